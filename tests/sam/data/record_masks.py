"""Record what segment-anything's generator finds with the reference network.

Run from the project's root where ``segment-anything``, ``pycocotools`` and ``opencv-python-headless`` are installed::

    python -m tests.sam.data.record_masks
"""

import json
from pathlib import Path

from tests.sam.reference_network import SETTINGS, build_network, draw_photo


def as_original(network):
    """Put the weights of a MobileSAM into segment-anything's classes, around our encoder."""
    from segment_anything.modeling import MaskDecoder, PromptEncoder, Sam, TwoWayTransformer

    cells = network.img_size[0] // 16
    sam = Sam(
        image_encoder=network.image_encoder,
        prompt_encoder=PromptEncoder(256, (cells, cells), network.img_size, mask_in_chans=16),
        mask_decoder=MaskDecoder(
            transformer_dim=256, transformer=TwoWayTransformer(depth=2, embedding_dim=256, num_heads=8, mlp_dim=2048)
        ),
    )
    sam.prompt_encoder.load_state_dict(network.prompt_encoder.state_dict())
    sam.mask_decoder.load_state_dict(network.mask_decoder.state_dict())
    sam.image_encoder.img_size = network.img_size[0]
    return sam.eval()


def main() -> None:
    from segment_anything import SamAutomaticMaskGenerator

    sam = as_original(build_network())
    recorded = {}
    for name, settings in SETTINGS.items():
        recorded[name] = SamAutomaticMaskGenerator(sam, **settings, output_mode="coco_rle").generate(draw_photo())
        print(name, len(recorded[name]), "masks")
    path = Path(__file__).with_name("segment_anything.json")
    path.write_text(json.dumps(recorded, separators=(",", ":")))
    print(path, path.stat().st_size, "bytes")


if __name__ == "__main__":
    main()
