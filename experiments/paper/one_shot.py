"""Table of appendix C: a lower learning rate narrows the gap of a one-shot ticket on ImageNet."""

from experiments.paper.panels import NOT_RUN, Finished, PaperFigure
from experiments.paper.scales import Scale
from experiments.sweeps.runs import Run


def list_learning_rate_runs(scale: Scale) -> list[Run]:
    """List the one-shot runs: at the learning rate of table 1, and at a lower one."""
    return [scale.one_shot, scale.one_shot.with_overrides(optimizer__learning_rate=scale.low_rate)]


def format_accuracies(scale: Scale, finished: Finished) -> str:
    """Return a Markdown table of the dense accuracy and of the points lost by pruning."""
    lines = ["| Learning rate | Dense accuracy | Accuracy at 30 % density |", "|---|---|---|"]
    for run in list_learning_rate_runs(scale):
        cells = [NOT_RUN, NOT_RUN]
        if run in finished:
            results = finished[run].results.query("arm == 'imp'")
            accuracy = 100 * results.set_index(["round", "replicate"])["test_accuracy"]
            dense, pruned = (accuracy[n] if n in results["round"].values else accuracy[:0] for n in (0, 1))
            if len(dense):
                cells[0] = _format_mean_and_range(dense, "{:.1f}") + " %"
            if len(pruned):
                cells[1] = _format_mean_and_range(pruned - dense, "{:+.1f}") + " points"
        lines.append(f"| {run.config.optimizer.learning_rate:g} | {cells[0]} | {cells[1]} |")
    return "\n".join(lines)


def _format_mean_and_range(values, pattern):
    mean, low, high = (pattern.format(v) for v in (values.mean(), values.min(), values.max()))
    return mean if len(values) == 1 else f"{mean} ({low} to {high})"


FIGURES = (
    PaperFigure("tablec", "one-shot accuracy, learning rate", list_learning_rate_runs, format_accuracies),
)
