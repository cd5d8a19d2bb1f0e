"""Folders that are ready for the Hugging Face hub, and the page that it shows of a model."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import ModelCardData
from transformers import PreTrainedModel, SamProcessor

from kornia_tinyvit.checkpoints import PretrainedWeights, open_pretrained
from kornia_tinyvit.checkpoints.catalog import ASSETS, default_weights, find_weights
from kornia_tinyvit.config import TinyViTConfig
from kornia_tinyvit.files import write_text
from kornia_tinyvit.huggingface.conversion import from_checkpoint
from kornia_tinyvit.huggingface.modeling import TAGS
from kornia_tinyvit.huggingface.processing import TinyVitImageProcessor
from kornia_tinyvit.huggingface.sam import TinyVitSamImageProcessor, from_mobile_sam
from kornia_tinyvit.sam import MobileSAM

__all__ = ["model_card", "save_hub_folder"]

Weights = bool | str | Path
Variant = str | TinyViTConfig | None

_USES = {
    "image-classification": """from transformers import pipeline

classify = pipeline("image-classification", model="{name}")
print(classify("photo.jpg", top_k=3))""",
    "image-feature-extraction": """from transformers import AutoImageProcessor, AutoModel

processor = AutoImageProcessor.from_pretrained("{name}")
model = AutoModel.from_pretrained("{name}")
features = model(**processor("photo.jpg")).pooler_output""",
    "mask-generation": """from transformers import pipeline

segment = pipeline("mask-generation", model="{name}")
print(len(segment("photo.jpg")["masks"]))""",
}

_NETWORK = """It is a {tinyvit}
of {parameters:.1f} million parameters{variant} for images of {size} x {size} pixels; it runs at other sizes, too."""
_ABOUT = {
    "image-classification": "This model names what an image shows. " + _NETWORK,
    "image-feature-extraction": "This model turns an image into features. " + _NETWORK,
    "mask-generation": """This is MobileSAM ([arXiv:2306.14289](https://arxiv.org/abs/2306.14289)): it segments what
prompts point at, and everything in an image. It has {parameters:.1f} million parameters; its encoder is a
{tinyvit}{variant} for inputs of {size} x {size} pixels.""",
}


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


def model_card(name: str, model: PreTrainedModel, weights: PretrainedWeights | None = None) -> str:
    """Write the ``README.md`` of a hub folder.

    Args:
        name: what the model is called on the hub, such as ``"me/tinyvit-5m"``.
        model: the model, which decides the task.
        weights: what is known of its weights.

    Returns:
        The page, with its header.
    """
    task = _task(model)
    license = None if weights is None else weights.license.lower()
    header = ModelCardData(license=license, library_name="transformers", pipeline_tag=task, tags=list(TAGS))
    vision = getattr(model.config, "vision_config", model.config)
    about = _ABOUT[task].format(
        tinyvit="TinyViT ([arXiv:2207.10666](https://arxiv.org/abs/2207.10666))",
        variant="" if weights is None else f" (variant {weights.variant})",
        parameters=sum(parameter.numel() for parameter in model.parameters()) / 1e6,
        size=vision.image_size,
    )
    code = _USES[task].format(name=name)
    page = (ASSETS / "model_card.txt").read_text(encoding="utf-8")
    return page.format(header=header.to_yaml(), name=name, about=about, facts=_facts(model, weights), code=code)


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
            facts.append(f"- Accuracy as published: top-1 {weights.top1:.1f} %, top-5 {weights.top5:.1f} %")
    return "\n".join(facts) or "What it was trained on is not recorded."
