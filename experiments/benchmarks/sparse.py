"""Time steps of sparse LeNets in three forms: `python -m experiments.benchmark sparse`.

The masks are those of a short run of configs/mnist5k.py. In each timed round all members take the same steps of
Adam, divided over the devices as in a run:

- dense: the products of whole layers, as in `training`;
- compact: the inputs and units that still have outgoing weights, gathered once per round. A unit without them
  has no gradient, so the results are equal;
- sparse: the surviving weights only: gather, multiply, and add by `segment_sum`.
"""

import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from rich.console import Console
from rich.table import Table

from experiments.benchmarks.whole_runs import make_mnist5k_config
from imp_jax import imp
from imp_jax.experiment import setup
from imp_jax.runtime.compilation import jit_with_backend_options
from imp_jax.runtime.devices import MEMBER

LAYERS = ("Dense_0", "Dense_1", "Dense_2")
STEPS = 66  # an epoch of mnist5k
EPOCHS = 2  # of the run that finds the masks


class Form(NamedTuple):
    """One form of a LeNet: how a member's parameters and images are stored, and its loss.

    Attributes:
      prepare: (params, masks, images) of a member, NumPy arrays → (parameters, constants, images).
      loss: (parameters, constants, images, labels) → scalar.
    """

    prepare: Callable[..., tuple[Any, Any, np.ndarray]]
    loss: Callable[..., jax.Array]


def benchmark_sparse(rounds: int, repeats: int) -> None:
    """Train a run of `rounds`, then time the forms on the masks of every third round and print a table."""
    config = make_mnist5k_config(rounds, EPOCHS)
    experiment = setup(config)
    images = np.asarray(experiment.dataset.train.images, np.float32).reshape(-1, 784) / 255
    labels = np.asarray(experiment.dataset.train.labels)
    table = Table("density", "inputs", "hidden units", *FORMS, title="milliseconds per step of all members")
    for end in imp.rounds(experiment):
        if end.round % 3 and end.round != rounds - 1:
            continue
        params, masks = end.networks.initial["params"], end.networks.mask
        density = end.rows[0]["density"]
        sizes = [[len(units) for units in list_live_units(take(masks, m))] for m in range(len(end.members))]
        cells = [f"{min(counts)} to {max(counts)}" for counts in zip(*sizes, strict=True)]
        times = time_forms(params, masks, images, labels, repeats)
        texts = [f"{1e3 * statistics.median(times[name]):.2f}" for name in FORMS]
        table.add_row(f"{density:.1%}", cells[0], f"{cells[1]}; {cells[2]}", *texts)
    Console(width=140).print(table)


def take(tree, member):
    """Return the trees of one member."""
    return jax.tree.map(lambda leaf: np.asarray(leaf[member]), tree)


def list_live_units(masks: Any) -> list[np.ndarray]:
    """Return the indices of the inputs and of the units of each hidden layer that have outgoing weights.

    A weight to a unit without outgoing weights does not count.
    """
    live, outputs = [], np.arange(masks[LAYERS[-1]]["kernel"].shape[1])
    for name in reversed(LAYERS):
        outputs = np.flatnonzero(masks[name]["kernel"][:, outputs].any(1))
        live.insert(0, outputs)
    return live


def time_forms(
    params: Any, masks: Any, images: np.ndarray, labels: np.ndarray, repeats: int
) -> dict[str, list[float]]:
    """Return the seconds of a step of all members in each form, timed in turn.

    Args:
      params, masks: of all members.
      images, labels: training set, [examples, pixels] and [examples].
    """
    functions = {name: make_train_fn(form, params, masks, images, labels) for name, form in FORMS.items()}
    times = {name: [] for name in FORMS}
    for function in functions.values():
        function()
    for _ in range(repeats):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            times[name].append((time.perf_counter() - start) / STEPS)
    return times


def make_train_fn(form: Form, params, masks, images, labels, batch_size: int = 60) -> Callable[[], Any]:
    """Return a function that trains `STEPS` steps of all members and returns their parameters."""
    members = len(jax.tree.leaves(params)[0])
    prepared = [form.prepare(take(params, m), take(masks, m), images) for m in range(members)]
    params, constants, images = _stack_padded(prepared)
    orders = np.stack([np.random.default_rng(m).permutation(len(labels)) for m in range(members)])
    orders = orders[:, : STEPS * batch_size].reshape(members, STEPS, batch_size).astype(np.int32)
    optimizer = optax.adam(12e-4)

    def train_member(params, constants, images, order):
        def step(state, chosen):
            params, opt_state = state
            gradients = jax.grad(form.loss)(params, constants, images[chosen], jnp.asarray(labels)[chosen])
            updates, opt_state = optimizer.update(gradients, opt_state)
            return (optax.apply_updates(params, updates), opt_state), None

        return jax.lax.scan(step, (params, optimizer.init(params)), order)[0][0]

    devices = jax.devices()
    count = max(n for n in range(1, len(devices) + 1) if members % n == 0)
    mesh = Mesh(np.array(devices[:count]), (MEMBER,))
    train = jax.shard_map(
        jax.vmap(train_member), mesh=mesh, in_specs=P(MEMBER), out_specs=P(MEMBER), check_vma=False
    )
    train = jit_with_backend_options(train, ynnpack_reductions=False)
    sharding = jax.sharding.NamedSharding(mesh, P(MEMBER))
    arguments = jax.device_put((params, constants, images, orders), sharding)
    return lambda: jax.block_until_ready(train(*arguments))


def _stack_padded(members):
    """Stack trees whose leaves differ in their sizes, padded with zeros to the largest."""

    def stack(*leaves):
        shape = np.max([leaf.shape for leaf in leaves], axis=0)
        pads = ([(0, n - k) for n, k in zip(shape, leaf.shape, strict=True)] for leaf in leaves)
        return np.stack([np.pad(leaf, pad) for leaf, pad in zip(leaves, pads, strict=True)])

    return jax.tree.map(stack, *members)


def _cross_entropy(logits, labels):
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def _prepare_dense(params, masks, images):
    return jax.tree.map(np.multiply, params, masks), jax.tree.map(np.float32, masks), images


def _dense_loss(params, masks, images, labels):
    x = images
    for name in LAYERS:
        # the gradient is masked as in a run: the product with the mask is the identity in the forward pass
        x = x @ (params[name]["kernel"] * masks[name]["kernel"]) + params[name]["bias"]
        x = x if name == LAYERS[-1] else jax.nn.relu(x)
    return _cross_entropy(x, labels)


def _prepare_compact(params, masks, images):
    inputs, *hidden = list_live_units(masks)
    units = [inputs, *hidden, np.arange(params[LAYERS[-1]]["bias"].size)]
    compact = {}
    for name, rows, columns in zip(LAYERS, units[:-1], units[1:], strict=True):
        compact[name] = {
            kind: {"kernel": tree[name]["kernel"][np.ix_(rows, columns)], "bias": tree[name]["bias"][columns]}
            for kind, tree in (("params", params), ("masks", masks))
        }
    params, masks = ({name: compact[name][kind] for name in LAYERS} for kind in ("params", "masks"))
    return _prepare_dense(params, masks, images[:, inputs])


def _prepare_sparse(params, masks, images):
    values, positions = {}, {}
    for name in LAYERS:
        kernel, mask = params[name]["kernel"], masks[name]["kernel"]
        columns, rows = np.nonzero(mask.T)  # by output
        values[name] = {"kernel": kernel[rows, columns], "bias": params[name]["bias"]}
        # columns from 1, because those of padding are 0
        positions[name] = {"rows": rows.astype(np.int32), "columns": 1 + columns.astype(np.int32)}
    return values, positions, images


def _sparse_loss(values, positions, images, labels):
    x = images.T
    for name in LAYERS:
        weights, where = values[name], positions[name]
        products = x[where["rows"]] * weights["kernel"][:, None]
        sums = jax.ops.segment_sum(products, where["columns"], 1 + len(weights["bias"]))[1:]
        x = sums + weights["bias"][:, None]
        x = x if name == LAYERS[-1] else jax.nn.relu(x)
    return _cross_entropy(x.T, labels)


FORMS = {
    "dense": Form(_prepare_dense, _dense_loss),
    "compact": Form(_prepare_compact, _dense_loss),
    "sparse": Form(_prepare_sparse, _sparse_loss),
}
