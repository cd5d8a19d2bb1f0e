"""The recipes and the hyperparameters of the paper and its code."""

from __future__ import annotations

import math

import pytest

from kornia_tinyvit.preprocessing import TRAINING_PRESETS, find_preset
from kornia_tinyvit.training import RECIPES, Recipe, choose_recipe, find_recipe

# stage: epochs, warm-up, base lr, min lr, weight decay, layer decay, frozen batch norm, mixup and cutmix, pixels
PUBLISHED = {
    "in1k": (300, 20, 5e-4, 5e-6, 0.05, 1, False, (0.8, 1.0), 224),
    "in22k_distill": (90, 5, 2.5e-4, 5e-6, 0.01, 1, False, (0, 0), 224),
    "in22k_to_in1k": (30, 5, 2.5e-4, 1e-5, 1e-8, 0.8, True, (0, 0), 224),
    "224_to_384": (30, 5, 2e-5, 2e-7, 1e-8, 1, True, (0, 0), 384),
    "384_to_512": (30, 5, 2e-5, 2e-7, 1e-8, 1, True, (0, 0), 512),
}


class TestPublished:
    @pytest.mark.parametrize("name", PUBLISHED)
    def test_numbers(self, name):
        recipe = RECIPES[name]
        preset = find_preset(recipe.preset, **recipe.changes)
        found = (
            recipe.epochs, recipe.warmup_epochs, recipe.base_lr, recipe.min_lr, recipe.weight_decay,
            recipe.layer_decay, recipe.frozen_batch_norm, (preset.mixup, preset.cutmix), recipe.img_size,
        )  # fmt: skip
        assert found == PUBLISHED[name]
        assert recipe.clip_norm == 5
        assert recipe.ema_decay == 0
        assert (preset.policy, preset.color_jitter, preset.erasing, preset.flip) == ("rand", 0.4, 0.25, 0.5)
        assert preset.label_smoothing == (0.0 if name == "in22k_distill" else 0.1)

    def test_batches(self):
        assert RECIPES["in22k_distill"].batch_size == 4096
        assert RECIPES["in1k"].batch_size == 1024

    def test_drop_path_of_21m(self):
        rates = {name: RECIPES[name].drop_path for name in PUBLISHED}
        assert rates == {"in1k": {"21m": 0.2}} | {name: {"21m": 0.1} for name in list(PUBLISHED)[1:]}

    @pytest.mark.parametrize("name", RECIPES)
    def test_all_have_a_preset(self, name):
        assert RECIPES[name].preset in TRAINING_PRESETS
        find_preset(RECIPES[name].preset, **RECIPES[name].changes)


class TestLearningRate:
    @pytest.mark.parametrize(
        ("name", "batch", "peak"),
        [
            ("in1k", 1024, 1e-3),
            ("in22k_distill", 4096, 2e-3),
            ("in22k_to_in1k", 512, 2.5e-4),
            ("224_to_384", 128, 5e-6),
        ],
    )
    def test_linear_scaling_rule(self, name, batch, peak):
        assert find_recipe(name, batch_size=batch).peak_lr == pytest.approx(peak)

    def test_linear_warm_up(self):
        recipe = Recipe(epochs=30, warmup_epochs=5)
        assert [recipe.lr_factor(epoch) for epoch in (1, 2.5, 4)] == pytest.approx([0.2, 0.5, 0.8])
        assert 0 < recipe.lr_factor(0) <= 1e-3
        assert recipe.lr_factor(5) == 1
        assert recipe.lr_factor(5 - 1e-9) == pytest.approx(1)

    def test_no_warm_up(self):
        assert Recipe(epochs=3, warmup_epochs=0).lr_factor(0) == 1

    def test_warm_up_only(self):
        recipe = Recipe(epochs=3, warmup_epochs=3)
        assert recipe.lr_factor(1.5) == pytest.approx(0.5)
        assert math.isfinite(recipe.lr_factor(3))

    @pytest.mark.parametrize("name", RECIPES)
    def test_cosine(self, name):
        recipe = RECIPES[name]
        lowest = recipe.min_lr / recipe.base_lr
        after = recipe.epochs - recipe.warmup_epochs
        for fraction in (0, 0.25, 0.5, 0.9, 1):
            wanted = recipe.min_lr + (recipe.base_lr - recipe.min_lr) * (1 + math.cos(math.pi * fraction)) / 2
            assert recipe.base_lr * recipe.lr_factor(recipe.warmup_epochs + fraction * after) == pytest.approx(wanted)
        assert recipe.lr_factor(recipe.epochs) == pytest.approx(lowest)
        assert recipe.lr_factor(recipe.epochs + 1) == pytest.approx(lowest)
        factors = [recipe.lr_factor(recipe.epochs * step / 100) for step in range(101)]
        assert max(factors) <= 1
        assert min(factors[50:]) == pytest.approx(lowest)


class TestFindRecipe:
    def test_changes(self):
        recipe = find_recipe("cifar10", epochs=5, base_lr=None, img_size=48)
        assert (recipe.epochs, recipe.img_size, recipe.base_lr) == (5, 48, RECIPES["cifar10"].base_lr)
        assert RECIPES["cifar10"].epochs == 30

    def test_the_final_rate_follows_the_peak(self):
        usual, changed = RECIPES["semantic"], find_recipe("semantic", base_lr=0.0096)
        assert changed.min_lr == pytest.approx(usual.min_lr * 0.0096 / usual.base_lr)
        assert find_recipe("semantic", base_lr=0.0096, min_lr=0.001).min_lr == 0.001

    def test_unknown(self):
        with pytest.raises(ValueError, match="no recipe 'in2k'; choose one of in1k, in22k_distill"):
            find_recipe("in2k")
        with pytest.raises(ValueError, match="no field color, learning_rate"):
            find_recipe("in1k", learning_rate=1, color=2)

    @pytest.mark.parametrize(
        "changes",
        [
            {"epochs": 0}, {"epochs": 10, "warmup_epochs": 20}, {"warmup_epochs": -1}, {"batch_size": 0},
            {"batch_size": 127},
            {"base_lr": 0.0}, {"base_lr": -1.0}, {"min_lr": 1.0}, {"min_lr": -1e-9}, {"ema_decay": 1.0},
            {"ema_decay": -0.1},
        ],
    )  # fmt: skip
    def test_out_of_range(self, changes):
        with pytest.raises(ValueError, match="Out of range"):
            find_recipe("in1k", **changes)


class TestChooseRecipe:
    @pytest.mark.parametrize(
        ("task", "usual", "limit"),
        [("classification", "in1k", 10_000), ("semantic", "semantic", 2_000), ("promptable", "promptable", 2_000),
         ("detection", "detection", 2_000)],
    )  # fmt: skip
    def test_by_task_size_and_weights(self, task, usual, limit):
        small = f"{task}_small"
        assert choose_recipe(task, limit - 1, True) == (small, f"fine-tuning on fewer than {limit:,} images")
        assert choose_recipe(task, limit, True)[0] == choose_recipe(task, 2, False)[0] == usual
        assert RECIPES[small].patience > 0
        assert RECIPES[small].layer_decay < 1
        assert RECIPES[small].epochs < RECIPES[usual].epochs
        assert RECIPES[usual].patience == 0

    def test_unknown_task(self):
        with pytest.raises(ValueError, match="no task 'depth'; choose one of classification, semantic"):
            choose_recipe("depth", 5, True)


class TestFit:
    @pytest.mark.parametrize(
        ("images", "multiple", "batch"),
        [
            (2000, 2, 128),
            (2000, 48, 192),
            (8192, 2, 1024),
            (8191, 2, 512),
            (1_281_167, 2, 1024),
            (12, 2, 2),
            (2, 2, 2),
            (3, 8, 8),
        ],
    )
    def test_batch(self, images, multiple, batch):
        fitted = RECIPES["in1k"].fit(images, multiple)
        assert fitted.batch_size == batch
        assert fitted.peak_lr == pytest.approx(RECIPES["in1k"].peak_lr * batch / 1024)
        assert (fitted is RECIPES["in1k"]) == (batch == 1024)
