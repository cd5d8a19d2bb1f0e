import pytest
import torch
from kornia.models.sam.architecture.mask_decoder import MaskDecoder
from kornia.models.sam.architecture.prompt_encoder import PromptEncoder
from kornia.models.sam.architecture.transformer import TwoWayTransformer
from torch import nn
from torch.nn.utils import prune

from kornia_tinyvit.sam import decoder as module
from kornia_tinyvit.sam.decoder import FoldedMaskDecoder, SharingMaskDecoder

CHANNELS, CELLS = 32, (6, 9)
PIXELS = (96, 144)


@torch.no_grad()
def scramble(network: nn.Module, seed: int) -> nn.Module:
    """Randomize all parameters of a network."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in network.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim == 1:
            parameter.add_(0.3 * noise)
        else:
            parameter.copy_(1.5 * noise / parameter[0].numel() ** 0.5)
    return network.eval()


def build_decoder(depth: int = 2, heads: int = 4) -> MaskDecoder:
    transformer = TwoWayTransformer(depth=depth, embedding_dim=CHANNELS, num_heads=heads, mlp_dim=48)
    return scramble(MaskDecoder(transformer_dim=CHANNELS, transformer=transformer, iou_head_hidden_dim=24), 1)


@pytest.fixture
def decoder():
    return build_decoder()


@pytest.fixture
def prompt_encoder():
    torch.manual_seed(2)
    return scramble(PromptEncoder(CHANNELS, CELLS, PIXELS, mask_in_chans=8), 3)


@pytest.fixture
def features():
    return torch.randn(1, CHANNELS, *CELLS, generator=torch.Generator().manual_seed(4))


def embed_prompts(prompt_encoder, kinds, count=5):
    """Return sparse and dense embeddings of prompts of the given kinds."""
    generator = torch.Generator().manual_seed(5)
    size = torch.tensor([PIXELS[1], PIXELS[0]])
    points = torch.rand(count, 3, 2, generator=generator) * size
    labels = torch.randint(0, 2, (count, 3), generator=generator)
    corners = torch.rand(count, 2, 2, generator=generator).sort(1).values * size
    masks = torch.randn(count, 1, 4 * CELLS[0], 4 * CELLS[1], generator=generator)
    sparse, dense = prompt_encoder(
        points=(points, labels) if "points" in kinds else None,
        boxes=corners.flatten(1) if "boxes" in kinds else None,
        masks=masks if "masks" in kinds else None,
    )
    return sparse.detach(), dense.detach()


def assert_same(found, expected, tolerance=1e-4):
    for one, other in zip(found, expected, strict=True):
        assert one.shape == other.shape
        assert (one - other).norm() <= tolerance * other.norm()
        torch.testing.assert_close(one, other, atol=tolerance * float(other.abs().max()), rtol=0)


@torch.no_grad()
def run_both(decoder, prompt_encoder, features, sparse, dense, multimask=True):
    pe = prompt_encoder.get_dense_pe()
    folded = FoldedMaskDecoder(decoder)(features, pe, sparse, dense, multimask_output=multimask)
    return folded, decoder(features, pe, sparse, dense, multimask_output=multimask)


class TestParity:
    @pytest.mark.parametrize("kinds", ["points", "boxes", "points boxes", "masks", "points masks", "boxes masks"])
    @pytest.mark.parametrize("multimask", [True, False])
    def test_kornia(self, decoder, prompt_encoder, features, kinds, multimask):
        found, expected = run_both(decoder, prompt_encoder, features, *embed_prompts(prompt_encoder, kinds), multimask)
        assert_same(found, expected)
        assert (expected[0][0] - expected[0][1]).abs().mean() > 0.01 * expected[0].abs().mean()  # prompts matter

    @pytest.mark.parametrize("count", [1, module.CPU_CHUNK, 2 * module.CPU_CHUNK + 3])
    @pytest.mark.parametrize("kinds", ["points", "points masks"])
    def test_any_number_of_prompts(self, decoder, prompt_encoder, features, count, kinds):
        assert_same(*run_both(decoder, prompt_encoder, features, *embed_prompts(prompt_encoder, kinds, count)))

    def test_no_prompt_of_any_kind(self, decoder, prompt_encoder, features):
        assert_same(*run_both(decoder, prompt_encoder, features, *prompt_encoder(points=None, boxes=None, masks=None)))

    @pytest.mark.parametrize(("depth", "heads"), [(1, 4), (3, 2)])
    def test_other_transformers(self, prompt_encoder, features, depth, heads):
        decoder = build_decoder(depth, heads)
        assert_same(*run_both(decoder, prompt_encoder, features, *embed_prompts(prompt_encoder, "points")))

    @pytest.mark.parametrize("cells", [(1, 1), (3, 14), (20, 2)])
    def test_other_sizes(self, decoder, cells):
        torch.manual_seed(0)
        pixels = (16 * cells[0], 16 * cells[1])
        prompt_encoder = scramble(PromptEncoder(CHANNELS, cells, pixels, mask_in_chans=8), 3)
        points = (torch.rand(3, 1, 2) * 16, torch.ones(3, 1))
        prompts = prompt_encoder(points=points, boxes=None, masks=None)
        assert_same(*run_both(decoder, prompt_encoder, torch.randn(1, CHANNELS, *cells), *prompts))

    def test_dense_embedding_for_all(self, decoder, prompt_encoder, features):
        sparse, dense = embed_prompts(prompt_encoder, "points masks")
        found, expected = (
            run_both(decoder, prompt_encoder, features, sparse, each)[index]
            for index, each in enumerate((dense[:1], dense[:1].repeat(len(sparse), 1, 1, 1)))
        )
        assert_same(found, expected)

    def test_double_precision(self, decoder, prompt_encoder, features):
        decoder, prompt_encoder = decoder.double(), prompt_encoder.double()
        sparse, dense = embed_prompts(prompt_encoder.float(), "points")
        prompts = (sparse.double(), dense.double())
        found, expected = run_both(decoder, prompt_encoder.double(), features.double(), *prompts)
        assert_same(found, expected, tolerance=1e-10)


class TestGradients:
    def gradients(self, decoder, run, features, sparse, dense):
        """Return the gradients of random sums of the masks and predicted IoUs, for the inputs and all parameters."""
        inputs = [each.clone().requires_grad_() for each in (features, sparse, dense)]
        masks, iou = run(*inputs)
        generator = torch.Generator().manual_seed(6)
        sums = ((each * torch.randn(each.shape, generator=generator)).sum() for each in (masks, iou))
        leaves = [*inputs, *decoder.parameters()]
        found = torch.autograd.grad(sum(sums), leaves, allow_unused=True)
        return [torch.zeros_like(leaf) if each is None else each for leaf, each in zip(leaves, found, strict=True)]

    @pytest.mark.parametrize("kinds", ["points", "boxes", "points masks"])
    @pytest.mark.parametrize("multimask", [True, False])
    def test_kornia(self, decoder, prompt_encoder, features, kinds, multimask):
        pe = prompt_encoder.get_dense_pe().double()
        prompts = [each.double() for each in embed_prompts(prompt_encoder, kinds, module.CPU_CHUNK + 2)]
        if "masks" not in kinds:  # of which there is one for all prompts
            prompts[1] = prompts[1][:1]
        decoder.double()
        found, expected = (
            self.gradients(decoder, lambda x, *rest, run=run: run(x, pe, *rest, multimask), features.double(), *prompts)
            for run in (FoldedMaskDecoder(decoder), decoder)
        )
        # Zero: biases of keys, up to rounding, and the networks of masks that are not returned.
        assert sum(bool(each.abs().max() > 1e-9) for each in expected) > 0.7 * len(expected)
        scale = max(each.abs().max() for each in expected)
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-12 * float(scale))

    def test_one_gradient_per_input(self, decoder, prompt_encoder, features):
        """Each input receives its gradient where no parameter requires one."""
        sparse, dense = embed_prompts(prompt_encoder, "points")
        decoder.requires_grad_(False)
        for index in range(3):
            inputs = [features, sparse, dense]
            inputs[index] = inputs[index].clone().requires_grad_()
            image, tokens, maps = inputs
            FoldedMaskDecoder(decoder)(image, prompt_encoder.get_dense_pe(), tokens, maps, True)[0].sum().backward()
            assert inputs[index].grad.any()

    def test_changed_layers(self, decoder, prompt_encoder, features):
        adapt(decoder)
        sparse, dense = embed_prompts(prompt_encoder, "points")
        FoldedMaskDecoder(decoder)(features, prompt_encoder.get_dense_pe(), sparse, dense, True)[0].sum().backward()
        assert decoder.transformer.layers[1].cross_attn_token_to_image.k_proj.update[0].weight.grad.any()


class TestPrecision:
    @torch.no_grad()
    def test_bfloat16(self, decoder, prompt_encoder, features):
        sparse, dense = embed_prompts(prompt_encoder, "points")
        pe = prompt_encoder.get_dense_pe()
        expected = decoder(features, pe, sparse, dense, multimask_output=True)
        found = FoldedMaskDecoder(decoder, torch.bfloat16)(features, pe, sparse, dense, multimask_output=True)
        assert found[0].dtype == found[1].dtype == torch.float32
        assert_same(found, expected, tolerance=0.05)
        assert not torch.equal(found[0], FoldedMaskDecoder(decoder)(features, pe, sparse, dense, True)[0])

    def test_gradients_of_norms_under_autocast(self):
        """Their sums over all image tokens are in float32; in bfloat16 they are wrong by 40 %."""
        torch.manual_seed(0)
        decoder = build_decoder()
        cells, generator = (64, 64), torch.Generator().manual_seed(7)
        image, pe, dense = (torch.randn(1, CHANNELS, *cells, generator=generator) for _ in range(3))
        sparse = torch.randn(4, 2, CHANNELS, generator=generator)
        weights = [layer.norm4.weight for layer in decoder.transformer.layers]
        found, expected = [], []
        for enabled, into in ((True, found), (False, expected)):
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                masks, _ = FoldedMaskDecoder(decoder)(image, pe, sparse, dense, True)
            into.extend(torch.autograd.grad(masks.float().square().mean(), weights))
        for one, other in zip(found, expected, strict=True):
            assert (one - other).norm() < 0.2 * other.norm()


class TestParts:
    @pytest.fixture
    def prompted(self, decoder, prompt_encoder, features):
        sparse, dense = embed_prompts(prompt_encoder, "points")
        folded = FoldedMaskDecoder(decoder)
        with torch.no_grad():
            image = folded.prepare(features, prompt_encoder.get_dense_pe(), dense[:1])
            return folded, folded.prompt(image, sparse)

    @torch.no_grad()
    def test_some_prompts_and_cells(self, prompted):
        folded, found = prompted
        every = folded.upscale(found)
        assert every.shape == (5, 4, 24, 36)
        some = folded.upscale(found, prompts=[4, 1], cells=(5, 7))
        torch.testing.assert_close(some, every[[4, 1], :, :20, :28])

    @torch.no_grad()
    def test_bands_have_no_seams(self, prompted, monkeypatch):
        folded, found = prompted
        expected = folded.upscale(found)
        monkeypatch.setattr(module, "BAND", 4)
        torch.testing.assert_close(folded.upscale(found), expected)

    @torch.no_grad()
    def test_no_prompts_chosen(self, prompted):
        folded, found = prompted
        assert folded.upscale(found, prompts=[], cells=(2, 3)).shape == (0, 4, 8, 12)

    def test_quality_needs_no_upscaling(self, decoder, prompt_encoder, features):
        calls = []
        for layer in decoder.output_upscaling:
            layer.register_forward_hook(lambda *_: calls.append(1))
        sparse, dense = embed_prompts(prompt_encoder, "points")
        folded = FoldedMaskDecoder(decoder)
        with torch.no_grad():
            image = folded.prepare(features, prompt_encoder.get_dense_pe(), dense[:1])
            iou = folded.prompt(image, sparse).iou
            assert not calls
            expected = decoder(features, prompt_encoder.get_dense_pe(), sparse, dense, multimask_output=True)[1]
        torch.testing.assert_close(iou[:, 1:], expected, atol=1e-4, rtol=1e-4)

    def test_image_side_is_shared(self, decoder, prompt_encoder, features, monkeypatch):
        tokens = CELLS[0] * CELLS[1]
        seen = []
        attentions = [part for part in decoder.transformer.modules() if hasattr(part, "q_proj")]
        projections = {each for part in attentions for each in (part.q_proj, part.k_proj, part.v_proj)}
        forward = nn.Linear.forward

        def count(layer, x):
            if layer in projections:
                seen.append(x.shape[:2].numel())
            return forward(layer, x)

        monkeypatch.setattr(nn.Linear, "forward", count)
        sparse, dense = embed_prompts(prompt_encoder, "points", count=20)
        with torch.no_grad():
            FoldedMaskDecoder(decoder)(features, prompt_encoder.get_dense_pe(), sparse, dense, multimask_output=True)
        assert max(seen) <= module.CPU_CHUNK * 20  # not the image tokens of each prompt
        assert 3 <= seen.count(tokens) <= 4


class TestStaleness:
    @torch.no_grad()
    def test_follows_the_decoder(self, decoder, prompt_encoder, features):
        sparse, dense = embed_prompts(prompt_encoder, "points")
        pe = prompt_encoder.get_dense_pe()
        folded = FoldedMaskDecoder(decoder)
        before = folded(features, pe, sparse, dense, True)[0]
        for parameter in decoder.parameters():
            parameter.mul_(1.1)
        assert not torch.allclose(folded(features, pe, sparse, dense, True)[0], before, atol=1e-3)
        assert_same(folded(features, pe, sparse, dense, True), decoder(features, pe, sparse, dense, True))


class TestExceptions:
    def test_rejects_other_modules(self):
        with pytest.raises(TypeError, match="got Linear"):
            FoldedMaskDecoder(nn.Linear(2, 2))

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"image_embeddings": torch.zeros(2, CHANNELS, *CELLS)}, "one image"),
            ({"image_embeddings": torch.zeros(1, 16, *CELLS)}, "one image"),
            ({"image_pe": torch.zeros(1, CHANNELS, 9, 6)}, "positional encoding"),
            ({"dense_prompt_embeddings": torch.zeros(5, CHANNELS, 9, 6)}, "Dense prompts"),
            ({"dense_prompt_embeddings": torch.zeros(4, CHANNELS, *CELLS)}, "Sparse prompts"),
            ({"sparse_prompt_embeddings": torch.zeros(5, CHANNELS)}, "Sparse prompts"),
        ],
    )
    @torch.no_grad()
    def test_shapes(self, decoder, prompt_encoder, features, change, message):
        sparse, dense = embed_prompts(prompt_encoder, "points")
        arguments = {
            "image_embeddings": features,
            "image_pe": prompt_encoder.get_dense_pe(),
            "sparse_prompt_embeddings": sparse,
            "dense_prompt_embeddings": dense,
            "multimask_output": True,
        }
        with pytest.raises(ValueError, match=message):
            FoldedMaskDecoder(decoder)(**(arguments | change))

    @torch.no_grad()
    def test_prepared_for_other_prompts(self, decoder, prompt_encoder, features):
        sparse, dense = embed_prompts(prompt_encoder, "points masks")
        folded = FoldedMaskDecoder(decoder)
        image = folded.prepare(features, prompt_encoder.get_dense_pe(), dense)
        with pytest.raises(ValueError, match="5 dense prompts"):
            folded.prompt(image, sparse[:3])

    def test_no_prompts(self, decoder, prompt_encoder, features):
        sparse, dense = torch.zeros(0, 2, CHANNELS), torch.zeros(0, CHANNELS, *CELLS)
        masks, iou = FoldedMaskDecoder(decoder)(features, prompt_encoder.get_dense_pe(), sparse, dense, True)
        assert masks.shape == (0, 3, 24, 36)
        assert iou.shape == (0, 3)


class TestSharing:
    """kornia's weights and arguments, computed by the folded decoder."""

    @pytest.fixture
    def sharing(self, decoder, monkeypatch):
        calls = []
        forward = FoldedMaskDecoder.forward

        def count(self, *arguments):
            calls.append(len(arguments[2]))
            return forward(self, *arguments)

        monkeypatch.setattr(FoldedMaskDecoder, "forward", count)
        transformer = TwoWayTransformer(depth=2, embedding_dim=CHANNELS, num_heads=4, mlp_dim=48)
        network = SharingMaskDecoder(transformer_dim=CHANNELS, transformer=transformer, iou_head_hidden_dim=24)
        network.load_state_dict(decoder.state_dict())
        network.calls = calls
        return network.eval()

    @pytest.mark.parametrize("recorded", [True, False])
    def test_calls(self, sharing, decoder, prompt_encoder, features, recorded):
        arguments = (features, prompt_encoder.get_dense_pe(), *embed_prompts(prompt_encoder, "points"))
        with torch.set_grad_enabled(recorded):
            found, expected = sharing(*arguments, True), decoder(*arguments, True)
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)
            assert one.requires_grad == recorded
        assert sharing.calls == [5]

    @pytest.mark.parametrize("recorded", [True, False])
    def test_no_prompts(self, sharing, prompt_encoder, features, recorded):
        with torch.set_grad_enabled(recorded):
            sparse, dense = embed_prompts(prompt_encoder, "points", count=2)
            masks, scores = sharing(features, prompt_encoder.get_dense_pe(), sparse[:0], dense[:0], True)
        assert (masks.shape, scores.shape) == ((0, 3, 24, 36), (0, 3))
        assert not masks.requires_grad

    def test_exported(self, sharing, decoder, prompt_encoder, features):
        with torch.no_grad():
            arguments = (features, prompt_encoder.get_dense_pe(), *embed_prompts(prompt_encoder, "points"), True)
            program = torch.export.export(sharing, arguments)
            assert torch.equal(program.module()(*arguments)[0], decoder(*arguments)[0])
        assert sharing.calls == []


class Adapter(nn.Module):
    """A wrapper that adds a low-rank update to a linear layer and shows its weight."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.update = nn.Sequential(nn.Linear(base.in_features, 2), nn.Linear(2, base.out_features))

    weight = property(lambda self: self.base.weight)
    bias = property(lambda self: self.base.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + self.update(x)


def adapt(decoder: MaskDecoder) -> None:
    attention = decoder.transformer.layers[1].cross_attn_token_to_image
    attention.k_proj, attention.v_proj = Adapter(attention.k_proj), Adapter(attention.v_proj)


def prune_keys(decoder: MaskDecoder) -> None:
    prune.l1_unstructured(decoder.transformer.final_attn_token_to_image.k_proj, "weight", 0.5)


def hook_upscaling(decoder: MaskDecoder) -> None:
    decoder.output_upscaling[1].register_forward_hook(lambda layer, args, output: 2 * output)


def replace_activation(decoder: MaskDecoder) -> None:
    decoder.output_upscaling[2] = nn.Softmax(1)


class TestChangedLayers:
    @pytest.mark.parametrize("change", [adapt, prune_keys, hook_upscaling, replace_activation])
    @pytest.mark.parametrize("kinds", ["points", "masks"])
    @torch.no_grad()
    def test_as_kornias(self, decoder, prompt_encoder, features, change, kinds):
        sparse, dense = embed_prompts(prompt_encoder, {kinds})
        arguments = features, prompt_encoder.get_dense_pe(), sparse, dense, True
        before = decoder(*arguments)
        change(decoder)
        expected = decoder(*arguments)
        folded = FoldedMaskDecoder(decoder)
        assert not folded.folds
        assert_same(folded(*arguments), expected)
        assert not torch.allclose(expected[0], before[0], atol=1e-2)
        decoder.__class__ = SharingMaskDecoder
        assert_same(decoder(*arguments), expected)
        prepared = folded.prepare(features, arguments[1], dense)
        part = folded.upscale(folded.prompt(prepared, sparse), [3, 1], (4, 5))
        torch.testing.assert_close(part[:, 1:], expected[0][[3, 1], :, :16, :20], atol=1e-4, rtol=1e-4)

    def test_unchanged(self, decoder):
        assert FoldedMaskDecoder(decoder).folds
