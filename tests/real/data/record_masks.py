"""Record the masks of the original MobileSAM with its published weights on a photo of the package.

Run from the project's root in the environment of the original code (see ``benchmarks/original.py``), with
``pycocotools``::

    python -m tests.real.data.record_masks mobile_sam.pt
"""

import json
import sys
from pathlib import Path

import numpy as np
from PIL import Image

PHOTO = "kornia_tinyvit/assets/photos/chelsea.png"
#: Points of the cat's face, its eye and the background, and boxes of the cat and its eye.
PROMPTS = {
    "point": {"point_coords": [[220, 110]], "point_labels": [1]},
    "points": {"point_coords": [[220, 110], [20, 20]], "point_labels": [1, 0]},
    "box": {"box": [100, 20, 400, 290]},
    "box and point": {"box": [150, 90, 200, 130], "point_coords": [[176, 112]], "point_labels": [1]},
}
EVERYTHING = {"points_per_side": 6}


def main() -> None:
    from mobile_sam import SamAutomaticMaskGenerator, SamPredictor, sam_model_registry
    from pycocotools.mask import encode

    def compress(mask):
        code = encode(np.asfortranarray(mask.astype(np.uint8)))
        return {"size": code["size"], "counts": code["counts"].decode()}

    sam = sam_model_registry["vit_t"](checkpoint=sys.argv[1]).eval()
    predictor, photo = SamPredictor(sam), np.asarray(Image.open(PHOTO).convert("RGB"))
    predictor.set_image(photo)
    recorded = {}
    for name, prompt in PROMPTS.items():
        arrays = {key: np.array(value) for key, value in prompt.items()}
        masks, scores, low = predictor.predict(**arrays)
        refined, _, _ = predictor.predict(**arrays, mask_input=low[None, scores.argmax()], multimask_output=False)
        recorded[name] = {"masks": [compress(each) for each in (*masks, *refined)], "scores": scores.tolist()}
    found = SamAutomaticMaskGenerator(sam, **EVERYTHING).generate(photo)
    recorded["everything"] = {
        "masks": [compress(each["segmentation"]) for each in found],
        "scores": [each["predicted_iou"] for each in found],
    }
    path = Path(__file__).with_name("original.json")
    path.write_text(json.dumps(recorded, separators=(",", ":")))
    print(path, path.stat().st_size, "bytes")


if __name__ == "__main__":
    main()
