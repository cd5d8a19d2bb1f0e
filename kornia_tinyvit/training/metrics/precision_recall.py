"""Precision-recall curves of detectors, their best F1 scores, and their plot."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kornia_tinyvit.extras import optional_imports
from kornia_tinyvit.files import replacing

__all__ = ["RECALLS", "PrecisionRecall", "measure_curve", "save_precision_recall"]

#: The recalls of COCO's curves: 0, 0.01, ..., 1.
RECALLS = np.linspace(0.0, 1.0, 101)

_MOST_CLASSES = 10  # with a color and a name in the plot


@dataclass(frozen=True)
class PrecisionRecall:
    """Precision of detections over recall, and the score threshold of the highest F1 score.

    Args:
        precision: highest precision in per cent at :data:`RECALLS` or a higher recall, :math:`(101,)`; NaN without
            objects.
        best_f1: highest F1 score in per cent over all score thresholds; NaN without objects.
        threshold: its score threshold in [0, 1], midway between the lowest score kept and the next one; NaN if no
            object is found.
    """

    precision: Tensor
    best_f1: float
    threshold: float


def measure_curve(scores: NDArray[np.float64], correct: NDArray[np.bool_], objects: int) -> PrecisionRecall:
    """Return the precision-recall curve of detections, interpolated as by COCO.

    Args:
        scores: scores :math:`(D,)`.
        correct: whether each detection is matched to an object, :math:`(D,)`.
        objects: number of objects.
    """
    if not objects:
        return PrecisionRecall(torch.full((len(RECALLS),), torch.nan), math.nan, math.nan)
    order = np.argsort(-scores, kind="mergesort")  # pycocotools' order of equal scores
    scores, hits = scores[order], correct[order].cumsum()
    counts = np.arange(1, len(scores) + 1)
    highest = np.maximum.accumulate((hits / counts)[::-1])[::-1]
    positions = np.searchsorted(hits / objects, RECALLS, side="left")
    precision = torch.from_numpy(100 * np.append(highest, 0.0)[positions]).float()
    if not correct.any():
        return PrecisionRecall(precision, 0.0, math.nan)
    following = np.append(scores[1:], 0.0)
    f1 = np.where(scores > following, 2 * hits / (counts + objects), 0.0)  # equal scores are kept together
    best = int(f1.argmax())
    return PrecisionRecall(precision, 100 * float(f1[best]), float(scores[best] + following[best]) / 2)


def save_precision_recall(path: str | Path, curves: Mapping[str, PrecisionRecall]) -> None:
    """Plot precision over recall, with the best F1 score and its threshold in the legend.

    The first curve is black. If there are many others, they are gray and unnamed.

    Args:
        path: the PNG file to write; its folder is created.
        curves: curves by name, such as all classes and then each class; those without objects are left out.

    Raises:
        MissingExtraError: if matplotlib is not installed.
    """
    with optional_imports("The plot needs matplotlib", "'kornia-tinyvit[train]'"):
        from matplotlib.figure import Figure

    figure = Figure(figsize=(5.6, 4.4), layout="constrained")
    axes = figure.subplots()
    shown = {name: curve for name, curve in curves.items() if not math.isnan(curve.best_f1)}
    for number, (name, curve) in enumerate(shown.items()):
        style: dict[str, Any] = {"color": "#b4b4b4", "linewidth": 0.8}
        if not number or len(shown) <= 1 + _MOST_CLASSES:
            at = "" if math.isnan(curve.threshold) else f" at {curve.threshold:.2f}"
            style = {"label": f"{name}: F1 {curve.best_f1:.1f} %{at}", "linewidth": 1.2}
        if not number:
            style |= {"color": "black", "linewidth": 2.2, "zorder": 3}
        axes.plot(100 * RECALLS, curve.precision.numpy(), **style)
    axes.set(xlabel="recall, %", ylabel="precision at IoU 0.5, %", xlim=(0, 101), ylim=(0, 101))
    axes.spines[["top", "right"]].set_visible(False)
    if shown:
        axes.legend(loc="lower left", frameon=False, fontsize="small")
    with replacing(path, suffix=".png") as temporary:
        figure.savefig(temporary, dpi=100)
