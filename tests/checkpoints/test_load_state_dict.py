from __future__ import annotations

import dataclasses
import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from russet.checkpoints.formats.weight_files import open_weights
from russet.checkpoints.load_state_dict import build, check, load_state_dict
from russet.errors import ConfigError, CorruptFile, KeyMismatch

from .made import Tiny, needs_float8


@pytest.fixture
def stored(tmp_path: Path) -> Any:
    """Tensors as they come from a file."""

    def written(state: dict[str, torch.Tensor]) -> Any:
        save_file({name: value.contiguous() for name, value in state.items()}, tmp_path / "x.safetensors")
        return open_weights(tmp_path / "x.safetensors").tensors

    return written


def test_a_model_is_built_without_memory_and_computed_buffers_are_real() -> None:
    model = build(Tiny, None)
    assert all(value.is_meta for value in model.parameters())
    assert torch.equal(model.positions, torch.arange(6))
    assert not model.training


def test_building_does_not_import_torchs_compiler() -> None:
    """It takes seconds, and an initialiser on a tensor without memory would import it."""
    program = (
        "import sys, torch; from torch import nn; from russet.checkpoints.load_state_dict import build\n"
        "class Words(nn.Module):\n"
        "    def __init__(self, config):\n"
        "        super().__init__(); self.words = nn.Embedding(3, 2); self.linear = nn.Linear(2, 2)\n"
        "before = 'torch._dynamo' in sys.modules\n"
        "build(Words, None)\n"
        "sys.exit('torch._dynamo' in sys.modules and not before)\n"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


def test_filled_weights_are_bit_equal_and_want_no_gradient(stored: Any, tiny_state: dict[str, torch.Tensor]) -> None:
    model = build(Tiny, None)
    load_state_dict(model, stored(tiny_state), "here")
    for name, value in model.state_dict(keep_vars=True).items():
        assert torch.equal(value, tiny_state[name])
        assert not value.requires_grad
        assert value.device.type == "cpu"
    assert model.conv(torch.ones(1, 2, 4, 4)).shape == (1, 3, 2, 2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_values_are_converted_as_torch_converts_them(
    dtype: torch.dtype, stored: Any, tiny_state: dict[str, torch.Tensor]
) -> None:
    model = build(Tiny, None)
    load_state_dict(model, stored(tiny_state), "here", dtype=dtype)
    assert all(torch.equal(value, tiny_state[name].to(dtype)) for name, value in model.state_dict().items())


@needs_float8
def test_float8_becomes_what_was_asked_for(stored: Any, tiny_state: dict[str, torch.Tensor]) -> None:
    small = {name: value.to(torch.float8_e4m3fn) for name, value in tiny_state.items()}
    model = build(Tiny, None)
    load_state_dict(model, stored(small), "here", dtype=torch.float16)
    assert all(torch.equal(value, small[name].half()) for name, value in model.state_dict().items())


def test_convolutions_take_the_memory_format(stored: Any, tiny_state: dict[str, torch.Tensor]) -> None:
    model = build(Tiny, None)
    load_state_dict(model, stored(tiny_state), "here", memory_format=torch.channels_last)
    assert model.conv.weight.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(model.conv.weight, tiny_state["conv.weight"])


def test_weights_go_to_the_device_one_by_one(stored: Any, tiny_state: dict[str, torch.Tensor]) -> None:
    """The meta device stands for one that tests do not have: everything was converted, checked and sent there."""
    model = build(Tiny, None)
    load_state_dict(model, stored(tiny_state), "here", dtype=torch.float16, device="meta")
    assert {(value.device.type, value.dtype) for value in model.state_dict().values()} == {("meta", torch.float16)}


def test_values_that_stay_as_stored_are_the_file_and_all_others_are_copies(
    stored: Any, tiny_state: dict[str, torch.Tensor]
) -> None:
    sources = stored(tiny_state)
    kept, copied = build(Tiny, None), build(Tiny, None)
    load_state_dict(kept, sources, "here")
    starts = {value.data_ptr() - sources[name].offset for name, value in kept.state_dict().items()}
    assert len(starts) == 1
    load_state_dict(copied, sources, "here", dtype=torch.float64)
    starts = {value.data_ptr() - sources[name].offset for name, value in copied.state_dict().items()}
    assert len(starts) > 1


class Tied(nn.Module):
    def __init__(self, config: Any = None) -> None:
        super().__init__()
        self.first = nn.Linear(3, 3, bias=False)
        self.second = nn.Linear(3, 3, bias=False)
        self.second.weight = self.first.weight


@pytest.mark.parametrize("names", [["first.weight"], ["second.weight"], ["first.weight", "second.weight"]])
def test_tied_weights_stay_tied_whichever_name_they_come_under(names: list[str], stored: Any) -> None:
    model = build(Tied, None)
    load_state_dict(model, stored({name: torch.eye(3) for name in names}), "here")
    assert model.first.weight is model.second.weight
    assert torch.equal(model.first.weight, torch.eye(3))


@dataclasses.dataclass
class Described:
    """A tensor that is not there to be read."""

    shape: tuple[int, ...]
    torch_dtype: torch.dtype

    def read(self, *, brief: bool = False) -> torch.Tensor:
        raise AssertionError("nothing was to be read")


def described(shapes: dict[str, tuple[int, ...]], dtype: torch.dtype = torch.float32) -> dict[str, Described]:
    return {name: Described(shape, dtype) for name, shape in shapes.items()}


def test_a_mismatch_lists_what_is_missing_unexpected_and_wrongly_shaped(tiny_state: dict[str, torch.Tensor]) -> None:
    shapes = {name: tuple(value.shape) for name, value in tiny_state.items()}
    del shapes["norm.bias"]
    shapes |= {"other.weight": (1,), "linear.weight": (4, 4)}
    with pytest.raises(KeyMismatch) as caught:
        check(build(Tiny, None), described(shapes), "unet/x.safetensors")
    text = str(caught.value)
    assert "1 missing: norm.bias" in text
    assert "1 unexpected: other.weight" in text
    assert "linear.weight (is [4, 4], should be [4, 3])" in text
    assert "unet/x.safetensors does not fit Tiny" in text


def test_a_long_mismatch_is_cut_and_counted() -> None:
    with pytest.raises(KeyMismatch, match=r"30 unexpected: x0, .*x9, … \(20 more\)"):
        check(build(Tiny, None), described({f"x{number}": (1,) for number in range(30)}), "here")


def test_nothing_is_read_where_names_do_not_match(tiny_state: dict[str, torch.Tensor]) -> None:
    with pytest.raises(KeyMismatch):
        load_state_dict(build(Tiny, None), described(dict.fromkeys(tiny_state, (1,))), "here")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_values_that_are_not_finite_are_reported_by_name(
    value: float, dtype: torch.dtype, stored: Any, tiny_state: dict[str, torch.Tensor], caplog: pytest.LogCaptureFixture
) -> None:
    tiny_state = {name: value.to(dtype) for name, value in tiny_state.items()}
    tiny_state["conv.weight"][1, 1, 2, 2] = value
    with caplog.at_level(logging.WARNING):
        load_state_dict(build(Tiny, None), stored(tiny_state), "unet", dtype=dtype)
    assert [record.getMessage() for record in caplog.records] == [
        "unet: NaN or Inf in conv.weight; pictures will be black or broken"
    ]


def test_values_that_overflow_in_half_precision_are_reported(
    stored: Any, tiny_state: dict[str, torch.Tensor], caplog: pytest.LogCaptureFixture
) -> None:
    tiny_state["norm.weight"][0] = 70_000.0
    load_state_dict(build(Tiny, None), stored(tiny_state), "vae", dtype=torch.float16)
    assert "norm.weight" in caplog.text


def test_types_are_compared_before_anything_is_read(tiny_state: dict[str, torch.Tensor]) -> None:
    shapes = {name: tuple(value.shape) for name, value in tiny_state.items()}
    with pytest.raises(CorruptFile, match="quantised"):
        load_state_dict(build(Tiny, None), described(shapes, torch.int8), "here")


def test_quantised_weights_are_refused(stored: Any, tiny_state: dict[str, torch.Tensor]) -> None:
    tiny_state["linear.weight"] = tiny_state["linear.weight"].to(torch.int8)
    with pytest.raises(CorruptFile, match=r"linear\.weight is stored as torch\.int8"):
        load_state_dict(build(Tiny, None), stored(tiny_state), "here")


class Deep(nn.Module):
    def __init__(self, layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(2, 2) for _ in range(layers))


class Wide(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.layer = nn.Linear(width, width)


def test_a_config_of_a_billion_layers_is_refused_at_once() -> None:
    with pytest.raises(ConfigError, match="more than 100 tensors"):
        build(Deep, 10**9, limit=100)


def test_a_config_of_impossible_width_is_refused() -> None:
    with pytest.raises(ConfigError, match="Wide cannot be built"):
        build(Wide, 1 << 40)
