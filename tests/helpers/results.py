"""Made-up rows of results.csv."""


def make_rows(number):
    """Make the rows of round `number`, of imp and reinit in replicate 0."""
    return [
        {
            "replicate": 0,
            "arm": arm,
            "round": number,
            "density": 0.8**number,
            "threshold": 0.01,
            "train_loss": 0.5,
        }
        | {"train_accuracy": 1.0, "test_loss": 0.25, "test_accuracy": 0.929, "seconds": 1.5}
        for arm in ("imp", "reinit")
    ]
