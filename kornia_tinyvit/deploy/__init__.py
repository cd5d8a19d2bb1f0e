"""Deployment: optimized inference with several engines, export and quantization.

:func:`optimize` returns a callable with the model's signature and results; :func:`export_onnx` and
:func:`export_program` write files for other runtimes. All start from a folded graph
(:func:`~kornia_tinyvit.folding.fold`).
"""

from kornia_tinyvit.deploy.accuracy import Agreement, compare
from kornia_tinyvit.deploy.engines import ENGINES
from kornia_tinyvit.deploy.export import ExportError, ExportTask, export_onnx, export_program
from kornia_tinyvit.deploy.graph import build_graph
from kornia_tinyvit.deploy.optimization import Choice, Optimized, optimize
from kornia_tinyvit.deploy.quantization import quantize_onnx, quantize_openvino
from kornia_tinyvit.deploy.sam import export_mobile_sam

__all__ = [
    "ENGINES",
    "Agreement",
    "Choice",
    "ExportError",
    "ExportTask",
    "Optimized",
    "build_graph",
    "compare",
    "export_mobile_sam",
    "export_onnx",
    "export_program",
    "optimize",
    "quantize_onnx",
    "quantize_openvino",
]
