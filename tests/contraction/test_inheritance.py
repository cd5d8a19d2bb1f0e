"""Weight inheritance."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, prune

from kornia_tinyvit import TinyViT
from kornia_tinyvit.contraction import SearchSpace, inherit, smallest
from kornia_tinyvit.data import ClassificationDataset
from kornia_tinyvit.preprocessing import EvaluationPipeline
from tests.conftest import shared
from tests.contraction.conftest import SMALL


@torch.no_grad()
def silence_filters(layer: nn.Module, channels: list[int]) -> None:
    layer.c.weight[channels] = 0
    for values in (layer.bn.weight, layer.bn.bias):
        values[channels] = 0


@torch.no_grad()
def silence_rows(layer: nn.Linear, rows: list[int]) -> None:
    layer.weight[rows] = 0
    layer.bias[rows] = 0


class TestInherit:
    @pytest.mark.parametrize(
        ("change", "layer"),
        [
            (lambda parent: prune.l1_unstructured(parent.head, "weight", 0.5), "head"),
            (lambda parent: parametrizations.weight_norm(parent.patch_embed.seq[0].c), r"patch_embed\.seq\.0\.c"),
            (lambda parent: setattr(parent.patch_embed.seq[0], "bn", nn.Identity()), r"patch_embed\.seq\.0\.bn"),
            (lambda parent: setattr(parent.patch_embed.seq[0].c, "padding_mode", "reflect"), r"patch_embed\.seq\.0\.c"),
            (lambda parent: setattr(parent.norm_head, "eps", 0.1), "norm_head"),
        ],
    )
    def test_changed_layers(self, change, layer):
        parent = TinyViT.from_config(SMALL)
        change(parent)
        with pytest.raises(ValueError, match=f"cannot be inherited from changed layers, here {layer}.*prune"):
            inherit(parent, SMALL)

    def test_pruning_made_permanent(self):
        parent = TinyViT.from_config(SMALL)
        prune.l1_unstructured(parent.head, "weight", 0.5)
        prune.remove(parent.head, "weight")
        assert torch.equal(inherit(parent, SMALL).head.weight, parent.head.weight)

    def test_same_config(self, parent, images):
        child = inherit(parent, SMALL.replace(img_size=64))
        assert child.training
        assert child.config.img_size == 64
        for name, tensor in child.state_dict().items():
            assert torch.equal(tensor, parent.state_dict()[name]), name
        child.head.weight.data.zero_()
        assert parent.head.weight.any()  # the parent is not modified

    @pytest.mark.parametrize(
        ("factor", "value"),
        [
            ("mbconv_expand_ratio", 3.0),
            ("mlp_ratio", 3.0),
            ("embed_dims", (12, 16, 24, 32)),
        ],
    )
    def test_removing_zero_weights_keeps_outputs(self, parent, images, factor, value):
        """Removing channels with zero weights keeps the outputs; removing others does not."""
        smaller = SMALL.replace(**{factor: value})
        assert not torch.allclose(inherit(parent, smaller).eval()(images), parent(images), atol=1e-2)
        silence = {
            "mbconv_expand_ratio": self.silence_expansion,
            "mlp_ratio": self.silence_mlps,
            "embed_dims": self.silence_first_stage,
        }
        silence[factor](parent)
        torch.testing.assert_close(inherit(parent, smaller).eval()(images), parent(images), atol=1e-5, rtol=1e-4)

    def silence_expansion(self, parent):
        for block in parent.layers[0].blocks:
            silence_filters(block.conv2, [3, *range(20, 35)])

    def silence_mlps(self, parent):
        for stage in (1, 2, 3):
            for block in parent.layers[stage].blocks:
                width = block.attn.proj.in_features
                silence_rows(block.mlp.fc1, list(range(1, 1 + width)))

    def silence_first_stage(self, parent):
        silence_filters(parent.patch_embed.seq[0], [0, 5])
        for layer in (parent.patch_embed.seq[2], *(block.conv3 for block in parent.layers[0].blocks)):
            silence_filters(layer, [1, 2, 7, 14])
        for block in parent.layers[0].blocks:  # its width shrinks with the stage's
            silence_filters(block.conv2, list(range(16, 32)))

    def silence_block(self, parent, number=0, scale=1.0):
        """Reduce a block of the second stage to a scale of its feature map."""
        block = parent.layers[1].blocks[number]
        for layer in (block.attn.proj, block.mlp.fc2):
            silence_rows(layer, list(range(16)))
        norm = block.local_conv.bn
        with torch.no_grad():
            block.local_conv.c.weight.zero_()[:, :, 1, 1] = scale
            norm.weight.copy_((norm.running_var + norm.eps).sqrt())
            norm.bias.copy_(norm.running_mean)

    @pytest.mark.parametrize(("number", "scale"), [(0, 1.0), (1, 1.0), (0, -3.0)])
    def test_removing_identity_blocks_keeps_outputs(self, parent, images, number, scale):
        """Identity blocks, and a scaling first block, which is folded into the merging before it."""
        self.silence_block(parent, number, scale)
        child = inherit(parent, SMALL.replace(depths=(2, 1, 2, 2))).eval()
        kept = parent.layers[1].blocks[1 - number].mlp.fc1.weight
        assert torch.equal(child.layers[1].blocks[0].mlp.fc1.weight, kept)
        torch.testing.assert_close(child(images), parent(images), atol=1e-5, rtol=1e-4)

    def test_attention_biases_of_smaller_windows(self, parent):
        child = inherit(parent, SMALL.replace(window_sizes=(4, 3, 2, 3)))
        whole = parent.layers[1].blocks[0].attn.attention_biases.view(2, 4, 4)
        assert torch.equal(child.layers[1].blocks[0].attn.attention_biases.view(2, 3, 3), whole[:, :3, :3])

    def test_most_important_heads(self, parent):
        attention = parent.layers[1].blocks[1].attn
        silence_rows(attention.qkv, list(range(16, 24)))  # the values of the first head
        child = inherit(parent, SMALL.replace(embed_dims=(16, 8, 24, 32), num_heads=(1, 1, 3, 4)))
        kept = child.layers[1].blocks[1].attn.attention_biases
        assert torch.equal(kept, attention.attention_biases[1:])

    def test_all_factors(self, parent, images):
        child = inherit(parent, smallest(SMALL, SearchSpace()))
        assert child(images).shape == (2, 3)
        assert child.config == smallest(SMALL, SearchSpace())

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"depths": (2, 3, 2, 2)}, "depths can only become smaller"),
            ({"mlp_ratio": 5.0}, "mlp_ratio can only become smaller"),
            ({"num_classes": 4}, "its parent's num_classes"),
            ({"num_heads": (1, 1, 3, 4)}, "Heads of stage 1 must keep their width of 8; got 16"),
            ({"mobile_sam": True}, "cannot be contracted"),
        ],
    )
    def test_errors(self, parent, change, message):
        with pytest.raises(ValueError, match=message):
            inherit(parent, SMALL.replace(**change))

    @pytest.mark.slow
    def test_learns_faster_than_from_scratch_on_cifar10(self):
        photos = ClassificationDataset.open(shared("data/cifar10/test.parquet")).sample(320)
        whole = TinyViT.from_config("1m", pretrained="cifar10")
        prepare = EvaluationPipeline(whole.config.img_size)
        images = torch.cat([prepare(photos[row][0][None]) for row in range(len(photos))])
        labels = torch.tensor(photos.labels)
        smaller = whole.config.replace(embed_dims=(32, 64, 96, 128), num_heads=(1, 2, 3, 4), mlp_ratio=3.0)
        losses = []
        for start in ("inherit", "fresh"):
            torch.manual_seed(0)
            model = inherit(whole, smaller) if start == "inherit" else TinyViT.from_config(smaller)
            losses.append(fit(model, images, labels))
        assert losses[0] < losses[1] - 1, losses


def fit(model: TinyViT, images: torch.Tensor, labels: torch.Tensor) -> float:
    """Train on all but 128 images for one epoch, and return the loss on those."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for rows in torch.arange(128, len(labels)).split(32):
        optimizer.zero_grad()
        F.cross_entropy(model.train()(images[rows]), labels[rows]).backward()
        optimizer.step()
    with torch.no_grad():
        return float(F.cross_entropy(model.train()(images[:128]), labels[:128]))
