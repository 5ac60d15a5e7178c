"""Files of ``torch.save`` (.bin, .ckpt, .pt): a pickle that describes tensors, and their bytes beside it.

Since torch 1.6 the file is an uncompressed zip archive: ``NAME/data.pkl`` and one member ``NAME/data/KEY`` for each
storage. Before that it was five pickles in a row (a magic number, a version, the system, the object, the storages'
keys), then for each storage its length and bytes. Both are read by description: no tensor is made until it is wanted.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from russet.checkpoints.formats import pickles
from russet.checkpoints.formats.pickles import Inert, unpickle
from russet.checkpoints.formats.tensor_source import (
    ITEM_SIZES,
    RANK_LIMIT,
    TORCH_NAMES,
    StoredFile,
    StoredTensor,
    row_major,
)
from russet.checkpoints.formats.zips import place, read_directory
from russet.errors import CorruptFile

TENSOR_LIMIT = 200_000  # entries in one file; a full SDXL .ckpt has 2,600

Lookup = Callable[[str], tuple[int, int]]  # a storage's key -> where its bytes begin in the file, how many there are


@dataclasses.dataclass(frozen=True)
class _ElementType:
    """The type of a storage's or a tensor's elements; None for a storage of plain bytes."""

    dtype: str | None


@dataclasses.dataclass(frozen=True)
class _Storage:
    element_type: _ElementType
    key: str


@dataclasses.dataclass(frozen=True)
class _Tensor:
    storage: _Storage
    dtype: str
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def read_zip(file: StoredFile) -> dict[str, StoredTensor]:
    """The tensors of a zip file of torch.

    Raises:
        CorruptFile: it is damaged, compressed, or no file of torch.
        UnsafeFile: its pickle wants more than tensors.
    """
    members = read_directory(file)
    pickle_name = next((name for name in members if name == "data.pkl" or name.endswith("/data.pkl")), None)
    if pickle_name is None:
        raise CorruptFile(f"{file.path} is a zip archive without data.pkl: no file of torch.save")
    folder = pickle_name[: -len("data.pkl")]
    if (order := members.get(f"{folder}byteorder")) and file.read_bytes(place(file, order)[0], 6) != b"little":
        raise CorruptFile(f"{file.path} was written on a big-endian machine; save it again on another")
    start, size = place(file, members[pickle_name])
    data = file.read_bytes(start, min(size, pickles.SIZE_LIMIT))
    root, _ = unpickle(data, 0, _ALLOWED, _storage, str(file.path))

    def lookup(key: str) -> tuple[int, int]:
        member = members.get(f"{folder}data/{key}")
        if member is None:
            raise CorruptFile(f"{file.path} has no storage {key[:100]!r}; it is damaged")
        return place(file, member)

    return _stored(root, file, lookup)


def read_legacy(file: StoredFile) -> dict[str, StoredTensor]:
    """The tensors of a file that torch before 1.6 wrote.

    Raises:
        CorruptFile: it is damaged.
        UnsafeFile: its pickles want more than tensors.
    """
    data = file.read_bytes(0, pickles.SIZE_LIMIT)
    element_types: dict[str, _ElementType] = {}

    def persistent(pid: Any) -> _Storage:
        *pid, view = pid
        storage = _storage(pid)
        if view is not None:
            raise ValueError("a view of a storage, as torch before 0.4 wrote them")
        element_types[storage.key] = storage.element_type
        return storage

    at = 0
    objects = []
    for _ in range(5):
        value, at = unpickle(data, at, _ALLOWED, persistent, str(file.path))
        objects.append(value)
    _, _, system, root, keys = objects
    if not isinstance(system, dict) or system.get("little_endian") is not True:
        raise CorruptFile(f"{file.path} was written on a big-endian machine, or is damaged")
    if not isinstance(keys, list) or len(keys) > TENSOR_LIMIT:
        raise CorruptFile(f"{file.path} does not list its storages; it is damaged")
    places: dict[str, tuple[int, int]] = {}
    for key in keys:
        count = int.from_bytes(file.read_bytes(at, 8), "little")
        element_type = element_types.get(key) if isinstance(key, str) else None
        if element_type is None or at + 8 + count * _item_size(element_type) > file.size:
            raise CorruptFile(f"{file.path} is cut short or damaged; download it again")
        places[key] = (at + 8, count * _item_size(element_type))
        at += 8 + places[key][1]

    def lookup(key: str) -> tuple[int, int]:
        if key not in places:
            raise CorruptFile(f"{file.path} has no storage {key[:100]!r}; it is damaged")
        return places[key]

    return _stored(root, file, lookup)


def _stored(root: Any, file: StoredFile, lookup: Lookup) -> dict[str, StoredTensor]:
    """The tensors of a state dict and of dicts directly in it, by dotted names; ``state_dict`` itself is unwrapped."""
    if isinstance(root, dict) and isinstance(root.get("state_dict"), dict):
        root = root["state_dict"]
    if not isinstance(root, dict):
        raise CorruptFile(f"{file.path} holds a {type(root).__name__.strip('_')}; a dict of tensors was expected")
    found: dict[str, _Tensor] = {}
    seen = 0
    for key, value in root.items():
        seen += len(value) if isinstance(value, dict) else 1
        if seen > TENSOR_LIMIT:
            raise CorruptFile(f"{file.path} holds more than {TENSOR_LIMIT} entries; that is refused")
        inside = (
            {f"{key}.{name}": item for name, item in value.items()} if isinstance(value, dict) else {str(key): value}
        )
        found |= {name: item for name, item in inside.items() if isinstance(item, _Tensor)}
    return {name: _locate(name, tensor, file, lookup) for name, tensor in found.items()}


def _locate(name: str, tensor: _Tensor, file: StoredFile, lookup: Lookup) -> StoredTensor:
    """Where a described tensor lies, if its storage has room for it."""
    start, size = lookup(tensor.storage.key)
    item = ITEM_SIZES[tensor.dtype]
    found = StoredTensor(file, start + tensor.offset * item, tensor.dtype, tensor.shape, tensor.strides)
    if found.strides == row_major(found.shape) or found.count <= 1:
        found = dataclasses.replace(found, strides=None)
    if (tensor.offset + found.span) * item > size:
        raise CorruptFile(f"{file.path}: tensor {name[:200]!r} reaches beyond its storage; the file is damaged")
    if found.count > found.span:
        raise CorruptFile(f"{file.path}: tensor {name[:200]!r} uses the same bytes twice; that is refused")
    return found


def _item_size(element_type: _ElementType) -> int:
    return 1 if element_type.dtype is None else ITEM_SIZES[element_type.dtype]


def _storage(pid: Any) -> _Storage:
    """From a persistent id: ("storage", type, key, device, number of elements)."""
    mark, element_type, key, _, _ = pid
    if mark != "storage" or not isinstance(element_type, _ElementType) or not isinstance(key, str):
        raise ValueError("a persistent id that is no storage")
    return _Storage(element_type, key)


def _tensor(storage: Any, offset: Any, shape: Any, strides: Any, *rest: Any) -> _Tensor:
    """What ``_rebuild_tensor`` and its successors are called with; the third of ``rest`` may be a type."""
    element_type = rest[2] if len(rest) > 2 and isinstance(rest[2], _ElementType) else storage.element_type
    if not isinstance(storage, _Storage) or element_type.dtype is None:
        raise ValueError("a tensor without a typed storage")
    if len(shape) != len(strides) or len(shape) > RANK_LIMIT:
        raise ValueError("a tensor of impossible rank")
    if not all(type(number) is int and 0 <= number < 1 << 62 for number in (offset, *shape, *strides)):
        raise ValueError("a tensor of impossible size")
    return _Tensor(storage, element_type.dtype, offset, tuple(shape), tuple(strides))


def _from_type(function: Any, _kind: Any, arguments: Any, _state: Any) -> Any:
    """What a tensor with attributes is rebuilt by; the attributes are dropped."""
    if function not in (_tensor, _first) or len(arguments) > pickles.ARGUMENT_LIMIT:
        raise ValueError("a tensor rebuilt by what rebuilds none")
    return function(*arguments)


def _first(value: Any, *_: Any) -> Any:
    return value


def _size(sizes: Any) -> Any:
    return sizes


def _globals() -> Mapping[str, Any]:
    storages = {
        "Bool": "BOOL", "Byte": "U8", "Char": "I8", "Short": "I16", "Int": "I32", "Long": "I64",
        "Half": "F16", "BFloat16": "BF16", "Float": "F32", "Double": "F64", "ComplexFloat": "C64",
    }  # fmt: skip
    inert = (
        # what Lightning and numpy put beside the weights
        "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint",
        "pytorch_lightning.callbacks.early_stopping.EarlyStopping",
        "numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar", "numpy.dtype", "_codecs.encode",
        "argparse.Namespace", "torch.device", "torch.Tensor", "torch.nn.parameter.Parameter",
        "torch.serialization._get_layout",
        # a training config in OmegaConf
        "omegaconf.dictconfig.DictConfig", "omegaconf.listconfig.ListConfig", "omegaconf.nodes.AnyNode",
        "omegaconf.base.ContainerMetadata", "omegaconf.base.Metadata", "typing.Any", "collections.defaultdict",
    )  # fmt: skip
    return {
        **dict.fromkeys(inert, Inert),
        **{f"torch.{name}Storage": _ElementType(dtype) for name, dtype in storages.items()},
        **{f"torch.{name}": _ElementType(dtype) for dtype, name in TORCH_NAMES.items()},
        "torch.storage.UntypedStorage": _ElementType(None),
        "torch.storage._UntypedStorage": _ElementType(None),
        "torch._utils._rebuild_tensor": _tensor,
        "torch._utils._rebuild_tensor_v2": _tensor,
        "torch._utils._rebuild_tensor_v3": _tensor,
        "torch._utils._rebuild_parameter": _first,
        "torch._utils._rebuild_parameter_with_state": _first,
        "torch._tensor._rebuild_from_type_v2": _from_type,
        "torch.Size": _size,
        "collections.OrderedDict": dict,
    }


_ALLOWED = _globals()
