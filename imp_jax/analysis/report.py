"""report.html: the config, results and figures of a run in one file."""

import base64
import html as markup
import json
from typing import Any

import pandas as pd

from imp_jax import config_files, methods
from imp_jax.analysis.registry import ANALYSES, FIGURES, is_builtin

STYLE = """
body { font: 15px/1.5 sans-serif; color: #222; max-width: 76em; margin: 2em auto; padding: 0 1em }
.table { overflow-x: auto; font-size: 13px }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
th, td { padding: .15em .7em; text-align: right; border-bottom: 1px solid #ddd }
th { vertical-align: bottom } td { white-space: nowrap }
figure { margin: 2em 0 } figure img { max-width: min(100%, 52em) } figcaption { color: #555; max-width: 52em }
figcaption b { color: #222; font-weight: normal }
pre { background: #f6f6f6; padding: 1em; overflow-x: auto }
"""


def html(run: Any, drawn: dict[str, bytes]) -> str:
    """Return the report of an `analysis.Run` as one self-contained page; `drawn` are its PNGs by name."""
    title = f"{run.config.model.name} on {run.config.dataset.name}: {run.workdir.resolve().name}"
    pictures = "\n".join(
        f'<figure><img alt="{name}" src="data:image/png;base64,{base64.b64encode(png).decode()}">'
        f"<figcaption>{_caption(run, FIGURES[name])}</figcaption></figure>"
        for name, png in drawn.items()
    )
    method = methods.name_of(run.config)
    method = f"<p>Method: {method}</p>\n" if method else ""
    replicates = f"{run.config.replicates} replicate{'s' * (run.config.replicates > 1)}"
    config = json.dumps(json.loads(config_files.to_json(run.config)), indent=2)
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>{markup.escape(title)}</title><style>{STYLE}</style></head>
<body>
<h1>{markup.escape(title)}</h1>
{method}<h2>Results, mean (minimum to maximum) of {replicates}</h2>
{_format_table(_results(run))}
<h2>Figures</h2>
{pictures}
{_listed_tables(run)}
<h2>Config</h2>
<pre>{markup.escape(config)}</pre>
</body></html>
"""


def _caption(run, figure) -> str:
    """Return the caption of a figure, followed by the sentence about this run."""
    sentence = figure.sentence(run) if figure.sentence else ""
    return markup.escape(figure.caption) + (f" <b>{markup.escape(sentence)}</b>" if sentence else "")


def _results(run) -> pd.DataFrame:
    """Return one row per round: test accuracies (mean and range) and other quantities of each arm."""
    rows = []
    for number, results in run.results.groupby("round"):
        row = {"round": number, "density": f"{results['density'].iloc[0]:.2%}"}
        for arm, arm_rows in results[results["arm"] != "twin"].groupby("arm", sort=False):
            accuracy = 100 * arm_rows["test_accuracy"]
            row[f"{arm}: test accuracy (%)"] = (
                f"{accuracy.mean():.2f} ({accuracy.min():.2f}–{accuracy.max():.2f})"
            )
            row[f"{arm}: threshold"] = f"{arm_rows['threshold'].mean():.4f}"
            weights = run.weights[(run.weights["round"] == number) & (run.weights["arm"] == arm)]
            if len(weights):  # none for a damaged or missing round
                row[f"{arm}: bimodality"] = f"{weights['bimodality'].mean():.3f}"
                row[f"{arm}: near zero"] = f"{weights['near_zero'].mean():.2%}"
        layers = run.layers[run.layers["round"] == number]
        if layers["units"].sum():  # 0 for a damaged round, or if the paths of the model are not known
            row["dead units"] = f"{layers['dead_units'].sum() / layers['units'].sum():.1%}"
        barriers = run.barriers[(run.barriers["round"] == number) & (run.barriers["split"] == "test")]
        for kind, name in (("successive", "barrier (points)"), ("instability", "instability (points)")):
            values = barriers[barriers["kind"] == kind]["barrier"]
            row[name] = f"{100 * values.mean():.2f}" if len(values) else None
        rows.append(row)
    return pd.DataFrame(rows)


def _listed_tables(run) -> str:
    """Format the tables of users' analyses, averaged per round and arm if they have these columns."""
    parts = []
    for name, table in run.tables.items():
        if is_builtin(name):  # shown in figures, or summarised with the results
            continue
        keys = [column for column in ("round", "arm") if column in table]
        values = table.select_dtypes("number").columns.difference([*keys, "replicate"], sort=False)
        if keys and len(table):
            table = table.groupby(keys)[list(values)].mean().reset_index()
        text = _format_table(table)
        description = ANALYSES[name].description if name in ANALYSES else ""
        parts.append(f"<h2>{markup.escape(name)}</h2>\n<p>{markup.escape(description)}</p>\n{text}")
    return "\n".join(parts)


def _format_table(table) -> str:
    text = table.to_html(index=False, border=0, na_rep="–", justify="right", float_format="{:.4g}".format)
    return f'<div class="table">{text}</div>'
