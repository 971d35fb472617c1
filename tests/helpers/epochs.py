"""Training on images in memory, and learning rates, with all that they depend on as arguments."""

from imp_jax import optimizers, training


def train_epoch(states, masks, split, keys, epoch, first_step, rates, optima=None, *, batch_size=8, spec):
    """`training.train_steps` from step `first_step` of an epoch on."""
    spec = spec._replace(batch_size=batch_size)
    batches = split.training_epochs(keys, epoch + 1, batch_size).epoch(epoch)
    return training.train_steps(states, masks, batches, first_step, rates, optima, spec=spec)


def learning_rates_of(config, steps_per_epoch):
    """`optimizers.learning_rates` of a config."""
    fields = ("learning_rate", "schedule", "milestones", "warmup_epochs")
    options = {field: config.optimizer[field] for field in fields}
    return optimizers.learning_rates(config.epochs, steps_per_epoch, **options)
