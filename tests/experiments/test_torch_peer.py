"""The PyTorch loops that `benchmark lenet --torch` times: both train as torch.optim.Adam does."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from experiments.benchmarks import torch_peer  # noqa: E402


def train_with_autograd(networks, masks, images, labels):
    """Train with autograd and torch.optim.Adam; return the weights of the layers of each network."""
    trained = []
    for i, (layers, mask) in enumerate(zip(networks, masks, strict=True)):
        params = [tensor.clone().requires_grad_() for layer in layers for tensor in layer]
        optimizer = torch.optim.Adam(params, lr=12e-4)
        for batch, classes in zip(images, labels, strict=True):
            x = batch[i]
            for j in range(len(layers)):
                x = torch.nn.functional.linear(x, *params[2 * j : 2 * j + 2])
                x = x.relu() if j < len(layers) - 1 else x
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(x, classes[i]).backward()
            for j, kept in enumerate(mask):
                params[2 * j].grad *= kept
            optimizer.step()
        trained.append([weights.detach() for weights in params[::2]])
    return trained


@pytest.mark.parametrize("form", torch_peer.FORMS)
def test_the_peers_train_as_autograd_and_adam_do(form):
    networks, masks = torch_peer.make_networks(2)
    rng = np.random.default_rng(1)
    images = torch.tensor(rng.random((4, 2, 8, torch_peer.WIDTHS[0]), np.float32))
    labels = torch.tensor(rng.integers(0, 10, (4, 2, 8)))
    expected = train_with_autograd(networks, masks, images, labels)
    peer = torch_peer.FORMS[form](networks, masks)
    for batch, classes in zip(images, labels, strict=True):
        peer.step(batch, classes)
    for layers, expected_layers, mask in zip(peer.weights(), expected, masks, strict=True):
        for weights, expected_weights, kept in zip(layers, expected_layers, mask, strict=True):
            np.testing.assert_allclose(weights, expected_weights, atol=2e-6)
            assert (weights[kept == 0] == 0).all()
