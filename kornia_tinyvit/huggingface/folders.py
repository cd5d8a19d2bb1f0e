"""Folders for the Hugging Face hub with model cards."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import ModelCardData
from transformers import PreTrainedModel, SamProcessor

from kornia_tinyvit.checkpoints import Checkpoint, PretrainedWeights, open_pretrained
from kornia_tinyvit.checkpoints.catalog import ASSETS, find_weights
from kornia_tinyvit.config import TinyViTConfig
from kornia_tinyvit.files import write_text
from kornia_tinyvit.huggingface.conversion import from_checkpoint
from kornia_tinyvit.huggingface.modeling import TAGS
from kornia_tinyvit.huggingface.processing import TinyVitImageProcessor
from kornia_tinyvit.huggingface.sam import TinyVitSamImageProcessor, from_mobile_sam
from kornia_tinyvit.sam import MobileSAM

__all__ = ["model_card", "save_hub_folder"]

Weights = bool | str | Path | Checkpoint
Variant = str | TinyViTConfig | None


def save_hub_folder(
    folder: str | Path, pretrained: Weights, variant: Variant = None, repo_id: str | None = None
) -> PreTrainedModel:
    """Write a folder for the hub with weights, configuration, preprocessing and a model card.

    Upload it with ``hf upload NAME FOLDER``.

    Args:
        folder: folder to write; created if missing.
        pretrained: ``True``, a name of the catalog, a file, a URL, a hub folder of timm or a
            :class:`~kornia_tinyvit.checkpoints.Checkpoint`.
        variant: variant or configuration of the network, if the weights do not determine it.
        repo_id: name of the model in the card; ``None`` for the name of the folder.

    Returns:
        The saved model in evaluation mode.

    Raises:
        CheckpointError: if the weights do not exist or cannot be read.
        ValueError: if ``folder`` is a file.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = save_hub_folder(folder, "cifar10", "1m")
        ...     sorted(path.name for path in Path(folder).iterdir())
        ['README.md', 'config.json', 'model.safetensors', 'preprocessor_config.json']
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file; expected a folder to write.")
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
    weights = None
    if not isinstance(pretrained, Checkpoint):
        weights = find_weights(variant if isinstance(variant, str) else None, pretrained)
    write_text(folder / "README.md", model_card(repo_id or folder.name, model, weights))
    return model


def model_card(name: str, model: PreTrainedModel, weights: PretrainedWeights | None = None) -> str:
    """Write the ``README.md`` of a hub folder.

    Args:
        name: name of the model on the hub, such as ``"owner/tinyvit-5m"``.
        model: the model; its class determines the task.
        weights: entry of the catalog, if the weights are published.

    Returns:
        The text with its YAML header.
    """
    task = _task(model)
    license = None if weights is None else weights.license.lower()
    header = ModelCardData(license=license, library_name="transformers", pipeline_tag=task, tags=list(TAGS))
    vision = getattr(model.config, "vision_config", model.config)
    card, parts = ((ASSETS / file).read_text(encoding="utf-8") for file in ("model_card.txt", f"model_card_{task}.txt"))
    about, code = parts.format(
        name=name,
        tinyvit="TinyViT ([arXiv:2207.10666](https://arxiv.org/abs/2207.10666))",
        variant="" if weights is None else f" (variant {weights.variant})",
        parameters=sum(parameter.numel() for parameter in model.parameters()) / 1e6,
        size=vision.image_size,
    ).split("---\n")
    facts = _facts(model, weights)
    return card.format(header=header.to_yaml(), name=name, about=about.strip(), facts=facts, code=code.strip())


def _task(model: PreTrainedModel) -> str:
    if hasattr(model, "mask_decoder"):
        return "mask-generation"
    return "image-classification" if hasattr(model, "classifier") else "image-feature-extraction"


def _facts(model: PreTrainedModel, weights: PretrainedWeights | None) -> str:
    facts = []
    if hasattr(model, "classifier"):
        facts.append(f"- Classes: {model.config.num_labels}")
    if weights is not None:
        facts.append(f"- Trained on: {weights.trained_on}")
        facts.append(f"- License of the weights: {weights.license}")
        if weights.top1 is not None and weights.top5 is not None:
            facts.append(f"- Published accuracy: top-1 {weights.top1:.1f} %, top-5 {weights.top5:.1f} %")
    return "\n".join(facts) or "The training data is unknown."
