"""A config field: its default, meaning, allowed values and the wording of messages about it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

NUMBER = (int, float)


@dataclass(frozen=True)
class Field:
    """A config field.

    Attributes:
      default: the value of the field unless a config sets it.
      meaning: a description of the field for readers.
      check: a function that returns whether a value of the right type is allowed.
      words: a description of the allowed values that completes the sentence "it should be …".
      types: the types that a value may have; () allows the type of `default` only, and int for float.
      may_change_on_resume: True if no training depends on the field, so that a resumed run may change it.
    """

    default: Any
    meaning: str
    check: Callable[[Any], bool] = lambda value: True
    words: str = ""
    types: tuple[type, ...] = ()
    may_change_on_resume: bool = False

    def has_type(self, value: Any) -> bool:
        """Return whether a value has a type that the field may have."""
        types = self.types or (NUMBER if isinstance(self.default, float) else (type(self.default),))
        if isinstance(value, bool):  # a bool is an int in Python, but not in a config
            return bool in types
        return isinstance(value, types)

    def describe_type(self) -> str:
        """Describe the types that the field may have, for a message, such as "of type int, like 60"."""
        if self.types:
            return " or ".join("None" if t is type(None) else f"of type {t.__name__}" for t in self.types)
        return f"of type {type(self.default).__name__}, like {self.default!r}"


def at_least(minimum, *, or_none=False):
    """Return the arguments of a field whose values are at least `minimum`; with `or_none`, integers or None."""
    words = f"at least {minimum}" + ", or None" * or_none
    types = {"types": (int, type(None))} if or_none else {}
    return {"check": lambda value: value is None or value >= minimum, "words": words, **types}


def one_of(*names):
    """Return the arguments `check` and `words` of a field whose values are `names`."""
    words = f"{', '.join(names[:-1])} or {names[-1]}"
    return {"check": lambda value: value in names, "words": words}
