"""A run of a sweep: a config file and the fields that differ from it, with its name and its command."""

import dataclasses
import functools
import importlib
import sys
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from imp_jax import config as configs
from imp_jax import config_files

REPOSITORY = Path(__file__).parents[2]


@dataclasses.dataclass(frozen=True)
class Run:
    """One call of `imp_jax.main`. Create it with `make_run`, so that runs of the same config compare equal."""

    base: str  # a file of configs/, without its ending
    overrides: tuple[tuple[str, Any], ...] = ()  # only fields that differ from the base, in alphabetical order

    def with_overrides(self, **fields: Any) -> "Run":
        """Return this run with other `fields`, written with __ for the dot: `optimizer__name`."""
        changed = {name.replace("__", "."): value for name, value in fields.items()}
        return make_run(self.base, dict(self.overrides) | changed)

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
