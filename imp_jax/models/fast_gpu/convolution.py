"""Two-dimensional convolutions of several members on a GPU.

`jax.vmap` over members, whose kernels differ, makes a grouped convolution of each of the three parts of a
convolution: the forward pass, the gradient of the images, and the gradient of the kernel. The last one then
becomes a *forward* convolution whose window is as large as the image, which occupies few multiprocessors. Here
each part has a rule of its own for `vmap`, in one of two implementations:

- "per_member": one call of cuDNN per member, as for a single network;
- "grouped": one grouped call for all members, whose gradients are the transposes of the grouped convolution, so
  that cuDNN computes them as gradients.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_batching import custom_vmap
from jaxtyping import Array, Float

Images = Float[Array, "batch height width inputs"]
Outputs = Float[Array, "batch height_out width_out outputs"]
Kernel = Float[Array, "rows columns inputs outputs"]

IMPLEMENTATIONS = ("per_member", "grouped")
_DIMENSIONS = ("NHWC", "HWIO", "NHWC")


class _Geometry(NamedTuple):
    """What is constant in a convolution and its gradients."""

    sides: tuple[int, int]  # height and width of the images, in pixels
    lengths: tuple[int, int]  # of the kernel
    strides: tuple[int, int]
    pads: tuple[tuple[int, int], tuple[int, int]]
    precision: Any
    implementation: str


@functools.cache
def conv_general_dilated_by(implementation: str) -> Callable[..., Array]:
    """Return the partial function `conv_general_dilated` with an implementation, the same object every time."""
    return functools.partial(conv_general_dilated, implementation=implementation)


def conv_general_dilated(
    images: Float[Array, "batch *sides inputs"],
    kernel: Float[Array, "*lengths inputs_of_group outputs"],
    strides: Sequence[int],
    padding: str | Sequence[tuple[int, int]],
    *,
    implementation: str,
    precision: Any = None,
    **options: Any,
) -> Float[Array, "batch *sides_out outputs"]:
    """Compute `lax.conv_general_dilated`, as `nn.Conv` calls it, with the rules for `vmap` of this module.

    Dilated and grouped convolutions, and those of one or three dimensions, keep the rules of JAX.

    Args:
      images: in the layout NHWC.
      kernel: in the layout HWIO.
      strides: in pixels.
      padding: as in `lax.conv_general_dilated`.
      implementation: one of `IMPLEMENTATIONS`.
      precision: as in `lax.conv_general_dilated`.
      options: the other arguments of `lax.conv_general_dilated`.
    """
    plain = options.get("feature_group_count", 1) == 1 and all(
        set(options.get(name) or (1,)) == {1} for name in ("lhs_dilation", "rhs_dilation")
    )
    if images.ndim != 4 or not plain:
        return lax.conv_general_dilated(images, kernel, strides, padding, precision=precision, **options)
    if isinstance(padding, str):
        padding = lax.padtype_to_pads(images.shape[1:3], kernel.shape[:2], strides, padding)
    pads = tuple(map(tuple, padding))
    if precision is None:  # gradients are traced outside the context that sets it
        precision = jax.config.jax_default_matmul_precision
    geometry = _Geometry(images.shape[1:3], kernel.shape[:2], tuple(strides), pads, precision, implementation)
    return _convolve(images, kernel, geometry)


# Each of the three parts is bilinear in its two operands, so that the gradients of one are the two others.


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _convolve(images: Images, kernel: Kernel, geometry: _Geometry) -> Outputs:
    return _map_members(_forward, geometry)(images, kernel)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _image_gradient(kernel: Kernel, gradient: Outputs, geometry: _Geometry) -> Images:
    return _map_members(_transpose_to_images, geometry)(kernel, gradient)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _kernel_gradient(images: Images, gradient: Outputs, geometry: _Geometry) -> Kernel:
    return _map_members(_transpose_to_kernel, geometry)(images, gradient)


def _keep_operands(part):
    return lambda a, b, geometry: (part(a, b, geometry), (a, b))


def _convolve_backward(geometry, operands, gradient):
    images, kernel = operands
    return _image_gradient(kernel, gradient, geometry), _kernel_gradient(images, gradient, geometry)


def _image_gradient_backward(geometry, operands, images):
    kernel, gradient = operands
    return _kernel_gradient(images, gradient, geometry), _convolve(images, kernel, geometry)


def _kernel_gradient_backward(geometry, operands, kernel):
    images, gradient = operands
    return _image_gradient(kernel, gradient, geometry), _convolve(images, kernel, geometry)


_convolve.defvjp(_keep_operands(_convolve), _convolve_backward)
_image_gradient.defvjp(_keep_operands(_image_gradient), _image_gradient_backward)
_kernel_gradient.defvjp(_keep_operands(_kernel_gradient), _kernel_gradient_backward)


# The parts of one network, or with a leading axis of members in all arguments if `function` is vmapped.


def _forward(images, kernel, geometry, map_members=lambda function: function):
    return map_members(
        lambda images, kernel: lax.conv_general_dilated(
            images,
            kernel,
            geometry.strides,
            geometry.pads,
            dimension_numbers=_DIMENSIONS,
            precision=geometry.precision,
        )
    )(images, kernel)


def _transpose_to_images(kernel, gradient, geometry, map_members=lambda function: function):
    shape = (*gradient.shape[:-3], *geometry.sides, kernel.shape[-2])
    images = jax.ShapeDtypeStruct(shape, gradient.dtype)
    forward = functools.partial(_forward, geometry=geometry, map_members=map_members)
    return jax.linear_transpose(lambda images: forward(images, kernel), images)(gradient)[0]


def _transpose_to_kernel(images, gradient, geometry, map_members=lambda function: function):
    shape = (*images.shape[:-4], *geometry.lengths, images.shape[-1], gradient.shape[-1])
    kernel = jax.ShapeDtypeStruct(shape, gradient.dtype)
    forward = functools.partial(_forward, geometry=geometry, map_members=map_members)
    return jax.linear_transpose(lambda kernel: forward(images, kernel), kernel)(gradient)[0]


def _map_members(part, geometry):
    """Return `part` as a function of its two operands, with the implementation's rule for `vmap`."""
    function = custom_vmap(functools.partial(part, geometry=geometry))

    @function.def_vmap
    def rule(members, is_batched, a, b):
        a_is_batched, b_is_batched = is_batched
        if a_is_batched and b_is_batched:
            if geometry.implementation == "grouped":
                return part(a, b, geometry, jax.vmap), True
            return jnp.stack([function(a[i], b[i]) for i in range(members)]), True
        # with one kernel, members are more images; `function` keeps this rule for a further vmap
        if part is _forward and a_is_batched:
            return _split(function(_merge(a), b), members), True
        if part is _transpose_to_images and b_is_batched:
            return _split(function(a, _merge(b)), members), True
        # JAX's rule: members are more channels
        in_axes = [0 if batched else None for batched in is_batched]
        return jax.vmap(functools.partial(part, geometry=geometry), in_axes)(a, b), True

    return function


def _merge(images):
    """Make members part of the batch."""
    return images.reshape(-1, *images.shape[2:])


def _split(images, members):
    return images.reshape(members, -1, *images.shape[1:])
