from __future__ import annotations

import torch

from russet.checkpoints.layouts.old_keys import renewed


class Kept:
    """A tensor that knows where it came from."""

    def __init__(self, *shape: int) -> None:
        self.shape = shape
        self.torch_dtype = torch.float32

    def read(self, *, brief: bool = False) -> torch.Tensor:
        return torch.arange(float(torch.Size(self.shape).numel())).reshape(self.shape)


VAE = "decoder.mid_block.attentions.0."


def test_old_attention_names_of_the_vae_become_todays() -> None:
    wanted = {f"{VAE}{name}": (4, 4) for name in ("to_q.weight", "to_k.weight", "to_v.weight", "to_out.0.weight")}
    old = {f"{VAE}{name}.weight": Kept(4, 4) for name in ("query", "key", "value", "proj_attn")}
    assert renewed(old, wanted) == dict(zip(wanted, old.values(), strict=True))


def test_todays_attention_names_stay() -> None:
    given = {f"{VAE}to_q.weight": Kept(4, 4)}
    assert renewed(given, {f"{VAE}to_q.weight": (4, 4)}) == given


def test_attention_stored_as_convolutions_becomes_matrices() -> None:
    result = renewed({f"{VAE}query.weight": Kept(4, 4, 1, 1)}, {f"{VAE}to_q.weight": (4, 4)})
    squeezed = result[f"{VAE}to_q.weight"]
    assert squeezed.shape == (4, 4)
    assert torch.equal(squeezed.read(), torch.arange(16.0).reshape(4, 4))


def test_a_real_convolution_of_one_by_one_stays_one() -> None:
    conv = Kept(4, 4, 1, 1)
    assert renewed({"quant_conv.weight": conv}, {"quant_conv.weight": (4, 4, 1, 1)}) == {"quant_conv.weight": conv}


def test_position_ids_are_dropped_wherever_they_are() -> None:
    places = ("", "embeddings.", "text_model.embeddings.", "text_model.encoder.text_model.embeddings.")
    assert renewed({f"{place}position_ids": Kept(1, 77) for place in places}, {}) == {}


def test_the_prefix_of_a_text_encoder_is_added_or_taken_away() -> None:
    with_it, without = "text_model.final_layer_norm.weight", "final_layer_norm.weight"
    for wanted in (with_it, without):
        for given in (with_it, without):
            assert list(renewed({given: Kept(3)}, {wanted: (3,)})) == [wanted]


def test_the_second_prefix_of_the_safety_checker_is_added_or_taken_away() -> None:
    once, twice = "vision_model.post_layernorm.bias", "vision_model.vision_model.post_layernorm.bias"
    for wanted in (once, twice):
        for given in (once, twice):
            assert list(renewed({given: Kept(3)}, {wanted: (3,)})) == [wanted]


def test_a_name_that_no_rule_helps_is_left_to_be_reported() -> None:
    assert list(renewed({"lora.up": Kept(1)}, {"x": (1,)})) == ["lora.up"]
