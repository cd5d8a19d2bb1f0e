"""Static post-training quantization to int8, calibrated on the user's images.

The quantizers run the network on calibration images, record the range of every tensor they quantize and store the
ranges in the graph. Measure the accuracy drop with :func:`~kornia_tinyvit.deploy.accuracy.compare`.

Convolutions are not quantized. Quantized as well, the packaged network changes the top-1 class of 1.2 to 1.4 % of the
test images of CIFAR-10 instead of 0.4 %, and is no faster on processors with matrix units: the conversions around the
integer operators cost what these save.
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

#: Maximum number of calibration images; the accuracy is the same from about 64 on.
CALIBRATION_IMAGES = 256

# nncf averages the extremes over batches, and the ranges of single images are too narrow: with every layer quantized,
# the relative error of the logits is 4.3 % with single images, and 2.3 % with batches of 16.
_BATCH = 16
# Images larger than 256 pixels come in smaller batches, which limits the memory of their feature maps.
_BATCH_PIXELS = _BATCH * 256**2
# nncf reads the images several times, so they are kept in memory: 256 images of 1024 pixels would be 3 GiB.
_MAX_BYTES = 2**30


def quantize_onnx(model: onnx.ModelProto | str | Path, images: Iterable[Tensor]) -> onnx.ModelProto:
    """Quantize the linear layers of an ONNX model for ONNX Runtime, with one scale per output channel.

    All other operators stay in float32.

    Args:
        model: the model or its file, with one input of images :math:`(B, C, H, W)`; it is not modified.
        images: calibration images: batches in the format of the model's input. The first
            :data:`CALIBRATION_IMAGES`, or one GiB, are used. They should cover the inputs at inference, so shuffle
            images that are sorted by class.

    Returns:
        The model with QuantizeLinear and DequantizeLinear around the quantized operators, and the same inputs and
        outputs. The result is deterministic.

    Raises:
        MissingExtraError: if ONNX Runtime or onnx is not installed.
        TypeError: if the images are not tensors of the input's dtype.
        ValueError: if there are no images, or they do not have the input's shape.
    """
    with optional_imports("int8 for ONNX Runtime needs onnx and onnxruntime", "'kornia-tinyvit[export]'"):
        import onnx
        from onnxruntime.quantization import QuantType, quantize_static
        from onnxruntime.quantization.quant_utils import add_pre_process_metadata
    graph = onnx.ModelProto()
    # onnx.load includes external data, which the quantizer would look for in its own folder.
    graph.CopyFrom(model if isinstance(model, onnx.ModelProto) else onnx.load(model))
    spec = _onnx_input(graph)
    feeds = iter([{spec.name: batch} for batch in _calibration_batches(images, spec)])
    metadata = {entry.key: entry.value for entry in graph.metadata_props}
    # The exporter already inferred the shapes, and ONNX Runtime's preprocessing fails on the Attention operator.
    # Without this mark the quantizer warns through logging.warning, which configures the root logger.
    add_pre_process_metadata(graph)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "quantized.onnx"
        quantize_static(
            graph,
            path,
            SimpleNamespace(get_next=partial(next, feeds, None)),
            # x86 has instructions for unsigned by signed bytes; signed by signed is 25 to 50 % slower.
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            per_channel=True,
            reduce_range=True,  # 7-bit weights, whose sums do not overflow on processors without VNNI
            op_types_to_quantize=["MatMul", "Gemm"],
            extra_options={"MatMulConstBOnly": True},  # not the matrix products of attention
        )
        quantized = onnx.load(path)
    del quantized.metadata_props[:]
    onnx.helper.set_model_props(quantized, metadata)
    return quantized


def quantize_openvino(model: openvino.Model, images: Iterable[Tensor]) -> openvino.Model:
    """Quantize the linear layers of an OpenVINO model with nncf, with SmoothQuant and bias correction.

    All other operators stay in the inference precision of the compiled model.

    Args:
        model: the model, with one input of images :math:`(B, C, H, W)`; it is not modified.
        images: calibration images, see :func:`quantize_onnx`.

    Returns:
        The model with FakeQuantize operators, which the compiler converts to int8 arithmetic, and the same inputs and
        outputs. The result is deterministic.

    Raises:
        MissingExtraError: if nncf is not installed.
        TypeError: if the images are not tensors of the input's dtype.
        ValueError: if there are no images, or they do not have the input's shape.
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
class _InputSpec:
    """Name, shape (``None`` for dynamic dimensions) and dtype of a model's input."""

    name: str
    shape: tuple[int | None, ...]
    dtype: np.dtype

    def check(self, batch: Tensor) -> None:
        if not isinstance(batch, Tensor):
            raise TypeError(f"Calibration needs batches of images as tensors; got {type(batch).__name__}.")
        # Any batch size: the images are rebatched to the model's.
        sizes = [*zip(self.shape, batch.shape, strict=False)][1:]
        if batch.ndim != len(self.shape) or any(size not in {None, given} for size, given in sizes):
            shape = ", ".join(str(size or axis) for size, axis in zip(self.shape, "BCHW", strict=True))
            raise ValueError(f"The model takes images ({shape}); got calibration images {tuple(batch.shape)}.")
        dtype = str(batch.dtype).removeprefix("torch.")
        if dtype != self.dtype.name:
            raise TypeError(f"The model takes {self.dtype.name} images; got {dtype} calibration images.")


def _onnx_input(model: onnx.ModelProto) -> _InputSpec:
    import onnx

    value = model.graph.input[0]
    tensor_type = value.type.tensor_type
    shape = tuple(size.dim_value if size.HasField("dim_value") else None for size in tensor_type.shape.dim)
    return _InputSpec(value.name, shape, onnx.helper.tensor_dtype_to_np_dtype(tensor_type.elem_type))


def _openvino_input(model: openvino.Model) -> _InputSpec:
    value = model.input()
    shape = tuple(size.get_length() if size.is_static else None for size in value.get_partial_shape())
    return _InputSpec("", shape, value.get_element_type().to_dtype())


def _calibration_batches(images: Iterable[Tensor], spec: _InputSpec) -> list[np.ndarray]:
    """Rebatch the first images by shape, which makes the result independent of the user's batches."""
    batches = []
    for shape, group in itertools.groupby(_first_images(images, spec), key=lambda image: image.shape):
        size = spec.shape[0] or min(_BATCH, max(1, _BATCH_PIXELS // (shape[1] * shape[2])))
        while chunk := list(itertools.islice(group, size)):
            if spec.shape[0] in {None, len(chunk)}:  # a model of a static batch size takes no partial batch
                batches.append(np.stack(chunk))
    if not batches:
        raise ValueError("int8 needs calibration images, 128 or more; got none, or fewer than the model's batch size.")
    return batches


def _first_images(images: Iterable[Tensor], spec: _InputSpec) -> Iterator[np.ndarray]:
    count = held = 0
    for batch in images:
        spec.check(batch)
        for image in batch.detach().cpu().numpy():
            count, held = count + 1, held + image.nbytes
            if count > CALIBRATION_IMAGES or held > _MAX_BYTES:
                return
            yield image
