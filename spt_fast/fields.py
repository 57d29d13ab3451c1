"""What settings are made of: counts, shares and spans read exactly, dataclasses built from YAML, YAML read strictly.

A field of a settings dataclass is a `setting` with its parser; `build` makes the dataclass from plain data and names
what is wrong, what was given and what would do; `plain` turns it back.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from fractions import Fraction
from pathlib import Path
from typing import Any, TypeVar

import yaml

from spt_fast.data.mixture import exact_share
from spt_fast.errors import RecipeError, invalid, nearest, shown
from spt_fast.synonyms import unknown_key

# -------------------------------------------------------------------------------------------- values and their units

_COUNT = re.compile(r"([0-9][0-9_]{0,29}(?:\.[0-9]{1,30})?(?:[eE]\+?[0-9]{1,2})?)\s*([kKmMbBtT]?)")
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}


def parse_count(value: object, where: str) -> int:
    """A positive whole number: 300, "300K", "1.5B", "2e6". Exact: "1.0005K" is refused rather than rounded."""
    match = None if isinstance(value, bool) else _COUNT.fullmatch(str(value).strip())
    if match:
        exact = Fraction(match[1].replace("_", "")) * _UNITS[match[2].upper()]
        if exact.denominator == 1 and 0 < exact <= 2**62:
            return int(exact)
    raise RecipeError(invalid(where, value, "write a positive whole number such as 300, 300K, 20M or 1.5B"))


def parse_share(value: object, where: str) -> Fraction:
    """An exact share in [0, 1]: "2%", 0.02, "1/50". Floats are read by their repr, as exact decimals."""
    text = str(value).strip()
    try:
        share = exact_share("" if isinstance(value, bool) else text)
    except (ValueError, ZeroDivisionError):
        raise RecipeError(
            invalid(where, value, "write a percent (2%), a decimal (0.02) or a fraction (1/50)")
        ) from None
    if not 0 <= share <= 1:
        meant = "" if text.endswith("%") else f"; did you mean {text}%?"
        raise RecipeError(invalid(where, value, f"write a share between 0 and 1{meant}"))
    return share


@dataclass(frozen=True)
class Span:
    """A stretch of training: a number of steps, of tokens, or a share of the phase."""

    amount: Fraction
    unit: str  # "steps" | "tokens" | "share"

    @classmethod
    def parse(cls, value: object, where: str) -> Span:
        if isinstance(value, Span):
            return value
        text = str(value).strip()
        if text.endswith("%"):
            return cls(parse_share(text, where), "share")
        steps = re.fullmatch(r"(.*?)\s*steps?", text)
        if steps:
            return cls(Fraction(0) if steps[1].strip() == "0" else Fraction(parse_count(steps[1], where)), "steps")
        try:
            return cls(Fraction(0) if text == "0" else Fraction(parse_count(text, where)), "tokens")
        except RecipeError:
            raise RecipeError(
                invalid(where, value, "write `500 steps`, `2M` (tokens) or `2%` (of the phase)")
            ) from None

    def steps(self, tokens_per_step: int, phase_steps: int) -> int:
        """The span in whole steps, rounded; never less than one unless the span is zero."""
        if self.amount == 0:
            return 0
        exact = {
            "steps": self.amount,
            "tokens": self.amount / tokens_per_step,
            "share": self.amount * phase_steps,
        }[self.unit]
        return max(1, round(exact))

    def __str__(self) -> str:
        if self.unit == "share":
            percent = self.amount * 100
            return f"{percent if percent.denominator == 1 else float(percent)!s}%"
        return f"{self.amount} steps" if self.unit == "steps" else str(self.amount)


def cadence(value: object, where: str) -> Span:
    span = Span.parse(value, where)
    if span.amount == 0:
        raise RecipeError(invalid(where, value, "write how often, such as `500 steps`, `2M` or `10%`"))
    return span


def number(low: float = -math.inf, high: float = math.inf, *, open_low: bool = False) -> Callable[[object, str], float]:
    def parse(value: object, where: str) -> float:
        try:
            number = float("nan") if isinstance(value, bool) else float(str(value))
        except (TypeError, ValueError):
            number = float("nan")
        if not (low <= number <= high) or (open_low and number == low) or math.isinf(number):
            bounds = f"{'above' if open_low else 'at least'} {low:g}" + (
                f" and at most {high:g}" if high < math.inf else ""
            )
            raise RecipeError(invalid(where, value, f"write a number {bounds}"))
        return number

    return parse


def integer(low: int, high: int = 2**63 - 1) -> Callable[[object, str], int]:
    def parse(value: object, where: str) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            most = "below 2^63" if high == 2**63 - 1 else f"at most {high:,}"
            raise RecipeError(invalid(where, value, f"write a whole number, at least {low} and {most}"))
        return value

    return parse


def boolean(value: object, where: str) -> bool:
    if not isinstance(value, bool):
        raise RecipeError(invalid(where, value, "write true or false"))
    return value


def text(value: object, where: str) -> str:
    if isinstance(value, (dict, list)) or value is None or not str(value).strip():
        raise RecipeError(invalid(where, value, "write a name or path"))
    return str(value)


def one_of(*choices: str) -> Callable[[object, str], str]:
    def parse(value: object, where: str) -> str:
        if value not in choices:
            near = difflib.get_close_matches(str(value), choices, n=1)
            meant = f"; did you mean {near[0]!r}?" if near else ""
            raise RecipeError(invalid(where, value, f"write one of {', '.join(choices)}{meant}"))
        return str(value)

    return parse


def optional(parse: Callable[[object, str], Any]) -> Callable[[object, str], Any]:
    return lambda value, where: None if value is None else parse(value, where)


# ------------------------------------------------------------------------------------------------ building dataclasses

Section = TypeVar("Section")


def setting(parse: Callable[[object, str], Any], default: Any = dataclasses.MISSING, *, key: str | None = None) -> Any:
    metadata = {"parse": parse, "key": key}
    if default is dataclasses.MISSING:
        return field(metadata=metadata)
    return field(default=default, metadata=metadata)


def key_of(item: dataclasses.Field[Any]) -> str:
    return item.metadata.get("key") or item.name


def build(cls: type[Any], raw: object, where: str) -> Any:
    if not isinstance(raw, Mapping):
        raise RecipeError(
            invalid(where, raw, f"write a section with keys such as {', '.join(map(key_of, fields(cls)))}")
        )
    known = {key_of(item): item for item in fields(cls)}
    dot = f"{where}." if where else ""
    for key in raw:
        if key not in known:
            raise RecipeError(f"{dot}{key}: {unknown_key(key, known)}")
    values = {}
    for key, item in known.items():
        if key in raw:
            values[item.name] = item.metadata["parse"](raw[key], f"{dot}{key}")
        elif item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING:
            raise RecipeError(f"{dot}{key}: missing; every {where or 'recipe'} needs it")
    return cls(**values)


def section(cls: type[Section]) -> Callable[[object, str], Section]:
    return lambda raw, where: build(cls, raw, where)


def plain(value: Any) -> Any:
    """What YAML and JSON write of settings and results: what is not a finite number is None, as JSON has no other word
    for it. A method `as_json` says itself what a value is made of."""
    if hasattr(value, "as_json"):
        value = value.as_json()
    if dataclasses.is_dataclass(value) and not isinstance(value, (type, Span)):
        return {key_of(item): plain(getattr(value, item.name)) for item in fields(value)}
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, (Span, Fraction)):
        return str(value)
    return None if isinstance(value, float) and not math.isfinite(value) else value


class _StrictLoader(yaml.SafeLoader):
    """Safe YAML in which a key given twice is an error, not a silent override, and `on` a word, as in YAML 1.2."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                raise RecipeError(
                    f"line {key_node.start_mark.line + 1}: a key must be a plain word; put braces in quotes"
                )
            if key_node.value in seen:
                raise RecipeError(
                    f"line {key_node.start_mark.line + 1}: key {key_node.value!r} is given twice; keep one"
                )
            seen.add(key_node.value)
        return super().construct_mapping(node, deep)

    def construct_yaml_int(self, node: Any) -> int:
        number = super().construct_yaml_int(node)
        if abs(number) >= 2**64:  # Python computes with thousands of digits, and refuses to print them
            raise RecipeError(f"line {node.start_mark.line + 1}: a whole number of 2^64 or more; nothing is that large")
        return number


_StrictLoader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:bool"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_StrictLoader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"(true|false)\Z"), list("tf"))
_StrictLoader.add_constructor("tag:yaml.org,2002:int", _StrictLoader.construct_yaml_int)


def parse_yaml(text: str, where: str) -> Any:
    """The data of YAML text; RecipeError names the line of what is wrong."""
    try:
        return yaml.load(text, _StrictLoader)
    except RecipeError as error:
        raise RecipeError(f"{where}: {error}") from None
    except RecursionError:
        raise RecipeError(f"{where}: is nested too deeply; no recipe needs more than a few levels") from None
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a date or number that Python can't hold
        raise RecipeError(f"{where}: is not valid YAML: {error}") from None


def read_yaml(path: str | Path) -> Any:
    """The data of a YAML file; RecipeError names the file and line of what is wrong."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise RecipeError(f"{path}: cannot be read ({error.strerror}); give the path of a recipe in YAML") from None
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path}: is not valid YAML: {error}") from None
    return parse_yaml(text, str(path))


def apply_overrides(raw: Any, overrides: Sequence[str]) -> None:
    """Set values of YAML data by "a.b=c" strings: the value is YAML, list items go by name or position.

    Raises RecipeError.
    """
    try:
        for override in overrides:
            target, separator, value = override.partition("=")
            if not separator:
                raise RecipeError(invalid("overrides", override, "write KEY=VALUE, such as phases.pretrain.tokens=40M"))
            parsed = parse_yaml(value, f"overrides: {shown(override)}: the value")
            _set(raw, target.strip().split("."), parsed, target)
    except RecipeError as error:
        error.argument = True
        raise


def _set(node: Any, path: list[str], value: Any, whole: str) -> None:
    head, rest = path[0], path[1:]
    if isinstance(node, list):
        names = [item.get("name") if isinstance(item, dict) else None for item in node]
        index = names.index(head) if head in names else int(head) if re.fullmatch("[0-9]{1,9}", head) else len(node)
        if index >= len(node):
            expected = f"there is no item {head!r}; {nearest(head, [str(n) for n in names])}"
            raise RecipeError(invalid("overrides", whole, expected))
        key: Any = index
    elif isinstance(node, dict):
        key = head
    else:
        raise RecipeError(invalid("overrides", whole, f"{head!r} lies below a plain value; check the path"))
    if not rest:
        node[key] = value
        return
    if isinstance(node, dict) and node.get(key) is None:
        node[key] = {}
    _set(node[key], rest, value, whole)
