"""Preprocessing of a network in all file formats and in everything that uses it."""

import argparse
import copy
import json
from dataclasses import replace

import pytest
import torch
from PIL import Image

from kornia_tinyvit import (
    CheckpointError,
    ImageClassifier,
    SemanticSegmenter,
    TinyViT,
    TinyViTDetector,
    load_checkpoint,
    save_checkpoint,
)
from kornia_tinyvit.checkpoints import PretrainedWeights, catalog, list_pretrained, open_pretrained, read_checkpoint
from kornia_tinyvit.checkpoints.hub import write_timm_folder
from kornia_tinyvit.checkpoints.layouts import to_timm
from kornia_tinyvit.checkpoints.tensors import read_tensors, write_tensors
from kornia_tinyvit.config import TinyViTConfig
from kornia_tinyvit.contraction import inherit
from kornia_tinyvit.deploy import build_graph, optimize
from kornia_tinyvit.deploy.benchmark import read_images
from kornia_tinyvit.images import read_image
from kornia_tinyvit.preprocessing import EvaluationPipeline, Preprocessing, default_preprocessing
from tests.conftest import TINY, tiny_weights
from tests.helpers import run

ODD = Preprocessing(160, 0.9, "bilinear", mean=(0.5,) * 3, std=(0.25,) * 3)
OTHER = Preprocessing(64, 0.6, "bilinear", mean=(0.5, 0.4, 0.3), std=(0.2, 0.25, 0.3))
NAMES = tuple("abcdefg")


@pytest.fixture
def network(tiny) -> TinyViT:
    tiny.preprocessing = OTHER
    return tiny


@pytest.fixture
def photos() -> torch.Tensor:
    return torch.rand(2, 3, 90, 120)


def write_transformers(model, folder):
    pytest.importorskip("transformers")
    from kornia_tinyvit.huggingface import save_hub_folder

    save_hub_folder(folder, save_checkpoint(model, folder.with_suffix(".safetensors"), NAMES))
    return folder


WRITERS = {
    "file": lambda model, path: save_checkpoint(model, path.with_suffix(".safetensors"), NAMES),
    "timm": lambda model, path: write_timm_folder(model, path, NAMES),
    "transformers": write_transformers,
}


class TestPreprocessing:
    def test_default(self):
        assert [Preprocessing(size).crop_fraction for size in (64, 224, 384)] == [15 / 16, 0.875, None]

    def test_dictionary(self):
        assert Preprocessing.from_dict(json.loads(json.dumps(OTHER.to_dict()))) == OTHER

    def test_resize(self):
        assert Preprocessing(384).resize(224) == Preprocessing(224)
        assert OTHER.resize(384).crop_fraction == 0.6

    def test_channels(self):
        assert OTHER.with_channels(1).mean == pytest.approx((0.4,))
        assert OTHER.with_channels(5).std == (0.2, 0.25, 0.3, 0.2, 0.25)

    @pytest.mark.parametrize(
        ("values", "message"),
        [
            ({"interpolation": "lanczos"}, "interpolation must be one of bicubic, bilinear, nearest; got 'lanczos'"),
            ({"std": (0.1, 0.0, 0.1)}, "std not 0"),
            ({"mean": (), "std": ()}, "one per channel"),
            ({"mean": ("a", 0.5, 0.5)}, "mean and std must be numbers"),
            ({"img_size": 2.5}, "img_size >= 1"),
            ({"crop_fraction": True}, "crop_fraction in"),
            ({"crop": 0.9}, "no field crop"),
        ],
    )
    def test_exceptions(self, values, message):
        with pytest.raises(ValueError, match=message):
            Preprocessing.from_dict(values)

    @pytest.mark.parametrize("interpolation", ["bicubic", "bilinear", "nearest"])
    def test_interpolation(self, interpolation):
        from PIL import Image

        from kornia_tinyvit.images import read_image, to_pil

        photo = to_pil(torch.rand(3, 40, 40))
        pipeline = EvaluationPipeline(16, None, (0.0,) * 3, (1.0,) * 3, interpolation)
        theirs = photo.resize((16, 16), Image.Resampling[interpolation.upper()])
        assert (pipeline(read_image(photo)[None])[0] - read_image(theirs)).abs().max() < 1e-2


class TestFiles:
    @pytest.mark.parametrize("kind", WRITERS)
    def test_classifier(self, network, photos, tmp_path, kind):
        path = WRITERS[kind](network, tmp_path / "weights")
        classifier = ImageClassifier.from_config(pretrained=path)
        assert classifier.model.preprocessing == OTHER
        assert classifier.class_names == NAMES
        expected = network(EvaluationPipeline(64, 0.6, OTHER.mean, OTHER.std, "bilinear")(photos))
        assert torch.equal(classifier(photos), expected)
        assert not torch.allclose(expected, network(EvaluationPipeline(64)(photos)), atol=1e-3)

    @pytest.mark.parametrize("last", WRITERS)
    @pytest.mark.parametrize("first", WRITERS)
    def test_round_trips(self, network, tmp_path, first, last):
        found = TinyViT.from_config(pretrained=WRITERS[first](network, tmp_path / "first"))
        again = TinyViT.from_config(pretrained=WRITERS[last](found, tmp_path / "last"))
        assert again.preprocessing == OTHER
        assert again.class_names == NAMES

    def test_file_without_preprocessing(self, tiny, tmp_path):
        path = save_checkpoint(tiny, tmp_path / "old.safetensors")
        tensors, metadata = read_tensors(path)
        del metadata["kornia_tinyvit.preprocessing"]
        write_tensors(path, tensors, metadata)
        assert read_checkpoint(path).preprocessing is None
        assert TinyViT.from_config(pretrained=path).preprocessing == default_preprocessing(tiny.config)

    def test_file_with_invalid_preprocessing(self, tiny, tmp_path):
        path = save_checkpoint(tiny, tmp_path / "invalid.safetensors")
        tensors, metadata = read_tensors(path)
        for text in ('{"std": [0, 0, 0]}', '{"zoom": 2}', "[1]", "{"):
            write_tensors(path, tensors, metadata | {"kornia_tinyvit.preprocessing": text})
            with pytest.raises(CheckpointError, match="cannot be used"):
                read_checkpoint(path)

    def test_state_dict_does_not_change(self, network):
        assert network.state_dict().keys() == TinyViT(**TINY).state_dict().keys()

    def test_copy(self, network):
        assert copy.deepcopy(network).preprocessing == OTHER

    def test_load_checkpoint_does_not_change_it(self, network, tmp_path):
        """Only from_config reads it from the file; load_checkpoint loads tensors."""
        path = save_checkpoint(network, tmp_path / "weights.safetensors")
        other = TinyViT(**TINY)
        load_checkpoint(other, path)
        assert other.preprocessing == default_preprocessing(other.config)

    def test_catalog(self):
        for weights in list_pretrained():
            assert weights.preprocessing == default_preprocessing(weights.config)


def write_model_of_transformers(model, path):
    """Without a preprocessor_config.json, as transformers' Trainer writes it."""
    pytest.importorskip("transformers")
    from kornia_tinyvit.huggingface import from_tinyvit

    from_tinyvit(model, NAMES).save_pretrained(path)
    return path


def write_training_of_timm(model, path):
    settings = model.preprocessing
    arguments = {"img_size": settings.img_size, "crop_pct": settings.crop_fraction, **settings.statistics}
    arguments["interpolation"] = settings.interpolation
    weights = {to_timm(name): tensor for name, tensor in model.state_dict().items()}
    torch.save({"state_dict": weights, "args": argparse.Namespace(**arguments)}, path.with_suffix(".pth"))
    return path.with_suffix(".pth")


def write_converted(form):
    def write(model, path):
        out = path.with_suffix(".safetensors") if form == "safetensors" else path.with_name(form)
        weights = save_checkpoint(model, path.with_suffix(".original.safetensors"), NAMES)
        run("convert", "--weights", str(weights), "--out", str(out), "--format", form)
        return out

    return write


def write_contracted(model, path):
    config = model.config.replace(mlp_ratio=model.config.mlp_ratio)
    return save_checkpoint(inherit(model, config), path.with_suffix(".safetensors"))


FORMATS = WRITERS | {
    "transformers' model": write_model_of_transformers,
    "timm's training": write_training_of_timm,
    "converted to safetensors": write_converted("safetensors"),
    "converted for timm": write_converted("timm"),
    "converted for transformers": write_converted("transformers"),
    "contracted": write_contracted,
    "pickled": lambda model, path: torch.save(model, path.with_suffix(".pt")) or path.with_suffix(".pt"),
}


def through_transformers(path, photo):
    from kornia_tinyvit.huggingface import TinyVitImageProcessor, from_checkpoint, to_tinyvit

    model = from_checkpoint(path)
    processor = TinyVitImageProcessor.from_preprocessing(to_tinyvit(model).preprocessing)
    return model(**processor(read_image(photo), return_tensors="pt")).logits


def through_benchmark(path, photo):
    folder = photo.parents[1]
    classifier = ImageClassifier.from_config(pretrained=path, class_names=NAMES)
    return classifier.model(read_images(classifier, folder, 1).images)


def through_command(path, photo):
    printed = json.loads(run("classify", str(photo), "--weights", str(path), "--top-k", "7", "--json"))
    scores = {each["index"]: each["score"] for each in printed[0]["predictions"]}
    return torch.tensor([[scores[index] for index in range(7)]]).log()


def through_backbone(path, photo):
    """Normalize as a segmenter and a detector do, which have their own sizes."""
    inputs = EvaluationPipeline.from_preprocessing(ODD).resize_and_crop(read_image(photo)[None])
    segmenter = SemanticSegmenter.from_config(pretrained=path, num_classes=3, width=8)
    detector = TinyViTDetector.from_config(pretrained=path, num_classes=3, hidden_dim=16, num_queries=5)
    assert torch.equal(segmenter.normalize(inputs), detector.normalize(inputs))
    return TinyViT.from_config(pretrained=path)(segmenter.normalize(inputs))


#: Functions from a checkpoint and a photo to logits, up to a constant.
CONSUMERS = {
    "classifier": lambda path, photo: ImageClassifier.from_config(pretrained=path)(read_image(photo)[None]),
    "classify": through_command,
    "graph": lambda path, photo: build_graph(ImageClassifier.from_config(pretrained=path))(read_image(photo)[None]),
    "optimize": lambda path, photo: optimize(ImageClassifier.from_config(pretrained=path), "eager")(
        read_image(photo)[None]
    ),
    "benchmark": through_benchmark,
    "transformers": through_transformers,
    "backbone": through_backbone,
}


@pytest.fixture(scope="module")
def photo(tmp_path_factory):
    path = tmp_path_factory.mktemp("photos") / "a" / "photo.png"
    path.parent.mkdir()
    pixels = torch.randint(0, 256, (190, 230, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    for name in ("photo.png", "same.png"):  # the benchmark needs two images
        Image.fromarray(pixels.numpy()).resize((460, 380)).save(path.with_name(name))
    return path


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """The path of a network in each format, written at the first use."""
    model = TinyViT(**TINY)
    model.load_state_dict(tiny_weights())
    model.eval().preprocessing, model.class_names = ODD, NAMES
    folder, paths = tmp_path_factory.mktemp("formats"), {}

    def write(kind):
        if kind not in paths:
            place = folder / str(len(paths)) / "weights"
            place.parent.mkdir()
            paths[kind] = FORMATS[kind](model, place)
        return paths[kind]

    return model, write


class TestMatrix:
    """Every format gives every function that reads it the preprocessing of the network that was written."""

    @pytest.mark.parametrize("kind", FORMATS)
    @pytest.mark.parametrize("consumer", CONSUMERS)
    @torch.no_grad()
    def test_equal_logits(self, written, photo, kind, consumer):
        model, write = written
        expected = model(EvaluationPipeline.from_preprocessing(ODD)(read_image(photo)[None]))
        path = write(kind)
        loaded = TinyViT.from_config(pretrained=path)
        assert loaded.preprocessing == ODD
        assert loaded.class_names == (None if kind in ("timm's training", "pickled") else NAMES)
        found = CONSUMERS[consumer](path, photo)
        torch.testing.assert_close(found.log_softmax(1), expected.log_softmax(1), atol=2e-3, rtol=1e-3)

    @pytest.mark.parametrize(
        "change",
        [
            {"img_size": 128},
            {"crop_fraction": 1.0},
            {"interpolation": "bicubic"},
            {"mean": (0.45,) * 3},
            {"std": (0.26,) * 3},
        ],
    )
    @torch.no_grad()
    def test_every_field_changes_the_logits(self, written, photo, change):
        """Otherwise the tolerance of the other test would hide that a field is ignored."""
        model, _ = written
        image = read_image(photo)[None]
        first, second = (
            model(EvaluationPipeline.from_preprocessing(each)(image)).log_softmax(1)
            for each in (ODD, replace(ODD, **change))
        )
        assert (first - second).abs().max() > 2e-2


class TestOverrides:
    def test_size(self, network, tmp_path):
        path = save_checkpoint(network, tmp_path / "weights.safetensors")
        larger = TinyViT.from_config(pretrained=path, img_size=96).preprocessing
        assert (larger.img_size, larger.crop_fraction, larger.mean) == (96, 0.6, OTHER.mean)
        whole = TinyViT.from_config(network.config.replace(img_size=96), pretrained=path)
        assert whole.preprocessing == larger

    def test_size_with_the_default_crop(self, tiny, tmp_path):
        path = save_checkpoint(tiny, tmp_path / "weights.safetensors")
        assert TinyViT.from_config(pretrained=path, img_size=384).preprocessing == Preprocessing(384)

    def test_channels(self, network, tmp_path):
        path = save_checkpoint(network, tmp_path / "weights.safetensors")
        assert TinyViT.from_config(pretrained=path, in_chans=1).preprocessing.mean == pytest.approx((0.4,))

    def test_other_classes(self, network, tmp_path):
        path = save_checkpoint(network, tmp_path / "weights.safetensors", NAMES)
        model = TinyViT.from_config(pretrained=path, num_classes=3)
        assert model.preprocessing == OTHER
        assert model.class_names is None

    def test_new_classifier(self, network, tmp_path):
        model = TinyViT.from_config(pretrained=save_checkpoint(network, tmp_path / "weights.safetensors", NAMES))
        model.reset_classifier(3)
        assert model.class_names is None


class TestHubFolders:
    @pytest.mark.parametrize(
        ("values", "expected"),
        [
            ({"size": 96}, Preprocessing(96)),
            ({"size": {"height": 96, "width": 96}, "crop_pct": 0.8, "resample": 2}, Preprocessing(96, 0.8, "bilinear")),
            ({"crop_pct": 0.8, "do_center_crop": False}, Preprocessing(64, None)),
            (
                {"size": {"shortest_edge": 128}, "crop_size": {"height": 96, "width": 96}},
                Preprocessing(96, 0.75),
            ),
            ({"do_normalize": False, "size": 64}, Preprocessing(64, mean=(0.0,) * 3, std=(1.0,) * 3)),
            # ViT's processor resizes the whole image; BEiT's and others may have another scale of pixels.
            (
                {"image_processor_type": "ViTImageProcessor", "size": {"height": 64, "width": 64}, "resample": 2},
                Preprocessing(64, None, "bilinear"),
            ),
            (
                {
                    "image_processor_type": "ViTImageProcessor",
                    "rescale_factor": 1 / 127.5,
                    "image_mean": [1.0, 1.0, 1.0],
                    "image_std": [1.0, 1.0, 1.0],
                },
                Preprocessing(64, None, mean=(0.5,) * 3, std=(0.5,) * 3),
            ),
            (
                {"image_processor_type": "ConvNextImageProcessor", "size": {"shortest_edge": 96}, "crop_pct": 0.8},
                Preprocessing(96, 0.8),
            ),
            (
                {"image_processor_type": "ConvNextImageProcessor", "size": {"shortest_edge": 384}, "crop_pct": 0.8},
                Preprocessing(384, None),
            ),
        ],
    )
    def test_processors_of_transformers(self, tiny, tmp_path, values, expected):
        folder = write_transformers(tiny, tmp_path / "hub")
        (folder / "preprocessor_config.json").write_text(json.dumps(values))
        assert read_checkpoint(folder).preprocessing == expected

    @pytest.mark.parametrize(
        ("values", "message"),
        [
            ({"resample": 1}, "interpolation must be one of .* got 'lanczos'"),
            ({"size": {"height": 64, "width": 96}}, "expected square images"),
            ({"size": {"shortest_edge": 64}}, "without a crop"),
            ({"size": 96, "crop_size": {"height": 64, "width": 64}}, "a resize that keeps the aspect ratio"),
        ],
    )
    def test_exceptions(self, tiny, tmp_path, values, message):
        folder = write_transformers(tiny, tmp_path / "hub")
        (folder / "preprocessor_config.json").write_text(json.dumps(values))
        with pytest.raises(CheckpointError, match=message):
            read_checkpoint(folder)

    def test_without_a_processor(self, network, tmp_path):
        folder = write_transformers(network, tmp_path / "hub")
        (folder / "preprocessor_config.json").unlink()
        assert read_checkpoint(folder).preprocessing == OTHER
        values = json.loads((folder / "config.json").read_text())
        del values["preprocessing"]
        (folder / "config.json").write_text(json.dumps(values))
        assert read_checkpoint(folder).preprocessing is None
        assert TinyViT.from_config(pretrained=folder).preprocessing == default_preprocessing(network.config)


class TestTimm:
    @pytest.mark.parametrize(
        ("values", "expected"),
        [
            ({}, Preprocessing(64, 0.875)),  # timm's default at every size
            (
                {"crop_pct": 0.95, "crop_mode": "center", "interpolation": "bilinear"},
                Preprocessing(64, 0.95, "bilinear"),
            ),
            ({"crop_pct": 1.0, "crop_mode": "squash"}, Preprocessing(64, None)),
            ({"test_input_size": [3, 96, 96], "test_crop_pct": 1.0}, Preprocessing(64, 0.875)),
            ({"mean": [0.5, 0.5, 0.5], "std": None}, Preprocessing(64, 0.875, mean=(0.5,) * 3)),
        ],
    )
    @pytest.mark.parametrize("old", [False, True], ids=["pretrained_cfg", "top"])
    def test_folders(self, tiny, tmp_path, values, expected, old):
        write_timm_folder(tiny, tmp_path)
        settings = {"input_size": [3, 64, 64], **values}
        config = {"architecture": "tiny_vit_5m_224", **(settings if old else {"pretrained_cfg": settings})}
        (tmp_path / "config.json").write_text(json.dumps(config))
        model = TinyViT.from_config(pretrained=tmp_path)
        assert (model.preprocessing, model.config.img_size, model.class_names) == (expected, 64, None)

    @pytest.mark.parametrize(
        ("values", "message"),
        [
            ({"crop_mode": "border"}, "expected crop_mode center, or squash without a crop; got border"),
            ({"crop_mode": "squash", "crop_pct": 0.9}, "got squash with crop_pct 0.9"),
            ({"input_size": [3, 64, 96]}, "expected square images"),
        ],
    )
    def test_exceptions(self, tiny, tmp_path, values, message):
        write_timm_folder(tiny, tmp_path)
        config = {"architecture": "tiny_vit_5m_224", "pretrained_cfg": {"input_size": [3, 64, 64], **values}}
        (tmp_path / "config.json").write_text(json.dumps(config))
        with pytest.raises(CheckpointError, match=message):
            read_checkpoint(tmp_path)

    def test_wrapper_of_transformers(self, tiny, tmp_path):
        """TimmWrapperModel.save_pretrained writes timm's fields and numbered labels."""
        path = write_timm_folder(tiny, tmp_path, [f"LABEL_{index}" for index in range(7)]) / "config.json"
        values = json.loads(path.read_text())
        values |= {"model_type": "timm_wrapper", "architectures": ["TimmWrapperForImageClassification"]}
        path.write_text(json.dumps(values))
        found = read_checkpoint(tmp_path)
        assert (found.layout, found.class_names, found.preprocessing) == ("timm", None, Preprocessing(64))


class TestCatalog:
    @pytest.fixture
    def weights(self, network, tmp_path, monkeypatch):
        entry = PretrainedWeights("1m", "own", "", 7, 64, asset=str(tmp_path / "own.safetensors"))
        monkeypatch.setattr(PretrainedWeights, "config", network.config)
        monkeypatch.setattr(catalog, "CATALOG", (entry,))
        return save_checkpoint(network, entry.asset)

    def test_file_states_its_own(self, weights):
        found = open_pretrained("own")
        assert found.preprocessing_for(found.config) == OTHER

    def test_file_states_none(self, weights):
        tensors, _ = read_tensors(weights)
        write_tensors(weights, tensors, {})
        found = open_pretrained("own")
        assert found.preprocessing_for(found.config) == default_preprocessing(found.config)


class TestNetworksOnABackbone:
    BUILDERS = (
        lambda path, **kwargs: SemanticSegmenter.from_config(pretrained=path, **kwargs),
        lambda path, **kwargs: TinyViTDetector.from_config(pretrained=path, **kwargs),
    )

    @pytest.mark.parametrize("build", BUILDERS, ids=["segmenter", "detector"])
    def test_files(self, network, tmp_path, build):
        fields = {"width": 8} if build is self.BUILDERS[0] else {"hidden_dim": 16, "num_queries": 5}
        path = save_checkpoint(network, tmp_path / "backbone.safetensors")
        model = build(path, num_classes=3, **fields)
        assert model.mean.tolist() == pytest.approx(OTHER.mean)
        again = build(model.save(tmp_path / "whole.safetensors"))
        assert again.backbone.preprocessing == OTHER
        assert again.std.tolist() == pytest.approx(OTHER.std)


class TestExport:
    def test_graphs(self, network, photos):
        from kornia_tinyvit.deploy import build_graph

        classifier = ImageClassifier(network)
        with torch.no_grad():
            graph = build_graph(classifier)
            torch.testing.assert_close(graph(photos), classifier(photos), atol=1e-3, rtol=1e-3)
            crop = classifier.preprocessing.resize_and_crop(photos)
            graph = build_graph(network, pixels="unit")
            torch.testing.assert_close(graph(crop), classifier(photos), atol=1e-4, rtol=1e-4)

    def test_metadata(self, network):
        from kornia_tinyvit.deploy.export import ExportTask

        metadata = json.loads(ExportTask(network).metadata()["kornia_tinyvit.input"])
        assert (metadata["mean"], metadata["crop_fraction"], metadata["interpolation"]) == (
            [0.5, 0.4, 0.3],
            0.6,
            "bilinear",
        )

    def test_nearest(self, network):
        from kornia_tinyvit.deploy import build_graph

        network.preprocessing = Preprocessing(64, interpolation="nearest")
        with pytest.raises(ValueError, match="bicubic or bilinear interpolation; got nearest"):
            build_graph(ImageClassifier(network))


def test_default_of_a_config():
    assert default_preprocessing(TinyViTConfig(img_size=384)) == Preprocessing(384)
