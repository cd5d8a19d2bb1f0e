"""Training on prompts: sampling, samples, network, loss, evaluation and resuming."""

from __future__ import annotations

import copy
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch.autograd import gradcheck

from kornia_tinyvit import MobileSAM, TinyViT, save_checkpoint
from kornia_tinyvit.checkpoints import CheckpointError
from kornia_tinyvit.data import BrokenImageError, InstanceDataset, replay_loader
from kornia_tinyvit.data.paired import PairedBatch
from kornia_tinyvit.ops import central_points, mask_boxes
from kornia_tinyvit.training import (
    PROMPTABLE,
    MaskLoss,
    PromptAugmentation,
    PromptedSAM,
    PromptedSamples,
    Prompting,
    PromptMetrics,
    Recipe,
    build_sam,
    evaluate,
    find_recipe,
    train,
)
from kornia_tinyvit.training.tasks import promptable
from kornia_tinyvit.training.tasks.prompts import Prompts, PromptTargets
from tests.conftest import TINY, liven
from tests.scenes import damage, make_instances
from tests.training.runs import Interrupted, Stopping, losses, metrics

WHOLE = {"crop_scale": (1.0, 1.0), "crop_ratio": (1.0, 1.0), "flip": 0.0, "color_jitter": 0.0}
RECIPE = Recipe(img_size=64, epochs=2, warmup_epochs=0, batch_size=2, base_lr=0.25, min_lr=0.02, preset="promptable")


@pytest.fixture
def folder(tmp_path) -> Path:
    return make_instances(tmp_path / "data")


def make_sam(**changes) -> MobileSAM:
    torch.manual_seed(0)
    config = TINY | {"num_classes": 0, "mobile_sam": True, "window_sizes": (4, 4, 4, 4)} | changes
    return MobileSAM(TinyViT(**config)).train()


def lively_sam() -> MobileSAM:
    """Return a network whose masks depend on the image."""
    sam = make_sam()
    liven(sam.image_encoder)
    return sam.eval()


def samples_of(folder, on_broken="stop", prompting=None, seed=1, **changes) -> PromptedSamples:
    augmentation = PromptAugmentation(64, seed=seed, prompting=prompting, **changes)
    return PromptedSamples(InstanceDataset.open(folder), augmentation, on_broken)


def fit(folder, out, recipe=RECIPE, stop_at=0, on_broken="stop", model=None, samples=None, focal=20.0, **options):
    samples = samples or samples_of(folder, on_broken, **recipe.changes)
    options = {"cpu": True, "log_every": 1, "task": PROMPTABLE} | options
    return train(PromptedSAM(model or make_sam()), samples, Stopping(MaskLoss(focal), stop_at), recipe, out, **options)


class TestPrompting:
    def masks(self):
        masks = torch.zeros(3, 60, 80, dtype=torch.bool)
        masks[0, 10:40, 5:25], masks[1, 20:22, 30:70], masks[2, 50:59, 60:79] = True, True, True
        return masks

    def draw(self, index=0, seed=1, epoch=0, prompting=None, **changes):
        augment = PromptAugmentation(64, seed=seed, prompting=prompting, **(WHOLE | changes))
        return augment.sample(torch.zeros(3, 60, 80, dtype=torch.uint8), self.masks(), epoch, index)

    def test_boxes_and_points_belong_to_the_masks(self):
        for index in range(5):
            _, masks, prompts = self.draw(index, prompting=Prompting(jitter=0.0, points=(1, 4)))
            assert torch.equal(prompts.boxes, mask_boxes(masks))
            for mask, points in zip(masks, prompts.points, strict=True):
                columns, rows = points.long().unbind(1)
                assert mask[rows, columns].all()
        assert (prompts.points.shape, masks.shape[1:]) == ((3, 4, 2), (64, 64))

    def test_masks_follow_the_image(self):
        image = self.masks().any(0).expand(3, -1, -1).to(torch.uint8) * 255
        for changes in (WHOLE, {"color_jitter": 0.0}):
            crop, masks, _ = PromptAugmentation(64, seed=2, **changes).sample(image, self.masks(), 0, 3)
            assert ((crop[0] > 127) == masks.any(0)).float().mean() > 0.97

    def test_whole_images_equal_inference(self, folder):
        photo = torch.randint(0, 256, (3, 60, 80), dtype=torch.uint8)
        crop, masks, prompts = PromptAugmentation(64, **WHOLE).sample(photo, self.masks(), 0, 0)
        batch = PairedBatch(crop[None], PromptTargets(prompts, masks, torch.ones(3)), torch.ones(1), ())
        found = samples_of(folder).inputs(batch, torch.device("cpu")).images[0]
        sam = make_sam()
        wanted, (geometry,) = sam.preprocess(Image.fromarray(photo.movedim(0, -1).numpy()))
        assert torch.allclose(found, wanted[0], atol=0.01)  # the padding is rounded to uint8
        assert geometry.input_size == (48, 64)

    def test_noise_on_boxes(self):
        wanted = {tuple(box) for box in self.draw(prompting=Prompting(jitter=0.0))[2].boxes.tolist()}
        tight = torch.tensor(sorted(wanted))
        moved = torch.stack([
            each[each[:, 0].argsort()] for index in range(30) for each in [self.draw(index)[2].boxes]
        ])  # fmt: skip
        difference = (moved - tight[tight[:, 0].argsort()]).abs()
        assert 0.2 < difference.mean() < 1.25
        assert difference.max() <= 20 * 64 / 1024
        assert (moved >= 0).all()
        assert (moved <= 64).all()
        assert (moved[..., 2:] > moved[..., :2]).all()

    def test_fractions_of_kinds(self):
        counts = torch.cat([self.draw(index, prompting=Prompting(box_fraction=0.6))[2].counts for index in range(80)])
        assert sorted(set(counts.tolist())) == [0, 1, 3]
        assert (counts == 0).float().mean() == pytest.approx(0.6, abs=0.1)
        for fraction, wanted in ((0.0, {2}), (1.0, {0})):
            prompts = Prompting(box_fraction=fraction, points=(2,))
            assert set(self.draw(prompting=prompts)[2].counts.tolist()) == wanted

    def test_number_of_instances(self):
        drawn = [self.draw(index, prompting=Prompting(instances=1, jitter=0.0)) for index in range(20)]
        assert {len(each[1]) for each in drawn} == {1}
        assert len({tuple(each[2].boxes[0].tolist()) for each in drawn}) == 3

    def test_replayed(self):
        torch.manual_seed(5)
        state = torch.get_rng_state()
        first, again = self.draw(7, epoch=3), self.draw(7, epoch=3)
        assert torch.equal(torch.get_rng_state(), state)
        assert all(torch.equal(*pair) for pair in zip(first[2], again[2], strict=True))
        assert torch.equal(first[0], again[0])
        for other in (self.draw(8, epoch=3), self.draw(7, epoch=4), self.draw(7, seed=2, epoch=3)):
            assert not torch.equal(first[2].boxes, other[2].boxes)

    @pytest.mark.parametrize(
        "wrong", [{"instances": 0}, {"box_fraction": 1.5}, {"points": ()}, {"points": (0,)}, {"jitter": -1.0}]
    )
    def test_errors(self, wrong):
        with pytest.raises(ValueError, match="Prompting needs"):
            Prompting(**wrong)

    def test_described(self):
        described = PromptAugmentation(64, prompting=Prompting(box_fraction=0.25)).describe()
        assert json.loads(json.dumps(described))["prompting"] == described["prompting"]
        assert (described["kind"], described["prompting"]["box_fraction"]) == ("prompts", 0.25)


class TestSamples:
    def test_workers(self, folder):
        samples = samples_of(folder)
        keys = [[(0, 1), (0, 2)], [(1, 0), (1, 3)]]
        alone, helped = (list(replay_loader(samples, keys, workers)) for workers in (0, 1))
        for one, other in zip(alone, helped, strict=True):
            assert torch.equal(one.images, other.images)
            assert torch.equal(one.targets.masks, other.targets.masks)
            assert all(torch.equal(*pair) for pair in zip(one.targets.prompts, other.targets.prompts, strict=True))
        assert torch.equal(samples[0, 2].images[0], alone[0].images[1])
        assert set(alone[0].targets.prompts.photo.tolist()) == {0, 1}
        inputs = samples.inputs(alone[0], torch.device("cpu"))
        assert (inputs.images.dtype, inputs.images.shape) == (torch.float32, (2, 3, 64, 64))
        assert torch.equal(inputs.boxes, alone[0].targets.prompts.boxes)

    def test_no_instances(self, folder):
        Image.fromarray(np.zeros((44, 60), dtype=np.uint8)).save(folder / "masks" / "02.png")
        batch = samples_of(folder).__getitems__([(0, 2), (0, 3)])
        prompts, _, weights = batch.targets
        assert (batch.valid.tolist(), weights[0].item(), prompts.photo[0].item()) == ([1, 1], 0, 0)
        assert set(weights[1:].tolist()) == {1 / 8}  # 1 / Prompting.instances
        assert prompts.boxes[0].tolist() == [0, 0, 64, 64]

    def test_corrupt_images(self, folder):
        damage(folder / "masks" / "02.png")
        with pytest.raises(BrokenImageError, match=r"02\.png"):
            samples_of(folder)[0, 2]
        batch = samples_of(folder, "skip").__getitems__([(0, 2), (0, 3)])
        assert (batch.valid.tolist(), batch.broken, batch.targets.weights[0].item()) == ([0, 1], ("02.png",), 0)

    def test_on_broken(self, folder):
        with pytest.raises(ValueError, match="'stop' or 'skip'"):
            samples_of(folder, "ignore")


class TestNetwork:
    def prompts(self, photos=2) -> Prompts:
        generator = torch.Generator().manual_seed(0)
        images = torch.randn(photos, 3, 64, 64, generator=generator)
        photo = torch.tensor([0, 0, 0, 1, 1, 1]) if photos == 2 else torch.zeros(6, dtype=torch.int64)
        boxes = torch.rand(6, 4, generator=generator) * 30
        boxes[:, 2:] += 32
        points = torch.rand(6, 3, 2, generator=generator) * 64
        return Prompts(images, photo, boxes, points, torch.tensor([1, 0, 3, 0, 1, 0]))

    def reference(self, sam, prompts, row):
        """Decode one prompt with kornia's modules."""
        count = int(prompts.counts[row])
        points = (prompts.points[row : row + 1, :count], torch.ones(1, count)) if count else None
        boxes = None if count else prompts.boxes[row : row + 1]
        sparse, dense = sam.prompt_encoder(points, boxes, None)
        features = sam.image_encoder(prompts.images)[prompts.photo[row]][None]
        return sam.mask_decoder.predict_masks(features, sam.prompt_encoder.get_dense_pe(), sparse, dense)

    @pytest.mark.parametrize("recording", [True, False])
    def test_prompts_are_independent(self, recording):
        sam, prompts = lively_sam(), self.prompts()
        with torch.set_grad_enabled(recording):
            logits, scores = PromptedSAM(sam)(prompts)
        assert (logits.shape, scores.shape) == ((6, 4, 16, 16), (6, 4))
        with torch.no_grad():
            for row in range(6):
                wanted = self.reference(sam, prompts, row)
                assert torch.allclose(logits[row], wanted[0][0], atol=1e-4)
                assert torch.allclose(scores[row], wanted[1][0], atol=1e-4)

    def test_the_encoder_runs_once_per_image(self):
        sam = make_sam().eval()
        calls = []
        sam.image_encoder.register_forward_hook(lambda *_: calls.append(1))
        PromptedSAM(sam)(self.prompts())
        assert len(calls) == 1

    def test_parameter_groups(self):
        network = PromptedSAM(make_sam())
        groups = network.parameter_groups(1.0, 0.1, 0.5)
        grouped = [id(parameter) for group in groups for parameter in group["params"]]
        learning = [id(parameter) for parameter in network.parameters() if parameter.requires_grad]
        assert sorted(grouped) == sorted(learning)
        token = network.sam.mask_decoder.iou_token.weight
        (own,) = (group for group in groups if any(each is token for each in group["params"]))
        assert (own["lr"], own["weight_decay"]) == (1.0, 0.1)
        assert min(group["lr"] for group in groups) < 1

    def test_described(self):
        config = PromptedSAM(make_sam()).config.to_dict()
        assert config["img_size"] == 64
        assert json.loads(json.dumps(config))

    def test_errors(self):
        with pytest.raises(ValueError, match="square"):
            PromptedSAM(MobileSAM(make_sam().image_encoder, (64, 96)))


class TestMaskLoss:
    def batch(self, count=3, photos=2) -> tuple[Prompts, PairedBatch]:
        masks = torch.zeros(count, 32, 32, dtype=torch.bool)
        for row in range(count):
            masks[row, 4 * row : 4 * row + 12, 8:24] = True
        photo = torch.tensor([0, 1, 1])[:count]
        prompts = Prompts(torch.empty(photos, 0), photo, torch.zeros(count, 4), torch.zeros(count, 1, 2),
                          torch.zeros(count, dtype=torch.int64))  # fmt: skip
        targets = PromptTargets(prompts, masks, torch.ones(count))
        return prompts, PairedBatch(torch.empty(0), targets, torch.ones(photos), ())

    def change(self, batch, **targets) -> PairedBatch:
        return batch._replace(targets=batch.targets._replace(**targets))

    def logits(self, batch, scale=8.0):
        small = F.interpolate(batch.targets.masks[:, None].float(), (8, 8), mode="area")
        return scale * (2 * small - 1).repeat(1, 4, 1, 1)

    def test_smaller_for_better_masks(self):
        prompts, batch = self.batch()
        logits = self.logits(batch)
        perfect = torch.ones(3, 4)
        good, poor = (MaskLoss()((each, perfect), prompts, batch) for each in (logits, -logits))
        assert good.shape == (2,)
        assert (good < 0.5).all()
        assert (poor > 1).all()

    def test_by_hand(self):
        prompts, batch = self.batch(1, 1)
        logits = torch.randn(1, 4, 32, 32, generator=torch.Generator().manual_seed(0))  # of the size of the masks
        truth = batch.targets.masks[:, None].float()
        p = logits.sigmoid()
        right = torch.where(truth > 0, p, 1 - p)
        focal = (torch.where(truth > 0, 0.25, 0.75) * (1 - right) ** 2 * -right.log()).mean((2, 3))
        dice = 1 - (2 * (p * truth).sum((2, 3)) + 1) / (p.sum((2, 3)) + truth.sum() + 1)
        masks = 20 * focal + dice
        ious = ((logits > 0) & batch.targets.masks[:, None]).sum((2, 3)) / (
            (logits > 0) | batch.targets.masks[:, None]
        ).sum((2, 3))
        scores = torch.rand(1, 4)
        wanted = (masks[0, 0] + masks[0, 1:].min()) / 2 + (scores - ious).square().mean()
        assert MaskLoss()((logits, scores), prompts, batch).item() == pytest.approx(wanted.item(), rel=1e-4)
        single = MaskLoss(iou=0.0)((logits, scores), prompts._replace(counts=torch.ones(1, dtype=torch.int64)), batch)
        assert single.item() == pytest.approx(masks[0, 1:].min().item(), rel=1e-4)

    @pytest.mark.parametrize(("count", "single"), [(0, True), (3, True), (1, False)])
    def test_the_best_mask_learns(self, count, single):
        prompts, batch = self.batch()
        prompts = prompts._replace(counts=torch.full((3,), count))
        logits = -self.logits(batch)
        logits[:, 2] *= -1  # the second of the ambiguous ones is right
        logits.requires_grad_()
        MaskLoss(iou=0.0)((logits, torch.zeros(3, 4)), prompts, batch).sum().backward()
        assert logits.grad.flatten(2).any(2).tolist() == [[single, False, True, False]] * 3

    def test_scores_learn_the_iou(self):
        prompts, batch = self.batch()
        logits = self.logits(batch)
        logits[:, 1] = -1.0  # an empty mask
        scores = torch.zeros(3, 4, requires_grad=True)
        MaskLoss(focal=0.0, dice=0.0)((logits, scores), prompts, batch).sum().backward()
        assert (scores.grad[:, [0, 2, 3]] < 0).all()  # towards 1
        assert not scores.grad[:, 1].any()  # it is 0

    def test_objects_have_equal_weights_and_placeholders_none(self):
        prompts, batch = self.batch()
        logits, scores = -self.logits(batch), torch.zeros(3, 4)
        losses = MaskLoss()((logits, scores), prompts, batch)
        alone, other = (
            MaskLoss()(
                (logits[rows], scores[rows]),
                prompts._replace(photo=prompts.photo[rows], counts=prompts.counts[rows]),
                self.change(batch, masks=batch.targets.masks[rows], weights=batch.targets.weights[rows]),
            )
            for rows in (slice(1, 2), slice(2, None))
        )
        assert losses[1].item() == pytest.approx((alone[1] + other[1]).item())
        empty = MaskLoss()((logits, scores), prompts, self.change(batch, weights=torch.tensor([0.0, 1, 1])))
        assert empty.tolist() == [0, losses[1].item()]

    def test_gradcheck(self):
        _, batch = self.batch(2)
        logits = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(1)).double().requires_grad_()
        scores = torch.rand(2, 4).double().requires_grad_()

        class Double(MaskLoss):  # the loss computes in float32
            def __call__(self, logits, scores):
                truth = batch.targets.masks.double()
                return self._losses(logits, scores, truth, torch.tensor([True, False]))

        assert gradcheck(Double(), (logits, scores))

    @pytest.mark.parametrize("size", [(32, 32), (21, 13), (8, 8)])
    def test_large_masks(self, size):
        """Losses and gradients equal those of kornia's focal loss and of the dice loss on resized logits."""
        generator = torch.Generator().manual_seed(2)
        logits = (6 * torch.randn(5, 8, 8, generator=generator)).double().requires_grad_()
        truth = (torch.rand(4, *size, generator=generator) > 0.7).double()
        truth[3] = 0  # an object of less than a pixel
        rows, weights = torch.tensor([0, 1, 2, 3, 1]), torch.rand(5, generator=generator).double()
        loss = MaskLoss(focal=20.0, dice=3.0)
        large = F.interpolate(logits[:, None], size, mode="bilinear", align_corners=False)
        expected = loss._soft_losses(large, truth[rows][:, None])[:, 0]
        found = promptable._LargeMaskLosses.apply(logits, truth, rows, loss.focal, loss.dice)
        torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-9)
        slopes = (torch.autograd.grad((each * weights).sum(), logits)[0] for each in (found, expected))
        torch.testing.assert_close(*slopes, rtol=1e-6, atol=1e-9)


class TestEvaluation:
    def test_it_equals_the_public_api(self, folder):
        """The scores equal those of ``embed`` and ``predict_masks``."""
        sam, data = lively_sam(), InstanceDataset.open(folder)
        metrics = PromptMetrics()
        for row in range(len(data)):
            photo, masks = data.read(row)
            embedding = sam.embed(Image.fromarray(photo.movedim(0, -1).numpy()))
            (boxed,) = sam.predict_masks(embedding, boxes=mask_boxes(masks), multimask_output=False)
            (pointed,) = sam.predict_masks(embedding, central_points(masks)[:, None])
            metrics.update("box", boxed.masks()[:, 0], masks)
            metrics.update("point", pointed.best().masks()[:, 0], masks)
        wanted = metrics.compute()
        assert 0 < wanted.box_iou < 100
        assert vars(evaluate(sam, data)) == pytest.approx(vars(wanted), rel=1e-3)


class TestBuildSam:
    def test_random(self):
        sam = build_sam("1m", img_size=64, window_sizes="fit", drop_path_rate=0.3, use_checkpoint=True)
        assert (sam.img_size, sam.training, sam.config.window_sizes) == ((64, 64), True, (8, 8, 4, 2))
        assert (sam.config.drop_path_rate, sam.config.use_checkpoint) == (0.3, True)

    def test_encoder_alone(self):
        sam = build_sam("1m", pretrained="cifar10", img_size=64)
        start = TinyViT.from_config("1m", pretrained="cifar10").state_dict()
        found = sam.image_encoder.state_dict()
        assert all(torch.equal(found[name], start[name]) for name in start if not name.startswith("head."))
        assert found.keys() - start.keys() == {name for name in found if name.startswith("neck.")}

    def test_encoder_with_its_neck(self, tmp_path):
        encoder = lively_sam().image_encoder
        path = save_checkpoint(encoder, tmp_path / "encoder.safetensors")
        found = build_sam(pretrained=path, img_size=64).image_encoder.state_dict()
        assert all(torch.equal(tensor, found[name]) for name, tensor in encoder.state_dict().items())

    def test_whole(self, tmp_path):
        sam = lively_sam()
        path = save_checkpoint(sam, tmp_path / "sam.safetensors")
        again = build_sam(pretrained=path, drop_path_rate=0.2)
        assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in sam.state_dict().items())
        assert (again.config.drop_path_rate, again.img_size, again.training) == (0.2, (64, 64), True)
        assert build_sam(pretrained=path, img_size=96).img_size == (96, 96)

    def test_errors(self, tmp_path):
        with pytest.raises(CheckpointError, match="no weights and no file"):
            build_sam("1m", pretrained="nothing")
        with pytest.raises(ValueError, match="multiple of 16"):
            build_sam("1m", img_size=40)


class TestTraining:
    @pytest.mark.slow
    def test_it_learns_boxes(self, tmp_path):
        data = make_instances(tmp_path / "data", 2)
        for copied in range(2, 40):  # fewer epochs, each of which saves a state
            for kind in ("images", "masks"):
                shutil.copy(data / kind / f"{copied % 2:02}.png", data / kind / f"{copied:02}.png")
        images = InstanceDataset.open(data)
        few, model = images.sample(4), make_sam()
        before = evaluate(copy.deepcopy(model).eval(), few)
        recipe = replace(RECIPE, epochs=2, warmup_epochs=0.2, base_lr=0.25, clip_norm=0.5, changes=WHOLE)
        samples = samples_of(data, prompting=Prompting(box_fraction=1.0, jitter=0.0), **WHOLE)
        result = fit(data, tmp_path / "out", recipe, model=model, samples=samples, focal=2.0, log_every=10)
        found = evaluate(MobileSAM.from_config(pretrained=result.last), few)
        assert before.box_iou < 45
        assert found.box_iou > 85
        assert found.instances == 8

    def test_validation(self, folder, tmp_path):
        validation = InstanceDataset.open(make_instances(tmp_path / "val", 3, seed=20))
        result = fit(folder, tmp_path / "out", validation=validation)
        lines = [line for line in metrics(tmp_path / "out") if "broken" in line]
        best = max(line["box_iou"] for line in lines)
        assert result.to_dict()["box_iou"] == result.score == best
        kept = MobileSAM.from_config(pretrained=result.best)
        assert (kept.training, kept.img_size) == (False, (64, 64))
        found = evaluate(kept, validation)
        assert found.box_iou == pytest.approx(best, abs=1e-3)
        line = next(line for line in lines if line["box_iou"] == best)
        assert line["point_iou"] == pytest.approx(found.point_iou, abs=1e-3)

    @pytest.mark.parametrize("call", [2, 3])
    @pytest.mark.slow
    def test_resuming(self, folder, tmp_path, call):
        recipe, changes = replace(RECIPE, ema_decay=0.9), {"drop_path_rate": 0.3}
        fit(folder, tmp_path / "undisturbed", recipe, model=make_sam(**changes))
        out = tmp_path / "out"
        with pytest.raises(Interrupted):
            fit(folder, out, recipe, call, model=make_sam(**changes), save_minutes=0)
        fit(folder, out, recipe, model=make_sam(**changes))
        one, two = (losses(each) for each in (out, tmp_path / "undisturbed"))
        assert one == pytest.approx(two, rel=1e-6)
        first, second = (
            MobileSAM.from_config(pretrained=each / "last.safetensors").state_dict()
            for each in (out, tmp_path / "undisturbed")
        )
        assert all(torch.allclose(first[key], second[key], rtol=1e-5, atol=1e-7) for key in first)

    def test_frozen_encoder(self, folder, tmp_path):
        start = make_sam()
        result = fit(folder, tmp_path / "out", replace(RECIPE, freeze=("backbone",)), model=make_sam())
        kept = MobileSAM.from_config(pretrained=result.last).state_dict()
        changed = {name for name, tensor in start.state_dict().items() if not torch.equal(tensor, kept[name])}
        assert changed
        assert not any(name.startswith("image_encoder.") for name in changed)
        with pytest.raises(ValueError, match=r"recipe\.freeze"):
            fit(folder, tmp_path / "out")

    def test_accumulation_equals_the_large_batch(self, folder, tmp_path):
        recipe = replace(RECIPE, batch_size=4, frozen_batch_norm=True)
        for size in (4, 2):
            fit(folder, tmp_path / str(size), recipe, process_batch=size)
        one, two = (losses(tmp_path / size) for size in ("4", "2"))
        assert one == pytest.approx(two, rel=1e-4)

    def test_corrupt_images(self, folder, tmp_path):
        damage(folder / "masks" / "02.png")
        val = make_instances(tmp_path / "val", 2, seed=20)
        damage(val / "images" / "01.png")
        Image.fromarray(np.zeros((44, 60), dtype=np.uint8)).save(folder / "masks" / "01.png")  # no instances
        result = fit(folder, tmp_path / "out", on_broken="skip", validation=InstanceDataset.open(val))
        assert result.broken == ("02.png", "validation: 01.png")

    def test_preset_of_the_recipe(self):
        recipe = find_recipe("promptable")
        described = PromptAugmentation(recipe.img_size, recipe.preset, **recipe.changes).describe()
        assert json.loads(json.dumps(described))["crop_scale"] == [0.5, 1.0]
