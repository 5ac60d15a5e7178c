from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file

import russet
from russet.errors import ArgumentTypeError, ConfigError, InputError
from russet.models.attention import chunked, sliced
from russet.models.clip_text import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection
from russet.models.clip_vision import CLIPVisionConfig, CLIPVisionModelWithProjection

MINI = Path(russet.__file__).parent / "mini/text_encoder"
TEXT = {
    "vocab_size": 100,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "projection_dim": 24,
    "bos_token_id": 98,
    "eos_token_id": 99,
}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "projection_dim": 24,
    "image_size": 28,
    "patch_size": 8,  # leaves 4 pixels over
}


def classic(weights: dict) -> dict:
    """Keys as published checkpoints have them: transformers 5 leaves out the prefix of a bare text model."""
    return {name if name.startswith("text_") else f"text_model.{name}": tensor for name, tensor in weights.items()}


@pytest.fixture
def pair(shaken):
    def make(ours_class: type, **changes) -> tuple[torch.nn.Module, torch.nn.Module]:
        vision = ours_class is CLIPVisionModelWithProjection
        kind = transformers.CLIPVisionConfig if vision else transformers.CLIPTextConfig
        config = {**(VISION if vision else TEXT), **changes}
        reference = shaken(getattr(transformers, ours_class.__name__)(kind(**config)))
        ours = ours_class(config)
        ours.load_state_dict(reference.state_dict() if vision else classic(reference.state_dict()), strict=True)
        return reference, ours.requires_grad_(False)

    return make


def prompts() -> torch.Tensor:
    """Three prompts as a tokenizer gives them: begin, words, end, padding; one padded with the end token itself."""
    ids = torch.randint(3, 97, (3, 20), generator=torch.Generator().manual_seed(0))
    ids[:, 0] = 98
    ids[0, 7:] = 99
    ids[1, 12] = 99
    ids[1, 13:] = 1
    ids[2, 19] = 99
    return ids


@pytest.mark.parametrize("eos", [2, 99], ids=["highest id", "first end token"])
@pytest.mark.parametrize("act", ["quick_gelu", "gelu"])
def test_the_text_model_equals_transformers(act, eos, pair, agree):
    reference, ours = pair(CLIPTextModel, hidden_act=act, eos_token_id=eos)
    got, wanted = ours(prompts(), output_hidden_states=True), reference(prompts(), output_hidden_states=True)
    agree(got.last_hidden_state, wanted.last_hidden_state)
    agree(got.pooler_output, wanted.pooler_output)
    for state, other in zip(got.hidden_states, wanted.hidden_states, strict=True):
        agree(state, other)


@pytest.mark.parametrize("eos", [2, 99], ids=["highest id", "first end token"])
def test_the_text_model_with_projection_equals_transformers(eos, pair, agree):
    reference, ours = pair(CLIPTextModelWithProjection, eos_token_id=eos, hidden_act="gelu")
    got, wanted = ours(prompts(), output_hidden_states=True), reference(prompts(), output_hidden_states=True)
    agree(got.text_embeds, wanted.text_embeds)
    agree(got.last_hidden_state, wanted.last_hidden_state)
    agree(got.hidden_states[-2], wanted.hidden_states[-2])
    assert ours(prompts())[0] is not None
    assert ours(prompts()).hidden_states is None


def test_the_two_pooling_rules_differ_once_new_tokens_lie_beyond_the_end_token(pair, agree):
    ids = prompts()
    ids[:, 3] = 105  # a token that textual inversion added
    for eos, place in ((2, 3), (99, 7)):
        _, ours = pair(CLIPTextModel, vocab_size=110, eos_token_id=eos)
        out = ours(ids)
        agree(out.pooler_output[0], out.last_hidden_state[0, place])


@pytest.mark.parametrize("method", [sliced(1), chunked(7, 5)], ids=repr)
def test_another_attention_gives_the_same_text(method, pair, agree):
    _, ours = pair(CLIPTextModel)
    fused = ours(prompts()).last_hidden_state
    ours.set_attention(method)
    agree(ours(prompts()).last_hidden_state, fused)


def test_a_token_is_not_seen_by_those_before_it(pair):
    _, ours = pair(CLIPTextModel)
    ids = prompts()
    before = ours(ids).last_hidden_state
    ids[:, 10] = 42
    after = ours(ids).last_hidden_state
    assert torch.equal(before[:, :10], after[:, :10])
    assert not torch.allclose(before[:, 10:], after[:, 10:], atol=1e-3)


def test_the_mask_is_made_of_floats_of_the_weights_dtype(pair):
    _, ours = pair(CLIPTextModel)
    masks = []

    def noting(q, k, v, scale, mask=None):
        masks.append(mask)
        return sliced(4)(q, k, v, scale, mask)

    ours.set_attention(noting)
    for dtype in (torch.float32, torch.bfloat16):
        assert ours.to(dtype)(prompts()).last_hidden_state.isfinite().all()
        assert masks[-1].dtype == dtype  # a boolean mask crashes mps, and a causal flag leaks on it


def test_a_batch_equals_its_single_prompts(pair, agree):
    _, ours = pair(CLIPTextModelWithProjection)
    together = ours(prompts())
    for i in range(3):
        alone = ours(prompts()[i : i + 1])
        agree(alone.text_embeds, together.text_embeds[i : i + 1])
        agree(alone.last_hidden_state, together.last_hidden_state[i : i + 1])


@pytest.mark.parametrize(
    "ids",
    [
        torch.zeros(1, 78, dtype=torch.long),
        torch.zeros(1, 0, dtype=torch.long),
        torch.zeros(5, dtype=torch.long),
        torch.zeros(1, 5),
    ],
    ids=["too long", "empty", "flat", "floats"],
)
def test_ids_that_do_not_fit_are_refused(ids):
    with pytest.raises(InputError, match=r"whole numbers \[B, N\] with N from 1 to 77"):
        CLIPTextModel(TEXT)(ids)


def test_what_is_no_tensor_is_refused():
    with pytest.raises(ArgumentTypeError, match="input_ids must be a tensor, not list"):
        CLIPTextModel(TEXT)([[1, 2]])
    with pytest.raises(ArgumentTypeError, match="pixel_values must be a tensor, not NoneType"):
        CLIPVisionModelWithProjection(VISION)(None)


def test_the_vision_model_equals_transformers(pair, agree, randn):
    reference, ours = pair(CLIPVisionModelWithProjection)
    pixels = randn(2, 3, 28, 28)
    got, wanted = ours(pixels), reference(pixels)
    agree(got.image_embeds, wanted.image_embeds)
    agree(got.last_hidden_state, wanted.last_hidden_state)


@pytest.mark.parametrize("shape", [(1, 3, 32, 32), (3, 28, 28), (1, 1, 28, 28)])
def test_pictures_of_another_size_are_refused(shape):
    with pytest.raises(InputError, match=r"\[B, 3, 28, 28\]"):
        CLIPVisionModelWithProjection(VISION)(torch.zeros(shape))


def test_the_embedded_text_encoder_fits():
    ours = CLIPTextModel(json.loads((MINI / "config.json").read_text())).state_dict()
    found = classic(load_file(MINI / "model.safetensors"))
    assert {name: x.shape for name, x in ours.items()} == {name: x.shape for name, x in found.items()}


@pytest.mark.parametrize("kind", ["text", "vision"])
def test_defaults_are_those_of_transformers(kind):
    ours, reference = (
        (CLIPTextConfig(), transformers.CLIPTextConfig())
        if kind == "text"
        else (CLIPVisionConfig(), transformers.CLIPVisionConfig())
    )
    assert {name: ours[name] for name in ours} == {name: getattr(reference, name) for name in ours}


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        (CLIPTextConfig, {"hidden_size": 0}, "hidden_size must be positive"),
        (CLIPTextConfig, {"vocab_size": 0}, "vocab_size must be positive"),
        (CLIPTextConfig, {"max_position_embeddings": -1}, "max_position_embeddings must be positive"),
        (CLIPTextConfig, {"num_attention_heads": 7}, "512 cannot be shared by 7 heads"),
        (CLIPTextConfig, {"hidden_act": "snake"}, "hidden_act 'snake'"),
        (CLIPTextConfig, {"layer_norm_eps": 0.0}, "layer_norm_eps must be positive"),
        (CLIPTextConfig, {"eos_token_id": "2"}, "eos_token_id must be int"),
        (CLIPVisionConfig, {"num_channels": 0}, "num_channels must be positive"),
        (CLIPVisionConfig, {"patch_size": 300}, "patch_size 300 is larger"),
    ],
)
def test_configs_that_cannot_be_built_are_refused(kind, changes, message):
    with pytest.raises(ConfigError, match=message):
        kind(**changes)
