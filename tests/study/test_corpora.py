"""The demo's text: reproducible, clean, without repeats, and enough of it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from spt_fast.errors import DataError
from spt_fast.study import corpora
from spt_fast.study.demo import Scale

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def domain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("corpora") / "domain.jsonl"
    corpora.write_domain(path, 10 * Scale().domain_bytes)
    return path


@pytest.fixture(scope="module")
def general(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("corpora") / "general.jsonl"
    corpora.write_general(path, Scale().general_bytes)
    return path


def texts(path: Path) -> list[str]:
    documents = [json.loads(line) for line in path.read_text().splitlines()]
    assert all(document.keys() == {"text", "source"} for document in documents)
    return [document["text"] for document in documents]


def test_both_corpora_have_the_size_that_the_demo_needs(general: Path, domain: Path) -> None:
    assert sum(map(len, texts(general))) > 4_000_000
    assert sum(map(len, texts(domain))) > 3_000_000


def test_a_corpus_is_reproducible_and_a_smaller_limit_gives_a_prefix(domain: Path, tmp_path: Path) -> None:
    limit_bytes = 200_000
    written = corpora.write_domain(tmp_path / "again", limit_bytes)
    assert limit_bytes - corpora.HEADER_MAX_CHARS < written <= limit_bytes
    assert domain.read_bytes().startswith((tmp_path / "again").read_bytes())
    assert sum(len(text.encode()) for text in texts(tmp_path / "again")) == written


def test_the_general_corpus_is_prose(general: Path) -> None:
    for text in texts(general):
        assert not re.search(r">>>|\\|[{}=<>|]|https?:|^(Args|Parameters|Returns):?$|-----|``", text, re.MULTILINE), (
            text
        )
        for paragraph in text.split("\n\n"):
            assert paragraph[0].isupper(), paragraph
            assert paragraph[-1] in ".!?", paragraph


def test_the_domain_is_code_without_licences_and_generated_headers(domain: Path) -> None:
    headers = texts(domain)
    for text in headers:
        assert not re.search(r"copyright|all rights reserved|@generated|\r", text, re.IGNORECASE), text[:500]
    looks_like_code = re.compile(r"#include|namespace|struct|class|template|#define|;")
    assert sum(bool(looks_like_code.search(text)) for text in headers) > 0.99 * len(headers)


def test_no_paragraph_and_no_header_is_repeated(general: Path, domain: Path) -> None:
    paragraphs = [paragraph for text in texts(general) for paragraph in text.split("\n\n")]
    assert len(set(paragraphs)) == len(paragraphs)
    assert len(set(texts(domain))) == len(texts(domain))


def test_the_prose_of_a_docstring_has_no_code_labels_and_markup() -> None:
    docstring = """Compute the `thing` that is asked for.

    The **first** paragraph of it says what the function does
    and goes on over a second line.

    Parameters
    ----------
    x : array_like
        The input array that will be searched for the thing.
    y (`int`, *optional*): How many times the search is to be repeated.

    - An item in a list that is a whole sentence of its own.
    - no sentence

    >>> thing(3)  # The code of an example that is not prose.
    4

    The result is ``x = y + 1`` where all of that is a formula.

    short.
    """
    assert list(corpora.prose_paragraphs(docstring)) == [
        "The first paragraph of it says what the function does and goes on over a second line.",
        "How many times the search is to be repeated.",
        "An item in a list that is a whole sentence of its own.",
    ]


def test_templates_that_differ_in_names_are_repeats() -> None:
    seen: set[str] = set()
    text = "The configuration of a {} model. It is used by {}Trainer."
    assert corpora._drop_repeated_paragraphs(text.format("Bert", "Bert"), seen)
    assert not corpora._drop_repeated_paragraphs(text.format("Gpt2", "Gpt2"), seen)


def test_headers_that_are_mostly_known_are_repeats() -> None:
    seen: set[str] = set()
    lines = [f"int the_function_number_{i}(int argument);" for i in range(10)]
    assert corpora._drop_repetitive_header("\n".join(lines), seen)
    assert not corpora._drop_repetitive_header("\n".join(lines[:6] + ["int something_new_in_here(int a);"] * 5), seen)
    assert corpora._drop_repetitive_header("\n".join(line.replace("int", "char") for line in lines), seen)


def test_a_torch_without_headers_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpora.torch, "__file__", str(tmp_path / "__init__.py"))
    with pytest.raises(DataError, match="no C\\+\\+ headers"):
        corpora.write_domain(tmp_path / "domain.jsonl", 1000)
    assert not (tmp_path / "domain.jsonl").exists()
