"""LeNet-300-100 on MNIST: the first row of table 1 (figures 14 and 17 to 20).

    python -m imp_jax.main --config=configs/lenet.py    # downloads MNIST, 11 MiB

Expected: imp should beat reinit at medium and high sparsity. The paper gives the accuracy as a curve only
(figure 14).
Status: not run yet.
"""

from imp_jax import methods
from imp_jax.config import default


def get_config(method="imp"):
    config = default()
    config.dataset.name = "mnist"
    config.dataset.normalize = True  # (ours) as in OpenLTH
    config.epochs = 25
    config.batch_size = 60
    config.model.name = "lenet"
    config.optimizer.name = "adam"
    config.optimizer.learning_rate = 12e-4
    config.optimizer.schedule = "constant"
    config.optimizer.weight_decay = 0.0
    return methods.apply(
        config, method, rewind_step=1000
    )  # (ours) one epoch; stable from step 0 (Frankle et al. 2020)
