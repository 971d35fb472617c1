"""A run of a sweep: a file of configs/ and the fields that differ from it, its name and its command."""

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
    """One call of `imp_jax.main`; made by `make_run`, so that two of the same config are equal."""

    base: str  # a file of configs/, without its ending
    overrides: tuple[tuple[str, Any], ...] = ()  # only fields that differ from the base, in alphabetical order

    def with_overrides(self, **fields: Any) -> "Run":
        """The run that differs from this one in `fields`, written with __ for the dot: `optimizer__name`."""
        changed = {name.replace("__", "."): value for name, value in fields.items()}
        return make_run(self.base, dict(self.overrides) | changed)

    @functools.cached_property
    def config(self) -> ConfigDict:
        """The base with the overrides; to be read only."""
        config = _base(self.base)
        config.update_from_flattened_dict(dict(self.overrides))
        return config

    @property
    def name(self) -> str:
        """Such as `resnet20,batch_size=1024`: a folder's name that tells one config from all others."""
        return config_files.run_name(self.base, _base(self.base), self.config)

    def command(self, workdir: Path, data_dir: str | None = None) -> list[str]:
        """The command that trains it, in the root of the repository; a network that diverges stays behind."""
        fields = dict(self.overrides) | {"on_divergence": "drop"}
        if data_dir:
            fields["dataset.data_dir"] = data_dir
        return [
            *(sys.executable, "-m", "imp_jax.main", f"--config=configs/{self.base}.py", f"--workdir={workdir}"),
            *(f"--config.{field}={value}" for field, value in fields.items()),
        ]

    @property
    def trainings(self) -> int:
        """How many networks it trains, twins included."""
        config = self.config
        twins = sum(number < config.rounds for number in set(config.instability.rounds))
        return config.replicates * (len(config.arms) * config.rounds + twins)


def make_run(base: str, overrides: dict[str, Any]) -> Run:
    """The run of `overrides` over `configs/BASE.py`.

    Raises:
      UserError: a field that does not exist, or may not hold this.
    """
    config = _base(base)
    unchanged = configs.flatten(config)
    config.update_from_flattened_dict(overrides)
    configs.validate(config)
    changed = configs.flatten(config)
    return Run(base, tuple((f, v) for f, v in sorted(changed.items()) if v != unchanged[f]))


def _base(name):
    return importlib.import_module(f"configs.{name}").get_config()
