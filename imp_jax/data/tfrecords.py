"""Random access, without TensorFlow, to sets that TFDS has prepared in TFRecord format."""

import itertools
import os
import struct
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from tensorboardX.record_writer import masked_crc32c
from tensorflow_datasets.core.data_sources.base import BaseDataSource

_HEADER = struct.Struct("<QI")  # the length of a record in bytes, and the checksum of the length
# The checksum of the record is not verified: in pure Python that takes longer than decoding the image.
_FOOTER_BYTES = 4


def open_builder(make_builder: Callable[..., tfds.core.DatasetBuilder]) -> tfds.core.DatasetBuilder:
    """Return `make_builder(file_format=…)` in ArrayRecord format, or in TFRecord if only that is prepared.

    Raises:
      Exception: the set has another format or cannot be opened; TFDS raises errors of several types.
    """
    try:
        builder = make_builder(file_format="array_record")
    except Exception as error:
        if "file format" not in str(error).lower():
            raise
        builder = make_builder(file_format="tfrecord")
    if builder.is_prepared():
        # dataset_info.json names no format in older versions of TFDS, and several in converted sets
        for file_format in ("array_record", "tfrecord", builder.info.file_format):
            builder.info.set_file_format(file_format, override=True, override_if_initialized=True)
            if all(path.exists() for split in builder.info.splits.values() for path in split.filepaths):
                break
    return builder


@dataclass(repr=False)
class TFRecordDataSource(BaseDataSource):
    """Picklable sequence of the examples of a TFRecord split, decoded as by TFDS's `as_data_source`."""

    def __post_init__(self):
        split = self.dataset_info.splits[self.split]
        self.data_source = _Records([os.fspath(path) for path in split.filepaths], split.shard_lengths)


@dataclass
class _Records:
    """Sequence of the serialised examples of all files. A file is indexed when it is first read.

    Raises:
      ValueError: on access, a file is truncated, its lengths are damaged, or its number of records is wrong.
    """

    files: list[str]
    lengths: list[int]  # number of records in each file
    # for each indexed file, the offsets of its records in bytes
    offsets: dict[int, np.ndarray] = field(default_factory=dict)

    def __post_init__(self):
        self.ends = np.cumsum(self.lengths)

    def __len__(self) -> int:
        return int(self.ends[-1])

    def __getitem__(self, index: int) -> bytes:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Iterable[int]) -> list[bytes]:
        records: list[Any] = []
        for number, file_indices in itertools.groupby(indices, self._file_number):
            with open(self.files[number], "rb") as file:
                if number not in self.offsets:
                    self.offsets[number] = _index(file, self.lengths[number])
                first = self.ends[number] - self.lengths[number]
                for index in file_indices:
                    file.seek(self.offsets[number][index - first])
                    length, _ = _HEADER.unpack(file.read(_HEADER.size))
                    records.append(file.read(length))
        return records

    def _file_number(self, index):
        if not 0 <= index < len(self):
            raise IndexError(f"record {index} of {len(self)}")
        return int(np.searchsorted(self.ends, index, side="right"))


def _index(file, num_records):
    """Return the offsets of all records of a file after checking their lengths."""
    offsets, offset, size = [], 0, os.fstat(file.fileno()).st_size
    while offset < size:
        file.seek(offset)
        header = file.read(_HEADER.size)
        if len(header) < _HEADER.size:
            raise ValueError(f"the file is cut off within record {len(offsets)}")
        length, checksum = _HEADER.unpack(header)
        if masked_crc32c(header[:8]) != checksum:
            raise ValueError(f"the length of record {len(offsets)} does not match its checksum")
        offsets.append(offset)
        offset += _HEADER.size + length + _FOOTER_BYTES
    if offset > size:
        raise ValueError(f"the file is cut off within record {len(offsets) - 1}")
    if len(offsets) != num_records:
        raise ValueError(f"the file has {len(offsets)} records, not {num_records}")
    return np.array(offsets, np.int64)
