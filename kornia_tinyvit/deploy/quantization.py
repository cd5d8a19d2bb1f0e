"""Static quantization to 8-bit integers after training, calibrated on the user's images.

The quantizers run the network on some images, note the range of every tensor they quantize, and write the ranges into
the graph. How much accuracy that costs is not known before :func:`~kornia_tinyvit.deploy.accuracy.compare` tells it.

Convolutions stay floats. Quantized as well, the embedded network puts another class first for 1.2 to 1.4 % of the test
images of CIFAR-10 instead of 0.4 %, and is no faster where the processor has matrix units: what the integers save
goes into the conversions around them.
"""

from __future__ import annotations

import itertools
import logging
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from kornia_tinyvit.deploy.formats.program import quiet
from kornia_tinyvit.deploy.openvino_core import shared_core, without_telemetry
from kornia_tinyvit.extras import optional_imports

if TYPE_CHECKING:
    import onnx
    import openvino

__all__ = ["CALIBRATION_IMAGES", "quantize_onnx", "quantize_openvino"]

#: How many images a calibration looks at; the accuracy is the same from about 64 on.
CALIBRATION_IMAGES = 256

# nncf averages the extremes of the batches, and those of single images are too narrow: with every layer quantized,
# logits are off by 4.3 % then, and by 2.3 % with batches of 16.
_BATCH = 16
# A batch of 16 holds as many pixels at 256; larger images come in smaller batches, so that their maps fit in memory.
_BATCH_PIXELS = _BATCH * 256**2
# nncf goes through the images several times, so they are held: 256 images of 1024 pixels would be 3 GiB.
_MAX_BYTES = 2**30


def quantize_onnx(model: onnx.ModelProto | str | Path, images: Iterable[Tensor]) -> onnx.ModelProto:
    """Quantize the linear layers of an ONNX graph for ONNX Runtime, with a scale for each output channel.

    Everything else stays in float32.

    Args:
        model: the graph or its file; it is left as it is. It has one input, images :math:`(B, C, H, W)`.
        images: calibration images: batches of what the graph takes, of any sizes. The first
            :data:`CALIBRATION_IMAGES`, or a GiB, of them are used; they should show all that the network will see,
            so shuffle images that are sorted by class.

    Returns:
        The graph with pairs of QuantizeLinear and DequantizeLinear around what is quantized. It takes and returns what
        the float graph does. The same images give the same graph.

    Raises:
        MissingExtraError: if ONNX Runtime or onnx is not installed.
        TypeError: if the images are not tensors of the type that the graph takes.
        ValueError: if there are no images, or they do not have the shape that the graph takes.
    """
    with optional_imports("int8 for ONNX Runtime needs it", "'kornia-tinyvit[export]'"):
        import onnx
        from onnxruntime.quantization import QuantType, quantize_static
        from onnxruntime.quantization.quant_utils import add_pre_process_metadata
    graph = onnx.ModelProto()
    # Loaded, data beside the file is part of the graph; the quantizer would look for it in its own folder.
    graph.CopyFrom(model if isinstance(model, onnx.ModelProto) else onnx.load(model))
    taken = _onnx_input(graph)
    feeds = iter([{taken.name: batch} for batch in _calibration_batches(images, taken)])
    metadata = {entry.key: entry.value for entry in graph.metadata_props}
    # The exporter has inferred the shapes, and ONNX Runtime's preparation, which fails on the Attention operator, gains
    # nothing. Without the mark the quantizer warns through logging.warning, which configures the root logger.
    add_pre_process_metadata(graph)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "quantized.onnx"
        quantize_static(
            graph,
            path,
            SimpleNamespace(get_next=partial(next, feeds, None)),
            # x86 multiplies unsigned by signed bytes; signed by signed takes a quarter to a half longer.
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            per_channel=True,
            reduce_range=True,  # weights of 7 bits: sums of products cannot overflow where there is no VNNI
            op_types_to_quantize=["MatMul", "Gemm"],
            extra_options={"MatMulConstBOnly": True},  # not the products of attention
        )
        quantized = onnx.load(path)
    del quantized.metadata_props[:]
    onnx.helper.set_model_props(quantized, metadata)
    return quantized


def quantize_openvino(model: openvino.Model, images: Iterable[Tensor]) -> openvino.Model:
    """Quantize the linear layers of an OpenVINO model with nncf, activations smoothed and biases corrected.

    Everything else stays in the precision that the compiler is told.

    Args:
        model: the model; it is left as it is. It has one input, images :math:`(B, C, H, W)`.
        images: calibration images, as :func:`quantize_onnx` takes them.

    Returns:
        The model with FakeQuantize operators, which the compiler turns into 8-bit arithmetic. It takes and returns what
        the float model does. The same images give the same model.

    Raises:
        MissingExtraError: if nncf is not installed.
        TypeError: if the images are not tensors of the type that the model takes.
        ValueError: if there are no images, or they do not have the shape that the model takes.
    """
    with optional_imports("int8 for OpenVINO needs nncf", "'kornia-tinyvit[openvino]'"), without_telemetry():
        import nncf
    batches = _calibration_batches(images, _openvino_input(model))
    with quiet(below=logging.WARNING), shared_core():
        return nncf.quantize(
            model,
            nncf.Dataset(batches),
            subset_size=len(batches),
            model_type=nncf.ModelType.TRANSFORMER,
            preset=nncf.QuantizationPreset.PERFORMANCE,
            ignored_scope=nncf.IgnoredScope(types=["Convolution", "GroupConvolution"], validate=False),
        )


@dataclass(frozen=True)
class _Input:
    """What a graph takes: sizes that it leaves open are ``None``."""

    name: str
    shape: tuple[int | None, ...]
    dtype: np.dtype

    def check(self, batch: Tensor) -> None:
        if not isinstance(batch, Tensor):
            raise TypeError(f"Calibration takes batches of images as tensors; got {type(batch).__name__}.")
        # The number of images is free: they are put into batches of the graph's size.
        fits = batch.ndim == len(self.shape) and all(
            size in {None, given} for size, given in zip(self.shape[1:], batch.shape[1:], strict=True)
        )
        if not fits:
            shape = ", ".join(
                axis if size is None else str(size) for size, axis in zip(self.shape, "BCHW", strict=True)
            )
            raise ValueError(f"The graph takes images ({shape}); got calibration images {tuple(batch.shape)}.")
        dtype = str(batch.dtype).removeprefix("torch.")
        if dtype != self.dtype.name:
            raise TypeError(f"The graph takes images of {self.dtype.name}; got calibration images of {dtype}.")


def _onnx_input(model: onnx.ModelProto) -> _Input:
    import onnx

    value = model.graph.input[0]
    taken = value.type.tensor_type
    sizes = tuple(size.dim_value if size.HasField("dim_value") else None for size in taken.shape.dim)
    return _Input(value.name, sizes, onnx.helper.tensor_dtype_to_np_dtype(taken.elem_type))


def _openvino_input(model: openvino.Model) -> _Input:
    taken = model.input()
    sizes = tuple(size.get_length() if size.is_static else None for size in taken.get_partial_shape())
    return _Input("", sizes, taken.get_element_type().to_dtype())


def _calibration_batches(images: Iterable[Tensor], taken: _Input) -> list[np.ndarray]:
    """Put the first images into batches of one size each, so that nothing depends on how the user batched them."""
    batches = []
    for shape, group in itertools.groupby(_first_images(images, taken), key=lambda image: image.shape):
        size = taken.shape[0] or min(_BATCH, max(1, _BATCH_PIXELS // (shape[1] * shape[2])))
        while chunk := list(itertools.islice(group, size)):
            # A graph of a fixed batch takes no smaller one.
            if taken.shape[0] in {None, len(chunk)}:
                batches.append(np.stack(chunk))
    if not batches:
        raise ValueError("int8 is calibrated on images; got none, or fewer than the graph's batch. Give 128 or more.")
    return batches


def _first_images(images: Iterable[Tensor], taken: _Input) -> Iterator[np.ndarray]:
    count = held = 0
    for batch in images:
        taken.check(batch)
        for image in batch.detach().cpu().numpy():
            count, held = count + 1, held + image.nbytes
            if count > CALIBRATION_IMAGES or held > _MAX_BYTES:
                return
            yield image
