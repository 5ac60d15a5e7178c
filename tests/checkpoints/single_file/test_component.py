"""One network out of a single file, and what is bundled for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from russet import AutoencoderKL, CLIPTextModel, CLIPTokenizer, UNet2DConditionModel
from russet.checkpoints.arguments import Options
from russet.checkpoints.configs import VOCABULARY_SIZE, bundled, clip_tokenizer, clip_vocabulary, from_folder, models
from russet.checkpoints.single_file.component import component_recipe
from russet.checkpoints.single_file.recipes import SingleFile
from russet.errors import CheckpointError, ConfigError, InputError, UnsupportedArgument

from .. import ldm_layout, ldm_tiny
from ..sparse import write_sparse


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return ldm_tiny.write_original(tmp_path_factory.mktemp("whole") / "model.safetensors", "sd1")


def vae_alone(whole: Path, path: Path, prefix: str = "") -> Path:
    inner = "first_stage_model."
    tensors = {key: value for key, value in load_file(whole).items() if key.startswith(inner)}
    tensors = {prefix + key.removeprefix(inner): value for key, value in tensors.items()}
    save_file({**tensors, f"{prefix}loss.logvar": torch.zeros(()), "model_ema.decay": torch.zeros(())}, path)
    return path


@pytest.mark.parametrize("prefix", ["", "first_stage_model.", "vae."])
def test_a_vae_alone_loads_under_every_prefix(prefix: str, whole: Path, tmp_path: Path) -> None:
    path = vae_alone(whole, tmp_path / "vae.safetensors", prefix)
    vae = AutoencoderKL.from_single_file(path, config=ldm_tiny.VAE)
    assert torch.equal(vae.post_quant_conv.weight, load_file(whole)["first_stage_model.post_quant_conv.weight"])


def test_a_network_is_taken_out_of_a_whole_model(whole: Path) -> None:
    original, configs = load_file(whole), ldm_tiny.configs("sd1")
    unet = UNet2DConditionModel.from_single_file(whole, config=configs["unet"], torch_dtype=torch.float16)
    assert torch.equal(unet.conv_out.bias, original["model.diffusion_model.out.2.bias"].half())
    averaged = UNet2DConditionModel.from_single_file(whole, config=configs["unet"], extract_ema=True)
    assert torch.equal(averaged.conv_out.bias, original["model_ema.diffusion_modelout2bias"])
    text = CLIPTextModel.from_single_file(whole, config=configs["text_encoder"])
    key = "text_model.final_layer_norm.bias"
    assert torch.equal(text.state_dict()[key], original[f"cond_stage_model.transformer.{key}"])


def test_a_weight_file_of_a_diffusers_folder_loads_by_itself(tmp_path: Path) -> None:
    torch.manual_seed(0)
    saved = AutoencoderKL(ldm_tiny.VAE)
    saved.save_pretrained(tmp_path)
    vae = AutoencoderKL.from_single_file(tmp_path / "diffusion_pytorch_model.safetensors", config=ldm_tiny.VAE)
    assert torch.equal(vae.quant_conv.weight, saved.quant_conv.weight)


@pytest.mark.parametrize(("stem", "scale"), [("vae-ft-mse-840000-ema-pruned", 0.18215), ("sdxl_vae", 0.13025)])
def test_the_scale_of_a_vaes_latents_follows_its_name(stem: str, scale: float, tmp_path: Path) -> None:
    file = SingleFile.at(write_sparse(tmp_path / f"{stem}.safetensors", ldm_layout.vae()))
    assert component_recipe("vae", None, file, Options()).parts["vae"]["scaling_factor"] == scale
    assert component_recipe("vae", "sdxl", file, Options()).parts["vae"]["scaling_factor"] == 0.13025


@pytest.mark.parametrize(("family", "width"), [("sd1", 768), ("sd2", 1024), ("sdxl", 2048)])
def test_a_unet_alone_gets_the_config_of_its_family(family: str, width: int, tmp_path: Path) -> None:
    params = {"sd1": ldm_layout.SD1, "sd2": ldm_layout.SD2, "sdxl": ldm_layout.SDXL}[family]
    file = SingleFile.at(write_sparse(tmp_path / "unet.safetensors", ldm_layout.UNet(params).shapes))
    assert component_recipe("unet", None, file, Options()).parts["unet"]["cross_attention_dim"] == width


def test_what_single_files_do_not_hold_is_refused(whole: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="CLIPTokenizer"):
        CLIPTokenizer.from_single_file(whole)
    with pytest.raises(UnsupportedArgument):
        AutoencoderKL.from_single_file(whole, confg={})
    vae = vae_alone(whole, tmp_path / "vae.safetensors")
    with pytest.raises(CheckpointError, match="VAE alone"):
        UNet2DConditionModel.from_single_file(vae, config={})


# -------------------------------------------------------------------------------------------------- what is bundled


def test_clips_vocabulary_is_whole() -> None:
    vocab, merges = clip_vocabulary()
    assert len(vocab) == VOCABULARY_SIZE
    assert sorted(vocab.values()) == list(range(VOCABULARY_SIZE))
    assert len(merges) == len(set(merges)) == VOCABULARY_SIZE - 512 - 2
    assert (vocab["!"], vocab["<|startoftext|>"], vocab["<|endoftext|>"]) == (0, 49406, 49407)


def test_clips_tokenizer_gives_the_known_ids() -> None:
    tokenizer = clip_tokenizer(bundled("sd1").parts["tokenizer"])
    # as in the documentation of transformers and in CLIP's own notebook
    assert tokenizer("a photo of a cat", padding="do_not_pad", return_tensors=None).input_ids == [
        *(49406, 320, 1125, 539, 320, 2368, 49407)
    ]
    ids = tokenizer("a photo of a cat").input_ids
    assert ids.shape == (1, 77)
    assert set(ids[0, 7:].tolist()) == {49407}


def test_clips_tokenizer_equals_transformers_on_the_same_files(tmp_path: Path) -> None:
    import transformers

    for name in ("sd1", "sd2-base"):
        ours = clip_tokenizer(bundled(name).parts["tokenizer"])
        (tmp_path / name).mkdir()
        ours.save(tmp_path / name)
        theirs = transformers.CLIPTokenizer.from_pretrained(tmp_path / name)
        texts = [
            "a photo of an astronaut riding a horse on mars",
            "Don't 3D-print café №5 🐱",
            "고양이 사진",
            "",
            "wow " * 99,
        ]
        for text in texts:
            expected = theirs(text, padding="max_length", max_length=77, truncation=True).input_ids
            assert ours(text).input_ids[0].tolist() == expected


def test_stable_diffusion_2_pads_with_zeros_as_openclip_does() -> None:
    tokenizer = clip_tokenizer(bundled("sd2-v").parts["tokenizer"])
    assert set(tokenizer("a cat").input_ids[0, 4:].tolist()) == {0}


def test_bundled_models_take_from_those_they_are_like() -> None:
    assert set(models()) >= {"sd1", "sd1-inpaint", "sd1-pix2pix", "sd2-base", "sd2-v", "sdxl", "sdxl-refiner"}
    assert bundled("sd1-inpaint").parts["unet"] == {**bundled("sd1").parts["unet"], "in_channels": 9}
    assert bundled("sd2-v").parts["unet"]["sample_size"] == 96
    assert bundled("sdxl-turbo").settings == bundled("sdxl").settings
    with pytest.raises(ConfigError, match="sdxl-turbo"):
        bundled("sd7")


def test_every_bundled_config_can_be_built() -> None:
    from russet.checkpoints.folder import find_class
    from russet.checkpoints.layouts.ldm_keys import CLASSES

    for name in models():
        for part, config in bundled(name).parts.items():
            if config is not None and not part.startswith("tokenizer"):
                entry = find_class(CLASSES.get(part) or config["_class_name"], name)
                kept = entry.load().config_class.from_dict(config).extra
                assert not [key for key in kept if not key.startswith("_") and key not in KEPT]


KEPT = {"architectures", "attention_dropout", "model_type"}  # transformers writes them; they change no picture


def test_configs_of_a_folder_leave_out_what_single_files_do_not_hold(tiny_folder: Path) -> None:
    recipe = from_folder(tiny_folder)
    assert set(recipe.parts) == {"unet", "vae", "text_encoder", "tokenizer", "scheduler"}
    assert recipe.settings.get("requires_safety_checker") is not None


def test_the_embedded_model_goes_through_a_file_and_makes_the_same_picture(shared_mini: Any, tmp_path: Path) -> None:
    import numpy as np

    from russet import StableDiffusionPipeline

    shared_mini.save_single_file(tmp_path / "mini.safetensors")
    pipe = StableDiffusionPipeline.from_single_file(tmp_path / "mini.safetensors", config="mini")
    pipe.set_progress_bar_config(disable=True)
    settings = {"seed": 3, "num_inference_steps": 2, "height": 64, "width": 64, "output_type": "np"}
    assert np.array_equal(pipe("a red apple", **settings).images, shared_mini("a red apple", **settings).images)
