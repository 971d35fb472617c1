"""Errors that the user can correct, and the wording of their messages."""

import difflib
import functools
import importlib
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")


class UserError(Exception):
    """An error that the user can correct. `main` prints its message, one sentence, without a traceback."""


def one_line(error: Exception) -> str:
    """Describe an error in one line. The middle of a long message is left out, because the cause comes last."""
    text = " ".join(f"{type(error).__name__}: {error}".split())
    if code := re.search(r"os_error_code='(\d+)'", text):  # TensorStore's messages are long; this is the cause
        return os.strerror(int(code[1]))
    return text if len(text) <= 400 else f"{text[:200]} […] {text[-200:]}"


class UnknownNameError(UserError):
    """A name under which nothing is registered."""


def lookup(options: Mapping[str, T], field: str, name: str) -> T:
    """Return `options[name]`.

    Args:
      options: the registered objects by name.
      field: the config field that holds `name`, for the message.
      name: the name to look up.

    Raises:
      UnknownNameError: `name` is not in `options`. The message lists the names and any similar one.
    """
    if name not in options:
        raise UnknownNameError(
            f"{field} is {name!r}; it should be one of {', '.join(options)}{_suggestion(name, options)}"
        )
    return options[name]


def _suggestion(name, options) -> str:
    close = difflib.get_close_matches(str(name), options, n=1)
    return f" (did you mean {close[0]}?)" if close else ""


def is_import_path(name: str) -> bool:
    """Return whether a name has the form of a dotted path, "module:attribute".

    Names with a version, such as "cifar10:3.0.2", do not.
    """
    return bool(re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*", name))


def import_by_path(path: str, field: str) -> Any:
    """Import the object with a dotted path such as "their_package.sets:mine".

    Args:
      path: the name of a module, a colon, and the name of an attribute of it.
      field: the config field that holds `path`, for the message.

    Raises:
      UserError: the module cannot be imported, or has no such attribute.
    """
    module_name, _, attribute = path.partition(":")
    try:
        return functools.reduce(getattr, attribute.split("."), importlib.import_module(module_name))
    except Exception as error:  # importing a user's module may raise anything
        raise UserError(f"{field} is {path!r}, which cannot be imported: {one_line(error)}") from error


def lookup_or_import(options: dict, field: str, name: str) -> Any:
    """Return `options[name]`; import the object instead if `name` is not in `options` and has a colon.

    Raises: see `lookup` and `import_by_path`.
    """
    if name not in options and ":" in name:
        return import_by_path(name, field)
    return lookup(options, field, name)


def user_path(path: str | os.PathLike, name: str) -> Path:
    """Return a path that the user gave, with `~` expanded.

    Args:
      path: the path.
      name: the flag or config field that holds it, for the message.

    Raises:
      UserError: the path is empty, or begins with `~` and there is no home directory.
    """
    if not str(path):
        raise UserError(f"{name} is empty; it should be the path of a folder")
    expanded = os.path.expanduser(path)  # pathlib's would also expand the ~ of ./~
    if str(path).startswith("~") and expanded == str(path):
        raise UserError(f"{name} is {str(path)!r}, and there is no home directory to replace ~ with")
    return Path(expanded)
