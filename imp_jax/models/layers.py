"""Kaiming initialisations: fan-in, gain √2, so that ReLU layers keep the variance of their inputs (table 1)."""

import flax.linen as nn

kaiming_uniform = nn.initializers.variance_scaling(2.0, "fan_in", "uniform")  # in ±√(6 / fan-in)
# a plain normal of variance 2 / fan-in; Flax's own he_normal is cut off at two standard deviations
kaiming_normal = nn.initializers.variance_scaling(2.0, "fan_in", "normal")
