"""ResNet-50 on ImageNet, pruned once to 30 % density: a row of table 1 (table of appendix C).

    python -m imp_jax.data prepare imagenet2012    # once, with the two archives in downloads/manual
    python -m imp_jax.main --config=configs/resnet50.py

Expected (table of appendix C): with --config.optimizer.learning_rate=0.1, 72.1 % for the dense network and 2.0
points less at 30 % density. At the learning rate of this file, the table quotes 76.1 % and 2.4 points less from
Frankle et al. 2020a, for a normalisation with learnable scale and bias (--config.model.norm_affine=True).
Cost: 231 million images; a CPU core decodes about 500 of them per second. `python -m experiments.run list`
estimates the time of figures on measured devices.
Status: run on 40 JPEGs, as a check.
"""

from imp_jax import methods
from imp_jax.config import default


def get_config(method="imp"):
    config = default()
    config.dataset.name = "imagenet2012"
    config.dataset.normalize = True
    config.replicates = 1
    config.arms = ("imp",)
    config.rounds = 2
    config.epochs = 90
    config.batch_size = 1024
    config.dtype = "bfloat16"
    config.model.name = "resnet50"
    config.optimizer.name = "momentum"
    config.optimizer.momentum = 0.9
    config.optimizer.learning_rate = 0.4
    config.optimizer.schedule = "step"
    config.optimizer.milestones = (30, 60, 80)
    config.optimizer.weight_decay = 1e-5
    config.pruning.fraction = 0.7
    return methods.apply(config, method, rewind_step=11259)  # epoch 9 (Renda et al. 2020): 1,251 steps each
