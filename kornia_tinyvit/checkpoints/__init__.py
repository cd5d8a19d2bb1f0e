"""Weights: catalog of published weights, layouts of tensor names, and reading, loading and saving checkpoints."""

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
