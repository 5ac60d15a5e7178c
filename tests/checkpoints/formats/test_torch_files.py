from __future__ import annotations

import collections
import contextlib
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from russet.checkpoints.formats.weight_files import open_weights
from russet.errors import CheckpointError, CorruptFile

from ..made import called, needs_float8, torch_zip


def odd_state() -> dict[str, torch.Tensor]:
    """Tensors as they are found in checkpoints, and as only a test has them."""
    base = torch.randn(6, 5)
    return collections.OrderedDict(
        plain=base,
        view=base[2:4],
        transposed=base.t(),
        column=base[:, 1],
        channels_last=torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last),
        half=torch.randn(3).half(),
        bfloat=torch.randn(3).bfloat16(),
        double=torch.randn(2).double(),
        long=torch.arange(3),
        bool=torch.tensor([True, False]),
        scalar=torch.tensor(2.5),
        empty=torch.empty(0, 3),
        parameter=torch.nn.Parameter(torch.ones(3)),
    )


@pytest.fixture(params=["zip", "legacy"])
def save(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    """Saves with torch and opens with Russet."""

    def saved(value: Any) -> Any:
        torch.save(value, tmp_path / "x.bin", _use_new_zipfile_serialization=request.param == "zip")
        return open_weights(tmp_path / "x.bin")

    return saved


def test_every_tensor_is_read_as_torch_saved_it(save: Any) -> None:
    state = odd_state()
    found = save(state).tensors
    assert set(found) == set(state)
    for name, value in state.items():
        read = found[name].read()
        assert read.dtype == value.dtype, name
        assert torch.equal(read, value.detach()), name
        assert read.is_contiguous(), name


def test_a_state_dict_in_a_training_checkpoint_is_unwrapped(save: Any) -> None:
    state = odd_state()
    checkpoint = {"state_dict": state, "epoch": 3, "lr": 1e-4, "optimizer": [{"step": torch.tensor(1)}], "seed": (1, 2)}
    assert set(save(checkpoint).tensors) == set(state)


def test_a_dict_within_the_dict_gets_dotted_names(save: Any) -> None:
    embedding = {"string_to_token": {"*": 265}, "string_to_param": {"*": torch.ones(2, 3)}, "name": "x"}
    assert set(save(embedding).tensors) == {"string_to_param.*"}


def test_a_state_dict_with_versions_of_its_modules_is_read(save: Any) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2))
    assert set(save(model.state_dict()).tensors) == set(model.state_dict())


@needs_float8
def test_float8_is_read_from_a_storage_of_bytes(tmp_path: Path) -> None:
    value = torch.randn(4, 4).to(torch.float8_e4m3fn)
    torch.save({"a": value}, tmp_path / "x.bin")
    read = open_weights(tmp_path / "x.bin").tensors["a"].read()
    assert read.dtype == value.dtype
    assert torch.equal(read.view(torch.uint8), value.view(torch.uint8))


def test_lightning_callbacks_are_passed_over(tmp_path: Path) -> None:
    """The first Stable Diffusion checkpoints have a class of Lightning as a key, and numpy numbers."""
    key = b"cpytorch_lightning.callbacks.model_checkpoint\nModelCheckpoint\n"
    number = b"cnumpy.core.multiarray\nscalar\ncnumpy\ndtype\nX\x02\x00\x00\x00f8K\x00K\x01\x87RX\x01\x00\x00\x00x\x86R"
    callbacks = b"X\x09\x00\x00\x00callbacks}" + key + number + b"s"
    state = b"X\x0a\x00\x00\x00state_dict}"
    path = torch_zip(tmp_path / "x.ckpt", b"\x80\x02}(" + callbacks + state + b"u.")
    assert open_weights(path).tensors == {}


def test_opening_reads_no_tensor(tmp_path: Path) -> None:
    """Only headers: a file whose tensors have all gone from the disk, leaving zeros, opens just the same."""
    torch.save({"a": torch.ones(1 << 20)}, tmp_path / "x.bin")
    path = tmp_path / "x.bin"
    with zipfile.ZipFile(path) as archive:
        info = next(info for info in archive.infolist() if "/data/" in info.filename)
    with open(path, "r+b") as file:
        file.seek(info.header_offset + 200)
        file.write(bytes(1 << 16))
    assert open_weights(path).tensors["a"].shape == (1 << 20,)


def whole(path: Path) -> bytes:
    torch.save({"a": torch.arange(300.0), "b": torch.ones(2, 2)}, path)
    return path.read_bytes()


@pytest.mark.parametrize("kept", [0.02, 0.3, 0.6, 0.97])
@pytest.mark.parametrize("legacy", [False, True])
def test_a_file_cut_short_is_refused(kept: float, legacy: bool, tmp_path: Path) -> None:
    path = tmp_path / "x.bin"
    torch.save({"a": torch.arange(300.0)}, path, _use_new_zipfile_serialization=not legacy)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * kept)])
    with pytest.raises(CorruptFile, match=r"x\.bin"):
        open_weights(path)


def tensor_of(offset: int, shape: tuple[int, ...], strides: tuple[int, ...], count: int = 4) -> bytes:
    """The pickle of {"a": tensor} over one storage of four floats, with these numbers in it."""
    import io
    import pickle

    class Storage:
        pass

    class Pickler(pickle._Pickler):  # type: ignore[name-defined, misc]
        def persistent_id(self, value: Any) -> Any:
            return ("storage", torch.FloatStorage, "0", "cpu", count) if isinstance(value, Storage) else None

    class Rebuilt:
        def __reduce__(self) -> Any:
            arguments = (Storage(), offset, shape, strides, False, collections.OrderedDict())
            return torch._utils._rebuild_tensor_v2, arguments

    out = io.BytesIO()
    Pickler(out, 2).dump({"a": Rebuilt()})
    return out.getvalue()


def test_the_hand_made_pickle_reads_as_a_tensor(tmp_path: Path) -> None:
    data = torch.arange(4.0).numpy().tobytes()
    path = torch_zip(tmp_path / "x.bin", tensor_of(0, (2, 2), (1, 2)), {"0": data})
    assert torch.equal(open_weights(path).tensors["a"].read(), torch.tensor([[0.0, 2.0], [1.0, 3.0]]))


@pytest.mark.parametrize(
    ("offset", "shape", "strides"),
    [
        (1, (2, 2), (2, 1)),  # reaches beyond the storage
        (0, (1 << 40,), (1,)),
        (0, (1 << 60, 4), (0, 1)),  # the same bytes again and again
        (0, (4, 4), (0, 1)),
        (0, (2, 2), (1 << 61, 1)),
        (-1, (2,), (1,)),
        (0, (-2,), (1,)),
        (0, (2,), (-1,)),
        (0, (2, 2), (1,)),
        (0, (1,) * 65, (1,) * 65),
        (0, (2.0,), (1,)),
        (True, (2,), (1,)),
    ],
)
def test_a_tensor_that_its_storage_cannot_hold_is_refused(
    offset: Any, shape: Any, strides: Any, tmp_path: Path
) -> None:
    path = torch_zip(tmp_path / "x.bin", tensor_of(offset, shape, strides), {"0": bytes(16)})
    with pytest.raises(CorruptFile):
        open_weights(path)


def test_a_storage_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CorruptFile, match="storage '0'"):
        open_weights(torch_zip(tmp_path / "x.bin", tensor_of(0, (2,), (1,))))


def test_a_compressed_archive_is_refused(tmp_path: Path) -> None:
    path = torch_zip(tmp_path / "x.bin", tensor_of(0, (2,), (1,)), {"0": bytes(16)}, compression=zipfile.ZIP_DEFLATED)
    with pytest.raises(CorruptFile, match="compressed"):
        open_weights(path)


@pytest.mark.parametrize("value", [[torch.ones(1)], torch.ones(1), 3, "text"])
def test_what_is_no_dict_of_tensors_is_refused(value: Any, save: Any) -> None:
    with pytest.raises(CorruptFile, match="dict of tensors was expected"):
        save(value)


def test_a_zip_archive_of_something_else_is_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "x.ckpt", "w") as archive:
        archive.writestr("readme.txt", "hello")
    with pytest.raises(CorruptFile, match="no file of torch"):
        open_weights(tmp_path / "x.ckpt")


def test_a_whole_pickled_model_is_refused_by_the_name_of_its_class(tmp_path: Path) -> None:
    from russet.errors import UnsafeFile

    torch.save(torch.nn.Linear(2, 2), tmp_path / "x.pt")
    with pytest.raises(UnsafeFile, match=r"torch\.nn\.modules\.linear\.Linear"):
        open_weights(tmp_path / "x.pt")


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_archives_with_bytes_changed_give_tensors_or_our_errors(data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.bin"
        content = bytearray(whole(path))
        ends = st.integers(0, 400) | st.integers(len(content) - 800, len(content) - 1)
        for _ in range(data.draw(st.integers(1, 5))):
            content[data.draw(ends)] = data.draw(st.integers(0, 255))
        path.write_bytes(content)
        with contextlib.suppress(CheckpointError):
            for tensor in open_weights(path).tensors.values():
                tensor.read()


def test_a_large_archive_is_read_through_its_64_bit_fields(tmp_path: Path) -> None:
    """zipfile writes the zip64 records that torch writes for files beyond 4 GB, when it is told to."""
    path = tmp_path / "x.bin"
    with zipfile.ZipFile(path, "w", allowZip64=True) as archive:
        with archive.open("archive/data.pkl", "w", force_zip64=True) as file:
            file.write(tensor_of(0, (4,), (1,)))
        with archive.open("archive/data/0", "w", force_zip64=True) as file:
            file.write(torch.arange(4.0).numpy().tobytes())
    assert torch.equal(open_weights(path).tensors["a"].read(), torch.arange(4.0))


def test_calls_in_a_file_are_not_made(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    torch_zip(tmp_path / "x.bin", called("os", "mkdir", str(mark)))
    with pytest.raises(CheckpointError):
        open_weights(tmp_path / "x.bin")
    assert not mark.exists()
