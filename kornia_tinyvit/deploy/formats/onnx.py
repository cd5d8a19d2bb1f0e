"""ONNX: graphs for ONNX Runtime, OpenVINO and others."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.export import ExportedProgram

from kornia_tinyvit.deploy.formats import ExportError
from kornia_tinyvit.deploy.formats.program import quiet
from kornia_tinyvit.extras import optional_imports
from kornia_tinyvit.layers import open_sizes_at_one
from kornia_tinyvit.version import __version__

if TYPE_CHECKING:
    import onnx

__all__ = ["check_opset", "to_onnx", "write_onnx"]

MIN_OPSET = 18  # the oldest that torch's exporter writes
Run = Callable[[Mapping[str, Tensor]], list[Tensor]]


def check_opset(opset: int) -> None:
    """Refuse operators that cannot be written, before anything is traced, which takes long.

    Raises:
        ValueError: if the opset is older than 18 or newer than the installed onnx.
        MissingExtraError: if onnx, onnxscript or onnxruntime is not installed.
    """
    with optional_imports("Exporting to ONNX needs onnx, onnxscript and onnxruntime", "'kornia-tinyvit[export]'"):
        import onnx
        import onnxruntime  # noqa: F401 - found missing before anything is traced
        import onnxscript  # noqa: F401
    newest = onnx.defs.onnx_opset_version()
    if not MIN_OPSET <= opset <= newest:
        raise ValueError(f"opset must be from {MIN_OPSET} to {newest}, what the exporter and onnx know; got {opset}.")


def to_onnx(
    program: ExportedProgram, opset: int, inputs: Sequence[str] = ("images",), outputs: Sequence[str] | None = None
) -> onnx.ModelProto:
    """Translate a program into an ONNX graph; needs onnx and onnxscript.

    Args:
        program: what :func:`~kornia_tinyvit.deploy.formats.program.trace` returned.
        opset: version of the operators.
        inputs: names of the inputs.
        outputs: names of the outputs.
    """
    with quiet(), open_sizes_at_one():
        translated: Any = torch.onnx.export(
            program, (), dynamo=True, opset_version=opset, input_names=inputs, output_names=outputs, verbose=False
        )
    return translated.model_proto


def write_onnx(proto: onnx.ModelProto, path: Path, opset: int, metadata: dict[str, str]) -> Run:
    """Write an ONNX file, check it and return what runs it: a function from inputs by name to the outputs.

    Args:
        proto: the graph; it gets the metadata.
        path: the file to write.
        opset: version of the operators that was asked for.
        metadata: texts by key.

    Raises:
        ExportError: if the graph has operators of another version, as torch writes those of 18 where it does not know
            the asked ones.
    """
    import onnx
    import onnxruntime

    found = {entry.domain: entry.version for entry in proto.opset_import}
    if found != {"": opset}:
        raise ExportError(f"torch's exporter wrote operators of {found} where opset {opset} was asked for.")
    proto.producer_name, proto.producer_version = "kornia-tinyvit", __version__
    onnx.helper.set_model_props(proto, metadata)
    onnx.save(proto, path)
    onnx.checker.check_model(path, full_check=True)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])

    def run(inputs: Mapping[str, Tensor]) -> list[Tensor]:
        arrays = {name: tensor.numpy() for name, tensor in inputs.items()}
        return [torch.from_numpy(output) for output in session.run(None, arrays)]

    return run
