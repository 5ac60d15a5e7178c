"""There and back: folders that Diffusers and transformers save load bit-equal here, and what is saved here, there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
import transformers
from diffusers.pipelines.stable_diffusion import StableDiffusionSafetyChecker

from russet.checkpoints import load, save
from russet.checkpoints.folder import find_class

TEXT = {"vocab_size": 99, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
TEXT |= {"bos_token_id": 97, "eos_token_id": 98, "pad_token_id": 98}
VISION = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
VISION |= {"image_size": 16, "patch_size": 4, "projection_dim": 8}
UNET = {"block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4, "sample_size": 8}
UNET |= {"down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D")}
UNET |= {"up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D")}
XL = {"addition_embed_type": "text_time", "addition_time_embed_dim": 4, "projection_class_embeddings_input_dim": 32}

# Name → a model of the reference with random weights, of the shape of a published one.
MODELS: dict[str, Any] = {
    "the UNet of SD 1": lambda: diffusers.UNet2DConditionModel(**UNET, cross_attention_dim=16, attention_head_dim=2),
    "the UNet of SD 2": lambda: diffusers.UNet2DConditionModel(
        **UNET, cross_attention_dim=16, attention_head_dim=(2, 4), use_linear_projection=True, upcast_attention=True
    ),
    "the UNet of SDXL": lambda: diffusers.UNet2DConditionModel(
        **{**UNET, **XL, "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D")},
        cross_attention_dim=16,
        attention_head_dim=(2, 4),
        transformer_layers_per_block=(1, 2),
        use_linear_projection=True,
    ),
    "the UNet of inpainting": lambda: diffusers.UNet2DConditionModel(**UNET, cross_attention_dim=16, in_channels=9),
    "the VAE": lambda: diffusers.AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        layers_per_block=2,
    ),
    "the text encoder": lambda: transformers.CLIPTextModel(transformers.CLIPTextConfig(**TEXT)),
    "the second text encoder": lambda: transformers.CLIPTextModelWithProjection(
        transformers.CLIPTextConfig(**TEXT, hidden_act="gelu", projection_dim=12)
    ),
    "the image encoder": lambda: transformers.CLIPVisionModelWithProjection(transformers.CLIPVisionConfig(**VISION)),
    "the safety checker": lambda: StableDiffusionSafetyChecker(
        transformers.CLIPConfig(text_config=TEXT, vision_config=VISION, projection_dim=8)
    ),
}
FORMS: dict[str, dict[str, Any]] = {
    "whole": {},
    "in shards": {"max_shard_size": "10KB"},
    "as a pickle": {"safe_serialization": False},
    "as a variant": {"variant": "fp16"},
    "as a variant in shards": {"variant": "fp16", "max_shard_size": "10KB"},
}


@pytest.fixture(scope="module")
def reference() -> Any:
    """The models of MODELS, made once; every parameter random, also those that begin at one and zero."""
    made: dict[str, Any] = {}

    def model(name: str) -> Any:
        if name not in made:
            torch.manual_seed(len(made))
            made[name] = MODELS[name]().eval()
            for value in made[name].parameters():
                torch.nn.init.normal_(value)
        return made[name]

    return model


def ours(reference: Any) -> Any:
    return find_class(type(reference).__name__, "the test").load()


def bare(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Without the prefixes of CLIP, which come and go with the version of transformers."""
    return {name.replace("text_model.", "").replace("vision_model.", ""): value for name, value in state.items()}


def equal(one: Any, other: Any) -> bool:
    a, b = bare(one.state_dict()), bare(other.state_dict())
    return set(a) == set(b) and all(torch.equal(a[name], b[name]) for name in a)


def can(name: str, form: str) -> bool:
    """transformers 5 no longer writes pickles."""
    return form != "as a pickle" or name.startswith(("the UNet", "the VAE"))


CASES = [(name, form) for name in MODELS for form in FORMS]


@pytest.mark.parametrize(("name", "form"), [case for case in CASES if can(*case)])
def test_what_diffusers_saves_loads_bit_equal(name: str, form: str, reference: Any, tmp_path: Path) -> None:
    theirs = reference(name)
    theirs.save_pretrained(tmp_path, **FORMS[form])
    assert equal(load.component(ours(theirs), tmp_path, variant=FORMS[form].get("variant")), theirs)


@pytest.mark.parametrize(("name", "form"), [case for case in CASES if can(*case)])
def test_what_russet_saves_diffusers_loads_bit_equal(name: str, form: str, reference: Any, tmp_path: Path) -> None:
    theirs = reference(name)
    theirs.save_pretrained(tmp_path / "there")
    mine = load.component(ours(theirs), tmp_path / "there")
    save.component(mine, tmp_path / "here", **FORMS[form])
    options = {"variant": FORMS[form].get("variant"), "use_safetensors": form != "as a pickle"}
    again = type(theirs).from_pretrained(tmp_path / "here", **options)
    assert equal(again, theirs)
    assert again.dtype == theirs.dtype


def test_an_old_pickle_of_a_text_encoder_loads_bit_equal(reference: Any, tmp_path: Path) -> None:
    theirs = reference("the text encoder")
    theirs.config.save_pretrained(tmp_path)
    state = {f"text_model.{name}": value for name, value in bare(theirs.state_dict()).items()}
    torch.save({**state, "text_model.embeddings.position_ids": torch.arange(77)[None]}, tmp_path / "pytorch_model.bin")
    assert equal(load.component(ours(theirs), tmp_path), theirs)


def test_half_precision_comes_out_as_diffusers_has_it(reference: Any, tmp_path: Path) -> None:
    theirs = reference("the UNet of SD 2")
    theirs.save_pretrained(tmp_path)
    half = diffusers.UNet2DConditionModel.from_pretrained(tmp_path, torch_dtype=torch.float16)
    assert equal(load.component(ours(theirs), tmp_path, torch_dtype=torch.float16), half)


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_a_whole_pipeline_goes_there_and_back(variant: str | None, tiny_folder: Path, tmp_path: Path) -> None:
    loaded = load.pipeline(tiny_folder)
    save.pipeline(tmp_path, loaded.class_name, loaded.components, loaded.index, variant=variant, max_shard_size="1MB")
    before = diffusers.StableDiffusionPipeline.from_pretrained(tiny_folder)
    after = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path, variant=variant)
    for part in ("unet", "vae", "text_encoder", "safety_checker"):
        assert equal(getattr(before, part), getattr(after, part)), part
    prompts = ["a photo of an astronaut", "말을 탄 우주인 🐴", ""]
    options = {"padding": "max_length", "truncation": True, "max_length": 77}
    assert before.tokenizer(prompts, **options).input_ids == after.tokenizer(prompts, **options).input_ids
    public = {key: value for key, value in before.scheduler.config.items() if not key.startswith("_")}
    assert {key: after.scheduler.config[key] for key in public} == public
    assert after.feature_extractor.crop_size["height"] == before.feature_extractor.crop_size["height"] == 32
    assert after.config["requires_safety_checker"] == before.config["requires_safety_checker"]
