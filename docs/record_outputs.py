"""Run the commands shown on the pages and write their outputs to `docs/guides/outputs`.

    python docs/record_outputs.py [--cifar10 FOLDER] [NAME ...]

FOLDER contains `test.parquet` and `train.parquet` of CIFAR-10 in the Hugging Face layout; without it, the recorded
accuracies are kept. The demo's sheet for the cat is written as the image of the TinyViT page, in 256 colors. The table
of the recipes is generated from the code, the tables of numbers from the recorded outputs (`collect_numbers.py`). With
names, only those outputs are written; `distill_check` and `distill_train` need `distill_save` before them.
"""

from __future__ import annotations

import argparse
import csv
import io
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from collect_numbers import write as write_numbers
from PIL import Image

from kornia_tinyvit.checkpoints import save_checkpoint
from kornia_tinyvit.checkpoints.catalog import ASSETS
from kornia_tinyvit.sam import MobileSAM
from kornia_tinyvit.training import RECIPES, Recipe

DOCS = Path(__file__).resolve().parent
OUTPUTS = DOCS / "guides" / "outputs"
SAVE = """kornia-tinyvit distill save photos labels --teacher 1m/cifar10 \\
    --recipe cifar10_distill --epochs 4 --top-k 5"""
COMMANDS = {
    "demo": "kornia-tinyvit demo",
    "classify": "kornia-tinyvit classify chelsea.png horse.png --top-k 3",
    "classify_json": "kornia-tinyvit classify horse.png --top-k 2 --json",
    "pretrained": "kornia-tinyvit pretrained",
    "export": "kornia-tinyvit export --out photos.onnx --photos --pixels uint8",
    "segment": """kornia-tinyvit segment chelsea.png --box 100,20,400,290 --box 10,150,120,290 \\
    --weights mobile_sam.safetensors""",
    "error": "kornia-tinyvit classify no_such.png",
    "distill_estimate": SAVE + " --estimate",
    "distill_save": SAVE,
    "distill_check": """kornia-tinyvit distill check photos labels --teacher 1m/cifar10 \\
    --recipe cifar10_distill""",
    "distill_train": """kornia-tinyvit distill train photos labels --variant 1m \\
    --recipe cifar10_distill --epochs 4 --batch-size 8 --out runs/student""",
    "train": """kornia-tinyvit train photos --variant 1m --weights cifar10 --recipe cifar10 \\
    --epochs 8 --batch-size 8 --base-lr 0.03 --validation photos --out runs/photos""",
}
ON_CIFAR10 = {
    "evaluate": "kornia-tinyvit evaluate test.parquet",
    "evaluate_more": """kornia-tinyvit evaluate test.parquet --per-class --confusion --calibration \\
    --knn train.parquet --linear train.parquet""",
}
PROGRESS = r"^\w[\w. ]* \d+/\d+.* \d+:\d\d left$"
COLUMNS = (
    "recipe",
    "pixels",
    "epochs (warm-up)",
    "batch",
    "learning rate, to",
    "weight decay",
    "layer decay",
    "drop path",
    "batch norm",
    "average",
    "augmentation",
)


def recipes_table() -> str:
    """Return the recipes as lines of comma-separated values."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(COLUMNS)
    for name, recipe in RECIPES.items():
        writer.writerow([name, *_row(recipe)])
    return file.getvalue()


def _row(recipe: Recipe) -> list[object]:
    changes = "".join(
        f", {key} {' to '.join(f'{each:g}' for each in (value if isinstance(value, tuple) else (value,)))}"
        for key, value in recipe.changes.items()
    )
    return [
        recipe.img_size,
        f"{recipe.epochs} ({recipe.warmup_epochs:g})",
        recipe.batch_size,
        f"{recipe.base_lr:g}, {recipe.min_lr:g}",
        f"{recipe.weight_decay:g}",
        f"{recipe.layer_decay:g}",
        ", ".join(f"{variant} {rate:g}" for variant, rate in recipe.drop_path.items()),
        "frozen" if recipe.frozen_batch_norm else "trained",
        f"{recipe.ema_decay:g}" if recipe.ema_decay else "none",
        recipe.preset + changes,
    ]


def write_pieces(root: Path) -> None:
    """Write a data set of sixteen crops of two photos."""
    for name, file in (("cat", "chelsea.png"), ("horse", "horse.png")):
        (root / name).mkdir(parents=True)
        with Image.open(ASSETS / "photos" / file) as photo:
            small = photo.convert("RGB").resize((120, 120))
        for number in range(8):
            small.crop((2 * number, 2 * number, 2 * number + 100, 2 * number + 100)).save(root / name / f"{number}.png")


def write_mobile_sam(path: Path) -> None:
    """Write a MobileSAM with random weights; the published ones are not part of the package."""
    torch.manual_seed(0)
    save_checkpoint(MobileSAM.from_config("1m", img_size=256), path)


def write_small(sheet: Image.Image, path: Path) -> None:
    """Write an image in 256 colors, a third of the size."""
    sheet.convert("RGB").quantize(256, dither=Image.Dither.FLOYDSTEINBERG).save(path, optimize=True)


def prepare(folder: Path, cifar10: Path | None = None) -> None:
    """Write the input files of the commands to a folder."""
    for photo in (ASSETS / "photos").iterdir():
        shutil.copy(photo, folder)
    write_pieces(folder / "photos")
    write_mobile_sam(folder / "mobile_sam.safetensors")
    if cifar10:
        for split in ("train", "test"):
            os.symlink((cifar10 / f"{split}.parquet").resolve(), folder / f"{split}.parquet")


def record(command: str, folder: Path) -> str:
    """Run a command in a folder and return it with its output.

    Raises:
        subprocess.CalledProcessError: if it fails, except for the command that shows an error.
    """
    environment = os.environ | {"COLUMNS": "100", "PYTHONPATH": str(DOCS.parent), "NO_COLOR": "1"}
    environment["PYTHONWARNINGS"] = "ignore::UserWarning:torch.utils.data.dataloader"  # on machines with one core
    done = subprocess.run(  # noqa: S603 - the commands above
        [sys.executable, "-m", "kornia_tinyvit", *command.replace("\\\n", " ").split()[1:]],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=command != COMMANDS["error"],
    )
    # On a terminal progress is a bar that disappears.
    lines = [line.rstrip() for line in done.stdout.strip("\n").splitlines() if not re.search(PROGRESS, line)]
    return "\n".join([f"$ {command}", *lines, ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cifar10", type=Path)
    parser.add_argument("names", nargs="*", help="outputs to write (default: all)")
    args = parser.parse_args()
    commands = COMMANDS | (ON_CIFAR10 if args.cifar10 else {})
    if args.names:
        commands = {name: commands[name] for name in args.names}
    with tempfile.TemporaryDirectory() as folder:
        prepare(Path(folder), args.cifar10)
        for name, command in commands.items():
            (OUTPUTS / f"{name}.txt").write_text(record(command, Path(folder)))
        if "demo" in commands:
            with Image.open(Path(folder) / "demo" / "chelsea.png") as sheet:
                write_small(sheet, DOCS / "_static" / "demo.png")
    (OUTPUTS / "recipes.csv").write_text(recipes_table())
    write_numbers()


if __name__ == "__main__":
    main()
