import json

import pytest
import torch
from huggingface_hub import ModelCard

pytest.importorskip("transformers")

from transformers import AutoImageProcessor, AutoModelForImageClassification

from kornia_tinyvit import ImageClassifier, TinyViT, save_checkpoint
from kornia_tinyvit.checkpoints.catalog import find_weights
from kornia_tinyvit.checkpoints.hub import write_timm_folder
from kornia_tinyvit.huggingface import TinyVitModel, from_checkpoint, from_tinyvit, save_hub_folder, to_tinyvit
from kornia_tinyvit.huggingface.folders import model_card
from kornia_tinyvit.preprocessing import Preprocessing
from tests.conftest import shared
from tests.huggingface.helpers import tiny_backbone, tiny_classifier, tiny_network

NAMES = tuple("abcdefg")


class TestNetworks:
    def test_round_trip(self, images):
        network = tiny_network()
        network.preprocessing = TestTimm.PREPROCESSING
        model = from_tinyvit(network, NAMES)
        assert torch.equal(model(images).logits, network(images))
        assert [model.config.id2label[index] for index in range(7)] == list(NAMES)
        back = to_tinyvit(model)
        assert back.config == network.config
        assert (back.preprocessing, back.class_names) == (network.preprocessing, NAMES)
        assert all(torch.equal(tensor, network.state_dict()[name]) for name, tensor in back.state_dict().items())
        assert not back.training

    def test_without_classes(self, images):
        network = tiny_network(num_classes=0)
        model = from_tinyvit(network)
        assert isinstance(model, TinyVitModel)
        assert torch.equal(model(images).pooler_output, network(images))
        assert torch.equal(to_tinyvit(model)(images), network(images))

    def test_saved_without_processor(self, tmp_path):
        network = tiny_network()
        network.preprocessing = TestTimm.PREPROCESSING
        from_tinyvit(network, NAMES).save_pretrained(tmp_path)
        assert TinyViT.from_config(pretrained=tmp_path).preprocessing == network.preprocessing
        again = to_tinyvit(AutoModelForImageClassification.from_pretrained(tmp_path))
        assert (again.preprocessing, again.class_names) == (network.preprocessing, NAMES)

    def test_copied_weights(self):
        network = tiny_network()
        model = from_tinyvit(network)
        model.classifier.weight.data.zero_()
        assert network.head.weight.any()
        to_tinyvit(model).head.bias.data.zero_()
        assert model.classifier.bias.any()

    def test_mode_and_precision(self):
        network = tiny_network().train().to(torch.bfloat16)
        model = from_tinyvit(network)
        assert model.training
        assert model.dtype == torch.bfloat16
        assert to_tinyvit(model).head.weight.dtype == torch.bfloat16

    def test_errors(self):
        with pytest.raises(ValueError, match="Got 2 class names for 7 classes"):
            from_tinyvit(tiny_network(), ["cat", "dog"])
        with pytest.raises(ValueError, match="Expected a model with a pooling layer"):
            to_tinyvit(tiny_backbone().tinyvit)


class TestCheckpoints:
    def test_catalog(self):
        model = from_checkpoint("cifar10", "1m")
        images = torch.rand(2, 3, 64, 64)
        assert torch.equal(model(images).logits, TinyViT.from_config("1m", pretrained="cifar10")(images))
        assert model.config.label2id["horse"] == 7

    @pytest.mark.parametrize("layout", ["official_tiny.pth", "official_tiny.safetensors", "timm_tiny.safetensors"])
    def test_layouts(self, layout):
        path = shared(f"reference/{layout}")
        images = torch.rand(1, 3, 64, 64)
        expected = TinyViT.from_config(pretrained=path).eval()(images)
        assert torch.equal(from_checkpoint(path)(images).logits, expected)

    def test_folder_of_transformers(self, images, tmp_path):
        """A folder that transformers saved is read like any checkpoint."""
        model = from_tinyvit(tiny_network(), NAMES)
        model.save_pretrained(tmp_path)
        classifier = ImageClassifier.from_config(pretrained=tmp_path)
        assert classifier.class_names == NAMES
        assert classifier.model.config == tiny_network().config
        assert torch.equal(classifier.model(images), model(images).logits)


class TestHubFolders:
    def test_catalog(self, tmp_path):
        save_hub_folder(tmp_path / "mine", "cifar10", "1m", repo_id="owner/tinyvit-cifar10")
        names = {path.name for path in (tmp_path / "mine").iterdir()}
        assert names == {"README.md", "config.json", "model.safetensors", "preprocessor_config.json"}
        model = AutoModelForImageClassification.from_pretrained(tmp_path / "mine")
        processor = AutoImageProcessor.from_pretrained(tmp_path / "mine")
        photo = torch.rand(3, 90, 70)
        classifier = ImageClassifier.from_config("1m", pretrained="cifar10")
        pixels = processor(photo, return_tensors="pt")["pixel_values"]
        assert torch.equal(pixels, classifier.preprocessing(photo[None]))
        # transformers maps weights from the file; kernels of some CPUs round differently for their alignment.
        for tensor in model.state_dict(keep_vars=True).values():
            tensor.data = tensor.data.clone()
        assert torch.equal(model(pixels).logits, classifier(photo[None]))

    def test_card(self, tmp_path):
        save_hub_folder(tmp_path, "cifar10", "1m", repo_id="owner/tinyvit-cifar10")
        card = ModelCard.load(tmp_path / "README.md")
        assert card.data.license == "apache-2.0"
        assert card.data.pipeline_tag == "image-classification"
        assert card.data.library_name == "transformers"
        assert "tinyvit" in card.data.tags
        assert "# owner/tinyvit-cifar10" in card.text
        assert 'pipeline("image-classification", model="owner/tinyvit-cifar10")' in card.text
        assert "Trained on: CIFAR-10, by this project" in card.text
        assert "1.3 million" in card.text

    def test_card_of_published_weights(self):
        page = model_card("x", tiny_classifier(), find_weights("5m", "in1k"))
        assert "top-1 80.7 %, top-5 95.6 %" in page
        assert "license: mit" in page

    def test_card_of_unknown_weights(self, tmp_path):
        path = save_checkpoint(tiny_network(), tmp_path / "mine.safetensors", NAMES)
        save_hub_folder(tmp_path / "folder", path)
        card = ModelCard.load(tmp_path / "folder" / "README.md")
        assert card.data.license is None
        assert "# folder" in card.text
        assert "Classes: 7" in card.text

    def test_card_of_features(self):
        page = model_card("x", tiny_classifier().tinyvit)
        assert "pipeline_tag: image-feature-extraction" in page
        assert "AutoModel.from_pretrained" in page


class TestTimm:
    PREPROCESSING = Preprocessing(64, 0.9, "bilinear", mean=(0.5, 0.4, 0.3), std=(0.2, 0.2, 0.2))

    def test_round_trip(self, images, tmp_path):
        network = tiny_network()
        network.preprocessing = self.PREPROCESSING
        write_timm_folder(network, tmp_path / "timm", NAMES)
        save_hub_folder(tmp_path / "hub", tmp_path / "timm")
        model = AutoModelForImageClassification.from_pretrained(tmp_path / "hub")
        assert torch.equal(model(images).logits, tiny_network()(images))
        assert model.config.id2label[2] == "c"
        processor = AutoImageProcessor.from_pretrained(tmp_path / "hub")
        assert (processor.crop_pct, processor.image_mean, processor.size.height) == (0.9, (0.5, 0.4, 0.3), 64)
        again = TinyViT.from_config(pretrained=tmp_path / "hub")
        assert again.preprocessing == self.PREPROCESSING
        write_timm_folder(again, tmp_path / "again")
        for name in ("config.json", "model.safetensors"):
            assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "timm" / name).read_bytes()

    def test_images_without_crop(self, tmp_path):
        network = tiny_network()
        network.preprocessing = Preprocessing(64, None)
        write_timm_folder(network, tmp_path / "timm")
        save_hub_folder(tmp_path / "hub", tmp_path / "timm")
        values = json.loads((tmp_path / "hub" / "preprocessor_config.json").read_text())
        assert values["do_center_crop"] is False
