"""Exports with torch.export and to ONNX."""

import pytest
import torch

pytest.importorskip("transformers")

from tests.huggingface.helpers import tiny_classifier


class Logits(torch.nn.Module):
    """The logits of a model as a function of images."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.model(pixel_values).logits


def test_program():
    model = tiny_classifier(depths=(1, 1, 1, 1))
    model.set_attn_implementation("eager")
    images = torch.rand(2, 3, 64, 64)
    program = torch.export.export(model, (images,), dynamic_shapes=[{0: torch.export.Dim.AUTO}])
    found = program.module()(torch.cat([images, images[:1]]))
    torch.testing.assert_close(found.logits[:2], model(images).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_onnx(tmp_path):
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    model, path = tiny_classifier(depths=(1, 1, 1, 1)), tmp_path / "model.onnx"
    images = torch.rand(2, 3, 64, 64)
    # With gradients, torch 2.13 cannot decompose its fused attention.
    with torch.no_grad():
        torch.onnx.export(
            Logits(model).eval(),
            (images,),
            path,
            dynamo=True,
            input_names=["pixel_values"],
            output_names=["logits"],
            dynamic_shapes=[{0: "batch"}],
            verbose=False,
        )
    more = torch.rand(3, 3, 64, 64)
    (logits,) = runtime.InferenceSession(path).run(None, {"pixel_values": more.numpy()})
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(logits), model(more).logits, rtol=1e-4, atol=1e-4)
