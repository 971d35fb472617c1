"""Import the eager PyTorch loops of `torch_reference` only if `--torch` asks for them."""

from collections.abc import Callable

from imp_jax.errors import UserError
from imp_jax.runtime import devices

TORCH_NETWORKS = ("lenet", "conv4", "resnet8", "resnet20")


def make_torch_train_fns(network: str, steps: int, batch_size: int) -> dict[str, Callable[[], None]]:
    """Return functions that train one network by `steps` in eager PyTorch on all cores, by their names.

    Several networks would train one after the other, so one is enough.

    Raises:
      UserError: PyTorch or torchvision is not installed.
    """
    try:
        import torch

        from experiments.benchmarks import torch_reference

        step_fns = torch_reference.make_step_fns(network, batch_size)
    except ImportError as error:
        raise UserError('--torch needs PyTorch and torchvision: pip install -e ".[bench]"') from error
    torch.set_num_threads(devices.available_cores())

    def repeat(step):
        def train():
            for _ in range(steps):
                step()

        return train

    return {name: repeat(step) for name, step in step_fns.items()}
