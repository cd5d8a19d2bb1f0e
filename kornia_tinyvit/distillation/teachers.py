"""Teachers: TinyViT, models of timm and transformers, or any module that a Python file builds."""

from __future__ import annotations

import hashlib
import runpy
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from kornia.enhance import normalize
from torch import Tensor, nn

from kornia_tinyvit.extras import optional_imports
from kornia_tinyvit.model import TinyViT
from kornia_tinyvit.modules import plain_state_dict
from kornia_tinyvit.preprocessing import IMAGENET_MEAN, IMAGENET_STD

__all__ = ["Teacher", "load_teacher"]


class Teacher(nn.Module):
    """A network that receives the normalized images of its student and converts them to its own preprocessing.

    Args:
        network: module that maps images :math:`(B, 3, H, W)` to logits :math:`(B, C)`, to features, or to an object
            with ``logits``, as in transformers.
        name: name in the manifest of a store.
        img_size: side in pixels to which images are resized (bicubic); ``None`` keeps the student's size.
        mean: channel means of the teacher's normalization; ``None`` for the student's.
        std: channel standard deviations of the teacher's normalization; ``None`` for the student's.
        student_mean: channel means of the student's normalization.
        student_std: channel standard deviations of the student's normalization.

    Attributes:
        class_names: names of the classes, where the network has them as ``class_names``.
    """

    scale: Tensor
    offset: Tensor

    def __init__(
        self,
        network: nn.Module,
        name: str,
        img_size: int | None = None,
        mean: tuple[float, ...] | None = None,
        std: tuple[float, ...] | None = None,
        student_mean: tuple[float, ...] = IMAGENET_MEAN,
        student_std: tuple[float, ...] = IMAGENET_STD,
    ) -> None:
        super().__init__()
        self.network = network
        self.name = name
        self.class_names: tuple[str, ...] | None = getattr(network, "class_names", None)
        self.img_size = img_size
        from_mean, from_std = torch.tensor(student_mean), torch.tensor(student_std)
        to_mean = from_mean if mean is None else torch.tensor(mean)
        to_std = from_std if std is None else torch.tensor(std)
        # From (p - a) / b to (p - c) / d is one normalization: (x - (c - a) / b) / (d / b).
        self.register_buffer("offset", (to_mean - from_mean) / from_std, persistent=False)
        self.register_buffer("scale", to_std / from_std, persistent=False)
        # Stored, because reading the buffers at every step would synchronize with the GPU.
        self.renormalizes = bool(self.offset.any()) or bool((self.scale != 1).any())
        self.eval().requires_grad_(False)

    def forward(self, images: Tensor) -> Tensor:
        """Map normalized images of the student :math:`(B, 3, H, W)` to logits :math:`(B, C)` or features."""
        size = self.img_size
        if size is not None and tuple(images.shape[-2:]) != (size, size):
            images = F.interpolate(images, (size, size), mode="bicubic", antialias=True)
        if self.renormalizes:
            images = normalize(images, self.offset, self.scale)
        output: Any = self.network(images)
        return output if isinstance(output, Tensor) else output.logits

    def train(self, mode: bool = True) -> Teacher:
        """Stay in evaluation mode whatever ``mode`` is."""
        return super().train(False)

    def describe(self) -> dict[str, Any]:
        """Return name, checksum of the weights, class names and preprocessing for the manifest of a store."""
        offset, scale = ([round(value, 6) for value in each.tolist()] for each in (self.offset, self.scale))
        names = self.class_names
        weights = {"name": self.name, "checksum": checksum(self.network), "class_names": names and list(names)}
        return weights | {"img_size": self.img_size, "offset": offset, "scale": scale}


def device_of(network: nn.Module) -> torch.device:
    """Return the device of a network, or the CPU if it has no tensors, such as a wrapper of another runtime."""
    return next((tensor.device for tensor in (*network.parameters(), *network.buffers())), torch.device("cpu"))


def checksum(network: nn.Module) -> str:
    """Return the first 16 hexadecimal digits of the SHA-256 of a network's state dict."""
    digest = hashlib.sha256()
    for name, tensor in sorted(plain_state_dict(network).items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


def load_teacher(source: str | Path | nn.Module, device: str | torch.device = "cpu") -> Teacher:
    """Build a teacher.

    Args:
        source: an ``nn.Module`` for images with ImageNet normalization; ``"file.py:function"``, a function that
            returns such a module; ``"timm:NAME"`` for pretrained weights of timm; ``"transformers:NAME"`` for an image
            classifier from the Hugging Face hub or a folder; a checkpoint or hub folder of a TinyViT; or
            ``"VARIANT/NAME"`` from :func:`~kornia_tinyvit.list_pretrained`, such as ``"21m/in22k"``.
        device: device of the teacher.

    Returns:
        The teacher in evaluation mode.

    Raises:
        ValueError: if the source is unknown, or the file or its function does not exist.
        MissingExtraError: if timm or transformers is required and not installed.
    """
    if isinstance(source, nn.Module):
        teacher = source if isinstance(source, Teacher) else Teacher(source, type(source).__name__)
    else:
        teacher = _build(str(source))
    return teacher.to(device)


def _build(text: str) -> Teacher:
    kind, _, name = text.partition(":")
    if kind == "timm":
        return _from_timm(name)
    if kind == "transformers":
        return _from_transformers(name)
    if kind.endswith(".py"):
        found = load_teacher(_call(Path(kind), name))
        found.name = f"{Path(kind).name}:{name}"
        return found
    if text and Path(text).exists():
        network = TinyViT.from_config(pretrained=text)
        text = Path(text).name  # independent of where it is
    elif "/" in text:
        variant, weights = text.split("/", 1)
        network = TinyViT.from_config(variant, pretrained=weights)
    else:
        raise ValueError(
            f"Unknown teacher {text!r}; expected file.py:function, timm:NAME, transformers:NAME, the path of a "
            "checkpoint or VARIANT/NAME such as 21m/in22k."
        )
    preprocessing = network.preprocessing
    return Teacher(network, text, preprocessing.img_size, preprocessing.mean, preprocessing.std)


def _call(file: Path, function: str) -> nn.Module:
    if not file.is_file():
        raise ValueError(f"There is no file {file}; expected a Python file with a function that returns the teacher.")
    found = runpy.run_path(str(file)).get(function)
    if not callable(found):
        raise ValueError(f"{file} has no function {function!r}; expected FILE:FUNCTION such as {file}:build.")
    network = found()
    if not isinstance(network, nn.Module):
        raise ValueError(f"{file}:{function} must return an nn.Module; got {type(network).__name__}.")
    return network


def _from_timm(name: str) -> Teacher:
    with optional_imports("Teachers of timm require timm", "timm"):
        import timm
    network = timm.create_model(name, pretrained=True)
    config = network.pretrained_cfg
    return Teacher(network, f"timm:{name}", config["input_size"][-1], config["mean"], config["std"])


def _from_transformers(name: str) -> Teacher:
    with optional_imports("Teachers of transformers require transformers", "transformers"):
        from transformers import AutoImageProcessor, AutoModelForImageClassification
    network = AutoModelForImageClassification.from_pretrained(name)
    processor = AutoImageProcessor.from_pretrained(name)
    size = getattr(processor, "crop_size", None) or processor.size
    side = size.get("height", size.get("shortest_edge"))
    return Teacher(network, f"transformers:{name}", side, tuple(processor.image_mean), tuple(processor.image_std))
