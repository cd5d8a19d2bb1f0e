import json
import sys

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from kornia_tinyvit.cli import app
from kornia_tinyvit.deploy import benchmark as measuring
from kornia_tinyvit.deploy.engines import ENGINES
from tests.helpers import error_of, make_weights, run

MODULE = sys.modules["kornia_tinyvit.cli.benchmark"]  # the package has the command under this name
FAST = ("--repetitions", "1", "--no-tune-allocator")


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(measuring, "matrix_peak", lambda dtype, device: 100.0)


@pytest.fixture
def weights(tiny, tmp_path) -> str:
    return make_weights(tiny, tmp_path)


@pytest.fixture
def folder(tmp_path):
    generator = torch.Generator().manual_seed(0)
    for number in range(12):
        path = tmp_path / "data" / ("cat", "dog", "frog")[number % 3] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = (torch.rand(4, 4, 3, generator=generator) * 255).byte()
        Image.fromarray(pixels.numpy()).resize((64, 64)).save(path)
    return str(tmp_path / "data")


class TestBenchmark:
    def test_json(self, weights):
        options = ("--engines", "eager", "--dtypes", "float32,int8", "--batch-sizes", "2,1", "--json", *FAST)
        report = json.loads(run("benchmark", "--weights", weights, *options))
        measured, skipped, *others = report["rows"]
        assert [(row["batch"], row["dtype"]) for row in others] == [(1, "float32"), (1, "int8")]
        assert (measured["engine"], measured["dtype"], measured["batch"]) == ("eager", "float32", 2)
        assert measured["images_per_second"] == pytest.approx(2000 / measured["ms"])
        share = 100 * 2 * report["gflop"] / (measured["ms"] / 1000) / report["peak_gflops"]["float32"]
        assert measured["peak_fraction"] == pytest.approx(share)
        assert measured["warmup_s"] > 0
        assert measured["agreement"] is measured["top1"] is None
        assert skipped["skipped"] == "int8 is calibrated on images: give --data"
        assert skipped["ms"] is None
        assert report["machine"]["threads"] == torch.get_num_threads()
        assert report["machine"]["allocator"] == "default"
        assert report["network"]["img_size"] == 64

    def test_agreement(self, weights, folder):
        options = ("--engines", "eager", "--dtypes", "float32,bfloat16", "--batch-sizes", "4", "--json", *FAST)
        report = json.loads(run("benchmark", "--weights", weights, "--data", folder, *options))
        exact = report["rows"][0]
        assert exact["agreement"] == 100
        assert exact["error"] < 1e-4
        assert exact["top1"] == report["reference_top1"]
        if report["rows"][1]["skipped"] is None:
            assert 1e-4 < report["rows"][1]["error"] < 0.1

    def test_table(self, weights, folder):
        options = ("--engines", "eager", "--dtypes", "float32,int8", "--batch-sizes", "3", "--data", folder, *FAST)
        output = run("benchmark", "--weights", weights, *options)
        rows = [line.split() for line in output.splitlines() if line.split()[:1] == ["eager"]]
        assert rows[0][:3] == ["eager", "float32", "3"]
        assert rows[0][-2] == "100.00"
        assert rows[1] == ["eager", "int8", "3", *6 * ["-"]]
        assert "\neager int8: " in output
        assert "top-1 of the unconverted network: " in output
        assert output.endswith("allocator default\n")

    def test_random_weights_are_not_compared(self, folder):
        options = ("--engines", "eager", "--dtypes", "float32", "--batch-sizes", "1", "--img-size", "64", "--json")
        result = CliRunner().invoke(app, ["benchmark", "--variant", "1m", *options, *FAST, "--data", folder])
        assert result.exit_code == 0, result.output
        (row,) = json.loads(result.stdout)["rows"]
        assert row["agreement"] is None
        assert row["ms"] > 0
        assert "The weights are random" in result.stderr

    def test_method(self, weights, folder):
        options = ("--engines", "eager", "--dtypes", "float32", "--batch-sizes", "1", "--json", *FAST)
        arguments = ("benchmark", "--weights", weights, "--data", folder, *options)
        report = json.loads(run(*arguments, "--method", "forward_intermediates"))
        assert report["rows"][0]["agreement"] is None
        assert report["rows"][0]["error"] < 1e-4
        output = run(*(each for each in arguments if each != "--json"), "--method", "forward_features")
        assert "error" in output
        assert "top-1" not in output

    def test_reason_of_skipped_engines(self, weights, monkeypatch):
        monkeypatch.setattr(ENGINES["onnxruntime"], "missing", classmethod(lambda cls: "needs what is not here"))

        def fail(*args, **kwargs):
            raise RuntimeError("compiling failed\nwith a long trace")

        monkeypatch.setattr(ENGINES["inductor"], "__init__", fail)
        options = ("--engines", "onnxruntime,inductor,eager", "--dtypes", "float32", "--batch-sizes", "1", *FAST)
        rows = json.loads(run("benchmark", "--weights", weights, *options, "--json"))["rows"]
        assert [row["skipped"] for row in rows] == ["needs what is not here", "compiling failed", None]
        output = run("benchmark", "--weights", weights, *options)
        assert "onnxruntime float32: needs what is not here\ninductor float32: compiling failed\n" in output

    def test_allocator_and_threads(self, weights, monkeypatch):
        done = []
        monkeypatch.setattr(MODULE, "keep_memory", lambda: done.append(1) or True)
        before = torch.get_num_threads()
        options = ("--engines", "eager", "--dtypes", "float32", "--batch-sizes", "1", "--repetitions", "1", "--json")
        try:
            report = json.loads(run("benchmark", "--weights", weights, *options, "--threads", "3"))
        finally:
            torch.set_num_threads(before)
        assert (report["machine"]["allocator"], report["machine"]["threads"]) == ("tuned", 3)
        run("benchmark", "--weights", weights, *options, "--no-tune-allocator")
        assert len(done) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--engines", "eager,steam"), "--engines takes eager, inductor"),
        (("--dtypes", "float8"), "--dtypes takes float32, bfloat16"),
        (("--batch-sizes", "1,x"), "--batch-sizes takes positive numbers"),
        (("--batch-sizes", "0"), "--batch-sizes takes positive numbers"),
        (("--data", "gone"), "There is no dataset gone"),
    ],
)
def test_errors(weights, capfd, monkeypatch, options, message):
    assert message in error_of(capfd, monkeypatch, "benchmark", "--weights", weights, *options, "--json")
