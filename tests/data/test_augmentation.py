import ast
import dataclasses
import itertools
import os
import pickle
import subprocess
import sys
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageOps
from torch.utils._python_dispatch import TorchDispatchMode

from kornia_tinyvit.data import EpochBatches, EpochOrder, ReplayableAugmentation, ReplayedSamples, replay_loader
from kornia_tinyvit.data import augmentation as module
from kornia_tinyvit.data.operators import OPERATIONS, OPERATORS, make_noise
from kornia_tinyvit.data.params import ReplayParams, beta_quantile, crop_box

SIZE, SAMPLES = 40, 66
PRESETS = {
    "in1k": {},  # RandAugment, jitter, erasing, mixup and cutmix
    "distill": {},
    "trivial": {"policy": "trivial", "color_jitter": 0.0},
    "small": {"cutmix": 1.0, "mix_probability": 0.5},
}


FIELDS = {field.name for field in dataclasses.fields(ReplayParams)} - {"epoch"}


def build(name, seed=11, **changes):
    preset = "distill" if name == "trivial" else name
    return ReplayableAugmentation(SIZE, preset, seed=seed, num_samples=SAMPLES, **{**PRESETS[name], **changes})


class Images:
    """Images of many sizes, generated from their index."""

    labels = tuple(index % 10 for index in range(SAMPLES))

    def __len__(self):
        return SAMPLES

    def read(self, index):
        height, width = 20 + 7 * (index % 9), 20 + 5 * (index % 11)
        y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
        waves = [torch.sin(0.11 * (c + 1) * x + 0.07 * (index + 1) * y + c) for c in range(3)]
        return (127.5 + 127 * torch.stack(waves)).to(torch.uint8), self.labels[index]

    def name(self, index):
        return f"image {index}"


def replay(augment, epoch, batches, workers=0):
    """Return the CRC-32 of each sample's pixels, and the checksums of its parameters, by index."""
    keys = [[(epoch, int(index)) for index in batch] for batch in batches]
    pixels, checksums = {}, {}
    for batch in replay_loader(ReplayedSamples(Images(), augment), keys, workers):
        images = augment(batch.crops, batch.params).numpy()
        for row, index in enumerate(batch.params.indices.tolist()):
            pixels[index] = zlib.crc32(images[row].tobytes())
        checksums |= dict(zip(batch.params.indices.tolist(), batch.params.checksums().tolist(), strict=True))
    return pixels, checksums


def cut(order, size):
    return [order[start : start + size] for start in range(0, len(order), size)]


@pytest.fixture(scope="module", params=PRESETS)
def recorded(request):
    augment = build(request.param)
    order = EpochOrder(SAMPLES, 11).permutation(3)
    return request.param, order, replay(augment, 3, cut(order, 64))


WORLD_SIZES = (1, 2, 3)


def resume(world_size):
    """Return the batch at which each rank resumes epoch 3 after its first batch."""
    return 3 * (SAMPLES // (4 * world_size)) + 1


def replay_rank(rank):
    """Return what a rank replays: its shard for each world size, and the whole epoch as world size 0."""
    order, found = EpochOrder(SAMPLES, 11), {}
    for name in PRESETS:
        found[name, 0] = replay(build(name), 3, cut(order.permutation(3), 32))
        for size in WORLD_SIZES[rank:]:
            batches = EpochBatches(order, 4, 4, rank, size, start=resume(size))
            found[name, size] = replay(build(name), 3, [[index for _, index in batch] for batch in batches])
    return found


@pytest.fixture(scope="module")
def ranks():
    """Return what the processes of three ranks replay, forked from a fresh Python process."""
    code = (
        "import multiprocessing\nfrom tests.data.test_augmentation import replay_rank\n"
        "print(multiprocessing.get_context('fork').Pool(3).map(replay_rank, range(3)))"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}  # three processes with several threads are slow on two cores
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    return ast.literal_eval(done.stdout)


class TestInvariance:
    @pytest.mark.parametrize("batch", [2, 6, 14])
    def test_batch_size(self, recorded, batch):
        name, order, expected = recorded
        assert replay(build(name), 3, cut(order, batch)) == expected

    def test_single_samples_and_odd_batches_without_mixing(self):
        augment, order = build("distill"), EpochOrder(SAMPLES, 11).permutation(3)
        expected = replay(augment, 3, cut(order, 64))
        assert replay(build("distill"), 3, cut(order, 1)) == expected
        assert replay(build("distill"), 3, cut(order, 7)) == expected
        assert replay(build("distill"), 3, cut(order[::-1], 13)) == expected

    @pytest.mark.parametrize("workers", [1, 3])
    def test_workers(self, recorded, workers):
        name, order, expected = recorded
        assert replay(build(name), 3, cut(order, 16), workers) == expected

    @pytest.mark.parametrize("world_size", WORLD_SIZES)
    def test_ranks_and_resumption(self, recorded, ranks, world_size):
        """Each rank is a process, which resumes its shard of the epoch after the first batch."""
        name, _, (pixels, checksums) = recorded
        shards = [rank[name, world_size] for rank in ranks[:world_size]]
        seen = {index: crc for shard, _ in shards for index, crc in shard.items()}
        assert sum(len(shard) for shard, _ in shards) == len(seen)
        assert seen.items() <= pixels.items()
        assert all(found.items() <= checksums.items() for _, found in shards)
        assert len(seen) == (SAMPLES // (4 * world_size) - 1) * 4 * world_size

    def test_threads(self, recorded):
        name, order, expected = recorded
        before = torch.get_num_threads()
        try:
            for threads in (1, 2):
                torch.set_num_threads(threads)
                pixels, checksums = replay(build(name), 3, [order[:22]])
                assert pixels.items() <= expected[0].items()
                assert checksums.items() <= expected[1].items()
        finally:
            torch.set_num_threads(before)

    def test_python_threads_with_one_augmentation(self, recorded):
        name, order, expected = recorded
        augment = build(name)
        with ThreadPoolExecutor(4) as pool:
            parts = list(pool.map(lambda part: replay(augment, 3, [part]), cut(order, 16)))
        assert {key: crc for pixels, _ in parts for key, crc in pixels.items()} == expected[0]

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_autocast(self, recorded, dtype):
        name, order, expected = recorded
        with torch.autocast("cpu", dtype):
            assert replay(build(name), 3, cut(order, 64)) == expected

    def test_pickled(self, recorded):
        """Data loaders pickle it for processes that are spawned."""
        name, order, expected = recorded
        assert replay(pickle.loads(pickle.dumps(build(name))), 3, cut(order, 64)) == expected

    def test_global_random_numbers(self, recorded):
        name, order, expected = recorded
        torch.manual_seed(99)
        np.random.seed(99)
        before = torch.get_rng_state()
        assert replay(build(name), 3, cut(order, 64)) == expected
        assert torch.equal(before, torch.get_rng_state())

    def test_another_process(self, recorded, ranks):
        name, _, expected = recorded
        assert all(rank[name, 0] == expected for rank in ranks)

    def test_epoch_and_seed_change_every_image(self, recorded):
        name, order, (pixels, checksums) = recorded
        for augment, epoch in ((build(name), 4), (build(name, seed=12), 3)):
            order = EpochOrder(SAMPLES, augment.seed).permutation(epoch)
            other = replay(augment, epoch, cut(order, 64))
            assert not any(other[1][index] == checksums[index] for index in checksums)
            assert sum(other[0][index] == pixels[index] for index in pixels) <= 1

    def test_no_operator_is_random(self, recorded):
        name, order, _ = recorded

        class Deterministic(TorchDispatchMode):
            def __torch_dispatch__(self, function, types, args=(), kwargs=None):
                assert torch.Tag.nondeterministic_seeded not in function.tags, function
                return function(*args, **(kwargs or {}))

        augment = build(name)
        batch = ReplayedSamples(Images(), augment).__getitems__([(3, index) for index in order[:32].tolist()])
        with Deterministic():
            augment(batch.crops, augment.sample_params(3, batch.params.indices))


class TestStreams:
    @pytest.mark.parametrize("change", [{"flip": 0.1}, {"color_jitter": 0.1}, {"erasing": 0.9}, {"policy": None}])
    def test_a_change_leaves_other_parameters_unchanged(self, change):
        first, other = (build("in1k", **each).sample_params(0, np.arange(64)) for each in ({}, change))
        touched = {
            "flip": {"flip"},
            "color_jitter": {"jitter"},
            "erasing": {"erased"},
            "policy": {"operations", "magnitudes"},
        }
        for field in FIELDS - {"indices", "partners"}:
            same = np.array_equal(getattr(first, field), getattr(other, field))
            assert same != (field in touched[next(iter(change))]), field


@pytest.fixture(scope="module")
def many():
    augment = ReplayableAugmentation(64, "in1k", seed=1, num_samples=20_000)
    return augment, augment.sample_params(0, np.arange(20_000))


class TestParams:
    def test_flip_and_jitter(self, many):
        _, params = many
        assert abs(params.flip.mean() - 0.5) < 0.015
        assert params.jitter.min() >= 0.6
        assert params.jitter.max() <= 1.4
        assert np.allclose(params.jitter.mean(0), 1, atol=0.01)

    def test_policy_is_rand_m9_mstd05_inc1(self, many):
        _, params = many
        chosen = params.operations[params.operations >= 0]
        assert params.operations.shape == (20_000, 2)
        assert abs(len(chosen) / 40_000 - 0.5) < 0.01
        assert np.abs(np.bincount(chosen, minlength=15) / len(chosen) - 1 / 15).max() < 0.01
        rotations = params.magnitudes[params.operations == OPERATIONS.index("rotate")]
        assert abs(np.abs(rotations).mean() - 27) < 0.3  # level 9 of 10 of 30 degrees
        assert abs(np.abs(rotations).std() - 1.5) < 0.25
        assert abs((rotations > 0).mean() - 0.5) < 0.05
        assert np.abs(rotations).max() <= 30
        bits = params.magnitudes[params.operations == OPERATIONS.index("posterize")]
        assert set(np.unique(bits)) <= {1, 2, 3}

    def test_trivial_policy_samples_one_operator_of_uniform_magnitude(self):
        params = ReplayableAugmentation(64, "distill", policy="trivial").sample_params(0, np.arange(20_000))
        assert params.operations.shape == (20_000, 1)
        assert abs((params.operations == -1).mean() - 1 / 16) < 0.01
        angles = np.abs(params.magnitudes[params.operations == OPERATIONS.index("rotate")])
        assert abs(angles.mean() - 15) < 0.8
        assert angles.min() < 1

    def test_erasing(self, many):
        _, params = many
        erased = params.erased[params.erased[:, 2] > 0]
        assert abs(len(erased) / 20_000 - 0.25) < 0.015
        top, left, height, width = erased.T
        assert ((top >= 0) & (left >= 0) & (top + height <= 64) & (left + width <= 64)).all()
        area = height * width / 64**2
        assert area.min() > 0.01
        assert area.max() < 0.35
        assert abs(area.mean() - (0.02 + 1 / 3) / 2) < 0.03

    def test_mixing(self, many):
        _, params = many
        mixed, cut_out = params.mixup_weight > 0, params.pasted[:, 2] * params.pasted[:, 3] > 0
        assert not (mixed & cut_out).any()
        assert abs(mixed.mean() - 0.5) < 0.02
        at = {index: row for row, index in enumerate(params.indices.tolist())}
        partner = np.array([at[index] for index in params.partners.tolist()])
        assert np.array_equal(params.indices[partner[partner]], params.indices)
        assert np.array_equal(params.mixup_weight[partner], params.mixup_weight)
        assert np.array_equal(params.pasted[partner], params.pasted)
        expected = np.random.default_rng(0).beta(0.8, 0.8, 100_000)
        quantiles = np.linspace(0.05, 0.95, 10)
        difference = np.quantile(params.mixup_weight[mixed], quantiles) - np.quantile(expected, quantiles)
        assert np.abs(difference).max() < 0.03

    def test_the_last_of_an_odd_number_of_samples_is_not_mixed(self):
        augment = ReplayableAugmentation(32, "in1k", num_samples=5)
        last = augment.order.permutation(0)[4:]
        params = augment.sample_params(0, last)
        assert params.partners.tolist() == last.tolist()
        assert params.mixup_weight.tolist() == [0]
        assert params.pasted.sum() == 0

    def test_mix_probability(self):
        augment = ReplayableAugmentation(32, "small", num_samples=10_000, cutmix=1.0, mix_probability=0.3)
        pasted = augment.sample_params(0, np.arange(10_000)).pasted
        assert 0.25 < (pasted[:, 2] > 0).mean() < 0.31  # some boxes have no height

    def test_crop_boxes_are_torchvisions(self):
        augment = ReplayableAugmentation(32, "distill")
        params = augment.sample_params(0, np.arange(4000))
        boxes = np.array([crop_box(tries, 300, 500, augment.preset) for tries in params.crop])
        top, left, height, width = boxes.T
        assert ((top >= 0) & (left >= 0) & (top + height <= 300) & (left + width <= 500)).all()
        area, ratio = height * width / 150_000, width / height
        assert area.min() > 0.07
        random, expected = np.random.default_rng(0), []
        while len(expected) < 20_000:  # torchvision's loop over attempts; large squares do not fit
            target, aspect = 150_000 * random.uniform(0.08, 1), np.exp(random.uniform(np.log(3 / 4), np.log(4 / 3)))
            broad, tall = round(np.sqrt(target * aspect)), round(np.sqrt(target / aspect))
            if broad <= 500 and tall <= 300:
                expected.append(tall * broad / 150_000)
        assert abs(area.mean() - np.mean(expected)) < 0.015
        assert abs(area.std() - np.std(expected)) < 0.015
        assert ratio.min() > 0.74
        assert ratio.max() < 1.35

    def test_a_strip_falls_back_to_the_center_crop(self):
        augment = ReplayableAugmentation(32, "distill", crop_scale=(1.0, 1.0))
        top, left, height, width = crop_box(augment.sample_params(0, [0]).crop[0], 10, 1000, augment.preset)
        assert (height, width) == (10, 13)
        assert (top, left) == (0, 493)

    @pytest.mark.parametrize("alpha", [0.2, 0.8, 1.0, 2.0])
    def test_beta_quantile(self, alpha):
        expected = np.random.default_rng(0).beta(alpha, alpha, 400_000)
        probabilities = np.array([0.05, 0.3, 0.5, 0.7, 0.95])
        assert np.allclose(beta_quantile(alpha, probabilities), np.quantile(expected, probabilities), atol=5e-3)

    def test_checksums_depend_on_every_field(self):
        augment = build("in1k")
        params = augment.sample_params(0, np.arange(8))
        for field in FIELDS:
            edited = getattr(params, field).copy()
            edited[3] = ~edited[3] if field == "flip" else edited[3] + 1
            changed = dataclasses.replace(params, **{field: edited}).checksums() != params.checksums()
            assert changed.tolist() == [row == 3 for row in range(8)], field

    def test_recorded_checksums(self):
        """A change of these checksums requires another VERSION."""
        assert module.VERSION == 1
        augment = ReplayableAugmentation(64, "in1k", seed=2**40 + 3, num_samples=100)
        assert augment.sample_params(7, [0, 41, 99]).checksums().tolist() == [946905671, 207723968, 3305397921]

    @pytest.mark.parametrize(
        ("preset", "changes", "recorded"),
        [
            ("in1k", {}, 888041347),
            ("small", {}, 3608147941),
            ("distill", {"policy": "trivial"}, 16762595),
            ("distill", {"cutmix": 1.0}, 2488375841),
        ],
    )
    def test_recorded_checksums_of_many_samples(self, preset, changes, recorded):
        """Enough samples to cover every branch, such as erasing."""
        augment = ReplayableAugmentation(48, preset, seed=5, num_samples=200, **changes)
        assert zlib.crc32(augment.sample_params(3, list(range(200))).checksums().tobytes()) == recorded


class TestOperators:
    """Compare with Pillow, which timm uses."""

    @pytest.fixture
    def photo(self):
        return Images().read(5)[0]

    @pytest.mark.parametrize(
        ("name", "magnitude", "reference"),
        [
            ("invert", 0.0, ImageOps.invert),
            ("equalize", 0.0, ImageOps.equalize),
            ("posterize", 3.0, lambda image: ImageOps.posterize(image, 3)),
            ("solarize", 100.0, lambda image: ImageOps.solarize(image, 100)),
            ("color", 1.7, lambda image: ImageEnhance.Color(image).enhance(1.7)),
            ("contrast", 0.3, lambda image: ImageEnhance.Contrast(image).enhance(0.3)),
            ("brightness", 1.6, lambda image: ImageEnhance.Brightness(image).enhance(1.6)),
            ("sharpness", 1.9, lambda image: ImageEnhance.Sharpness(image).enhance(1.9)),
        ],
    )
    def test_intensity(self, photo, name, magnitude, reference):
        ours = OPERATORS[name](photo[None], torch.tensor([magnitude]))[0]
        theirs = torch.from_numpy(np.array(reference(Image.fromarray(photo.permute(1, 2, 0).numpy()))))
        difference = (ours.int() - theirs.permute(2, 0, 1).int()).abs()
        assert difference.max() <= 1  # Pillow truncates where we round

    def test_solarize_add(self):
        pixels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(1, 3, 16, 16)
        out = OPERATORS["solarize_add"](pixels, torch.tensor([90.0]))[0, 0].flatten().tolist()
        assert out == [min(255, value + 90) if value < 128 else value for value in range(256)]

    def test_auto_contrast(self):
        photo = (torch.rand(1, 3, 8, 8) * 60 + 50).to(torch.uint8)
        out = OPERATORS["auto_contrast"](photo, torch.zeros(1)).flatten(2)
        assert out.amin(2).tolist() == [[0, 0, 0]]
        assert out.amax(2).min() >= 254
        flat = torch.full((2, 3, 8, 8), 200, dtype=torch.uint8)
        flat[1, 0, 0, 0] = 100
        flat_out = OPERATORS["auto_contrast"](flat, torch.zeros(2))
        assert torch.equal(flat_out[0], flat[0])  # a constant channel is unchanged
        assert torch.equal(flat_out[1, 1:], flat[1, 1:])
        assert sorted(flat_out[1, 0].unique().tolist()) == [0, 255]

    def test_translation_and_shear(self):
        photo = torch.full((1, 3, 20, 20), 7, dtype=torch.uint8)
        photo[:, :, 10, 5] = 250
        moved = OPERATORS["translate_x"](photo, torch.tensor([0.2]))[0, 0]
        assert moved[10, 1] == 250
        assert moved[3, 18] == round(255 * 0.485)  # the padding is the mean color
        sheared = OPERATORS["shear_y"](photo, torch.tensor([0.0]))
        assert torch.equal(sheared, photo)

    def test_rotation_by_90_degrees(self):
        photo = torch.randint(256, (1, 3, 12, 12), dtype=torch.uint8)
        turned = OPERATORS["rotate"](photo, torch.tensor([90.0]))
        assert torch.equal(turned, photo.rot90(1, (2, 3))) or torch.equal(turned, photo.rot90(-1, (2, 3)))

    @pytest.mark.parametrize("name", OPERATIONS)
    def test_images_of_a_batch_are_independent(self, name):
        photos = torch.stack([module.F.interpolate(Images().read(i)[0][None], (33, 35))[0] for i in range(9)])
        magnitudes = torch.tensor([1.0, 2.0, 3.0, 0.4, 1.5, 2.5, 0.1, 1.9, 2.2])
        whole = OPERATORS[name](photos, magnitudes)
        for row in range(9):
            assert torch.equal(OPERATORS[name](photos[row : row + 1], magnitudes[row : row + 1])[0], whole[row])

    def test_noise(self):
        noise = make_noise(torch.arange(64), torch.zeros(64, 3, 20, 20))
        assert abs(float(noise.mean())) < 0.01
        assert abs(float(noise.std()) - 1) < 0.01
        assert torch.equal(noise[5:6], make_noise(torch.tensor([5]), torch.zeros(1, 3, 20, 20)))
        flat = noise.flatten(1)
        assert np.abs(np.corrcoef(flat.numpy()) - np.eye(64)).max() < 0.15
        assert abs(float((flat[:, 1:] * flat[:, :-1]).mean())) < 0.02


def augmented():
    """Return the crops of an epoch, the augmented images and the checksums of their parameters."""
    augment, order = build("in1k"), EpochOrder(SAMPLES, 11).permutation(3)
    batch = ReplayedSamples(Images(), augment).__getitems__([(3, index) for index in order.tolist()])
    return batch.crops, augment(batch.crops, batch.params), batch.params.checksums().tolist()


class TestPixels:
    def test_normalized_and_erased(self):
        augment = ReplayableAugmentation(
            24, "distill", policy=None, color_jitter=0.0, flip=0.0, erasing=1.0, crop_scale=(1.0, 1.0),
            crop_ratio=(1.0, 1.0),
        )  # fmt: skip
        params = augment.sample_params(0, [0, 1])
        photo = torch.randint(256, (3, 24, 24), dtype=torch.uint8)
        crops = torch.stack([augment.crop(photo, params, row) for row in range(2)])
        assert torch.equal(crops[0], photo)
        images = augment(crops, params)
        plain = (photo / 255 - augment.mean[:, None, None]) / augment.std[:, None, None]
        for row, (top, left, height, width) in enumerate(params.erased.tolist()):
            inside = torch.zeros(24, 24, dtype=torch.bool)
            inside[top : top + height, left : left + width] = True
            assert torch.allclose(images[row][:, ~inside], plain[:, ~inside], atol=1e-6)
            assert (images[row][:, inside] != plain[:, inside]).float().mean() > 0.9

    def test_mixed_images_and_labels_agree(self):
        settings = {"policy": None, "color_jitter": 0.0, "flip": 0.0, "erasing": 0.0}
        augment = ReplayableAugmentation(
            16, "in1k", num_samples=40, mean=(0.0,) * 3, std=(1.0,) * 3, label_smoothing=0.0, **settings
        )
        order = augment.order.permutation(0)
        params = augment.sample_params(0, order)
        # Images at even positions are black and at odd ones white: the mean is the weight of the white one.
        crops = torch.zeros(40, 3, 16, 16, dtype=torch.uint8)
        crops[1::2] = 255
        images = augment(crops, params)
        targets = augment.soft_labels(torch.arange(40) % 2, params, 2)
        assert torch.allclose(images.mean((1, 2, 3)), targets[:, 1], atol=1e-5)
        assert torch.allclose(targets.sum(1), torch.ones(40))
        assert len(set(targets[:, 1].tolist())) > 20

    def test_label_smoothing(self):
        augment = ReplayableAugmentation(16, "finetune")
        targets = augment.soft_labels(torch.tensor([1]), augment.sample_params(0, [0]), 4)
        assert torch.allclose(targets, torch.tensor([[0.025, 0.925, 0.025, 0.025]]))

    def test_empty_batch(self):
        augment, crops = ReplayableAugmentation(16, "distill"), torch.zeros(0, 3, 16, 16, dtype=torch.uint8)
        assert augment(crops, augment.sample_params(0, [])).shape == (0, 3, 16, 16)

    def test_without_simd(self, tmp_path):
        """Scalar kernels give the same parameters and crops, and nearly all pixels, like other devices."""
        code = f"from tests.data.test_augmentation import *\ntorch.save(augmented(), {str(tmp_path / 'scalar')!r})"
        environment = {**os.environ, "ATEN_CPU_CAPABILITY": "default", "OMP_NUM_THREADS": "1"}
        subprocess.run([sys.executable, "-c", code], check=True, env=environment)
        (crops, images, checksums), (other_crops, other_images, other_checksums) = (
            augmented(), torch.load(tmp_path / "scalar"),
        )  # fmt: skip
        assert checksums == other_checksums
        assert torch.equal(crops, other_crops)
        assert ((images - other_images).abs() > 1e-3).float().mean() < 1e-3

    @pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
    def test_cuda(self):  # pragma: no cover
        for name in PRESETS:
            order = EpochOrder(SAMPLES, 11).permutation(3)[:64]
            augment = build(name)
            batch = ReplayedSamples(Images(), augment).__getitems__([(3, index) for index in order.tolist()])
            here = augment(batch.crops, batch.params)
            there = build(name).cuda()(batch.crops.cuda(), batch.params).cpu()
            assert ((here - there).abs() > 1e-3).float().mean() < 1e-3


class TestErrors:
    def test_settings(self):
        with pytest.raises(ValueError, match="no preset 'strong'"):
            ReplayableAugmentation(32, "strong")
        with pytest.raises(ValueError, match="no field strength"):
            ReplayableAugmentation(32, strength=1)
        with pytest.raises(ValueError, match="img_size must be positive"):
            ReplayableAugmentation(0)
        with pytest.raises(ValueError, match="need num_samples"):
            ReplayableAugmentation(32, mixup=0.8)

    def test_images(self):
        augment = ReplayableAugmentation(16)
        params = augment.sample_params(0, [0, 1])
        with pytest.raises(TypeError, match=r"uint8 image \(C, H, W\); got torch.float32"):
            augment.crop(torch.rand(3, 8, 8), params, 0)
        with pytest.raises(TypeError, match="uint8 crops"):
            augment(torch.rand(2, 3, 16, 16), params)
        with pytest.raises(ValueError, match=r"\(2, 3, 16, 16\), one per row"):
            augment(torch.zeros(1, 3, 16, 16, dtype=torch.uint8), params)

    def test_partners_apart(self):
        augment = build("in1k")
        order = augment.order.permutation(0)
        for rows in (order[[0, 2]], order[1:3], order[:1]):
            with pytest.raises(ValueError, match="neighbors in one batch"):
                augment(torch.zeros(len(rows), 3, SIZE, SIZE, dtype=torch.uint8), augment.sample_params(0, rows))

    def test_describe_covers_what_changes_pixels(self):
        described = build("in1k").describe()
        for name, change in {"img_size": 8, "mean": (0.5,) * 3}.items():
            assert (
                ReplayableAugmentation(
                    **{"img_size": SIZE, "preset": "in1k", "num_samples": 2, name: change}
                ).describe()
                != described
            )
        for change in ({"flip": 0.2}, {"erasing": 0.1}, {"mixup": 0.1}, {"crop_scale": (0.2, 1.0)}):
            assert build("in1k", **change).describe() != described
        assert build("in1k", label_smoothing=0.0).describe() == described
        assert "seed" not in described


def test_all_combinations_of_augmentations_run():
    for policy, jitter, erasing, mixup, cutmix in itertools.product(
        (None, "rand"), (0.0, 0.4), (0.0, 1.0), (0, 1), (0, 1)
    ):
        augment = ReplayableAugmentation(
            16, "in1k", num_samples=6, policy=policy, color_jitter=jitter, erasing=erasing, mixup=mixup, cutmix=cutmix
        )
        params = augment.sample_params(0, augment.order.permutation(0))
        images = augment(torch.randint(256, (6, 3, 16, 16), dtype=torch.uint8), params)
        assert images.isfinite().all()
