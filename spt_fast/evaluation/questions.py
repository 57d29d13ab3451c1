"""The user's own multiple-choice questions: a JSONL of {question, choices, answer}.

    {"question": "Which gas do plants take in?", "choices": ["oxygen", "carbon dioxide"], "answer": 1}

`answer` is the index of the right choice, from 0, its letter, or its text. Each choice is scored by its likelihood
after the prompt `TEMPLATE`, with a space between; the numbers equal those of an lm-eval task with

    output_type: multiple_choice
    doc_to_text: "Question: {{question}}\\nAnswer:"
    doc_to_choice: choices
    doc_to_target: answer

acc takes the likeliest choice, acc_norm the one whose log-likelihood divided by its characters is highest.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from string import ascii_uppercase
from typing import Any, NamedTuple

import numpy as np

from spt_fast.data.inputs import COMPRESSIONS
from spt_fast.data.text import TextReader
from spt_fast.errors import DataError, invalid, shown_key
from spt_fast.evaluation.likelihood import TextModel

TEMPLATE = "Question: {}\nAnswer:"
FILES = tuple(form + packed for form in (".jsonl", ".ndjson") for packed in COMPRESSIONS)


class Question(NamedTuple):
    text: str
    choices: list[str]
    answer: int
    """The index of the right choice."""

    @property
    def prompt(self) -> str:
        return TEMPLATE.format(self.text)

    @property
    def solved(self) -> str:
        """The question as an example for later ones."""
        return f"{self.prompt} {self.choices[self.answer]}\n\n"


def read_questions(path: Path) -> list[Question]:
    """The questions of a file; DataError names the first invalid line, or a file without questions."""
    questions = [_question(line, place) for place, line in _lines(path)]
    if not questions:
        raise DataError(f"{path}: holds no question; write one JSON object per line, {{question, choices, answer}}")
    return questions


def digest_of(questions: Sequence[Question]) -> str:
    """A digest of the questions and the prompt."""
    return hashlib.sha256(json.dumps([TEMPLATE, *questions]).encode()).hexdigest()[:16]


def answer(model: TextModel, questions: Sequence[Question], examples: Sequence[Question]) -> dict[str, list[float]]:
    """acc and acc_norm of each question, 1 if the model is right and otherwise 0, after solved examples."""
    shots = "".join(example.solved for example in examples)
    pairs = [model.pair(shots + q.prompt, f" {choice}") for q in questions for choice in q.choices]
    nats = iter(model.likelihoods(pairs))
    right: dict[str, list[float]] = {"acc": [], "acc_norm": []}
    for q in questions:
        of_choices = np.array([next(nats).nats for _ in q.choices])
        right["acc"].append(float(of_choices.argmax() == q.answer))
        right["acc_norm"].append(float((of_choices / [*map(len, q.choices)]).argmax() == q.answer))
    return right


def _lines(path: Path) -> Iterator[tuple[str, bytes]]:
    """Each line that isn't empty, with its place."""
    if not path.name.lower().endswith(FILES):
        raise DataError(f"{path}: is not a .jsonl file; write one JSON object per line, {{question, choices, answer}}")
    if not path.exists():
        raise DataError(f"{path}: doesn't exist; name a .jsonl file of {{question, choices, answer}}")
    for chunk in TextReader(path, skip_bad=True):
        for number, line in enumerate(chunk.data.split(b"\n"), chunk.first):
            if line and not line.isspace():
                yield f"{path}:{number}", line


def _question(line: bytes, place: str) -> Question:
    try:
        record = json.loads(line.decode())
        json.dumps(record, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:  # UnicodeError and JSONDecodeError are ValueErrors
        raise DataError(f"{place}: broken JSON ({error}); fix the line") from None
    if not isinstance(record, dict):
        raise DataError(f"{place}: {type(record).__name__} instead of a JSON object; fix the line")
    for key in ("question", "choices", "answer"):
        if key not in record:
            has = ", ".join(repr(shown_key(key)) for key in [*record][:12]) or "nothing"
            raise DataError(f"{place}: no {key!r} (the line has {has}); write {{question, choices, answer}}")
    text, choices = record["question"], record["choices"]
    if not isinstance(text, str) or not text.strip():
        raise DataError(invalid(f"{place}: question", text, "write a text"))
    sound = isinstance(choices, list) and all(isinstance(choice, str) and choice.strip() for choice in choices)
    if not sound or len(choices) < 2 or len({*choices}) < len(choices):
        raise DataError(invalid(f"{place}: choices", choices, "write a list of at least two different texts"))
    return Question(text, choices, _place_of(record["answer"], choices, place))


def _place_of(answer: Any, choices: Sequence[str], place: str) -> int:
    """The index of the right choice."""
    last = len(choices) - 1
    if isinstance(answer, int) and not isinstance(answer, bool) and 0 <= answer <= last:
        return answer
    found = set()
    if isinstance(answer, str):
        found |= {i for i, choice in enumerate(choices) if choice == answer}
        found |= {i for i, letter in enumerate(ascii_uppercase[: last + 1]) if letter == answer.strip().upper()}
    if len(found) == 1:
        return found.pop()
    problem = "it is the text of one choice and the letter of another; write" if found else "write"
    expected = f"{problem} the index of the right choice from 0 to {last}, its letter, or its text"
    if found:
        expected = f"{problem} the index of the right choice from 0 to {last}"
    raise DataError(invalid(f"{place}: answer", answer, expected))
