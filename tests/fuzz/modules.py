"""Networks that users changed: the answers are those of a plain forward pass that calls one module after the other."""

from __future__ import annotations

import copy
import logging
import random
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune
from torch.utils.flop_counter import FlopCounterMode

from kornia_tinyvit import ImageClassifier, TinyViT
from kornia_tinyvit.contraction.inheritance import inherit
from kornia_tinyvit.folding import fold
from tests.fuzz.harness import Target
from tests.fuzz.images import segmenter
from tests.fuzz.known import Verdict, check, same
from tests.fuzz.networks import detector, network, sam

VALID, OPEN = Verdict.VALID, Verdict.OPEN
TOLERANCE = 2e-4  # of rounding; outputs are about 1


def plain(model: TinyViT, x: Tensor) -> Tensor:
    """Return the logits, in evaluation or training without dropout and drop path."""
    layers: Any = model.layers
    seq: Any = model.patch_embed.seq
    x = conv(seq[2], seq[1](conv(seq[0], x)))
    for number, stage in enumerate(layers):
        for block in stage.blocks:
            x = mbconv(block, x) if number == 0 else vit_block(block, x)
        if stage.downsample is not None:
            merge = stage.downsample
            x = conv(merge.conv3, merge.act2(conv(merge.conv2, merge.act1(conv(merge.conv1, x)))))
    return model.head(model.norm_head(x.mean((2, 3))))


def conv(layer: Any, x: Tensor) -> Tensor:
    return layer.bn(layer.c(x))


def mbconv(block: Any, x: Tensor) -> Tensor:
    y = block.act2(conv(block.conv2, block.act1(conv(block.conv1, x))))
    return block.act3(x + conv(block.conv3, y))


def vit_block(block: Any, x: Tensor) -> Tensor:
    tokens = x.permute(0, 2, 3, 1)
    tokens = tokens + windows(block.attn, tokens)
    tokens = conv(block.local_conv, tokens.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    mlp = block.mlp
    return (tokens + mlp.fc2(mlp.act(mlp.fc1(mlp.norm(tokens))))).permute(0, 3, 1, 2)


def windows(attn: Any, tokens: Tensor) -> Tensor:
    """Apply attention window by window to zero-padded tokens."""
    height, width, side = tokens.shape[1], tokens.shape[2], attn.window_size
    padded = F.pad(tokens, (0, 0, 0, -width % side, 0, -height % side))
    rows = []
    for top in range(0, height, side):
        row = [padded[:, top : top + side, left : left + side] for left in range(0, width, side)]
        rows.append(torch.cat([attention(attn, each) for each in row], 2))
    return torch.cat(rows, 1)[:, :height, :width]


@cache
def offsets(side: int) -> Tensor:
    places = [(y, x) for y in range(side) for x in range(side)]
    return torch.tensor([[abs(a - c) * side + abs(b - d) for c, d in places] for a, b in places])


def attention(attn: Any, window: Tensor) -> Tensor:
    x = window.flatten(1, 2)
    batch, tokens, dims = x.shape
    heads = attn.qkv(attn.norm(x)).view(batch, tokens, attn.num_heads, -1).permute(0, 2, 1, 3)
    query, key, value = heads.chunk(3, -1)
    scores = query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5
    scores = scores + attn.attention_biases[:, offsets(attn.window_size)]
    mixed = (scores.softmax(-1) @ value).transpose(1, 2).reshape(batch, tokens, dims)
    return attn.proj(mixed).view(window.shape)


def fresh(rng: random.Random) -> TinyViT:
    return copy.deepcopy(network()).requires_grad_(rng.random() < 0.8)


def an_input(rng: random.Random, batch: int = 2) -> Tensor:
    size = (batch, 3, rng.choice((32, 40, 64)), rng.choice((32, 64, 71)))
    return torch.rand(size, generator=torch.Generator().manual_seed(rng.getrandbits(40)))


def a_layer(rng: random.Random, model: TinyViT) -> Any:
    return rng.choice([module for module in model.modules() if hasattr(module, "bn") and hasattr(module, "c")])


class Doubled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


class OtherConv(nn.Conv2d):
    """A subclass whose forward pass differs, such as a quantized or a LoRA layer."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 1


def pruned(rng: random.Random, layer: Any) -> None:
    rng.choice((prune.l1_unstructured, prune.random_unstructured))(layer.c, "weight", amount=0.5)


def structured(rng: random.Random, layer: Any) -> None:
    prune.ln_structured(layer.c, "weight", amount=0.5, n=2, dim=0)


def hooked(rng: random.Random, layer: Any) -> None:
    part = rng.choice((layer.c, layer.bn))
    rng.choice((
        lambda: part.register_forward_hook(lambda _, __, y: y * 1.5),
        lambda: part.register_forward_pre_hook(lambda _, x: (x[0] + 0.1,)),
    ))()  # fmt: skip


def other_norm(rng: random.Random, layer: Any) -> None:
    channels = layer.bn.num_features
    layer.bn = rng.choice((
        lambda: nn.GroupNorm(1, channels), nn.Identity, Doubled,
        lambda: nn.InstanceNorm2d(channels, affine=True, track_running_stats=True),
        lambda: nn.BatchNorm2d(channels, affine=False), lambda: nn.BatchNorm2d(channels, track_running_stats=False),
        lambda: nn.Sequential(nn.BatchNorm2d(channels), Doubled()),
    ))().eval()  # fmt: skip


def other_conv(rng: random.Random, layer: Any) -> None:
    old = layer.c
    kernel, settings = old.kernel_size, {"stride": old.stride, "padding": old.padding, "groups": old.groups}
    made: Any = rng.choice((
        lambda: nn.Conv2d(old.in_channels, old.out_channels, kernel, bias=True, **settings),
        lambda: nn.Conv2d(old.in_channels, old.out_channels, kernel, bias=False, padding_mode="circular", **settings),
        lambda: OtherConv(old.in_channels, old.out_channels, kernel, bias=False, **settings),
        lambda: nn.Sequential(copy.deepcopy(old), Doubled()),
    ))()  # fmt: skip
    layer.c = made


def partly_affine(rng: random.Random, layer: Any) -> None:
    setattr(layer.bn, rng.choice(("weight", "bias")), None)


class Scaled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 0.5 * x


def parametrized(rng: random.Random, layer: Any) -> None:
    kind = rng.randrange(3)
    if kind == 0:
        parametrize.register_parametrization(layer.c, "weight", Scaled())
    elif kind == 1:
        parametrizations.weight_norm(layer.c)
    else:
        parametrize.register_parametrization(layer.bn, "weight", Scaled())


def overwritten(rng: random.Random, layer: Any) -> None:
    """A forward method of the instance, as quantizers and profilers set it."""
    part = rng.choice((layer.c, layer.bn))
    before = part.forward
    part.forward = lambda x: 3 * before(x)


def moved(rng: random.Random, layer: Any) -> None:
    """New values under the same names."""
    layer.bn.running_mean.add_(0.3)
    layer.bn.running_var.mul_(1.7)
    layer.c.weight.data.mul_(1.2)


CHANGES: tuple[Callable[[random.Random, Any], None], ...] = (
    pruned, pruned, structured, hooked, hooked, other_norm, other_norm, other_conv, partly_affine, parametrized,
    overwritten, moved,
)  # fmt: skip


def change_linear(rng: random.Random, model: TinyViT) -> str:
    """Change a linear layer or a norm between tokens."""
    kinds = (nn.Linear, nn.LayerNorm)
    owners = [
        (owner, name) for owner in model.modules() for name, part in owner.named_children() if isinstance(part, kinds)
    ]
    owner, name = rng.choice(owners)
    part = getattr(owner, name)
    kind = rng.randrange(5)
    if kind == 0:
        part.register_forward_hook(lambda _, __, y: y * 1.5)
    elif kind == 1:
        prune.l1_unstructured(part, "weight", amount=0.5)
    elif kind == 2:
        parametrize.register_parametrization(part, "weight", Scaled())
    elif kind == 3:
        part.bias = None
    else:
        setattr(owner, name, nn.Sequential(part, Doubled()))
    return f"linear {kind}"


def change(rng: random.Random, model: TinyViT) -> str:
    if rng.random() < 0.25:
        with torch.no_grad():
            return change_linear(rng, model)
    names, taken = [], set()
    for _ in range(rng.choice((1, 1, 2))):
        layer = a_layer(rng, model)
        if id(layer) not in taken:
            taken.add(id(layer))
            kind = rng.choice(CHANGES)
            with torch.no_grad():
                kind(rng, layer)
            names.append(kind.__name__)
    return " and ".join(sorted(set(names)))


def changed_network(rng: random.Random, folder: Path) -> None:
    """Pruning, hooks, parametrizations and replaced layers, after a first call that nothing may be cached of."""
    model, x = fresh(rng), an_input(rng)
    if rng.random() < 0.5:
        with torch.no_grad():
            model(x[:1])
    what = change(rng, model)
    x.requires_grad_(rng.random() < 0.5)
    with torch.set_grad_enabled(rng.random() < 0.6):
        found, wanted = model(x), plain(model, x)
        scale = max(1.0, float(wanted.detach().abs().max()))
        same(found.detach() / scale, wanted.detach() / scale, "the output of a changed network", TOLERANCE, what)
        if found.requires_grad and x.requires_grad:
            (one,), (other,) = (torch.autograd.grad(each.sum(), x) for each in (found, wanted))
            scale = max(1.0, float(other.abs().max()))
            same(one / scale, other / scale, "the gradient of a changed network", 10 * TOLERANCE, what)


def folded_network(rng: random.Random, folder: Path) -> None:
    """Folding gives the same outputs, or says that it cannot."""
    model, x = fresh(rng), an_input(rng)
    what = change(rng, model)
    with torch.no_grad():
        wanted = plain(model, x)
        scale = max(1.0, float(wanted.abs().max()))
        check(
            OPEN, "folding a changed network", lambda: fold(model)(x),
            lambda found: same(found / scale, wanted / scale, "the output of a folded network", TOLERANCE, what),
            "", what,
        )  # fmt: skip


def counting_hooks(rng: random.Random, folder: Path) -> None:
    """Hooks fire once per call on every module, as FLOP counters, profilers and Grad-CAM expect."""
    model, x = fresh(rng), an_input(rng, 1)
    fired: Counter[str] = Counter()
    kinds = (nn.Conv2d, nn.BatchNorm2d, nn.Linear, nn.LayerNorm)
    parts = {name: module for name, module in model.named_modules() if isinstance(module, kinds)}
    if rng.random() < 0.3:
        parts = dict(rng.sample(list(parts.items()), 2))
    shapes = {}
    for name, module in parts.items():

        def hook(_: Any, __: Any, y: Tensor, name: str = name) -> None:
            fired[name] += 1
            shapes[name] = y.shape

        module.register_forward_hook(hook)
    with torch.no_grad():
        found = model(x)
    silent = sorted(parts.keys() - fired.keys())
    assert not silent, f"hooks do not fire: {silent[:3]} of {len(parts)}"
    assert set(fired.values()) == {1}, "hooks fire several times"
    with torch.no_grad():
        same(found, plain(model, x), "the output of a network with hooks", TOLERANCE)


def inherited_weights(rng: random.Random, folder: Path) -> None:
    """A network of the same configuration inherits what the parent computes, or an error says why not."""
    model, x = fresh(rng), an_input(rng)
    what = change(rng, model) if rng.random() < 0.7 else "nothing"
    hooks = any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    if hooks or "overwritten" in what:  # which are no weights
        return
    with torch.no_grad():
        wanted = plain(model, x)
        scale = max(1.0, float(wanted.abs().max()))
        check(
            OPEN if what != "nothing" else VALID, "inheriting weights", lambda: inherit(model, model.config).eval()(x),
            lambda found: same(found / scale, wanted / scale, "the output of an inherited network", TOLERANCE, what),
            "", what,
        )  # fmt: skip


def flops(rng: random.Random, folder: Path) -> None:
    model, x = fresh(rng), an_input(rng, 1)
    counts = []
    for run in (model, lambda x: plain(model, x)):
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            run(x)
        counts.append(counter.flop_counts["Global"][torch.ops.aten.convolution])
    assert counts[0] == counts[1], f"another number of operations: {counts[0]}, not {counts[1]}"


def training_mode(rng: random.Random, folder: Path) -> None:
    """Batch statistics and their updates, with some norms frozen."""
    model, other = fresh(rng), fresh(rng)
    frozen = {
        name for name, module in model.named_modules() if isinstance(module, nn.BatchNorm2d) and rng.random() < 0.3
    }
    for each in (model, other):
        each.train()
        for name, module in each.named_modules():
            if name in frozen:
                module.eval()
    x = an_input(rng, 4)
    same(model(x).detach(), plain(other, x).detach(), "the output in training", 10 * TOLERANCE)
    for (name, one), two in zip(model.state_dict().items(), other.state_dict().values(), strict=True):
        same(one, two, "a statistic after training", 1e-3, name)


def snapshot(model: nn.Module) -> tuple[dict[str, Tensor], list[bool]]:
    state = {name: each.clone() for name, each in model.state_dict().items()}
    return state, [module.training for module in model.modules()]


@torch.no_grad()  # otherwise an encoder in training uses batch statistics, as documented
def embedded(model: Any, image: Tensor) -> Tensor:
    return model.embed(image).features


PREDICTORS: tuple[tuple[Callable[[], nn.Module], Callable[[Any, Tensor], Any]], ...] = (
    (lambda: ImageClassifier(network()), lambda model, x: [(each.index, each.score) for each in model.predict(x)[0]]),
    (segmenter, lambda model, x: model.predict(x)[0]),
    (detector, lambda model, x: [(each.index, each.score, each.box) for each in model.predict(x, 0.0)[0]]),
    (sam, embedded),
)


def equal(one: Any, other: Any) -> bool:
    return torch.equal(one, other) if isinstance(one, Tensor) else bool(one == other)


def predicting(rng: random.Random, folder: Path) -> None:
    """Predicting changes nothing, in any mode and from any number of threads."""
    build, predict = rng.choices(PREDICTORS, (6, 3, 2, 1))[0]
    shared = build()
    images = [torch.rand(3, rng.randrange(32, 64), rng.randrange(32, 64)) for _ in range(3)]
    wanted = [predict(shared, each) for each in images]
    mode = rng.choice(("eval", "train", "train", "mixed"))
    model: Any = copy.deepcopy(shared)
    if mode == "train":
        model.train()
    elif mode == "mixed":
        for module in model.modules():
            module.training = rng.random() < 0.5
    before, flags = snapshot(model)
    training = mode != "eval"
    threads = rng.choice((1, 2, 4, 8))
    inputs = images * (1 if threads == 1 else 4)

    def run() -> list[Any]:
        with ThreadPoolExecutor(threads) as pool, torch.no_grad():
            return list(pool.map(lambda image: predict(model, image), inputs))

    def compare(found: list[Any]) -> None:
        wrong = sum(not equal(one, other) for one, other in zip(found, wanted * (len(found) // 3), strict=True))
        assert not wrong, f"predicting gives other answers: {wrong} of {len(found)}"

    detail = f"{mode}, {threads} threads"
    try:
        check(OPEN if training else VALID, "predicting", run, compare, "eval()", detail)
    finally:
        after, kept = snapshot(model)
        changed = [name for name, each in before.items() if not torch.equal(each, after[name])]
        assert not changed, f"predicting changes tensors: {len(changed)}, such as {changed[0]}, {detail}"
        assert kept == flags, f"predicting changes modes: {detail}"


def per_sample_gradients(rng: random.Random, folder: Path) -> None:
    model, x = fresh(rng), an_input(rng, 3)
    parameters, buffers = dict(model.named_parameters()), dict(model.named_buffers())
    parameters = {name: each.detach() for name, each in parameters.items()}
    names = rng.sample(sorted(parameters), 3)

    def loss(chosen: dict[str, Tensor], image: Tensor) -> Tensor:
        return torch.func.functional_call(model, (parameters | chosen, buffers), (image[None],)).square().sum()

    chosen = {name: parameters[name] for name in names}
    found = torch.func.vmap(torch.func.grad(loss), (None, 0))(chosen, x)
    for row, image in enumerate(x):
        values = {name: each.clone().requires_grad_() for name, each in chosen.items()}
        with_them = torch.func.functional_call(model, (parameters | values, buffers), (image[None],))
        wanted = torch.autograd.grad(with_them.square().sum(), list(values.values()))
        for name, each in zip(values, wanted, strict=True):
            scale = max(1.0, float(each.abs().max()))
            same(found[name][row] / scale, each / scale, "a gradient per sample", 10 * TOLERANCE, name)


def scripted(rng: random.Random, folder: Path) -> None:
    model, x = fresh(rng), an_input(rng)
    how = rng.choice(("script", "trace"))
    with torch.no_grad():
        made = torch.jit.script(model) if how == "script" else torch.jit.trace(model, x)
        other = an_input(rng) if how == "script" else x.flip(0)
        same(made(other), plain(model, other), f"the output of torch.jit.{how}", TOLERANCE)


def exported(rng: random.Random, folder: Path) -> None:
    """torch.onnx.export of a part, with and without gradients."""
    import onnxruntime

    model: Any = network()
    part, shape = rng.choice((
        (model.layers[1].blocks[0].attn, (2, 16, 16)), (model.layers[1].blocks[0], (2, 16, 8, 8)),
        (model.layers[3], (2, 32, 4, 4)),
    ))  # fmt: skip
    x = torch.rand(shape, generator=torch.Generator().manual_seed(rng.getrandbits(40)))
    part = copy.deepcopy(part).requires_grad_(rng.random() < 0.8)
    path = str(folder / "a.onnx")
    for name in ("torch.onnx", "torch.export"):
        logging.getLogger(name).setLevel(logging.ERROR)
    torch.onnx.export(part, (x,), path, dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    with torch.no_grad():
        same(torch.from_numpy(found), part(x), "the output of an exported part", TOLERANCE)


KINDS: tuple[tuple[float, Callable[[random.Random, Path], None]], ...] = (
    (10, changed_network), (4, folded_network), (3, counting_hooks), (1, flops), (3, training_mode), (3, predicting),
    (1, inherited_weights), (0.5, per_sample_gradients), (0.2, scripted), (0.25, exported),
)  # fmt: skip


def known_modules(rng: random.Random, folder: Path) -> None:
    kind = rng.choices([each for _, each in KINDS], [weight for weight, _ in KINDS])[0]
    torch.manual_seed(rng.getrandbits(32))
    kind(rng, folder)


TARGETS = (Target("modules with known outputs", known_modules, seconds=90, megabytes=1500, num_cases=40),)
