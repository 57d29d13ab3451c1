"""What a long command shows while it works: a line on a terminal that changes in place, plain lines elsewhere.

The parts of a line are in order of importance; on a narrow terminal the last are left out. Everything goes to standard
error.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Self

from rich.cells import cell_len
from rich.console import Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from spt_fast.printing import middle, print_note, terminal
from spt_fast.quantities import duration

PLAIN_LINE_EVERY_S = 30.0
SHORTEST_TITLE, SHORTEST_BAR = 8, 12
SEPARATORS = (" · ", "  ")

_quiet = False


def be_quiet(quiet: bool) -> None:
    """Whether this process shows only warnings from now on."""
    global _quiet
    _quiet = quiet


@dataclass(frozen=True)
class Line:
    """The progress of some work: its title and figures, the most important first, and the share that is done."""

    parts: Sequence[str]
    share: float | None = None

    def fit(self, width: int) -> str:
        """In at most `width` cells: as many parts as fit; a long title is cut before a part is left out."""
        title, *figures = (part for part in self.parts if part)
        for shown in range(len(figures), -1, -1):
            for separator in SEPARATORS:
                rest = separator.join(["", *figures[:shown]])
                room = width - cell_len(rest)
                if room >= min(cell_len(title), SHORTEST_TITLE) and (
                    separator == SEPARATORS[-1] or room >= cell_len(title)
                ):
                    return middle(title, room) + rest
        return middle(title, width)

    def render(self, width: int) -> RenderableType:
        """With a bar if there is room for one."""
        text = self.fit(width)
        row = Table.grid(padding=(0, 1, 0, 0))
        bar = width - cell_len(text) - 2
        if self.share is None or bar < SHORTEST_BAR:
            row.add_row(Text(text, no_wrap=True))
        else:
            row.add_row(Text(text, no_wrap=True), ProgressBar(1.0, self.share, width=min(bar, 40)))
        return row


def clock() -> str:
    return time.strftime("%H:%M:%S")


class Screen:
    """The standard error of a long command. Without `show` nothing is printed."""

    def __init__(self, *, show: bool = True) -> None:
        self._console = terminal(stderr=True, quiet=not show)
        self._live: Live | None = None
        self._lines: Sequence[Line] = ()
        self._last_line_s = time.monotonic()
        if show and not _quiet and self._console.is_terminal:
            self._live = Live(get_renderable=self._render, console=self._console, refresh_per_second=4, transient=True)
            self._live.start()

    def _render(self) -> RenderableType:
        return Group(*(line.render(self._console.width) for line in self._lines))

    def say(self, message: str) -> None:
        """Print permanent text above the line that changes."""
        lines = message.splitlines() if _quiet else [message]
        for line in lines:
            if not _quiet or line.startswith("warning: "):
                print_note(self._console, line)

    def update(self, *lines: Line, plain: bool | None = None) -> None:
        """Show these lines from now on. plain: whether to print the first one where there is no terminal; by default
        it is printed from time to time."""
        self._lines = lines
        now_s = time.monotonic()
        if plain is None:
            plain = now_s - self._last_line_s >= PLAIN_LINE_EVERY_S
        if plain and lines and not self._console.is_terminal:
            self._last_line_s = now_s
            self.say(f"{clock()} {SEPARATORS[0].join(filter(None, lines[0].parts))}")

    def close(self, status: str = "done") -> None:
        """status: how a run ended."""
        if self._live:
            self._live.stop()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def time_left(elapsed_s: float, done: float, left: float) -> str:
    """The time left at the pace so far; empty at the start and at the end."""
    return f"ETA {duration(elapsed_s * left / done)}" if 0 < done * 1e-6 < left else ""


@contextmanager
def progress_of(
    what: str, total: int | None, *, says: Callable[[int, float], str] = lambda done, elapsed_s: "", show: bool = True
) -> Iterator[Callable[[int], None]]:
    """Show how much of `total` is done; the yielded function adds to it. says: further text, from the amount done and
    the seconds it took."""
    began_s, done = time.monotonic(), 0

    def elapsed_s() -> float:
        return max(time.monotonic() - began_s, 1e-9)

    with Screen(show=show) as screen:

        def advance(more: int) -> None:
            nonlocal done
            done += more
            share = min(1.0, done / total) if total else None
            left = [f"{share:.0%}", time_left(elapsed_s(), done, (total or 0) - done)] if share is not None else []
            screen.update(Line([what, *left, says(done, elapsed_s())], share))

        yield advance
        screen.update(Line([what, f"done in {duration(elapsed_s())}", says(done, elapsed_s())]), plain=True)


class Steps(Screen):
    """The progress of training steps, and the time left for all the work that they belong to."""

    def __init__(self, *, show: bool = True) -> None:
        super().__init__(show=show)
        self._since_s: float | None = None
        """Where the pace is measured from: the end of the first step, which compiles and comes after an evaluation."""
        self._done = 0.0
        self._title, self._step, self._steps, self._work, self._after = "", 0, 1, 1.0, 0.0
        self._figures: Sequence[str] = ()
        self._more: Sequence[str] = ()

    def begin(self, title: str, step: int, steps: int, *, work: float = 1.0, after: float = 0.0) -> None:
        """Begin new steps, `step` of `steps` already done. `work` is their amount of work, `after` that of what follows
        them, in any common unit."""
        self._title, self._step, self._steps, self._work, self._after = title, step, steps, work, after
        self._figures = self._more = ()
        self.update(self._line(step), plain=False)

    def advance(self, step: int) -> None:
        if self._since_s is None:
            self._since_s = time.monotonic()
        else:
            self._done += self._work * (step - self._step) / self._steps
        self._step = step
        self.update(self._line(step), plain=False)

    def show(self, step: int, figures: Sequence[str], more: Sequence[str] = ()) -> None:
        """Show the figures of a step: the most important first, and `more` after the time left."""
        self._figures, self._more = figures, more
        self.update(self._line(step), plain=True)

    def _line(self, step: int) -> Line:
        left = self._work * (self._steps - step) / self._steps + self._after
        eta = time_left(time.monotonic() - (self._since_s or 0.0), self._done, left)
        return Line([self._title, f"step {step}/{self._steps}", *self._figures, eta, *self._more], step / self._steps)
