"""Weights in and out: what is published, how foreign files name their tensors, and reading them safely."""

from kornia_tinyvit.checkpoints.catalog import PretrainedWeights, list_pretrained
from kornia_tinyvit.checkpoints.loading import (
    Checkpoint,
    LoadReport,
    load_checkpoint,
    open_pretrained,
    read_checkpoint,
    save_checkpoint,
)
from kornia_tinyvit.checkpoints.tensors import CheckpointError

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "LoadReport",
    "PretrainedWeights",
    "list_pretrained",
    "load_checkpoint",
    "open_pretrained",
    "read_checkpoint",
    "save_checkpoint",
]
