"""Questions on held-out tunes, for `spt-fast eval --tasks`: which bars come next?

    python -m benchmarks.tune_questions music.heldout.jsonl tunes.questions.jsonl

One question per line: {"question", "choices", "answer"}. The question is a tune in ABC up to the middle of its bars;
the choices are its next four bars and the four at the same place in three other tunes of its metre, with chords if it
has some.
"""

from __future__ import annotations

import json
import random
import re
import sys
from collections import defaultdict
from pathlib import Path

BARS, CHOICES = 4, 4


def halves(text: str) -> tuple[str, str, str] | None:
    """Its kind, the tune up to its middle, and the next bars; None if it isn't a tune, or too short."""
    metre, key = re.search(r"^M: *(\S+)", text, re.MULTILINE), re.search(r"^K:.*\n", text, re.MULTILINE)
    if not metre or not key:
        return None
    bars = re.findall(r"[^|]+\|+", text[key.end() :])
    middle = len(bars) // 2
    if middle < BARS:
        return None
    after = "".join(bars[middle : middle + BARS]).strip()
    kind = metre[1] + (" with chords" if '"' in after else "")
    return kind, text[: key.end()] + "".join(bars[:middle]).rstrip(), after


def main(source: Path, out: Path) -> None:
    rng = random.Random(0)
    documents = [json.loads(line)["text"] for line in source.read_text(encoding="utf-8").splitlines()]
    tunes = [tune for tune in map(halves, documents) if tune]
    by_kind = defaultdict(list)
    for kind, _, after in tunes:
        by_kind[kind].append(after)
    questions = []
    for kind, before, after in tunes:
        others = sorted({other for other in by_kind[kind] if other != after})
        if len(others) < CHOICES - 1:
            continue
        choices = [after, *rng.sample(others, CHOICES - 1)]
        rng.shuffle(choices)
        questions.append({"question": before, "choices": choices, "answer": choices.index(after)})
    out.write_text("".join(json.dumps(question) + "\n" for question in questions), encoding="utf-8")
    print(f"{out}: {len(questions)} questions of {len(tunes)} tunes")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:3]))
