"""Contraction on the command line: a budget is met, and a killed search is resumed."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import pytest
import torch
from PIL import Image

from kornia_tinyvit import TinyViT, TinyViTConfig, progress, save_checkpoint
from kornia_tinyvit.cli.contract import change
from kornia_tinyvit.contraction import Budget, Candidate, SearchResult, count
from tests.cli.test_distill import TEACHER
from tests.conftest import TINY
from tests.helpers import CommandProcess, error_of, json_lines, run, run_both
from tests.scenes import CLASSES, make_images

SMALL = ("--recipe", "cifar10", "--img-size", "32", "--batch-size", "8")


@pytest.fixture
def folder(tmp_path) -> Path:
    return make_images(tmp_path / "data")


@pytest.fixture
def seed(tmp_path) -> Path:
    """The file of a network of 30 thousand weights."""
    return save_checkpoint(TinyViT(**TINY | {"img_size": 32}), tmp_path / "seed.safetensors")


def command(folder, seed, out, *options):
    held_out = () if "--validation" in options else ("--hold-out", "0.25")
    small = ("--variant", str(seed), *SMALL, *held_out, "--steps", "2")
    return ("contract", str(folder), *small, "--out", str(out), *options)


def journal(out: Path) -> list[dict]:
    return json_lines(out / "search.jsonl")


def count_evaluated(out: Path) -> int:
    return sum(line["event"] == "evaluated" for line in journal(out))


class TestContract:
    @pytest.mark.slow
    def test_json(self, folder, seed, tmp_path):
        limits = ("--max-parameters", "25k", "--max-macs", "2.5e6", "--min-depth", "2")
        report = json.loads(run(*command(folder, seed, tmp_path / "out", *limits, "--json")))
        assert report.keys() == {"winner", "evaluated", "path"}
        network = TinyViT.from_config(pretrained=report["winner"])
        assert network.config.num_classes == 3
        costs = count(network.config)
        assert costs["parameters"] <= 25e3
        assert costs["macs"] <= 2.5e6
        assert TinyViTConfig.from_dict(report["path"][-1]["config"]) == network.config
        assert report["path"][-1]["costs"] == costs
        depths = {tuple(line["config"]["depths"]) for line in journal(tmp_path / "out") if line["event"] == "measured"}
        assert depths == {TINY["depths"]}, "no stage has more than two blocks"
        assert report["evaluated"] == sum(line["event"] == "evaluated" for line in journal(tmp_path / "out"))
        assert Image.open(tmp_path / "out" / "search.png").size == (1120, 400)
        rows = json.loads(run("classify", str(folder / "red" / "00.png"), "--weights", report["winner"], "--json"))
        assert {each["label"] for each in rows[0]["predictions"]} == set(CLASSES)

        # 'train' takes the file in the place of a variant, for a network like it with first weights of its own.
        training = ("--recipe", "cifar10", "--img-size", "32", "--batch-size", "8", "--workers", "0", "--epochs", "1")
        out = ("--out", str(tmp_path / "trained"), "--json")
        trained = json.loads(run("train", str(folder), "--variant", report["winner"], *training, *out))
        assert TinyViT.from_config(pretrained=trained["last"]).config.embed_dims == network.config.embed_dims

    @pytest.mark.slow
    def test_text(self, folder, seed, tmp_path, monkeypatch):
        options = ("--max-parameters", "25k", "--weights", str(seed))
        monkeypatch.setattr(progress, "_MIN_SECONDS", 0)
        printed, notes = run_both(*command(folder, seed, tmp_path / "out", *options))
        assert (tmp_path / "out" / "weights" / "seed.safetensors").exists()
        assert "step 2 of 2" in notes
        rows = [line.split() for line in printed.splitlines() if "->" in line]
        assert len(rows) == sum(line["event"] == "kept" for line in journal(tmp_path / "out")) - 1
        assert all(int(row[3]) < int(row[1]) or float(row[3]) < float(row[1]) for row in rows)
        last = printed.strip().splitlines()[-1]
        assert " networks trained: " in last
        assert last.endswith("search.png")

    @pytest.mark.slow
    def test_refine(self, folder, seed, tmp_path, monkeypatch):
        """A network that lost more than it had to is improved within the same budget, and never left worse."""
        limits = ("--max-parameters", "25k", "--max-macs", "2.5e6")
        slim = TINY | {
            "img_size": 32,
            "embed_dims": (8, 8, 8, 16),
            "num_heads": (1, 1, 1, 2),
            "mlp_ratio": 1.0,
            "num_classes": 3,
        }
        start = save_checkpoint(TinyViT(**slim), tmp_path / "start.safetensors")
        trades = ("--refine", str(start), "--rounds", "1", "--candidates", "3", *limits, "--hold-out", "0.25")
        options = ("--variant", str(seed), *SMALL, *trades, "--out", str(tmp_path / "out"))
        monkeypatch.setattr(progress, "_MIN_SECONDS", 0)
        _, notes = run_both("contract", str(folder), *options)
        assert "round 1 of 1" in notes
        lines = journal(tmp_path / "out")
        found = {line["accuracy"] for line in lines if line["event"] == "evaluated"}
        assert sum(line["event"] == "evaluated" for line in lines) == 4
        report = json.loads(run("contract", str(folder), *options, "--json"))
        assert journal(tmp_path / "out") == lines, "all was known"
        assert report["path"][0]["config"]["embed_dims"] == [8, 8, 8, 16]
        assert report["path"][-1]["accuracy"] == max(found)
        costs = count(TinyViT.from_config(pretrained=report["winner"]).config)
        assert costs["parameters"] <= 25e3
        assert costs["macs"] <= 2.5e6

    def test_trades(self):
        first = TinyViTConfig(**TINY)
        grown = first.replace(mlp_ratio=first.mlp_ratio + 1, depths=(2, 2, 1, 2))
        pair = [Candidate(0, None, None, first, {}, 50.0)]
        pair.append(Candidate(1, 0, "mlp_ratio for depths[2]", grown, {}, 51.0))
        result = SearchResult(tuple(pair), (0, 1), None, Budget(max_macs=1))
        before, after = first.depths[2], 1
        report = f"mlp_ratio {first.mlp_ratio:g} -> {grown.mlp_ratio:g} for depths[2] {before} -> {after}"
        assert [change(result, each) for each in pair] == ["start", report]

    @pytest.mark.slow
    def test_killed(self, folder, seed, tmp_path):
        """A search that is killed twice repeats no evaluation and finds the same as an uninterrupted one."""
        options = ("--max-parameters", "25k", "--max-macs", "2.5e6", "--device", "cpu", "--json")
        whole = json.loads(run(*command(folder, seed, tmp_path / "whole", *options)))
        out = tmp_path / "out"
        evaluated: list[dict] = []
        for target in (2, 5):
            search = CommandProcess(tmp_path, *command(folder, seed, out, *options))
            search.signal(signal.SIGKILL, lambda: count_evaluated(out) >= target)  # noqa: B023 - called in this turn
            search.wait()
            found = [line for line in journal(out) if line["event"] == "evaluated"]
            assert found[: len(evaluated)] == evaluated
            evaluated = found
        assert len(evaluated) < whole["evaluated"], "killed too late"
        with (out / "search.jsonl").open("a") as file:
            file.write('{"event": "evaluated", "conf')  # what a killed write leaves
        again = json.loads(run(*command(folder, seed, out, *options)))
        assert again["path"] == whole["path"]
        winners = [TinyViT.from_config(pretrained=each["winner"]).state_dict() for each in (again, whole)]
        torch.testing.assert_close(winners[0], winners[1])
        lines = [(line["event"], json.dumps(line.get("config"))) for line in journal(out)]
        assert len(lines) == len(set(lines))
        assert [line for line in journal(out) if line["event"] == "evaluated"][: len(evaluated)] == evaluated

    @pytest.mark.slow
    def test_processes_end_with_a_killed_search(self, folder, seed, tmp_path):
        options = ("--max-parameters", "15k", "--processes", "2", "--device", "cpu", "--json")
        arguments = command(folder, seed, tmp_path / "out", *options)
        search = CommandProcess(tmp_path, *arguments)
        children: list[str] = []

        def ready() -> bool:
            pid = search.process.pid
            children[:] = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
            return count_evaluated(tmp_path / "out") > 0

        search.signal(signal.SIGKILL, ready)
        search.wait()
        assert children
        deadline = time.monotonic() + 60
        while any(Path(f"/proc/{child}").exists() for child in children):
            assert time.monotonic() < deadline, "a worker outlives its search"
            time.sleep(0.05)

    @pytest.mark.slow
    def test_stored_labels(self, folder, seed, tmp_path, capfd, monkeypatch):
        (tmp_path / "colors.py").write_text(TEACHER)
        store, teacher = tmp_path / "store", f"{tmp_path}/colors.py:build"
        recipe = ("--recipe", "cifar10", "--img-size", "32")
        save = ("distill", "save", str(folder), str(store), "--teacher", teacher, *recipe, "--workers", "0")
        run(*save, "--epochs", "1", "--top-k", "2", "--json")
        os.unlink(tmp_path / "colors.py")  # no teacher runs
        options = ("--max-parameters", "28k", "--store", str(store), "--start", "fresh", "--json")
        held_out = error_of(capfd, monkeypatch, *command(folder, seed, tmp_path / "out", *options))
        assert "none can be held out; give --validation" in held_out
        validation = make_images(tmp_path / "val", each=2, seed=5)
        report = json.loads(run(*command(folder, seed, tmp_path / "out", *options, "--validation", str(validation))))
        assert report["path"][-1]["costs"]["parameters"] <= 28e3
        assert journal(tmp_path / "out")[0]["evaluation"]["objective"]["kind"] == "stored labels"

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ((), "A budget needs positive limits (max_parameters, "),
            (("--max-macs", "30MM"), "--max-macs must be a number such as 1.3M, 30e6 or 2G; got '30MM'"),
            (("--max-macs", "1..2"), "got '1..2'"),
            (("--max-parameters", "10"), "cannot be met"),
            (("--max-memory", "20k", "--dtype", "float7"), "--dtype must be one of float32"),
            (("--max-latency-ms", "1", "--engine", "steam"), "engine must be auto"),
            (("--max-parameters", "20k", "--min-ratio", "0"), "min_ratio > 0; got SearchSpace(min_depth=1, "),
            (("--max-parameters", "20k", "--hold-out", "1"), "Cannot hold out 24 of 24"),
            (("--max-parameters", "20k", "--variant", "9m"), "There is no TinyViT variant '9m'"),
        ],
    )
    def test_errors(self, folder, seed, tmp_path, capfd, monkeypatch, options, message):
        assert message in error_of(capfd, monkeypatch, *command(folder, seed, tmp_path / "out", "--json", *options))
