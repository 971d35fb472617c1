"""Models that users register, and the errors for those that break a rule."""

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
    """Create a model and check its normalisation, as the setup of a run does."""
    model = models.create(name, num_classes, image_shape, **options)
    models.check_normalization(name, model, image_shape, norm_parts, batch_norm)
    return model


class Mixer(nn.Module):
    """A network for images of one size. Of the fields that a config can set, it has only `num_classes`."""

    num_classes: int = 10
    param_dtype: str = "float32"

    @nn.compact
    def __call__(self, images, train: bool = False):
        x = nn.Conv(4, (7, 7), strides=(7, 7))(images)
        x = x.reshape(len(x), 16, 4)
        x = nn.Dense(16, param_dtype=self.param_dtype)(x.swapaxes(1, 2))
        return nn.Dense(self.num_classes)(x.mean(1))


class Normalized(nn.Module):
    num_classes: int = 10
    dtype: str = "float32"

    @nn.compact
    def __call__(self, images, train: bool = False):
        x = nn.BatchNorm(use_running_average=not train, dtype=self.dtype)(images)
        return nn.Dense(self.num_classes, dtype=self.dtype)(x.mean((1, 2)))


class NoTrainArgument(nn.Module):
    num_classes: int = 10

    @nn.compact
    def __call__(self, images):
        return nn.Dense(self.num_classes)(images.mean((1, 2)))


class NoNumClasses(nn.Module):
    @nn.compact
    def __call__(self, images, train: bool = False):
        return nn.Dense(10)(images.mean((1, 2)))


class Unflattened(nn.Module):
    num_classes: int = 10

    @nn.compact
    def __call__(self, images, train=False):
        return nn.Dense(self.num_classes)(images)


class ListField(Mixer):
    widths: tuple = ()


@pytest.fixture
def own_models(monkeypatch):
    own = {"listed": functools.partial(ListField, widths=[3])}
    own |= {
        "flat": Unflattened,
        "mixer": Mixer,
        "half": functools.partial(Mixer, param_dtype="bfloat16"),
        "normalized": Normalized,
    }
    monkeypatch.setattr(models, "MODELS", dict(models.MODELS))
    for name, model in (own | {"untrained": NoTrainArgument, "fixed": NoNumClasses}).items():
        models.register(name, model)


def test_a_model_needs_only_the_field_num_classes(own_models):
    assert create("mixer", (28, 28, 1), num_classes=7).num_classes == 7
    assert create("normalized", norm_parts=2, dtype="bfloat16").dtype == jnp.bfloat16


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
        ("untrained", {}, r"'untrained', whose __call__ has no parameter train; it should be"),
        ("fixed", {}, r"'fixed', which has no field num_classes"),
        (
            "flat",
            {},
            r"'flat', which returns \(1, 28, 28, 10\) for one image; it should return logits of the shape",
        ),
        ("listed", {}, r"'listed', which has a field that cannot be hashed, such as a list; it should be a"),
    ],
)
def test_a_model_that_breaks_a_rule_is_reported(own_models, name, options, sentence):
    with pytest.raises(UserError, match=sentence):
        create(name, (28, 28, 1), **options)


def test_reestimate_requires_batch_statistics_and_norm_momentum(own_models):
    for name, missing in (("normalized", "field norm_momentum"), ("conv4", "batch statistics")):
        with pytest.raises(
            UserError, match=rf"analysis\.batch_norm is 'reestimate'; {name} has no {missing}, so"
        ):
            create(name, batch_norm="reestimate")
    assert create("resnet8", batch_norm="reestimate", norm_parts=2).norm_momentum == 0.9


def test_find_returns_registered_models_and_resnets_of_any_depth(own_models):
    assert models.find("mixer") is Mixer
    models.register("mixer", LeNet)  # like a config file that is executed again
    assert models.find("mixer") is LeNet
    assert models.find("resnet20")().depth == 20
    assert models.find("resnet26")().depth == 26  # not registered, but a depth of 6n + 2


@pytest.mark.parametrize(
    ("name", "model", "sentence"),
    [
        ("mixer", "Mixer", r"the model 'mixer' is registered as 'Mixer'; it should be a Linen class, or a"),
        ("mixer", Mixer(), r"the model 'mixer' is registered as Mixer\("),
        ("nets:Mixer", Mixer, r"a model is registered as 'nets:Mixer'; its name should be a string without"),
        (3, Mixer, r"a model is registered as 3; its name should be a string"),
    ],
)
def test_register_refuses_invalid_names_and_models(name, model, sentence):
    registered = dict(models.MODELS)
    with pytest.raises(UserError, match=sentence):
        models.register(name, model)
    assert registered == models.MODELS


# --- dotted paths ---


@pytest.fixture
def package(tmp_path, monkeypatch):
    """Write a user's package, their_package, to a folder of sys.path."""
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
def test_a_model_is_created_by_its_dotted_path(package, attribute):
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
    """A network with dropout that draws from the rng streams `streams` in training."""

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
def test_rng_streams_are_those_from_which_a_model_draws(streams, norm):
    model = Dropping(streams=streams, norm=norm)
    names = models.rng_streams(model, CIFAR)
    assert names == tuple(dict.fromkeys(streams))
    assert models.rng_streams(model, CIFAR) is names  # traced once
    # given a key for each, the model can be applied, and its logits depend on each key
    images = jax.random.normal(jax.random.key(0), (4, *CIFAR))
    variables = model.init(jax.random.key(1), images, train=False)

    def logits(**keys):
        rngs = {name: jax.random.key(keys.get(name, 0)) for name in names}
        return model.apply(variables, images, train=True, mutable=["batch_stats"], rngs=rngs)[0]

    for name in names:
        assert np.abs(logits() - logits(**{name: 1})).max() > 0.01
        np.testing.assert_array_equal(logits(**{name: 1}), logits(**{name: 1}))


def test_rng_streams_of_a_model_with_a_norm_axis_need_no_mesh():
    assert models.rng_streams(Dropping(norm=True, norm_axis="data"), CIFAR) == ("dropout",)
    assert models.rng_streams(CifarResNet(depth=8, norm_axis="data"), CIFAR) == ()


def test_a_model_with_dropout_is_accepted_if_it_draws_only_in_training(own_models):
    models.register("dropping", Dropping)
    model = create("dropping", num_classes=7)
    params = models.shapes(model, CIFAR)["params"]
    assert jax.tree.map(lambda leaf: leaf.shape, params) == {
        "Dense_0": {"kernel": (3, 50), "bias": (50,)},
        "Dense_1": {"kernel": (50, 7), "bias": (7,)},
    }
    models.register("always", AlwaysDropping)
    with pytest.raises(UserError, match=r"'always', which draws random numbers if train is False .*dropout"):
        create("always")
