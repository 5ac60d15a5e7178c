"""Whole models out of one file, in the layouts of their authors."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from russet import DiffusionPipeline, StableDiffusionPipeline
from russet.checkpoints.layouts import ldm_keys
from russet.checkpoints.load import Loaded
from russet.checkpoints.single_file.load import single_file
from russet.errors import (
    ArgumentTypeError,
    CheckpointError,
    ConfigError,
    CorruptFile,
    InputError,
    KeyMismatch,
    MissingFile,
    UnsupportedArgument,
)
from russet.text.tokenizer import CLIPTokenizer

from ...conftest import MINI
from .. import ldm_layout, ldm_tiny

FAMILIES = tuple(ldm_tiny.UNETS)
NO_WORDS = {"tokenizer": None, "tokenizer_2": None}  # the tiny models know fewer words than CLIP's tokenizer


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One tiny file of each family."""
    folder = tmp_path_factory.mktemp("files")
    return {family: ldm_tiny.write_original(folder / f"{family}.safetensors", family) for family in FAMILIES}


def load(path: Path, family: str, **how: Any) -> Loaded:
    overrides = {**NO_WORDS, **how.pop("overrides", {})}
    how.setdefault("prediction_type", "epsilon" if family == "sd2" else None)
    return single_file(path, overrides=overrides, config=ldm_tiny.configs(family), **how)


def written_back(loaded: Loaded, family: str) -> dict[str, torch.Tensor]:
    """The file's tensors put together again from our networks, by hand: q, k, v stacked and so on."""
    found: dict[str, list[tuple[int, torch.Tensor]]] = {}
    for part in ldm_keys.LAYOUTS[family]:
        model = loaded.components[part.component]
        for name, value in model.state_dict().items():
            place = part.translate(name, model.config)
            found.setdefault(part.prefixes[0] + place.key, []).append((place.third or 0, value))
    return {key: torch.cat([value for _, value in sorted(parts, key=lambda p: p[0])]) for key, parts in found.items()}


def assert_same_weights(loaded: Loaded, family: str, original: Mapping[str, torch.Tensor]) -> None:
    ours = written_back(loaded, family)
    assert ours
    for key, value in ours.items():
        expected = original[key]
        if key.endswith("text_projection"):
            expected = expected.t()
        assert value.numel() == expected.numel(), key
        assert torch.equal(value, expected.reshape(value.shape)), key


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_loads_bit_equal_to_its_file(family: str, files: dict[str, Path]) -> None:
    loaded = load(files[family], family)
    assert_same_weights(loaded, family, load_file(files[family]))
    assert not any(p.requires_grad for p in loaded.components["unet"].parameters())
    assert not loaded.components["unet"].training


@pytest.mark.parametrize("family", FAMILIES)
def test_each_network_has_the_weights_that_diffusers_gives_it(
    family: str, files: dict[str, Path], tmp_path: Path
) -> None:
    reference = ldm_tiny.reference(family)
    reference.save_pretrained(tmp_path / "configs")
    extra = {"safety_checker": None} if family in ("sd1", "sd2") else {}
    theirs = type(reference).from_single_file(
        str(files[family]), config=str(tmp_path / "configs"), local_files_only=True, **extra
    )
    ours = single_file(files[family], config=tmp_path / "configs").components
    # Diffusers 0.42 with transformers 5 does not fill XL's second text encoder; the next test is about that one
    for name in ("unet", "vae", "text_encoder"):
        if (network := getattr(theirs, name, None)) is None:
            assert ours.get(name) is None
            continue
        expected = {key.removeprefix("text_model."): value for key, value in network.state_dict().items()}
        found = {key.removeprefix("text_model."): value for key, value in ours[name].state_dict().items()}
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            assert torch.equal(found[key], value), key


@pytest.mark.parametrize("family", ["sd1", "sd2"])
def test_the_pictures_from_a_file_and_a_folder_are_those_that_diffusers_makes(
    family: str, files: dict[str, Path], tmp_path: Path, psnr: Callable[[Any, Any], float]
) -> None:
    """Stable Diffusion 2's with velocity, heads of their own in each block, and attention in float32."""
    import diffusers

    ldm_tiny.reference(family).save_pretrained(tmp_path)
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    pictures = []
    for kind in (diffusers.StableDiffusionPipeline, StableDiffusionPipeline):
        options = {"local_files_only": True, "safety_checker": None}
        for pipe in (
            kind.from_single_file(str(files[family]), config=str(tmp_path), **options),
            kind.from_pretrained(str(tmp_path), **options),
        ):
            pipe.set_progress_bar_config(disable=True)
            result = pipe("a red apple", latents=latents, num_inference_steps=3, height=64, width=64, output_type="np")
            pictures.append(result.images)
    assert psnr(pictures[0], pictures[2]) >= 60
    assert psnr(pictures[1], pictures[3]) >= 60
    assert psnr(pictures[2], pictures[3]) < 60


def test_openclips_own_computation_gives_the_features_that_our_text_encoder_gives(files: dict[str, Path]) -> None:
    encoder = load(files["sdxl"], "sdxl").components["text_encoder_2"]
    prefix = "conditioner.embedders.1.model."
    weights = {k.removeprefix(prefix): v for k, v in load_file(files["sdxl"]).items() if k.startswith(prefix)}
    ids = torch.tensor([[2942, 5, 9, 17, 2943, *[0] * 72]])
    states, pooled = openclip(weights, ids, heads=4)
    ours = encoder(ids, output_hidden_states=True)
    assert torch.allclose(ours.hidden_states[-2], states[-2], atol=1e-5)
    assert torch.allclose(ours.text_embeds, pooled, atol=1e-5)


def openclip(
    weights: Mapping[str, torch.Tensor], ids: torch.Tensor, heads: int
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """OpenCLIP's text tower as its authors wrote it: torch's multi-head attention on stacked matrices, batch second."""
    norm = torch.nn.functional.layer_norm
    linear = torch.nn.functional.linear
    width = weights["ln_final.weight"].shape[0]
    x = (weights["token_embedding.weight"][ids] + weights["positional_embedding"]).transpose(0, 1)
    mask = torch.full((77, 77), float("-inf")).triu(1)
    states = [x.transpose(0, 1)]
    for i in range(ldm_tiny.TEXT_LAYERS):
        w = {k.removeprefix(f"transformer.resblocks.{i}."): v for k, v in weights.items() if f".resblocks.{i}." in k}
        y = norm(x, (width,), w["ln_1.weight"], w["ln_1.bias"])
        attended, _ = torch.nn.functional.multi_head_attention_forward(
            y, y, y, width, heads, w["attn.in_proj_weight"], w["attn.in_proj_bias"], None, None, False, 0.0,
            w["attn.out_proj.weight"], w["attn.out_proj.bias"], training=False, attn_mask=mask, need_weights=False,
        )  # fmt: skip
        x = x + attended
        y = norm(x, (width,), w["ln_2.weight"], w["ln_2.bias"])
        y = torch.nn.functional.gelu(linear(y, w["mlp.c_fc.weight"], w["mlp.c_fc.bias"]))
        x = x + linear(y, w["mlp.c_proj.weight"], w["mlp.c_proj.bias"])
        states.append(x.transpose(0, 1))
    final = norm(states[-1], (width,), weights["ln_final.weight"], weights["ln_final.bias"])
    return states, final[:, ids[0].argmax()] @ weights["text_projection"]


def test_the_averaged_unet_is_taken_on_request(files: dict[str, Path]) -> None:
    original = load_file(files["sd1"])
    plain, averaged = load(files["sd1"], "sd1"), load(files["sd1"], "sd1", extract_ema=True)
    ours = averaged.components["unet"].conv_out.weight
    assert torch.equal(ours, original["model_ema.diffusion_modelout2weight"])
    assert torch.equal(plain.components["unet"].conv_out.weight, original["model.diffusion_model.out.2.weight"])
    assert torch.equal(averaged.components["vae"].quant_conv.bias, plain.components["vae"].quant_conv.bias)


def test_a_file_without_averaged_weights_says_so(files: dict[str, Path]) -> None:
    with pytest.raises(CheckpointError, match="extract_ema"):
        load(files["sdxl"], "sdxl", extract_ema=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_files_load_in_any_precision(dtype: torch.dtype, tmp_path: Path) -> None:
    path = ldm_tiny.write_original(tmp_path / "half.safetensors", "sd1", dtype=dtype)
    stored = load_file(path)
    assert_same_weights(load(path, "sd1"), "sd1", {key: value.float() for key, value in stored.items()})
    assert_same_weights(load(path, "sd1", dtype=dtype), "sd1", stored)


def test_a_pickled_checkpoint_loads_like_a_safetensors_file(files: dict[str, Path], tmp_path: Path) -> None:
    original = load_file(files["sd1"])
    torch.save({"state_dict": original, "global_step": 470000, "epoch": 2}, tmp_path / "model.ckpt")
    assert_same_weights(load(tmp_path / "model.ckpt", "sd1"), "sd1", original)


def test_text_encoders_saved_without_their_inner_prefix_load(files: dict[str, Path], tmp_path: Path) -> None:
    original = load_file(files["sd1"])
    outer = "cond_stage_model.transformer."
    save_file({k.replace(f"{outer}text_model.", outer): v for k, v in original.items()}, tmp_path / "a.safetensors")
    assert_same_weights(load(tmp_path / "a.safetensors", "sd1"), "sd1", original)


def test_matrices_stored_as_convolutions_and_the_other_way_round_load(files: dict[str, Path], tmp_path: Path) -> None:
    original = load_file(files["sd1"])
    changed = {
        key: value[:, :, 0, 0] if ".attn_1." in key and value.dim() == 4 else value for key, value in original.items()
    }
    changed = {key: value.flatten(1) if key.endswith("proj_in.weight") else value for key, value in changed.items()}
    save_file({key: value.contiguous() for key, value in changed.items()}, tmp_path / "a.safetensors")
    assert_same_weights(load(tmp_path / "a.safetensors", "sd1"), "sd1", original)


def test_tensors_of_no_network_are_reported_and_not_fatal(
    files: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save_file({**load_file(files["sd1"]), "mystery.weight": torch.zeros(1)}, tmp_path / "a.safetensors")
    with caplog.at_level(logging.WARNING, "russet"):
        load(tmp_path / "a.safetensors", "sd1")
        assert "mystery.weight" in caplog.text
        caplog.clear()
        load(files["sd1"], "sd1")
        assert not caplog.records


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model.diffusion_model.out.2.bias", None),
        ("first_stage_model.encoder.norm_out.bias", torch.zeros(7)),
        ("model.diffusion_model.input_blocks.0.0.extra", torch.zeros(1)),
        ("cond_stage_model.transformer.text_model.encoder.layers.3.layer_norm1.bias", torch.zeros(32)),
    ],
)
def test_a_missing_wrong_or_unexpected_tensor_is_an_error_that_names_it(
    key: str, value: torch.Tensor | None, files: dict[str, Path], tmp_path: Path
) -> None:
    tensors = load_file(files["sd1"])
    if value is None:
        del tensors[key]
    else:
        tensors[key] = value
    save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(KeyMismatch, match=r"conv_out\.bias|conv_norm_out\.bias|blocks\.0\.0\.extra|layers\.3"):
        load(tmp_path / "a.safetensors", "sd1")


def test_published_configs_that_do_not_fit_ask_for_others(files: dict[str, Path]) -> None:
    with pytest.raises((KeyMismatch, ConfigError), match="config="):
        single_file(files["sd1"])


def test_a_network_that_the_file_lacks_is_asked_for_and_taken_from_the_caller(
    files: dict[str, Path], tmp_path: Path
) -> None:
    tensors = {k: v for k, v in load_file(files["sd1"]).items() if not k.startswith("first_stage_model.")}
    save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match="vae="):
        load(tmp_path / "a.safetensors", "sd1")
    vae = load(files["sd1"], "sd1").components["vae"]
    assert load(tmp_path / "a.safetensors", "sd1", overrides={"vae": vae}).components["vae"] is vae


def test_a_pipeline_gets_its_components_settings_and_no_safety_checker(files: dict[str, Path]) -> None:
    loaded = load(files["sdxl-refiner"], "sdxl-refiner")
    assert loaded.class_name == "StableDiffusionXLImg2ImgPipeline"
    assert loaded.components["text_encoder"] is None
    assert loaded.components.get("safety_checker") is None
    assert loaded.index["requires_aesthetics_score"] is True
    assert loaded.index["requires_safety_checker"] is False
    checker = object()
    assert load(files["sd1"], "sd1", overrides={"safety_checker": checker}).components["safety_checker"] is checker


def test_a_file_of_another_family_is_refused_before_its_weights_are_read(files: dict[str, Path]) -> None:
    with pytest.raises(CheckpointError, match="StableDiffusionXLPipeline"):
        StableDiffusionPipeline.from_single_file(files["sdxl"], config=ldm_tiny.configs("sdxl"))


@pytest.mark.parametrize(
    ("family", "kind"),
    [("sdxl", "StableDiffusionXLPipeline"), ("sdxl-refiner", "StableDiffusionXLImg2ImgPipeline")],
)
def test_a_file_of_xl_makes_the_picture_of_its_folder(
    family: str, kind: str, files: dict[str, Path], tmp_path: Path
) -> None:
    import diffusers

    tokenizers = {
        name.replace("text_encoder", "tokenizer"): CLIPTokenizer.from_files(MINI / "tokenizer")
        for name in ldm_tiny.configs(family)
        if name.startswith("text_encoder")
    }
    pipe = DiffusionPipeline.from_single_file(files[family], config=ldm_tiny.configs(family), **tokenizers)
    assert type(pipe).__name__ == kind
    pipe.set_progress_bar_config(disable=True)
    pipe.save_pretrained(tmp_path / "folder")
    theirs = getattr(diffusers, kind).from_pretrained(tmp_path / "folder", add_watermarker=False)
    theirs.set_progress_bar_config(disable=True)
    given = {"num_inference_steps": 4, "output_type": "np"}
    if family == "sdxl-refiner":
        values = np.random.default_rng(0).random((64, 64, 3), dtype=np.float32)
        given |= {"image": values, "strength": 0.8}
    ours, wanted = (
        one("a horse", generator=torch.Generator().manual_seed(0), **given).images for one in (pipe, theirs)
    )
    assert -10 * np.log10(np.square(ours - wanted).mean()) > 60


def test_a_tokenizer_of_another_size_is_asked_for(files: dict[str, Path]) -> None:
    with pytest.raises(CheckpointError, match=r"2944.*tokenizer="):
        single_file(files["sd1"], config=ldm_tiny.configs("sd1"))


def test_a_tokenizer_comes_from_the_folder_of_the_configs(files: dict[str, Path], tmp_path: Path) -> None:
    ldm_tiny.reference("sd1").save_pretrained(tmp_path)
    assert single_file(files["sd1"], config=tmp_path).components["tokenizer"].vocab_size == ldm_tiny.VOCABULARY


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        (ldm_layout.vae(8, (1, 1, 2, 2), 1), "VAE alone.*AutoencoderKL.from_single_file"),
        ({"lora_unet_mid_block_attentions_0_proj_in.lora_down.weight": (4, 8)}, "LoRA"),
        ({"emb_params": (2, 768)}, "textual inversion"),
        ({"double_blocks.0.img_attn.qkv.weight": (8, 8)}, "Flux"),
        ({"fc.weight": (2, 2)}, "unknown kind"),
        ({}, "unknown kind"),
    ],
)
def test_a_file_that_is_no_model_is_named_for_what_it_is(
    tensors: Mapping[str, tuple[int, ...]], words: str, tmp_path: Path
) -> None:
    save_file({name: torch.zeros(shape) for name, shape in tensors.items()}, tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match=words):
        single_file(tmp_path / "a.safetensors")


@pytest.mark.parametrize(
    ("how", "error"),
    [
        ({"extract_ema": 1}, ArgumentTypeError),
        ({"prediction_type": 1}, ArgumentTypeError),
        ({"prediction_type": "noise"}, InputError),
        ({"config": {"unet": 3}}, ArgumentTypeError),
        ({"config": {"text": {}}}, InputError),
        ({"config": "sd9"}, MissingFile),
        ({"config": {"unet": {"layers_per_block": "two"}}}, ConfigError),
        ({"config": {"scheduler": {"beta_start": 0.1}}}, ConfigError),
        ({"config": {"scheduler": {"_class_name": "UNet2DConditionModel"}}}, ConfigError),
        ({"original_config": 3}, ArgumentTypeError),
        ({"original_config": "https://example.org/v1.yaml"}, InputError),
        ({"original_config": "nowhere.yaml"}, MissingFile),
        ({"overrides": {"unets": None}}, UnsupportedArgument),
    ],
)
def test_wrong_arguments_are_named(how: dict[str, Any], error: type[Exception], files: dict[str, Path]) -> None:
    how = {"overrides": NO_WORDS, **how}
    if isinstance(how.get("config"), dict):
        how["config"] = {**ldm_tiny.configs("sd1"), **how["config"]}
    with pytest.raises(error):
        single_file(files["sd1"], **how)


def test_files_that_are_not_there_or_damaged_are_named(files: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(MissingFile, match="huggingface"):
        single_file(tmp_path / "absent.safetensors")
    with pytest.raises(InputError, match="from_pretrained"):
        single_file(tmp_path)
    with pytest.raises(ArgumentTypeError):
        single_file(3)  # type: ignore[arg-type]
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(files["sd1"].read_bytes()[:-100])
    with pytest.raises(CorruptFile):
        single_file(cut)
