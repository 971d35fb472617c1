"""The train step, an epoch in one compiled program or step by step, and evaluation.

Every tree of `train_steps_in_memory`, `train_steps_on_stream` and `evaluate` leads with an axis of members,
which train side by side. Masks, learning rates, keys and earlier optima are arguments: one compiled program
serves every round, or with repulsion every round of one shape of `Optima`.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int, Key, PyTree, UInt8

from imp_jax import masking, repulsion
from imp_jax.data import InMemory, Normalize, Streamed
from imp_jax.data.augmentation import augment
from imp_jax.masking import Mask, Params
from imp_jax.models.fast_cpu import use_kernels
from imp_jax.repulsion import Optima
from imp_jax.runtime.compilation import jit_with_backend_options
from imp_jax.runtime.devices import DATA, MEMBER
from imp_jax.runtime.execution import (
    ExecutionMode,
    python_loop,
    shard_over_mesh,
    stack_step_outputs,
    vmap_or_unroll_members,
)

Variables = dict[str, Any]  # what model.init returns: "params", and collections such as "batch_stats"


class TrainSpec(NamedTuple):
    """What a step is, besides its state and data; static under jit."""

    model: nn.Module
    optimizer: optax.GradientTransformationExtraArgs | None = None  # None where nothing is trained
    normalize: Normalize = Normalize()
    augmentation: tuple[str, ...] = ()  # of images in memory; a stream has made its own
    repulsion_strength: float = 0.0  # λ_r; read where there are earlier optima
    execution: ExecutionMode = ExecutionMode()
    accumulate_steps: int = 1  # parts of a batch that are computed one after the other
    norm_parts: int = 1  # parts of those that are normalised each by its own statistics
    mesh: Mesh | None = None  # of devices; None is one

    @property
    def data_devices(self) -> int:
        """How many devices divide each batch."""
        return self.mesh.shape[DATA] if self.mesh else 1

    def apply(
        self, variables: "Variables", images: UInt8[Array, "batch height width channels"], **options: Any
    ) -> Any:
        """Apply the model to images as they are in a data set, with the kernels of `execution`."""
        with use_kernels(self.execution.convolutions):
            return self.model.apply(variables, self.normalize(images), **options)


class TrainState(NamedTuple):
    params: Params
    model_state: Variables  # the collections of the model besides its parameters; {} for most
    opt_state: PyTree[Array]

    @property
    def variables(self) -> Variables:
        return {"params": self.params, **self.model_state}


class Metrics(NamedTuple):
    loss: Float[Array, "steps members"]  # mean cross-entropy of each step's batch, in nats
    accuracy: Float[Array, "steps members"]  # on the same batch, in [0, 1]


@functools.partial(jax.jit, static_argnames=("optimizer",))
def init_states(variables: Variables, masks: Mask, *, optimizer: optax.GradientTransformation) -> TrainState:
    """The states of all members at the start of a training: their tickets θ⊙m and fresh optimizers."""

    def member_state(variables, mask):
        model_state = {name: values for name, values in variables.items() if name != "params"}
        params = masking.apply(variables["params"], mask)
        return TrainState(params, model_state, optimizer.init(params))

    return jax.vmap(member_state)(variables, masks)


def train_step(
    state: TrainState,
    mask: Mask,
    images: UInt8[Array, "batch height width channels"],
    labels: Int[Array, " batch"],
    learning_rate: Float[Array, ""],
    optima: Optima | None = None,
    *,
    spec: TrainSpec,
) -> tuple[TrainState, Metrics]:
    """One step of one member; its metrics are scalars, of the batch before the step.

    With `optima`, J_r joins the loss that is descended, not the one that is reported: as a gradient of its own,
    since `jax.grad` of the sum would take several more passes over all weights, pruned ones too.
    Where devices divide the batch, images and labels are this one's, and all else is the same on all of them.
    """

    def loss_fn(params, images, labels):
        logits, model_state = _forward(params, state.model_state, images, spec)
        logits = logits.astype(jnp.float32)
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
        return loss, (model_state, jnp.mean(logits.argmax(-1) == labels))

    gradient = functools.partial(jax.value_and_grad(loss_fn, has_aux=True), state.params)
    (loss, (model_state, accuracy)), gradients = accumulate_gradients(gradient, images, labels, spec)
    if optima is not None:
        gradients = repulsion.add_gradient(gradients, state.params, optima, spec.repulsion_strength)
    updates, opt_state = spec.optimizer.update(
        gradients, state.opt_state, state.params, mask=mask, learning_rate=learning_rate
    )
    params = optax.apply_updates(state.params, updates)
    return TrainState(params, model_state, opt_state), Metrics(loss, accuracy)


def _forward(params, model_state, images, spec):
    """Logits of a batch in training, and the collections after it, by parts where each is normalised alone."""

    def forward(images):
        variables = {"params": params, **model_state}
        return spec.apply(variables, images, train=True, mutable=list(model_state))

    if spec.norm_parts == 1:
        return forward(images)
    parts = spec.norm_parts // spec.data_devices
    logits, model_states = jax.vmap(forward)(images.reshape(parts, -1, *images.shape[1:]))
    return logits.reshape(len(images), -1), jax.tree.map(lambda leaf: leaf.mean(0), model_states)


def accumulate_gradients(function, images, labels, spec):
    """The mean of `function(images, labels)` over a batch: over its parts in turn, then over its devices."""
    if (steps := spec.accumulate_steps) == 1:
        mean = function(images, labels)
    else:
        # every n-th image: each device has its share of every part, which so is the same on any mesh
        parts = jax.tree.map(
            lambda leaf: leaf.reshape(-1, steps, *leaf.shape[1:]).swapaxes(0, 1), (images, labels)
        )
        total = jax.tree.map(jnp.zeros_like, jax.eval_shape(function, *(leaf[0] for leaf in parts)))

        def add(total, part):
            return jax.tree.map(jnp.add, total, function(*part)), None

        if spec.execution.scan:
            total, _ = jax.lax.scan(add, total, parts)
        else:  # a CPU's convolutions are slow in a loop
            for number in range(steps):
                total, _ = add(total, [leaf[number] for leaf in parts])
        mean = jax.tree.map(lambda leaf: leaf / steps, total)
    return jax.lax.pmean(mean, DATA) if spec.data_devices > 1 else mean


def train_step_all_members(
    states: TrainState,
    masks: Mask,
    images: UInt8[Array, "members batch height width channels"],
    labels: Int[Array, "members batch"],
    learning_rate: Float[Array, ""],
    optima: Optima | None = None,
    *,
    spec: TrainSpec,
) -> tuple[TrainState, Metrics]:
    """`train_step` of all members, which lead all but the rate, each on a batch of its own."""
    step = functools.partial(train_step, spec=spec)
    step = vmap_or_unroll_members(step, (0, 0, 0, 0, None, 0), spec.execution)
    member, batch = P(MEMBER), P(MEMBER, DATA)
    step = shard_over_mesh(step, (member, member, batch, batch, P(), member), spec.mesh)
    return step(states, masks, images, labels, learning_rate, optima)


def train_steps_in_memory(
    states: TrainState,
    masks: Mask,
    split: InMemory,
    keys: Key[Array, " members"],
    epoch: int,
    first_step: int,
    learning_rates: Float[np.ndarray, " steps"],
    optima: Optima | None = None,
    *,
    batch_size: int,
    spec: TrainSpec,
) -> tuple[TrainState, Metrics]:
    """Train all members for `len(learning_rates)` steps of one epoch, from its step `first_step` on.

    Each member visits the examples in an order, and augments them in a way, drawn from its key and the epoch;
    examples that do not fill a last batch are left out of that epoch (ours). `states` is donated. `optima`, the
    earlier optima of J_r, lead with the members.
    """
    options = {"batch_size": batch_size, "spec": spec}
    draws = _draw_epoch_jit(keys, epoch, examples=split.examples)
    if spec.execution.scan:
        return _train_epoch_jit(states, masks, split, draws, first_step, learning_rates, optima, **options)
    return python_loop(
        lambda states, *inputs: _train_step_in_memory_jit(
            states, masks, split, draws, optima, inputs, **options
        ),
        states,
        enumerate(learning_rates, start=first_step),
    )


def train_steps_on_stream(
    states: TrainState,
    masks: Mask,
    batches: Iterator[tuple[UInt8[Array, "members batch height width channels"], Int[Array, "members batch"]]],
    learning_rates: Float[np.ndarray, " steps"],
    optima: Optima | None = None,
    *,
    spec: TrainSpec,
) -> tuple[TrainState, Metrics]:
    """Train all members on the next `len(learning_rates)` batches of a stream. `states` is donated."""
    return python_loop(
        lambda states, rate, batch: _train_step_jit(states, masks, *batch, rate, optima, spec=spec),
        states,
        zip(learning_rates, batches, strict=False),  # rates first: no batch is taken in vain
    )


def evaluate(
    variables: Variables, split: InMemory | Streamed, *, spec: TrainSpec, batch_size: int | None = None
) -> tuple[Float[Array, " members"], Int[Array, " members"]]:
    """Mean cross-entropy (nats) and number of examples classified right, of every member over a whole split.

    Args:
      batch_size: changes nothing but memory and rounding; see `sum_over_batches`.
    """
    losses, correct = sum_over_batches(_member_sums, variables, split, spec=spec, batch_size=batch_size)
    return losses / split.examples, correct


def sum_over_batches(
    function: Callable[..., PyTree[Array]],
    networks: PyTree[Array],
    split: InMemory | Streamed,
    *,
    spec: TrainSpec,
    batch_size: int | None = None,
) -> PyTree[Array]:
    """The sum of `function(networks, images, labels, counted, spec=spec)` over all batches of a split.

    Args:
      function: traced, and static: one that is defined once. `counted` [batch] is False for the examples that
        fill up the last batch and should count for nothing.
      batch_size: None is 1000 small images or 250 large ones.
    """
    batch_size = min(batch_size or (250 if isinstance(split, Streamed) else 1000), split.examples)
    batch_size = -(-batch_size // spec.data_devices) * spec.data_devices
    numbers = np.arange(-(-split.examples // batch_size))
    if isinstance(split, Streamed):
        # the last batch is filled up, so that one program serves all
        examples = np.arange(len(numbers) * batch_size)
        batches = split.evaluation_batches(batch_size, examples % split.examples, spec.mesh)
        counted = (examples < split.examples).reshape(-1, batch_size)
        sums = stack_step_outputs(
            _eval_streamed_batch_jit(function, networks, *batch, counted=of_batch, spec=spec)
            for batch, of_batch in zip(batches, counted, strict=True)
        )
    else:
        options = {"batch_size": batch_size, "spec": spec}
        if spec.execution.scan:
            sums = _eval_split_jit(function, networks, split, numbers, **options)
        else:
            sums = stack_step_outputs(_eval_batch_jit(function, networks, split, i, **options) for i in numbers)
    return jax.tree.map(lambda leaf: leaf.sum(0), sums)


def example_sums(
    logits: Float[Array, "batch classes"], labels: Int[Array, " batch"], counted: Bool[Array, " batch"]
) -> tuple[Float[Array, ""], Int[Array, ""]]:
    """The sum of the cross-entropies (nats), and the number right, over the examples that count."""
    logits = logits.astype(jnp.float32)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    correct = logits.argmax(-1) == labels
    return jnp.sum(losses, where=counted), jnp.sum(correct, where=counted, dtype=jnp.int32)


def _draw_epoch(keys, epoch, examples):
    """For each member the order of the examples in an epoch, and the key of its augmentations."""

    def of_member(key):
        order_key, augmentation_key = jax.random.split(jax.random.fold_in(key, epoch))
        return jax.random.permutation(order_key, examples), augmentation_key

    return jax.vmap(of_member)(keys)


def _step(states, masks, split, draws, optima, inputs, *, batch_size, spec):
    """Step number `inputs[0]` of an epoch of all members, on images in memory, at the rate `inputs[1]`."""
    number, learning_rate = inputs

    def member_batch(order, key):
        batch = jax.lax.dynamic_slice_in_dim(order, number * batch_size, batch_size)
        images = augment(jax.random.fold_in(key, number), split.images[batch], spec.augmentation)
        return images, split.labels[batch]

    images, labels = jax.vmap(member_batch)(*draws)
    return train_step_all_members(states, masks, images, labels, learning_rate, optima, spec=spec)


def _scan_steps(states, masks, split, draws, first_step, learning_rates, optima, *, batch_size, spec):
    numbers = first_step + jnp.arange(len(learning_rates))
    step = functools.partial(_step, batch_size=batch_size, spec=spec)
    return jax.lax.scan(
        lambda states, inputs: step(states, masks, split, draws, optima, inputs),
        states,
        (numbers, learning_rates),
    )


def _member_sums(variables, images, labels, counted, *, spec):
    """`example_sums` of each member."""

    def of_member(variables, images, labels, counted):
        logits = spec.apply(variables, images, train=False)
        sums = example_sums(logits, labels, counted)
        return jax.lax.psum(sums, DATA) if spec.data_devices > 1 else sums

    sums = vmap_or_unroll_members(of_member, (0, None, None, None), spec.execution)
    sums = shard_over_mesh(sums, (P(MEMBER), P(DATA), P(DATA), P(DATA)), spec.mesh)
    return sums(variables, images, labels, counted)


def _sums(function, networks, split, number, *, batch_size, spec):
    """`function` of batch `number`; the last one is filled up with examples that count for nothing."""
    batch = number * batch_size + jnp.arange(batch_size)
    where = batch % split.examples
    counted = batch < split.examples
    return function(networks, split.images[where], split.labels[where], counted, spec=spec)


def _scan_sums(function, networks, split, numbers, *, batch_size, spec):
    return jax.lax.map(
        lambda number: _sums(function, networks, split, number, batch_size=batch_size, spec=spec), numbers
    )


def _stream_sums(function, networks, images, labels, counted, *, spec):
    return function(networks, images, labels, counted, spec=spec)


_draw_epoch_jit = jit_with_backend_options(_draw_epoch, static_argnames="examples")
_train_epoch_jit = jit_with_backend_options(
    _scan_steps, static_argnames=("batch_size", "spec"), donate_argnames="states"
)
_train_step_in_memory_jit = jit_with_backend_options(
    _step, static_argnames=("batch_size", "spec"), donate_argnames="states"
)
_train_step_jit = jit_with_backend_options(
    train_step_all_members, static_argnames="spec", donate_argnames="states"
)
_eval_split_jit = jit_with_backend_options(_scan_sums, static_argnames=("function", "batch_size", "spec"))
_eval_batch_jit = jit_with_backend_options(_sums, static_argnames=("function", "batch_size", "spec"))
_eval_streamed_batch_jit = jit_with_backend_options(_stream_sums, static_argnames=("function", "spec"))
