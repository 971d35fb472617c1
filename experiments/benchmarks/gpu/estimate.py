"""Estimate how long a GPU takes for the kernels of a training step: arithmetic, not a measurement.

A kernel takes the time of a launch, and the longer of the times for its bytes and its products. The shares of
the peaks that kernels reach are assumptions, most uncertain for cuDNN's convolutions of few channels, so the
result is a range of ±35 %. If a step has grouped convolutions, its lower end assumes that these take three
times as long.
"""

from typing import NamedTuple

from experiments.benchmarks.gpu.hlo import Kernel, Launches, Step
from experiments.benchmarks.gpu.targets import Gpu

UNCERTAINTY = 0.35
GROUPED_FACTOR = 3
SMALL_BYTES = 2_000_000  # a kernel that moves less takes the time of its launch

_MEMORY_SHARE = 0.9  # of the memory's bytes per second
_CACHE_FACTOR = 1.35  # how much faster bytes are that fit into half of the L2 cache
_SMALL_S = 2.5e-6
_EXTERNAL_S = 3e-6
# share of the matrix units' peak by the smaller number of channels of a convolution
_CHANNEL_SHARES = ((128, 0.45), (64, 0.25), (32, 0.15), (0, 0.075))
_PRODUCT_SHARE = 0.2
_WEIGHT_GRADIENT_FACTOR = 1.5
_HOST_GRAPH_S, _HOST_EXTERNAL_S, _HOST_KERNEL_S = 6e-6, 8e-6, 2.3e-6


class Range(NamedTuple):
    """Images per second of all members."""

    low: float
    middle: float
    high: float


def estimate_images_per_second(step: Step, launches: Launches, images: int, gpu: Gpu) -> Range:
    """Estimate the speed of a training step.

    Args:
      images: of all members in a step.
    """
    host = estimate_host_seconds(launches)
    device, slow_device = (
        sum(estimate_kernel_seconds(kernel, gpu, factor) for kernel in step.kernels)
        for factor in (1, GROUPED_FACTOR)
    )
    return Range(
        (1 - UNCERTAINTY) * images / max(slow_device, host),
        images / max(device, host),
        (1 + UNCERTAINTY) * images / max(device, host),
    )


def estimate_host_seconds(launches: Launches) -> float:
    """Estimate how long the host takes to launch a step, in s."""
    return (
        launches.graphs * _HOST_GRAPH_S
        + launches.external_calls * _HOST_EXTERNAL_S
        + launches.kernels * _HOST_KERNEL_S
    )


def estimate_kernel_seconds(kernel: Kernel, gpu: Gpu, grouped_factor: float = 1) -> float:
    """Estimate the time of a kernel, in s.

    Args:
      grouped_factor: how much longer a grouped convolution takes than one of the same size.
    """
    bandwidth = _MEMORY_SHARE * gpu.bytes_per_second
    if kernel.bytes < gpu.l2_bytes / 2:
        bandwidth *= _CACHE_FACTOR
    peak = gpu.bf16_flops if kernel.dtype == "bf16" else gpu.tf32_flops
    if kernel.kind == "convolution":
        channels = kernel.channels if kernel.channels > 4 else 16  # cuDNN pads the channels of images
        if kernel.window > 7:  # a weight gradient written as a forward convolution: few thread blocks
            busy = min(kernel.blocks / gpu.multiprocessors, 1)
            return _EXTERNAL_S + kernel.flops / (busy * _channel_share(64) * peak)
        factor = _WEIGHT_GRADIENT_FACTOR if kernel.is_weight_gradient else 1
        products = factor * kernel.flops / (_channel_share(channels) * peak)
        seconds = max(kernel.bytes / (0.75 * bandwidth), products)
        return _EXTERNAL_S + seconds * (grouped_factor if kernel.groups > 1 else 1)
    if kernel.kind == "matmul":
        return _EXTERNAL_S + max(kernel.bytes / bandwidth, kernel.flops / (_PRODUCT_SHARE * peak))
    if kernel.bytes < SMALL_BYTES:
        return _SMALL_S
    launch_s, share = {"reduction": (2.5e-6, 0.7), "transpose": (2e-6, 0.6)}.get(kernel.kind, (1.5e-6, 1.0))
    return launch_s + kernel.bytes / (share * bandwidth)


def _channel_share(channels):
    return next(share for least, share in _CHANNEL_SHARES if channels >= least)
