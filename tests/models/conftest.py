"""A small network, and the language model that its checkpoints name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from flashu_compile.models.showo2.modeling import Showo2
from tests.support.checkpoints import base_tokenizer, llm_settings, network_of, small_config


@pytest.fixture(scope="module")
def network() -> Showo2:
    return network_of(small_config())


@pytest.fixture
def llm(tmp_path: Path) -> Path:
    """A local Qwen2 directory."""
    folder = tmp_path / "llm"
    folder.mkdir()
    base_tokenizer().save(str(folder / "tokenizer.json"))
    (folder / "config.json").write_text(json.dumps(llm_settings(small_config().llm)))
    return folder
