"""Known faults as patches, which show what the fuzzing finds: `python benchmarks/fuzz.py --mutants`."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from torch import Tensor, nn

from kornia_tinyvit import ImageClassifier, TinyViT, classification, folding, images, layers, model, modules
from kornia_tinyvit.checkpoints import adaptation, layouts, loading, tensors
from kornia_tinyvit.checkpoints.tensors import CheckpointError
from kornia_tinyvit.contraction import inheritance
from kornia_tinyvit.data import classification as labeled
from kornia_tinyvit.data import coco, descriptions, folders, instances, masks, parquet, segmentation, tars, yolo
from kornia_tinyvit.data import datasets as data_sets
from kornia_tinyvit.preprocessing import default_preprocessing

IMAGES, CHECKPOINTS = "images with known pixels", "checkpoints with known tensors"
DATA, MODULES = "data sets with known samples", "modules with known outputs"
Patch = Callable[[], AbstractContextManager[object]]


@dataclass(frozen=True)
class Mutant:
    """A fault that is put back.

    Args:
        entry: name of the fault.
        what: what is wrong.
        target: the target that should find it; ``None`` if none can.
        patch: context in which the package has the fault.
        note: why no target can find it.
    """

    entry: str
    what: str
    target: str | None
    patch: Patch
    note: str = ""


def patched(owner: Any, name: str, value: Any) -> Patch:
    """Return a patch of one attribute, which must exist."""
    return lambda: mock.patch.object(owner, name, value)


def together(*patches: Patch) -> Patch:
    @contextmanager
    def all_of_them() -> Iterator[None]:
        with ExitStack() as stack:
            for patch in patches:
                stack.enter_context(patch())
            yield

    return all_of_them


# --- Data sets ------------------------------------------------------------------------------------------------------


def without_255(ids: NDArray[Any]) -> NDArray[Any]:
    return np.array([each for each in np.unique(ids) if each not in (0, 255)], dtype=np.int64)


def fill_by_pillow(rings: Any, size: tuple[int, int]) -> NDArray[np.bool_]:
    mask = Image.new("1", (size[1], size[0]))
    for ring in rings:
        if len(ring) > 1:
            ImageDraw.Draw(mask).polygon([tuple(corner) for corner in ring], fill=1)
    return np.array(mask)


def strokes(file: Path, size: tuple[int, int]) -> list[NDArray[np.bool_]]:
    """Read each line as an outline, also that of a box: its center and its sides are two corners."""
    yolo._read_labels(file)  # its checks
    found = []
    for line in file.read_text("utf-8-sig").splitlines():
        numbers = [float(word) for word in line.split()[1:]]
        corners = [(x * size[1], y * size[0]) for x, y in zip(numbers[::2], numbers[1::2], strict=True)]
        found += [fill_by_pillow([corners], size)] if corners else []
    return found


def merge_by_stem(path: Path, content: dict[str, Any], folder: Any) -> Any:
    """Give the annotations of ``a.jpg`` and ``a.png`` to the first of them."""
    first: dict[str, Any] = {}
    ids = {image["id"]: first.setdefault(Path(image["file_name"]).stem, image["id"]) for image in content["images"]}
    moved = [each | {"image_id": ids[each["image_id"]]} for each in content["annotations"]]
    return MATCH_IMAGES(path, content | {"annotations": moved}, folder)


MATCH_IMAGES = coco._match_images


def fill_anything(rings: Any, size: tuple[int, int]) -> NDArray[np.bool_]:
    """Fill what can be filled."""
    valid = [ring for ring in rings if len(ring) > 2 and np.isfinite(np.array(ring, float)).all()]
    return masks.fill_polygons(valid, size)


UNCHECKED = together(
    patched(instances, "check_size", lambda *_: None),
    patched(coco, "_is_segmentation", lambda value: isinstance(value, (list, dict))),
    patched(coco, "_check_corners", lambda *_: None),
    patched(coco, "fill_polygons", fill_anything),
)


def stated_entry(root: Path, entry: str) -> Iterator[Any]:
    """Take a folder as it is stated, or one folder up, as Ultralytics does not for Roboflow's files."""
    stated = root / entry
    found = stated if stated.exists() else root / ".." / entry
    if not found.exists():
        raise FileNotFoundError(f"There are no images {stated}, nor {found}.")
    return FIND_ENTRY(root, entry)


FIND_ENTRY = yolo._find_entry


def walk(folder: str, parts: tuple[str, ...], above: Any, listing: Any, known: Any) -> None:
    """List a folder as `os.walk` does: links to folders are skipped, dangling links are images."""
    for parent, names, files in os.walk(folder):
        below = (*parts, *Path(parent).relative_to(folder).parts)
        names[:] = [name for name in names if not folders.is_junk(name)]
        listing.folders += [(*below, name) for name in names if not below or not Path(parent, name).is_symlink()]
        known_files = [name for name in files if Path(name).suffix.lower() in known and not folders.is_junk(name)]
        listing.images += [(*below, name) for name in known_files]


def innermost(self: Any, split: str, path: Path) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Take the folders inside of a single top-level folder as the classes of a tar file."""
    tops = self._below(())
    return ((tops[0],), ()) if len(tops) == 1 and self._below((tops[0],)) else ARCHIVE_ROOT(self, split, path)


ARCHIVE_ROOT = tars.Archive.root


def by_position(ours: Any, theirs: Any, *_: Any, **__: Any) -> list[int] | None:
    """Match classes by position where no name is common."""
    if ours is None or theirs is None or not set(ours) & set(theirs):
        return None
    return MATCH_CLASSES(ours, theirs)


MATCH_CLASSES = data_sets.match_classes
read_unmarked = partial(Path.read_text, encoding="utf-8")


# --- Images ---------------------------------------------------------------------------------------------------------


def clipped(image: Image.Image, channels: int) -> Tensor:
    """Convert images of more than 8 bits as Pillow does, which clips them; 32-bit integers are divided by 65,535."""
    if image.mode == "F":
        image = image.convert("L")
    elif image.mode == "I":
        gray = np.asarray(image, dtype=np.float32) / 65535
        return torch.from_numpy(gray.clip(0, 1))[None].expand(channels, -1, -1)
    return CONVERT_PIL(image, channels)


CONVERT_PIL = images._convert_pil


def rows_as_gray(image: NDArray[Any]) -> Tensor:
    """Take an array (1, H, W) as a gray image, also (1, 1000, 3)."""
    if image.ndim == 3 and image.shape[0] == 1:
        return ARRAY_TO_TENSOR(image[0])
    return ARRAY_TO_TENSOR(image)


ARRAY_TO_TENSOR = images._array_to_tensor


# --- Checkpoints ----------------------------------------------------------------------------------------------------


def only_tensors(path: Path) -> tuple[Any, dict[str, str]]:
    """Read PyTorch files by torch's own reader, which knows no foreign classes."""
    content, metadata = READ_TENSORS(path)
    if not tensors._is_safetensors(path):
        try:
            torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:
            raise CheckpointError(f"{path} is damaged or contains other objects than tensors: {error}") from error
    return content, metadata


READ_TENSORS = tensors.read_tensors


def trusting(path: Path) -> tuple[Any, dict[str, str]]:
    """Unpickle a file, which executes what is in it."""
    if not tensors._is_safetensors(path):
        with suppress(Exception):
            torch.load(path, map_location="cpu", weights_only=False)
    return READ_TENSORS(path)


def few_prefixes(content: Any, use_ema: bool = False) -> Any:
    """Know ``module.``, ``_orig_mod.`` and ``model.`` as prefixes, and no other."""
    found = FIND_NETWORK(content, use_ema)
    leaves = list(layouts._leaves(content, {}))
    anchors = [leaf.path[-1] for leaf in leaves if leaf.path[-1].endswith(tuple(layouts._ANCHORS.values()))]
    known = re.compile(
        r"(module\.|_orig_mod\.|model\.|tinyvit\.network\.|network\.|image_encoder\.)*(layers|stages)\.0"
    )
    if not all(known.match(anchor) for anchor in anchors):
        raise ValueError("has no TinyViT in a known layout.")
    return found


FIND_NETWORK = loading.find_network


def default_fields(fields: Mapping[str, Any], config: Any, source: str) -> Any:
    """Ignore the preprocessing that a file states."""
    return default_preprocessing(config)


# --- Modules --------------------------------------------------------------------------------------------------------


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Switch the mode of a module that other threads may use."""
    training = [part for part in module.modules() if part.training]
    for part in training:
        part.training = False
    try:
        yield
    finally:
        for part in training:
            part.training = True


def switching(predict: Any) -> Any:
    def predict_in_evaluation_mode(self: nn.Module, *arguments: Any, **settings: Any) -> Any:
        with evaluating(self):
            return predict(self, *arguments, **settings)

    return predict_in_evaluation_mode


def always_folded(self: Any) -> bool:
    """Look at the running statistics alone."""
    return not (self.bn.training or self.bn.running_mean is None or self.bn.running_var is None)


def flat_attention(self: Any, x: Tensor) -> Tensor:
    """Flatten the attended tokens whatever their strides in a traced graph."""
    q, k, v = self.qkv(self.norm(x)).unflatten(-1, (self.num_heads, 3, -1)).permute(3, 0, 2, 1, 4).unbind()
    bias = self.attention_bias().to(q.dtype)
    return self.proj(self.attend(q, k, v, bias.unsqueeze(0)).transpose(1, 2).flatten(2))


def embed_channels_last(self: Any, x: Tensor) -> Tensor:
    """Ask for a memory format that `vmap` does not know."""
    images.check_images(x, self.config.in_chans, 32)
    return self.patch_embed(x.contiguous(memory_format=torch.channels_last))


def blocks_by_super(self: Any, x: Tensor) -> Tensor:
    """Call the forward function of the base class, which TorchScript does not compile."""
    return super(model.Blocks, self).forward(x)


SWITCHED = together(
    patched(ImageClassifier, "predict", switching(ImageClassifier.predict)),
    patched(classification, "evaluation_copy", lambda module: module),
)


MUTANTS: tuple[Mutant, ...] = (
    Mutant("D1", "instance 255 of a mask is dropped", DATA, patched(masks, "_instance_ids", without_255)),
    Mutant("D1", "255 is unlabeled in masks of 0 and 255", DATA, patched(segmentation, "BINARY", {-1})),
    Mutant("D2", "lines with boxes are read as outlines", DATA, patched(yolo, "_read_masks", strokes)),
    Mutant(
        "D2", "rings of two corners are strokes", DATA,
        together(patched(coco, "_is_segmentation", lambda value: True), patched(coco, "fill_polygons", fill_by_pillow)),
    ),
    Mutant("D3", "COCO's masks are not checked", DATA, UNCHECKED),
    Mutant("D3", "annotations of a.jpg and a.png are merged", DATA, patched(coco, "_match_images", merge_by_stem)),
    Mutant("D4", "polygons of COCO are filled by Pillow", DATA, patched(coco, "fill_polygons", fill_by_pillow)),
    Mutant("D4", "polygons of YOLO are filled by Pillow", DATA, patched(yolo, "fill_polygons", fill_by_pillow)),
    Mutant("D5", "splits are classes", DATA, patched(labeled, "split_folders", lambda path: {})),
    Mutant("D5", "system files are images and classes", DATA, patched(folders, "is_junk", lambda name: name[0] == ".")),
    Mutant("D5", "links are not followed, or dangle", DATA, patched(folders, "_scan", walk)),
    Mutant("D5", "a nested folder is the class in a tar file", DATA, patched(tars.Archive, "root", innermost)),
    Mutant("D6", "class names of parquet files are ignored", DATA, patched(parquet, "_read_features", lambda _: {})),
    Mutant("D6", "classes without common names keep positions", DATA, patched(data_sets, "match_classes", by_position)),
    Mutant("D7", "byte order marks are part of the text", DATA, together(
        patched(descriptions, "read_text", read_unmarked), patched(yolo, "read_text", read_unmarked),
    )),
    Mutant("D7", "Roboflow's ../train/images is not found", DATA, patched(yolo, "_find_entry", stated_entry)),
    Mutant("D7", "outlines end at 1.0 exactly", DATA, patched(yolo, "_TOLERANCE", 0)),
    Mutant("D8", "float and 32-bit images are clipped", IMAGES, patched(images, "_convert_pil", clipped)),
    Mutant("D9", "values outside of [0, 1] pass", IMAGES, patched(images, "_check_values", lambda image: None)),
    Mutant("D9", "an array (1, 1000, 3) is gray", IMAGES, patched(images, "_array_to_tensor", rows_as_gray)),
    Mutant(
        "D10", "one class and batches larger than the data are accepted", None, nullcontext,
        "a warning and a default of the command `train`, not an answer",
    ),
    Mutant("W1", "foreign classes are rejected", CHECKPOINTS, patched(loading, "read_tensors", only_tensors)),
    Mutant("W1", "files are unpickled", CHECKPOINTS, patched(loading, "read_tensors", trusting)),
    Mutant("W1", "only three prefixes are known", CHECKPOINTS, patched(loading, "find_network", few_prefixes)),
    Mutant(
        "W2", "stored preprocessing is ignored", CHECKPOINTS, patched(loading, "read_preprocessing", default_fields)
    ),
    Mutant("W3", "wrappers inside are kept in names", CHECKPOINTS, patched(modules, "_WRAPPERS", frozenset())),
    Mutant("W4", "a head of 22k is set to zeros", CHECKPOINTS, patched(adaptation, "IMAGENET_22K", -1)),
    Mutant(
        "W5", "the guide's adapter is reloaded with other statistics", None, nullcontext,
        "a code block of the documentation, which its own test runs",
    ),
    Mutant("N1", "changed layers are folded", MODULES, patched(layers.ConvBN, "is_foldable", always_folded)),
    Mutant("N1", "changed layers are folded for inference", MODULES, patched(folding, "is_plain", isinstance)),
    Mutant("N1", "changed layers are inherited", MODULES, patched(inheritance, "_check_layers", lambda parent: None)),
    Mutant("N2", "torch.onnx.export needs no_grad", MODULES, patched(layers.Attention, "forward", flat_attention)),
    Mutant("N3", "vmap does not know the memory format", MODULES, patched(TinyViT, "_embed", embed_channels_last)),
    Mutant("N3", "TorchScript does not compile stages", MODULES, patched(model.Blocks, "forward", blocks_by_super)),
    Mutant("N4", "predict switches the mode of the network", MODULES, SWITCHED),
)  # fmt: skip
