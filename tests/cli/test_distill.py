"""Distillation on the command line: save, check, train and evaluate."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.numpy import load_file, save_file
from typer.testing import CliRunner

from kornia_tinyvit import TinyViT
from kornia_tinyvit.cli import app
from kornia_tinyvit.cli.training_options import match_labels
from kornia_tinyvit.distillation import LabelStore, estimated_size
from tests.helpers import error_of, json_lines, run, run_both
from tests.scenes import CLASSES, damage, make_images, samples_of

TEACHER = """
import torch
from torch import nn

SEED = 0

class Colors(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(SEED)
        self.scale = nn.Parameter(torch.tensor([6.0, 6.0, 6.0]) + 0.1 * torch.rand(3))

    def forward(self, images):
        return images.mean((2, 3)).flip(1) * self.scale

def build():
    return Colors()
"""
BARE = """
from torch import nn

class Bare(nn.Module):
    def forward(self, images):
        return images.mean((2, 3)).flip(1) * 9

def build():
    return Bare()
"""
SMALL = ("--recipe", "cifar10_distill", "--img-size", "32")
FAST = ("--batch-size", "8", "--workers", "0", "--variant", "1m")


@pytest.fixture
def folder(tmp_path) -> Path:
    return make_images(tmp_path / "data", each=4)


@pytest.fixture
def teacher(tmp_path) -> str:
    (tmp_path / "colors.py").write_text(TEACHER)
    return f"{tmp_path}/colors.py:build"


def save(folder, store, teacher, *options, epochs=2):
    workers = () if "--estimate" in options else ("--workers", "0")
    given = ("--teacher", teacher, *SMALL, "--epochs", str(epochs), "--top-k", "2", *workers)
    return run("distill", "save", str(folder), str(store), *given, *options)


@pytest.fixture
def store(folder, tmp_path, teacher) -> Path:
    save(folder, tmp_path / "store", teacher, "--json")
    return tmp_path / "store"


def test_whole_journey(folder, tmp_path, teacher):
    store, out = tmp_path / "store", tmp_path / "out"
    printed = save(folder, store, teacher)
    assert "12 samples x 2 epochs x the top 2 of 3 classes: 656 bytes" in printed
    assert "24 records written, 0 already present." in printed
    assert "0 records written, 24 already present." in save(folder, store, teacher)
    check = run("distill", "check", str(folder), str(store), "--teacher", teacher, *SMALL)
    assert check.startswith("24 records recomputed: largest difference 0.000")
    validation = make_images(tmp_path / "val", each=2, seed=5)
    train = ("distill", "train", str(folder), str(store), *SMALL, *FAST, "--epochs", "2", "--out", str(out))
    result = json.loads(run(*train, "--validation", str(validation), "--json"))
    assert result["steps"] == 2
    assert result["best"] == str(out / "best.safetensors")
    report = json.loads(run("evaluate", str(validation), "--weights", result["best"], "--json"))
    assert report["images"] == 6
    assert report["top1"] == pytest.approx(result["top1"], abs=0.01)
    lines = json_lines(out / "metrics.jsonl")
    assert [line["epoch"] for line in lines] == [1, 1, 2, 2]
    again = json.loads(run(*train, "--validation", str(validation), "--json"))
    assert again == result
    assert TinyViT.from_config(pretrained=result["last"]).config.img_size == 32


class TestSave:
    def test_estimate(self, folder, tmp_path, teacher):
        printed = save(folder, tmp_path / "store", teacher, "--estimate", epochs=300)
        size = estimated_size(12, 300, 3, 2)
        assert printed.splitlines() == [
            f"12 samples x 300 epochs x the top 2 of 3 classes: {size / 1e3:.2f} kB ({size / 2**10:.2f} KiB)"
        ]
        report = json.loads(save(folder, tmp_path / "store", teacher, "--estimate", "--json", epochs=300))
        assert report == {"records": 3600, "bytes": size}
        assert not (tmp_path / "store").exists()

    def test_json_and_what_is_written(self, folder, tmp_path, teacher):
        report = json.loads(save(folder, tmp_path / "store", teacher, "--json"))
        size = sum(path.stat().st_size for path in (tmp_path / "store").rglob("*.safetensors"))
        assert report == {
            "records": 24, "bytes": size, "written": 24, "present": 0, "locked": 0, "broken": [],
        }  # fmt: skip
        opened = LabelStore(tmp_path / "store")
        assert opened.epochs == [0, 1]
        assert opened.manifest.teacher["name"] == "colors.py:build"
        assert (opened.read(0, range(12)).probabilities.float().sum(1) > 0.5).all()

    def test_a_teacher_without_weights(self, folder, tmp_path):
        """Such as a wrapper of another runtime."""
        (tmp_path / "bare.py").write_text(BARE)
        bare = f"{tmp_path}/bare.py:build"
        assert json.loads(save(folder, tmp_path / "store", bare, "--json"))["written"] == 24
        options = ("--teacher", bare, *SMALL, "--json")
        assert json.loads(run("distill", "check", str(folder), str(tmp_path / "store"), *options))["good"] is True

    def test_broken_images(self, folder, tmp_path, teacher, capfd, monkeypatch):
        damage(folder / "green" / "01.png")
        given = ("--teacher", teacher, *SMALL, "--epochs", "1", "--top-k", "2", "--workers", "0", "--json")
        error = error_of(capfd, monkeypatch, "distill", "save", str(folder), str(tmp_path / "a"), *given)
        assert "green/01.png is not an image" in error
        given = (*given[:-1], "--on-broken", "skip")
        _, notes = run_both("distill", "save", str(folder), str(tmp_path / "store"), *given)
        assert "Images that cannot be read: 1, e.g. green/01.png" in notes
        report = json.loads(
            run("distill", "check", str(folder), str(tmp_path / "store"), "--teacher", teacher, *SMALL, "--json")
        )
        assert report["good"] is True

    def test_another_teacher_for_the_same_store(self, folder, store, teacher, tmp_path, capfd, monkeypatch):
        file = tmp_path / "colors.py"
        file.write_text(TEACHER.replace("SEED = 0", "SEED = 1"))
        given = ("--teacher", teacher, *SMALL, "--epochs", "2", "--top-k", "2", "--json")
        error = error_of(capfd, monkeypatch, "distill", "save", str(folder), str(store), *given)
        assert "does not match this pipeline: teacher.checksum: the store has" in error

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (("--precision", "fp7"), "--precision must be one of no, bf16, fp16"),
            (("--teacher", "gone.py:build"), "There is no file gone.py"),
            (("--teacher", "nonsense"), "Unknown teacher"),
            (("--recipe", "in2k"), "There is no recipe 'in2k'"),
            (("--top-k", "9"), "--top-k must be at most 3, the classes of the teacher; got 9"),
            (("--device", "toaster"), "--device toaster is not available"),
            (("--on-broken", "ignore"), "'stop' or 'skip'"),
            (("--limit", "13"), "Cannot sample 13 of 12 images"),
        ],
    )
    def test_errors(self, folder, tmp_path, teacher, capfd, monkeypatch, options, message):
        given = ("--teacher", teacher, *SMALL, "--top-k", "2", "--workers", "0", "--json", *options)
        error = error_of(capfd, monkeypatch, "distill", "save", str(folder), str(tmp_path / "store"), *given)
        assert message in error
        assert not list(tmp_path.glob("store/epoch*"))

    def test_limit(self, folder, tmp_path, teacher):
        report = json.loads(save(folder, tmp_path / "store", teacher, "--json", "--limit", "5"))
        assert report["written"] == 10


class TestCheck:
    def test_json(self, folder, store, teacher):
        given = ("--teacher", teacher, *SMALL, "--records", "6", "--json")
        report = json.loads(run("distill", "check", str(folder), str(store), *given))
        assert report.keys() == {"records", "largest", "mean", "drifted", "good"}
        assert report["good"] is True
        assert report["drifted"] == []
        assert 6 <= report["records"] < 24
        assert 0 < report["mean"] <= report["largest"] < 1e-3

    def test_another_teacher(self, folder, store, teacher, tmp_path, capfd, monkeypatch):
        (tmp_path / "colors.py").write_text(TEACHER.replace("SEED = 0", "SEED = 1"))
        given = ("distill", "check", str(folder), str(store), "--teacher", teacher, *SMALL, "--json")
        assert "teacher.checksum" in error_of(capfd, monkeypatch, *given)

    def test_records_that_are_wrong(self, folder, store, teacher):
        """Records that do not match the manifest's teacher."""
        shard = store / "epoch-00001" / "shard-00000.safetensors"
        records = load_file(shard)
        records["probabilities"][:, 0] = 0  # their checksums are right
        save_file(records, shard)
        given = ["distill", "check", str(folder), str(store), "--teacher", teacher, *SMALL]
        result = CliRunner().invoke(app, given)
        assert result.exit_code == 1
        assert str(result.exception) == "The store does not match this teacher."
        result = CliRunner().invoke(app, [*given, "--json"])
        assert result.exit_code == 1
        assert json.loads(result.stdout)["good"] is False
        assert CliRunner().invoke(app, [*given, "--tolerance", "1"]).exit_code == 0

    def test_empty_store(self, folder, store, teacher, capfd, monkeypatch):
        for path in store.glob("epoch-*"):
            shutil.rmtree(path)
        given = ("distill", "check", str(folder), str(store), "--teacher", teacher, *SMALL, "--json")
        assert "has no records to check" in error_of(capfd, monkeypatch, *given)


class TestTrain:
    def command(self, folder, tmp_path, *options):
        return ("distill", "train", str(folder), *options, *FAST, "--out", str(tmp_path / "out"), "--json")

    @pytest.mark.parametrize(
        ("options", "messages"),
        [
            (("--recipe", "cifar10", "--img-size", "32"), ["augmentation.cutmix: the store has 1.0, this pipeline 0"]),
            ((*SMALL[:2], "--img-size", "48"), ["augmentation.img_size: the store has 32, this pipeline 48"]),
            ((*SMALL, "--seed", "4"), ["seed: the store has 0, this pipeline 4"]),
            ((*SMALL, "--limit", "10"), ["num_samples: the store has 12, this pipeline 10", "data.fingerprint"]),
        ],
    )  # fmt: skip
    def test_mismatch_is_listed(self, folder, store, tmp_path, capfd, monkeypatch, options, messages):
        error = error_of(capfd, monkeypatch, *self.command(folder, tmp_path, str(store), *options))
        assert "does not match this pipeline" in error
        assert all(message in error for message in messages)
        assert not (tmp_path / "out").exists()

    def test_store_or_teacher(self, folder, store, teacher, tmp_path, capfd, monkeypatch):
        for options in ((), (str(store), "--teacher", teacher)):
            error = error_of(capfd, monkeypatch, *self.command(folder, tmp_path, *options, *SMALL))
            assert "Give either the folder of a store or --teacher" in error

    def test_online(self, folder, teacher, tmp_path):
        report = json.loads(run(*self.command(folder, tmp_path, "--teacher", teacher, *SMALL, "--epochs", "1")))
        assert report["steps"] == 1
        network = TinyViT.from_config(pretrained=report["last"])
        assert network.config.num_classes == 3

    def test_fewer_epochs_are_stored(self, folder, store, tmp_path):
        result = CliRunner().invoke(app, [*self.command(folder, tmp_path, str(store), *SMALL), "--epochs", "3"])
        assert result.exit_code == 0, result.output
        assert "2 of 3 epochs are complete and are replayed in turn." in result.stderr
        assert json.loads(result.stdout)["steps"] == 3

    def test_no_whole_epoch(self, folder, store, tmp_path, capfd, monkeypatch):
        for path in store.glob("epoch-*/*.safetensors"):
            path.unlink()
        error = error_of(capfd, monkeypatch, *self.command(folder, tmp_path, str(store), *SMALL))
        assert "has no complete epoch; resume 'kornia-tinyvit distill save" in error

    def test_hard_weight_changes_the_loss(self, folder, store, tmp_path):
        curves = []
        for share in ("0", "0.5"):
            options = (str(store), *SMALL, "--epochs", "1", "--hard-weight", share)
            run(*self.command(folder, tmp_path / share, *options))
            line = (tmp_path / share / "out" / "metrics.jsonl").read_text().splitlines()[0]
            curves.append(json.loads(line)["loss"])
        assert curves[0] != pytest.approx(curves[1], rel=1e-3)

    def test_replays(self, folder, store, tmp_path):
        options = (str(store), *SMALL, "--epochs", "2", "--replays", "1", "--base-lr", "1e-3")
        assert json.loads(run(*self.command(folder, tmp_path, *options)))["steps"] == 2

    @pytest.mark.parametrize("online", [False, True])
    def test_classes_of_the_teacher(self, folder, tmp_path, online):
        """A teacher whose classes have another order than the folders; labels are matched by name."""
        named = TEACHER.replace(".flip(1)", "").replace(
            "SEED)", 'SEED)\n        self.class_names = ("red", "green", "blue")'
        )
        (tmp_path / "named.py").write_text(named)
        source = f"{tmp_path}/named.py:build"
        if not online:
            save(folder, tmp_path / "named", source, "--json")
        given = ("--teacher", source) if online else (str(tmp_path / "named"), "--hard-weight", "1")
        options = (*SMALL, *FAST, "--epochs", "6", "--base-lr", "0.03", "--validation", str(folder), "--json")
        result = json.loads(run("distill", "train", str(folder), *given, *options, "--out", str(tmp_path / "out")))
        assert TinyViT.from_config(pretrained=result["last"]).class_names == ("red", "green", "blue")
        report = json.loads(run("evaluate", str(folder), "--weights", result["best"], "--json"))
        assert report["top1"] == pytest.approx(result["top1"], abs=0.01)

    def test_names_are_in_the_checkpoint(self, folder, store, tmp_path):
        report = json.loads(run(*self.command(folder, tmp_path, str(store), *SMALL, "--epochs", "1")))
        rows = json.loads(run("classify", str(folder / "red" / "00.png"), "--weights", report["best"], "--json"))
        assert {each["label"] for each in rows[0]["predictions"]} == set(CLASSES)
        assert torch.isfinite(torch.tensor([each["score"] for each in rows[0]["predictions"]])).all()


def test_match_labels(folder):
    samples = samples_of(folder)
    before = samples.images.labels
    match_labels(samples, ["red", "blue", "green"], 3)
    assert samples.images.labels == [{0: 1, 1: 2, 2: 0}[label] for label in before]
    with pytest.raises(ValueError, match="The data has the classes blue, green, red, but the network has cat, dog"):
        match_labels(samples_of(folder), ["cat", "dog"], 2)
    with pytest.raises(ValueError, match="The data has 3 classes and the teacher 7, so its labels cannot be used"):
        match_labels(samples_of(folder), None, 7)
