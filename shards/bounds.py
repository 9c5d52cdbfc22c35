"""Bounds that stand beside the options of a command: `Annotated[int, AT_LEAST_1]`."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Annotated, Any, get_args, get_origin, get_type_hints

from higgs_tune.shards.errors import UserError


@dataclass(frozen=True)
class Bound:
    """What a number must be; None is not checked, NaN is within no bound."""

    text: str
    more_than: float = -math.inf
    at_least: float = -math.inf
    at_most: float = math.inf
    below: float = math.inf

    def allows(self, value: float | None) -> bool:
        return value is None or (self.more_than < value < self.below and self.at_least <= value <= self.at_most)


MORE_THAN_0 = Bound("more than 0", more_than=0)
AT_LEAST_0 = Bound("at least 0", at_least=0)
AT_LEAST_1 = Bound("at least 1", at_least=1)
FROM_0_TO_1 = Bound("0 to 1", at_least=0, at_most=1)
FROM_0_BELOW_1 = Bound("at least 0 and below 1", at_least=0, below=1)


def bounds_of(owner: type) -> dict[str, tuple[Any, Bound | None]]:
    """Of each field of a dataclass: its type without `Annotated`, and its bound."""
    hints = get_type_hints(owner, include_extras=True)
    found: dict[str, tuple[Any, Bound | None]] = {}
    for item in fields(owner):
        hint = hints[item.name]
        kind, *extras = get_args(hint) if get_origin(hint) is Annotated else (hint,)
        found[item.name] = kind, next((extra for extra in extras if isinstance(extra, Bound)), None)
    return found


def check_bounds(options: Any) -> None:
    """Check every field of a dataclass that has a bound.

    Raises:
        UserError: a value is out of its range; says which, expected and got.
    """
    for name, (_, bound) in bounds_of(type(options)).items():
        check_bound(name, bound, getattr(options, name))


def check_bound(name: str, bound: Bound | None, value: Any) -> None:
    """Check one option.

    Raises:
        UserError: the value is out of its range.
    """
    if bound and not bound.allows(value):
        raise UserError(f"--{name} is out of range", expected=bound.text, got=value)
