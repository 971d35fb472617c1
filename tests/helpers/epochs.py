"""Short forms of training for an epoch on images in memory and of learning-rate schedules."""

from imp_jax import optimizers, training


def train_epoch(states, masks, split, keys, epoch, first_step, rates, optima=None, *, batch_size=8, spec):
    """Train on an epoch from step `first_step` on; see `training.train_steps`."""
    spec = spec._replace(batch_size=batch_size)
    batches = split.training_epochs(keys, epoch + 1, batch_size).epoch(epoch)
    return training.train_steps(states, masks, batches, first_step, rates, optima, spec=spec)


def learning_rates_of(config, steps_per_epoch):
    """Return the learning rates of a config; see `optimizers.learning_rates`."""
    fields = ("learning_rate", "schedule", "milestones", "warmup_epochs")
    options = {field: config.optimizer[field] for field in fields}
    return optimizers.learning_rates(config.epochs, steps_per_epoch, **options)
