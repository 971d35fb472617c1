"""The project of a user, with its own model, data set, score, arm, analysis and optimizer."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from imp_jax import analysis, arms, data, models, optimizers, scores
from imp_jax.config import default


class Mixer(nn.Module):
    """Mixes pixels, then channels, with dropout between them."""

    num_classes: int
    width: float = 1.0
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, images, train=False):
        x = images.reshape(len(images), -1, images.shape[-1])
        x = x + nn.Dense(x.shape[1])(nn.LayerNorm()(x).swapaxes(1, 2)).swapaxes(1, 2)
        x = nn.Dense(max(1, round(16 * self.width)), dtype=self.dtype)(x)
        x = nn.Dropout(0.2, deterministic=not train)(nn.relu(x))
        return nn.Dense(self.num_classes)(x.reshape(len(x), -1))


def blobs(data_dir):
    """Return grey 6 × 6 images with a bright spot in one of four quarters; the quarter is the label."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 4, 400)
    images = rng.integers(0, 100, (400, 6, 6, 1))
    for image, label in zip(images, labels, strict=True):
        image[3 * (label // 2) :, 3 * (label % 2) :][:3, :3] += 120
    images = images.astype(np.uint8)
    return data.from_arrays(images[:300], labels[:300], images[300:], labels[300:])


def taylor(inputs):
    """Return |θ · ∂loss/∂θ|, the first-order change of the loss when a weight is removed."""
    return jax.tree.map(lambda p, g: jnp.abs(p * g), inputs.params, jax.grad(inputs.loss)(inputs.params))


def norm(params):
    """Return the Euclidean norm of all parameters."""
    return float(jnp.sqrt(sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(params))))


models.register("mixer", Mixer)
data.register("blobs", blobs)
scores.register("taylor", taylor)
arms.register(
    "negated",
    arms.Arm(number=100, weights=lambda i: jax.tree.map(jnp.negative, i.ticket), mask=lambda i: i.mask),
)
analysis.register("norms", lambda i: [(norm(i.params),)], columns=("norm",), needs="round")
optimizers.register("lion", optax.lion)


def get_config():
    config = default()
    config.model.name = "mixer"
    config.dataset.name = "blobs"
    config.pruning.score = "taylor"
    config.pruning.images = 100
    config.arms = ("imp", "reinit", "negated")
    config.optimizer.name = "lion"
    config.optimizer.learning_rate = 3e-3
    config.replicates, config.rounds, config.epochs, config.batch_size = 2, 3, 3, 20
    config.instability.rounds = (1,)
    config.analysis.path_points = 3
    return config
