"""Iterative magnitude pruning: train, prune, measure and reset, round after round (section 2.1).

`rounds` is the algorithm. It needs no workdir: in a notebook it trains in memory. `runs.run` records every
round in a workdir, from which a stopped run resumes.
"""

import functools
import itertools
import time
from collections.abc import Iterator, Sequence

import jax
import numpy as np
from jaxtyping import Float

from imp_jax import arms, divergence, masking, repulsion, training
from imp_jax.evidence import choose_masks, plan_next_round
from imp_jax.experiment import Experiment
from imp_jax.members import (
    BranchMember,
    Member,
    imp_of_each,
    member_keys,
    members_for_next_round,
    round_of,
    where_members,
)
from imp_jax.round_end import end_round
from imp_jax.round_state import (
    Callbacks,
    EpochEnd,
    RoundEnd,
    RoundState,
    align_networks,
    copy_networks,
    init_tickets,
    start_round,
)
from imp_jax.runtime import devices
from imp_jax.runtime.compilation import compile_seconds
from imp_jax.training import Variables
from imp_jax.workdir.checkpoints import MidRoundState, RoundNetworks
from imp_jax.workdir.results import Row


def rounds(
    experiment: Experiment,
    state: RoundState | None = None,
    first: int = 0,
    progress: MidRoundState | None = None,
    *,
    on_epoch: Callbacks = (),
    on_round: Callbacks = (),
    train_fn: training.TrainFn | None = None,
) -> Iterator[RoundEnd]:
    """Run iterative magnitude pruning from round `first` to the last one, and yield the `RoundEnd` of each.

    Args:
      state: the state at the start of round `first`; None is that of round 0.
      progress: the state within round `first` to continue from; None starts at step 0.
      on_epoch, on_round: functions to call with each `EpochEnd` and each `RoundEnd`.
      train_fn: see `train`.

    Raises:
      DivergedError: see `raise_if_diverged`.
      UserError: with repulsion, the mask of an arm regains a pruned weight.
    """
    state = state or init_state(experiment)
    for number in range(first, experiment.rounds):
        progress = train(experiment, number, state, progress, on_epoch=on_epoch, train_fn=train_fn)
        networks = copy_networks(state, progress)
        masks, thresholds, barrier = choose_masks(experiment, number, state, progress, networks)
        rows = measure(experiment, number, state, progress, networks, thresholds, barrier)
        diverged = find_diverged(experiment, number, state.members, progress, rows)
        plan = plan_next_round(experiment, number, state, networks)
        end, state = end_round(experiment, number, state, progress, diverged, networks, rows, masks, plan)
        for callback in on_round:
            callback(end)
        yield end
        progress = None


def init_state(experiment: Experiment) -> RoundState:
    """Make the state of round 0: each imp initialised at random with a dense mask, other arms from imp."""
    imps = [member for member in experiment.members if member.arm == "imp"]
    tickets = init_tickets(experiment, imps)
    permutations = align_networks(experiment, imps, None)
    masks = masking.ones_like(tickets["params"])
    return start_round(experiment, 0, experiment.members, tickets, masks, permutations=permutations)


def begin_training(experiment: Experiment, state: RoundState) -> MidRoundState:
    """Make the state at step 0 of a round, on the mesh: masked tickets and fresh optimizers."""
    states = training.programs(experiment.spec.execution.unroll).init_states(
        state.tickets, state.masks, spec=experiment.spec
    )
    return MidRoundState(0, state.tickets, states, divergence.init_history(len(state.members)), 0.0)


def train(
    experiment: Experiment,
    number: int,
    state: RoundState,
    progress: MidRoundState | None = None,
    *,
    on_epoch: Callbacks = (),
    train_fn: training.TrainFn | None = None,
) -> MidRoundState:
    """Train all members of round `number`, or of a branch, to the end.

    Rewinding (`rewind_step=k`): round 0 stores imp's weights at step k as its ticket. Later rounds train all
    members from step 0, and at step k reset those whose arm rewinds to their tickets with a fresh optimizer
    (Frankle et al. 2020); the control `reinit` is never reset within a round (ours).

    Args:
      progress: the state to continue from; None starts at step 0.
      on_epoch: functions to call with each `EpochEnd`.
      train_fn: takes the steps, a function like `training.train_and_evaluate`, which is the default.

    Returns: the state after the last step, on the mesh.

    Raises:
      DivergedError: see `raise_if_diverged`.
    """
    spec = experiment.spec
    learning_rates = experiment.learning_rates_in(round_of(state.members[0], number), state.plan.short)
    epochs, steps = learning_rates.shape
    progress = progress or begin_training(experiment, state)

    def make_keys(stream):
        keys = member_keys(
            state.members, experiment.seed, lambda m: [stream, arms.ARMS[m.arm].number, round_of(m, number)]
        )
        return devices.shard_members(keys, spec.mesh)

    rng_keys = make_keys("rngs") if spec.rng_streams else None
    optima = devices.shard_members(state.optima, spec.mesh)
    train_epochs = experiment.dataset.train.training_epochs(
        make_keys("data"), epochs, spec.batch_size, progress.step, spec.mesh
    )
    splits = _splits_after_epochs(experiment, progress, steps)
    for first, last in itertools.pairwise(_list_sync_steps(experiment, learning_rates, progress.step)):
        start, compiled = time.perf_counter(), compile_seconds()
        tickets, states = progress.tickets, progress.states
        if first > 0 and first == experiment.rewind_step and not state.plan.continues:
            tickets, states = rewind(experiment, number, state, tickets, states)
        epoch, step = divmod(first, steps)
        arguments = (
            states,
            state.masks,
            train_epochs.epoch(epoch),
            step,
            learning_rates[epoch, step : step + last - first],
            optima,
            None if rng_keys is None else _fold_in_members(rng_keys, epoch),
        )
        evaluated = splits if last % steps == 0 else {}
        states, metrics, evaluations = (train_fn or training.train_and_evaluate)(
            *arguments, splits=list(evaluated.values()), spec=spec
        )
        # waits for the device, so that `seconds` includes the computation
        metrics = devices.gather_members(metrics, len(state.members), axis=1)
        columns = _split_columns(evaluated, evaluations, len(state.members))
        compile_time = compile_seconds() - compiled
        seconds = time.perf_counter() - start - compile_time
        history = divergence.update_history(progress.history, metrics.loss, metrics.accuracy, first, steps)
        rows = _make_rows(state.members, number, columns, {"epoch": last // steps}) if columns else []
        progress = MidRoundState(
            last, tickets, states, history, progress.seconds + seconds, [*progress.epoch_rows, *rows]
        )
        broken = divergence.non_finite_members(history)
        diverged = {state.members[i]: step_and_description for i, step_and_description in broken.items()}
        end = EpochEnd(
            number, state.members, progress, metrics, seconds, compile_time, diverged, learning_rates.size, rows
        )
        for callback in on_epoch:
            callback(end)
        raise_if_diverged(experiment, number, state.members, diverged)
    return progress


def _splits_after_epochs(experiment, progress, steps):
    """Return the splits, by name, on which members are evaluated after every epoch of a training.

    A round is evaluated after all of its epochs or after none, so it keeps its setting when it is resumed.
    """
    if not (experiment.evaluate_epochs if progress.step < steps else progress.epoch_rows):
        return {}
    return {name: split for name, split in experiment.dataset.splits().items() if name != "train"}


_fold_in_members = jax.jit(jax.vmap(jax.random.fold_in, (0, None)))


def _list_sync_steps(experiment, learning_rates, start):
    """Return `start` and the later steps at which the host calls back, saves or rewinds, sorted."""
    epochs, steps = learning_rates.shape
    steps_per_call = experiment.dataset.train.steps_per_call or steps
    sync_steps = {
        start,
        *range(0, epochs * steps, steps_per_call),
        *range(0, epochs * steps + 1, steps),
        experiment.rewind_step or 0,
        *experiment.saved_steps,
    }
    return sorted(step for step in sync_steps if start <= step <= epochs * steps)


def rewind(
    experiment: Experiment, number: int, state: RoundState, tickets: Variables, states: training.TrainState
) -> tuple[Variables, training.TrainState]:
    """Rewind at step k the members whose arm rewinds; return the tickets and states of all, on the mesh.

    In round 0, imp's weights at step k become its ticket: the other members that rewind start from it at step
    k, with the state of imp's optimizer. In later rounds, all are reset to their tickets with fresh optimizers.
    """
    slots = devices.count_slots(len(state.members), experiment.spec.mesh)
    rewinds = np.resize([arms.ARMS[member.arm].rewinds for member in state.members], slots)
    if round_of(state.members[0], number) == 0:
        imps = imp_of_each(state.members)
        recurring = [member for member in state.members if member.arm in experiment.arms]
        imp_indices = [i for i, member in enumerate(state.members) if member.arm == "imp"]
        start = start_round(
            experiment,
            number,
            recurring,
            states.variables,
            state.masks,
            imp_indices,
            imp_indices,
            permutations=state.permutations,
        )
        return _replace_tickets(
            rewinds, np.resize(imps, slots), tickets, states, start.tickets, state.masks, spec=experiment.spec
        )
    fresh = training.programs(experiment.spec.execution.unroll).init_states(
        tickets, state.masks, spec=experiment.spec
    )
    return tickets, jax.jit(where_members)(rewinds, fresh, states)


@functools.partial(jax.jit, static_argnames="spec")
def _replace_tickets(rewinds, imps, tickets, states, new_tickets, masks, *, spec):
    imp_states = jax.tree.map(lambda leaf: leaf[imps], states)
    new_states = training.init_states(new_tickets, masks, spec=spec)._replace(opt_state=imp_states.opt_state)
    chosen = where_members(rewinds, (new_tickets, new_states), (tickets, states))
    return devices.constrain_members(chosen, spec.mesh)


def measure(
    experiment: Experiment,
    number: int,
    state: RoundState,
    progress: MidRoundState,
    networks: RoundNetworks,
    thresholds: Float[np.ndarray, " members"],
    pruning_barrier: float | None = None,
) -> list[Row]:
    """Evaluate the trained networks on all splits; return their rows of results.csv.

    With repulsion, rows also have J_r after training and, from round 1 on, the mean cosine with earlier optima.
    Where evidence decided, they have the barriers that it looked at.
    """
    dataset, spec, members = experiment.dataset, experiment.spec, state.members
    variables, splits = progress.states.variables, dataset.splits()
    evaluated = progress.epoch_rows[-len(members) :]  # all splits but train, after the last epoch
    if evaluated:
        splits = {"train": splits["train"]}
    evaluations = [training.evaluate(variables, split, spec=spec) for split in splits.values()]
    exclude = experiment.pruning.exclude
    prunable_weights = masking.size(networks.mask, exclude) // len(members)
    columns = {
        "density": np.asarray(_survivors(networks.mask, exclude)) / prunable_weights,
        "threshold": thresholds,
        **_split_columns(splits, evaluations, len(members)),
    }
    for name in evaluated[0] if evaluated else ():
        if name.endswith(("_loss", "_accuracy")):
            columns[name] = [row[name] for row in evaluated]
    if state.optima is not None:
        summary = repulsion.summary(networks.trained["params"], state.optima, spec.repulsion_strength)
        columns["repulsion"], columns["cosine"] = summary
    elif spec.repulsion_strength:
        columns["repulsion"] = np.zeros(len(members))  # without earlier optima J_r is 0
    learning_rates = experiment.learning_rates_in(round_of(members[0], number), state.plan.short)
    shared = {"retraining_barrier": state.plan.barrier, "pruning_barrier": pruning_barrier}
    shared = {"epochs": len(learning_rates)} | {k: v for k, v in shared.items() if v is not None}
    return _make_rows(members, number, columns, shared | {"seconds": round(progress.seconds, 3)})


def _split_columns(splits, evaluations, members):
    """Return the loss and the accuracy of all members on each split, by the name of their column."""
    columns = {}
    for (name, split), (loss, correct) in zip(splits.items(), evaluations, strict=True):
        columns[f"{name}_loss"], correct = devices.gather_members((loss, correct), members)
        columns[f"{name}_accuracy"] = correct / split.examples
    return columns


def _make_rows(members, number, columns, shared):
    """Return a row of results.csv or epochs.csv for each member; all have the values of `shared`."""
    columns = {name: np.asarray(column) for name, column in columns.items()}
    return [
        {"replicate": member.replicate, "arm": member.arm, "round": round_of(member, number)}
        | {name: float(str(column[i])) for name, column in columns.items()}  # float32 as 0.1, not 0.10000000149
        | shared
        for i, member in enumerate(members)
    ]


@functools.partial(jax.jit, static_argnames="exclude")
def _survivors(masks, exclude):
    return jax.vmap(lambda mask: masking.survivors(mask, exclude))(masks)


def find_diverged(
    experiment: Experiment,
    number: int,
    members: Sequence[Member],
    progress: MidRoundState,
    rows: Sequence[Row],
) -> dict[Member, tuple[int, str]]:
    """Find the members whose training diverged, each with the step and a description.

    Raises:
      DivergedError: see `raise_if_diverged`.
    """
    losses = [row["train_loss"] for row in rows]
    classes = experiment.dataset.num_classes
    found = divergence.diverged_members(progress.history, losses, classes, progress.step)
    diverged = {members[i]: step_and_description for i, step_and_description in found.items()}
    raise_if_diverged(experiment, number, members, diverged)
    return diverged


def raise_if_diverged(
    experiment: Experiment,
    number: int,
    members: Sequence[Member],
    diverged: dict[Member, tuple[int, str]],
) -> None:
    """Stop the run if a member has diverged with `on_divergence="stop"`, or if no ticket is left.

    Raises:
      DivergedError: a member diverged, and `on_divergence` is "stop"; or no ticket is left.
    """
    if not diverged:
        return
    if experiment.on_divergence == "stop":
        member, (step, description) = next(iter(diverged.items()))
        rate = experiment.learning_rates.max()
        raise divergence.DivergedError(
            f"{description} in round {round_of(member, number)}, arm {member.arm}, replicate "
            f"{member.replicate}, at step {step} of the training; {finished_rounds_text(number)} finished; "
            f"a lower optimizer.learning_rate "
            f"({rate:.6g}) or a warm-up may help, and --config.on_divergence=drop continues with the other "
            f"members",
            number,
            diverged,
        )
    remaining = [member for member in members if member not in diverged]
    is_branch = isinstance(members[0], BranchMember)
    if not is_branch and not members_for_next_round(remaining, experiment.arms):
        raise divergence.DivergedError(
            f"no ticket is left: all have diverged, the last in round {number}; "
            f"a workdir lists them in divergences.csv",
            number,
            diverged,
        )


def finished_rounds_text(number):
    return f"rounds 0 to {number - 1}" if number else "no whole round"
