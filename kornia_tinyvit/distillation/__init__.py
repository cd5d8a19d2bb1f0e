"""Fast pretraining distillation: a teacher's soft labels stored once and replayed exactly (arXiv:2207.10666)."""

from kornia_tinyvit.distillation.losses import (
    OnlineDistillationLoss,
    StoredFeatureLoss,
    StoredLabelLoss,
    distillation_loss,
    soft_target_cross_entropy,
)
from kornia_tinyvit.distillation.manifest import Manifest, StoreError, estimated_size
from kornia_tinyvit.distillation.saving import CheckReport, SaveReport, check_records, save_records
from kornia_tinyvit.distillation.store import FeatureStore, LabelStore, MissingRecordsError, StoreMismatchError
from kornia_tinyvit.distillation.teachers import Teacher, load_teacher

__all__ = [
    "CheckReport",
    "FeatureStore",
    "LabelStore",
    "Manifest",
    "MissingRecordsError",
    "OnlineDistillationLoss",
    "SaveReport",
    "StoreError",
    "StoreMismatchError",
    "StoredFeatureLoss",
    "StoredLabelLoss",
    "Teacher",
    "check_records",
    "distillation_loss",
    "estimated_size",
    "load_teacher",
    "save_records",
    "soft_target_cross_entropy",
]
