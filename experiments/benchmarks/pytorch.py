"""Import the loops of `torch_reference` and `torch_peer` only if `--torch` asks for PyTorch."""

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


def make_peer_train_fns(epochs: int) -> dict[str, tuple[Callable[[], None], int]]:
    """Return the functions of `torch_peer`, which train as many LeNets as a run of configs/mnist5k.py.

    PyTorch must be installed, see `make_torch_train_fns`.
    """
    from experiments.benchmarks import torch_peer

    return torch_peer.make_peer_train_fns(epochs)
