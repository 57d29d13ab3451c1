"""The command line: `spt-fast`, also `python -m spt_fast`. Each command reads its flags, calls the library, and prints.

Exit codes: 0 the work is done; 75 interrupted and saved; 2 a bad recipe, file or flag, with one message; 1 otherwise.
"""

from __future__ import annotations

import os
import sys
import traceback
from typing import NoReturn

from spt_fast.cli.program import app, talk
from spt_fast.errors import FailedElsewhere, SptError, readable
from spt_fast.printing import print_message, set_up
from spt_fast.train.signals import interrupt_by_signals

# --help lists the commands in this order.
# isort: off
from spt_fast.cli import data, training, studies, models
# isort: on

__all__ = ["app", "data", "main", "models", "studies", "training"]


def main() -> None:
    """Entry point: runs the command line and turns a user's mistake into one message and exit code 2.

    SIGTERM interrupts like Ctrl-C, so that partial files are removed; training handles both itself and saves.
    """
    interrupt_by_signals()
    set_up()
    rank = os.environ.get("RANK")
    me = "spt-fast" if rank is None or os.environ.get("WORLD_SIZE", "1") == "1" else f"spt-fast, process {rank}"
    try:
        app()
    except FailedElsewhere:
        sys.exit(1)
    except SptError as error:
        _say(f"{me}: {error}", 2)
    except OSError as error:
        what = f"{error.filename}: {error.strerror}" if error.filename else str(error)
        _say(readable(f"{me}: {what}; free some space there, or give a file or folder that you may use"), 2)
    except RuntimeError as error:
        _say(f"{me}: {error}", 1)


def _say(message: str, code: int) -> NoReturn:
    """Print an error's message, after its traceback if that is asked for, and exit."""
    if talk.tracebacks:
        traceback.print_exc()
    print_message(message)
    sys.exit(code)
