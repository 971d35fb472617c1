"""Training on images in memory, with all that an epoch depends on as arguments."""

from imp_jax import training


def train_epoch(states, masks, split, keys, epoch, first_step, rates, optima=None, *, batch_size=8, spec):
    """`training.train_steps` from step `first_step` of an epoch on."""
    spec = spec._replace(batch_size=batch_size)
    batches = split.training_epochs(keys, epoch + 1, batch_size).epoch(epoch)
    return training.train_steps(states, masks, batches, first_step, rates, optima, spec=spec)
