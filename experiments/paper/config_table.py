"""Generate configs/README.md: `python -m experiments.paper.config_table [--write]`.

The table is made of the configs, the status in their docstrings, and `throughput.json`. Without --write it is
only printed.
"""

import argparse
import importlib
import re

from experiments.paper.networks import name_network
from experiments.sweeps import cost
from experiments.sweeps.datasets import DATASET_SIZES
from experiments.sweeps.runs import REPOSITORY, Run, make_run
from imp_jax.workdir.files import write_atomically

README = REPOSITORY / "configs" / "README.md"
COMMAND = "python -m experiments.paper.config_table --write"
TEXT = """\
# Configs

Each file is a short Python module whose `get_config()` returns `imp_jax.config.default()` with a few fields
changed. Its docstring has the command and the expected result. Train one, with any field overridden:

```sh
python -m imp_jax.main --config=configs/mnist5k.py --config.replicates=1
```

{table}

`conv4`, `lenet`, `resnet20` and `resnet50` are table 1 of the paper. *Trainings* counts all networks that a run
trains, including twins. *Images* counts the images that all trainings process. The cost of the run is estimated
from the images/s measured on each device (`experiments/benchmarks/throughput.json`); for the cost of a figure,
see `python -m experiments.run list`.

## Methods

A method follows a colon, and sets a few fields (`imp_jax/methods.py`); the run then lies in `runs/mnist5k-lrr`:

```sh
python -m imp_jax.main --config=configs/mnist5k.py:lrr
```

| method | what it does | source |
| --- | --- | --- |
| `imp` | train, prune by magnitude, reset to the initialisation; the default | section 2.1 |
| `rewind` | reset to an early step of the dense training, chosen by each config | Frankle et al. 2020 |
| `lrr` | learning-rate rewinding: keep the weights, restart optimizer and schedule | Renda et al. 2020 |
| `finetune` | keep the weights, train at the last learning rate of the schedule | Han et al. 2015 |
| `oneshot` | prune the network of round 0 to the density of each round, and reset | Frankle & Carbin 2019 |
| `snip`, `grasp` | prune the initialisation by a score on images | Lee et al. 2019, Wang et al. 2020 |
| `synflow` | prune the initialisation in 100 steps, without data | Tanaka et al. 2020 |
| `random`, `erk` | draw a mask over all layers, or with ERK layer densities | Evci et al. 2020 |

Round n has the same density with all methods. Those of the last three rows train no network before they find a
mask; their round 0 is the dense network, for comparison. The arm `reinit` is trained with their masks too.
`finetune` trains all arms of later rounds at the last rate, so `reinit` is no control there. With a constant
schedule it equals `lrr`; with the schedule cosine, whose last rate is near 0, later rounds hardly train.

`{command}` writes this file.
"""


def list_config_names() -> list[str]:
    """List the config files in alphabetical order, without their ending."""
    return sorted(path.stem for path in README.parent.glob("*.py") if path.stem != "__init__")


def read_status(name: str) -> str:
    """Return the status that the docstring of a config gives.

    Raises:
      ValueError: the docstring has no line "Status: …".
    """
    docstring = importlib.import_module(f"configs.{name}").__doc__ or ""
    status = re.search(r"^Status: (.+?)\.?$", docstring, re.MULTILINE)
    if not status:
        raise ValueError(f"the docstring of configs/{name}.py lacks a line such as 'Status: not run yet.'")
    return status[1]


def format_table() -> str:
    """Return the table of the configs as Markdown."""
    devices = cost.read_throughput()
    headings = ["config", "network", "data", "epochs", "batch", "trainings", "images"]
    headings += [*(f"cost on {device}" for device in devices), "status"]
    rows = [headings, ["---"] * len(headings)]
    for name in list_config_names():
        run = make_run(name, {})
        rows.append([*_format_run(run), *(_format_cost(run, device) for device in devices.values())])
        rows[-1].append(read_status(name))
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def format_readme() -> str:
    """Return the text of configs/README.md."""
    return TEXT.format(table=format_table(), command=COMMAND)


def _format_run(run: Run) -> list[str]:
    config = run.config
    known = config.dataset.name in DATASET_SIZES
    return [
        f"`{run.base}.py`",
        name_network(config),
        config.dataset.name,
        str(config.epochs),
        str(config.batch_size),
        str(run.trainings),
        f"{cost.count_images(run) / 1e6:,.1f} million" if known else "",
    ]


def _format_cost(run: Run, device: dict) -> str:
    known = run.config.dataset.name in DATASET_SIZES
    return cost.format_duration(cost.estimate_seconds(run, device) if known else None)


def main() -> None:
    parser = argparse.ArgumentParser("python -m experiments.paper.config_table", description=__doc__)
    parser.add_argument("--write", action="store_true", help=f"write {README.relative_to(REPOSITORY)}")
    if parser.parse_args().write:
        write_atomically(README, format_readme())
    else:
        print(format_table())


if __name__ == "__main__":
    main()
