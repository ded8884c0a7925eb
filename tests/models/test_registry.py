"""Adapters of other packages: found by entry points, told apart, and named where they are at fault."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from flashu_compile import cli
from flashu_compile.bundle.settings import GenerationSettings, Template
from flashu_compile.compiler.captured import CapturedModel
from flashu_compile.compiler.progress import ProgressReporter
from flashu_compile.errors import ConfigurationError, UnknownTaskError, UnsupportedModelError
from flashu_compile.models.loading import load_model
from flashu_compile.models.reducing import depths, place_in_copy, with_layers
from flashu_compile.models.registry import adapters

SOURCE = """
from flashu_compile.models.adapter import LoadedModel, ModelAdapter


class {adapter}(ModelAdapter):
    name, title, tasks, options = "{name}", "models with a trunk", ("sing",), {{"voice": "how high"}}

    def recognise(self, config, names):
        return config.get("kind") == "trunk" or "trunk.0.weight" in names

    def load(self, source, options, dtype):
        name = f"{{source.name}}, {{options.get('voice')}}"
        return LoadedModel(name, source.module, None, None, adapter=self)

    captures = settings = eager = lambda *_: None
    stacks = lambda *_: {{"trunk": "trunk"}}
"""
Install = Callable[..., None]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """Put a package with an adapter on the path, as an installer leaves it."""

    def install(package: str, name: str, adapter: str = "Adapter", place: str | None = None) -> None:
        folder = tmp_path / package
        (folder / f"{package}-1.0.dist-info").mkdir(parents=True)
        (folder / f"{package}.py").write_text(SOURCE.format(name=name, adapter=adapter))
        told = folder / f"{package}-1.0.dist-info"
        (told / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
        place = place or f"{package}:{adapter}"
        (told / "entry_points.txt").write_text(f"[flashu_compile.models]\n{name} = {place}\n")
        monkeypatch.syspath_prepend(str(folder))
        sys.modules.pop(package, None)  # that of an earlier test

    return install


class Trunk(nn.Module):
    def __init__(self, layers: int = 3) -> None:
        super().__init__()
        self.trunk = nn.ModuleList(nn.Linear(2, 2) for _ in range(layers))


def test_our_own_are_always_there() -> None:
    assert "showo2" in [adapter.name for adapter in adapters()]


def test_an_adapter_of_another_package_is_found(install: Install) -> None:
    install("invented_family", "invented")
    assert "invented" in [adapter.name for adapter in adapters()]
    loaded = load_model(Trunk(), model_options={"voice": "low"})
    assert (loaded.name, loaded.adapter.name) == ("Trunk, low", "invented")
    with pytest.raises(UnknownTaskError, match=r"of invented, has no task 't2i'; it has: sing\."):
        CapturedModel.from_loaded(loaded, ["t2i"], ProgressReporter(None))


def test_a_directory_is_told_by_its_configuration(install: Install, tmp_path: Path) -> None:
    install("invented_family", "invented")
    (tmp_path / "config.json").write_text(json.dumps({"kind": "trunk"}))
    assert load_model(tmp_path).adapter.name == "invented"


def test_the_command_lists_it(install: Install) -> None:
    install("invented_family", "invented")
    listed = CliRunner().invoke(cli.app, ["models", "--json"])
    assert listed.exit_code == 0
    told = {family["name"]: family for family in json.loads(listed.stdout)}
    assert told["invented"]["options"] == {"voice": "how high"}
    assert told["showo2"]["tasks"] == ["t2i", "mmu"]
    table = CliRunner().invoke(cli.app, ["models"], env={"COLUMNS": "200"}).stdout
    assert "models with a trunk" in table


def test_two_that_claim_a_model_are_both_named(install: Install) -> None:
    install("invented_family", "invented")
    install("other_family", "other")
    with pytest.raises(UnsupportedModelError, match="Several adapters claim a Trunk: invented, other"):
        load_model(Trunk())


def test_a_model_that_none_claims_is_told_which_there_are(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(
        UnsupportedModelError, match=rf"No adapter knows {tmp_path}; there are: .*showo2 \(Show-o2"
    ):
        load_model(tmp_path)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {
                "model_type": "multi_modality",
                "architectures": ["MultiModalityCausalLM"],
                "gen_vision_config": {},
            },
            r"of janus .* such as deepseek-community/Janus-Pro-1B, instead\.",
        ),
        (
            {"model_type": "Emu3", "architectures": ["Emu3ForCausalLM"]},
            r"of emu3 .* such as BAAI/Emu3-Chat-hf or BAAI/Emu3-Gen-hf, instead\.",
        ),
        *(
            (
                {"model_type": kind, "architectures": [architecture]},
                r"of llava .* such as llava-hf/llava-1\.5-7b-hf, instead\.",
            )
            for kind, architecture in (
                ("llava_llama", "LlavaLlamaForCausalLM"),
                ("llava", "LlavaLlamaForCausalLM"),
                ("llava_qwen", "LlavaQwenForCausalLM"),
            )
        ),
    ],
)
def test_a_layout_that_is_not_read_is_told_what_to_give_instead(
    config: dict[str, Any], message: str, tmp_path: Path
) -> None:
    assert not [adapter.name for adapter in adapters() if adapter.recognise(config, ())]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedModelError, match=rf"^{tmp_path} is a model {message}$"):
        load_model(tmp_path)


@pytest.mark.parametrize(
    "config",
    [
        {"model_type": "multi_modality", "architectures": ["MultiModalityCausalLM"], "aligner_config": {}},
        {"model_type": ["llava_llama"], "architectures": [["LlavaLlamaForCausalLM"]]},
        {"architectures": "LlavaLlamaForCausalLM"},
    ],
)
def test_others_of_such_names_are_told_which_adapters_there_are(
    config: dict[str, Any], tmp_path: Path
) -> None:
    """The first is DeepSeek-VL, which shares the names of Janus."""
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedModelError, match="No adapter knows"):
        load_model(tmp_path)


def test_what_is_read_is_not_told_of_other_layouts() -> None:
    known = {adapter.name: adapter for adapter in adapters()}
    for name in ("emu3", "janus", "llava"):
        adapter: Any = known[name]
        config = {"model_type": adapter.model_type, "architectures": [adapter.architecture]}
        assert not [one.name for one in known.values() if one.instead(config, ())]


def test_two_of_one_name_are_an_error_that_names_their_packages(install: Install) -> None:
    install("invented_family", "showo2")
    with pytest.raises(ConfigurationError, match=r"'showo2': .* of flashu-compile and .* of invented_family"):
        adapters()


@pytest.mark.parametrize(
    ("place", "message"),
    [
        (
            "absent_module:Adapter",
            "absent_module:Adapter of broken_family cannot be loaded .ModuleNotFoundError",
        ),
        ("json:loads", "json:loads of broken_family is no ModelAdapter"),
        ("flashu_compile.models.adapter:ModelAdapter", "cannot be loaded .TypeError"),
    ],
)
def test_one_that_cannot_be_loaded_is_named(install: Install, place: str, message: str) -> None:
    install("broken_family", "broken", place=place)
    with pytest.raises(ConfigurationError, match=message):
        adapters()


@pytest.mark.parametrize("method", ["recognise", "instead"])
def test_one_that_fails_when_it_is_asked_is_named(
    install: Install, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    install("broken_family", "broken")
    assert "broken" in [adapter.name for adapter in adapters()]

    def asked(adapter: Any, config: Any, names: Any) -> Any:
        return config["absent"]

    monkeypatch.setattr(sys.modules["broken_family"].Adapter, method, asked)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(
        ConfigurationError,
        match=rf"The adapter broken_family:Adapter of broken_family fails when it is asked about {tmp_path} "
        r"\(KeyError: 'absent'\); repair or uninstall it\.",
    ):
        load_model(tmp_path)


def test_options_are_those_of_the_adapter(install: Install) -> None:
    install("invented_family", "invented")
    with pytest.raises(
        ConfigurationError, match=r"vae does not apply to a Trunk, .* of invented, which takes voice"
    ):
        load_model(Trunk(), vae="a path")
    with pytest.raises(ConfigurationError, match="vae is given twice"):
        load_model(Trunk(), vae="a path", model_options={"vae": "another"})


def test_a_family_of_one_size_is_given_no_other(install: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    install("invented_family", "invented")
    with pytest.raises(
        ConfigurationError, match=r"resolution does not apply to Trunk.*, which draws none; leave"
    ):
        load_model(Trunk(), resolution=8)
    family = type(load_model(Trunk()).adapter)
    sizes = GenerationSettings((1, 2, 4), 16, 8, 1, (16, 8), Template(after=(1,), picture=1), 0)
    monkeypatch.setattr(family, "tasks", ("t2i",))
    monkeypatch.setattr(family, "settings", lambda *_: sizes)
    assert load_model(Trunk(), resolution="16x8").adapter.name == "invented"
    with pytest.raises(ConfigurationError, match="whose pictures have 16x8 pixels"):
        load_model(Trunk(), model_options={"resolution": 8})


def test_a_copy_has_some_layers_and_the_model_keeps_all() -> None:
    model = nn.ModuleDict({"body": Trunk(4)})
    roots = {"trunk": "body.trunk"}
    small = with_layers(model, roots, {"trunk": (0, 3)})
    assert (depths(model, roots), depths(small, roots)) == ({"trunk": 4}, {"trunk": 2})
    theirs, ours = model.state_dict(), small.state_dict()
    for name, tensor in theirs.items():
        place = place_in_copy(name, roots, {"trunk": (0, 3)})
        assert (place is None) == (name.split(".")[2] in "12")
        assert place is None or ours[place].data_ptr() == tensor.data_ptr()
    assert torch.equal(small["body"].trunk[1].weight, model["body"].trunk[3].weight)
