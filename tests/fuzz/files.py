"""Hostile checkpoints, hub folders and record stores."""

from __future__ import annotations

import io
import json
import os
import pickle
import random
import struct
import zipfile
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from kornia_tinyvit import MobileSAM, TinyViT, load_checkpoint, save_checkpoint
from kornia_tinyvit.checkpoints import read_checkpoint
from kornia_tinyvit.checkpoints.hub import write_timm_folder
from kornia_tinyvit.contraction.journal import Journal
from kornia_tinyvit.detection import TinyViTDetector
from kornia_tinyvit.distillation import LabelStore, Manifest, StoreError
from kornia_tinyvit.sam import ImageEmbedding
from kornia_tinyvit.semantic import SemanticSegmenter
from tests.conftest import SHALLOW
from tests.distillation.helpers import write_records
from tests.fuzz.harness import RAN, Target, json_thing, mutate, tamper
from tests.fuzz.networks import detector, network, sam

MEGABYTE = 2**20


@cache
def contents() -> dict[str, bytes]:
    """Return the bytes of small valid files by their kind."""
    import tempfile

    state, buffers = network().state_dict(), {}
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        save_checkpoint(network(), root / "own.safetensors", [f"class {index}" for index in range(7)])
        detector().save(root / "detector.safetensors")
        torch.manual_seed(0)
        SemanticSegmenter(TinyViT(**SHALLOW | {"num_classes": 0}), num_classes=3).save(root / "segmenter.safetensors")
        buffers = {path.stem: path.read_bytes() for path in root.iterdir()}
    for name, settings in (("zip", {}), ("legacy", {"_use_new_zipfile_serialization": False})):
        file = io.BytesIO()
        torch.save({"model": state, "epoch": 3}, file, **settings)
        buffers[name] = file.getvalue()
    buffers["whole sam"] = save({name: each.contiguous() for name, each in sam().state_dict().items()})
    return buffers


@cache
def _fresh() -> tuple[TinyViT, dict[str, Tensor]]:
    torch.manual_seed(1)
    model = TinyViT(**SHALLOW)
    return model, {name: each.clone() for name, each in model.state_dict().items()}


def check_loaded(path: Any) -> None:
    """Load a file into a network; it is loaded whole and finite, or not at all."""
    model, before = _fresh()
    model.load_state_dict(before)
    try:
        load_checkpoint(model, path)
    except ValueError:
        same = all(torch.equal(each, before[name]) for name, each in model.state_dict().items())
        assert same, "a rejected file changed the network"
        raise
    found = read_checkpoint(path).state_dict
    for name, each in model.state_dict().items():
        assert not each.is_floating_point() or each.isfinite().all(), f"{name} is not finite"
        if name in found and found[name].shape == each.shape:
            assert torch.equal(each, found[name].to(each.dtype)), f"{name} was not loaded"


def safetensors_file(rng: random.Random, folder: Path) -> None:
    path = folder / rng.choice(("a.safetensors", "a.bin", "a"))
    content = contents()["own"]
    head = 8 + struct.unpack("<Q", content[:8])[0]
    how = rng.randrange(5)
    if how == 0:  # the length of the header lies
        length = rng.choice((0, 1, 7, head - 9, head, head + 8, 2**31, 2**40, 2**63, 2**64 - 1, rng.randrange(2**20)))
        content = struct.pack("<Q", length) + content[8:]
    elif how <= 2:  # valid JSON that says something else
        header = tamper(rng, json.loads(content[8:head]))
        text = json.dumps(header).encode()
        content = struct.pack("<Q", len(text)) + text + content[head:]
    else:
        content = mutate(rng, content, head)
    path.write_bytes(content)
    check_loaded(path)


def other_tensors(rng: random.Random, folder: Path) -> None:
    """Well-formed files of tensors that do not fit."""
    tensors = {name: each.clone() for name, each in network().state_dict().items()}
    for _ in range(rng.choice((1, 1, 2, 5))):
        name = rng.choice(list(tensors))
        tensors |= _changed(rng, name, tensors.pop(name))
    kind = rng.randrange(3)
    if kind == 0:
        path: Any = folder / "a.safetensors"
        metadata = {"kornia_tinyvit.config": json.dumps(tamper(rng, network().config.to_dict()))}
        path.write_bytes(save(_plain(tensors), rng.choice((None, metadata))))
    elif kind == 1:
        path = folder / "a.pt"
        torch.save(rng.choice((tensors, {"model": tensors}, {"state_dict": {"model": tensors}}, [tensors])), path)
    else:
        path = tensors if rng.random() < 0.8 else {**tensors, rng.choice((1, None, "x", ("a",))): json_thing(rng)}
    check_loaded(path)


def _plain(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    known = (torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool)
    dense = {name: each for name, each in tensors.items() if each.dtype in known and not each.is_sparse}
    return {name: each.contiguous().clone() for name, each in dense.items() if not each.is_meta}


def _changed(rng: random.Random, name: str, tensor: Tensor) -> dict[str, Tensor]:
    how = rng.randrange(9)
    if how == 0:
        return {}
    if how == 1:
        return {name + rng.choice((".x", "0", " ")): tensor}
    if how == 2:
        return {name: tensor, rng.choice(("", "x" * 999, "layers.0.blocks.99999999.x", "head.weight.", "ü")): tensor}
    if how == 3:
        types = (torch.float16, torch.int64, torch.uint8, torch.bool, torch.complex64, torch.float64)
        return {name: tensor.to(rng.choice(types))}
    if how == 4 and tensor.is_floating_point() and tensor.numel():
        flat = tensor.flatten().clone()
        flat[rng.randrange(len(flat))] = rng.choice((float("nan"), float("inf"), float("-inf")))
        return {name: flat.view(tensor.shape)}
    if how == 5:
        return {name: tensor[..., :-1] if tensor.ndim else tensor}
    if how == 6:
        return {name: tensor.unsqueeze(0) if rng.random() < 0.5 else tensor.flatten()}
    if how == 7 and tensor.ndim:
        return {name: torch.zeros(0, *tensor.shape[1:])}
    if how == 8 and tensor.ndim == 2:
        return {name: rng.choice((tensor.to_sparse(), tensor.T, torch.empty(tensor.shape, device="meta")))}
    return {name: torch.zeros(rng.choice(((), (1,), (2, 2), (1, 1, 1, 1))))}


class Code:
    """What a hostile pickle asks for."""

    def __init__(self, call: Any, *arguments: Any) -> None:
        self.call, self.arguments = call, arguments

    def __reduce__(self) -> Any:
        return self.call, self.arguments


def pickled_file(rng: random.Random, folder: Path) -> None:
    path = folder / rng.choice(("a.pt", "a.pth", "a.safetensors", "a.bin"))
    how = rng.randrange(4)
    if how == 0:
        ran = folder / RAN
        code = rng.choice((
            Code(os.system, f"touch '{ran}'"), Code(eval, f"open({str(ran)!r}, 'w')"), Code(open, str(ran), "w"),
            Code(exec, f"open({str(ran)!r}, 'w')"), Code(Path.touch, ran), Code(torch.hub.load, str(folder), "x"),
        ))  # fmt: skip
        held = rng.choice((code, {"model": code}, {"model": network().state_dict(), "x": code}))
        if rng.random() < 0.5:
            torch.save(held, path)
        else:
            path.write_bytes(pickle.dumps(held, protocol=rng.randrange(6)))
    elif how == 1:
        content = contents()[rng.choice(("zip", "legacy"))]
        path.write_bytes(mutate(rng, content, 4096))
    elif how == 2:  # an archive whose pickle was changed, with right checksums
        with zipfile.ZipFile(io.BytesIO(contents()["zip"])) as source, zipfile.ZipFile(path, "w") as target:
            chosen = rng.choice(source.namelist())
            for name in source.namelist():
                content = source.read(name)
                if name == chosen or (name.endswith("data.pkl") and rng.random() < 0.5):
                    content = mutate(rng, content, 600)
                if rng.random() > 0.01:
                    target.writestr(name, content)
    else:
        kind = rng.choice(("bomb", "stack", "text", "empty"))
        if kind == "bomb":
            with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as target:
                for name in ("archive/data.pkl", "archive/data/0", "archive/version"):
                    target.writestr(name, bytes(20 * MEGABYTE))
        elif kind == "stack":
            path.write_bytes(b"\x80\x02" + b"]" * 10**5 + b"a" * (10**5 - 1) + b".")
        else:
            path.write_bytes(b"" if kind == "empty" else b"Not Found" * 99)
    check_loaded(path)


def other_networks(rng: random.Random, folder: Path) -> None:
    """Files of whole detectors, segmenters and MobileSAMs."""
    name, build = rng.choice((
        ("detector", lambda path: TinyViTDetector.from_config(pretrained=path)),
        ("segmenter", lambda path: SemanticSegmenter.from_config(pretrained=path)),
        ("whole sam", lambda path: MobileSAM.from_config(pretrained=path, img_size=64)),
        ("own", lambda path: TinyViT.from_config(pretrained=path)),
    ))  # fmt: skip
    content = contents()[name]
    head = 8 + struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8:head])
    if rng.random() < 0.6:
        metadata = header.get("__metadata__", {})
        changed = {key: json.dumps(tamper(rng, json.loads(text))) for key, text in metadata.items() if text[0] in "[{"}
        header["__metadata__"] = metadata | changed
        if not changed:
            header = tamper(rng, header)
        text = json.dumps(header).encode()
        content = struct.pack("<Q", len(text)) + text + content[head:]
    else:
        content = mutate(rng, content, head)
    (folder / "a.safetensors").write_bytes(content)
    model = build(folder / "a.safetensors")
    assert all(each.isfinite().all() for each in model.state_dict().values()), "weights that are not finite"


def hub_folder(rng: random.Random, folder: Path) -> None:
    kinds = {
        "model_type": "tinyvit", "architectures": ["TinyVitForImageClassification"], "image_size": 64,
        "num_channels": 3, "embed_dims": [16, 16, 24, 32], "depths": [1, 1, 1, 1], "num_heads": [1, 2, 3, 4],
        "window_sizes": [4, 4, 5, 3], "id2label": {str(index): f"class {index}" for index in range(7)},
    }  # fmt: skip
    if rng.random() < 0.5:
        write_timm_folder(network(), folder, [f"class {index}" for index in range(7)])
        kinds = json.loads((folder / "config.json").read_text())
    else:
        save_checkpoint(network(), folder / "model.safetensors")
    text = json.dumps(tamper(rng, kinds))
    if rng.random() < 0.2:
        text = mutate(rng, text.encode()).decode("latin-1")
    (folder / "config.json").write_bytes(text.encode(rng.choice(("utf-8", "utf-16", "latin-1")), "replace"))
    model = TinyViT.from_config(pretrained=folder)
    assert model(torch.rand(1, 3, 32, 32)).isfinite().all()


def places(rng: random.Random, folder: Path) -> None:
    """Paths that are no plain files."""
    kind = rng.choice(("folder", "fifo", "loop", "gone", "long", "null", "device", "socket", "text", "dot"))
    path: Any = folder / "a.safetensors"
    if kind == "folder":
        path.mkdir()
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind == "loop":
        path.symlink_to(path)
    elif kind == "long":
        path = folder / ("x" * 5000 + ".safetensors")
    elif kind == "null":
        path = str(folder) + "/a\0b.safetensors"
    elif kind == "device":
        path = Path(rng.choice(("/dev/null", "/dev/zero", "/proc/self/mem")))
    elif kind == "text":
        path = rng.choice(("http://", "file://", "http://[", "file:///\0", "https://x:y/z", "//", "a b.pt", "\n.pt"))
    elif kind == "dot":
        path = rng.choice((".", "..", "", "/"))
    entry = rng.choice((
        read_checkpoint, check_loaded, lambda each: TinyViT.from_config(pretrained=each or "x/"),
        lambda each: MobileSAM.from_config(pretrained=each), LabelStore,
        lambda each: SemanticSegmenter.from_config(pretrained=each),
        lambda each: TinyViTDetector.from_config(pretrained=each),
    ))  # fmt: skip
    entry(path)


SAMPLES, CLASSES, TOP_K = 40, 9, 3


@cache
def store_files() -> dict[str, bytes]:
    """Return the files of a small store."""
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        manifest = Manifest(SAMPLES, CLASSES, TOP_K, seed=3, shard_records=16)
        with LabelStore.create(folder, manifest) as store:
            for epoch in range(2):
                answers = torch.rand(SAMPLES, CLASSES, generator=torch.Generator().manual_seed(epoch)).softmax(1)
                write_records(store, epoch, range(SAMPLES), answers, range(SAMPLES))
        root = Path(folder)
        return {str(each.relative_to(root)): each.read_bytes() for each in root.rglob("*") if each.is_file()}


def record_store(rng: random.Random, folder: Path) -> None:
    files = dict(store_files())
    shards = [name for name in files if name.endswith(".safetensors")]
    how = rng.randrange(6)
    if how == 0:
        files["manifest.json"] = mutate(rng, files["manifest.json"])
    elif how <= 2:
        files["manifest.json"] = json.dumps(tamper(rng, json.loads(files["manifest.json"]))).encode()
    elif how == 3:
        first, second = rng.sample(shards, 2)
        files[first], files[second] = files[second], files[first]
    else:
        name = rng.choice(shards)
        files[name] = mutate(rng, files[name], 64)
    if rng.random() < 0.1:
        files.pop(rng.choice(list(files)))
    for name, content in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)
    with LabelStore(folder) as store:
        if store.manifest.num_samples > 10**6:
            store.read(0, [0])
            return
        rows = [rng.randrange(SAMPLES) for _ in range(rng.choice((1, 5, 40)))]
        found = store.read(rng.randrange(2), rows)
        assert (found.classes.long() < store.manifest.num_classes).all(), "a class that the teacher does not have"
        assert (found.probabilities >= 0).all(), "probabilities below 0 or NaN"
        assert (found.probabilities.float().sum(1) <= 1.02).all(), "probabilities of more than 1"
        store.missing(rng.randrange(3))


def records_to_write(rng: random.Random, folder: Path) -> None:
    manifest = {"num_samples": SAMPLES, "num_classes": CLASSES, "top_k": TOP_K, "shard_records": 4}
    if rng.random() < 0.4:
        changed = json_thing(rng)
        if isinstance(changed, (int, float)) and changed > 10**6:
            Manifest(**manifest | {rng.choice(list(manifest)): changed})
            return
        manifest[rng.choice(list(manifest))] = changed
    with LabelStore.create(folder, Manifest(**manifest)) as store:
        shard = store.order.permutation(0)[:4]
        indices: Any = rng.choice(
            (shard, shard.tolist(), shard[:2].repeat(2), range(4), [-1, 0, 1, 2], [0, 1, 2, 10**9], [0.5] * 4, [])
        )
        values = torch.rand(4, CLASSES).softmax(1).to(rng.choice((torch.float32, torch.float16, torch.float64)))
        if rng.random() < 0.3:
            values[rng.randrange(4), 0] = rng.choice((float("nan"), float("inf"), -1.0, 2.0))
        sums = rng.choice((range(4), [2**32] * 4, [-1] * 4, [1], [[1, 2], [3, 4]], ["a"] * 4, [2**70] * 4))
        epoch = rng.choice((0, 1, 2**32 - 1, 2**32, -1, 2**70))
        with store.writer(epoch, 0) as writer:
            count = writer.write(indices, values, sums)
        assert count == store.valid_count(epoch) == len(set(indices)), "another number of records"


def feature_embedding(rng: random.Random, folder: Path) -> None:
    """Files of MobileSAM's embeddings."""
    path = folder / "a.safetensors"
    sam().embed(torch.rand(3, 20, 30, generator=torch.Generator().manual_seed(0))).save(path)
    content = path.read_bytes()
    head = 8 + struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8:head])
    if rng.random() < 0.6:
        header["__metadata__"] = {
            key: json.dumps(tamper(rng, _parsed(text))) if rng.random() < 0.5 else text
            for key, text in header.get("__metadata__", {}).items()
        }
        text = json.dumps(header).encode()
        path.write_bytes(struct.pack("<Q", len(text)) + text + content[head:])
    else:
        path.write_bytes(mutate(rng, content, head))
    found = ImageEmbedding.load(path)
    sam().predict_masks(found, boxes=torch.tensor([[1.0, 1.0, 9.0, 9.0]]))


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def search_journal(rng: random.Random, folder: Path) -> None:
    path, config = folder / "search.jsonl", network().config
    journal = Journal(path, {"seed": 1})
    journal.write("measured", config, costs={"parameters": 1}, parent=None)
    journal.write("evaluated", config, accuracy=3.0)
    path.write_bytes(mutate(rng, path.read_bytes()))
    journal = Journal(path, {"seed": 1})
    for event in ("measured", "evaluated"):
        found = journal.find(event, config)
        assert found is None or found["event"] == event


TARGETS = (
    Target("safetensors files", safetensors_file),
    Target("tensors that do not fit", other_tensors),
    Target("PyTorch files", pickled_file),
    Target("detectors and segmenters", other_networks),
    Target("folders of the hub", hub_folder),
    Target("paths that are no files", places),
    Target("record stores", record_store, (StoreError, IndexError)),
    Target("records to write", records_to_write, (ValueError, IndexError)),
    Target("embeddings", feature_embedding),
    Target("journals of a search", search_journal),
)
