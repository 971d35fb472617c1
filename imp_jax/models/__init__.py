"""The networks, by the name a config gives them.

A model is a Flax Linen module called as `model(images, train=…)` that returns logits; fields it shares
with the others are `num_classes` and `dtype`. To add one, write the module and name it in `MODELS`.
"""

import flax.linen as nn
import jax.numpy as jnp
from ml_collections import ConfigDict

from imp_jax.config import choose
from imp_jax.models.lenet import LeNet

MODELS = {"lenet": LeNet}


def create(config: ConfigDict, num_classes: int) -> nn.Module:
    """The network of `config.model`, computing in `config.dtype`.

    Raises:
      UserError: an unknown name.
    """
    model = choose(MODELS, "model.name", config.model.name)
    return model(num_classes=num_classes, dtype=jnp.dtype(config.dtype))
