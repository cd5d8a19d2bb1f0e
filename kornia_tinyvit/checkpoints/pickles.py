"""Read files of ``torch.save`` and other pickles without executing anything in them.

A pickle is a program for a stack machine that can import and call any function. The interpreter in this module has no
operation that imports, calls or sets an attribute: a class or function in a file is its :class:`Name`, tensors are
built by the functions of ``_BUILDERS``, and every other object is a :class:`Placeholder` that only holds data. Memory
is bounded by the size of the file: a value that is stored once can be used often, so nothing is copied per use.
"""

from __future__ import annotations

import io
import math
import os
import pickletools
import struct
import sys
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from typing import IO, Any

import torch
from torch import Tensor

__all__ = ["Name", "Placeholder", "read_pickle"]

# First object of a file of torch.save before torch 1.6 (torch.serialization.MAGIC_NUMBER).
_MAGIC_NUMBER = 0x1950A86A20F9469CFC6C
# An operation takes at least a byte of the file and creates an object of about 100 bytes: at most about 500 MB.
_MAX_OPERATIONS = 5_000_000
_MAX_DIMENSIONS = 64  # of torch's tensors
_MAX_KEY = 500  # characters

# Names of modules in pickles of protocol 2, which torch.save writes.
_PYTHON_2 = {"__builtin__": "builtins", "copy_reg": "copyreg"}
_DTYPES = {f"torch.{name}": each for name, each in vars(torch).items() if isinstance(each, torch.dtype)}
_STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "ComplexFloatStorage": torch.complex64,
    "ComplexDoubleStorage": torch.complex128,
    "UntypedStorage": torch.uint8,
}


@dataclass(frozen=True)
class Name:
    """A class or function in a pickle; it is never imported.

    Args:
        kind: its name with its module.
    """

    kind: str

    def __str__(self) -> str:
        return self.kind


class Placeholder:
    """An object in a pickle that is not a tensor, a number, a text or a container of Python.

    Args:
        kind: name of its class, or of the function that would have returned it.

    Attributes:
        items: entries of a subclass of ``dict``.
        state: its state, usually its attributes by name.
    """

    __slots__ = ("items", "kind", "state")

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.items: dict[Any, Any] = {}
        self.state: Any = None

    def __str__(self) -> str:
        return self.kind


@dataclass(frozen=True)
class _Storage:
    """Bytes, and the data type of the numbers in them."""

    data: Tensor
    dtype: torch.dtype


class _Limits:
    """The operations and the memory that a file may still use.

    Args:
        size: size of the file. Its storages are not compressed; those in nested pickles are copied up to three times.
    """

    def __init__(self, size: int) -> None:
        self.operations = _MAX_OPERATIONS
        self.memory = 4 * size

    def use_memory(self, count: int) -> None:
        if not 0 <= count <= self.memory:
            raise ValueError(f"an object of {count} bytes is larger than the file.")
        self.memory -= count

    def use_operation(self) -> None:
        self.operations -= 1
        if self.operations < 0:
            raise ValueError(f"it has more than {_MAX_OPERATIONS} objects.")

    def allocate(self, count: int) -> Tensor:
        self.use_memory(count)
        return torch.empty(count, dtype=torch.uint8, device="cpu")  # also in the context of another device


def read_pickle(file: IO[bytes]) -> Any:
    """Read a file of ``torch.save`` in its current or its older format, or another pickle.

    Args:
        file: a seekable binary file.

    Returns:
        The object: containers, numbers and texts of Python, tensors on the CPU, and a :class:`Placeholder` or a
        :class:`Name` for everything else. Parameters are tensors, an ``OrderedDict`` is a ``dict``, sets are lists.

    Raises:
        ValueError: if the file is damaged, is not a pickle, or describes more data than it has. Damaged files raise
            other exceptions, too.
    """
    limits = _Limits(file.seek(0, os.SEEK_END))
    zipped = zipfile.is_zipfile(file)
    file.seek(0)
    return _read_archive(file, limits) if zipped else _read_stream(file, limits)


def _read_archive(file: IO[bytes], limits: _Limits) -> Any:
    """Read the zip archive of ``torch.save`` since torch 1.6: a pickle, and a record for each storage."""
    with zipfile.ZipFile(file) as archive:
        records = {info.filename: info for info in archive.infolist()}
    roots = [name.removesuffix("data.pkl") for name in records if name.count("/") == 1 and name.endswith("/data.pkl")]
    if len(roots) != 1:
        raise ValueError("the zip archive has no data.pkl of torch.save.")
    (root,) = roots
    if f"{root}constants.pkl" in records:
        raise ValueError("it is a TorchScript archive; pass the state_dict() of torch.jit.load.")

    def read(name: str) -> Tensor:
        info = records[name]
        if info.compress_type != zipfile.ZIP_STORED:
            raise ValueError(f"{name} is compressed; torch.save writes uncompressed archives.")
        file.seek(info.header_offset + 26)  # the lengths of the name and of the extra field in the local header
        file.seek(sum(struct.unpack("<HH", file.read(4))), os.SEEK_CUR)
        return _fill(limits.allocate(info.file_size), file)

    order = bytes(read(f"{root}byteorder").tolist()).decode() if f"{root}byteorder" in records else "little"
    storages: dict[str, Tensor] = {}

    def storage(key: str, dtype: torch.dtype, numel: int) -> Tensor:
        if key not in storages:
            storages[key] = read(f"{root}data/{key}")
            if len(storages[key]) != numel * dtype.itemsize:
                raise ValueError(f"storage {key} has {len(storages[key])} bytes instead of {numel * dtype.itemsize}.")
            if order != sys.byteorder:
                storages[key].untyped_storage().byteswap(dtype)
        return storages[key]

    return _Interpreter(io.BytesIO(read(f"{root}data.pkl").numpy().tobytes()), limits, storage).run()


def _read_stream(file: IO[bytes], limits: _Limits, nested: bool = False) -> Any:
    """Read a pickle, or the format of ``torch.save`` before torch 1.6: five pickles and the bytes of the storages."""
    first = _Interpreter(file, limits, nested=nested).run()
    if type(first) is not int or first != _MAGIC_NUMBER:
        return first
    for _ in ("protocol", "system"):
        _Interpreter(file, limits).run()
    storages: dict[str, tuple[Tensor, int]] = {}

    def storage(key: str, dtype: torch.dtype, numel: int) -> Tensor:
        if key not in storages:
            storages[key] = limits.allocate(numel * dtype.itemsize), dtype.itemsize
        return storages[key][0]

    content = _Interpreter(file, limits, storage, nested).run()
    for key in _Interpreter(file, limits).run():
        if not isinstance(key, str):
            raise ValueError("the key of a storage is not a text.")
        data, itemsize = storages.pop(key)
        (numel,) = struct.unpack("<q", file.read(8))
        if numel * itemsize != len(data):
            raise ValueError(f"storage {key} has {numel} elements instead of {len(data) // itemsize}.")
        _fill(data, file)
    if storages:
        raise ValueError(f"it has no data for {len(storages)} storages.")
    return content


def _fill(data: Tensor, file: Any) -> Tensor:
    """Read the bytes of a storage."""
    if len(data) and file.readinto(data.numpy()) != len(data):
        raise ValueError("the file ends within a storage.")
    return data


class _Interpreter:
    """Interpreter of one pickle.

    Args:
        file: the file, at the beginning of the pickle; afterwards it is at its end.
        limits: operations and memory, shared by all pickles of a file.
        storage: function that returns the bytes of a storage from its key, data type and number of elements.
        nested: whether the pickle is stored inside of another one.
    """

    def __init__(
        self,
        file: IO[bytes],
        limits: _Limits,
        storage: Callable[[str, torch.dtype, int], Tensor] | None = None,
        nested: bool = False,
    ) -> None:
        self.file = file
        self.limits = limits
        self.storage = storage
        self.nested = nested
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}
        self.names: dict[tuple[str, str], Name] = {}

    def run(self) -> Any:
        """Return the object of the pickle."""
        for opcode, argument, _ in pickletools.genops(self.file):
            self.limits.use_operation()
            operation = opcode.name
            if operation == "STOP":
                return self.stack.pop()
            if operation in _LITERALS:
                self.stack.append(argument)
            elif operation in _EMPTY:
                self.stack.append(_EMPTY[operation]())
            elif operation in _MARKED:
                self.stack.append(_MARKED[operation](self.pop_marked()))
            elif operation in _OPERATIONS:
                _OPERATIONS[operation](self, argument)
            else:
                raise ValueError(f"the operation {operation} is not supported.")
        raise ValueError("it has no end.")

    def pop_marked(self) -> list[Any]:
        """Remove the objects above the last mark, and the mark."""
        start = self.marks.pop()
        items = self.stack[start:]
        del self.stack[start:]
        return items

    def drop(self) -> None:
        """Remove the last object or mark."""
        if self.marks and self.marks[-1] == len(self.stack):
            self.marks.pop()
        else:
            self.stack.pop()

    def pack(self, length: int) -> None:
        """Replace the last objects by a tuple of them."""
        self.stack[-length:] = [tuple(self.stack[-length:])]

    def append(self, items: list[Any]) -> None:
        """Append to the last list; elements of other objects are dropped."""
        if type(self.stack[-1]) is list:
            self.stack[-1].extend(items)

    def update(self, items: list[Any]) -> None:
        """Set entries of the last dictionary."""
        target = self.stack[-1]
        entries = target.items if isinstance(target, Placeholder) else target
        if type(entries) is not dict:
            raise ValueError(f"an object of type {type(entries).__name__} has no entries.")
        entries.update(_entries(items))

    def build(self) -> None:
        """Store the state of the last placeholder; that of other objects, such as tensors, is dropped."""
        state = self.stack.pop()
        if isinstance(self.stack[-1], Placeholder):
            self.stack[-1].state = state

    def memorize(self, key: int) -> None:
        self.memo[key] = self.stack[-1]

    def name(self, module: Any, qualname: Any) -> Name:
        if not (isinstance(module, str) and isinstance(qualname, str)):
            raise ValueError("the name of a class or function is not a text.")
        module = _PYTHON_2.get(module, module)
        return self.names.setdefault((module, qualname), Name(f"{module}.{qualname}"))

    def call(self, function: Any, arguments: Any) -> Any:
        """Return the tensor or container that a call would return, or a placeholder."""
        if not isinstance(function, (Name, Placeholder)) or not isinstance(arguments, (tuple, list)):
            raise ValueError(f"an object of type {type(function).__name__} is called.")
        builder = _BUILDERS.get(function.kind) if isinstance(function, Name) else None
        return Placeholder(function.kind) if builder is None else builder(self, *arguments)

    def reduce(self, dropped: int = 0) -> None:
        """Replace a function, its arguments and the keyword arguments, which are dropped, by the result."""
        function, arguments, *_ = self.stack[-2 - dropped :]
        self.stack[-2 - dropped :] = [self.call(function, arguments)]

    def load_persistent(self) -> None:
        """Replace the description of a storage by the storage, and that of a module's source by its class."""
        kind, *values = self.stack.pop()
        if kind == "module":
            result = values[0]
        elif kind == "storage":
            result = self.find_storage(*values)
        else:
            raise ValueError("it refers to an object outside of the file.")
        self.stack.append(result)

    def find_storage(self, name: Name, key: Any, _device: Any, numel: Any, view: Any = None) -> Any:
        """Return a storage, or a placeholder for data types that are not plain numbers."""
        dtype = _STORAGES.get(name.kind.rpartition(".")[2])
        if dtype is None or self.storage is None:
            return Placeholder(name.kind)
        if not isinstance(key, str) or type(numel) is not int:
            raise ValueError("the description of a storage is invalid.")
        data = self.storage(key, dtype, numel)
        if view is not None:  # a part of a storage, before torch 1.6
            _, start, numel = view
            data = data[start * dtype.itemsize : (start + numel) * dtype.itemsize]
        return _Storage(data, dtype)


def _entries(items: list[Any]) -> dict[Any, Any]:
    """Pair keys and values."""
    return dict(zip(map(_as_key, items[::2]), items[1::2], strict=True))


def _as_key(key: Any) -> Any:
    """Return a short text or number, and a placeholder for other keys: hashing nested tuples may take forever."""
    short = (isinstance(key, str) and len(key) <= _MAX_KEY) or (isinstance(key, int) and -(2**63) <= key < 2**63)
    return key if short else Placeholder(type(key).__name__)


def _build_tensor(
    _: _Interpreter, storage: Any, offset: int, size: Any, stride: Any, *_rest: Any, dtype: torch.dtype | None = None
) -> Any:
    if isinstance(storage, Placeholder):
        return storage
    dtype = dtype or storage.dtype
    _check_size(size)
    if math.prod(size) * dtype.itemsize > len(storage.data):
        return Placeholder("torch.Tensor")  # expanded: a copy of it could have any size
    numbers = storage.data.view(dtype)
    return numbers.as_strided(size, stride, numbers.storage_offset() + offset)  # checks the bounds


def _build_tensor_v3(machine: _Interpreter, *arguments: Any) -> Any:
    return _build_tensor(machine, *arguments[:4], dtype=_DTYPES[arguments[6].kind])


def _build_meta_tensor(_: _Interpreter, dtype: Name, size: Any, stride: Any, *_rest: Any) -> Tensor:
    _check_size(size)
    return torch.empty_strided(size, stride, dtype=_DTYPES[dtype.kind], device="meta")


def _check_size(size: Any) -> None:
    if len(size) > _MAX_DIMENSIONS or not all(type(side) is int and 0 <= side < 2**63 for side in size):
        raise ValueError("the size of a tensor is out of range.")


def _build_parameter(_: _Interpreter, data: Any, *_rest: Any) -> Any:
    return data


def _build_subclass(machine: _Interpreter, function: Any, _type: Any, arguments: Any, *_rest: Any) -> Any:
    return machine.call(function, arguments)


def _build_ordered_dict(_: _Interpreter) -> dict[Any, Any]:
    return {}


def _build_set(_: _Interpreter, items: Any = ()) -> Any:
    return items if type(items) is list else []


def _build_bytes(machine: _Interpreter, text: str, encoding: str) -> Any:
    """Return bytes, which pickle protocol 2 stores as a text and a call."""
    machine.limits.use_memory(len(text))
    return text.encode("latin1") if encoding == "latin1" else Placeholder("_codecs.encode")


def _build_object(_: _Interpreter, kind: Name, _base: Any, entries: Any) -> Placeholder:
    """Return an object of pickle protocol 0 or 1."""
    result = Placeholder(kind.kind)
    if type(entries) is dict:
        result.items = entries
    return result


def _build_storage(machine: _Interpreter, data: bytes) -> Any:
    """Return the storage of a tensor that was pickled without ``torch.save``: a file in a pickle."""
    if machine.nested:
        raise ValueError("a storage is nested in another one.")
    machine.limits.use_memory(len(data))
    return _read_stream(io.BytesIO(data), machine.limits, nested=True)


_BUILDERS: dict[str, Callable[..., Any]] = {
    "collections.OrderedDict": _build_ordered_dict,
    "_codecs.encode": _build_bytes,
    "builtins.set": _build_set,
    "copyreg._reconstructor": _build_object,
    "torch.storage._load_from_bytes": _build_storage,
    "torch._utils._rebuild_tensor": _build_tensor,
    "torch._utils._rebuild_tensor_v2": _build_tensor,
    "torch._utils._rebuild_tensor_v3": _build_tensor_v3,
    "torch._utils._rebuild_meta_tensor_no_storage": _build_meta_tensor,
    "torch._utils._rebuild_parameter": _build_parameter,
    "torch._utils._rebuild_parameter_with_state": _build_parameter,
    "torch._utils._rebuild_device_tensor_from_cpu_tensor": _build_parameter,
    "torch._tensor._rebuild_from_type": _build_subclass,
    "torch._tensor._rebuild_from_type_v2": _build_subclass,
}

# Operations that push their argument.
_LITERALS = {
    *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
    *("STRING", "BINSTRING", "SHORT_BINSTRING", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"),
    *("UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8"),
}
# Operations that push a constant or an empty container. Elements of a set may not be hashable, so it is a list.
_EMPTY: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_LIST": list,
    "EMPTY_SET": list,
    "EMPTY_DICT": dict,
    "EMPTY_TUPLE": tuple,
}
# Operations on the objects above the last mark.
_MARKED: dict[str, Callable[[list[Any]], Any]] = {"LIST": list, "FROZENSET": list, "TUPLE": tuple, "DICT": _entries}
# The other operations.
_OPERATIONS: dict[str, Callable[[_Interpreter, Any], Any]] = {
    "PROTO": lambda machine, _: None,
    "FRAME": lambda machine, _: None,
    "MARK": lambda machine, _: machine.marks.append(len(machine.stack)),
    "POP": lambda machine, _: machine.drop(),
    "POP_MARK": lambda machine, _: machine.pop_marked(),
    "DUP": lambda machine, _: machine.stack.append(machine.stack[-1]),
    "TUPLE1": lambda machine, _: machine.pack(1),
    "TUPLE2": lambda machine, _: machine.pack(2),
    "TUPLE3": lambda machine, _: machine.pack(3),
    "APPEND": lambda machine, _: machine.append([machine.stack.pop()]),
    "APPENDS": lambda machine, _: machine.append(machine.pop_marked()),
    "ADDITEMS": lambda machine, _: machine.append(machine.pop_marked()),
    "SETITEM": lambda machine, _: machine.update([machine.stack.pop(), machine.stack.pop()][::-1]),
    "SETITEMS": lambda machine, _: machine.update(machine.pop_marked()),
    "GLOBAL": lambda machine, names: machine.stack.append(machine.name(*names.split(" ", 1))),
    "STACK_GLOBAL": lambda machine, _: machine.stack.append(machine.name(*[machine.stack.pop() for _ in "12"][::-1])),
    "REDUCE": lambda machine, _: machine.reduce(),
    "NEWOBJ": lambda machine, _: machine.reduce(),
    "NEWOBJ_EX": lambda machine, _: machine.reduce(1),
    "OBJ": lambda machine, _: machine.stack.append(_call_first(machine, machine.pop_marked())),
    "INST": lambda machine, names: machine.stack.append(
        machine.call(machine.name(*names.split(" ", 1)), machine.pop_marked())
    ),
    "BUILD": lambda machine, _: machine.build(),
    "BINPERSID": lambda machine, _: machine.load_persistent(),
    "MEMOIZE": lambda machine, _: machine.memorize(len(machine.memo)),
    **dict.fromkeys(("PUT", "BINPUT", "LONG_BINPUT"), lambda machine, key: machine.memorize(key)),
    **dict.fromkeys(("GET", "BINGET", "LONG_BINGET"), lambda machine, key: machine.stack.append(machine.memo[key])),
}


def _call_first(machine: _Interpreter, items: list[Any]) -> Any:
    return machine.call(items[0], items[1:])
