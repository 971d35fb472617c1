"""Branches: arms trained on the masks of a run that has them already.

    python -m imp_jax.branch --workdir=runs/mnist5k --arms=shuffled,signs,snip

Once imp's masks are on disk, no control needs an earlier one: all rounds, replicates and arms are independent.
They train side by side in groups of whole rounds: as many members as memory allows, but on a CPU about a
dozen, because more are no faster there. A branch is a workdir in the folder `branches` of its run. It can be
stopped, resumed and analysed like a run. The run may grow meanwhile.

An arm has the same random keys as beside imp. On a CPU its networks are equal to the bit to those of a run that
trains it beside imp, unless a device trains a single member.
"""

import argparse
import contextlib
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pandas as pd
from absl import logging
from ml_collections import ConfigDict

from imp_jax import analysis, cli, config_files, data, imp, masking, models, training
from imp_jax import arms as arm_registry
from imp_jax import config as configs
from imp_jax.branch_start import choose_rounds, open_source, start
from imp_jax.errors import UserError, user_path
from imp_jax.experiment import Experiment, put_on_mesh, setup
from imp_jax.members import BranchMember, Member, take_members
from imp_jax.next_masks import prune
from imp_jax.round_state import Callbacks, EpochEnd, RoundEnd, RoundState
from imp_jax.runtime import compilation, devices, distributed
from imp_jax.runtime.memory import available_bytes
from imp_jax.runtime.signals import GracefulStop, Stopped
from imp_jax.workdir.execution import describe_execution, restore_execution, store_execution
from imp_jax.workdir.files import write_atomically
from imp_jax.workdir.lock import stored_config, stored_config_file
from imp_jax.workdir.progress import BranchDisplay, ignore_print_errors
from imp_jax.workdir.recorder import Recorder

# fields that a branch takes from its run: masks and starting weights depend on them, or a branch sets them
_FIXED = ("seed", "rounds", "replicates", "rewind_step", "keep_checkpoints", "on_divergence", "execution")
_FIXED_GROUPS = ("model.", "pruning.", "instability.", "repulsion.", "mesh.", "branch.")
_MAY_CHANGE = (
    "pruning.images",
    "repulsion.strength",
    "repulsion.memory",
    "repulsion.dtype",
    "model.norm_momentum",
)
_SHARE_OF_MEMORY = 0.5  # that the members of a program may take
_COPIES_OF_STATE = 6
_MAX_MEMBERS = 12  # on a CPU more members are no faster; many convolutions take long to compile
_CHUNK_FILE = "chunk.json"  # the rounds in training; a saved state belongs to these


def make_config(
    run_config: ConfigDict,
    arms: Sequence[str],
    rounds: Sequence[int] = (),
    name: str | None = None,
    mask_from: str | None = None,
    overrides: dict[str, Any] | None = None,
) -> ConfigDict:
    """Return the config of a branch: that of its run with other arms and overridden fields.

    Args:
      name: of the branch; by default its arms and what else it specifies.
      overrides: values of fields, by name such as "optimizer.learning_rate".

    Raises:
      UserError: an overridden field does not exist, or has no effect on a branch.
    """
    overrides = overrides or {}
    if not arms:
        raise UserError("arms is empty; it should have at least one arm, without repetition")
    if name is not None and (not name or Path(name).name != name or len(name.encode()) > 200):
        raise UserError(f"--name is {name!r}; it should be the name of a folder: no slash, at most 200 bytes")
    if run_config.branch.name:
        raise UserError(
            f"--workdir has the branch {run_config.branch.name!r}; it should be the workdir of a run, which "
            f"finds its own masks"
        )
    config = run_config.copy_and_resolve_references()
    known = configs.flatten(config)
    for field in overrides:
        if field not in known:
            raise UserError(configs.unknown_field(field))
        fixed = field == "arms" or field in _FIXED or field.startswith(_FIXED_GROUPS)
        if fixed and field not in _MAY_CHANGE:
            raise UserError(f"--config.{field} is given; a branch has the {field} of its run")
    if overrides.get("retraining.policy") == "full":
        config.retraining.update(configs.default().retraining)
        if config.pruning.policy == "fixed":
            config.evidence.images = configs.default().evidence.images
    config.update_from_flattened_dict(overrides)
    config.arms = tuple(arms)
    config.keep_checkpoints = "all"
    config.on_divergence = "drop"  # members are independent
    config.analysis.also = tuple(name for name in config.analysis.also if name != "instability")
    config.instability.update(configs.default().instability)
    config.instability.rounds = ()  # a branch has no twins
    config.branch.rounds = tuple(sorted(set(rounds)))
    config.branch.mask_from = mask_from and str(user_path(mask_from, "--mask_from").absolute())
    if name is None:
        parts = {"rounds": config.branch.rounds, "mask_from": mask_from and Path(mask_from).absolute().name}
        parts = {field: value for field, value in parts.items() if value}
        parts |= {k: v for k, v in overrides.items() if not configs.may_change_on_resume(k)}
        name = config_files.join_name("-".join(arms), parts)
    config.branch.name = name
    if config.repulsion.strength:
        raise UserError(
            f"repulsion.strength is {config.repulsion.strength:g}; a branch trains all rounds at once, without "
            f"earlier optima, so --config.repulsion.strength=0 should be given"
        )
    if config.retraining.policy == "evidence":
        raise UserError(
            "retraining.policy is 'evidence'; a branch trains all rounds with one number of epochs, so "
            "--config.retraining.policy=full or short should be given"
        )
    return config


def run(
    workdir: str | os.PathLike,
    arms: Sequence[str],
    rounds: Sequence[int] = (),
    name: str | None = None,
    mask_from: str | None = None,
    overrides: dict[str, Any] | None = None,
    *,
    stop: GracefulStop | None = None,
    dataset: data.Dataset | None = None,
    on_epoch: Callbacks = (),
    on_round: Callbacks = (),
) -> Path:
    """Train arms on the masks of the run in `workdir`, record them in a branch, and return its workdir.

    Args:
      arms: names of registered arms.
      rounds: the rounds on whose masks they train; () is all rounds on disk. With a rewind step above 0, or if
        the optimizer continues from a dense training, round 0 is left out: its mask is dense.
      name: of the folder in `branches`, see `make_config`.
      mask_from: workdir of another run, whose masks are used with the tickets of this one.
      overrides: see `make_config`.
      stop: the handler of signals that stop the branch; None handles no signals.
      dataset: see `setup`.
      on_epoch, on_round: functions of an `EpochEnd` and of a `RoundEnd`, as in `runs.run`.

    Raises:
      UserError: the run, the arms or the rounds are wrong, which is found before any training.
      Stopped: a signal arrived; the state of the trainings has been saved.
    """
    workdir, stop = user_path(workdir, "--workdir"), stop or GracefulStop()
    if jax.process_count() > 1:
        raise UserError("a branch trains in one process; several branches, one per process, may train at once")
    config = make_config(stored_config(workdir), arms, rounds, name, mask_from, overrides)
    configs.validate(config)
    branch_workdir = workdir / "branches" / config.branch.name
    with contextlib.ExitStack() as stack:
        trunk = stack.enter_context(open_source(workdir))
        masks_of = trunk
        if config.branch.mask_from:
            masks_of = stack.enter_context(open_source(Path(config.branch.mask_from)))
        experiment = setup(config, dataset, use_mesh=False)
        experiment = restore_execution(experiment, branch_workdir if branch_workdir.exists() else workdir)
        chosen = choose_rounds(experiment, config.branch.rounds, trunk, masks_of)
        config_file = stored_config_file(workdir, existing=True)  # analyses of the branch need it too
        recorder = stack.enter_context(Recorder(experiment, config, branch_workdir, config_file))
        done = {*recorder.finished, *_find_diverged_rounds(branch_workdir, masks_of.rows, len(config.arms))}
        missing = [number for number in chosen if number not in done]
        if not missing:
            print(f"{branch_workdir} is finished: all {len(chosen)} rounds are trained, nothing to do")
            return branch_workdir
        unfinished = _read_chunk(branch_workdir)
        if not set(unfinished) <= set(missing):  # some of these rounds are recorded, so all are trained
            recorder.checkpoints.discard_progress()
            unfinished = []
        chunks = _divide(experiment, missing, unfinished)
        print(_describe(experiment, branch_workdir, chunks))
        store_execution(experiment, branch_workdir)
        for numbers in chunks:
            first = numbers[0]  # the number of the chunk, also when the branch is resumed
            state = start(experiment, numbers, trunk, masks_of)
            placed = _place(experiment, state)
            state = state._replace(
                tickets=devices.shard_members(state.tickets, placed.spec.mesh),
                masks=devices.shard_members(state.masks, placed.spec.mesh),
            )
            write_atomically(branch_workdir / _CHUNK_FILE, json.dumps({"rounds": numbers}) + "\n")
            like = imp.begin_training(placed, state)
            progress = recorder.saved_progress(first, like, placed.spec.mesh)
            if numbers is chunks[0]:
                steps = experiment.learning_rates_in(first, state.plan.short).size
                first_step = progress.step if progress else 0
                recorder.begin(first, 0, BranchDisplay([group[0] for group in chunks], steps, first_step))

            def stop_on_signal(end: EpochEnd) -> None:
                if stop.signal_on_any_process(distributed.global_max):
                    recorder.save_progress(end.round, end.progress, wait=True)
                    raise stop.stopped(f"at step {end.progress.step} of {end.steps}")

            callbacks = (recorder.on_epoch, stop_on_signal, recorder.save_progress_if_due, *on_epoch)
            with stop.defer_signals():
                ends, diverged = train(placed, first, state, progress, on_epoch=callbacks)
                recorder.record_diverged(first, diverged)
                for end in ends:
                    for callback in (recorder.on_round, *on_round):
                        callback(end)
                recorder.wait()
            recorder.checkpoints.discard_progress()
    print(f"results: {branch_workdir / 'results.csv'}")
    return branch_workdir


def train(
    experiment: Experiment,
    number: int,
    state: RoundState,
    progress: imp.MidRoundState | None = None,
    *,
    on_epoch: Callbacks = (),
) -> tuple[list[RoundEnd], dict[BranchMember, tuple[int, str]]]:
    """Train the members of some rounds together.

    Args:
      number: of the group, its first round; it is `EpochEnd.round`.
      state: the state of `start`, on the mesh.
      progress, on_epoch: see `imp.train`.

    Returns: the `RoundEnd` of each round in which a member has not diverged, and the members that have.
    """
    rounds = list(dict.fromkeys(member.round for member in state.members))
    progress = imp.train(experiment, number, state, progress, on_epoch=on_epoch)
    networks = imp.copy_networks(state, progress)
    thresholds = np.concatenate([_thresholds(experiment, n, state.members, networks) for n in rounds])
    shared = progress._replace(seconds=progress.seconds / len(rounds))
    rows = imp.measure(experiment, number, state, shared, networks, thresholds)
    diverged = imp.find_diverged(experiment, number, state.members, progress, rows)
    ends = []
    for number in rounds:
        kept = [m for m in state.members if m.round == number and m not in diverged]
        if not kept:
            continue
        ends.append(
            RoundEnd(
                number,
                tuple(Member(m.arm, m.replicate) for m in kept),
                take_members(networks, state.members, kept),
                [row for row, m in zip(rows, state.members, strict=True) if m in kept],
                None,
                (),
                None,
                {Member(m.arm, m.replicate): what for m, what in diverged.items() if m.round == number},
                epoch_rows=[
                    row
                    for row in progress.epoch_rows
                    if BranchMember(row["arm"], row["replicate"], row["round"]) in kept
                ],
            )
        )
    return ends, diverged


def _find_diverged_rounds(workdir, rows, arms):
    """Return the rounds in which all members have diverged; `rows` are those of the run that has the masks."""
    try:
        diverged = pd.read_csv(workdir / "divergences.csv").groupby("round").size()
    except FileNotFoundError:
        return []
    replicates = pd.DataFrame(rows).query("arm == 'imp'").groupby("round").size()
    return [number for number, count in diverged.items() if count >= arms * replicates[number]]


def _thresholds(experiment, number, members, networks):
    """Compute the pruning thresholds of the members of one round."""
    group = [member for member in members if member.round == number]
    one_device = put_on_mesh(experiment, None)
    networks = take_members(networks, members, group)
    _, thresholds = prune(
        one_device, number, group, networks.trained, networks.mask, networks.initial["params"]
    )
    return thresholds


def _divide(experiment, rounds, unfinished):
    """Divide rounds into chunks that train together; the first is the one whose state was saved, if any."""
    chunks = [unfinished] if unfinished else []
    rounds = [number for number in rounds if number not in unfinished]
    members = len(experiment.arms) * experiment.replicates
    size = max(1, members_that_fit(experiment) // members)
    size = -(-len(rounds) // -(-len(rounds) // size)) if rounds else size  # chunks of about one size
    return chunks + [rounds[i : i + size] for i in range(0, len(rounds), size)]


def members_that_fit(experiment: Experiment) -> int:
    """Return how many members train at once: those that fit in memory, or a dozen where more are no faster."""
    spec = put_on_mesh(experiment, None).spec
    image_shape = experiment.dataset.train.image_shape
    variables = models.shapes(spec.model, image_shape)
    mask = jax.eval_shape(masking.ones_like, variables["params"])
    many = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((1, *leaf.shape), leaf.dtype), (variables, mask))
    state = jax.eval_shape(lambda v, m: training.init_states(v, m, spec=spec), *many)
    state = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), state)
    images = jax.ShapeDtypeStruct((spec.batch_size, *image_shape), np.uint8)
    labels = jax.ShapeDtypeStruct((spec.batch_size,), np.int32)
    key = jax.eval_shape(lambda: jax.random.key(0)) if spec.rng_streams else None
    step = jax.jit(lambda *inputs: training.train_step(*inputs[:5], None, inputs[5], spec=spec))
    rate = jax.ShapeDtypeStruct((), np.float32)
    used = step.lower(state, mask, images, labels, rate, key).compile().memory_analysis()
    # besides the step: copies of the state for checkpoints, and the networks before and after
    member = used.temp_size_in_bytes + _COPIES_OF_STATE * used.argument_size_in_bytes
    fits = max(1, int(_SHARE_OF_MEMORY * available_bytes() // member))
    limited = jax.default_backend() == "cpu" or spec.execution.repeats_convolutions
    return min(fits, _MAX_MEMBERS) if limited else fits


def _read_chunk(workdir):
    try:
        return json.loads((workdir / _CHUNK_FILE).read_text())["rounds"]
    except (OSError, ValueError, KeyError):
        return []


def _place(experiment, state):
    """Return the experiment on a mesh for the members of a chunk."""
    # a single member on a device is computed in another order
    at_most = max(1, min(jax.device_count(), len(state.members) // 2))
    mesh = devices.make_mesh(len(state.members), experiment.spec.batch_size, member=at_most)
    return put_on_mesh(experiment, mesh)


def _describe(experiment, workdir, chunks):
    members = len(experiment.arms) * experiment.replicates
    rounds = sum(map(len, chunks))
    sizes = sorted({len(numbers) * members for numbers in chunks})
    sizes = " or ".join(map(str, sizes))
    return "\n".join(
        filter(
            None,
            [
                f"branch: {workdir}",
                f"{experiment.name}: arms {', '.join(experiment.arms)} on the masks of {rounds} rounds; "
                f"{len(chunks)} group{'s' * (len(chunks) > 1)} of {sizes} members",
                describe_execution(experiment.spec.execution),
            ],
        )
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command `python -m imp_jax.branch`."""
    cli.replace_unprintable()
    parser = argparse.ArgumentParser(
        prog="python -m imp_jax.branch",
        description=f"{__doc__.splitlines()[0]} --config.FIELD=VALUE overrides what the trainings use, such "
        f"as the data set, the epochs or the optimizer.",
        epilog=f"arms: {', '.join(arm_registry.ARMS)}",
    )
    parser.add_argument(
        "--workdir", required=True, help="the workdir of a run of imp_jax.main, finished or not"
    )
    parser.add_argument("--arms", required=True, help="names, separated by commas, such as shuffled,signs")
    parser.add_argument("--rounds", default="", help="rounds, such as 1,5,10; by default all")
    parser.add_argument("--name", help="of the branch; by default its arms and what else is given")
    parser.add_argument("--mask_from", help="the workdir of another run, whose masks are used instead")
    arguments, others = parser.parse_known_args(argv)
    logging.set_verbosity(logging.FATAL)
    try:
        workdir = user_path(arguments.workdir, "--workdir")
        if config_file := stored_config_file(workdir, existing=True):
            config_files.execute(config_file)  # it may register models, data sets and arms
        config = stored_config(workdir)
        overrides = cli.parse_overrides(others, config)
        arms, rounds = arguments.arms.split(","), _parse_rounds(arguments.rounds)
        with GracefulStop() as stop, ignore_print_errors():
            devices.use_one_device_per_cpu_core()
            devices.require_usable()
            compilation.enable_compilation_cache()
            branch = run(workdir, arms, rounds, arguments.name, arguments.mask_from, overrides, stop=stop)
            analysis.run(branch)
            try:
                analysis.run(workdir)  # draws the figure of all branches
            except UserError as error:  # for example, the run is still training
                print(f"the report of {workdir} is not updated: {error}", file=sys.stderr)
    except UserError as error:
        sys.exit(f"error: {error}")
    except Stopped as stopped:
        print(stopped, file=sys.stderr, flush=True)
        sys.exit(128 + stopped.number)


def _parse_rounds(text):
    try:
        return tuple(int(part) for part in text.split(",") if part)
    except ValueError as error:
        raise UserError(
            f"--rounds is {text!r}; it should be rounds separated by commas, such as 1,5,10"
        ) from error


if __name__ == "__main__":
    main()
