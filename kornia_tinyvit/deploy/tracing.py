"""A graph as a program of torch.export, and the program as an ONNX graph."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from kornia_tinyvit.extras import MissingExtraError
from kornia_tinyvit.layers import TORCH_2_7, open_sizes_at_one

if TYPE_CHECKING:
    import onnx

__all__ = ["has_compiler", "quiet", "to_onnx", "trace"]


def trace(graph: nn.Module, images: Tensor, dynamic_batch: bool = True, dynamic_size: bool = False) -> ExportedProgram:
    """Trace a graph of one picture batch.

    Args:
        graph: what to trace.
        images: pictures :math:`(B, C, H, W)` of the sizes that stay closed. Where sizes are open, :math:`B` has to be 2
            or more, and :math:`H` another number than :math:`W`, or torch takes them for fixed or for one and the same.
        dynamic_batch: take any number of pictures.
        dynamic_size: take any height and width.
    """
    open_sizes = {0: dynamic_batch, 2: dynamic_size, 3: dynamic_size}
    shapes = {index: Dim.DYNAMIC for index, is_open in open_sizes.items() if is_open}
    # What the graph asks of open sizes is asked when it runs; as conditions of the trace they would exclude some.
    deferred: Any = {"prefer_deferred_runtime_asserts_over_guards": True} if TORCH_2_7 else {}
    with torch.no_grad(), quiet(), open_sizes_at_one():
        return torch.export.export(graph, (images,), dynamic_shapes=(shapes,), **deferred)


def to_onnx(program: ExportedProgram, opset: int, outputs: Sequence[str] | None = None) -> onnx.ModelProto:
    """Translate a program into an ONNX graph with the input ``images``.

    Args:
        program: what :func:`trace` returned.
        opset: version of the operators.
        outputs: names of the outputs.

    Raises:
        MissingExtraError: if onnx or onnxscript is not installed.
    """
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401 - torch's exporter needs it
    except ImportError as error:
        raise MissingExtraError("ONNX needs onnx and onnxscript: pip install 'kornia-tinyvit[export]'.") from error
    with quiet(), open_sizes_at_one():
        translated: Any = torch.onnx.export(
            program, (), dynamo=True, opset_version=opset, input_names=["images"], output_names=outputs, verbose=False
        )
    return translated.model_proto


def has_compiler() -> bool:
    """Tell whether there is the C++ compiler that Inductor needs."""
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        return False
    return True


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep torch's exporters from telling about torchvision, deprecations and their progress."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)
