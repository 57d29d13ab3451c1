"""The parts of settings: counts, shares and spans read exactly, dataclasses built from YAML, YAML read strictly.

A field of a settings dataclass is a `setting` with its parser; `build` makes the dataclass from plain data. Its errors
name the field, the value given and the remedy.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from fractions import Fraction
from numbers import Integral
from pathlib import Path, PurePath
from typing import Any, TypeVar

import yaml

from spt_fast.data.mixture import exact_share
from spt_fast.errors import RecipeError, SptError, among, cut, invalid, nearest, shown, shown_key, shown_path
from spt_fast.files import NO_USER, check_regular, expanded, settled
from spt_fast.synonyms import unknown_key

# -------------------------------------------------------------------------------------------- values and their units

_COUNT = re.compile(r"([0-9][0-9_]{0,29}(?:\.[0-9]{1,30})?(?:[eE]\+?[0-9]{1,2})?)\s*([kKmMbBtT]?)")
_FLOAT = re.compile(r"[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?")
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
        meant = f"; did you mean {text}%?" if 1 < share <= 100 and not text.endswith("%") else ""
        raise RecipeError(invalid(where, value, f"write a share between 0 and 1{meant}"))
    return share


def rounded_share(value: object, where: str) -> float:
    return float(parse_share(value, where))


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
        return max(1, round(self.exact_steps(tokens_per_step, phase_steps))) if self.amount else 0

    def exact_steps(self, tokens_per_step: int, phase_steps: int | Fraction) -> Fraction:
        """The span in steps and parts of one."""
        return {
            "steps": self.amount,
            "tokens": self.amount / tokens_per_step,
            "share": self.amount * phase_steps,
        }[self.unit]

    def as_json(self) -> str:
        return str(self)

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


LARGEST = 3.4e38
"""Of float32, in which numbers are used."""


def number(low: float = -LARGEST, high: float = LARGEST, *, open_low: bool = False) -> Callable[[object, str], float]:
    def parse(value: object, where: str) -> float:
        try:
            number = float("nan") if isinstance(value, bool) or not _FLOAT.fullmatch(str(value)) else float(str(value))
        except (TypeError, ValueError):
            number = float("nan")
        if not (low <= number <= high) or (open_low and number == low):
            least = "" if low == -LARGEST else f" {'above' if open_low else 'of at least'} {low:g}"
            most = f" and at most {high:g}" if high < LARGEST or LARGEST < number < math.inf else ""
            raise RecipeError(invalid(where, value, f"write a number{least}{most}"))
        return number

    return parse


def integer(low: int = -(2**63), high: int = 2**63 - 1) -> Callable[[object, str], int]:
    def parse(value: object, where: str) -> int:
        if isinstance(value, str) and re.fullmatch(r"[1-9][0-9]{0,18}(_[0-9]{3}){1,6}", value):
            value = int(value)  # 1_000
        whole = int(value) if isinstance(value, Integral) and not isinstance(value, bool) else None  # NumPy's too
        if whole is None or not low <= whole <= high:
            least = "" if low == -(2**63) else f", at least {low} and"
            most = "below 2^63" if high == 2**63 - 1 else f"at most {high:,}"
            raise RecipeError(invalid(where, value, f"write a whole number{least} {most}"))
        return whole

    return parse


def boolean(value: object, where: str) -> bool:
    if not isinstance(value, bool):
        raise RecipeError(invalid(where, value, "write true or false"))
    return value


_NO_NAME = re.compile(r"\s*|.{1001,}|.*[\x00-\x1f\x7f-\x9f\ud800-\udfff].*", re.DOTALL)


def text(value: object, where: str) -> str:
    """A name or path as it was written. What YAML reads as a number is refused: digits may be lost (1.10)."""
    written = str(value) if isinstance(value, (str, int, PurePath)) and not isinstance(value, bool) else ""
    longest_name_bytes = 255
    if _NO_NAME.fullmatch(written) or any(len(part.encode()) > longest_name_bytes for part in written.split("/")):
        quotes = "" if value is None or isinstance(value, (str, dict, list)) else ", in quotes"
        raise RecipeError(invalid(where, value, f"write a name or path{quotes}"))
    return written


def path(value: object, where: str) -> str:
    """A path or name with ~ and variables of the environment expanded."""
    given = text(value, where)
    found = expanded(given)
    if unset := re.search(
        r"(?:^|/)\$([A-Za-z_]\w*|\{\w+\})(?:/|$)", found
    ):  # elsewhere a dollar may be part of the name
        name = unset[1].strip("{}")
        raise RecipeError(invalid(where, given, f"the environment has no {name}; set it, or write the path itself"))
    if not found:
        raise RecipeError(invalid(where, given, "it expands to nothing; set the variable, or write the path itself"))
    if found.startswith("~"):
        raise RecipeError(invalid(where, given, NO_USER))
    return str(settled(found)) if str(PurePath(found)).startswith("~") else found


def paths(value: object, where: str) -> str | tuple[str, ...]:
    """A path, or a list of them."""
    if not isinstance(value, (list, tuple)):
        return path(value, where)
    if not value:
        raise RecipeError(invalid(where, value, "name at least one path"))
    return tuple(path(item, f"{where}.{i}") for i, item in enumerate(value))


def one_of(*choices: str) -> Callable[[object, str], str]:
    def parse(value: object, where: str) -> str:
        if value not in choices:
            raise RecipeError(invalid(where, value, among(value, choices)))
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
            raise RecipeError(f"{dot}{shown_key(key)}: {unknown_key(key, known)}")
    values = {}
    for key, item in known.items():
        if key in raw:
            values[item.name] = item.metadata["parse"](raw[key], f"{dot}{key}")
        elif item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING:
            raise RecipeError(f"{dot}{key}: missing; every {where or 'recipe'} needs it")
    return cls(**values)


def section(cls: type[Section]) -> Callable[[object, str], Section]:
    return lambda raw, where: build(cls, raw, where)


# ------------------------------------------------------------------------------------------------ YAML

MAX_CHARACTERS = 1_000_000
"""Limit for a YAML file, before and after its aliases are expanded."""


class _StrictLoader(yaml.SafeLoader):
    """Strict YAML: a value that isn't plainly a number, true, false or null is text, and so is every key.

    Sexagesimal (1:30) and octal (010) numbers, dates and the other names of true and false stay text; nothing that
    `yaml.safe_dump` writes as text becomes a number. A key given twice is an error.
    """

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self._unfolded: dict[yaml.Node, int] = {}
        """Characters of each node, its aliases included."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        is_alias = self.check_event(yaml.AliasEvent)
        node = super().compose_node(parent, index)
        assert node
        if is_alias and node not in self._unfolded:
            raise self._error(node, "an alias refers to a node that contains it; write it out")
        if not is_alias:
            self._unfolded[node] = self._size(node)
        if self._unfolded[node] > MAX_CHARACTERS:
            raise self._error(node, f"aliases expand to more than {MAX_CHARACTERS:,} characters; use fewer")
        return node

    def _size(self, node: yaml.Node) -> int:
        if isinstance(node, yaml.ScalarNode):
            return 1 + len(node.value)
        parts = node.value if isinstance(node, yaml.SequenceNode) else [part for pair in node.value for part in pair]
        return 1 + sum(self._unfolded[part] for part in parts)

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise self._error(key, "a key must be a plain word; put braces in quotes")
            if key.value in seen:
                raise self._error(key, f"key {shown(key.value)} is given twice; keep one")
            seen.add(key.value)
            if key.tag != "tag:yaml.org,2002:merge":
                key.tag = "tag:yaml.org,2002:str"
        return node

    def construct_yaml_int(self, node: Any) -> int:
        number = int(node.value)
        if abs(number) >= 2**64:  # Python computes with thousands of digits, and refuses to print them
            raise self._error(node, "a whole number of 2^64 or more; write a smaller one")
        return number

    @staticmethod
    def _error(node: yaml.Node, problem: str) -> RecipeError:
        return RecipeError(f"line {node.start_mark.line + 1}: {problem}")


_StrictLoader.yaml_implicit_resolvers = {}
for _tag, _pattern, _first in (
    ("null", "~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", "true|false", ["t", "f"]),
    ("int", "-?(0|[1-9][0-9]*)", list("-0123456789")),
    ("float", r"[-+]?([0-9]+\.[0-9]*|\.[0-9]+)([eE][-+][0-9]+)?", list("-+.0123456789")),
    ("float", r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)", list("-+.")),
    ("merge", "<<", ["<"]),
):
    _StrictLoader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(rf"({_pattern})\Z"), _first)
_StrictLoader.add_constructor("tag:yaml.org,2002:int", _StrictLoader.construct_yaml_int)


def parse_yaml(text: str, where: str) -> Any:
    """The data of YAML text; RecipeError names the line."""
    try:
        return yaml.load(text, _StrictLoader)
    except RecipeError as error:
        raise RecipeError(f"{where}: {error}") from None
    except RecursionError:
        raise RecipeError(f"{where}: is nested too deeply; use fewer levels") from None
    except yaml.MarkedYAMLError as error:
        line = f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""
        raise RecipeError(f"{where}: is not valid YAML: {line}{cut(str(error.problem))}") from None
    except (KeyError, AttributeError, TypeError) as error:  # a tag such as !!bool on another kind of value
        raise RecipeError(f"{where}: is not valid YAML: a tag doesn't fit its value ({cut(str(error))})") from None
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a number that Python can't hold
        raise RecipeError(f"{where}: is not valid YAML: {cut(str(error).splitlines()[0])}") from None


def read_yaml(path: str | Path) -> Any:
    """The data of a YAML file; RecipeError names the file and line."""
    try:
        check_regular(Path(path))
        with Path(path).open(encoding="utf-8") as file:
            text = file.read(MAX_CHARACTERS + 1)
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path}: is not valid YAML: {error}") from None
    except (OSError, ValueError) as error:  # ValueError: no file can have that name
        why = error.strerror if isinstance(error, OSError) else "no file can have that name"
        raise RecipeError(f"{shown_path(path)}: cannot be read ({why}); give the path of a recipe in YAML") from None
    if len(text) > MAX_CHARACTERS:
        raise RecipeError(f"{path}: holds more than {MAX_CHARACTERS:,} characters; give the path of a recipe in YAML")
    return parse_yaml(text, str(path))


@contextmanager
def naming(where: object) -> Iterator[None]:
    """Begin the errors raised inside with `where`: the file of a field, or the field that names a file."""
    try:
        yield
    except SptError as error:
        if not error.argument and not str(error).startswith(f"{where}: "):
            error.args = (f"{where}: {error}",)
        raise


def apply_overrides(raw: Any, overrides: str | Sequence[str]) -> None:
    """Set values of YAML data by "a.b=c" strings: the value is YAML, list items go by name or position.

    Raises RecipeError.
    """
    given = [overrides] if isinstance(overrides, str) else overrides
    try:
        if not isinstance(given, Sequence) or not all(isinstance(override, str) for override in given):
            raise RecipeError(invalid("overrides", overrides, 'give one or several texts, such as "seed=1"'))
        for override in given:
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
            expected = f"there is no item {shown(head)}; {nearest(head, [str(n) for n in names])}"
            raise RecipeError(invalid("overrides", whole, expected))
        key: Any = index
    elif isinstance(node, dict):
        if head not in node and (item := re.fullmatch(r"(.+)\[(.+)\]", head)):
            dotted = " or ".join(_dotted(node.get(item[1]), item[1], item[2], whole))
            raise RecipeError(invalid("overrides", whole, f"items go by position or name; write {dotted}"))
        key = head
    else:
        raise RecipeError(invalid("overrides", whole, f"{shown(head)} is inside a plain value; check the path"))
    if not rest:
        node[key] = value
        return
    if isinstance(node, dict) and node.get(key) is None:
        node[key] = {}
    _set(node[key], rest, value, whole)


def _dotted(items: object, key: str, item: str, whole: str) -> list[str]:
    """A path with `key[item]` in it, and maybe other brackets, with dots; with the name too of an item by position."""
    dotted = re.sub(r"\[([^][]+)\]", r".\1", whole)
    found = items[int(item)] if isinstance(items, list) and item in map(str, range(len(items))) else None
    name = found.get("name") if isinstance(found, dict) else None
    return [dotted] if name is None else [dotted, dotted.replace(f"{key}.{item}", f"{key}.{name}", 1)]
