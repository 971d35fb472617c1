"""Iterative magnitude pruning and the lottery ticket hypothesis, as pure functions over parameter trees."""

import importlib

__version__ = "0.1.0"

_SURFACE = ("connectivity", "masking", "pruning", "repulsion", "similarity")


def __getattr__(name):
    """Import a module of the notebook surface on first use, so that `imp_jax.main --help` need not load JAX."""
    if name in _SURFACE:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__():
    return sorted([*globals(), *_SURFACE])
