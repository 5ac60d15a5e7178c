"""A pickle interpreter that cannot run code.

Python's own unpickler, even with ``find_class`` restricted, can be made to allocate without bound or to hash for ever.
This one knows the opcodes that ``torch.save`` writes, works on plain data, and resolves a global only in the table that
it is given. Nothing is imported, and nothing is called but the functions in that table. No step costs more than what it
takes from the pickle, so the time is linear in its length.

Opcodes: ``pickletools`` in the standard library describes each.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from typing import Any

from russet.errors import CheckpointError, CorruptFile, UnsafeFile

SIZE_LIMIT = 8 << 20  # bytes of one pickle; that of a full SDXL .ckpt has 1 MB
ARGUMENT_LIMIT = 16  # of a call; torch's longest has eight
NAME_LIMIT = 1000  # characters of a key

_MARK = object()


class Inert:
    """What an object becomes that a checkpoint carries but weights do not need: it takes everything, does nothing."""

    def __init__(self, *_: Any) -> None:
        pass


def unpickle(
    data: bytes, start: int, allowed: Mapping[str, Any], persistent: Callable[[Any], Any], where: str
) -> tuple[Any, int]:
    """The object pickled at ``data[start:]``, and where its pickle ends.

    Args:
        allowed: what each global may be, by its full name (``"collections.OrderedDict"``); callables may be called.
        persistent: makes an object from a persistent id.

    Raises:
        UnsafeFile: the pickle names a global that is not allowed, or calls what is not in the table.
        CorruptFile: it is no pickle, or uses what torch never writes.
    """
    machine = _Machine(data, start, allowed, persistent, where)
    try:
        return machine.run(), machine.at
    except CheckpointError:
        raise
    except (IndexError, KeyError, TypeError, ValueError, AttributeError, struct.error, OverflowError) as error:
        # Opcodes that do not fit together: an empty stack, a key that cannot be hashed, an argument of the wrong type.
        raise CorruptFile(f"{where}: its pickle makes no sense at byte {machine.at}: {error!r}"[:500]) from None


class _Machine:
    """The stack machine: ``stack`` holds values and marks, ``memo`` what the pickle refers back to."""

    def __init__(
        self, data: bytes, start: int, allowed: Mapping[str, Any], persistent: Callable[[Any], Any], where: str
    ) -> None:
        self.data, self.at = data, start
        self.allowed, self.persistent, self.where = allowed, persistent, where
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def run(self) -> Any:
        while True:
            opcode = self.take(1)
            if opcode == b".":
                return self.stack.pop()
            action = _ACTIONS.get(opcode)
            if action is None:
                raise CorruptFile(
                    f"{self.where}: its pickle has opcode {opcode!r} at byte {self.at - 1}, never torch's"
                )
            action(self)

    def take(self, count: int) -> bytes:
        piece = self.data[self.at : self.at + count]
        if len(piece) < count:
            raise CorruptFile(f"{self.where}: its pickle is cut short, or longer than {SIZE_LIMIT} bytes")
        self.at += count
        return piece

    def number(self, layout: str) -> Any:
        return struct.unpack(layout, self.take(struct.calcsize(layout)))[0]

    def line(self) -> str:
        end = self.data.index(b"\n", self.at)
        return self.take(end + 1 - self.at)[:-1].decode("utf-8")

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def since_mark(self) -> list[Any]:
        items = []
        while (item := self.stack.pop()) is not _MARK:
            items.append(item)
        return items[::-1]

    def resolve(self, module: str, name: str) -> None:
        if f"{module}.{name}" not in self.allowed:
            raise UnsafeFile(
                f"{self.where} asks for {module[:100]}.{name[:100]}, which weights do not need; it was not loaded and "
                "nothing in it was run. Look for a .safetensors version of this file"
            )
        self.push(self.allowed[f"{module}.{name}"])

    def call(self) -> None:
        arguments, function = self.stack.pop(), self.stack.pop()
        if not callable(function):
            raise UnsafeFile(f"{self.where}: its pickle calls a {type(function).__name__}; it was not loaded")
        if not isinstance(arguments, tuple) or len(arguments) > ARGUMENT_LIMIT:
            raise ValueError("a call with impossible arguments")
        self.push(function(*arguments))

    def build(self) -> None:
        """Gives an object its state: dropped, since no state matters to weights (it would be a module's version)."""
        self.stack.pop()

    def set_items(self, pairs: list[Any]) -> None:
        target = self.stack[-1]
        if isinstance(target, Inert):
            return
        if not isinstance(target, dict) or len(pairs) % 2:
            raise ValueError("items for what is no dict")
        for key, value in zip(pairs[::2], pairs[1::2], strict=True):
            if isinstance(key, str) and len(key) > NAME_LIMIT:
                raise ValueError(f"a name of {len(key)} characters")
            if isinstance(key, (str, int)):  # others name no weight, and a nested tuple takes for ever to hash
                target[key] = value

    def append(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if isinstance(target, list):
            target.extend(items)
        elif not isinstance(target, (set, Inert)):  # what a set holds names no weight
            raise ValueError("items for what is no list")

    def put(self, index: int) -> None:
        self.memo[index] = self.stack[-1]

    def tuple_of(self, count: int) -> None:
        if len(self.stack) < count:
            raise ValueError("too few values for a tuple")
        self.stack[-count:] = [tuple(self.stack[-count:])]

    def pair(self) -> list[Any]:
        value, key = self.stack.pop(), self.stack.pop()
        return [key, value]


def _text(data: bytes) -> str:
    return data.decode("utf-8", "surrogatepass")


def _stack_global(m: _Machine) -> None:
    name, module = m.stack.pop(), m.stack.pop()
    if not isinstance(name, str) or not isinstance(module, str):
        raise ValueError("a global without a name")
    m.resolve(module, name)


_ACTIONS: dict[bytes, Callable[[_Machine], Any]] = {
    b"\x80": lambda m: m.take(1),  # PROTO
    b"\x95": lambda m: m.take(8),  # FRAME
    b"(": lambda m: m.push(_MARK),
    b"0": lambda m: m.stack.pop(),  # POP
    b"1": lambda m: m.since_mark(),  # POP_MARK
    b"N": lambda m: m.push(None),
    b"\x88": lambda m: m.push(True),
    b"\x89": lambda m: m.push(False),
    b"J": lambda m: m.push(m.number("<i")),
    b"K": lambda m: m.push(m.number("<B")),
    b"M": lambda m: m.push(m.number("<H")),
    b"\x8a": lambda m: m.push(int.from_bytes(m.take(m.number("<B")), "little", signed=True)),  # LONG1
    b"G": lambda m: m.push(m.number(">d")),
    b"X": lambda m: m.push(_text(m.take(m.number("<I")))),  # BINUNICODE
    b"\x8c": lambda m: m.push(_text(m.take(m.number("<B")))),  # SHORT_BINUNICODE
    b"T": lambda m: m.push(m.take(m.number("<I")).decode("latin-1")),  # BINSTRING, of Python 2
    b"U": lambda m: m.push(m.take(m.number("<B")).decode("latin-1")),  # SHORT_BINSTRING
    b"B": lambda m: m.push(m.take(m.number("<I"))),  # BINBYTES
    b"C": lambda m: m.push(m.take(m.number("<B"))),  # SHORT_BINBYTES
    b"}": lambda m: m.push({}),
    b"]": lambda m: m.push([]),
    b")": lambda m: m.push(()),
    b"\x8f": lambda m: m.push(set()),
    b"t": lambda m: m.push(tuple(m.since_mark())),
    b"\x85": lambda m: m.tuple_of(1),
    b"\x86": lambda m: m.tuple_of(2),
    b"\x87": lambda m: m.tuple_of(3),
    b"a": lambda m: m.append([m.stack.pop()]),
    b"e": lambda m: m.append(m.since_mark()),
    b"\x90": lambda m: m.append(m.since_mark()),  # ADDITEMS
    b"s": lambda m: m.set_items(m.pair()),
    b"u": lambda m: m.set_items(m.since_mark()),
    b"c": lambda m: m.resolve(m.line(), m.line()),  # GLOBAL
    b"\x93": _stack_global,
    b"R": lambda m: m.call(),  # REDUCE
    b"\x81": lambda m: m.call(),  # NEWOBJ
    b"b": lambda m: m.build(),
    b"Q": lambda m: m.push(m.persistent(m.stack.pop())),  # BINPERSID
    b"q": lambda m: m.put(m.number("<B")),
    b"r": lambda m: m.put(m.number("<I")),
    b"\x94": lambda m: m.put(len(m.memo)),  # MEMOIZE
    b"h": lambda m: m.push(m.memo[m.number("<B")]),
    b"j": lambda m: m.push(m.memo[m.number("<I")]),
}
