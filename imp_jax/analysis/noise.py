"""Computes the table noise: the simple gradient noise scale of imp at some epochs of some rounds."""

import functools
from typing import Any

import jax
import numpy as np
import pandas as pd

from imp_jax import gradient_noise, masking, training
from imp_jax.analysis.on_request import (
    experiment_in_round,
    format_density,
    has_all_images,
    imp_replicates,
    replay_round,
    take_batches,
    trained_epochs,
)
from imp_jax.analysis.registry import RunInputs, complete_rows, find_missing, register
from imp_jax.experiment import Experiment
from imp_jax.figures import (
    PATH_COLORS,
    Figure,
    densities,
    density_axis,
    draw_mean,
    log_y_axis,
    use_default_style,
)
from imp_jax.runtime.compilation import jit_with_backend_options

_KEYS = ["replicate", "round", "epoch"]
_COLUMNS = [*_KEYS, "images", "gradient", "variance", "noise_scale", "batch_size"]
_MIN_BATCHES = 10


def compute_noise(inputs: RunInputs) -> list[tuple]:
    """Compute the gradient noise scale of imp after some epochs of its training, in some rounds.

    Checkpoints have only the ends of trainings, so the training of these rounds is repeated up to the last of
    the epochs (`replay.replay`). Gradients are those of the cross-entropy in training mode, without
    augmentation, of all parameters that are trained: surviving weights, biases, and parameters of
    normalisation. The small batches have the size of the run, or a tenth of the images if that is less. With
    BatchNorm, which normalises them by their own statistics, the estimates are approximate.

    Columns:
      replicate, round, epoch: `epoch` epochs after the start of the training of imp.
      images: the number of training images asked for, `analysis.images`, of which whole batches are used.
      gradient: the estimate of ‖G‖², the squared norm of the expected gradient, in nats² per squared weight.
      variance: the estimate of tr Σ, the trace of the covariance of the gradient of one image, in this unit.
      noise_scale: tr Σ / ‖G‖² in images; nan where the estimate of ‖G‖² is not above 0.
      batch_size: of the run, in images.
    """
    return complete_rows(inputs, "noise", _list_keys(inputs), functools.partial(_compute_rounds, inputs))


def _compute_rounds(inputs, missing):
    """Return the values of all replicates in the rounds and epochs of the missing keys."""
    rows = {}
    for number, epochs in _epochs_by_round(missing).items():
        experiment = experiment_in_round(inputs, number)
        steps_per_epoch = experiment.learning_rates.shape[1]
        replayed = replay_round(inputs, number, [epoch * steps_per_epoch for epoch in epochs])
        if replayed is None:
            continue
        replicates, masks, states = replayed
        for epoch in epochs:
            variables = states[epoch * steps_per_epoch].states.variables
            estimates = compute_noise_scales(experiment, variables, masks, inputs.config.analysis.images)
            for replicate, values in zip(replicates, np.transpose(estimates).tolist(), strict=True):
                row = inputs.config.analysis.images, *values, experiment.spec.batch_size
                rows[replicate, number, epoch] = row
    return rows


def _list_keys(inputs):
    """Return the replicate, round and epoch of all rows that the config asks for."""
    settings = inputs.config.analysis
    return [
        (replicate, number, epoch)
        for number in sorted(settings.noise_rounds)
        for epoch in sorted(settings.noise_epochs)
        for replicate in imp_replicates(inputs, number)
        if epoch <= trained_epochs(inputs, number)
    ]


def _epochs_by_round(keys):
    by_round = {}
    for _, number, epoch in keys:
        by_round.setdefault(number, {})[epoch] = None
    return {number: list(epochs) for number, epochs in by_round.items()}


def compute_noise_scales(
    experiment: Experiment, variables: training.Variables, masks: masking.Mask, images: int
) -> gradient_noise.NoiseScale:
    """Compute the noise scales of networks, stacked along axis 0, on a random subset of the training set.

    Args:
      experiment: on one device.
      images: the number of training images, in the whole batches of `take_batches`.
    """
    examples = experiment.dataset.train.examples
    small = max(1, min(experiment.spec.batch_size, images // _MIN_BATCHES, examples // 2))
    batches = take_batches(experiment, max(images, 2 * small), small)
    key = jax.random.key(experiment.seed)
    norms = _program()(variables, masks, batches, key, spec=experiment.spec._replace(norm_parts=1))
    return gradient_noise.noise_scale(*norms, small, batches[1].size)


def _squared_norms(variables, masks, batches, key, *, spec):
    def one_network(network):
        variables, mask = network
        model_state = {name: leaves for name, leaves in variables.items() if name != "params"}

        def gradient(batch):
            loss = functools.partial(training.loss_fn, spec=spec)
            gradients, _ = jax.grad(loss, has_aux=True)(variables["params"], model_state, *batch, key)
            return masking.apply(gradients, mask)

        return gradient_noise.squared_norms(gradient, batches)

    if spec.execution.unroll:  # vmap over kernels makes slow grouped convolutions
        return jax.lax.map(one_network, (variables, masks))
    return jax.vmap(one_network)((variables, masks))


@functools.cache
def _program():
    return jit_with_backend_options(_squared_norms, static_argnames="spec")


def estimate_cost(inputs: RunInputs) -> float:
    """Return the number of images whose gradients take as long as the missing rows."""
    total = 0
    for number, epochs in _epochs_by_round(find_missing(inputs, "noise", _list_keys(inputs))).items():
        images = inputs.experiment.learning_rates.shape[1] * inputs.experiment.spec.batch_size
        per_network = max(epochs) * images + len(epochs) * inputs.config.analysis.images
        total += len(imp_replicates(inputs, number)) * per_network
    return total


@use_default_style
def draw(table: pd.DataFrame, results: pd.DataFrame) -> Figure:
    """Draw the noise scale over density: one line per epoch, mean, min and max, and the batch size of the run.

    Args:
      table, results: noise.csv and results.csv.
    """
    table = table.assign(density=table["round"].map(densities(results))).dropna()
    figure = Figure(figsize=(5.6, 3.6), layout="constrained")
    axes = figure.add_subplot()
    styles = zip(PATH_COLORS * 9, ("o-", "s--", "^:", "v-.") * 9, strict=True)
    for (epoch, rows), (color, line) in zip(table.groupby("epoch"), styles, strict=False):
        draw_mean(
            axes, rows, "noise_scale", label=_after(epoch), color=color, marker=line[0], linestyle=line[1:]
        )
    batch_size = table["batch_size"].iloc[0]
    axes.axhline(batch_size, color="black", linewidth=1, label=f"batch size, {batch_size:g}")
    density_axis(axes, table["density"].min())
    log_y_axis(axes)
    axes.set_ylabel("Gradient noise scale (images)")
    axes.legend(frameon=False, fontsize="small")
    return figure


def describe(run: Any) -> str:
    """Return a sentence about the noise scale of an `analysis.Run`, in its first and last analysed round."""
    rows, density = run.noise.dropna(), densities(run.results)
    if rows.empty:
        return ""
    parts = []
    for epoch, of_epoch in rows.groupby("epoch"):
        means = of_epoch.groupby("round")[["gradient", "variance"]].mean()
        scale = means["variance"] / means["gradient"]  # less biased than the mean of ratios
        first, last = scale.index[0], scale.index[-1]
        parts.append(
            f"{scale[first]:,.0f} images at {format_density(density[first])} density and {scale[last]:,.0f} at "
            f"{format_density(density[last])} {_after(epoch)}"
        )
    batch_size = rows["batch_size"].iloc[0]
    return f"The noise scale is {'; '.join(parts)}; the run has batches of {batch_size:g} images."


def _after(epoch):
    return f"after {epoch} epoch{'s' * (epoch != 1)}" if epoch else "at the start"


register(
    "noise",
    compute_noise,
    columns=_COLUMNS,
    needs="run",
    description="simple gradient noise scale tr Σ / ‖G‖² of imp, in images, after some epochs of some rounds, "
    "with the estimates of ‖G‖² (`gradient`) and tr Σ (`variance`), beside the batch size of the run",
    figure=lambda run: draw(run.noise, run.results) if len(run.noise.dropna()) else None,
    caption="Gradient noise scale of imp after some epochs of a training, and the batch size of the run; mean "
    "of the replicates, bars from minimum to maximum. In a batch smaller than the noise scale, noise outweighs "
    "the gradient.",
    sentence=describe,
    is_current=has_all_images,
    cost=estimate_cost,
)
