"""Inference engines: eager PyTorch, Inductor, ONNX Runtime and OpenVINO behind one interface."""

from __future__ import annotations

import importlib.util
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from kornia_tinyvit.deploy.formats.program import has_compiler
from kornia_tinyvit.deploy.graph import InferenceGraph
from kornia_tinyvit.deploy.openvino_core import cpu_settings, openvino_core
from kornia_tinyvit.deploy.quantization import quantize_onnx, quantize_openvino

__all__ = ["ENGINES", "Engine"]

Outputs = Tensor | tuple[Tensor, ...]


class Engine(ABC):
    """A graph prepared for images of one shape; other shapes are supported, but may be slower.

    Args:
        graph: the graph to run; it is not modified.
        example: images :math:`(B, C, H, W)` of the shape to optimize for, on the device to run on.
        dtype: dtype to compute in, one of :meth:`dtypes`.
        calibration: batches of images for the calibration of int8.
    """

    name: ClassVar[str]
    needs: ClassVar[tuple[str, ...]] = ()  # packages besides torch
    extra: ClassVar[str] = ""

    def __init__(
        self, graph: InferenceGraph, example: Tensor, dtype: torch.dtype, calibration: Iterable[Tensor] = ()
    ) -> None:
        self.graph = graph
        self.dtype = dtype
        self.calibration = calibration if dtype == torch.int8 else ()  # float engines keep no images
        self.prepare(example)

    @abstractmethod
    def prepare(self, example: Tensor) -> None:
        """Compile the graph for images like ``example``; called once by the constructor.

        Args:
            example: example images :math:`(B, C, H, W)`.
        """

    @abstractmethod
    def __call__(self, images: Tensor) -> Outputs:
        """Map images :math:`(B, C, H, W)` to the outputs of the graph."""

    @classmethod
    def missing(cls) -> str | None:
        """Return a line that states which packages are not installed; ``None`` if all are."""
        absent = [package for package in cls.needs if importlib.util.find_spec(package) is None]
        if not absent:
            return None
        return f"engine {cls.name!r} needs {', '.join(absent)}: pip install 'kornia-tinyvit[{cls.extra}]'"

    @classmethod
    @abstractmethod
    def dtypes(cls, device: torch.device) -> tuple[torch.dtype, ...]:
        """Return the dtypes that the engine supports on a device of this machine; empty if it does not run there."""


class EagerEngine(Engine):
    """Eager PyTorch; on the CPU with oneDNN's fused GELU."""

    name = "eager"

    def prepare(self, example: Tensor) -> None:
        """Cast a copy of the graph and fuse its activations."""
        self.graph = self.graph.with_dtype(self.dtype)
        if example.device.type == "cpu" and torch.backends.mkldnn.is_available():
            fuse_activations(self.graph)

    def __call__(self, images: Tensor) -> Outputs:
        with torch.inference_mode():
            out: Outputs = self.graph(images)
            return out

    @classmethod
    def dtypes(cls, device: torch.device) -> tuple[torch.dtype, ...]:
        # Without hardware support bfloat16 is slower than float32 on a CPU.
        if device.type == "cuda":
            return torch.float32, torch.bfloat16, torch.float16
        if device.type == "cpu" and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
            return (torch.float32,)
        return torch.float32, torch.bfloat16


class InductorEngine(EagerEngine):
    """``torch.compile`` with frozen weights.

    Compilation takes about a minute, and seconds in a later process, which finds the compiled code in torch's cache
    (``TORCHINDUCTOR_CACHE_DIR``). The first shape is compiled with static shapes, a second one with dynamic shapes.
    """

    name = "inductor"

    def prepare(self, example: Tensor) -> None:
        """Wrap a copy of the graph in ``torch.compile``; the first call compiles it."""
        self.cudagraphs = example.device.type == "cuda"
        self.graph = self.graph.with_dtype(self.dtype)
        self.compiled = torch.compile(self.graph, options={"freezing": True, "triton.cudagraphs": self.cudagraphs})

    def __call__(self, images: Tensor) -> Outputs:
        # Freezing needs no_grad; in inference mode torch would compile a second time.
        with torch.no_grad():
            out: Outputs = self.compiled(images)
        if self.cudagraphs:  # the next run overwrites these outputs
            return out.clone() if isinstance(out, Tensor) else tuple(each.clone() for each in out)
        return out

    @classmethod
    def missing(cls) -> str | None:
        if has_compiler():
            return None
        return "engine 'inductor' needs a C++ compiler such as g++, or CXX set to one"


class StaticEngine(Engine):
    """An engine that compiles the graph with static shapes for the example, and with dynamic shapes on demand."""

    static_dims: ClassVar[slice]  # dimensions of an image batch that are static in the first compilation

    def prepare(self, example: Tensor) -> None:
        """Compile the graph for the static dimensions of ``example`` :math:`(B, C, H, W)`."""
        self.static_shape = example.shape[self.static_dims]
        self.static = self.compile(example, dynamic=False)
        self.dynamic: Any = None
        self.lock = threading.Lock()

    @abstractmethod
    def compile(self, example: Tensor, dynamic: bool) -> Any:
        """Compile the graph for images like ``example`` :math:`(B, C, H, W)`, or of any batch and image size."""

    def compiled_for(self, images: Tensor) -> Any:
        """Return the compiled graph for images :math:`(B, C, H, W)`."""
        if images.shape[self.static_dims] == self.static_shape:
            return self.static
        with self.lock:
            if self.dynamic is None:
                self.dynamic = self.compile(images, dynamic=True)
        return self.dynamic


class OnnxRuntimeEngine(StaticEngine):
    """ONNX Runtime on the CPU."""

    name = "onnxruntime"
    needs = ("onnx", "onnxscript", "onnxruntime")
    extra = "export"
    static_dims = slice(2, 4)  # a static image size saves a tenth of the time, a static batch size nothing

    def __call__(self, images: Tensor) -> Outputs:
        inputs = {"images": images.detach().cpu().contiguous().numpy()}
        return _as_outputs(self.compiled_for(images).run(None, inputs))

    def compile(self, example: Tensor, dynamic: bool) -> Any:
        """Return an inference session."""
        import onnxruntime

        model = self.graph.to_onnx(example, dynamic)
        if self.dtype == torch.int8:
            model = quantize_onnx(model, self.calibration)
        if dynamic:
            del self.graph, self.calibration  # free their memory: both variants are compiled
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 3
        # Threads that spin while they wait take CPU time from the rest of the process.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])

    @classmethod
    def dtypes(cls, device: torch.device) -> tuple[torch.dtype, ...]:
        return (torch.float32, torch.int8) if device.type == "cpu" else ()


class OpenVinoEngine(StaticEngine):
    """OpenVINO on the CPU."""

    name = "openvino"
    needs = ("openvino", "nncf", "onnx", "onnxscript")
    extra = "openvino"
    static_dims = slice(None)

    def prepare(self, example: Tensor) -> None:
        """Convert and quantize the graph once with dynamic shapes, which compile to any static shape without loss."""
        self.core = openvino_core()
        self.model = self.core.read_model(self.graph.to_onnx(example, dynamic_size=True).SerializeToString())
        if self.dtype == torch.int8:
            self.model = quantize_openvino(self.model, self.calibration)
        # In an int8 model the remaining floating-point operators run in bfloat16 where the CPU supports it.
        low = self.dtype != torch.float32 and torch.bfloat16 in self.dtypes(example.device)
        self.precision = "bf16" if low else "f32"
        del self.graph, self.calibration  # free their memory
        self.requests = threading.local()  # an infer request serves one thread at a time
        super().prepare(example)

    def __call__(self, images: Tensor) -> Outputs:
        compiled, requests = self.compiled_for(images), vars(self.requests)
        key = str(compiled is self.static)
        if key not in requests:
            requests[key] = compiled.create_infer_request()
        pixels = images.detach().cpu().contiguous().numpy()
        return _as_outputs(requests[key].infer({0: pixels}, share_inputs=True).values())

    def compile(self, example: Tensor, dynamic: bool) -> Any:
        """Return a compiled model."""
        model = self.model.clone()
        if not dynamic:
            model.reshape(list(example.shape))
        return self.core.compile_model(model, "CPU", cpu_settings(self.precision))

    @classmethod
    def dtypes(cls, device: torch.device) -> tuple[torch.dtype, ...]:
        if device.type != "cpu":
            return ()
        capabilities = openvino_core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
        return (torch.float32, *((torch.bfloat16,) if "BF16" in capabilities else ()), torch.int8)


#: Engines by name.
ENGINES: dict[str, type[Engine]] = {
    engine.name: engine for engine in (EagerEngine, InductorEngine, OnnxRuntimeEngine, OpenVinoEngine)
}


class _FusedGELU(nn.Module):
    """A convolution or linear layer with a fused GELU."""

    def __init__(self, layer: nn.Conv2d | nn.Linear) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        layer = self.layer
        if isinstance(layer, nn.Linear):
            return torch.ops.mkldnn._linear_pointwise(x, layer.weight, layer.bias, "gelu", [], "none")
        settings = (layer.padding, layer.stride, layer.dilation, layer.groups)
        return torch.ops.mkldnn._convolution_pointwise(x, layer.weight, layer.bias, *settings, "gelu", [], "none")


def fuse_activations(module: nn.Module) -> None:
    """Fuse each convolution or linear layer of folded blocks with the exact GELU after it, in place.

    Inductor uses the same operators on the CPU. A separate GELU reads and writes the largest feature maps once more.
    """
    for parent in module.modules():
        for layer, act in (("conv1", "act1"), ("conv2", "act2"), ("fc1", "act"), ("0", "1")):
            first, second = getattr(parent, layer, None), getattr(parent, act, None)
            exact = isinstance(second, nn.GELU) and second.approximate == "none"
            if exact and isinstance(first, nn.Conv2d | nn.Linear):
                setattr(parent, layer, _FusedGELU(first))
                setattr(parent, act, nn.Identity())


def _as_outputs(outputs: Iterable[np.ndarray]) -> Outputs:
    tensors = tuple(torch.from_numpy(output) for output in outputs)
    return tensors[0] if len(tensors) == 1 else tensors
