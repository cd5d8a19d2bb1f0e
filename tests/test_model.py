import copy
import io
import math
import pickle
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from kornia.models.common import DropPath
from torch import Tensor, nn
from torch.autograd import gradcheck
from torch.func import functional_call, grad, jacfwd, jacrev, jvp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from kornia_tinyvit import (
    CheckpointError,
    ImageClassifier,
    MobileSAM,
    SemanticSegmenter,
    TinyViT,
    TinyViTConfig,
    TinyViTDetector,
    load_checkpoint,
)
from tests.conftest import SHALLOW, TINY, liven


class TestSmoke:
    @pytest.mark.parametrize(("variant", "millions"), [("1m", 1.27), ("5m", 5.39), ("11m", 10.99), ("21m", 21.19)])
    def test_parameters(self, variant, millions):
        with torch.device("meta"):
            model = TinyViT.from_config(variant, num_classes=10 if variant == "1m" else 1000)
        assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, abs=0.01)

    def test_modes(self):
        assert TinyViT.from_config("1m").training
        assert not TinyViT.from_config("1m", pretrained="cifar10").training
        assert TinyViT.from_config("1m", pretrained="cifar10", num_classes=3).training

    def test_signature_is_kornias(self):
        import inspect

        from kornia.models.tiny_vit import TinyViT as KorniaTinyViT

        ours, theirs = (inspect.signature(cls).parameters for cls in (TinyViT, KorniaTinyViT))
        assert list(ours) == list(theirs)
        assert [p.default for p in ours.values()] == [p.default for p in theirs.values()]

    def test_drop_path_grows_linearly(self):
        model = TinyViT(**TINY, drop_path_rate=0.4)
        rates = [m.drop_prob for m in model.modules() if isinstance(m, DropPath)]
        assert rates == pytest.approx([0.0, 0.1, 0.1, 0.2, 0.2, 0.3, 0.3, 0.4, 0.4])


class TestShapes:
    @given(st.integers(32, 90), st.integers(32, 90), st.integers(0, 3), st.sampled_from([1, 3, 4]))
    def test_any_size(self, height, width, batch, channels):
        torch.manual_seed(0)
        model = TinyViT(**TINY, in_chans=channels).eval()
        x = torch.rand(batch, channels, height, width)
        assert model(x).shape == (batch, 7)
        stages = model.forward_intermediates(x)
        for features, dim, stride in zip(stages, model.feature_channels, model.feature_strides, strict=True):
            assert features.shape == (batch, dim, -(-height // stride), -(-width // stride))
        torch.testing.assert_close(model.forward_features(x), stages[-1])

    @given(
        st.tuples(*[st.integers(1, 3)] * 4),
        st.tuples(*[st.integers(1, 3)] * 4),
        st.tuples(*[st.integers(1, 8)] * 4),
        st.sampled_from([0.5, 2.0, 3.7]),
        st.sampled_from([1, 3, 5]),
    )
    def test_any_configuration(self, depths, heads, windows, ratio, kernel):
        dims = tuple(8 * head for head in heads)
        model = TinyViT(64, 3, 5, dims, depths, heads, windows, mlp_ratio=ratio, local_conv_size=kernel).train()
        out = model(torch.rand(2, 3, 40, 52))
        assert out.shape == (2, 5)
        out.sum().backward()
        assert all(p.grad is not None for p in model.parameters())

    def test_head(self, tiny, images):
        features = tiny.forward_features(images)
        pooled = tiny.forward_head(features, pre_logits=True)
        torch.testing.assert_close(tiny.head(pooled), tiny(images))
        torch.testing.assert_close(pooled, tiny.norm_head(features.mean((2, 3))))

    def test_reset_classifier(self, tiny, images):
        before = tiny.forward_features(images)
        tiny.reset_classifier(3)
        assert tiny(images).shape == (2, 3)
        assert tiny.config.num_classes == 3
        tiny.reset_classifier(0)
        torch.testing.assert_close(tiny(images), tiny.forward_head(before, pre_logits=True))
        assert "head.weight" not in tiny.state_dict()
        with pytest.raises(ValueError, match="num_classes must be an integer of at least 0"):
            tiny.reset_classifier(-1)

    def test_failing_to_build_a_head_changes_nothing(self, tiny, images, monkeypatch):
        before = tiny.config, tiny(images)

        def fail(config):
            raise MemoryError

        monkeypatch.setattr("kornia_tinyvit.model._build_head", fail)
        with pytest.raises(MemoryError):
            tiny.reset_classifier(3)
        assert tiny.config is before[0]
        assert torch.equal(tiny(images), before[1])

    def test_mobile_sam(self):
        model = TinyViT(**TINY, mobile_sam=True).eval()
        assert model.feature_strides == (4, 8, 16, 16)
        assert model(torch.rand(1, 3, 96, 64)).shape == (1, 256, 6, 4)

    def test_rectangles_are_not_transposed(self, tiny):
        x = torch.rand(1, 3, 96, 64)
        symmetric = copy.deepcopy(tiny)
        for name, parameter in symmetric.named_parameters():
            if parameter.ndim == 4:
                parameter.data = (parameter.data + parameter.data.transpose(2, 3)) / 2
            if name.endswith("attention_biases"):
                side = math.isqrt(parameter.shape[1])
                table = parameter.data.view(-1, side, side)
                parameter.data = ((table + table.transpose(1, 2)) / 2).flatten(1)
        torch.testing.assert_close(symmetric(x), symmetric(x.transpose(2, 3)), rtol=1e-4, atol=1e-5)
        assert not torch.allclose(tiny(x), tiny(x.transpose(2, 3)), atol=1e-3)


class TestExceptions:
    @pytest.mark.parametrize(
        ("images", "error", "message"),
        [
            (torch.rand(1, 1, 64, 64), ValueError, r"shape \(B, 3, H, W\); got \(1, 1, 64, 64\).*in_chans"),
            (torch.rand(3, 64, 64), ValueError, "unsqueeze"),
            (torch.zeros(1, 3, 64, 64, dtype=torch.uint8), TypeError, r"torch.uint8.*float\(\) / 255"),
            (torch.rand(1, 3, 31, 64), ValueError, "at least 32x32 pixels; got 31x64"),
            (torch.rand(1, 3, 0, 0), ValueError, "at least 32x32 pixels; got 0x0"),
            ("photo.jpg", TypeError, "must be a floating point tensor.*got str"),
        ],
    )
    def test_images(self, tiny, images, error, message):
        with pytest.raises(error, match=message):
            tiny(images)

    def test_from_config(self):
        with pytest.raises(ValueError, match="Pass a variant"):
            TinyViT.from_config()
        with pytest.raises(ValueError, match="no field widht"):
            TinyViT.from_config("5m", widht=3)
        with pytest.raises(CheckpointError, match=r"no weights and no file 'in2k'; expected one of in1k \(5m\)"):
            TinyViT.from_config("5m", pretrained="in2k")
        with pytest.raises(CheckpointError, match="pretrained=True requires a variant"):
            TinyViT.from_config(TinyViTConfig(), pretrained=True)

    def test_layer_decay(self, tiny):
        with pytest.raises(ValueError, match="layer_decay"):
            tiny.parameter_groups(1e-3, layer_decay=0.0)


class TestGradients:
    def test_gradcheck(self):
        torch.manual_seed(0)
        config = TINY | {
            "embed_dims": (4, 4, 4, 4),
            "num_heads": (1, 1, 2, 2),
            "depths": (1, 1, 1, 1),
            "num_classes": 2,
        }
        model = liven(TinyViT(**config)).double()
        x = torch.rand(1, 3, 32, 33, dtype=torch.float64, requires_grad=True)
        assert gradcheck(model, (x,), fast_mode=True)

    def test_checkpointing_changes_nothing(self, images):
        torch.manual_seed(0)
        model = TinyViT(**TINY, use_checkpoint=True, drop_path_rate=0.3, drop_rate=0.1).train()
        plain = TinyViT(**TINY, drop_path_rate=0.3, drop_rate=0.1).train()
        plain.load_state_dict(model.state_dict())
        results = []
        for each in (model, plain):
            torch.manual_seed(5)
            x = images.clone().requires_grad_()
            out = each(x)
            out.square().sum().backward()
            results.append([out, x.grad, *(p.grad for p in each.parameters())])
        for ours, theirs in zip(*results, strict=True):
            torch.testing.assert_close(ours, theirs)

    def test_checkpointing_saves_memory(self, images):
        kept = {}
        for use in (False, True):
            model, saved = TinyViT(**TINY, use_checkpoint=use).train(), []
            with torch.autograd.graph.saved_tensors_hooks(lambda t, s=saved: (s.append(t.numel()), t)[1], lambda t: t):
                model(images)
            kept[use] = sum(saved)
        assert kept[True] < 0.6 * kept[False]


class TestParameterGroups:
    def test_every_parameter_once(self, tiny):
        groups = tiny.parameter_groups(1e-3, 0.05, 0.8)
        grouped = [id(p) for group in groups for p in group["params"]]
        assert sorted(grouped) == sorted(id(p) for p in tiny.parameters())

    def test_decay_and_rates(self, tiny):
        where = {id(p): group for group in tiny.parameter_groups(1.0, 0.05, 0.5) for p in group["params"]}
        named = {name: where[id(p)] for name, p in tiny.named_parameters()}
        assert named["head.weight"]["weight_decay"] == 0.05
        for name in ("head.bias", "norm_head.weight", "layers.1.blocks.0.attn.attention_biases"):
            assert named[name]["weight_decay"] == 0.0
        # Five blocks: 1, 1, 2, 1. The rate halves from each block to the one before it.
        expected = {
            "patch_embed.seq.0.c.weight": 4,
            "layers.0.blocks.0.conv1.c.weight": 4,
            "layers.0.downsample.conv1.c.weight": 4,
            "layers.1.blocks.0.mlp.fc1.weight": 3,
            "layers.2.blocks.0.mlp.fc1.weight": 2,
            "layers.2.blocks.1.mlp.fc1.weight": 1,
            "layers.2.downsample.conv3.c.weight": 1,
            "layers.3.blocks.0.mlp.fc1.weight": 0,
            "norm_head.weight": 0,
            "head.weight": 0,
        }
        assert {name: named[name]["lr"] for name in expected} == {n: 0.5**power for n, power in expected.items()}

    def test_frozen_parameters_are_left_out(self, tiny):
        tiny.patch_embed.requires_grad_(False)
        grouped = {id(p) for group in tiny.parameter_groups(1e-3) for p in group["params"]}
        assert not grouped & {id(p) for p in tiny.patch_embed.parameters()}
        torch.optim.AdamW(tiny.parameter_groups(1e-3))


class TestNoStaleCache:
    """The same weights give the same outputs, whatever happened to the network before."""

    def test_load_in_evaluation_mode(self, tiny, images):
        before = tiny(images)
        other = liven(TinyViT(**TINY), seed=3)
        tiny.load_state_dict(other.state_dict())
        assert torch.equal(tiny(images), other(images))
        assert not torch.allclose(before, other(images))

    def test_change_in_place(self, tiny, images):
        tiny(images)
        reference = copy.deepcopy(tiny)
        with torch.no_grad():
            for each in (tiny, reference):
                each.layers[1].blocks[0].attn.attention_biases.add_(1.0).mul_(torch.linspace(0, 2, 16))
                each.patch_embed.seq[0].bn.running_var.mul_(2)
        assert torch.equal(tiny(images), reference(images))

    @pytest.mark.parametrize(
        "copy_of",
        [
            copy.deepcopy,
            lambda model: pickle.loads(pickle.dumps(model)),
            lambda model: model.double().float(),
            lambda model: model.to(memory_format=torch.channels_last),
            lambda model: model.train().eval(),
        ],
        ids=["deepcopy", "pickle", "cast", "channels_last", "train_eval"],
    )
    def test_copies(self, tiny, images, copy_of):
        expected = tiny(images)
        torch.testing.assert_close(copy_of(tiny)(images), expected)

    def test_after_training_steps(self, tiny, images):
        tiny(images)
        optimizer = torch.optim.SGD(tiny.train().parameters(), 0.1)
        tiny(images).square().sum().backward()
        optimizer.step()
        fresh = TinyViT(**TINY)
        fresh.load_state_dict(tiny.state_dict())
        assert torch.equal(tiny.eval()(images), fresh.eval()(images))

    def test_training_after_inference_mode(self, tiny, images):
        with torch.inference_mode():
            tiny(images)
        tiny(images).sum().backward()

    def test_torch_save(self, tiny, images):
        buffer = io.BytesIO()
        torch.save(tiny, buffer)
        buffer.seek(0)
        assert torch.equal(torch.load(buffer, weights_only=False)(images), tiny(images))

    def test_meta_device(self, tiny, images):
        with torch.device("meta"):
            empty = TinyViT(**TINY)
        empty.load_state_dict(tiny.state_dict(), assign=True)
        assert not any(t.is_meta for t in [*empty.parameters(), *empty.buffers()])
        assert torch.equal(empty.eval()(images), tiny(images))

    def test_meta_device_filled_by_load_checkpoint(self, tiny, images):
        with torch.device("meta"):
            empty = TinyViT(**TINY)
        load_checkpoint(empty, {name: tensor.double() for name, tensor in tiny.state_dict().items()})
        assert all(p.dtype == torch.float32 and p.requires_grad for p in empty.parameters())
        assert torch.equal(empty.eval()(images), tiny(images))

    def test_no_buffer_outside_the_state_dict(self, tiny):
        assert dict(tiny.named_buffers()).keys() <= tiny.state_dict().keys()


class TestPrecision:
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_half(self, tiny, images, dtype):
        expected = tiny(images)
        out = copy.deepcopy(tiny).to(dtype)(images.to(dtype))
        assert out.dtype == dtype
        assert (out.float() - expected).abs().max() < 0.1 * expected.std() + 0.05

    def test_autocast_trains(self, tiny, images):
        with torch.autocast("cpu", torch.bfloat16):
            loss = tiny.train()(images).float().square().mean()
        loss.backward()
        assert all(p.grad.isfinite().all() for p in tiny.parameters())

    @pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
    def test_cuda(self, tiny, images):
        expected = tiny(images)
        torch.testing.assert_close(tiny.cuda()(images.cuda()).cpu(), expected, rtol=1e-3, atol=1e-3)


def counting_backend(graphs: list):
    """A backend that collects the graphs of dynamo and runs them eagerly."""

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    return backend


@pytest.fixture
def shallow() -> TinyViT:
    torch.manual_seed(0)
    return liven(TinyViT(**SHALLOW))


class TestCompile:
    @pytest.mark.slow
    def test_one_graph_for_all_batch_sizes(self):
        torch.compiler.reset()
        graphs: list = []
        model = liven(TinyViT(**SHALLOW))
        fast = torch.compile(model, backend=counting_backend(graphs), fullgraph=True)
        # torch selects another CPU convolution from 16 images on, which makes a second graph for any network.
        for batch in (2, 3, 5, 15):
            x = torch.rand(batch, 3, 64, 64)
            torch._dynamo.mark_dynamic(x, 0)
            torch.testing.assert_close(fast(x), model(x), rtol=1e-3, atol=1e-4)
        assert len(graphs) == 1
        for batch in (16, 33, 64):
            fast(torch.rand(batch, 3, 64, 64))
        assert len(graphs) == 2

    @pytest.mark.slow
    def test_unmarked_batch_sizes_make_two_graphs(self):
        torch.compiler.reset()
        graphs: list = []
        model = TinyViT(**SHALLOW).eval()
        fast = torch.compile(model, backend=counting_backend(graphs), fullgraph=True)
        for batch in (2, 3, 5, 15):
            fast(torch.rand(batch, 3, 64, 64))
        assert len(graphs) == 2  # the first has a static batch size, the second a dynamic one

    @pytest.mark.slow
    def test_inductor(self, shallow, images):
        torch.compiler.reset()
        fast = torch.compile(shallow, fullgraph=True)
        with torch.inference_mode():
            torch.testing.assert_close(fast(images), shallow(images), rtol=1e-3, atol=1e-4)

    @pytest.mark.slow
    def test_training_step(self, shallow, images):
        torch.compiler.reset()
        fast = torch.compile(copy.deepcopy(shallow).train(), backend="aot_eager", fullgraph=True)
        plain = copy.deepcopy(shallow).train()
        for model in (fast, plain):
            model(images).square().sum().backward()
        for ours, theirs in zip(fast.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-3, atol=1e-4)


class TestExport:
    @pytest.mark.parametrize("example", [(65, 97), (64, 64), (224, 160)])
    @pytest.mark.slow
    def test_dynamic(self, shallow, example):
        from torch.export import Dim

        # torch's convolutions specialize on one image and on a smallest feature map of one cell.
        shapes = ({0: Dim("batch", min=2), 2: Dim("height", min=33), 3: Dim("width", min=33)},)
        program = torch.export.export(shallow, (torch.rand(2, 3, *example),), dynamic_shapes=shapes).module()
        for size in ((2, 3, 64, 64), (3, 3, 70, 33), (2, 3, 128, 96), (4, 3, 39, 39), (5, 3, 255, 77)):
            x = torch.rand(size)
            torch.testing.assert_close(program(x), shallow(x))

    def test_intermediates(self, shallow, images):
        class Backbone(nn.Module):
            def __init__(self):
                super().__init__()
                self.model = shallow

            def forward(self, x):
                return self.model.forward_intermediates(x)

        program = torch.export.export(Backbone(), (images,))
        torch.testing.assert_close(program.module()(images), shallow.forward_intermediates(images))


class TestTransforms:
    """Transforms of torch.func, TorchScript and torch's own ONNX export."""

    IMAGES = torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    LABELS = torch.tensor([0, 3, 6])

    def test_vmap(self, tiny):
        found = vmap(lambda image: tiny(image[None])[0])(self.IMAGES)
        torch.testing.assert_close(found, tiny(self.IMAGES))

    def test_gradients_per_sample(self, tiny):
        weights, buffers = dict(tiny.named_parameters()), dict(tiny.named_buffers())

        def loss(weights, image, label):
            return F.cross_entropy(functional_call(tiny, (weights, buffers), image[None]), label[None])

        found = vmap(grad(loss), (None, 0, 0))(weights, self.IMAGES, self.LABELS)
        for index, (image, label) in enumerate(zip(self.IMAGES, self.LABELS, strict=True)):
            expected = torch.autograd.grad(loss(weights, image, label), list(weights.values()))
            for value, gradients in zip(expected, found.values(), strict=True):
                torch.testing.assert_close(gradients[index], value, atol=1e-4, rtol=1e-3)

    @pytest.mark.slow
    def test_derivatives(self, shallow):
        """In forward and reverse mode, with the attention kernel that has a derivative in forward mode."""
        model = shallow.double()
        image = self.IMAGES[:1, :, :32, :32].double()
        with sdpa_kernel(SDPBackend.MATH):
            forward, reverse = jacfwd(model)(image), jacrev(model)(image)
            _, tangent = jvp(model, (image,), (image,))
        torch.testing.assert_close(forward, reverse)
        torch.testing.assert_close(tangent, (reverse * image).sum((2, 3, 4, 5)))

    @pytest.mark.parametrize("training", [False, True])
    def test_script(self, tiny, training):
        model = TinyViT(**TINY | {"drop_rate": 0.1, "drop_path_rate": 0.2}).train(training)
        model.load_state_dict(tiny.state_dict())
        scripted = torch.jit.script(model)
        for size in ((64, 64), (96, 64), (50, 75), (33, 200)):
            images = torch.rand(2, 3, *size)
            torch.testing.assert_close(scripted.eval()(images), tiny(images), atol=1e-5, rtol=1e-5)
        scripted.train()(self.IMAGES).sum().backward()
        assert all(parameter.grad is not None for parameter in model.parameters())
        assert not torch.equal(model.patch_embed.seq[0].bn.running_mean, tiny.patch_embed.seq[0].bn.running_mean)

    def test_script_of_mobile_sam(self):
        model = liven(TinyViT(**SHALLOW | {"mobile_sam": True}))
        scripted = torch.jit.script(model)
        torch.testing.assert_close(scripted(self.IMAGES), model(self.IMAGES), atol=1e-4, rtol=1e-4)

    @pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
    @pytest.mark.parametrize("case", ["network", "classifier", "segmenter", "detector", "encoder", "mask decoder"])
    def test_trace(self, shallow, case):
        module, inputs = build_case(shallow, case)
        with torch.no_grad():
            expected = module(*inputs)
            if case == "mask decoder":  # whose last argument is not a tensor
                module.forward, inputs = partial(type(module).forward, module, multimask_output=True), inputs[:-1]
            traced = torch.jit.trace(module, inputs)
            torch.testing.assert_close(traced(*inputs), expected, atol=1e-5, rtol=1e-5)

    @pytest.mark.slow
    @pytest.mark.parametrize("gradients", [True, False])
    @pytest.mark.parametrize("case", ["network", "classifier", "segmenter", "detector", "encoder", "mask decoder"])
    def test_onnx(self, shallow, case, gradients):
        """torch's exporter without this package's folding."""
        onnxruntime = pytest.importorskip("onnxruntime")
        module, inputs = build_case(shallow, case)
        with torch.set_grad_enabled(gradients):
            program = torch.onnx.export(module, inputs, dynamo=True, verbose=False)
            expected = module(*inputs)
        session = onnxruntime.InferenceSession(program.model_proto.SerializeToString())
        names = [each.name for each in session.get_inputs()]
        found = session.run(None, dict(zip(names, (x.numpy() for x in inputs if isinstance(x, Tensor)), strict=True)))
        for output, value in zip(found, expected if isinstance(expected, tuple) else [expected], strict=True):
            torch.testing.assert_close(torch.from_numpy(output), value.detach(), atol=1e-4, rtol=1e-4)


def build_case(network: TinyViT, case: str) -> tuple[nn.Module, tuple[object, ...]]:
    """Return a module around a network, in evaluation mode, and its inputs."""
    torch.manual_seed(0)
    images, image = torch.rand(1, 3, 64, 64), torch.rand(1, 256, 4, 4)
    if case == "encoder":
        return liven(TinyViT(**SHALLOW | {"mobile_sam": True})), (images,)
    if case == "mask decoder":
        sam = MobileSAM(TinyViT(**SHALLOW | {"mobile_sam": True})).eval()
        position = sam.prompt_encoder.get_dense_pe().detach()
        return sam.mask_decoder, (image, position, torch.rand(2, 3, 256), torch.rand(2, 256, 4, 4), True)
    modules = {
        "network": lambda: network,
        "classifier": lambda: ImageClassifier(network),
        "segmenter": lambda: SemanticSegmenter(network, num_classes=5, width=16),
        "detector": lambda: TinyViTDetector(network, num_classes=5, hidden_dim=32, num_queries=10, decoder_layers=1),
    }
    return modules[case]().eval(), (images,)


class TestWindows:
    def test_fit_at_small_sizes(self):
        model = TinyViT.from_config("5m", img_size=32, window_sizes="fit")
        assert model.config.window_sizes == (7, 4, 2, 1)
        assert model.eval()(torch.rand(1, 3, 32, 32)).shape == (1, 1000)

    def test_scale(self):
        assert TinyViT.from_config("5m", img_size=256, window_sizes="scale").config.window_sizes == (8, 8, 16, 8)

    def test_fit_changes_no_window_that_fits(self, images):
        fit = liven(TinyViT.from_config("1m", window_sizes="fit"))
        plain = TinyViT.from_config("1m").eval()
        plain.load_state_dict(fit.state_dict())
        assert torch.equal(fit(images), plain(images))
