"""Every argument of a call is checked before any work begins, and the pipeline works afterwards."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from russet.errors import ArgumentTypeError, InputError, UnsupportedArgument
from russet.pipelines.base import INTERNAL

NAN = float("nan")
ONE = torch.zeros(1, 77, 32)

WRONG_VALUES: list[tuple[dict[str, Any], str]] = [
    ({"prompt": None}, "prompt"),
    ({"prompt": []}, "prompt"),
    ({"prompt_embeds": ONE}, "prompt"),
    ({"prompt": None, "prompt_embeds": ONE[0]}, "prompt_embeds"),
    ({"prompt": None, "prompt_embeds": ONE[..., :31]}, "prompt_embeds"),
    ({"prompt": None, "prompt_embeds": ONE[:0]}, "prompt_embeds"),
    ({"prompt": None, "prompt_embeds": ONE * NAN}, "finite"),
    ({"prompt": None, "prompt_embeds": ONE[:, :70]}, "negative_prompt_embeds"),
    ({"prompt": None, "prompt_embeds": ONE, "negative_prompt_embeds": ONE[:, :70]}, "negative_prompt_embeds"),
    ({"negative_prompt": "a", "negative_prompt_embeds": ONE}, "negative_prompt"),
    ({"negative_prompt": ["a", "b"]}, "negative_prompt"),
    ({"negative_prompt": []}, "negative_prompt"),
    ({"height": 60}, "divisible by 8"),
    ({"width": 4}, "width"),
    ({"height": 0}, "height"),
    ({"width": -64}, "width"),
    ({"num_inference_steps": 0}, "num_inference_steps"),
    ({"num_inference_steps": -3}, "num_inference_steps"),
    ({"num_inference_steps": 100000}, "steps"),
    ({"timesteps": []}, "timesteps"),
    ({"timesteps": [10, 500]}, "timesteps"),
    ({"timesteps": [500, NAN]}, "timesteps"),
    ({"timesteps": [500, 10], "sigmas": [3.0, 1.0]}, "timesteps"),
    ({"guidance_scale": NAN}, "guidance_scale"),
    ({"guidance_scale": float("inf")}, "guidance_scale"),
    ({"guidance_rescale": 1.5}, "guidance_rescale"),
    ({"num_images_per_prompt": 0}, "num_images_per_prompt"),
    ({"eta": 1.1}, "eta"),
    ({"eta": -0.1}, "eta"),
    ({"clip_skip": 3}, "clip_skip"),
    ({"clip_skip": -1}, "clip_skip"),
    ({"seed": -1}, "seed"),
    ({"seed": 2**64}, "seed"),
    ({"seed": [1, 2]}, "seed"),
    ({"seed": 1, "generator": torch.Generator()}, "seed"),
    ({"generator": [torch.Generator(), torch.Generator()]}, "generator"),
    ({"generator": []}, "generator"),
    ({"latents": torch.zeros(1, 4, 8, 9)}, "latents"),
    ({"latents": torch.full((1, 4, 8, 8), NAN)}, "latents"),
    ({"output_type": "jpeg"}, "output_type"),
    ({"callback_on_step_end_tensor_inputs": ["noise"]}, "callback_on_step_end_tensor_inputs"),
]

WRONG_TYPES: list[tuple[dict[str, Any], str]] = [
    ({"prompt": 3}, "prompt"),
    ({"prompt": ["a", 3]}, "prompt"),
    ({"prompt": None, "prompt_embeds": [[1.0]]}, "prompt_embeds"),
    ({"prompt": None, "prompt_embeds": ONE.long()}, "prompt_embeds"),
    ({"negative_prompt": 3}, "negative_prompt"),
    ({"height": "64"}, "height"),
    ({"height": 64.0}, "height"),
    ({"width": True}, "width"),
    ({"num_inference_steps": 2.5}, "num_inference_steps"),
    ({"num_inference_steps": None}, "num_inference_steps"),
    ({"num_inference_steps": True}, "num_inference_steps"),
    ({"timesteps": "999"}, "timesteps"),
    ({"timesteps": ["999"]}, "timesteps"),
    ({"guidance_scale": "7.5"}, "guidance_scale"),
    ({"guidance_scale": None}, "guidance_scale"),
    ({"num_images_per_prompt": "2"}, "num_images_per_prompt"),
    ({"eta": "0"}, "eta"),
    ({"clip_skip": 1.5}, "clip_skip"),
    ({"seed": 1.5}, "seed"),
    ({"seed": "1"}, "seed"),
    ({"generator": 42}, "generator"),
    ({"generator": [42]}, "generator"),
    ({"latents": [[0.0]]}, "latents"),
    ({"output_type": 3}, "output_type"),
    ({"return_dict": 1}, "return_dict"),
    ({"callback_on_step_end": "print"}, "callback_on_step_end"),
    ({"callback_on_step_end_tensor_inputs": "latents"}, "callback_on_step_end_tensor_inputs"),
]


def in_words(value: Any) -> str:
    """A parameter's name in the report: the arguments, without values that print their address."""
    return " ".join(value) if isinstance(value, dict) else str(value)


@pytest.fixture(autouse=True)
def no_network_may_run(tiny: Any) -> Iterator[None]:
    """Fails a test in which any network begins to work."""

    def refuse(*args: Any) -> None:
        pytest.fail("a network ran before the arguments were checked")

    hooks = [network.register_forward_pre_hook(refuse) for network in tiny.networks.values()]
    yield
    for hook in hooks:
        hook.remove()


@pytest.mark.parametrize(("given", "named"), WRONG_VALUES, ids=in_words)
def test_a_wrong_value_is_refused_by_name(given: dict[str, Any], named: str, tiny: Any) -> None:
    with pytest.raises(InputError, match=named):
        tiny(**{"prompt": "a horse", "num_inference_steps": 1, **given})


@pytest.mark.parametrize(("given", "named"), WRONG_TYPES, ids=in_words)
def test_a_wrong_type_is_refused_by_name(given: dict[str, Any], named: str, tiny: Any) -> None:
    with pytest.raises(ArgumentTypeError, match=named):
        tiny(**{"prompt": "a horse", "num_inference_steps": 1, **given})


@pytest.mark.parametrize(
    "name", ["cross_attention_kwargs", "ip_adapter_image", "ip_adapter_image_embeds", "callback_steps"]
)
def test_an_argument_that_diffusers_has_and_russet_lacks_is_named(name: str, tiny: Any) -> None:
    with pytest.raises(UnsupportedArgument, match=f"Diffusers has '{name}'"):
        tiny("a horse", **{name: 1})


def test_an_unknown_argument_is_refused(tiny: Any) -> None:
    with pytest.raises(UnsupportedArgument, match="num_steps"):
        tiny("a horse", num_steps=3)


def test_an_error_is_also_the_built_in_one_that_programs_catch(tiny: Any) -> None:
    with pytest.raises(ValueError, match="height"):
        tiny("a horse", height=60)
    with pytest.raises(TypeError, match="num_steps"):
        tiny("a horse", num_steps=3)


def test_dir_shows_what_a_user_may_call(shared_mini: Any) -> None:
    shown = {name for name in dir(shared_mini) if not name.startswith("_")}
    assert {"unet", "vae", "scheduler", "to", "plan", "start", "from_pretrained", "enable_deep_cache"} <= shown
    assert not INTERNAL & shown
    assert all(hasattr(shared_mini, name) for name in INTERNAL)  # none is listed that is gone
