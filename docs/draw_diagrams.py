"""Draw the diagrams of the pages, as SVG files in `docs/_static`.

    python docs/draw_diagrams.py

The shapes are computed from the networks' configurations. The tests draw the diagrams again and compare. The background
is white, for legibility in the dark theme.
"""

from __future__ import annotations

import html
from pathlib import Path

from kornia_tinyvit import TinyViTConfig
from kornia_tinyvit.detection import DetectorConfig
from kornia_tinyvit.model import NECK_CHANNELS
from kornia_tinyvit.sam.embedding import STRIDE
from kornia_tinyvit.semantic import SegmenterConfig

STATIC = Path(__file__).resolve().parent / "_static"
WIDTH, MARGIN = 720, 20
BOX, SHAPE = 420, 250  # widths of the columns: steps, and the shapes of their outputs
TITLE, DETAIL = 19, 15  # font sizes in pixels; a phone shows about half of them
INK, QUIET, EDGE = "#16202c", "#4a5868", "#9aa7b4"
DATA, CONVOLUTION, ATTENTION, HEAD = "#eef1f4", "#d5ecdf", "#d6e4fb", "#fbe6cc"
TIMES = "\N{MULTIPLICATION SIGN}"

#: The layers of the package from the top, each with its modules and their purpose. A module imports modules of the
#: layers below, and of its own layer those to its left.
LAYERS: tuple[tuple[tuple[str, ...], str], ...] = (
    (("cli",), "one module per command"),
    (("web",), "the web demo"),
    (("contraction",), "smaller networks under a budget"),
    (("training",), "the loop, and one module per task"),
    (("distillation",), "stored soft labels, teachers"),
    (("deploy", "visualization", "huggingface"), "engines, export; drawing; transformers"),
    (("backbone", "classification", "semantic", "detection", "sam"), "one network per task"),
    (("model", "folding"), "TinyViT; folding of its operators"),
    (("checkpoints", "data"), "weights; data sets and loading"),
    (("config", "layers", "images", "preprocessing", "ops"), "blocks; images to tensors; masks"),
    (
        ("version", "extras", "files", "modules", "allocator", "progress", "interruption"),
        "atomic files, optional packages, progress",
    ),
)


class Diagram:
    """A column of boxes on a white card, connected by arrows, each with a shape to its right.

    Args:
        title: accessible title of the SVG file.
    """

    def __init__(self, title: str) -> None:
        self.title = title
        self.parts: list[str] = []
        self.bottom = MARGIN
        self.joined = False

    def text(self, x: float, y: float, words: str, size: int, color: str = INK, style: str = "") -> None:
        """Add a line of text that starts at x with its baseline at y."""
        self.parts.append(
            f'<text x="{x:g}" y="{y:g}" font-size="{size}" fill="{color}" {style}>{html.escape(words)}</text>'
        )

    def box(self, x: float, width: float, title: str, details: tuple[str, ...], color: str) -> float:
        """Add a box at the bottom and return its height."""
        height = 34 + 20 * len(details)
        self.parts.append(
            f'<rect x="{x:g}" y="{self.bottom:g}" width="{width:g}" height="{height}" rx="7" '
            f'fill="{color}" stroke="{EDGE}"/>'
        )
        self.text(x + 12, self.bottom + 23, title, TITLE, style='font-weight="600"')
        for number, detail in enumerate(details):
            self.text(x + 12, self.bottom + 44 + 20 * number, detail, DETAIL, QUIET)
        return height

    def arrow(self, x: float, top: float, bottom: float) -> None:
        """Add an arrow downwards."""
        self.parts.append(f'<path d="M{x:g} {top:g}V{bottom - 2:g}" stroke="{QUIET}" marker-end="url(#tip)"/>')

    def heading(self, words: str) -> None:
        """Start a new section."""
        self.bottom += 14 if self.parts else 0
        self.text(MARGIN, self.bottom + 18, words, TITLE, style='font-weight="700"')
        self.bottom += 32
        self.joined = False

    def step(self, title: str, *details: str, shape: str = "", color: str = DATA) -> None:
        """Add a box below the last one, with an arrow between them unless it is the first of a section."""
        if self.joined:
            self.arrow(MARGIN + BOX / 2, self.bottom, self.bottom + 20)
            self.bottom += 20
        height = self.box(MARGIN, BOX, title, details, color)
        for number, line in enumerate(shape.split("\n") if shape else ()):
            lines = shape.count("\n")
            y = self.bottom + height / 2 + 5 + 21 * (number - lines / 2)
            self.text(MARGIN + BOX + 16, y, line, DETAIL + 1, style='font-family="monospace"')
        self.bottom += height
        self.joined = True

    def beside(self, left: tuple[str, tuple[str, ...], str], right: tuple[str, tuple[str, ...], str]) -> None:
        """Add two boxes side by side, each with an arrow downwards."""
        half = (WIDTH - 3 * MARGIN) / 2
        height = max(self.box(MARGIN + side * (half + MARGIN), half, *box) for side, box in enumerate((left, right)))
        self.bottom += height
        for side in (0, 1):
            self.arrow(MARGIN + side * (half + MARGIN) + half / 4 + side * half / 8, self.bottom, self.bottom + 20)
        self.bottom += 20
        self.joined = False

    def note(self, words: str) -> None:
        """Add a line in small type."""
        self.bottom += 24
        self.text(MARGIN, self.bottom, words, DETAIL, QUIET)

    def to_svg(self) -> str:
        """Return the content of the SVG file."""
        height = self.bottom + MARGIN
        lines = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:g}" width="{WIDTH}" '
            f'height="{height:g}" role="img" font-family="system-ui, Segoe UI, DejaVu Sans, sans-serif">',
            f"<title>{html.escape(self.title)}</title>",
            '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="9" markerHeight="9" orient="auto">'
            f'<path d="M0 0L8 4L0 8z" fill="{QUIET}"/></marker></defs>',
            f'<rect x="0.5" y="0.5" width="{WIDTH - 1}" height="{height - 1:g}" rx="10" fill="#fff" stroke="{EDGE}"/>',
            *self.parts,
            "</svg>",
        ]
        return "\n".join(lines) + "\n"


def size(channels: int | str, side: int | str) -> str:
    """Format the shape of a square feature map."""
    return f"{channels} {TIMES} {side} {TIMES} {side}"


def draw_network(config: TinyViTConfig, name: str) -> Diagram:
    """Draw the network, and one of its attention blocks."""
    diagram = Diagram(f"TinyViT {name}: the network from the image to the logits, and one of its attention blocks")
    sides = [config.img_size // stride for stride in config.stage_strides]
    diagram.heading(f"TinyViT {name} at {config.img_size} pixels")
    diagram.step("Image", shape=size(config.in_chans, config.img_size))
    diagram.step(
        "Patch embedding",
        f"two 3{TIMES}3 convolutions, stride 2",
        shape=size(config.embed_dims[0], sides[0]),
        color=CONVOLUTION,
    )
    for stage, (channels, depth, side) in enumerate(zip(config.embed_dims, config.depths, sides, strict=True)):
        if stage:
            diagram.step(
                "Merging",
                f"1{TIMES}1, depthwise 3{TIMES}3 with stride 2, 1{TIMES}1",
                shape=size(channels, side),
                color=CONVOLUTION,
            )
        if stage:
            window, heads = config.window_sizes[stage], config.num_heads[stage]
            title, color = f"Stage {stage + 1}: {depth} attention blocks", ATTENTION
            detail = f"windows of {window}{TIMES}{window}, {heads} heads"
        else:
            title, color = f"Stage 1: {depth} MBConv blocks", CONVOLUTION
            detail = f"1{TIMES}1 to {config.mbconv_expand_ratio:g} times the channels, depthwise 3{TIMES}3, 1{TIMES}1"
        diagram.step(title, detail, shape=f"features {stage + 1}, stride {config.stage_strides[stage]}", color=color)
    diagram.step("Head", "global average pooling, layer norm, linear", shape=f"{config.num_classes} logits", color=HEAD)
    diagram.heading("One attention block")
    diagram.step("Tokens", shape="C channels")
    diagram.step("+ attention inside windows", "layer norm; a learned bias for each offset", color=ATTENTION)
    diagram.step(
        f"depthwise {config.local_conv_size}{TIMES}{config.local_conv_size} convolution",
        "across window borders",
        color=CONVOLUTION,
    )
    diagram.step(
        "+ MLP",
        "layer norm, linear, GELU, linear",
        shape=f"{config.mlp_ratio:g} C inside",
        color=ATTENTION,
    )
    diagram.note("+ denotes a residual connection. Convolutions are followed by batch norm.")
    return diagram


def draw_mobile_sam(config: TinyViTConfig) -> Diagram:
    """Draw the steps of MobileSAM per image and per prompt."""
    diagram = Diagram("MobileSAM: steps per image and per prompt")
    side = config.img_size
    cells, low = side // STRIDE, side // 4
    diagram.heading("Once per image")
    diagram.step("Image", shape=f"3 {TIMES} H {TIMES} W")
    diagram.step("Resize, normalize, pad", f"longer side to {side} pixels", shape=size(config.in_chans, side))
    diagram.step(
        "TinyViT 5m",
        "the last merging has stride 1",
        shape=size(config.embed_dims[-1], cells),
        color=ATTENTION,
    )
    diagram.step("Neck", f"1{TIMES}1, norm, 3{TIMES}3, norm", shape=size(NECK_CHANNELS, cells), color=CONVOLUTION)
    diagram.heading("For each of P prompts")
    diagram.beside(
        ("Image embedding", ("computed above, or from a file",), DATA),
        ("Prompt encoder", ("points, boxes, earlier masks",), HEAD),
    )
    diagram.step(
        "Mask decoder",
        "two-way attention between prompt and image",
        shape=f"P {TIMES} 3 {TIMES} {low} {TIMES} {low}\nP {TIMES} 3 scores",
        color=ATTENTION,
    )
    diagram.step("Upsample, crop, threshold", shape=f"P {TIMES} 3 {TIMES} H {TIMES} W")
    return diagram


def draw_detector(config: DetectorConfig) -> Diagram:
    """Draw the detector."""
    backbone, width, queries = config.backbone, config.hidden_dim, config.num_queries
    strides = backbone.stage_strides[1:]
    sides = [backbone.img_size // stride for stride in strides]
    diagram = Diagram("The detector: from an image to boxes")
    diagram.step("Image", shape=f"3 {TIMES} H {TIMES} W")
    diagram.step("Resize to a square, normalize", shape=size(backbone.in_chans, backbone.img_size))
    diagram.step(
        "TinyViT 5m",
        f"features of stages 2, 3 and 4: strides {strides[0]}, {strides[1]}, {strides[2]}",
        shape="\n".join(size(c, side) for c, side in zip(backbone.embed_dims[1:], sides, strict=True)),
        color=ATTENTION,
    )
    diagram.step(
        "Hybrid encoder",
        "attention over the coarsest features,",
        "convolutions between the three scales",
        shape="\n".join(size(width, side) for side in sides),
        color=CONVOLUTION,
    )
    diagram.step(
        "Query selection",
        f"the top {queries} of {sum(side**2 for side in sides)} cells",
        shape=f"{queries} {TIMES} {width}",
        color=HEAD,
    )
    diagram.step(
        f"Decoder, {config.decoder_layers} layers",
        "self-attention, deformable attention",
        shape=f"{queries} {TIMES} K logits\n{queries} {TIMES} 4 boxes",
        color=ATTENTION,
    )
    diagram.step("Sort by score, scale to the image", shape="label, score, box")
    return diagram


def draw_segmenter(config: SegmenterConfig) -> Diagram:
    """Draw the semantic segmenter."""
    backbone, width = config.backbone, config.width
    sides = [backbone.img_size // stride for stride in backbone.stage_strides]
    diagram = Diagram("The semantic segmenter: from an image to a class for each pixel")
    diagram.step("Image", shape=size(backbone.in_chans, backbone.img_size))
    diagram.step(
        "Normalize, TinyViT 5m",
        "features of the four stages",
        shape="\n".join(size(c, side) for c, side in zip(backbone.embed_dims, sides, strict=True)),
        color=ATTENTION,
    )
    diagram.step(
        "A linear layer per stage",
        "upsampled to the finest, concatenated",
        shape=size(len(sides) * width, sides[0]),
        color=CONVOLUTION,
    )
    diagram.step("Linear layer", "batch norm, ReLU, dropout", shape=size(width, sides[0]), color=CONVOLUTION)
    diagram.step("Classifier", shape=size("K", sides[0]), color=HEAD)
    diagram.step("Upsample", shape=size("K", backbone.img_size))
    return diagram


def draw_package() -> Diagram:
    """Draw the modules of the package, each above those that it imports."""
    diagram = Diagram("The modules of the package, each above those that it imports")
    for names, purpose in LAYERS:
        diagram.text(MARGIN, diagram.bottom + 12, purpose, DETAIL, QUIET)
        diagram.bottom += 20
        letters = sum(map(len, names)) + 3 * len(names)  # widths are proportional to the names
        unit = (WIDTH - 2 * MARGIN - 10 * (len(names) - 1)) / letters
        left = float(MARGIN)
        for name in names:
            width = unit * (len(name) + 3)
            diagram.box(left, width, name, (), ATTENTION if names[0] != "cli" else HEAD)
            left += width + 10
        diagram.bottom += 34
        if names != LAYERS[-1][0]:
            diagram.arrow(WIDTH / 2, diagram.bottom, diagram.bottom + 16)
            diagram.bottom += 16
    diagram.note("A module imports modules below it, and of its own layer those to its left.")
    return diagram


def diagrams() -> dict[str, str]:
    """Return the SVG files by name."""
    five = TinyViTConfig.from_variant("5m")
    drawn = {
        "network": draw_network(five, "5m"),
        "mobile_sam": draw_mobile_sam(five.replace(img_size=1024, mobile_sam=True)),
        "detector": draw_detector(DetectorConfig(five.replace(img_size=640, num_classes=0), num_classes=80)),
        "segmenter": draw_segmenter(SegmenterConfig(five.replace(img_size=512, num_classes=0), num_classes=150)),
        "package": draw_package(),
    }
    return {f"{name}.svg": diagram.to_svg() for name, diagram in drawn.items()}


if __name__ == "__main__":
    for name, text in diagrams().items():
        (STATIC / name).write_text(text, encoding="utf-8")
