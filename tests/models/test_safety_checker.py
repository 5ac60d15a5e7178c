from __future__ import annotations

import pytest
import torch
import transformers
from diffusers.pipelines.stable_diffusion import safety_checker as published

from russet.errors import ConfigError, InputError
from russet.models.safety_checker import StableDiffusionSafetyChecker

VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 16,
    "patch_size": 8,
}


def classic(name: str) -> str:
    """transformers 5 leaves out one of the two prefixes that the published checkpoint has."""
    return f"vision_model.{name}" if name.startswith("vision_model.") else name


@pytest.fixture
def pair(shaken):
    """The published checker with random weights, its thresholds at ``level``, and ours with the same."""

    def make(level: float, special: float) -> tuple[torch.nn.Module, StableDiffusionSafetyChecker]:
        config = transformers.CLIPConfig(vision_config=VISION, projection_dim=12)
        reference = published.StableDiffusionSafetyChecker(config)
        make = torch.Generator().manual_seed(3)
        for embeds in (reference.concept_embeds, reference.special_care_embeds):
            embeds.data = torch.randn(embeds.shape, generator=make)
        shaken(reference)
        reference.concept_embeds_weights.data = level + 0.05 * torch.rand(17, generator=make)
        reference.special_care_embeds_weights.data = special + 0.05 * torch.rand(3, generator=make)
        ours = StableDiffusionSafetyChecker(vision_config=VISION, projection_dim=12)
        ours.load_state_dict({classic(name): x for name, x in reference.state_dict().items()}, strict=True)
        return reference, ours

    return make


@pytest.mark.parametrize("special", [-1.0, 0.0, 2.0], ids=["special care", "some", "no special care"])
def test_verdicts_equal_the_published_ones(special, pair, randn):
    verdicts = []
    for level in (-0.2, 0.2, 0.4, 0.5, 0.55, 0.6, 0.7):
        reference, ours = pair(level, special)
        pixels = randn(12, 3, 16, 16)
        _, wanted = reference(images=torch.zeros(12, 3, 4, 4), clip_input=pixels)
        assert ours(pixels) == wanted
        verdicts += wanted
    assert 0.1 < sum(verdicts) / len(verdicts) < 0.9  # both verdicts occur


def test_special_care_lowers_the_thresholds_by_a_hundredth(pair, randn):
    pixels = randn(4, 3, 16, 16)
    _, ours = pair(0.5, special=2.0)
    without = ours.scores(pixels)
    ours.special_care_embeds_weights.fill_(-1.1)
    careful = ours.scores(pixels)
    assert (without.special < 0).all()
    assert (careful.special > 0).all()
    assert torch.allclose(careful.concepts - without.concepts, torch.tensor(0.01), atol=1e-6)


def test_special_care_is_taken_for_each_picture_by_itself(pair, randn):
    pixels = randn(12, 3, 16, 16)
    _, ours = pair(0.5, special=0.0)
    ours.special_care_embeds_weights += ours.scores(pixels).special.amax(dim=1).median()  # half of them fire
    together = ours.scores(pixels)
    alone = torch.cat([ours.scores(pixels[i : i + 1]).concepts for i in range(12)])
    assert 0 < (together.special > 0).any(dim=1).sum() < 12
    assert torch.allclose(alone, together.concepts, atol=1.1e-3)  # rounding to thousandths may tip over


def test_half_precision_gives_verdicts_too(pair, randn):
    _, ours = pair(-1.5, special=2.0)
    assert ours.to(torch.bfloat16)(randn(2, 3, 16, 16).bfloat16()) == [True, True]


def test_pictures_of_another_size_are_refused():
    with pytest.raises(InputError, match=r"\[B, 3, 16, 16\]"):
        StableDiffusionSafetyChecker(vision_config=VISION)(torch.zeros(1, 3, 8, 8))


def test_a_vision_config_that_cannot_be_built_is_refused():
    with pytest.raises(ConfigError, match=r"vision_config.*hidden_size"):
        StableDiffusionSafetyChecker(vision_config={**VISION, "hidden_size": -1})
    with pytest.raises(ConfigError, match="projection_dim must be positive"):
        StableDiffusionSafetyChecker(vision_config=VISION, projection_dim=0)
