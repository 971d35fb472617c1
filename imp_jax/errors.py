"""Errors that the user can mend, and their wording."""

import difflib
import os
import re
from pathlib import Path


class UserError(Exception):
    """Something the user can mend, said in one sentence; `main` prints it without a traceback."""


def one_line(error: Exception) -> str:
    """An error as part of a sentence; a long one without its middle, as the cause comes last."""
    text = " ".join(f"{type(error).__name__}: {error}".split())
    if code := re.search(r"os_error_code='(\d+)'", text):  # TensorStore's, after all it knows of the file
        return os.strerror(int(code[1]))
    return text if len(text) <= 400 else f"{text[:200]} […] {text[-200:]}"


class UnknownNameError(UserError):
    """A name that nothing is registered under."""


def lookup(options: dict, field: str, name: str):
    """`options[name]`, or an UnknownNameError that says the field, the value and what there is."""
    if name not in options:
        raise UnknownNameError(
            f"{field} is {name!r}; it should be one of {', '.join(options)}{_suggestion(name, options)}"
        )
    return options[name]


def _suggestion(name, options) -> str:
    close = difflib.get_close_matches(str(name), options, n=1)
    return f" (did you mean {close[0]}?)" if close else ""


def user_path(path: str | os.PathLike, name: str) -> Path:
    """A path that the user gave as `name`, with `~` expanded.

    Raises:
      UserError: an empty path, or a `~` without a home directory.
    """
    if not str(path):
        raise UserError(f"{name} is empty; it should be the path of a folder")
    expanded = os.path.expanduser(path)  # not pathlib's, which takes the ~ of ./~ for a home directory too
    if str(path).startswith("~") and expanded == str(path):
        raise UserError(f"{name} is {str(path)!r}, and there is no home directory to put for ~")
    return Path(expanded)
