import argparse
import collections
import copy
import copyreg
import datetime
import enum
import functools
import io
import operator
import os
import pickle
import resource
import struct
import sys
import types
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from kornia_tinyvit import TinyViT, load_checkpoint
from kornia_tinyvit.checkpoints import CheckpointError, pickles, read_checkpoint
from kornia_tinyvit.checkpoints.pickles import Name, Placeholder, read_pickle

FORMATS = {
    "zip": torch.save,
    "legacy": functools.partial(torch.save, _use_new_zipfile_serialization=False),
    **{f"pickle {protocol}": functools.partial(pickle.dump, protocol=protocol) for protocol in range(6)},
}


#: The first pickles of a file before torch 1.6.
HEADER = b"".join(pickle.dumps(each, 2) for each in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}))


class Color(enum.Enum):
    RED = 1


class Config(dict):
    """A configuration like yacs' ``CfgNode``: a dictionary with attributes."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.__dict__["frozen"] = True


class Items(list):
    """A list like fastcore's ``L``."""


class Slots:
    __slots__ = ("value",)

    def __init__(self) -> None:
        self.value = 3


class Call:
    """Pickles to a call of a function."""

    def __init__(self, function: Callable[..., Any], *args: Any, state: Any = None) -> None:
        self.reduced = (function, args) if state is None else (function, args, state)

    def __reduce__(self) -> Any:
        return self.reduced


def written(content: Any, how: str = "zip") -> io.BytesIO:
    file = io.BytesIO()
    FORMATS[how](content, file)
    file.seek(0)
    return file


def archive(program: bytes, **records: bytes) -> bytes:
    """A file of torch.save with a handwritten pickle."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as written:
        for name, data in {"data.pkl": program, **records}.items():
            written.writestr(f"archive/{name}", data)
    return file.getvalue()


class TestTensors:
    @pytest.mark.parametrize("how", FORMATS)
    def test_state_dict(self, tiny, how):
        expected = tiny.state_dict()
        found = read_pickle(written({"model": expected, "epoch": 3}, how))
        assert found["epoch"] == 3
        assert list(found["model"]) == list(expected)
        for name, tensor in expected.items():
            assert type(found["model"][name]) is Tensor
            assert torch.equal(found["model"][name], tensor)
            assert found["model"][name].dtype == tensor.dtype

    @pytest.mark.parametrize("how", ["zip", "legacy", "pickle 2", "pickle 4"])
    def test_kinds(self, how):
        base = torch.arange(24.0).view(4, 6)
        expected = {
            "parameter": nn.Parameter(torch.rand(3)),
            "buffer": nn.Buffer(torch.rand(3)),
            "view": base[1:3, ::2],
            "transposed": base.T,
            "empty": torch.zeros(0, 3),
            "scalar": torch.tensor(7),
            "half": torch.rand(3).half(),
            "bfloat16": torch.rand(3).bfloat16(),
            "float8": torch.rand(3).to(torch.float8_e4m3fn),
            "bool": torch.tensor([True, False]),
            "complex": torch.rand(3, dtype=torch.complex64),
            "uint16": torch.tensor([1, 2], dtype=torch.uint16),
        }
        found = read_pickle(written(expected, how))
        for name, tensor in expected.items():
            assert torch.equal(found[name], tensor.detach()), name
            assert found[name].stride() == tensor.stride()
            assert not found[name].requires_grad
        if not how.startswith("pickle"):
            storages = [found[name].untyped_storage().data_ptr() for name in ("view", "transposed")]
            assert storages[0] == storages[1]

    def test_without_values(self):
        found = read_pickle(written({"weight": torch.zeros(3, 4, device="meta")}))
        assert found["weight"].is_meta
        assert found["weight"].shape == (3, 4)

    def test_context_of_another_device(self):
        file = written({"weight": torch.ones(3)})
        with torch.device("meta"):
            assert read_pickle(file)["weight"].tolist() == [1, 1, 1]

    @pytest.mark.parametrize(
        "tensor",
        [
            torch.zeros(1).expand(1000),
            torch.eye(3).to_sparse(),
        ],
        ids=["expanded", "sparse"],
    )
    def test_placeholders_for_other_tensors(self, tensor):
        found = read_pickle(written({"x": tensor, "weight": torch.ones(2)}))
        assert isinstance(found["x"], Placeholder)
        assert torch.equal(found["weight"], torch.ones(2))

    @pytest.mark.parametrize("order", ["little", "big"])
    def test_byte_order(self, order):
        file, changed = written({"x": torch.arange(5.0)}), io.BytesIO()
        with zipfile.ZipFile(file) as old, zipfile.ZipFile(changed, "w") as new:
            for info in old.infolist():
                data = old.read(info)
                if info.filename.endswith("/byteorder"):
                    data = order.encode()
                if info.filename.endswith("/data/0") and order != sys.byteorder:
                    data = np.frombuffer(data, "f4").byteswap().tobytes()
                new.writestr(info.filename, data)
        assert torch.equal(read_pickle(changed)["x"], torch.arange(5.0))

    def test_checkpoint_of_torch_0_4(self):
        """Before torch 1.6 a pickle of a storage could describe a part of another one, and the source of a module."""
        storage = torch.arange(6.0).untyped_storage()

        class Old(pickle.Pickler):
            def persistent_id(self, item):
                if isinstance(item, torch.UntypedStorage):
                    return "storage", torch.FloatStorage, "1", "cpu", 6, ("2", 2, 3)
                return ("module", nn.Linear, "linear.py", "import os") if item is nn.Identity else None

        program, arguments = io.BytesIO(), (storage, 0, (3,), (1,), False, {})
        Old(program, 2).dump([Call(torch._utils._rebuild_tensor_v2, *arguments), nn.Identity])
        keys, data = pickle.dumps(["1"], 2), struct.pack("<q", 6) + bytes(storage.tolist())
        tensor, module = read_pickle(io.BytesIO(HEADER + program.getvalue() + keys + data))
        assert torch.equal(tensor, torch.tensor([2.0, 3.0, 4.0]))
        assert module == Name("torch.nn.modules.linear.Linear")


class TestForeignObjects:
    @pytest.mark.parametrize("how", FORMATS)
    def test_kinds(self, tiny, how):
        optimizer = torch.optim.AdamW(tiny.parameters())
        junk = {
            "args": argparse.Namespace(lr=1e-3, data=Path("/data")),
            "config": Config({"MODEL": Config({"TYPE": "tiny_vit"})}),
            "items": Items([1, 2]),
            "accuracy": np.float64(80.7),
            "history": np.arange(3),
            "random": np.random.default_rng(0),
            "date": datetime.datetime(2026, 1, 1),
            "color": Color.RED,
            "loss": functools.partial(nn.functional.cross_entropy, label_smoothing=0.1),
            "function": os.path.join,
            "scheduler": torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10),
            "scaler": torch.amp.GradScaler("cpu"),
            "criterion": nn.CrossEntropyLoss(torch.ones(7)),
            "counts": collections.Counter("aab"),
            "default": collections.defaultdict(list, a=[1]),
            "slice": slice(3),
            "namespace": types.SimpleNamespace(a=1),
            "device": torch.device("cpu"),
            "size": torch.Size((1, 2)),
            "dtype": torch.float16,
        }
        if how not in ("pickle 0", "pickle 1"):
            junk["slots"] = Slots()
        plain = {"optimizer": optimizer.state_dict(), "epoch": 3, "text": "ü", "big": 10**40, "set": {1, 2}, "b": b"b"}
        content = {**junk, **plain, "state_dict": tiny.state_dict()}
        found = read_pickle(written(content, how))
        assert all(isinstance(found[name], (Placeholder, Name)) for name in junk)
        assert found["args"].kind == "argparse.Namespace"
        assert found["args"].state["lr"] == 1e-3
        assert found["config"].kind == f"{__name__}.Config"
        assert found["config"].items["MODEL"].items == {"TYPE": "tiny_vit"}
        assert found["loss"].kind == "functools.partial"
        assert (found["epoch"], found["text"], found["big"]) == (3, "ü", 10**40)
        path = written(content, how)
        checkpoint = read_checkpoint(found)
        assert path.getbuffer()
        assert checkpoint.state_dict.keys() == tiny.state_dict().keys()
        assert "args (argparse.Namespace)" in checkpoint.left_out
        assert {name.split(" ")[0] for name in checkpoint.left_out} == content.keys() - {"state_dict"}

    @pytest.mark.parametrize("how", FORMATS)
    def test_whole_modules(self, tiny, images, tmp_path, how):
        """A module of a class that does not exist here, as of ``torch.save(model)``."""
        with (tmp_path / "model.pt").open("wb") as file:
            FORMATS[how]({"epoch": 3, "model": nn.DataParallel(tiny)}, file)
        model = TinyViT.from_config(pretrained=tmp_path / "model.pt")
        assert torch.equal(model(images), tiny(images))

    def test_buffers_that_are_not_stored(self, tiny):
        tiny.layers[0].register_buffer("table", torch.zeros(3), persistent=False)
        assert read_checkpoint(read_pickle_of(tiny)).state_dict.keys() == tiny.state_dict().keys()

    def test_unknown_class(self, tiny):
        """The class of an object need not exist."""
        module = types.ModuleType("training_config")
        module.Config = type("Config", (), {"__module__": "training_config"})
        sys.modules["training_config"] = module
        try:
            file = written({"model": tiny.state_dict(), "config": module.Config()})
        finally:
            del sys.modules["training_config"]
        assert read_checkpoint(read_pickle(file)).left_out == ("config (training_config.Config)",)


def read_pickle_of(module: nn.Module) -> dict[str, Any]:
    return {"model": read_pickle(written(module))}


def text(value: str) -> bytes:
    data = value.encode()
    return pickle.BINUNICODE + struct.pack("<I", len(data)) + data


def programs(marker: Path) -> dict[str, bytes]:
    """Handwritten pickles that create a file when they are executed."""
    path, command = text(str(marker)), text(f"touch {marker}")
    mkdir = b"cos\nmkdir\n"
    return {
        "REDUCE": mkdir + path + b"\x85R.",
        "STACK_GLOBAL": text("os") + text("mkdir") + b"\x93" + path + b"\x85R.",
        "dotted name": text("pathlib") + text("os.mkdir") + b"\x93" + path + b"\x85R.",
        "INST": b"(" + path + b"ios\nmkdir\n.",
        "OBJ": b"(" + mkdir + path + b"o.",
        "NEWOBJ": mkdir + path + b"\x85\x81.",
        "NEWOBJ_EX": mkdir + path + b"\x85}\x92.",
        "eval": b"cbuiltins\neval\n" + text(f"open({str(marker)!r}, 'w')") + b"\x85R.",
        "exec": b"cbuiltins\nexec\n" + text(f"open({str(marker)!r}, 'w')") + b"\x85R.",
        "getattr": b"cbuiltins\ngetattr\ncbuiltins\n__import__\n" + text("os") + b"\x85R" + text("mkdir") + b"\x86R"
        + path + b"\x85R.",
        "attrgetter": b"coperator\nattrgetter\n" + text("mkdir") + b"\x85Rcbuiltins\n__import__\n" + text("os")
        + b"\x85R\x85R" + path + b"\x85R.",
        "methodcaller": b"coperator\nmethodcaller\n" + text("mkdir") + path + b"\x86Rcbuiltins\n__import__\n"
        + text("os") + b"\x85R\x85R.",
        "partial": b"cfunctools\npartial\n" + mkdir + path + b"\x86R)R.",
        "BUILD of a class": b"ccollections\nOrderedDict\n}" + text("__reduce_ex__") + mkdir + b"sb)R.",
        "BUILD with slots": b"ctorch._utils\n_rebuild_tensor_v2\nN}" + text("__defaults__") + path + b"s\x86b.",
        "_load_from_bytes": b"ctorch.storage\n_load_from_bytes\nB" + struct.pack("<I", len(mkdir + path) + 5)
        + b"\x80\x02" + mkdir + path + b"\x85R." + b"\x85R.",
        "_reconstructor": b"ccopyreg\n_reconstructor\ncpathlib\nPath\n" + mkdir + path + b"\x87R.",
        "_reconstruct": b"cnumpy.core.multiarray\n_reconstruct\n" + mkdir + path + b"\x85\x86R.",
        "wrapper subclass": b"ctorch._utils\n_rebuild_wrapper_subclass\n(" + mkdir + path + b"tR.",
        "_rebuild_from_type_v2": b"ctorch._tensor\n_rebuild_from_type_v2\n(" + mkdir + mkdir + path + b"\x85NtR.",
        "_rebuild_parameter": b"ctorch._utils\n_rebuild_parameter_with_state\n(" + mkdir + path + b"\x85R\x88N}tR.",
        "hub": b"ctorch.hub\nload\n(" + text(str(marker.parent)) + text("x") + text("local") + b"tR.",
        "BINPERSID": b"(" + text("module") + mkdir + path + b"\x85R" + path + text("source") + b"tQ.",
        "system": b"cposix\nsystem\n" + command + b"\x85R.",
    }  # fmt: skip


class TestCode:
    """No file executes anything, and no file changes an object of the process."""

    @pytest.mark.parametrize("how", ["zip", "legacy", "pickle"])
    @pytest.mark.parametrize("name", programs(Path("x")))
    def test_programs(self, tmp_path, name, how):
        marker = tmp_path / "marker"
        (tmp_path / "hubconf.py").write_text(f"import os\nos.mkdir({str(marker)!r})\ndef x(): pass\n")
        program = programs(marker)[name]
        data = {
            "zip": archive(b"\x80\x02" + program),
            "legacy": HEADER + b"\x80\x02" + program + pickle.dumps([], 2),
            "pickle": b"\x80\x04" + program,
        }[how]
        defaults = torch._utils._rebuild_tensor_v2.__defaults__
        (tmp_path / "weights.pth").write_bytes(data)
        with pytest.raises(CheckpointError):
            read_checkpoint(tmp_path / "weights.pth")
        assert not marker.exists()
        assert torch._utils._rebuild_tensor_v2.__defaults__ == defaults

    def test_programs_do_run(self, tmp_path):
        """The programs are valid: ``pickle`` executes most of them."""
        ran = 0
        for number, name in enumerate(programs(Path("x"))):
            marker = tmp_path / str(number)
            with io.BytesIO(programs(marker)[name]) as file:
                try:
                    unpickler = pickle.Unpickler(file)
                    unpickler.persistent_load = lambda saved: saved
                    unpickler.load()
                except Exception:
                    pass
            ran += marker.exists()
        assert ran >= 15

    @pytest.mark.parametrize("how", FORMATS)
    def test_beside_weights(self, tiny, tmp_path, how):
        marker = tmp_path / "marker"
        code = [
            Call(os.mkdir, str(marker)),
            Call(eval, f"__import__('os').mkdir({str(marker)!r})"),
            Call(functools.reduce, operator.add, [Call(os.mkdir, str(marker))]),
            Call(map, os.mkdir, [str(marker)]),
            Call(collections.OrderedDict, state={"x": Call(os.mkdir, str(marker))}),
            Call(argparse.Namespace, state={"x": Call(os.mkdir, str(marker))}),
        ]
        with (tmp_path / "weights.pth").open("wb") as file:
            FORMATS[how]({"model": tiny.state_dict(), "junk": code}, file)
        model = TinyViT(**{**vars(tiny.config)})
        assert load_checkpoint(model, tmp_path / "weights.pth").left_out == ("junk",)
        assert all(torch.equal(model.state_dict()[name], each) for name, each in tiny.state_dict().items())
        assert not marker.exists()

    def test_extension_registry(self, tmp_path):
        """Registered extensions of the process are not looked up."""
        copyreg.add_extension("os", "mkdir", 240)
        try:
            program = b"\x80\x02" + pickle.EXT1 + b"\xf0" + text(str(tmp_path / "marker")) + b"\x85R."
            with pytest.raises(ValueError, match="operation EXT1 is not supported"):
                read_pickle(io.BytesIO(program))
        finally:
            copyreg.remove_extension("os", "mkdir", 240)
        assert not (tmp_path / "marker").exists()


def storage(numel: bytes, size: bytes = b"K\x01", stride: bytes = b"K\x01", key: str = "0") -> bytes:
    """A program for a tensor of a storage, without an end."""
    described = b"(" + text("storage") + b"ctorch\nFloatStorage\n" + text(key) + text("cpu") + numel + b"tQ"
    arguments = described + b"K\x00" + size + b"\x85" + stride + b"\x85\x89}"
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + arguments + b"tR"


HUGE = b"\x8a\x06" + (2**40).to_bytes(6, "little")
BOMBS = {
    "huge storage": archive(storage(HUGE) + b".", **{"data/0": bytes(64)}),
    "huge tensor": archive(storage(b"K\x10", HUGE) + b".", **{"data/0": bytes(64)}),
    "huge stride": archive(storage(b"K\x10", b"K\x02", HUGE) + b".", **{"data/0": bytes(64)}),
    "missing storage": archive(storage(b"K\x10") + b"."),
    "huge legacy storage": HEADER + storage(HUGE) + b"." + pickle.dumps(["0"], 2),
    "huge text": b"\x80\x04\x8d" + (2**62).to_bytes(8, "little") + b"x.",
    "huge number": b"\x80\x02\x8b" + (2**31 - 1).to_bytes(4, "little") + b"x.",
    "huge frame": b"\x80\x04\x95" + (2**62).to_bytes(8, "little") + b"N.",
    "nested tuples as a key": b"\x80\x02K\x01" + b"2\x86" * 100 + b"q\x00}h\x00Ns.",
    "doubled tuples": b"\x80\x02K\x01" + b"2\x86" * 100_000 + b".",
    "nested lists": b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b".",
    "cycle": b"\x80\x02]q\x00h\x00a.",
    "bytes of one text": b"\x80\x02]q\x00(" + text("x" * 100_000) + b"q\x010"
    + b"c_codecs\nencode\nh\x01X\x06\x00\x00\x00latin1\x86R" * 10_000 + b"e.",
    "no end": b"\x80\x02" + b"]" * 1000,
    "no stack": b"\x80\x020000.",
}  # fmt: skip


class TestBombs:
    """Files cannot use more memory or time than one of their size should."""

    @pytest.mark.parametrize("name", BOMBS)
    def test_memory(self, tmp_path, name):
        (tmp_path / "weights.pth").write_bytes(BOMBS[name])
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        with pytest.raises(CheckpointError, match=r"weights\.pth (is damaged|has no)"):
            read_checkpoint(tmp_path / "weights.pth")
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        assert grown < 100 * 2**10  # in KiB

    def test_many_objects(self, monkeypatch):
        monkeypatch.setattr(pickles, "_MAX_OPERATIONS", 1000)
        with pytest.raises(ValueError, match="more than 1000 objects"):
            read_pickle(io.BytesIO(b"\x80\x02(" + b"]" * 1000 + b"l."))

    def test_compressed_archive(self, tmp_path):
        file = tmp_path / "weights.pth"
        with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as bomb:
            bomb.writestr("archive/data.pkl", bytes(10_000_000))
        with pytest.raises(CheckpointError, match=r"data\.pkl is compressed; torch\.save writes"):
            read_checkpoint(file)

    def test_overlapping_records(self):
        """Records of an archive that overlap have more bytes than the file in sum."""
        file, numel = io.BytesIO(), b"M" + struct.pack("<H", 25_000)
        with zipfile.ZipFile(file, "w") as bomb:
            program = b"(" + b"".join(storage(numel, key=f"{key}") for key in range(200)) + b"l."
            bomb.writestr("archive/data.pkl", program)
            bomb.writestr("archive/data/0", bytes(100_000))
            (info,) = (each for each in bomb.filelist if each.filename == "archive/data/0")
            for key in range(1, 200):
                other = copy.copy(info)
                other.filename = other.orig_filename = f"archive/data/{key}"
                bomb.filelist.append(other)
        with pytest.raises(ValueError, match="larger than the file"):
            read_pickle(file)


class TestArchives:
    def test_torchscript(self, tmp_path):
        torch.jit.script(nn.Linear(2, 2)).save(tmp_path / "model.pt")
        with pytest.raises(CheckpointError, match=r"TorchScript archive; pass the state_dict\(\) of torch\.jit\.load"):
            read_checkpoint(tmp_path / "model.pt")

    def test_other_archive(self, tmp_path):
        with zipfile.ZipFile(tmp_path / "model.pt", "w") as other:
            other.writestr("readme.txt", "no weights")
        with pytest.raises(CheckpointError, match=r"has no data\.pkl of torch\.save"):
            read_checkpoint(tmp_path / "model.pt")
