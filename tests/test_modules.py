"""Evaluation of modules that are in training mode, from several threads, without changing them."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.ao.quantization import QuantWrapper
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.utils import parametrizations, prune
from torch.optim.swa_utils import AveragedModel
from torch.testing import assert_close

from kornia_tinyvit import ImageClassifier, MobileSAM, SemanticSegmenter, TinyViT, TinyViTDetector
from kornia_tinyvit.modules import evaluation_copy, plain_name, plain_state_dict, unwrapped, without_wrappers
from kornia_tinyvit.training.metrics.probes import extract_features
from tests.conftest import TINY, liven

THREADS = 8


def snapshot(module: nn.Module) -> tuple[Any, ...]:
    """Return everything that a prediction could change."""
    state = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    return state, [part.training for part in module.modules()], [set(vars(part)) for part in module.modules()]


def assert_unchanged(module: nn.Module, before: tuple[Any, ...]) -> None:
    state, *rest = snapshot(module)
    assert rest == list(before[1:])
    assert all(torch.equal(tensor, before[0][name]) for name, tensor in state.items())


def network(dropout: float = 0.5) -> TinyViT:
    torch.manual_seed(0)
    return liven(TinyViT(**TINY, drop_rate=dropout, drop_path_rate=dropout))


def sam() -> MobileSAM:
    torch.manual_seed(0)
    return MobileSAM(liven(TinyViT(**TINY | {"mobile_sam": True}, drop_rate=0.5, drop_path_rate=0.5)))


def classify(model: ImageClassifier, images: Tensor) -> list[Tensor]:
    return [torch.tensor([each.score for each in found]) for found in model.predict(images, top_k=7)]


def detect(model: TinyViTDetector, images: Tensor) -> list[Tensor]:
    return [torch.tensor([each.box for each in found]) for found in model.predict(images, 0.0)]


def embed(model: MobileSAM, images: Tensor) -> list[Tensor]:
    return [model.embed(images).features]


def predict_masks(model: MobileSAM, images: Tensor) -> list[Tensor]:
    with torch.no_grad():
        found = model.predict_masks(model.embed(images[0]), boxes=torch.tensor([[5.0, 5.0, 60.0, 40.0]]))
    return [found[0].low_res_logits, found[0].scores]


def generate_masks(model: MobileSAM, images: Tensor) -> list[Tensor]:
    found = model.generate_masks(images[0], points_per_side=2, pred_iou_thresh=-1e9, stability_score_thresh=0.0)
    return [torch.from_numpy(mask.segmentation) for mask in found]


def prompt(model: MobileSAM, images: Tensor) -> list[Tensor]:
    prompter = model.prompter()
    prompter.set_image(images[0])
    return [prompter.predict(boxes=torch.tensor([[5.0, 5.0, 60.0, 40.0]])).logits]


def build_segmenter() -> SemanticSegmenter:
    return SemanticSegmenter(network(), num_classes=5, width=16, dropout=0.5)


def build_detector() -> TinyViTDetector:
    return TinyViTDetector(network(), num_classes=5, hidden_dim=32, num_queries=10)


CASES = {
    "classifier": (lambda: ImageClassifier(network()), classify),
    "segmenter": (build_segmenter, lambda model, images: model.predict(images)),
    "detector": (build_detector, detect),
    "embed": (sam, embed),
    "predict_masks": (sam, predict_masks),
    "generate_masks": (sam, generate_masks),
    "prompter": (sam, prompt),
}


class TestPredictions:
    @pytest.mark.parametrize("mode", ["training", "evaluation"])
    @pytest.mark.parametrize("case", CASES)
    @torch.no_grad()
    def test_from_threads(self, case, mode):
        """Bit for bit as from one thread in evaluation mode; nothing of the network is changed."""
        build, predict = CASES[case]
        model = build().eval()
        inputs = [torch.rand(2, 3, 50, 70, generator=torch.Generator().manual_seed(seed)) for seed in range(THREADS)]
        expected = [predict(model, images) for images in inputs]
        model.train(mode == "training")
        predict(model, inputs[0])  # attributes that the first call sets, as kornia's prompter does
        before = snapshot(model)
        barrier = threading.Barrier(THREADS)

        def run(images: Tensor) -> list[list[Tensor]]:
            barrier.wait()
            with torch.no_grad():
                return [predict(model, images) for _ in range(2)]

        with ThreadPoolExecutor(THREADS) as pool:
            found = list(pool.map(run, inputs))
        for results, wanted in zip(found, expected, strict=True):
            for result in results:
                assert len(result) == len(wanted) > 0
                assert all(map(torch.equal, result, wanted))
        assert_unchanged(model, before)

    def test_features(self):
        model = network().train()
        before = snapshot(model)
        batches = [(torch.rand(2, 3, 64, 64), torch.tensor([0, 1]))]
        features, _ = extract_features(model, batches)
        assert_unchanged(model, before)
        assert torch.equal(features, extract_features(model.eval(), batches)[0])


def evaluated(module: nn.Module, *inputs: Any) -> Any:
    """Return the output in evaluation mode, and check that the copy of the module in training mode gives the same."""
    with torch.no_grad():
        expected = module.eval()(*inputs)
        copied = evaluation_copy(module.train())
        before = snapshot(module)
        found = copied(*inputs)
    assert copied is not module
    assert not any(part.training for part in copied.modules())
    assert all(part.training for part in module.modules())
    assert_unchanged(module, before)
    assert_close(found, expected, atol=0, rtol=0)
    return copied


class Recorder(nn.Module):
    """A module with references outside of its submodules, and state that a forward pass sets."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(4)
        self.drop = nn.Dropout(0.5)
        self.norm.register_forward_hook(self.record)
        self.steps = [self.norm, partial(self.scale, factor=2.0)]
        self.by_name = {"drop": self.drop}
        self.calls: list[int] = []

    def record(self, module: nn.Module, args: Any, output: Tensor) -> None:
        self.recorded = output

    def scale(self, x: Tensor, factor: float) -> Tensor:
        return factor * self.drop(x)

    def forward(self, x: Tensor) -> Tensor:
        for step in self.steps:
            x = step(x)
        self.calls.append(len(x))
        return self.by_name["drop"](x) + self.recorded


class TestEvaluationCopy:
    IMAGES = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))

    def test_evaluation_mode_needs_no_copy(self, tiny):
        assert evaluation_copy(tiny) is tiny

    def test_one_part_in_training(self, tiny):
        expected = tiny(self.IMAGES)
        tiny.layers[1].train()
        before = snapshot(tiny)
        assert torch.equal(evaluation_copy(tiny)(self.IMAGES), expected)
        assert_unchanged(tiny, before)

    def test_tensors_are_shared(self, tiny):
        copied = evaluation_copy(tiny.train())
        assert type(copied) is TinyViT
        theirs = dict(copied.named_parameters()) | dict(copied.named_buffers())
        for name, tensor in (*tiny.named_parameters(), *tiny.named_buffers()):
            assert theirs[name] is tensor
        copied(self.IMAGES).sum().backward()
        assert all(parameter.grad is not None for parameter in tiny.parameters())

    def test_shared_parts_stay_shared(self):
        norm = nn.BatchNorm1d(4)
        copied = evaluation_copy(nn.Sequential(norm, nn.Sequential(norm)))
        assert copied[0] is copied[1][0] is not norm

    def test_references_outside_of_submodules(self):
        module = Recorder()
        for _ in range(3):
            module(torch.rand(8, 4))
        module.calls.clear()
        copied = evaluated(module, torch.rand(8, 4))
        assert module.calls == [8]  # of the call in evaluation mode
        assert copied.recorded is not module.recorded

    def test_replaced_forward(self):
        module = nn.Sequential(nn.Dropout(0.5))
        module.forward = partial(nn.Sequential.forward, module)
        module[0].forward = module[0].forward
        evaluated(module, torch.rand(3))

    @pytest.mark.parametrize(
        "change",
        [
            lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
            nn.utils.weight_norm,
            nn.utils.spectral_norm,
            parametrizations.weight_norm,
            parametrizations.spectral_norm,
        ],
        ids=["pruning", "weight_norm", "spectral_norm", "parametrized weight_norm", "parametrized spectral_norm"],
    )
    @pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
    def test_changed_weights(self, change):
        module = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
        change(module[0])
        evaluated(module, torch.rand(8, 4))

    @pytest.mark.parametrize("wrap", [torch.compile, nn.DataParallel, torch.fx.symbolic_trace])
    def test_wrapped(self, wrap):
        """Compiled parts run in eager mode."""
        inner = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5), nn.BatchNorm1d(4))
        wrapped = wrap(inner)
        module = nn.Sequential(wrapped)
        expected = inner.eval()(torch.ones(8, 4))
        module.train()
        before = snapshot(module)
        copied = evaluation_copy(module)
        assert torch.equal(copied(torch.ones(8, 4)), expected)
        assert_unchanged(module, before)

    def test_compiled_in_place(self):
        module = nn.Sequential(nn.Dropout(0.5))
        module.compile(backend="eager")
        copied = evaluation_copy(module)
        assert torch.equal(copied(torch.ones(9)), torch.ones(9))
        assert module._compiled_call_impl is not None

    def test_slots(self):
        class Slotted(nn.Dropout):
            __slots__ = ("factor",)

            def forward(self, x: Tensor) -> Tensor:
                return self.factor * super().forward(x)

        module = Slotted(0.5)
        module.factor = 2
        evaluated(module, torch.rand(3))

    def test_attribute_access_of_the_class(self):
        class Delegating(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.inner = nn.Dropout(0.5)

            def __getattr__(self, name: str) -> Any:
                try:
                    return super().__getattr__(name)
                except AttributeError:
                    return getattr(self.inner, name)

            def __setattr__(self, name: str, value: Any) -> None:
                assert name != "unknown"
                super().__setattr__(name, value)

            def forward(self, x: Tensor) -> Tensor:
                return self.inner(x) * self.p

        evaluated(Delegating(), torch.rand(3))

    def test_scripted(self):
        scripted = torch.jit.script(nn.Dropout(0.5))
        module = nn.Sequential(scripted, nn.Dropout(0.5))
        with pytest.raises(ValueError, match=r"RecursiveScriptModule is scripted, so .* Call eval\(\) on the network"):
            evaluation_copy(module)
        scripted.eval()
        assert evaluation_copy(module)[0] is scripted
        assert torch.equal(evaluation_copy(module)(torch.ones(5)), torch.ones(5))

    def test_hidden_references(self):
        """A part that only a function or object knows would run in training mode."""
        inner = nn.Dropout(0.5)
        closure, holder, recursive = nn.Sequential(inner), nn.Sequential(inner), nn.Sequential(inner)
        original = closure.forward
        closure.forward = lambda x: original(x) + 1
        holder.engine = type("Engine", (), {})()
        holder.engine.network = [holder.forward]
        recursive.items_seen = [recursive.modules]
        recursive.items_seen.append(recursive.items_seen)
        for module, name in ((closure, "forward"), (holder, "engine"), (recursive, "items_seen")):
            with pytest.raises(ValueError, match=f"Sequential refers to another part in its attribute '{name}'"):
                evaluation_copy(module)
            assert evaluation_copy(module.eval()) is module
            inner.train()


class TestWrappers:
    def test_names(self):
        assert (
            plain_name("module.encoder._orig_mod.layers.0._fsdp_wrapped_module.c.weight") == "encoder.layers.0.c.weight"
        )
        assert plain_name("layers.0._checkpoint_wrapped_module.modules.c") == "layers.0.modules.c"

    @pytest.mark.parametrize(
        "wrap",
        [
            torch.compile,
            nn.DataParallel,
            AveragedModel,
            QuantWrapper,
            checkpoint_wrapper,
            lambda network: nn.DataParallel(torch.compile(network)),
        ],
    )
    def test_state_dict(self, tiny, wrap):
        expected = tiny.state_dict()
        wrapped = wrap(tiny)
        assert unwrapped(wrapped).config == tiny.config
        found = plain_state_dict(unwrapped(wrapped))
        assert list(found) == list(expected)
        assert all(torch.equal(found[name], expected[name]) for name in expected)
        assert plain_state_dict(wrapped).keys() == expected.keys()

    def test_parts(self, tiny):
        expected = tiny.state_dict()
        stage = tiny.layers[1]
        tiny.layers[1] = torch.compile(stage)
        tiny.head = nn.DataParallel(tiny.head)
        assert list(plain_state_dict(tiny)) == list(expected)
        assert unwrapped(tiny) is tiny
        plain = without_wrappers(nn.DataParallel(tiny))
        assert list(plain.state_dict()) == list(expected)
        assert plain.layers[1] is stage
        assert isinstance(tiny.head, nn.DataParallel)
        assert without_wrappers(plain) is plain
