"""Hostile surroundings: disks that are full, transfers that break off, many threads and processes at once."""

from __future__ import annotations

import builtins
import errno
import io
import random
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from kornia_tinyvit import ImageClassifier, TinyViT, load_checkpoint, save_checkpoint
from kornia_tinyvit.checkpoints.hub import write_timm_folder
from kornia_tinyvit.deploy import optimize
from kornia_tinyvit.distillation import LabelStore, Manifest
from kornia_tinyvit.preprocessing import EvaluationPipeline
from kornia_tinyvit.training.run_folder import RunFolder
from tests.conftest import SHALLOW
from tests.distillation.helpers import write_records
from tests.fuzz.files import contents
from tests.fuzz.harness import Rejected, Target
from tests.fuzz.networks import detector, network, sam


class _Full:
    """A disk that takes so many bytes."""

    def __init__(self, room: int) -> None:
        self.room = room

    def take(self, size: int) -> None:
        self.room -= size
        if self.room < 0:
            raise OSError(errno.ENOSPC, "No space left on device")


@contextmanager
def full_disk(room: int) -> Iterator[None]:
    """Let whatever is written through Python's files fail after so many bytes; what fitted has been written."""
    disk, opened = _Full(room), io.open

    def open_there(file: Any, mode: str = "r", *arguments: Any, **settings: Any) -> Any:
        made = opened(file, mode, *arguments, **settings)
        if not set(mode) & set("wax+"):
            return made
        write = made.write

        def write_some(content: Any) -> int:
            size = len(content)
            if size > disk.room:
                write(content[: max(0, disk.room)])
                made.flush()
            disk.take(size)
            return int(write(content))

        proxy = mock.MagicMock(wraps=made)
        proxy.write = write_some
        proxy.__enter__ = lambda _: proxy
        proxy.__exit__ = lambda *_: made.close()
        return proxy

    with mock.patch.object(io, "open", open_there), mock.patch.object(builtins, "open", open_there):
        yield


def writers(rng: random.Random, folder: Path) -> None:
    """Write over a file on a full disk: the old file stays as it was, or the new one is whole."""
    path, before = folder / "a.safetensors", contents()["own"]
    path.write_bytes(before)
    torch.manual_seed(rng.randrange(9))
    model = TinyViT(**SHALLOW)
    writer = rng.choice((
        lambda: save_checkpoint(model, path), lambda: detector().save(path),
        lambda: write_timm_folder(model, folder / "hub"),
    ))  # fmt: skip
    try:
        with full_disk(rng.randrange(len(before) + 3 * 10**5)):
            writer()
    except OSError as error:
        assert path.read_bytes() == before, "the file that was there is damaged"
        assert (
            not (folder / "hub" / "model.safetensors").exists()
            or (folder / "hub" / "config.json").exists()
            or (_whole(folder / "hub" / "model.safetensors"))
        ), "half a folder"
        raise Rejected("there is no room on the disk") from error
    assert path.read_bytes() == before or _whole(path), "half a file"


def _whole(path: Path) -> bool:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        return all(file.get_tensor(name) is not None for name in file.keys())  # noqa: SIM118


@mock.patch("torch.utils.tensorboard.SummaryWriter")  # its thread would report the full disk later
def run_folder(rng: random.Random, folder: Path, _: Any) -> None:
    """A training's state on a full disk: the state before stays, and the folder can be gone on with."""
    run, asked = RunFolder(folder), {"seed": 1, "text": "x" * rng.randrange(3000)}
    run.start(asked, 0)
    run.pending.mkdir()
    run.publish_state({"step": 1})
    run.log({"step": 1, "loss": 1.0})
    try:
        with full_disk(rng.randrange(4000)):
            run.start(asked, 1)
            run.log({"step": 2, "loss": 1.0})
            run.pending.mkdir()
            run.publish_state({"step": 2, "text": "x" * rng.randrange(3000)})
    except OSError as error:
        again = RunFolder(folder)
        again.check_config(asked)
        again.clear_pending()
        state = again.newest_state()
        assert state is not None, "the state before is lost"
        assert state[1]["step"] in (1, 2)
        again.start(asked, state[1]["step"])
        raise Rejected("there is no room on the disk") from error
    finally:
        run.close()
    assert RunFolder(folder).newest_state()[1]["step"] == 2  # type: ignore[index]


class _Server(BaseHTTPRequestHandler):
    content, announced, status = b"", 0, 200

    def do_GET(self) -> None:
        self.send_response(self.status)
        if self.announced >= 0:
            self.send_header("Content-Length", str(self.announced))
        self.end_headers()
        self.wfile.write(self.content)

    def log_message(self, *_: Any) -> None:
        pass


def downloads(rng: random.Random, folder: Path) -> None:
    """Fetch from a server that breaks off, lies or fails; then from one that does not."""
    whole = contents()[rng.choice(("own", "zip"))]
    sent = whole[: rng.randrange(len(whole))] if rng.random() < 0.7 else rng.choice((b"", b"Not Found", whole))
    handler = type("Handler", (_Server,), {
        "content": sent, "announced": rng.choice((len(whole), len(sent), -1, 2**40)),
        "status": rng.choice((200, 200, 200, 404, 500, 301, 204)),
    })  # fmt: skip
    server = HTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    url, model = f"http://127.0.0.1:{server.server_port}/weights.bin", TinyViT(**SHALLOW)
    (folder / "file").write_text("")
    cache = str(rng.choice((folder / "cache", folder / "cache", folder / "cache", folder / "file" / "x", "/proc/x")))
    try:
        with mock.patch.dict("os.environ", {"TORCH_HOME": cache}), mock.patch("time.sleep"):
            try:
                load_checkpoint(model, url)
            except ValueError:
                kept = [path.name for path in folder.rglob("*") if path.is_file() and path.name != "file"]
                assert not [name for name in kept if not name.endswith(".lock")], f"the cache keeps {kept[0]}"
                if cache == str(folder / "cache"):  # where something can be kept, it is fetched again
                    handler.content, handler.announced, handler.status = whole, len(whole), 200  # type: ignore[attr-defined]
                    load_checkpoint(model, url)
                raise
        assert sent == whole, "a torn file was loaded"
    finally:
        server.shutdown()
        server.server_close()


def _images(rng: random.Random, count: int) -> list[Tensor]:
    return [torch.rand(3, rng.randrange(32, 80), rng.randrange(32, 80)) for _ in range(count)]


@cache
def _engine(name: str) -> Any:
    return optimize(network(), name, example=torch.rand(1, 3, 64, 64), tune_allocator=False)


def threads(rng: random.Random, folder: Path) -> None:
    """Many threads at one network: each gets what it would get alone."""
    torch.manual_seed(rng.randrange(10**6))
    classifier = ImageClassifier(network())
    engine = _engine(rng.choice(("eager", "eager", "onnxruntime")))
    works: list[tuple[Any, list[Any]]] = [
        (network(), [image[None] for image in _images(rng, 8)]),
        (lambda image: [each.index for each in classifier.predict(image)[0]], _images(rng, 8)),
        (lambda image: sam().embed(image).features, _images(rng, 3)),
        (lambda image: detector()([image])[1], _images(rng, 4)),
        (engine, [torch.rand(rng.choice((1, 1, 2)), 3, 64, 64) for _ in range(8)]),
    ]
    work, inputs = rng.choice(works)
    with torch.inference_mode():
        wanted = [work(each) for each in inputs]

    def alone(each: Any) -> Any:
        with torch.inference_mode():
            return work(each)

    with ThreadPoolExecutor(rng.choice((2, 4, 8))) as pool:
        found = list(pool.map(alone, inputs * 2))
    for one, other in zip(found, wanted * 2, strict=True):
        same = torch.allclose(one, other, atol=1e-4) if isinstance(one, Tensor) else one == other
        assert same, "threads get other results"


class Prepared(torch.utils.data.Dataset[Tensor]):
    """Images that a worker prepares and shows to a network."""

    def __init__(self, with_network: bool) -> None:
        self.prepare = EvaluationPipeline(32)
        self.network = network() if with_network else None

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> Tensor:
        image = self.prepare(torch.rand(1, 3, 40, 50, generator=torch.Generator().manual_seed(index)))
        with torch.no_grad():
            return (image if self.network is None else self.network(image))[0]


def workers(rng: random.Random, folder: Path) -> None:
    """Networks and preprocessing in the processes of a data loader, forked or spawned."""
    data = Prepared(rng.random() < 0.7)
    kind = "fork" if rng.random() < 0.7 else "spawn"
    loader = DataLoader(data, 2, num_workers=rng.choice((1, 2)), multiprocessing_context=kind)
    found, wanted = torch.cat(list(loader)), torch.stack([data[index] for index in range(len(data))])
    assert torch.allclose(found, wanted, atol=1e-4), "workers get other results"


def shared_files(rng: random.Random, folder: Path) -> None:
    """Threads that write one checkpoint and one store at once: a reader sees a whole file, whoever was last."""
    models = [TinyViT(**SHALLOW) for _ in range(3)]
    path, target = folder / "a.safetensors", TinyViT(**SHALLOW)
    save_checkpoint(models[0], path)
    manifest = Manifest(20, 9, 3, shard_records=4)
    answers = torch.rand(20, 9).softmax(1)

    def write(number: int) -> int:
        save_checkpoint(models[number], path)
        load_checkpoint(target if number == 0 else TinyViT(**SHALLOW), path)
        with LabelStore.create(folder / "store", manifest) as store:
            try:
                return write_records(store, 0, range(20), answers, range(20))
            except BlockingIOError:  # another one writes that shard
                return 0

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(write, range(3)))
    with LabelStore(folder / "store") as store:
        missing = store.missing(0)
        if len(missing):
            write_records(store, 0, missing, answers[missing], missing)
        assert torch.equal(store.read(0, range(20)).probabilities, answers.topk(3).values.half())
    left = target.state_dict()
    assert any(all(torch.equal(left[name], each) for name, each in model.state_dict().items()) for model in models)


TARGETS = (
    Target("writing on a full disk", writers, ()),
    Target("a training on a full disk", run_folder, ()),
    Target("downloads", downloads, seconds=60, num_cases=3),
    Target("threads", threads, (), seconds=120, num_cases=1),
    Target("workers of data loaders", workers, (), seconds=120, num_cases=1),
    Target("writers of one file", shared_files, (), num_cases=1),
)
