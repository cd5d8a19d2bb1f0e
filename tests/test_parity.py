"""Agreement with the original implementations: recorded outputs, and kornia's network."""

import pytest
import torch
from kornia.models.tiny_vit import TinyViT as KorniaTinyViT
from safetensors.torch import load_file

from kornia_tinyvit import TinyViT, TinyViTConfig, load_checkpoint
from tests.conftest import shared

SMALL = TinyViTConfig(
    depths=(1, 1, 2, 1),
    embed_dims=(32, 64, 96, 128),
    num_heads=(1, 2, 3, 4),
    window_sizes=(7, 7, 14, 7),
    num_classes=10,
)
CLOSE = {"rtol": 0, "atol": 1e-4}


def image(batch: int, height: int, width: int) -> torch.Tensor:
    """The images of the recorded outputs."""
    b = torch.arange(batch, dtype=torch.float64).view(-1, 1, 1, 1)
    c = torch.arange(3, dtype=torch.float64).view(1, -1, 1, 1)
    y = torch.arange(height, dtype=torch.float64).view(1, 1, -1, 1)
    x = torch.arange(width, dtype=torch.float64).view(1, 1, 1, -1)
    return (0.5 + 0.5 * torch.sin(0.05 * (c + 1) * x + 0.03 * (b + 1) * y + 0.0004 * x * y + c + b)).float()


class TestRecorded:
    @pytest.mark.parametrize("suffix", ["safetensors", "pth"])
    @pytest.mark.parametrize("size", [224, 256])
    def test_official(self, size, suffix):
        expected = load_file(shared(f"reference/official_tiny_{size}_outputs.safetensors"))
        model = TinyViT.from_config(SMALL, pretrained=shared(f"reference/official_tiny.{suffix}"))
        assert not model.training
        x = image(2, size, size)
        torch.testing.assert_close(model(x), expected["logits"], **CLOSE)
        x = model.patch_embed(x)
        torch.testing.assert_close(x, expected["patch_embed"], **CLOSE)
        for number, stage in enumerate(model.layers):
            x = stage(x)
            torch.testing.assert_close(x.flatten(2).transpose(1, 2), expected[f"layers.{number}"], **CLOSE)

    @pytest.mark.parametrize("size", [(192, 320), (224, 224), (225, 287)])
    def test_timm(self, size):
        expected = load_file(shared("reference/timm_tiny_{}x{}_outputs.safetensors".format(*size)))
        model = TinyViT.from_config(pretrained=shared("reference/timm_tiny.safetensors"))
        assert model.config.replace(drop_path_rate=0.0) == SMALL
        x = image(1, *size)
        torch.testing.assert_close(model(x), expected["logits"], **CLOSE)
        for number, features in enumerate(model.forward_intermediates(x)):
            torch.testing.assert_close(features, expected[f"stage{number}"], **CLOSE)

    def test_mobile_sam(self):
        expected = load_file(shared("reference/mobilesam_tiny_1024_outputs.safetensors"))
        model = TinyViT.from_config(pretrained=shared("reference/mobilesam_tiny_encoder.safetensors"))
        assert model.config.mobile_sam
        assert model.config.img_size == 1024
        with torch.inference_mode():
            embedding = model(image(1, 1024, 1024))
        torch.testing.assert_close(embedding[:, :, ::4, ::4], expected["embedding_every_4th"], **CLOSE)
        torch.testing.assert_close(embedding.mean().view(1), expected["mean"], **CLOSE)
        torch.testing.assert_close(embedding.std().view(1), expected["std"], **CLOSE)


def kornia_network(variant: str, **kwargs) -> KorniaTinyViT:
    """kornia's network with weights whose output depends on the image and on every attention bias."""
    torch.manual_seed(0)
    model = KorniaTinyViT.from_config(variant, **kwargs)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("attention_biases"):
                parameter.normal_()
            elif parameter.ndim == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.1)
                module.running_var.uniform_(0.3, 1.0)
    return model.eval()


KORNIA = {
    "5m": ("5m", {}, 224),
    "11m": ("11m", {}, 224),
    "21m": ("21m", {}, 224),
    "21m-384": ("21m", {"img_size": 384, "window_sizes": (12, 12, 24, 12), "depths": (1, 1, 2, 1)}, 384),
    "5m-256": ("5m", {"img_size": 256}, 256),
    "mobile_sam": ("5m", {"img_size": 256, "mobile_sam": True}, 256),
}


class TestKornia:
    @pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * n.startswith("21m")) for n in KORNIA])
    def test_weights_outputs_and_input_gradients(self, name):
        variant, kwargs, size = KORNIA[name]
        theirs = kornia_network(variant, **kwargs)
        ours = TinyViT.from_config(variant, **kwargs).eval()
        ours.load_state_dict(theirs.state_dict(), strict=True)
        x = image(2, size, size)  # with one image, kornia's input gradient is wrong; see TestOneImage
        ours_x, theirs_x = (x.clone().requires_grad_() for _ in range(2))
        out, expected = ours(ours_x), theirs(theirs_x)
        assert expected.std() > 0.05
        torch.testing.assert_close(out, expected, **CLOSE)
        weights = torch.linspace(-1, 1, out.numel()).view_as(out)
        (out * weights).sum().backward()
        (expected * weights).sum().backward()
        scale = theirs_x.grad.abs().max()
        assert scale > 0
        torch.testing.assert_close(ours_x.grad / scale, theirs_x.grad / scale, **CLOSE)

    @pytest.mark.parametrize("name", ["5m", "mobile_sam"])
    def test_weights_from_ours(self, name):
        variant, kwargs, _size = KORNIA[name]
        theirs = KorniaTinyViT.from_config(variant, **kwargs)
        ours = TinyViT.from_config(variant, **kwargs)
        theirs.load_state_dict(ours.state_dict(), strict=True)
        for key, value in theirs.state_dict().items():
            assert torch.equal(value, ours.state_dict()[key])

    def test_training_mode_agrees(self):
        theirs = kornia_network("5m").train()
        ours = TinyViT.from_config("5m").train()
        ours.load_state_dict(theirs.state_dict())
        x = image(4, 224, 224)
        out, expected = ours(x), theirs(x)
        torch.testing.assert_close(out, expected, **CLOSE)
        for _network, result in ((ours, out), (theirs, expected)):
            torch.nn.functional.cross_entropy(result, torch.arange(4)).backward()
        scale = max(parameter.grad.abs().max() for parameter in theirs.parameters())
        ours_parameters = dict(ours.named_parameters())
        for name, parameter in theirs.named_parameters():
            torch.testing.assert_close(ours_parameters[name].grad / scale, parameter.grad / scale, **CLOSE)

    def test_interpolated_windows_agree(self, tmp_path, monkeypatch):
        """kornia's adaptation of a checkpoint to other window sizes gives the same attention biases."""
        import kornia.models.tiny_vit as original

        path = tmp_path / "tiny_vit_5m_22kto1k_distill.pth"
        torch.save({"model": kornia_network("5m").state_dict()}, path)
        theirs = KorniaTinyViT.from_config("5m", img_size=256, window_sizes=[8, 8, 16, 8])
        monkeypatch.setenv("TORCH_HOME", str(tmp_path))
        original._load_pretrained(theirs, path.as_uri())
        ours = TinyViT.from_config("5m", img_size=256, window_sizes="scale")
        load_checkpoint(ours, path)
        for key, value in theirs.state_dict().items():
            torch.testing.assert_close(ours.state_dict()[key], value)


class TestOneImage:
    def test_input_gradient(self):
        """The gradient of one image agrees with a difference quotient in float64.

        torch 2.13's batch norm in evaluation mode returns a wrong input gradient on the CPU for a batch of one image
        whose output gradient is in channels-last memory, as from kornia's mean over tokens. ConvBN does not call it.
        """
        ours = TinyViT.from_config("5m").eval()
        ours.load_state_dict(kornia_network("5m").state_dict())
        ours.double()
        x = image(1, 64, 64).double().requires_grad_()
        direction = torch.randn(x.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        (gradient,) = torch.autograd.grad(ours(x)[0, 3], x)
        with torch.no_grad():
            step = 1e-6 * direction
            quotient = (ours(x + step)[0, 3] - ours(x - step)[0, 3]) / 2e-6
        torch.testing.assert_close((gradient * direction).sum(), quotient, rtol=1e-5, atol=1e-8)
