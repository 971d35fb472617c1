"""ResNet-50 on ImageNet, one cut to 30 %: a row of table 1 (table of appendix C).

python -m imp_jax.data prepare imagenet2012    # once, with the two archives in downloads/manual
python -m imp_jax.main --config=configs/resnet50.py

Expected (table of appendix C): with --config.optimizer.learning_rate=0.1 72.1 % dense and 2.0 points less at
30 %. 76.1 % and 2.4 points less are quoted there from Frankle et al. 2020, at the learning rate here and with
learnable scale and bias in the normalisation, which is --config.model.norm_affine=True.
Cost: 231 million images; a core decodes about 500 a second. `python -m experiments.run list` gives the time of
whole figures on measured devices.
"""

from imp_jax.config import default


def get_config():
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
    return config
