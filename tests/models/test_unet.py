from __future__ import annotations

import diffusers
import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from russet.errors import ArgumentTypeError, InputError
from russet.models.attention import chunked, sliced
from russet.models.unet import UNet2DConditionModel

DOWN, CROSS_DOWN, UP, CROSS_UP = "DownBlock2D", "CrossAttnDownBlock2D", "UpBlock2D", "CrossAttnUpBlock2D"
TINY = {
    "sample_size": 16,
    "block_out_channels": (16, 32),
    "down_block_types": (CROSS_DOWN, DOWN),
    "up_block_types": (UP, CROSS_UP),
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "cross_attention_dim": 12,
    "attention_head_dim": 4,
}
THREE = {
    **TINY,
    "block_out_channels": (16, 32, 48),
    "down_block_types": (DOWN, CROSS_DOWN, CROSS_DOWN),
    "up_block_types": (CROSS_UP, CROSS_UP, UP),
}
XL = {
    **THREE,
    "transformer_layers_per_block": (1, 2, 3),
    "attention_head_dim": (2, 4, 6),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 6,
    "projection_class_embeddings_input_dim": 10 + 6 * 6,
    "upcast_attention": None,
}
VARIANTS = {
    "SD 1": {**TINY, "layers_per_block": 2},
    "SD 2": {**TINY, "attention_head_dim": (2, 4), "use_linear_projection": True, "upcast_attention": True},
    "XL": XL,
    "XL refiner": {
        **XL,
        "block_out_channels": (16, 32, 48, 48),
        "down_block_types": (DOWN, CROSS_DOWN, CROSS_DOWN, DOWN),
        "up_block_types": (UP, CROSS_UP, CROSS_UP, UP),
        "transformer_layers_per_block": 4,
        "attention_head_dim": (2, 4, 6, 6),
        "projection_class_embeddings_input_dim": 10 + 5 * 6,
    },
    "inpainting": {**TINY, "in_channels": 9},
    "pix2pix": {**TINY, "in_channels": 8},
    "LCM": {**TINY, "time_cond_proj_dim": 5},
    "upscaler": {**TINY, "in_channels": 7, "only_cross_attention": (True, False), "num_class_embeds": 20},
    "class timestep": {**TINY, "class_embed_type": "timestep"},
    "unclip": {**TINY, "class_embed_type": "projection", "projection_class_embeddings_input_dim": 9},
    "scale and shift": {**TINY, "resnet_time_scale_shift": "scale_shift"},
    "no middle": {**TINY, "mid_block_type": None},
    "middle without attention": {**TINY, "mid_block_type": "UNetMidBlock2D"},
    "distilled": {
        **THREE,
        "mid_block_type": None,
        "layers_per_block": 2,
        "transformer_layers_per_block": (0, (2, 1), (1, 3)),
        "reverse_transformer_layers_per_block": ((1, 2, 1), (2, 1, 3), 0),
    },
    "nested depths with a middle": {
        **THREE,
        "layers_per_block": 2,
        "transformer_layers_per_block": (1, (2, 1), (3, 1)),
        "reverse_transformer_layers_per_block": ((1, 2, 1), (2, 1, 1), 1),
    },
    "layers per block": {**TINY, "layers_per_block": (2, 1), "cross_attention_dim": (12, 12)},
    "odd values": {
        **TINY,
        "act_fn": "gelu",
        "conv_in_kernel": 5,
        "conv_out_kernel": 1,
        "center_input_sample": True,
        "flip_sin_to_cos": False,
        "freq_shift": 1,
        "mid_block_scale_factor": 1.5,
        "downsample_padding": 0,
        "norm_eps": 1e-3,
        "time_embedding_dim": 40,
    },
    "relu": {**TINY, "act_fn": "relu", "out_channels": 8},
    "mish": {**TINY, "act_fn": "mish"},
}


def conditions(config: dict, batch: int, randn) -> dict:
    """The extra arguments that a variant needs."""
    extra: dict = {}
    if config.get("addition_embed_type"):
        ids = (config["projection_class_embeddings_input_dim"] - 10) // config["addition_time_embed_dim"]
        time_ids = torch.tensor([[1024.0, 768, 0, 16, 1024, 1024][:ids]]).repeat(batch, 1)
        extra["added_cond_kwargs"] = {"text_embeds": randn(batch, 10), "time_ids": time_ids}
    if config.get("time_cond_proj_dim"):
        extra["timestep_cond"] = randn(batch, config["time_cond_proj_dim"])
    if config.get("num_class_embeds"):
        extra["class_labels"] = torch.arange(batch) + 3
    if config.get("class_embed_type") == "timestep":
        extra["class_labels"] = torch.arange(batch) * 7.0
    if config.get("class_embed_type") == "projection":
        extra["class_labels"] = randn(batch, 9)
    return extra


@pytest.fixture
def pair(shaken):
    """A UNet of Diffusers with random weights, and ours with the same."""

    def make(config: dict) -> tuple[torch.nn.Module, UNet2DConditionModel]:
        reference = shaken(diffusers.UNet2DConditionModel(**config))
        ours = UNet2DConditionModel(config)
        ours.load_state_dict(reference.state_dict(), strict=True)
        return reference, ours.requires_grad_(False)

    return make


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_equals_diffusers(name, pair, agree, randn):
    config = VARIANTS[name]
    reference, ours = pair(config)
    x, context = randn(2, config.get("in_channels", 4), 16, 12), randn(2, 7, 12)
    extra = conditions(config, 2, randn)
    agree(ours(x, 601, context, **extra).sample, reference(x, 601, context, **extra).sample)


@pytest.mark.parametrize("size", [(1, 1), (2, 3), (9, 16), (13, 15), (16, 17)])
def test_sizes_that_do_not_halve_evenly_equal_diffusers(size, pair, agree, randn):
    reference, ours = pair(THREE)
    x, context = randn(1, 4, *size), randn(1, 7, 12)
    agree(ours(x, 3, context).sample, reference(x, 3, context).sample)


@pytest.mark.parametrize("t", [0, 999, 421.37, torch.tensor(77), torch.tensor(77.5), torch.tensor([1, 980])], ids=str)
def test_times_may_be_numbers_or_tensors(t, pair, agree, randn):
    reference, ours = pair(TINY)
    x, context = randn(2, 4, 8, 8), randn(2, 7, 12)
    agree(ours(x, t, context).sample, reference(x, t, context).sample)


def test_residuals_of_a_controlnet_are_added_as_in_diffusers(pair, agree, randn):
    reference, ours = pair(TINY)
    x, context = randn(2, 4, 8, 8), randn(2, 7, 12)
    shapes = [(2, 16, 8, 8), (2, 16, 8, 8), (2, 16, 4, 4), (2, 32, 4, 4)]
    residuals = {
        "down_block_additional_residuals": tuple(randn(*shape, seed=i) for i, shape in enumerate(shapes)),
        "mid_block_additional_residual": randn(2, 32, 4, 4, seed=9),
    }
    agree(ours(x, 5, context, **residuals).sample, reference(x, 5, context, **residuals).sample)
    assert not torch.allclose(ours(x, 5, context, **residuals).sample, ours(x, 5, context).sample, atol=1e-2)


@pytest.mark.parametrize("name", ["SD 1", "SD 2", "XL", "scale and shift"])
def test_channels_last_changes_only_the_memory_format(name, pair, agree, randn):
    config = VARIANTS[name]
    reference, ours = pair(config)
    x, context, extra = randn(2, 4, 16, 12), randn(2, 7, 12), conditions(config, 2, randn)
    out = ours.to(memory_format=torch.channels_last)(x, 9, context, **extra).sample
    agree(out, reference(x, 9, context, **extra).sample)
    assert out.is_contiguous(memory_format=torch.channels_last)


def test_without_channels_last_every_convolution_sees_plain_maps(pair, randn):
    class Layouts(TorchFunctionMode):
        plain = True

        def __torch_function__(self, function, types, args=(), kwargs=None):
            if function is torch.conv2d or function is torch.group_norm:
                self.plain = self.plain and args[0].is_contiguous()
            return function(*args, **(kwargs or {}))

    _, ours = pair(TINY)
    with Layouts() as layouts:
        ours(randn(2, 4, 8, 8), 9, randn(2, 7, 12))
    assert layouts.plain  # channels-last maps are unsafe on mps


def test_channels_last_maps_become_tokens_and_back_without_a_copy(pair, randn):
    class Copies(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.count += function in (torch.ops.aten.clone.default, torch.ops.aten.copy_.default)
            return function(*args, **(kwargs or {}))

    _, ours = pair(TINY)
    ours.to(memory_format=torch.channels_last)
    x = randn(2, 4, 8, 8).to(memory_format=torch.channels_last)
    with Copies() as copies:
        ours(x, 9, randn(2, 7, 12))
    assert copies.count == 0


def test_the_time_embedding_is_activated_once(pair, randn):
    class Activations(TorchFunctionMode):
        rows = 0

        def __torch_function__(self, function, types, args=(), kwargs=None):
            self.rows += function is torch.nn.functional.silu and args[0].ndim == 2
            return function(*args, **(kwargs or {}))

    _, ours = pair(TINY)
    with Activations() as activations:
        ours(randn(2, 4, 8, 8), 9, randn(2, 7, 12))
    assert activations.rows == 2  # within the embedding's two layers, and after them


@pytest.mark.parametrize("method", [sliced(1), sliced(5), chunked(10), chunked(7, 5)], ids=repr)
@pytest.mark.parametrize("name", ["SD 1", "SD 2", "XL"])
def test_another_attention_gives_the_same_result(method, name, pair, agree, randn):
    config = VARIANTS[name]
    _, ours = pair(config)
    inputs, extra = (randn(2, 4, 16, 12), 700, randn(2, 7, 12)), conditions(config, 2, randn)
    plain = ours(*inputs, **extra).sample
    ours.set_attention(method)
    agree(ours(*inputs, **extra).sample, plain)


def test_set_attention_reaches_every_attention_layer(pair, randn):
    _, ours = pair(THREE)
    calls = []

    def counting(q, k, v, scale, mask=None):
        calls.append((q.shape, k.shape[2]))
        return sliced(1)(q, k, v, scale, mask)

    ours.set_attention(counting)
    ours(randn(1, 4, 16, 16), 9, randn(1, 7, 12))
    # 2 on the way down, 1 in the middle, 4 on the way up: each attends to itself and to the 7 tokens of text
    assert len(calls) == 14
    assert sum(keys == 7 for _, keys in calls) == 7
    with pytest.raises(ArgumentTypeError, match=r"russet\.models\.attention"):
        ours.set_attention("fused")


def test_a_batch_of_four_equals_four_single_calls(pair, agree, randn):
    _, ours = pair(XL)
    x, context, t = randn(4, 4, 16, 12), randn(4, 7, 12), torch.tensor([1, 300, 600, 999])
    added = conditions(XL, 4, randn)["added_cond_kwargs"]
    together = ours(x, t, context, added_cond_kwargs=added).sample
    for i in range(4):
        row = slice(i, i + 1)
        alone = {name: value[row] for name, value in added.items()}
        agree(ours(x[row], t[row], context[row], added_cond_kwargs=alone).sample, together[row])


def test_inputs_are_left_as_they_were(pair, randn):
    _, ours = pair(TINY)
    inputs = [randn(2, 4, 8, 8), randn(2, 7, 12)]
    kept = [x.clone() for x in inputs]
    for _ in range(2):
        ours.to(memory_format=torch.channels_last)(inputs[0], 9, inputs[1])
    assert all(torch.equal(a, b) for a, b in zip(inputs, kept, strict=True))


@pytest.mark.parametrize("name", ["SD 1", "SD 2", "scale and shift"])
def test_gradients_equal_those_of_diffusers(name, pair, agree, randn):
    gradients = []
    for model in pair(VARIANTS[name]):
        model.requires_grad_(True)
        x, context = randn(1, 4, 8, 8).requires_grad_(), randn(1, 7, 12).requires_grad_()
        model(x, 9, context).sample.square().sum().backward()
        weights = {name: weight.grad for name, weight in model.named_parameters()}
        gradients.append({"x": x.grad, "context": context.grad, **weights})
    reference, ours = gradients
    for key, gradient in reference.items():  # sums of many products: more rounding than in the forward pass
        agree(ours[key], gradient, tolerance=1e-4)


def test_outputs_are_named_and_also_plain_tuples(pair, randn):
    _, ours = pair(TINY)
    inputs = randn(1, 4, 8, 8), 9, randn(1, 7, 12)
    output = ours(*inputs)
    assert output.sample is output[0]
    assert type(ours(*inputs, return_dict=False)) is tuple
    assert torch.equal(ours(*inputs, return_dict=False)[0], output.sample)


def test_inference_mode_and_half_precision_work(pair, randn):
    _, ours = pair(TINY)
    whole = ours(randn(1, 4, 8, 8), 9, randn(1, 7, 12)).sample
    ours.to(torch.bfloat16)
    assert (ours.dtype, ours.device.type) == (torch.bfloat16, "cpu")
    with torch.inference_mode():
        half = ours(randn(1, 4, 8, 8).bfloat16(), 9, randn(1, 7, 12).bfloat16()).sample
    assert half.dtype == torch.bfloat16
    assert (half - whole).abs().mean() < 0.05 * whole.abs().mean()  # bfloat16 keeps 8 bits


@pytest.mark.parametrize(
    ("shape", "context", "extra", "message"),
    [
        ((1, 3, 8, 8), (1, 7, 12), {}, r"\[B, 4, h, w\], not \[1, 3, 8, 8\]"),
        ((4, 8, 8), (1, 7, 12), {}, "sample"),
        ((1, 4, 0, 8), (1, 7, 12), {}, "sample"),
        ((2, 4, 8, 8), (1, 7, 12), {}, r"\[2, N, 12\], not \[1, 7, 12\]"),
        ((1, 4, 8, 8), (1, 7, 13), {}, r"\[1, N, 12\]"),
        ((1, 4, 8, 8), (1, 7, 12), {"timestep_cond": torch.zeros(1, 5)}, "time_cond_proj_dim"),
        ((1, 4, 8, 8), (1, 7, 12), {"class_labels": torch.zeros(1)}, "no class embedding"),
        ((1, 4, 8, 8), (1, 7, 12), {"added_cond_kwargs": {"image_embeds": torch.zeros(1)}}, "nothing.*image_embeds"),
        ((1, 4, 8, 8), (1, 7, 12), {"mid_block_additional_residual": torch.zeros(1)}, "4 down_block"),
        ((1, 4, 8, 8), (1, 7, 12), {"down_block_additional_residuals": [torch.zeros(1)] * 4}, "none came"),
    ],
)
def test_inputs_that_do_not_fit_are_named(shape, context, extra, message):
    with pytest.raises(InputError, match=message):
        UNet2DConditionModel(TINY)(torch.zeros(shape), 9, torch.zeros(context), **extra)


def test_missing_conditions_are_named(randn):
    x, context = randn(2, 4, 16, 16), randn(2, 7, 12)
    with pytest.raises(InputError, match=r"1 or 2 numbers.*: 3"):
        UNet2DConditionModel(TINY)(x, torch.zeros(3), context)
    with pytest.raises(InputError, match="give class_labels"):
        UNet2DConditionModel(VARIANTS["class timestep"])(x, 9, context)
    with pytest.raises(InputError, match=r"text_embeds.*nothing"):
        UNet2DConditionModel(XL)(x, 9, context)
    with pytest.raises(InputError, match="give 47 numbers; this network takes 46"):
        UNet2DConditionModel(XL)(
            x, 9, context, added_cond_kwargs={"text_embeds": randn(2, 11), "time_ids": randn(2, 6)}
        )
    for t, error in ((float("nan"), InputError), ("9", ArgumentTypeError), (None, ArgumentTypeError)):
        with pytest.raises(error, match="timestep must be"):
            UNet2DConditionModel(TINY)(x, t, context)
    with pytest.raises(ArgumentTypeError, match="encoder_hidden_states must be a tensor, not NoneType"):
        UNet2DConditionModel(TINY)(x, 9, None)
    with pytest.raises(TypeError, match="cross_attention_kwargs"):
        UNet2DConditionModel(TINY)(x, 9, context, cross_attention_kwargs={})


@pytest.mark.parametrize("name", VARIANTS)
def test_the_flat_stages_are_the_modules_of_the_blocks_in_order(name):
    unet = UNet2DConditionModel(VARIANTS[name])
    for stages, blocks in ((unet.input_stages, unet.down_blocks), (unet.output_stages, unet.up_blocks)):
        parts = [part for stage in stages for part in (stage.resnet, stage.attention, stage.downsample, stage.upsample)]
        found = [part for part in parts if part is not None]
        assert {*found} == {part for block in blocks for group in block.children() for part in group.children()}
        assert len(found) == len({*found})
        resnets = [stage.resnet for stage in stages if stage.resnet is not None]
        assert resnets == [resnet for block in blocks for resnet in block.resnets]
    assert len(unet.input_stages) + 1 == len(unet.output_stages), "each output stage takes one skip connection"
