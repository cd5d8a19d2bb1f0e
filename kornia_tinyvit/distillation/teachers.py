"""Networks that teach: TinyViT, timm's, transformers', or any module that a Python file returns."""

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
from kornia_tinyvit.preprocessing import IMAGENET_MEAN, IMAGENET_STD

__all__ = ["Teacher", "load_teacher"]


class Teacher(nn.Module):
    """A network behind the images of its students: it resizes and normalizes them as it was trained with.

    Args:
        network: takes images :math:`(B, 3, H, W)` and returns logits :math:`(B, C)` or features, or an object with
            ``logits``, as the networks of transformers do.
        name: what a store's manifest calls it.
        img_size: side in pixels it wants images resized to (bicubic); ``None`` takes the student's.
        mean: channel means it was trained with; ``None`` for the student's normalization.
        std: the deviations to the means.
        student_mean: channel means that the images which arrive were normalized with.
        student_std: the deviations to them.
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
        self.img_size = img_size
        ours_mean, ours_std = torch.tensor(student_mean), torch.tensor(student_std)
        theirs_mean = ours_mean if mean is None else torch.tensor(mean)
        theirs_std = ours_std if std is None else torch.tensor(std)
        # From (p - a) / b to (p - c) / d is one normalization: (x - (c - a) / b) / (d / b).
        self.register_buffer("offset", (theirs_mean - ours_mean) / ours_std, persistent=False)
        self.register_buffer("scale", theirs_std / ours_std, persistent=False)
        # Decided once: asking the buffers at every step would wait for the GPU.
        self.renormalizes = bool(self.offset.any()) or bool((self.scale != 1).any())
        self.eval().requires_grad_(False)

    def forward(self, images: Tensor) -> Tensor:
        """Map the students' normalized images :math:`(B, 3, H, W)` to logits :math:`(B, C)` or features."""
        size = self.img_size
        if size is not None and tuple(images.shape[-2:]) != (size, size):
            images = F.interpolate(images, (size, size), mode="bicubic", antialias=True)
        if self.renormalizes:
            images = normalize(images, self.offset, self.scale)
        output: Any = self.network(images)
        return output if isinstance(output, Tensor) else output.logits

    def train(self, mode: bool = True) -> Teacher:
        """Stay in evaluation mode: a teacher does not learn."""
        return super().train(False)

    def describe(self) -> dict[str, Any]:
        """Return its name, a checksum of its weights and what it does to images, for a store's manifest."""
        offset, scale = ([round(value, 6) for value in each.tolist()] for each in (self.offset, self.scale))
        weights = {"name": self.name, "checksum": checksum(self.network)}
        return weights | {"img_size": self.img_size, "offset": offset, "scale": scale}


def device_of(network: nn.Module) -> torch.device:
    """Return where a network wants its images; a wrapper of another runtime, which holds no tensors, on the CPU."""
    return next((tensor.device for tensor in (*network.parameters(), *network.buffers())), torch.device("cpu"))


def checksum(network: nn.Module) -> str:
    """Return 16 hexadecimal digits that tell the weights of a network from others."""
    digest = hashlib.sha256()
    for name, tensor in sorted(network.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def load_teacher(source: str | Path | nn.Module, device: str | torch.device = "cpu") -> Teacher:
    """Build a teacher.

    Args:
        source: an ``nn.Module`` that takes images with ImageNet's normalization; ``"file.py:function"``, whose
            function returns one; ``"timm:NAME"``, which downloads timm's weights; ``"transformers:NAME"`` for an image
            classifier of the Hugging Face hub or a folder; or weights of TinyViT: a path with its configuration inside
            (:func:`~kornia_tinyvit.save_checkpoint`) or ``"VARIANT/NAME"`` of
            :func:`~kornia_tinyvit.list_pretrained`, such as ``"21m/in22k"``.
        device: where it runs.

    Raises:
        ValueError: if the source is of no known kind or the function is not there.
        MissingExtraError: if timm or transformers is needed and not installed.
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
    if Path(text).is_file():
        network = TinyViT.from_config(pretrained=text)
        text = Path(text).name  # wherever it lies
    elif "/" in text:
        variant, weights = text.split("/", 1)
        network = TinyViT.from_config(variant, pretrained=weights)
    else:
        raise ValueError(
            f"{text!r} is no teacher; expected file.py:function, timm:NAME, transformers:NAME, a checkpoint's path or "
            "VARIANT/NAME such as 21m/in22k."
        )
    preprocessing = network.preprocessing
    return Teacher(network, text, preprocessing.img_size, preprocessing.mean, preprocessing.std)


def _call(file: Path, function: str) -> nn.Module:
    if not file.is_file():
        raise ValueError(f"There is no file {file} with a function that returns the teacher.")
    found = runpy.run_path(str(file)).get(function)
    if not callable(found):
        raise ValueError(f"{file} has no function {function!r}; write it as {file}:build, for example.")
    network = found()
    if not isinstance(network, nn.Module):
        raise ValueError(f"{file}:{function} must return an nn.Module; got {type(network).__name__}.")
    return network


def _from_timm(name: str) -> Teacher:
    with optional_imports("A teacher of timm needs it", "timm"):
        import timm
    network = timm.create_model(name, pretrained=True)
    trained = network.pretrained_cfg
    return Teacher(network, f"timm:{name}", trained["input_size"][-1], trained["mean"], trained["std"])


def _from_transformers(name: str) -> Teacher:
    with optional_imports("A teacher of transformers needs it", "transformers"):
        from transformers import AutoImageProcessor, AutoModelForImageClassification
    network = AutoModelForImageClassification.from_pretrained(name)
    processor = AutoImageProcessor.from_pretrained(name)
    size = getattr(processor, "crop_size", None) or processor.size
    side = size.get("height", size.get("shortest_edge"))
    return Teacher(network, f"transformers:{name}", side, tuple(processor.image_mean), tuple(processor.image_std))
