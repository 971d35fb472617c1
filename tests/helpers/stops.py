"""A handler of signals that simulates a signal."""

from imp_jax.runtime.signals import GracefulStop


class StopsAtFirstCheck(GracefulStop):
    """Simulates a signal that arrives before the first check for signals."""

    def signal_on_any_process(self, _):
        self.requested = 15
        return super().signal_on_any_process(lambda value: value)
