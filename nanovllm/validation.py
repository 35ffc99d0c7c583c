"""Checks of the user's values. Each failure is a ValueError or TypeError with name, rule, value and remedy."""

import dataclasses
import difflib
import functools
import math
import numbers
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

_Class = TypeVar("_Class", bound=type)


def reject_unknown_options(cls: _Class) -> _Class:
    """Class decorator for dataclasses: an unknown keyword raises a TypeError that names the nearest field."""
    original, known = cls.__init__, [field.name for field in dataclasses.fields(cls)]

    @functools.wraps(original)
    def checked(self: Any, *args: Any, **kwargs: Any) -> None:
        for name in kwargs:
            if name not in known:
                nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
                hint = f"; did you mean {nearest[0]!r}?" if nearest else f"; known options: {', '.join(known)}"
                raise TypeError(f"{cls.__name__} has no option {name!r}{hint}")
        original(self, *args, **kwargs)

    cls.__init__ = checked  # type: ignore[misc]
    return cls


def is_int(value: Any) -> bool:
    """True for an int or a numpy integer, False for a bool."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def as_ints(values: Iterable[Any]) -> list[int] | None:
    """The values as a new list of int; None unless is_int holds for all. Checks each type once, not each value."""
    values = list(values)
    types = list(map(type, values))
    if types.count(int) == len(values):  # counting takes a third of the time of set(types)
        return values
    are_integers = all(issubclass(kind, numbers.Integral) and kind is not bool for kind in set(types))
    return list(map(int, values)) if are_integers else None


def convert_numpy_integers(instance: Any) -> None:
    """Replace numpy integers in the fields of a frozen dataclass by ints: arithmetic on small ones overflows."""
    for field in dataclasses.fields(instance):
        value = getattr(instance, field.name)
        if is_int(value):
            object.__setattr__(instance, field.name, int(value))


def require_int(name: str, value: Any, minimum: int, maximum: int | None = None, remedy: str = "") -> None:
    """Raise ValueError unless `value` is an integer (not a bool) in [minimum, maximum]."""
    if is_int(value) and value >= minimum and (maximum is None or value <= maximum):
        return
    rule = f"an integer of at least {minimum}" if maximum is None else f"an integer from {minimum} to {maximum}"
    raise ValueError(f"{name} must be {rule}, got {value!r}{'; ' + remedy if remedy else ''}")


def require_bool(name: str, value: Any) -> None:
    """Raise ValueError unless `value` is True or False."""
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be True or False, got {value!r}")


def require_number(name: str, value: Any, rule: str, is_allowed: Callable[[float], bool], remedy: str = "") -> None:
    """Raise ValueError unless `value` is a finite number for which `is_allowed` holds; `rule` says this in words."""
    if not _is_finite(value) or not is_allowed(float(value)):  # a float16 compared with 1e39 warns
        raise ValueError(f"{name} must be {rule}, got {value!r}{'; ' + remedy if remedy else ''}")


def require_choice(name: str, value: Any, choices: Iterable[str], remedy: str = "") -> None:
    """Raise ValueError unless `value` is one of `choices`."""
    choices = list(choices)
    if not isinstance(value, str) or value not in choices:
        allowed = ", ".join(repr(choice) for choice in choices)
        raise ValueError(f"{name} must be one of {allowed}, got {value!r}{'; ' + remedy if remedy else ''}")


def require_unicode(name: str, text: str) -> None:
    """Raise ValueError for a lone surrogate, which stands for an undecodable byte. No tokenizer accepts it."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{name} must be valid Unicode, got {text!r} with a lone surrogate at position {error.start}; decode its "
            "bytes with the right encoding, or with errors='replace'"
        ) from error


def _is_finite(value: Any) -> bool:
    """True for a finite Python or numpy number in the range of float, False for a bool."""
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # an int outside the range of float
        return False
