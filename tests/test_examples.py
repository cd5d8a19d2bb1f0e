"""The examples, run in separate processes; their files and printed numbers are checked."""

from __future__ import annotations

import importlib.util
import io
import json
import math
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from safetensors.torch import load_file

from kornia_tinyvit import ImageClassifier, MobileSAM, TinyViT, save_checkpoint
from kornia_tinyvit.checkpoints.catalog import ASSETS
from kornia_tinyvit.data import (
    ClassificationDataset,
    InstanceDataset,
    ReplayableAugmentation,
    ReplayedSamples,
    SegmentationDataset,
)
from kornia_tinyvit.distillation import FeatureStore, LabelStore, check_records
from kornia_tinyvit.images import read_image
from kornia_tinyvit.preprocessing import EvaluationPipeline
from kornia_tinyvit.semantic import SemanticSegmenter
from kornia_tinyvit.training import evaluate
from tests.conftest import TINY
from tests.scenes import NAMES, make_instances, make_scenes
from tests.test_commands import parse_command_line

EXAMPLES = Path(__file__).parents[1] / "examples"
CHELSEA = ASSETS / "photos" / "chelsea.png"
CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


def run(*command: object, cwd: Path, status: int = 0) -> str:
    """Run Python with these arguments and return its output, or its errors for another exit status than 0."""
    environment = os.environ | {"PYTHONPATH": str(EXAMPLES.parent), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, *map(str, command)], cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == status, done.stderr
    return done.stderr if status else done.stdout


def load_example(name: str):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def json_lines(output: str) -> list[dict]:
    return [json.loads(line) for line in output.splitlines() if line.startswith("{")]


def read_uint8(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB")).astype(int)


@pytest.mark.slow
def test_augment_and_classify(tmp_path):
    copies, size = 3, 64
    options = ("--copies", copies, "--size", size, "--batch-size", 4, "--repeats", 2, "--out", "new/sheet.png")
    photos = [CHELSEA, ASSETS / "photos" / "rocket.jpg"]
    output = run(EXAMPLES / "augment_and_classify.py", *photos, *options, cwd=tmp_path)

    rows = re.findall(r"^(\S+\.\w{3}) +(\w+) +([\d.]+)% +(\d+) of 3 +([\d.]+)%", output, re.MULTILINE)
    assert [row[0] for row in rows] == [photo.name for photo in photos]
    classifier = ImageClassifier.from_config("1m", pretrained="cifar10")
    square = EvaluationPipeline(size, crop_fraction=1.0)
    for photo, (_, label, score, _, in_copies) in zip(photos, rows, strict=True):
        (expected,) = classifier.predict(square.resize_and_crop(read_image(photo)[None]), top_k=1)[0]
        assert label == expected.label
        assert float(score) == pytest.approx(100 * expected.score, abs=0.2)
        assert 0 < float(in_copies) <= 100

    rates = [float(rate) for rate in re.findall(r": ([\d.]+) images/s", output)]
    assert len(rates) == 2
    assert min(rates) > 0

    # The frames match the table: read one corner of each tile, row by row.
    sheet = read_uint8(tmp_path / "new" / "sheet.png")
    pitch = size + 2 * 4 + 6
    assert sheet.shape == (2 * pitch - 6, (copies + 1) * pitch - 6, 3)
    corners = sheet[1::pitch, 1::pitch]
    assert (corners[:, 0] == corners[0, 0, 0]).all()
    green = (corners[:, 1:, 1] > corners[:, 1:, 0]).sum(1)
    assert green.tolist() == [int(row[3]) for row in rows]
    first, copy = sheet[4 : 4 + size, 4 : 4 + size], sheet[4 : 4 + size, pitch + 4 : pitch + 4 + size]
    assert np.abs(first - copy).mean() > 3  # the copies are augmented


@pytest.mark.slow
@pytest.mark.parametrize(("epsilon", "target"), [(4, None), (2.5, "truck"), (0, None)])
def test_adversarial(tmp_path, epsilon, target):
    options = ("--epsilon", epsilon, "--steps", 8, "--out", "attack") + (("--target", target) if target else ())
    output = run(EXAMPLES / "adversarial.py", CHELSEA, *options, cwd=tmp_path)

    labels = dict(re.findall(r"^(before|after): (.+) [\d.]+%$", output, re.MULTILINE))
    name, before, after = re.search(r"^score of (.+): ([\d.]+)% -> ([\d.]+)%$", output, re.MULTILINE).groups()
    norm = float(re.search(r"^L-inf norm: ([\d.]+)/255$", output, re.MULTILINE)[1])
    change = read_uint8(tmp_path / "attack" / "attacked.png") - read_uint8(CHELSEA)
    assert np.abs(change).max() == pytest.approx(norm, abs=1e-3)
    assert norm == math.floor(epsilon)
    assert not change[:, :60].any()  # pixels outside of the crop are unchanged

    # The file gives the printed results.
    classifier = ImageClassifier.from_config("1m", pretrained="cifar10")
    predictions = classifier.predict([CHELSEA, tmp_path / "attack" / "attacked.png"], top_k=10)
    assert [each[0].label for each in predictions] == [labels["before"], labels["after"]]
    scores = [{each.label: 100 * each.score for each in image}[name] for image in predictions]
    assert scores == pytest.approx([float(before), float(after)], abs=0.02)
    assert name == (target or labels["before"])
    if epsilon == 0:
        assert scores[0] == pytest.approx(scores[1], abs=0.02)
    else:
        assert (scores[1] > 2 * scores[0]) if target else (scores[1] < scores[0] / 2)
    succeeded = (labels["after"] == name) == bool(target)
    assert ("the attack succeeded" in output) == succeeded
    assert ("the attack failed" in output) != succeeded
    height, width, _ = change.shape
    assert Image.open(tmp_path / "attack" / "sheet.png").size == (5 * width + 4 * 8, height)


@pytest.mark.slow
def test_multiscale_features(tmp_path):
    sizes = [(64, 64), (40, 100)]
    arguments = [f"{height}x{width}" for height, width in sizes]
    output = run(EXAMPLES / "multiscale_features.py", CHELSEA, "--sizes", *arguments, "--channels", 8, cwd=tmp_path)

    shapes = re.findall(r"stride +(\d+): stage (\d+) x (\d+) x (\d+) +pyramid (\d+) x (\d+) x (\d+)", output)
    expected = [
        (stride, channels, -(-height // stride), -(-width // stride), 8, -(-height // stride), -(-width // stride))
        for height, width in sizes
        for stride, channels in zip((4, 8, 16, 32), (32, 64, 96, 160), strict=True)
    ]
    assert [tuple(map(int, numbers)) for numbers in shapes] == expected
    reached = re.findall(r"gradients reach (\d+) of (\d+)", output)
    assert len(reached) == 2
    assert all(some == every != "0" for some, every in reached)
    for name, (height, width) in zip(arguments, sizes, strict=True):
        zoom = 256 // height
        image = Image.open(tmp_path / "features" / f"features_{name}.png")
        assert image.size == (5 * zoom * width + 4 * 6, zoom * height)
        assert len(set(image.crop((zoom * width + 6, 0, 2 * zoom * width + 6, zoom * height)).getcolors(10**6))) > 50


def test_feature_pyramid_is_top_down():
    module = load_example("multiscale_features")
    features = [torch.rand(1, 4, side, side + 3, requires_grad=True) for side in (9, 5, 3)]
    levels = module.FeaturePyramid((4, 4, 4), 6)(features)
    assert [tuple(level.shape) for level in levels] == [(1, 6, 9, 12), (1, 6, 5, 8), (1, 6, 3, 6)]
    assert all(gradient.any() for gradient in torch.autograd.grad(levels[0].sum(), features, retain_graph=True))
    assert torch.autograd.grad(levels[2].sum(), features, allow_unused=True)[0] is None


def draw_shape(name: str, width: int, height: int, colors: list[tuple[int, ...]]) -> Image.Image:
    """Draw a disc, stripes or a checkerboard on an image of any size."""
    image = Image.new("RGB", (width, height), colors[0])
    draw = ImageDraw.Draw(image)
    side = min(width, height)
    if name == "disc":
        box = (width / 2 - side / 3, height / 2 - side / 3, width / 2 + side / 3, height / 2 + side / 3)
        draw.ellipse(box, fill=colors[1])
        return image
    cell = side // 6
    for row in range(height // cell + 1):
        for column in range(width // cell + 1):
            if (row + (column if name == "board" else 0)) % 2:
                left, top = column * cell, row * cell
                draw.rectangle((left, top, left + cell - 1, top + cell - 1), fill=colors[1])
    return image


@pytest.fixture
def shapes(tmp_path) -> Path:
    """A folder of three classes with ten images each, of different sizes, in two file formats."""
    generator = np.random.default_rng(0)
    for name in ("board", "disc", "stripes"):
        (tmp_path / "shapes" / name).mkdir(parents=True)
        for number in range(10):
            colors = [tuple(generator.integers(0, 100, 3).tolist()), tuple(generator.integers(150, 256, 3).tolist())]
            image = draw_shape(name, 70 + 9 * number, 150 - 8 * number, colors[:: 1 if number % 2 else -1])
            image.save(tmp_path / "shapes" / name / f"{number}.{'jpg' if number % 3 else 'png'}")
    return tmp_path / "shapes"


@pytest.mark.slow
@pytest.mark.parametrize("freeze", [False, True])
def test_finetune_folder(shapes, tmp_path, freeze):
    options = ("--epochs", 8, "--batch-size", 8, "--out", "run") + (("--freeze-statistics",) if freeze else ())
    output = run(EXAMPLES / "finetune_folder.py", shapes, *options, cwd=tmp_path)

    assert output.startswith("3 classes, 24 training images, 6 held-out images\n")
    *epochs, end = json_lines(output)
    assert [line["epoch"] for line in epochs] == list(range(1, 9))
    assert epochs[-1]["loss"] < 0.6 * epochs[0]["loss"]
    assert end["train"] >= 0.9
    assert end["held_out_best"] == max(line["held_out"] for line in epochs)
    assert not list((tmp_path / "run").glob("*.tmp"))

    # The checkpoint gives the same accuracy on the images in the folder.
    classifier = ImageClassifier.from_config(pretrained=tmp_path / "run" / "best.safetensors")
    assert classifier.class_names == ("board", "disc", "stripes")
    files = sorted(shapes.rglob("*.*g"))
    predictions = [found[0].label for found in classifier.predict(files)]
    correct = [label == file.parent.name for file, label in zip(files, predictions, strict=True)]
    assert sum(correct) / len(correct) == pytest.approx((24 * end["train"] + 6 * end["held_out_best"]) / 30, abs=0.05)

    # Frozen statistics equal those of the pretrained network; the weights are trained in both cases.
    before = TinyViT.from_config("1m", pretrained="cifar10").state_dict()
    after = load_file(tmp_path / "run" / "last.safetensors")
    statistics = [name for name in before if name.endswith(("running_mean", "running_var"))]
    assert all(torch.equal(before[name], after[name]) == freeze for name in statistics)
    assert not torch.equal(before["patch_embed.seq.0.c.weight"], after["patch_embed.seq.0.c.weight"])

    if not freeze:  # run the command that the example prints
        program, *command = shlex.split(output.splitlines()[-1])
        assert (program, command[-1]) == ("kornia-tinyvit", "PHOTO")
        command[-1] = files[0]
        start = "from kornia_tinyvit.cli import main; main()"
        (row,) = json.loads(run("-c", start, *command, "--json", cwd=tmp_path))
        assert row["predictions"][0]["label"] == classifier.predict(files[0])[0][0].label


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (("adversarial", "--target", "unicorn"), "no class 'unicorn'"),
        (("finetune_folder", "lonely"), "no class in lonely has a second image"),
        (("feature_distillation", "lonely"), f"no folder {Path('lonely', 'train2017')}"),
    ],
)
def test_errors(tmp_path, monkeypatch, capsys, command, message):
    (tmp_path / "lonely" / "cat").mkdir(parents=True)
    Image.new("RGB", (40, 40)).save(tmp_path / "lonely" / "cat" / "1.png")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [f"{command[0]}.py", *command[1:]])
    with pytest.raises(SystemExit) as error:
        load_example(command[0]).main()
    assert error.value.code == 2
    assert message in capsys.readouterr().err


def write_parquet(path: Path, count: int, seed: int) -> None:
    """Write images in CIFAR-10's layout whose color depends on the class."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    generator = np.random.default_rng(seed)
    labels = [index % 10 for index in range(count)]
    images = []
    for label in labels:
        noise = generator.integers(0, 60, (32, 32, 3))
        file = io.BytesIO()
        pixels = (noise + np.array([20 * label, 100, 190 - 20 * label])).astype(np.uint8)
        Image.fromarray(pixels).save(file, "JPEG")
        images.append({"bytes": file.getvalue(), "path": None})
    pq.write_table(pa.table({"image": images, "label": labels}), path)


@pytest.mark.slow
def test_train_cifar10_resumes(tmp_path):
    pytest.importorskip("pyarrow")
    write_parquet(tmp_path / "train.parquet", 104, seed=0)
    write_parquet(tmp_path / "test.parquet", 20, seed=1)
    options = ("--held-out", 40, "--limit", 64, "--batch-size", 16)
    command = (EXAMPLES / "train_cifar10.py", ".", "--out", "run", *options)
    first = json_lines(run(*command, "--epochs", 2, cwd=tmp_path))
    assert [line.get("epoch") for line in first] == [1, 2, None]
    state = torch.load(tmp_path / "run" / "state.pt", weights_only=True)
    assert state["epoch"] == 2

    second = json_lines(run(*command, "--epochs", 3, cwd=tmp_path))
    assert [line.get("epoch") for line in second] == [3, None]
    assert second[0]["loss"] < first[1]["loss"] < first[0]["loss"]
    later = torch.load(tmp_path / "run" / "state.pt", weights_only=True)
    assert later["epoch"] == 3
    steps = [int(next(iter(each["optimizer"]["state"].values()))["step"]) for each in (state, later)]
    assert steps == [8, 12]  # the optimizer's state is resumed

    exported = tmp_path / "run" / "tiny_vit_1m_cifar10.safetensors"
    classifier = ImageClassifier.from_config(pretrained=exported)
    assert classifier.class_names == CIFAR10
    assert {tensor.dtype for tensor in load_file(exported).values() if tensor.is_floating_point()} == {torch.float16}
    assert 0 <= second[-1]["test_top1"] <= 1
    assert second[-1]["held_out_best"] == max(line["held_out"] for line in first + second if "epoch" in line)


@pytest.mark.slow
def test_finetune_transformers(tmp_path):
    for needed in ("pyarrow", "accelerate", "transformers", "peft"):
        pytest.importorskip(needed)
    write_parquet(tmp_path / "train.parquet", 40, seed=0)
    write_parquet(tmp_path / "test.parquet", 30, seed=1)
    options = ("--out", "run", "--train", 32, "--test", 20, "--epochs", 2, "--batch-size", 16, "--lora")
    printed = run(EXAMPLES / "finetune_transformers.py", ".", *options, cwd=tmp_path)
    (report,) = json_lines(printed)
    assert (report["train"], report["test"], report["steps"]) == (32, 20, 4)
    assert report["trainable"] < 100_000
    # The saved model has the printed accuracy: the adapters are merged.
    classifier = ImageClassifier.from_config(pretrained=tmp_path / "run" / "model")
    assert classifier.class_names == CIFAR10
    images = ClassificationDataset.open(tmp_path / "test.parquet").sample(20)
    predictions = classifier.predict([image for image, _ in images], top_k=1)
    correct = sum(best.index == label for (best,), (_, label) in zip(predictions, images, strict=True))
    assert correct / 20 == pytest.approx(report["accuracy"], abs=0.051)
    (best,) = classifier.predict(ASSETS / "photos" / "horse.png", top_k=1)[0]
    ((label, score),) = re.findall(r"^horse.png +(\w+) +([\d.]+)%", printed, re.MULTILINE)
    assert (label, float(score)) == (best.label, pytest.approx(100 * best.score, abs=0.06))


@pytest.mark.slow
def test_distill_cifar10(tmp_path):
    pytest.importorskip("pyarrow")
    pytest.importorskip("accelerate")
    write_parquet(tmp_path / "train.parquet", 40, seed=0)
    write_parquet(tmp_path / "test.parquet", 20, seed=1)
    command = (EXAMPLES / "distill_cifar10.py", ".", "--out", "run", "--teacher", "1m/cifar10", "--limit", 32)
    printed = run(*command, "--epochs", 1, "--batch-size", 16, "--seeds", 3, cwd=tmp_path)
    assert "stored 32 records" in printed
    for kind in ("labels", "online", "stored"):
        assert re.search(rf"{kind} seed 3: top-1 [\d.]+ %, [\d.]+ s per epoch, peak \d+ MB", printed)
        model = TinyViT.from_config(pretrained=tmp_path / "run" / f"{kind}-3" / "last.safetensors")
        tested = json.loads((tmp_path / "run" / f"{kind}-3" / "tested.json").read_text())
        assert tested["images"] == 20
        assert model.config.num_classes == 10
    store = LabelStore(tmp_path / "run" / "store")
    assert (store.valid_count(0), store.manifest.top_k) == (32, 5)
    weights = [
        load_file(tmp_path / "run" / f"{kind}-3" / "last.safetensors") for kind in ("labels", "online", "stored")
    ]
    online, stored = (weights[row]["head.weight"] for row in (1, 2))
    assert torch.allclose(online, stored, atol=2e-3)  # equal targets except for the classes outside of the top 5
    assert not torch.allclose(weights[0]["head.weight"], stored, atol=1e-6)
    # Finished trainings are not repeated.
    assert run(*command, "--epochs", 1, "--batch-size", 16, "--seeds", 3, cwd=tmp_path) == printed


@pytest.fixture
def photos(tmp_path) -> Path:
    """A folder of images in COCO's layout without labels, 16 for training and 6 for validation."""
    generator = np.random.default_rng(0)
    for name, count in (("train2017", 16), ("val2017", 6)):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for number in range(count):
            colors = [tuple(generator.integers(0, 256, 3).tolist()) for _ in range(2)]
            shape = ("board", "disc", "stripes")[number % 3]
            draw_shape(shape, 60 + 3 * number, 80 - 2 * number, colors).save(
                tmp_path / "photos" / name / f"{number:03d}.jpg"
            )
    return tmp_path / "photos"


@pytest.mark.slow
def test_feature_distillation(photos, tmp_path):
    pytest.importorskip("accelerate")
    options = ("--out", "run", "--img-size", 32, "--stored", 2, "--epochs", 4, "--batch-size", 8, "--show", 3)
    command = (EXAMPLES / "feature_distillation.py", photos, *options, "--device", "cpu")
    first, second = run(*command, cwd=tmp_path), run(*command, cwd=tmp_path)
    assert re.findall(r"(\d+) records of (.+) written, (\d+) already present", first) == [("32", "256 x 2 x 2", "0")]
    assert re.findall(r"(\d+) records of (.+) written, (\d+) already present", second) == [("0", "256 x 2 x 2", "32")]
    assert re.findall(r"(\d+) epochs trained, (\d+) resumed, (\d+) steps", first) == [("4", "0", "8")]
    assert re.findall(r"(\d+) epochs trained, (\d+) resumed, (\d+) steps", second) == [("0", "4", "8")]
    assert all("student: 0 images passed to the teacher" in output for output in (first, second))
    row = r"^  (mean|untrained|trained) .* ([\d.]+) +(-?[\d.]+)$"
    tables = [re.findall(row, output, re.MULTILINE) for output in (first, second)]
    assert tables[0] == tables[1]
    scores = {name: (float(error), float(cosine)) for name, error, cosine in tables[0]}
    assert scores["trained"][0] < scores["untrained"][0]
    assert scores["trained"][1] > scores["untrained"][1]

    # The files give the printed results: the stored features are the teacher's, and the student's errors are equal.
    spec = importlib.util.spec_from_file_location("feature_distillation", EXAMPLES / "feature_distillation.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    teacher = module.build_teacher(module.Photos(photos / "train2017"), 32, tmp_path / "run" / "teacher.safetensors")
    changes = {"crop_scale": (0.2, 1.0), "erasing": 0.0}
    augmentation = ReplayableAugmentation(32, "small", 0, **changes)
    samples = ReplayedSamples(module.Photos(photos / "train2017"), augmentation)
    with FeatureStore(tmp_path / "run" / "store") as store:
        report = check_records(store, teacher, samples, records=32)
    assert report.records == 32
    assert report.largest < 0.02
    assert not report.drifted
    student = TinyViT.from_config(pretrained=tmp_path / "run" / "student" / "last.safetensors").eval()
    prepare = EvaluationPipeline(32)
    with torch.inference_mode():
        images = torch.cat([prepare(read_image(file)[None]) for file in sorted((photos / "val2017").iterdir())])
        expected, features = teacher(images), student(images)
    assert (features - expected).square().mean().item() == pytest.approx(scores["trained"][0], abs=2e-3)
    assert torch.cosine_similarity(features, expected).mean().item() == pytest.approx(scores["trained"][1], abs=2e-3)
    assert Image.open(tmp_path / "run" / "features.png").size == (3 * 256 + 2 * 6, 3 * 256 + 2 * 6)


@pytest.mark.slow
def test_segment_semantic(tmp_path):
    data = make_scenes(tmp_path / "data", 4)
    options = (
        "--images",
        2,
        "--img-size",
        64,
        "--width",
        8,
        "--epochs",
        2,
        "--batch-size",
        2,
        "--shown",
        2,
        "--device",
        "cpu",
    )
    output = run(EXAMPLES / "segment_semantic.py", data, *options, "--out", "runs/it", cwd=tmp_path)
    assert "2 images, 3 classes, 2 steps" in output
    train, val = json_lines(output)
    assert (train["split"], train["images"], train["classes_present"], val["images"]) == ("train", 2, 3, 4)
    kept = SemanticSegmenter.from_config(pretrained=tmp_path / "runs" / "it" / "last.safetensors")
    assert kept.class_names == NAMES
    scores = evaluate(kept, SegmentationDataset.open(data))
    assert val["mean_iou"] == pytest.approx(scores.mean_iou, abs=0.01)
    assert val["pixel_accuracy"] == pytest.approx(scores.pixel_accuracy, abs=0.01)
    sheet = read_uint8(tmp_path / "runs" / "it" / "val.png")
    photo = read_uint8(data / "images" / "00.png")
    assert np.abs(sheet[20, 16] - photo[3, 3]).max() < 60  # the background of the first image, resized
    assert not sheet[1, 328 + 20].any()  # the border is unlabeled
    resumed = run(EXAMPLES / "segment_semantic.py", data, *options, "--out", "runs/it", cwd=tmp_path)
    assert json_lines(resumed) == [train, val]


@pytest.mark.slow
def test_unet_decoder(tmp_path):
    data = make_scenes(tmp_path / "data", 3)
    options = ("--images", 3, "--img-size", 64, "--epochs", 12, "--lr", 3e-3, "--out", "new/unet.pt")
    output = run(EXAMPLES / "unet_decoder.py", data, *options, cwd=tmp_path)
    assert "out_channels (3, 0, 32, 64, 96, 160), output_stride 32" in output
    shapes = re.findall(r"^ +(\d+) channels: (\d+) x (\d+) x (\d+)$", output, re.MULTILINE)
    sides = (64, 32, 16, 8, 4, 2)
    assert [tuple(map(int, each)) for each in shapes] == [
        (channels, channels, side, side) for channels, side in zip((3, 0, 32, 64, 96, 160), sides, strict=True)
    ]
    first, last, scores = json_lines(output)
    assert (first["epoch"], last["epoch"]) == (1, 12)
    assert last["loss"] < first["loss"]
    assert (scores["images"], scores["classes_present"]) == (3, 3)

    # The saved weights give the printed results.
    module = load_example("unet_decoder")
    encoder = module.TinyViTEncoder(TinyViT.from_config("1m", pretrained="cifar10", num_classes=0))
    network = module.Unet(encoder, module.UnetDecoder(encoder.out_channels), 16, 3)
    network.load_state_dict(torch.load(tmp_path / "new" / "unet.pt", weights_only=True))
    measured = module.evaluate(network, *module.load(SegmentationDataset.open(data).sample(3), 64), 3)
    assert scores["mean_iou"] == pytest.approx(measured.mean_iou, abs=0.01)
    assert scores["pixel_accuracy"] == pytest.approx(measured.pixel_accuracy, abs=0.01)


def test_unet_of_any_size():
    """Sizes that are not multiples of the strides; gradients reach every stage."""
    module = load_example("unet_decoder")
    encoder = module.TinyViTEncoder(TinyViT(**TINY | {"num_classes": 0}))
    features = encoder(torch.rand(2, 3, 75, 101))
    assert [tuple(each.shape[2:]) for each in features] == [(75, 101), (38, 51), (19, 26), (10, 13), (5, 7), (3, 4)]
    assert [each.shape[1] for each in features] == list(encoder.out_channels)
    network = module.Unet(encoder, module.UnetDecoder(encoder.out_channels, (12, 8, 8, 8, 4)), 4, 5)
    logits = network(torch.rand(2, 3, 75, 101))
    assert logits.shape == (2, 5, 75, 101)
    logits.sum().backward()
    assert all(weight.grad is not None for weight in encoder.backbone.layers.parameters())


@pytest.mark.slow
def test_segment_promptable(tmp_path):
    data = make_instances(tmp_path / "data", 3)
    folders = (data / "images", data / "masks")
    options = ("--images", 2, "--min-area", 1, "--img-size", 64, "--windows", 4, 4, 4, 4, "--epochs", 2,
               "--batch-size", 2, "--shown", 2, "--others", *folders, "--device", "cpu",
               "--out", "runs/it")  # fmt: skip
    output = run(EXAMPLES / "segment_promptable.py", *folders, *options, cwd=tmp_path)
    assert "2 images, 2 steps" in output
    before, after, others = json_lines(output)
    assert (before["when"], before["images"], before["instances"]) == ("before", 2, 4)
    assert (after["when"], others["split"], others["instances"]) == ("after", "others", 6)
    kept = MobileSAM.from_config(pretrained=tmp_path / "runs" / "it" / "last.safetensors")
    found = evaluate(kept, InstanceDataset.open(folders[0], instances=folders[1]))
    assert others["box_iou"] == pytest.approx(found.box_iou, abs=0.01)
    assert others["point_iou"] == pytest.approx(found.point_iou, abs=0.01)
    sheet = Image.open(tmp_path / "runs" / "it" / "masks.png")
    assert sheet.width == 3 * 328


class TestContractCifar10:
    def test_commands(self, tmp_path, monkeypatch, capsys):
        """The commands are valid; the hours of search and training are not run."""
        example, commands = load_example("contract_cifar10"), []
        winner = tmp_path / "found.safetensors"
        save_checkpoint(TinyViT.from_config("1m", num_classes=10), winner)
        step = {"factor": None, "costs": {"parameters": 1.2e6, "macs": 25e6}, "accuracy": 60.0}

        def run_nothing(*command, processes=1):
            commands.append((command[0], processes))
            parse_command_line([*map(str, command), "--json"])
            top1 = 70.0 + len(commands)
            return {"last": winner, "winner": winner, "path": [step], "evaluated": 1, "top1": top1}

        monkeypatch.setattr(example, "run", run_nothing)
        options = ["--out", str(tmp_path / "out"), "--seeds", "0", "1", "--processes", "1", "--limit", "100"]
        monkeypatch.setattr(sys, "argv", ["contract_cifar10.py", str(tmp_path), *options])
        example.main()
        assert [name for name, _ in commands] == ["train", "contract", "contract", *["train", "evaluate"] * 4]
        printed = capsys.readouterr().out
        assert "1.20M parameters, 25.0M MACs, 60.00 %" in printed
        assert re.search(r"1m +1,269,698 +25,362,368 +76\.00 \(1\.41\)", printed)
        assert re.search(r"contracted +1,269,698 +25,362,368 +80\.00 \(1\.41\)", printed)
