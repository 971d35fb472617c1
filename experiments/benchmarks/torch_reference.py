"""Implement the training steps of LeNet, Conv-4, ResNet-8 and ResNet-20 in eager PyTorch, for `--torch`."""

import functools
import itertools
from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional


class Block(nn.Module):
    """A residual block with the shortcut of option A (He et al. 2016) and BatchNorm without scale and bias."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.stride, self.new_channels = 1 if inputs == outputs else 2, outputs - inputs
        self.conv_1 = nn.Conv2d(inputs, outputs, 3, self.stride, 1, bias=False)
        self.conv_2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.norm_1, self.norm_2 = (nn.BatchNorm2d(outputs, affine=False) for _ in range(2))

    def forward(self, x):
        y = functional.relu(self.norm_1(self.conv_1(x)))
        y = self.norm_2(self.conv_2(y))
        if self.new_channels:
            x = functional.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.new_channels))
        return functional.relu(x + y)


def make_resnet(blocks_per_stage, width):
    """Return the CIFAR ResNet with three stages of this many blocks; `width` scales the channels 16, 32, 64."""
    stages = [int(width * channels) for channels in (16, 32, 64)]
    channels = [stages[0], *(outputs for outputs in stages for _ in range(blocks_per_stage))]
    stem = [nn.Conv2d(3, stages[0], 3, 1, 1, bias=False), nn.BatchNorm2d(stages[0], affine=False), nn.ReLU()]
    blocks = [Block(inputs, outputs) for inputs, outputs in itertools.pairwise(channels)]
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(stages[2], 10))


def make_conv4():
    layers, inputs = [], 3
    for outputs in (64, 128):
        for _ in range(2):
            layers += [nn.Conv2d(inputs, outputs, 3, 1, 1), nn.ReLU()]
            inputs = outputs
        layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers, nn.Flatten(), *make_dense_layers(8192, 256, 256, 10))


def make_lenet():
    return nn.Sequential(nn.Flatten(), *make_dense_layers(784, 300, 100, 10))


def make_dense_layers(*widths):
    """Return dense layers of these widths with ReLUs between them."""
    layers = [layer for pair in itertools.pairwise(widths) for layer in (nn.Linear(*pair), nn.ReLU())]
    return layers[:-1]


def make_momentum(parameters):
    return torch.optim.SGD(parameters, lr=0.01, momentum=0.9, weight_decay=1e-5)


def make_adam(parameters):
    return torch.optim.Adam(parameters, lr=12e-4)


NETWORKS = {  # network, optimizer and image shape
    "lenet": (make_lenet, make_adam, (1, 28, 28)),
    "conv4": (make_conv4, make_momentum, (3, 32, 32)),
    "resnet8": (functools.partial(make_resnet, 1, 0.5), make_momentum, (3, 32, 32)),
    "resnet20": (functools.partial(make_resnet, 3, 1), make_momentum, (3, 32, 32)),
}


def make_step_fns(network: str, batch_size: int) -> dict[str, Callable[[], float]]:
    """Return functions that train one masked step on random images, one for each way to load the images.

    The images are normalised like ours. They are not augmented, which would only make the loop slower.
    """
    _, _, shape = NETWORKS[network]
    examples = max(4_000, 4 * batch_size)  # as in mnist5k
    images = torch.randint(0, 256, (examples, *shape), dtype=torch.uint8)
    labels = torch.randint(0, 10, (examples,))

    def make_in_memory_step(memory_format):
        formatted_images = images.to(memory_format=memory_format)

        def sample_batch():
            chosen = torch.randint(0, examples, (batch_size,))
            return (formatted_images[chosen].float() / 255 - 0.5) / 0.25, labels[chosen]

        return make_masked_step(network, sample_batch, memory_format)

    if network == "lenet":
        from experiments.benchmarks.torch_loader import make_loader  # only LeNet needs torchvision

        loader = make_loader(images, labels, batch_size)
        batches = itertools.chain.from_iterable(itertools.repeat(loader))
        return {
            "PyTorch": make_in_memory_step(torch.contiguous_format),
            "PyTorch with DataLoader": make_masked_step(
                network, lambda: next(batches), torch.contiguous_format
            ),
        }
    return {
        "PyTorch": make_in_memory_step(torch.contiguous_format),
        "PyTorch, channels last": make_in_memory_step(torch.channels_last),
    }


def make_masked_step(
    network: str,
    next_batch: Callable[[], tuple[torch.Tensor, torch.Tensor]],
    memory_format: torch.memory_format,
) -> Callable[[], float]:
    """Return a function that trains one step on `next_batch()` with masked gradients."""
    make_network, make_optimizer, _ = NETWORKS[network]
    model = make_network().to(memory_format=memory_format)
    optimizer = make_optimizer(model.parameters())
    masks = [torch.ones_like(parameter) for parameter in model.parameters()]

    def step():
        images, labels = next_batch()
        loss = functional.cross_entropy(model(images.to(memory_format=memory_format)), labels)
        optimizer.zero_grad()
        loss.backward()
        for parameter, mask in zip(model.parameters(), masks, strict=True):
            parameter.grad *= mask
        optimizer.step()
        return loss.item()

    return step
