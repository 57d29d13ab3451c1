"""Advice on continuing from a base: by its runs, by laws for a limit on the general loss, or by the papers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from typer.testing import CliRunner

from spt_fast.advice.advise import advise
from spt_fast.advice.bases import BaseAdvice, BaseArm, advise_base, of_bases
from spt_fast.advice.result import Advice
from spt_fast.cli import app
from spt_fast.config import Phase, recipe_from
from spt_fast.errors import CheckpointError, DataError, RecipeError
from spt_fast.fields import parse_yaml
from spt_fast.model.flops import parameters
from spt_fast.model.gpt import GPT, GPTConfig
from spt_fast.printing import as_json
from spt_fast.report.page import report
from spt_fast.study.runs_table import COLUMNS, read_table, save_table
from spt_fast.study.usable import usable
from tests.study.synthetic import dcpt_table

M = 10**6
ARMS = {  # (replay, anchor): domain and general loss; 2.0 and 3.0 before
    (0.0, 0.0): (1.80, 3.30),
    (0.01, 0.0): (1.80, 3.10),
    (0.05, 0.0): (1.84, 3.02),
    (0.01, 1.0): (1.85, 3.01),
}


def row(replay: float, anchor: float, losses: tuple[float, float], **more: Any) -> dict[str, Any]:
    domain, general = losses
    values = {
        **{"stage": 1, "status": "done", "after": "", "start": "pretrained", "params": 135 * M, "seed": 0, "lr": 3e-5},
        **{"run": f"r{replay}-{anchor}", "phase": "continue", "anchor": anchor, "tokens": 10 * M, "delta": 1 - replay},
        **{"injected": replay, "domain_tokens": 3 * M, "epochs": (1 - replay) * 10 / 3, "handed_on": True},
        **{"domain_heldout": domain, "general_heldout": general, "domain_select": domain, "base": "SmolLM2-135M"},
        **{"domain_before": 2.0, "general_before": 3.0, "tokenizer": "t", "heldout": "h", "average": 0.0},
        **{"sequences": 4, "window": 512},
    }
    return {**dict.fromkeys(COLUMNS, np.nan), **values, **more}


def table_of(*bases: str) -> pd.DataFrame:
    rows = [
        row(
            replay,
            anchor,
            (domain + 0.004 * seed, general),
            seed=seed,
            run=f"{base}-{replay}-{anchor}-{seed}",
            base=base,
        )
        for base in bases
        for (replay, anchor), (domain, general) in ARMS.items()
        for seed in (0, 1)
    ]
    return pd.DataFrame(rows)


def test_a_question_outside_the_runs_of_a_base_is_answered_with_the_factors() -> None:
    table = table_of("SmolLM2-135M")
    near, far = (
        advise_base(domain_tokens=size, budget=budget, model=model, table=table).missing
        for size, budget, model in ((3 * M, 12 * M, None), (3000 * M, 20_000 * M, "1b"))
    )
    assert not near
    assert far == [
        "the question is outside these runs, so losses and the best arm may differ; run the best arms nearer to it: "
        "2,000× in tokens, 1,000× in domain tokens, 7.61× in parameters, 1.98× in epochs"
    ]


def test_runs_of_one_seed_with_several_lengths_count_as_one_seed() -> None:
    table = table_of("SmolLM2-135M").query("seed == 0")
    other = table["injected"].eq(0.05)
    longer = table[~other].assign(tokens=20 * M, run=table["run"] + "-longer")
    table = pd.concat([table.assign(tokens=table["tokens"].where(~other, 40 * M)), longer])
    advice = advise_base(domain_tokens=3 * M, budget=20 * M, table=table)
    assert {arm.tokens: arm.seeds for arm in advice.arms} == {20 * M: 1, 40 * M: 1}
    assert "with one seed it is unknown how much of the differences is chance" in advice.missing


def test_the_arm_with_the_lowest_general_loss_at_no_cost_in_the_domain_is_advised() -> None:
    table = table_of("SmolLM2-135M")
    assert of_bases(usable(table))
    advice = advise_base(domain_tokens=3 * M, budget=20 * M, table=table)
    decided = advice.decision
    assert (decided.replay, decided.delta, decided.anchor, decided.average) == (0.01, 0.99, 0.0, 0.0)
    assert (decided.basis, decided.epochs) == ("seen", pytest.approx(0.99 * 20 / 3))
    assert [arm.replay for arm in advice.arms] == [0.0, 0.01, 0.05, 0.01]
    assert all(isinstance(arm, BaseArm) and arm.seeds == 2 for arm in advice.arms)
    assert "data is open (SmolLM2, OLMo 2, Pythia)" in advice.general_text
    recipe = recipe_from(parse_yaml(advice.recipe, "recipe"))
    assert (recipe.init, recipe.phases[0].tokens, str(recipe.phases[0].mixture["general"])) == (
        "SmolLM2-135M",
        20 * M,
        "1/100",
    )
    assert recipe.phases[0].optimizer.lr == 3e-5
    assert (recipe.phases[0].batch.sequences, recipe.phases[0].batch.context) == (4, 512)


def test_a_table_of_runs_from_a_base_gets_advice_on_the_base_from_call_command_and_report(tmp_path: Path) -> None:
    table = table_of("SmolLM2-135M")
    asked: dict[str, Any] = {"domain_tokens": 3 * M, "budget": 20 * M}
    given = advise(**asked, table=table)
    assert given == advise_base(**asked, table=table)
    assert isinstance(advise(**asked, base=None, table=pd.concat([table, table.assign(base=None, stage=0)])), Advice)
    save_table(table, tmp_path)
    flags = ["--domain-tokens", "3M", "--budget", "20M", "--runs", str(tmp_path), "--json"]
    assert json.loads(CliRunner().invoke(app, ["advise", *flags]).stdout) == as_json(given)
    with pytest.raises(RecipeError, match=r"^inference_tokens: the finetuner's tax is computed for pretraining only"):
        advise(**asked, table=table, inference_tokens=M)
    report([tmp_path], tmp_path / "page.html")
    assert "Continue with 99% of domain and 1% of general text." in (tmp_path / "page.html").read_text()


def test_the_recipe_has_a_default_window_that_fits_the_context_of_the_base(tmp_path: Path) -> None:
    old = table_of("a").drop(columns=["sequences", "window"])
    save_table(old, tmp_path)
    advice = advise(domain_tokens=3 * M, budget=M, table=read_table([tmp_path]))
    (batch,) = (phase.batch for phase in _recipe(advice))
    assert (batch.sequences, batch.context) == (2, 2048)
    assert advice.recipe.startswith("# the batch of the runs, which the learning rate belongs to, is not recorded")
    GPT(GPTConfig(layers=1, width=16, heads=2, kv_heads=1, ffn=32, context=64, vocab_size=64)).save_hf(tmp_path / "b")
    for table, sequences, says in (
        (None, 16, "# the batch is a default: tune the learning rates"),
        (table_of("a"), 32, "# the runs' 4 windows of 512 tokens a step are 32 windows of 64 tokens here,"),
    ):
        given = advise(domain_tokens=3 * M, budget=M, table=table, base=str(tmp_path / "b"))
        (phase,) = _recipe(given)
        assert (phase.batch.sequences, phase.batch.context) == (sequences, 64)
        assert given.recipe.startswith(says)
        assert "  tokens: 1M\n" in given.recipe
    with pytest.raises(CheckpointError, match=r"^absent: is not a folder"):
        advise(domain_tokens=3 * M, budget=M, base="absent")


def _recipe(advice: Advice | BaseAdvice) -> tuple[Phase, ...]:
    return recipe_from(parse_yaml(advice.recipe, "recipe")).phases


def test_with_a_limit_the_lowest_domain_loss_within_it_is_advised_or_else_the_lowest_general_loss() -> None:
    table = table_of("a")
    limited = advise_base(domain_tokens=3 * M, budget=20 * M, table=table, max_general_rise=0.01)
    assert (limited.decision.replay, limited.decision.anchor) == (0.05, 0.0)
    none = advise_base(domain_tokens=3 * M, budget=20 * M, table=table, max_general_rise=0.001)
    assert (none.decision.replay, none.decision.anchor) == (0.01, 1.0)
    assert "since no arm ends at" in none.decision.says


def test_a_limit_needs_general_losses_and_no_loss_is_called_nan() -> None:
    table, asked = table_of("a"), {"domain_tokens": 3 * M, "budget": 20 * M}
    of_general = ["general_heldout", "general_before"]
    for missing, says, refused in (
        (
            of_general,
            "the lowest domain loss; the general loss was not measured; domain loss 1.8020",
            "; set `heldout`",
        ),
        (
            of_general[1:],
            "the lowest general loss of the arms that end within 1% of",
            " before the finetune, from which",
        ),
    ):
        unmeasured = table.assign(**dict.fromkeys(missing, np.nan))
        told = advise_base(**asked, table=unmeasured).decision.says
        assert says in told
        assert "nan" not in told
        with pytest.raises(DataError, match=f"max_general_rise: these runs have no general losses{refused}"):
            advise_base(**asked, table=unmeasured, max_general_rise=0.03)


def test_advice_uses_the_runs_and_averages_of_the_base_asked_for() -> None:
    table = table_of("a", "b")
    averaged = [row(0.01, 0.0, (1.80, 3.0), seed=seed, run=f"avg-{seed}", base="b", average=0.1) for seed in (0, 1)]
    averaged = [of_run | {"window": 256} for of_run in averaged]
    both = pd.concat([table, pd.DataFrame(averaged)], ignore_index=True)
    assert (
        "the answer is for a; for b, name it as `init`"
        in advise_base(domain_tokens=3 * M, budget=10 * M, table=both).missing
    )
    for base, average, window in (("b", 0.1, 256), ("a", 0.0, 512)):
        given = advise_base(domain_tokens=3 * M, budget=M, table=both, base=base)
        assert (given.decision.average, _recipe(given)[0].batch.context) == (average, window)
        assert not any("the answer is for" in note for note in given.missing)


def test_the_best_learning_rate_is_chosen_for_each_base() -> None:
    """Two bases of one size with different best rates."""
    rows = [
        row(0.0, 0.0, (1.8 + 0.1 * (lr != best), 3.0), lr=lr, run=f"{base}-{lr}", base=base)
        for base, best in (("a", 1e-5), ("b", 1e-4))
        for lr in (1e-5, 1e-4)
    ]
    kept = usable(pd.DataFrame(rows)).rows
    assert dict(zip(kept["base"], kept["lr"], strict=True)) == {"a": 1e-5, "b": 1e-4}


def test_with_a_limit_the_d_cpt_laws_choose_the_share() -> None:
    table = dcpt_table().assign(base="a")
    corpus, asked = int(table["domain_tokens"].iloc[0]), {"budget": 20_000 * M, "model": 200 * M}
    shares = [
        advise_base(domain_tokens=corpus, table=table, max_general_rise=rise, **asked).decision for rise in (0.03, 0.1)
    ]
    assert {decided.basis for decided in shares} == {"laws"}
    assert 0 < shares[0].delta < shares[1].delta <= 1
    worse = table[table["params"] == 200 * M]
    worse = worse.assign(base="b", run="b " + worse["run"], general_heldout=1.2 * worse["general_heldout"])
    both = pd.concat([table, worse], ignore_index=True)
    of_one = advise_base(domain_tokens=corpus, table=both, max_general_rise=0.03, base="a", **asked).decision
    assert of_one.delta == shares[0].delta, "the runs of another base of this size say nothing about this one"


def test_the_d_cpt_laws_of_plain_runs_do_not_choose_the_share_of_an_anchored_arm() -> None:
    table = dcpt_table().assign(base="a")
    anchored = table[(table["delta"] == 1.0) & (table["params"] == 200 * M)].assign(run="anchored", anchor=1.0)
    anchored["general_heldout"] = anchored["general_before"] = 2.6
    asked: dict[str, Any] = {"domain_tokens": int(table["domain_tokens"].iloc[0]), "budget": 20_000 * M}
    asked |= {"model": 200 * M, "max_general_rise": 0.03}
    plain, both = (advise_base(table=t, **asked).decision for t in (table, pd.concat([table, anchored])))
    assert (plain.basis, plain.anchor) == ("laws", 0.0)
    assert (both.basis, both.anchor, both.delta) == ("seen", 1.0, 1.0)


def test_an_arm_with_one_lucky_seed_is_not_said_to_end_near_the_lowest_domain_loss() -> None:
    table = table_of("a")
    lucky = (table["injected"] == 0.05) & (table["seed"] == 0)
    table.loc[lucky, "domain_heldout"] = 1.70
    table.loc[(table["injected"] == 0.05) & (table["seed"] == 1), "domain_heldout"] = 2.0
    given = advise_base(domain_tokens=3 * M, budget=20 * M, table=table)
    assert given.decision.replay == 0.05
    assert "or have a seed that ends no higher than all seeds of the arm with the lowest" in given.decision.says


def test_the_command_advises_on_a_base_with_and_without_runs(tmp_path: Path) -> None:
    config = GPTConfig(layers=1, width=16, heads=2, kv_heads=1, ffn=32, context=64, vocab_size=64)
    GPT(config).save_hf(tmp_path / "base")
    asked = ["advise", "--domain-tokens", "3M", "--budget", "20M"]
    papers = CliRunner().invoke(app, [*asked, "--init", str(tmp_path / "base"), "--json"])
    advice = json.loads(papers.stdout)
    assert advice["asked"]["params"] == parameters(config)
    assert (advice["decision"]["replay"], advice["decision"]["basis"]) == (0.01, "published")
    limited = CliRunner().invoke(app, [*asked, "--init", str(tmp_path / "base"), "--max-general-rise", "3%"])
    assert "max_general_rise is not used" in limited.stdout
    save_table(table_of("SmolLM2-135M"), tmp_path)
    said = CliRunner().invoke(app, [*asked, "--runs", str(tmp_path)])
    assert said.exit_code == 0, said.output
    assert "continue with 99% of domain and 1% of general text" in said.stdout
    with pytest.raises(RecipeError, match="budget"):
        advise_base(domain_tokens=3 * M, budget=0)
