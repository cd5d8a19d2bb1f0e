"""Checkpoints of real trainings: whatever wraps the tensors, the right ones are loaded, and nothing is executed."""

from __future__ import annotations

import argparse
import collections
import datetime
import io
import json
import os
import pickle
import random
import re
import sys
import types
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor, nn

from kornia_tinyvit import ImageClassifier, TinyViT, TinyViTConfig, load_checkpoint, save_checkpoint
from kornia_tinyvit.checkpoints import read_checkpoint
from kornia_tinyvit.detection import TinyViTDetector
from kornia_tinyvit.preprocessing import Preprocessing
from kornia_tinyvit.sam.embedding import fingerprint
from kornia_tinyvit.semantic import SemanticSegmenter
from tests.conftest import SHALLOW
from tests.fuzz.files import Code
from tests.fuzz.harness import RAN, Target, mutate
from tests.fuzz.known import Verdict, check, same
from tests.fuzz.networks import network, sam

VALID, OPEN, INVALID = Verdict.VALID, Verdict.OPEN, Verdict.INVALID
State = dict[str, Tensor]


@cache
def _template() -> State:
    return {name: each.clone() for name, each in network().state_dict().items()}


@cache
def _target() -> TinyViT:
    return TinyViT(**SHALLOW)


def weights(rng: random.Random) -> State:
    """Return weights that no other case has."""
    generator = torch.Generator().manual_seed(rng.getrandbits(40))
    return {
        name: each + 0.1 * torch.rand(each.shape, generator=generator) if each.is_floating_point() else each.clone()
        for name, each in _template().items()
    }


#: The layout of timm (tiny_vit.py), whose downsampling starts a stage.
_TIMM = (
    (r"^layers\.(\d)\.downsample\.", lambda found: f"stages.{int(found[1]) + 1}.downsample."),
    (r"^layers\.", "stages."),
    (r"^patch_embed\.seq\.0\.", "patch_embed.conv1."),
    (r"^patch_embed\.seq\.2\.", "patch_embed.conv2."),
    (r"^norm_head\.", "head.norm."),
    (r"^head\.(weight|bias)$", r"head.fc.\1"),
    (r"\.c\.weight$", ".conv.weight"),
)  # fmt: skip


def timm_name(name: str) -> str:
    head = name.startswith("head.")
    for pattern, new in _TIMM:
        if head == pattern.startswith(r"^head"):
            name = re.sub(pattern, new, name)
    return name


def transformers_name(name: str) -> str:
    return name.replace("head.", "classifier.") if name.startswith("head.") else "tinyvit.network." + name


LAYOUTS: dict[str, Callable[[str], str]] = {
    "official": lambda name: name,
    "timm": timm_name,
    "transformers": transformers_name,
}
PREFIXES = (
    "module.",
    "_orig_mod.",
    "model.",
    "net.",
    "backbone.",
    "network.",
    "_forward_module.",
    "encoder.",
    "student.",
)


def prefix(rng: random.Random) -> str:
    return "".join(rng.choice(PREFIXES) for _ in range(rng.choice((0, 1, 1, 1, 2, 3))))


def wrapped_inside(rng: random.Random, state: State) -> State:
    """Rename the tensors of one part as if it had been compiled or made parallel."""
    inner = rng.choice(("_orig_mod.", "module."))
    part = rng.choice(("layers.1.", "layers.", "patch_embed.", "layers.2.blocks.0.", "layers.1.blocks.0.attn."))
    return {part + inner + name[len(part) :] if name.startswith(part) else name: each for name, each in state.items()}


@contextmanager
def foreign_module(name: str) -> Iterator[types.ModuleType]:
    """A module that exists while a file is written, and not when it is read."""
    module = types.ModuleType(name)
    parts = [name.rsplit(".", depth)[0] for depth in range(name.count(".") + 1)]
    before = {part: sys.modules.get(part) for part in parts}
    sys.modules.update(dict.fromkeys(parts, module))
    try:
        yield module
    finally:
        for part, old in before.items():
            if old is None:
                del sys.modules[part]
            else:
                sys.modules[part] = old


def foreign(rng: random.Random, module: types.ModuleType) -> Any:
    """Return an object of a class that will not exist."""
    kind = rng.choice(("dict", "list", "object", "slots", "enum", "tuple", "str", "call", "reduce"))
    base: Any = {"dict": dict, "list": list, "tuple": tuple, "str": str}.get(kind, object)
    members: dict[str, Any] = {"__module__": module.__name__}
    if kind == "slots":
        members |= {"__slots__": ("a",)}
    if kind == "reduce":
        members |= {"__reduce__": lambda self: (type(self), (1, "x"), {"state": 3}),
                    "__init__": lambda self, *_: None}  # fmt: skip
    name = f"Config{len(vars(module))}"
    made: Any = type(name, (base,), members)
    if kind == "enum":
        import enum

        made = enum.Enum(name, ["A", "B"], module=module.__name__)
    setattr(module, name, made)
    if kind == "enum":
        return made.A
    if kind in ("dict", "list", "tuple", "str"):
        item = made({"a": [1]} if kind == "dict" else "ab")
        if kind != "str" and kind != "tuple":
            item.extra = {"nested": [1, 2]}
        return item
    if kind == "call":
        return made
    item = made()
    if kind != "reduce":
        item.a = [1, {"b": 2}]
    return item


def junk(rng: random.Random, module: types.ModuleType) -> Any:
    """Return what trainings store beside the weights."""
    return rng.choice((
        lambda: argparse.Namespace(lr=1e-3, model="tiny_vit_5m_224", path=Path("a/b")),
        lambda: foreign(rng, module), lambda: foreign(rng, module), lambda: [foreign(rng, module), {"a": 1}],
        lambda: np.float64(0.93), lambda: np.random.default_rng(0).bit_generator.state, lambda: np.arange(3),
        lambda: Path("/data/imagenet"), lambda: datetime.datetime(2026, 1, 1), lambda: {1, 2}, lambda: 3,
        lambda: torch.device("cpu"), lambda: torch.Size((1, 2)), lambda: torch.float16, torch.get_rng_state,
        lambda: {"state": {0: {"exp_avg": torch.zeros(3)}}, "param_groups": [{"lr": 1e-3, "params": [0]}]},
        lambda: collections.defaultdict(list, a=[1]), lambda: collections.OrderedDict(a=1), lambda: complex(1, 2),
        lambda: slice(3), lambda: b"bytes", lambda: bytearray(b"ab"), lambda: None, lambda: "text", lambda: 10**40,
        lambda: nn.CrossEntropyLoss(weight=torch.ones(3)), lambda: random.Random(0).getstate(),
    ))()  # fmt: skip


CONTAINERS = ("model", "state_dict", "model_state_dict", "net", "module", "network", "weights", "params")
SURE = CONTAINERS[:3]
BESIDE = ("epoch", "args", "config", "optimizer", "hyper_parameters", "callbacks", "best_acc", "rng", "scaler", "cfg")


def container(rng: random.Random, state: Mapping[str, Tensor], module: types.ModuleType) -> tuple[Any, Verdict, str]:
    """Return the content of a training's checkpoint, and its keys in words."""
    content: Any = dict(state) if rng.random() < 0.5 else collections.OrderedDict(state)
    verdict, keys = VALID, "a bare state dict"
    for _ in range(rng.choice((0, 1, 1, 1, 2))):
        key = rng.choice(SURE if rng.random() < 0.8 else CONTAINERS)
        verdict, keys = verdict if key in SURE else OPEN, f"{key!r} with junk"
        beside = {name: junk(rng, module) for name in rng.sample(BESIDE, rng.choice((0, 1, 2, 4)))}
        content = rng.choice((beside | {key: content}, {key: content, **beside}))
    return content, verdict, keys


@dataclass(frozen=True)
class Written:
    """A checkpoint, and what is known of it."""

    path: Path
    state: State
    verdict: Verdict
    detail: str
    left_out: tuple[str, ...] = ()
    ema: State = field(default_factory=dict)


def write(rng: random.Random, folder: Path, content: Any, settings: Mapping[str, Any]) -> Path:
    path = folder / ("a" + rng.choice((".pt", ".pth", ".ckpt", ".bin", ".pth.tar", "")))
    torch.save(content, path, **settings)
    return path


def training(rng: random.Random, folder: Path) -> Written:
    """A file of torch.save."""
    state = weights(rng)
    layout = rng.choice(tuple(LAYOUTS))
    outer, details = prefix(rng), [layout]
    stored, wanted = dtyped(rng, state)
    if rng.random() < 0.2 and layout == "official":
        stored = wrapped_inside(rng, stored)
        details.append("a wrapped part")
    named = {outer + LAYOUTS[layout](name): each for name, each in stored.items()}
    verdict, left_out = VALID, []
    if outer:
        details.append("prefixes")
    extra = rng.choice(("n_averaged", "criterion.weight", "loss_fn.class_weights", "", "", ""))
    if extra and not (extra == "n_averaged" and not outer):
        named = {extra: torch.tensor(7) if extra == "n_averaged" else torch.ones(7)} | named
        left_out.append(extra)
        details.append(extra)
        verdict = VALID if outer else OPEN
    if rng.random() < 0.2:  # buffers of older releases
        name = outer + LAYOUTS[layout]("layers.1.blocks.0.attn.attention_bias_idxs")
        named[name] = torch.zeros(4, 4, dtype=torch.long)
    settings: dict[str, Any] = {} if rng.random() < 0.7 else {"_use_new_zipfile_serialization": False}
    if rng.random() < 0.15:  # nothing but tensors by name
        path = folder / rng.choice(("a.safetensors", "a.bin", "a.pt"))
        path.write_bytes(save({name: each.contiguous().clone() for name, each in named.items()}))
        return Written(path, wanted, verdict, ", ".join((*details, "safetensors")), tuple(left_out))
    with foreign_module(
        rng.choice(("yacs.config", "fastcore.foundation", "omegaconf.dictconfig", "__main__x"))
    ) as module:
        content, found, keys = container(rng, named, module)
        ema: State = {}
        if rng.random() < 0.2 and "state_dict" in content:
            ema = {name: each + 1 if each.is_floating_point() else each for name, each in named.items()}
            content["state_dict_ema"] = ema
        path = write(rng, folder, content, settings)
    verdict = found if verdict is VALID else verdict
    return Written(path, wanted, verdict, ", ".join((*details, keys, *settings)), tuple(left_out), ema)


def whole_modules(rng: random.Random, folder: Path) -> None:
    """A pickled network, or a pickled module of a foreign class that holds one."""
    state = weights(rng)
    model = TinyViT(**SHALLOW)
    model.load_state_dict(state)
    if rng.random() < 0.3:
        model.requires_grad_(False).half()
        state = {name: each.half().to(each.dtype) for name, each in state.items()}
    with foreign_module("project.models") as module:
        made: Any = rng.choice((
            lambda: model, lambda: nn.DataParallel(model), lambda: nn.Sequential(nn.Identity(), model),
            lambda: foreign_network(module, model), lambda: torch.optim.swa_utils.AveragedModel(model),
        ))()  # fmt: skip
        detail = type(made).__name__
        path = write(rng, folder, made if rng.random() < 0.5 else {"epoch": 1, "model": made}, {})
    check(
        VALID, "a pickled module", lambda: loaded(rng, path), lambda answer: compare_state(answer[0], state, detail),
        detail=detail,
    )  # fmt: skip


def foreign_network(module: types.ModuleType, model: TinyViT) -> nn.Module:
    """Return a module of a class that will not exist, as Lightning's."""
    kind: Any = type("LitModel", (nn.Module,), {"__module__": module.__name__})
    module.LitModel = kind  # type: ignore[attr-defined]
    made: nn.Module = kind()
    made.net, made.criterion, made.lr = model, nn.CrossEntropyLoss(weight=torch.ones(7)), 1e-3
    return made


def dtyped(rng: random.Random, state: State) -> tuple[State, State]:
    """Return tensors as trainings store them, and their values."""
    kind = rng.randrange(8)
    if kind == 0:
        lower = {name: each.to(rng.choice((torch.float16, torch.bfloat16, torch.float64))) if
                 each.is_floating_point() else each for name, each in state.items()}  # fmt: skip
        return lower, {name: each.to(state[name].dtype) for name, each in lower.items()}
    if kind == 1:
        parameters: Any = {
            name: nn.Parameter(each) if each.is_floating_point() else each for name, each in state.items()
        }
        return parameters, state
    if kind == 2:  # views of one storage
        flat = torch.cat([each.flatten() for each in state.values() if each.is_floating_point()])
        views, start = {}, 0
        for name, each in state.items():
            views[name] = flat[start : start + each.numel()].view(each.shape) if each.is_floating_point() else each
            start += each.numel() if each.is_floating_point() else 0
        return views, state
    if kind == 3:
        return {name: each.mT.contiguous().mT if each.ndim == 2 else each for name, each in state.items()}, state
    return state, state


def compare_state(found: Mapping[str, Tensor], wanted: State, detail: str) -> None:
    missing = sorted(wanted.keys() - found.keys())
    assert not missing, f"tensors are missing: {detail}: {missing[:3]}"
    for name, each in wanted.items():
        same(found[name], each, "a tensor", 0.0, f"{name}, {detail}")


def loaded(rng: random.Random, path: Path) -> tuple[Mapping[str, Tensor], tuple[str, ...]]:
    """Read a file in one of the ways; return the tensors and what was left out."""
    how = rng.randrange(4)
    if how == 0:
        checkpoint = read_checkpoint(path)
        return {name: each.float() if each.is_floating_point() else each for name, each in
                checkpoint.state_dict.items()}, checkpoint.left_out  # fmt: skip
    if how == 1:
        return TinyViT.from_config(pretrained=path).state_dict(), ()
    report = load_checkpoint(_target(), path)
    return _target().state_dict(), report.left_out


def trainings(rng: random.Random, folder: Path) -> None:
    written = training(rng, folder)

    def compare(answer: tuple[Mapping[str, Tensor], tuple[str, ...]]) -> None:
        compare_state(answer[0], written.state, written.detail)
        if written.ema:
            average = read_checkpoint(written.path, use_ema=True).state_dict
            wanted = {name: each + 1 if each.is_floating_point() else each for name, each in written.state.items()}
            for name, each in wanted.items():
                same(average[name], each, "a moving average", 0.05, f"{name}, {written.detail}")
        unreported = [name for name in written.left_out if answer[1] and not any(name in each for each in answer[1])]
        assert not unreported, f"what was left out is not reported: {unreported}, {written.detail}"

    check(written.verdict, "a training's checkpoint", lambda: loaded(rng, written.path), compare, detail=written.detail)


def hostile(rng: random.Random, folder: Path) -> None:
    """A file that would run code, with or without right weights beside it."""
    ran, state = folder / RAN, weights(rng)
    path = folder / ("a" + rng.choice((".pt", ".pth", ".ckpt", ".bin", ".safetensors")))
    if rng.random() < 0.3:
        path.write_bytes(raw_pickle(rng, ran))
        check(INVALID, "a pickle of code", lambda: loaded(rng, path), lambda _: None)
        return
    second = folder / "second.pt"
    torch.save(Code(os.system, f"touch '{ran}'"), second)
    code = rng.choice((
        Code(os.system, f"touch '{ran}'"), Code(eval, f"open({str(ran)!r}, 'w')"), Code(open, str(ran), "w"),
        Code(exec, f"open({str(ran)!r}, 'w')"), Code(Path.touch, ran), Code(torch.hub.load, str(folder), "x"),
        Code(torch.load, str(second)), Code(pickle.loads, pickle.dumps(Code(os.mkdir, str(ran)))),
        Code(torch.storage._load_from_bytes, second.read_bytes()), Code(np.load, str(second), None, True),
Code(map, os.mkdir, [str(ran)]), Code(os.mkdir, str(ran)),
        Stateful(ran), Code(collections.deque, Code(map, os.mkdir, [str(ran)])),
    ))  # fmt: skip
    content: Any = {"model": state, "x": code}
    wanted = state
    if rng.random() < 0.3:
        content = {"model": {**state, "head.weight": code}}
        wanted = {name: each for name, each in state.items() if not name.startswith("head.")}
    elif rng.random() < 0.3:
        content = {"model": state, "args": argparse.Namespace(x=[code]), "y": Code(Later, code)}
    if rng.random() < 0.6:
        torch.save(content, path, _use_new_zipfile_serialization=rng.random() < 0.6)
    else:
        path.write_bytes(pickle.dumps(content, protocol=rng.randrange(2, 6)))
    check(OPEN, "a file with code", lambda: loaded(rng, path), lambda answer: compare_state(answer[0], wanted, "code"))


class Later(list):  # type: ignore[type-arg]
    """A harmless class of this file."""


class Stateful:
    """A class whose ``__setstate__`` runs code."""

    def __init__(self, ran: Path) -> None:
        self.ran = str(ran)

    def __setstate__(self, state: Any) -> None:
        Path(state["ran"]).touch()


def raw_pickle(rng: random.Random, ran: Path) -> bytes:
    """Return pickled instructions that no ``__reduce__`` writes."""
    command = f"touch {ran}".encode()
    text = b"\x8c" + bytes((len(command),)) + command if len(command) < 256 else b""

    def name(module: bytes, attribute: bytes) -> bytes:
        if rng.random() < 0.5 and b"." not in attribute:
            return b"c" + module + b"\n" + attribute + b"\n"
        return b"\x8c" + bytes((len(module),)) + module + b"\x8c" + bytes((len(attribute),)) + attribute + b"\x93"

    module, attribute = rng.choice((
        (b"os", b"system"), (b"posix", b"system"), (b"torch", b"hub.os.system"), (b"collections", b"_sys.modules"),
        (b"subprocess", b"getoutput"), (b"torch._utils", b"torch.os.system"), (b"numpy", b"f2py.os.system"),
        (b"argparse", b"_os.system"), (b"pathlib", b"os.system"), (b"commands", b"getoutput"),
    ))  # fmt: skip
    body = rng.choice((
        name(module, attribute) + text + b"\x85R",  # REDUCE
        b"(" + text + b"i" + module + b"\n" + attribute + b"\n" if b"." not in attribute else
        name(module, attribute) + text + b"\x85R",  # INST
        b"(" + name(module, attribute) + text + b"o",  # OBJ
        name(module, attribute) + text + b"\x85\x81",  # NEWOBJ
    ))  # fmt: skip
    return b"\x80\x04" + body + b"."


def damaged(rng: random.Random, folder: Path) -> None:
    """A file of which bytes were changed: an archive's tensors are right, or it is rejected."""
    state = weights(rng)
    file = io.BytesIO()
    torch.save({"model": state, "args": argparse.Namespace(lr=1)}, file)
    path = folder / "a.pt"
    path.write_bytes(mutate(rng, file.getvalue(), 4096))

    def compare(answer: tuple[Mapping[str, Tensor], tuple[str, ...]]) -> None:
        with suppress(UnicodeDecodeError, zipfile.BadZipFile), zipfile.ZipFile(path) as archive:
            if archive.testzip() is None:  # the checksums hold
                compare_shapes(answer[0])

    def compare_shapes(found: Mapping[str, Tensor]) -> None:
        for name, each in state.items():
            assert found[name].shape == each.shape, f"a tensor has another shape: {name}"

    check(OPEN, "a damaged file", lambda: loaded(rng, path), compare)


def a_preprocessing(rng: random.Random) -> Preprocessing:
    channels = range(3)
    return Preprocessing(
        img_size=rng.choice((32, 64, 96)),
        crop_fraction=rng.choice((None, 0.5, 0.9, 0.95, 1.0)),
        interpolation=rng.choice(("bicubic", "bilinear", "nearest")),
        mean=tuple(round(rng.random(), 3) for _ in channels),
        std=tuple(round(0.1 + rng.random(), 3) for _ in channels),
    )


def timm_folder(rng: random.Random, folder: Path, state: State, wanted: Preprocessing) -> Path:
    """A folder as timm's save_for_hf writes it."""
    side = wanted.img_size
    arguments = {key: list(SHALLOW[key]) for key in ("embed_dims", "depths", "num_heads", "window_sizes")}  # type: ignore[call-overload]
    settings: dict[str, Any] = {
        "input_size": [3, side, side], "interpolation": wanted.interpolation, "mean": wanted.mean, "std": wanted.std,
        "crop_mode": "squash" if wanted.crop_fraction is None else "center", "num_classes": 7,
    }  # fmt: skip
    settings["crop_pct"] = 1.0 if wanted.crop_fraction is None else wanted.crop_fraction
    config = {"architecture": "tiny_vit_5m_224", "num_classes": 7, "model_args": arguments, "pretrained_cfg": settings}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors").write_bytes(save({timm_name(name): each for name, each in state.items()}))
    return folder


def transformers_folder(rng: random.Random, folder: Path, state: State, wanted: Preprocessing) -> Path:
    """A folder with the image processor of ViT or of this package."""
    config = {
        "model_type": "tinyvit", "architectures": ["TinyVitForImageClassification"], "image_size": 64,
        "num_channels": 3, "id2label": {str(index): f"c{index}" for index in range(7)},
        **{key: list(SHALLOW[key]) for key in ("embed_dims", "depths", "num_heads", "window_sizes")},  # type: ignore[call-overload]
    }  # fmt: skip
    side = {"height": wanted.img_size, "width": wanted.img_size}
    processor: dict[str, Any] = {
        "image_mean": wanted.mean, "image_std": wanted.std, "size": side,
        "resample": {"nearest": 0, "bilinear": 2, "bicubic": 3}[wanted.interpolation],
        "do_center_crop": wanted.crop_fraction is not None, "crop_pct": wanted.crop_fraction or 1.0,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    (folder / "model.safetensors").write_bytes(save({transformers_name(name): each for name, each in state.items()}))
    return folder


def own_file(rng: random.Random, folder: Path, state: State, wanted: Preprocessing) -> Path:
    model = TinyViT(**SHALLOW)
    model.load_state_dict(state)
    model.preprocessing = wanted
    return save_checkpoint(model, folder / "a.safetensors")


def preprocessing(rng: random.Random, folder: Path) -> None:
    """The preprocessing of a checkpoint reaches whatever uses its weights."""
    state, wanted = weights(rng), a_preprocessing(rng)
    kind = rng.choice((timm_folder, transformers_folder, own_file))
    path = kind(rng, folder, state, wanted)
    what = f"the preprocessing of {kind.__name__.replace('_', ' ')}"
    again = rng.random() < 0.3

    def use() -> tuple[str, Any]:
        source = path
        if again:  # through a file of this package
            source = save_checkpoint(TinyViT.from_config(pretrained=path), folder / "again.safetensors")
        which = rng.randrange(4)
        if which == 0:
            return "TinyViT", TinyViT.from_config(pretrained=source)
        if which == 1:
            return "SemanticSegmenter", SemanticSegmenter.from_config(pretrained=source, num_classes=2, width=8)
        if which == 2 and rng.random() < 0.3:
            options: Any = {"hidden_dim": 32, "num_queries": 8, "decoder_layers": 1}
            return "TinyViTDetector", TinyViTDetector.from_config(pretrained=source, num_classes=2, **options)
        return "ImageClassifier", ImageClassifier.from_config(pretrained=source)

    def compare(answer: tuple[str, Any]) -> None:
        name, model = answer
        if name == "ImageClassifier":
            found = model.preprocessing.settings
        else:
            found = (model if name == "TinyViT" else model.backbone).preprocessing
        assert found == wanted, f"{what} is lost: {name} has {found}, not {wanted}"
        backbone = {"TinyViT": model, "ImageClassifier": getattr(model, "model", None)}.get(name)
        if backbone is not None:
            compare_state(backbone.state_dict(), state, what)
        else:
            same(model.mean.flatten(), torch.tensor(wanted.mean), f"the mean of {name}", 1e-6)

    check(VALID, what, use, compare)


def wrapped_parts(rng: random.Random, folder: Path) -> None:
    """Networks with compiled or parallel parts are saved and read like others."""
    state = weights(rng)
    wrap: Any = rng.choice((nn.DataParallel, torch.compile, nn.DataParallel))
    which = rng.randrange(10)
    detail = wrap.__name__
    if which == 0:
        part = sam().image_encoder
        wanted = fingerprint(part)
        found = fingerprint(wrap(part))
        assert found == wanted, f"the fingerprint of a wrapped encoder differs: {detail}"
        return
    model = TinyViT(**SHALLOW)
    model.load_state_dict(state)
    model.eval()
    owner, name = rng.choice((
        (model, "patch_embed"), (model.layers, "1"), (model.layers[1].blocks, "0"), (model.layers[2].blocks[0], "attn"),
        (model.layers[1].blocks[0], "mlp"),
    ))  # fmt: skip
    setattr(owner, name, wrap(getattr(owner, name))) if not name.isdigit() else owner.__setitem__(
        int(name), wrap(owner[int(name)])
    )
    path = folder / "a.safetensors"
    check(
        VALID, "a network with a wrapped part", lambda: save_and_read(model, path),
        lambda found: compare_state(found, state, detail), detail=f"{detail} {name}",
    )  # fmt: skip


def save_and_read(model: TinyViT, path: Path) -> Mapping[str, Tensor]:
    save_checkpoint(model, path)
    return TinyViT.from_config(pretrained=path).state_dict()


@cache
def rows_of_1k() -> Tensor:
    """The classes of ImageNet-1k in the 21,841 of ImageNet-22k, as the authors' file lists them."""
    import kornia_tinyvit

    text = (Path(kornia_tinyvit.__file__).parent / "assets" / "imagenet_22k_to_1k.txt").read_text()
    return torch.tensor([int(line) for line in text.split()])


def big_head(rng: random.Random, folder: Path) -> None:
    """A head of ImageNet-22k loaded for ImageNet-1k: the rows of the classes."""
    state = weights(rng)
    generator = torch.Generator().manual_seed(rng.getrandbits(40))
    dims = state["head.weight"].shape[1]
    state["head.weight"] = torch.randn(21841, dims, generator=generator)
    state["head.bias"] = torch.randn(21841, generator=generator)
    path = folder / "a.pth"
    torch.save({"model": state}, path)
    config = TinyViTConfig(**SHALLOW | {"num_classes": 1000})
    rows = rows_of_1k()
    wanted = dict(state)
    for name in ("head.weight", "head.bias"):
        wanted[name] = state[name][rows]
        wanted[name][rows < 0] = wanted[name][rows >= 0].mean(0)  # what ImageNet-22k does not have (main.py of Cream)
    check(
        VALID, "a head of ImageNet-22k", lambda: TinyViT.from_config(config, pretrained=path).state_dict(),
        lambda found: compare_state(found, wanted, "22k to 1k"),
    )  # fmt: skip


KINDS = (
    *(trainings,) * 10, whole_modules, *(hostile,) * 4, *(damaged,) * 2, *(preprocessing,) * 4, *(wrapped_parts,) * 2
)  # fmt: skip


def known_checkpoints(rng: random.Random, folder: Path) -> None:
    kind = big_head if rng.random() < 0.02 else rng.choice(KINDS)
    kind(rng, folder)


TARGETS = (Target("checkpoints with known tensors", known_checkpoints, num_cases=150),)
