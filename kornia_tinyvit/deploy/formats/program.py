"""Programs of torch.export, and AOTInductor's packages of machine code."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from kornia_tinyvit.deploy.formats import ExportError
from kornia_tinyvit.layers import TORCH_2_7, open_sizes_at_one

__all__ = ["check_program", "has_compiler", "quiet", "trace", "trace_images", "write_program"]


def trace(graph: nn.Module, inputs: Mapping[str, Tensor], open_dims: Mapping[str, Collection[int]]) -> ExportedProgram:
    """Trace a graph.

    Args:
        graph: what to trace.
        inputs: examples of what goes in, by name, in the order in which the graph takes them. An open dimension has to
            be 2 or more, and another number than those it has nothing to do with, or torch takes it for fixed, or the
            two for one and the same.
        open_dims: the dimensions that may be of any size, of the inputs that have some.

    Returns:
        The program, with inputs and outputs of the shapes of the graph's; :func:`trace_images` is for images
        :math:`(B, C, H, W)`.
    """
    shapes = tuple(dict.fromkeys(open_dims.get(name, ()), Dim.DYNAMIC) for name in inputs)
    # What the graph asks of open sizes is asked when it runs; as conditions of the trace they would exclude some.
    deferred: Any = {"prefer_deferred_runtime_asserts_over_guards": True} if TORCH_2_7 else {}
    with torch.no_grad(), quiet(), open_sizes_at_one():
        return torch.export.export(graph, tuple(inputs.values()), dynamic_shapes=shapes, **deferred)


def trace_images(
    graph: nn.Module, images: Tensor, dynamic_batch: bool = True, dynamic_size: bool = False
) -> ExportedProgram:
    """Trace a graph of one image batch.

    Args:
        graph: what to trace.
        images: images :math:`(B, C, H, W)` of the sizes that stay closed.
        dynamic_batch: take any number of images; otherwise :math:`B`.
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


def check_program(path: Path, compiled: bool) -> None:
    """Check what a file of this format needs, before anything is traced, which takes long.

    Raises:
        ValueError: if the path does not end in ``.pt2``.
        ExportError: if it is to be compiled and there is no C++ compiler.
    """
    if path.suffix != ".pt2":
        raise ValueError(f"torch reads programs from files that end in .pt2; got {path.name}.")
    if compiled and not has_compiler():
        raise ExportError("A compiled program needs a C++ compiler such as g++, or CXX set to one.")


def write_program(
    program: ExportedProgram, path: Path, metadata: Mapping[str, str], compiled: bool
) -> Callable[[Tensor], Any]:
    """Write a program, load it again and return it as a function of images.

    Args:
        program: what :func:`trace` returned.
        path: the file to write, which ends in ``.pt2``.
        metadata: texts by key; a program has them in its extra file ``metadata.json``, a compiled one in its
            ``get_metadata()``.
        compiled: compile to machine code with AOTInductor.
    """
    with quiet(), open_sizes_at_one(), torch.no_grad():
        if compiled:
            settings = {"aot_inductor.metadata": metadata, "freezing": True}
            torch._inductor.aoti_compile_and_package(program, package_path=str(path), inductor_configs=settings)
            return torch._inductor.aoti_load_package(str(path))
        # By way of memory: on a full disk, torch's writer of files ends the process.
        archive = io.BytesIO()
        torch.export.save(program, archive, extra_files={"metadata.json": json.dumps(metadata)})
        path.write_bytes(archive.getbuffer())
        return torch.export.load(path).module()


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
def quiet(below: int = logging.ERROR) -> Iterator[None]:
    """Keep exporters and quantizers from reporting deprecations, what torch lacks of torchvision, and their progress.

    Args:
        below: level of logging below which no logger writes.
    """
    disabled = logging.root.manager.disable
    logging.disable(below - 1)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)
