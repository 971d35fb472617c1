"""Iterative magnitude pruning and the lottery ticket hypothesis, as pure functions over parameter trees."""

import importlib

__version__ = "0.1.0"

_LAZY_MODULES = ("connectivity", "masking", "pruning", "repulsion", "similarity")


def __getattr__(name):
    """Import a module for notebooks on first use, so that `imp_jax.main --help` does not load JAX."""
    if name in _LAZY_MODULES:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__():
    return sorted([*globals(), *_LAZY_MODULES])
