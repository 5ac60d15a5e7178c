"""What many tests share: the embedded model, and a tiny random pipeline as Diffusers saves it."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from . import absent

os.environ["HF_HUB_OFFLINE"] = "1"  # no test may reach a network; those of the Hub bring a server of their own
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_BF16")  # without AMX: Russet's default is bfloat16 with it
if "PYTEST_XDIST_WORKER" in os.environ:  # one process for each core: more threads would wait for one another
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # which programs that tests start read
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))  # torch has read it when it was imported

if not os.path.exists("/dev/nvidia0"):
    os.environ.setdefault("TRITON_INTERPRET", "1")  # kernels run on the CPU; read when Triton is first imported

absent.stand_in()  # before any test module is imported
pytest_runtest_setup = absent.skip_without_half


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A test's name must be the same in every process, or pytest-xdist runs none at all."""
    if changing := [item.nodeid for item in items if " at 0x" in item.nodeid]:
        raise pytest.UsageError(f"the name has an address in it, give it ids=: {changing[0]}")


MINI = Path(__file__).parents[1] / "src" / "russet" / "mini"


@pytest.fixture(scope="session")
def shared_mini() -> Any:
    """The embedded model, loaded once. A test that changes it uses ``mini``."""
    from russet import DiffusionPipeline

    pipe = DiffusionPipeline.from_pretrained("mini")
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def mini(shared_mini: Any) -> Any:
    """A pipeline of its own over the shared networks: its scheduler and its switches may be changed."""
    pipe = type(shared_mini)(**shared_mini.components, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Stable Diffusion of 64×64 pixels, safety checker and all, saved by Diffusers (by Russet without it)."""
    folder = tmp_path_factory.mktemp("tiny") / "pipeline"
    (tiny_reference() if absent.installed("diffusers") else tiny_own()).save_pretrained(folder)
    return folder


UNET = {
    "sample_size": 8,
    "block_out_channels": (32, 64),
    "layers_per_block": 1,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "cross_attention_dim": 32,
    "attention_head_dim": 4,
    "norm_num_groups": 8,
}
VAE = {
    "block_out_channels": (8, 8, 16, 16),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "norm_num_groups": 4,
    "sample_size": 64,
}
TEXT = {
    "vocab_size": 2944,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "bos_token_id": 2942,
    "eos_token_id": 2943,
    "pad_token_id": 2943,
}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 8,
}
SCHEDULER = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "skip_prk_steps": True,
    "steps_offset": 1,
}
PROCESSOR = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}


def tiny_reference() -> Any:
    """The tiny pipeline of Diffusers; random weights with a fixed seed, and mini's tokenizer."""
    import diffusers
    import transformers
    from diffusers.pipelines.stable_diffusion import StableDiffusionSafetyChecker

    torch.manual_seed(0)
    unet, vae = diffusers.UNet2DConditionModel(**UNET), diffusers.AutoencoderKL(**VAE)
    text = transformers.CLIPTextModel(transformers.CLIPTextConfig(**TEXT))
    config = transformers.CLIPConfig(vision_config=transformers.CLIPVisionConfig(**VISION).to_dict(), projection_dim=16)
    pipe = diffusers.StableDiffusionPipeline(
        vae=vae,
        text_encoder=text.eval(),
        tokenizer=transformers.CLIPTokenizer.from_pretrained(MINI / "tokenizer"),
        unet=unet,
        scheduler=diffusers.PNDMScheduler(**SCHEDULER),
        safety_checker=harmless(StableDiffusionSafetyChecker(config)),
        feature_extractor=transformers.CLIPImageProcessor(**PROCESSOR),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def tiny_own() -> Any:
    """The same pipeline made by Russet, for where there is no Diffusers."""
    import russet
    from russet.images.clip_processor import CLIPImageProcessor
    from russet.models.safety_checker import StableDiffusionSafetyChecker
    from russet.text.tokenizer import CLIPTokenizer

    torch.manual_seed(0)
    return russet.StableDiffusionPipeline(
        vae=russet.AutoencoderKL(VAE),
        text_encoder=russet.CLIPTextModel({**TEXT, "dtype": "float32"}),
        tokenizer=CLIPTokenizer.from_files(MINI / "tokenizer"),
        unet=russet.UNet2DConditionModel(UNET),
        scheduler=russet.PNDMScheduler(**SCHEDULER),
        safety_checker=harmless(StableDiffusionSafetyChecker({"vision_config": VISION, "projection_dim": 16})),
        feature_extractor=CLIPImageProcessor(**PROCESSOR),
    )


def harmless(checker: Any) -> Any:
    """A safety checker with random concepts that flags nothing: its thresholds are more than a cosine."""
    torch.nn.init.normal_(checker.concept_embeds)
    torch.nn.init.normal_(checker.special_care_embeds)
    torch.nn.init.constant_(checker.concept_embeds_weights, 2.0)
    torch.nn.init.constant_(checker.special_care_embeds_weights, 2.0)
    return checker


@pytest.fixture(scope="session")
def shared_reference(tiny_folder: Path) -> Any:
    import diffusers

    return diffusers.StableDiffusionPipeline.from_pretrained(tiny_folder, safety_checker=None)


@pytest.fixture
def reference(shared_reference: Any) -> Any:
    """The tiny pipeline in Diffusers, without its safety checker and with a scheduler of its own."""
    pipe = type(shared_reference)(**shared_reference.components, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="session")
def shared_tiny(tiny_folder: Path) -> Any:
    from russet import DiffusionPipeline

    return DiffusionPipeline.from_pretrained(tiny_folder, safety_checker=None)


@pytest.fixture
def tiny(shared_tiny: Any) -> Any:
    """The tiny pipeline in Russet, with switches and a scheduler of its own."""
    pipe = type(shared_tiny)(**shared_tiny.components, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="session")
def psnr() -> Callable[[Any, Any], float]:
    """Peak signal-to-noise ratio in dB of two arrays in 0..1."""

    def measure(a: Any, b: Any) -> float:
        error = float(np.mean((np.asarray(a, dtype=np.float64) - np.asarray(b, dtype=np.float64)) ** 2))
        return float("inf") if error == 0 else -10 * float(np.log10(error))

    return measure
