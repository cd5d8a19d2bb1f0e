"""Datasets, the readers of their formats, replayable augmentation, and the order and loading of epochs."""

from kornia_tinyvit.data.augmentation import ReplayableAugmentation
from kornia_tinyvit.data.boxes import Objects
from kornia_tinyvit.data.classification import ClassificationDataset
from kornia_tinyvit.data.datasets import BrokenImageError, ImageDataset
from kornia_tinyvit.data.detection import DetectionDataset
from kornia_tinyvit.data.instances import InstanceDataset
from kornia_tinyvit.data.loader import Batch, EpochBatches, KeyedSamples, ReplayedSamples, replay_loader
from kornia_tinyvit.data.order import EpochOrder
from kornia_tinyvit.data.params import ReplayParams
from kornia_tinyvit.data.segmentation import IGNORED, SegmentationDataset
from kornia_tinyvit.data.splits import MissingSplitError

__all__ = [
    "IGNORED",
    "Batch",
    "BrokenImageError",
    "ClassificationDataset",
    "DetectionDataset",
    "EpochBatches",
    "EpochOrder",
    "ImageDataset",
    "InstanceDataset",
    "KeyedSamples",
    "MissingSplitError",
    "Objects",
    "ReplayParams",
    "ReplayableAugmentation",
    "ReplayedSamples",
    "SegmentationDataset",
    "replay_loader",
]
