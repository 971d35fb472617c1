"""ResNet-20 on CIFAR-10: a row of table 1 (figures 1 to 11 and 15).

    python -m imp_jax.main --config=configs/resnet20.py    # downloads CIFAR-10, 162 MiB

Expected: 91 to 92 % for the dense network (91.25 % in table 6 of He et al. 2016, after 164 epochs and with
learnable normalisation). At batch size 128, imp is unstable and no better than reinit; with
--config.batch_size=1024 it is better (figure 1).
Cost: 675 million images; `python -m experiments.run list` estimates the time of figures on measured devices.
Status: two rounds run on mnist5k, as a check.

For training with warm-up, add --config.optimizer.warmup_epochs=10.0.
"""

from imp_jax import methods
from imp_jax.config import default


def get_config(method="imp"):
    config = default()
    config.dataset.name = "cifar10"
    config.dataset.normalize = True
    config.epochs = 85
    config.batch_size = 128
    config.model.name = "resnet20"
    config.model.norm_momentum = 0.8  # (ours) with 0.9, the statistics lag in trainings of few steps
    config.optimizer.name = "momentum"
    config.optimizer.momentum = 0.9
    config.optimizer.learning_rate = 0.1
    config.optimizer.schedule = "step"
    config.optimizer.milestones = (56, 71)
    config.optimizer.weight_decay = 1e-5
    return methods.apply(config, method, rewind_step=2000)  # stable from there on (Frankle et al. 2020)
