"""Labelled pictures from a folder of folders or from the Hugging Face hub's parquet files."""

from __future__ import annotations

import io
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from kornia_tinyvit.preprocessing import read_image

__all__ = ["LabelledImages", "MissingExtraError"]


class MissingExtraError(ImportError):
    """An optional package is needed that is not installed."""


class LabelledImages(Dataset[tuple[Tensor, int]]):
    """Pictures with their class: item :math:`i` is a picture :math:`(3, H, W)` in [0, 1] and a class index.

    Args:
        path: a folder that holds a folder for each class, named after it; or a parquet file as the Hugging Face hub
            writes them, with a column ``image`` of structs that hold ``bytes`` and an integer column ``label``.

    Attributes:
        labels: class index of each picture.
        class_names: names of the classes, sorted, where the folders tell them; ``None`` for parquet files.

    Raises:
        FileNotFoundError: if there is no such path.
        ValueError: if there are no labelled pictures in it.
        MissingExtraError: if a parquet file is asked for without pyarrow.
    """

    def __init__(self, path: str | Path) -> None:
        path = Path(path)
        if not path.exists():
            raise FileNotFoundError(
                f"There is no data set {path}; expected a folder of class folders or a parquet file."
            )
        self.class_names: tuple[str, ...] | None = None
        self._pictures: list[Path] | list[bytes]
        if path.is_dir():
            self.class_names = tuple(sorted(entry.name for entry in path.iterdir() if _is_class(entry)))
            known = Image.registered_extensions()
            files = [
                (file, label)
                for label, name in enumerate(self.class_names)
                for file in sorted((path / name).rglob("*"))
                if file.suffix.lower() in known
            ]
            self._pictures = [file for file, _ in files]
            self.labels = [label for _, label in files]
        else:
            self._pictures, self.labels = _read_parquet(path)
        if not self.labels:
            raise ValueError(f"{path} holds no pictures in class folders such as {path}/cat/1.jpg.")

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        picture = self._pictures[index]
        return read_image(io.BytesIO(picture) if isinstance(picture, bytes) else picture), self.labels[index]


def _is_class(entry: Path) -> bool:
    return entry.is_dir() and not entry.name.startswith(".")  # tools leave hidden folders behind


def collate(items: list[tuple[Tensor, int]]) -> tuple[list[Tensor], Tensor]:
    """Put pictures of different sizes into a list and their classes into a tensor, for a data loader."""
    return [picture for picture, _ in items], torch.tensor([label for _, label in items])


def _read_parquet(path: Path) -> tuple[list[bytes], list[int]]:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise MissingExtraError("Parquet files need pyarrow: pip install 'kornia-tinyvit[train]'.") from error
    try:
        table = pq.read_table(path, columns=["image", "label"])
        return [row["bytes"] for row in table["image"].to_pylist()], table["label"].to_pylist()
    except (pa.ArrowException, TypeError, KeyError) as error:
        raise ValueError(
            f"{path} is no parquet file with a column image (structs with bytes) and a column label: {error}"
        ) from error
