"""ONNX export."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.export import ExportedProgram

from kornia_tinyvit.deploy.formats import ExportError
from kornia_tinyvit.deploy.formats.program import IMAGE_AXES, Axes, quiet
from kornia_tinyvit.extras import optional_imports
from kornia_tinyvit.layers import without_size_specialization
from kornia_tinyvit.version import __version__

if TYPE_CHECKING:
    import onnx

__all__ = ["check_opset", "to_onnx", "write_onnx"]

MIN_OPSET = 18  # the oldest of torch's exporter
Run = Callable[..., list[Tensor]]


def check_opset(opset: int) -> None:
    """Check the opset and the installed packages before the graph is traced, which takes seconds.

    Args:
        opset: opset version.

    Raises:
        ValueError: if the opset is older than 18 or newer than the installed onnx.
        MissingExtraError: if onnx, onnxscript or onnxruntime is not installed.
    """
    with optional_imports("Exporting to ONNX needs onnx, onnxscript and onnxruntime", "'kornia-tinyvit[export]'"):
        import onnx
        import onnxruntime  # noqa: F401 - check that it is installed
        import onnxscript  # noqa: F401
    newest = onnx.defs.onnx_opset_version()
    if not MIN_OPSET <= opset <= newest:
        raise ValueError(f"opset must be from {MIN_OPSET} to {newest} with the installed onnx; got {opset}.")


def to_onnx(
    program: ExportedProgram,
    opset: int,
    inputs: Sequence[str] = ("images",),
    outputs: Sequence[str] | None = None,
    axes: Axes = {"images": IMAGE_AXES},  # noqa: B006 - not modified
) -> onnx.ModelProto:
    """Convert an exported program to an ONNX model; needs onnx and onnxscript.

    Args:
        program: result of :func:`~kornia_tinyvit.deploy.formats.program.trace`.
        opset: opset version.
        inputs: names of the inputs.
        outputs: names of the outputs.
        axes: names of the dynamic dimensions of inputs and outputs; sizes that depend on them have the same names.

    Returns:
        The model.
    """
    with quiet(), without_size_specialization():
        converted: Any = torch.onnx.export(
            program, (), dynamo=True, opset_version=opset, input_names=inputs, output_names=outputs, verbose=False
        )
    proto: onnx.ModelProto = converted.model_proto
    _name_axes(proto.graph, axes)
    _remove_weight_shapes(proto.graph)
    return proto


def _name_axes(graph: onnx.GraphProto, axes: Axes) -> None:
    """Replace torch's symbols for dynamic sizes, such as ``s77``, by names."""
    values = [*graph.input, *graph.output, *graph.value_info]
    names: dict[str, str] = {}
    for value in values:
        for position, name in axes.get(value.name, {}).items():
            if symbol := value.type.tensor_type.shape.dim[position].dim_param:
                names.setdefault(symbol, name)
    for value in values:
        for dim in value.type.tensor_type.shape.dim:
            if expression := dim.dim_param:  # a symbol, or an expression such as (s77 + 3)//4
                renamed = re.sub(r"\w+", lambda word: names.get(word[0], word[0]), expression)
                dim.dim_param = names.get(expression, renamed)


def _remove_weight_shapes(graph: onnx.GraphProto) -> None:
    """Remove the initializers from ``value_info``, where torch's serializer adds them.

    Their shapes are those of their data. Tools that transpose weights, such as ONNX Runtime's quantizer, update only
    the data, and fail on the contradiction.
    """
    weights = {tensor.name for tensor in graph.initializer}
    kept = [value for value in graph.value_info if value.name not in weights]
    del graph.value_info[:]
    graph.value_info.extend(kept)


def write_onnx(proto: onnx.ModelProto, path: Path, opset: int, metadata: dict[str, str]) -> Run:
    """Write and check an ONNX file, and open it in ONNX Runtime.

    Args:
        proto: the model; the metadata is added to it.
        path: the file to write.
        opset: the requested opset version.
        metadata: metadata properties.

    Returns:
        A function that maps the input tensors to the list of outputs.

    Raises:
        ExportError: if the model has another opset; torch falls back to opset 18 for versions it does not support.
    """
    import onnx
    import onnxruntime

    found = {entry.domain: entry.version for entry in proto.opset_import}
    if found != {"": opset}:
        raise ExportError(f"torch's exporter wrote opset {found} instead of {opset}. Give another opset.")
    proto.producer_name, proto.producer_version = "kornia-tinyvit", __version__
    onnx.helper.set_model_props(proto, metadata)
    onnx.save(proto, path)
    onnx.checker.check_model(path, full_check=True)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])

    def run(*inputs: Tensor) -> list[Tensor]:
        arrays = {value.name: tensor.numpy() for value, tensor in zip(session.get_inputs(), inputs, strict=True)}
        return [torch.from_numpy(output) for output in session.run(None, arrays)]

    return run
