"""``kornia-tinyvit demo``."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlparse

import torch

from kornia_tinyvit.checkpoints.catalog import ASSETS
from kornia_tinyvit.cli.options import NetworkRequest, find_device
from kornia_tinyvit.cli.requests import argument, command, option
from kornia_tinyvit.cli.tables import print_table
from kornia_tinyvit.images import read_image
from kornia_tinyvit.visualization import demo_augmentations, save_figure

HOST, SAM = "127.0.0.1", "mobile_sam"


@dataclass(frozen=True, kw_only=True)
class DemoRequest(NetworkRequest):
    """The options of ``demo``."""

    photos: list[Path] | None = argument("Image files. Default: those of the package.", None)
    web: bool = option("Web demo", "Serve the web demo, with the photos as examples.", False)
    host: str = option(
        "Web demo", "Address to listen on. Default: this machine only; 0.0.0.0: the network, without a password.", HOST
    )
    port: int = option("Web demo", "Port; 0 for any free one.", 7860, min=0, max=65535)
    sam_weights: str = option(
        "Web demo", "Path or URL of a MobileSAM, or mobile_sam: the published one, downloaded at the first use.", SAM
    )
    out: Path = option("Output", "Folder for the contact sheets.", Path("demo"))


@command
def demo(request: DemoRequest) -> None:
    """Classify photos and draw a contact sheet of predictions and features for each.

    With --web, serve a web page to classify, augment and segment photos instead.
    """
    folder = ASSETS / "photos"
    photos = request.photos or sorted(path for path in folder.iterdir() if path.suffix in {".jpg", ".png"})
    if request.web:
        _serve(request, photos)
        return
    request.reject_unused(("host", "port", "sam_weights"), "without --web")
    torch.manual_seed(0)  # one augmented view has noise
    sheets = [request.out / f"{photo.stem}.png" for photo in photos]
    if len({path.resolve() for path in (*photos, *sheets)}) < 2 * len(photos):
        raise ValueError(
            f"A sheet in {request.out} would replace a photo or another sheet; rename photos or change --out."
        )
    classifier = request.build_classifier(tta=True)
    device, views = find_device(request.device), demo_augmentations()
    rows, reports = [], []
    for photo, sheet in zip(photos, sheets, strict=True):
        first, second, *_ = save_figure(sheet, classifier, read_image(photo).to(device), photo.name, views)
        rows.append([photo.name, first.label, f"{first.score:.1%}", second.label, f"{second.score:.1%}", str(sheet)])
        reports.append({"photo": str(photo), "predictions": [vars(first), vars(second)], "sheet": str(sheet)})
    if request.as_json:
        print(json.dumps(reports))
    else:
        print_table(["photo", "class", "score", "second", "score", "sheet"], rows, left=6)


def _serve(request: DemoRequest, photos: list[Path]) -> None:
    request.reject_unused(("out", "as_json"), "with --web")
    from kornia_tinyvit.web.page import serve  # gradio takes seconds to import, and is an extra

    sam = request.sam_weights or SAM
    if sam != SAM and not urlparse(sam).scheme and not Path(sam).is_file():
        raise FileNotFoundError(f"There is no file {sam} for --sam-weights.")
    if missing := [path for path in photos if not path.is_file()]:
        raise FileNotFoundError(f"There is no image {missing[0]}.")
    classifier = request.build_classifier(tta=True)
    # An empty --host (an unset variable of a script) would listen to the whole network.
    serve(classifier, sam, str(find_device(request.device)), photos, request.host or HOST, request.port)
