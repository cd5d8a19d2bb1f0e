"""Equivalence of MobileSAM and its transformers model."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("transformers")

from huggingface_hub import ModelCard
from transformers import AutoConfig, AutoModel, AutoModelForMaskGeneration, AutoProcessor, SamProcessor, pipeline

from kornia_tinyvit import TinyViT, save_checkpoint
from kornia_tinyvit.checkpoints.catalog import ASSETS
from kornia_tinyvit.huggingface import (
    TinyVitSamConfig,
    TinyVitSamImageProcessor,
    TinyVitSamModel,
    from_mobile_sam,
    save_hub_folder,
    to_mobile_sam,
)
from kornia_tinyvit.sam import MobileSAM
from tests.conftest import TINY, liven, shared

SIZE = 128


def make_sam(img_size: int | tuple[int, int] = SIZE) -> MobileSAM:
    torch.manual_seed(0)
    encoder = liven(TinyViT(**(TINY | {"mobile_sam": True, "img_size": SIZE})))
    sam = MobileSAM(encoder, img_size).eval()
    with torch.no_grad():
        for name, parameter in sam.named_parameters():
            if parameter.ndim == 1 and not name.startswith("image_encoder"):
                parameter.add_(0.3 * torch.randn_like(parameter))
    return sam


@pytest.fixture(scope="module")
def sam() -> MobileSAM:
    return make_sam()


@pytest.fixture(scope="module")
def model(sam) -> TinyVitSamModel:
    return from_mobile_sam(sam)


@pytest.fixture(scope="module")
def processor() -> SamProcessor:
    return SamProcessor(TinyVitSamImageProcessor.from_size(SIZE))


@pytest.fixture(scope="module")
def photo() -> Image.Image:
    return Image.open(ASSETS / "photos" / "chelsea.png").convert("RGB")


class TestMasks:
    @pytest.mark.parametrize(
        ("theirs", "ours"),
        [
            (
                {"input_points": [[[200.0, 150.0], [120.0, 80.0]]], "input_labels": [[1, 0]]},
                {"points": [[[200.0, 150.0], [120.0, 80.0]]], "labels": [[1.0, 0.0]]},
            ),
            ({"input_boxes": [[[100.0, 50.0, 300.0, 250.0]]]}, {"boxes": [[100.0, 50.0, 300.0, 250.0]]}),
            (
                {
                    "input_points": [[[200.0, 150.0]]],
                    "input_labels": [[1]],
                    "input_boxes": [[[90.0, 5.0, 300.0, 250.0]]],
                },
                {"points": [[[200.0, 150.0]]], "labels": [[1.0]], "boxes": [[90.0, 5.0, 300.0, 250.0]]},
            ),
        ],
        ids=["points", "box", "both"],
    )
    @pytest.mark.parametrize("multimask", [True, False])
    def test_equal(self, sam, model, processor, photo, theirs, ours, multimask):
        inputs = processor(photo, return_tensors="pt", **theirs)
        prompts = {name: torch.tensor(value) for name, value in ours.items()}
        with torch.no_grad():
            found = model(**inputs, multimask_output=multimask)
        (expected,) = sam.predict_masks(sam.embed(photo), multimask_output=multimask, **prompts)
        assert expected.low_res_logits.std() > 0.1
        torch.testing.assert_close(found.pred_masks[0], expected.low_res_logits, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found.iou_scores[0], expected.scores, rtol=1e-4, atol=1e-5)
        masks = processor.post_process_masks(found.pred_masks, inputs["original_sizes"], inputs["reshaped_input_sizes"])
        assert masks[0].shape == (1, 3 if multimask else 1, photo.height, photo.width)
        assert (masks[0] == expected.masks()).float().mean() > 0.9999

    def test_mask_as_prompt(self, sam, model, processor, photo):
        before = torch.randn(1, 1, SIZE // 4, SIZE // 4)
        inputs = processor(photo, input_boxes=[[[100.0, 50.0, 300.0, 250.0]]], return_tensors="pt")
        with torch.no_grad():
            found = model(**inputs, input_masks=before).pred_masks[0]
        box = torch.tensor([[100.0, 50.0, 300.0, 250.0]])
        (expected,) = sam.predict_masks(sam.embed(photo), boxes=box, masks=before)
        torch.testing.assert_close(found, expected.low_res_logits, rtol=1e-4, atol=1e-5)

    def test_images(self, sam, processor, photo):
        """Both preprocess as segment-anything."""
        inputs, _ = sam.preprocess(photo)
        torch.testing.assert_close(processor(photo, return_tensors="pt")["pixel_values"].float(), inputs)

    def test_embedding(self, sam, model, photo):
        inputs, _ = sam.preprocess(photo)
        with torch.no_grad():
            assert torch.equal(model.get_image_embeddings(inputs), sam.image_encoder(inputs))

    def test_real_encoder(self):
        """The encoder of the reference file in a complete model."""
        encoder = TinyViT.from_config(pretrained=shared("reference/mobilesam_tiny_encoder.safetensors"))
        sam = MobileSAM(encoder, 1024).eval()
        images = torch.rand(1, 3, 1024, 1024)
        with torch.no_grad():
            assert torch.equal(from_mobile_sam(sam).get_image_embeddings(images), encoder.eval()(images))


class TestOutputs:
    def test_encoder(self, model):
        images = torch.rand(1, 3, SIZE, SIZE)
        outputs = model.vision_encoder(images, output_hidden_states=True)
        assert [tuple(each.shape[1:]) for each in outputs.hidden_states] == [
            (16, 32, 32),
            (16, 32, 32),
            (16, 16, 16),
            (24, 8, 8),
            (32, 8, 8),
        ]
        with pytest.raises(ValueError, match="'sdpa' does not return weights"):
            model.vision_encoder(images, output_attentions=True)

    def test_eager(self, sam, processor, photo):
        model = from_mobile_sam(sam)
        inputs = processor(photo, input_boxes=[[[100.0, 50.0, 300.0, 250.0]]], return_tensors="pt")
        with torch.no_grad():
            expected = model(**inputs).pred_masks
            model.set_attn_implementation("eager")
            outputs = model(**inputs, output_attentions=True)
        assert len(outputs.vision_attentions) == 4
        torch.testing.assert_close(outputs.pred_masks, expected, rtol=1e-3, atol=1e-4)

    def test_gradients(self, processor, photo):
        model = from_mobile_sam(make_sam()).train()
        model.activation_checkpointing_enable()
        inputs = processor(photo, input_boxes=[[[100.0, 50.0, 300.0, 250.0]]], return_tensors="pt")
        model(**inputs).pred_masks.square().mean().backward()
        idle = {name for name, each in model.named_parameters() if each.grad is None}
        unused = ("network.head", "network.norm_head", "mask_embed", "iou_prediction_head", "point_embed")
        assert all(any(part in name for part in (*unused, "shared", "hypernetworks_mlps.0", "_point")) for name in idle)
        assert model.vision_encoder.network.patch_embed.seq[0].c.weight.grad.any()


class TestFiles:
    def test_save_and_load(self, model, processor, photo, tmp_path):
        model.save_pretrained(tmp_path)
        processor.save_pretrained(tmp_path)
        assert type(AutoConfig.from_pretrained(tmp_path)) is TinyVitSamConfig
        assert type(AutoModel.from_pretrained(tmp_path)) is TinyVitSamModel
        again, info = TinyVitSamModel.from_pretrained(tmp_path, output_loading_info=True)
        assert not any(info.values())
        loaded = AutoProcessor.from_pretrained(tmp_path)
        assert type(loaded) is SamProcessor
        assert type(loaded.image_processor) is TinyVitSamImageProcessor
        inputs = loaded(photo, input_boxes=[[[100.0, 50.0, 300.0, 250.0]]], return_tensors="pt")
        with torch.no_grad():
            assert torch.equal(again(**inputs).pred_masks, model(**inputs).pred_masks)

    def test_round_trip(self, sam, model):
        back = to_mobile_sam(model)
        assert back.config == sam.config
        assert back.img_size == sam.img_size
        assert back.state_dict().keys() == sam.state_dict().keys()
        assert all(torch.equal(tensor, sam.state_dict()[name]) for name, tensor in back.state_dict().items())

    def test_published_file(self):
        """The names and shapes of ``mobile_sam.pt`` are unchanged after a round trip."""
        with torch.device("meta"):
            sam = MobileSAM.from_config("5m")
        published = json.loads(shared("reference/checkpoint_keys.json").read_text())["mobile_sam.pt"]
        expected = {name: tuple(shape) for name, shape in published.items() if not name.endswith("attention_bias_idxs")}
        weights = {name: torch.zeros(shape) for name, shape in expected.items()}
        back = to_mobile_sam(from_mobile_sam(MobileSAM.from_config(pretrained=weights)))
        assert {name: tuple(tensor.shape) for name, tensor in back.state_dict().items()} == expected
        assert sam.state_dict().keys() == expected.keys()

    def test_hub_folder(self, sam, tmp_path):
        path = save_checkpoint(sam, tmp_path / "mine.safetensors")
        save_hub_folder(tmp_path / "hub", path)
        names = {file.name for file in (tmp_path / "hub").iterdir()}
        assert names == {"README.md", "config.json", "model.safetensors", "processor_config.json"}
        assert ModelCard.load(tmp_path / "hub" / "README.md").data.pipeline_tag == "mask-generation"
        assert type(AutoModelForMaskGeneration.from_pretrained(tmp_path / "hub")) is TinyVitSamModel

    def test_rejects_non_square_input(self):
        with pytest.raises(ValueError, match="requires a square input; got 64x128"):
            from_mobile_sam(make_sam((64, SIZE)))


class TestPipeline:
    def test_mask_generation(self, sam, model, processor, photo, tmp_path):
        model.save_pretrained(tmp_path)
        processor.save_pretrained(tmp_path)
        segment = pipeline("mask-generation", model=str(tmp_path))
        settings = {"pred_iou_thresh": 0.0, "stability_score_thresh": 0.0}
        found = segment(photo, points_per_crop=4, crops_nms_thresh=0.9, output_rle_mask=True, **settings)
        assert found["masks"]
        assert all(mask.shape == (photo.height, photo.width) for mask in found["masks"])
        assert list(found["scores"]) == sorted(found["scores"], reverse=True)
        ours = sam.generate_masks(photo, points_per_side=4, box_nms_thresh=0.9, **settings)
        assert len(ours) == len(found["masks"])
        for theirs, mask in zip(found["masks"], ours, strict=True):
            assert (theirs == mask.segmentation).mean() > 0.999

    def test_suppression(self):
        boxes = torch.tensor([[0, 0, 10, 10], [0, 0, 10, 9], [20, 20, 30, 30]])
        scores = torch.tensor([0.5, 0.9, 0.7])
        encoded = [{"size": [2, 2], "counts": [each, 4 - each]} for each in (1, 2, 3)]
        masks, kept, runs, corners = TinyVitSamImageProcessor().post_process_for_mask_generation(
            encoded, scores, boxes, 0.7
        )
        assert torch.equal(kept, torch.tensor([0.9, 0.7]))
        assert [run["counts"][0] for run in runs] == [2, 3]
        assert torch.equal(corners, boxes[[1, 2]])
        assert np.array_equal(masks[0], [[False, True], [False, True]])
