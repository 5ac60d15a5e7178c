"""What a user changes in a network stays changed: in pictures and in files, wherever the plan lets weights rest."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import russet

from ..devices.virtual_mps import VirtualMac

FAST = {"num_inference_steps": 2, "output_type": "np", "seed": 1}
LAYERS = {"unet": "conv_in", "vae": "post_quant_conv", "text_encoder": "text_model.encoder.layers.0.mlp.fc1"}


def opened(folder: Path) -> Any:
    pipe = russet.DiffusionPipeline.from_pretrained(folder, safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def drawn(pipe: Any) -> np.ndarray:
    return np.asarray(pipe("a horse", **FAST).images)


def place(network: nn.Module, path: str) -> tuple[nn.Module, str]:
    owner, _, name = path.rpartition(".")
    return network.get_submodule(owner), name


# -- ways of changing a weight


def in_place(network: Any, path: str) -> None:
    with torch.no_grad():
        network.get_submodule(path).weight.mul_(1.3)


def in_place_data(network: Any, path: str) -> None:
    network.get_submodule(path).weight.data.mul_(1.3)


def new_data(network: Any, path: str) -> None:
    weight = network.get_submodule(path).weight
    weight.data = weight.data * 1.3


def loaded_state(network: Any, path: str) -> None:
    state = {name: value.clone() for name, value in network.state_dict().items()}
    state[f"{path}.weight"] *= 1.3
    network.load_state_dict(state)


def new_parameter(network: Any, path: str) -> None:
    layer = network.get_submodule(path)
    layer.weight = nn.Parameter(layer.weight.detach() * 1.3, requires_grad=False)


def swapped_module(network: Any, path: str) -> None:
    owner, name = place(network, path)
    changed = copy.deepcopy(getattr(owner, name))
    with torch.no_grad():
        changed.weight.mul_(1.3)
    setattr(owner, name, changed)


CHANGES = {
    "in place": in_place,
    ".data in place": in_place_data,
    ".data =": new_data,
    "load_state_dict": loaded_state,
    "a new Parameter": new_parameter,
    "a new module": swapped_module,
}

# -- ways of losing it


def saved(pipe: Any, tmp_path: Path) -> Any:
    pipe.save_pretrained(tmp_path / "saved")
    return opened(tmp_path / "saved")


def one_file(folder: Path) -> Callable[[Any, Path], Any]:
    def saved_as_one(pipe: Any, tmp_path: Path) -> Any:
        pipe.save_single_file(tmp_path / "one.safetensors")
        again = russet.StableDiffusionPipeline.from_single_file(tmp_path / "one.safetensors", config=folder)
        again.set_progress_bar_config(disable=True)
        return again

    return saved_as_one


def model_offload(pipe: Any, tmp_path: Path) -> Any:
    pipe.enable_model_cpu_offload(device="cpu")
    return pipe


def sequential_offload(pipe: Any, tmp_path: Path) -> Any:
    pipe.enable_sequential_cpu_offload(device="cpu")
    return pipe


def there_and_back(pipe: Any, tmp_path: Path) -> Any:
    with VirtualMac():
        return pipe.to("mps", torch.float32).to("cpu")


def second_pipeline(pipe: Any, tmp_path: Path) -> Any:
    other = type(pipe)(**pipe.components, requires_safety_checker=False)
    other.set_progress_bar_config(disable=True)
    return other


def offloaded_twice(pipe: Any, tmp_path: Path) -> Any:
    pipe.enable_model_cpu_offload(device="cpu")
    drawn(pipe)
    return pipe


def offloaded_and_saved(pipe: Any, tmp_path: Path) -> Any:
    return saved(offloaded_twice(pipe, tmp_path), tmp_path)


LOSSES = {
    "model offload": model_offload,
    "sequential offload": sequential_offload,
    "model offload, the second picture": offloaded_twice,
    "model offload and save_pretrained": offloaded_and_saved,
    "to mps and back": there_and_back,
    "save_pretrained": saved,
    "a second pipeline": second_pipeline,
}
DROPPING = {"model offload", "model offload, the second picture", "model offload and save_pretrained"}


FEW = ("in place", "a new module")  # for what drops no weights


def cases() -> list[Any]:
    return [
        pytest.param(loss, change, id=f"{loss}, {change}")
        for loss in LOSSES
        for change in (CHANGES if loss in DROPPING else FEW)
    ]


@pytest.mark.parametrize(("loss", "change"), cases())
def test_a_changed_weight_is_in_pictures_and_files(loss: str, change: str, tiny_folder: Path, tmp_path: Path) -> None:
    pipe, weights = opened(tiny_folder), {}
    for component, path in LAYERS.items():
        CHANGES[change](getattr(pipe, component), path)
        weights[component] = getattr(pipe, component).get_submodule(path).weight.clone()
    expected = drawn(pipe)
    pipe = LOSSES[loss](pipe, tmp_path)
    assert np.abs(drawn(pipe) - expected).max() < 1e-5
    for component, path in LAYERS.items():
        assert torch.equal(getattr(pipe, component).get_submodule(path).weight, weights[component])


@pytest.mark.parametrize("component", LAYERS)
def test_each_network_that_is_changed_stays_so_under_offload(component: str, tiny_folder: Path) -> None:
    pipe = opened(tiny_folder)
    in_place(getattr(pipe, component), LAYERS[component])
    expected = drawn(pipe)
    pipe.enable_model_cpu_offload(device="cpu")
    assert np.abs(drawn(pipe) - expected).max() < 1e-5


@pytest.mark.parametrize("change", FEW)
def test_a_changed_weight_is_in_a_single_file(change: str, tiny_folder: Path, tmp_path: Path) -> None:
    pipe = opened(tiny_folder)
    for component, path in LAYERS.items():
        CHANGES[change](getattr(pipe, component), path)
    expected = drawn(pipe)
    assert np.abs(drawn(one_file(tiny_folder)(pipe, tmp_path)) - expected).max() < 1e-5


@pytest.mark.parametrize("component", LAYERS)
@pytest.mark.parametrize("change", ["load_state_dict"])
def test_a_changed_weight_survives_offload_on_a_mac(change: str, component: str, tiny_folder: Path) -> None:
    with VirtualMac():
        pipe = opened(tiny_folder).to(torch.float32)
        CHANGES[change](getattr(pipe, component), LAYERS[component])
        expected = drawn(pipe)
        pipe.enable_model_cpu_offload(device="mps")
        assert np.abs(drawn(pipe) - expected).max() < 1e-3


class Doubled(nn.Module):
    """Somebody's layer around a layer, as LoRA libraries put it there."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = 2 * self.inner(x)
        return y


PACKED = ["attn1.to_q", "attn1.to_v", "attn2.to_k", "attn1.to_out.0", "ff.net.2"]


def blocks(unet: nn.Module) -> list[nn.Module]:
    return [module for module in unet.modules() if hasattr(module, "attn1") and hasattr(module, "attn2")]


def wrapped(unet: nn.Module, path: str) -> None:
    for block in blocks(unet):
        owner, name = place(block, path)
        if isinstance(owner, nn.ModuleList):
            owner[int(name)] = Doubled(owner[int(name)])
        else:
            setattr(owner, name, Doubled(getattr(owner, name)))


def hooked(unet: nn.Module, path: str) -> None:
    for block in blocks(unet):
        block.get_submodule(path).register_forward_hook(lambda layer, args, output: 2 * output)


@pytest.mark.parametrize("change", [wrapped, hooked])
@pytest.mark.parametrize("path", PACKED)
def test_a_layer_in_a_layers_place_and_a_hook_are_obeyed_where_products_are_packed(
    path: str, change: Any, tiny_folder: Path
) -> None:
    doubled = opened(tiny_folder)
    for block in blocks(doubled.unet):
        with torch.no_grad():
            for value in block.get_submodule(path).parameters():
                value.mul_(2)
    expected = drawn(doubled)
    with VirtualMac():
        before, after = (opened(tiny_folder).to("mps", torch.float32) for _ in range(2))
        change(before.unet, path)
        drawn(after)
        change(after.unet, path)
        assert np.abs(drawn(before) - expected).max() < 1e-3, "changed before the first picture"
        assert np.abs(drawn(after) - expected).max() < 1e-3, "changed between two pictures"
