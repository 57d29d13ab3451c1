"""The report in a real browser, and its text for tables with a known answer."""

from __future__ import annotations

import base64
import json
import re
import sys
from collections.abc import Iterator
from dataclasses import replace
from html.parser import HTMLParser
from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from markupsafe import escape

from spt_fast import cli, laws
from spt_fast.advice.advise import advise
from spt_fast.advice.bases import advise_base
from spt_fast.advice.result import Advice
from spt_fast.errors import DataError
from spt_fast.report import panels, sections
from spt_fast.report.decision import compared, decide
from spt_fast.report.page import page, report
from spt_fast.report.sections import pretraining
from spt_fast.report.tables import provenance
from spt_fast.study import views
from spt_fast.study.compare import Finetune
from spt_fast.study.crossover import crossovers
from spt_fast.study.curves import Curve, curves_of
from spt_fast.study.finetunes import Sizes, Treatment, after_pretraining
from spt_fast.study.fits import Fitted, Score, fit
from spt_fast.study.runs_table import save_table
from spt_fast.study.usable import usable
from tests.report.browser import NAMES, Browser, installed
from tests.study.synthetic import dcpt_table, spt_table
from tests.study.test_crossover import TRUTH, rows_of

in_a_browser = pytest.mark.skipif(installed() is None, reason=f"no Chromium here: none of {', '.join(NAMES)}")
EVIL = "<img src=x onerror='pwned = 1'> & <b>\"5%\"</b>"


def small_table() -> pd.DataFrame:
    """SPT with two seeds, two arms with replay, and two runs that failed, with names that need escaping."""
    budgets = (20_000_000_000, 50_000_000_000, 100_000_000_000, 200_000_000_000)
    table = spt_table(deltas=(0.0, 0.01, 0.02, 0.05), budgets=budgets)
    replayed = spt_table(deltas=(0.0, 0.02), budgets=budgets[-1:], injected=(0.01, 0.1), anchors=(0.0, 0.1), seed=5)
    failed = table.iloc[:2].assign(run=[EVIL, "diverged"], status="failed", handed_on=False)
    numbers = failed.columns[[dtype.kind == "f" for dtype in failed.dtypes]]
    failed[numbers] = np.nan
    table = pd.concat([table, replayed[replayed["stage"] > 0], failed], ignore_index=True)
    return table.assign(phase=table["phase"].replace("finetune", f"finetune {EVIL}"))


def reported(table: pd.DataFrame, folder: Path, *options: str) -> Path:
    """The page that the command writes for a study of this table."""
    save_table(table, folder)
    out = folder / "out" / "report.html"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["spt-fast", "report", str(folder), "--out", str(out), *options])
        with pytest.raises(SystemExit) as exit_:
            cli.main()
        assert not exit_.value.code
    return out


def trained(study: Path, table: pd.DataFrame) -> None:
    """Write folders for six of the table's runs with the files that the report reads, and one damaged folder."""
    for name, phase in [*dict.fromkeys(zip(table["run"], table["phase"], strict=True))][:6]:
        folder = study / "runs" / name
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "summary.json").write_text(json.dumps({"status": "done", "phases": {phase: {"arm": 1}}}))
        with (folder / "metrics.jsonl").open("a") as file:
            for arm, step in product((0, 1), range(1, 400)):
                where = {"kind": "train", "phase": phase, "arm": arm, "step": step, "tokens": 1000 * step}
                figures = {"loss": 5 / step**0.1 + 10 * (arm == 0), "lr": 1e-3, "tokens_per_s": 9e4}
                norm = {"grad_norm": 0.3 + 3 / step if step > 9 else None}
                file.write(json.dumps(where | figures | norm) + "\n")
    damaged = study / "runs" / "damaged"
    damaged.mkdir()
    (damaged / "metrics.jsonl").write_text("{")


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, table = tmp_path_factory.mktemp("study"), small_table()
    trained(folder, table[table["run"].str.match("[a-z]")])
    return reported(table, folder)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with Browser(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


# ------------------------------------------------------------------------------------------------ in the browser


@in_a_browser
def test_the_page_loads_without_errors_and_requests_nothing(written: Path, browser: Browser) -> None:
    browser.open(written)
    assert browser.errors() == []
    assert browser.requested() == [written.as_uri()]
    assert browser.evaluate("typeof pwned") == "undefined"
    assert browser.evaluate("document.querySelectorAll('img, link, iframe, b').length") == 0
    refused = browser.evaluate(
        """new Promise((resolve) => {
            document.addEventListener("securitypolicyviolation", (event) => resolve(event.blockedURI));
            setTimeout(() => resolve(null), 5000);
            document.body.append(Object.assign(new Image(), {src: "https://example.org/pixel.png"}));
        })"""
    )
    assert refused == "https://example.org/pixel.png"


@in_a_browser
@pytest.mark.parametrize("width", [1440, 820, 390])
def test_figures_are_visible_and_nothing_overflows(written: Path, browser: Browser, width: int) -> None:
    browser.open(written, width=width, dark=width == 820)
    assert browser.evaluate("document.documentElement.scrollWidth") == width
    figures = browser.evaluate(
        """[...document.querySelectorAll("figure svg")].map((svg) => {
            const box = svg.getBoundingClientRect();
            const texts = [...svg.querySelectorAll("text")].map((text) => text.getBoundingClientRect());
            return {
                width: box.width,
                height: box.height,
                says: svg.ariaLabel,
                drawn: svg.querySelectorAll("path, use").length,
                letters: Math.min(...texts.map((text) => text.height)),
                outside: texts.filter((text) => text.left < box.left - 1 || text.right > box.right + 1).length,
            };
        })"""
    )
    assert len(figures) == 16  # after finetuning, 3 of laws, forgetting, the plane, 2 of pretraining, 8 of steps
    for figure in figures:
        assert min(width - 33, 340) <= figure["width"] <= 600
        assert figure["height"] > 100
        assert figure["drawn"] > 20
        assert figure["letters"] > 9
        assert figure["outside"] == 0
        assert len(figure["says"]) > 30
    assert browser.evaluate("document.querySelectorAll('figure > figcaption').length") == browser.evaluate(
        "document.querySelectorAll('figure').length"
    )
    tables = browser.evaluate(
        """[...document.querySelectorAll("table")].map((table) => {
            const box = table.closest(".scroll");
            const says = getComputedStyle(box, "::before").content;
            return [box.scrollWidth > box.clientWidth + 1, says.includes("goes on to the right")];
        })"""
    )
    assert all(cut == said for cut, said in tables)
    assert any(cut for cut, _ in tables)
    clipped = """[...document.querySelectorAll("main *:not(svg *)")].filter((each) => {
        const outside = each.getBoundingClientRect().right > innerWidth + 1 && !each.closest(".scroll, pre");
        return outside || (getComputedStyle(each).overflowX === "hidden" && each.scrollWidth > each.clientWidth + 1);
    }).map((each) => each.outerHTML.slice(0, 80))"""
    assert browser.evaluate(clipped) == []


@in_a_browser
def test_a_printed_page_is_light_complete_and_within_its_margins(written: Path, browser: Browser) -> None:
    browser.open(written, width=1000, dark=True)
    pdf = base64.b64decode(browser.call("Page.printToPDF", preferCSSPageSize=True)["data"])
    assert 5 < len(re.findall(rb"/Type /Page\b", pdf)) < 40
    assert browser.evaluate("[...document.querySelectorAll('details')].every((each) => each.open)")
    browser.call("Emulation.setEmulatedMedia", media="print", features=[])
    assert browser.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    beyond = """[...document.querySelectorAll("table, figure, dl")]
        .filter((each) => each.getBoundingClientRect().right > innerWidth + 1).map((each) => each.className)"""
    assert browser.evaluate(beyond) == []


@in_a_browser
def test_the_table_of_runs_sorts_on_click(written: Path, browser: Browser) -> None:
    browser.open(written)

    def clicked(heading: str) -> list[str]:
        """The texts of a column after a click on its heading."""
        return browser.evaluate(
            f"""(() => {{
                const headings = [...document.querySelectorAll(".sortable th")];
                const column = headings.findIndex((each) => each.textContent === "{heading}");
                headings[column].querySelector("button").click();
                return [...document.querySelectorAll(".sortable tbody tr")].map((row) => row.cells[column].textContent);
            }})()"""
        )

    losses = clicked("domain")
    numbers = [float(loss) for loss in losses if loss]
    assert len(numbers) > 40
    assert numbers == sorted(numbers)
    assert losses[-2:] == ["", ""]  # of the failed runs
    losses = clicked("domain")
    assert [float(loss) for loss in losses[:-2]] == sorted(numbers, reverse=True)
    assert losses[-2:] == ["", ""]
    assert browser.evaluate("document.querySelectorAll('[aria-sort]').length") == 1
    assert clicked("pretrain tokens")[:2] == ["20B", "20B"]  # by number, not by text
    statuses = clicked("status")
    assert statuses == sorted(statuses)
    assert browser.evaluate("[...document.querySelectorAll('tr.failed')].map((row) => row.cells[2].textContent)") == [
        "failed",
        "failed",
    ]
    assert browser.evaluate("getComputedStyle(document.querySelector('.sortable td.number')).textAlign") == "right"


@in_a_browser
def test_in_dark_mode_figures_have_light_ink(written: Path, browser: Browser) -> None:
    seen = {}
    for dark in (False, True):
        browser.open(written, dark=dark)
        seen[dark] = browser.evaluate(
            """[getComputedStyle(document.body).backgroundColor,
                getComputedStyle(document.querySelector("figure svg text")).fill]"""
        )
        brightness = browser.evaluate(
            """[...document.querySelectorAll("figure svg path")].map((path) => getComputedStyle(path).stroke)
                .filter((colour) => colour.startsWith("rgb("))
                .map((colour) => Math.max(...colour.match(/[0-9]+/g).map(Number)))"""
        )
        assert len(brightness) > 100
        assert not dark or min(brightness) > 40, "dark ink on a dark background"
    assert seen == {False: ["rgb(255, 255, 255)", "rgb(28, 32, 36)"], True: ["rgb(21, 24, 27)", "rgb(228, 231, 234)"]}


# ------------------------------------------------------------------------------------------------ without a browser


class Text(HTMLParser):
    """The text of a page's main part, and all attributes."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.text, self.attributes, self._within = "", list[tuple[str, str]](), False
        self.feed(html)
        self.text = re.sub(r"\s+", " ", self.text)

    def handle_data(self, data: str) -> None:
        self.text += data * self._within

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._within |= tag == "main"
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        self._within &= tag != "main"


def test_the_page_is_self_contained(written: Path) -> None:
    html = written.read_text()
    assert len(html) < 2_000_000
    assert "http" not in re.sub(r"http-equiv|https?://example", "", html)
    read = Text(html)
    references = [value for name, value in read.attributes if name in ("src", "href", "xlink:href", "action", "data")]
    assert references
    assert all(value.startswith("#") for value in references)
    ids = [value for name, value in read.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    assert {value.removeprefix("#") for value in references} <= set(ids)
    assert EVIL in read.text
    assert f"finetune {EVIL}" in read.text


def test_figures_use_the_pages_colours_and_tables_are_scrollable(written: Path) -> None:
    """The part of the browser tests that the page's source suffices for."""
    html = written.read_text()
    pictures = re.findall(r"<svg.*?</svg>", html, re.DOTALL)
    assert len(pictures) == 16
    for picture in pictures:
        assert picture.startswith('<svg role="img" aria-label="')
        assert 'viewBox="0 0' in picture
        assert re.findall(r"#[0-9a-f]{3,8}\b(?!-)", re.sub(r'(url\(|href=")#[^")]+', "", picture)) == []
    used = set(re.findall(r"var\((--[\w-]+)\)", "".join(pictures)))
    style = re.search(r"<style>(.*?)</style>", html, re.DOTALL)
    assert style
    light, dark = re.findall(r":root \{(.*?)\}", style[1], re.DOTALL)
    assert used >= {"--paper", "--ink", "--hue-1", "--npt"}
    assert used <= set(re.findall(r"(--[\w-]+):", light)) & set(re.findall(r"(--[\w-]+):", dark))
    assert len(re.findall("<table", html)) == len(re.findall(r'<div class="scroll( tall)?"[^>]*>\s*<table', html))


def test_every_abbreviation_of_the_page_is_explained_on_it(written: Path) -> None:
    html = written.read_text()
    terms = html.split('<section id="terms">')[1].split("</section>")[0]
    said = Text(html).text
    for term in (
        "NPT",
        "SPT",
        "FT",
        "R_gain",
        "δ, share",
        "epochs",
        "R², error",
        "replay",
        "anchor",
        "K, M, B, T",
        "lr",
    ):
        assert f"<dt>{term}</dt>" in terms
    assert "<dt>SCPT</dt>" not in terms, "the page has none"
    assert {*re.findall(r"\b(?:[A-Z]-?){3,}\b", said)} <= {*re.findall(r"\w+", terms), "D-CPT", "FLOPs", "X"}
    captions = " ".join(re.findall("<figcaption>(.*?)</figcaption>", html))
    assert "from pale (the smallest) to strong" in captions
    assert "Pale lines are not part of the result" in captions


def test_training_steps_are_drawn_for_the_kept_arm(written: Path) -> None:
    training = written.read_text().split('<section id="training">')[1].split("</section>")[0]
    for title in ("Training loss", "Learning rate", "Gradient norm", "Throughput"):
        assert f"<h3>Pretraining · {title}</h3>" in training
    ticks = re.search(r"Pretraining · Training loss.*?</svg>", training, re.DOTALL)
    assert ticks
    numbers = [float(text) for text in re.findall(r">([0-9]\.[0-9]+)</text>", ticks[0])]
    assert numbers
    assert max(numbers) < 6, "the other arm's losses are above 10"
    rows = small_table().query("status == 'done'")
    at = rows.iloc[0]
    loss = {"loss": np.ones(2)} | dict.fromkeys(("lr", "grad_norm", "tokens_per_s"), np.full(2, np.nan))
    (figure,) = sections.training([Curve(at["run"], at["phase"], np.ones(2), loss, 4)], rows).figures
    assert [panel.title for panel in figure.panels] == ["Pretraining · Training loss"]


def test_the_phases_of_a_pretraining_run_are_drawn_as_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run with several budgets has a phase for each; the second begins where the first ended."""
    drawn = {}
    monkeypatch.setattr(panels, "steps_of_runs", lambda axes, curves, of, colours: drawn.update({of: curves}))
    rows = small_table().query("status == 'done' and stage == 0").iloc[:2].assign(run="r", phase=["p-20B", "p-50B"])
    figures = {name: np.array([3.0, 2.0]) for name in ("loss", "lr", "grad_norm", "tokens_per_s")}
    pieces = [Curve("r", phase, np.array([4.0, 8.0]), figures, 10) for phase in rows["phase"]]
    assert len(sections.training(pieces, rows).figures) == 1
    ((_, curve),) = drawn["loss"]
    assert curve.tokens.tolist() == [4, 8, 14, 18]
    assert curve.figures["loss"].tolist() == [3, 2, 3, 2]


def test_a_curve_ends_where_its_phase_stopped_early(tmp_path: Path) -> None:
    phase = {"arm": 0, "tokens": 12}
    (tmp_path / "summary.json").write_text(json.dumps({"status": "done", "phases": {"p": phase}}))
    step = {"kind": "train", "phase": "p", "arm": 0, "tokens": 10}
    step |= dict.fromkeys(("loss", "lr", "grad_norm", "tokens_per_s"), 1.0)
    (tmp_path / "metrics.jsonl").write_text(json.dumps(step))
    (curve,) = curves_of([tmp_path])
    assert (curve.tokens.tolist(), curve.trained) == ([10], 12)


def test_the_answer_comes_first(written: Path) -> None:
    said = Text(written.read_text()).text
    assert said.strip().startswith("Give the domain 2% of the pretraining tokens.")
    assert said.index("Certainty") < said.index("What the runs show") < said.index("Provenance")
    assert "56 done, 2 failed" in said  # 8 of pretraining, 4 finetunes from each, 16 more with replay or anchor
    assert "4f5ca1b2" in said
    assert "90e3dd11" in said
    table = small_table().query("status == 'done'")
    pretrained, finetuned = (table[table["stage"] == stage].groupby("run")["tokens"].max().sum() for stage in (0, 1))
    assert f"TrainingFLOPs,keptarms{6 * table['params'].max() * (pretrained + finetuned):.3g}" in said.replace(" ", "")


def finetune(delta: float, seed: int, after: float, replay: float = 0.0, **other: float) -> Finetune:
    figures = {"domain_epochs": 1.0, "domain_before": 3.0, "domain_after": after, "domain_select": after}
    figures |= {"general_before": 2.0, "general_after": 2.5}
    return Finetune(
        name="",
        folder="",
        treatment=Treatment(delta, replay, 0.0),
        seed=seed,
        tokens=1000,
        paths=[[(0, 3.0, 2.0), (1, after, 2.5)]],
        **figures | other,
    )


def test_a_share_that_is_better_at_every_seed_is_recommended() -> None:
    rows = [finetune(d, s, loss + 0.01 * s) for d, loss in ((0.0, 2.0), (0.02, 1.8), (0.05, 1.9)) for s in (0, 1)]
    decision = decide(Sizes(10, 20), rows)
    assert decision is not None
    assert (decision.best.delta, decision.headline) == (0.02, "Give the domain 2% of the pretraining tokens.")
    assert "0.200 lower, more than the spread between 2 seeds (0.010)" in decision.sure[0]
    assert decision.sure[1] == "Every other share that was run is worse by more than the spread between seeds."
    assert decision.costs[0] == "Before finetuning the general loss is 2.000, +0.000 against NPT."
    assert [arm.best for arm in decision.arms] == [False, True, False]
    assert decision.arms[1].cells[3] == "1.805 ± 0.005"


def test_a_difference_that_may_be_chance_is_not_given_as_the_answer() -> None:
    rows = [finetune(0.0, 0, 2.0), finetune(0.0, 1, 2.2), finetune(0.02, 0, 1.95), finetune(0.02, 1, 2.1)]
    decision = decide(Sizes(10, 20), rows)
    assert decision is not None
    assert decision.headline == "A domain share of 2% is best so far, but that may be chance."
    assert "It was chosen on the select half of the held-out text; the losses are on the report half." in decision.sure
    assert decision.sure[-1] == "It is the largest share that was run: a larger one may be better."


def test_the_best_is_chosen_on_the_select_half() -> None:
    rows = [
        finetune(0.0, 0, 2.0),
        finetune(0.02, 0, 1.8, domain_select=1.9),
        finetune(0.05, 0, 1.85, domain_select=1.7),
    ]
    decision = decide(Sizes(10, 20), rows)
    assert decision is not None
    assert decision.best.delta == 0.05


def test_halves_that_disagree_give_no_decision_and_a_missing_select_half_is_reported() -> None:
    runs = [
        *(finetune(0.0, seed, 2.0 + 0.01 * seed, domain_select=2.0) for seed in (0, 1)),
        *(finetune(0.05, seed, 2.3 + 0.01 * seed, domain_select=1.9) for seed in (0, 1)),
    ]
    decision = decide(Sizes(1, 2), runs)
    assert decision is not None
    assert decision.headline == "No decision: 5% is best on the select half, but NPT on the report half."
    unknown = decide(Sizes(1, 2), [replace(run, domain_select=float("nan")) for run in runs])
    assert unknown is not None
    assert unknown.best.delta == 0
    assert "It was chosen by the losses that are shown, so its gain may be overestimated." in unknown.sure


def test_arms_with_replay_are_shown_but_the_share_is_chosen_among_those_without() -> None:
    rows = [finetune(0.0, 0, 2.0), finetune(0.02, 0, 1.9), finetune(0.0, 0, 1.8, replay=0.1, general_after=2.1)]
    decision = decide(Sizes(10, 20), rows)
    assert decision is not None
    assert decision.best == Treatment(0.02, 0.0, 0.0)
    assert [arm.cells[0] for arm in decision.arms] == ["NPT", "NPT, 10% replay", "SPT 2%"]


def test_if_no_share_beats_npt_the_answer_is_finetuning_only() -> None:
    rows = [finetune(d, s, loss) for d, loss in ((0.0, 2.0), (0.02, 2.1)) for s in (0, 1)]
    decision = decide(Sizes(10, 20), rows)
    assert decision is not None
    assert decision.headline == "No share beats NPT: use domain data in the finetune only."
    assert decision.costs == []


def test_shares_are_compared_over_the_seeds_that_all_of_them_have() -> None:
    """As while a study is being trained: only NPT has the harder seed 1."""
    rows = [finetune(delta, seed, loss) for delta, seed, loss in ((0.0, 0, 2.0), (0.0, 1, 2.4), (0.02, 0, 2.1))]
    decision = decide(Sizes(10, 20), rows)
    assert decision is not None
    assert decision.headline == "No share beats NPT: use domain data in the finetune only."


@pytest.mark.filterwarnings("ignore::spt_fast.laws.LawWarning")
def test_continual_pretraining_is_decided_by_the_dcpt_law() -> None:
    table = dcpt_table(params=(1_000_000_000,), evaluations=8)
    fits = []
    for of in ("domain", "general"):
        ((group, rows),) = views.dcpt(usable(table), of=of)
        law = laws.DCPTLaw().fit(rows)
        fits.append(Fitted(f"dcpt-{of}", group, rows, law=law, score=Score(**law.score(rows))))
    said = Text(page(table, fits, None)).text
    share = laws.best_ratio(domain=fits[0].law, general=fits[1].law, params=1e9, tokens=2e10, max_general_rise=0.03)
    assert f"Give the domain {100 * share:.3g}% of the tokens." in said
    assert "The runs' domain corpus of 20B tokens is then read 0." in said
    given = advise_base(domain_tokens=10**9, budget=4 * 10**10, table=table.assign(base="a"))
    said = Text(page(table, fits, given)).text
    share = laws.best_ratio(domain=fits[0].law, general=fits[1].law, params=1e9, tokens=4e10, max_general_rise=0.03)
    assert f"Give the domain {100 * share:.3g}% of the tokens." in said
    assert "For 1B parameters and 40B tokens of continual pretraining, by the D-CPT law." in said
    assert "DCPTLaw extrapolates: tokens = 4e+10 is outside" in said
    assert f"yours of 1B {40 * share:.3g} times." in said
    said = Text(page(table, [], None)).text
    assert "No finetunes after pretraining at two shares or more." in said
    assert "No training steps to draw: they are read from the folders of runs or of a study." in said
    assert "No run here was pretrained from scratch." in said


def test_the_page_reports_that_runs_do_not_decide_and_what_laws_lack() -> None:
    table = spt_table(deltas=(0.0, 0.02), budgets=(20_000_000_000,))
    missing = Fitted("overfitting", {}, pd.DataFrame(), "it takes <four> shares")
    said = Text(page(table[table["stage"] == 0], [missing], None)).text
    assert "These runs do not decide the pretraining mixture yet." in said
    assert "No overfitting law: it takes <four> shares." in said
    assert "Held-out general loss" not in said  # the text for screen readers is not part of the page's text


def test_advice_can_be_requested_for_a_size_and_budget_that_were_not_run(tmp_path: Path) -> None:
    table = spt_table(deltas=(0.0, 0.02), budgets=(20_000_000_000,))
    asked = ("--domain-tokens", "100M", "--budget", "40B", "--model", "1b")
    said = Text(reported(table[table["stage"] == 0], tmp_path, *asked).read_text()).text
    assert "Give the domain" in said
    assert "domain data in all of 40B tokens" in said
    assert "Not supported by runs" in said
    assert "model: {preset: 1b}" in said


def test_advice_with_two_possible_regimes_is_shown_as_the_answer() -> None:
    given = advise(domain_tokens=30_000_000, budget=100_000_000_000)
    assert given.decision.regime == "SPT or SCPT"
    assert "of the pretraining tokens, from the start or late." in page(dcpt_table(), [], given)


def test_pretraining_without_domain_text_is_drawn_with_every_corpus() -> None:
    table = spt_table(deltas=(0.0, 0.02), budgets=(20_000_000_000,)).query("stage == 0")
    table["domain_tokens"] = table["domain_tokens"].where(table["delta"] > 0, 9e9)
    (figure,) = pretraining(table).figures
    assert [panel.title for panel in figure.panels] == ["Domain loss", "General loss"]
    assert all(">0%</text>" in panel.svg and ">2%</text>" in panel.svg for panel in figure.panels)


def test_the_crossover_is_a_section_if_the_runs_compare_starts() -> None:
    table = pd.DataFrame(rows_of(seeds=3, noise=0.05)).assign(epochs=4.0, injected=0.0, phase="finetune", after="")
    html = page(table, [], None)
    (found,) = crossovers(table)
    assert found.crossover == pytest.approx(TRUTH, rel=0.1)
    assert f"<p>{escape(found.says)}</p>" in html
    assert html.split('<section id="crossover">')[1].split("</section>")[0].count("<svg") == 2
    assert "To pretrain or not" not in page(spt_table(), [], None)


def test_the_page_and_fit_use_the_same_runs_for_the_crossover() -> None:
    """Each seed from scratch has another best rate; the arm uses the rate with the lowest mean."""
    table = pd.DataFrame(rows_of(seeds=2)).assign(epochs=4.0, injected=0.0, phase="finetune", after="")
    other = table[table["start"] == "scratch"].assign(lr=2e-3)
    by_seed = other["seed"].map({0: 0.97, 1: 1.01})
    losses = {name: other[name] * by_seed for name in ("domain_heldout", "domain_select")}
    table = pd.concat([table, other.assign(run=other["run"] + "-fast", **losses)], ignore_index=True)
    (found,) = fit(table).crossover
    assert f"<p>{escape(found.says)}</p>" in page(table, [], None)


def test_a_table_without_general_losses_still_makes_a_page() -> None:
    table = spt_table(deltas=(0.0, 0.02, 0.05), budgets=(20_000_000_000,))
    table[["general_train", "general_heldout", "general_select", "general_before"]] = np.nan
    said = Text(page(table, [], None)).text
    assert "These runs do not decide the pretraining mixture yet." in said
    assert "No finetune here has a general held-out loss before and after." in said
    assert "Lower is better." in said


def test_losses_that_are_not_numbers_are_left_out_of_the_page() -> None:
    table = spt_table(deltas=(0.0, 0.02, 0.05), budgets=(20_000_000_000,))
    within = table.index[(table["stage"] > 0) & ~table["handed_on"]]
    some_broken = table.copy()
    some_broken.loc[within[::2], "domain_heldout"] = np.nan
    said = Text(page(some_broken, [], None)).text
    assert f"domain_heldout is not a number: {len(within[::2])} evaluations" in said
    assert "Give the domain 5% of the pretraining tokens." in said
    nothing = table.assign(domain_train=np.nan, domain_heldout=np.nan, domain_select=np.nan, domain_before=np.nan)
    said = Text(page(nothing, [], None)).text
    assert "These runs do not decide the pretraining mixture yet." in said
    assert "No finetunes after pretraining at two shares or more." in said


def test_a_study_of_runs_whose_mixture_changes_late_makes_a_page_and_is_not_taken_for_one_of_bases(
    tmp_path: Path,
) -> None:
    """No law and no comparison uses these runs, so none is left of which something could be said."""
    table = spt_table(deltas=(0.001,), seeds=(0,), budgets=(100_000_000_000,))
    table.loc[(table["stage"] == 0) & (table["tokens"] < 90e9), "delta"] = 0.0
    assert usable(table).rows.empty
    save_table(table, tmp_path)
    report([tmp_path], tmp_path / "page.html")
    assert "share changes within a stage" in (tmp_path / "page.html").read_text()
    assert isinstance(advise(domain_tokens="300M", budget="100B", table=table), Advice)


def test_the_page_reports_the_text_behind_its_losses() -> None:
    table = spt_table()
    says = provenance(table, ["a"])
    assert says["Domain losses are on"] == "40 documents, 6,000 tokens, standard error up to 0.01 nats"
    finetunes = after_pretraining(usable(table).rows)
    decision = decide(Sizes(1, 2), compared(finetunes, table))
    assert decision is not None
    says = "losses are measured on the report half of the held-out text (domain 40 documents, 6,000 tokens, "
    assert any(says in sentence for sentence in decision.sure)
    unknown = provenance(table.assign(domain_error=np.nan, domain_documents=np.nan, domain_scored=np.nan), ["a"])
    assert unknown["Domain losses are on"] == "text that is not recorded"
    one = provenance(table.assign(domain_error=np.nan, domain_documents=1), ["a"])
    assert one["Domain losses are on"] == "1 document, 6,000 tokens, standard error unknown"


def test_a_table_without_a_finished_run_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    save_table(small_table().query("status == 'failed'"), tmp_path)
    monkeypatch.setattr(sys, "argv", ["spt-fast", "report", str(tmp_path), "--out", str(tmp_path / "report.html")])
    with pytest.raises(SystemExit) as exit_:
        cli.main()
    assert exit_.value.code == 2
    assert "none of them is finished" in capsys.readouterr().err
    assert not (tmp_path / "report.html").exists()


def test_mixed_tokenizers_are_refused() -> None:
    table = spt_table(deltas=(0.0, 0.02), budgets=(20_000_000_000,))
    with pytest.raises(DataError, match="tokenizer"):
        page(table.assign(tokenizer=np.where(table["seed"] == 0, "one", "other")), [], None)
