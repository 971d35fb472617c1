"""A split of a prepared set: random access to its ArrayRecord files, and the name of one that is damaged."""

import itertools
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from jaxtyping import Int, UInt8

from imp_jax.config import UserError, in_one_line


class Source:
    """The examples of a split by number, as {"image": …, "label": int}; it can be sent to other processes.

    With `decode=False` an image is the bytes of its PNG or JPEG file.

    Raises:
      UserError: a file is missing; later, an example that cannot be read or has an impossible label.
    """

    def __init__(self, builder: tfds.core.DatasetBuilder, split: str, *, decode: bool):
        self.name = f"{split} of {builder.name}"
        self._folder = builder.data_path
        self.num_classes = builder.info.features["label"].num_classes
        info = builder.info.splits[split]
        self.files = [str(path) for path in info.filepaths]
        self.ends = list(itertools.accumulate(info.shard_lengths))
        missing = [path for path, file in zip(self.files, info.filepaths, strict=True) if not file.exists()]
        if missing:
            raise UserError(
                f"{builder.name} is only half there: {missing[0]} is missing ({len(missing)} of "
                f"{len(self.files)} files of {split}); remove {builder.data_path} and prepare the set again"
            )
        decoders = None if decode else {"image": tfds.decode.SkipDecoding()}
        try:
            self._records = builder.as_data_source(split, decoders=decoders)
        except Exception as error:  # each reader of TFDS raises its own
            raise UserError(f"cannot read {self.name}, {self._damage(self.files, error)}") from error

    def __len__(self) -> int:
        return self.ends[-1]

    def __getitem__(self, index: int) -> dict[str, Any]:
        try:
            example = self._records[index]
        except Exception as error:
            raise UserError(f"cannot read {self.name}, {self._damage([self.file(index)], error)}") from error
        self._check_labels(np.array([example["label"]]), index)
        return example

    def file(self, index: int) -> str:
        """The file that holds an example."""
        return self.files[int(np.searchsorted(self.ends, index, side="right"))]

    def read_all(
        self,
    ) -> tuple[UInt8[np.ndarray, "examples height width channels"], Int[np.ndarray, " examples"]]:
        """All images and labels of a split whose images have one size."""
        images, labels = [], []
        for start, end in itertools.pairwise([0, *self.ends]):  # a file at a time: it is faster than one by one
            if start == end:
                continue
            try:
                examples = self._records.__getitems__(range(start, end))
                images.append(np.stack([example["image"] for example in examples]))
            except Exception as error:
                raise UserError(
                    f"cannot read {self.name}, {self._damage([self.file(start)], error)}"
                ) from error
            labels.append(np.array([example["label"] for example in examples], np.int32))
            self._check_labels(labels[-1], start)
        return np.concatenate(images), np.concatenate(labels)

    def _check_labels(self, labels, first):
        wrong = np.flatnonzero((labels < 0) | (labels >= self.num_classes))
        if len(wrong):
            raise UserError(
                f"example {first + wrong[0]} of {self.name} has the label {labels[wrong[0]]}; the set has "
                f"{self.num_classes} classes, so it should be 0 to {self.num_classes - 1}"
            )

    def _damage(self, files, error):
        return f"{files[0]}: {in_one_line(error)}; remove {self._folder} and prepare the set again"
