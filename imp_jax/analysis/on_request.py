"""What several analyses on request share: a subset of the training set, and repeated trainings."""

from collections.abc import Collection

import jax
import numpy as np
import pandas as pd
from ml_collections import ConfigDict

from imp_jax.analysis.registry import RunInputs
from imp_jax.experiment import Experiment
from imp_jax.figures import format_percent
from imp_jax.masking import Mask
from imp_jax.members import Member
from imp_jax.replay import replay
from imp_jax.round_state import take_images
from imp_jax.workdir.checkpoints import MidRoundState


def take_batches(experiment: Experiment, images: int, batch_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Take batches of random training images, without augmentation; the same for all networks of a run.

    Args:
      images: how many; rounded down to whole batches, but at least one batch and at most the training set.

    Returns: images [batches, batch, …] and labels [batches, batch].
    """
    batches = max(1, min(images, experiment.dataset.train.examples) // batch_size)
    arrays = take_images(experiment, "analysis images", 0, batches * batch_size)
    return tuple(array.reshape(batches, batch_size, *array.shape[1:]) for array in arrays)


def has_all_images(table: pd.DataFrame, config: ConfigDict) -> pd.Series:
    """Return which rows were computed on as many images as the config asks for."""
    return table["images"] == config.analysis.images


def imp_replicates(inputs: RunInputs, number: int) -> list[int]:
    """Return the replicates whose imp finished round `number`; [] if its checkpoint is not on disk."""
    return [member.replicate for member in inputs.rounds.get(number, ()) if member.arm == "imp"]


def trained_epochs(inputs: RunInputs, number: int) -> int:
    """Return the number of epochs of round `number`, which is smaller in short rounds."""
    results = inputs.results[inputs.results["round"] == number]
    epochs = results["epochs"].max() if "epochs" in results else np.nan
    return inputs.config.epochs if np.isnan(epochs) else int(epochs)  # earlier versions did not record it


def experiment_in_round(inputs: RunInputs, number: int) -> Experiment:
    """Return the experiment with the learning rates of round `number`, and where its training starts."""
    experiment = inputs.experiment
    short = trained_epochs(inputs, number) < inputs.config.epochs
    learning_rates = experiment.learning_rates_in(number, short)
    experiment = experiment._replace(learning_rates=learning_rates, finetunes=False)
    if short and experiment.retraining.policy == "evidence":  # the round started from the trained weights
        return experiment._replace(rewind_step=0)
    return experiment


def replay_round(
    inputs: RunInputs, number: int, steps: Collection[int]
) -> tuple[list[int], Mask, dict[int, MidRoundState]] | None:
    """Repeat the training of all imps of a round.

    Returns: the replicates, their masks, and the states at `steps`; None if the checkpoint is damaged.
    """
    networks = inputs.load_round(number)
    replicates = imp_replicates(inputs, number)
    if not networks:
        return None
    imps = [networks[Member("imp", replicate)] for replicate in replicates]
    starts = [({"params": imp.initial, **imp.initial_state}, imp.mask) for imp in imps]
    initial, masks = jax.tree.map(lambda *leaves: np.stack(leaves), *starts)
    return (
        replicates,
        masks,
        replay(experiment_in_round(inputs, number), number, replicates, initial, masks, steps),
    )


def format_density(density: float) -> str:
    """Return a density for a label or a sentence, such as "1.8 %"."""
    return f"{format_percent(density)} %"
