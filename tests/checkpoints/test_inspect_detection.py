"""What a file is, told by its header alone, at full size."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest

from russet.checkpoints.formats.weight_files import open_weights
from russet.checkpoints.inspect import inspect
from russet.checkpoints.layouts.detection import FileKind, recognise

from . import ldm_layout as layout
from .sparse import write_sparse

Shapes = dict[str, tuple[int, ...]]


def unet(**changes: object) -> layout.UNetParams:
    return dataclasses.replace(layout.SD1, **changes)


def renamed(shapes: Shapes, old: str, new: str) -> Shapes:
    return {name.replace(old, new, 1): shape for name, shape in shapes.items()}


WHOLE: dict[str, tuple[Callable[[], Shapes], str]] = {
    "sd1": (layout.sd1, "Stable Diffusion 1.x, checkpoint (LDM layout)"),
    "sd1 with ema": (lambda: layout.sd1(ema=True), "Stable Diffusion 1.x, checkpoint (LDM layout)"),
    "inpaint": (lambda: layout.sd1(unet(in_channels=9)), "Stable Diffusion 1.x, inpainting, checkpoint (LDM layout)"),
    "pix2pix": (
        lambda: layout.sd1(unet(in_channels=8)),
        "Stable Diffusion 1.x, instruct-pix2pix, checkpoint (LDM layout)",
    ),
    "sd2": (layout.sd2, "Stable Diffusion 2.x, checkpoint (LDM layout)"),
    "sd2 inpaint": (
        lambda: layout.sd2(dataclasses.replace(layout.SD2, in_channels=9)),
        "Stable Diffusion 2.x, inpainting, checkpoint (LDM layout)",
    ),
    "sd2 depth": (
        lambda: layout.sd2(dataclasses.replace(layout.SD2, in_channels=5)),
        "Stable Diffusion 2.x, depth to image, checkpoint (LDM layout)",
    ),
    "sd2 unclip": (
        lambda: layout.sd2(dataclasses.replace(layout.SD2, adm_in_channels=2048)),
        "Stable Diffusion 2.x, image variations (unCLIP), checkpoint (LDM layout)",
    ),
    "sdxl": (layout.sdxl, "Stable Diffusion XL, checkpoint (LDM layout)"),
    "refiner": (layout.refiner, "Stable Diffusion XL refiner, checkpoint (LDM layout)"),
    "edm": (lambda: layout.sdxl() | {"edm_mean": (4,)}, "Stable Diffusion XL, EDM checkpoint (LDM layout)"),
    "without text": (
        lambda: layout.unet_file(layout.SD2) | layout.under("first_stage_model.", layout.vae()),
        "Stable Diffusion 2.x, checkpoint (LDM layout)",
    ),
}


@pytest.mark.parametrize("name", WHOLE)
def test_whole_models_are_recognised_by_their_tensors(name: str, tmp_path: Path) -> None:
    make, words = WHOLE[name]
    file = open_weights(write_sparse(tmp_path / "model.safetensors", make()))
    assert str(recognise({key: tensor.shape for key, tensor in file.tensors.items()})) == words


LONE: dict[str, tuple[Callable[[], Shapes], FileKind]] = {
    "LDM UNet": (lambda: layout.UNet(layout.SDXL).shapes, FileKind("unet", "sdxl", "", "LDM")),
    "LDM UNet with prefix": (
        lambda: layout.under("diffusion_model.", layout.UNet(layout.SD1).shapes),
        FileKind("unet", "sd1", "", "LDM"),
    ),
    "LDM VAE": (layout.vae, FileKind("vae", layout="LDM")),
    "LDM VAE with prefix": (lambda: layout.under("first_stage_model.", layout.vae()), FileKind("vae", layout="LDM")),
    "Diffusers UNet": (
        lambda: {
            "conv_in.weight": (320, 9, 3, 3),
            "time_embedding.linear_1.weight": (1280, 320),
            "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.weight": (320, 768),
        },
        FileKind("unet", "sd1", "inpaint", "Diffusers"),
    ),
    "Diffusers VAE": (
        lambda: {"decoder.mid_block.resnets.0.norm1.weight": (512,)},
        FileKind("vae", layout="Diffusers"),
    ),
    "CLIP": (lambda: layout.clip(counter=False), FileKind("text_encoder", layout="Diffusers")),
    "OpenCLIP": (lambda: layout.openclip(1024, 24), FileKind("text_encoder", layout="OpenCLIP")),
    "ControlNet": (
        lambda: layout.under("control_model.", layout.UNet(layout.SD1).shapes),
        FileKind("controlnet", "sd1", "", "LDM"),
    ),
    "Diffusers ControlNet": (
        lambda: {
            "controlnet_cond_embedding.conv_in.weight": (16, 3, 3, 3),
            "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k.weight": (640, 2048),
        },
        FileKind("controlnet", "sdxl", "", "Diffusers"),
    ),
    "embedding": (lambda: {"emb_params": (4, 768)}, FileKind("embedding", "sd1", layout="A1111")),
    "old embedding": (lambda: {"string_to_param.*": (4, 1024)}, FileKind("embedding", "sd2", layout="A1111")),
    "Diffusers embedding": (lambda: {"<cat-toy>": (768,)}, FileKind("embedding", "sd1", layout="Diffusers")),
    "XL embedding": (lambda: {"clip_l": (2, 768), "clip_g": (2, 1280)}, FileKind("embedding", "sdxl", layout="kohya")),
    "Flux": (lambda: {"double_blocks.0.img_attn.qkv.weight": (9216, 3072)}, FileKind("other", detail="Flux")),
    "SD3": (
        lambda: {"model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight": (4608, 1536)},
        FileKind("other", detail="Stable Diffusion 3"),
    ),
    "anything": (lambda: {"fc.weight": (10, 10), "fc.bias": (10,)}, FileKind("other", detail="unknown kind of file")),
    "empty": (dict, FileKind("other", detail="unknown kind of file")),
    "odd shapes": (lambda: {"input_blocks.0.0.weight": ()}, FileKind("unet", "", "", "LDM")),
}


@pytest.mark.parametrize("name", LONE)
def test_parts_adapters_and_foreign_files_are_named(name: str) -> None:
    make, kind = LONE[name]
    assert recognise(make()) == kind


def test_a_full_size_file_is_described_without_reading_a_weight(tmp_path: Path) -> None:
    precisions = {"model.": "F16", "model_ema": "F32", "first_stage": "BF16", "cond_stage": "F32", "": "F32"}
    path = write_sparse(tmp_path / "v1-5-pruned.safetensors", layout.sd1(ema=True), precisions)
    report = inspect(path)
    assert (report.pipeline, report.model, report.obstacle) == ("StableDiffusionPipeline", "sd1", "")
    assert report.has_ema
    parts = {part.name: (part.parameters, part.precision) for part in report.parts}
    assert parts["unet"] == (859_520_964, "float16")
    assert parts["vae"] == (83_653_863, "bfloat16")
    assert report.size == path.stat().st_size > 5e9
    assert report.configs["unet"]["cross_attention_dim"] == 768
    assert "859.5 million parameters, float16" in str(report)


@pytest.mark.parametrize(("name", "words"), [("sdxl", "sdxl"), ("refiner", "sdxl-refiner"), ("inpaint", "sd1-inpaint")])
def test_the_bundled_configs_fit_the_full_size_files(name: str, words: str, tmp_path: Path) -> None:
    report = inspect(write_sparse(tmp_path / "model.safetensors", WHOLE[name][0]()))
    assert (report.model, report.obstacle) == (words, "")


@pytest.mark.parametrize(("stem", "model"), [("sd_xl_turbo_1.0_fp16", "sdxl-turbo"), ("dreamTurboXL", "sdxl")])
def test_turbo_is_told_by_the_published_name_alone(stem: str, model: str, tmp_path: Path) -> None:
    assert inspect(write_sparse(tmp_path / f"{stem}.safetensors", layout.sdxl())).model == model


def test_turbo_is_told_by_metadata(tmp_path: Path) -> None:
    metadata = {"modelspec.architecture": "stable-diffusion-xl-turbo-v1", "modelspec.title": "Quick"}
    report = inspect(write_sparse(tmp_path / "a.safetensors", layout.sdxl(), metadata=metadata))
    assert report.model == "sdxl-turbo"
    assert report.configs["scheduler"]["timestep_spacing"] == "trailing"
    assert ("title", "Quick") in list(report.rows())


def test_a_model_that_cannot_be_loaded_says_why(tmp_path: Path) -> None:
    edm = inspect(write_sparse(tmp_path / "edm.safetensors", WHOLE["edm"][0]()))
    assert edm.pipeline == ""
    assert "EDM" in edm.obstacle
    depth = inspect(write_sparse(tmp_path / "depth.safetensors", WHOLE["sd2 depth"][0]()))
    assert "depth" in depth.obstacle


def test_a_damaged_model_says_what_is_missing(tmp_path: Path) -> None:
    shapes = layout.sd1()
    del shapes["first_stage_model.decoder.conv_in.weight"]
    shapes["model.diffusion_model.out.2.bias"] = (5,)
    report = inspect(write_sparse(tmp_path / "a.safetensors", shapes))
    assert "out.2" in report.obstacle or "conv_out.bias" in report.obstacle
    assert report.pipeline == ""
