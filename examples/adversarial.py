"""Adversarial attack on an image, with gradients through resizing and normalization to the pixels.

    python examples/adversarial.py [PHOTO] --epsilon 4 --target dog --out attack

Projected gradient descent (Madry et al., arXiv:1706.06083) changes each channel of a pixel by at most epsilon of 255,
either away from the predicted class or towards `--target`. The result is rounded to uint8 before it is classified.
Writes `attacked.png`, and `sheet.png` with, from left to right, the image, its saliency, the perturbation (gray is
zero), the attacked image and its saliency.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from kornia.image import make_grid
from kornia.io import write_image
from torch import Tensor, nn

from kornia_tinyvit import ImageClassifier
from kornia_tinyvit.checkpoints.catalog import ASSETS
from kornia_tinyvit.images import read_image
from kornia_tinyvit.visualization import overlay_heatmap, saliency

LEVELS = 255


def attack(classifier: nn.Module, image: Tensor, label: int, epsilon: float, steps: int, towards: bool) -> Tensor:
    """Return an image within `epsilon` of `image` (1, 3, H, W), optimized away from or towards `label`.

    The total length of the steps is 2.5 epsilon, so the attack can reach the border of the ball and return. It starts
    at a random point, because the gradient at the image itself may be near zero.
    """
    target = torch.tensor([label], device=image.device)
    step_size = 2.5 * epsilon / steps
    perturbation = torch.empty_like(image).uniform_(-epsilon, epsilon)
    seen = torch.zeros_like(image, dtype=torch.bool)
    for _ in range(steps):
        pixels = (image + perturbation).clamp(0, 1).requires_grad_()
        loss = F.cross_entropy(classifier(pixels), target)
        (gradient,) = torch.autograd.grad(loss, pixels)
        seen |= gradient != 0
        direction = -gradient.sign() if towards else gradient.sign()
        perturbation = (pixels.detach() - image + step_size * direction).clamp(-epsilon, epsilon)
    # Pixels outside of the crop have no gradient and are left unchanged.
    return (image + perturbation * seen).clamp(0, 1)


def to_levels(attacked: Tensor, image: Tensor, epsilon: float) -> Tensor:
    """Round the perturbation to multiples of 1/255 inside the ball: epsilon 2.5 allows only 2."""
    levels = ((attacked - image) * LEVELS).round().clamp(-math.floor(epsilon), math.floor(epsilon))
    return ((image * LEVELS).round() + levels) / LEVELS


def to_bytes(image: Tensor) -> Tensor:
    return (image.clamp(0, 1) * LEVELS).round().byte().cpu()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photo", type=Path, nargs="?", default=ASSETS / "photos" / "chelsea.png")
    parser.add_argument("--out", type=Path, default=Path("attack"), help="folder for the two images")
    parser.add_argument("--variant", default="1m")
    parser.add_argument("--weights", default="cifar10", help="a name of the catalog, a path or a URL")
    parser.add_argument("--epsilon", type=float, default=4.0, help="largest change of a channel, of 255")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--target", default=None, help="target class (default: any other than the predicted one)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.manual_seed(args.seed)

    classifier = ImageClassifier.from_config(args.variant, pretrained=args.weights).to(args.device).eval()
    classifier.requires_grad_(False)  # only the input gradient is needed
    names = classifier.class_names
    if args.target is not None and args.target not in names:
        parser.error(f"the network has no class {args.target!r}, but for example {', '.join(names[:10])}")
    image = read_image(args.photo).unsqueeze(0).to(args.device)
    image = (image * LEVELS).round() / LEVELS  # also for 16-bit images
    (before,) = classifier.predict(image, top_k=1)[0]
    towards = args.target is not None
    label = names.index(args.target) if towards else before.index
    attacked = attack(classifier, image, label, args.epsilon / LEVELS, args.steps, towards)
    attacked = to_levels(attacked, image, args.epsilon)
    (after,) = classifier.predict(attacked, top_k=1)[0]

    perturbation = attacked - image
    with torch.no_grad():
        scores = torch.cat([classifier(image), classifier(attacked)]).softmax(1)
    goal = f"towards {args.target}" if towards else f"away from {before.label}"
    print(f"attack: {goal}, {args.steps} steps, epsilon {args.epsilon:g}/255")
    print(f"before: {before.label} {before.score:.1%}")
    print(f"after: {after.label} {after.score:.1%}")
    print(f"score of {names[label]}: {scores[0, label]:.2%} -> {scores[1, label]:.2%}")
    print(f"L-inf norm: {float(perturbation.abs().max()) * LEVELS:.3f}/255")
    succeeded = (after.index == label) == towards
    print(
        "result: the attack succeeded" if succeeded else f"result: the attack failed, the class is still {after.label}"
    )

    images = torch.cat([image, attacked])
    heat = overlay_heatmap(images, saliency(classifier, images))
    amplified = perturbation * (LEVELS / (2 * max(args.epsilon, 1.0))) + 0.5  # black or white at the border of the ball
    args.out.mkdir(parents=True, exist_ok=True)
    sheet = make_grid(torch.cat([image, heat[:1], amplified, attacked, heat[1:]]), n_row=5, padding=8)
    write_image(args.out / "attacked.png", to_bytes(attacked[0]))
    write_image(args.out / "sheet.png", to_bytes(sheet))
    print(f"wrote {args.out / 'attacked.png'} and {args.out / 'sheet.png'}")


if __name__ == "__main__":
    main()
