"""Networks of configs, built without loading their data sets."""

import jax
from flax import linen as nn
from ml_collections import ConfigDict

from experiments.sweeps.datasets import DATASET_SIZES
from imp_jax import experiment, models


def create_model(config: ConfigDict) -> nn.Module:
    """Return the network of a config, for the images of its data set."""
    _, image_shape, num_classes = DATASET_SIZES[config.dataset.name]
    return experiment.create_model(config, num_classes, image_shape)


def compute_variable_shapes(config: ConfigDict) -> dict:
    """Return the variables of a config's network as `jax.ShapeDtypeStruct`s."""
    return models.shapes(create_model(config), DATASET_SIZES[config.dataset.name].image_shape)


def count_parameters(config: ConfigDict) -> int:
    """Count the parameters of a config's network."""
    return sum(leaf.size for leaf in jax.tree.leaves(compute_variable_shapes(config)["params"]))
