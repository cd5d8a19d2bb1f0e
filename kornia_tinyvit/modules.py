"""Evaluation of modules without changing them, a check of what a module computes, and modules without wrappers."""

from __future__ import annotations

import copy
import copyreg
import weakref
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from functools import partial
from operator import is_
from types import CellType, FunctionType, MethodType, ModuleType
from typing import Any, TypeGuard, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn.modules import module as _hooks

__all__ = ["evaluation_copy", "is_plain", "plain_name", "plain_state_dict", "unwrapped", "without_wrappers"]

Module = TypeVar("Module", bound=nn.Module)

# Attributes by which torch.compile, DataParallel and DistributedDataParallel, AveragedModel, QuantWrapper, FSDP and
# activation checkpointing hold the module that they wrap. No part of a network of this package is called so.
_WRAPPERS = frozenset({"_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
_COMPILED = "_orig_mod"  # the name under which torch.compile's wrapper registers the module that it runs
_HOOKS = (
    "_backward_pre_hooks",
    "_backward_hooks",
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
)
_INTERNAL = frozenset(vars(nn.Module()))
_PLAIN = frozenset({bool, int, float, str, type(None), type, torch.device, torch.dtype, nn.Parameter, Tensor})


def evaluation_copy(module: Module) -> Module:
    """Return a module in evaluation mode with the same parameters and buffers, without changing the module.

    Switching the mode of a module that other threads use would change their results, and its running statistics.
    A module in evaluation mode is returned as it is. Otherwise every submodule is copied, but no tensor: weights and
    gradients are shared, and attributes that a forward pass of the copy sets stay in the copy. Hooks get the copies as
    their modules. Parts that :func:`torch.compile` compiled run in eager mode.

    Args:
        module: the module, in training mode or partly so.

    Raises:
        ValueError: if a part cannot be copied: it is scripted, or a function or object in its attributes refers to a
            part of the module.

    Example:
        >>> norm = nn.BatchNorm2d(3)
        >>> copied = evaluation_copy(norm)
        >>> copied.training, norm.training, copied.weight is norm.weight
        (False, True, True)
    """
    parts = list(module.modules())
    if not any(part.training for part in parts):
        return module
    copies: dict[int, nn.Module] = {}
    for part in reversed(parts):  # submodules first
        compiled = _COMPILED in part._modules
        copies[id(part)] = copies[id(part._modules[_COMPILED])] if compiled else _blank(part)
    for part in parts:
        copied = copies[id(part)]
        if copied is not part and _COMPILED not in part._modules:
            _fill(copied, part, copies)
    return cast("Module", copies[id(module)])


def is_plain(module: Any, kind: type[Module]) -> TypeGuard[Module]:
    """Return whether a module computes what a class does, from its weights alone.

    Only then may a caller replace a call by an equivalent computation: subclasses (of which parametrizations are some),
    a forward function set on the instance, and hooks (as those of pruning) can change the output or need the call.

    Args:
        module: the module.
        kind: the class; subclasses do not count.
    """
    own = module.__dict__
    return type(module) is kind and not (
        own["_forward_hooks"]
        or own["_forward_pre_hooks"]
        or own["_backward_hooks"]
        or own["_backward_pre_hooks"]
        or "forward" in own
        or "_conv_forward" in own
        or _hooks._global_forward_hooks
        or _hooks._global_forward_pre_hooks
        or _hooks._global_backward_hooks
        or _hooks._global_backward_pre_hooks
    )


def plain_name(name: str) -> str:
    """Remove the names of wrappers, such as those of ``torch.compile`` and ``DataParallel``, from a tensor's name.

    Args:
        name: name of a tensor.

    Returns:
        The name that the tensor has in the unwrapped network.

    Example:
        >>> plain_name("module.image_encoder._orig_mod.neck.0.weight")
        'image_encoder.neck.0.weight'
    """
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def plain_state_dict(module: nn.Module) -> dict[str, Tensor]:
    """Return the state dict of a module under the names that it has without wrappers at any depth.

    Args:
        module: the module.
    """
    tensors = {plain_name(name): tensor for name, tensor in module.state_dict().items()}
    tensors.pop("n_averaged", None)  # the counter of AveragedModel
    return tensors


def unwrapped(module: Any) -> Any:
    """Return the module inside of wrappers such as ``torch.compile`` and ``DataParallel``.

    Args:
        module: the module.
    """
    while isinstance(module, nn.Module) and len(inner := _WRAPPERS & module._modules.keys()) == 1:
        module = module._modules[next(iter(inner))]
    return module


def without_wrappers(module: Any) -> Any:
    """Return a module without wrappers at any depth; its parts and tensors are shared, not copied.

    Args:
        module: the module; it is not changed.
    """
    module = unwrapped(module)
    parts = {name: part if part is None else without_wrappers(part) for name, part in module._modules.items()}
    if all(part is module._modules[name] for name, part in parts.items()):
        return module
    plain = copy.copy(module)
    plain._modules = parts
    return plain


def _blank(part: nn.Module) -> nn.Module:
    """Return a module of the same class without attributes; for a scripted part in evaluation mode the part itself."""
    if isinstance(part, torch.jit.ScriptModule):
        if part.training:
            raise _rejection(part, "is scripted")
        return part
    return cast("nn.Module", object.__new__(type(part)))


def _fill(copied: nn.Module, part: nn.Module, copies: Mapping[int, nn.Module]) -> None:
    """Set the attributes of the copy of a part."""
    attributes = vars(copied)
    attributes.update(vars(part))
    attributes["training"] = False
    attributes["_modules"] = {name: copies.get(id(child)) for name, child in part._modules.items()}
    for name in ("_parameters", "_buffers", "_non_persistent_buffers_set"):
        attributes[name] = attributes[name].copy()
    # Empty hooks of torch's layers, which register none in a forward pass, are shared: they take half the time.
    if any(map(attributes.__getitem__, _HOOKS)) or not type(part).__module__.startswith("torch.nn."):
        for name in _HOOKS:
            attributes[name] = _rebind_attribute(part, name, copies) if attributes[name] else OrderedDict()
    for name in attributes.keys() - _INTERNAL:
        value = attributes[name]
        if type(value) not in _PLAIN and not (type(value) is tuple and _PLAIN.issuperset(map(type, value))):
            attributes[name] = _rebind_attribute(part, name, copies)
    for name in copyreg._slotnames(type(part)):  # type: ignore[attr-defined]
        if hasattr(part, name):
            object.__setattr__(copied, name, getattr(part, name))


def _rebind_attribute(part: nn.Module, name: str, copies: Mapping[int, nn.Module]) -> Any:
    value = vars(part)[name]
    if name == "_compiled_call_impl":  # of the part's compile(), for the part alone
        return None
    try:
        rebound = _rebind(value, copies)
    except (LookupError, RecursionError):
        raise _rejection(part, f"refers to another part in its attribute {name!r}") from None
    return rebound.copy() if rebound is value and isinstance(value, (dict, list, set)) else rebound


def _rebind(value: Any, copies: Mapping[int, nn.Module]) -> Any:
    """Return a value with references to copies in place of those to parts; the same object if it has none.

    Raises:
        LookupError: if it refers to a part in a way that cannot be changed.
    """
    kind = type(value)
    found = copies.get(id(value))
    if found is not None or kind in _PLAIN or isinstance(value, (nn.Module, torch.fx.Graph)):
        return value if found is None else found  # a graph is not run: its module contains code
    if kind is MethodType and id(value.__self__) in copies:
        return MethodType(value.__func__, copies[id(value.__self__)])
    if kind in (list, tuple, set):
        plain = _PLAIN.issuperset(map(type, value))
        items = value if plain else kind(_rebind(each, copies) for each in value)
        return value if plain or all(map(is_, items, value)) else items
    if kind in (dict, OrderedDict):
        entries = kind((key, _rebind(each, copies)) for key, each in value.items())
        return value if all(map(is_, entries.values(), value.values())) else entries
    if kind is partial:
        old = value.func, value.args, value.keywords
        func, args, keywords = new = _rebind(old, copies)
        return value if new is old else partial(func, *args, **keywords)
    if kind is not MethodType and _hides(value, copies):
        raise LookupError
    return value


def _hides(value: Any, copies: Mapping[int, nn.Module], depth: int = 3) -> bool:
    """Return whether a function or object refers to a part, through at most ``depth`` others."""
    if id(value) in copies:
        return True
    if depth == 0 or type(value) in _PLAIN or isinstance(value, ModuleType):
        return False
    return any(_hides(each, copies, depth - 1) for each in _referents(value))


def _referents(value: Any) -> Iterable[Any]:
    if isinstance(value, FunctionType):
        return [cell.cell_contents for cell in value.__closure__ or () if cell != CellType()]
    if isinstance(value, MethodType):
        return [value.__self__]
    if isinstance(value, partial):
        return [value.func, *value.args, *value.keywords.values()]
    if isinstance(value, weakref.ref):
        return [value()]
    if isinstance(value, (list, tuple, set)):
        return [] if _PLAIN.issuperset(map(type, value)) else value
    return (value if isinstance(value, dict) else getattr(value, "__dict__", {})).values()


def _rejection(part: nn.Module, reason: str) -> ValueError:
    return ValueError(
        f"{type(part).__name__} {reason}, so it cannot be evaluated without changing it in training mode. Call eval() "
        "on the network first."
    )
