"""Random weights, and a Hub on the loopback address."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from .hub_server import HubServer
from .made import Tiny


@pytest.fixture
def tiny_state() -> dict[str, torch.Tensor]:
    """Random weights for ``Tiny``."""
    torch.manual_seed(0)
    return {name: torch.randn(value.shape) for name, value in Tiny().state_dict().items()}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """A Hub of one's own, which huggingface_hub takes for the real one, with an empty cache."""
    import huggingface_hub.constants as constants
    import huggingface_hub.utils

    with HubServer() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        huggingface_hub.utils.disable_progress_bars()
        yield server
