"""Run the commands that the pages show and write what they print to `docs/guides/outputs`.

    python docs/record_outputs.py [--cifar10 FOLDER]

FOLDER holds `test.parquet` with CIFAR-10's test pictures in the Hugging Face layout; without it, the accuracy that is
shown stays as it was. The sheet of the cat becomes the picture of the model's page.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from kornia_tinyvit.checkpoints.catalog import ASSETS

DOCS = Path(__file__).resolve().parent
COMMANDS = {
    "demo": "kornia-tinyvit demo",
    "classify": "kornia-tinyvit classify chelsea.png horse.png --top-k 3",
    "classify_json": "kornia-tinyvit classify horse.png --top-k 2 --json",
    "pretrained": "kornia-tinyvit pretrained",
    "error": "kornia-tinyvit classify no_such.png",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cifar10", type=Path)
    args = parser.parse_args()
    environment = os.environ | {"COLUMNS": "100", "PYTHONPATH": str(DOCS.parent), "NO_COLOR": "1"}
    with tempfile.TemporaryDirectory() as folder:
        for photo in (ASSETS / "photos").iterdir():
            shutil.copy(photo, folder)
        commands = dict(COMMANDS)
        if args.cifar10:
            shutil.copy(args.cifar10 / "test.parquet", folder)
            commands["evaluate"] = "kornia-tinyvit evaluate test.parquet"
        for name, command in commands.items():
            program = [sys.executable, "-c", "from kornia_tinyvit.cli import main; main()"]
            done = subprocess.run(  # noqa: S603 - the commands above
                [*program, *command.split()[1:]],
                cwd=folder,
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                check=name != "error",
            )
            lines = [line.rstrip() for line in done.stdout.strip("\n").splitlines()]
            (DOCS / "guides" / "outputs" / f"{name}.txt").write_text("\n".join([f"$ {command}", *lines, ""]))
        shutil.copy(Path(folder) / "demo" / "chelsea.png", DOCS / "_static" / "demo.png")


if __name__ == "__main__":
    main()
