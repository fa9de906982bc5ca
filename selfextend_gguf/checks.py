"""Values from outside, whatever door they come through: they are what they must be, or a ConfigError says why not.

Beyond this file they go to C, which takes a NaN for a number and the lower 32 bits of one that is too large.
"""

from __future__ import annotations

import math
import numbers
import operator
import os
import reprlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from selfextend_gguf.errors import ConfigError, TextError, UnknownArgumentError

_LARGEST = 3.4e38  # of a 32-bit float
Check = Callable[[str, Any], Any]  #: name and value -> the value to go on with. Raises ConfigError.


def shown(value: object) -> str:
    """A value in an error message: short, in one line."""
    if isinstance(value, int) and value.bit_length() > 200:
        return "a number of more than 60 digits"  # Python refuses to print some
    return reprlib.repr(value)


def whole_number(name: str, value: Any, low: int | None = None, high: int | None = None, why: str = "") -> int:
    """`value` as an int from `low` to `high`. Numpy's integers are whole numbers, truth values are none.

    Raises ConfigError; `why` ends what the message says of the range.
    """
    try:
        number = None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = None
    if number is None:
        raise ConfigError(f"{name} must be a whole number, not {shown(value)}")
    if (low is not None and number < low) or (high is not None and number > high):
        limits = f"between {low} and {high}" if high is not None else f"at least {low}"
        raise ConfigError(f"{name} must be {limits}{why}, not {shown(number)}")
    return number


def real_number(name: str, value: Any, low: float = -_LARGEST, high: float = _LARGEST) -> float:
    """`value` as a float from `low` to `high`, which C's float can hold. Raises ConfigError."""
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        raise ConfigError(f"{name} must be a number, not {shown(value)}")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise ConfigError(f"{name} must be a finite number, not {shown(value)}")
    if not low <= number <= high:
        limits = f"between {low:g} and {high:g}" if high < _LARGEST else f"at least {low:g} and within C's range"
        raise ConfigError(f"{name} must be {limits}, not {shown(value)}")
    return number


# ---- checks for tables -----------------------------------------------------------------------------------------


def whole(low: int | None = None, high: int | None = None) -> Check:
    """A whole number in a range."""
    return lambda name, value: whole_number(name, value, low, high)


def real(low: float = -_LARGEST, high: float = _LARGEST) -> Check:
    """A finite number in a range."""
    return lambda name, value: real_number(name, value, low, high)


#: A seed; llama.cpp's has 32 bits, with a sign or without.
seed = whole(-(2**31), 2**32)


def optional(check: Check) -> Check:
    """What `check` takes, or None."""
    return lambda name, value: None if value is None else check(name, value)


def truth(name: str, value: Any) -> bool:
    """True or False, or 1 or 0; a text such as "no" would count as true."""
    if not isinstance(value, bool | int | np.bool_) or value not in (0, 1):
        raise ConfigError(f"{name} must be True or False, not {shown(value)}")
    return bool(value)


def callable_(name: str, value: Any) -> Any:
    """Something to call."""
    if not callable(value):
        raise ConfigError(f"{name} must be callable, not {shown(value)}")
    return value


def text(name: str, value: Any) -> str:
    """A text. Raises TextError for what UTF-8 cannot express: half a character."""
    if not isinstance(value, str):
        raise ConfigError(f"{name} must be a text, not {shown(value)}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise TextError(f"{name} is not Unicode: half a character at position {error.start}") from error
    return value


def path(name: str, value: Any) -> str:
    """A path as a text."""
    if not isinstance(value, str | os.PathLike) or "\0" in os.fsdecode(value):
        raise ConfigError(f"{name} must be a path, not {shown(value)}")
    return os.fsdecode(value)


def check_all(checks: Mapping[str, Check], values: Mapping[str, Any]) -> dict[str, Any]:
    """`values` as their checks return them. Raises ConfigError, and UnknownArgumentError for one without a check."""
    unknown = sorted(set(values) - set(checks))
    if unknown:
        raise UnknownArgumentError(f"unknown argument{'s' * (len(unknown) > 1)}: {', '.join(unknown)}")
    return {name: checks[name](name, value) for name, value in values.items()}
