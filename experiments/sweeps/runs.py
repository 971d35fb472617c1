"""What a sweep trains: runs, which are config files with fields that differ, and branches of runs."""

import dataclasses
import functools
import hashlib
import importlib
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from experiments.sweeps.datasets import STREAMED_DATASETS
from imp_jax import branch, config_files, packing
from imp_jax import config as configs

REPOSITORY = Path(__file__).parents[2]


@dataclasses.dataclass(frozen=True)
class Run:
    """One call of `imp_jax.main`. Create it with `make_run`, so that runs of the same config compare equal."""

    base: str  # a file of configs/, without its ending
    overrides: tuple[tuple[str, Any], ...] = ()  # only fields that differ from the base, in alphabetical order
    needs = ()  # the runs that must be finished first

    def with_overrides(self, named: dict[str, Any] | None = None, **fields: Any) -> "Run":
        """Return this run with other `fields`, written with __ for the dot: `optimizer__name`.

        Args:
          named: other fields by their names, such as those of `imp_jax.methods`.
        """
        changed = {name.replace("__", "."): value for name, value in fields.items()}
        return make_run(self.base, dict(self.overrides) | (named or {}) | changed)

    @functools.cached_property
    def config(self) -> ConfigDict:
        """The base config with the overrides applied. It is cached: do not change it."""
        config = load_config(self.base)
        config.update_from_flattened_dict(dict(self.overrides))
        return config

    @property
    def name(self) -> str:
        """The name of the run's folder, such as `resnet20,batch_size=1024`; different for each config."""
        return config_files.run_name(self.base, load_config(self.base), self.config)

    @property
    def folder(self) -> str:
        """The path of the run's workdir in the folder of the sweep."""
        return self.name

    @property
    def runs(self) -> tuple["Run", ...]:
        """This run alone; a `RunPack` has several."""
        return (self,)

    @property
    def rounds(self) -> int:
        """The number of rounds that it trains."""
        return self.config.rounds

    def command(self, workdir: Path, data_dir: str | None = None) -> list[str]:
        """Return the command that trains the run, to be started in the root of the repository.

        It sets `on_divergence=drop`, so that one diverged network does not end the run.
        """
        fields = dict(self.overrides) | {"on_divergence": "drop"}
        if data_dir:
            fields["dataset.data_dir"] = data_dir
        return [
            *(sys.executable, "-m", "imp_jax.main", f"--config=configs/{self.base}.py", f"--workdir={workdir}"),
            *(f"--config.{field}={value}" for field, value in fields.items()),
        ]

    @property
    def trainings(self) -> int:
        """The number of networks that the run trains, including twins."""
        config = self.config
        twins = sum(number < config.rounds for number in set(config.instability.rounds))
        return config.replicates * (len(config.arms) * config.rounds + twins)


@dataclasses.dataclass(frozen=True)
class Branch:
    """One call of `imp_jax.branch`: arms that train on the masks of a run of the same sweep.

    Attributes:
      trunk: the run.
      label: the name of the branch in the folder of the run.
      arms, numbers: the arms, and the rounds on whose masks they train.
      mask_from: another run of the sweep, whose masks are used instead.
      overrides: fields that differ from the run, in alphabetical order.
    """

    trunk: Run
    label: str
    arms: tuple[str, ...]
    numbers: tuple[int, ...]
    mask_from: Run | None = None
    overrides: tuple[tuple[str, Any], ...] = ()

    @property
    def needs(self) -> tuple[Run, ...]:
        """The runs that must be finished first."""
        return (self.trunk, self.mask_from) if self.mask_from else (self.trunk,)

    @functools.cached_property
    def config(self) -> ConfigDict:
        """The config that the branch stores, but for the folder of the sweep in `branch.mask_from`."""
        mask_from = self.mask_from and self.mask_from.folder
        config = branch.make_config(
            self.trunk.config, self.arms, self.numbers, self.label, mask_from, dict(self.overrides)
        )
        configs.validate(config)
        return config

    @property
    def name(self) -> str:
        """The name in messages and of its log, such as `mnist5k+controls`."""
        return f"{self.trunk.name}+{self.label}"

    @property
    def folder(self) -> str:
        """The path of the branch's workdir in the folder of the sweep."""
        return f"{self.trunk.folder}/branches/{self.label}"

    @property
    def runs(self) -> tuple["Branch", ...]:
        """This branch alone; a `RunPack` has several runs."""
        return (self,)

    @property
    def rounds(self) -> int:
        """The number of rounds on whose masks it trains."""
        return len(self.numbers)

    @property
    def trainings(self) -> int:
        """The number of networks that the branch trains."""
        return self.config.replicates * len(self.arms) * self.rounds

    def command(self, workdir: Path, data_dir: str | None = None) -> list[str]:
        """Return the command that trains the branch, whose workdir is `workdir`."""
        root = workdir.parents[2]
        fields = dict(self.overrides) | ({"dataset.data_dir": data_dir} if data_dir else {})
        return [
            *(sys.executable, "-m", "imp_jax.branch", f"--workdir={root / self.trunk.folder}"),
            f"--arms={','.join(self.arms)}",
            f"--rounds={','.join(map(str, self.numbers))}",
            f"--name={self.label}",
            *([f"--mask_from={root / self.mask_from.folder}"] if self.mask_from else []),
            *(f"--config.{field}={value}" for field, value in fields.items()),
        ]


AnyRun = Run | Branch


@dataclasses.dataclass(frozen=True)
class RunPack:
    """Runs that one process trains in one program (`imp_jax.packing`)."""

    runs: tuple[Run, ...]
    needs = ()  # the runs that must be finished first
    folder = ""  # the process gets the folder of the sweep

    @property
    def name(self) -> str:
        """The name in messages and of its log, such as `pack-1a2b3c4d`."""
        names = "\n".join(run.name for run in self.runs)
        return f"pack-{hashlib.sha256(names.encode()).hexdigest()[:8]}"

    def command(self, root: Path, data_dir: str | None = None) -> list[str]:
        """Return the command that trains the runs in the folder `root`."""
        runs = [json.dumps({"base": run.base, "overrides": dict(run.overrides)}) for run in self.runs]
        data_dir_flag = [f"--data_dir={data_dir}"] if data_dir else []
        return [sys.executable, "-m", "experiments.sweeps.pack", f"--root={root}", *data_dir_flag, *runs]


def pack_runs(runs: Iterable[AnyRun], size: int) -> list[AnyRun | RunPack]:
    """Pack runs that can train in one program, at most `size` at a time, in the order of the first of each."""
    kinds: dict[Any, list[AnyRun]] = {}
    for run in runs:
        can_be_packed = (
            isinstance(run, Run)
            and run.config.execution != "tune"
            and run.config.dataset.name not in STREAMED_DATASETS
        )
        kind = str(packing.describe_kind(run.config)) if can_be_packed else run
        kinds.setdefault(kind, []).append(run)
    parts = [kind[i : i + size] for kind in kinds.values() for i in range(0, len(kind), size)]
    return [part[0] if len(part) == 1 else RunPack(tuple(part)) for part in parts]


def make_run(base: str, overrides: dict[str, Any]) -> Run:
    """Return the run of `configs/BASE.py` with `overrides`.

    Raises:
      UserError: a field does not exist or has an invalid value.
    """
    config = load_config(base)
    unchanged = configs.flatten(config)
    config.update_from_flattened_dict(overrides)
    configs.validate(config)
    changed = configs.flatten(config)
    return Run(base, tuple((f, v) for f, v in sorted(changed.items()) if v != unchanged[f]))


def load_config(name: str) -> ConfigDict:
    """Return a new config of `configs/NAME.py`."""
    return importlib.import_module(f"configs.{name}").get_config()
