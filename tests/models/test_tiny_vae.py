from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch

import russet
from russet.errors import ArgumentTypeError, ConfigError, InputError
from russet.models.tiny_vae import AutoencoderTiny, TinyVAEConfig
from russet.planning import parameter_counts

SMALL: dict[str, Any] = {
    "encoder_block_out_channels": (8, 8, 8),
    "decoder_block_out_channels": (8, 8, 8),
    "num_encoder_blocks": (1, 2, 1),
    "num_decoder_blocks": (2, 1, 1),
}
VARIANTS = {
    "plain": SMALL,
    "sixteen channels": {**SMALL, "latent_channels": 16, "scaling_factor": 0.5, "shift_factor": 0.1},
    "gelu": {**SMALL, "act_fn": "gelu"},
    "smooth": {**SMALL, "upsample_fn": "bilinear"},
    "uneven": {**SMALL, "encoder_block_out_channels": (4, 4, 4), "in_channels": 1, "out_channels": 2},
    "as published": {},
}


@pytest.fixture
def pair(shaken: Any) -> Any:
    def make(config: dict[str, Any]) -> tuple[torch.nn.Module, AutoencoderTiny]:
        reference = shaken(diffusers.AutoencoderTiny(**config))
        ours = AutoencoderTiny(config)
        ours.load_state_dict(reference.state_dict(), strict=True)
        return reference, ours.requires_grad_(False)

    return make


@pytest.mark.parametrize("name", VARIANTS)
def test_encoding_and_decoding_equal_diffusers(name: str, pair: Any, agree: Any, randn: Any) -> None:
    config = VARIANTS[name]
    reference, ours = pair(config)
    x, z = randn(2, config.get("in_channels", 3), 32, 24), 3 * randn(2, config.get("latent_channels", 4), 6, 5)
    agree(ours.encode(x).latents, reference.encode(x).latents)
    agree(ours.decode(z).sample, reference.decode(z).sample)
    assert torch.equal(ours.decode(z, return_dict=False)[0], ours.decode(z).sample)
    assert torch.equal(ours.encode(x, return_dict=False)[0], ours.encode(x)[0])


def test_latents_are_scaled_for_storage_as_in_diffusers(pair: Any, agree: Any, randn: Any) -> None:
    reference, ours = pair({**SMALL, "latent_magnitude": 2.0, "latent_shift": 0.4})
    z = randn(1, 4, 6, 5) * 3
    agree(ours.scale_latents(z), reference.scale_latents(z))
    agree(ours.unscale_latents(z), reference.unscale_latents(z))


def test_inputs_are_left_as_they_were(pair: Any, randn: Any) -> None:
    _, ours = pair(SMALL)
    x, z = randn(1, 3, 16, 16), randn(1, 4, 4, 4)
    before = x.clone(), z.clone()
    ours.encode(x), ours.decode(z)
    assert torch.equal(x, before[0])
    assert torch.equal(z, before[1])


def test_a_folder_is_written_and_read_as_diffusers_does(pair: Any, tmp_path: Path, agree: Any, randn: Any) -> None:
    reference, _ = pair({})
    reference.save_pretrained(tmp_path / "theirs")
    ours = russet.AutoencoderTiny.from_pretrained(tmp_path / "theirs")
    ours.save_pretrained(tmp_path / "ours")
    again = diffusers.AutoencoderTiny.from_pretrained(tmp_path / "ours").requires_grad_(False)
    z = randn(1, 4, 6, 5)
    agree(ours.decode(z).sample, reference.decode(z).sample)
    agree(again.decode(z).sample, reference.decode(z).sample)


def test_slicing_and_tiling_are_those_of_every_autoencoder(pair: Any, agree: Any, randn: Any) -> None:
    _, ours = pair(SMALL)
    z = randn(2, 4, 20, 16)
    plain = ours.decode(z).sample
    ours.enable_slicing()
    agree(ours.decode(z).sample, plain)
    ours.enable_tiling(tile=48, overlap=24)
    tiled = ours.decode(z).sample
    assert tiled.shape == plain.shape
    assert float((tiled - plain).abs().mean()) < 0.05 * float(plain.abs().mean()), "seams are blended"


@pytest.mark.parametrize("name", VARIANTS)
def test_parameters_are_counted_exactly(name: str) -> None:
    config = VARIANTS[name]
    count = sum(p.numel() for p in AutoencoderTiny(config).parameters())
    assert parameter_counts.vae(AutoencoderTiny(config).config) == count


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"act_fn": "swoosh"}, "act_fn 'swoosh'"),
        ({"upsample_fn": "magic"}, "upsample_fn"),
        ({"num_encoder_blocks": (1, 2)}, "num_encoder_blocks must have 4"),
        ({"decoder_block_out_channels": (8, 8, 8, 16)}, "all be the same"),
        ({"encoder_block_out_channels": ()}, "is empty"),
        ({"num_decoder_blocks": (1, 2, -1, 1)}, "too small"),
        ({"upsampling_scaling_factor": 3}, "encoder reduces by 8"),
        ({"latent_channels": 0}, "latent_channels must be positive"),
        ({"scaling_factor": 0.0}, "scaling_factor"),
    ],
)
def test_configs_that_cannot_be_built_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TinyVAEConfig(**changes)


def test_shapes_that_do_not_fit_are_refused() -> None:
    vae = AutoencoderTiny(SMALL)
    with pytest.raises(InputError, match=r"latents must have the shape \[B, 4"):
        vae.decode(torch.zeros(1, 3, 4, 4))
    with pytest.raises(InputError, match="pictures"):
        vae.encode(torch.zeros(1, 3, 2, 4))
    with pytest.raises(ArgumentTypeError):
        vae.decode([1.0])


# -- in a pipeline


def eightfold() -> AutoencoderTiny:
    torch.manual_seed(0)
    return AutoencoderTiny(encoder_block_out_channels=(8,) * 4, decoder_block_out_channels=(8,) * 4)


def test_a_pipeline_draws_with_it_what_diffusers_draws_with_it(
    tiny: Any, reference: Any, tmp_path: Path, psnr: Any
) -> None:
    vae = eightfold()
    vae.save_pretrained(tmp_path)
    reference.vae = diffusers.AutoencoderTiny.from_pretrained(tmp_path)
    tiny.vae = russet.AutoencoderTiny.from_pretrained(tmp_path)
    settings = {"num_inference_steps": 3, "output_type": "np"}
    ours = tiny("a horse", generator=torch.Generator().manual_seed(1), **settings).images
    theirs = reference("a horse", generator=torch.Generator().manual_seed(1), **settings).images
    assert psnr(ours, theirs) > 60


def test_a_pipeline_is_loaded_with_it_saved_with_it_and_loaded_again(tiny_folder: Path, tmp_path: Path) -> None:
    pipe = russet.DiffusionPipeline.from_pretrained(tiny_folder, safety_checker=None, vae=eightfold())
    pipe.save_pretrained(tmp_path / "small")
    again = russet.DiffusionPipeline.from_pretrained(tmp_path / "small", safety_checker=None)
    assert isinstance(again.vae, AutoencoderTiny)
    settings = {"num_inference_steps": 2, "output_type": "np", "seed": 1}
    again.set_progress_bar_config(disable=True)
    assert np.array_equal(pipe("a horse", **settings).images, again("a horse", **settings).images)


def test_the_plan_knows_that_it_is_small(tiny: Any) -> None:
    usual = tiny.plan(height=512, width=512)
    tiny.vae = AutoencoderTiny()
    small = tiny.plan(height=512, width=512)
    assert small.estimate["decode"].activations != usual.estimate["decode"].activations
    tiny.enable_vae_tiling()
    assert tiny("a horse", height=96, width=64, num_inference_steps=1, output_type="np").images.shape[1:3] == (96, 64)
