"""Models that a user adds, and what is reported of those that break a rule."""

import functools
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from imp_jax import models
from imp_jax.errors import UserError
from imp_jax.models.lenet import LeNet
from imp_jax.models.resnet import CifarResNet

CIFAR = (32, 32, 3)


def create(name, image_shape=CIFAR, num_classes=10, *, norm_parts=1, batch_norm="interpolate", **options):
    """Create a model and check its normalization, as the setup of a run does."""
    model = models.create(name, num_classes, image_shape, **options)
    models.check_normalization(name, model, image_shape, norm_parts, batch_norm)
    return model


class Mixer(nn.Module):
    """A network for images of one size, without the fields of our own."""

    num_classes: int = 10
    param_dtype: str = "float32"

    @nn.compact
    def __call__(self, images, train: bool = False):
        x = nn.Conv(4, (7, 7), strides=(7, 7))(images)
        x = x.reshape(len(x), 16, 4)
        x = nn.Dense(16, param_dtype=self.param_dtype)(x.swapaxes(1, 2))
        return nn.Dense(self.num_classes)(x.mean(1))


class Normalised(nn.Module):
    num_classes: int = 10
    dtype: str = "float32"

    @nn.compact
    def __call__(self, images, train: bool = False):
        x = nn.BatchNorm(use_running_average=not train, dtype=self.dtype)(images)
        return nn.Dense(self.num_classes, dtype=self.dtype)(x.mean((1, 2)))


class Untrained(nn.Module):
    num_classes: int = 10

    @nn.compact
    def __call__(self, images):
        return nn.Dense(self.num_classes)(images.mean((1, 2)))


class Fixed(nn.Module):
    @nn.compact
    def __call__(self, images, train: bool = False):
        return nn.Dense(10)(images.mean((1, 2)))


class Unflattened(nn.Module):
    num_classes: int = 10

    @nn.compact
    def __call__(self, images, train=False):
        return nn.Dense(self.num_classes)(images)


class Listed(Mixer):
    widths: tuple = ()


@pytest.fixture
def own_models(monkeypatch):
    own = {"listed": functools.partial(Listed, widths=[3])}
    own |= {
        "flat": Unflattened,
        "mixer": Mixer,
        "half": functools.partial(Mixer, param_dtype="bfloat16"),
        "normalised": Normalised,
    }
    monkeypatch.setattr(models, "MODELS", dict(models.MODELS))
    for name, model in (own | {"untrained": Untrained, "fixed": Fixed}).items():
        models.register(name, model)


def test_a_model_needs_no_field_but_the_number_of_classes(own_models):
    assert create("mixer", (28, 28, 1), num_classes=7).num_classes == 7
    assert create("normalised", norm_parts=2, dtype="bfloat16").dtype == jnp.bfloat16


@pytest.mark.parametrize(
    ("name", "options", "sentence"),
    [
        ("mixer", {"width": 0.5}, r"model\.width is 0\.5; mixer has no field width, so it should be 1\.0"),
        (
            "mixer",
            {"dtype": "bfloat16"},
            r"^dtype is bfloat16; mixer has no field dtype, so it should be float32",
        ),
        ("mixer", {"norm_parts": 2}, r"model\.norm_parts is 2; mixer has no normalisation"),
        ("lenet", {"norm_momentum": 0.5}, r"model\.norm_momentum is 0\.5; lenet has no field norm_momentum"),
        ("half", {}, r"'half', which has parameters of type bfloat16; they should be float32"),
        ("untrained", {}, r"'untrained', which is not called as model\(images, train=False\)"),
        ("fixed", {}, r"'fixed', which has no field num_classes"),
        (
            "flat",
            {},
            r"'flat', which makes \(1, 28, 28, 10\) of one image; it should be logits of the shape \(1, 10\)",
        ),
        ("listed", {}, r"'listed', which has a field that cannot be hashed, as a list; it should be a tuple"),
    ],
)
def test_what_a_model_lacks_is_reported(own_models, name, options, sentence):
    with pytest.raises(UserError, match=sentence):
        create(name, (28, 28, 1), **options)


def test_statistics_cannot_be_estimated_again_without_a_momentum(own_models):
    for name, lacks in (("normalised", "field norm_momentum"), ("conv4", "statistics of its batches")):
        with pytest.raises(
            UserError, match=rf"analysis\.batch_norm is 'reestimate'; {name} has no {lacks}, so"
        ):
            create(name, batch_norm="reestimate")
    assert create("resnet8", batch_norm="reestimate", norm_parts=2).norm_momentum == 0.9


def test_a_registered_model_is_found_by_its_name(own_models):
    assert models.find("mixer") is Mixer
    models.register("mixer", LeNet)  # as by a config file that is executed again
    assert models.find("mixer") is LeNet
    assert models.find("resnet20")().depth == 20
    assert models.find("resnet26")().depth == 26  # not registered, but of the family


@pytest.mark.parametrize(
    ("name", "model", "sentence"),
    [
        ("mixer", "Mixer", r"the model 'mixer' is registered as 'Mixer'; it should be a Linen class, or a"),
        ("mixer", Mixer(), r"the model 'mixer' is registered as Mixer\("),
        ("nets:Mixer", Mixer, r"a model is registered as 'nets:Mixer'; its name should be a string without"),
        (3, Mixer, r"a model is registered as 3; its name should be a string"),
    ],
)
def test_what_cannot_be_registered_is_reported(name, model, sentence):
    before = dict(models.MODELS)
    with pytest.raises(UserError, match=sentence):
        models.register(name, model)
    assert before == models.MODELS


# --- dotted paths ---


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package of a user's own, that can be imported."""
    folder = tmp_path / "their_package"
    folder.mkdir()
    (folder / "__init__.py").touch()
    (folder / "nets.py").write_text(
        "from imp_jax.models.lenet import LeNet\n\n"
        "class Net(LeNet):\n    pass\n\n"
        "class Zoo:\n    Net = Net\n\n"
        "depth = 3\n\n"
        "def make_text(num_classes):\n    return 'net'\n"
    )
    (folder / "broken.py").write_text("raise RuntimeError('no licence')\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield
    for name in [name for name in sys.modules if name.split(".")[0] == "their_package"]:
        del sys.modules[name]


@pytest.mark.parametrize("attribute", ["Net", "Zoo.Net"])
def test_a_dotted_path_names_a_model_wherever_a_registered_name_does(package, attribute):
    model = create(f"their_package.nets:{attribute}", (28, 28, 1), num_classes=7, width=0.5)
    assert isinstance(model, LeNet)
    assert (type(model).__module__, model.num_classes, model.width) == ("their_package.nets", 7, 0.5)


@pytest.mark.parametrize(
    ("path", "sentence"),
    [
        ("their_package.nots:Net", r"cannot be imported: ModuleNotFoundError: No module .*their_package\.nots"),
        ("their_package.nets:Not", r"cannot be imported: AttributeError: .* no attribute 'Not'"),
        ("their_package.broken:Net", r"cannot be imported: RuntimeError: no licence"),
        ("their_package.nets:", r"cannot be imported: AttributeError"),
        (":Net", r"cannot be imported: ValueError: Empty module name"),
        ("their_package.nets:depth", r"which is of type int; it should be a Linen class, or a function"),
        ("their_package.nets:make_text", r"which creates an object of type str; it should be a module of flax"),
    ],
)
def test_a_dotted_path_that_cannot_be_used_is_reported(package, path, sentence):
    with pytest.raises(UserError, match=sentence) as error:
        create(path)
    assert str(error.value).startswith(f"model.name is {path!r}, which ")
    assert "\n" not in str(error.value)


# --- rng streams ---


class Dropping(nn.Module):
    """A network that draws from these rng streams in training."""

    num_classes: int = 10
    streams: tuple[str, ...] = ("dropout",)
    norm: bool = False
    norm_axis: str | None = None

    @nn.compact
    def __call__(self, images, train=False):
        x = nn.Dense(50)(images.mean((1, 2)))
        if self.norm:
            x = nn.BatchNorm(use_running_average=not train, axis_name=self.norm_axis)(x)
        for stream in self.streams:
            x = nn.Dropout(0.5, rng_collection=stream, deterministic=not train)(x)
        return nn.Dense(self.num_classes)(x)


class AlwaysDropping(Dropping):
    def __call__(self, images, train=False):
        return super().__call__(images, train=True)


@pytest.mark.parametrize("streams", [(), ("dropout",), ("noise", "dropout"), ("dropout", "dropout")])
@pytest.mark.parametrize("norm", [False, True])
def test_the_rng_streams_of_a_model_are_those_it_asks_for(streams, norm):
    model = Dropping(streams=streams, norm=norm)
    names = models.rng_streams(model, CIFAR)
    assert names == tuple(dict.fromkeys(streams))
    assert models.rng_streams(model, CIFAR) is names  # traced once
    # with a key for each the model trains, and draws from every one of them
    images = jax.random.normal(jax.random.key(0), (4, *CIFAR))
    variables = model.init(jax.random.key(1), images, train=False)

    def logits(**keys):
        rngs = {name: jax.random.key(keys.get(name, 0)) for name in names}
        return model.apply(variables, images, train=True, mutable=["batch_stats"], rngs=rngs)[0]

    for name in names:
        assert np.abs(logits() - logits(**{name: 1})).max() > 0.01
        np.testing.assert_array_equal(logits(**{name: 1}), logits(**{name: 1}))


def test_rng_streams_of_a_model_on_a_mesh_need_no_mesh():
    assert models.rng_streams(Dropping(norm=True, norm_axis="data"), CIFAR) == ("dropout",)
    assert models.rng_streams(CifarResNet(depth=8, norm_axis="data"), CIFAR) == ()


def test_a_model_with_dropout_is_created_and_has_shapes(own_models):
    models.register("dropping", Dropping)
    model = create("dropping", num_classes=7)
    params = models.shapes(model, CIFAR)["params"]
    assert jax.tree.map(lambda leaf: leaf.shape, params) == {
        "Dense_0": {"kernel": (3, 50), "bias": (50,)},
        "Dense_1": {"kernel": (50, 7), "bias": (7,)},
    }
    models.register("always", AlwaysDropping)
    with pytest.raises(UserError, match=r"'always', which draws random numbers where train is False .*dropout"):
        create("always")
