"""What the commands share: types of flags, how values are read, how errors speak of flags, how commands are stopped."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from typer.core import TyperCommand, TyperGroup

from spt_fast.errors import SptError, shown
from spt_fast.files import NO_PATH, NO_USER, expanded, settled
from spt_fast.printing import print_message


def path(given: str | Path) -> Path:
    """A path of the command line: shells leave `~` alone in --out=~/x."""
    return settled(named(str(given)))


def named(given: str) -> str:
    """A path, expanded; an empty one, as an unset variable leaves it, is not the working directory."""
    found = expanded(given)
    if not found or found.startswith("~"):
        raise typer.BadParameter(NO_USER if found else NO_PATH)
    return found


def text(given: str) -> str:
    """Text of the command line, read as UTF-8 in every locale."""
    try:
        return os.fsencode(given).decode()
    except UnicodeDecodeError:
        raise typer.BadParameter("is not UTF-8; use a terminal that writes UTF-8") from None


PathArgument, PathOption = partial(typer.Argument, parser=path), partial(typer.Option, parser=path)

Json = Annotated[bool, typer.Option("--json", help="Print JSON with exact numbers instead of a table.")]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override a field, such as seed=1; repeatable."),
]
DomainSource = Annotated[
    str | None, typer.Option(metavar="SOURCE", help="Name the domain source, for runs that belong to no study.")
]
GeneralSource = Annotated[
    str | None, typer.Option(metavar="SOURCE", help="Name the general source, for runs that belong to no study.")
]
Dtype = Annotated[
    str | None, typer.Option(metavar="TYPE", help="Set the type of the ids in headerless files, such as uint16.")
]
Price = Annotated[float | None, typer.Option("--price", min=0, metavar="DOLLARS", help="Set the price of a GPU-hour.")]
ClusterOptions = Annotated[
    list[str] | None,
    typer.Option("--cluster-set", metavar="KEY=VALUE", help="Pass an option to submitit, such as timeout_min=600."),
]
Overwrite = Annotated[bool, typer.Option(help="Replace another model in that folder.")]
WeightsDtype = Annotated[
    str | None, typer.Option("--dtype", metavar="TYPE", help="Store fp32, bf16 or fp16; by default as the weights are.")
]
Resume = Annotated[bool, typer.Option(help="Continue from the newest checkpoint, or start without one.")]
OutFolder = Annotated[Path, PathOption("--out", metavar="DIR", help="Write to this folder.")]
RecipePath = Annotated[Path, PathArgument(metavar="RECIPE", help="The recipe, a YAML file.")]
RunPath = Annotated[Path, PathArgument(metavar="RUN", help="The folder of a run.")]
Runs = Annotated[list[Path], PathArgument(metavar="RUNS", help="Studies, tables (.parquet, .csv) or run folders.")]
WeightsPath = Annotated[
    Path, PathArgument(metavar="RUN_OR_CHECKPOINT", help="A run, a checkpoint or a Hugging Face folder.")
]
Inputs = Annotated[
    list[str],
    typer.Argument(
        parser=named,
        metavar="INPUT",
        help="Files (.jsonl, .txt, .parquet, also compressed), folders, or - for standard input.",
    ),
]
TextKey = Annotated[str, typer.Option(metavar="KEY", parser=text, help="Read the text from this key or column.")]
SkipBad = Annotated[bool, typer.Option(help="Skip and count broken lines instead of stopping at the first.")]


def share(given: str | None, flag: str) -> float | None:
    """40% as a fraction; None stays None. Raises RecipeError."""
    from spt_fast.fields import optional, rounded_share

    return optional(rounded_share)(given, flag)


def is_first() -> bool:
    """Whether this process prints: of those that a launcher started, only the first does."""
    return os.environ.get("RANK", "0") == "0"


def stopped(reason: str | None) -> typer.Exit:
    """Print that a run was interrupted and saved, and exit with 75."""
    if is_first():
        print_message(f"spt-fast: stopped by {reason} and saved; run again with --resume to continue")
    return typer.Exit(75)


class Commands(TyperGroup):
    """Commands whose errors name flags where the library names arguments, and that say that they were interrupted,
    which typer doesn't."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except SptError as error:
            command = self.get_command(ctx, ctx.invoked_subcommand or "")
            error.args = (in_flags(error, flags_of(command), of_others=OF_TRAIN),)
            raise
        except (KeyboardInterrupt, RuntimeError) as error:
            if isinstance(error, RuntimeError) and not isinstance(error.__cause__, KeyboardInterrupt):
                raise  # Python 3.11 makes a RuntimeError of an interruption while a class is created, as in imports
            print_message("spt-fast: interrupted")
            raise typer.Exit(130) from None


UsageError: Any = typer.BadParameter.__base__


class AllCommands(Commands):
    """The commands of the program: of several processes that a launcher started, one says what is wrong with the
    command line."""

    def make_context(self, *given: Any, **named: Any) -> Any:
        try:
            return super().make_context(*given, **named)
        except UsageError as error:
            _raise_in_one(error)

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except UsageError as error:
            if ctx.invoked_subcommand in (None, "train"):  # only the first process runs other commands
                _raise_in_one(error)
            raise


def _raise_in_one(error: Exception) -> NoReturn:
    """Raise `error` in one of the processes that a launcher started, FailedElsewhere in the others."""
    if os.environ.get("WORLD_SIZE", "1") != "1":
        from spt_fast.train.world import before_joining

        before_joining(partial(_raise, error))
    raise error


def _raise(error: Exception) -> NoReturn:
    raise error


class Command(TyperCommand):
    """A command whose help says what a user writes: no type beside a flag that takes no value, and no types of Python
    beside the names of arguments."""

    def get_params(self, ctx: Any) -> Any:
        params: Any = super().get_params(ctx)
        for param in params:
            if getattr(param, "is_flag", False):
                param.metavar, param.show_default = "", False
            elif param.param_type_name == "argument":
                param.display_type_rich = lambda ctx: None
        return params

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """With what was given in the message about an invalid value, which pydantic's leaves out."""
        try:
            return super().parse_args(ctx, args)
        except typer.BadParameter as error:
            if details := getattr(error.__cause__, "errors", None):
                wrong = details()[0]
                must = wrong["msg"].removeprefix("Input should ").partition(",")[0]
                error.message = f"{shown(wrong['input'])} must {must}"
            raise


class ManyValues(Command):
    """A command one of whose flags takes all the values that follow it: --weights 0.9 0.1."""

    flag = ""

    @classmethod
    def of(cls, flag: str, is_value: Callable[[str, list[str]], bool]) -> type[ManyValues]:
        """is_value: whether a later word belongs to the flag, from it and all words."""
        return type("ManyValues", (cls,), {"flag": flag, "is_value": staticmethod(is_value)})

    @staticmethod
    def is_value(word: str, words: list[str]) -> bool:
        raise NotImplementedError

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        given, inside = list[str](), False
        for i, arg in enumerate(args):
            if arg == self.flag:
                inside = True
                given += [] if args[i + 1 :] else [arg]  # its value is missing
            else:
                inside = inside and (args[i - 1] == self.flag or self.is_value(arg, args))
                given.append(f"{self.flag}={arg}" if inside else arg)
        return super().parse_args(ctx, given)


def is_number(word: str, words: list[str]) -> bool:
    """Also a share, such as 10% or 1/10."""
    return re.fullmatch(r"-?[0-9.]+(e-?[0-9]+)?(%|/[0-9]+)?|nan|-?inf", word, re.IGNORECASE) is not None


def after_the_argument(word: str, words: list[str]) -> bool:
    """A word that is no flag, where the command's one argument came first."""
    return not word.startswith("-") and not words[0].startswith("-")


def flags_of(command: Any) -> dict[str, str]:
    """A command's flags by the names that they have as arguments: gpu_memory → --gpu-memory."""
    return {
        name: param.opts[0]
        for param in (command.params if command else ())
        if param.opts[0].startswith("--")
        for name in (param.name, param.opts[0].removeprefix("--").replace("-", "_"))
    }


OF_TRAIN = {"resume": "`spt-fast train --resume`", "verify": "`spt-fast train --verify`"}


def in_flags(error: SptError, flags: Mapping[str, str], *, of_others: Mapping[str, str] | None = None) -> str:
    """A library's message with flags instead of arguments: `resume=True` and a leading argument `resume` are --resume.
    `of_others` are flags of other commands."""

    def flag(keyword: re.Match[str]) -> str:
        name, value = keyword.groups()
        said = flags.get(name) or (of_others or {}).get(name)
        return keyword[0] if said is None else said + ("" if value == "True" else f" {value}")

    message = re.sub(r"`(\w+)=([^`]+)`", flag, str(error))
    name, colon, rest = message.partition(":")
    return f"{flags.get(name, name)}{colon}{rest}" if error.argument else message
