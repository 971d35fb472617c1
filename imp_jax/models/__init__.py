"""The networks, by the name a config gives them.

A model is a Flax Linen module of plain Flax layers, called as `model(images, train=…)`, that returns logits. It
has the field `num_classes`, and may have

- `width`, `dtype`, `norm_affine` and `norm_momentum`, to be set by the fields of the config of these names;
- `norm_axis`, the axis of a mesh over whose devices it takes the statistics of a batch;
- `image_sides`, the smallest and largest side of images that suit it, in pixels; None is without limit.

To add one, write the module and name it in `MODELS`.
"""

import functools
import inspect
import re
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import PyTree
from ml_collections import ConfigDict

from imp_jax.config import default
from imp_jax.errors import UserError, lookup
from imp_jax.models.conv4 import Conv4
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
    return lookup(MODELS, "model.name", name)


def create(config: ConfigDict, num_classes: int, image_shape: tuple[int, int, int]) -> nn.Module:
    """Create the network of `config.model`, computing in `config.dtype`, for images of height, width, channels.

    Raises:
      UserError: see `find`; a network that lacks what is asked of it, or has parameters of another type than
        float32; images that do not suit it.
    """
    name, standard = config.model.name, default()
    make = find(name)
    fields = {
        "width": ("model.width", config.model.width, standard.model.width),
        "dtype": ("dtype", jnp.dtype(config.dtype), jnp.dtype(standard.dtype)),
        "norm_affine": ("model.norm_affine", config.model.norm_affine, standard.model.norm_affine),
        "norm_momentum": ("model.norm_momentum", config.model.norm_momentum, standard.model.norm_momentum),
    }
    given = {"num_classes": num_classes}
    if not _takes(make, "num_classes"):
        raise UserError(f"model.name is {name!r}, which has no field num_classes; it should have one")
    for field, (setting, value, unset) in fields.items():
        if _takes(make, field):
            given[field] = value
        elif value != unset:
            raise UserError(f"{setting} is {value}; {name} has no field {field}, so it should be {unset}")
    model = make(**given)
    try:
        hash(model)
    except TypeError as error:
        raise UserError(
            f"model.name is {name!r}, which has a field that cannot be hashed, as a list; it should be a tuple"
        ) from error
    if not _takes(model.__call__, "train"):
        raise UserError(
            f"model.name is {name!r}, which is not called as model(images, train=False); it should be"
        )
    _require_suitable(name, model, image_shape)
    variables = shapes(model, image_shape)
    if other := {str(leaf.dtype) for leaf in jax.tree.leaves(variables["params"])} - {"float32"}:
        raise UserError(
            f"model.name is {name!r}, which has parameters of type {', '.join(sorted(other))}; they should be "
            f"float32, whatever type the computation has"
        )
    image = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
    logits = jax.eval_shape(lambda v, image: model.apply(v, image, train=False), variables, image)
    if getattr(logits, "shape", None) != (1, num_classes):
        found = getattr(logits, "shape", type(logits).__name__)
        raise UserError(
            f"model.name is {name!r}, which makes {found} of one image; it should be logits of the shape "
            f"(1, {num_classes})"
        )
    if config.model.norm_parts > 1 and set(variables) == {"params"}:
        raise UserError(
            f"model.norm_parts is {config.model.norm_parts}; {name} has no normalisation, so it should be 1"
        )
    lacks = "statistics of its batches" if set(variables) == {"params"} else "field norm_momentum"
    if config.analysis.batch_norm == "reestimate" and not (
        set(variables) != {"params"} and hasattr(model, "norm_momentum")
    ):
        raise UserError(
            f"analysis.batch_norm is 'reestimate'; {name} has no {lacks}, so it should be 'interpolate'"
        )
    return model


def _takes(function, name):
    """Whether a function, or the constructor of a module, has a parameter of this name."""
    parameters = inspect.signature(function).parameters
    return name in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())


@functools.lru_cache(maxsize=4)
def shapes(model: nn.Module, image_shape: tuple[int, int, int]) -> dict[str, PyTree[jax.ShapeDtypeStruct]]:
    """Shapes and dtypes of a model's variables for such images; nothing is computed."""
    image = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
    return dict(jax.eval_shape(lambda image: model.init(jax.random.key(0), image, train=False), image))


def register(name, model):
    MODELS[name] = model


def rng_streams(model, image_shape):
    return ()


def _require_suitable(name, model, image_shape):
    smallest, largest = getattr(model, "image_sides", (1, None))
    if min(image_shape[:2]) < smallest or (largest and max(image_shape[:2]) > largest):
        sides = f"{smallest} to {largest}" if largest else f"at least {smallest}"
        height, width, _ = image_shape
        raise UserError(
            f"model.name is {name!r}, which takes images of {sides} pixels a side; those of the data set are "
            f"{height} × {width} (dataset.image_side says so for sets that are streamed)"
        )
