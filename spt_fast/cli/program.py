"""The program that the commands belong to, and where they print."""

from __future__ import annotations

import functools
import inspect
import json
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, get_type_hints

import typer
from typer import Option

from spt_fast import __version__
from spt_fast.cli.flags import AllCommands, Command, Commands, is_first
from spt_fast.printing import as_json, terminal
from spt_fast.progress import be_quiet

Quiet = Annotated[bool, Option("--quiet", "-q", help="Show results, warnings and errors only.")]
Verbose = Annotated[
    bool, Option("--verbose", "-v", help="Also show what libraries log, and the traceback of every error.")
]


@dataclass
class Talk:
    """What `--verbose` asks for."""

    tracebacks: bool = False


talk = Talk()


def listen(quiet: bool, verbose: bool) -> None:
    """Apply `--quiet` and `--verbose`."""
    if quiet:
        be_quiet(True)
    if verbose:
        talk.tracebacks = True
        logging.basicConfig(level=logging.INFO)


class Program(typer.Typer):
    """Commands that also take `--quiet` and `--verbose` themselves, since people write them last."""

    def command(self, *names: Any, **settings: Any) -> Callable[[Any], Any]:
        add = super().command(*names, **{"cls": Command, **settings})

        def register(work: Callable[..., None]) -> Callable[..., None]:
            add(_that_listens(work))
            return work

        return register


def _that_listens(work: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(work)
    def listening(*, quiet: bool = False, verbose: bool = False, **given: Any) -> None:
        listen(quiet, verbose)
        work(**given)

    own = inspect.signature(work).parameters.values()
    hints = get_type_hints(work, include_extras=True) | {"quiet": Quiet, "verbose": Verbose}
    more = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=False) for name in ("quiet", "verbose")]
    parameters = [parameter.replace(annotation=hints[parameter.name]) for parameter in (*own, *more)]
    listening.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    listening.__annotations__ = hints
    return listening


app = Program(
    cls=AllCommands,
    help="Specialized pretraining: decide how much domain data goes into pretraining, then train that model fast.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
tokenizer_app = Program(cls=Commands, help="Train a tokenizer.", no_args_is_help=True)
checkpoint_app = Program(cls=Commands, help="List or verify the checkpoints of a run.", no_args_is_help=True)
app.add_typer(tokenizer_app, name="tokenizer")
app.add_typer(checkpoint_app, name="checkpoint")

out = terminal()


def example(*lines: str) -> str:
    """The text below the help of a command."""
    return "\n\n".join(f"Example: {line}" for line in lines)


def print_json(data: Any) -> None:
    print(json.dumps(as_json(data), indent=1, allow_nan=False))


@app.callback(invoke_without_command=True)
def _program(
    context: typer.Context,
    version: Annotated[bool, Option("--version", help="Print the version.")] = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Only training uses several processes; of those that a launcher starts, only the first runs other commands."""
    if context.invoked_subcommand != "train" and os.environ.get("WORLD_SIZE", "1") != "1" and not is_first():
        raise typer.Exit
    be_quiet(False)
    talk.tracebacks = False
    listen(quiet, verbose)
    if version:
        print(f"spt-fast {__version__}")
        raise typer.Exit
