"""Generate imp_jax/analysis/README.md: `python -m experiments.paper.analysis_table [--write]`.

The tables are made of the registered analyses and figures. Without --write the page is only printed.
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
is drawn and put into the report. This command does the same, also for an interrupted run:

```sh
python -m imp_jax.analysis --workdir=runs/mnist5k
```

Rows that are known are not computed again. `--data_dir` names the data folder if it was moved. The config file
of the run is executed again if it is still at its path, because it may register models, data sets and analyses;
`--config` names another path. In a notebook, `imp_jax.analysis.load("runs/mnist5k")` has each table as an
attribute.

{analyses}

The argument `needs` of `analysis.register` determines how an analysis is called. With `keep_checkpoints=ends`,
distances are computed between adjacent rounds and to round 0 only.

{figures}

| file | contents |
|---|---|
| `registry.py` | `register`, `register_figure`, and what an analysis is given: `NetworkInputs`, `RunInputs` |
| `paper.py` | the analyses and figures above, registered as a user registers their own |
| `distances.py`, `paths.py`, `weights.py` | what these analyses compute |
| `computation.py` | finds the rows that are missing, reads the networks and calls the analyses |
| `tables.py` | reads and writes the csv files |
| `report.py` | `report.html` |

`{command}` writes this file.
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
            (f"`{registered.name}.csv`", registered.description, columns, CALLED[registered.needs]),
        )
    return _format_table(rows)


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
