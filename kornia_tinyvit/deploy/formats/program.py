"""Export with torch.export and AOTInductor."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from kornia_tinyvit.deploy.formats import ExportError
from kornia_tinyvit.layers import TORCH_2_7, without_size_specialization

__all__ = ["IMAGE_AXES", "Axes", "check_program", "has_compiler", "quiet", "trace", "trace_images", "write_program"]

#: Names of dynamic dimensions by position, by the name of the input or output.
Axes = Mapping[str, Mapping[int, str]]
#: The dimensions of images that can be dynamic.
IMAGE_AXES = {0: "batch", 2: "height", 3: "width"}


def trace(graph: nn.Module, inputs: Mapping[str, Tensor], axes: Axes) -> ExportedProgram:
    """Trace a module with :func:`torch.export.export`.

    Args:
        graph: the module.
        inputs: example inputs by name, in the order of the module's arguments. A dynamic dimension must be 2 or more,
            or torch specializes it, and differ from unrelated dimensions, or torch may treat them as equal.
        axes: the dynamic dimensions.

    Returns:
        The program; its inputs and outputs have the shapes of the module's.
    """
    shapes = tuple(dict.fromkeys(axes.get(name, ()), Dim.DYNAMIC) for name in inputs)
    # As guards of the trace, the graph's checks of dynamic sizes would exclude some sizes; they run as assertions.
    deferred: Any = {"prefer_deferred_runtime_asserts_over_guards": True} if TORCH_2_7 else {}
    with torch.no_grad(), quiet(), without_size_specialization():
        return torch.export.export(graph, tuple(inputs.values()), dynamic_shapes=shapes, **deferred)


def trace_images(
    graph: nn.Module, images: Tensor, dynamic_batch: bool = True, dynamic_size: bool = False
) -> ExportedProgram:
    """Trace a module that takes one image batch.

    Args:
        graph: the module.
        images: example images :math:`(B, C, H, W)` with the sizes of the static dimensions.
        dynamic_batch: make the batch size dynamic.
        dynamic_size: make height and width dynamic.

    Returns:
        The exported program.
    """
    batch, channels, height, width = images.shape
    # A dynamic size must not be 1, and height and width must differ, see trace.
    shape = (2 if dynamic_batch else batch, channels, height, height + height // 2 + 1 if dynamic_size else width)
    axes = {dim: name for dim, name in IMAGE_AXES.items() if (dynamic_size if dim else dynamic_batch)}
    return trace(graph, {"images": images.new_zeros(shape)}, {"images": axes})


def check_program(path: Path, compiled: bool) -> None:
    """Check the path and the compiler before the graph is traced, which takes seconds.

    Args:
        path: path of the export.
        compiled: whether the export is compiled by inductor.

    Raises:
        ValueError: if the path does not end in ``.pt2``.
        ExportError: if ``compiled`` is set and no C++ compiler is found.
    """
    if path.suffix != ".pt2":
        raise ValueError(f"The path of an exported program must end in .pt2; got {path.name}.")
    if compiled and not has_compiler():
        raise ExportError("compiled=True needs a C++ compiler such as g++, or CXX set to one.")


def write_program(
    program: ExportedProgram, path: Path, metadata: Mapping[str, str], compiled: bool
) -> Callable[[Tensor], Any]:
    """Write an exported program and load it again.

    Args:
        program: result of :func:`trace`.
        path: the file to write, which must end in ``.pt2``.
        metadata: metadata properties, stored in the extra file ``metadata.json`` of a program, and returned by
            ``get_metadata()`` of a compiled one.
        compiled: compile the program with AOTInductor.

    Returns:
        The loaded program as a function of images :math:`(B, C, H, W)`.
    """
    with quiet(), without_size_specialization(), torch.no_grad():
        if compiled:
            settings = {"aot_inductor.metadata": metadata, "freezing": True}
            torch._inductor.aoti_compile_and_package(program, package_path=str(path), inductor_configs=settings)
            return torch._inductor.aoti_load_package(str(path))
        # torch's file writer terminates the process when the disk is full, so the archive is built in memory.
        archive = io.BytesIO()
        torch.export.save(program, archive, extra_files={"metadata.json": json.dumps(metadata)})
        path.write_bytes(archive.getbuffer())
        return torch.export.load(path).module()


def has_compiler() -> bool:
    """Return whether the C++ compiler that Inductor needs is found."""
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        return False
    return True


@contextlib.contextmanager
def quiet(below: int = logging.ERROR) -> Iterator[None]:
    """Suppress warnings, standard output and log records of exporters and quantizers.

    Args:
        below: logging level below which records are suppressed.
    """
    disabled = logging.root.manager.disable
    logging.disable(below - 1)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)
