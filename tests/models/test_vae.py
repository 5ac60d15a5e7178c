from __future__ import annotations

import json
from pathlib import Path

import diffusers
import pytest
import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from safetensors.torch import load_file

import russet
from russet.errors import ArgumentTypeError, ConfigError, InputError
from russet.models.attention import sliced
from russet.models.vae import AutoencoderKL, DiagonalGaussian
from russet.models.vae_config import VAEConfig

MINI = Path(russet.__file__).parent / "mini/vae"
TINY = {
    "block_out_channels": (16, 16, 32),
    "down_block_types": ("DownEncoderBlock2D",) * 3,
    "up_block_types": ("UpDecoderBlock2D",) * 3,
    "norm_num_groups": 8,
    "sample_size": 32,
}
SD1 = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
}
VARIANTS = {
    "plain": TINY,
    "two layers": {**TINY, "layers_per_block": 2},
    "without quant": {**TINY, "use_quant_conv": False, "use_post_quant_conv": False},
    "without attention": {**TINY, "mid_block_add_attention": False},
    "sixteen channels": {**TINY, "latent_channels": 16, "shift_factor": 0.1159, "scaling_factor": 0.3611},
    "one level": {
        **TINY,
        "block_out_channels": (16,),
        "down_block_types": ("DownEncoderBlock2D",),
        "up_block_types": ("UpDecoderBlock2D",),
        "in_channels": 1,
        "out_channels": 2,
    },
}


@pytest.fixture
def pair(shaken):
    def make(config: dict) -> tuple[torch.nn.Module, AutoencoderKL]:
        reference = shaken(diffusers.AutoencoderKL(**config))
        ours = AutoencoderKL(config)
        ours.load_state_dict(reference.state_dict(), strict=True)
        return reference, ours.requires_grad_(False)

    return make


@pytest.mark.parametrize("name", VARIANTS)
def test_encoding_and_decoding_equal_diffusers(name, pair, agree, randn):
    config = VARIANTS[name]
    reference, ours = pair(config)
    x = randn(2, config.get("in_channels", 3), 24, 16)
    got, wanted = ours.encode(x).latent_dist, reference.encode(x).latent_dist
    agree(got.mean, wanted.mean)
    agree(got.std, wanted.std)
    agree(got.var, wanted.var)
    agree(ours.decode(got.mode()).sample, reference.decode(wanted.mode()).sample)


@pytest.mark.parametrize("size", [(4, 4), (13, 18), (25, 31)])
def test_sides_that_do_not_halve_evenly_equal_diffusers(size, pair, agree, randn):
    reference, ours = pair(TINY)
    x = randn(1, 3, *size)
    agree(ours.encode(x).latent_dist.mean, reference.encode(x).latent_dist.mean)


def test_channels_last_changes_only_the_memory_format(pair, agree, randn):
    _, ours = pair(TINY)
    x, z = randn(2, 3, 24, 16), randn(2, 4, 6, 4)
    latents, pictures = ours.encode(x).latent_dist.mean, ours.decode(z).sample
    ours.to(memory_format=torch.channels_last)
    agree(ours.encode(x).latent_dist.mean, latents)
    agree(ours.decode(z).sample, pictures)


def test_another_attention_gives_the_same_result(pair, agree, randn):
    _, ours = pair(TINY)
    z = randn(2, 4, 9, 7)
    fused = ours.decode(z).sample
    ours.set_attention(sliced(1))
    agree(ours.decode(z).sample, fused)


def test_slicing_works_on_one_picture_at_a_time_and_changes_nothing(pair, agree, randn):
    _, ours = pair(TINY)
    x, z = randn(3, 3, 24, 16), randn(3, 4, 6, 4)
    whole = ours.encode(x).latent_dist.mean, ours.decode(z).sample
    rows = []
    ours.decoder.register_forward_pre_hook(lambda module, inputs: rows.append(len(inputs[0])))
    ours.enable_slicing()
    agree(ours.encode(x).latent_dist.mean, whole[0])
    agree(ours.decode(z).sample, whole[1])
    ours.disable_slicing()
    ours.decode(z)
    assert rows == [1, 1, 1, 3]


def test_tiling_changes_nothing_where_one_tile_suffices(pair, randn):
    _, ours = pair(TINY)
    x, z = randn(1, 3, 32, 32), randn(1, 4, 8, 6)
    whole = ours.encode(x).latent_dist.mean, ours.decode(z).sample
    ours.enable_tiling()  # 32 pixels: sample_size
    assert torch.equal(ours.encode(x).latent_dist.mean, whole[0])
    assert torch.equal(ours.decode(z).sample, whole[1])


def test_no_tile_is_larger_than_asked_for_and_the_result_has_its_full_size(pair, randn):
    _, ours = pair(TINY)
    seen = []
    for half in (ours.encoder, ours.decoder):
        half.register_forward_pre_hook(lambda module, inputs: seen.append(tuple(inputs[0].shape[2:])))
    ours.enable_tiling(tile=16, overlap=4)
    assert ours.encode(randn(1, 3, 40, 24)).latent_dist.mean.shape == (1, 4, 10, 6)
    assert set(seen) == {(16, 16)}
    seen.clear()
    assert ours.decode(randn(2, 4, 10, 3)).sample.shape == (2, 3, 40, 12)
    assert set(seen) == {(4, 3)}
    ours.disable_tiling()
    seen.clear()
    ours.decode(randn(1, 4, 10, 6))
    assert seen == [(10, 6)]


def test_tiling_of_the_embedded_vae_leaves_the_picture_as_it_is(randn):
    vae = AutoencoderKL(json.loads((MINI / "config.json").read_text()))
    weights = load_file(MINI / "diffusion_pytorch_model.safetensors")
    vae.load_state_dict({name: tensor.float() for name, tensor in weights.items()}, strict=True)
    vae.requires_grad_(False)
    smooth = torch.nn.functional.interpolate(randn(1, 4, 5, 5), size=(32, 32), mode="bilinear")
    whole = vae.decode(smooth).sample
    vae.enable_tiling(tile=160, overlap=64)
    assert (vae.decode(smooth).sample - whole).abs().mean() < 0.1 * whole.abs().mean()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tile": 30}, "tile must be a multiple of 4 pixels, not 30"),
        ({"tile": 0}, "tile must be"),
        ({"tile": 32.0}, "tile must be"),
        ({"overlap": 3}, "overlap must be"),
        ({"tile": 32, "overlap": 32}, "cannot overlap"),
        ({"tile": 4}, "cannot overlap"),
    ],
)
def test_tile_sizes_that_make_no_sense_are_refused(options, message):
    vae = AutoencoderKL(TINY)
    with pytest.raises(InputError, match=message):
        vae.enable_tiling(**options)
    assert vae.tiling is None


def test_samples_follow_the_distribution_and_the_generator(randn):
    moments = torch.cat([randn(2, 4, 8, 8), torch.full((2, 4, 8, 8), -2.0)], dim=1)
    latents = DiagonalGaussian(moments)
    reference = DiagonalGaussianDistribution(moments)
    seed = torch.Generator().manual_seed
    assert torch.equal(latents.sample(seed(5)), reference.sample(seed(5)))
    each = latents.sample([torch.Generator().manual_seed(i) for i in (7, 5)])
    assert torch.equal(each[1:], DiagonalGaussian(moments[1:]).sample(torch.Generator().manual_seed(5)))
    assert torch.equal(latents.mode(), moments[:, :4])
    assert abs(float((latents.sample() - latents.mean).std()) - 2.718281828**-1) < 0.1  # 512 draws of std exp(-1)
    with pytest.raises(InputError, match="2 rows"):
        latents.sample([torch.Generator()])


def test_extreme_variances_are_bounded_as_in_diffusers(agree, randn):
    moments = 40 * randn(2, 8, 4, 4)
    reference = DiagonalGaussianDistribution(moments)
    agree(DiagonalGaussian(moments).std, reference.std)
    assert DiagonalGaussian(moments).logvar.abs().max() == 30


@pytest.mark.cpu_half
def test_half_precision_latents_get_the_same_noise():
    moments = torch.zeros(1, 8, 4, 4)
    half = DiagonalGaussian(moments.half()).sample(torch.Generator().manual_seed(1))
    whole = DiagonalGaussian(moments).sample(torch.Generator().manual_seed(1))
    assert torch.equal(half, whole.half())


@pytest.mark.skipif(not hasattr(torch.device, "__enter__"), reason="torch < 2 has no device as a context")
def test_full_size_weights_have_the_names_and_shapes_of_diffusers():
    with torch.device("meta"):
        ours, reference = AutoencoderKL(SD1), diffusers.AutoencoderKL(**SD1)
    shapes = [{name: tensor.shape for name, tensor in vae.state_dict().items()} for vae in (ours, reference)]
    assert shapes[0] == shapes[1]


def test_outputs_are_named_and_also_plain_tuples(pair, randn):
    _, ours = pair(TINY)
    z = randn(1, 4, 4, 4)
    assert type(ours.decode(z, return_dict=False)) is tuple
    assert torch.equal(ours.decode(z, return_dict=False)[0], ours.decode(z)[0])
    assert type(ours.encode(randn(1, 3, 8, 8), return_dict=False)) is tuple


@pytest.mark.parametrize("shape", [(1, 4, 8, 8), (3, 8, 8), (1, 3, 2, 8), (0, 3, 8, 8)])
def test_pictures_that_do_not_fit_are_refused(shape):
    with pytest.raises(InputError, match=r"pictures must have the shape \[B, 3, H, W\]"):
        AutoencoderKL(TINY).encode(torch.zeros(shape))


def test_latents_that_do_not_fit_are_refused():
    with pytest.raises(ArgumentTypeError, match="latents must be a tensor, not list"):
        AutoencoderKL(TINY).decode([])
    with pytest.raises(InputError, match=r"latents must have the shape \[B, 4, H, W\]"):
        AutoencoderKL(TINY).decode(torch.zeros(1, 3, 8, 8))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"latent_channels": 0}, "latent_channels must be positive"),
        ({"sample_size": (0, 8)}, "sample_size must be positive"),
        ({"scaling_factor": 0.0}, "scaling_factor must be positive"),
        ({"block_out_channels": ()}, "block_out_channels is empty"),
        ({"block_out_channels": (16, 32)}, "must have 2 entries"),
        ({"norm_num_groups": 5}, "equal groups"),
        ({"down_block_types": ("AttnDownEncoderBlock2D",) * 3}, "only DownEncoderBlock2D is"),
        ({"up_block_types": ("DownEncoderBlock2D",) * 3}, "only UpDecoderBlock2D is"),
        ({"act_fn": "snake"}, "act_fn 'snake'"),
        ({"latents_mean": (0.0,)}, "latents_mean must have 4 entries"),
        ({"latents_std": (1.0, 1.0)}, "latents_std must have 4 entries"),
    ],
)
def test_configs_that_cannot_be_built_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        AutoencoderKL(TINY, **changes)


def test_latents_are_counted_in_pixels():
    assert VAEConfig().pixels_per_latent == 1
    assert VAEConfig.from_dict(TINY).pixels_per_latent == 4
