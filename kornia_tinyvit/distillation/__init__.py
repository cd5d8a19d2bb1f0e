"""Fast pretraining distillation: a teacher's soft labels stored once and replayed exactly (arXiv:2207.10666)."""

from kornia_tinyvit.distillation.augmentation import Draws, ReplayableAugmentation
from kornia_tinyvit.distillation.batches import Batch, EpochBatches, KeyedSamples, ReplayedSamples, replay_loader
from kornia_tinyvit.distillation.keyed import EpochOrder
from kornia_tinyvit.distillation.losses import distillation_loss, soft_target_cross_entropy
from kornia_tinyvit.distillation.official import OfficialLogits
from kornia_tinyvit.distillation.saving import CheckReport, SavedRecords, check_records, save_records
from kornia_tinyvit.distillation.store import (
    FeatureStore,
    LogitStore,
    Manifest,
    MissingRecordsError,
    StoreError,
    StoreLockedError,
    StoreMismatchError,
    estimated_size,
)
from kornia_tinyvit.distillation.teachers import Teacher, load_teacher

__all__ = [
    "Batch",
    "CheckReport",
    "Draws",
    "EpochBatches",
    "EpochOrder",
    "FeatureStore",
    "KeyedSamples",
    "LogitStore",
    "Manifest",
    "MissingRecordsError",
    "OfficialLogits",
    "ReplayableAugmentation",
    "ReplayedSamples",
    "SavedRecords",
    "StoreError",
    "StoreLockedError",
    "StoreMismatchError",
    "Teacher",
    "check_records",
    "distillation_loss",
    "estimated_size",
    "load_teacher",
    "replay_loader",
    "save_records",
    "soft_target_cross_entropy",
]
