"""Count the arithmetic and the memory traffic of a training step from the shapes of its layers."""

import math
from typing import NamedTuple

import jax
from flax import traverse_util
from ml_collections import ConfigDict

from experiments.sweeps.datasets import DATASET_SIZES
from experiments.sweeps.networks import compute_variable_shapes, create_model
from imp_jax.experiment import make_optimizer

# How often a layer's output or its gradient passes through memory, if everything between two matrix products is
# fused with them: the output is written once and read twice (by the next layer, and in the backward pass), and
# its gradient is written once and read by both products of the backward pass.
TOUCHES = 6
# Statistics read the output once more in the forward pass; in the backward pass they read output and gradient.
TOUCHES_WITH_NORM = 9


class Work(NamedTuple):
    """Lower bounds for a training step of one member."""

    flops: float  # per image: multiplications and additions of matrix products and convolutions
    activations: float  # bytes of activations and their gradients moved per image
    state: float  # further bytes moved per step: weights, optimizer state, gradient and mask


def count_work(config: ConfigDict) -> Work:
    """Count the work of a training step from the shapes of the layers that have kernels.

    Each layer has three products: the forward pass, the gradient of the weights and, except in the first layer,
    the gradient of the inputs. Products with padding are counted. Weights, moments and the gradient are read
    and written once, the mask is read once. Repulsion is not counted.
    """
    image_shape = DATASET_SIZES[config.dataset.name].image_shape
    model, variables = create_model(config), compute_variable_shapes(config)
    image = jax.ShapeDtypeStruct((1, *image_shape), "float32")
    _, captured = jax.eval_shape(
        lambda variables, image: model.apply(
            variables, image, capture_intermediates=True, mutable=["intermediates"]
        ),
        variables,
        image,
    )
    outputs = traverse_util.flatten_dict(captured["intermediates"])
    kernels = {
        path[:-1]: leaf
        for path, leaf in traverse_util.flatten_dict(variables["params"]).items()
        if path[-1] == "kernel"
    }
    sizes = {path: math.prod(outputs[(*path, "__call__")][0].shape) for path in kernels}
    products = {path: 2 * sizes[path] * math.prod(kernel.shape[:-1]) for path, kernel in kernels.items()}
    # the first layer is the one whose inputs are the pixels (dense) or the channels (convolutional) of an image
    image_inputs = {2: math.prod(image_shape), 4: image_shape[-1]}
    first = next(path for path, kernel in kernels.items() if kernel.shape[-2] == image_inputs[kernel.ndim])
    touches = TOUCHES_WITH_NORM if len(variables) > 1 else TOUCHES
    params = sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))
    moments = sum(
        leaf.size for leaf in jax.tree.leaves(jax.eval_shape(make_optimizer(config).init, variables["params"]))
    )
    return Work(
        flops=3 * sum(products.values()) - products[first],
        activations=touches * sum(sizes.values()) * jax.numpy.dtype(config.dtype).itemsize,
        state=2 * 4 * (params + moments + params) + params,
    )
