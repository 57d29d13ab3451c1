"""Questions put to weights, and what is kept of the answers."""

from __future__ import annotations

import dataclasses
import importlib
import json
import math
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tokenizers
import torch
import yaml

import spt_fast as spt
from spt_fast import evaluation
from spt_fast.cli import main
from spt_fast.data.base_tokenizer import BaseTokenizer
from spt_fast.data.hf_tokenizer import HFTokenizer
from spt_fast.data.tokenizer import EOS, Tokenizer, train_tokenizer
from spt_fast.errors import DataError, SptError, SptWarning
from spt_fast.evaluation import questions as own
from spt_fast.evaluation.likelihood import Pair, TextModel
from spt_fast.evaluation.results import Metric, results_of, standard_error
from spt_fast.evaluation.tasks import score_tasks
from spt_fast.model import hf
from spt_fast.model.config import GPTConfig
from spt_fast.model.gpt import GPT
from tests import tiny
from tests.train.test_identity import byte_tokenizer

CONTEXT = 64
TEXT = "Which gas do plants take in by day? oxygen carbon dioxide Answer: Question: acid base heat water salt. " * 20
QUESTIONS = [
    {"question": "Which gas do plants take in?", "choices": ["oxygen", "carbon dioxide", "salt"], "answer": 1},
    {"question": "Which is salt water?", "choices": ["acid", "base"], "answer": "B", "id": 7},
    {"question": "Heat?", "choices": ["water heat by day", "base"], "answer": "base"},
    {"question": "Which do plants take in by day?", "choices": ["acid", "heat", "salt water"], "answer": 2},
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    (folder / "text.txt").write_text(TEXT)
    return train_tokenizer(folder / "text.txt", 300, folder / "bpe.tiktoken")


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> Path:
    """A Hugging Face folder whose tokenizer lies with it, of a vocabulary that is padded."""
    folder = tmp_path_factory.mktemp("weights")
    config = GPTConfig(vocab_size=320, layers=2, width=32, heads=2, kv_heads=1, ffn=64, context=CONTEXT, qk_norm=True)
    model = GPT(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(8)  # far from uniform
    model.save_hf(folder, tokenizer)
    return folder


@pytest.fixture
def model(weights: Path, tokenizer: Tokenizer) -> TextModel:
    """In float32."""
    return TextModel(GPT.from_hf(weights), tokenizer)


def write(path: Path, lines: list[Any]) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines) + "\n")
    return path


def one_by_one(weights: Path, pair: Pair, context: int = CONTEXT) -> tuple[float, bool]:
    """The likelihood of a continuation without batches or padding."""
    row = torch.tensor([[*pair.context, *pair.continuation]])[:, -context - 1 :]
    with torch.no_grad():
        logits = GPT.from_hf(weights)(row[:, :-1])[0, -len(pair.continuation) :]
    of_target = logits.double().log_softmax(-1)[range(len(pair.continuation)), pair.continuation]
    return float(of_target.sum()), logits.argmax(-1).tolist() == pair.continuation


def test_likelihoods_are_those_of_each_text_alone(weights: Path, tokenizer: Tokenizer, model: TextModel) -> None:
    texts = [("Which gas", " do plants"), ("Heat? ", "water"), ("", "acid base"), ("salt " * 90, " heat")]
    pairs = [model.pair(*text) for text in texts]
    greedy = GPT.from_hf(weights).generate(pairs[0].context, 3, temperature=0)[-3:]
    pairs.append(Pair(pairs[0].context, greedy))
    expected = [one_by_one(weights, pair) for pair in pairs]
    with pytest.warns(SptWarning, match="1 of 5 texts are longer than 64 tokens"):
        found = model.likelihoods(pairs)
    with pytest.warns(SptWarning, match="lost their beginning"):
        two = TextModel(GPT.from_hf(weights), tokenizer, batch=2).likelihoods(pairs)
    for each in (found, two):
        assert [one.nats for one in each] == pytest.approx([nats for nats, _ in expected], rel=1e-5)
        assert [one.greedy for one in each] == [is_greedy for _, is_greedy in expected]
    assert found[-1].greedy
    short = TextModel(GPT.from_hf(weights), tokenizer, context=8).likelihoods(pairs[:1])
    assert short[0].nats == pytest.approx(one_by_one(weights, pairs[0], context=8)[0], rel=1e-5)
    with pytest.raises(SptError, match=r"context: 2 is invalid: at least 3"):
        TextModel(GPT.from_hf(weights), tokenizer, context=2).likelihoods(pairs[-1:])
    with pytest.raises(SptError, match=r"^tasks: an answer has 65 tokens, and the model reads at most 64 at a time"):
        model.likelihoods([Pair([1], [2] * 65)])


def _that_begins_texts(tokenizer: Tokenizer, folder: Path) -> BaseTokenizer:
    """A Hugging Face tokenizer that puts an id before a text, although no document of a run began with it."""
    tokenizer.save_hf(folder)
    theirs = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    theirs.post_processor = tokenizers.processors.TemplateProcessing(
        single=f"{EOS} $A", special_tokens=[(EOS, tokenizer.eos_id)]
    )
    theirs.save(str(folder / "tokenizer.json"))
    found = HFTokenizer.load(folder)
    assert found.bos_id is None
    return found


def test_texts_are_cut_where_the_context_alone_ends(weights: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    model = TextModel(GPT.from_hf(weights), tokenizer)
    ids = tokenizer.encode
    assert model.pair("Heat?", " water") == (ids("Heat?"), ids("Heat? water")[len(ids("Heat?")) :])
    assert model.pair("Heat? ", "water") == model.pair("Heat?", " water")
    assert model.pair("", "water") == ([tokenizer.eos_id], ids("water"))
    begins = SimpleNamespace(encode_array=tokenizer.encode_array, eos_id=tokenizer.eos_id, bos_id=299)
    model = TextModel(GPT.from_hf(weights), begins)  # type: ignore[arg-type]
    assert model.pair("Heat?", " water").context == [299, *ids("Heat?")]
    assert model.pair("", "water") == ([299], ids("water"))
    windows = model.windows("acid base heat " * 40)
    assert [id for window in windows for id in window.continuation] == [299, *ids("acid base heat " * 40)]
    assert windows[0].context == [299]
    assert {len(w.context) + len(w.continuation) for w in windows} == {CONTEXT + 1}
    assert TextModel(GPT.from_hf(weights), _that_begins_texts(tokenizer, tmp_path)).pair("Heat?", " water") == (
        [tokenizer.eos_id, *ids("Heat?")],
        model.pair("Heat?", " water").continuation,
    )
    with pytest.raises(SptError, match="has no tokens"):
        model.pair("Heat?", "")


def test_generation_ends_at_a_string_or_the_end_of_the_text(model: TextModel, monkeypatch: pytest.MonkeyPatch) -> None:
    words = model._tokenizer.encode(" heat water acid base salt") * 8
    decode, given, seeds = model._tokenizer.decode, [], []

    def generate(rows: list[list[int]], new: int, **settings: Any) -> list[list[int]]:
        given.append([*map(len, rows)])
        seeds.append(settings["seed"])
        return [[*row, *words[:new]] for row in rows]

    monkeypatch.setattr(model._model, "generate_batch", generate)
    assert model.continuations(["Heat?", "Salt?"], ["acid", "water"], 40) == [" heat "] * 2
    assert len(given) == 1
    assert model.continuations(["Heat? " * 90], [], 40) == [decode([*words[:32], *words[:8]])]
    assert given[1:] == [[CONTEXT - 40], [CONTEXT - 40 + 32]]
    assert seeds[1] != seeds[2], "no part of a text is drawn as the one before it"
    with monkeypatch.context() as patch:
        patch.setattr(model._tokenizer, "named_tokens", lambda: {"<|turn|>": words[3]})
        assert model.continuations(["Heat?"], ["<|turn|>"], 40) == [decode(words[:3])], "a token that text doesn't show"
    words[2] = model._tokenizer.eos_id
    monkeypatch.setattr(model._model, "generate_batch", lambda rows, new, **_: [[*row, *words[:3]] for row in rows])
    assert model.continuations(["Heat?"], ["acid"], 40) == [decode(words[:2])]
    model.batch = 1
    assert model.continuations(["Heat?", "Salt?"], [], 3) == [decode(words[:2])] * 2
    with pytest.raises(SptError, match=r"context: 64 is invalid"):
        model.continuations(["Heat?"], [], CONTEXT)


def test_weights_without_likelihoods_have_no_accuracy(model: TextModel) -> None:
    with torch.no_grad():
        model._model.final_norm[0] = torch.nan
    with pytest.raises(SptError, match="weights: give logits that are not finite"):
        own.answer(model, [own.Question("Heat?", ["base", "water"], 0)], [])


def test_choices_are_judged_by_likelihood_and_by_likelihood_a_character(weights: Path, model: TextModel) -> None:
    asked = [own.Question(q["question"], q["choices"], a) for q, a in zip(QUESTIONS, (1, 1, 1, 2), strict=True)]
    example = own.Question("Heat?", ["base", "water"], 1)
    found = own.answer(model, asked, [example])
    for place, question in enumerate(asked):
        prompt = f"Question: Heat?\nAnswer: water\n\nQuestion: {question.text}\nAnswer:"
        nats = [one_by_one(weights, model.pair(prompt, f" {choice}"))[0] for choice in question.choices]
        assert found["acc"][place] == (np.argmax(nats) == question.answer)
        a_character = [n / len(choice) for n, choice in zip(nats, question.choices, strict=True)]
        assert found["acc_norm"][place] == (np.argmax(a_character) == question.answer)


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("{", "broken JSON"),
        (b'{"question": "\xff"}'.decode("latin-1"), "no 'choices'"),
        ('{"question": "\\ud800", "choices": ["a", "b"], "answer": 0}', "broken JSON"),
        ("[1]", "list instead of a JSON object"),
        ({"prompt": "x", "choices": ["a", "b"], "answer": 0}, "no 'question' (the line has 'prompt', 'choices'"),
        ({"question": " ", "choices": ["a", "b"], "answer": 0}, "question: ' ' is invalid"),
        ({"question": "x", "choices": ["a"], "answer": 0}, "choices: ['a'] is invalid"),
        ({"question": "x", "choices": ["a", "a"], "answer": 0}, "at least two different texts"),
        ({"question": "x", "choices": ["a", 2], "answer": 0}, "choices: ['a', 2] is invalid"),
        ({"question": "x", "choices": ["a", ""], "answer": 0}, "choices: ['a', ''] is invalid"),
        ({"question": "x", "choices": "ab", "answer": 0}, "choices: 'ab' is invalid"),
        ({"question": "x", "choices": ["p", "q"], "answer": 2}, "answer: 2 is invalid"),
        ({"question": "x", "choices": ["p", "q"], "answer": True}, "answer: True is invalid"),
        ({"question": "x", "choices": ["p", "q"], "answer": "C"}, "from 0 to 1, its letter, or its text"),
        ({"question": "x", "choices": ["C", "D", "E"], "answer": "C"}, "the text of one choice and the letter of an"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: Any, says: str) -> None:
    path = write(tmp_path / "questions.jsonl", [QUESTIONS[0], "", line])
    with pytest.raises(DataError) as error:
        own.read_questions(path)
    assert str(error.value).startswith(f"{path}:3: ")
    assert says in str(error.value)


def test_answers_are_places_letters_and_texts(tmp_path: Path) -> None:
    path = write(tmp_path / "questions.jsonl", QUESTIONS)
    assert [question.answer for question in own.read_questions(path)] == [1, 1, 1, 2]
    notes = {"question": "Tonic of A?", "choices": ["A", "B"], "answer": "A"}
    assert own.read_questions(write(tmp_path / "notes.jsonl", [notes]))[0].answer == 0
    with pytest.raises(DataError, match="holds no question"):
        own.read_questions(write(tmp_path / "empty.jsonl", []))
    with pytest.raises(DataError, match="doesn't exist"):
        own.read_questions(tmp_path / "absent.jsonl")


def test_results_are_kept_with_what_decided_them(
    weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path / "notes.jsonl", QUESTIONS)
    said: list[str] = []

    def scored(*flags: str, code: int = 0) -> Any:
        monkeypatch.setattr(sys, "argv", ["spt-fast", "eval", str(weights), "--tasks", str(path), *flags, "--json"])
        with pytest.raises(SystemExit) as ended:
            main()
        out, err = capsys.readouterr()
        said.append(err)
        assert ended.value.code == code, err
        return json.loads(out)["tasks"]["notes.jsonl"] if code == 0 else err

    with pytest.warns(SptWarning, match="4 questions are few"):
        first = scored()
    assert "score 10 texts" in said[-1]
    assert first["questions"] == 4
    assert first["metrics"].keys() == {"acc", "acc_norm"}
    assert first["settings"]["context"] == CONTEXT
    assert first["settings"]["bos"] is None
    (kept,) = results_of(weights)
    with monkeypatch.context() as patch:
        patch.chdir(weights)
        assert results_of(Path()) == [kept], "by another path to the same weights"
    each = kept.metrics["acc"].each
    assert each is not None
    assert kept.metrics["acc"].value == first["metrics"]["acc"]["value"] == sum(each) / 4
    assert kept.metrics["acc"].standard_error == pytest.approx(np.std(each, ddof=1) / 2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SptWarning)
        for tasks in (str(path), path, [path]):
            again = spt.evaluate(weights, tasks=tasks, progress=False).tasks["notes.jsonl"]
            assert again.metrics == kept.metrics
        assert scored("--limit", "9") == first, "the same questions"
        fewer = scored("--limit", "2", "--num-fewshot", "1", "--context", "32", "--batch", "1")
    assert (fewer["questions"], fewer["settings"]["limit"], fewer["settings"]["num_fewshot"]) == (2, 2, 1)
    assert len(results_of(weights)) == 2
    assert "--num-fewshot: 4 is invalid: at most 3" in scored("--num-fewshot", "4", code=2)
    assert "--limit: 0 is invalid" in scored("--limit", "0", code=2)
    assert "--context: 65 is invalid: from 2 to 64" in scored("--context", "65", code=2)
    assert "--bos: 'x' is invalid: name a token of the tokenizer" in scored("--bos", "x", code=2)
    for name, other in (
        ("config.json", (weights / "config.json").read_bytes().replace(b"10000", b"20000")),
        ("tokenizer.tiktoken", byte_tokenizer(0).to_bytes()),
    ):
        (weights / "tokenizer.json").unlink(missing_ok=True)  # the same in other words
        kept_as, changed = (weights / name).read_bytes(), tmp_path / name
        assert other != kept_as
        (weights / name).rename(changed)
        (weights / name).write_bytes(other)
        assert results_of(weights) == [], f"of another {name}"
        changed.replace(weights / name)
    (file, _) = (weights / "tasks").iterdir()
    old = json.loads(file.read_text())
    file.write_text(json.dumps({key: value for key, value in old.items() if key not in ("config", "tokenizer")}))
    assert len(results_of(weights)) == 2, "also of a version that noted neither"
    with monkeypatch.context() as patch:
        patch.setenv("WORLD_SIZE", "2")
        patch.setenv("RANK", "1")
        patch.setattr(sys, "argv", ["spt-fast", "eval", str(weights), "--tasks", "gone.jsonl"])
        with pytest.raises(SystemExit) as ended:
            main()
        assert (ended.value.code, *capsys.readouterr()) == (0, "", ""), "the first process does it"
    GPT(dataclasses.replace(hf.read_config(weights), layers=1)).save_hf(tmp_path / "other")
    (tmp_path / "other" / "tasks").mkdir()
    for file in (weights / "tasks").iterdir():
        (tmp_path / "other" / "tasks" / file.name).write_text(file.read_text().replace(weights.name, "other"))
    assert results_of(tmp_path / "other") == [], "these are of other weights"
    with pytest.raises(SptError, match="tokenizer: missing"):
        score_tasks(tmp_path / "other", [str(path)])
    data = tiny.write_dataset(tmp_path / "data", 0, 200, tokenizer_digest=None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SptWarning)
        monkeypatch.setattr(sys, "argv", ["spt-fast", "eval", str(weights), "--json"])
        sys.argv += ["--data", str(data), "--tasks", str(path)]
        with pytest.raises(SystemExit):
            main()
    both = json.loads(capsys.readouterr().out)
    assert both.keys() == {str(data), "tasks"}
    assert both["tasks"]["notes.jsonl"] == first, "beside the losses"
    monkeypatch.setattr(sys, "argv", ["spt-fast", "eval", str(weights), "--data", str(data), "--tokenizer", "gone"])
    with pytest.raises(SystemExit, match="2"):
        main()
    assert "--tokenizer: is for tasks; add --tasks TASK" in capsys.readouterr().err
    path = Path(",")
    assert "--tasks: '' is invalid: name at least one task" in scored(code=2)


class Instance:
    """What lm-eval asks."""

    def __init__(self, *args: Any) -> None:
        self.args = args


@pytest.fixture
def fake_lm_eval(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """What is used of lm-eval, saying what it said of a task whose two questions have two choices each."""
    fakes = {name: ModuleType(name) for name in ("lm_eval", "lm_eval.api", "lm_eval.api.model", "lm_eval.tasks")}
    lm_eval: Any = fakes["lm_eval"]

    def simple_evaluate(model: Any, *, tasks: list[str], num_fewshot: int, limit: int, task_manager: Any) -> Any:
        if tasks == ["far"]:
            raise ConnectionError("Couldn't reach 'far/far'\non the Hub")
        asked = [Instance("Heat?", " water"), Instance("Heat?", " base"), Instance("", "salt")]
        lm_eval.said = model.loglikelihood(asked)
        hashes = {"doc_hash": "d", "prompt_hash": "p", "target_hash": "t", "filter": "none"}
        samples = [{"doc_id": i, "acc": float(i < 1), "f1": (0, 1)} | hashes for i in (2, 0, 1)]
        metrics = {"acc,none": 1 / 3, "acc_stderr,none": 1 / 3, "f1,none": 0.5, "f1_stderr,none": "N/A"}
        return {
            "results": {"near": {"name": "near", "alias": "near", "sample_len": 3, **metrics}},
            "samples": {"near": samples},
            "versions": {"near": 1.0},
            "n-shot": {"near": num_fewshot},
            "n-samples": {"near": {"original": 3, "effective": 3}},
        }

    lm_eval.__version__, lm_eval.evaluator = "0.4.13", SimpleNamespace(simple_evaluate=simple_evaluate)
    fakes["lm_eval.api.model"].LM = type("LM", (), {})  # type: ignore[attr-defined]
    fakes["lm_eval.tasks"].TaskManager = lambda: SimpleNamespace(all_tasks=["near", "far"])  # type: ignore[attr-defined]
    for name, fake in fakes.items():
        monkeypatch.setitem(sys.modules, name, fake)
    monkeypatch.delitem(sys.modules, "spt_fast.evaluation.harness", raising=False)
    monkeypatch.delattr(evaluation, "harness", raising=False)
    yield lm_eval
    sys.modules.pop("spt_fast.evaluation.harness", None)
    vars(evaluation).pop("harness", None)


@pytest.mark.filterwarnings("ignore::spt_fast.errors.SptWarning")
def test_lm_eval_is_answered_and_its_answers_are_kept(weights: Path, model: TextModel, fake_lm_eval: Any) -> None:
    near = score_tasks(weights, ["near"], num_fewshot=2, limit=3)["near"]
    assert near.questions == 3
    assert near.settings.library == "lm-eval 0.4.13"
    assert (near.settings.num_fewshot, near.settings.limit) == (2, None), "there are no more"
    assert near.metrics == {"acc": Metric(1 / 3, 1 / 3, [1.0, 0.0, 0.0]), "f1": Metric(0.5, None)}
    assert near in results_of(weights)
    for (nats, greedy), pair in zip(
        fake_lm_eval.said, (("Heat?", " water"), ("Heat?", " base"), ("", "salt")), strict=True
    ):
        assert nats == pytest.approx(one_by_one(weights, model.pair(*pair))[0], rel=0.05), "bf16, on some machines"
        assert isinstance(greedy, bool)
    with pytest.raises(DataError, match=r"'nea' is invalid: .*did you mean 'near'\?"):
        score_tasks(weights, ["nea"])
    with pytest.raises(
        DataError, match=r"lm-eval cannot run far \(ConnectionError: Couldn't reach 'far/far' on the Hub\)"
    ):
        score_tasks(weights, ["far"])
    harness = importlib.import_module("spt_fast.evaluation.harness")
    asked = harness.HarnessModel(model)
    text = "acid base heat " * 40
    windows = model.windows(text)
    assert asked.loglikelihood_rolling([Instance(text), Instance("salt")]) == pytest.approx(
        [sum(one_by_one(weights, window)[0] for window in windows), one_by_one(weights, model.pair("", "salt"))[0]]
    )
    five, three = ({"until": "\n\n", "max_gen_toks": tokens, "do_sample": False} for tokens in (5, 3))
    said = asked.generate_until([Instance("Heat?", five), Instance("Salt water?", three), Instance("Salt", five)])
    texts = (("Heat?", 5), ("Salt water?", 3), ("Salt", 5))
    assert said == [model.continuations([text], ["\n\n"], tokens)[0] for text, tokens in texts]


def test_without_lm_eval_one_message_says_what_to_install(
    weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(DataError, match=r'near needs lm-eval .*: pip install "spt-fast\[eval\]"'):
        score_tasks(weights, ["near"])
    same = [str(write(tmp_path / name, QUESTIONS)) for name in ("notes.jsonl", "Notes/notes.jsonl")]
    for tasks in ([], ["near", "near"], same):
        with pytest.raises(DataError, match=r"tasks: .* is invalid: name at least one task, each once"):
            score_tasks(weights, tasks)
    with pytest.raises(DataError, match=r"absent\.jsonl: doesn't exist"):
        score_tasks(weights, [str(tmp_path / "absent.jsonl")])
    for task in (str(tmp_path / "absent.yaml"), str(write(tmp_path / "table.csv", []))):
        with pytest.raises(DataError, match=r"is invalid: give a file of questions \(\.jsonl\)"):
            score_tasks(weights, [task])


@pytest.mark.filterwarnings("ignore")
def test_lm_eval_gives_the_same_numbers(weights: Path, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    answers = [{**question, "answer": place} for question, place in zip(QUESTIONS, (1, 1, 1, 2), strict=True)]
    task = {
        "task": "notes",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(write(tmp_path / "notes.jsonl", answers))}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "Question: {{question}}\nAnswer:",
        "doc_to_choice": "choices",
        "doc_to_target": "answer",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    }
    (tmp_path / "notes.yaml").write_text(yaml.safe_dump(task))
    found = score_tasks(weights, [str(tmp_path / "notes.jsonl"), str(tmp_path / "notes.yaml")])
    for name, own_metric in found["notes.jsonl"].metrics.items():
        assert found["notes"].metrics[name].each == own_metric.each
        assert found["notes"].metrics[name].standard_error == pytest.approx(own_metric.standard_error)


def test_the_standard_error_is_of_a_sample() -> None:
    assert standard_error([0, 1, 1, 0, 1]) == pytest.approx(math.sqrt(0.24 / 4))
    assert standard_error([1]) is None
