"""Models on the hub: what is fetched, by commit."""

from __future__ import annotations

import shutil
from pathlib import Path

import huggingface_hub
import pytest
import torch
from safetensors.torch import save_file

from flashu_compile.errors import CheckpointError
from flashu_compile.models import origins
from flashu_compile.models.loading import load_model
from flashu_compile.models.showo2.modeling import Showo2
from flashu_compile.models.vae import SpaceToDepth
from tests.support.checkpoints import (
    LAYOUTS,
    network_of,
    one_safetensors,
    publish,
    same_weights,
    small_config,
)


class FakeHub:
    """In place of the hub client's download: repositories with commits, and what was asked for and fetched."""

    def __init__(self, cache: Path) -> None:
        self.cache = cache
        self.commits: dict[tuple[str, str], Path] = {}
        self.branches: dict[tuple[str, str], str] = {}
        self.asked: list[tuple[str, str | None]] = []
        self.fetched: list[str] = []

    def publish(self, repository: str, commit: str, folder: Path, *branches: str) -> None:
        self.commits[repository, commit] = folder
        for branch in branches:
            self.branches[repository, branch] = commit

    def snapshot_download(
        self, repository: str, *, revision: str | None = None, allow_patterns: list[str]
    ) -> str:
        self.asked.append((repository, revision))
        named = revision or "main"
        commit = self.branches.get((repository, named), named)
        source, target = self.commits[repository, commit], self.cache / repository / "snapshots" / commit
        target.mkdir(parents=True, exist_ok=True)
        names = sorted(str(path.relative_to(source)) for path in source.rglob("*") if path.is_file())
        for name in huggingface_hub.utils.filter_repo_objects(names, allow_patterns=allow_patterns):
            (target / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(source / name, target / name)
            self.fetched.append(name)
        return str(target)


@pytest.fixture
def fake_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    made = FakeHub(tmp_path / "cache")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", made.snapshot_download)
    return made


COMMIT, OTHER_COMMIT = "a" * 40, "b" * 40


class TestHub:
    def test_a_model_and_its_language_model_s_small_files(
        self, tmp_path: Path, fake_hub: FakeHub, llm: Path, network: Showo2
    ) -> None:
        published = publish(tmp_path / "m", network, "Qwen/Qwen2.5-tiny", one_safetensors)
        (llm / "model.safetensors").write_bytes(b"never fetched")
        fake_hub.publish("showlab/show-o2-tiny", COMMIT, published, "main")
        fake_hub.publish("Qwen/Qwen2.5-tiny", OTHER_COMMIT, llm, "main")
        loaded = load_model("showlab/show-o2-tiny")
        assert loaded.name == "show-o2-tiny"
        assert same_weights(loaded.network, network)
        assert fake_hub.fetched == [
            "config.json",
            "diffusion_pytorch_model.safetensors",
            "tokenizer.json",
            "config.json",
        ]
        origin = loaded.origins["model"]
        assert (origin.repository, origin.revision) == ("showlab/show-o2-tiny", COMMIT)

    @pytest.mark.parametrize("revision", ["v2", OTHER_COMMIT])
    def test_a_revision_is_what_is_loaded_and_recorded(
        self, tmp_path: Path, fake_hub: FakeHub, llm: Path, network: Showo2, revision: str
    ) -> None:
        other = network_of(small_config())
        with torch.no_grad():
            other.showo.model.norm.weight += 1
        fake_hub.publish("showlab/tiny", COMMIT, publish(tmp_path / "one", network, llm), "main")
        fake_hub.publish("showlab/tiny", OTHER_COMMIT, publish(tmp_path / "two", other, llm), "v2")
        for hub_id, expected, commit in (
            ("showlab/tiny", network, COMMIT),
            (f"showlab/tiny@{revision}", other, OTHER_COMMIT),
        ):
            loaded = load_model(hub_id)
            assert loaded.name == "tiny"
            assert same_weights(loaded.network, expected)
            assert loaded.origins["model"].revision == commit

    @pytest.mark.parametrize(
        ("layouts", "fetched"),
        [
            (["one bin", "one safetensors"], {"diffusion_pytorch_model.safetensors"}),
            (
                ["bin shards, transformers index", "safetensors shards"],
                {"model.safetensors.index.json", *(f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3))},
            ),
            (["one bin"], {"pytorch_model.bin"}),
            (
                ["bin shards, diffusers index"],
                {
                    "diffusion_pytorch_model.bin.index.json",
                    *(f"pytorch_model-0000{i}-of-00003.bin" for i in (1, 2, 3)),
                },
            ),
        ],
    )
    def test_weights_come_in_one_format(
        self,
        tmp_path: Path,
        fake_hub: FakeHub,
        llm: Path,
        network: Showo2,
        layouts: list[str],
        fetched: set[str],
    ) -> None:
        folder = publish(tmp_path / "m", network, llm, LAYOUTS[layouts[0]])
        for layout in layouts[1:]:
            LAYOUTS[layout](folder, dict(network.state_dict()))
        fake_hub.publish("showlab/tiny", COMMIT, folder, "main")
        loaded = load_model("showlab/tiny")
        assert same_weights(loaded.network, network)
        assert set(fake_hub.fetched) == {"config.json"} | fetched
        # A branch may move between two downloads: the second one is of the first one's commit.
        assert [revision for _, revision in fake_hub.asked] in ([None], [None, COMMIT])
        files = loaded.origins["model"].files
        assert files is not None
        assert files.keys() == {name for name in fetched if not name.endswith(".json")} | {"config.json"}

    def test_safetensors_of_something_else_do_not_hide_the_pickles(
        self, tmp_path: Path, fake_hub: FakeHub, llm: Path, network: Showo2
    ) -> None:
        folder = publish(tmp_path / "m", network, llm)
        save_file({"a": torch.ones(1)}, folder / "adapter.safetensors")
        fake_hub.publish("showlab/tiny", COMMIT, folder, "main")
        assert same_weights(load_model("showlab/tiny").network, network)

    @pytest.mark.parametrize(
        ("files", "found", "fetched"),
        [
            (
                ["vae/config.json", "vae/model.safetensors", "transformer/model.safetensors"],
                "vae",
                ["vae/config.json", "vae/model.safetensors"],
            ),
            (["Wan2.1_VAE.pth", "diffusion_pytorch_model.safetensors"], "Wan2.1_VAE.pth", ["Wan2.1_VAE.pth"]),
            (
                ["config.json", "diffusion_pytorch_model.safetensors"],
                "",
                ["config.json", "config.json", "diffusion_pytorch_model.safetensors"],
            ),
        ],
    )
    def test_a_vae_by_its_hub_id(
        self, tmp_path: Path, fake_hub: FakeHub, files: list[str], found: str, fetched: list[str]
    ) -> None:
        for name in files:
            path = tmp_path / "repository" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text('{"_class_name": "AutoencoderKLWan", "license": "mit"}')
        fake_hub.publish("Wan-AI/Wan2.1", COMMIT, tmp_path / "repository", "main")
        path, snapshot = origins.fetched_vae("Wan-AI/Wan2.1")
        assert snapshot is not None
        assert path == snapshot.directory / found
        assert fake_hub.fetched == fetched
        origin = origins.vae_origin(path, origins.vae_files(path), snapshot)
        assert (origin.repository, origin.revision) == ("Wan-AI/Wan2.1", COMMIT)
        assert origin.license == (None if found.endswith(".pth") else "mit")

    def test_a_repository_without_a_vae(self, tmp_path: Path, fake_hub: FakeHub) -> None:
        folder = tmp_path / "repository"
        folder.mkdir()
        (folder / "config.json").write_text('{"_class_name": "WanTransformer3DModel"}')
        (folder / "model.safetensors").write_bytes(b"gigabytes")
        fake_hub.publish("Wan-AI/Wan2.1", COMMIT, folder, "main")
        with pytest.raises(CheckpointError, match=r"holds no VAE: no folder vae, no Wan2\.1_VAE\.pth"):
            load_model("showo2-shapes", vae="Wan-AI/Wan2.1")
        assert fake_hub.fetched == ["config.json"]

    def test_what_is_no_hub_id_of_a_vae(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        (tmp_path / "wan" / "vae").mkdir(parents=True)
        vae = SpaceToDepth(4)
        for given in ("wan/vae", "vae.pth", tmp_path, vae):
            assert origins.fetched_vae(given) == (given, None)
