"""The networks, by the name a config gives them.

A model is a Flax Linen module called as `model(images, train=…)` that returns logits. It has the fields
`num_classes`, `width` and `dtype`, with normalisation `norm_affine`, `norm_momentum` and `norm_axis` too, and
says in `image_sides` which images suit it. To add one, write the module and name it in `MODELS`.
"""

import functools
import re
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import PyTree
from ml_collections import ConfigDict

from imp_jax.config import UserError, choose
from imp_jax.models.conv import Conv4
from imp_jax.models.lenet import LeNet
from imp_jax.models.resnet import CifarResNet, ResNet50

MODELS = {
    "lenet": LeNet,
    "conv4": Conv4,
    **{f"resnet{depth}": functools.partial(CifarResNet, depth=depth) for depth in (20, 32, 44, 56, 110)},
    "resnet50": ResNet50,
}


def find(name: str) -> Callable[..., nn.Module]:
    """The network called `name`, without its options; any depth of the CIFAR family goes by it, as in resnet26.

    Raises:
      UserError: an unknown name, or a ResNet's depth that is not 6n + 2.
    """
    depth = re.fullmatch(r"resnet([1-9][0-9]*)", name)
    if depth and name not in MODELS:
        model = functools.partial(CifarResNet, depth=int(depth[1]))
        model()  # has its depth checked
        return model
    return choose(MODELS, "model.name", name)


def create(config: ConfigDict, num_classes: int, image_shape: tuple[int, int, int]) -> nn.Module:
    """The network of `config.model`, computing in `config.dtype`, for images of height, width and channels.

    Raises:
      UserError: see `find`; images that do not suit the network; normalisation asked of one that has none.
    """
    name = config.model.name
    model = find(name)(num_classes=num_classes, width=config.model.width, dtype=jnp.dtype(config.dtype))
    if hasattr(model, "norm_affine"):
        model = model.copy(norm_affine=config.model.norm_affine, norm_momentum=config.model.norm_momentum)
    elif config.model.norm_affine:
        raise UserError(f"model.norm_affine is True; {name} has no normalisation, so it should be False")
    elif config.model.norm_parts > 1:
        raise UserError(
            f"model.norm_parts is {config.model.norm_parts}; {name} has no normalisation, so it should be 1"
        )
    _require_suitable(name, model, image_shape)
    return model


def shapes(model: nn.Module, image_shape: tuple[int, int, int]) -> dict[str, PyTree[jax.ShapeDtypeStruct]]:
    """Shapes and dtypes of a model's variables for such images; nothing is computed."""
    image = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
    return dict(jax.eval_shape(lambda image: model.init(jax.random.key(0), image, train=False), image))


def _require_suitable(name, model, image_shape):
    smallest, largest = model.image_sides
    if min(image_shape[:2]) < smallest or (largest and max(image_shape[:2]) > largest):
        sides = f"{smallest} to {largest}" if largest else f"at least {smallest}"
        height, width, _ = image_shape
        raise UserError(
            f"model.name is {name!r}, which takes images of {sides} pixels a side; those of the data set are "
            f"{height} × {width} (dataset.image_side says so for sets that are streamed)"
        )
