"""Diffusers' own pipeline on the virtual device: equal to the CPU, and black where a real Mac's picture is black."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from .virtual_mps import VirtualMac

diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def build():
    def made():
        torch.manual_seed(0)
        unet = diffusers.UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(16, 32),
            layers_per_block=1,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            cross_attention_dim=16,
            attention_head_dim=2,
            norm_num_groups=4,
        )
        vae = diffusers.AutoencoderKL(
            block_out_channels=(8, 16),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            latent_channels=4,
            norm_num_groups=4,
        )
        pipe = diffusers.StableDiffusionPipeline(
            vae=vae.eval(),
            text_encoder=None,
            tokenizer=None,
            unet=unet.eval(),
            scheduler=diffusers.PNDMScheduler(skip_prk_steps=True, steps_offset=1, beta_schedule="scaled_linear"),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
        pipe.set_progress_bar_config(disable=True)
        return pipe

    return made


def picture(pipe, steps: int = 3) -> np.ndarray:
    embeds = torch.randn(2, 1, 7, 16, generator=torch.Generator().manual_seed(1)).to(pipe.device)
    return pipe(
        prompt_embeds=embeds[0],
        negative_prompt_embeds=embeds[1],
        num_inference_steps=steps,
        generator=torch.Generator().manual_seed(2),
        output_type="np",
    ).images


def test_its_picture_is_the_cpus_bit_for_bit(build):
    expected = picture(build())
    with VirtualMac() as mac:
        pipe = build().to("mps")
        assert pipe.device.type == "mps"
        with mac.measure() as counts:
            found = picture(pipe)
    assert np.array_equal(found, expected)
    assert np.isfinite(found).all()
    assert counts.kernel_count > 100
    assert counts.syncs["item"] > 3  # its schedulers read numbers from the device in every step


def test_it_turns_nan_when_sliced_and_does_not_where_torch_is_repaired(build):
    for version, black in (("2.12.1", True), ("2.14.0", False)):
        with VirtualMac(torch=version):
            pipe = build().to("mps")
            pipe.enable_attention_slicing("max")
            assert np.isnan(picture(pipe, steps=1)).any() == black


def test_text_encoders_run_on_it_too():
    torch.manual_seed(0)
    config = transformers.CLIPTextConfig(
        vocab_size=100,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=7,
    )
    tower, tokens = transformers.CLIPTextModel(config).eval(), torch.arange(7)[None]
    with torch.no_grad():
        expected = tower(tokens)[0]
        with VirtualMac():
            assert torch.equal(tower.to("mps")(tokens.to("mps"))[0].cpu(), expected)
