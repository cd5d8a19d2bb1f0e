"""Folders that are ready for the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path

from transformers import PreTrainedModel, SamProcessor

from kornia_tinyvit.checkpoints import PretrainedWeights, open_pretrained
from kornia_tinyvit.checkpoints.catalog import default_weights, find_weights
from kornia_tinyvit.config import TinyViTConfig
from kornia_tinyvit.files import write_text
from kornia_tinyvit.huggingface.card import model_card
from kornia_tinyvit.huggingface.conversion import from_checkpoint
from kornia_tinyvit.huggingface.processing import TinyVitImageProcessor
from kornia_tinyvit.huggingface.sam_conversion import from_mobile_sam
from kornia_tinyvit.huggingface.sam_processing import TinyVitSamImageProcessor
from kornia_tinyvit.sam import MobileSAM

__all__ = ["save_hub_folder"]

Weights = bool | str | Path
Variant = str | TinyViTConfig | None


def save_hub_folder(
    folder: str | Path, pretrained: Weights, variant: Variant = None, repo_id: str | None = None
) -> PreTrainedModel:
    """Write a folder that is ready for the hub: weights, configuration, preprocessing and a model card.

    ``hf upload NAME FOLDER`` puts it there.

    Args:
        folder: the folder, which is made.
        pretrained: the weights: ``True``, a name of the catalog, a file, a URL, or a hub folder of timm.
        variant: the variant, where that does not follow from the weights.
        repo_id: the name that the card calls the model by; the folder's name if left out.

    Returns:
        The model that was written, in evaluation mode.

    Raises:
        CheckpointError: if there are no such weights, or they cannot be read.
        ValueError: if the folder is a file.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = save_hub_folder(folder, "cifar10", "1m")
        ...     sorted(path.name for path in Path(folder).iterdir())
        ['README.md', 'config.json', 'model.safetensors', 'preprocessor_config.json']
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file; give the folder to write.")
    found = open_pretrained(pretrained, variant)
    model: PreTrainedModel
    if found.config.mobile_sam:
        sam = MobileSAM.from_config(variant, pretrained=pretrained)
        model = from_mobile_sam(sam)
        SamProcessor(TinyVitSamImageProcessor.from_size(max(sam.img_size))).save_pretrained(folder)
    else:
        model = from_checkpoint(found)
        TinyVitImageProcessor.from_preprocessing(found.preprocessing_for(found.config)).save_pretrained(folder)
    model.save_pretrained(folder)
    page = model_card(repo_id or folder.name, model, _published(pretrained, variant))
    write_text(folder / "README.md", page)
    return model


def _published(pretrained: Weights, variant: Variant) -> PretrainedWeights | None:
    """Return the entry of the catalog that was asked for, if it was one."""
    name = variant if isinstance(variant, str) else None
    if pretrained is True:
        return None if name is None else default_weights(name)
    return find_weights(name, str(pretrained))
