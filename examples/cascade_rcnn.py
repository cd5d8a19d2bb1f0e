"""Cascade R-CNN with a TinyViT backbone, built from torchvision's modules.

    python examples/cascade_rcnn.py coco128/object_detection/config.yaml --images 2 --steps 20

arXiv:2207.10666 fine-tunes TinyViT-21M in Cascade R-CNN (arXiv:1712.00726) for 12 epochs of COCO. Here torchvision's
feature pyramid and region proposal network use the feature maps of strides 4, 8, 16 and 32 from
`forward_intermediates`, and three heads, each refining the boxes of the one before, replace the single one of Faster
R-CNN. DATA is the YAML file of a YOLO data set, a JSON file of COCO, or a folder with one of them. The script trains
for a few steps on a few images. It needs torchvision.
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

# From arXiv:1712.00726, for each head: the IoU threshold of positive proposals, the weights of the box regression, and
# the weight of the loss.
IOU_THRESHOLDS = (0.5, 0.6, 0.7)
REGRESSION = ((10.0, 10.0, 5.0, 5.0), (20.0, 20.0, 10.0, 10.0), (30.0, 30.0, 15.0, 15.0))
WEIGHTS = (1.0, 0.5, 0.25)
POOLED = 7  # height and width of the pooled features of a box


class PyramidBackbone(nn.Module):
    """A TinyViT with a feature pyramid, a backbone for torchvision's detectors.

    Args:
        network: the network; its norm and head are not used.
        out_channels: channels of the output feature maps.
    """

    def __init__(self, network: TinyViT, out_channels: int = 256) -> None:
        super().__init__()
        self.network, self.out_channels = network, out_channels
        network.norm_head.requires_grad_(False)
        self.pyramid = FeaturePyramidNetwork(list(network.feature_channels), out_channels, LastLevelMaxPool())

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Return feature maps (B, C, H/s, W/s), s = 4, 8, 16, 32 and 64, of normalized images (B, 3, H, W)."""
        features = self.network.forward_intermediates(images)
        return self.pyramid(OrderedDict((str(stage), each) for stage, each in enumerate(features)))


class AgnosticPredictor(nn.Module):
    """Class scores and a class-agnostic box, repeated for torchvision's loss.

    Args:
        channels: number of features of a box.
        num_classes: number of classes, including the background.
    """

    def __init__(self, channels: int, num_classes: int) -> None:
        super().__init__()
        self.scores, self.box, self.num_classes = nn.Linear(channels, num_classes), nn.Linear(channels, 4), num_classes

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return logits (N, K) and box deltas (N, 4 K) of features (N, C)."""
        return self.scores(x), self.box(x).repeat(1, self.num_classes)


class CascadeHeads(nn.Module):
    """Three of torchvision's heads with increasing IoU thresholds, each on the refined boxes of the one before.

    Args:
        channels: channels of the feature maps.
        num_classes: number of classes, including the background.
        hidden: number of features of a box.
        boxes: number of sampled boxes per image in training.
    """

    def __init__(self, channels: int, num_classes: int, hidden: int = 1024, boxes: int = 512) -> None:
        super().__init__()
        self.heads = nn.ModuleList(
            RoIHeads(
                MultiScaleRoIAlign(["0", "1", "2", "3"], POOLED, sampling_ratio=2),
                TwoMLPHead(channels * POOLED**2, hidden),
                AgnosticPredictor(hidden, num_classes),
                iou, iou, boxes, 0.25, scale, score_thresh=0.05, nms_thresh=0.5, detections_per_img=100,
            )
            for iou, scale in zip(IOU_THRESHOLDS, REGRESSION, strict=True)
        )  # fmt: skip

    def forward(
        self,
        features: dict[str, Tensor],
        proposals: list[Tensor],
        shapes: list[tuple[int, int]],
        targets: list[dict[str, Tensor]] | None = None,
    ) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
        """Return detections, or losses in training, like `RoIHeads`."""
        losses: dict[str, Tensor] = {}
        scores = []
        for number, (head, weight) in enumerate(zip(self.heads, WEIGHTS, strict=True)):
            if self.training:
                proposals, _, labels, box_targets = head.select_training_samples(proposals, targets)
            logits, deltas = head.box_predictor(head.box_head(head.box_roi_pool(features, proposals, shapes)))
            if self.training:
                pair = fastrcnn_loss(logits, deltas, labels, box_targets)
                losses |= {
                    f"{kind} {number}": weight * loss for kind, loss in zip(("scores", "boxes"), pair, strict=True)
                }
            scores.append(logits.softmax(1))
            if number + 1 < len(self.heads):
                proposals = self.refine(head, deltas, proposals, shapes)
        if self.training:
            return [], losses
        # The scores are averaged over the heads, the boxes are those of the last head.
        mean = torch.stack(scores).mean(0).log()
        rows = zip(*self.heads[-1].postprocess_detections(mean, deltas, proposals, shapes), strict=True)
        return [{"boxes": boxes, "scores": score, "labels": label} for boxes, score, label in rows], losses

    @staticmethod
    def refine(head: RoIHeads, deltas: Tensor, proposals: list[Tensor], shapes: list[tuple[int, int]]) -> list[Tensor]:
        """Return the refined boxes of a head, the proposals of the next one."""
        refined = head.box_coder.decode(deltas[:, :4].detach(), proposals)[:, 0]
        parts = refined.split([len(each) for each in proposals])
        return [clip_boxes_to_image(boxes, shape) for boxes, shape in zip(parts, shapes, strict=True)]


def cascade_rcnn(network: TinyViT, num_classes: int, channels: int = 256, hidden: int = 1024, **options) -> FasterRCNN:
    """Build the detector.

    Args:
        network: the backbone.
        num_classes: number of classes, without the background.
        channels: channels of the pyramid.
        hidden: number of features of a box.
        **options: arguments of torchvision's `FasterRCNN`, such as `min_size`.
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
    parser.add_argument("--weights", default="cifar10", help="weights of the backbone, or 'none'")
    parser.add_argument("--size", type=int, default=256, help="shorter side in pixels (800 in the paper)")
    parser.add_argument("--channels", type=int, default=128)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--lr", type=float, default=5e-4)
    args = parser.parse_args()
    torch.manual_seed(0)

    images = DetectionDataset.open(args.data, "train").sample(args.images)
    network = TinyViT.from_config(
        args.variant, pretrained=False if args.weights == "none" else args.weights, num_classes=0
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
        for row, detections in enumerate(model.eval()(photos)):
            names = [images.class_names[label - 1] for label in detections["labels"].tolist()]
            best = [f"{name} {score:.2f}" for name, score in zip(names, detections["scores"].tolist(), strict=True)]
            print(f"{images.name(row)}: {len(best)} boxes, top 3: {', '.join(best[:3]) or 'none'}")


if __name__ == "__main__":
    main()
