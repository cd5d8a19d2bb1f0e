"""Frozen statistics of batch norm."""

import copy

import torch

from kornia_tinyvit import TinyViT
from kornia_tinyvit.training import freeze_statistics
from tests.conftest import TINY


def statistics(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items() if "running" in name}


def same(first, second):
    return all(torch.equal(tensor, second[name]) for name, tensor in first.items())


def test_frozen(tiny, images):
    expected = statistics(tiny)
    handle = freeze_statistics(tiny)
    for _ in range(2):  # a loop calls train() before every step
        tiny.train()(images).sum().backward()
    assert same(expected, statistics(tiny))
    assert tiny.patch_embed.seq[0].bn.weight.grad.any()
    copied = copy.deepcopy(tiny).train()
    copied(images)
    assert same(expected, statistics(copied))
    handle.remove()
    tiny.train()(images)
    assert not same(expected, statistics(tiny))


def test_inside_another_module(images):
    model = torch.nn.Sequential(TinyViT(**TINY))
    expected = statistics(model)
    with freeze_statistics(model):
        model.train()(images)
    assert same(expected, statistics(model))


def test_backbone_only(images):
    backbone, other = TinyViT(**TINY), torch.nn.BatchNorm2d(3)
    model = torch.nn.Sequential(other, backbone)
    expected = statistics(backbone)
    with freeze_statistics(model, backbone_only=True):
        model.train()(images)
    assert same(expected, statistics(backbone))
    assert other.running_mean.any()
