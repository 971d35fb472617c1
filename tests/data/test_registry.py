"""Data sets and augmentations that users register from outside the package."""

import os
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest

from imp_jax import data, experiment
from imp_jax.data import augmentation, folder
from imp_jax.data.augmentation import augment
from imp_jax.errors import UnknownNameError, UserError
from tests.conftest import quick_config
from tests.data.test_folder import write_set
from tests.helpers import ROOT

IMAGES = np.random.default_rng(0).integers(0, 256, (20, 6, 5, 1), np.uint8)
LABELS = np.arange(20) % 3


def make_set(**options):
    return data.from_arrays(IMAGES, LABELS, IMAGES[:7], LABELS[:7], **options)


@pytest.fixture(autouse=True)
def restored_registries(monkeypatch):
    """Restore the registries after each test."""
    monkeypatch.setattr(data.registry, "DATASETS", dict(data.DATASETS))
    for name, function in list(data.AUGMENTATIONS.items()):
        monkeypatch.setitem(data.AUGMENTATIONS, name, function)
    yield
    for name in set(data.AUGMENTATIONS) - {"crop", "flip"}:
        del data.AUGMENTATIONS[name]


@pytest.fixture
def package_root(tmp_path, monkeypatch):
    """Write a user's package with the module their_package.sets to a folder of sys.path; return the folder."""
    package = tmp_path / "their_package"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "broken.py").write_text("1 / 0")
    code = """
        import numpy as np
        from imp_jax import data

        number = 3

        def mine(data_dir):
            rng = np.random.default_rng(0)
            images, labels = rng.integers(0, 256, (20, 6, 5, 1), np.uint8), np.arange(20) % 3
            return data.from_arrays(images, labels, images[:7], labels[:7])

        class Sets:
            mine = staticmethod(mine)
    """
    (package / "sets.py").write_text(textwrap.dedent(code))
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    for module in [name for name in sys.modules if name.partition(".")[0] == "their_package"]:
        del sys.modules[module]


def test_a_registered_set_is_loaded_by_name(tmp_path, monkeypatch):
    data_dirs = []
    data.register("mine", lambda data_dir: data_dirs.append(data_dir) or make_set())
    dataset = data.load("mine", str(tmp_path))
    np.testing.assert_array_equal(dataset.train.images, IMAGES)
    assert dataset.identity() == {"train_examples": 20, "test_examples": 7, "num_classes": 3, "classes": []}
    monkeypatch.setenv("HOME", "/home/me")
    data.load("mine")
    data.load("mine", "~/sets")
    assert [None if path is None else str(path) for path in data_dirs] == [str(tmp_path), None, "/home/me/sets"]
    data.register("mine", lambda data_dir: make_set(num_classes=9))  # like a notebook cell that runs again
    assert data.load("mine").num_classes == 9
    data.register("cifar10", lambda data_dir: make_set())  # a built-in set may be replaced
    assert data.load("cifar10").train.examples == 20


def test_built_in_sets_are_registered():
    assert {*data.BUILDERS, "folder"} == set(data.DATASETS)


def test_a_factory_gets_the_settings_for_which_it_has_parameters():
    calls = []

    def factory(data_dir, *, image_side, workers=4, **options):
        calls.append((image_side, workers, options))
        return make_set()

    data.register("mine", factory)
    data.load("mine", augmentation=("flip",), image_side=64)
    assert calls == [(64, None, {})]


def test_the_augmentation_of_a_set_in_memory_can_be_replaced():
    data.register("mine", lambda data_dir: make_set(augmentation=("crop",)))
    assert data.load("mine").augmentation == ("crop",)
    assert data.load("mine", augmentation=()).augmentation == ()
    assert data.load("mine", augmentation=["flip"]).augmentation == ("flip",)
    with pytest.raises(UserError, match=r"dataset.augmentation is \('mirror',\); it should be None, or any of"):
        data.load("mine", augmentation=("mirror",))


def test_settings_of_streamed_sets_are_refused_for_a_set_in_memory():
    data.register("mine", lambda data_dir, image_side: make_set())
    config = quick_config(None, **{"dataset.name": "mine", "batch_size": 5, "dataset.image_side": 64})
    with pytest.raises(UserError, match="image_side is 64; only streamed sets read it, and mine is kept in"):
        experiment.setup(config)
    config.dataset.image_side = 224
    assert experiment.setup(config).dataset.num_classes == 3


def test_a_registered_function_may_return_a_streamed_set(tmp_path):
    write_set(tmp_path, (40, 60, 3))

    def load_streamed(data_dir, image_side, workers, augmentation):
        splits = folder.open_splits(data_dir)
        return data.Dataset(
            *(data.Streamed(split, image_side, augmentation or (), workers) for split in splits),
            num_classes=3,
            augmentation=augmentation or (),
            folder=None,
        )

    data.register("all_settings", load_streamed)
    data.register("only_workers", lambda data_dir, workers: load_streamed(data_dir, 8, workers, ()))
    dataset = data.load("all_settings", tmp_path, image_side=16, workers=0, augmentation=("flip",))
    assert (dataset.train.image_shape, dataset.train.augmentation) == ((16, 16, 3), ("flip",))
    assert data.load("only_workers", tmp_path, workers=0).test.image_shape == (8, 8, 3)
    for option, value, default in (("image_side", 16, "224"), ("augmentation", ("flip",), "None")):
        with pytest.raises(
            UserError,
            match=f"dataset.{option} is .*; the function of the streamed set only_workers has no parameter "
            f"{option}, so it should be {default}",
        ):
            data.load("only_workers", tmp_path, **{option: value})


@pytest.mark.parametrize("path", ["their_package.sets:mine", "their_package.sets:Sets.mine"])
def test_a_set_is_loaded_by_a_dotted_path(package_root, path):
    assert data.load(path).identity() == make_set().identity()


@pytest.mark.parametrize(
    ("path", "sentence"),
    [
        (
            "their_package.nosuch:mine",
            "cannot be imported: ModuleNotFoundError: No module named 'their_package.n",
        ),
        ("their_package.sets:nosuch", "cannot be imported: AttributeError: .* has no attribute 'nosuch'"),
        ("their_package.broken:mine", "cannot be imported: ZeroDivisionError: division by zero"),
        ("their_package.sets:number", "is an object of type int; it should be a function of data_dir"),
    ],
)
def test_an_unusable_dotted_path_is_reported_in_one_sentence(package_root, path, sentence):
    with pytest.raises(UserError, match=f"dataset.name is '{path}', which {sentence}") as error:
        data.load(path)
    assert "\n" not in str(error.value)


def test_registered_names_are_listed_and_suggested(tmp_path):
    data.register("their_birds", lambda data_dir: make_set())
    with pytest.raises(
        UnknownNameError,
        match=r"'their-bird'; it should be one of mnist5k, .*, their_birds, .*did you mean their_birds\?",
    ):
        data.load("their-bird", tmp_path)


def test_an_unknown_name_error_of_a_factory_is_not_replaced():
    def factory(data_dir):
        raise UnknownNameError("species is 'emu'; it should be one of kiwi")

    data.register("mine", factory)
    with pytest.raises(UnknownNameError, match="species is 'emu'"):
        data.load("mine")


@pytest.mark.parametrize(
    ("name", "factory", "sentence"),
    [
        (
            "mine",
            3,
            "a data set is registered as 'mine' with an object of type int; it should be a function of",
        ),
        ("a:b", make_set, "a data set is registered as 'a:b'; its name should be a string without a colon"),
        ("", make_set, "its name should be a string"),
        (None, make_set, "registered as None; its name should be a string"),
    ],
)
def test_register_refuses_invalid_names_and_factories(name, factory, sentence):
    names = set(data.registry.DATASETS)
    with pytest.raises(UserError, match=sentence):
        data.register(name, factory)
    assert set(data.registry.DATASETS) == names


def split(images=IMAGES, labels=LABELS):
    return data.InMemory(images, labels)


@pytest.mark.parametrize(
    ("returned", "sentence"),
    [
        (None, "the function of the data set mine returns NoneType; it should return an imp_jax.data.Dataset"),
        ((IMAGES, LABELS), "the data set mine returns tuple; it should return"),
        ({"num_classes": 1}, "the data set mine has num_classes 1; it should be a number of at least 2"),
        ({"num_classes": 2}, "the train split of the data set mine has the label 2; labels should be from"),
        ({"test": split(labels=LABELS - 1)}, "the test split of the data set mine has the label -1"),
        ({"train": split(IMAGES.astype(int))}, "images of type int64; they should be uint8, from 0 to 255, or"),
        ({"train": split(IMAGES[..., 0])}, r"images of the shape \(20, 6, 5\); it should be \[examples,"),
        ({"test": split(labels=LABELS[:3])}, r"labels of type int64 and shape \(3,\); they should be 20 int"),
        ({"test": split(labels=LABELS / 1)}, "has labels of type float64"),
        ({"test": split(IMAGES[:, 1:])}, r"shape \(6, 5, 1\) and test images of \(5, 5, 1\); they should have"),
        ({"augmentation": ("mirror",)}, "dataset.augmentation is .'mirror',.; it should be None, or any of"),
    ],
)  # fmt: skip
def test_load_refuses_an_invalid_data_set(returned, sentence):
    if isinstance(returned, dict):
        returned = make_set()._replace(**returned)
    data.register("mine", lambda data_dir: returned)
    with pytest.raises(UserError, match=sentence) as error:
        data.load("mine")
    assert "\n" not in str(error.value)


def test_numpy_arrays_are_put_on_the_device():
    splits = split(IMAGES / 255), split(IMAGES[:7] / 255, LABELS[:7].astype(np.int8))
    data.register("mine", lambda data_dir: data.Dataset(*splits, num_classes=3, augmentation=(), folder=None))
    dataset = data.load("mine")
    for loaded, original in zip((dataset.train, dataset.test), splits, strict=True):
        assert isinstance(loaded.images, jax.Array)
        assert (loaded.images.dtype, loaded.labels.dtype) == (jnp.float32, jnp.int32)
        np.testing.assert_allclose(loaded.images, original.images, rtol=1e-6)
        np.testing.assert_array_equal(loaded.labels, original.labels)


def test_a_registered_augmentation_is_applied():
    data.register_augmentation("invert", lambda key, images: 255 - images)
    data.register("mine", lambda data_dir: make_set())
    assert data.load("mine", augmentation=("invert",)).augmentation == ("invert",)
    assert make_set(augmentation=("invert", "flip")).augmentation == ("invert", "flip")
    jitted = jax.jit(augment, static_argnums=2)
    np.testing.assert_array_equal(jitted(jax.random.key(0), IMAGES, ("invert",)), 255 - IMAGES)
    data.register_augmentation("invert", lambda key, images: images // 2)  # replaces the compiled one
    np.testing.assert_array_equal(jitted(jax.random.key(0), IMAGES, ("invert",)), IMAGES // 2)


def test_each_augmentation_gets_its_own_key():
    data.register_augmentation("noise", lambda key, images: images + jax.random.normal(key, images.shape))
    images = jnp.zeros((4, 3, 3, 1))
    augmented = augment(jax.random.key(0), images, ("noise", "noise"))
    keys = [jax.random.fold_in(jax.random.key(0), number) for number in range(2)]
    np.testing.assert_allclose(augmented, sum(jax.random.normal(key, images.shape) for key in keys), rtol=1e-6)


def test_invalid_augmentations_are_refused():
    with pytest.raises(
        UserError, match="an augmentation is registered as 'invert' with an object of type int; it"
    ):
        data.register_augmentation("invert", 3)
    with pytest.raises(UserError, match="an augmentation is registered as ''; its name should be a string"):
        augmentation.register("", augmentation.random_flip)
    data.register_augmentation("wide", lambda key, images: jnp.repeat(images, 2, axis=2))
    data.register_augmentation("float", lambda key, images: images / 255)
    for name, sentence in (
        (
            "wide",
            r"the augmentation wide changes images from uint8 of the shape \(20, 6, 5, 1\) to uint8 of the sh",
        ),
        ("float", "the augmentation float changes images from uint8 .* to float32 .*; it should keep both"),
    ):
        with pytest.raises(UserError, match=sentence):
            augment(jax.random.key(0), jnp.asarray(IMAGES), (name,))
        data.register("mine", lambda data_dir: make_set())
        with pytest.raises(UserError, match=f"the augmentation {name} changes"):
            data.load("mine", augmentation=(name,))


CONFIG_FILE = """
import numpy as np
from imp_jax import config, data

rng = np.random.default_rng(0)
images, labels = rng.normal(size=(20, 6, 5, 2)).astype(np.float32), np.arange(20) % 3
data.register("mine", lambda data_dir: data.from_arrays(images, labels, images[:7], labels[:7]))
data.register_augmentation("darken", lambda key, images: (images * 0.5).astype(images.dtype))

def get_config(name):
    fields = config.default()
    fields.update({"rounds": 1, "epochs": 1, "batch_size": 5, "replicates": 1})
    fields.dataset.name = name
    fields.dataset.augmentation = ("flip", "darken")
    return fields
"""


@pytest.mark.parametrize("name", ["mine", "their_package.sets:mine"])
def test_a_run_trains_on_the_set_that_its_config_file_registers(package_root, name):
    config_file = package_root / "own.py"
    config_file.write_text(CONFIG_FILE)
    done = subprocess.run(
        [sys.executable, "-m", "imp_jax.main", f"--config={config_file}:{name}", "--workdir=run"],
        cwd=package_root,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert f"lenet on {name} (6 × 5 × {2 if name == 'mine' else 1})" in done.stdout
    results = pd.read_csv(package_root / "run" / "results.csv")
    assert len(results) == 2
    assert np.isfinite(results["test_loss"]).all()
