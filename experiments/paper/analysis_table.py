"""Generate imp_jax/analysis/README.md: `python -m experiments.paper.analysis_table [--write]`.

Its tables list the registered analyses and figures. Without --write the text is only printed.
"""

import argparse

from experiments.sweeps.runs import REPOSITORY
from imp_jax import analysis
from imp_jax.workdir.files import write_atomically

README = REPOSITORY / "imp_jax" / "analysis" / "README.md"
COMMAND = "python -m experiments.paper.analysis_table --write"
TEXT = """\
# Analyses

When all rounds of a run are finished, each registered analysis computes its table, and each registered figure
is drawn and added to the report. This command does the same, also for an interrupted run:

```sh
python -m imp_jax.analysis --workdir=runs/mnist5k
```

Existing rows are not recomputed. `--data_dir` gives the data folder if it was moved. The config file of the run
is executed again if it is still at its path, because it may register models, data sets and analyses; `--config`
gives another path. In a notebook, `imp_jax.analysis.load("runs/mnist5k")` returns an object with each table as
an attribute.

{analyses}

The last column is set by the argument `needs` of `analysis.register`. Analyses on request take long: a run
computes only those that `analysis.also` names, and this command those of `--also=sharpness,noise`. With
`keep_checkpoints=ends`, distances are computed only between adjacent rounds, to round 0 and to the
initialisation, and the agreement of rounds only between adjacent rounds and with round 0.

{figures}

| file | contents |
|---|---|
| `registry.py` | `register`, `register_figure`, and the inputs of analyses: `NetworkInputs`, `RunInputs` |
| `paper.py` | the analyses and figures of the paper, registered in the same way as a user's own |
| `distances.py`, `paths.py`, `weights.py` | the functions of these analyses |
| `agreement.py`, `overlap.py`, `sublevel.py`, `permuted_paths.py`, `learning.py` | one analysis each |
| `sharpness.py`, `noise.py`, `instability.py` | the analyses on request, each in one file |
| `on_request.py` | what these share: images of the training set, and repeated trainings |
| `computation.py` | finds missing rows, reads the networks and calls the analyses |
| `tables.py` | reads and writes the csv files |
| `report.py` | `report.html` |

This file is written by `{command}`.
"""
CALLED = {
    "round": "for each network of each round",
    "imp": "for each network of `imp`",
    "successive": "for `imp` in two successive rounds",
    "twin": "for `imp` and its twin",
    "pair": "for `imp` in two successive rounds, and for `imp` and its twin",
    "run": "once, with all tables and networks",
}


def format_readme() -> str:
    """Return the text of imp_jax/analysis/README.md."""
    return TEXT.format(analyses=_format_analyses(), figures=_format_figures(), command=COMMAND)


def _format_analyses() -> str:
    rows = [("table", "contents", "columns", "called"), ("---",) * 4]
    for registered in analysis.ANALYSES.values():
        columns = ", ".join(f"`{column}`" for column in registered.columns)
        rows.append(
            (f"`{registered.name}.csv`", registered.description, columns, _describe_calls(registered)),
        )
    return _format_table(rows)


def _describe_calls(registered) -> str:
    return CALLED[registered.needs] + ", on request" * bool(registered.cost)


def _format_figures() -> str:
    rows = [("figure", "contents"), ("---",) * 2]
    rows += [(f"`{drawn.name}.png`", drawn.caption) for drawn in analysis.FIGURES.values()]
    return _format_table(rows)


def _format_table(rows) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def main() -> None:
    parser = argparse.ArgumentParser("python -m experiments.paper.analysis_table", description=__doc__)
    parser.add_argument("--write", action="store_true", help=f"write {README.relative_to(REPOSITORY)}")
    if parser.parse_args().write:
        write_atomically(README, format_readme())
    else:
        print(format_readme())


if __name__ == "__main__":
    main()
