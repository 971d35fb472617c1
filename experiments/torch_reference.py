"""The training steps of Conv-4 and ResNet-20 in eager PyTorch, to be timed beside ours: `benchmark --torch`."""

import itertools

import torch
from torch import nn
from torch.nn import functional


class Block(nn.Module):
    """A residual block with option A's shortcut and normalisation without scale and bias."""

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


def resnet20():
    channels = [16, 16, 16, 16, 32, 32, 32, 64, 64, 64]
    stem = [nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16, affine=False), nn.ReLU()]
    blocks = [Block(inputs, outputs) for inputs, outputs in itertools.pairwise(channels)]
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


def conv4():
    layers, inputs = [], 3
    for outputs in (64, 128):
        for _ in range(2):
            layers += [nn.Conv2d(inputs, outputs, 3, 1, 1), nn.ReLU()]
            inputs = outputs
        layers.append(nn.MaxPool2d(2))
    layers += [
        nn.Flatten(),
        nn.Linear(8192, 256),
        nn.ReLU(),
        nn.Linear(256, 256),
        nn.ReLU(),
        nn.Linear(256, 10),
    ]
    return nn.Sequential(*layers)


NETWORKS = {"conv4": conv4, "resnet20": resnet20}


def stepper(network: str, batch_size: int, examples: int, memory_format: torch.memory_format):
    """A function that takes one masked momentum step on a batch gathered from images in memory.

    Normalised like ours; not augmented, which would only make it slower.
    """
    model = NETWORKS[network]().to(memory_format=memory_format)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-5)
    masks = [torch.ones_like(parameter) for parameter in model.parameters()]
    images = torch.randint(0, 256, (examples, 3, 32, 32), dtype=torch.uint8).to(memory_format=memory_format)
    labels = torch.randint(0, 10, (examples,))

    def step():
        batch = torch.randint(0, examples, (batch_size,))
        x = (images[batch].float() / 255 - 0.5) / 0.25
        loss = functional.cross_entropy(model(x.to(memory_format=memory_format)), labels[batch])
        optimizer.zero_grad()
        loss.backward()
        for parameter, mask in zip(model.parameters(), masks, strict=True):
            parameter.grad *= mask
        optimizer.step()
        return loss.item()

    return step
