"""Run the original MobileSAM for real.py, in an environment of its own.

    python -m venv original && original/bin/pip install torch torchvision timm mobilesam-mirror==1.0.0

mobilesam-mirror is the authors' code. This script imports nothing of kornia-tinyvit. real.py, which imports the
measurement and the file format from here, calls it with a task in JSON.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image


def read_photo(path: str) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB"))


def measured(step: Callable[[], Any]) -> tuple[Any, dict[str, float]]:
    """Return the result of a step, its wall-clock and CPU seconds, and the peak memory of the process in MB."""
    Path("/proc/self/clear_refs").write_text("5")  # reset the peak
    start = time.perf_counter(), time.process_time()
    result = step()
    seconds, computed = time.perf_counter() - start[0], time.process_time() - start[1]
    lines = Path("/proc/self/status").read_text().splitlines()
    peak = next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM"))
    return result, {"s": seconds, "cpu_s": computed, "peak_mb": peak}


def save_masks(path: str | Path, masks: Sequence[np.ndarray], **others: Any) -> None:
    """Write masks (H, W), a bit per pixel, and other arrays and numbers; an existing file is complete."""
    masks = np.stack(masks) if len(masks) else np.zeros((0, 1, 1), bool)
    rows = masks.reshape(len(masks), masks.shape[1] * masks.shape[2])
    part = Path(path).with_suffix(".part.npz")
    np.savez_compressed(part, bits=np.packbits(rows, 1), shape=masks.shape, **others)
    part.rename(path)


def load_masks(path: str | Path) -> dict[str, np.ndarray]:
    """Return what :func:`save_masks` wrote, with the masks (N, H, W)."""
    with np.load(path) as file:
        found = dict(file)
    bits, shape = found.pop("bits"), found.pop("shape")
    masks = np.unpackbits(bits, axis=1, count=shape[1] * shape[2])
    return found | {"masks": masks.astype(bool).reshape(shape)}


def predict(sam: torch.nn.Module, task: dict) -> None:
    """Predict the masks of all prompts of a photo, and refine those of which that is requested."""
    from mobile_sam import SamPredictor

    predictor = SamPredictor(sam)
    for photo, out in zip(task["photos"], task["files"], strict=True):
        if Path(out).exists():
            continue
        predictor.set_image(read_photo(photo["path"]))
        masks = []
        for prompt in photo["prompts"]:
            arrays = {name: np.array(value) for name, value in prompt["arguments"].items()}
            found, scores, low = predictor.predict(**arrays, multimask_output=prompt["multimask"])
            if prompt["refined"]:
                arrays["mask_input"] = low[None, scores.argmax()]
                found, _, _ = predictor.predict(**arrays, multimask_output=False)
            masks.extend(found)
        save_masks(out, masks)


def generate(sam: torch.nn.Module, task: dict) -> None:
    """Segment everything in photos with the default settings."""
    from mobile_sam import SamAutomaticMaskGenerator

    generator = SamAutomaticMaskGenerator(sam)
    for photo, out in zip(task["photos"], task["files"], strict=True):
        pixels = read_photo(photo)
        found, times = measured(lambda pixels=pixels: generator.generate(pixels))
        boxes = np.array([each["bbox"] for each in found]).reshape(-1, 4)
        scores = np.array([each["predicted_iou"] for each in found])
        save_masks(out, [each["segmentation"] for each in found], boxes=boxes, scores=scores, **times)


def main() -> None:
    task = json.loads(sys.argv[1])
    if task["what"] != "versions":
        from mobile_sam import sam_model_registry

        sam = sam_model_registry["vit_t"](checkpoint=task["weights"]).eval()
        {"prompts": predict, "everything": generate}[task["what"]](sam, task)
    print(json.dumps({name: version(name) for name in ("mobilesam-mirror", "torch", "torchvision", "timm")}))


if __name__ == "__main__":
    main()
