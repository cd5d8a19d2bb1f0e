"""Docstrings of everything in an ``__all__`` document the parameters, shapes, results and errors."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

PACKAGE = Path(__file__).parents[1] / "kornia_tinyvit"
Function = ast.FunctionDef | ast.AsyncFunctionDef

#: ``(B, C, H, W)`` or ``(*, 2)``, or a reference to the class or function that documents the shape.
SHAPE = re.compile(r"\([^()`]*[A-Z*\d][^()`]*\)|\(\w+,\)|[Ss]calar|:(class|meth|func|attr):")
#: A section, or a first sentence, about the result.
RESULT = re.compile(r"^(Return|Yield|Compute|Map|Iterate|Build|Read|Load|Open|Create)\b|(Returns|Yields):")
#: Errors of an incomplete subclass or a missing attribute, not of an argument.
INTERNAL_ERRORS = {"NotImplementedError", "AttributeError"}


def classes_of(tree: ast.Module) -> dict[str, ast.ClassDef]:
    return {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}


def functions_of(node: ast.Module | ast.ClassDef) -> dict[str, Function]:
    return {part.name: part for part in node.body if isinstance(part, Function)}


def exported(tree: ast.Module) -> set[str]:
    for node in tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return set(ast.literal_eval(node.value))
    return set()


def has_entry(docstring: str, name: str) -> bool:
    """Return whether a docstring has an entry for a parameter, or mentions it as code."""
    return re.search(rf"^\s*(\w+, )*\*{{0,2}}{name}(, \w+)*:|``\*{{0,2}}{name}``", docstring, re.MULTILINE) is not None


def raises(function: Function) -> bool:
    """Return whether a function raises an error itself, not in a nested function."""
    pending: list[ast.AST] = list(function.body)
    while pending:
        node = pending.pop()
        if isinstance(node, ast.Raise) and node.exc is not None:
            error = node.exc.func if isinstance(node.exc, ast.Call) else node.exc
            if ast.unparse(error) not in INTERNAL_ERRORS:
                return True
        if not isinstance(node, Function | ast.Lambda | ast.ClassDef):
            pending += ast.iter_child_nodes(node)
    return False


def check_signature(function: Function, docstring: str) -> Iterator[str]:
    """Yield what a docstring lacks about the parameters and errors of a function."""
    args = function.args
    named = [*args.posonlyargs, *args.args, *args.kwonlyargs, *filter(None, (args.vararg, args.kwarg))]
    named = [arg for arg in named if arg.arg not in ("self", "cls") and not arg.arg.startswith("_")]
    if len(named) > 1 or "\n" in docstring:  # one line about a single parameter needs no section
        yield from (f"no entry for {arg.arg}" for arg in named if not has_entry(docstring, arg.arg))
    annotations = " ".join(ast.unparse(each) for each in (*(arg.annotation for arg in named), function.returns) if each)
    if re.search(r"\bTensor\b", annotations.replace("[str, Tensor]", "")) and not SHAPE.search(docstring):
        yield "no shape"
    if raises(function) and "Raises:" not in docstring:
        yield "no Raises"


def check_function(function: Function) -> Iterator[str]:
    docstring = ast.get_docstring(function)
    if docstring is None:
        yield "no docstring"
        return
    yield from check_signature(function, docstring)
    is_property = any("property" in ast.unparse(each) for each in function.decorator_list)
    returns = function.returns is not None and ast.unparse(function.returns) not in ("None", "Iterator[None]")
    if returns and not is_property and not RESULT.search(docstring):
        yield "no Returns"


def check_class(node: ast.ClassDef, known: dict[str, ast.ClassDef]) -> Iterator[str]:
    """Yield what the docstrings of a class and its public methods lack, but for overrides of documented methods."""
    docstring = (ast.get_docstring(node) or "") + "\n"
    functions = functions_of(node)
    if shared := re.search(r"are those\s+of\s+:class:`(\w+)`", docstring):
        docstring += ast.get_docstring(known[shared[1]]) or ""
    if "__init__" in functions:
        yield from check_signature(functions["__init__"], docstring)
    kinds = " ".join(ast.unparse(each) for each in (*node.decorator_list, *node.bases))
    if "dataclass" in kinds or "NamedTuple" in kinds:
        fields = {
            ast.unparse(part.target)
            for part in node.body
            if isinstance(part, ast.AnnAssign) and "ClassVar" not in ast.unparse(part.annotation)
        }
        yield from (
            f"no entry for {name}" for name in sorted(fields) if name[0] != "_" and not has_entry(docstring, name)
        )
        if "__post_init__" in functions and raises(functions["__post_init__"]) and "Raises:" not in docstring:
            yield "no Raises"
    inherited = (set(dir(torch.nn.Module)) - {"forward"}) | {
        name for base in node.bases for name in documented(ast.unparse(base).split("[")[0], known)
    }
    for name, function in functions.items():
        if name[0] != "_" and name not in inherited:
            yield from (f"{name}: {problem}" for problem in check_function(function))


def documented(base: str, known: dict[str, ast.ClassDef]) -> set[str]:
    """Return the names of the documented methods of a class of the package and its bases."""
    if base not in known:
        return set()
    own = {name for name, function in functions_of(known[base]).items() if ast.get_docstring(function)}
    return own.union(*(documented(ast.unparse(parent).split("[")[0], known) for parent in known[base].bases))


def check_module(tree: ast.Module, known: dict[str, ast.ClassDef]) -> list[str]:
    names = exported(tree)
    problems = []
    for node in tree.body:
        overload = isinstance(node, Function) and "overload" in map(ast.unparse, node.decorator_list)
        if isinstance(node, ast.ClassDef | Function) and node.name in names and not overload:
            found = check_class(node, known) if isinstance(node, ast.ClassDef) else check_function(node)
            problems += [f"{node.name}: {problem}" for problem in found]
    return problems


def test_public_docstrings():
    paths = [path for path in sorted(PACKAGE.rglob("*.py")) if path.parent.name != "cli"]  # its options have help texts
    trees = {path: ast.parse(path.read_text(encoding="utf-8")) for path in paths}
    known = {name: node for tree in trees.values() for name, node in classes_of(tree).items()}
    problems = [
        f"{path.relative_to(PACKAGE)} {problem}"
        for path, tree in trees.items()
        for problem in check_module(tree, known)
    ]
    assert problems == [], f"{len(problems)} omissions:\n" + "\n".join(problems)


@pytest.mark.parametrize(
    ("code", "problems"),
    [
        ('def f(x: int, y: int) -> int:\n    """Return ``x``."""', ["f: no entry for y"]),
        ('def f(x: int) -> int:\n    """Return the number doubled."""', []),
        ('def f(x: int) -> int:\n    """Add.\n\n    Args:\n        x: a number.\n    """', ["f: no Returns"]),
        ('def f(x: Tensor) -> None:\n    """Draw ``x``."""', ["f: no shape"]),
        ('def f(x: Tensor) -> Tensor:\n    """Return ``x`` :math:`(B, C)` doubled."""', []),
        ('def f() -> None:\n    """Stop."""\n    raise ValueError("x")', ["f: no Raises"]),
        ('def f() -> None:\n    """Stop."""\n    raise NotImplementedError', []),
        ("def f() -> None: ...", ["f: no docstring"]),
        ('@dataclass\nclass f:\n    """A point ``x``."""\n\n    x: int\n    y: int', ["f: no entry for y"]),
        ('class f:\n    """A."""\n\n    def __init__(self, x: int) -> None: ...\n', ["f: no entry for x"]),
        ('class f:\n    """A."""\n\n    def g(self) -> int:\n        """Do."""', ["f: g: no Returns"]),
        ('class f:\n    """A."""\n\n    @property\n    def g(self) -> int:\n        """The size."""', []),
        ('class f(Base):\n    """A."""\n\n    def g(self, x: int) -> int: ...', []),
    ],
)
def test_finds_omissions(code, problems):
    base = classes_of(ast.parse('class Base:\n    def g(self, x: int) -> int:\n        """Return ``x``."""'))
    assert check_module(ast.parse(f'__all__ = ["f"]\n{code}'), base) == problems
