"""Features of photos, where the photos lie in them, and the masks that were found: tensors without a network."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kornia_tinyvit.checkpoints.tensors import read_tensors, write_tensors

__all__ = ["Geometry", "ImageEmbedding", "MaskPrediction", "fingerprint"]

#: Pixels of the input that a cell of the features stands for.
STRIDE = 16
_METADATA_KEY = "kornia_tinyvit.embedding"
_SAMPLES = 16  # numbers of each tensor that a fingerprint reads: an optimizer's step changes them all
# MobileSAM's files hold these, and its embedding does not depend on them.
_UNUSED = ("head.", "norm_head.")


@dataclass(frozen=True)
class Geometry:
    """How a photo lies in the input of an encoder: resized as a whole, in the upper left corner.

    Args:
        original_size: height and width of the photo.
        input_size: height and width that it was resized to.
        img_size: height and width of the input; what the photo does not cover is padding.
    """

    original_size: tuple[int, int]
    input_size: tuple[int, int]
    img_size: tuple[int, int]

    @classmethod
    def fit(cls, original_size: tuple[int, int], img_size: tuple[int, int]) -> Geometry:
        """Return how a photo fits an input: as large as it can be, with its aspect ratio.

        Sides are rounded half up as ``ResizeLongestSide.get_preprocess_shape`` of segment-anything does (kornia's
        ``VisualPrompter`` cuts the fraction off). Of a photo that is very much longer than it is wide, that would
        leave nothing of the short side; here it keeps a pixel.

        Args:
            original_size: height and width of the photo.
            img_size: height and width of the input.

        Raises:
            ValueError: if the photo has no pixels.

        Example:
            >>> Geometry.fit((1380, 2076), (1024, 1024)).input_size
            (681, 1024)
        """
        if min(original_size) < 1:
            raise ValueError(f"A photo must have pixels; got {original_size[0]}x{original_size[1]}.")
        scale = min(side / pixels for side, pixels in zip(img_size, original_size, strict=True))
        height, width = (max(1, int(pixels * scale + 0.5)) for pixels in original_size)
        return cls(original_size, (height, width), img_size)

    def map_points(self, points: Tensor) -> Tensor:
        """Map points :math:`(*, 2)`, x and y in pixels of the photo, to the input, as segment-anything does.

        That is a multiplication by the ratio of the sides. kornia's ``VisualPrompter`` lets a point mark the center of
        a pixel instead, which is up to half a pixel of the input away.

        Args:
            points: points :math:`(*, 2)`.
        """
        height, width = (new / old for new, old in zip(self.input_size, self.original_size, strict=True))
        return points * points.new_tensor([width, height])

    def restore(self, low_res_logits: Tensor) -> Tensor:
        """Bring logits :math:`(P, M, h/4, w/4)` of the input to the photo's size, :math:`(P, M, H, W)`.

        Bilinear, first to the input's size, then without the padding to the photo's, as
        ``Sam.postprocess_masks`` of segment-anything does; differentiable.

        Args:
            low_res_logits: logits :math:`(P, M, h/4, w/4)`.

        Returns:
            Logits :math:`(P, M, H, W)`.
        """
        height, width = self.input_size
        padded = F.interpolate(low_res_logits, self.img_size, mode="bilinear", align_corners=False)
        return F.interpolate(padded[..., :height, :width], self.original_size, mode="bilinear", align_corners=False)


@dataclass(frozen=True, eq=False)
class ImageEmbedding:
    r"""The features of photos and how the photos lie in them; made by :meth:`MobileSAM.embed`.

    It has the length of its photos; an index or a slice gives an embedding of those, and iteration one of each.

    Args:
        features: maps :math:`(B, 256, h/16, w/16)` of inputs of :math:`h \times w` pixels.
        geometries: how each photo lies in its input.
        encoder: :func:`fingerprint` of the encoder; ``None`` leaves unknown where the features came from.

    Raises:
        ValueError: if the features do not belong to the geometries.
    """

    features: Tensor
    geometries: tuple[Geometry, ...]
    encoder: str | None = None

    def __post_init__(self) -> None:
        if self.features.ndim != 4 or len(self.features) != len(self.geometries):
            raise ValueError(
                f"Features must be (B, C, h, w) with B={len(self.geometries)} photos; got {tuple(self.features.shape)}."
            )
        cells = tuple(self.features.shape[2:])
        for geometry in self.geometries:
            if tuple(side // STRIDE for side in geometry.img_size) != cells:
                raise ValueError(f"Features of {cells} cells are not those of an input of {geometry.img_size} pixels.")

    def __len__(self) -> int:
        return len(self.geometries)

    def __getitem__(self, index: int | slice) -> ImageEmbedding:
        if isinstance(index, int):
            index = range(len(self))[index]  # an index that is not there raises IndexError, which ends an iteration
            index = slice(index, index + 1)
        return dataclasses.replace(self, features=self.features[index], geometries=self.geometries[index])

    def __iter__(self) -> Iterator[ImageEmbedding]:
        return (self[index] for index in range(len(self)))

    def to(self, *args: Any, **kwargs: Any) -> ImageEmbedding:
        """Return the embedding on another device or in another precision; takes what :meth:`torch.Tensor.to` does."""
        return dataclasses.replace(self, features=self.features.to(*args, **kwargs))

    def save(self, path: str | Path) -> Path:
        """Write a safetensors file, whole or not at all; its folder is made.

        Args:
            path: the file to write.

        Returns:
            The path.
        """
        facts = {"geometries": [dataclasses.asdict(each) for each in self.geometries], "encoder": self.encoder}
        return write_tensors(path, {"features": self.features}, {"format": "pt", _METADATA_KEY: json.dumps(facts)})

    @classmethod
    def load(cls, path: str | Path) -> ImageEmbedding:
        """Read what :meth:`save` wrote, onto the CPU.

        Args:
            path: the file.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if it holds no embedding, or is damaged.
        """
        if not Path(path).is_file():
            raise FileNotFoundError(f"There is no embedding {path}.")
        try:
            tensors, metadata = read_tensors(Path(path))
            facts = json.loads(metadata[_METADATA_KEY])
            geometries = [
                Geometry(**{name: (int(sides[0]), int(sides[1])) for name, sides in each.items()})
                for each in facts["geometries"]
            ]
            return cls(tensors["features"], tuple(geometries), facts["encoder"])
        except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
            raise ValueError(f"{path} is damaged or holds no embedding: {error}") from error


@dataclass(frozen=True, eq=False)
class MaskPrediction:
    r"""The masks of a photo's prompts.

    Args:
        low_res_logits: :math:`(P, M, h/4, w/4)` for :math:`P` prompts with :math:`M` masks each and an input of
            :math:`h \times w` pixels; larger than the threshold on the object. With one mask a prompt, they can be
            passed on as ``masks``.
        scores: the network's guess of each mask's IoU with the object, :math:`(P, M)`.
        geometry: how the photo lies in the input.
        threshold: the logit from which on a pixel belongs to the object.
    """

    low_res_logits: Tensor
    scores: Tensor
    geometry: Geometry
    threshold: float = 0.0

    def logits(self) -> Tensor:
        """Return logits of the photo's size, :math:`(P, M, H, W)`; differentiable."""
        return self.geometry.restore(self.low_res_logits)

    def masks(self) -> Tensor:
        """Return the masks of the photo's size, :math:`(P, M, H, W)`, bool; their logits are never held all at once."""
        masks = [self.geometry.restore(each[None]) > self.threshold for each in self.low_res_logits]
        return torch.cat(masks) if masks else self.logits().bool()

    def best(self) -> MaskPrediction:
        """Return the mask with the highest score of each prompt, :math:`M = 1`."""
        best = self.scores.argmax(1)[:, None]
        rows = torch.arange(len(best), device=best.device)[:, None]
        return MaskPrediction(self.low_res_logits[rows, best], self.scores[rows, best], self.geometry, self.threshold)


@torch.no_grad()
def fingerprint(encoder: nn.Module) -> str | None:
    """Return a text that tells the weights of an encoder from others, the same on every device.

    It reads 16 numbers of each tensor, bit for bit: enough to notice any training, cheap enough for every call. The
    same weights in another precision are others. A module that keeps its weights out of sight, such as an optimized
    network, has none.

    Args:
        encoder: the image encoder.
    """
    digest = hashlib.sha256()
    samples: dict[torch.dtype, list[Tensor]] = {}
    for name, tensor in encoder.state_dict().items():
        if tensor.numel() and not name.startswith(_UNUSED) and not name.endswith("num_batches_tracked"):
            digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype};".encode())
            flat = tensor.flatten()
            samples.setdefault(tensor.dtype, []).append(flat[:: max(1, len(flat) // _SAMPLES)][:_SAMPLES])
    for taken in samples.values():
        digest.update(torch.cat(taken).cpu().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest() if samples else None
