"""Data sets whose samples are known: pycocotools, Pillow and numpy give the right labels, boxes and masks."""

from __future__ import annotations

import io
import json
import random
import tarfile
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pycocotools import mask as coco_masks

from kornia_tinyvit.data import DetectionDataset, InstanceDataset, SegmentationDataset
from kornia_tinyvit.data.classification import ClassificationDataset
from tests.fuzz.harness import Target
from tests.fuzz.images import UPRIGHT, encoded
from tests.fuzz.known import Verdict, check

VALID, OPEN, INVALID = Verdict.VALID, Verdict.OPEN, Verdict.INVALID
Pixels = NDArray[np.uint8]  # (H, W, 3)
Mask = NDArray[np.bool_]  # (H, W)


@dataclass(frozen=True)
class Sample:
    """An image file: its bytes, its upright pixels, and its suffix."""

    content: bytes
    pixels: Pixels
    suffix: str = "png"

    @property
    def height(self) -> int:
        return int(self.pixels.shape[0])

    @property
    def width(self) -> int:
        return int(self.pixels.shape[1])


def a_sample(rng: random.Random, turned: bool = True, least: int = 8) -> Sample:
    """Return a sample that no other has."""
    sides = [side for side in (6, 8, 12, 20, 33, 40) if side >= least]
    generator = np.random.default_rng(rng.getrandbits(40))
    pixels = generator.integers(0, 256, (rng.choice(sides), rng.choice(sides), 3), dtype=np.uint8)
    orientation = rng.choice((1, 1, 1, 3, 6)) if turned else 1
    upright = UPRIGHT[orientation](pixels)
    return Sample(encoded(Image.fromarray(pixels), "png", orientation, compress_level=1), upright)


def write(path: Path, content: bytes | str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)


def text(rng: random.Random, lines: Sequence[str]) -> bytes:
    """Return lines as different editors save them."""
    end = rng.choice(("\n", "\n", "\r\n"))
    content = end.join(lines) + end * rng.choice((0, 1, 1, 3))
    return (b"\xef\xbb\xbf" if rng.random() < 0.15 else b"") + content.encode()


def png(levels: NDArray[Any]) -> bytes:
    file = io.BytesIO()
    Image.fromarray(levels).save(file, "PNG", compress_level=1)
    return file.getvalue()


def pixels_of(image: Any) -> bytes:
    levels = image.permute(1, 2, 0).numpy()
    return repr(levels.shape).encode() + np.ascontiguousarray(levels).tobytes()


def key(sample: Sample) -> bytes:
    return repr(sample.pixels.shape).encode() + np.ascontiguousarray(sample.pixels).tobytes()


# --- Labeled images -------------------------------------------------------------------------------------------------

CLASSES = ("cat", "dog", "great white shark", "Übung", "n01440764", "0", "1", "10", "2", "train station", "-x", "a,b")
WORDNET_IDS = ("n01440764", "n01443537", "n02102040", "n03425413", "n15075141")
Labeled = list[tuple[str, str, Sample]]  # class, path below it, sample


def labeled(rng: random.Random) -> tuple[list[str], Labeled]:
    known = CLASSES if rng.random() < 0.85 else WORDNET_IDS
    classes = sorted(rng.sample(known, rng.choice((2, 2, 3, 4))))
    found: Labeled = []
    for name in classes:
        for number in range(rng.choice((1, 1, 2, 3))):
            below = rng.choice(("", "", "", "sub/", "a/b/"))
            suffix = rng.choice(("png", "png", "PNG"))
            found.append((name, f"{below}{number}.{suffix}", a_sample(rng)))
    return classes, found


JUNK: tuple[tuple[str, bytes], ...] = (
    ("__MACOSX/{c}/._0.png", b"\0\5\26\7"),
    ("@eaDir/{c}/0.png", b"x"), (".DS_Store", b"\0\0"), ("{c}/.DS_Store", b"\0"),
    ("{c}/Thumbs.db", b"x"), ("{c}/desktop.ini", b"x"), ("{c}/notes.txt", b"x"), ("{c}/._0.png", b"\0\5\26\7"),
    ("{c}/@eaDir/0.png@SynoEAStream", b"x"), (".ipynb_checkpoints/0.png", b"x"), ("readme.md", b"x"),
    ("{c}/@eaDir/0.png/SYNOPHOTO_THUMB_M.jpg", b"x"), ("{c}/labels.csv", b"x"), ("{c}/clip.mp4", b"x"),
)  # fmt: skip


def compare_labeled(
    found: ClassificationDataset, classes: Sequence[str] | None, wanted: Counter[Any], what: str
) -> None:
    if classes is not None:
        assert found.class_names == tuple(classes), f"other classes of {what}: {found.class_names}, not {classes}"
    samples = [found.read(index) for index in range(len(found))]
    names = found.class_names
    assert names is not None or classes is None, f"no class names of {what}"
    counted = Counter((pixels_of(pixels), label if names is None else names[label]) for pixels, label in samples)
    more, less = sum((counted - wanted).values()), sum((wanted - counted).values())
    assert counted == wanted, f"other samples of {what}: {more} that are wrong, {less} are missing"


def labeled_folders(rng: random.Random, folder: Path) -> None:
    classes, images = labeled(rng)
    root, details = folder / "data", []
    for name, path, sample in images:
        write(root / name / path, sample.content)
    for path, content in rng.sample(JUNK, rng.choice((0, 0, 1, 3))):
        write(root / path.format(c=classes[0]), content)
        details.append(path)
    if rng.random() < 0.2:
        classes = sorted([*classes, "empty"])
        (root / "empty").mkdir()
        details.append("an empty class")
    if rng.random() < 0.3:
        details.append(link(rng, root, folder, classes, images))
        classes = sorted({*classes, *(name for name, *_ in images)})
    wanted = Counter((key(sample), name) for name, _, sample in images)
    check(
        VALID, "class folders", lambda: ClassificationDataset.open(root),
        lambda found: compare_labeled(found, classes, wanted, "class folders"), detail=", ".join(details),
    )  # fmt: skip


def link(rng: random.Random, root: Path, folder: Path, classes: list[str], images: Labeled) -> str:
    kind = rng.choice(("a dangling link", "a link to a file", "a linked class", "a linked folder", "a cycle"))
    inside, sample = root / classes[0], a_sample(rng)
    if kind == "a dangling link":
        (inside / "gone.png").symlink_to(folder / "nowhere.png")
    elif kind == "a link to a file":
        write(folder / "elsewhere.png", sample.content)
        (inside / "link.png").symlink_to(folder / "elsewhere.png")
        images.append((classes[0], "link.png", sample))
    elif kind == "a linked class":
        write(folder / "elsewhere" / "0.png", sample.content)
        (root / "linked").symlink_to(folder / "elsewhere")
        images.append(("linked", "0.png", sample))
    elif kind == "a linked folder":
        write(folder / "elsewhere" / "0.png", sample.content)
        (inside / "linked").symlink_to(folder / "elsewhere")
        images.append((classes[0], "linked/0.png", sample))
    else:
        (inside / "again").symlink_to(inside)
    return kind


def split_folders(rng: random.Random, folder: Path) -> None:
    """A folder or a tar file of ``train`` and ``val``: they are splits, not classes."""
    classes, images = labeled(rng)
    root, others = folder / "data", [(name, path, a_sample(rng)) for name, path, _ in images]
    names = rng.choice((("train", "val"), ("train", "test"), ("train", "validation"), ("train", "val", "test")))
    for name, path, sample in images:
        write(root / "train" / name / path, sample.content)
    for split in names[1:]:
        for name, path, sample in others:
            write(root / split / name / path, sample.content)
    what, place = "a folder of splits", root
    if rng.random() < 0.3:
        what, place = "a tar file of splits", folder / "data.tar"
        with tarfile.open(place, "w") as tar:
            tar.add(root, rng.choice((".", "data")))
    split = rng.choice(names)
    chosen = images if split == "train" else others
    wanted = Counter((key(sample), name) for name, _, sample in chosen)

    def compare(found: ClassificationDataset) -> None:
        assert found.class_names == tuple(classes), f"splits are taken for classes: {found.class_names}"
        compare_labeled(found, classes, wanted, what)

    check(VALID, what, lambda: ClassificationDataset.open(place, split), compare, detail=split)
    direct = ClassificationDataset.open(root / split)
    compare_labeled(direct, classes, wanted, "the folder of a split")


def labeled_tar(rng: random.Random, folder: Path) -> None:
    classes, images = labeled(rng)
    top = rng.choice(("", "", "./", "data/", "./data/"))
    if rng.random() < 0.15:  # a single class: the folders in it are none
        classes, top = classes[:1], rng.choice(("", "./"))
        paths = ("0.png", "sub/1.png", "sub/2.png")[: rng.choice((2, 3))]
        images = [(classes[0], path, a_sample(rng)) for path in paths]
    file = folder / "a.tar"
    shapes = {"format": rng.choice((tarfile.PAX_FORMAT, tarfile.GNU_FORMAT))}
    with tarfile.open(file, "w", **shapes) as tar:  # type: ignore[call-overload]
        if rng.random() < 0.5:
            for name in ({top.rstrip("/")} - {"", "."}) | {top + name for name in classes}:
                member = tarfile.TarInfo(name)
                member.type = tarfile.DIRTYPE
                tar.addfile(member)
        order = rng.sample(images, len(images))
        for name, path, sample in order:
            add(tar, f"{top}{name}/{path}", sample.content)
        junk = rng.sample(JUNK, rng.choice((0, 0, 1, 3)))
        for path, content in junk:
            add(tar, top + path.format(c=classes[0]), content)
    wanted = Counter((key(sample), name) for name, _, sample in images)
    check(
        VALID, "a tar file", lambda: ClassificationDataset.open(file),
        lambda found: compare_labeled(found, classes, wanted, "a tar file"),
        detail=f"{top} {[each for each, _ in junk]}",
    )  # fmt: skip


def add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


def tars_of_classes(rng: random.Random, folder: Path) -> None:
    classes, images = labeled(rng)
    root = folder / "data"
    root.mkdir()
    for each in classes:
        with tarfile.open(root / f"{each}.tar", "w") as tar:
            for name, path, sample in images:
                if name == each:
                    add(tar, path, sample.content)
    wanted = Counter((key(sample), name) for name, _, sample in images)
    check(
        VALID, "tar files of classes", lambda: ClassificationDataset.open(root),
        lambda found: compare_labeled(found, classes, wanted, "tar files of classes"),
    )  # fmt: skip


def write_parquet(rng: random.Random, folder: Path, images: Labeled, names: list[str], named: bool) -> tuple[Path, str]:
    """Write a file of `datasets.to_parquet`, whose class names are in the metadata of its schema."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    column, plain = rng.choice(("image", "img")), rng.random() < 0.2
    values: list[Any] = [sample.content for *_, sample in images]
    structs = [{"bytes": each, "path": rng.choice((None, "a.png"))} for each in values]
    labels = pa.array([names.index(name) for name, *_ in images], rng.choice((pa.int64(), pa.int8())))
    table = pa.table({column: values if plain else structs, "label": labels})
    if named:
        features = {column: {"_type": "Image"}, "label": {"names": names, "_type": "ClassLabel"}}
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    path = folder / rng.choice(("train-00000-of-00001.parquet", "a.parquet"))
    pq.write_table(table, path)
    return path, f"{'binary ' * plain}{column}"


def parquet(rng: random.Random, folder: Path) -> None:
    classes, images = labeled(rng)
    names = rng.sample(classes, len(classes))  # in any order
    rng.shuffle(images)
    named = rng.random() < 0.8
    path, detail = write_parquet(rng, folder, images, names, named)
    wanted = Counter((key(sample), name if named else names.index(name)) for name, _, sample in images)
    check(
        VALID, "a parquet file", lambda: ClassificationDataset.open(path),
        lambda found: compare_labeled(found, names if named else None, wanted, "a parquet file"), detail=detail,
    )  # fmt: skip


def other_order(rng: random.Random, folder: Path) -> None:
    """The classes of a network in another order: they are matched by name, or rejected."""
    classes, images = labeled(rng)
    if rng.random() < 0.3:
        ours = rng.sample(classes, len(classes))
        path, _ = write_parquet(rng, folder, images, ours, named=True)
    else:
        path = folder / "data"
        for name, below, sample in images:
            write(path / name / below, sample.content)
    kind = rng.choice(("permuted", "more", "more", "disjoint", "fewer"))
    theirs = rng.sample(classes, len(classes))
    if kind == "more":
        theirs = rng.sample([*theirs, "another", "one more"], len(theirs) + 2)
    elif kind == "disjoint":
        theirs = [f"other {number}" for number in range(len(classes))]
    elif kind == "fewer":
        theirs = theirs[1:]
    wanted = Counter((key(sample), name) for name, _, sample in images)
    check(
        INVALID if kind in ("disjoint", "fewer") else VALID, f"a network with {kind} classes",
        lambda: ClassificationDataset.open(path).with_classes(tuple(theirs)),
        lambda found: compare_labeled(found, theirs, wanted, f"a network with {kind} classes"),
    )  # fmt: skip


def broken_image(rng: random.Random, folder: Path) -> None:
    classes, images = labeled(rng)
    root = folder / "data"
    for name, path, sample in images:
        write(root / name / path, sample.content)
    write(root / classes[0] / "broken.png", rng.choice((b"", b"no image", images[0][2].content[:60])))

    def read() -> Any:
        found = ClassificationDataset.open(root)
        return [found.read(index) for index in range(len(found))]

    check(INVALID, "a broken image", read, lambda _: None, "broken.png")


# --- Boxes and instances --------------------------------------------------------------------------------------------

Box = tuple[float, float, float, float]  # left, top, right, bottom in pixels
Found = tuple[int, Box]


def a_box(rng: random.Random) -> tuple[float, float, float, float]:
    """Return left, top, width and height as fractions, inside of the image."""
    width, height = round(rng.uniform(0.2, 0.9), 6), round(rng.uniform(0.2, 0.9), 6)
    return round(rng.uniform(0, 1 - width), 6), round(rng.uniform(0, 1 - height), 6), width, height


def a_ring(rng: random.Random) -> list[float]:
    """Return an outline as fractions."""
    corners = rng.choice((3, 4, 5, 8))
    if rng.random() < 0.2:  # whole pixels of many sizes, to the border
        values = (0.0, 0.25, 0.5, 0.75, 1.0)
        grid = rng.sample([(x, y) for x in values for y in values], corners)  # YOLO's return to a corner ends a part
        return [value for corner in grid for value in corner]
    return [round(rng.random(), 6) for _ in range(2 * corners)]


def filled(rings: Sequence[Sequence[float]], height: int, width: int) -> Mask:
    """Return the union of polygons in pixels, as pycocotools rasterizes them."""
    codes = coco_masks.frPyObjects([list(map(float, ring)) for ring in rings], height, width)
    return coco_masks.decode(coco_masks.merge(codes)).astype(bool)


def compare_boxes(found: DetectionDataset, wanted: dict[bytes, list[Found]], what: str) -> None:
    seen = 0
    for index in range(len(found)):
        pixels, objects = found.read(index)
        expected = wanted.get(pixels_of(pixels))
        assert expected is not None, f"another image of {what}: {found.name(index)}"
        seen += 1
        boxes = sorted((int(label), *map(float, box)) for label, box in zip(objects.labels, objects.boxes, strict=True))
        right = sorted((label, *box) for label, box in expected)
        assert len(boxes) == len(right), f"another number of boxes of {what}: {len(boxes)}, not {len(right)}"
        far = max((abs(a - b) for one, two in zip(boxes, right, strict=True) for a, b in zip(one, two, strict=True)),
                  default=0.0)  # fmt: skip
        assert far < 0.01, f"another box of {what}: off by {far:.3g}"
    assert seen == len(wanted), f"another number of images of {what}: {seen}, not {len(wanted)}"


def compare_instances(found: InstanceDataset, wanted: dict[bytes, list[Mask]], what: str) -> None:
    seen = 0
    for index in range(len(found)):
        pixels, masks = found.read(index)
        expected = wanted.get(pixels_of(pixels))
        assert expected is not None, f"another image of {what}: {found.name(index)}"
        seen += 1
        one = sorted(np.packbits(mask.numpy()).tobytes() for mask in masks)
        two = sorted(np.packbits(mask).tobytes() for mask in expected if mask.any())
        assert len(one) == len(two), f"another number of instances of {what}: {len(one)}, not {len(two)}"
        assert one == two, f"another mask of {what}: {sum(a != b for a, b in zip(one, two, strict=True))} of {len(one)}"
    assert seen == len(wanted), f"another number of images of {what}: {seen}, not {len(wanted)}"


@dataclass(frozen=True)
class Yolo:
    """Label files: what they hold, and for each sample the boxes and the masks."""

    samples: list[Sample]
    lines: list[list[str]]
    boxes: list[list[Found]]
    masks: list[list[Mask]]


def yolo(rng: random.Random, num_classes: int) -> Yolo:
    samples = [a_sample(rng, least=12) for _ in range(rng.choice((1, 2, 3)))]
    lines: list[list[str]] = []
    boxes: list[list[Found]] = []
    masks: list[list[Mask]] = []
    for sample in samples:
        lines.append([])
        boxes.append([])
        masks.append([])
        for _ in range(rng.choice((1, 1, 2, 3))):
            label = rng.randrange(num_classes)
            if rng.random() < 0.5:
                left, top, width, height = a_box(rng)
                x, y = round(left + width / 2, 6), round(top + height / 2, 6)
                ring = [x - width / 2, y - height / 2, x + width / 2, y - height / 2, x + width / 2, y + height / 2,
                        x - width / 2, y + height / 2]  # fmt: skip
                values = [x, y, width, height]
            else:
                values = ring = a_ring(rng)
                if rng.random() < 0.1 and all(
                    0 < value < 1 for value in ring
                ):  # what rounding of tools leaves beyond the border
                    position = rng.randrange(len(ring))
                    ring[position] = 1.00003 if ring[position] > 0.5 else -0.00002
            scale = (sample.width, sample.height)
            inside = [min(max(value, 0), 1) * scale[place % 2] for place, value in enumerate(ring)]
            box = (min(inside[::2]), min(inside[1::2]), max(inside[::2]), max(inside[1::2]))
            lines[-1].append(" ".join(map(str, (label, *values))) + rng.choice(("", "", " ", "\t")))
            if box[0] < box[2] and box[1] < box[3]:
                boxes[-1].append((label, box))
            masks[-1].append(filled([inside], sample.height, sample.width))
    return Yolo(samples, lines, boxes, masks)


def yolo_layout(rng: random.Random, root: Path, found: Yolo, names: list[str]) -> tuple[Path, str]:
    """Write a data set in one of the layouts of the tools; return its YAML and the layout."""
    layout = rng.choice(("ultralytics", "ultralytics", "roboflow", "roboflow up", "lists", "list of folders", "flat"))
    images = {
        "ultralytics": "images/train", "roboflow": "train/images", "roboflow up": "train/images",
        "lists": "images/train", "list of folders": "images/train", "flat": "images",
    }[layout]  # fmt: skip
    paths = []
    for number, (sample, lines) in enumerate(zip(found.samples, found.lines, strict=True)):
        place = images + (f"{number % 2}" if layout == "list of folders" else "")
        stem = rng.choice((f"{number}", f"a b {number}", f"ü{number}.rf.0a1b"))
        paths.append(f"{place}/{stem}.png")
        write(root / paths[-1], sample.content)
        write(root / place.replace("images", "labels") / f"{stem}.txt", text(rng, lines))
    entry: Any = images
    if layout == "roboflow up":
        entry = "../train/images"
    elif layout == "lists":
        entry = "train.txt"
        start = rng.choice(("", "./"))
        write(root / "train.txt", text(rng, [start + path for path in paths]))
    elif layout == "list of folders":
        entry = sorted({str(Path(path).parent) for path in paths})
    if rng.random() < 0.15 and isinstance(entry, str) and layout != "lists":
        entry, layout = entry.replace("/", "\\"), f"{layout}, backslashes"
    classes: Any = names if rng.random() < 0.5 else dict(enumerate(names))
    described = {"train": entry, "val": entry, "names": classes}
    if rng.random() < 0.5:
        described["nc"] = len(names)
    if rng.random() < 0.4 and layout != "roboflow up":
        described["path"] = rng.choice((".", str(root), "./"))
    import yaml

    write(root / "data.yaml", text(rng, yaml.safe_dump(described, allow_unicode=True).splitlines()))
    return root / "data.yaml", layout


def yolo_data(rng: random.Random, folder: Path) -> None:
    names = rng.sample(CLASSES, rng.choice((1, 2, 3)))
    names = [name for name in names if not name.isdigit()] or ["cat"]
    found, root = yolo(rng, len(names)), folder / "data"
    path, layout = yolo_layout(rng, root, found, names)
    detail = f"in the layout {layout}"
    split = rng.choice(("train", "val"))
    if rng.random() < 0.5:
        wanted = {key(sample): boxes for sample, boxes in zip(found.samples, found.boxes, strict=True)}
        verdict = VALID if any(found.boxes) else OPEN

        def compare(data: DetectionDataset) -> None:
            assert data.class_names == tuple(names), f"other classes of YOLO: {data.class_names}"
            compare_boxes(data, wanted, "YOLO's files")

        check(verdict, "YOLO's boxes", lambda: DetectionDataset.open(path, split), compare, detail=detail)
        return
    masks = {key(sample): each for sample, each in zip(found.samples, found.masks, strict=True)}
    check(
        VALID, "YOLO's outlines", lambda: InstanceDataset.open(path, split),
        lambda data: compare_instances(data, masks, "YOLO's files"), detail=detail,
    )  # fmt: skip


BAD_LINES = (
    "0 0.5 0.5 0.2", "x 0.5 0.5 0.2 0.2", "0 nan 0.5 0.2 0.2", "0 0.5 0.5 inf 0.2", "9 0.5 0.5 0.2 0.2",
    "-1 0.5 0.5 0.2 0.2", "0 300 200 50 40", "0.5 0.5 0.5 0.2 0.2", "0 0.1 0.1 0.5 0.5 0.9", "0,0.5,0.5,0.2,0.2",
    "0 1.2 0.5 0.5 0.5", "0 0.1 0.1 2.5 0.5 0.5 0.9",
)  # fmt: skip


def bad_yolo(rng: random.Random, folder: Path) -> None:
    """A line that is no label: the error names the file and the line."""
    found, root = yolo(rng, 2), folder / "data"
    line = rng.choice(BAD_LINES)
    position = rng.randrange(len(found.lines[0]) + 1)
    found.lines[0].insert(position, line)
    write(root / "images" / "bad.png", found.samples[0].content)
    write(root / "labels" / "bad.txt", "\n".join(found.lines[0]))
    write(root / "data.yaml", "{train: images, names: [a, b]}")

    def read() -> Any:
        data: Any = rng.choice((DetectionDataset, InstanceDataset)).open(root / "data.yaml", "train")
        return [data.read(index) for index in range(len(data))]

    if line.startswith("9"):  # classes are not read with instances
        check(INVALID, "a bad line of YOLO", lambda: DetectionDataset.open(root / "data.yaml"), lambda _: None,
              f"bad.txt:{position + 1}", line)  # fmt: skip
        return
    check(INVALID, "a bad line of YOLO", read, lambda _: None, f"bad.txt:{position + 1}", line)


@dataclass
class Coco:
    """A COCO file and what it says."""

    content: dict[str, Any]
    samples: list[Sample]
    boxes: list[list[Found]]
    masks: list[list[Mask]]
    names: list[str]


def coco(rng: random.Random, folder: Path) -> Coco:
    """Write images and return their annotations."""
    names = rng.sample(CLASSES, rng.choice((1, 2, 3)))
    ids = sorted(rng.sample(range(0, 91), len(names)))
    samples, images, annotations = [], [], []
    boxes: list[list[Found]] = []
    masks: list[list[Mask]] = []
    for number in range(rng.choice((1, 2, 3))):
        sample = a_sample(rng, least=12)
        name = rng.choice((f"{number}.png", f"ü {number}.png", f"sub/{number}.png"))
        if number == 1 and rng.random() < 0.4:  # one stem, two suffixes
            name = str(Path(images[0]["file_name"]).with_suffix(".bmp"))
            sample = Sample(encoded(Image.fromarray(sample.pixels), "bmp", 1), sample.pixels, "bmp")
        write(folder / name, sample.content)
        samples.append(sample)
        images.append({"id": number + 10, "file_name": name, "width": sample.width, "height": sample.height})
        boxes.append([])
        masks.append([])
        for _ in range(rng.choice((1, 1, 2, 3))):
            label, crowd = rng.randrange(len(names)), int(rng.random() < 0.1)
            stored, mask = a_segmentation(rng, sample)
            left, top, width, height = a_box(rng)
            box = [left * sample.width, top * sample.height, width * sample.width, height * sample.height]
            annotations.append({
                "id": len(annotations) + 1, "image_id": number + 10, "category_id": ids[label], "bbox": box,
                "area": float(mask.sum()), "segmentation": stored, "iscrowd": crowd,
            })  # fmt: skip
            boxes[-1].append((label, (box[0], box[1], box[0] + box[2], box[1] + box[3])))
            if not crowd:
                masks[-1].append(mask)
    categories = [{"id": number, "name": name} for number, name in zip(ids, names, strict=True)]
    rng.shuffle(categories)
    rng.shuffle(annotations)
    return Coco({"images": images, "annotations": annotations, "categories": categories}, samples, boxes, masks, names)


def a_segmentation(rng: random.Random, sample: Sample) -> tuple[Any, Mask]:
    """Return polygons or run lengths, and pycocotools' mask of them."""
    height, width = sample.height, sample.width
    if rng.random() < 0.6:
        rings = []
        for _ in range(rng.choice((1, 1, 2))):
            ring = a_ring(rng)
            rings.append([round(value * (width, height)[place % 2], 2) for place, value in enumerate(ring)])
        return rings, filled(rings, height, width)
    mask = np.random.default_rng(rng.getrandbits(32)).random((height, width)) < rng.choice((0.1, 0.5, 0.9))
    code = coco_masks.encode(np.asfortranarray(mask.astype(np.uint8)))
    if rng.random() < 0.5:
        return {"size": [height, width], "counts": code["counts"].decode()}, mask
    flat, counts, last = mask.T.reshape(-1), [], False
    start = 0
    for position, value in enumerate(flat):
        if value != last:
            counts.append(position - start)
            start, last = position, bool(value)
    return {"size": [height, width], "counts": [*counts, len(flat) - start]}, mask


def coco_data(rng: random.Random, folder: Path) -> None:
    found = coco(rng, folder / "images")
    path = folder / "images" / rng.choice(("coco.json", "_annotations.coco.json"))
    content = json.dumps(found.content, ensure_ascii=rng.random() < 0.5)
    write(path, (b"\xef\xbb\xbf" if rng.random() < 0.1 else b"") + content.encode())
    if rng.random() < 0.5:
        wanted = {key(sample): boxes for sample, boxes in zip(found.samples, found.boxes, strict=True)}

        def compare(data: DetectionDataset) -> None:
            assert data.class_names == tuple(found.names), f"other classes of COCO: {data.class_names}"
            compare_boxes(data, wanted, "a COCO file")

        check(VALID, "COCO's boxes", lambda: DetectionDataset.open(path), compare)
        return
    masks = {key(sample): each for sample, each in zip(found.samples, found.masks, strict=True)}
    check(
        VALID, "COCO's masks", lambda: InstanceDataset.open(path.parent, instances=path),
        lambda data: compare_instances(data, masks, "a COCO file"),
    )  # fmt: skip


def bad_coco(rng: random.Random, folder: Path) -> None:
    """A COCO file that contradicts its images or itself."""
    found = coco(rng, folder / "images")
    image = found.content["images"][0]
    each = next(each for each in found.content["annotations"] if each["image_id"] == image["id"])
    each["iscrowd"] = 0
    kind = rng.choice(("size", "turned", "NaN corner", "no segmentation", "odd ring", "RLE of another size", "image_id",
                       "long RLE"))  # fmt: skip
    if kind == "size":
        image["width"], image["height"] = 2 * image["width"], 2 * image["height"]
    elif kind == "turned":
        if image["width"] == image["height"]:
            image["width"] += 1
        image["width"], image["height"] = image["height"], image["width"]
    elif kind == "NaN corner":
        each["segmentation"] = [[1, 1, 5, float("nan"), 5, 5]]
    elif kind == "no segmentation":
        each["segmentation"] = rng.choice(([], [[]]))
    elif kind == "odd ring":
        each["segmentation"] = [[1, 1, 5, 1, 5, 5, 1]]
    elif kind == "RLE of another size":
        each["segmentation"] = {"size": [image["width"] + 3, image["height"]], "counts": [0, 5]}
    elif kind == "long RLE":
        each["segmentation"] = {"size": [image["height"], image["width"]], "counts": [0, 10**6]}
    else:
        each["image_id"] = 99999
    path = folder / "images" / "coco.json"
    write(path, json.dumps(found.content))
    boxes = kind in ("size", "turned", "image_id") and rng.random() < 0.5

    def read() -> Any:
        data: Any
        data = DetectionDataset.open(path) if boxes else InstanceDataset.open(path.parent, instances=path)
        return [data.read(index) for index in range(len(data))]

    naming = (path.name,) if kind == "image_id" else (Path(image["file_name"]).name, *[path.name] * boxes)
    check(INVALID, f"a COCO file, {kind}", read, lambda _: None, naming, "boxes" if boxes else "masks")


def box_rings(rng: random.Random, folder: Path) -> None:
    """Rings of two corners: the filled box, or an error."""
    sample = a_sample(rng, least=12)
    write(folder / "images" / "a.png", sample.content)
    ring = [2, 3, sample.width - 2, sample.height - 3]
    image = {"id": 1, "file_name": "a.png", "width": sample.width, "height": sample.height}
    each = {
        "id": 1,
        "image_id": 1,
        "category_id": 1,
        "bbox": [2, 3, 4, 4],
        "area": 9,
        "segmentation": [ring],
        "iscrowd": 0,
    }
    path = folder / "images" / "coco.json"
    write(path, json.dumps({"images": [image], "annotations": [each], "categories": [{"id": 1, "name": "a"}]}))
    mask = np.zeros((sample.height, sample.width), bool)
    mask[3 : sample.height - 3, 2 : sample.width - 2] = True

    def read() -> Any:
        data = InstanceDataset.open(path.parent, instances=path)
        data.read(0)
        return data

    check(
        OPEN, "a ring of two corners", read, lambda data: compare_instances(data, {key(sample): [mask]}, "two corners")
    )


def voc_data(rng: random.Random, folder: Path) -> None:
    root, names = folder / "VOC", sorted(rng.sample(("cat", "dog", "person", "tv monitor"), 2))
    wanted: dict[bytes, list[Found]] = {}
    stems = []
    for number in range(rng.choice((1, 2))):
        sample = a_sample(rng, turned=False, least=12)
        stem = f"2007_{number:06}"
        stems.append(stem)
        objects, found = "", []
        for label, name in enumerate(names):
            left, top = rng.randrange(1, 5), rng.randrange(1, 5)
            right, bottom = rng.randrange(left, sample.width + 1), rng.randrange(top, sample.height + 1)
            found.append((label, (left - 1.0, top - 1.0, float(right), float(bottom))))
            objects += (
                f"<object><name>{name}</name><bndbox><xmin>{left}</xmin><ymin>{top}</ymin><xmax>{right}</xmax>"
                f"<ymax>{bottom}</ymax></bndbox></object>"
            )
        size = f"<size><width>{sample.width}</width><height>{sample.height}</height><depth>3</depth></size>"
        write(root / "JPEGImages" / f"{stem}.png", sample.content)
        write(root / "Annotations" / f"{stem}.xml", f"<annotation>{size}{objects}</annotation>")
        wanted[key(sample)] = found
    write(root / "ImageSets" / "Main" / "train.txt", text(rng, stems))
    check(
        VALID, "VOC's boxes", lambda: DetectionDataset.open(root, "train"),
        lambda data: compare_boxes(data, wanted, "a VOC folder"),
    )  # fmt: skip


# --- Masks ----------------------------------------------------------------------------------------------------------


def blocks(rng: random.Random, sample: Sample, ids: Sequence[int], dtype: Any) -> NDArray[Any]:
    """Return a map in which each id occurs."""
    generator = np.random.default_rng(rng.getrandbits(32))
    levels = generator.choice(np.array(ids), (sample.height, sample.width))
    levels.flat[: len(ids)] = ids
    return levels.astype(dtype)


def mask_layout(rng: random.Random, root: Path, split: str, named: dict[str, tuple[Sample, bytes]]) -> str:
    layout = rng.choice(("{kind}", "{kind}/{split}", "{split}/{kind}"))
    for stem, (sample, mask) in named.items():
        write(root / layout.format(kind="images", split=split) / f"{stem}.png", sample.content)
        write(root / layout.format(kind="masks", split=split) / f"{stem}.png", mask)
    return layout


def instance_masks(rng: random.Random, folder: Path) -> None:
    """An id per pixel: each but 0 is an instance."""
    kind = rng.choice(("8 bits", "8 bits with 255", "16 bits", "16 bits with 255", "0 and 255", "palette"))
    wanted: dict[bytes, list[Mask]] = {}
    named = {}
    for number in range(rng.choice((1, 2))):
        sample = a_sample(rng, turned=False)
        ids = {
            "8 bits": [0, 1, 2, 7], "8 bits with 255": [0, 1, 2, 255], "16 bits": [0, 1, 300, 65535],
            "16 bits with 255": [0, 254, 255, 256, 300], "0 and 255": [0, 255], "palette": [0, 1, 2],
        }[kind]  # fmt: skip
        levels = blocks(rng, sample, ids, np.uint16 if "16" in kind else np.uint8)
        content = png(levels)
        if kind == "palette":
            image = Image.fromarray(levels)
            image.putpalette([index % 256 for index in range(768)])
            file = io.BytesIO()
            image.save(file, "PNG")
            content = file.getvalue()
        objects = [each for each in ids if each]
        wanted[key(sample)] = [levels == each for each in objects]
        named[f"{number}"] = (sample, content)
    mask_layout(rng, folder / "data", "train", named)

    def read() -> InstanceDataset:
        data = InstanceDataset.open(folder / "data", "train")
        [data.read(index) for index in range(len(data))]
        return data

    check(VALID, f"masks of {kind}", read, lambda data: compare_instances(data, wanted, f"masks of {kind}"))


def object_masks(rng: random.Random, folder: Path) -> None:
    """One folder per image, one file per object, as in the Data Science Bowl 2018."""
    wanted = {}
    for number in range(rng.choice((1, 2))):
        sample = a_sample(rng, turned=False)
        place = folder / "data" / f"sample{number}"
        write(place / "images" / f"{number}.png", sample.content)
        masks = []
        for one in range(rng.choice((1, 2, 3))):
            mask = blocks(rng, sample, (0, 255), np.uint8)
            write(place / "masks" / f"{one}.png", png(mask))
            masks.append(mask > 0)
        wanted[key(sample)] = masks
    check(
        VALID, "masks of one object each", lambda: InstanceDataset.open(folder / "data"),
        lambda data: compare_instances(data, wanted, "masks of one object each"),
    )  # fmt: skip


def class_masks(rng: random.Random, folder: Path) -> None:
    """An id per pixel for classes."""
    kind = rng.choice(("named", "named", "unnamed", "0 and 255", "another size", "unknown id", "16 bits"))
    names = ["sky", "road", "car", "tree"][: rng.choice((2, 3, 4))]
    ids = list(range(len(names)))
    present = {"0 and 255": [0, 255], "unknown id": [*ids, 77], "16 bits": ids}.get(kind, [*ids, 255])
    named, wanted = {}, {}
    for number in range(rng.choice((1, 2))):
        sample = a_sample(rng, turned=False)
        levels = blocks(rng, sample, present, np.uint16 if kind == "16 bits" else np.uint8)
        named[f"m{number}"] = (sample, png(levels[:-1] if kind == "another size" else levels))
        wanted[key(sample)] = np.where(levels == 255, 1 if kind == "0 and 255" else -100, levels.astype(np.int64))
    root = folder / "data"
    mask_layout(rng, root, "train", named)
    if kind not in ("unnamed", "0 and 255"):
        write(root / "classes.txt", text(rng, names))
    invalid = kind in ("another size", "unknown id")

    def read() -> list[Any]:
        data = SegmentationDataset.open(root, "train")
        found = [data.read(index) for index in range(len(data))]
        if kind not in ("unnamed", "0 and 255"):
            assert data.class_names == tuple(names), f"other classes of masks: {data.class_names}, not {names}"
        return found

    def compare(found: list[Any]) -> None:
        assert len(found) == len(wanted), f"another number of masks: {len(found)}"
        for pixels, mask in found:
            right = wanted[pixels_of(pixels)]
            off = int((mask.numpy() != right).sum())
            assert off == 0, f"another class map, {kind}: {off} of {right.size} pixels"

    check(
        INVALID if invalid else VALID,
        f"class masks, {kind}",
        read,
        compare,
        "m0" if invalid and len(named) == 1 else "",
    )


KINDS: tuple[tuple[int, Callable[[random.Random, Path], None]], ...] = (
    (4, labeled_folders), (1, split_folders), (2, labeled_tar), (1, tars_of_classes), (2, parquet), (2, other_order),
    (1, broken_image), (5, yolo_data), (2, bad_yolo), (5, coco_data), (3, bad_coco), (1, box_rings), (1, voc_data),
    (3, instance_masks), (1, object_masks), (3, class_masks),
)  # fmt: skip


def known_data(rng: random.Random, folder: Path) -> None:
    kind = rng.choices([each for _, each in KINDS], [weight for weight, _ in KINDS])[0]
    kind(rng, folder)


TARGETS = (Target("data sets with known samples", known_data, num_cases=200),)
