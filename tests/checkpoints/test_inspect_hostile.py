"""Headers and configs that nobody meant: looking into them gives a report or one of our errors."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from russet.checkpoints.inspect import inspect
from russet.checkpoints.layouts.detection import recognise
from russet.checkpoints.single_file.load import single_file
from russet.checkpoints.single_file.prediction import read_sidecar
from russet.errors import CheckpointError, InputError, MissingFile, RussetError

from . import ldm_tiny
from .sparse import write_sparse

REAL = sorted(
    {name for family in ldm_tiny.UNETS for name in ldm_tiny.shapes(family)}
    | {"emb_params", "clip_l", "clip_g", "v_pred", "edm_mean", "lora_unet_x.lora_down.weight", "unet.x.lora_A.weight"}
    | {"x.hada_w1_b", "lora_te_.alpha", "conv_in.weight", "time_embedding.linear_1.weight", "control_model.x"}
)
SHAPES = st.lists(st.sampled_from([0, 1, 3, 4, 8, 9, 32, 768, 1024]), max_size=5).map(tuple)
HEADERS = st.dictionaries(st.sampled_from(REAL) | st.text(max_size=20), SHAPES, max_size=12)


@settings(max_examples=80, deadline=None)
@given(shapes=HEADERS)
def test_any_header_is_recognised_as_something(shapes: dict[str, tuple[int, ...]]) -> None:
    assert str(recognise(shapes))


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(shapes=HEADERS, metadata=st.dictionaries(st.text(max_size=30), st.text(max_size=30), max_size=3))
def test_any_header_gives_a_report_and_loads_or_is_refused(
    shapes: dict[str, tuple[int, ...]], metadata: dict[str, str], tmp_path: Path
) -> None:
    shapes = {name: shape for name, shape in shapes.items() if name != "__metadata__"}
    small = {name: shape if len(shape) < 4 else shape[:3] for name, shape in shapes.items()}
    path = write_sparse(tmp_path / "a.safetensors", small, metadata=metadata)
    with contextlib.suppress(RussetError):
        assert str(inspect(path))
    with pytest.raises(RussetError):
        single_file(path)


def test_a_report_does_not_act_on_the_terminal(tmp_path: Path) -> None:
    metadata = {"modelspec.title": "nice\x1b[2J\nmodel\u202e"}
    path = write_sparse(
        tmp_path / "a.safetensors", {"evil\x1b]0;x\x07": (1,), "lora_unet_x.alpha": ()}, metadata=metadata
    )
    text = str(inspect(path))
    assert all(char.isprintable() or char == "\n" for char in text)
    assert "nice" in text


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text(alphabet="ab:- []{}&*!|>'\"#\n\t%@?1.e", max_size=200) | st.binary(max_size=200))
def test_any_yaml_is_a_mapping_or_refused(text: str | bytes, tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    with contextlib.suppress(CheckpointError):
        assert isinstance(read_sidecar(path), dict)


@pytest.mark.parametrize(
    ("files", "error"),
    [
        ({}, MissingFile),
        ({"config.json": "[]"}, CheckpointError),
        ({"config.json": "{}"}, InputError),
        ({"config.json": '{"_class_name": 7, "architectures": 3}'}, InputError),
        ({"config.json": '{"_class_name": "AutoencoderKL"}'}, MissingFile),
        ({"model_index.json": '{"_class_name": "X"}'}, RussetError),
        ({"model_index.json": '{"_class_name": "X", "unet": ["diffusers", "UNet2DConditionModel"]}'}, MissingFile),
    ],
)
def test_a_folder_that_is_no_checkpoint_is_refused(
    files: dict[str, str], error: type[Exception], tmp_path: Path
) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(error):
        inspect(tmp_path)


@pytest.mark.parametrize("path", ["owner/name", "nowhere", 3, ""])
def test_what_is_not_on_this_machine_is_refused(path: object) -> None:
    with pytest.raises(RussetError):
        inspect(path)  # type: ignore[arg-type]


def test_folders_are_told_by_their_parts_and_variants(tiny_folder: Path, tmp_path: Path) -> None:
    report = inspect(tiny_folder)
    assert report.pipeline == "StableDiffusionPipeline"
    assert {"unet", "vae", "text_encoder", "safety_checker"} == {part.name for part in report.parts}
    assert all(part.precision == "float32" for part in report.parts)
    assert report.predicts.startswith("epsilon")
    config = json.loads((tiny_folder / "vae" / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config))
    weights = tiny_folder / "vae" / "diffusion_pytorch_model.safetensors"
    (tmp_path / "diffusion_pytorch_model.fp16.safetensors").write_bytes(weights.read_bytes())
    alone = inspect(tmp_path)
    assert (alone.kind.form, alone.parts[0].name, alone.parts[0].variants) == ("vae", "AutoencoderKL", ("fp16",))
    assert "variants fp16" in str(alone)
