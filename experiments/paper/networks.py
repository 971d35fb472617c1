"""Table 1: the networks and how they are trained, read from the configs."""

from collections.abc import Sequence

from ml_collections import ConfigDict

from experiments.paper.panels import Finished, PaperFigure
from experiments.paper.scales import Scale
from experiments.sweeps.networks import count_parameters
from experiments.sweeps.runs import Run

TABLE_1_CONFIGS = ("lenet", "conv4", "resnet20", "resnet50")
NETWORK_NAMES = {
    "lenet": "LeNet-300-100",
    "resnet8": "ResNet-8",
    "resnet20": "ResNet-20",
    "conv4": "Conv-4",
    "resnet50": "ResNet-50",
}
INITIALISATIONS = {"lenet": "Kaiming uniform"}  # the other networks: Kaiming normal
COLUMNS = ("Network", "Data", "Parameters", "Epochs", "Batch", "Optimizer", "Learning rate", "Schedule")
COLUMNS += ("Initialisation", "Weight decay", "Pruning")


def describe_runs(runs: Sequence[Run]) -> str:
    """Describe what runs train, such as "ResNet-20 on cifar10, 85 epochs, 3 replicates"."""
    configs = [run.config for run in runs]
    trained = dict.fromkeys((name_network(c), c.dataset.name, c.epochs, c.replicates) for c in configs)
    return "; ".join(
        f"{network} on {dataset}, {epochs} epoch{'s' * (epochs > 1)}, "
        f"{replicates} replicate{'s' * (replicates > 1)}"
        for network, dataset, epochs, replicates in trained
    )


def name_network(config: ConfigDict) -> str:
    """Return a network's name, and its width unless that is 1, such as "Conv-4 (width 0.25)"."""
    model, width = config.model.name, config.model.width
    return NETWORK_NAMES.get(model, model) + (f" (width {width:g})" if width != 1 else "")


def list_no_runs(scale: Scale) -> list[Run]:
    """List no runs: table 1 needs none."""
    return []


def format_table_1(scale: Scale, finished: Finished) -> str:
    """Return networks, data and hyperparameters as a Markdown table; parameters are counted."""
    rows = [COLUMNS, ["---"] * len(COLUMNS)]
    for run in (scale.lenet, scale.resnet20, scale.conv4, scale.one_shot):
        config = run.config
        schedule = config.optimizer.schedule
        if schedule == "step":
            schedule = f"÷10 at {', '.join(map(str, config.optimizer.milestones))}"
        density = (1 - config.pruning.fraction) ** (config.rounds - 1)
        rows.append(
            [
                name_network(config),
                config.dataset.name,
                f"{count_parameters(config):,}",
                config.epochs,
                config.batch_size,
                config.optimizer.name,
                f"{config.optimizer.learning_rate:g}",
                schedule,
                INITIALISATIONS.get(config.model.name, "Kaiming normal"),
                f"{config.optimizer.weight_decay:g}",
                f"one-shot ({density:.0%})" if config.rounds == 2 else "iterative",
            ]
        )
    return "\n".join(f"| {' | '.join(map(str, row))} |" for row in rows)


FIGURES = (PaperFigure("table1", "networks and hyperparameters", list_no_runs, format_table_1),)
