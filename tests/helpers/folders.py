"""Small random versions of TFDS data sets, prepared with the features and file names of the real builders."""

import io

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image


def encoded(pixels, encoding="PNG"):
    """Return an image file with `pixels`, as a BytesIO."""
    file = io.BytesIO()
    Image.fromarray(pixels.squeeze()).save(file, encoding, **({"quality": 95} if encoding == "JPEG" else {}))
    return io.BytesIO(file.getvalue())


def write(name, data_dir, splits, label_names=None):
    """Prepare the set `name` in `data_dir` from `splits`, {split: list of examples}, in the format of TFDS.

    `label_names` are the class names of label features, {feature: names}, if the real builder reads them from a
    file.
    """
    real = tfds.builder_cls(name)

    def split_generators(self, dl_manager):
        del dl_manager
        for feature, names in (label_names or {}).items():
            self.info.features[feature].names = names
        return {split: enumerate(examples) for split, examples in splits.items()}

    members = {"name": name, "_split_generators": split_generators, "pkg_dir_path": real.pkg_dir_path}
    with tfds.core.registered.skip_registration():  # it has the name of the real builder
        builder = type(name.title(), (real,), members)
    builder(data_dir=str(data_dir), file_format="array_record").download_and_prepare()


def random_examples(size, shape, num_classes=10, seed=0):
    """Yield noise images as PNG files, whose brightness depends on their class; classes take turns."""
    rng = np.random.default_rng(seed)
    for i in range(size):
        label = i % num_classes
        brightness = 25 + 200 * label // num_classes
        pixels = np.clip(rng.normal(brightness, 20, shape), 0, 255).astype(np.uint8)
        yield {"image": encoded(pixels), "label": label}


def write_mnist(data_dir, train=30, test=20):
    """Prepare MNIST with random images."""
    sizes = {"train": train, "test": test}
    write("mnist", data_dir, {split: list(random_examples(n, (28, 28, 1))) for split, n in sizes.items()})


def write_cifar10(data_dir, train=30, test=20):
    """Prepare CIFAR-10 with random images."""

    def examples(size):
        for i, example in enumerate(random_examples(size, (32, 32, 3))):
            yield {"id": f"{i:05}", **example}

    write("cifar10", data_dir, {"train": list(examples(train)), "test": list(examples(test))})


def write_imagenet(data_dir, train=12, validation=6):
    """Prepare ImageNet with JPEGs of various sizes: smooth, so that JPEG preserves them; blue is the class."""

    def examples(size, seed):
        rng = np.random.default_rng(seed)
        for i in range(size):
            height, width = rng.integers(60, 140, 2)
            rows, columns = np.mgrid[:height, :width]
            red = 255 * rows / height
            green = 255 * columns / width
            blue = np.full((height, width), 20 + 60 * (i % 4))
            pixels = np.stack([red, green, blue], -1).astype(np.uint8)
            yield {"file_name": f"{i}.JPEG", "image": encoded(pixels, "JPEG"), "label": i % 4}

    splits = {"train": list(examples(train, 0)), "validation": list(examples(validation, 1))}
    write("imagenet2012", data_dir, splits)
