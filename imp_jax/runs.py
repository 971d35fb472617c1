"""Runs of iterative magnitude pruning in a workdir, which records them and from which they resume."""

import os
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import numpy as np
import pandas as pd
from ml_collections import ConfigDict

from imp_jax import arms, data, similarity, training
from imp_jax import config as configs
from imp_jax.errors import UserError, user_path
from imp_jax.experiment import Experiment, describe_experiment, setup
from imp_jax.imp import begin_training, finished_rounds_text, init_state, rounds
from imp_jax.masking import Mask
from imp_jax.members import Member, members_for_next_round, members_of_rows, take_members
from imp_jax.next_masks import prune
from imp_jax.repulsion import Optima
from imp_jax.round_state import (
    Callbacks,
    EarlierNetworks,
    EpochEnd,
    RoundPlan,
    RoundState,
    add_optimum,
    align_networks,
    default_plan,
    init_tickets,
    repeat_optima,
    start_round,
)
from imp_jax.runtime import devices, distributed
from imp_jax.runtime.signals import GracefulStop
from imp_jax.tuning import tune_execution
from imp_jax.workdir.checkpoints import Checkpoints, DamagedError, RoundNetworks
from imp_jax.workdir.execution import (
    agree_on_execution,
    describe_execution,
    has_execution,
    restore_execution,
    store_execution,
)
from imp_jax.workdir.progress import print_summary
from imp_jax.workdir.recorder import Recorder
from imp_jax.workdir.results import Row


def rebuild_optima(
    experiment: Experiment,
    members: Sequence[Member],
    finished: Iterable[tuple[Sequence[Member], RoundNetworks]],
    masks: Mask,
) -> Optima | None:
    """Rebuild the earlier optima of `members` under `masks` from the checkpoints of all finished rounds.

    Args:
      finished: the networks of each round from the first on, with their members.
    """
    optima, previous = None, None
    for round_members, networks in finished:
        networks = take_members(networks, round_members, members)
        if previous:
            optima = add_optimum(experiment, optima, previous, networks.mask)
        previous = networks
    return add_optimum(experiment, optima, previous, masks)


def resume(experiment: Experiment, checkpoints: Checkpoints, rows: Sequence[Row]) -> RoundState:
    """Restore the state at the start of the round after the last one of `checkpoints`.

    Args:
      rows: the rows of results.csv, up to that last round.

    Raises:
      UserError: with repulsion, the rounds so far used another definition of J_r, or a round that is needed
        is damaged; see also `Checkpoints.restore`.
    """
    last = checkpoints.rounds()[-1]
    round_members = members_of_rows(rows, last)
    members = members_for_next_round(round_members, experiment.arms)
    imps = [member for member in members if member.arm == "imp"]
    networks = jax.tree.map(np.asarray, checkpoints.restore(last))
    masks = checkpoints.next_masks(last)
    if masks is None:  # earlier versions did not save them
        masks, _ = prune(
            experiment, last, round_members, networks.trained, networks.mask, networks.initial["params"]
        )
        all_imps = [member for member in round_members if member.arm == "imp"]
        masks = take_members(devices.gather_members(masks, None), all_imps, imps)
    trained = take_members(networks.trained, round_members, imps)
    stored_plan = checkpoints.next_plan(last)
    plan = RoundPlan(**stored_plan) if stored_plan else default_plan(experiment, last + 1)
    tickets = None
    if experiment.rewind_step is not None:
        tickets = _whole_tickets(experiment, checkpoints, rows, imps)
        if tickets is None:
            tickets = take_members(networks.initial, round_members, imps)
    permutations = None
    if any(arms.ARMS[name].aligned for name in experiment.arms):
        permutations = align_networks(experiment, imps, read_round(checkpoints, rows, 0))
    start = trained if plan.continues else tickets
    state = start_round(
        experiment, last + 1, members, start, masks, trained=trained, permutations=permutations, plan=plan
    )
    earlier = EarlierNetworks()
    if experiment.retraining.policy == "evidence":
        earlier = earlier._replace(tickets=tickets, previous=trained)
    if experiment.pruning.network == "dense":
        dense_members, dense_networks = read_round(checkpoints, rows, 0)
        earlier = earlier._replace(dense=take_members(dense_networks.trained, dense_members, imps))
    state = state._replace(earlier=earlier)
    if not experiment.spec.repulsion_strength:
        return state
    if last and checkpoints.similarity_definition(last) != similarity.DEFINITION:
        raise UserError(
            "the rounds so far were trained by an earlier version, whose J_r counted biases too, and a run "
            "should not mix the two; train it in another --workdir, or continue with that version"
        )
    optima = checkpoints.optima(last)
    if optima is None:
        finished = ((members_of_rows(rows, n), checkpoints.restore(n)) for n in range(last + 1))
        next_masks = devices.gather_members(state.masks, len(state.members))
        try:
            optima = rebuild_optima(
                experiment, members, finished, take_members(next_masks, state.members, members)
            )
        except DamagedError as error:
            raise UserError(
                f"{error}; repulsion needs all earlier rounds: once it and those after it are moved "
                f"elsewhere, the same command trains them again"
            ) from error
    return state._replace(optima=repeat_optima(optima, members, state.members))


def read_round(
    checkpoints: Checkpoints, rows: Sequence[Row], number: int
) -> tuple[tuple[Member, ...], RoundNetworks]:
    """Read the networks of a round, as NumPy arrays, with its members.

    Raises:
      DamagedError: the round is not on disk; see also `Checkpoints.restore`.
    """
    if number not in checkpoints.rounds():
        raise DamagedError(f"there is no checkpoint of round {number}")
    return members_of_rows(rows, number), jax.tree.map(np.asarray, checkpoints.restore(number))


def _whole_tickets(experiment, checkpoints, rows, imps):
    """Return imp's tickets with the weights that later masks prune; None if they are lost and not needed.

    They are the starting weights of round 0. With `rewind_step=0` these are the random initialisations, which
    can be computed again.
    """
    try:
        members, networks = read_round(checkpoints, rows, 0)
    except DamagedError as error:
        if not experiment.rewind_step:
            return init_tickets(experiment, imps)
        if experiment.retraining.policy == "evidence":
            raise UserError(
                f"{error}; with retraining.policy evidence a round may start from the first tickets, so "
                f"round 0 is needed"
            ) from error
        own_masks = [name for name in experiment.arms if arms.ARMS[name].mask is not arms.ARMS["imp"].mask]
        if own_masks:
            raise UserError(
                f"{error}; {', '.join(own_masks)} may keep weights that imp has pruned, so round 0 is needed"
            ) from error
        return None
    return take_members(networks.initial, members, imps)


def run(
    config: ConfigDict,
    workdir: str | os.PathLike,
    stop: GracefulStop | None = None,
    config_file: str | None = None,
    *,
    dataset: data.Dataset | None = None,
    on_epoch: Callbacks = (),
    on_round: Callbacks = (),
    analyses: Any = None,
    train_fn: training.TrainFn | None = None,
) -> None:
    """Train the rounds of `config` that `workdir` lacks, record them in it, and print a summary.

    Args:
      stop: the handler of signals that stop the run; None handles no signals.
      config_file: the file that `config` comes from, which the workdir keeps for `imp_jax.analysis`.
      dataset: see `setup`.
      on_epoch, on_round: functions of an `EpochEnd` and of a `RoundEnd`, called after those of the recorder.
      analyses: the module `imp_jax.analysis`, with which `keep_checkpoints=ends` computes the analyses of a
        round before it deletes it. None deletes no round.
      train_fn: see `imp.train`.

    Raises:
      UserError: the config, the data or the workdir is wrong, which is found before any training, and nothing
        is overwritten; a round diverges or cannot be recorded, and all earlier rounds are kept.
      Stopped: a signal arrived; the state of the current round has been saved.
    """
    workdir, stop = user_path(workdir, "the workdir"), stop or GracefulStop()
    with distributed.raise_on_all_processes():
        configs.validate(config)
        if config.branch.name:
            raise UserError(
                f"branch.name is {config.branch.name!r}; it should be '' for a run; branches are trained by "
                f"python -m imp_jax.branch"
            )
    distributed.check_same_everywhere(configs.describe_for_processes(config))
    with distributed.raise_on_all_processes():
        experiment = setup(config, dataset)
    experiment = agree_on_execution(restore_execution(experiment, workdir))
    with Recorder(experiment, config, workdir, config_file, analyses) as recorder:
        first = recorder.finished[-1] + 1 if recorder.finished else 0
        if first == experiment.rounds:
            recorder.finish_cleanup()
            print(f"{workdir} is finished: all {first} rounds are trained, nothing to do")
        else:
            with distributed.raise_on_all_processes():
                if config.execution == "tune" and not has_execution(workdir):
                    experiment = tune_execution(experiment)
                state = resume(experiment, recorder.checkpoints, recorder.rows) if first else None
            state = state or init_state(experiment)
            progress = recorder.saved_progress(
                first, like=begin_training(experiment, state), mesh=experiment.spec.mesh
            )
            _print_start(experiment, state, workdir, first, progress.step if progress else 0)
            if distributed.is_primary():
                store_execution(experiment, workdir)
            recorder.begin(first, progress.step if progress else 0)

            def stop_on_signal(end: EpochEnd) -> None:
                if stop.signal_on_any_process(distributed.global_max):
                    recorder.save_progress(end.round, end.progress, wait=True)
                    raise stop.stopped(f"in round {end.round} at step {end.progress.step} of {end.steps}")

            options = {
                "on_epoch": (recorder.on_epoch, stop_on_signal, recorder.save_progress_if_due, *on_epoch),
                "on_round": (recorder.on_round, *on_round),
                "train_fn": train_fn,
            }
            with stop.defer_signals():
                for _ in rounds(experiment, state, first, progress, **options):
                    pass
                recorder.wait()
                stop.signal_on_any_process(distributed.global_max)
    if distributed.is_primary():
        print_summary(pd.read_csv(workdir / "results.csv"))
        print(f"results: {workdir / 'results.csv'}")


def _print_start(experiment, state, workdir, first, step):
    if first or step:
        steps = experiment.learning_rates_in(first, state.plan.short).size
        finished = finished_rounds_text(first)
        print(f"{workdir} has {finished}; continuing with round {first} at step {step} of {steps}")
    else:
        print(f"workdir: {workdir}")
    print(describe_experiment(experiment))
    for line in (
        describe_execution(experiment.spec.execution),
        devices.describe_mesh(experiment.spec.mesh, len(experiment.members)),
    ):
        if line:
            print(line)
