"""What runs a graph: eager PyTorch, Inductor, ONNX Runtime and OpenVINO behind one interface."""

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
    """A graph made ready for images of one shape; those of other shapes it takes too, if not as fast.

    Args:
        graph: what to run; it is left as it is.
        example: images of the shape to be fast at, on the device to run on.
        dtype: type to compute in, one of :meth:`dtypes`.
        calibration: images as the graph takes them, batch by batch, to find the ranges of int8 on.
    """

    name: ClassVar[str]
    needs: ClassVar[tuple[str, ...]] = ()  # packages beside torch
    extra: ClassVar[str] = ""

    @abstractmethod
    def __init__(
        self, graph: InferenceGraph, example: Tensor, dtype: torch.dtype, calibration: Iterable[Tensor] = ()
    ) -> None: ...

    @abstractmethod
    def __call__(self, images: Tensor) -> Outputs:
        """Map images :math:`(B, C, H, W)` to what the graph returns."""

    @classmethod
    def missing(cls) -> str | None:
        """Tell in a line what is missing on this machine to run the engine; ``None`` if nothing is."""
        absent = [package for package in cls.needs if importlib.util.find_spec(package) is None]
        if not absent:
            return None
        return f"engine {cls.name!r} needs {', '.join(absent)}: pip install 'kornia-tinyvit[{cls.extra}]'"

    @classmethod
    @abstractmethod
    def dtypes(cls, device: torch.device) -> tuple[torch.dtype, ...]:
        """Return the types that the engine computes in on a device of this machine; none if it does not run there."""


class EagerEngine(Engine):
    """PyTorch itself, operator by operator; on the CPU with oneDNN's operators that apply GELU as they write."""

    name = "eager"

    def __init__(
        self, graph: InferenceGraph, example: Tensor, dtype: torch.dtype, calibration: Iterable[Tensor] = ()
    ) -> None:
        self.graph = graph.with_dtype(dtype)
        if example.device.type == "cpu" and torch.backends.mkldnn.is_available():
            fuse_activations(self.graph)

    def __call__(self, images: Tensor) -> Outputs:
        with torch.inference_mode():
            out: Outputs = self.graph(images)
            return out

    @classmethod
    def dtypes(cls, device: torch.device) -> tuple[torch.dtype, ...]:
        # Only types that are worth it: on a CPU bfloat16 needs instructions of its own.
        if device.type == "cuda":
            return torch.float32, torch.bfloat16, torch.float16
        if device.type == "cpu" and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
            return (torch.float32,)
        return torch.float32, torch.bfloat16


class InductorEngine(EagerEngine):
    """``torch.compile`` with the weights frozen into the code.

    Compiling takes a minute or so, and seconds in a later process, which finds the compiled code in torch's cache
    (``TORCHINDUCTOR_CACHE_DIR``). Each shape is compiled for itself at first; after a second one sizes are left open.
    """

    name = "inductor"

    def __init__(
        self, graph: InferenceGraph, example: Tensor, dtype: torch.dtype, calibration: Iterable[Tensor] = ()
    ) -> None:
        self.cudagraphs = example.device.type == "cuda"
        options: dict[str, Any] = {"freezing": True, **({"triton.cudagraphs": True} if self.cudagraphs else {})}
        self.compiled = torch.compile(graph.with_dtype(dtype), options=options)

    def __call__(self, images: Tensor) -> Outputs:
        # Freezing asks for no_grad; in inference mode torch would compile a second time.
        with torch.no_grad():
            out: Outputs = self.compiled(images)
        if self.cudagraphs:  # whose next run overwrites the results of this one
            return out.clone() if isinstance(out, Tensor) else tuple(each.clone() for each in out)
        return out

    @classmethod
    def missing(cls) -> str | None:
        if has_compiler():
            return None
        return "engine 'inductor' needs a C++ compiler such as g++, or CXX set to one"


class OnnxRuntimeEngine(Engine):
    """ONNX Runtime on the CPU."""

    name = "onnxruntime"
    needs = ("onnx", "onnxscript", "onnxruntime")
    extra = "export"

    def __init__(
        self, graph: InferenceGraph, example: Tensor, dtype: torch.dtype, calibration: Iterable[Tensor] = ()
    ) -> None:
        self.graph = graph
        self.calibration = calibration
        self.dtype = dtype
        self.size = tuple(example.shape[2:])
        self.session = self._session(example, dynamic_size=False)
        self.open_session: Any = None
        self.lock = threading.Lock()

    def __call__(self, images: Tensor) -> Outputs:
        outputs = self._session_for(images).run(None, {"images": images.detach().cpu().contiguous().numpy()})
        return _results(outputs)

    def _session_for(self, images: Tensor) -> Any:
        if tuple(images.shape[2:]) == self.size:
            return self.session
        with self.lock:
            if self.open_session is None:
                self.open_session = self._session(images, dynamic_size=True)
                del self.graph, self.calibration  # there is nothing more to make of them
        return self.open_session

    def _session(self, example: Tensor, dynamic_size: bool) -> Any:
        import onnxruntime

        # Closed sizes are worth a tenth of the time; an open batch costs nothing.
        model = self.graph.to_onnx(example, dynamic_size)
        if self.dtype == torch.int8:
            model = quantize_onnx(model, self.calibration)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 3
        # Waiting threads that spin take the processor from everything else that the process does.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])

    @classmethod
    def dtypes(cls, device: torch.device) -> tuple[torch.dtype, ...]:
        return (torch.float32, torch.int8) if device.type == "cpu" else ()


class OpenVinoEngine(Engine):
    """OpenVINO on the CPU."""

    name = "openvino"
    needs = ("openvino", "nncf", "onnx", "onnxscript")
    extra = "openvino"

    def __init__(
        self, graph: InferenceGraph, example: Tensor, dtype: torch.dtype, calibration: Iterable[Tensor] = ()
    ) -> None:
        self.core = openvino_core()
        # It cuts an open graph to a shape without loss, so the graph is traced once.
        traced = graph.to_onnx(example, dynamic_size=True)
        self.model = self.core.read_model(traced.SerializeToString())
        if dtype == torch.int8:
            self.model = quantize_openvino(self.model, calibration)
        # What int8 leaves as floats is computed in the narrowest type there is.
        narrow = dtype != torch.float32 and torch.bfloat16 in self.dtypes(example.device)
        self.precision = "bf16" if narrow else "f32"
        self.shape = tuple(example.shape)
        self.compiled = self._compile(self.shape)
        self.open_compiled: Any = None
        self.lock = threading.Lock()
        self.requests = threading.local()  # a request serves one thread at a time

    def __call__(self, images: Tensor) -> Outputs:
        pixels = images.detach().cpu().contiguous().numpy()
        found = self._request_for(images).infer({0: pixels}, share_inputs=True)
        return _results(found.values())

    def _request_for(self, images: Tensor) -> Any:
        key = "closed" if tuple(images.shape) == self.shape else "open"
        request = getattr(self.requests, key, None)
        if request is None:
            with self.lock:
                if key == "open" and self.open_compiled is None:
                    self.open_compiled = self._compile(None)
            request = (self.compiled if key == "closed" else self.open_compiled).create_infer_request()
            setattr(self.requests, key, request)
        return request

    def _compile(self, shape: tuple[int, ...] | None) -> Any:
        model = self.model.clone()
        if shape is not None:
            model.reshape(list(shape))
        return self.core.compile_model(model, "CPU", cpu_settings(self.precision))

    @classmethod
    def dtypes(cls, device: torch.device) -> tuple[torch.dtype, ...]:
        if device.type != "cpu":
            return ()
        able = openvino_core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
        return (torch.float32, *((torch.bfloat16,) if "BF16" in able else ()), torch.int8)


#: The engines by name, in the order in which they are told.
ENGINES: dict[str, type[Engine]] = {
    engine.name: engine for engine in (EagerEngine, InductorEngine, OnnxRuntimeEngine, OpenVinoEngine)
}


class _Fused(nn.Module):
    """A convolution or linear layer that applies GELU to its output as it writes it."""

    def __init__(self, layer: nn.Conv2d | nn.Linear) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        layer = self.layer
        if isinstance(layer, nn.Linear):
            return torch.ops.mkldnn._linear_pointwise(x, layer.weight, layer.bias, "gelu", [], "none")
        sizes = (layer.padding, layer.stride, layer.dilation, layer.groups)
        return torch.ops.mkldnn._convolution_pointwise(x, layer.weight, layer.bias, *sizes, "gelu", [], "none")


def fuse_activations(module: nn.Module) -> None:
    """Join each convolution or linear layer of folded blocks with the GELU behind it, in place.

    These are the operators that Inductor takes on the CPU; GELU on its own reads and writes the widest maps once more.
    """
    for parent in module.modules():
        for layer, act in (("conv1", "act1"), ("conv2", "act2"), ("fc1", "act"), ("0", "1")):
            first, second = getattr(parent, layer, None), getattr(parent, act, None)
            exact = isinstance(second, nn.GELU) and second.approximate == "none"
            if exact and isinstance(first, nn.Conv2d | nn.Linear):
                setattr(parent, layer, _Fused(first))
                setattr(parent, act, nn.Identity())


def _results(outputs: Iterable[np.ndarray]) -> Outputs:
    tensors = tuple(torch.from_numpy(output) for output in outputs)
    return tensors[0] if len(tensors) == 1 else tensors
