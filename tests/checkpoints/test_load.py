"""Folders in Diffusers form, as they are found and as they should not be."""

from __future__ import annotations

import contextlib
import json
import logging
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from russet.checkpoints import load
from russet.checkpoints.arguments import MINI
from russet.checkpoints.folder import parse_index
from russet.errors import (
    ArgumentTypeError,
    ConfigError,
    CorruptFile,
    InputError,
    KeyMismatch,
    MissingFile,
    RussetError,
    UnsafeFile,
    UnsupportedArgument,
)
from russet.models.clip_text import CLIPTextModel
from russet.models.unet import UNet2DConditionModel
from russet.models.vae import AutoencoderKL
from russet.schedulers.named import DDIMScheduler, EulerDiscreteScheduler, PNDMScheduler
from russet.text.tokenizer import CLIPTokenizer

UNET = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture
def folder(tiny_folder: Path, tmp_path: Path) -> Path:
    """A tiny pipeline to break: links where tests do not write, copies where they do."""
    target = tmp_path / "model"
    shutil.copytree(tiny_folder, target)
    return target


def change(path: Path, **values: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def test_every_component_comes_with_its_class_and_precision(tiny_folder: Path) -> None:
    loaded = load.pipeline(tiny_folder)
    names = {part: type(value).__name__ for part, value in loaded.components.items() if value is not None}
    assert names == {
        "feature_extractor": "CLIPImageProcessor",
        "safety_checker": "StableDiffusionSafetyChecker",
        "scheduler": "PNDMScheduler",
        "text_encoder": "CLIPTextModel",
        "tokenizer": "CLIPTokenizer",
        "unet": "UNet2DConditionModel",
        "vae": "AutoencoderKL",
    }
    assert loaded.class_name == "StableDiffusionPipeline"
    assert loaded.index["requires_safety_checker"] is True
    assert loaded.components["unet"].dtype == torch.float32


def test_mini_loads_in_the_precision_that_is_asked_for() -> None:
    components = load.pipeline("mini", dtype={"vae": torch.float32, "default": torch.float16}).components
    assert [components[part].dtype for part in ("unet", "text_encoder", "vae")] == [
        torch.float16,
        torch.float16,
        torch.float32,
    ]
    stored = load_file(MINI / "vae" / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(stored[name].float(), value) for name, value in components["vae"].state_dict().items())


def test_overrides_are_used_as_they_are_and_their_files_are_not_opened(folder: Path) -> None:
    shutil.rmtree(folder / "vae")
    shutil.rmtree(folder / "safety_checker")
    mine = object()
    components = load.pipeline(folder, overrides={"vae": mine, "safety_checker": None}).components
    assert components["vae"] is mine
    assert components["safety_checker"] is None
    assert isinstance(components["unet"], UNet2DConditionModel)


def test_a_component_that_the_index_lacks_can_be_given_or_left_out(folder: Path) -> None:
    assert load.pipeline(folder, overrides={"tokenizer_2": None}).components["tokenizer_2"] is None


def test_an_override_of_no_component_is_refused(tiny_folder: Path) -> None:
    with pytest.raises(UnsupportedArgument, match=r"unett: no such argument or component; components are .*unet"):
        load.pipeline(tiny_folder, overrides={"unett": None})


def test_old_configs_are_repaired_in_a_pipeline_and_kept_in_a_component(folder: Path) -> None:
    change(folder / "scheduler" / "scheduler_config.json", steps_offset=0)
    change(folder / "unet" / "config.json", _diffusers_version="0.6.0", sample_size=32)
    components = load.pipeline(folder).components
    assert components["scheduler"].config.steps_offset == 1
    assert components["unet"].config.sample_size == 64
    assert load.component(PNDMScheduler, folder, subfolder="scheduler").config.steps_offset == 0


def test_unknown_config_keys_are_kept_and_reported_once(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    change(folder / "unet" / "config.json", new_feature=3)
    with caplog.at_level(logging.INFO):
        unet = load.component(UNet2DConditionModel, folder / "unet")
    assert unet.config["new_feature"] == 3
    assert caplog.text.count("new_feature") == 1


# -- weights in other forms


def save_as(folder: Path, name: str, state: dict[str, torch.Tensor]) -> None:
    for path in folder.glob("*model*"):
        path.unlink()
    save_file(state, folder / name)


def test_pickled_weights_are_read_where_there_are_no_others(folder: Path) -> None:
    state = load_file(folder / UNET)
    (folder / UNET).unlink()
    torch.save(state, folder / "unet" / "diffusion_pytorch_model.bin")
    unet = load.component(UNet2DConditionModel, folder / "unet")
    assert all(torch.equal(state[name], value) for name, value in unet.state_dict().items())
    with pytest.raises(MissingFile, match="leave out use_safetensors=True"):
        load.component(UNet2DConditionModel, folder / "unet", use_safetensors=True)


def test_a_variant_of_some_components_falls_back_in_the_others(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    state = {name: value.half() for name, value in load_file(folder / UNET).items()}
    save_file(state, folder / "unet" / "diffusion_pytorch_model.fp16.safetensors")
    (folder / UNET).write_bytes(b"not to be opened")
    with caplog.at_level(logging.INFO):
        components = load.pipeline(folder, options=load.Options(variant="fp16"), dtype=torch.float16).components
    assert all(torch.equal(state[name], value) for name, value in components["unet"].state_dict().items())
    assert "no variant 'fp16' of safety_checker, text_encoder, vae; using the plain files there" in caplog.text


def test_a_variant_that_no_component_has_is_refused_with_those_there_are(folder: Path) -> None:
    shutil.copy(folder / UNET, folder / "unet" / "diffusion_pytorch_model.non_ema.safetensors")
    with pytest.raises(MissingFile, match=r"variant 'fp16'; there are non_ema"):
        load.pipeline(folder, options=load.Options(variant="fp16"))
    with pytest.raises(MissingFile, match="there is none; leave out variant"):
        load.component(AutoencoderKL, folder, subfolder="vae", variant="fp16")


def test_weights_that_are_there_only_as_a_variant_are_pointed_out(folder: Path) -> None:
    (folder / UNET).rename(folder / "unet" / "diffusion_pytorch_model.fp16.safetensors")
    with pytest.raises(MissingFile, match="pass variant='fp16'"):
        load.pipeline(folder)


def test_the_text_encoder_loads_with_and_without_its_prefix_and_its_position_ids(folder: Path) -> None:
    name = "model.safetensors"
    state = load_file(folder / "text_encoder" / name)
    expected = load.component(CLIPTextModel, folder, subfolder="text_encoder").state_dict()
    bare = {key.removeprefix("text_model."): value for key, value in state.items()}
    full = {f"text_model.{key}": value for key, value in bare.items()}
    for form in (bare, full, {**full, "text_model.embeddings.position_ids": torch.arange(77.0)[None]}):
        save_as(folder / "text_encoder", name, form)
        model = load.component(CLIPTextModel, folder, subfolder="text_encoder")
        assert all(torch.equal(expected[key], value) for key, value in model.state_dict().items())


def test_the_vae_loads_under_its_old_attention_names(folder: Path) -> None:
    name = "diffusion_pytorch_model.safetensors"
    expected = load_file(folder / "vae" / name)
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    state = dict(expected)
    for key in expected:
        for new, before in old.items():
            if f"attentions.0.{new}." in key:
                value = state.pop(key)
                value = value[:, :, None, None].clone() if value.dim() == 2 else value
                state[key.replace(f"attentions.0.{new}.", f"attentions.0.{before}.")] = value
    assert len(set(state) - set(expected)) == 16
    save_as(folder / "vae", name, state)
    vae = load.component(AutoencoderKL, folder / "vae")
    assert all(torch.equal(expected[key], value) for key, value in vae.state_dict().items())


# -- what is wrong, each told by name before any weight is read


def edit_index(**values: Any) -> Callable[[Path], None]:
    return lambda folder: change(folder / "model_index.json", **values)


def write(name: str, content: bytes | str) -> Callable[[Path], None]:
    return lambda folder: (
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode()) and None
    )


def remove(pattern: str) -> Callable[[Path], None]:
    """Removes the files of that name or pattern, of which there must be one at least."""

    def remove_from(folder: Path) -> None:
        found = list(folder.glob(pattern))
        assert found
        for path in found:
            path.unlink()

    return remove_from


FAULTS: dict[str, tuple[Callable[[Path], None], type[RussetError], str]] = {
    "no index": (remove("model_index.json"), MissingFile, "no model_index.json"),
    "an empty index": (write("model_index.json", ""), CorruptFile, "is empty"),
    "an index that is no JSON": (write("model_index.json", "{,}"), CorruptFile, "JSON cannot be read"),
    "an index that is a list": (write("model_index.json", "[]"), CorruptFile, "must hold a JSON object"),
    "an index that nests": (write("model_index.json", '{"a":' * 500 + "1" + "}" * 500), CorruptFile, "nests too deep"),
    "no class": (edit_index(_class_name=None), ConfigError, "no _class_name"),
    "no components": (write("model_index.json", '{"_class_name": "X"}'), ConfigError, "names no component"),
    "a class of nobody": (edit_index(unet=["diffusers", "UNetOfNobody"]), ConfigError, "'UNetOfNobody'.*it has Auto"),
    "a module to import": (edit_index(unet=["os", "system"]), ConfigError, "'system'"),
    "a path as a component": (edit_index(**{"../x": ["a", "CLIPTokenizer"]}), UnsafeFile, r"'\.\./x'"),
    "a component of three": (edit_index(unet=["a", "b", "c"]), ConfigError, r"must be \[library, class\]"),
    "a component of numbers": (edit_index(unet=[1, 2]), ConfigError, r"must be \[library, class\]"),
    "a class of another kind": (edit_index(unet=["diffusers", "AutoencoderKL"]), ConfigError, "not of a AutoencoderKL"),
    "no config": (remove("unet/config.json"), MissingFile, "unet/config.json"),
    "a config cut short": (write("unet/config.json", '{"sample_size": 8'), CorruptFile, "unet/config.json"),
    "a config of wrong types": (
        write("vae/config.json", '{"latent_channels": "four"}'),
        ConfigError,
        "latent_channels",
    ),
    "no weights": (remove(UNET), MissingFile, "unet has no weights"),
    "weights cut short": (lambda folder: truncate(folder / UNET, 0.5), CorruptFile, "cut short"),
    "weights of a page": (write(UNET, "<html>"), CorruptFile, "not a safetensors file"),
    "weights of git-lfs": (write(UNET, "version https://git-lfs.github.com/spec/v1\n"), CorruptFile, "git lfs pull"),
    "a config of more layers": (
        lambda folder: change(folder / "unet/config.json", layers_per_block=2),
        KeyMismatch,
        "missing: down_blocks",
    ),
    "a config of a billion layers": (
        lambda folder: change(folder / "text_encoder/config.json", num_hidden_layers=10**9),
        ConfigError,
        "more than",
    ),
    "a config of blocks of a billion layers": (
        lambda folder: change(folder / "unet/config.json", layers_per_block=10**9),
        ConfigError,
        "layers_per_block may be at most",
    ),
    "a config of a billion timesteps": (
        lambda folder: change(folder / "scheduler/scheduler_config.json", num_train_timesteps=10**9),
        ConfigError,
        "num_train_timesteps",
    ),
    "no vocabulary": (remove("tokenizer/[tv]o[kc]*.json"), MissingFile, "tokenizer"),
}


def truncate(path: Path, share: float) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])


@pytest.mark.parametrize("what", FAULTS)
def test_a_fault_is_named_before_any_weight_is_read(what: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from russet.checkpoints.formats.tensor_source import StoredTensor

    def never(self: StoredTensor, *, brief: bool = False) -> torch.Tensor:
        raise AssertionError("a weight was read")

    monkeypatch.setattr(StoredTensor, "read", never)
    spoil, error, hint = FAULTS[what]
    spoil(folder)
    for postponed in (True, False):
        with pytest.raises(error, match=hint):
            load.pipeline(folder, postponed=postponed)


def test_weights_of_another_component_are_refused_with_their_names(folder: Path) -> None:
    shutil.copy(folder / "vae/diffusion_pytorch_model.safetensors", folder / UNET)
    with pytest.raises(KeyMismatch, match=r"does not fit UNet2DConditionModel: .* missing: .* unexpected: "):
        load.pipeline(folder)


def test_a_good_pipeline_loads_after_a_bad_one(tiny_folder: Path, folder: Path) -> None:
    (folder / UNET).write_bytes(b"")
    with pytest.raises(CorruptFile):
        load.pipeline(folder)
    assert load.pipeline(tiny_folder).components["unet"] is not None


def test_a_folder_that_is_no_pipeline_says_what_it_is(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(MissingFile, match="it is a single component"):
        load.pipeline(folder / "unet")
    with pytest.raises(MissingFile, match="the folder model in it has one"):
        load.pipeline(tmp_path)
    (tmp_path / "x").mkdir()
    save_file({"a": torch.ones(1)}, tmp_path / "x" / "v1-5.safetensors")
    with pytest.raises(MissingFile, match=r"v1-5\.safetensors with from_single_file"):
        load.pipeline(tmp_path / "x")


# -- single components


def test_a_scheduler_takes_the_config_of_another(tiny_folder: Path) -> None:
    euler = load.component(EulerDiscreteScheduler, tiny_folder, subfolder="scheduler")
    assert isinstance(euler, EulerDiscreteScheduler)
    assert euler.config.beta_end == 0.012
    assert isinstance(DDIMScheduler.from_pretrained("mini", subfolder="scheduler"), DDIMScheduler)


def test_a_tokenizer_and_an_image_processor_load_by_themselves(tiny_folder: Path) -> None:
    from russet.images.clip_processor import CLIPImageProcessor

    assert CLIPTokenizer.from_pretrained(tiny_folder, subfolder="tokenizer").vocab_size == 2944
    assert isinstance(CLIPImageProcessor.from_pretrained(tiny_folder / "feature_extractor"), CLIPImageProcessor)


def test_a_class_made_from_one_of_ours_loads_as_itself(tiny_folder: Path) -> None:
    class Mine(UNet2DConditionModel):
        pass

    assert type(Mine.from_pretrained(tiny_folder, subfolder="unet")) is Mine


COMPONENT_FAULTS: dict[str, tuple[type[Any], dict[str, Any], type[RussetError], str]] = {
    "a whole pipeline": (UNet2DConditionModel, {}, MissingFile, "pass subfolder="),
    "another class": (AutoencoderKL, {"subfolder": "unet"}, ConfigError, "config of a UNet2DConditionModel"),
    "a subfolder that is not there": (UNet2DConditionModel, {"subfolder": "unet2"}, MissingFile, "unet2"),
    "a subfolder outside": (UNet2DConditionModel, {"subfolder": "../unet"}, UnsafeFile, "leads out"),
    "an absolute subfolder": (UNet2DConditionModel, {"subfolder": "/unet"}, UnsafeFile, "leads out"),
    "a subfolder of a wrong type": (UNet2DConditionModel, {"subfolder": 3}, ArgumentTypeError, "subfolder"),
    "an unknown option": (UNet2DConditionModel, {"device_map": "auto"}, UnsupportedArgument, "device_map"),
    "a wrong precision": (UNet2DConditionModel, {"dtype": "int4"}, InputError, "int4"),
    "a class of nobody": (dict, {}, ConfigError, "dict is not a component"),
}


@pytest.mark.parametrize("what", COMPONENT_FAULTS)
def test_a_wrong_call_for_a_component_is_explained(what: str, tiny_folder: Path) -> None:
    cls, arguments, error, hint = COMPONENT_FAULTS[what]
    with pytest.raises(error, match=hint):
        load.component(cls, tiny_folder, **arguments)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(1 << 40), 1 << 40) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=5,
)
VAE_KEYS = json.loads((MINI / "vae" / "config.json").read_text())


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.dictionaries(st.sampled_from([*VAE_KEYS, "new_key"]), JSON, min_size=1, max_size=3))
def test_random_values_in_a_config_give_a_model_or_our_errors(tiny_folder: Path, values: dict[str, Any]) -> None:
    with tempfile.TemporaryDirectory() as place:
        shutil.copytree(tiny_folder / "vae", place, dirs_exist_ok=True)
        change(Path(place) / "config.json", **values)
        with contextlib.suppress(RussetError):
            assert isinstance(load.component(AutoencoderKL, place), AutoencoderKL)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.dictionaries(st.sampled_from(["_class_name", "unet", "vae", "../x", "a/b", ""]), JSON, min_size=1))
def test_random_values_in_an_index_give_a_pipeline_or_our_errors(tiny_folder: Path, values: dict[str, Any]) -> None:
    index = json.loads((tiny_folder / "model_index.json").read_text())
    with contextlib.suppress(RussetError):
        parsed = parse_index({**index, **values}, "model_index.json")
        parsed.entries(skipped=())
