"""Computes the table sharpness: the largest eigenvalue and the trace of the Hessian of each network."""

import functools
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import pandas as pd

from imp_jax import curvature
from imp_jax.analysis.on_request import format_density, has_all_images, take_batches
from imp_jax.analysis.registry import NetworkInputs, RunInputs, register
from imp_jax.figures import (
    LABELS,
    STYLES,
    Figure,
    densities,
    density_axis,
    draw_mean,
    log_y_axis,
    use_default_style,
)
from imp_jax.runtime.compilation import jit_with_backend_options

PROBES = 16
_GRADIENTS = 2 * (PROBES + 40)  # of all Hessian-vector products of a network; Lanczos takes 20 to 60


def compute_sharpness(inputs: NetworkInputs) -> Iterator[tuple]:
    """Compute the sharpness of a network on a fixed random subset of the training set.

    The loss is the mean cross-entropy in training mode, see `curvature.training_loss_product`, in batches of
    the size in which BatchNorm sees them in training; augmentation is off. Only surviving weights vary.

    Columns:
      images: the number of images asked for, `analysis.images`, of which whole batches are used.
      largest_eigenvalue: of the Hessian, in nats per squared weight.
      trace: of the Hessian, in the same unit; estimated from 16 random probes.
      trace_error: the standard error of this estimate.
    """
    experiment, images = inputs.experiment, inputs.config.analysis.images
    batch_size = experiment.spec.batch_size // experiment.spec.accumulate_steps
    batches = take_batches(experiment, images, batch_size)
    exclude, key = experiment.pruning.exclude, jax.random.key(experiment.seed)
    if not all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(inputs.variables)):
        yield images, np.nan, np.nan, np.nan
        return
    arguments = jax.device_put((inputs.variables, *batches))
    compute_product, compute_trace = _programs()
    product = functools.partial(compute_product, *arguments, key=key, spec=experiment.spec)
    largest = curvature.largest_eigenvalue(product, inputs.mask, exclude)
    trace, error = compute_trace(*arguments, inputs.mask, key, exclude=exclude, spec=experiment.spec)
    yield images, largest, float(trace), float(error)


def _trace(variables, images, labels, mask, key, *, exclude, spec):
    def product(vector):
        return curvature.training_loss_product(variables, images, labels, vector, key, spec=spec)

    return curvature.hutchinson_trace(product, mask, key, exclude, probes=PROBES)


@functools.cache
def _programs():
    """Return the jitted Hessian-vector product and trace, with this backend's compiler options."""
    product = jit_with_backend_options(curvature.training_loss_product, static_argnames="spec")
    return product, jit_with_backend_options(_trace, static_argnames=("exclude", "spec"))


def estimate_cost(inputs: RunInputs) -> float:
    """Return the number of images whose gradients take as long as the missing rows."""
    table = inputs.tables["sharpness"]
    current = table.loc[has_all_images(table, inputs.config), ["arm", "replicate", "round"]]
    known = set(current.itertuples(index=False, name=None))
    networks = {(*m, n) for n, members in inputs.rounds.items() for m in members if m.arm != "twin"}
    return len(networks - known) * inputs.config.analysis.images * _GRADIENTS


@use_default_style
def draw(table: pd.DataFrame, results: pd.DataFrame) -> Figure:
    """Draw the largest eigenvalue and the trace over density: one line per arm, mean, min and max.

    Args:
      table, results: sharpness.csv and results.csv.
    """
    table = table.assign(density=table["round"].map(densities(results))).dropna()
    figure = Figure(figsize=(7.6, 3.2), layout="constrained")
    panels = figure.subplots(1, 2)
    labels = {"largest_eigenvalue": "Largest eigenvalue (nats)", "trace": "Trace of the Hessian (nats)"}
    for axes, (column, label) in zip(panels, labels.items(), strict=True):
        for arm, rows in table.groupby("arm", sort=False):
            draw_mean(axes, rows, column, label=LABELS.get(arm, arm), **STYLES.get(arm, {"marker": "."}))
        density_axis(axes, table["density"].min())
        axes.set_ylabel(label)
        if table[column].min() > 0:
            log_y_axis(axes)
    panels[0].legend(frameon=False, fontsize="small")
    return figure


def describe(run: Any) -> str:
    """Return a sentence about the sharpness of imp in the first and the last round of an `analysis.Run`."""
    rows = run.sharpness.query("arm == 'imp'").dropna()
    if rows.empty:
        return ""
    means, density = rows.groupby("round")[["largest_eigenvalue", "trace"]].mean(), densities(run.results)
    first, last = means.index[0], means.index[-1]
    return (
        f"At {format_density(density[first])} density the largest eigenvalue of imp is "
        f"{means['largest_eigenvalue'][first]:.3g} and the trace {means['trace'][first]:.3g} nats per squared "
        f"weight; at {format_density(density[last])} they are {means['largest_eigenvalue'][last]:.3g} and "
        f"{means['trace'][last]:.3g}."
    )


register(
    "sharpness",
    compute_sharpness,
    columns=("images", "largest_eigenvalue", "trace", "trace_error"),
    description="largest eigenvalue of the Hessian of the training loss on the surviving weights, its trace "
    "and the standard error of the trace, in nats per squared weight; on `images` training images",
    figure=lambda run: draw(run.sharpness, run.results) if len(run.sharpness.dropna()) else None,
    caption="Largest eigenvalue and trace of the Hessian of the training loss on the surviving weights after "
    "training, in nats per squared weight; mean of the replicates, bars from minimum to maximum.",
    sentence=describe,
    is_current=has_all_images,
    cost=estimate_cost,
)
