"""A lower learning rate narrows the gap of a one-shot ticket on ImageNet (table of appendix C)."""

from experiments.paper.panels import NOT_RUN, Finished, PaperFigure
from experiments.paper.scales import Scale
from experiments.sweeps.runs import Run


def both_rates(scale: Scale) -> list[Run]:
    return [scale.one_shot, scale.one_shot.with_overrides(optimizer__learning_rate=scale.low_rate)]


def dense_and_pruned(scale: Scale, finished: Finished) -> str:
    lines = ["| Learning rate | Dense accuracy | Accuracy at 30 % density |", "|---|---|---|"]
    for run in both_rates(scale):
        cells = [NOT_RUN, NOT_RUN]
        if run in finished:
            results = finished[run].results.query("arm == 'imp'")
            accuracy = 100 * results.set_index(["round", "replicate"])["test_accuracy"]
            dense, pruned = (accuracy[n] if n in results["round"].values else accuracy[:0] for n in (0, 1))
            if len(dense):
                cells[0] = _mean_low_high(dense, "{:.1f}") + " %"
            if len(pruned):
                cells[1] = _mean_low_high(pruned - dense, "{:+.1f}") + " points"
        lines.append(f"| {run.config.optimizer.learning_rate:g} | {cells[0]} | {cells[1]} |")
    return "\n".join(lines)


def _mean_low_high(values, form):
    mean, low, high = (form.format(v) for v in (values.mean(), values.min(), values.max()))
    return mean if len(values) == 1 else f"{mean} ({low} to {high})"


FIGURES = (PaperFigure("tablec", "one-shot accuracy, learning rate", both_rates, dense_and_pruned),)
