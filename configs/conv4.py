"""Conv-4 on CIFAR-10: a row of table 1 (figures 12, 13, 16 and 21 to 23).

    python -m imp_jax.main --config=configs/conv4.py    # downloads CIFAR-10, 162 MiB

Expected: training is stable at these settings, so imp should beat reinit at medium and high sparsity. The paper
gives the accuracy as a curve only (figure 12).
Cost: 595 million images; `python -m experiments.run list` estimates the time of figures on measured devices.
Status: two rounds run on mnist5k, as a check.

To destabilise training as in figure 12, add --config.batch_size=16 --config.optimizer.weight_decay=0.01
--config.optimizer.schedule=step --config.optimizer.milestones="(55,65)".
"""

from imp_jax import methods
from imp_jax.config import default


def get_config(method="imp"):
    config = default()
    config.dataset.name = "cifar10"
    config.dataset.normalize = True
    config.epochs = 75
    config.batch_size = 128
    config.model.name = "conv4"
    config.optimizer.name = "momentum"
    config.optimizer.momentum = 0.9
    config.optimizer.learning_rate = 0.01
    config.optimizer.schedule = "cosine"
    config.optimizer.weight_decay = 1e-5
    return methods.apply(config, method, rewind_step=2000)  # (ours) as for ResNet-20
