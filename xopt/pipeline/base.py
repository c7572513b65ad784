"""What a pass is: a frozen dataclass whose fields are its options, and a report of what it did.

A field says its legal values once, and everything reads them there: the check of a value, the text of an
error, the listing of ``xopt passes``, the textual and YAML pipelines, and the search space::

    keep: Annotated[float, Between(0.0, 1.0)] = 0.9
    score: Annotated[str, Choice("fisher", "optin")] = "fisher"
    schedule: Annotated[tuple[int, ...], Between(0, 4096)] = ()  # each element is checked

Kinds of options: bool, int, float, str, ``tuple`` of one of them (a list or a single element is taken as
well), and each of these or None. Every option has a default.
"""

from __future__ import annotations

import dataclasses
import math
import types
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from enum import Enum
from functools import cache
from typing import (
    TYPE_CHECKING,
    Annotated,
    Any,
    ClassVar,
    TypeAlias,
    Union,
    cast,
    get_args,
    get_origin,
    get_type_hints,
)

from xopt.errors import InputError

if TYPE_CHECKING:
    import onnx_ir as ir

    from xopt.pipeline.context import PassContext

OptionValue: TypeAlias = "bool | int | float | str | tuple[OptionValue, ...] | None"


class Effect(Enum):
    """What a pass may do to the outputs of a model; the manager checks it after every run."""

    EXACT = "exact"
    """The outputs stay the same to rounding."""
    LOSSY = "lossy"
    """The outputs may change: the loss is measured."""


@dataclass(frozen=True)
class Between:
    """Legal numbers: ``low <= value <= high``."""

    low: float
    high: float

    def allows(self, value: object) -> bool:
        return isinstance(value, (int, float)) and self.low <= value <= self.high

    def __str__(self) -> str:
        return f"from {self.low:g} to {self.high:g}"


@dataclass(frozen=True, init=False)
class Choice:
    """Legal words: one of ``values``."""

    values: tuple[str, ...]

    def __init__(self, *values: str) -> None:
        object.__setattr__(self, "values", values)

    def allows(self, value: object) -> bool:
        return value in self.values

    def __str__(self) -> str:
        return "one of " + ", ".join(self.values)


@dataclass(frozen=True)
class Strength:
    """Marks an option that says how much is changed; at ``harmless`` the pass changes nothing.

    A pass that costs too much accuracy is run again with such options moved towards it.
    """

    harmless: float


_KIND_WORDS: dict[type, str] = {bool: "true or false", int: "an integer", float: "a number", str: "a word"}


@dataclass(frozen=True)
class Option:
    """One field of a pass: its kind, its legal values and its default."""

    name: str
    kind: type
    """bool, int, float or str; of each element where ``many``."""
    many: bool
    optional: bool
    legal: Between | Choice | None
    default: OptionValue
    harmless: float | None = None
    """Value at which the pass changes nothing, where the option is its strength."""

    def __str__(self) -> str:
        one = str(self.legal) if isinstance(self.legal, Choice) else _KIND_WORDS[self.kind]
        if isinstance(self.legal, Between):
            one += f" {self.legal}"
        return (f"a list, each {one}" if self.many else one) + (", or none" if self.optional else "")

    def coerce(self, value: object, owner: str) -> OptionValue:
        """``value`` in the field's own type; InputError E-OPTION where it is not legal."""
        if value is None and self.optional:
            return None
        if not self.many:
            return self._one(value, owner)
        items = value if isinstance(value, (list, tuple)) else (value,)
        return tuple(self._one(item, owner) for item in items)

    def _one(self, value: object, owner: str) -> bool | int | float | str:
        if self.kind is float and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        right_kind = isinstance(value, self.kind) and (self.kind is bool or not isinstance(value, bool))
        is_nan = isinstance(value, float) and math.isnan(value)
        if not right_kind or is_nan or (self.legal is not None and not self.legal.allows(value)):
            raise InputError(
                "E-OPTION",
                f"{value!r} is not legal",
                where=f"option {self.name} of {owner}",
                cure=f"give {self}",
            )
        assert isinstance(value, (bool, int, float, str))
        return value


@dataclass(frozen=True)
class Pass(ABC):
    """One rewrite of a model. Subclasses are frozen dataclasses; their fields are the options."""

    name: ClassVar[str]
    effect: ClassVar[Effect]
    widens: ClassVar[bool] = False
    """Axes of inputs that were fixed may be open afterwards."""

    def __post_init__(self) -> None:
        for option in self.options().values():
            object.__setattr__(self, option.name, option.coerce(getattr(self, option.name), self.name))
        self.check()

    def check(self) -> None:  # noqa: B027, a hook
        """Check options against each other; raises InputError E-OPTION."""

    def requires(self, model: ir.Model, context: PassContext) -> None:  # noqa: B027, a hook
        """Check what must hold before the run; raises InputError."""

    @abstractmethod
    def run(self, model: ir.Model, context: PassContext) -> PassReport:
        """Rewrite ``model`` in place."""

    def ensures(self, model: ir.Model, context: PassContext) -> None:  # noqa: B027, a hook
        """Check what must hold after the run; raises VerificationError."""

    @classmethod
    def options(cls) -> Mapping[str, Option]:
        """The fields, by name, in the order of their declaration."""
        return _options_of(cls)

    def values(self, *, all_options: bool = True) -> dict[str, OptionValue]:
        """Value of each option; without ``all_options`` only of those that differ from the default."""
        values = {name: getattr(self, name) for name in self.options()}
        if all_options:
            return values
        return {name: value for name, value in values.items() if value != self.options()[name].default}

    @classmethod
    def summary(cls) -> str:
        """First line of the docstring."""
        return (cls.__doc__ or "").strip().split("\n")[0]


@cache
def _options_of(cls: type[Pass]) -> Mapping[str, Option]:
    hints = get_type_hints(cls, include_extras=True)
    return types.MappingProxyType({f.name: _option(f, hints[f.name]) for f in dataclasses.fields(cls)})


def _option(declared: dataclasses.Field[Any], hint: Any) -> Option:
    legal: Between | Choice | None = None
    harmless: float | None = None
    if get_origin(hint) is Annotated:
        hint, *notes = get_args(hint)
        legal = next((note for note in notes if isinstance(note, (Between, Choice))), None)
        harmless = next((note.harmless for note in notes if isinstance(note, Strength)), None)
    optional = get_origin(hint) in (Union, types.UnionType) and type(None) in get_args(hint)
    if optional:
        (hint,) = (arm for arm in get_args(hint) if arm is not type(None))
    many = get_origin(hint) in (tuple, list)
    if many:
        hint = get_args(hint)[0]
    if hint not in _KIND_WORDS or declared.default is dataclasses.MISSING:
        raise TypeError(f"option {declared.name}: it needs a known kind and a default")
    return Option(declared.name, hint, many, optional, legal, cast("OptionValue", declared.default), harmless)


@dataclass(frozen=True)
class Refusal:
    """A place that a pass looked at and left alone, and why (a word such as ``shared-residual``)."""

    what: str
    reason: str


@dataclass
class PassReport:
    """What a pass did, as numbers."""

    pass_: Pass
    matched: int = 0
    rewritten: int = 0
    accepted: list[str] = field(default_factory=list)
    refused: list[Refusal] = field(default_factory=list)
    numbers: dict[str, float | int | str] = field(default_factory=dict)

    def accepts(self, item: object, reason: str | None) -> bool:
        """Count ``item`` as matched; True when it may be rewritten, otherwise keep ``reason``."""
        self.matched += 1
        limit = _LIMIT.get()
        if reason is None and limit is not None and len(self.accepted) >= limit:
            reason = BEYOND_LIMIT
        if reason is None:
            self.accepted.append(describe(item))
        else:
            self.refused.append(Refusal(describe(item), reason))
        return reason is None

    def rewrote(self, item: object = None, count: int = 1) -> None:
        """Count ``count`` rewrites at ``item``."""
        self.rewritten += count

    @property
    def reasons(self) -> dict[str, int]:
        """How often each reason for a refusal was given."""
        counts: dict[str, int] = {}
        for refusal in self.refused:
            counts[refusal.reason] = counts.get(refusal.reason, 0) + 1
        return counts

    def to_dict(self) -> dict[str, object]:
        return {
            "pass": self.pass_.name,
            "options": self.pass_.values(),
            "matched": self.matched,
            "rewritten": self.rewritten,
            "refused": [dataclasses.asdict(refusal) for refusal in self.refused],
            "numbers": dict(self.numbers),
        }

    def __str__(self) -> str:
        refused = "".join(f", {count} refused ({reason})" for reason, count in self.reasons.items())
        return f"{self.pass_.name}: {self.matched} matched, {self.rewritten} rewritten{refused}"


BEYOND_LIMIT = "beyond-bisect-limit"
_LIMIT: ContextVar[int | None] = ContextVar("limit of accepted places", default=None)


@contextmanager
def application_limit(limit: int | None) -> Iterator[None]:
    """Let each pass accept only its first ``limit`` places: bisection finds the one that breaks a check."""
    token = _LIMIT.set(limit)
    try:
        yield
    finally:
        _LIMIT.reset(token)


def describe(item: object) -> str:
    """Name of a node, a value, a block or anything else, for a report."""
    index = getattr(item, "index", None)
    if isinstance(index, int):
        return f"block {index}"
    return str(getattr(item, "name", None) or getattr(item, "op_type", None) or item)
