"""Pickles that weights come in, and pickles that want to do harm: nothing in them ever runs."""

from __future__ import annotations

import contextlib
import pickle
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from russet.checkpoints.formats.pickles import Inert, unpickle
from russet.checkpoints.formats.weight_files import open_weights
from russet.errors import CheckpointError, CorruptFile, UnsafeFile

from ..made import called, torch_zip

PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers(-(1 << 31), 1 << 31) | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner) | st.tuples(inner, inner),
    max_leaves=20,
)


def read(data: bytes, allowed: dict[str, Any] | None = None) -> Any:
    return unpickle(data, 0, allowed or {}, lambda pid: pid, "x.bin")[0]


@settings(max_examples=100, deadline=None)
@given(PLAIN, st.sampled_from([2, 3, 4]))
def test_plain_data_comes_out_as_python_reads_it(data: Any, protocol: int) -> None:
    assert read(pickle.dumps(data, protocol)) == data


HARMFUL = {
    "a shell": called("os", "system", "echo harm > {mark}"),
    "the same under its own name": called("posix", "system", "echo harm > {mark}"),
    "eval": called("builtins", "eval", "open('{mark}', 'w')"),
    "exec in Python 2's name": called("__builtin__", "exec", "open('{mark}', 'w')"),
    "getattr": called("builtins", "getattr", "x", "y"),
    "a process": called("subprocess", "Popen", ["touch", "{mark}"]),
    "torch's own loader": called("torch", "load", "{mark}"),
    "torch's compiler": called("torch.utils.cpp_extension", "load", "{mark}"),
    "an import by path": called("importlib", "import_module", "antigravity"),
    "a dotted name": called("collections", "OrderedDict.fromkeys", "x"),
    "a class of ours": called("russet.checkpoints.formats.tensor_source", "StoredFile", "{mark}"),
}


@pytest.mark.parametrize("what", HARMFUL)
@pytest.mark.parametrize("legacy", [False, True])
def test_a_refused_global_is_named_and_nothing_runs(what: str, legacy: bool, tmp_path: Path) -> None:
    mark = tmp_path / "harm"
    data = HARMFUL[what].replace(b"{mark}", str(mark).encode()[:6].ljust(6, b"_"))
    path = tmp_path / "x.bin"
    if legacy:
        magic = pickle.dumps(0x1950A86A20F9469CFC6C, 2)
        path.write_bytes(magic + pickle.dumps(1001, 2) + pickle.dumps({"little_endian": True}, 2) + data)
    else:
        torch_zip(path, data)
    name = data[3:].split(b"\n")[:2]
    with pytest.raises(UnsafeFile, match=rf"{name[0].decode()}\.{name[1].decode()}.*safetensors"):
        open_weights(path)
    assert not mark.exists()


def test_a_global_by_the_newer_opcode_is_refused_as_well() -> None:
    with pytest.raises(UnsafeFile, match=r"os\.system"):
        read(b"\x80\x04\x8c\x02os\x8c\x06system\x93)R.")


def test_what_is_no_function_of_ours_is_not_called() -> None:
    with pytest.raises(UnsafeFile, match="calls a str"):
        read(b"\x80\x04\x8c\x02os)R.")


def test_objects_that_weights_do_not_need_become_inert() -> None:
    assert isinstance(read(called("numpy", "dtype", "f8", False), {"numpy.dtype": Inert}), Inert)


# Pickles that Python's own unpickler is slow, large or endless on. Each would take minutes or gigabytes there.
BOMBS = {
    "nested tuples as a key": b"\x80\x02}" + b")" + b"q\x00h\x00\x86" * 60 + b"K\x01s.",
    "eight exabytes of bytes": b"\x80\x04\x8e" + b"\xff" * 7 + b"\x7f.",
    "a bytearray of an exabyte": b"\x80\x05\x96" + b"\xff" * 6 + b"\x0f\x00.",
    "a long of two gigabytes": b"\x80\x02\x8b\xff\xff\xff\x7f.",
    "a text of four gigabytes": b"\x80\x02X\xff\xff\xff\xff.",
    "a memo of four billion": b"\x80\x02Nr\xff\xff\xff\xff.",
    "endless opening marks": b"\x80\x02" + b"(" * 200_000 + b".",
    "endlessly nested tuples": b"\x80\x02)" + b"\x85" * 200_000 + b".",
    "endlessly nested lists": b"\x80\x02" + b"]" * 200_000 + b"a" * 199_999 + b".",
    "a tuple that calls itself": b"\x80\x02]q\x00h\x00a.",
    "calls with endless arguments": b"\x80\x02ccollections\nOrderedDict\nq\x00("
    + b"N" * 200_000
    + b"tq\x01"
    + b"h\x00h\x01R" * 100_000
    + b".",
    "an endless name": b"\x80\x02c" + b"a" * 200_000,
}


@pytest.mark.parametrize("what", BOMBS)
def test_a_bomb_does_not_go_off(what: str, tmp_path: Path) -> None:
    started = time.process_time()
    with contextlib.suppress(CheckpointError):
        assert open_weights(torch_zip(tmp_path / "x.bin", BOMBS[what])).tensors == {}
    assert time.process_time() - started < 10  # linear in the size; the margin is for slow machines


@pytest.mark.parametrize("name", ["a" * 1001, "가" * 2000])
def test_names_of_absurd_length_are_refused(name: str) -> None:
    with pytest.raises(CorruptFile, match="characters"):
        read(pickle.dumps({name: 1}, 4))


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_random_opcodes_give_only_our_errors(data: st.DataObject) -> None:
    sound = pickle.dumps({"a": [1, 2.5, "x", (None, True)], "b": {"c": b"y"}}, 2)
    content = bytearray(sound)
    for _ in range(data.draw(st.integers(1, 6))):
        at = data.draw(st.integers(2, len(content) - 1))
        content[at : at + data.draw(st.integers(0, 2))] = data.draw(st.binary(max_size=3))
    with contextlib.suppress(CheckpointError):
        read(bytes(content))


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=200))
def test_random_pickles_in_a_file_give_only_our_errors(content: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder, contextlib.suppress(CheckpointError):
        open_weights(torch_zip(Path(folder) / "x.bin", b"\x80\x02" + content))
