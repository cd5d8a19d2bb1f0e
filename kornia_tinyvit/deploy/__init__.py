"""Deployment: the same network, faster, in the runtime of your choice.

:func:`optimize` returns a callable with the model's signature and results; :func:`export_onnx` and
:func:`export_program` write files that other runtimes load. Both start from a folded graph (:func:`fold`).
"""

from kornia_tinyvit.deploy.accuracy import Agreement, compare
from kornia_tinyvit.deploy.allocator import keep_memory
from kornia_tinyvit.deploy.engines import ENGINES
from kornia_tinyvit.deploy.export import ExportError, export_onnx, export_program
from kornia_tinyvit.deploy.folding import fold
from kornia_tinyvit.deploy.graph import build_graph
from kornia_tinyvit.deploy.optimizing import Choice, Optimized, optimize
from kornia_tinyvit.deploy.quantization import quantize_onnx, quantize_openvino

__all__ = [
    "ENGINES",
    "Agreement",
    "Choice",
    "ExportError",
    "Optimized",
    "build_graph",
    "compare",
    "export_onnx",
    "export_program",
    "fold",
    "keep_memory",
    "optimize",
    "quantize_onnx",
    "quantize_openvino",
]
