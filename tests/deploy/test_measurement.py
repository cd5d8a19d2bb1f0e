import dataclasses
import json
import time

import pytest
import torch
from torch import nn

from kornia_tinyvit import TinyViT
from kornia_tinyvit.deploy import measurement
from kornia_tinyvit.deploy.measurement import count_flops, describe_machine, interleaved, matrix_peak


class TestMachine:
    def test_current_machine(self):
        machine = describe_machine()
        assert machine.threads == torch.get_num_threads()
        assert machine.versions["torch"].split("+")[0] == torch.__version__.split("+")[0]
        assert {"Python", "kornia"} <= set(machine.versions)
        json.dumps(dataclasses.asdict(machine))
        for part in (machine.processor, f"{machine.threads} threads", f"torch {machine.versions['torch']}"):
            assert part in str(machine)

    def test_cpuinfo(self, monkeypatch):
        fields = {"model name": "Some CPU", "flags": "fpu avx2 amx_int8 sse"}
        monkeypatch.setattr(measurement, "_read_cpuinfo", lambda: fields)
        machine = describe_machine()
        assert machine.processor == "Some CPU"
        assert machine.instructions == ("avx2", "amx_int8")
        assert "Some CPU (avx2 amx_int8)" in str(machine)

    @pytest.mark.parametrize(("tuned", "variable"), [(True, False), (False, True), (False, False)])
    def test_allocator(self, monkeypatch, tuned, variable):
        monkeypatch.delenv("MALLOC_MMAP_THRESHOLD_", raising=False)
        if variable:
            monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "1073741824")
        allocator = describe_machine(allocator_tuned=tuned).allocator
        assert allocator == ("tuned" if tuned or variable else "default")


class TestPeak:
    @pytest.fixture(autouse=True)
    def small(self, monkeypatch):
        monkeypatch.setattr(measurement, "_CPU_SIZES", (64, 128))

    def test_multiply_accumulate_counts_as_two(self, monkeypatch):
        ticks = iter(range(1000))
        monkeypatch.setattr(measurement.time, "perf_counter", lambda: next(ticks))  # each matrix product takes a second
        assert matrix_peak(torch.float32) == pytest.approx(2 * 128**3 / 1e9)

    def test_slow_int8_has_no_peak(self, monkeypatch):
        multiply = torch._int_mm

        def slow(left, right):
            time.sleep(0.05)
            return multiply(left, right)

        monkeypatch.setattr(torch, "_int_mm", slow)
        assert matrix_peak(torch.int8) is None


class TestFlops:
    def test_linear_and_convolution(self):
        assert count_flops(nn.Linear(10, 20), torch.rand(3, 10)) == 2 * 3 * 10 * 20
        assert count_flops(nn.Conv2d(3, 8, 3), torch.rand(2, 3, 10, 12)) == 2 * 2 * 8 * 8 * 10 * 27

    def test_attention_counts(self):
        def attend(x):
            return nn.functional.scaled_dot_product_attention(x, x, x)

        assert count_flops(attend, torch.rand(2, 3, 7, 5)) == 2 * (2 * 2 * 3 * 7 * 7 * 5)

    def test_network(self):
        with torch.device("meta"):
            model = TinyViT.from_config("5m").eval()
        assert count_flops(model, torch.rand(1, 3, 224, 224, device="meta")) == pytest.approx(2.51e9, rel=1e-2)


class TestInterleaved:
    @pytest.mark.parametrize(("settle", "runs"), [(0, 1), (1e-6, 2)])
    def test_order(self, settle, runs):
        seen = []
        steps = {name: lambda name=name: seen.append(name) for name in "ab"}
        times = interleaved(steps, repetitions=2, warmup=1, settle=settle)
        assert seen == ["a", "b"] + 2 * (runs * ["a"] + runs * ["b"])
        assert set(times) == {"a", "b"}

    def test_median_of_timed_runs(self, monkeypatch):
        clock = [0.0]
        durations = iter([100.0, 9.0, 1.0, 50.0, 2.0, 50.0, 7.0])  # a warm-up, then each after an untimed run
        monkeypatch.setattr(measurement.time, "perf_counter", lambda: clock[0])
        monkeypatch.setattr(measurement.time, "sleep", lambda _: None)

        def step():
            clock[0] += next(durations)

        assert interleaved({"step": step}, repetitions=3, warmup=1) == {"step": 2.0}

    def test_errors(self):
        with pytest.raises(ValueError, match="at least 1; got 0"):
            interleaved({}, 0)
