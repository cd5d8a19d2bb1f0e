"""``kornia-tinyvit evaluate``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import torch
import typer
from kornia.metrics import accuracy
from rich.progress import track
from torch.utils.data import DataLoader, Subset

from kornia_tinyvit.cli.options import Augmented, Device, ImgSize, Json, Pretrained, Variant, build_classifier
from kornia_tinyvit.training.data import LabelledImages, collate


def evaluate(
    data: Annotated[Path, typer.Argument(help="A folder of class folders, or a parquet file of the Hugging Face hub.")],
    variant: Variant = None,
    pretrained: Pretrained = None,
    img_size: ImgSize = None,
    device: Device = "cpu",
    tta: Augmented = False,
    batch_size: Annotated[int, typer.Option(min=1, help="Pictures at a time.")] = 64,
    limit: Annotated[int | None, typer.Option(min=1, help="Use so many pictures, drawn with a fixed seed.")] = None,
    workers: Annotated[int, typer.Option(min=0, help="Processes that read pictures.")] = 0,
    as_json: Json = False,
) -> None:
    """Measure the accuracy on labelled pictures."""
    classifier = build_classifier(variant, pretrained, device, img_size, tta)
    images = LabelledImages(data)
    classes = _class_indices(images.class_names, classifier.class_names)
    rows = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[:limit].tolist()
    loader = DataLoader(Subset(images, rows), batch_size, num_workers=workers, collate_fn=collate)
    top_k = min(5, len(classifier.class_names))
    right = [0.0, 0.0]
    with torch.inference_mode():
        for pictures, labels in track(loader, "evaluating", disable=as_json, transient=True):
            logits = classifier([picture.to(device) for picture in pictures]).cpu()
            targets = labels if classes is None else classes[labels]
            if int(targets.max()) >= logits.shape[1]:
                raise ValueError(f"The data has a class {int(targets.max())}, but the network knows {logits.shape[1]}.")
            for rank, percent in enumerate(accuracy(logits, targets, (1, top_k))):
                right[rank] += float(percent) * len(labels)
    top1, top5 = (total / len(rows) for total in right)
    if as_json:
        print(json.dumps({"pictures": len(rows), "top1": round(top1, 2), f"top{top_k}": round(top5, 2)}))
    else:
        print(f"{len(rows)} pictures: top-1 {top1:.2f} %, top-{top_k} {top5:.2f} %")


def _class_indices(folders: tuple[str, ...] | None, names: tuple[str, ...]) -> torch.Tensor | None:
    """Map the data's classes to the network's by name, or by position where no name is told or known."""
    if folders is None or not set(folders) & set(names):
        return None
    unknown = sorted(set(folders) - set(names))
    if unknown:
        raise ValueError(f"The network does not know the classes {', '.join(unknown[:5])} of the data.")
    return torch.tensor([names.index(folder) for folder in folders])
