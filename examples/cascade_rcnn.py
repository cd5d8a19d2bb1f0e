"""The paper's detector: Cascade R-CNN on a TinyViT, out of torchvision's parts.

    python examples/cascade_rcnn.py coco128/object_detection/config.yaml --images 2 --steps 20

arXiv:2207.10666 fine-tunes TinyViT-21M in Cascade R-CNN (arXiv:1712.00726) for 12 epochs of COCO. This shows how the
network goes into such code: `forward_intermediates` gives the maps at strides 4, 8, 16 and 32, torchvision's feature
pyramid and region proposals stand on them, and three heads, each on the boxes of the one before, replace its single
one. DATA is a YOLO data set's YAML file, a JSON file of COCO's, or a folder with one. A few steps on a few images
show that it learns. It needs torchvision.
"""

from __future__ import annotations

import argparse
import json
from collections import OrderedDict
from pathlib import Path

import torch
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.faster_rcnn import TwoMLPHead
from torchvision.models.detection.roi_heads import RoIHeads, fastrcnn_loss
from torchvision.ops import FeaturePyramidNetwork, MultiScaleRoIAlign, clip_boxes_to_image
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from kornia_tinyvit import TinyViT
from kornia_tinyvit.data import DetectionDataset

# Of arXiv:1712.00726: the overlap from which a proposal is an object, the scale of what each head's boxes regress, and
# the weight of its loss.
OVERLAPS = (0.5, 0.6, 0.7)
REGRESSION = ((10.0, 10.0, 5.0, 5.0), (20.0, 20.0, 10.0, 10.0), (30.0, 30.0, 15.0, 15.0))
WEIGHTS = (1.0, 0.5, 0.25)
POOLED = 7  # side in cells of what is cut out of the maps for a box


class PyramidBackbone(nn.Module):
    """A TinyViT and a feature pyramid, as torchvision's detectors take backbones.

    Args:
        network: the network; its norm and head are not used.
        out_channels: channels of every map that comes out.
    """

    def __init__(self, network: TinyViT, out_channels: int = 256) -> None:
        super().__init__()
        self.network, self.out_channels = network, out_channels
        network.norm_head.requires_grad_(False)
        self.pyramid = FeaturePyramidNetwork(list(network.feature_channels), out_channels, LastLevelMaxPool())

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Turn normalized images (B, 3, H, W) into maps (B, C, H/s, W/s) for s = 4, 8, 16, 32 and 64."""
        maps = self.network.forward_intermediates(images)
        return self.pyramid(OrderedDict((str(stage), each) for stage, each in enumerate(maps)))


class AgnosticPredictor(nn.Module):
    """Scores of the classes, and one box for all of them, repeated for torchvision's loss.

    Args:
        channels: features of a box.
        num_classes: classes, with the background.
    """

    def __init__(self, channels: int, num_classes: int) -> None:
        super().__init__()
        self.scores, self.box, self.num_classes = nn.Linear(channels, num_classes), nn.Linear(channels, 4), num_classes

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Turn features (N, C) into scores (N, K) and changes of boxes (N, 4 K)."""
        return self.scores(x), self.box(x).repeat(1, self.num_classes)


class CascadeHeads(nn.Module):
    """Three of torchvision's heads in a row, each stricter than the one before and on the boxes that it made better.

    Args:
        channels: channels of the maps.
        num_classes: classes, with the background.
        hidden: features of a box.
        boxes: boxes of an image that a step of the training looks at.
    """

    def __init__(self, channels: int, num_classes: int, hidden: int = 1024, boxes: int = 512) -> None:
        super().__init__()
        self.heads = nn.ModuleList(
            RoIHeads(
                MultiScaleRoIAlign(["0", "1", "2", "3"], POOLED, sampling_ratio=2),
                TwoMLPHead(channels * POOLED**2, hidden),
                AgnosticPredictor(hidden, num_classes),
                overlap, overlap, boxes, 0.25, scale, score_thresh=0.05, nms_thresh=0.5, detections_per_img=100,
            )
            for overlap, scale in zip(OVERLAPS, REGRESSION, strict=True)
        )  # fmt: skip

    def forward(
        self,
        features: dict[str, Tensor],
        proposals: list[Tensor],
        shapes: list[tuple[int, int]],
        targets: list[dict[str, Tensor]] | None = None,
    ) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
        """Return what was found, or the losses in training, as `RoIHeads` does."""
        losses: dict[str, Tensor] = {}
        scores = []
        for number, (head, weight) in enumerate(zip(self.heads, WEIGHTS, strict=True)):
            if self.training:
                proposals, _, labels, aims = head.select_training_samples(proposals, targets)
            found, changes = head.box_predictor(head.box_head(head.box_roi_pool(features, proposals, shapes)))
            if self.training:
                for kind, loss in zip(("scores", "boxes"), fastrcnn_loss(found, changes, labels, aims), strict=True):
                    losses[f"{kind} {number}"] = weight * loss
            scores.append(found.softmax(1))
            if number + 1 < len(self.heads):
                proposals = self.refine(head, changes, proposals, shapes)
        if self.training:
            return [], losses
        # The scores of all heads count, and the boxes of the last.
        mean = torch.stack(scores).mean(0).log()
        rows = zip(*self.heads[-1].postprocess_detections(mean, changes, proposals, shapes), strict=True)
        return [{"boxes": boxes, "scores": score, "labels": label} for boxes, score, label in rows], losses

    @staticmethod
    def refine(head: RoIHeads, changes: Tensor, proposals: list[Tensor], shapes: list[tuple[int, int]]) -> list[Tensor]:
        """Return the boxes that a head made of proposals, for the next one."""
        better = head.box_coder.decode(changes[:, :4].detach(), proposals)[:, 0]
        parts = better.split([len(each) for each in proposals])
        return [clip_boxes_to_image(boxes, shape) for boxes, shape in zip(parts, shapes, strict=True)]


def cascade_rcnn(network: TinyViT, num_classes: int, channels: int = 256, hidden: int = 1024, **options) -> FasterRCNN:
    """Build the detector.

    Args:
        network: the backbone.
        num_classes: classes, without the background.
        channels: channels of the pyramid.
        hidden: features of a box.
        **options: for torchvision's `FasterRCNN`, such as `min_size`.
    """
    model = FasterRCNN(PyramidBackbone(network, channels), num_classes + 1, **options)
    model.roi_heads = CascadeHeads(channels, num_classes + 1, hidden)
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--images", type=int, default=2)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--variant", default="1m")
    parser.add_argument("--pretrained", default="cifar10", help="weights of the backbone, or 'none'")
    parser.add_argument("--size", type=int, default=256, help="shorter side in pixels; the paper's is 800")
    parser.add_argument("--channels", type=int, default=128)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--lr", type=float, default=5e-4)
    args = parser.parse_args()
    torch.manual_seed(0)

    images = DetectionDataset.open(args.data, "train").sample(args.images)
    network = TinyViT.from_config(
        args.variant, pretrained=False if args.pretrained == "none" else args.pretrained, num_classes=0
    )
    model = cascade_rcnn(
        network, images.num_classes, args.channels, args.hidden, min_size=args.size, max_size=2 * args.size
    ).train()
    photos = [photo for photo, _ in images]
    targets = [{"boxes": objects.boxes, "labels": objects.labels + 1} for _, objects in images]  # 0 is the background
    optimizer = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], args.lr)
    for step in range(args.steps):
        losses = model(photos, targets)
        loss = sum(losses.values())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()
        if step in (0, args.steps - 1):
            print(json.dumps({"step": step, "loss": round(loss.item(), 4), "parts": len(losses)}))
    with torch.inference_mode():
        for row, found in enumerate(model.eval()(photos)):
            names = [images.class_names[label - 1] for label in found["labels"].tolist()]
            best = [f"{name} {score:.2f}" for name, score in zip(names, found["scores"].tolist(), strict=True)]
            print(f"{images.name(row)}: {len(best)} boxes, the surest {', '.join(best[:3]) or 'none'}")


if __name__ == "__main__":
    main()
