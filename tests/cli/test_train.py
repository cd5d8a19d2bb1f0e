"""Training from labels on the command line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from kornia_tinyvit import ImageClassifier, MobileSAM, TinyViT, progress, save_checkpoint
from kornia_tinyvit.cli import app
from kornia_tinyvit.cli.training_options import LoopRequest
from kornia_tinyvit.data import InstanceDataset, SegmentationDataset
from kornia_tinyvit.detection import TinyViTDetector
from kornia_tinyvit.preprocessing import Preprocessing
from kornia_tinyvit.semantic import SemanticSegmenter
from kornia_tinyvit.training import RECIPES, evaluate, find_recipe
from tests.helpers import error_of, run, run_both
from tests.scenes import CLASSES, NAMES, damage, make_boxes, make_images, make_instances, make_scenes

SMALL = ("--recipe", "cifar10", "--img-size", "32", "--batch-size", "8", "--variant", "1m", "--workers", "0")
LOOP = ("is_main_process", "best_epoch", "stopped_early")


@pytest.fixture
def folder(tmp_path) -> Path:
    return make_images(tmp_path / "data", each=4)


def command(folder, tmp_path, *options):
    return ("train", str(folder), *SMALL, "--epochs", "1", "--out", str(tmp_path / "out"), *options)


def recorded(tmp_path):
    return json.loads((tmp_path / "out" / "run.json").read_text())


class TestTrain:
    def test_json(self, folder, tmp_path):
        validation = make_images(tmp_path / "val", each=2, seed=5)
        result = json.loads(run(*command(folder, tmp_path, "--validation", str(validation), "--json")))
        assert result.keys() == {"steps", "top1", "best", "last", "broken", "seconds", *LOOP}
        assert (result["steps"], result["broken"], result["is_main_process"]) == (1, [], True)
        report = json.loads(run("evaluate", str(validation), "--weights", result["best"], "--json"))
        assert report["top1"] == pytest.approx(result["top1"], abs=0.01)
        network = TinyViT.from_config(pretrained=result["last"])
        assert (network.config.num_classes, network.config.img_size) == (3, 32)
        assert network.config.drop_path_rate == RECIPES["cifar10"].drop_path["1m"]
        assert not network.config.use_checkpoint
        rows = json.loads(run("classify", str(folder / "red" / "00.png"), "--weights", result["best"], "--json"))
        assert {each["label"] for each in rows[0]["predictions"]} == set(CLASSES)

    def test_preprocessing_of_the_weights(self, folder, tmp_path):
        """Fine-tuning normalizes, crops and interpolates as the weights do, and scores what its files predict."""
        model = TinyViT.from_config("1m", num_classes=3, img_size=32, window_sizes="fit")
        model.preprocessing = Preprocessing(32, 0.9, "bilinear", (0.5,) * 3, (0.25,) * 3)
        weights = str(save_checkpoint(model, tmp_path / "weights.safetensors"))
        options = ("--weights", weights, "--validation", str(folder), "--json")
        result = json.loads(run(*command(folder, tmp_path, *options)))
        for name in ("best", "last"):
            assert TinyViT.from_config(pretrained=result[name]).preprocessing == model.preprocessing
        assert recorded(tmp_path)["augmentation"]["std"] == [0.25] * 3
        report = json.loads(run("evaluate", str(folder), "--weights", result["best"], "--json"))
        assert report["top1"] == pytest.approx(result["top1"], abs=0.01)

    def test_text(self, folder, tmp_path, monkeypatch):
        monkeypatch.setattr(progress, "_MIN_SECONDS", 0)
        printed, notes = run_both(*command(folder, tmp_path, "--validation", str(folder)))
        assert notes.startswith("12 images, 3 classes; not divided into splits; device ")
        assert "weights random\n" in notes
        assert "training 1/1, " in notes
        last = printed.strip().splitlines()[-1]
        assert last.startswith("1 steps in ")
        assert "top-1 " in last
        assert last.endswith("best.safetensors")
        assert run(*command(folder, tmp_path, "--validation", str(folder))).strip().splitlines()[-1] == last

    def test_recipe_of_the_data(self, folder, tmp_path):
        small = ("--variant", "1m", "--img-size", "32", "--workers", "0", "--epochs", "1", "--weights", "cifar10")
        _, notes = run_both("train", str(folder), *small, "--out", str(tmp_path / "out"))
        assert "Recipe classification_small: fine-tuning on fewer than 10,000 images\n" in notes
        recipe = recorded(tmp_path)["recipe"]
        assert (recipe["preset"], recipe["patience"], recipe["layer_decay"]) == ("finetune", 10, 0.8)

    def test_fields_of_the_recipe(self, folder, tmp_path, capfd, monkeypatch):
        fields = ("--layer-decay", "0.5", "--ema-decay", "0.9", "--freeze", "stages=1", "--crop-scale", "0.7,0.9")
        run(*command(folder, tmp_path, *fields))
        recipe = recorded(tmp_path)["recipe"]
        assert (recipe["layer_decay"], recipe["ema_decay"], recipe["freeze"]) == (0.5, 0.9, ["stages=1"])
        assert recorded(tmp_path)["augmentation"]["crop_scale"] == [0.7, 0.9]
        for wrong in ("0.9,0.7", "0.5", "a,b"):
            error = error_of(capfd, monkeypatch, *command(folder, tmp_path, "--crop-scale", wrong))
            assert f"--crop-scale must be LOW,HIGH with 0 < LOW <= HIGH <= 1, such as 0.2,1; got '{wrong}'" in error
        error = error_of(capfd, monkeypatch, *command(folder, tmp_path, "--rotate"))
        assert "--rotate has no effect with --task classification" in error

    def test_early_stopping(self, folder, tmp_path):
        """Without a learning rate the score stays that of the first epoch."""
        options = ("--validation", str(folder), "--epochs", "4", "--base-lr", "1e-12", "--patience", "1")
        printed, notes = run_both(*command(folder, tmp_path, *options))
        assert "Stopped early: top-1 did not improve for 1 epoch, best in epoch 1 of 4.\n2 steps in " in printed
        assert "Learning rate 1.56e-14, by a cosine to 1.56e-16 after 4 epochs\n" in notes

    def divide(self, root, train=CLASSES, validation=CLASSES):
        for split, names, seed in (("train", train, 0), ("val", validation, 5)):
            made = make_images(root / "all" / split, each=4, seed=seed)
            for name in names:
                (root / "data" / split).mkdir(parents=True, exist_ok=True)
                (made / name).rename(root / "data" / split / name)
        return root / "data"

    def test_splits(self, tmp_path):
        data = self.divide(tmp_path)
        (data / "val" / "red" / "00.png").unlink()
        printed, notes = run_both(*command(data, tmp_path))
        assert notes.startswith("12 images, 3 classes; device ")
        assert "\nValidation: 11 images, 3 classes\n" in notes
        assert "top-1 " in printed
        best = str(tmp_path / "out" / "best.safetensors")
        assert json.loads(run("evaluate", str(data), "--weights", best, "--json"))["images"] == 11
        assert json.loads(run("evaluate", str(data), "--weights", best, "--split", "train", "--json"))["images"] == 12

    def test_validation_classes_are_matched_by_name(self, tmp_path):
        """Red is the third class of the training and the only one of the validation."""
        data = self.divide(tmp_path, validation=("red",))
        result = json.loads(run(*command(data, tmp_path, "--weights", "cifar10", "--epochs", "6", "--json")))
        report = json.loads(run("evaluate", str(data), "--weights", result["best"], "--per-class", "--json"))
        assert [row["class"] for row in report["per_class"]] == ["red"]
        assert report["top1"] == pytest.approx(result["top1"], abs=0.01)

    def test_unknown_validation_class(self, tmp_path, capfd, monkeypatch):
        data = self.divide(tmp_path, train=("blue", "red"))
        error = error_of(capfd, monkeypatch, *command(data, tmp_path, "--json"))
        assert "The data has the classes green, but the network has blue, red." in error

    def test_batch_that_fits(self, folder, tmp_path):
        small = ("--variant", "1m", "--img-size", "32", "--workers", "0", "--epochs", "1")
        printed, notes = run_both("train", str(folder), *small, "--out", str(tmp_path / "out"))
        assert "Batch 2 instead of the recipe's 1024 for 12 images, learning rate 1.95e-06 instead of 0.001." in notes
        assert "6 steps in " in printed
        assert recorded(tmp_path)["recipe"]["batch_size"] == 2

    def test_one_class(self, folder, tmp_path, capfd, monkeypatch):
        for name in CLASSES[1:]:
            shutil.rmtree(folder / name)
        with pytest.warns(UserWarning, match="one class learns nothing"):
            run(*command(folder, tmp_path, "--batch-size", "2", "--json"))

    def test_one_image(self, folder, tmp_path, capfd, monkeypatch):
        for file in sorted(folder.rglob("*.png"))[1:]:
            file.unlink()
        small = ("--variant", "1m", "--img-size", "32", "--workers", "0", "--json")
        error = error_of(capfd, monkeypatch, "train", str(folder), *small, "--out", str(tmp_path / "out"))
        assert "Training needs at least 2 images; the dataset has 1." in error

    def test_broken_images(self, folder, tmp_path, capfd, monkeypatch):
        damage(folder / "green" / "01.png")
        options = ("--batch-size", "12", "--json")
        assert "green/01.png is not an image" in error_of(capfd, monkeypatch, *command(folder, tmp_path, *options))
        _, notes = run_both(*command(folder, tmp_path, "--batch-size", "12", "--on-broken", "skip"))
        assert "cannot be read: 1, e.g. green/01.png" in notes
        result = json.loads(run(*command(folder, tmp_path, *options, "--on-broken", "skip")))
        assert result["broken"] == ["green/01.png"]

    @pytest.mark.parametrize("pretrained", ["cifar10", "file"])
    def test_pretrained(self, folder, tmp_path, pretrained):
        if pretrained == "file":
            pretrained = json.loads(run(*command(folder, tmp_path / "first", "--json")))["best"]
        result = json.loads(run(*command(folder, tmp_path, "--weights", pretrained, "--base-lr", "1e-3", "--json")))
        trained = TinyViT.from_config(pretrained=result["last"])
        start = TinyViT.from_config("1m", pretrained=pretrained)
        near = (trained.layers[2].blocks[1].mlp.fc1.weight - start.layers[2].blocks[1].mlp.fc1.weight).abs().max()
        assert near < 0.01
        assert trained.config.num_classes == 3

    def test_options_reach_the_training(self, folder, tmp_path):
        run(*command(folder, tmp_path, "--process-batch", "4", "--seed", "7", "--base-lr", "0.004",
                     "--gradient-checkpointing", "--precision", "bf16", "--limit", "10", "--json"))  # fmt: skip
        config = recorded(tmp_path)
        assert config["recipe"]["base_lr"] == 0.004
        assert config["recipe"]["batch_size"] == 8
        assert config["augmentation"]["seed"] == 7
        assert config["model"]["use_checkpoint"] is True
        assert config["loss"] == {"kind": "labels", "label_smoothing": 0.1}

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (("--recipe", "in2k"), "There is no recipe 'in2k'; choose one of in1k"),
            (("--variant", "9m"), "There is no TinyViT variant '9m'"),
            (("--batch-size", "14"), "12 samples, fewer than a global batch of 14"),
            (("--batch-size", "7"), "even batch_size"),
            (("--process-batch", "3"), "no multiple of 3 images"),
            (("--precision", "fp7"), "fp7"),
            (("--weights", "nothing"), "nothing"),
            (("--on-broken", "ignore"), "'stop' or 'skip'"),
            (("--base-lr", "-1"), "Out of range: base_lr=-1.0"),
            (("--validation", "gone"), "There is no dataset gone"),
        ],
    )
    def test_errors(self, folder, tmp_path, capfd, monkeypatch, options, message):
        assert message in error_of(capfd, monkeypatch, *command(folder, tmp_path, "--json", *options))

    def test_no_data(self, tmp_path, capfd, monkeypatch):
        assert "There is no dataset" in error_of(capfd, monkeypatch, *command(tmp_path / "gone", tmp_path, "--json"))

    def test_another_training_in_the_folder(self, folder, tmp_path, capfd, monkeypatch):
        run(*command(folder, tmp_path, "--json"))
        error = error_of(capfd, monkeypatch, *command(folder, tmp_path, "--json", "--seed", "3"))
        assert "origin.init_seed: it has 0, requested 3" in error

    @pytest.mark.parametrize("option", ["--epochs", "--batch-size", "--img-size", "--limit"])
    def test_numbers_start_above_zero(self, folder, tmp_path, option):
        assert CliRunner().invoke(app, [*command(folder, tmp_path), option, "0"]).exit_code == 2


class TestSemantic:
    def command(self, folder, tmp_path, *options):
        small = ("--variant", "1m", "--img-size", "32", "--batch-size", "2", "--workers", "0", "--epochs", "1")
        return ("train", str(folder), "--task", "semantic", *small, "--out", str(tmp_path / "out"), *options)

    def test_json(self, tmp_path):
        data, validation = make_scenes(tmp_path / "data", 4), make_scenes(tmp_path / "val", 2, seed=9)
        options = ("--validation", str(validation), "--class-balance", "0.5", "--json")
        result = json.loads(run(*self.command(data, tmp_path, *options)))
        assert result.keys() == {"steps", "mean_iou", "best", "last", "broken", "seconds", *LOOP}
        segmenter = SemanticSegmenter.from_config(pretrained=result["best"])
        assert segmenter.class_names == NAMES
        assert segmenter.config.backbone.window_sizes == (8, 4, 2, 1)
        found = evaluate(segmenter, SegmentationDataset.open(validation))
        assert found.mean_iou == pytest.approx(result["mean_iou"], abs=1e-3)
        config = recorded(tmp_path)
        assert config["augmentation"]["kind"] == "masks"
        assert len(set(config["loss"]["class_weights"])) == 3

    def test_text(self, tmp_path):
        data = make_scenes(tmp_path / "data", 4)
        (data / "masks" / "03.png").unlink()
        printed, notes = run_both(*self.command(data, tmp_path, "--validation", str(data), "--weights", "cifar10"))
        assert notes.startswith(
            "3 images, 3 classes, ignored ids 255; skipped 1 image without labels; not divided into splits; "
            "device cpu; weights cifar10\n"
        )
        assert "missing: 1, e.g. 03.png" in notes
        assert ", mean IoU " in printed.strip().splitlines()[-1]
        again = self.command(data, tmp_path / "more", "--weights", str(tmp_path / "out" / "best.safetensors"))
        assert "1 steps in " in run(*again)

    def test_errors(self, tmp_path, capfd, monkeypatch):
        data = make_scenes(tmp_path / "data", 2)
        assert "There is no dataset" in error_of(capfd, monkeypatch, *self.command(tmp_path / "gone", tmp_path))
        error = error_of(capfd, monkeypatch, *self.command(data, tmp_path, "--recipe", "in1k"))
        assert "Masks do not support policy, erasing" in error

    def test_masks_without_names_or_objects(self, tmp_path, capfd, monkeypatch):
        """The validation images have the classes of the training images, also if they show fewer; so has evaluate."""
        data = make_scenes(tmp_path / "data", 3)
        (data / "classes.txt").unlink()
        for split in ("train", "val"):
            (data / split).mkdir()
            for kind in ("images", "masks"):
                shutil.copytree(data / kind, data / split / kind)
        for mask in (data / "val" / "masks").iterdir():
            ids = np.array(Image.open(mask))
            Image.fromarray(np.where(ids == 1, 0, ids)).save(mask)
        alone = shutil.copytree(data / "val", tmp_path / "alone")
        result = json.loads(run(*self.command(data, tmp_path, "--validation", str(data), "--json")))
        for path in (data, alone):
            options = ("--task", "semantic", "--weights", result["best"], "--json")
            found = json.loads(run("evaluate", str(path), *options))
            assert found["mean_iou"] == pytest.approx(result["mean_iou"], abs=0.01)
            assert found["classes_present"] == 2
        for mask in (data / "train" / "masks").iterdir():
            Image.new("L", Image.open(mask).size).save(mask)
        error = error_of(capfd, monkeypatch, *self.command(data, tmp_path / "empty"))
        assert "All labeled pixels of 3 masks have the class 'class 0'" in error

    def test_validation_with_other_class_indices(self, tmp_path):
        data, validation = make_scenes(tmp_path / "data", 2), make_scenes(tmp_path / "val", 2, seed=9)
        runs = [("--validation", str(validation), "--json")] * 2
        found = []
        for number, options in enumerate(runs):
            result = json.loads(run(*self.command(data, tmp_path / str(number), *options)))
            report = ("evaluate", str(validation), "--task", "semantic", "--weights", result["best"], "--json")
            found += [result["mean_iou"], json.loads(run(*report))["mean_iou"]]
            (validation / "classes.txt").write_text("\n".join(reversed(NAMES)))
            for mask in (validation / "masks").iterdir():
                ids = np.array(Image.open(mask))
                Image.fromarray(np.where(ids == 255, ids, 2 - ids.clip(max=2)).astype(np.uint8)).save(mask)
        assert found == pytest.approx([found[0]] * 4, abs=0.01)


class TestPromptable:
    def command(self, folder, tmp_path, *options):
        small = ("--variant", "1m", "--img-size", "64", "--batch-size", "2", "--workers", "0", "--epochs", "1")
        return ("train", str(folder), "--task", "promptable", *small, "--out", str(tmp_path / "out"), *options)

    def test_json(self, tmp_path):
        data, validation = make_instances(tmp_path / "data", 2), make_instances(tmp_path / "val", 2, seed=9)
        options = ("--validation", str(validation), "--freeze", "backbone", "--freeze", "prompt_encoder",
                   "--weights", "cifar10", "--min-area", "100", "--prompts", "3", "--box-fraction", "0.75",
                   "--json")  # fmt: skip
        result = json.loads(run(*self.command(data, tmp_path, *options)))
        assert result.keys() == {"steps", "box_iou", "best", "last", "broken", "seconds", *LOOP}
        sam = MobileSAM.from_config(pretrained=result["best"])
        assert (sam.img_size, sam.config.window_sizes) == ((64, 64), (12, 12, 6, 3))
        start = TinyViT.from_config("1m", pretrained="cifar10").state_dict()
        kept = sam.image_encoder.state_dict()
        assert all(torch.equal(kept[name], start[name]) for name in start if not name.startswith("head."))
        found = evaluate(sam, InstanceDataset.open(validation, min_area=100))
        assert found.box_iou == pytest.approx(result["box_iou"], abs=1e-3)
        config = recorded(tmp_path)
        assert config["recipe"]["freeze"] == ["backbone", "prompt_encoder"]
        assert config["augmentation"]["prompting"]["instances"] == 3
        assert config["augmentation"]["prompting"]["box_fraction"] == 0.75
        assert config["loss"] == {"kind": "masks", "focal": 20.0, "dice": 1.0, "iou": 1.0}

    def test_text(self, tmp_path):
        data = make_instances(tmp_path / "data", 3)
        (data / "masks" / "02.png").unlink()
        printed, notes = run_both(*self.command(data, tmp_path, "--validation", str(data)))
        assert "missing: 1, e.g. 02.png" in notes
        assert ", mean IoU of boxes " in printed.strip().splitlines()[-1]
        again = self.command(data, tmp_path / "more", "--weights", str(tmp_path / "out" / "best.safetensors"))
        assert "1 steps in " in run(*again)

    def test_errors(self, tmp_path, capfd, monkeypatch):
        data = make_instances(tmp_path / "data", 2)
        assert "There is no dataset" in error_of(capfd, monkeypatch, *self.command(tmp_path / "gone", tmp_path))
        error = error_of(capfd, monkeypatch, *self.command(data, tmp_path, "--weights", "nothing"))
        assert "no weights and no file 'nothing'" in error
        error = error_of(capfd, monkeypatch, *self.command(data, tmp_path, "--min-area", "5000"))
        assert "None of 2 images has an instance of at least 5000 pixels" in error
        error = error_of(capfd, monkeypatch, *self.command(data, tmp_path, "--freeze", "mask_decoder"))
        assert "no part 'mask_decoder' to freeze; expected backbone, stages=1 to stages=4 and prompt_encoder" in error


class TestChooseRecipe:
    @pytest.mark.parametrize("name", RECIPES)
    def test_unchanged(self, name):
        assert find_recipe(name, epochs=None, img_size=None) == RECIPES[name]

    def test_a_shorter_training_has_a_shorter_warm_up(self):
        assert find_recipe("in1k", epochs=10).warmup_epochs == 5
        assert find_recipe("in1k", epochs=1).warmup_epochs == 0.5
        assert find_recipe("in1k", epochs=60).warmup_epochs == 20


def training_request(variant, weights, **settings):
    return LoopRequest(context=None, data=Path(), out=Path(), variant=variant, weights=weights, **settings)


def build_student(variant, weights, recipe, num_classes, seed, gradient_checkpointing):
    request = training_request(variant, weights, seed=seed, gradient_checkpointing=gradient_checkpointing)
    return request.build_network(TinyViT.from_config, recipe, num_classes=num_classes)


class TestWeightsOfMobileSAM:
    """``--weights`` with a MobileSAM starts the training of every task."""

    ADAPTED = ": MobileSAM's encoder gets stride 32, without its neck and with a new norm"

    @pytest.fixture
    def weights(self, tmp_path) -> str:
        path = tmp_path / "sam.pt"
        torch.save(MobileSAM.from_config("1m", img_size=64).state_dict(), path)
        return str(path)

    @pytest.mark.parametrize(
        ("task", "make", "kind"),
        [
            ("classification", make_images, ImageClassifier),
            ("detection", make_boxes, TinyViTDetector),
            ("semantic", make_scenes, SemanticSegmenter),
        ],
    )
    def test_task(self, tmp_path, weights, task, make, kind):
        options = ("--task", task, "--epochs", "1", "--batch-size", "2", "--limit", "2", "--img-size", "64",
                   "--variant", "1m", "--workers", "0", "--device", "cpu", "--weights", weights)  # fmt: skip
        options += ("--queries", "5") if task == "detection" else ()
        data = make(tmp_path / "data", 2)
        _, notes = run_both("train", str(data), *options, "--out", str(tmp_path / "out"))
        network = kind.from_config(pretrained=tmp_path / "out" / "best.safetensors")
        backbone = network.model if task == "classification" else network.backbone
        assert any(f"Weights {weights}{self.ADAPTED}" in line for line in notes.splitlines()) == (task != "semantic")
        assert backbone.feature_strides == ((4, 8, 16, 16) if task == "semantic" else (4, 8, 16, 32))
        assert (backbone.config.img_size, backbone.preprocessing) == (64, Preprocessing(64))
        assert weights in (tmp_path / "out" / "run.json").read_text()


class TestBuildStudent:
    def test_first_weights_depend_on_the_seed(self):
        one, same, other = (build_student("1m", None, RECIPES["cifar10"], 4, seed, False) for seed in (1, 1, 2))
        assert torch.equal(one.head.weight, same.head.weight)
        assert not torch.equal(one.head.weight, other.head.weight)
        assert one.training

    def test_windows_grow_with_larger_images(self):
        recipe = find_recipe("224_to_384")
        student = build_student("1m", "cifar10", recipe, 10, 0, True)
        assert student.config.window_sizes == (48, 48, 24, 12)
        assert (student.config.img_size, student.config.use_checkpoint) == (384, True)
        assert build_student("1m", None, recipe, 10, 0, False).config.window_sizes == (8, 8, 4, 2)

    @pytest.mark.parametrize("recipe", ["in1k", "224_to_384"])
    def test_windows_of_mobile_sam_stay(self, tmp_path, recipe):
        encoder = TinyViT.from_config("1m", img_size=256, mobile_sam=True)
        file = save_checkpoint(encoder, tmp_path / "encoder.safetensors")
        request = training_request("1m", str(file))
        segmenter = request.build_network(SemanticSegmenter.from_config, find_recipe(recipe), num_classes=3)
        assert segmenter.config.backbone.window_sizes == (8, 8, 4, 2)

    def test_windows_fit_smaller_images(self):
        recipe = find_recipe("cifar10")
        assert build_student("5m", None, recipe, 10, 0, False).config.window_sizes == (7, 7, 4, 2)
        assert build_student("1m", "cifar10", recipe, 10, 0, False).config.window_sizes == (8, 8, 4, 2)

    @pytest.mark.parametrize(("variant", "rate"), [("5m", 0.0), ("11m", 0.1), ("21m", 0.2)])
    def test_stochastic_depth(self, variant, rate):
        assert build_student(variant, None, RECIPES["in1k"], 4, 0, False).config.drop_path_rate == rate
