"""Stable Diffusion XL and image to image against Diffusers: tiny random weights through folders, the same pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
import transformers
from PIL import Image

import russet

from ..conftest import MINI, TEXT, UNET, VAE

SAME = 60.0  # dB
PROMPTS = ["a red horse", "two cats on the moon"]
FAST = {"num_inference_steps": 6, "output_type": "np"}

SCHEDULE = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "steps_offset": 1,
    "timestep_spacing": "leading",
}
SAMPLERS = {
    "ddim": ("DDIMScheduler", {"clip_sample": False, "set_alpha_to_one": False}),
    "euler": ("EulerDiscreteScheduler", {}),
    "euler_a": ("EulerAncestralDiscreteScheduler", {}),
    "dpmpp_2m": ("DPMSolverMultistepScheduler", {}),
    "pndm": ("PNDMScheduler", {"skip_prk_steps": True}),
}


@pytest.fixture(scope="module")
def xl_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    second = {**TEXT, "hidden_size": 40, "projection_dim": 24}
    unet = diffusers.UNet2DConditionModel(
        **{**UNET, "cross_attention_dim": 72},
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=24 + 6 * 8,
    )
    tokenizer = transformers.CLIPTokenizer.from_pretrained(MINI / "tokenizer")
    pipe = diffusers.StableDiffusionXLPipeline(
        vae=diffusers.AutoencoderKL(**VAE),
        text_encoder=transformers.CLIPTextModel(transformers.CLIPTextConfig(**TEXT)).eval(),
        text_encoder_2=transformers.CLIPTextModelWithProjection(transformers.CLIPTextConfig(**second)).eval(),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        unet=unet,
        scheduler=diffusers.EulerDiscreteScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1
        ),
        add_watermarker=False,
    )
    folder = tmp_path_factory.mktemp("xl") / "pipeline"
    pipe.save_pretrained(folder)
    return folder


def quiet(pipe: Any) -> Any:
    pipe.set_progress_bar_config(disable=True)
    return pipe


class Both:
    """A pipeline of each library over the same weights."""

    def __init__(self, name: str, folder: Path, **options: Any) -> None:
        theirs = {"add_watermarker": False} if "XL" in name else {"safety_checker": None}
        ours = {} if "XL" in name else {"safety_checker": None}
        self.theirs = quiet(getattr(diffusers, name).from_pretrained(folder, **theirs, **options))
        self.ours = quiet(getattr(russet, name).from_pretrained(folder, **ours))

    def sample_by(self, sampler: str) -> None:
        kind, changes = SAMPLERS[sampler]
        self.theirs.scheduler = getattr(diffusers, kind)(**{**SCHEDULE, **changes})
        self.ours.scheduler = getattr(russet, kind)(**{**SCHEDULE, **changes})

    def __call__(self, *, streams: int = 1, **given: Any) -> tuple[Any, Any]:
        def generator() -> Any:
            found = [torch.Generator().manual_seed(seed) for seed in range(streams)]
            return found[0] if streams == 1 else found

        given = {**FAST, **given}
        return self.theirs(generator=generator(), **given).images, self.ours(generator=generator(), **given).images


@pytest.fixture(scope="module")
def xl(xl_folder: Path) -> Both:
    return Both("StableDiffusionXLPipeline", xl_folder)


@pytest.fixture(scope="module")
def xl_image(xl_folder: Path) -> Both:
    return Both("StableDiffusionXLImg2ImgPipeline", xl_folder)


@pytest.fixture(scope="module")
def sd_image(tiny_folder: Path) -> Both:
    return Both("StableDiffusionImg2ImgPipeline", tiny_folder)


def picture(width: int = 64, height: int = 64, mode: str = "RGB", seed: int = 0) -> Image.Image:
    values = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values).convert(mode)


# -- text to image


@pytest.mark.parametrize("scale", [1.0, 5.0])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_xl_makes_the_picture_that_diffusers_makes(sampler: str, scale: float, xl: Both, psnr: Any) -> None:
    xl.sample_by(sampler)
    assert psnr(*xl(prompt=PROMPTS[0], guidance_scale=scale)) > SAME


@pytest.mark.parametrize(
    "given",
    [
        {"prompt": PROMPTS, "streams": 2},
        {"prompt": PROMPTS, "num_images_per_prompt": 2, "streams": 4},
        {"prompt": PROMPTS[0], "prompt_2": "a blue car"},
        {"prompt": PROMPTS[0], "negative_prompt": "rain"},
        {"prompt": PROMPTS[0], "negative_prompt": "", "negative_prompt_2": "snow"},
        {"prompt": PROMPTS, "negative_prompt": ["rain", "snow"], "guidance_rescale": 0.7},
        {"prompt": PROMPTS[0], "height": 96, "width": 48},
        {"prompt": PROMPTS[0], "original_size": (32, 40), "crops_coords_top_left": (5, 9), "target_size": (512, 256)},
        {
            "prompt": PROMPTS[0],
            "negative_original_size": (16, 16),
            "negative_target_size": (80, 80),
            "negative_crops_coords_top_left": (3, 0),
        },
        {"prompt": PROMPTS[0], "clip_skip": 1},
    ],
    ids=lambda given: ", ".join(given),
)
def test_every_argument_of_xl_means_what_it_means_in_diffusers(given: dict[str, Any], xl: Both, psnr: Any) -> None:
    xl.sample_by("euler")
    theirs, ours = xl(**given)
    assert theirs.shape == ours.shape
    assert psnr(theirs, ours) > SAME


def test_without_zeros_an_empty_negative_prompt_is_encoded(xl_folder: Path, psnr: Any) -> None:
    both = Both("StableDiffusionXLPipeline", xl_folder)
    both.theirs.register_to_config(force_zeros_for_empty_prompt=False)
    both.ours = quiet(
        russet.StableDiffusionXLPipeline(
            **both.ours.components, requires_safety_checker=False, force_zeros_for_empty_prompt=False
        )
    )
    zeros = quiet(russet.StableDiffusionXLPipeline.from_pretrained(xl_folder))
    theirs, ours = both(prompt=PROMPTS[0])
    assert psnr(theirs, ours) > SAME
    assert psnr(ours, zeros(PROMPTS[0], generator=torch.Generator().manual_seed(0), **FAST).images) < SAME


def test_latents_come_out_of_xl_as_in_diffusers(xl: Both) -> None:
    theirs, ours = xl(prompt=PROMPTS[0], output_type="latent")
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_encoded_prompts_of_xl_stand_in_for_texts(xl: Both, psnr: Any) -> None:
    make = torch.Generator().manual_seed(3)
    context, pooled = torch.randn(2, 77, 72, generator=make), torch.randn(2, 24, generator=make)
    given = {
        "prompt_embeds": context,
        "pooled_prompt_embeds": pooled,
        "negative_prompt_embeds": context.flip(1),
        "negative_pooled_prompt_embeds": pooled.flip(0),
    }
    assert psnr(*xl(**given, streams=2)) > SAME


def test_a_callback_of_xl_sees_and_changes_the_same_tensors(xl: Both, psnr: Any) -> None:
    def change(pipe: Any, index: int, t: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        return {"latents": tensors["latents"] * 0.9, "add_text_embeds": tensors["add_text_embeds"] * 0.5}

    names = ["latents", "prompt_embeds", "add_text_embeds", "add_time_ids"]
    given = {"callback_on_step_end": change, "callback_on_step_end_tensor_inputs": names}
    theirs, ours = xl(prompt=PROMPTS[0], **given)
    assert psnr(theirs, ours) > SAME
    assert psnr(ours, xl(prompt=PROMPTS[0])[1]) < SAME


def test_xl_is_loaded_by_its_name_and_saved_again(xl_folder: Path, tmp_path: Path, psnr: Any) -> None:
    pipe = quiet(russet.DiffusionPipeline.from_pretrained(xl_folder))
    assert type(pipe) is russet.StableDiffusionXLPipeline
    wanted = pipe(PROMPTS[0], seed=1, **FAST).images
    pipe.save_pretrained(tmp_path / "again")
    again = quiet(russet.DiffusionPipeline.from_pretrained(tmp_path / "again"))
    assert np.array_equal(again(PROMPTS[0], seed=1, **FAST).images, wanted)
    theirs = quiet(diffusers.DiffusionPipeline.from_pretrained(tmp_path / "again", add_watermarker=False))
    ours = again(PROMPTS[0], generator=torch.Generator().manual_seed(0), **FAST).images
    assert psnr(ours, theirs(PROMPTS[0], generator=torch.Generator().manual_seed(0), **FAST).images) > SAME


# -- image to image


@pytest.mark.parametrize("scale", [1.0, 5.0])
@pytest.mark.parametrize("sampler", [name for name in SAMPLERS if name != "pndm"])
@pytest.mark.parametrize("kind", ["sd", "xl"])
def test_image_to_image_makes_the_picture_that_diffusers_makes(
    kind: str, sampler: str, scale: float, sd_image: Both, xl_image: Both, psnr: Any
) -> None:
    both = sd_image if kind == "sd" else xl_image
    both.sample_by(sampler)
    assert psnr(*both(prompt=PROMPTS[0], image=picture(), strength=0.6, guidance_scale=scale)) > SAME


@pytest.mark.parametrize("strength", [0.2, 0.34, 0.99, 1.0])
def test_strength_makes_as_many_steps_as_in_diffusers(strength: float, sd_image: Both, psnr: Any) -> None:
    sd_image.sample_by("ddim")
    assert psnr(*sd_image(prompt=PROMPTS[0], image=picture(), strength=strength)) > SAME


@pytest.mark.parametrize("kind", ["sd", "xl"])
@pytest.mark.parametrize(
    "given",
    [
        {"prompt": PROMPTS, "image": picture(), "streams": 2},
        {"prompt": PROMPTS, "image": picture()},
        {"prompt": PROMPTS, "image": [picture(), picture(seed=1)], "num_images_per_prompt": 2},
        {"prompt": PROMPTS, "image": [picture(), picture(seed=1)], "num_images_per_prompt": 2, "streams": 4},
        {"prompt": PROMPTS[0], "image": picture(70, 91)},
        {"prompt": PROMPTS[0], "image": np.asarray(picture(), dtype=np.float32) / 255},
        {"prompt": PROMPTS[0], "image": torch.rand(1, 3, 75, 66, generator=torch.Generator().manual_seed(0))},
        {"prompt": PROMPTS[0], "image": torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(0))},
        {"prompt": PROMPTS[0], "image": torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))},
        {"prompt": PROMPTS[0], "image": picture(), "output_type": "latent"},
        {"prompt": PROMPTS[0], "image": picture(), "negative_prompt": "rain"},
    ],
    ids=range(11),
)
def test_every_form_of_image_means_what_it_means_in_diffusers(
    kind: str, given: dict[str, Any], sd_image: Both, xl_image: Both, psnr: Any
) -> None:
    both = sd_image if kind == "sd" else xl_image
    both.sample_by("euler")
    theirs, ours = both(strength=0.6, **given)
    assert theirs.shape == ours.shape
    if given.get("output_type") == "latent":
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)
    else:
        assert psnr(theirs, ours) > SAME
