from __future__ import annotations

import pytest

from russet.checkpoints.weight_names import belongs, choose, variants

DIFFUSERS = {"safetensors": "diffusion_pytorch_model", "bin": "diffusion_pytorch_model"}
TRANSFORMERS = {"safetensors": "model", "bin": "pytorch_model"}
ALL = {
    "diffusion_pytorch_model.safetensors",
    "diffusion_pytorch_model.bin",
    "diffusion_pytorch_model.fp16.safetensors",
    "diffusion_pytorch_model.fp16.bin",
    "diffusion_pytorch_model.non_ema.safetensors",
    "config.json",
}


@pytest.mark.parametrize(
    ("variant", "use_safetensors", "expected"),
    [
        (None, None, "diffusion_pytorch_model.safetensors"),
        (None, False, "diffusion_pytorch_model.bin"),
        ("fp16", None, "diffusion_pytorch_model.fp16.safetensors"),
        ("fp16", False, "diffusion_pytorch_model.fp16.bin"),
        ("non_ema", True, "diffusion_pytorch_model.non_ema.safetensors"),
        ("non_ema", False, "diffusion_pytorch_model.bin"),  # falls back, for the caller to report
        ("ema", None, "diffusion_pytorch_model.safetensors"),
    ],
)
def test_the_right_file_is_chosen(variant: str | None, use_safetensors: bool | None, expected: str) -> None:
    choice = choose(ALL, DIFFUSERS, variant, use_safetensors)
    assert choice is not None
    assert (choice.first, choice.files, choice.sharded) == (expected, (expected,), False)
    assert (choice.variant == variant) == (variant is None or variant in expected)


def test_the_variant_comes_before_safetensors() -> None:
    choice = choose({"model.safetensors", "pytorch_model.fp16.bin"}, TRANSFORMERS, "fp16", None)
    assert choice is not None
    assert choice.first == "pytorch_model.fp16.bin"


SHARDED = {
    "plain": (None, "model.safetensors.index.json", "model-0000{}-of-00002.safetensors"),
    "a variant": ("fp16", "model.safetensors.index.fp16.json", "model.fp16-0000{}-of-00002.safetensors"),
    "a variant of old": ("fp16", "model.safetensors.index.fp16.json", "model-0000{}-of-00002.fp16.safetensors"),
    "an index of old": ("fp16", "model.safetensors.fp16.index.json", "model.fp16-0000{}-of-00002.safetensors"),
    "pickles": (None, "pytorch_model.bin.index.json", "pytorch_model-0000{}-of-00002.bin"),
}


@pytest.mark.parametrize("what", SHARDED)
def test_shards_are_found_under_every_spelling(what: str) -> None:
    variant, index, shard = SHARDED[what]
    names = {index, shard.format(1), shard.format(2)}
    choice = choose({*names, "other-00001-of-00002.safetensors", "config.json"}, TRANSFORMERS, variant, None)
    assert choice is not None
    assert choice.sharded
    assert choice.first == index
    assert set(choice.files) == names
    assert choice.variant == variant


def test_plain_shards_are_not_taken_for_those_of_a_variant() -> None:
    names = {
        "model.safetensors.index.json",
        "model-00001-of-00001.safetensors",
        "model.fp16-00001-of-00001.safetensors",
    }
    choice = choose(names, TRANSFORMERS, None, None)
    assert choice is not None
    assert choice.files == ("model.safetensors.index.json", "model-00001-of-00001.safetensors")


@pytest.mark.parametrize(
    "names", [set(), {"config.json"}, {"model-00001-of-00002.safetensors"}, {"x/model.safetensors"}]
)
def test_nothing_is_chosen_where_there_is_nothing(names: set[str]) -> None:
    assert choose(names, TRANSFORMERS, None, None) is None


def test_variants_are_listed_of_whole_files_and_of_shards() -> None:
    assert variants(ALL, DIFFUSERS) == {"fp16", "non_ema"}
    assert variants({"model.bf16-00001-of-00002.safetensors"}, TRANSFORMERS) == {"bf16"}
    assert variants({"model-00001-of-00002.fp16.safetensors"}, TRANSFORMERS) == {"fp16"}
    assert variants({"model.safetensors", "model.fp16.onnx"}, TRANSFORMERS) == frozenset()


def test_what_belongs_to_a_save_is_told_from_what_does_not() -> None:
    mine = {
        "model.safetensors",
        "pytorch_model.bin",
        "model-00001-of-00003.safetensors",
        "model.safetensors.index.json",
    }
    other = {"model.fp16.safetensors", "config.json", "mymodel.safetensors", "model.safetensors.index.fp16.json"}
    assert {name for name in mine | other if belongs(name, TRANSFORMERS, None)} == mine
    assert belongs("model.safetensors.index.fp16.json", TRANSFORMERS, "fp16")
