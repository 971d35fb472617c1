"""Random access to a split of a prepared TFDS set, with errors that name the damaged file."""

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from imp_jax.data.tfrecords import TFRecordDataSource
from imp_jax.errors import UserError, one_line


class Source:
    """A split as a picklable sequence of {"image": bytes of a PNG or JPEG file, "label": int}.

    Raises:
      UserError: a file is missing; on access, an example cannot be read, or its label is out of range.
    """

    def __init__(self, builder: tfds.core.DatasetBuilder, split: str):
        self.name = f"{split} of {builder.name}"
        self._folder = builder.data_path
        self.num_classes = builder.info.features["label"].num_classes
        info = builder.info.splits[split]
        self.files = [str(path) for path in info.filepaths]
        self.ends = list(itertools.accumulate(info.shard_lengths))
        missing = [path for path, file in zip(self.files, info.filepaths, strict=True) if not file.exists()]
        if missing:
            raise UserError(
                f"{builder.name} is incomplete: {missing[0]} is missing ({len(missing)} of "
                f"{len(self.files)} files of {split}); remove {builder.data_path} and prepare the set again"
            )
        decoders = {"image": tfds.decode.SkipDecoding()}
        try:
            if builder.info.file_format is tfds.core.FileFormat.TFRECORD:
                self._records = TFRecordDataSource(builder.info, split, decoders)
            else:
                self._records = builder.as_data_source(split, decoders=decoders)
        except Exception as error:  # the readers of TFDS raise errors of many types
            raise self._unreadable(self.files[0], error) from error

    def __len__(self) -> int:
        return self.ends[-1]

    def __getitem__(self, index: int) -> dict[str, Any]:
        try:
            example = self._records[index]
        except Exception as error:
            raise self._unreadable(self.file(index), error) from error
        return self._with_label(example, index)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        # one read per file is faster than one per example
        for start, end in itertools.pairwise([0, *self.ends]):
            try:
                examples = self._records.__getitems__(range(start, end))
            except Exception as error:
                raise self._unreadable(self.file(start), error) from error
            for index, example in enumerate(examples, start):
                yield self._with_label(example, index)

    def file(self, index: int) -> str:
        """Return the path of the file that holds an example."""
        return self.files[int(np.searchsorted(self.ends, index, side="right"))]

    def _with_label(self, example, index):
        """Return an example after checking its label."""
        if not 0 <= example["label"] < self.num_classes:
            raise UserError(
                f"example {index} of {self.name} has the label {example['label']}; the set has "
                f"{self.num_classes} classes, so it should be 0 to {self.num_classes - 1}"
            )
        return example

    def _unreadable(self, file, error):
        return UserError(
            f"cannot read {self.name}, {file}: {one_line(error)}; remove {self._folder} and prepare the set "
            f"again"
        )
