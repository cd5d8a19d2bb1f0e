"""Proxy training of candidates."""

from __future__ import annotations

import pickle
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from kornia_tinyvit.contraction import ProxyTraining
from kornia_tinyvit.data import ClassificationDataset
from kornia_tinyvit.distillation import LabelStore, Manifest, StoredLabelLoss
from kornia_tinyvit.training import find_recipe
from tests.contraction.conftest import SMALL
from tests.distillation.helpers import write_records
from tests.scenes import make_images, samples_of

RECIPE = find_recipe("cifar10", img_size=32, epochs=2, batch_size=8, base_lr=0.05, ema_decay=0.5)


class TestProxyTraining:
    @pytest.fixture
    def proxy(self, tmp_path) -> ProxyTraining:
        samples = samples_of(make_images(tmp_path / "data"), preset="small")
        validation = ClassificationDataset.open(make_images(tmp_path / "val", each=4, seed=5))
        return ProxyTraining(samples, validation, RECIPE, tmp_path / "training", cpu=True)

    def test_trains(self, proxy, parent):
        config = SMALL.replace(mlp_ratio=3.0)
        accuracy, network = proxy(config, None)
        assert network.config == config
        assert 0 <= accuracy <= 100
        assert list(proxy.folder.iterdir()) == []
        again, _ = proxy(config, None)
        assert again == accuracy

    def test_start(self, proxy, parent):
        # With a negligible learning rate the weights stay the initial ones.
        frozen = replace(proxy, recipe=replace(RECIPE, base_lr=1e-9, min_lr=0.0, ema_decay=0.0))
        _, inherited = frozen(SMALL, parent)
        _, fresh = replace(frozen, start="fresh")(SMALL, parent)
        torch.testing.assert_close(inherited.head.weight, parent.head.weight)
        assert not torch.allclose(fresh.head.weight, parent.head.weight)

    def test_stored_labels(self, proxy, tmp_path):
        samples = proxy.samples
        manifest = Manifest(num_classes=3, top_k=1, teacher={}, **samples.describe())
        rows = samples.order.permutation(0)
        params = samples.augmentation.sample_params(0, rows.tolist())
        sure = F.one_hot(torch.tensor([samples.images.labels[row] for row in rows.tolist()]), 3).float()
        with LabelStore.create(tmp_path / "store", manifest) as store:
            write_records(store, 0, rows, sure, params.checksums())
        objective = StoredLabelLoss(LabelStore(tmp_path / "store"), samples.augmentation)
        learns = pickle.loads(pickle.dumps(replace(proxy, objective=objective, replays=[0])))
        assert learns.describe()["objective"]["kind"] == "stored labels"
        assert learns.describe() != proxy.describe()
        accuracy, network = learns(SMALL, None)
        assert accuracy > 0
        assert network.config == SMALL

    def test_errors(self, proxy):
        with pytest.raises(ValueError, match="'inherit' or 'fresh'; got 'noise'"):
            replace(proxy, start="noise")
