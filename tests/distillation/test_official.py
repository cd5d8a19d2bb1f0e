"""Logits that the original implementation saved."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch

from kornia_tinyvit.distillation.official import OfficialLogits
from kornia_tinyvit.distillation.store import StoreError
from tests.conftest import shared

RECORD = np.dtype([("seed", "<i4"), ("classes", "<i2", (3,)), ("probabilities", "<f2", (3,))])


def save(path, ranks, epoch=0, top_k=3):
    """Write records as the original does: a list of keys a rank, the seeds counting up over all of them."""
    folder = path / f"logits_top{top_k}_epoch{epoch}"
    folder.mkdir(parents=True)
    seed = 0
    for rank, keys in enumerate(ranks):
        records = np.zeros(len(keys), RECORD)
        for record in records:
            record["seed"], record["classes"], record["probabilities"] = seed, [seed, 21840, 7], [0.5, 0.25, 0.125]
            seed += 1
        (folder / f"rank{rank}-keys.txt").write_text("".join(f"{key}\n" for key in keys))
        (folder / f"rank{rank}-values.bin").write_bytes(records.tobytes())
    return folder


class TestSmoke:
    def test_originals(self):
        path = shared("reference/microsoft_logits")
        expected = json.loads((path / "expected.json").read_text())
        logits = OfficialLogits(path)
        assert logits.epochs == [0]
        assert logits.top_k == 10
        assert sorted(logits.keys(0)) == sorted(expected)
        keys = sorted(expected, reverse=True) * 2
        records = logits.read(0, keys)
        assert records.seeds.tolist() == [expected[key]["seed"] for key in keys]
        assert records.classes.tolist() == [expected[key]["index"] for key in keys]
        assert records.probabilities.tolist() == [expected[key]["value"] for key in keys]

    def test_read(self, tmp_path):
        save(tmp_path, [["a/1", "b c/2"], [], ["d/3"]])
        save(tmp_path, [["a/1"]], epoch=12)
        (tmp_path / "logits_notes").mkdir()
        logits = OfficialLogits(tmp_path)
        assert logits.epochs == [0, 12]
        assert logits.keys(0) == ["a/1", "b c/2", "d/3"]
        records = logits.read(0, ["d/3", "a/1"])
        assert [tensor.dtype for tensor in records] == [torch.int32, torch.uint16, torch.float16]
        assert records.seeds.tolist() == [2, 0]
        assert records.classes.tolist() == [[2, 21840, 7], [0, 21840, 7]]
        assert records.probabilities.tolist() == [[0.5, 0.25, 0.125]] * 2
        assert logits.keys(12) == ["a/1"]
        assert logits.read(0, []).classes.shape == (0, 3)

    def test_first_rank_wins(self, tmp_path):
        save(tmp_path, [["a", "b"], ["c", "a"]])
        logits = OfficialLogits(tmp_path)
        assert logits.keys(0) == ["a", "b", "c"]
        assert logits.read(0, ["a", "b", "c"]).seeds.tolist() == [0, 1, 2]


class TestRefusals:
    def test_no_folder(self, tmp_path):
        with pytest.raises(StoreError, match="it has none"):
            OfficialLogits(tmp_path)
        with pytest.raises(StoreError, match="it has none"):
            OfficialLogits(tmp_path / "missing")

    def test_two_sizes(self, tmp_path):
        save(tmp_path, [["a"]])
        save(tmp_path, [["a"]], epoch=1, top_k=5)
        with pytest.raises(StoreError, match="of one K; it has K = 3, 5"):
            OfficialLogits(tmp_path)

    def test_unknown(self, tmp_path):
        save(tmp_path, [["a", "b"]])
        logits = OfficialLogits(tmp_path)
        with pytest.raises(StoreError, match="no record of 'x/y'; the first of its 2 keys is 'a'"):
            logits.read(0, ["a", "x/y"])
        with pytest.raises(StoreError, match="no epoch 4; it has 0"):
            logits.read(4, ["a"])

    @pytest.mark.parametrize("change", [-1, -16, 16])
    def test_truncated(self, tmp_path, change):
        folder = save(tmp_path, [["a", "b"], ["c"]])
        values = folder / "rank0-values.bin"
        values.write_bytes((values.read_bytes() + bytes(16))[: 32 + change])
        logits = OfficialLogits(tmp_path)
        for _ in range(2):
            with pytest.raises(
                StoreError, match=f"rank0-values.bin is damaged: it has {32 + change} bytes.*2 keys.*32"
            ):
                logits.read(0, ["c"])

    def test_other_top_k(self, tmp_path):
        """A folder with the wrong K in its name does not fit the files."""
        folder = save(tmp_path, [["a", "b"]])
        shutil.move(folder, tmp_path / "logits_top4_epoch0")
        with pytest.raises(StoreError, match="damaged"):
            OfficialLogits(tmp_path).keys(0)

    @pytest.mark.parametrize("name", ["rank0-keys.txt", "rank0-values.bin", "rank1-values.bin"])
    def test_missing_file(self, tmp_path, name):
        folder = save(tmp_path, [["a"], ["b"]])
        (folder / name).unlink()
        with pytest.raises(StoreError, match=f"holds no {name}"):
            OfficialLogits(tmp_path).keys(0)

    def test_empty_folder(self, tmp_path):
        (tmp_path / "logits_top3_epoch0").mkdir()
        with pytest.raises(StoreError, match=r"holds no rank0-keys\.txt"):
            OfficialLogits(tmp_path).keys(0)
