"""The maps between LDM's names and ours, at full size, against an account of the original layout that is not ours."""

from __future__ import annotations

import dataclasses
from functools import cache
from math import prod

import pytest
import torch

from russet.checkpoints.configs import Recipe, bundled, models
from russet.checkpoints.formats.tensor_source import ITEM_SIZES, StoredFile, StoredTensor
from russet.checkpoints.layouts import ldm_keys
from russet.checkpoints.layouts.ldm_keys import LAYOUTS, LdmNetwork, Place, ema_key, ignored, places
from russet.checkpoints.load_state_dict import build
from russet.models.clip_text import CLIPTextModel, CLIPTextModelWithProjection
from russet.models.unet import UNet2DConditionModel
from russet.models.vae import AutoencoderKL

from .. import ldm_layout

CLASSES = {
    "UNet2DConditionModel": UNet2DConditionModel,
    "AutoencoderKL": AutoencoderKL,
    "CLIPTextModel": CLIPTextModel,
    "CLIPTextModelWithProjection": CLIPTextModelWithProjection,
}
ORIGINALS = {
    "sd1": ldm_layout.sd1,
    "sd1-inpaint": lambda: ldm_layout.sd1(dataclasses.replace(ldm_layout.SD1, in_channels=9)),
    "sd1-pix2pix": lambda: ldm_layout.sd1(dataclasses.replace(ldm_layout.SD1, in_channels=8)),
    "sd2-base": ldm_layout.sd2,
    "sd2-v": ldm_layout.sd2,
    "sdxl": ldm_layout.sdxl,
    "sdxl-refiner": ldm_layout.refiner,
}


@cache
def shapes_of(recipe_name: str, component: str) -> dict[str, tuple[int, ...]]:
    """Names and shapes of one of our models at full size, built without memory."""
    config = bundled(recipe_name).parts[component]
    name = config.get("_class_name") or config["architectures"][0]
    cls = CLASSES[name]
    model = build(cls, cls.config_class.from_dict(config))
    return {key: tuple(value.shape) for key, value in model.state_dict().items()}


def layout(name: str) -> tuple[LdmNetwork, ...]:
    return LAYOUTS[next(family for family in sorted(LAYOUTS, key=len, reverse=True) if name.startswith(family))]


def mapped(name: str, recipe: Recipe) -> dict[str, list[tuple[Place, tuple[int, ...]]]]:
    """File key → our tensors that lie there, for a whole model."""
    found: dict[str, list[tuple[Place, tuple[int, ...]]]] = {}
    for part in layout(name):
        shapes = shapes_of(name, part.component)
        for key, place in places(shapes, part.translate, recipe.parts[part.component]).items():
            found.setdefault(part.prefixes[0] + place.key, []).append((place, shapes[key]))
    return found


@pytest.mark.parametrize("name", ORIGINALS)
def test_every_tensor_of_the_original_file_is_used_or_known_to_be_spare(name: str) -> None:
    original, ours = ORIGINALS[name](), mapped(name, bundled(name))
    left = {key for key in original if key not in ours and not ignored(key)}
    # SD2 takes the output of the layer before the last, so its configs end there and the last layer is spare
    spare = {key for key in left if key.startswith("cond_stage_model.model.transformer.resblocks.23.")}
    assert left - spare == set()
    assert len(spare) == (12 if name.startswith("sd2") else 0)
    assert ours.keys() <= original.keys()


@pytest.mark.parametrize("name", ORIGINALS)
def test_every_tensor_has_one_place_and_the_size_that_the_file_has_there(name: str) -> None:
    original = ORIGINALS[name]()
    for key, tenants in mapped(name, bundled(name)).items():
        assert sorted(place.third or 0 for place, _ in tenants) == list(range(len(tenants)))
        assert len(tenants) == (3 if "in_proj" in key else 1)
        assert sum(prod(shape) for _, shape in tenants) == prod(original[key])


def test_the_originals_have_the_published_numbers_of_tensors_and_parameters() -> None:
    # model cards: 860 M and 2.6 B parameters in the UNets, 84 M in the VAE; sd_xl_base_1.0.safetensors has 2515 tensors
    assert len(shapes_of("sd1", "unet")) == 686
    assert len(shapes_of("sd1", "vae")) == 248
    assert len(shapes_of("sdxl", "unet")) == 1680
    assert len(ldm_layout.sdxl()) == 2515
    assert sum(map(prod, shapes_of("sd1", "unet").values())) == 859_520_964
    assert sum(map(prod, shapes_of("sdxl", "unet").values())) == 2_567_463_684
    assert sum(map(prod, shapes_of("sd1", "vae").values())) == 83_653_863


@pytest.mark.parametrize("name", ["sd1", "sd2-v", "sdxl", "sdxl-refiner"])
def test_the_averaged_weights_have_places_that_do_not_collide(name: str) -> None:
    shapes = shapes_of(name, "unet")
    keys = [ema_key(place.key) for place in places(shapes, ldm_keys.unet, bundled(name).parts["unet"]).values()]
    assert len(set(keys)) == len(shapes)
    assert "model_ema.diffusion_modelinput_blocks00weight" in keys
    if name == "sd1":
        assert set(keys) <= ldm_layout.sd1(ema=True).keys()


def test_blocks_of_unequal_depth_are_numbered_through() -> None:
    config = {
        "layers_per_block": (1, 3),
        "block_out_channels": (32, 64),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    }
    assert ldm_keys.unet("down_blocks.1.resnets.0.conv1.weight", config).key == "input_blocks.3.0.in_layers.2.weight"
    assert ldm_keys.unet("up_blocks.0.upsamplers.0.conv.bias", config).key == "output_blocks.3.2.conv.bias"
    assert ldm_keys.unet("up_blocks.1.resnets.0.conv2.bias", config).key == "output_blocks.4.0.out_layers.3.bias"


def stored(values: torch.Tensor, path) -> StoredTensor:
    path.write_bytes(values.contiguous().numpy().tobytes())
    return StoredTensor(StoredFile.at(path), 0, "F32", tuple(values.shape))


def test_a_third_of_a_stacked_matrix_is_read_alone(tmp_path) -> None:
    whole = torch.arange(36.0).reshape(12, 3)
    for third, expected in enumerate(whole.chunk(3)):
        cut = Place("k", third=third).cut(stored(whole, tmp_path / "a"), (4, 3))
        assert cut.nbytes == 12 * ITEM_SIZES["F32"]
        assert torch.equal(cut.read(), expected)


def test_a_transposed_matrix_and_a_convolution_are_read_as_our_matrix(tmp_path) -> None:
    matrix = torch.arange(12.0).reshape(4, 3)
    turned = Place("k", transposed=True).cut(stored(matrix, tmp_path / "a"), (3, 4))
    assert torch.equal(turned.read(), matrix.t())
    squeezed = Place("k").cut(stored(matrix[:, :, None, None], tmp_path / "b"), (4, 3))
    assert torch.equal(squeezed.read(), matrix)
    widened = Place("k").cut(stored(matrix, tmp_path / "c"), (4, 3, 1, 1))
    assert torch.equal(widened.read(), matrix[:, :, None, None])


def test_a_third_of_a_matrix_that_is_stored_turned_is_read_right(tmp_path) -> None:
    whole = torch.arange(36.0).reshape(12, 3)
    turned = dataclasses.replace(stored(whole.t(), tmp_path / "a"), shape=(12, 3), strides=(1, 12))
    assert torch.equal(Place("k", third=1).cut(turned, (4, 3)).read(), whole[4:8])


def test_a_tensor_of_a_wrong_size_is_left_as_it_is_to_be_reported(tmp_path) -> None:
    assert Place("k").cut(stored(torch.zeros(4, 3, 3, 3), tmp_path / "a"), (4, 3)).shape == (4, 3, 3, 3)
    assert Place("k", third=1).cut(stored(torch.zeros(4, 3), tmp_path / "b"), (4, 3)).shape == (4, 3)


@pytest.mark.parametrize(
    "key",
    [
        "alphas_cumprod",
        "sqrt_one_minus_alphas_cumprod",
        "log_one_minus_alphas_cumprod",
        "sqrt_recipm1_alphas_cumprod",
        "posterior_log_variance_clipped",
        "betas",
        "logvar",
        "model_ema.decay",
        "model_ema.diffusion_modelout2bias",
        "cond_stage_model.transformer.text_model.embeddings.position_ids",
        "conditioner.embedders.0.transformer.text_model.embeddings.position_ids",
        "cond_stage_model.model.logit_scale",
        "cond_stage_model.model.text_projection",
        "first_stage_model.loss.discriminator.main.0.weight",
        "denoiser.sigmas",
        "v_pred",
        "ztsnr",
    ],
)
def test_tensors_that_no_picture_needs_are_known(key: str) -> None:
    assert ignored(key)


@pytest.mark.parametrize(
    "key",
    [
        "model.diffusion_model.out.2.bias",
        "model.diffusion_model.time_embedding.cond_proj.weight",
        "first_stage_model.encoder.conv_in.weight",
        "cond_stage_model.model.transformer.resblocks.24.ln_1.bias",
        "control_model.input_hint_block.0.weight",
        "model.betas",
    ],
)
def test_tensors_that_matter_are_not_taken_for_spare(key: str) -> None:
    assert not ignored(key)


def test_the_bundled_configs_are_complete() -> None:
    for name in models():
        recipe = bundled(name)
        assert recipe.class_name.startswith("StableDiffusion")
        assert {"unet", "vae", "scheduler"} <= recipe.parts.keys()
