"""Shared fixtures: a prepared data folder, and an experiment whose rounds take milliseconds."""

import os
import tempfile

# one compilation cache for all workers and the processes they start; JAX reads these variables when imported
if "PYTEST_XDIST_WORKER" not in os.environ:
    _CACHE_DIR = tempfile.TemporaryDirectory()
    os.environ |= {
        "JAX_COMPILATION_CACHE_DIR": _CACHE_DIR.name,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }

# prevent downloads by a proxy that does not exist; servers on this machine stay reachable
os.environ |= {f"{scheme}_PROXY": "http://127.0.0.1:9" for scheme in ("HTTP", "HTTPS")}
os.environ["NO_PROXY"] = "127.0.0.1,localhost"

# most programs of the tests run for milliseconds, but optimising one takes a second
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    " --xla_cpu_use_fusion_emitters=false",
)

import functools
import gc
from pathlib import Path

import flax.linen as nn
import jax
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache

from imp_jax import analysis, data, experiment, models
from imp_jax import config as configs
from imp_jax.data import files
from imp_jax.data.source import Source
from imp_jax.models.lenet import LeNet

# the slowest files, slowest first: each runs in one worker, so they should start early
LONGEST = (
    "runs",
    "branch",
    "imp",
    "faults",
    "devices",
    "analysis",
    "sweep",
    "readme",
    "command",
    "benchmark",
    "anchors",
    "controls",
    "distributed",
    "slurm",
    "evidence",
    "training",
    "cli",
    "divergence",
    "extending",
    "repulsion",
    "notebooks",
    "pruning",
    "data",
    "connectivity",
    "models",
    "permutations",
    "registry",
    "arms",
    "methods",
)


def pytest_collection_modifyitems(items):
    """Begin with the slowest files, so that all workers finish at about the same time."""
    order = {f"test_{name}": position for position, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.module.__name__.rpartition(".")[2], len(order)))


@pytest.fixture
def optimised(monkeypatch):
    """Let processes that a test starts compile with full optimisation; for tests with long trainings."""
    monkeypatch.setenv("XLA_FLAGS", "")


@pytest.fixture
def one_figure():
    """Let analyses in this process draw only one of the figures, which take a second and a half together."""
    registered = dict(analysis.FIGURES)
    for name in list(registered)[1:]:
        del analysis.FIGURES[name]
    yield
    analysis.FIGURES.clear()  # in the order in which they were registered
    analysis.FIGURES.update(registered)


@pytest.fixture(scope="session", autouse=True)
def _decode_each_set_once():
    """Decode the files of a prepared set once in each process, because 5,000 PNG images take seconds."""
    read_all, splits = files.read_all, {}

    def read_once(source, image_shape):
        if not isinstance(source, Source):
            return read_all(source, image_shape)
        stats = [os.stat(file) for file in source.files]
        key = (source.name, image_shape, *((stat.st_ino, stat.st_mtime_ns, stat.st_size) for stat in stats))
        if key not in splits:
            splits[key] = read_all(source, image_shape)
        return splits[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "read_all", read_once)
        yield


@pytest.fixture(scope="module", autouse=True)
def _release_programs():
    """Drop compiled programs after a file of tests, before this process reaches the limit of memory maps."""
    yield
    maps = Path("/proc/self/maps")
    if maps.exists() and maps.read_text().count("\n") > 20_000:  # Linux allows 65,530
        jax.clear_caches()
        gc.collect()


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory):
    """Return a TFDS folder in which mnist5k is prepared."""
    path = tmp_path_factory.mktemp("tensorflow_datasets")
    data.prepare("mnist5k", str(path))
    return str(path)


def quick_config(data_dir, **overrides):
    """Return a config of three rounds of a narrow LeNet on mnist5k, each of one epoch of 8 steps."""
    config = configs.default()
    config.update({"replicates": 1, "rounds": 3, "epochs": 1, "batch_size": 500})
    config.update_from_flattened_dict({"dataset.data_dir": data_dir, "model.width": 0.1, **overrides})
    return config


@pytest.fixture(autouse=True)
def restore_cache_writes():
    """Write to the compilation cache again after a test that used oneDNN, which disables writing."""
    yield
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)


@pytest.fixture
def programs_not_kept():
    """Turn off the compilation cache, which is the default outside of the tests."""
    names = ("dir", "max_size")
    settings = {
        f"jax_compilation_cache_{name}": getattr(jax.config, f"jax_compilation_cache_{name}") for name in names
    }
    jax.config.update("jax_compilation_cache_dir", None)
    compilation_cache.reset_cache()
    yield
    for name, value in settings.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


@pytest.fixture
def tiny_experiment():
    """Return the function `make_tiny_experiment`."""
    return make_tiny_experiment


models.register("tiny_lenet", functools.partial(LeNet, widths=(6, 5)))


class NormalizedNet(nn.Module):
    """A small network with BatchNorm and dropout."""

    num_classes: int = 3

    @nn.compact
    def __call__(self, images, train=False):
        x = nn.Dense(6)(images.reshape(len(images), -1))
        x = nn.relu(nn.BatchNorm(use_running_average=not train)(x))
        return nn.Dense(self.num_classes)(nn.Dropout(0.2, deterministic=not train)(x))


models.register("normalized", NormalizedNet)


def make_tiny_experiment(dataset=None, **overrides):
    """Set up a LeNet 16 → 6 → 5 → 3 on 46 random images of 4 × 4, in batches of 8, with these config fields."""
    return experiment.setup(make_tiny_config(**overrides), dataset or make_tiny_dataset())


def make_tiny_config(**overrides):
    """Return the config of `make_tiny_experiment`."""
    config = configs.default()
    with config.unlocked():
        config.update({"replicates": 2, "rounds": 3, "epochs": 2, "batch_size": 8})
        config.update_from_flattened_dict({"model.name": "tiny_lenet", **overrides})
    return config


def make_tiny_dataset():
    """Return 46 random images of 4 × 4 in three classes by brightness; the first 13 are the test set."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (46, 4, 4, 1), np.uint8)
    labels = (images.mean((1, 2, 3)) / 256 * 60).astype(np.int32) % 3
    return data.from_arrays(images, labels, images[:13], labels[:13], num_classes=3)
