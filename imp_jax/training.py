"""The train step, the epoch that scans over it, and evaluation, in reading order.

The functions of one network come first; the functions of all members call them, and their trees have a leading
axis of members. Masks, learning rates, keys and earlier optima are arguments: one compiled program serves all
rounds, or with repulsion all rounds whose `Optima` have the same shape.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
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
from imp_jax.data import Batches, Normalize, Split
from imp_jax.masking import Mask, Params
from imp_jax.models.kernels import use_kernels
from imp_jax.repulsion import Optima
from imp_jax.runtime.compilation import jit_with_backend_options
from imp_jax.runtime.devices import DATA, MEMBER, constrain_members
from imp_jax.runtime.execution import (
    ExecutionMode,
    python_loop,
    shard_over_mesh,
    stack_step_outputs,
    vmap_or_unroll_members,
)

Variables = dict[str, Any]  # what model.init returns: "params", and collections such as "batch_stats"
Images = UInt8[Array, "batch height width channels"] | Float[Array, "batch height width channels"]


class TrainSpec(NamedTuple):
    """The parts of a train step that are constant during a run; a static argument of jit."""

    model: nn.Module
    optimizer: optax.GradientTransformationExtraArgs | None = None  # None if nothing is trained
    batch_size: int = 1  # of each member
    normalize: Normalize = Normalize()
    augmentation: tuple[str, ...] = ()  # of images in memory; a streamed split augments while it decodes
    repulsion_strength: float = 0.0  # λ_r; used if there are earlier optima
    execution: ExecutionMode = ExecutionMode()
    accumulate_steps: int = 1  # equal parts of a batch whose gradients are computed one after the other
    norm_parts: int = 1  # equal parts of each of these parts with separate BatchNorm statistics
    rng_streams: tuple[str, ...] = ()  # that the model draws from in training, such as "dropout"
    mesh: Mesh | None = None  # None is one device
    matmul_precision: str = "default"  # of float32 products and convolutions; highest is float32 on a GPU too

    @property
    def data_devices(self) -> int:
        """The number of devices that share each batch."""
        return self.mesh.shape[DATA] if self.mesh else 1

    @contextlib.contextmanager
    def use_kernels(self) -> Iterator[None]:
        """Apply models in this context with the kernels of `execution` and with `matmul_precision`."""
        default = jax.config.jax_default_matmul_precision
        precision = default if self.matmul_precision == "default" else self.matmul_precision
        with use_kernels(self.execution.convolutions), jax.default_matmul_precision(precision):
            yield

    def apply(self, variables: Variables, images: Images, **options: Any) -> Any:
        """Apply the model to images that are not yet normalised."""
        with self.use_kernels():
            return self.model.apply(variables, self.normalize(images), **options)


class TrainState(NamedTuple):
    params: Params
    model_state: Variables  # collections besides "params", such as "batch_stats"; {} if there are none
    opt_state: PyTree[Array]

    @property
    def variables(self) -> Variables:
        return {"params": self.params, **self.model_state}


class Metrics(NamedTuple):
    loss: Float[Array, "steps members"]  # mean cross-entropy of each step's batch, in nats
    accuracy: Float[Array, "steps members"]  # on the same batch, in [0, 1]


class MemberSettings(NamedTuple):
    """Values of the spec that differ between members, if several runs train in one program (`packing`)."""

    weight_decay: Float[Array, " members"]
    repulsion_strength: Float[Array, " members"]


def loss_fn(
    params: Params,
    model_state: Variables,
    images: Images,
    labels: Int[Array, " batch"],
    key: Key[Array, ""] | None = None,
    *,
    spec: TrainSpec,
    temperature: float = 1.0,
) -> tuple[Float[Array, ""], tuple[Variables, Float[Array, ""]]]:
    """Compute the mean cross-entropy of a batch, in nats, with the model in training mode.

    Args:
      key: from which the keys of `spec.rng_streams` are folded; None if there are none.
      temperature: divides the logits; 1 in training.

    Returns: (loss, (model_state, accuracy)): the updated collections, and the accuracy in [0, 1].
    """
    rngs = {name: jax.random.fold_in(key, i) for i, name in enumerate(spec.rng_streams)}

    def forward(images):
        variables = {"params": params, **model_state}
        return spec.apply(variables, images, train=True, mutable=list(model_state), rngs=rngs)

    if spec.norm_parts == 1:
        logits, model_state = forward(images)
    else:
        parts = spec.norm_parts // spec.data_devices
        logits, model_states = jax.vmap(forward)(images.reshape(parts, -1, *images.shape[1:]))
        logits = logits.reshape(len(images), -1)
        model_state = jax.tree.map(lambda leaf: leaf.mean(0, dtype=leaf.dtype), model_states)
    logits = logits.astype(jnp.float32) / temperature
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
    return loss, (model_state, jnp.mean(logits.argmax(-1) == labels))


def train_step(
    state: TrainState,
    mask: Mask,
    images: Images,
    labels: Int[Array, " batch"],
    learning_rate: Float[Array, ""],
    optima: Optima | None = None,
    key: Key[Array, ""] | None = None,
    settings: MemberSettings | None = None,
    *,
    spec: TrainSpec,
) -> tuple[TrainState, Metrics]:
    """Take one step of one member. Its metrics are scalars, computed on the batch before the update.

    With `optima` the gradient of J_r is added to that of the loss. The reported loss is the cross-entropy
    without J_r. If devices share the batch, `images` and `labels` are the part of this device; all other
    arguments are equal on them.

    Args:
      settings: of this member, scalars; None: those of the spec.
    """
    gradient_fn = functools.partial(
        jax.value_and_grad(loss_fn, has_aux=True), state.params, state.model_state, spec=spec
    )
    if key is not None and spec.data_devices > 1:
        key = jax.random.fold_in(key, jax.lax.axis_index(DATA))
    if spec.accumulate_steps == 1:
        outputs = gradient_fn(images, labels, key)
    else:
        outputs = accumulate_gradients(gradient_fn, images, labels, key, spec=spec)
    if spec.data_devices > 1:
        outputs = _cast_like(jax.lax.pmean(outputs, DATA), outputs)
    (loss, (model_state, accuracy)), gradients = outputs
    if optima is not None:
        # a separate gradient, because jax.grad of the sum would take several more passes over all weights
        strength = spec.repulsion_strength if settings is None else settings.repulsion_strength
        gradients = repulsion.add_gradient(gradients, state.params, optima, strength)
    own_decay = {} if settings is None else {"weight_decay": settings.weight_decay}
    updates, opt_state = spec.optimizer.update(
        gradients, state.opt_state, state.params, mask=mask, learning_rate=learning_rate, **own_decay
    )
    params = optax.apply_updates(state.params, updates)
    return TrainState(params, model_state, opt_state), Metrics(loss, accuracy)


def accumulate_gradients(
    function: Callable[..., PyTree[Array]],
    images: Images,
    labels: Int[Array, " batch"],
    key: Key[Array, ""] | None,
    *,
    spec: TrainSpec,
) -> PyTree[Array]:
    """Compute the mean of `function(images, labels, key)` over `spec.accumulate_steps` parts of a batch."""
    steps = spec.accumulate_steps
    # a strided split: part i holds the same images on any mesh
    parts = jax.tree.map(lambda leaf: leaf.reshape(-1, steps, *leaf.shape[1:]).swapaxes(0, 1), (images, labels))
    parts = (*parts, None if key is None else jax.random.split(key, steps))
    first = jax.tree.map(lambda leaf: leaf[0], parts)
    total = jax.tree.map(jnp.zeros_like, jax.eval_shape(function, *first))

    def add(total, part):
        return jax.tree.map(jnp.add, total, function(*part)), None

    if spec.execution.scan:
        total, _ = jax.lax.scan(add, total, parts)
    else:  # convolutions are slow in a loop on a CPU
        for number in range(steps):
            total, _ = add(total, jax.tree.map(lambda leaf: leaf[number], parts))  # noqa: B023
    return _cast_like(jax.tree.map(lambda leaf: leaf / steps, total), total)


def _cast_like(means, tree):
    """Cast means to the types of `tree`, so that counters in the model state stay integers."""
    return jax.tree.map(lambda mean, leaf: mean.astype(leaf.dtype), means, tree)


def init_states(variables: Variables, masks: Mask, *, spec: TrainSpec) -> TrainState:
    """Make the states of all members at the start of a training: the tickets θ⊙m and fresh optimizers."""

    def init_state(variables, mask):
        model_state = {name: values for name, values in variables.items() if name != "params"}
        params = masking.apply(variables["params"], mask)
        return TrainState(params, model_state, spec.optimizer.init(params))

    return constrain_members(jax.vmap(init_state)(variables, masks), spec.mesh)


def train_and_evaluate(
    states: TrainState,
    masks: Mask,
    batches: Batches,
    first_step: int,
    learning_rates: Float[np.ndarray, " steps"] | Float[np.ndarray, "steps members"],
    optima: Optima | None = None,
    keys: Key[Array, " members"] | None = None,
    settings: MemberSettings | None = None,
    *,
    splits: Sequence[Split] = (),
    spec: TrainSpec,
) -> tuple[TrainState, Metrics, list[tuple[Float[Array, " members"], Int[Array, " members"]]]]:
    """Train all members for `len(learning_rates)` steps of one epoch, starting at its step `first_step`.

    Then `evaluate` them on each of `splits`, which does not change the bits of the training. Runs one program
    for all steps, and for the evaluations, if `spec.execution` and the splits allow it; otherwise one program
    per step. Leaves out the examples that do not fill the last batch of the epoch (ours). Donates `states`.

    Args:
      batches: of this epoch, from `Split.training_epochs`.
      learning_rates: of each step, for all members; with `settings`, one column per member.
      optima: Θ, the earlier optima of J_r; None if there are none.
      keys: of this epoch, for `spec.rng_streams`; None if there are none.
      settings: values for each member, None: those of the spec. Weight decays need an optimizer with one.
    """
    jitted, options = programs(spec.execution.unroll), (optima, keys, settings)
    if spec.execution.scan and batches.scannable:
        arguments = (states, masks, batches, first_step, learning_rates, *options)
        evaluations = [_evaluation_batches(split, spec) for split in splits]
        if splits and all(batches.scannable for batches, _ in evaluations):
            states, metrics, sums = jitted.scan_and_evaluate(*arguments, evaluations=evaluations, spec=spec)
            means = [(losses / s.examples, correct) for (losses, correct), s in zip(sums, splits, strict=True)]
            return states, metrics, means
        states, metrics = jitted.scan_steps(*arguments, spec=spec)
    else:

        def step(states, number, rate, batch):
            return jitted.step(states, masks, batch, number, rate, *options, spec=spec)

        numbers = range(first_step, first_step + len(learning_rates))
        # batches last, so that zip does not decode one more than it needs
        inputs = zip(numbers, learning_rates, batches.one_by_one(), strict=False)
        states, metrics = python_loop(step, states, inputs)
    return states, metrics, [evaluate(states.variables, split, spec=spec) for split in splits]


TrainFn = Callable[..., tuple[TrainState, Metrics, list[tuple[Array, Array]]]]  # like `train_and_evaluate`


def train_steps(*arguments: Any, spec: TrainSpec) -> tuple[TrainState, Metrics]:
    """Train as `train_and_evaluate` does, without evaluations."""
    states, metrics, _ = train_and_evaluate(*arguments, spec=spec)
    return states, metrics


def scan_and_evaluate(*arguments, evaluations, spec):
    """Take steps as `scan_steps` does, then compute the sums of `evaluate` on the batches of each split."""
    states, metrics = scan_steps(*arguments, spec=spec)
    sums = [_map_batches(_sum_examples, states.variables, *batches, spec=spec) for batches in evaluations]
    return states, metrics, jax.tree.map(lambda leaf: leaf.sum(0), sums)


def scan_steps(states, masks, batches, first_step, learning_rates, optima, keys, settings=None, *, spec):
    """Take `len(learning_rates)` steps of all members in a `lax.scan`."""

    def step(states, inputs):
        return step_all_members(states, masks, batches, *inputs, optima, keys, settings, spec=spec)

    return jax.lax.scan(step, states, (first_step + jnp.arange(len(learning_rates)), learning_rates))


def step_all_members(states, masks, batches, number, learning_rate, optima, keys, settings=None, *, spec):
    """Take step `number` of an epoch for all members, each on its own batch."""
    images, labels = batches.load(number, spec.batch_size, spec.augmentation)
    if keys is not None:
        keys = jax.vmap(jax.random.fold_in, (0, None))(keys, number)
    step = functools.partial(train_step, spec=spec)
    rate_axis, rate_spec = (None, P()) if settings is None else (0, P(MEMBER))
    step = vmap_or_unroll_members(step, (0, 0, 0, 0, rate_axis, 0, 0, 0), spec.execution)
    member, shared = P(MEMBER), P(MEMBER, DATA)
    in_specs = (member, member, shared, shared, rate_spec, member, member, member)
    step = shard_over_mesh(step, in_specs, spec.mesh)
    return step(states, masks, images, labels, learning_rate, optima, keys, settings)


def evaluate(
    variables: Variables, split: Split, *, spec: TrainSpec, batch_size: int | None = None
) -> tuple[Float[Array, " members"], Int[Array, " members"]]:
    """Compute the mean cross-entropy (nats) and the number of correct predictions of each member on a split.

    Args:
      batch_size: affects only memory and rounding; see `sum_over_batches`.
    """
    losses, correct = sum_over_batches(_sum_examples, variables, split, spec=spec, batch_size=batch_size)
    return losses / split.examples, correct


def sum_over_batches(
    function: Callable[..., PyTree[Array]],
    networks: PyTree[Array],
    split: Split,
    *,
    spec: TrainSpec,
    batch_size: int | None = None,
) -> PyTree[Array]:
    """Sum `function(networks, images, labels, valid, spec=spec)` over all batches of a split.

    Args:
      function: a module-level function, because it is a static argument of jit: a new lambda recompiles.
        `valid` [batch] is False for the padding in the last batch.
      batch_size: None is the default of the split. Rounded up to a multiple of the devices that share a batch.
    """
    batches, numbers = _evaluation_batches(split, spec, batch_size)
    if spec.execution.scan and batches.scannable:
        sums = programs(spec.execution.unroll).map_batches(function, networks, batches, numbers, spec=spec)
    else:
        sums = stack_step_outputs(
            programs(spec.execution.unroll).apply_to_batch(function, networks, batch, number, spec=spec)
            for number, batch in zip(numbers, batches.one_by_one(), strict=False)
        )
    return jax.tree.map(lambda leaf: leaf.sum(0), sums)


def _evaluation_batches(split, spec, batch_size=None):
    """Return the batches of an evaluation and their numbers; see `sum_over_batches`."""
    batch_size = min(batch_size or split.evaluation_batch_size, split.examples)
    batch_size = -(-batch_size // spec.data_devices) * spec.data_devices
    return split.evaluation(batch_size, spec.mesh), np.arange(-(-split.examples // batch_size))


def example_sums(
    logits: Float[Array, "batch classes"], labels: Int[Array, " batch"], valid: Bool[Array, " batch"]
) -> tuple[Float[Array, ""], Int[Array, ""]]:
    """Sum the cross-entropies (nats) and count the correct predictions of the valid examples."""
    logits = logits.astype(jnp.float32)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    correct = logits.argmax(-1) == labels
    return jnp.sum(losses, where=valid), jnp.sum(correct, where=valid, dtype=jnp.int32)


def _sum_examples(variables, images, labels, valid, *, spec):
    """Compute `example_sums` of each member."""

    def sum_member(variables, images, labels, valid):
        sums = example_sums(spec.apply(variables, images, train=False), labels, valid)
        return jax.lax.psum(sums, DATA) if spec.data_devices > 1 else sums

    sums = vmap_or_unroll_members(sum_member, (0, None, None, None), spec.execution)
    sums = shard_over_mesh(sums, (P(MEMBER), P(DATA), P(DATA), P(DATA)), spec.mesh)
    return sums(variables, images, labels, valid)


def _apply_to_batch(function, networks, batches, number, *, spec):
    return function(networks, *batches.load(number), spec=spec)


def _map_batches(function, networks, batches, numbers, *, spec):
    return jax.lax.map(lambda number: _apply_to_batch(function, networks, batches, number, spec=spec), numbers)


class Programs(NamedTuple):
    init_states: Callable[..., TrainState]
    scan_steps: Callable[..., tuple[TrainState, Metrics]]
    scan_and_evaluate: Callable[..., tuple[TrainState, Metrics, PyTree[Array]]]
    step: Callable[..., tuple[TrainState, Metrics]]
    map_batches: Callable[..., PyTree[Array]]
    apply_to_batch: Callable[..., PyTree[Array]]


@functools.cache
def programs(unroll: bool, platform: str | None = None) -> Programs:
    """Return the jitted functions of this module, whose compiler options depend on the platform.

    Args:
      unroll: whether members are unrolled, see `ExecutionMode`.
      platform: see `jit_with_backend_options`.
    """
    # if members are vmapped, YNNPACK's reductions make a member's bits depend on the number of members
    jit = functools.partial(jit_with_backend_options, ynnpack_reductions=unroll, platform=platform)
    return Programs(
        init_states=jit(init_states, static_argnames="spec"),
        scan_steps=jit(scan_steps, static_argnames="spec", donate_argnames="states"),
        scan_and_evaluate=jit(scan_and_evaluate, static_argnames="spec", donate_argnums=0),  # states
        step=jit(step_all_members, static_argnames="spec", donate_argnames="states"),
        map_batches=jit(_map_batches, static_argnames=("function", "spec")),
        apply_to_batch=jit(_apply_to_batch, static_argnames=("function", "spec")),
    )
