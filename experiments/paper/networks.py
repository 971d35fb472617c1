"""The networks and how they are trained (table 1), as the configs have it."""

from collections.abc import Sequence

import jax

from experiments.paper.panels import Finished, PaperFigure
from experiments.paper.scales import Scale
from experiments.sweeps.runs import Run
from imp_jax import models
from imp_jax.experiment import create_model

NAMES = {"lenet": "LeNet-300-100", "resnet20": "ResNet-20", "conv4": "Conv-4", "resnet50": "ResNet-50"}
SETS = {  # training images, their shape, classes
    "mnist5k": (4_000, (28, 28, 1), 10),
    "mnist": (60_000, (28, 28, 1), 10),
    "cifar10": (50_000, (32, 32, 3), 10),
    "imagenet2012": (1_281_167, (224, 224, 3), 1000),
}
INITIALISATIONS = {"lenet": "Kaiming uniform"}  # of the others: Kaiming normal


def describe_runs(runs: Sequence[Run]) -> str:
    """What runs train, such as "ResNet-20 on cifar10, 85 epochs, 3 replicates"."""
    configs = [run.config for run in runs]
    what = dict.fromkeys((c.model.name, c.dataset.name, c.epochs, c.replicates) for c in configs)
    return "; ".join(
        f"{NAMES[model]} on {dataset}, {epochs} epoch{'s' * (epochs > 1)}, "
        f"{replicates} replicate{'s' * (replicates > 1)}"
        for model, dataset, epochs, replicates in what
    )


def no_runs(scale: Scale) -> list[Run]:
    return []


def table_1(scale: Scale, finished: Finished) -> str:
    """Networks, data and hyperparameters; parameters are counted."""
    columns = ("Network", "Data", "Parameters", "Epochs", "Batch", "Optimizer", "Learning rate", "Schedule")
    columns += ("Initialisation", "Weight decay", "Pruning")
    rows = [columns, ["---"] * len(columns)]
    for run in (scale.lenet, scale.resnet20, scale.conv4, scale.one_shot):
        config = run.config
        _, image_shape, classes = SETS[config.dataset.name]
        params = models.shapes(create_model(config, classes, image_shape), image_shape)["params"]
        schedule = config.optimizer.schedule
        if schedule == "step":
            schedule = f"÷10 at {', '.join(map(str, config.optimizer.milestones))}"
        density = (1 - config.pruning.fraction) ** (config.rounds - 1)
        rows.append(
            [
                NAMES[config.model.name],
                config.dataset.name,
                f"{sum(leaf.size for leaf in jax.tree.leaves(params)):,}",
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


FIGURES = (PaperFigure("table1", "networks and hyperparameters", no_runs, table_1),)
