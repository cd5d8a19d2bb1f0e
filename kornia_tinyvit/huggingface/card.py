"""The page that the hub shows of a model."""

from __future__ import annotations

from huggingface_hub import ModelCardData
from transformers import PreTrainedModel

from kornia_tinyvit.checkpoints import PretrainedWeights

__all__ = ["TAGS", "model_card"]

#: What the hub finds a model by.
TAGS = ("tinyvit", "kornia-tinyvit", "kornia")

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

_PAGE = """---
{header}
---

# {name}

{about} It is a TinyViT ([arXiv:2207.10666](https://arxiv.org/abs/2207.10666)){family} of {parameters:.1f} million
parameters for pictures of {size} x {size} pixels; it runs at other sizes, too.

{facts}

## Use

transformers knows these classes once `kornia_tinyvit.huggingface` is imported:

```python
import kornia_tinyvit.huggingface  # pip install 'kornia-tinyvit[hf]'
{code}
```

## Citation

```bibtex
@inproceedings{{tinyvit,
  title     = {{TinyViT: Fast Pretraining Distillation for Small Vision Transformers}},
  author    = {{Wu, Kan and Zhang, Jinnian and Peng, Houwen and Liu, Mengchen and Xiao, Bin and Fu, Jianlong and
               Yuan, Lu}},
  booktitle = {{European Conference on Computer Vision (ECCV)}},
  year      = {{2022}}
}}
```
"""


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
    licence = None if weights is None else weights.licence.lower()
    header = ModelCardData(license=licence, library_name="transformers", pipeline_tag=task, tags=list(TAGS))
    vision = getattr(model.config, "vision_config", model.config)
    return _PAGE.format(
        header=header.to_yaml(),
        name=name,
        about=_ABOUT[task],
        family="" if weights is None else f", the variant {weights.variant},",
        parameters=sum(parameter.numel() for parameter in model.parameters()) / 1e6,
        size=vision.image_size,
        facts=_facts(model, weights),
        code=_USES[task].format(name=name),
    )


_ABOUT = {
    "image-classification": "This model names what a picture shows.",
    "image-feature-extraction": "This model turns a picture into features.",
    "mask-generation": "This is MobileSAM ([arXiv:2306.14289](https://arxiv.org/abs/2306.14289)): it segments what "
    "prompts point at, and everything in a picture.",
}


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
        facts.append(f"- Licence of the weights: {weights.licence}")
        if weights.top1 is not None and weights.top5 is not None:
            facts.append(f"- Accuracy as published: top-1 {weights.top1:.1f} %, top-5 {weights.top5:.1f} %")
    return "\n".join(facts) or "What it was trained on is not recorded."
