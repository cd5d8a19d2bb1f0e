"""Labelled pictures to evaluate and train on."""

from kornia_tinyvit.training.data import LabelledImages

__all__ = ["LabelledImages"]
