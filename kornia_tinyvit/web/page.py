"""Layout and server of the web demo, with gradio."""

from __future__ import annotations

import functools
import html
import os
import signal
import socket
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from kornia_tinyvit.checkpoints import CheckpointError
from kornia_tinyvit.classification import ImageClassifier
from kornia_tinyvit.extras import MissingExtraError
from kornia_tinyvit.sam import MobileSAM
from kornia_tinyvit.web import views
from kornia_tinyvit.web.views import AugmentationParams, Photo, UserPrompts

try:
    import gradio as gr
except ImportError as error:
    raise MissingExtraError("The web demo needs gradio: pip install 'kornia-tinyvit[demo]'.") from error

__all__ = ["build_page", "serve"]

#: How a tab is updated for a photo: a function of the photo and further inputs, these inputs, and its outputs.
Tab = tuple[Callable[..., Any], list[Any], list[Any]]

#: Minimum, maximum and step of each slider.
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
ON, OFF, BOX = "on the object", "off the object", "corner of a box"

WAITING = 32  # maximum length of the request queue
SESSIONS = 200  # sessions whose state is kept, some 8 MB each
KEPT_SECONDS = 3600  # before uploaded and generated files are deleted

# Options of events; none is part of the public API. MobileSAM has a concurrency of 1: the first event loads it, and the
# first event per photo computes the image embedding.
QUIET: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
TINYVIT: dict[str, Any] = QUIET | {"concurrency_limit": 2, "concurrency_id": "tinyvit"}
SAM: dict[str, Any] = {"api_visibility": "private", "concurrency_limit": 1, "concurrency_id": "sam"}

INTRODUCTION = f"""# kornia-tinyvit
Drop a photo, or choose an example. It stays on the machine that runs this page. Photos may have up to
{views.MAX_BYTES >> 20} MB and {views.MAX_PIXELS // 1_000_000} million pixels."""
ON_SALIENCY = "Bright pixels change the score of the first label most."
ON_AUGMENTATION = "kornia's augmentations in the order of the sliders. The bars compare the scores before and after."
ON_PROMPTS = (
    "Click points on an object, or two opposite corners of a box around it; points off the object exclude parts. The "
    "first click loads the weights and computes the image embedding, which takes a moment."
)
ON_FEATURES = (
    "Feature maps of the four stages. Red, green and blue are the first three principal components of the channels: "
    "cells of similar color have similar features."
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
    """Build the web demo.

    Photos and prompts are stored in gradio's session state, not in the page.

    Args:
        classifier: the classifier, in evaluation mode.
        sam: ``"mobile_sam"``, or a path or URL of a whole MobileSAM; loaded on first use.
        device: device of MobileSAM.
        examples: at least one example photo; the first is open at the start.

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
        # preprocess=False: gradio would decode images of any size and show its own errors.
        # always_last: by default gradio drops a photo that is uploaded while another one is processed.
        opened = gr.on(
            [page.load, file.change], _open, file, [file, photo], preprocess=False, trigger_mode="always_last", **QUIET
        )
        for function, inputs, outputs in (classify, change, mark, look):
            opened.then(_with_errors(function), [photo, *inputs], outputs, trigger_mode="always_last", **TINYVIT)
    return page.queue(max_size=WAITING)


def serve(classifier: ImageClassifier, sam: str, device: str, examples: Sequence[Path], host: str, port: int) -> None:
    """Serve the web demo until the process is interrupted; uploads are stored in a temporary folder.

    Args:
        classifier, sam, device, examples: as in :func:`build_page`.
        host: name or address of an interface of this machine.
        port: the port; 0 for any free port.

    Raises:
        OSError: if the port is not available.
    """
    port = _free_port(host, port)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # to remove the folder on SIGTERM, too
    for name in ("no_proxy", "NO_PROXY"):  # gradio requests its own address at the start
        os.environ[name] = ",".join([*filter(None, [os.environ.get(name)]), "localhost", host])
    with tempfile.TemporaryDirectory(prefix="kornia-tinyvit-") as folder:
        os.environ["GRADIO_TEMP_DIR"] = folder  # the default is shared by all users of the machine
        # launch() rather than mounting into another server: otherwise gradio does not check paths in requests.
        page = build_page(classifier, sam, device, examples)
        _, address, _ = page.launch(
            server_name=f"[{host}]" if ":" in host else host,
            server_port=port,
            share=False,
            quiet=True,
            show_error=True,
            prevent_thread_lock=True,
            max_file_size=views.MAX_BYTES,
            state_session_capacity=SESSIONS,
            enable_monitoring=False,
            run_history=False,  # it would store photos in the browser
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
        raise OSError(f"Port {port} of {host} cannot be used ({error}). Choose another --port, or 0.") from error


@functools.cache  # errors are not cached: a failed download is retried
def _load_sam(source: str, device: str) -> MobileSAM:
    try:
        return MobileSAM.from_config(pretrained=source).to(device).eval()
    except CheckpointError as error:
        raise CheckpointError(f"{error} On the command line: --sam-weights FILE.") from error


def _with_errors(function: Callable[..., Any]) -> Callable[..., Any]:
    """Show the errors of a function in the page."""

    @functools.wraps(function)
    def wrapper(*args: Any) -> Any:
        try:
            return function(*args)
        except (ValueError, TypeError, OSError) as error:
            raise gr.Error(_message(error), print_exception=False) from error

    return wrapper


def _message(error: Exception) -> str:
    return html.escape(" ".join(str(error).split()))  # gradio renders HTML, and file names are arbitrary


def _open(file: dict[str, Any] | None) -> tuple[Any, Photo | None]:
    """Return the update of the upload component and the photo, both ``None`` if it cannot be read."""
    try:
        return gr.skip(), None if file is None else views.open_photo(file["path"])
    except (ValueError, OSError) as error:
        gr.Warning(_message(error))
        return None, None


def _output_image(label: str | None, about: str, **options: Any) -> gr.Image:
    """Return a component for a computed image, without the button that shares images publicly."""
    buttons: list[Any] = ["download", "fullscreen"]
    return gr.Image(label=label, alt_text=about, interactive=False, buttons=buttons, **options)


def _classify_tab(classifier: ImageClassifier) -> Tab:
    with gr.Row():
        labels = gr.Label(label="labels", min_width=260, elem_id="labels")
        heat = _output_image("saliency", "saliency map of the photo", min_width=260, elem_id="saliency")
    gr.Markdown(ON_SALIENCY)

    def show(photo: Photo | None) -> tuple[dict[str, float] | None, Image.Image | None]:
        return (None, None) if photo is None else views.explain(classifier, photo)

    return show, [], [labels, heat]


def _augment_tab(classifier: ImageClassifier, photo: gr.State) -> Tab:
    with gr.Row():
        with gr.Column(min_width=260):
            image = _output_image("changed", "the changed photo", elem_id="changed")
            table = gr.HTML(elem_id="scores")
        with gr.Column(min_width=260):
            sliders = [
                gr.Slider(low, high, getattr(AugmentationParams, name), step=step, label=name)
                for name, (low, high, step) in SLIDERS.items()
            ]
            reset = gr.Button("Reset", size="sm")
    gr.Markdown(ON_AUGMENTATION)

    def show(photo: Photo | None, *values: float) -> tuple[Image.Image | None, str]:
        if photo is None:
            return None, ""
        changed, rows = views.compare(classifier, photo, AugmentationParams(**dict(zip(SLIDERS, values, strict=True))))
        return changed, score_table(rows)

    moved = [slider.change for slider in sliders]
    gr.on(moved, _with_errors(show), [photo, *sliders], [image, table], trigger_mode="always_last", **TINYVIT)
    reset.click(lambda: [getattr(AugmentationParams, name) for name in SLIDERS], None, sliders, **QUIET)
    return show, sliders, [image, table]


def score_table(rows: Sequence[views.Row]) -> str:
    """Return scores before and after augmentation as an HTML table with bars."""
    lines = [
        f"<tr><td>{html.escape(label)}</td>"
        f'<td><div class="bar before" style="width: {before:.1%}"></div>'
        f'<div class="bar after" style="width: {after:.1%}"></div></td>'
        f'<td class="number">{before:.1%}</td><td class="number">{after:.1%}</td></tr>'
        for label, before, after in rows
    ]
    heads = '<th>label</th><th></th><th class="number">before</th><th class="number">after</th>'
    return f'<table class="scores"><thead><tr>{heads}</tr></thead><tbody>{"".join(lines)}</tbody></table>'


def _segment_tab(load_sam: Callable[[], MobileSAM], photo: gr.State) -> Tab:
    prompts = gr.State(UserPrompts())
    kind = gr.Radio([ON, OFF, BOX], value=ON, label="a click marks", elem_id="kind")
    image = _output_image("masks", "the photo with what was found", elem_id="masks")
    status = gr.Markdown(ON_PROMPTS, elem_id="status")
    clear = gr.Button("Clear", size="sm")
    with gr.Row(equal_height=True):
        side = gr.Radio([8, 16, 32], value=16, label="points of the grid, along a side", scale=2, min_width=220)
        everything = gr.Button("Everything", variant="primary", scale=1, min_width=120, elem_id="everything")

    def show(photo: Photo | None) -> tuple[Image.Image | None, UserPrompts, str]:
        return None if photo is None else photo.image, UserPrompts(), ON_PROMPTS

    def click(
        photo: Photo, prompts: UserPrompts, kind: str, event: gr.SelectData
    ) -> tuple[Image.Image, UserPrompts, str]:
        x, y = event.index
        prompts = prompts.add_corner(x, y) if kind == BOX else prompts.add_point(x, y, kind == ON)
        if prompts.corner is not None:
            return views.draw_prompts(photo, prompts), prompts, "Now click the opposite corner of the box."
        if not prompts.ready:
            return views.draw_prompts(photo, prompts), prompts, "Mark a point on the object, too."
        result, message = views.segment_prompts(load_sam(), photo, prompts)
        return result, prompts, message

    def find(photo: Photo | None, side: int) -> tuple[Image.Image, UserPrompts, str]:
        if photo is None:
            raise ValueError("There is no photo: drop one first, or choose an example.")
        result, message = views.segment_everything(load_sam(), photo, side)
        return result, UserPrompts(), message

    outputs = [image, prompts, status]
    image.select(_with_errors(click), [photo, prompts, kind], outputs, **SAM)
    everything.click(_with_errors(find), [photo, side], outputs, **SAM)
    clear.click(show, photo, outputs, **QUIET)
    return show, [], outputs


def _features_tab(classifier: ImageClassifier) -> Tab:
    gr.Markdown(ON_FEATURES)
    tiles = []
    for _ in range(2):
        with gr.Row():
            tiles += [_output_image(None, "features", min_width=260, elem_classes="stage") for _ in "lr"]

    def show(photo: Photo | None) -> list[Any]:
        drawn = [(None, "stage")] * 4 if photo is None else views.show_features(classifier, photo)
        return [gr.update(value=image, label=about) for image, about in drawn]

    return show, [], tiles
