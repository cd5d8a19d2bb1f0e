"""Files that other runtimes load: ONNX, torch.export's programs and AOTInductor's packages."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

import kornia_tinyvit
from kornia_tinyvit.classification import ImageClassifier
from kornia_tinyvit.config import TinyViTConfig
from kornia_tinyvit.deploy.graph import Pixels, build_graph
from kornia_tinyvit.deploy.tracing import has_compiler, quiet, to_onnx, trace_pictures
from kornia_tinyvit.extras import MissingExtraError
from kornia_tinyvit.files import replacing
from kornia_tinyvit.layers import open_sizes_at_one
from kornia_tinyvit.model import TinyViT
from kornia_tinyvit.preprocessing import EvaluationPipeline, default_evaluation

if TYPE_CHECKING:
    import onnx

__all__ = ["ExportError", "export_onnx", "export_program"]

MIN_OPSET = 18  # the oldest that torch's exporter writes
Size = int | tuple[int, int]
Run = Callable[[Mapping[str, Tensor]], list[Tensor]]


class ExportError(RuntimeError):
    """A network cannot be exported, or what was exported does not do what the network does."""


def export_onnx(
    model: nn.Module,
    path: str | Path,
    *,
    method: str = "forward",
    pixels: Pixels | None = None,
    img_size: Size | None = None,
    dynamic_batch: bool = True,
    dynamic_size: bool = False,
    opset: int = 20,
    class_names: Sequence[str] | None = None,
    tolerance: float = 1e-4,
) -> Path:
    """Write a network to an ONNX file, folded, and compare it in ONNX Runtime with the network in PyTorch.

    The input is called ``images``; outputs are ``logits``, ``features`` (without a head, or of ``forward_features``),
    ``embedding`` (MobileSAM) or ``stage1`` to ``stage4`` (``forward_intermediates``). The file's metadata tell the
    configuration, the method, what the input has to be and the names of the classes, as JSON under keys that begin
    with ``kornia_tinyvit.``. The file is written beside its place and moved there when it has been checked.

    Args:
        model: a :class:`~kornia_tinyvit.TinyViT` or an :class:`~kornia_tinyvit.ImageClassifier`, whose graph takes raw
            photos, resizing and normalisation inside; or a module that holds a TinyViT.
        path: the file to write; its folder is made.
        method: ``"forward"``, ``"forward_features"`` or ``"forward_intermediates"``.
        pixels: what comes in: ``"normalized"``, ``"unit"`` (floats in [0, 1]) or ``"uint8"``, see
            :func:`~kornia_tinyvit.deploy.build_graph`.
        img_size: side or (height, width) of the pictures. A network's is its own resolution if left out; a
            classifier's graph then takes photos of any size.
        dynamic_batch: take any number of pictures; otherwise one.
        dynamic_size: take pictures of any size; ``img_size`` is then only an example.
        opset: version of the operators: from 20 on Gelu is one of them, from 23 on Attention.
        class_names: names of the classes to store; a classifier has its own.
        tolerance: largest difference to accept, of outputs whose values are up to 1, else in proportion.

    Returns:
        The path.

    Raises:
        ExportError: if the outputs differ, or the exporter cannot write the opset.
        ValueError: if the opset is older than 18 or newer than the installed onnx, or a setting is unknown.
        MissingExtraError: if onnx, onnxscript or onnxruntime is not installed.
    """
    check_opset(opset)
    task = _Task.of(model, method, pixels, img_size, dynamic_batch, dynamic_size, class_names)
    proto = to_onnx(task.program(), opset, outputs=task.outputs)
    path = Path(path)
    with replacing(path, path.suffix) as temporary:
        run = write_onnx(proto, temporary, opset, task.metadata())
        task.compare(lambda images: run({"images": images}), tolerance)
    return path


def export_program(
    model: nn.Module,
    path: str | Path,
    *,
    method: str = "forward",
    pixels: Pixels | None = None,
    img_size: Size | None = None,
    dynamic_batch: bool = True,
    dynamic_size: bool = False,
    compiled: bool = False,
    class_names: Sequence[str] | None = None,
    tolerance: float = 1e-4,
) -> Path:
    """Write a network as a program of torch.export, or compiled, load it again and compare it with the network.

    ``torch.export.load(path).module()`` reads a program back, ``torch._inductor.aoti_load_package(path)`` a compiled
    one, which runs without Python as well. The metadata are those of :func:`export_onnx`: a program has
    them in its extra file ``metadata.json``, a compiled one in its ``get_metadata()``.

    Args:
        model: as for :func:`export_onnx`, and so are ``method``, ``pixels``, ``img_size``, ``dynamic_batch``,
            ``dynamic_size``, ``class_names`` and ``tolerance``.
        path: the file to write, which has to end in ``.pt2``; its folder is made.
        method: see there.
        pixels: see there.
        img_size: see there.
        dynamic_batch: see there.
        dynamic_size: see there.
        compiled: compile to machine code with AOTInductor, for the machine it runs on.
        class_names: see there.
        tolerance: see there.

    Returns:
        The path.

    Raises:
        ExportError: if the outputs differ, or there is no C++ compiler to compile with.
        ValueError: if the path does not end in ``.pt2``, or a setting is unknown.
    """
    path = Path(path)
    if path.suffix != ".pt2":
        raise ValueError(f"torch reads programs from files that end in .pt2; got {path.name}.")
    if compiled and not has_compiler():
        raise ExportError("A compiled program needs a C++ compiler such as g++, or CXX set to one.")
    task = _Task.of(model, method, pixels, img_size, dynamic_batch, dynamic_size, class_names)
    metadata = task.metadata()
    with replacing(path, path.suffix) as temporary, quiet(), open_sizes_at_one(), torch.no_grad():
        program = task.program()
        if compiled:
            settings = {"aot_inductor.metadata": metadata, "freezing": True}
            torch._inductor.aoti_compile_and_package(program, package_path=str(temporary), inductor_configs=settings)
            run: Callable[[Tensor], Any] = torch._inductor.aoti_load_package(str(temporary))
        else:
            # By way of memory: on a full disk, torch's writer of files ends the process.
            archive = io.BytesIO()
            torch.export.save(program, archive, extra_files={"metadata.json": json.dumps(metadata)})
            temporary.write_bytes(archive.getbuffer())
            run = torch.export.load(temporary).module()
        task.compare(run, tolerance)
    return path


@dataclass(frozen=True)
class _Task:
    """What is exported: a graph, what goes in and what comes out."""

    graph: nn.Module
    network: TinyViT
    preprocessing: EvaluationPipeline | None
    method: str
    pixels: Pixels
    size: tuple[int, int]
    dynamic_batch: bool
    dynamic_size: bool
    class_names: tuple[str, ...] | None

    @classmethod
    def of(
        cls,
        model: nn.Module,
        method: str,
        pixels: Pixels | None,
        img_size: Size | None,
        dynamic_batch: bool,
        dynamic_size: bool,
        class_names: Sequence[str] | None,
    ) -> _Task:
        network = next((module for module in model.modules() if isinstance(module, TinyViT)), None)
        if network is None:
            raise ValueError(f"There is no TinyViT in this {type(model).__name__} to export.")
        photos, preprocessing = False, None
        if isinstance(model, ImageClassifier):
            photos, preprocessing = True, model.preprocessing
            class_names = model.class_names if class_names is None else class_names
        if class_names is not None and len(class_names) != network.config.num_classes:
            raise ValueError(f"Got {len(class_names)} class names for {network.config.num_classes} classes.")
        size = network.config.img_size if img_size is None else img_size
        return cls(
            graph=build_graph(model, method, pixels).eval(),
            network=network,
            preprocessing=preprocessing if isinstance(preprocessing, EvaluationPipeline) else None,
            method=method,
            pixels=pixels or ("unit" if photos else "normalized"),
            size=(size, size) if isinstance(size, int) else size,
            dynamic_batch=dynamic_batch,
            dynamic_size=dynamic_size or (photos and img_size is None),
            class_names=None if class_names is None else tuple(class_names),
        )

    @property
    def outputs(self) -> list[str]:
        config = self.network.config
        if self.method == "forward_intermediates":
            return [f"stage{stage}" for stage in range(1, len(config.depths) + 1)]
        if self.method == "forward" and config.mobile_sam:
            return ["embedding"]
        return ["logits" if self.method == "forward" and config.num_classes else "features"]

    def program(self) -> ExportedProgram:
        """Trace the graph."""
        return trace_pictures(self.graph, self._pictures(1, *self.size), self.dynamic_batch, self.dynamic_size)

    def metadata(self) -> dict[str, str]:
        """Describe the network and its input, as JSON by key."""
        config = self.network.config
        pipeline = self.preprocessing or default_evaluation(config)
        told = {
            "pixels": self.pixels,
            "range": {"normalized": None, "unit": [0, 1], "uint8": [0, 255]}[self.pixels],
            "mean": pipeline.mean.tolist(),
            "std": pipeline.std.tolist(),
            "normalization_inside": self.pixels != "normalized",
            "img_size": pipeline.img_size,
            "crop_fraction": pipeline.crop_fraction,
            "resize_inside": self.preprocessing is not None,
        }
        names = {} if self.class_names is None else {"class_names": self.class_names}
        return describe(config, method=self.method, input=told, **names)

    def compare(self, run: Callable[[Tensor], Any], tolerance: float) -> None:
        """Compare with the graph, at two numbers of pictures and two sizes where they are open."""
        height, width = self.size
        sizes = [(height, width), (height + 37, width + 10)] if self.dynamic_size else [(height, width)]
        for batch in (1, 3) if self.dynamic_batch else (1,):
            for size in sizes:
                images = self._pictures(batch, *size)
                with torch.inference_mode():
                    expected, found = _listed(self.graph(images)), _listed(run(images))
                for name, want, have in zip(self.outputs, expected, found, strict=True):
                    refuse_difference(name, want, have, tolerance)

    def _pictures(self, batch: int, height: int, width: int) -> Tensor:
        """Draw pictures: rough patterns with noise, which networks tell apart better than noise alone."""
        generator = torch.Generator().manual_seed(batch)
        channels = self.network.config.in_chans
        pattern = torch.rand(batch, channels, 5, 7, generator=generator)
        pattern = nn.functional.interpolate(pattern, (height, width), mode="bilinear")
        unit = 0.8 * pattern + 0.2 * torch.rand(batch, channels, height, width, generator=generator)
        if self.pixels == "uint8":
            return (unit * 255).round().to(torch.uint8)
        dtype = next(self.network.parameters()).dtype
        return (4 * unit - 2 if self.pixels == "normalized" else unit).to(dtype)


def check_opset(opset: int) -> None:
    """Refuse operators that cannot be written, before anything is traced, which takes long.

    Raises:
        ValueError: if the opset is older than 18 or newer than the installed onnx.
        MissingExtraError: if onnx, onnxscript or onnxruntime is not installed.
    """
    newest = _import_onnx()[0].defs.onnx_opset_version()
    if not MIN_OPSET <= opset <= newest:
        raise ValueError(f"opset must be from {MIN_OPSET} to {newest}, what the exporter and onnx know; got {opset}.")


def describe(config: TinyViTConfig, **facts: Any) -> dict[str, str]:
    """Return the metadata of a file: the version, the configuration and more facts, as JSON by key."""
    facts = {"version": kornia_tinyvit.__version__, "config": config.to_dict(), **facts}
    return {f"kornia_tinyvit.{key}": json.dumps(value) for key, value in facts.items()}


def write_onnx(proto: onnx.ModelProto, path: Path, opset: int, metadata: dict[str, str]) -> Run:
    """Write an ONNX file, check it and return what runs it: a function from inputs by name to the outputs.

    Args:
        proto: the graph; it gets the metadata.
        path: the file to write.
        opset: version of the operators that was asked for.
        metadata: what :func:`describe` returned.

    Raises:
        ExportError: if the graph has operators of another version, as torch writes those of 18 where it does not know
            the asked ones.
    """
    onnx, onnxruntime = _import_onnx()
    found = {entry.domain: entry.version for entry in proto.opset_import}
    if found != {"": opset}:
        raise ExportError(f"torch's exporter wrote operators of {found} where opset {opset} was asked for.")
    proto.producer_name, proto.producer_version = "kornia-tinyvit", kornia_tinyvit.__version__
    onnx.helper.set_model_props(proto, metadata)
    onnx.save(proto, path)
    onnx.checker.check_model(path, full_check=True)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])

    def run(inputs: Mapping[str, Tensor]) -> list[Tensor]:
        arrays = {name: tensor.numpy() for name, tensor in inputs.items()}
        return [torch.from_numpy(output) for output in session.run(None, arrays)]

    return run


def refuse_difference(name: str, want: Tensor, have: Tensor, tolerance: float) -> None:
    """Refuse an output whose largest difference, of values up to 1, else in proportion, is above the tolerance.

    Raises:
        ExportError: telling the output and the difference.
    """
    if want.shape != have.shape:
        raise ExportError(f"The export returns {name} of {tuple(have.shape)} instead of {tuple(want.shape)}.")
    difference = float((have - want).abs().max() / want.abs().max().clamp(min=1))
    if not difference <= tolerance:  # NaN is refused too
        raise ExportError(
            f"The export differs from the network by {difference:.2g} in {name}, more than {tolerance:.2g}; nothing "
            "was written."
        )


def _listed(outputs: Any) -> list[Tensor]:
    return [outputs] if isinstance(outputs, Tensor) else list(outputs)


def _import_onnx() -> tuple[Any, Any]:
    try:
        import onnx
        import onnxruntime
        import onnxscript  # noqa: F401 - found missing before anything is traced
    except ImportError as error:
        raise MissingExtraError(
            "Exporting to ONNX needs onnx, onnxscript and onnxruntime: pip install 'kornia-tinyvit[export]'."
        ) from error
    return onnx, onnxruntime
