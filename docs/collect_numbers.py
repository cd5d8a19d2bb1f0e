"""Collect numbers from the recorded outputs of commands into the tables of the page `guides/numbers`.

    python docs/collect_numbers.py

No benchmark is run: each number is extracted from a recorded file, with the command that precedes it there. Parameters
and multiply-accumulates are computed.
"""

from __future__ import annotations

import csv
import io
import re
import textwrap
from dataclasses import dataclass
from pathlib import Path

from kornia_tinyvit import list_pretrained
from kornia_tinyvit.contraction import count

ROOT = Path(__file__).resolve().parents[1]
TABLES = ROOT / "docs" / "guides" / "outputs"
OUTPUTS, EXAMPLES = "docs/guides/outputs", "examples/README.md"
N = r"(\d[\d.,]*\d|\d)"  # pattern of a number


@dataclass(frozen=True)
class Source:
    """The recorded output of one command.

    Args:
        file: the recorded file, relative to the root of the repository.
        rows: for each number a description, a format string for the matched groups, and a pattern.
        start: the pattern of the position to start from; the last line with a ``$`` before it is the command.
        command: the command, if the file does not contain it.
    """

    file: str
    rows: tuple[tuple[str, str, str], ...]
    start: str = ""
    command: str | None = None

    def to_rst(self) -> str:
        """Return the command and a table of its numbers.

        Raises:
            ValueError: if a pattern is not found in the file.
        """
        text = (ROOT / self.file).read_text(encoding="utf-8")
        begin = re.search(self.start, text, flags=re.DOTALL)
        if begin is None:
            raise ValueError(f"{self.file} does not contain {self.start!r}.")
        cells, end = [], 0
        for description, template, pattern in self.rows:
            found = re.search(pattern, text[begin.start() :], flags=re.DOTALL)
            if found is None:
                raise ValueError(f"{self.file} does not contain {pattern!r}: {description}.")
            cells.append([description, template.format(*found.groups())])
            end = max(end, begin.start() + found.end())
        return "\n".join(
            [
                ".. code-block:: console\n",
                textwrap.indent(f"$ {self._command(text[:end])}", "    "),
                f"\n.. csv-table:: recorded in ``{self.file}``\n    :widths: 55 45\n    :width: 100%\n",
                textwrap.indent(to_csv(cells), "    "),
            ]
        )

    def _command(self, before: str) -> str:
        if self.command is not None:
            return self.command
        return re.findall(r"^\$ ((?:.*\\\n)*.*)$", before, flags=re.MULTILINE)[-1]


def to_csv(rows: list[list[str]]) -> str:
    """Return lines of comma-separated values."""
    file = io.StringIO()
    csv.writer(file, lineterminator="\n").writerows(rows)
    return file.getvalue()


def _eager() -> Source:
    row = rf".*?batch {{batch:>2}}\s+ours\s+{N}.*?kornia\s+{N}.*?timm\s+{N}"
    rows = [
        (
            f"``{variant}``, batch size {batch}, {allocator} allocator",
            "{} ms; kornia {} ms, timm {} ms",
            f"Allocator {allocator}: forward.*?{variant}" + row.format(batch=batch),
        )
        for allocator in ("tuned", "default")
        for variant in ("5m", "11m", "21m")
        for batch in (1, 16)
    ]
    memory = "peak memory.*?5m" + row.format(batch=16)
    rows.append(("memory without the weights, ``5m``, batch size 16", "{} MB; kornia {} MB, timm {} MB", memory))
    small = rf"Allocator tuned.*?32 px training step\s+fit\s+{N} ms.*?padded\s+{N} ms.*?kornia\s+{N} ms"
    description = 'training step of ``5m`` at 32 pixels, ``window_sizes="fit"``, batch size 16, tuned allocator'
    rows.append((description, "{} ms; padded {} ms, kornia {} ms", small))
    return Source("benchmarks/eager.txt", tuple(rows))


def _deployed() -> Source:
    engines = (
        ("inductor", "float32"), ("onnxruntime", "float32"), ("onnxruntime", "int8"), ("openvino", "float32"),
        ("openvino", "bfloat16"), ("openvino", "int8"),
    )  # fmt: skip
    rows = []
    for batch in (1, 16):
        for engine, dtype in engines:
            line = rf"{engine}\s+{dtype}\s+{N} ms"
            rows.append(
                (
                    f"``5m``, batch size {batch}, {engine}, {dtype}",
                    "{1} ms; timm {0} ms",
                    rf"batch {batch}, allocator tuned.*?\n    timm       {line}.*?\n    ours       {line}",
                )
            )
    line = rf"eager\s+float32\s+{N} ms"
    encoder = rf"encoder at 1024, batch 1, allocator tuned\n    ours       {line}.*?\n    kornia     {line}"
    rows.append(("MobileSAM's encoder at 1024, eager, float32", "{} ms; kornia {} ms", encoder))
    return Source("benchmarks/deploy.txt", tuple(rows), start="5m at 224, batch 1, allocator tuned")


GENERATION = rf"computed\s+{N} s.*?{N} over the network\s+{N} masks"
STUDENT = rf"\s+{N} \({N}\)\s+{N}\s+{N}\n"
SECTIONS: dict[str, tuple[Source, ...]] = {
    "classification": (
        Source(
            f"{OUTPUTS}/evaluate.txt",
            (
                (
                    "``1m`` with the weights in the package, 10,000 test images of CIFAR-10",
                    "top-1 {} %, top-5 {} %",
                    f"top-1 {N} %, top-5 {N} %",
                ),
            ),
        ),
        Source(
            f"{OUTPUTS}/evaluate_more.txt",
            (
                ("expected calibration error", "{} %", f"calibration error {N} %"),
                ("k-NN on its features", "top-1 {} %", f"nearest neighbors[^\n]*top-1 {N} %"),
                ("linear probe on its features", "top-1 {} %", f"linear classifier[^\n]*top-1 {N} %"),
            ),
        ),
        Source(
            f"{OUTPUTS}/finetune_transformers.txt",
            (("all weights fine-tuned by transformers' ``Trainer``", "accuracy {}", f'"accuracy": {N}'),),
        ),
        Source(
            f"{OUTPUTS}/finetune_transformers.txt",
            (("fine-tuned with LoRA", "accuracy {}", f'"accuracy": {N}'),),
            start='{"lora": true',
        ),
    ),
    "distillation": (
        Source(
            EXAMPLES,
            (
                (
                    "students trained on labels, top-1 (spread)",
                    "{} % ({}), {} s per epoch, {} MB",
                    " labels" + STUDENT,
                ),
                ("with the teacher in every step", "{} % ({}), {} s per epoch, {} MB", " online" + STUDENT),
                ("on stored soft labels", "{} % ({}), {} s per epoch, {} MB", " stored" + STUDENT),
                ("storing the labels, once", "{} records, {} MB, {} s", f"stored {N} records, {N} MB, {N} s"),
            ),
            start=r"\$ python examples/distill_cifar10.py",
        ),
        Source(
            EXAMPLES,
            (("teacher", "top-1 {}", f'"test_top1": {N}'),),
            start=r"\$ python examples/cifar10_teacher.py cifar10 --out",
        ),
        Source(
            EXAMPLES,
            (("the same teacher after further training", "top-1 {}", f'"test_top1": {N}'),),
            start=r"\$ python examples/cifar10_teacher.py cifar10 --start",
        ),
        Source(
            EXAMPLES,
            (("after further training at 128 pixels", "top-1 {}", f'"test_top1": {N}'),),
            start=r"\$ python examples/cifar10_teacher.py cifar10 --start runs/teacher2",
        ),
        Source(
            EXAMPLES,
            (
                (
                    "a student trained on stored features, on held-out images",
                    "error {}, cosine {}",
                    rf"  trained student\s+{N}\s+{N}",
                ),
            ),
            start="student: 40 epochs",
        ),
        Source(
            "benchmarks/label_store.txt",
            (
                ("size of a record of 100 classes", "{} bytes", rf"size\s+{N} bytes"),
                ("saving records", "{} records/s", rf"saving\s+{N} records"),
                ("reading in the order of the epoch", "{} records/s", rf"sequential\s+{N} records"),
                ("random reading", "{} records/s", rf"random\s+{N} records"),
            ),
            command="python benchmarks/label_store.py",
        ),
        Source(
            "benchmarks/replay.txt",
            (
                ("sampling the augmentation parameters of an image", "{} ms", rf"sample parameters\s+{N}"),
                ("applying them to the pixels", "{} ms", rf"pixels on this device\s+{N}"),
            ),
            command="python benchmarks/replay.py",
        ),
    ),
    "dense": (
        Source(
            f"{OUTPUTS}/segment_semantic.txt",
            (
                ("segmenter, on its 32 training images", "mIoU {} %", f'"train"[^\n]*"mean_iou": {N}'),
                ("on 100 held-out images", "mIoU {} %", f'"val"[^\n]*"mean_iou": {N}'),
            ),
        ),
        Source(
            f"{OUTPUTS}/segment_promptable.txt",
            (
                (
                    "MobileSAM with boxes, on its 32 training images",
                    "IoU {} %",
                    f'"after", "split": "train"[^\n]*"box_iou": {N}',
                ),
                ("on 100 held-out images", "IoU {} %", f'"split": "others"[^\n]*"box_iou": {N}'),
            ),
            start=r"--base-lr 0.192 --weights runs/finer",
        ),
        Source(
            f"{OUTPUTS}/detect_objects.txt",
            (
                (
                    "detector, on its 16 training images",
                    "mAP {} %, AP50 {} %",
                    f'"train"[^\n]*"map": {N}, "map50": {N}',
                ),
                ("on 128 other images", "mAP {} %, AP50 {} %", f'"val"[^\n]*"map": {N}, "map50": {N}'),
            ),
        ),
        Source(
            EXAMPLES,
            (("U-Net, on its 6 training images", "mIoU {} %", f'"mean_iou": {N}'),),
            start=r"\$ python examples/unet_decoder.py",
        ),
        Source(
            "benchmarks/segmentation.txt",
            (
                (
                    "automatic mask generation, 32 x 32 points",
                    "{} s, {} MB over the network, {} masks",
                    "ours  [^\n]*" + GENERATION,
                ),
                (
                    "segment-anything",
                    "{} s, {} MB over the network, {} masks",
                    "segment-anything  [^\n]*" + GENERATION,
                ),
                (
                    "masks with IoU 0.99 or more",
                    "{1} of {0}, {2} identical",
                    f"ours  [^\n]*of {N} masks {N} agree, {N} identical",
                ),
            ),
            start="32x32 points",
        ),
        Source(
            "benchmarks/segmentation.txt",
            tuple(
                (f"encoder at {size}", "{} s", rf"{size}\s+{N} s, computed\s+{N} s".replace(N, r"[\d.]+", 1))
                for size in ("1024x1024", "768x768", "512x1024", "512x512")
            ),
            start="Encoder, 5m, eager, at other sizes",
        ),
    ),
    "eager": (
        _eager(),
        Source(
            "benchmarks/allocator.txt",
            (
                (
                    "kornia's ``5m``, 16 images, before and after ``keep_memory()``",
                    "{} ms, {} ms",
                    rf"kornia batch 16\s+{N} ms\s+\d+ faults\s+{N} ms",
                ),
                ("ours", "{} ms, {} ms", rf"ours   batch 16\s+{N} ms\s+\d+ faults\s+{N} ms"),
            ),
        ),
    ),
    "deployed": (
        _deployed(),
        Source(
            "benchmarks/deploy.txt",
            (
                (
                    "from file to label, OpenVINO, float32, batch size 1",
                    "{} images/s",
                    rf"Pillow, openvino float32, batch 1 \s+{N}",
                ),
                ("the same in bfloat16", "{} images/s", rf"Pillow, openvino bfloat16, batch 1 \s+{N}"),
                ("timm, eager, batch size 1", "{} images/s", rf"timm \+ Pillow, eager, batch 1 \s+{N}"),
                ("timm, eager, batch size 16", "{} images/s", rf"timm \+ Pillow, eager, batch 16, 0 workers\s+{N}"),
            ),
            start="label, 1000 photos, 5m at 224, allocator tuned",
        ),
    ),
}


def sizes() -> str:
    """Return parameters and multiply-accumulates of the published classifiers and the one in the package."""
    rows = []
    for weights in list_pretrained():
        if weights.name in ("cifar10", "in1k", "in1k_384", "in1k_512"):
            costs, config = count(weights.config), weights.config
            counted = [f"{costs[kind]:,.0f}" for kind in ("parameters", "macs")]
            rows.append([f"``{weights.variant}``", str(config.img_size), str(config.num_classes), *counted])
    return to_csv([["variant", "pixels", "classes", "parameters", "multiply-accumulates"], *rows])


def tables() -> dict[str, str]:
    """Return the tables by file name."""
    found = {f"numbers_{name}.txt": "\n".join(each.to_rst() for each in sources) for name, sources in SECTIONS.items()}
    return found | {"numbers_sizes.csv": sizes()}


def write() -> None:
    """Write the tables to `docs/guides/outputs`."""
    for name, text in tables().items():
        (TABLES / name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    write()
