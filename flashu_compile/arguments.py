"""Checks of what callers and files give: its type, and the bounds that keep work and memory finite.

Each check returns the value, in plain Python types, or raises the error class that the caller passes, with
one sentence that says what was expected and what was given.
"""

from __future__ import annotations

import math
import numbers
import operator
import reprlib
from collections.abc import Mapping
from typing import Any

from flashu_compile.errors import ConfigurationError, FlashuError, InputError

#: Time points of a trajectory. Published samplers take 20 to 50; beyond some hundred, rounding hides the difference.
LARGEST_POINTS = 1000
#: Threads of one engine; machines have some hundred cores at most.
LARGEST_THREADS = 1024
#: Prompts or questions of one call, and samples that something is measured on.
LARGEST_COUNT = 10_000
#: Pixels of a side of a picture that is drawn; published models draw 1024.
LARGEST_SIDE = 4096
#: Seeds of builds; noise takes those of the samples after it too, which must stay below 2**64.
LARGEST_BUILD_SEED = 2**63 - 1

#: The size of pictures that are drawn, in pixels: the side of squares, "768x512" (width first), or such a pair.
Resolution = int | str | tuple[int, int]

_repr = reprlib.Repr()
_repr.maxstring = _repr.maxother = _repr.maxlong = 60


def shown(value: object) -> str:
    """Return `repr` of a value on one line, cut to some 60 characters, or its type if it cannot be printed."""
    try:
        return " ".join(_repr.repr(value).split())
    except Exception:  # an integer of thousands of digits raises, and foreign types do what they like
        return f"a value of type {type(value).__name__} that cannot be printed"


def is_number(value: Any) -> bool:
    """Tell whether `value` is a finite real number; a bool is not one."""
    real = isinstance(value, numbers.Real) and not isinstance(value, bool)
    return real and bool(-math.inf < value < math.inf)


def is_integer(value: Any) -> bool:
    """Tell whether `value` is an integer; a bool is not one."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def integer(
    name: str, value: object, low: int, high: int, error: type[FlashuError] = ConfigurationError
) -> int:
    """Check an integer in [low, high], of Python or NumPy."""
    try:
        if isinstance(value, bool):
            raise TypeError
        number = operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        number = None
    if number is None or not low <= number <= high:
        raise error(f"{name} must be an integer from {low} to {high:,}, not {shown(value)}.")
    return number


def number(
    name: str,
    value: Any,
    low: float,
    high: float,
    error: type[FlashuError] = ConfigurationError,
    *,
    above: bool = False,
    below: bool = False,
) -> float:
    """Check a finite real number in [low, high]; `above` and `below` exclude the lower and the upper end."""
    ok = is_number(value) and low <= value <= high
    if not ok or (above and value == low) or (below and value == high):
        least = f"above {low:g}" if above else f"at least {low:g}"
        most = f"below {high:g}" if below else f"at most {high:g}"
        raise error(f"{name} must be a number {least} and {most}, not {shown(value)}.")
    return float(value)


def picture_size(resolution: object) -> tuple[int, int]:
    """Return (width, height) in pixels of a resolution: a number for squares, "768x512", or such a pair."""
    given: Any = resolution.lower().split("x") if isinstance(resolution, str) else resolution
    sides = list(given) if isinstance(given, list | tuple) else [given]
    if isinstance(resolution, str):
        sides = [
            int(side) if side.isascii() and side.isdecimal() and len(side) < 9 else side for side in sides
        ]
    sides *= 2 if len(sides) == 1 else 1
    if len(sides) != 2 or not all(is_integer(side) and 1 <= side <= LARGEST_SIDE for side in sides):
        raise ConfigurationError(
            f"A resolution is a number of pixels or WIDTHxHEIGHT, such as 512 or 768x512, up to {LARGEST_SIDE:,} a "
            f"side, not {shown(resolution)}."
        )
    return int(sides[0]), int(sides[1])


def names_a_size(resolution: object) -> bool:
    """Tell whether a resolution is a name, such as "show-o2-1.5B-HQ", which the model has to know."""
    return isinstance(resolution, str) and "-" in resolution and resolution[:1].isalpha()


def flag(name: str, value: object, error: type[FlashuError] = ConfigurationError) -> bool:
    """Check a bool; a text such as "no", which would count as true, is refused."""
    if not isinstance(value, bool):
        raise error(f"{name} must be true or false, not {shown(value)}.")
    return value


def name_of(what: str, value: object, error: type[FlashuError] = ConfigurationError) -> str:
    """Check a name: any text that is not empty."""
    if not isinstance(value, str) or not value:
        raise error(f"{what} must be a text that is not empty, not {shown(value)}.")
    return value


def mapping(name: str, value: object, error: type[FlashuError] = ConfigurationError) -> dict[str, Any]:
    """Check a mapping by names and return it as a dict; None becomes an empty one."""
    if value is None:
        return {}
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise error(f"{name} must be a mapping from names to values, not {shown(value)}.")
    return dict(value)


def function(name: str, value: object, error: type[FlashuError] = ConfigurationError) -> None:
    """Check that `value` is callable or None."""
    if value is not None and not callable(value):
        raise error(f"{name} must be a function or None, not {shown(value)}.")


def texts(name: str, value: object) -> list[str]:
    """Check a prompt or question, or a list of them, and return a list. Raises `InputError`."""
    found = [value] if isinstance(value, str) else value
    if not isinstance(found, list | tuple):
        raise InputError(f"A {name} is a string or a list of strings, not {type(value).__name__}.")
    if len(found) > LARGEST_COUNT:
        raise InputError(
            f"{len(found):,} {name}s are more than one call takes; give at most {LARGEST_COUNT:,}."
        )
    for text in found:
        if not isinstance(text, str):
            raise InputError(f"A {name} is a string, not {type(text).__name__}.")
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:
            raise InputError(f"The {name} {shown(text)} is not valid Unicode text.") from None
    return list(found)
