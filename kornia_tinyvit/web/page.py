"""How the page lies on the screen, and the server behind it; made with gradio."""

from __future__ import annotations

import functools
import html
import os
import signal
import socket
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from PIL import Image

from kornia_tinyvit.checkpoints import CheckpointError
from kornia_tinyvit.classification import ImageClassifier
from kornia_tinyvit.extras import MissingExtraError
from kornia_tinyvit.sam import MobileSAM
from kornia_tinyvit.web import views
from kornia_tinyvit.web.views import MAX_BYTES, MAX_PIXELS, AugmentationParams, Photo, Row, UserPrompts

try:
    import gradio as gr
except ImportError as error:
    raise MissingExtraError("The page needs gradio: pip install 'kornia-tinyvit[demo]'.") from error

__all__ = ["build_page", "serve"]

Result = TypeVar("Result")
#: What fills a tab for a photo: a function of the photo and other inputs, those inputs, and where its results go.
Tab = tuple[Callable[..., Any], list[Any], list[Any]]

#: Lowest and highest value and step of the slider of each change.
SLIDERS = {
    "brightness": (0.2, 1.8, 0.02),
    "contrast": (0.0, 3.0, 0.05),
    "saturation": (0.0, 3.0, 0.05),
    "hue": (-0.5, 0.5, 0.01),
    "rotation": (-180.0, 180.0, 1.0),
    "perspective": (-0.9, 0.9, 0.02),
    "blur": (0.0, 12.0, 0.25),
    "noise": (0.0, 0.5, 0.01),
}
BUTTONS: list[Any] = ["download", "fullscreen"]  # without the one that shares images with a public site
ON, OFF, BOX = "on the object", "off the object", "corner of a box"

WAITING = 32  # visitors' requests that wait for their turn; more are refused
SESSIONS = 200  # visitors whose photos are kept, some 8 MB each
KEPT_SECONDS = 3600  # how long files that were brought or made are kept

# How events run. None is offered to other programs. MobileSAM runs once at a time: it is loaded, and a photo embedded,
# by the first event that needs it.
QUIET: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
TINYVIT: dict[str, Any] = QUIET | {"concurrency_limit": 2, "concurrency_id": "tinyvit"}
SAM: dict[str, Any] = {"api_visibility": "private", "concurrency_limit": 1, "concurrency_id": "sam"}

INTRODUCTION = f"""# kornia-tinyvit
Drop a photo, or take one of the examples. It stays on the machine that runs this page. Photos may have up to
{MAX_BYTES >> 20} MB and {MAX_PIXELS // 1_000_000} million pixels."""
ON_SALIENCY = "Bright is where a change of a pixel moves the best label most."
ON_CHANGES = (
    "kornia's augmentations in the order of the sliders. The bars compare the photo as it is with the changed one."
)
ON_MARKS = (
    "Click points on an object, or two opposite corners of a box around it; points off the object take something "
    "away. The first click loads the weights and looks at the photo, which takes a moment."
)
ON_FEATURES = (
    "What the four stages hold, from fine to coarse: the three strongest principal components of the channels as "
    "red, green and blue. Cells of like color look alike to the network."
)
STYLE = """
table.scores { width: 100%; border-collapse: collapse; border: none !important; }
.scores th { font-weight: normal; text-align: left; color: var(--body-text-color-subdued); }
.scores tr { border: none; }
.scores td, .scores th { padding: 4px 6px; border: none; }
.scores td:first-child { white-space: nowrap; }
.scores td:nth-child(2) { width: 99%; }
.scores .number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
.scores .bar { height: 7px; border-radius: 2px; margin: 2px 0; min-width: 1px; }
.scores .before { background: var(--neutral-400); }
.scores .after { background: var(--primary-500); }
@media (max-width: 600px) { .tab-container button { padding: 0 6px; } }
"""


def build_page(classifier: ImageClassifier, sam: str, device: str, examples: Sequence[Path]) -> gr.Blocks:
    """Lay out the page.

    Nothing that belongs to a visitor is kept in the page: photos and marks are in gradio's state of their session.

    Args:
        classifier: the network that labels, in evaluation mode.
        sam: ``"mobile_sam"``, or a file or address of a whole MobileSAM; loaded when it is needed first.
        device: where MobileSAM runs.
        examples: photos to offer, one at least; the first one is open at the start.

    Returns:
        The page.
    """
    with gr.Blocks(title="kornia-tinyvit", analytics_enabled=False, delete_cache=(600, KEPT_SECONDS)) as page:
        photo = gr.State()
        gr.Markdown(INTRODUCTION)
        with gr.Row():
            with gr.Column(scale=1, min_width=280):
                file = gr.Image(
                    str(examples[0]),
                    sources=["upload", "clipboard"],
                    label="photo",
                    alt_text="the photo",
                    height=300,
                    buttons=["fullscreen"],
                    elem_id="photo",
                )
                gr.Examples([[str(path)] for path in examples], file, elem_id="examples")
            with gr.Column(scale=2, min_width=300), gr.Tabs():
                with gr.Tab("Classify"):
                    classify = _classify_tab(classifier)
                with gr.Tab("Augment"):
                    change = _augment_tab(classifier, photo)
                with gr.Tab("Segment"):
                    mark = _segment_tab(functools.partial(_load_sam, sam, device), photo)
                with gr.Tab("Features"):
                    look = _features_tab(classifier)
        # Not preprocessed: gradio would decode whatever comes, however large, and speak of its own failures.
        # A photo that comes while another is being opened or shown waits for its turn; gradio would forget it.
        opened = gr.on(
            [page.load, file.change], _open, file, [file, photo], preprocess=False, trigger_mode="always_last", **QUIET
        )
        for function, inputs, outputs in (classify, change, mark, look):
            opened.then(_telling(function), [photo, *inputs], outputs, trigger_mode="always_last", **TINYVIT)
    return page.queue(max_size=WAITING)


def serve(classifier: ImageClassifier, sam: str, device: str, examples: Sequence[Path], host: str, port: int) -> None:
    """Serve the page until the process is interrupted; what visitors bring lies in a folder that is removed then.

    Args:
        classifier, sam, device, examples: as :func:`build_page` takes them.
        host: name or address of an interface of this machine.
        port: the port; 0 for any that is free.

    Raises:
        OSError: if the port cannot be had.
    """
    port = _free_port(host, port)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that the folder is removed then, too
    for name in ("no_proxy", "NO_PROXY"):  # gradio asks for its own address before it is content
        os.environ[name] = ",".join([*filter(None, [os.environ.get(name)]), "localhost", host])
    with tempfile.TemporaryDirectory(prefix="kornia-tinyvit-") as folder:
        os.environ["GRADIO_TEMP_DIR"] = folder  # its own place is shared by all users of the machine
        # Launched, not mounted into a server of our own: gradio checks the files of requests only in pages it launched.
        page = build_page(classifier, sam, device, examples)
        _, address, _ = page.launch(
            server_name=f"[{host}]" if ":" in host else host,
            server_port=port,
            share=False,
            inbrowser=False,
            quiet=True,
            show_error=True,
            prevent_thread_lock=True,
            max_file_size=MAX_BYTES,
            state_session_capacity=SESSIONS,
            enable_monitoring=False,
            run_history=False,  # it would keep the photos in the browser
            ssr_mode=False,
            footer_links=[],
            theme=gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]),
            css=STYLE,
        )
        print(f"The page is at {address} (stop it with Ctrl+C).", flush=True)
        page.block_thread()


def _free_port(host: str, port: int) -> int:
    try:
        with socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET) as listener:
            return listener.getsockname()[1]
    except OSError as error:
        raise OSError(
            f"Port {port} of {host} cannot be used ({error}); choose another by --port, 0 for any that is free."
        ) from error


@functools.cache  # what fails is not kept, so that a download is tried again
def _load_sam(source: str, device: str) -> MobileSAM:
    try:
        return MobileSAM.from_config(pretrained=source).to(device).eval()
    except CheckpointError as error:
        raise CheckpointError(f"{error} On the command line that is --sam FILE.") from error


def _telling(function: Callable[..., Result]) -> Callable[..., Result]:
    """Let the page show as a sentence what a visitor can mend."""

    @functools.wraps(function)
    def told(*args: Any) -> Result:
        try:
            return function(*args)
        except (ValueError, TypeError, OSError) as error:
            raise gr.Error(_sentence(error), print_exception=False) from error

    return told


def _sentence(error: Exception) -> str:
    return html.escape(" ".join(str(error).split()))  # gradio takes it for HTML, and a file's name may be anything


def _open(file: dict[str, Any] | None) -> tuple[Any, Photo | None]:
    """Return what the place for files shows from now on, and the photo; both empty if it is none."""
    try:
        return gr.skip(), None if file is None else views.open_photo(file["path"])
    except (ValueError, OSError) as error:
        gr.Warning(_sentence(error))
        return None, None


def _drawn(label: str | None, about: str, **places: Any) -> gr.Image:
    """Return a place for an image that the page draws."""
    return gr.Image(label=label, alt_text=about, interactive=False, buttons=BUTTONS, **places)


def _classify_tab(classifier: ImageClassifier) -> Tab:
    with gr.Row():
        labels = gr.Label(label="labels", min_width=260, elem_id="labels")
        heat = _drawn("saliency", "where the network looks", min_width=260, elem_id="saliency")
    gr.Markdown(ON_SALIENCY)

    def show(photo: Photo | None) -> tuple[dict[str, float] | None, Image.Image | None]:
        return (None, None) if photo is None else views.explain(classifier, photo)

    return show, [], [labels, heat]


def _augment_tab(classifier: ImageClassifier, photo: gr.State) -> Tab:
    with gr.Row():
        with gr.Column(min_width=260):
            image = _drawn("changed", "the changed photo", elem_id="changed")
            table = gr.HTML(elem_id="scores")
        with gr.Column(min_width=260):
            sliders = [
                gr.Slider(low, high, getattr(AugmentationParams, name), step=step, label=name)
                for name, (low, high, step) in SLIDERS.items()
            ]
            reset = gr.Button("Reset", size="sm")
    gr.Markdown(ON_CHANGES)

    def show(photo: Photo | None, *values: float) -> tuple[Image.Image | None, str]:
        if photo is None:
            return None, ""
        changed, rows = views.compare(classifier, photo, AugmentationParams(**dict(zip(SLIDERS, values, strict=True))))
        return changed, score_table(rows)

    moved = [slider.change for slider in sliders]
    gr.on(moved, _telling(show), [photo, *sliders], [image, table], trigger_mode="always_last", **TINYVIT)
    reset.click(lambda: [getattr(AugmentationParams, name) for name in SLIDERS], None, sliders, **QUIET)
    return show, sliders, [image, table]


def score_table(rows: Sequence[Row]) -> str:
    """Return scores before and after a change as a table of HTML with bars."""
    lines = []
    for label, before, after in rows:
        bars = "".join(
            f'<div class="bar {kind}" style="width: {score:.1%}"></div>'
            for kind, score in (("before", before), ("after", after))
        )
        numbers = "".join(f'<td class="number">{text}</td>' for text in (f"{before:.1%}", f"{after:.1%}"))
        lines.append(f"<tr><td>{html.escape(label)}</td><td>{bars}</td>{numbers}</tr>")
    heads = '<th>label</th><th></th><th class="number">before</th><th class="number">after</th>'
    return f'<table class="scores"><thead><tr>{heads}</tr></thead><tbody>{"".join(lines)}</tbody></table>'


def _segment_tab(load_sam: Callable[[], MobileSAM], photo: gr.State) -> Tab:
    marks = gr.State(UserPrompts())
    kind = gr.Radio([ON, OFF, BOX], value=ON, label="a click marks", elem_id="kind")
    image = _drawn("masks", "the photo with what was found", elem_id="masks")
    status = gr.Markdown(ON_MARKS, elem_id="told")
    clear = gr.Button("Clear", size="sm")
    with gr.Row(equal_height=True):
        side = gr.Radio([8, 16, 32], value=16, label="points of the grid, along a side", scale=2, min_width=220)
        everything = gr.Button("Everything", variant="primary", scale=1, min_width=120, elem_id="everything")

    def show(photo: Photo | None) -> tuple[Image.Image | None, UserPrompts, str]:
        return None if photo is None else photo.image, UserPrompts(), ON_MARKS

    def click(
        photo: Photo, marks: UserPrompts, kind: str, event: gr.SelectData
    ) -> tuple[Image.Image, UserPrompts, str]:
        x, y = event.index
        marks = marks.add_corner(x, y) if kind == BOX else marks.add_point(x, y, kind == ON)
        if marks.corner is not None:
            return views.draw_prompts(photo, marks), marks, "Now click the opposite corner of the box."
        if not marks.ready:
            return views.draw_prompts(photo, marks), marks, "Mark a point on the object, too."
        found, told = views.segment_prompts(load_sam(), photo, marks)
        return found, marks, told

    def find(photo: Photo | None, side: int) -> tuple[Image.Image, UserPrompts, str]:
        if photo is None:
            raise ValueError("There is no photo: drop one first, or take an example.")
        found, told = views.segment_everything(load_sam(), photo, side)
        return found, UserPrompts(), told

    outputs = [image, marks, status]
    image.select(_telling(click), [photo, marks, kind], outputs, **SAM)
    everything.click(_telling(find), [photo, side], outputs, **SAM)
    clear.click(show, photo, outputs, **QUIET)
    return show, [], outputs


def _features_tab(classifier: ImageClassifier) -> Tab:
    gr.Markdown(ON_FEATURES)
    tiles = []
    for _ in range(2):
        with gr.Row():
            tiles += [_drawn(None, "features", min_width=260, elem_classes="stage") for _ in "lr"]

    def show(photo: Photo | None) -> list[Any]:
        drawn = [(None, "stage")] * 4 if photo is None else views.show_features(classifier, photo)
        return [gr.update(value=image, label=about) for image, about in drawn]

    return show, [], tiles
