"""LoRA files: which tool wrote them, how large they are, and whether every key is understood."""

from __future__ import annotations

from pathlib import Path

import pytest

from russet.checkpoints.inspect import inspect
from russet.checkpoints.layouts.detection import recognise

from .sparse import write_sparse

Shapes = dict[str, tuple[int, ...]]
ATTN = "down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"


def kohya(layer: str, width: int, out: int, rank: int = 16) -> Shapes:
    return {f"{layer}.lora_down.weight": (rank, width), f"{layer}.lora_up.weight": (out, rank), f"{layer}.alpha": ()}


def peft(layer: str, width: int, out: int, rank: int = 8) -> Shapes:
    return {f"{layer}.lora_A.weight": (rank, width), f"{layer}.lora_B.weight": (out, rank)}


SD1_KOHYA = kohya(f"lora_unet_{ATTN}", 768, 320) | kohya(
    "lora_te_text_model_encoder_layers_0_self_attn_q_proj", 768, 768
)
SD2_KOHYA = kohya(f"lora_unet_{ATTN}", 1024, 320) | kohya("lora_te_text_model_encoder_layers_22_mlp_fc1", 1024, 4096)
XL_LDM = (
    kohya("lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k", 2048, 640, 32)
    | kohya("lora_unet_middle_block_1_proj_in", 1280, 1280, 32)
    | kohya("lora_te1_text_model_encoder_layers_0_self_attn_q_proj", 768, 768, 32)
    | kohya("lora_te2_text_model_encoder_layers_31_mlp_fc2", 5120, 1280, 32)
)
XL_PEFT = peft("unet.down_blocks.2.attentions.1.transformer_blocks.9.attn2.to_v", 2048, 1280) | peft(
    "text_encoder_2.text_model.encoder.layers.3.self_attn.k_proj", 1280, 1280
)
PROCESSORS: Shapes = {
    "unet.mid_block.attentions.0.transformer_blocks.0.attn2.processor.to_k_lora.down.weight": (4, 768),
    "unet.mid_block.attentions.0.transformer_blocks.0.attn2.processor.to_k_lora.up.weight": (1280, 4),
    "unet.mid_block.attentions.0.transformer_blocks.0.attn2.processor.to_out_lora.down.weight": (4, 1280),
    "unet.mid_block.attentions.0.transformer_blocks.0.attn2.processor.to_out_lora.up.weight": (1280, 4),
    "text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_linear_layer.down.weight": (4, 768),
    "text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_linear_layer.up.weight": (768, 4),
}
LOCON = SD1_KOHYA | {
    "lora_unet_down_blocks_0_resnets_0_conv1.lora_down.weight": (4, 320, 3, 3),
    "lora_unet_down_blocks_0_resnets_0_conv1.lora_up.weight": (320, 4, 1, 1),
}
TUCKER = SD1_KOHYA | {"lora_unet_down_blocks_0_resnets_0_conv1.lora_mid.weight": (4, 4, 3, 3)}
LOHA: Shapes = {
    f"lora_unet_{ATTN}.hada_w1_a": (320, 8),
    f"lora_unet_{ATTN}.hada_w1_b": (8, 768),
    f"lora_unet_{ATTN}.hada_w2_a": (320, 8),
    f"lora_unet_{ATTN}.hada_w2_b": (8, 768),
}
LOKR: Shapes = {
    f"lora_unet_{ATTN}.lokr_w1": (16, 16),
    f"lora_unet_{ATTN}.lokr_w2_a": (20, 4),
    f"lora_unet_{ATTN}.lokr_w2_b": (4, 48),
}
DORA = SD1_KOHYA | {f"lora_unet_{ATTN}.dora_scale": (320, 1)}

FILES = {
    "kohya SD1": (SD1_KOHYA, "LoRA", "sd1", "kohya", (16,)),
    "kohya SD2": (SD2_KOHYA, "LoRA", "sd2", "kohya", (16,)),
    "kohya XL": (XL_LDM, "LoRA", "sdxl", "kohya", (32,)),
    "PEFT XL": (XL_PEFT, "LoRA", "sdxl", "PEFT", (8,)),
    "attention processors": (PROCESSORS, "LoRA", "sd1", "Diffusers", (4,)),
    "LoCon": (LOCON, "LoCon", "sd1", "kohya", (4, 16)),
    "LoCon with a core": (TUCKER, "LoCon", "sd1", "kohya", (16,)),
    "LoHa": (LOHA, "LoHa", "sd1", "kohya", (8,)),
    "DoRA": (DORA, "DoRA", "sd1", "kohya", (16,)),
}


@pytest.mark.parametrize("name", FILES)
def test_a_lora_is_recognised_whatever_wrote_it(name: str, tmp_path: Path) -> None:
    shapes, method, family, layout, ranks = FILES[name]
    report = inspect(write_sparse(tmp_path / "lora.safetensors", shapes))
    assert (report.kind.form, report.kind.detail, report.kind.family, report.kind.layout) == (
        *("lora", method, family, layout),
    )
    assert report.lora is not None
    assert report.lora.ranks == ranks
    assert report.lora.unknown == ()
    assert "all understood" in str(report)


def test_a_lora_that_does_not_tell_its_base_says_so(tmp_path: Path) -> None:
    report = inspect(write_sparse(tmp_path / "lora.safetensors", LOKR))
    assert (report.kind.detail, report.kind.family) == ("LoKr", "")
    assert report.lora is not None
    assert report.lora.unknown is None
    assert "cannot be told" in str(report)


def test_keys_that_belong_to_no_layer_are_listed(tmp_path: Path) -> None:
    odd = kohya("lora_unet_down_blocks_9_attentions_0_proj_in", 320, 320) | {"lora_unet_mystery": (1,)}
    report = inspect(write_sparse(tmp_path / "lora.safetensors", SD1_KOHYA | odd))
    assert report.lora is not None
    assert report.lora.unknown == ("lora_unet_mystery", "unet: down_blocks_9_attentions_0_proj_in")
    assert "down_blocks_9" in str(report)


def test_the_layers_it_changes_are_counted_and_its_metadata_told(tmp_path: Path) -> None:
    metadata = {"ss_base_model_version": "sdxl_base_v1-0", "ss_network_alpha": "16", "ss_tag_frequency": "{}"}
    report = inspect(write_sparse(tmp_path / "lora.safetensors", XL_LDM, metadata=metadata))
    assert report.lora is not None
    assert dict(report.lora.layers) == {"unet": 2, "text_encoder": 1, "text_encoder_2": 1}
    assert ("made for", "sdxl_base_v1-0") in list(report.rows())


@pytest.mark.parametrize(
    ("layer", "family"),
    [("lora_te_text_model_encoder_layers_0_self_attn_q_proj", "sd1"), ("lora_unet_mid_block_attentions_0_proj_in", "")],
)
def test_a_lora_of_few_layers_is_told_by_what_is_left(layer: str, family: str) -> None:
    assert recognise(kohya(layer, 768, 768)).family == family
