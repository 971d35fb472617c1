"""Curvature of the training loss: Hessian-vector products, largest eigenvalue and trace of the Hessian.

The eigenvalue and the trace are those of the block of the Hessian that belongs to the surviving weights: the
prunable weights that the mask keeps. Biases and the parameters of normalisation layers are held fixed. A ReLU
counts as linear on both sides of 0, as in all automatic differentiation.
"""

import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key, UInt8
from scipy.sparse.linalg import LinearOperator, eigsh

from imp_jax import masking, similarity, training
from imp_jax.masking import Mask, Params

Product = Callable[[Params], Params]  # from v to H v, both trees like the parameters
_LARGEST_DENSE = 20  # weights up to which the whole Hessian is computed: a Lanczos basis has 20 vectors


def hessian_vector_product(
    loss: Callable[[Params], Float[Array, ""]], params: Params, vector: Params
) -> Params:
    """Compute H v, where H is the Hessian of `loss` at `params`, without H itself (Pearlmutter 1994).

    The result is the derivative of the gradient along v, in forward over reverse mode, which costs about as
    much as two gradients. If forward mode is not available, it is the gradient of ⟨∇L, v⟩, in reverse over
    reverse mode. Forward mode is not available if the gradient calls functions with a `jax.custom_vjp`, as that
    of the kernels in `models.fast_cpu` and `models.fast_gpu` does.
    """
    gradient = jax.grad(loss)

    def differentiate_forward(params, vector):
        return jax.jvp(gradient, (params,), (vector,))[1]

    # under jit, JAX refuses the forward mode of a custom_vjp only after tracing, with a TypeError
    if "custom_lin[" in str(jax.make_jaxpr(differentiate_forward)(params, vector)):
        return jax.grad(lambda p: similarity.inner_product(gradient(p), vector))(params)
    return differentiate_forward(params, vector)


def training_loss_product(
    variables: training.Variables,
    images: UInt8[Array, "batches batch *image"] | Float[Array, "batches batch *image"],
    labels: Int[Array, "batches batch"],
    vector: Params,
    key: Key[Array, ""] | None = None,
    *,
    spec: training.TrainSpec,
) -> Params:
    """Compute H v for the mean cross-entropy (nats) over batches, with the model in training mode.

    BatchNorm normalises each batch by its own statistics, as in training. Weight decay and J_r are not part of
    this loss. The batches follow each other (`lax.scan`), so that memory holds the activations of one.

    Args:
      key: see `training.loss_fn`.
      spec: the kernels for a CPU are replaced by Flax's own, which have a forward mode.
    """
    spec = spec._replace(execution=spec.execution._replace(convolutions="flax"), mesh=None)
    params = variables["params"]
    model_state = {name: leaves for name, leaves in variables.items() if name != "params"}

    def add(total, batch):
        def loss(params):
            return training.loss_fn(params, model_state, *batch, key, spec=spec)[0]

        product = hessian_vector_product(loss, params, vector)
        return jax.tree.map(lambda t, p: t + p / len(images), total, product), None

    return jax.lax.scan(add, jax.tree.map(jnp.zeros_like, params), (images, labels))[0]


def largest_eigenvalue(
    product: Product, mask: Mask, exclude: str | Sequence[str] = (), *, tolerance: float = 1e-3, seed: int = 0
) -> float:
    """Compute the largest eigenvalue of the Hessian on the surviving weights.

    Uses the implicitly restarted Lanczos method (ARPACK), on the host, with a basis of 20 vectors that have one
    entry for each surviving weight. The eigenvalue is the most positive one, not that of largest magnitude.

    Args:
      product: maps a tree v, which is zero outside of the surviving weights, to H v; jit it.
      tolerance: relative error at which the iteration stops.
      seed: of the random vector with which the iteration starts.

    Returns: the eigenvalue, in the unit of the loss per squared weight; nan if no weight survives or `product`
      is not finite.

    Raises:
      ArpackNoConvergence: the iteration does not reach `tolerance`.
    """
    leaves, treedef = jax.tree.flatten(mask)
    is_weight = jax.tree.leaves(masking.prunable(mask, exclude))
    positions = [np.flatnonzero(m) if w else np.zeros(0, int) for m, w in zip(leaves, is_weight, strict=True)]
    ends = np.cumsum([len(position) for position in positions])
    size = int(ends[-1])

    def unpack(vector):
        tree = [np.zeros(leaf.shape, np.float32) for leaf in leaves]
        for leaf, position, part in zip(tree, positions, np.split(vector, ends[:-1]), strict=True):
            leaf.flat[position] = part
        return treedef.unflatten(tree)

    def multiply(vector):
        result = jax.tree.leaves(product(unpack(vector.ravel())))
        parts = zip(result, positions, strict=True)
        return np.concatenate([np.asarray(leaf, np.float32).ravel()[position] for leaf, position in parts])

    if size <= _LARGEST_DENSE:
        hessian = np.array([multiply(column) for column in np.eye(size)]).reshape(size, size)
        return float(np.linalg.eigvalsh(hessian)[-1]) if size and np.isfinite(hessian).all() else math.nan
    start = np.random.default_rng(seed).standard_normal(size).astype(np.float32)
    first = multiply(start)
    if not np.isfinite(first).all():
        return math.nan
    scale = np.abs(first).max()  # ARPACK's tolerance is absolute for eigenvalues below 2e-5
    if scale == 0:
        return 0.0
    operator = LinearOperator((size, size), lambda vector: multiply(vector) / scale, dtype=np.float32)
    (value,) = eigsh(operator, 1, which="LA", v0=start, tol=tolerance, return_eigenvectors=False)
    return float(scale * value)


def hutchinson_trace(
    product: Product, mask: Mask, key: Key[Array, ""], exclude: str | Sequence[str] = (), *, probes: int = 16
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Estimate the trace of the Hessian on the surviving weights as the mean of ⟨v, H v⟩ (Hutchinson 1990).

    The probes v have random signs at the surviving weights and zeros elsewhere. They follow each other
    (`lax.map`), so that memory holds one.

    Args:
      product: maps a tree v to H v.
      probes: number of probes, at least 2.

    Returns: the trace, in the unit of the loss per squared weight, and its standard error.
    """
    leaves, treedef = jax.tree.flatten(mask)
    is_weight = jax.tree.leaves(masking.prunable(mask, exclude))

    def sample(key):
        keys = jax.random.split(key, len(leaves))
        signs = [jax.random.rademacher(k, jnp.shape(m), jnp.float32) for k, m in zip(keys, leaves, strict=True)]
        kept = [jnp.where(m, s, 0) * w for s, m, w in zip(signs, leaves, is_weight, strict=True)]
        probe = treedef.unflatten(kept)
        return similarity.inner_product(probe, product(probe))

    samples = jax.lax.map(sample, jax.random.split(key, probes))
    return samples.mean(), samples.std(ddof=1) / math.sqrt(probes)
