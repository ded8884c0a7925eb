"""Where weights come from: hashes of files, licences, and files that change while they are used."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from examples.showo2_shapes.saving import save_model
from flashu_compile.bundle.manifest import Origin, file_entry
from flashu_compile.errors import CheckpointError
from flashu_compile.models import origins, weights
from flashu_compile.models.loading import load_model
from flashu_compile.models.showo2 import vocabulary
from flashu_compile.models.showo2.modeling import Showo2
from flashu_compile.models.vae import SpaceToDepth
from tests.support.checkpoints import LAYOUTS, base_tokenizer, network_of, publish, small_config


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


class TestOrigins:
    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_every_weight_file_with_its_hash(
        self, tmp_path: Path, llm: Path, network: Showo2, layout: str
    ) -> None:
        folder = publish(tmp_path / "m", network, llm, LAYOUTS[layout])
        (folder / "training_args.bin").write_bytes(b"not read")
        origin = load_model(folder).origins["model"]
        read = [p for p in folder.iterdir() if p.suffix in (".bin", ".safetensors")]
        expected = {p.name: _sha256(p) for p in read if p.name != "training_args.bin"}
        expected["config.json"] = _sha256(folder / "config.json")
        assert origin.files is not None
        assert {name: entry.sha256 for name, entry in origin.files.items()} == expected
        assert (origin.repository, origin.revision, origin.license) == (None, None, None)

    def test_own_layout_and_objects(self, tmp_path: Path) -> None:
        network, tokenizer = network_of(small_config(latent_channels=48)), vocabulary.extend(base_tokenizer())
        save_model(tmp_path, network, tokenizer, SpaceToDepth(4))
        loaded = load_model(tmp_path)
        read = {name: file_entry(tmp_path / name) for name in ("model.safetensors", "config.json")}
        assert loaded.origins == {"model": Origin(read)}
        given = load_model(network, tokenizer=tokenizer, vae=SpaceToDepth(4))
        assert given.origins == {"model": Origin(None), "vae": Origin(None)}

    @pytest.mark.parametrize(
        ("card", "settings", "license"),
        [
            ("---\nlanguage: en\nlicense: mit\n---\n# A model\n", {}, "mit"),
            ("\ufeff---\r\nlicense: apache-2.0\r\n---\r\n", {"license": "mit"}, "apache-2.0"),
            ("---\nlicense: other\nlicense_name: qwen-research\n---\n", {}, "qwen-research"),
            ("---\nlicense: other\n---\n", {}, "other"),
            ("---\nlicense:\n- mit\n- cc-by-4.0\n---\n", {}, "mit, cc-by-4.0"),
            ("---\ntags: []\n---\n", {"license": "mit"}, "mit"),
            ("# license: mit\n", {}, None),
            ("---\nlicense: 5\n---\n", {"license": {}}, None),
            (None, {"license": "mit"}, "mit"),
            (None, {}, None),
        ],
    )
    def test_license(
        self,
        tmp_path: Path,
        llm: Path,
        network: Showo2,
        card: str | None,
        settings: dict[str, Any],
        license: str | None,
    ) -> None:
        folder = publish(tmp_path / "m", network, llm, **settings)
        if card is not None:
            (folder / "README.md").write_bytes(card.encode())
        assert load_model(folder).origins["model"].license == license

    @pytest.mark.parametrize(
        "card",
        [
            b"---\nlicense: [\n---\n",
            b"---\n- a list\n---\n",
            b"---\nlicense: \xff\n---\n",
            b"---\nlicense: " + b"[" * 5000 + b"\n---\n",
            b"---\nlicense: mit\n---\n" + bytes(1 << 21),
        ],
        ids=["broken", "list", "not UTF-8", "deep", "large"],
    )
    def test_a_card_that_cannot_be_read_is_logged(
        self, tmp_path: Path, llm: Path, network: Showo2, card: bytes, caplog: pytest.LogCaptureFixture
    ) -> None:
        folder = publish(tmp_path / "m", network, llm)
        (folder / "README.md").write_bytes(card)
        assert load_model(folder).origins["model"].license is None
        assert "No licence is recorded" in caplog.text


def _flip(path: Path) -> None:
    """Write another last byte, of a tensor, in place."""
    with path.open("r+b") as file:
        file.seek(-1, 2)
        last = file.read(1)[0]
        file.seek(-1, 2)
        file.write(bytes([last ^ 1]))


def _exchange(path: Path) -> None:
    other = path.with_name("other")
    other.write_bytes(path.read_bytes())
    _flip(other)
    other.replace(path)


class TestChangedFiles:
    @pytest.mark.parametrize("change", [_flip, _exchange])
    @pytest.mark.parametrize("layout", ["one bin", "one safetensors", "safetensors shards"])
    def test_while_they_are_read(
        self,
        tmp_path: Path,
        llm: Path,
        network: Showo2,
        layout: str,
        change: Callable[[Path], None],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """Before they are read: hashes taken later would be of what was read; and between two shards."""
        folder = publish(tmp_path / "m", network, llm, LAYOUTS[layout])
        read = weights.read_weight_file

        def changed(path: Path, dtype: torch.dtype | None = None) -> dict[str, torch.Tensor]:
            change(path)
            return read(path, dtype)

        monkeypatch.setattr(weights, "read_weight_file", changed)
        with pytest.raises(CheckpointError, match="was replaced or written to while the model was in use"):
            load_model(folder)

    @pytest.mark.parametrize("change", [_flip, _exchange, Path.unlink])
    def test_after_they_were_read(
        self, tmp_path: Path, llm: Path, network: Showo2, change: Callable[[Path], None]
    ) -> None:
        loaded = load_model(publish(tmp_path / "m", network, llm, LAYOUTS["safetensors shards"]))
        (tmp_path / "backup").hardlink_to(loaded.sources[1].path)
        loaded.check_unchanged()
        assert len(loaded.sources) == 3 + 1  # the settings
        change(loaded.sources[1].path)
        with pytest.raises(CheckpointError, match=r"00002-of-00003.* was replaced or written to"):
            loaded.check_unchanged()

    def test_a_vae_given_by_its_path(self, tmp_path: Path, llm: Path, network: Showo2) -> None:
        """It is read once; its files are watched like the model's."""
        path = tmp_path / "vae.pth"
        torch.save({"a": torch.ones(3)}, path)
        (file,) = origins.vae_files(path)
        assert origins.vae_origin(path, (file,)).files == {"vae.pth": file_entry(path)}
        _flip(path)
        assert not file.is_unchanged()
        with pytest.raises(CheckpointError, match=r"Weight file .* does not exist"):
            origins.vae_files(tmp_path / "none.pth")
