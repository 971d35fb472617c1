"""GPUs for which programs can be compiled, and the description of each that XLA's compiler reads.

The numbers are those of XLA's own descriptions (xla/backends/gpu/target_config/specs) and, for the matrix
units, of NVIDIA's data sheets, without sparsity.
"""

from typing import NamedTuple

import jax
from jax.experimental import topologies

# cuDNN's version decides which fusions XLA forms, and the driver's which operations it puts into CUDA graphs
_CUDA_VERSION = "13.0.0"
_CUDNN_VERSION = (9, 12)


class Gpu(NamedTuple):
    """A GPU, as the compiler and the estimates of time see it."""

    name: str
    capability: tuple[int, int]  # CUDA's compute capability
    multiprocessors: int
    fp32_units: int  # of a multiprocessor
    clock_ghz: float
    memory_bytes: int
    bytes_per_second: float  # of the memory
    l2_bytes: int
    shared_bytes: int  # of a multiprocessor
    tf32_flops: float  # per second, of the matrix units
    bf16_flops: float


_H100 = Gpu(
    name="NVIDIA H100 80GB HBM3",
    capability=(9, 0),
    multiprocessors=132,
    fp32_units=128,
    clock_ghz=1.98,
    memory_bytes=84_942_979_072,
    bytes_per_second=3.352e12,
    l2_bytes=52_428_800,
    shared_bytes=233_472,
    tf32_flops=494e12,
    bf16_flops=989e12,
)
GPUS = {
    "h100": _H100,
    "h200": _H100._replace(name="NVIDIA H200", memory_bytes=151_397_597_184, bytes_per_second=4.8e12),
    "b200": Gpu(
        name="NVIDIA B200",
        capability=(10, 0),
        multiprocessors=148,
        fp32_units=128,
        clock_ghz=1.965,
        memory_bytes=191_514_411_008,
        bytes_per_second=7.672e12,
        l2_bytes=132_644_864,
        shared_bytes=233_472,
        tf32_flops=1125e12,
        bf16_flops=2250e12,
    ),
    "a100": Gpu(
        name="NVIDIA A100-SXM4-80GB",
        capability=(8, 0),
        multiprocessors=108,
        fp32_units=64,
        clock_ghz=1.41,
        memory_bytes=85_100_068_864,
        bytes_per_second=2.039e12,
        l2_bytes=41_943_040,
        shared_bytes=167_936,
        tf32_flops=156e12,
        bf16_flops=312e12,
    ),
}


def make_device(gpu: Gpu) -> jax.Device:
    """Return a device for which programs can be compiled but not run.

    Needs the wheels jax-cuda13-plugin and jax-cuda13-pjrt of JAX's own version on `sys.path`.
    """
    topology = topologies.get_topology_desc(
        gpu.name, "cuda", target_config=describe_target(gpu), topology="1x1x1"
    )
    return topology.devices[0]


def describe_target(gpu: Gpu) -> str:
    """Return the text of XLA's `GpuTargetConfigProto` for a GPU.

    Without `driver_version` and `runtime_version`, XLA leaves loops and convolutions out of CUDA graphs.
    """
    major, minor = gpu.capability
    cudnn_major, cudnn_minor = _CUDNN_VERSION
    accelerated = "feature_extension: ACCELERATED_FEATURES" if major >= 9 else ""
    cuda_major, cuda_minor, cuda_patch = _CUDA_VERSION.split(".")
    return f"""
gpu_device_info {{
  name: "{gpu.name}"
  cuda_compute_capability {{ major: {major} minor: {minor} {accelerated} }}
  threads_per_warp: 32
  threads_per_block_limit: 1024
  threads_per_core_limit: 2048
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: {gpu.shared_bytes - 1024}
  shared_memory_per_core: {gpu.shared_bytes}
  core_count: {gpu.multiprocessors}
  fpus_per_core: {gpu.fp32_units}
  clock_rate_ghz: {gpu.clock_ghz}
  memory_bandwidth: {gpu.bytes_per_second:.0f}
  l2_cache_size: {gpu.l2_bytes}
  device_memory_size: {gpu.memory_bytes}
  driver_version: "{_CUDA_VERSION}"
  runtime_version: "{_CUDA_VERSION}"
  compile_time_toolkit_version: "{_CUDA_VERSION}"
  dnn_version: "{cudnn_major}.{cudnn_minor}.0"
}}
runtime_version {{ major: {cuda_major} minor: {cuda_minor} patch: {cuda_patch} }}
platform_name: "CUDA"
dnn_version_info {{ major: {cudnn_major} minor: {cudnn_minor} }}
device_description_str: "{gpu.name}"
"""
