"""Networks, found by the name in a config.

A model is a Flax Linen module. It is called as `model(images, train=False)` with float32 images [batch, height,
width, channels] and returns logits [batch, num_classes]. It must have the field `num_classes` and float32
parameters; the values of its fields must be hashable; and it may draw random numbers only if `train` is True.
Its parameters named "kernel" can be pruned (see `masking`). It may have

- the fields `width`, `dtype`, `norm_affine` and `norm_momentum`, which the config sets;
- the field `norm_axis`, the name of the mesh axis over which batch statistics are averaged;
- the class attribute `image_sides`, the smallest and largest height or width of images that it accepts, in
  pixels (largest None: no limit).

To add a model, call `register("mixer", Mixer)`, or give its dotted path as `model.name`, such as
"their_package.nets:VGG11".
"""

import functools
import inspect
import re
from collections.abc import Callable
from typing import Any

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Key, PyTree

from imp_jax.errors import UserError, lookup_or_import, one_line
from imp_jax.models.conv4 import Conv4
from imp_jax.models.lenet import LeNet
from imp_jax.models.resnet import CifarResNet, ResNet, ResNet50, WideResNet
from imp_jax.models.vgg import VGG, VGG11, VGG16

MODELS: dict[str, Callable[..., nn.Module]] = {}  # filled by `register`


def register(name: str, model: Callable[..., nn.Module]) -> None:
    """Register a model under a name, for `config.model.name`. A model of the same name is replaced.

    Args:
      name: any string without a colon, which marks dotted paths.
      model: a Linen class, or a function that returns a Linen module. It takes `num_classes` and may take
        `dtype`, `width`, `norm_affine` and `norm_momentum`, all by keyword.

    Raises:
      UserError: `model` is not callable, or `name` is not such a string.
    """
    if not isinstance(name, str) or not name or ":" in name:
        raise UserError(f"a model is registered as {name!r}; its name should be a string without a colon")
    # an instance of a module is callable too, but takes images
    if not callable(model) or isinstance(model, nn.Module):
        raise UserError(
            f"the model {name!r} is registered as {model!r}; it should be a Linen class, or a function that "
            f"returns a Linen module"
        )
    MODELS[name] = model


register("lenet", LeNet)
register("conv4", Conv4)
for _depth in (20, 32, 44, 56, 110):
    register(f"resnet{_depth}", functools.partial(CifarResNet, depth=_depth))
register("resnet50", ResNet50)
register("resnet18", functools.partial(ResNet, blocks=(2, 2, 2, 2)))
register("resnet34", functools.partial(ResNet, blocks=(3, 4, 6, 3)))
register("vgg11", functools.partial(VGG, blocks=VGG11))
register("vgg16", functools.partial(VGG, blocks=VGG16))
register("wide_resnet", WideResNet)
register("mlp", LeNet)


def find(name: str) -> Callable[..., nn.Module]:
    """Return the class or factory of a model.

    Args:
      name: a registered name; "resnet" and any depth 6n + 2 of the CIFAR family; "wide_resnet28_10" with
        another depth and factor; "mlp_300_100" with the widths of other hidden layers; or a dotted path: a
        module, a colon and an attribute, such as "their_package.nets:VGG11".

    Raises:
      UserError: the name is unknown, the depth is not suitable, or the dotted path cannot be imported.
    """
    if name in MODELS:
        return MODELS[name]
    if depth := re.fullmatch(r"resnet([1-9][0-9]*)", name):
        model = functools.partial(CifarResNet, depth=int(depth[1]))
        model()  # checks the depth
        return model
    if sizes := re.fullmatch(r"wide_resnet([1-9][0-9]*)_([1-9][0-9]*)", name):
        model = functools.partial(WideResNet, depth=int(sizes[1]), factor=int(sizes[2]))
        model()  # checks the depth
        return model
    if re.fullmatch(r"mlp(_[1-9][0-9]*)+", name):
        return functools.partial(LeNet, widths=tuple(map(int, name.split("_")[1:])))
    model = lookup_or_import(MODELS, "model.name", name)
    if not callable(model) or isinstance(model, nn.Module):
        raise UserError(
            f"model.name is {name!r}, which is of type {type(model).__name__}; it should be a Linen class, or "
            f"a function that returns a Linen module"
        )
    return model


def create(
    name: str,
    num_classes: int,
    image_shape: tuple[int, int, int],
    *,
    dtype: Any = "float32",
    width: float = 1.0,
    norm_affine: bool = False,
    norm_momentum: float = 0.9,
) -> nn.Module:
    """Create a model and check that it accepts the images and returns logits.

    Args:
      name: see `find`.
      num_classes: number of logits.
      image_shape: height, width and channels of the images.
      dtype: type of the computation; parameters must be float32.
      width: factor of the number of channels or hidden units.
      norm_affine: whether the normalisation has a learnable scale and bias.
      norm_momentum: decay of the running statistics of the normalisation, in [0, 1).

    Raises:
      UserError: see `find`; also if an option differs from its default and the model has no field for it, if
        the size of the images is unsuitable, or if the model breaks one of the rules at the top of this module.
    """
    make = find(name)
    if not _takes(make, "num_classes"):
        raise UserError(f"model.name is {name!r}, which has no field num_classes; it should have one")
    options = {
        "width": ("model.width", width, 1.0),
        "dtype": ("dtype", jnp.dtype(dtype), jnp.dtype("float32")),
        "norm_affine": ("model.norm_affine", norm_affine, False),
        "norm_momentum": ("model.norm_momentum", norm_momentum, 0.9),
    }
    fields = {"num_classes": num_classes}
    for field, (setting, value, default) in options.items():
        if _takes(make, field):
            fields[field] = value
        elif value != default:
            raise UserError(f"{setting} is {value}; {name} has no field {field}, so it should be {default}")
    model = make(**fields)
    if not isinstance(model, nn.Module):
        raise UserError(
            f"model.name is {name!r}, which creates an object of type {type(model).__name__}; it should be a "
            f"module of flax.linen"
        )
    try:
        hash(model)
    except TypeError as error:
        raise UserError(
            f"model.name is {name!r}, which has a field that cannot be hashed, such as a list; it should be a "
            f"tuple"
        ) from error
    if not _takes(model.__call__, "train"):
        raise UserError(
            f"model.name is {name!r}, whose __call__ has no parameter train; it should be called as "
            f"model(images, train=False)"
        )
    _check_image_shape(name, model, image_shape)
    _check_variables_and_logits(name, model, image_shape, num_classes)
    return model


def _takes(function, name):
    """Return whether a function, or the constructor of a module, has a parameter of this name."""
    parameters = inspect.signature(function).parameters
    return name in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())


def _check_image_shape(name, model, image_shape):
    smallest, largest = getattr(model, "image_sides", (1, None))
    if min(image_shape[:2]) < smallest or (largest and max(image_shape[:2]) > largest):
        sides = f"{smallest} to {largest}" if largest else f"at least {smallest}"
        height, width, _ = image_shape
        raise UserError(
            f"model.name is {name!r}, which takes images of {sides} pixels per side; those of the data set are "
            f"{height} × {width} (for a streamed set, change dataset.image_side)"
        )


def _check_variables_and_logits(name, model, image_shape, num_classes):
    variables, image = shapes(model, image_shape), _image(image_shape)
    if dtypes := {str(leaf.dtype) for leaf in jax.tree.leaves(variables["params"])} - {"float32"}:
        raise UserError(
            f"model.name is {name!r}, which has parameters of type {', '.join(sorted(dtypes))}; they should be "
            f"float32, even if the computation has another type"
        )
    try:
        logits = jax.eval_shape(lambda v, image: model.apply(v, image, train=False), variables, image)
    except flax.errors.InvalidRngError as error:
        raise UserError(
            f"model.name is {name!r}, which draws random numbers if train is False ({one_line(error)}); it "
            f"should draw them only if train is True"
        ) from error
    if getattr(logits, "shape", None) != (1, num_classes):
        returned = getattr(logits, "shape", type(logits).__name__)
        raise UserError(
            f"model.name is {name!r}, which returns {returned} for one image; it should return logits of the "
            f"shape (1, {num_classes})"
        )


def check_normalization(
    name: str, model: nn.Module, image_shape: tuple[int, int, int], norm_parts: int, batch_norm: str
) -> None:
    """Check that a model has the normalisation that the settings of a run need.

    Args:
      name: name of the model, for messages.
      model: the model itself.
      image_shape: height, width and channels of the images.
      norm_parts: `config.model.norm_parts`, the number of parts of a batch with separate statistics.
      batch_norm: `config.analysis.batch_norm`, "interpolate" or "reestimate".

    Raises:
      UserError: `norm_parts` is greater than 1 and the model has no batch statistics; or `batch_norm` is
        "reestimate" and the model has no batch statistics or no field `norm_momentum`.
    """
    has_statistics = set(shapes(model, image_shape)) != {"params"}
    if norm_parts > 1 and not has_statistics:
        raise UserError(f"model.norm_parts is {norm_parts}; {name} has no normalisation, so it should be 1")
    if batch_norm == "reestimate" and not (has_statistics and hasattr(model, "norm_momentum")):
        missing = "field norm_momentum" if has_statistics else "batch statistics"
        raise UserError(
            f"analysis.batch_norm is 'reestimate'; {name} has no {missing}, so it should be 'interpolate'"
        )


@functools.lru_cache(maxsize=4)
def shapes(model: nn.Module, image_shape: tuple[int, int, int]) -> dict[str, PyTree[jax.ShapeDtypeStruct]]:
    """Return the shapes and dtypes of a model's variables by collection, without computing them.

    Args:
      model: a Linen module.
      image_shape: height, width and channels of the images.
    """
    initialize = functools.partial(model.init, train=False)
    return dict(jax.eval_shape(initialize, jax.random.key(0), _image(image_shape)))


@functools.lru_cache(maxsize=4)
def rng_streams(model: nn.Module, image_shape: tuple[int, int, int]) -> tuple[str, ...]:
    """Return the names of the rng streams from which a model draws in training, such as ("dropout",).

    They are found by tracing `model.apply(…, train=True)`, first without keys, and again with a key for each
    stream that is missing. Pass a key for each to `model.apply(…, train=True, rngs={name: key})`.

    Args:
      model: a Linen module.
      image_shape: height, width and channels of the images.

    Returns:
      The names in the order of their first use; () for a model that draws nothing.
    """
    if hasattr(model, "norm_axis"):
        model = model.clone(norm_axis=None)  # the model is traced outside of a mesh
    variables = shapes(model, image_shape)
    mutable = [collection for collection in variables if collection != "params"]
    names = []

    while True:
        rngs = {name: jax.random.key(0) for name in names}
        apply = functools.partial(model.apply, train=True, mutable=mutable, rngs=rngs)
        try:
            jax.eval_shape(apply, variables, _image(image_shape))
            return tuple(names)
        except flax.errors.InvalidRngError as error:
            missing = re.search(r'needs PRNG for "(.+?)"', str(error))
            if missing is None or missing[1] in names:
                raise
            names.append(missing[1])


def init_fn(model: nn.Module, image_shape: tuple[int, int, int]) -> Callable[[Key[Array, ""]], dict[str, Any]]:
    """Return a function that initialises a model from a key."""
    image = jnp.zeros((1, *image_shape))
    return lambda key: dict(model.init(key, image, train=False))


def _image(image_shape):
    return jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
