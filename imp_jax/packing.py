"""Train several runs as more members of one program.

The runs may differ in their seeds, learning rates, warm-ups, weight decays and strengths of repulsion, which
are arguments of the compiled steps. Each run is executed by `runs.run` in a thread of its own, as it would be
alone. Where it would train an epoch, it calls `Pack.train`, which waits until all other runs have called it,
and trains the members of all runs together.
"""

import contextlib
import dataclasses
import functools
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from imp_jax import data, masking, repulsion, runs, training
from imp_jax.config import flatten, validate
from imp_jax.errors import UserError
from imp_jax.experiment import setup
from imp_jax.runtime import compilation, devices
from imp_jax.runtime.signals import GracefulStop, Stopped

# Fields in which runs that train together may differ.
FIELDS = (
    *("seed", "optimizer.learning_rate", "optimizer.warmup_epochs"),
    *("optimizer.weight_decay", "repulsion.strength"),
)


@dataclasses.dataclass
class _Call:
    """A call of `train_and_evaluate` that waits for those of the other runs."""

    run: int
    arguments: tuple[Any, ...]
    splits: Sequence[Any]
    spec: training.TrainSpec
    thread: int = dataclasses.field(default_factory=threading.get_ident)
    result: tuple | None = None
    error: BaseException | None = None
    compile_s: float = 0.0  # in another thread

    @property
    def is_done(self):
        return self.result is not None or self.error is not None

    @functools.cached_property
    def kind(self):
        """What calls must have in common to be trained in one program."""
        states, masks, batches, first_step, learning_rates, optima, keys = self.arguments
        leaves, structure = jax.tree.flatten((states, masks, keys))
        shapes = (*((leaf.shape[1:], str(leaf.dtype)) for leaf in leaves), optima is None)
        # the optimizers differ only in their weight decays, which `Pack` receives
        spec = self.spec._replace(optimizer=None, repulsion_strength=0.0)
        return structure, shapes, type(batches), first_step, len(learning_rates), len(self.splits), spec


class Pack:
    """Runs that train together. Threads may call its methods concurrently."""

    def __init__(self, weight_decays: Sequence[float], stop: GracefulStop):
        """Make a pack with one run for each weight decay, that of its optimizer.

        The optimizers of all runs must be equal otherwise, and all must train on one data set in memory.

        Args:
          stop: the handler of signals of all runs.
        """
        self._weight_decays, self._stop = weight_decays, stop
        self.requested = 0  # `stop.requested` when the last steps ended, the same for all runs
        self._condition = threading.Condition()
        self._active = set(range(len(weight_decays)))
        self._calls: list[_Call] = []
        self._joined: tuple[Sequence[Any], Any] = (), None  # the optima of the runs, and of all members

    def train(self, run: int, *arguments: Any, splits: Sequence[Any] = (), spec: training.TrainSpec) -> tuple:
        """Train as `training.train_and_evaluate` does, together with the other runs.

        Runs at another step of an epoch, or whose arrays have other shapes, are trained by themselves.

        Args:
          run: the index of the run.
        """
        call = _Call(run, arguments, splits, spec)
        _ = call.kind  # here, where an error ends this run only
        with self._condition:
            self._calls.append(call)
            self._train_if_complete()
            self._condition.wait_for(lambda: call.is_done)
        compilation.add_compile_seconds(call.compile_s)
        if call.error is not None:
            raise call.error
        return call.result

    @contextlib.contextmanager
    def leave_at_exit(self, run: int) -> Iterator[None]:
        """Let the other runs train without this one after the context has ended."""
        try:
            yield
        finally:
            with self._condition:
                self._active.discard(run)
                self._train_if_complete()

    def _train_if_complete(self):
        """Train all waiting calls, in this thread, if there is one of each active run."""
        if not self._calls or {call.run for call in self._calls} != self._active:
            return
        waiting, self._calls = sorted(self._calls, key=lambda call: call.run), []
        compiled = compilation.compile_seconds()
        while left := [call for call in waiting if not call.is_done]:
            calls = [call for call in left if call is left[0] or call.kind == left[0].kind]
            try:
                for call, result in zip(calls, self._train_together(calls), strict=True):
                    call.result = result
            except BaseException as error:  # belongs to the threads that called, not to this one
                for call in calls:
                    call.error = error
        self.requested = self._stop.requested
        compile_s = compilation.compile_seconds() - compiled
        for call in waiting:
            if call.thread != threading.get_ident():
                call.compile_s = compile_s
        self._condition.notify_all()

    def _train_together(self, calls):
        """Return the results of calls of one kind, in their order."""
        first = calls[0]
        if len(calls) == 1:
            return [training.train_and_evaluate(*first.arguments, splits=first.splits, spec=first.spec)]
        mesh = first.spec.mesh
        states, masks, batches, first_steps, rates, optima, keys = zip(
            *(call.arguments for call in calls), strict=True
        )
        slots = [len(jax.tree.leaves(trees)[0]) for trees in masks]
        decays, strengths = (
            np.repeat(np.array(values, np.float32), slots)
            for values in (
                [self._weight_decays[call.run] for call in calls],
                [call.spec.repulsion_strength for call in calls],
            )
        )
        rates = np.repeat(np.stack(rates, 1), slots, axis=1)
        settings = devices.shard_members(training.MemberSettings(decays, strengths), mesh)
        all_states, all_masks, all_keys = (_concatenate(trees, mesh=mesh) for trees in (states, masks, keys))
        states, metrics, evaluations = training.train_and_evaluate(
            all_states,
            all_masks,
            batches[0].join(batches[1:]),
            first_steps[0],
            rates,
            self._join_optima(optima, masks[0], mesh),
            all_keys,
            settings,
            splits=first.splits,
            spec=first.spec,
        )
        ends = np.cumsum(slots)
        results = []
        for start, end in zip(ends - slots, ends, strict=True):
            own = _take_slots((states, evaluations), int(start), slots=int(end - start), mesh=mesh)
            own_metrics = jax.tree.map(lambda leaf: leaf[:, start:end], metrics)  # noqa: B023
            results.append((own[0], own_metrics, own[1]))
        return results

    def _join_optima(self, stores, masks, mesh):
        """Join the earlier optima of all runs, once per round; None if there are none."""
        if stores[0] is None:
            return None
        known, joined = self._joined
        if len(known) != len(stores) or any(a is not b for a, b in zip(known, stores, strict=True)):
            sizes = {name: leaf[0].size for name, leaf in masking.prunable_by_name(masks).items()}
            joined = devices.shard_members(repulsion.join_members(stores, sizes), mesh)
            self._joined = stores, joined
        return joined


class _StopOfRun:
    """The methods of `GracefulStop` that a run calls, for runs in several threads, which stop at one step."""

    def __init__(self, stop: GracefulStop, pack: Pack):
        self._stop, self._pack, self.stopped = stop, pack, stop.stopped

    def signal_on_any_process(self, global_max: Callable[[int], int]) -> int:
        del global_max  # there is one process
        return self._pack.requested

    @contextlib.contextmanager
    def defer_signals(self):
        yield
        if self._stop.requested:
            raise self.stopped("between two rounds")


def run_together(
    configs: Sequence[ConfigDict],
    workdirs: Sequence[str | os.PathLike],
    stop: GracefulStop | None = None,
    config_files: Sequence[str | None] | None = None,
    *,
    dataset: data.Dataset | None = None,
    analyses: Any = None,
) -> list[BaseException | None]:
    """Train runs in one program, each as `runs.run` trains it alone.

    Args:
      configs: they may differ only in `FIELDS`; weight decays and strengths of repulsion must be all 0, or all
        different from 0.
      workdirs, config_files: of the runs, see `runs.run`.
      stop, analyses: see `runs.run`.
      dataset: of all runs; None loads it once.

    Returns: the exception that ended each run; None if it is finished.

    Raises:
      UserError: the configs are wrong or differ in other fields, the data set is streamed, or several processes
        train together.
      KeyboardInterrupt: after all runs have saved their state, if `stop` does not handle signals.
    """
    if jax.process_count() > 1:
        raise UserError("several processes train together; runs in one program should have one process")
    check_fields(configs)
    if analyses:
        for config in configs:
            analyses.check_requests(config.analysis.also)
    first = configs[0]
    if dataset is None:
        options = {"augmentation": first.dataset.augmentation, "image_side": first.dataset.image_side}
        dataset = data.load(
            first.dataset.name, first.dataset.data_dir, workers=first.dataset.workers, **options
        )
    if not dataset.train.in_memory:
        raise UserError(
            f"dataset.name is {first.dataset.name!r}, which is streamed; runs that train together should have "
            f"a data set in memory"
        )
    setup(first, dataset)  # stores the statistics of the images and tests the kernels, once
    stop = stop or GracefulStop()
    pack = Pack([config.optimizer.weight_decay for config in configs], stop)
    errors: list[BaseException | None] = [None] * len(configs)

    def train(run, workdir, config_file):
        with pack.leave_at_exit(run):
            try:
                runs.run(
                    configs[run],
                    workdir,
                    _StopOfRun(stop, pack),
                    config_file,
                    dataset=dataset,
                    analyses=analyses,
                    train_fn=functools.partial(pack.train, run),
                )
            except BaseException as error:  # the other runs go on
                errors[run] = error

    each = zip(range(len(configs)), workdirs, config_files or [None] * len(configs), strict=True)
    threads = [threading.Thread(target=train, args=arguments) for arguments in each]
    with contextlib.suppress(Stopped), stop.defer_signals():
        for thread in threads:
            thread.start()
        try:
            _join(threads)
        except KeyboardInterrupt:
            stop.requested = signal.SIGINT
            _join(threads)
            raise
    return errors


def _join(threads):
    for thread in threads:
        thread.join()


def check_fields(configs: Sequence[ConfigDict]) -> None:
    """Raise a `UserError` unless the configs are valid and differ only in `FIELDS`."""
    if not configs:
        raise UserError("there are no configs; there should be one for each run")
    for config in configs:
        validate(config)
    first, *others = map(describe_kind, configs)
    for i, other in enumerate(others, start=1):
        for name, value in other.items():
            if value == first[name]:
                continue
            if name in FIELDS:
                one, another = (flatten(configs[j])[name] for j in (0, i))
                raise UserError(
                    f"{name} is {one:g} in one run and {another:g} in another; in runs that train together it "
                    f"should be 0 in all or in none"
                )
            raise UserError(
                f"{name} is {first[name]!r} in one run and {value!r} in another; runs that train together "
                f"should differ only in {', '.join(FIELDS)}"
            )
    if first["execution"] == "tune":
        raise UserError("execution is 'tune'; runs that train together should have auto or the name of a mode")


def describe_kind(config: ConfigDict) -> dict[str, Any]:
    """Return what must be equal in runs that train together: other fields, and whether some are 0."""
    values = flatten(config)
    is_zero = {name: values[name] == 0 for name in ("optimizer.weight_decay", "repulsion.strength")}
    return {name: value for name, value in values.items() if name not in FIELDS} | is_zero


@functools.partial(jax.jit, static_argnames="mesh")
def _concatenate(trees, *, mesh):
    joined = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *trees)
    return devices.constrain_members(joined, mesh)


@functools.partial(jax.jit, static_argnames=("slots", "mesh"))
def _take_slots(tree, start, *, slots, mesh):
    taken = jax.tree.map(lambda leaf: jax.lax.dynamic_slice_in_dim(leaf, start, slots), tree)
    return devices.constrain_members(taken, mesh)
