"""A graph as a program of torch.export, and the program as an ONNX graph."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from kornia_tinyvit.extras import MissingExtraError
from kornia_tinyvit.layers import TORCH_2_7, open_sizes_at_one

if TYPE_CHECKING:
    import onnx

__all__ = ["has_compiler", "quiet", "to_onnx", "trace", "trace_pictures"]


def trace(graph: nn.Module, inputs: Mapping[str, Tensor], open_dims: Mapping[str, Collection[int]]) -> ExportedProgram:
    """Trace a graph.

    Args:
        graph: what to trace.
        inputs: examples of what goes in, by name, in the order in which the graph takes them. An open dimension has to
            be 2 or more, and another number than those it has nothing to do with, or torch takes it for fixed, or the
            two for one and the same.
        open_dims: the dimensions that may be of any size, of the inputs that have some.

    Returns:
        The program, with inputs and outputs of the shapes of the graph's; :func:`trace_pictures` is for pictures
        :math:`(B, C, H, W)`.
    """
    shapes = tuple(dict.fromkeys(open_dims.get(name, ()), Dim.DYNAMIC) for name in inputs)
    # What the graph asks of open sizes is asked when it runs; as conditions of the trace they would exclude some.
    deferred: Any = {"prefer_deferred_runtime_asserts_over_guards": True} if TORCH_2_7 else {}
    with torch.no_grad(), quiet(), open_sizes_at_one():
        return torch.export.export(graph, tuple(inputs.values()), dynamic_shapes=shapes, **deferred)


def trace_pictures(
    graph: nn.Module, images: Tensor, dynamic_batch: bool = True, dynamic_size: bool = False
) -> ExportedProgram:
    """Trace a graph of one picture batch.

    Args:
        graph: what to trace.
        images: pictures :math:`(B, C, H, W)` of the sizes that stay closed.
        dynamic_batch: take any number of pictures; otherwise :math:`B`.
        dynamic_size: take any height and width.
    """
    batch, channels, height, width = images.shape
    open_dims: list[int] = []
    if dynamic_batch:
        batch = 2  # what is open must not be 1, see trace
        open_dims += [0]
    if dynamic_size:
        width = height + height // 2 + 1  # and not square
        open_dims += [2, 3]
    example = images.new_zeros(batch, channels, height, width)
    return trace(graph, {"images": example}, {"images": open_dims})


def to_onnx(
    program: ExportedProgram, opset: int, inputs: Sequence[str] = ("images",), outputs: Sequence[str] | None = None
) -> onnx.ModelProto:
    """Translate a program into an ONNX graph.

    Args:
        program: what :func:`trace` returned.
        opset: version of the operators.
        inputs: names of the inputs.
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
            program, (), dynamo=True, opset_version=opset, input_names=inputs, output_names=outputs, verbose=False
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
