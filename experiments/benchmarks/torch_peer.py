"""Masked LeNets with Adam in PyTorch, without the overhead of modules: the strongest peer of `benchmark lenet`.

Two forms train several networks, each in its own order of the images: `WrittenOut` writes the gradient out and
keeps all parameters in one vector; `Compiled` batches the networks and compiles the whole step. On two cores,
two processes of three networks with one thread each are faster than one process of six.
"""

import argparse
import itertools
import subprocess
import sys
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch.nn import functional

from experiments.sweeps.runs import REPOSITORY
from imp_jax.errors import UserError

WIDTHS = (784, 300, 100, 10)
LEARNING_RATE, BETAS, EPSILON = 12e-4, (0.9, 0.999), 1e-8
EXAMPLES, BATCH_SIZE = 4_000, 60  # as in mnist5k
NETWORKS, PROCESSES = 6, 2  # three networks in each process

Layers = list[tuple[torch.Tensor, torch.Tensor]]  # weights [outputs, inputs] and biases [outputs] of a network


class WrittenOut:
    """Trains one network after the other, with a gradient written out by hand and Adam on one flat vector."""

    def __init__(self, networks: Sequence[Layers], masks: Sequence[Sequence[torch.Tensor]]):
        self.networks = [self._flatten(layers, mask) for layers, mask in zip(networks, masks, strict=True)]

    def _flatten(self, layers, masks):
        tensors = [tensor for layer in layers for tensor in layer]
        flat_mask = torch.cat(
            [
                part.flatten()
                for mask, (_, bias) in zip(masks, layers, strict=True)
                for part in (mask, torch.ones_like(bias))
            ]
        )
        flat = torch.cat([tensor.flatten() for tensor in tensors])
        flat.grad = torch.zeros_like(flat)
        optimizer = torch.optim.Adam([flat], lr=LEARNING_RATE, betas=BETAS, eps=EPSILON, fused=True)

        def split(vector):
            parts = vector.split([tensor.numel() for tensor in tensors])
            views = [part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]
            return list(zip(views[::2], views[1::2], strict=True))

        return split(flat), split(flat.grad), flat.grad, flat_mask, optimizer

    @torch.no_grad()
    def step(self, images: torch.Tensor, labels: torch.Tensor) -> None:
        """Train one step; [networks, batch, pixels] and [networks, batch]."""
        rows = torch.arange(images.shape[1])
        for i, (layers, gradients, flat_gradient, flat_mask, optimizer) in enumerate(self.networks):
            inputs = [images[i]]
            for weights, bias in layers[:-1]:
                inputs.append(torch.addmm(bias, inputs[-1], weights.T).relu_())
            weights, bias = layers[-1]
            delta = torch.softmax(torch.addmm(bias, inputs[-1], weights.T), -1)
            delta[rows, labels[i]] -= 1
            delta /= len(rows)
            for j in range(len(layers) - 1, -1, -1):
                torch.mm(delta.T, inputs[j], out=gradients[j][0])
                torch.sum(delta, 0, out=gradients[j][1])
                if j:
                    delta = torch.mm(delta, layers[j][0]).mul_(inputs[j] > 0)
            flat_gradient.mul_(flat_mask)
            optimizer.step()

    def weights(self) -> list[list[torch.Tensor]]:
        """Return the weights of the layers of each network."""
        return [[weights for weights, _ in layers] for layers, *_ in self.networks]


class Compiled:
    """Trains all networks in one compiled step: batched products, their gradient, and Adam."""

    def __init__(self, networks: Sequence[Layers], masks: Sequence[Sequence[torch.Tensor]]):
        layers = [[torch.stack(tensors) for tensors in zip(*each, strict=True)] for each in zip(*networks)]  # noqa: B905
        self._params = [weights.mT.contiguous() for weights, _ in layers]
        self._params += [bias[:, None].contiguous() for _, bias in layers]
        self._masks = [torch.stack(each).mT.contiguous() for each in zip(*masks, strict=True)]
        self._first, self._second = ([torch.zeros_like(p) for p in self._params] for _ in range(2))
        self._count, depth = 0, len(layers)
        kept_masks = self._masks

        def loss(params, images, labels):
            x = images
            for j in range(depth):
                x = torch.baddbmm(params[depth + j], x, params[j])
                x = x.relu() if j < depth - 1 else x
            # the sum over networks of the mean over their batches
            return functional.cross_entropy(x.flatten(0, 1), labels.flatten(), reduction="sum") / x.shape[1]

        def step(params, first, second, images, labels, rate, second_scale):
            gradients = torch.func.grad(loss)(params, images, labels)
            for j, gradient in enumerate(gradients):
                gradient = gradient * kept_masks[j] if j < depth else gradient
                new_first = BETAS[0] * first[j] + (1 - BETAS[0]) * gradient
                new_second = BETAS[1] * second[j] + (1 - BETAS[1]) * gradient**2
                params[j].sub_(rate * new_first / (new_second.sqrt() * second_scale + EPSILON))
                first[j].copy_(new_first)
                second[j].copy_(new_second)

        self._step = torch.compile(step, fullgraph=True)

    def step(self, images: torch.Tensor, labels: torch.Tensor) -> None:
        """Train one step; [networks, batch, pixels] and [networks, batch]."""
        self._count += 1
        corrections = [1 - beta**self._count for beta in BETAS]
        rate, second_scale = LEARNING_RATE / corrections[0], corrections[1] ** -0.5
        self._step(
            *(self._params, self._first, self._second, images, labels),
            *(torch.tensor(value) for value in (rate, second_scale)),
        )

    def weights(self) -> list[list[torch.Tensor]]:
        """Return the weights of the layers of each network."""
        depth = len(self._masks)
        return [[p[i].T for p in self._params[:depth]] for i in range(len(self._params[0]))]


FORMS = {"written out": WrittenOut, "compiled": Compiled}


def make_networks(count: int, density: float = 0.5, seed: int = 0) -> tuple[list[Layers], list]:
    """Return random networks, already masked, and the masks of their weights."""
    generator = torch.Generator().manual_seed(seed)
    networks, masks = [], []
    for _ in range(count):
        layers, mask = [], []
        for inputs, outputs in itertools.pairwise(WIDTHS):
            weights = (2 * torch.rand(outputs, inputs, generator=generator) - 1) * (6 / inputs) ** 0.5
            mask.append((torch.rand(outputs, inputs, generator=generator) < density).float())
            layers.append((weights * mask[-1], torch.zeros(outputs)))
        networks.append(layers)
        masks.append(mask)
    return networks, masks


def main() -> None:
    """Train as many epochs as each line of stdin says, and print a line after each."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.benchmarks.torch_peer", description=main.__doc__
    )
    parser.add_argument("form", choices=FORMS)
    parser.add_argument("networks", type=int)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    peer = FORMS[arguments.form](*make_networks(arguments.networks))
    rng = np.random.default_rng(0)
    images = torch.tensor(rng.random((EXAMPLES, WIDTHS[0]), np.float32))
    labels = torch.tensor(rng.integers(0, 10, EXAMPLES))

    def train(steps):
        orders = torch.stack([torch.randperm(EXAMPLES) for _ in range(arguments.networks)])
        for i in range(steps):
            chosen = orders[:, i * BATCH_SIZE : (i + 1) * BATCH_SIZE]
            peer.step(images[chosen], labels[chosen])

    train(5)  # compiles
    print("ready", flush=True)
    for line in sys.stdin:
        for _ in range(int(line)):
            train(EXAMPLES // BATCH_SIZE)
        print("done", flush=True)


def make_peer_train_fns(epochs: int) -> dict[str, tuple[Callable[[], None], int]]:
    """Start the processes of both forms; return functions that train `epochs`, and the number of images.

    Raises:
      UserError: a process fails, for instance because there is no C++ compiler for `torch.compile`.
    """
    images = NETWORKS * epochs * (EXAMPLES // BATCH_SIZE) * BATCH_SIZE
    return {
        f"PyTorch, {form}, {PROCESSES} processes": (_start_processes(form, epochs), images) for form in FORMS
    }


def _start_processes(form, epochs):
    command = [sys.executable, "-m", "experiments.benchmarks.torch_peer", form, str(NETWORKS // PROCESSES)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "cwd": REPOSITORY}
    processes = [subprocess.Popen(command, **pipes) for _ in range(PROCESSES)]

    def wait_for(word):
        for process in processes:
            if process.stdout.readline().strip() != word:
                raise UserError(f"the process {' '.join(command)} failed; it has printed why")

    def train():
        for process in processes:
            print(epochs, file=process.stdin, flush=True)
        wait_for("done")

    wait_for("ready")
    return train


if __name__ == "__main__":
    main()
