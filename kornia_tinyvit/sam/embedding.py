"""Image embeddings, the geometry of their images, and predicted masks: tensors without a network."""

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
from kornia_tinyvit.modules import plain_state_dict

__all__ = ["Geometry", "ImageEmbedding", "MaskPrediction", "fingerprint"]

#: Stride of the image embedding in pixels of the model input.
STRIDE = 16
_METADATA_KEY = "kornia_tinyvit.embedding"
_SAMPLES = 16  # values of each tensor in a fingerprint: a step of an optimizer changes all of them
# Weights in MobileSAM's checkpoints that the image embedding does not depend on.
_UNUSED = ("head.", "norm_head.")


@dataclass(frozen=True)
class Geometry:
    """Placement of an image in the model input: resized with its aspect ratio, in the upper left corner.

    Args:
        original_size: height and width of the image in pixels.
        input_size: height and width of the resized image.
        img_size: height and width of the model input; the rest is padding.
    """

    original_size: tuple[int, int]
    input_size: tuple[int, int]
    img_size: tuple[int, int]

    @classmethod
    def fit(cls, original_size: tuple[int, int], img_size: tuple[int, int]) -> Geometry:
        """Return the largest placement of an image in the model input that keeps the aspect ratio.

        Sides are rounded half up as in ``ResizeLongestSide.get_preprocess_shape`` of segment-anything (kornia's
        ``VisualPrompter`` truncates), but to at least one pixel.

        Args:
            original_size: height and width of the image.
            img_size: height and width of the model input.

        Raises:
            ValueError: if the image has no pixels.

        Example:
            >>> Geometry.fit((1380, 2076), (1024, 1024)).input_size
            (681, 1024)
        """
        if min(original_size) < 1:
            raise ValueError(f"An image must have pixels; got {original_size[0]}x{original_size[1]}.")
        scale = min(side / pixels for side, pixels in zip(img_size, original_size, strict=True))
        height, width = (max(1, int(pixels * scale + 0.5)) for pixels in original_size)
        return cls(original_size, (height, width), img_size)

    def map_points(self, points: Tensor) -> Tensor:
        """Scale points :math:`(*, 2)`, x and y in pixels of the image, to the model input as segment-anything does.

        kornia's ``VisualPrompter`` treats a point as the center of a pixel, a difference of up to half a pixel of the
        input.

        Args:
            points: points :math:`(*, 2)`.

        Returns:
            Points :math:`(*, 2)` in pixels of the model input.
        """
        height, width = (new / old for new, old in zip(self.input_size, self.original_size, strict=True))
        return points * points.new_tensor([width, height])

    def restore(self, low_res_logits: Tensor) -> Tensor:
        """Resize low-resolution logits :math:`(P, M, h/4, w/4)` to the image, :math:`(P, M, H, W)`; differentiable.

        Bilinear, to the model input, cropped to the image, then to the image's size, as in
        ``Sam.postprocess_masks`` of segment-anything.

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
    r"""Features of a batch of images with the geometry of each image; returned by :meth:`MobileSAM.embed`.

    Its length is the number of images. Indexing, slicing and iteration give embeddings of single images or subsets.

    Args:
        features: feature maps :math:`(B, 256, h/16, w/16)` of model inputs of :math:`h \times w` pixels.
        geometries: placement of each image in its model input.
        encoder: :func:`fingerprint` of the encoder; ``None`` if unknown.

    Raises:
        ValueError: if the number or the size of the features does not match the geometries.
    """

    features: Tensor
    geometries: tuple[Geometry, ...]
    encoder: str | None = None

    def __post_init__(self) -> None:
        if self.features.ndim != 4 or len(self.features) != len(self.geometries):
            raise ValueError(
                f"Features must be (B, C, h, w) with B={len(self.geometries)} images; got {tuple(self.features.shape)}."
            )
        cells = tuple(self.features.shape[2:])
        for geometry in self.geometries:
            if tuple(side // STRIDE for side in geometry.img_size) != cells:
                raise ValueError(f"Features of size {cells} do not match an input of {geometry.img_size} pixels.")

    def __len__(self) -> int:
        return len(self.geometries)

    def __getitem__(self, index: int | slice) -> ImageEmbedding:
        if isinstance(index, int):
            index = range(len(self))[index]  # raises IndexError if out of range
            index = slice(index, index + 1)
        return dataclasses.replace(self, features=self.features[index], geometries=self.geometries[index])

    def __iter__(self) -> Iterator[ImageEmbedding]:
        return (self[index] for index in range(len(self)))

    def to(self, *args: Any, **kwargs: Any) -> ImageEmbedding:
        """Return the embedding on another device or in another dtype; arguments as in :meth:`torch.Tensor.to`."""
        return dataclasses.replace(self, features=self.features.to(*args, **kwargs))

    def save(self, path: str | Path) -> Path:
        """Write a safetensors file atomically and create its folder.

        Args:
            path: the file to write.

        Returns:
            The path.
        """
        metadata = {"geometries": [dataclasses.asdict(each) for each in self.geometries], "encoder": self.encoder}
        return write_tensors(path, {"features": self.features}, {"format": "pt", _METADATA_KEY: json.dumps(metadata)})

    @classmethod
    def load(cls, path: str | Path) -> ImageEmbedding:
        """Read a file written by :meth:`save`, onto the CPU.

        Args:
            path: the file.

        Raises:
            FileNotFoundError: if the file does not exist.
            ValueError: if it is damaged or not an image embedding.
        """
        if not Path(path).is_file():
            raise FileNotFoundError(f"There is no embedding {path}.")
        try:
            tensors, texts = read_tensors(Path(path))
            metadata = json.loads(texts[_METADATA_KEY])
            geometries = [
                Geometry(**{name: (int(sides[0]), int(sides[1])) for name, sides in each.items()})
                for each in metadata["geometries"]
            ]
            return cls(tensors["features"], tuple(geometries), metadata["encoder"])
        except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RecursionError) as error:
            raise ValueError(f"{path} is damaged or holds no embedding: {error}") from error


@dataclass(frozen=True, eq=False)
class MaskPrediction:
    r"""Predicted masks of the prompts of one image.

    Args:
        low_res_logits: low-resolution mask logits :math:`(P, M, h/4, w/4)` of :math:`P` prompts with :math:`M` masks
            each, for a model input of :math:`h \times w` pixels. With :math:`M = 1` they are valid mask prompts.
        scores: predicted IoU of each mask, :math:`(P, M)`.
        geometry: placement of the image in the model input.
        threshold: pixels with larger logits are in the mask.
    """

    low_res_logits: Tensor
    scores: Tensor
    geometry: Geometry
    threshold: float = 0.0

    def logits(self) -> Tensor:
        """Return the logits at the image's size, :math:`(P, M, H, W)`; differentiable."""
        return self.geometry.restore(self.low_res_logits)

    def masks(self) -> Tensor:
        """Return bool masks at the image's size, :math:`(P, M, H, W)`, upsampled one prompt at a time."""
        masks = [self.geometry.restore(each[None]) > self.threshold for each in self.low_res_logits]
        return torch.cat(masks) if masks else self.logits().bool()

    def best(self) -> MaskPrediction:
        """Return the mask with the highest score of each prompt, :math:`M = 1`."""
        best = self.scores.argmax(1)[:, None]
        rows = torch.arange(len(best), device=best.device)[:, None]
        return MaskPrediction(self.low_res_logits[rows, best], self.scores[rows, best], self.geometry, self.threshold)


@torch.no_grad()
def fingerprint(encoder: nn.Module) -> str | None:
    """Return a hash of the weights of an encoder, identical on every device.

    It covers the bits of 16 values of each tensor: enough to detect any training step, cheap enough for every call.
    The dtype is part of the hash.

    Args:
        encoder: the image encoder.

    Returns:
        The hash, or ``None`` for a module without visible weights, such as an optimized network.
    """
    digest = hashlib.sha256()
    samples: dict[torch.dtype, list[Tensor]] = {}
    for name, tensor in plain_state_dict(encoder).items():
        if tensor.numel() and not name.startswith(_UNUSED) and not name.endswith("num_batches_tracked"):
            digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype};".encode())
            flat = tensor.flatten()
            samples.setdefault(tensor.dtype, []).append(flat[:: max(1, len(flat) // _SAMPLES)][:_SAMPLES])
    for values in samples.values():
        digest.update(torch.cat(values).cpu().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest() if samples else None
