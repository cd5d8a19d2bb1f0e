"""Labeled images in parquet files of the Hugging Face Hub."""

from __future__ import annotations

import io
import re
from bisect import bisect_right
from itertools import accumulate
from pathlib import Path
from typing import Any, BinaryIO

from kornia_tinyvit.data.datasets import Contents
from kornia_tinyvit.extras import optional_imports

_IMAGE_COLUMNS = ("image", "img")  # names in datasets of the Hub


class _Rows:
    """Rows of parquet files, kept as Arrow arrays to avoid one Python object per image."""

    def __init__(self, files: list[Path]) -> None:
        self.files = files
        columns = [_read_columns(file) for file in files]
        self.images = [images for images, _ in columns]
        self.labels = [label for _, labels in columns for label in labels]
        self.ends = list(accumulate(len(images) for images in self.images))

    def __reduce__(self) -> tuple[type[_Rows], tuple[list[Path]]]:
        return _Rows, (self.files,)  # reading again is cheaper than pickling gigabytes

    def _row(self, index: int) -> tuple[int, int]:
        piece = bisect_right(self.ends, index)
        return piece, index - (self.ends[piece - 1] if piece else 0)

    def _content(self, index: int) -> Any:
        """Return the encoded image as a buffer, empty where the file has none."""
        piece, row = self._row(index)
        return self.images[piece][row].as_buffer() or b""

    def name(self, index: int) -> str:
        return Path(self.place(index)).name

    def place(self, index: int) -> str:
        piece, row = self._row(index)
        return f"{self.files[piece]} row {row}"

    def size(self, index: int) -> int:
        return len(self._content(index))

    def open(self, index: int) -> BinaryIO:
        return io.BytesIO(self._content(index))


def read_parquet(files: list[Path]) -> Contents:
    """Return the images and labels of parquet files, the parts of one split.

    Raises:
        ValueError: if the files belong to several splits, or one has no such columns or labels.
        MissingExtraError: if pyarrow is missing.
    """
    splits = sorted({re.sub(r"[-_.]*\d.*", "", file.stem) for file in files})
    if len(splits) > 1:
        raise ValueError(
            f"{files[0].parent} holds parquet files of several splits ({', '.join(splits[:5])}); open one file, or "
            "move each split to a separate folder."
        )
    rows = _Rows(files)
    return Contents(rows, rows.labels)


def _read_columns(path: Path) -> tuple[Any, list[int]]:
    """Return the images of a file, a chunked array of binary values, and its class indices."""
    with optional_imports("Parquet files need pyarrow", "'kornia-tinyvit[train]'"):
        import pyarrow as pa
        import pyarrow.compute as pc
        import pyarrow.parquet as pq
    try:
        file = pq.ParquetFile(path, memory_map=True)
        column = next((name for name in _IMAGE_COLUMNS if name in file.schema_arrow.names), _IMAGE_COLUMNS[0])
        table = file.read(columns=[f"{column}.bytes", "label"])
        images, labels = pc.struct_field(table[column], "bytes"), table["label"]
        pc.binary_length(images)  # raises for other types
    except (pa.ArrowException, OSError, TypeError, KeyError) as error:
        raise ValueError(
            f"{path} is not a parquet file with a column image or img (structs with bytes) and a column label: {error}"
        ) from error
    if not pa.types.is_integer(labels.type):
        raise ValueError(f"{path} has labels of the type {labels.type}; expected integer class indices.")
    values = labels.to_pylist()
    for row, label in enumerate(values):
        if label is None or label < 0:
            raise ValueError(
                f"{path} row {row} has the label {label}; expected a class index from 0. The test split of some "
                "datasets is unlabeled; use the validation split."
            )
    return images, values
