"""ResNet-20 on CIFAR-10: a row of table 1 (figures 1 to 11).

python -m imp_jax.main --config=configs/resnet20.py    # downloads CIFAR-10, 162 MiB

Expected: 91 to 92 % for the dense network (91.25 % in He et al. 2016, table 6, after 164 epochs, with learnable
normalisation). At batch 128 imp is unstable and does no better than reinit; at --config.batch_size=1024 it wins
(figure 1). --config.optimizer.warmup_epochs=10.0 adds the warm-up.
Cost: 675 million images; `python -m experiments.run list` gives the time of whole figures on measured devices.
"""

from imp_jax.config import default


def get_config():
    config = default()
    config.dataset.name = "cifar10"
    config.dataset.normalize = True
    config.epochs = 85
    config.batch_size = 128
    config.model.name = "resnet20"
    config.model.norm_momentum = (
        0.8  # (ours) for trainings of few steps, where a mean over ten batches lags behind
    )
    config.optimizer.name = "momentum"
    config.optimizer.momentum = 0.9
    config.optimizer.learning_rate = 0.1
    config.optimizer.schedule = "step"
    config.optimizer.milestones = (56, 71)
    config.optimizer.weight_decay = 1e-5
    return config
