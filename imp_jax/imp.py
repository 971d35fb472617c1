"""Iterative magnitude pruning: train → record → prune → rewind, round after round (section 2.1).

What is trained in a round is a member, one (arm, replicate) pair: `imp` is the ticket itself, `reinit` the
control, a different random initialisation under the same mask.
In the rounds of `instability.rounds` a `twin` of each ticket trains beside them, with other data order and
augmentation; it leaves a checkpoint and rows of results, and no trace in later rounds.
"""

import contextlib
import functools
import itertools
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
from jaxtyping import Float
from ml_collections import ConfigDict

from imp_jax import data, divergence, masking, pruning, repulsion, similarity, training
from imp_jax.arms import (
    ARMS,
    Member,
    member_keys,
    members_for_next_round,
    members_of_rows,
    repeat_imp_for_twins,
    take_members,
    where_members,
    without_twins,
)
from imp_jax.errors import UserError, user_path
from imp_jax.experiment import (
    Experiment,
    agree_on_execution,
    describe_execution,
    describe_experiment,
    in_round,
    put_on_mesh,
    restore_execution,
    setup,
    store_execution,
)
from imp_jax.masking import Mask
from imp_jax.repulsion import Optima
from imp_jax.runtime import devices, distributed
from imp_jax.runtime.compilation import compile_seconds
from imp_jax.runtime.signals import GracefulStop
from imp_jax.training import Metrics, Variables
from imp_jax.workdir.checkpoints import Checkpoints, DamagedError, MidRoundState, RoundNetworks
from imp_jax.workdir.progress import print_summary
from imp_jax.workdir.recorder import Recorder
from imp_jax.workdir.results import Row

_HOST_CHECK_EVERY_STEPS = 50  # steps of a stream, whose epochs are long: to tell of progress, and for signals


def run(
    config: ConfigDict,
    workdir: str | os.PathLike,
    interruption: GracefulStop | None = None,
    config_file: str | None = None,
) -> None:
    """Train all rounds of `config` into `workdir` and print a summary. Raises: see `rounds`."""
    workdir = user_path(workdir, "the workdir")
    trained = sum(1 for _ in rounds(config, workdir, interruption, config_file))
    if not distributed.is_primary():
        return
    if not trained:
        print(f"{workdir} is finished: all {config.rounds} rounds are trained, nothing to do")
    print_summary(pd.read_csv(workdir / "results.csv"))
    print(f"results: {workdir / 'results.csv'}")


def rounds(
    config: ConfigDict,
    workdir: str | os.PathLike,
    interruption: GracefulStop | None = None,
    config_file: str | None = None,
) -> Iterator[list[Row]]:
    """The rounds of `config` that `workdir` lacks: each one's rows of results.csv, once it is safely on disk.

    Args:
      config_file: the file that `config` comes from, which the workdir keeps for `imp_jax.analysis`.

    Raises, when the first round is asked for or later:
      UserError: anything wrong with the config, the data or the workdir, before any training and with
        nothing overwritten; a round that cannot be recorded, or diverges, with all earlier rounds kept.
      Stopped: `interruption` has taken in a signal, and the training under way is saved up to here.
    """
    workdir = user_path(workdir, "the workdir")
    interruption = interruption or GracefulStop()
    distributed.check_same_config_everywhere(config)
    with distributed.raise_on_all_processes():
        experiment = setup(config)
        mesh = devices.make_mesh(config, len(experiment.members))
        experiment = put_on_mesh(experiment, mesh)
    experiment = agree_on_execution(restore_execution(experiment, workdir))
    steps, saved_steps = experiment.learning_rates.size, _saved_steps(experiment)
    with Recorder(experiment, workdir, config_file) as recorder:
        first = recorder.finished[-1] + 1 if recorder.finished else 0
        if first == config.rounds:
            recorder.finish_cleanup()
            return
        if recorder.finished:
            with distributed.raise_on_all_processes():
                experiment, tickets, masks, optima = resume(experiment, recorder.checkpoints, recorder.rows)
        else:
            tickets = initialize(experiment)
            masks, optima = masking.ones_like(tickets["params"]), None
        progress = recorder.saved_progress(first, like=begin(in_round(experiment, first), tickets, masks))
        step = progress.step if progress else 0
        if first or step:
            print(
                f"{workdir} has {_finished_rounds_text(first)}; going on with round {first} at step {step} "
                f"of {steps}"
            )
        else:
            print(f"workdir: {workdir}")
        if distributed.is_primary():
            store_execution(experiment, workdir)
        print(describe_experiment(experiment, tickets["params"]))
        if how := describe_execution(experiment.spec.execution):
            print(how)
        if on_devices := devices.describe_mesh(mesh, len(experiment.members)):
            print(on_devices)
        recorder.begin(first, step)

        def on_chunk(of_round, number, now, metrics, seconds, compiling):
            images = metrics.loss.size * config.batch_size
            recorder.chunk(of_round, number, now, images, seconds, compiling)
            _record_divergence(of_round, number, divergence.non_finite_members(now.seen), recorder)
            if interruption.signal_on_any_process(distributed.global_max):
                recorder.progress(number, now, at_once=True)
                raise interruption.stopped(f"in round {number} at step {now.step} of {steps}")
            if now.step in saved_steps:
                recorder.progress(number, now)

        with interruption.defer_signals():
            recorded = None
            for number in range(first, config.rounds):
                of_round = in_round(experiment, number)
                watch = functools.partial(on_chunk, of_round, number)
                networks, end = train(of_round, number, tickets, masks, optima, progress, watch)
                masks, thresholds = prune(of_round, number, networks)
                tickets = reset(of_round, end.tickets, networks)
                rows = measure(of_round, number, networks, thresholds, end.seconds, optima)

                losses = [row["train_loss"] for row in rows]
                diverged = divergence.diverged_members(end.seen, losses, experiment.dataset.num_classes, steps)
                _record_divergence(of_round, number, diverged, recorder)
                kept = [member for i, member in enumerate(of_round.members) if i not in diverged]
                rows = [row for i, row in enumerate(rows) if i not in diverged]
                networks = take_members(networks, of_round.members, kept)
                tickets, masks, optima = take_members(
                    (tickets, masks, optima), experiment.members, members_for_next_round(kept)
                )
                experiment, progress = experiment._replace(members=members_for_next_round(kept)), None

                last = take_members(networks, kept, experiment.members)
                optima = add_optimum(
                    experiment, optima, last, masks
                )  # after the last round too: rounds may grow
                if recorded:
                    yield recorded.result()
                recorded = recorder.round(number, networks, rows, optima)  # while the next round trains
            interruption.signal_on_any_process(distributed.global_max)
            yield recorded.result()


def resume(
    experiment: Experiment, checkpoints: Checkpoints, rows: Sequence[Row]
) -> tuple[Experiment, Variables, Mask, Optima | None]:
    """What the round after the last one of `checkpoints` starts from: its members, tickets, masks and optima.

    Args:
      rows: of results.csv, up to that last round.
    """
    last = checkpoints.rounds()[-1]
    members = members_of_rows(rows, last)
    experiment = experiment._replace(members=members_for_next_round(members))
    networks = take_members(checkpoints.restore(last), members, experiment.members)
    masks, _ = prune(experiment, last, networks)
    # survivors alone are in later rounds, and an arm may have other masks than imp's
    tickets = _dense_tickets(experiment, checkpoints, rows) or networks.initial
    optima = None
    if experiment.config.repulsion.strength:
        if last and checkpoints.similarity_definition(last) != similarity.DEFINITION:
            raise UserError(
                "the rounds so far were trained by an earlier version, whose J_r counted biases too, and a run "
                "should not mix the two; train it in another --workdir, or go on with that version"
            )
        optima = checkpoints.optima(last)
        if optima is None:
            finished = (
                (members_of_rows(rows, number), checkpoints.restore(number)) for number in range(last + 1)
            )
            try:
                optima = rebuild_optima(experiment, finished, masks)
            except DamagedError as error:
                raise UserError(
                    f"{error}; repulsion needs all earlier rounds: once it and those after it are moved "
                    f"elsewhere, the same command trains them again"
                ) from error
    return experiment, reset(experiment, tickets, networks), masks, optima


def _dense_tickets(experiment, checkpoints, rows):
    """The tickets as round 0 has them, before any pruning; None if its checkpoint is missing or damaged."""
    if 0 in checkpoints.rounds():
        with contextlib.suppress(DamagedError):
            return take_members(checkpoints.restore(0).initial, members_of_rows(rows, 0), experiment.members)
    return None


def initialize(experiment: Experiment) -> Variables:
    """The random initialisation of every member; reinit has one of its own, kept over the rounds (ours)."""
    keys = member_keys(
        experiment.members,
        experiment.config.seed,
        lambda member: ["reinit" if member.arm == "reinit" else "init"],
    )
    image = jnp.zeros((1, *experiment.dataset.train.image_shape))
    return jax.jit(jax.vmap(lambda key: dict(experiment.spec.model.init(key, image, train=False))))(keys)


def begin(experiment: Experiment, tickets: Variables, masks: Mask) -> MidRoundState:
    """The beginning of a round's training: its tickets θ⊙m and fresh optimizers, of all members."""
    tickets, masks = repeat_imp_for_twins(experiment.members, (tickets, masks))
    states = training.init_states(tickets, masks, optimizer=experiment.spec.optimizer)
    return MidRoundState(0, tickets, states, divergence.init_history(len(experiment.members)), 0.0)


def train(
    experiment: Experiment,
    number: int,
    tickets: Variables,
    masks: Mask,
    optima: Optima | None = None,
    progress: MidRoundState | None = None,
    on_chunk: Callable[[MidRoundState, Metrics, float, float], None] = lambda *_: None,
) -> tuple[RoundNetworks, MidRoundState]:
    """Train the tickets of round `number`, θ⊙m for all members, to the end.

    `tickets`, `masks` and `optima` are those of all members but twins, which share imp's. `optima`, of earlier
    rounds (`add_optimum`), repel or attract by `config.repulsion`.

    With `rewind_step=k`, round 0 notes imp's weights at step k, and later rounds put them back at step k: the
    learning rates go on from there, the optimizer starts afresh (Frankle et al. 2020); what imp did before k in
    those rounds is dropped, beside the control, which always starts from its random initialisation (ours).

    Args:
      progress: where to go on, if not at the beginning.
      on_chunk: called after each epoch, or part of one where the host has something to do, with where the
        training stands, the metrics of the chunk's steps as NumPy arrays, its seconds of training and those of
        compilation. The states are on the mesh, and the next chunk takes them for its own:
        `devices.gather_members` copies them.

    Returns: the networks, and what else is known at the end.
    """
    config, spec, split = experiment.config, experiment.spec, experiment.dataset.train
    epochs, steps = experiment.learning_rates.shape
    members, mesh = len(experiment.members), spec.mesh
    rewound = jnp.array([member.arm in ("imp", "twin") for member in experiment.members])
    now = progress or begin(experiment, tickets, masks)
    now = now._replace(states=devices.shard_members(now.states, mesh))
    masks, optima = repeat_imp_for_twins(experiment.members, (masks, optima))
    keys = member_keys(
        experiment.members, experiment.config.seed, lambda member: ["data", ARMS[member.arm], number]
    )
    keys, masks_there, optima = devices.shard_members((keys, masks, optima), mesh)
    if isinstance(split, data.Streamed):
        seeds = devices.gather_members(jax.random.key_data(keys), None)
        batches = split.training_batches(seeds, epochs, config.batch_size, first_step=now.step, mesh=mesh)

    for first, last in _chunks(experiment, now.step):
        start, compiled = time.perf_counter(), compile_seconds()
        tickets, states = now.tickets, now.states
        if first > 0 and first == config.rewind_step:
            states = devices.gather_members(states, members)
            if number == 0:
                states = repeat_imp_for_twins(experiment.members, states)  # they part at step k
                tickets = where_members(rewound, states.variables, tickets)
            else:
                fresh = training.init_states(tickets, masks, optimizer=spec.optimizer)
                states = where_members(rewound, fresh, states)
            states = devices.shard_members(states, mesh)
        rates = experiment.learning_rates.ravel()[first:last]
        if isinstance(split, data.Streamed):
            states, metrics = training.train_steps_on_stream(
                states, masks_there, batches, rates, optima, spec=spec
            )
        else:
            epoch, step = divmod(first, steps)
            options = {"batch_size": config.batch_size, "spec": spec}
            states, metrics = training.train_steps_in_memory(
                states, masks_there, split, keys, epoch, step, rates, optima, **options
            )
        metrics = devices.gather_members(metrics, members, axis=1)  # the one wait for the device
        compiling = compile_seconds() - compiled
        seconds = time.perf_counter() - start - compiling
        seen = divergence.update_history(now.seen, metrics.loss, metrics.accuracy, first, steps)
        now = MidRoundState(last, tickets, states, seen, now.seconds + seconds)
        on_chunk(now, metrics, seconds, compiling)
    initial = {**now.tickets, "params": masking.apply(now.tickets["params"], masks)}
    return RoundNetworks(initial, devices.gather_members(now.states.variables, members), masks), now


def prune(
    experiment: Experiment, number: int, networks: RoundNetworks
) -> tuple[Mask, Float[np.ndarray, " members"]]:
    """The masks after round `number`, every arm's from its replicate's imp, and each member's own threshold.

    A round's twins are given a threshold, and no mask: no later round trains them.
    """
    members = experiment.members
    masks, thresholds = _prune_members(
        networks.trained["params"],
        networks.mask,
        member_keys(experiment.members, experiment.config.seed, lambda member: ["score", number]),
        jnp.array([members.index(Member("imp", member.replicate)) for member in members]),
        score=experiment.score,
        fraction=experiment.config.pruning.fraction,
        exclude=tuple(experiment.config.pruning.exclude),
    )
    return without_twins(experiment.members, masks), np.asarray(thresholds)


def reset(experiment: Experiment, tickets: Variables, networks: RoundNetworks) -> Variables:
    """Return the weights from which the next round's trainings start, not yet masked: those of this round.

    With `rewind_step=None`, imp goes on from its trained weights; the control is still reset (ours).

    Args:
      tickets: the weights, not masked, from which this round's trainings started, of all its members.
      networks: what the round trained.
    """
    if experiment.config.rewind_step is not None:
        return without_twins(experiment.members, tickets)
    goes_on = jnp.array([member.arm == "imp" for member in experiment.members])
    return without_twins(experiment.members, where_members(goes_on, networks.trained, tickets))


def add_optimum(
    experiment: Experiment, optima: Optima | None, networks: RoundNetworks, masks: Mask
) -> Optima | None:
    """The earlier optima for the round that trains under `masks`: `optima` and `networks`, the last result.

    All lead with the members of that round, without twins. Each arm remembers its own (ours for the control).
    None without repulsion.
    """
    config = experiment.config
    if not config.repulsion.strength:
        return None
    known = 0 if optima is None else int(np.max(optima.count))
    # those of the last round are for a run that grows
    most = 1 if config.repulsion.memory == "last" else max(config.rounds - 1, known + 1)
    options = {"dtype": config.repulsion.dtype, "exclude": tuple(config.pruning.exclude)}
    return repulsion.add_optimum(optima, networks.trained["params"], masks, max_optima=most, **options)


def rebuild_optima(
    experiment: Experiment, finished: Iterable[tuple[Sequence[Member], RoundNetworks]], masks: Mask
) -> Optima | None:
    """What `add_optimum` had come to after all of `finished`, for the members of `experiment` under `masks`.

    Args:
      finished: the rounds from the first on, each with the members that lead its networks.
    """
    optima, before = None, None
    for members, networks in finished:
        networks = take_members(networks, members, experiment.members)
        if before:
            optima = add_optimum(experiment, optima, before, networks.mask)
        before = networks
    return add_optimum(experiment, optima, before, masks)


def measure(
    experiment: Experiment,
    number: int,
    networks: RoundNetworks,
    thresholds: Float[np.ndarray, " members"],
    seconds: float,
    optima: Optima | None = None,
) -> list[Row]:
    """Evaluate the trained networks on both splits: the rows of results.csv of a round trained in `seconds`.

    With repulsion, J_r at the end of training too, and the mean cosine with the `optima` the round knew of.
    """
    dataset, spec = experiment.dataset, experiment.spec
    trained = devices.shard_members(networks.trained, spec.mesh)
    sums = [training.evaluate(trained, split, spec=spec) for split in (dataset.train, dataset.test)]
    (train_loss, train_correct), (test_loss, test_correct) = devices.gather_members(
        sums, len(experiment.members)
    )
    exclude = tuple(experiment.config.pruning.exclude)
    prunable_weights = masking.size(networks.mask, exclude) // len(experiment.members)
    columns = {
        "density": np.asarray(_survivors(networks.mask, exclude)) / prunable_weights,
        "threshold": thresholds,
        "train_loss": train_loss,
        "train_accuracy": np.asarray(train_correct) / dataset.train.examples,
        "test_loss": test_loss,
        "test_accuracy": np.asarray(test_correct) / dataset.test.examples,
    }
    if optima is not None:
        optima = repeat_imp_for_twins(experiment.members, optima)
        params, strength = networks.trained["params"], spec.repulsion_strength
        columns["repulsion"], columns["cosine"] = repulsion.summary(params, optima, strength)
    elif experiment.config.repulsion.strength:
        columns["repulsion"] = np.zeros(len(experiment.members))  # no earlier optimum, no term
    columns = {name: np.asarray(column) for name, column in columns.items()}
    return [
        {"replicate": member.replicate, "arm": member.arm, "round": number}
        | {name: float(str(column[i])) for name, column in columns.items()}  # float32 as 0.1, not 0.10000000149
        | {"seconds": round(seconds, 3)}
        for i, member in enumerate(experiment.members)
    ]


@functools.partial(jax.jit, static_argnames=("score", "fraction", "exclude"))
def _prune_members(params, masks, keys, imp_of, *, score, fraction, exclude):
    def member(params, mask, key):
        return pruning.prune_by_score(score(params, key), params, mask, fraction, exclude)

    masks, thresholds = jax.vmap(member)(params, masks, keys)
    return jax.tree.map(lambda mask: mask[imp_of], masks), thresholds


@functools.partial(jax.jit, static_argnames="exclude")
def _survivors(masks, exclude):
    return jax.vmap(lambda mask: masking.survivors(mask, exclude))(masks)


def _saved_steps(experiment):
    """The steps of a training at which its state is saved."""
    config, steps = experiment.config, experiment.learning_rates.size
    every = [config.checkpoint_every_epochs * experiment.learning_rates.shape[1]]
    if isinstance(experiment.dataset.train, data.Streamed):
        every.append(config.checkpoint_every_steps)
    return {step for n in every for step in range(n, steps, n)}


def _chunks(experiment, start):
    """A training from `start` on as pairs of steps, cut at the ends of epochs and where the host has to act."""
    epochs, steps = experiment.learning_rates.shape
    streamed = isinstance(experiment.dataset.train, data.Streamed)
    looks = range(0, epochs * steps, _HOST_CHECK_EVERY_STEPS) if streamed else ()
    cuts = {
        *looks,
        *range(0, epochs * steps + 1, steps),
        experiment.config.rewind_step or 0,
        *_saved_steps(experiment),
        start,
    }
    return itertools.pairwise(sorted(cut for cut in cuts if cut >= start))


def _record_divergence(experiment, number, diverged, recorder):
    """Record who has diverged, and stop the run if the config says so or no ticket is left."""
    config, members = experiment.config, experiment.members
    for index, (step, what) in diverged.items():
        recorder.divergence(number, members[index], step, what)
    if diverged and config.on_divergence == "stop":
        index, (step, what) = next(iter(diverged.items()))
        member = members[index]
        raise divergence.DivergedError(
            f"{what} in round {number}, arm {member.arm}, replicate {member.replicate}, at step {step} "
            f"of the training; {_finished_rounds_text(number)} on disk; a lower optimizer.learning_rate "
            f"({config.optimizer.learning_rate}) or a warm-up may help, and "
            f"--config.on_divergence=drop goes on with the other members"
        )
    if not members_for_next_round([member for i, member in enumerate(members) if i not in diverged]):
        raise divergence.DivergedError(
            f"no ticket is left: all have diverged, the last in round {number}; see divergences.csv"
        )


def _finished_rounds_text(number):
    return f"rounds 0 to {number - 1}" if number else "no whole round"
