"""Recipes as JSON and as files."""

from __future__ import annotations

import copy
import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from flashu_compile.errors import RecipeError
from flashu_compile.recipe.config import MMUConfig, T2IConfig
from flashu_compile.recipe.decisions import Decisions, Phase
from flashu_compile.recipe.presets import PRESETS, preset
from flashu_compile.recipe.recipe import Recipe
from tests.recipe.test_recipe import RECIPE

neurons = st.sets(st.integers(0, 300), min_size=1).map(sorted).map(np.array)
blocks = st.dictionaries(st.integers(0, 40), neurons, max_size=3)
layers = st.sets(st.integers(0, 30)).map(tuple)


class TestJson:
    @pytest.mark.parametrize("name", PRESETS)
    def test_presets_come_back(self, name: str) -> None:
        assert Recipe.from_json(preset(name).to_json()) == preset(name)

    def test_all_but_the_neurons_comes_back(self) -> None:
        back = Recipe.from_json(RECIPE.to_json())
        assert back.to_json() == RECIPE.to_json()
        assert back.decisions["t2i"].kept_widths == RECIPE.decisions["t2i"].kept_widths
        assert back.decisions["mmu"].phases == (Phase(0, {"llm": (2, 7)}),)
        assert not back.decisions["mmu"].complete

    def test_a_recipe_by_hand(self) -> None:
        text = """{"schema": 3, "name": "mine", "t2i": {"points": 20, "guidance": [[0, null], [0.3, 1]]},
                   "decisions": {"mmu": {"phases": [{"start": 0, "skipped": [5, 4]}]}}}"""
        assert Recipe.from_json(text) == Recipe(
            "mine",
            T2IConfig(20, guidance=((0, None), (0.3, 1))),
            decisions={"mmu": Decisions(phases=(Phase(0, {"llm": (4, 5)}),))},
            decoder="llm",
        )

    def test_one_of_an_older_version_keeps_its_plan(self) -> None:
        old = Recipe.from_json('{"schema": 2, "name": "x", "t2i": {"points": 9, "head_cache": 4}}')
        assert old.t2i == T2IConfig(9, head_cache=4, as_published=True)
        assert not Recipe.from_json('{"schema": 2, "name": "exact"}').t2i.is_lossy(None)
        assert Recipe.from_json(old.to_json()) == old

    def test_the_docstring_s_example(self) -> None:
        import flashu_compile.recipe.recipe as module

        example = (module.__doc__ or "").strip().splitlines()[-1]
        assert Recipe.from_json(example).mmu == MMUConfig(token_pruning=0.5)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"schema": 1}, "has schema 1; this version reads 2, 3 and 4"),
            ({"schema": None}, "no schema"),
            ({"schema": "2"}, "has schema '2'"),
            ({"schema": 3.0}, "has schema 3.0"),
            ({"name": 4}, "expected str, got int at \\$.name"),
            ({"title": 4}, "no field 'title' in .*, only name, decoder, t2i, mmu, text, decisions"),
            ({"t2i": []}, "expected object, got array at \\$.t2i"),
            ({"t2i": {"tau": 11}}, "'t2i' is not valid: there is no field 'tau'"),
            ({"t2i": {"points": "35"}}, "'t2i' .* expected int | null, got str at \\$.points"),
            ({"mmu": {"token_pruning": True}}, "'mmu' .* expected float, got bool at \\$.token_pruning"),
            ({"mmu": {"points": 4}}, "'mmu' is not valid: there is no field 'points'"),
            ({"decisions": None}, "expected object, got null at \\$.decisions"),
            ({"decisions": {"tts": {}}}, "not 'tts'"),
            ({"decisions": {"t2i": {"layers": []}}}, "'decisions', 't2i' .* no field 'layers'"),
            ({"decisions": {"t2i": {"phases": {}}}}, "expected array, got object at \\$.phases"),
            ({"decisions": {"t2i": {"phases": [3]}}}, "expected object, got int at \\$.phases"),
            ({"decisions": {"t2i": {"phases": [{}]}}}, "missing required field start at \\$.phases"),
            ({"decisions": {"t2i": {"phases": [{"start": 0, "skip": []}]}}}, "no field 'skip' in \\$.phases"),
            ({"decisions": {"t2i": {"phases": [{"start": "0"}]}}}, "expected float, got str at \\$.phases"),
            (
                {"decisions": {"t2i": {"phases": [{"start": 0, "skipped": "1"}]}}},
                "expected array, got str at \\$.phases",
            ),
            ({"decisions": {"t2i": {"kept_widths": 3}}}, "expected object, got int at \\$.kept_widths"),
            (
                {"decisions": {"t2i": {"kept_widths": {"llm": [1]}}}},
                "expected object, got array at \\$.kept_widths",
            ),
            (
                {"decisions": {"t2i": {"kept_widths": {"llm": {"a": 1}}}}},
                "expected int, got str at key in \\$.kept_widths",
            ),
            (
                {"decisions": {"t2i": {"kept_widths": {"llm": {"0": 0}}}}},
                "keeps must be an integer from 1 .*, not 0",
            ),
            (
                {"decisions": {"t2i": {"kept_widths": {"llm": {"0": 1.0}}}}},
                "expected int, got float at \\$.kept_widths",
            ),
            (
                {"decisions": {"t2i": {"kept_widths": {"llm": {"0": 10**18}}}}},
                "must be an integer .*, not 1000",
            ),
            (
                {"decisions": {"t2i": {"kept_widths": {"llm": {"9" * 5000: 1}}}}},
                "out of range at key in \\$.kept_widths",
            ),
            ({"t2i": {"points": 10**30}}, "has more than 64 bits"),
            ({"t2i": {"points": 10**18}}, "'t2i' .* points must be an integer from 2 to 1,000"),
            ({"t2i": {"guidance": [[k / 2000, 1] for k in range(1001)]}}, "guidance has 1,001 entries"),
            ({"decisions": {"t2i": {"phases": [{"start": k / 2000} for k in range(1001)]}}}, "1,001 phases"),
        ],
    )
    def test_mistakes_are_named(self, change: dict[str, Any], message: str) -> None:
        data = {k: v for k, v in {"schema": 3, "name": "x", **change}.items() if (k, v) != ("schema", None)}
        with pytest.raises(RecipeError, match=message):
            Recipe.from_json(json.dumps(data))

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("", "no strict JSON"),
            ("[]", "no schema"),
            ('{"schema": 3}', "missing required field name"),
            ('{"schema": 3, "name": "x", "name": "y"}', "'name' is there twice"),
            ('{"schema": 3, "name": "x", "t2i": {"points": NaN}}', "'NaN' is not finite"),
            ("[" * 100_000, "more than 100 levels"),
        ],
    )
    def test_malformed_text(self, text: str, message: str) -> None:
        with pytest.raises(RecipeError, match=message):
            Recipe.from_json(text)


class TestFiles:
    @settings(max_examples=30, deadline=None)
    @given(
        t2i=st.dictionaries(st.sampled_from(["llm", "semantic", "head"]), blocks),
        mmu=st.dictionaries(st.sampled_from(["llm", "semantic"]), blocks),
        starts=st.sets(st.floats(0, 1, exclude_min=True, exclude_max=True), max_size=4).map(sorted),
        skipped=layers,
    )
    def test_what_is_saved_comes_back(
        self,
        tmp_path_factory: pytest.TempPathFactory,
        t2i: dict,
        mmu: dict,
        starts: list[float],
        skipped: tuple[int, ...],
    ) -> None:
        phases = tuple(Phase(start, {"llm": skipped}) for start in (0.0, *starts))
        recipe = Recipe("any", decisions={"t2i": Decisions(t2i, phases), "mmu": Decisions(mmu)})
        directory = tmp_path_factory.mktemp("recipe")
        recipe.save(directory)
        assert Recipe.load(directory) == recipe

    def test_a_directory_or_a_json_file(self, tmp_path: Path) -> None:
        assert RECIPE.save(tmp_path / "new" / "folder") == tmp_path / "new" / "folder" / "recipe.json"
        assert RECIPE.save(tmp_path / "mine.json") == tmp_path / "mine.json"
        names = sorted(p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*.*"))
        assert names == [
            "mine.json",
            "mine.safetensors",
            "new/folder/recipe.json",
            "new/folder/recipe.safetensors",
        ]
        for path in ("mine.json", "new/folder", "new/folder/recipe.json"):
            assert Recipe.load(str(tmp_path / path)) == RECIPE

    def test_json_alone_where_no_neurons_are_kept(self, tmp_path: Path) -> None:
        RECIPE.save(tmp_path)
        preset("flashu").save(tmp_path)
        assert [p.name for p in tmp_path.iterdir()] == ["recipe.json"]
        assert Recipe.load(tmp_path) == preset("flashu")

    def test_the_same_recipe_gives_the_same_bytes(self, tmp_path: Path) -> None:
        RECIPE.save(tmp_path / "a")
        copy.deepcopy(RECIPE).save(tmp_path / "b")
        for name in ("recipe.json", "recipe.safetensors"):
            assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()

    def test_neurons_that_were_not_read_cannot_be_saved(self, tmp_path: Path) -> None:
        with pytest.raises(RecipeError, match="keeps for mmu were not read"):
            Recipe.from_json(RECIPE.to_json()).save(tmp_path)
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize("broken", ["recipe.json", "recipe.safetensors"])
    def test_a_failed_write_leaves_what_was_there(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str
    ) -> None:
        RECIPE.save(tmp_path)
        write = Path.write_bytes, Path.write_text

        def full(self: Path, *arguments: Any, **options: Any) -> int:
            if self.name.startswith(broken):
                self.touch()
                raise OSError("no space left")
            return write[isinstance(arguments[0], str)](self, *arguments, **options)

        monkeypatch.setattr(Path, "write_bytes", full)
        monkeypatch.setattr(Path, "write_text", full)
        with pytest.raises(RecipeError, match=r"could not be written to .*recipe\.json: no space left"):
            dataclasses.replace(RECIPE, name="new").save(tmp_path)
        assert sorted(p.name for p in tmp_path.iterdir()) == ["recipe.json", "recipe.safetensors"]
        assert Recipe.load(tmp_path) == RECIPE

    def test_a_write_cut_short_between_the_files_leaves_no_mixture(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        RECIPE.save(tmp_path)

        def killed(*paths: Path) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr("os.replace", killed)
        with pytest.raises(KeyboardInterrupt):
            RECIPE.save(tmp_path)
        with pytest.raises(RecipeError, match="There is no recipe at"):
            Recipe.load(tmp_path)

    def test_other_tensors_are_not_replaced(self, tmp_path: Path) -> None:
        save_file({"weight": np.ones(3)}, tmp_path / "model.safetensors")
        (tmp_path / "noise.safetensors").write_bytes(b"?")
        for name in ("model", "noise"):
            with pytest.raises(RecipeError, match=rf"{name}\.safetensors is not part of a recipe"):
                RECIPE.save(tmp_path / f"{name}.json")
        assert len(list(tmp_path.iterdir())) == 2

    def test_nothing_there(self, tmp_path: Path) -> None:
        with pytest.raises(RecipeError, match=r"There is no recipe at .*absent/recipe\.json"):
            Recipe.load(tmp_path / "absent")
        (tmp_path / "recipe.json").mkdir()
        with pytest.raises(RecipeError, match="is not a file"):
            Recipe.load(tmp_path)

    def test_mistakes_name_the_file(self, tmp_path: Path) -> None:
        (tmp_path / "recipe.json").write_text("{}")
        with pytest.raises(RecipeError, match=r"recipe\.json: The recipe has no schema"):
            Recipe.load(tmp_path)
        (tmp_path / "recipe.json").write_bytes(b"\xff")
        with pytest.raises(RecipeError, match=r"recipe\.json: .* no strict JSON"):
            Recipe.load(tmp_path)

    def test_neurons_that_are_missing_damaged_or_another_s(self, tmp_path: Path) -> None:
        RECIPE.save(tmp_path)
        path = tmp_path / "recipe.safetensors"
        tensors = load_file(path)
        name = "t2i/llm/3"
        for change, message in [
            ({}, "no neurons for block 3 of stack 'llm' in the task t2i"),
            ({name: tensors[name][:2]}, "widths {0: 1, 3: 2}, but the recipe says {0: 1, 3: 3}"),
            ({name: tensors[name][::-1].copy()}, "must rise"),
            ({name: tensors[name], "t2i/llm/9": tensors[name]}, "it has t2i/llm/9, of which"),
        ]:
            save_file({k: v for k, v in tensors.items() if k != name} | change, path)
            with pytest.raises(RecipeError, match=f"does not belong to recipe.json: .*{message}"):
                Recipe.load(tmp_path)
        path.write_bytes(b"no tensors")
        with pytest.raises(RecipeError, match=r"recipe\.safetensors cannot be read"):
            Recipe.load(tmp_path)
        path.unlink()
        with pytest.raises(RecipeError, match=r"recipe\.safetensors is missing; it holds the neurons"):
            Recipe.load(tmp_path)
