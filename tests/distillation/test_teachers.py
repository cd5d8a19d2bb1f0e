"""Loading teachers, and their preprocessing."""

from __future__ import annotations

import sys
import types

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from kornia_tinyvit import TinyViT, save_checkpoint
from kornia_tinyvit.checkpoints.hub import write_timm_folder
from kornia_tinyvit.distillation import Teacher, load_teacher
from kornia_tinyvit.extras import MissingExtraError
from kornia_tinyvit.preprocessing import IMAGENET_MEAN, IMAGENET_STD, Preprocessing

MEAN, STD = (0.5, 0.4, 0.3), (0.25, 0.5, 0.125)


class Raw(nn.Module):
    """Returns its images, optionally in an output object as in transformers."""

    def __init__(self, wrapped: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))
        self.dropout = nn.Dropout(0.5)
        self.wrapped = wrapped

    def forward(self, images):
        images = self.dropout(images)
        return types.SimpleNamespace(logits=images) if self.wrapped else images


def normalize(images, mean=IMAGENET_MEAN, std=IMAGENET_STD):
    return (images - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]


class TestTeacher:
    def test_normalization(self, images):
        teacher = Teacher(Raw(), "raw", mean=MEAN, std=STD)
        assert torch.allclose(teacher(normalize(images)), normalize(images, MEAN, STD), atol=1e-5)

    @pytest.mark.parametrize(("mean", "std"), [(MEAN, None), (None, STD)])
    def test_mean_or_std_only(self, images, mean, std):
        teacher = Teacher(Raw(), "raw", mean=mean, std=std)
        expected = normalize(images, mean or IMAGENET_MEAN, std or IMAGENET_STD)
        assert torch.allclose(teacher(normalize(images)), expected, atol=1e-5)

    def test_student_normalization(self, images):
        teacher = Teacher(Raw(), "raw", mean=MEAN, std=STD, student_mean=(0.1, 0.2, 0.3), student_std=(1, 2, 3))
        shown = normalize(images, (0.1, 0.2, 0.3), (1.0, 2.0, 3.0))
        assert torch.allclose(teacher(shown), normalize(images, MEAN, STD), atol=1e-5)

    def test_default_keeps_the_normalization(self, images):
        assert torch.equal(Teacher(Raw(), "raw")(images), images)

    @pytest.mark.parametrize("size", [32, 96])
    def test_image_size(self, images, size):
        teacher = Teacher(Raw(), "raw", size, MEAN, STD)
        resized = F.interpolate(images, (size, size), mode="bicubic", antialias=True)
        assert torch.allclose(teacher(normalize(images)), normalize(resized, MEAN, STD), atol=1e-4)
        same = torch.rand(1, 3, size, size)
        assert torch.allclose(Teacher(Raw(), "raw", size)(same), same)

    def test_output_objects(self, images):
        assert torch.equal(Teacher(Raw(wrapped=True), "raw")(images), images)

    def test_frozen_in_evaluation_mode(self, images):
        teacher = Teacher(Raw().train(), "raw")
        nn.Sequential(teacher).train()
        assert not any(module.training for module in teacher.modules())
        assert torch.equal(teacher(images), images)  # no dropout
        assert not any(parameter.requires_grad for parameter in teacher.parameters())

    def test_describe(self, tiny):
        teacher = Teacher(tiny, "mine", 64)
        first = teacher.describe()
        assert (first["name"], first["img_size"], len(first["checksum"])) == ("mine", 64, 16)
        assert teacher.describe() == first
        with torch.no_grad():
            tiny.head.bias[3] += 1e-4
        assert teacher.describe()["checksum"] != first["checksum"]
        with torch.no_grad():
            tiny.head.bias[3] -= 1e-4
        next(tiny.buffers()).add_(1)
        assert teacher.describe()["checksum"] != first["checksum"]

    def test_describe_with_all_dtypes(self):
        network = nn.BatchNorm2d(3).to(torch.bfloat16)
        network.register_buffer("mask", torch.tensor([True, False]))
        network.register_buffer("empty", torch.zeros(0))
        assert Teacher(network, "odd").describe()["name"] == "odd"


FILE = """
import torch
from torch import nn

NUMBER = 3

def build():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 5))

def wrong():
    return [1, 2]
"""


class TestLoadTeacher:
    def test_module(self, tiny, images):
        teacher = load_teacher(tiny.train())
        assert (teacher.name, teacher.img_size) == ("TinyViT", None)
        assert torch.equal(teacher(images), tiny.eval()(images))
        assert load_teacher(teacher) is teacher

    def test_function_in_a_file(self, tmp_path):
        file = tmp_path / "mine.py"
        file.write_text(FILE)
        teacher = load_teacher(f"{file}:build")
        assert teacher(torch.zeros(2, 3, 8, 8)).shape == (2, 5)
        assert "mine.py:build" in teacher.name
        assert teacher.describe() == load_teacher(f"{file}:build").describe()

    def test_teacher_that_a_file_returns(self, tmp_path):
        """Its preprocessing is part of the description, not hidden inside another teacher."""
        descriptions = []
        for size in (96, 112):
            (tmp_path / "made.py").write_text(
                "from kornia_tinyvit import TinyViT\nfrom kornia_tinyvit.distillation import Teacher\n"
                "def build():\n"
                "    network = TinyViT.from_config('1m', pretrained='cifar10')\n"
                f"    return Teacher(network, 'own', img_size={size}, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))\n"
            )
            descriptions.append(load_teacher(f"{tmp_path / 'made.py'}:build").describe())
        assert descriptions[0] != descriptions[1]
        assert descriptions[0]["name"] == "made.py:build"
        assert descriptions[0]["offset"] != [0.0, 0.0, 0.0]

    def test_description_is_independent_of_the_folder(self, tmp_path, monkeypatch):
        (tmp_path / "mine.py").write_text(FILE)
        monkeypatch.chdir(tmp_path)
        assert load_teacher("mine.py:build").describe() == load_teacher(f"{tmp_path}/mine.py:build").describe()

    @pytest.mark.parametrize(
        ("source", "message"),
        [
            ("gone.py:build", "no file .*gone.py"),
            ("mine.py:other", "no function 'other'"),
            ("mine.py:NUMBER", "no function 'NUMBER'"),
            ("mine.py:", "no function ''.*mine.py:build"),
            ("mine.py", "no function ''"),
            ("mine.py:wrong", "must return an nn.Module; got list"),
        ],
    )
    def test_file_errors(self, tmp_path, source, message):
        (tmp_path / "mine.py").write_text(FILE)
        with pytest.raises(ValueError, match=message):
            load_teacher(f"{tmp_path}/{source}")

    def test_checkpoint(self, tiny, tmp_path, images):
        path = save_checkpoint(tiny, tmp_path / "weights.safetensors")
        for source in (path, str(path)):
            teacher = load_teacher(source)
            assert (teacher.name, teacher.img_size) == ("weights.safetensors", 64)
            assert torch.allclose(teacher(images), tiny(images), atol=1e-6)
            small = F.interpolate(images, (40, 40), mode="bilinear")
            expected = tiny(F.interpolate(small, (64, 64), mode="bicubic", antialias=True))
            assert torch.allclose(teacher(small), expected, atol=1e-5)

    def test_hub_folder(self, tiny, tmp_path, images):
        tiny.preprocessing = Preprocessing(64, mean=(0.5,) * 3, std=(0.25,) * 3)
        teacher = load_teacher(write_timm_folder(tiny, tmp_path / "hub"))
        assert (teacher.name, teacher.img_size) == ("hub", 64)
        expected = tiny(normalize(images, (0.5,) * 3, (0.25,) * 3))
        assert torch.allclose(teacher(normalize(images)), expected, atol=1e-4)

    def test_variant(self, images):
        teacher = load_teacher("1m/cifar10")
        assert (teacher.name, teacher.img_size) == ("1m/cifar10", 96)
        images = F.interpolate(images, (96, 96), mode="bilinear")
        assert torch.allclose(
            teacher(images), TinyViT.from_config("1m", pretrained="cifar10").eval()(images), atol=1e-5
        )

    @pytest.mark.parametrize(
        ("source", "message"),
        [("nonsense", "Unknown teacher 'nonsense'; expected file.py:function"), ("", "Unknown teacher ''"),
         ("77m/in1k", "77m"), ("1m/nothing", "nothing")],
    )  # fmt: skip
    def test_errors(self, source, message, monkeypatch, tmp_path):
        monkeypatch.chdir(tmp_path)
        with pytest.raises(ValueError, match=message):
            load_teacher(source)

    def test_folder(self, tmp_path):
        with pytest.raises((ValueError, OSError)):
            load_teacher(tmp_path)

    @pytest.mark.parametrize("name", ["timm", "transformers"])
    def test_missing_packages(self, monkeypatch, name):
        monkeypatch.setitem(sys.modules, name, None)
        with pytest.raises(MissingExtraError, match=f"pip install {name}"):
            load_teacher(f"{name}:anything/at-all")

    def test_timm(self, monkeypatch, images):
        requested = []

        def create_model(name, pretrained):
            requested.append((name, pretrained))
            network = Raw()
            network.pretrained_cfg = {"input_size": (3, 48, 48), "mean": MEAN, "std": STD}
            return network

        timm = types.ModuleType("timm")
        timm.create_model = create_model
        monkeypatch.setitem(sys.modules, "timm", timm)
        teacher = load_teacher("timm:vit_large.mine")
        assert requested == [("vit_large.mine", True)]
        assert (teacher.name, teacher.img_size) == ("timm:vit_large.mine", 48)
        resized = F.interpolate(images, (48, 48), mode="bicubic", antialias=True)
        assert torch.allclose(teacher(normalize(images)), normalize(resized, MEAN, STD), atol=1e-4)

    @pytest.mark.parametrize(
        "processor",
        [
            {"crop_size": {"height": 48, "width": 48}, "size": {"shortest_edge": 56}},
            {"crop_size": None, "size": {"shortest_edge": 48}},
            {"size": {"height": 48, "width": 48}},
        ],
    )
    def test_transformers(self, monkeypatch, images, processor):
        requested = []

        def loader(result):
            return types.SimpleNamespace(from_pretrained=lambda name: requested.append(name) or result)

        transformers = types.ModuleType("transformers")
        transformers.AutoModelForImageClassification = loader(Raw(wrapped=True))
        loaded = types.SimpleNamespace(image_mean=list(MEAN), image_std=list(STD), **processor)
        transformers.AutoImageProcessor = loader(loaded)
        monkeypatch.setitem(sys.modules, "transformers", transformers)
        teacher = load_teacher("transformers:owner/vit")
        assert requested == ["owner/vit", "owner/vit"]
        assert (teacher.name, teacher.img_size) == ("transformers:owner/vit", 48)
        resized = F.interpolate(images, (48, 48), mode="bicubic", antialias=True)
        assert torch.allclose(teacher(normalize(images)), normalize(resized, MEAN, STD), atol=1e-4)
