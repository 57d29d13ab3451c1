"""The program that the commands belong to, and where they print."""

from __future__ import annotations

import json
import logging
import os
from dataclasses import dataclass
from typing import Annotated, Any

import typer
from typer import Option

from spt_fast import __version__
from spt_fast.cli.flags import Commands, is_first
from spt_fast.printing import as_json, terminal
from spt_fast.progress import be_quiet

app = typer.Typer(
    cls=Commands,
    help="Specialized pretraining: decide how much domain data goes into pretraining, then train that model fast.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
tokenizer_app = typer.Typer(cls=Commands, help="Train a tokenizer.", no_args_is_help=True)
checkpoint_app = typer.Typer(cls=Commands, help="List or verify the checkpoints of a run.", no_args_is_help=True)
app.add_typer(tokenizer_app, name="tokenizer")
app.add_typer(checkpoint_app, name="checkpoint")

out = terminal()


def example(*lines: str) -> str:
    """What stands below the help of a command."""
    return "\n\n".join(f"Example: {line}" for line in lines)


@dataclass
class Talk:
    """What `--verbose` asks for."""

    tracebacks: bool = False


talk = Talk()


def print_json(data: Any) -> None:
    print(json.dumps(as_json(data), indent=1, allow_nan=False))


@app.callback(invoke_without_command=True)
def _program(
    context: typer.Context,
    version: Annotated[bool, Option("--version", help="Print the version.")] = False,
    quiet: Annotated[bool, Option("--quiet", "-q", help="Show results, warnings and errors only.")] = False,
    verbose: Annotated[
        bool, Option("--verbose", "-v", help="Also show what libraries log, and the traceback of every error.")
    ] = False,
) -> None:
    """Only training is the work of several processes; of all that a launcher starts, the first does other commands."""
    if context.invoked_subcommand != "train" and os.environ.get("WORLD_SIZE", "1") != "1" and not is_first():
        raise typer.Exit
    be_quiet(quiet)
    talk.tracebacks = verbose
    if verbose:
        logging.basicConfig(level=logging.INFO)
    if version:
        print(f"spt-fast {__version__}")
        raise typer.Exit
