"""Sums within products, texts in the weights and times told beforehand change nothing but the number of operations."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from russet.models.spare import Spare
from torch.utils._python_dispatch import TorchDispatchMode

from russet.backends.ops import Plain
from russet.errors import InputError
from russet.models import sums
from russet.models.attention import HAS_SDPA, chunked, fused, padded, sliced, upcast
from russet.models.resnet import Resnet, ResnetStyle
from russet.models.transformer import MultiHeadAttention
from russet.models.unet import UNet2DConditionModel

pytestmark = pytest.mark.skipif(
    not hasattr(torch.Tensor, "untyped_storage"), reason="torch 1.13 cannot tell what lies where, so nothing is joined"
)

CROSS = ("CrossAttnDownBlock2D", "CrossAttnUpBlock2D")
CONFIG: dict[str, Any] = {
    "sample_size": 8,
    "block_out_channels": (16, 32),
    "down_block_types": (CROSS[0], "DownBlock2D"),
    "up_block_types": ("UpBlock2D", CROSS[1]),
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "cross_attention_dim": 12,
    "attention_head_dim": 4,
}
SHAPES = {
    "like SD 1": {},
    "deep, with linear projections": {"transformer_layers_per_block": 2, "use_linear_projection": True},
    "without self-attention": {"only_cross_attention": True},
    "with scaled norms": {"resnet_time_scale_shift": "scale_shift"},
}
NEAR = {"rtol": 1e-5, "atol": 1e-5}


def unet(**changes: Any) -> UNet2DConditionModel:
    torch.manual_seed(0)
    made = UNet2DConditionModel({**CONFIG, **changes}).requires_grad_(False)
    for parameter in made.parameters():  # biases too
        parameter.add_(0.1 * torch.randn_like(parameter))
    return made


@pytest.fixture
def given(randn: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Latents of one row, and two texts about it."""
    return randn(1, 4, 8, 8, seed=1), randn(2, 7, 12, seed=2)


def prepared(made: UNet2DConditionModel, copies: int | None = 2) -> int:
    """Lays everything, and says how many modules have a sum."""
    made.lay_together()
    made.lay_sums(copies)
    return sum(getattr(module, "sums", None) is not None for module in made.modules())


@pytest.mark.parametrize(
    "attention",
    [fused, padded(fused, (6, 16)), padded(chunked(16), (8,)), sliced(1)],
    ids=["fused", "padded", "padded and chunked", "sliced"],
)
@pytest.mark.parametrize("shape", SHAPES)
def test_everything_together_gives_the_plain_answer(shape: str, attention: Any, given: Any) -> None:
    x, context = given
    made = unet(**SHAPES[shape])
    made.set_attention(attention)
    expected = made(x, 500.0, context).sample
    assert prepared(made) > 0
    text = made.read(context, absorbed=True)
    found = made(x, made.tell([900.0, 500.0])[1], text).sample
    error = (found - expected).pow(2).mean() / expected.pow(2).mean()
    assert error < 1e-10  # 100 dB
    torch.testing.assert_close(found, expected, **NEAR)


@pytest.mark.parametrize("copies", [None, 2])
def test_sums_alone_give_the_plain_answer(copies: int | None, given: Any) -> None:
    made = unet()
    expected = made(given[0], 500.0, given[1]).sample
    prepared(made, copies)
    torch.testing.assert_close(made(given[0], 500.0, given[1]).sample, expected, **NEAR)


def test_another_number_of_rows_than_was_prepared_for_is_right_too(given: Any, randn: Any) -> None:
    x, context = randn(3, 4, 8, 8, seed=3), randn(3, 7, 12, seed=4)
    made = unet()
    expected = made(x, 500.0, context).sample
    prepared(made, 2)
    torch.testing.assert_close(made(x, 500.0, context).sample, expected, **NEAR)


def test_heads_that_are_padded_by_copies_or_in_each_call_come_to_the_same(given: Any, monkeypatch: Any) -> None:
    made = unet()
    made.set_attention(padded(fused, (6, 16)))
    expected = made(given[0], 500.0, given[1]).sample
    for limit in (0, 2**20):
        monkeypatch.setattr(sums, "PADDED", limit)
        prepared(made)
        assert {m.sums.dim for m in made.modules() if isinstance(m, MultiHeadAttention) and m.sums} == (
            {4, 8} if limit == 0 else {6, 16}
        )
        torch.testing.assert_close(made(given[0], 500.0, given[1]).sample, expected, **NEAR)


def test_what_was_made_is_dropped(given: Any) -> None:
    made = unet()
    prepared(made)
    made.drop_sums()
    assert not any(getattr(module, "sums", None) is not None for module in made.modules())
    prepared(made)
    made.to(torch.float64)  # which it would not follow
    assert not any(getattr(module, "sums", None) is not None for module in made.modules())


def test_weights_that_change_between_runs_are_those_that_count(given: Any) -> None:
    made = unet()
    prepared(made)
    block = made.down_blocks[0].attentions[0].transformer_blocks[0]
    for layer in (block.attn1.to_out[0], block.attn1.to_v, block.ff.net[2], made.up_blocks[0].resnets[0].conv_shortcut):
        for parameter in layer.parameters():
            parameter.mul_(-2).add_(0.1)
    prepared(made)
    found = made(given[0], 500.0, given[1]).sample
    made.drop_sums()
    torch.testing.assert_close(found, made(given[0], 500.0, given[1]).sample, **NEAR)


def test_layers_that_are_watched_are_called(given: Any) -> None:
    made, called = unet(), []
    block, middle = (part.attentions[0].transformer_blocks[0] for part in (made.down_blocks[0], made.mid_block))
    watched = [block, block.attn1.to_out[0], block.attn2.to_q, block.ff.net[2], made.up_blocks[0].resnets[0].conv2]
    watched += [middle.attn1, middle.attn2]
    for layer in watched:
        layer.register_forward_hook(lambda layer, *_: called.append(layer))
    prepared(made)
    made(*given[:1], 500.0, made.read(given[1], absorbed=True))
    assert set(called) == set(watched)


@pytest.mark.skipif(not HAS_SDPA, reason="counts the operations of torch's own attention")
def test_there_are_fewer_operations(given: Any) -> None:
    made = unet()
    made.set_attention(padded(fused, (6, 16)))

    def operations(call: Any) -> Counter[str]:
        with Operations() as counted:
            call()
        return counted.names

    made.lay_together()
    text = made.read(given[1])
    before = operations(lambda: made(given[0], 500.0, text))
    prepared(made)
    text, time = made.read(given[1], absorbed=True), made.tell([500.0])[0]
    after = operations(lambda: made(given[0], time, text))
    # 4 transformers: residual sums of 3 parts each; 4 attentions to the text with their pads; 3 shortcuts
    assert before["add_"] - after["add_"] >= 3 * 4 + 3
    assert before["constant_pad_nd"] == 2 * 4
    assert after["constant_pad_nd"] == 0
    assert (before["cos"], after["cos"]) == (1, 0)


class Operations(TorchDispatchMode):
    """Counts operations by name."""

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


# -- texts in the weights


@pytest.mark.parametrize("words", [1, 7, 154])
def test_a_text_of_any_length_can_be_absorbed(words: int, given: Any, randn: Any) -> None:
    made, context = unet(), randn(2, words, 12, seed=5)
    torch.testing.assert_close(
        made(given[0], 500.0, made.read(context, absorbed=True)).sample, made(given[0], 500.0, context).sample, **NEAR
    )


@pytest.mark.parametrize(
    "attention",
    [sliced(1), chunked(8), upcast(fused), padded(upcast(fused), (6, 16))],
    ids=["sliced", "chunked", "upcast", "padded and upcast"],
)
def test_a_text_is_not_absorbed_where_attention_was_chosen_for_its_scores(attention: Any, given: Any) -> None:
    made = unet()
    made.set_attention(attention)
    text = made.read(given[1], absorbed=True)
    readers = [module for module in made.modules() if isinstance(module, MultiHeadAttention)]
    assert all(text.absorbed(reader) is None for reader in readers)


def test_half_precision_stays_near(given: Any) -> None:
    made = unet()
    expected = made(given[0], 500.0, given[1]).sample
    made.to(torch.bfloat16)
    x, context = (tensor.bfloat16() for tensor in given)
    plain = made(x, 500.0, context).sample
    prepared(made)
    found = made(x, 500.0, made.read(context, absorbed=True)).sample

    def error(of: torch.Tensor) -> float:
        return float((of.float() - expected).pow(2).mean())

    assert error(found) < 1.5 * error(plain)


@pytest.mark.parametrize("rows", [1, 2, 3])
def test_several_rows_and_several_texts_about_each_keep_their_order(rows: int, randn: Any) -> None:
    made, x, context = unet(), randn(rows, 4, 8, 8, seed=7), randn(2 * rows, 7, 12, seed=8)
    for lay in (lambda: None, lambda: prepared(made, 2 * rows)):
        lay()
        torch.testing.assert_close(
            made(x, 500.0, made.read(context, absorbed=True)).sample, made(x, 500.0, context).sample, **NEAR
        )


# -- times told beforehand


def test_times_told_beforehand_are_those_told_in_the_call(given: Any) -> None:
    for joined in (False, True):
        made = unet()
        if joined:
            made.lay_together()
        times = [999.0, 500.5, 0.0]
        for t, told in zip(times, made.tell(times), strict=True):
            torch.testing.assert_close(
                made(given[0], told, given[1]).sample, made(given[0], t, given[1]).sample, **NEAR
            )


def test_a_distilled_unet_is_told_its_scale_beforehand(given: Any, randn: Any) -> None:
    made, scale = unet(time_cond_proj_dim=6), randn(1, 6, seed=6)
    told = made.tell([500.0], scale)[0]
    found = made(given[0], told, given[1]).sample
    expected = made(given[0], 500.0, given[1], timestep_cond=scale).sample
    torch.testing.assert_close(found, expected, **NEAR)


def test_conditions_beside_a_time_that_has_them_are_refused(given: Any, randn: Any) -> None:
    made = unet(time_cond_proj_dim=6)
    with pytest.raises(InputError, match="conditions in it"):
        made(given[0], made.tell([500.0])[0], given[1], timestep_cond=randn(1, 6, seed=6))


class Overwriting(Plain):
    """Steps that put a norm's result in place of a map that nothing needs any more, as kernels for CUDA do."""

    reuses = True

    def normed(self, x: Any, norm: Any, act: Any = None, shift: Any = None, *, spare: bool = False) -> Any:
        y = super().normed(x, norm, act, shift)
        return x.copy_(y) if spare else y


def test_a_shortcut_within_a_product_reads_its_map_before_it_is_overwritten(randn: Any) -> None:
    style = ResnetStyle(groups=2, eps=1e-5)
    block = Resnet(4, 8, style).requires_grad_(False)
    x = randn(2, 4, 6, 6)
    expected = block(x)
    block.steps = Overwriting()
    torch.testing.assert_close(block(Spare(x.clone())), expected)
    block.lay_sums(2)
    torch.testing.assert_close(block(Spare(x.clone())), expected, rtol=1e-5, atol=1e-5)
