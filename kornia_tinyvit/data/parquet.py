"""Labeled images in parquet files of the Hugging Face Hub."""

from __future__ import annotations

import io
import json
import math
import re
from bisect import bisect_right
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from typing import Any, BinaryIO

from kornia_tinyvit.data.datasets import Contents
from kornia_tinyvit.data.splits import UNDIVIDED, check_split, choose_split
from kornia_tinyvit.extras import optional_imports

#: Names of the columns in datasets of the Hub, in the order of preference.
_IMAGE_COLUMNS = ("image", "img", "jpg", "jpeg", "png", "webp")
_LABEL_COLUMNS = ("label", "labels", "fine_label", "cls", "class")


class _Rows:
    """Rows of parquet files, kept as Arrow arrays to avoid one Python object per image."""

    def __init__(self, files: list[Path]) -> None:
        self.files = files
        self.tables = [_Table(file) for file in files]
        self.ends = list(accumulate(len(table.images) for table in self.tables))

    def __reduce__(self) -> tuple[type[_Rows], tuple[list[Path]]]:
        return _Rows, (self.files,)  # reading again is cheaper than pickling gigabytes

    def _row(self, index: int) -> tuple[int, int]:
        piece = bisect_right(self.ends, index)
        return piece, index - (self.ends[piece - 1] if piece else 0)

    def _content(self, index: int) -> Any:
        """Return the encoded image as a buffer, empty where the file has none."""
        piece, row = self._row(index)
        return self.tables[piece].images[row].as_buffer() or b""

    def name(self, index: int) -> str:
        return Path(self.place(index)).name

    def place(self, index: int) -> str:
        piece, row = self._row(index)
        return f"{self.files[piece]} row {row}"

    def size(self, index: int) -> int:
        return len(self._content(index))

    def open(self, index: int) -> BinaryIO:
        return io.BytesIO(self._content(index))


def read_shards(folder: Path, split: str, files: list[Path]) -> Contents:
    """Return the images of a split in files such as ``train-00000-of-00002.parquet``.

    Args:
        folder: their folder, for the message.
        split: name of the split; files of a single split are read whatever its usual name.
        files: all parquet files of the folder.

    Raises:
        MissingSplitError: if there is no such split.
        ValueError: see :func:`read_parquet`.
    """
    splits: dict[str, list[Path]] = {}
    for file in files:
        splits.setdefault(re.sub(r"[-_.]*\d.*", "", file.stem), []).append(file)
    if len(splits) > 1:
        return read_parquet(choose_split(folder, split, splits))
    check_split(folder, split)
    return replace(read_parquet(files), notes=(UNDIVIDED,))


def read_parquet(files: list[Path]) -> Contents:
    """Return the images and labels of parquet files, the parts of one split.

    Raises:
        ValueError: if one has no such columns or labels, or they name the classes differently.
        MissingExtraError: if pyarrow is missing.
    """
    rows = _Rows(files)
    first = rows.tables[0]
    for table in rows.tables[1:]:
        if (table.class_names, table.named) != (first.class_names, first.named):
            raise ValueError(
                f"{table.path} and {first.path} name their classes differently; expected the same names in all parts "
                "of a split."
            )
    labels = [label for table in rows.tables for label in table.labels]
    if not first.named:
        return Contents(rows, labels, first.class_names)
    class_names = tuple(sorted(set(labels)))
    position = {name: index for index, name in enumerate(class_names)}
    return Contents(rows, [position[label] for label in labels], class_names)


class _Table:
    """The images and labels of a file.

    Attributes:
        images: chunked array of binary values.
        labels: class indices, or names if ``named``.
        named: whether labels are names.
        class_names: names of the class indices in the metadata of ``datasets``; ``None`` without them.
    """

    def __init__(self, path: Path) -> None:
        with optional_imports("Parquet files need pyarrow", "'kornia-tinyvit[train]'"):
            import pyarrow as pa
            import pyarrow.parquet as pq
        self.path = path
        try:
            file = pq.ParquetFile(path, memory_map=True)
            schema = file.schema_arrow
            features = _read_features(schema.metadata or {})
            image = self._find(schema.names, features, "Image", _IMAGE_COLUMNS)
            label = self._find(schema.names, features, "ClassLabel", _LABEL_COLUMNS)
            nested = pa.types.is_struct(schema.field(image).type)
            table = file.read(columns=[f"{image}.bytes" if nested else image, label])
        except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
            raise ValueError(f"{path} is not a parquet file that can be read: {error}") from error
        self.images = self._binary(table[image], image)
        self.labels, self.named = self._read_labels(table[label])
        self.class_names = _class_names(features.get(label))
        if not self.named:
            self._check_indices()

    def _find(self, columns: list[str], features: dict[str, Any], kind: str, usual: tuple[str, ...]) -> str:
        """Return the column of images or labels: a usual name, else the only column of that kind in the metadata."""
        found = [name for name in usual if name in columns]
        found = found or [name for name in columns if _kind(features.get(name)) == kind]
        if not found or (len(found) > 1 and found[0] not in usual):
            raise ValueError(
                f"{self.path} has the columns {', '.join(columns)}; expected images in one of "
                f"{', '.join(_IMAGE_COLUMNS)} and labels in one of {', '.join(_LABEL_COLUMNS)}."
            )
        return found[0]

    def _binary(self, values: Any, column: str) -> Any:
        """Return a column of binary values, or of structs with ``bytes``, as binary values."""
        import pyarrow as pa
        import pyarrow.compute as pc

        if pa.types.is_struct(values.type) and values.type.get_field_index("bytes") >= 0:
            values = pc.struct_field(values, "bytes")
        if not (pa.types.is_binary(values.type) or pa.types.is_large_binary(values.type)):
            raise ValueError(
                f"{self.path} has values of the type {values.type} in the column {column}; expected encoded images, "
                "binary values or structs with 'bytes'."
            )
        return values

    def _read_labels(self, values: Any) -> tuple[list[Any], bool]:
        """Return the labels of a column, and whether they are names."""
        import pyarrow as pa

        kind = values.type.value_type if pa.types.is_dictionary(values.type) else values.type
        named = pa.types.is_string(kind) or pa.types.is_large_string(kind)
        if not (named or pa.types.is_integer(kind)):
            raise ValueError(f"{self.path} has labels of the type {kind}; expected class indices or names.")
        if values.null_count:
            row = values.is_null().to_pylist().index(True)
            raise ValueError(f"{self.path} row {row} has no label; expected a class index or name.")
        return values.to_pylist(), named

    def _check_indices(self) -> None:
        end = math.inf if self.class_names is None else len(self.class_names)
        for row, label in enumerate(self.labels):
            if not 0 <= label < end:
                names = "" if self.class_names is None else f" below {end}, the number of class names"
                raise ValueError(
                    f"{self.path} row {row} has the label {label}; expected a class index from 0{names}. The test "
                    "split of some datasets is unlabeled; use the validation split."
                )


def _read_features(metadata: dict[bytes, bytes]) -> dict[str, Any]:
    """Return the description of the columns that ``datasets`` writes to the metadata of a file."""
    try:
        features = json.loads(metadata[b"huggingface"])["info"]["features"]
    except (KeyError, TypeError, ValueError):
        return {}
    return features if isinstance(features, dict) else {}


def _kind(feature: Any) -> str | None:
    return feature.get("_type") if isinstance(feature, dict) else None


def _class_names(feature: Any) -> tuple[str, ...] | None:
    names = feature.get("names") if _kind(feature) == "ClassLabel" else None
    return tuple(map(str, names)) if names else None
