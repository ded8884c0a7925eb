"""Recipes: as data, as files, and compared."""

from __future__ import annotations

import copy
import dataclasses
import json
import subprocess
import sys
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
from flashu_compile.recipe.overrides import override
from flashu_compile.recipe.presets import PRESETS, find_recipe, preset
from flashu_compile.recipe.recipe import Recipe, merge

RECIPE = Recipe(
    "both",
    T2IConfig(35, 7.5, 3.0, guidance=((0, 0.75), (0.5, None)), ffn_pruning=0.2, head_pruning=0.1),
    MMUConfig(ffn_pruning=0.5, layer_skipping=0.3),
    {
        "t2i": Decisions({"llm": {3: np.array([0, 2, 5]), 0: np.array([1])}, "head": {}}),
        "mmu": Decisions({"llm": {1: np.arange(4)}}, (Phase(0, (7, 2)),)),
    },
)


def changed(recipe: Recipe, task: str, **fields: Any) -> Recipe:
    return dataclasses.replace(recipe, **{task: dataclasses.replace(recipe.config(task), **fields)})


class TestDecisions:
    def test_widths_follow_from_neurons(self) -> None:
        decisions = RECIPE.decisions["t2i"]
        assert decisions.kept_widths == {"head": {}, "llm": {0: 1, 3: 3}}
        assert decisions.kept_neurons["llm"][3].dtype == np.int64
        assert decisions.complete

    def test_neurons_cannot_be_changed(self) -> None:
        mine = np.array([1, 2])
        decisions = Decisions({"llm": {0: mine}})
        mine[0] = 0
        assert decisions.kept_neurons["llm"][0].tolist() == [1, 2]
        with pytest.raises(ValueError, match="read-only"):
            decisions.kept_neurons["llm"][0][0] = 0

    def test_equality_looks_at_every_part(self) -> None:
        one = Decisions({"llm": {0: np.array([1, 2])}}, (Phase(0, (1,)),))
        assert one == Decisions({"llm": {0: [1, 2]}}, (Phase(0.0, [1]),))  # type: ignore[dict-item, arg-type]
        assert one != Decisions({"llm": {0: np.array([1, 3])}}, (Phase(0, (1,)),))
        assert one != Decisions({"llm": {1: np.array([1, 2])}}, (Phase(0, (1,)),))
        assert one != Decisions({"llm": {0: np.array([1, 2])}}, (Phase(0, (2,)),))
        assert one != Decisions(phases=one.phases, kept_widths=one.kept_widths)
        assert one != "something else"

    @pytest.mark.parametrize(
        ("neurons", "message"),
        [
            ([2, 1], "block 4 of stack 'llm' must rise from at least 0"),
            ([1, 1], "must rise"),
            ([-1, 1], "must rise from at least 0"),
            ([], "must be a list of integers"),
            ([0.5], "must be a list of integers, not float64"),
            ([True, False], "must be a list of integers"),
            ([[1]], r"not int64 \(1, 1\)"),
        ],
    )
    def test_unusable_neurons(self, neurons: list, message: str) -> None:
        with pytest.raises(RecipeError, match=message):
            Decisions({"llm": {4: neurons}})  # type: ignore[dict-item]

    def test_widths_and_neurons_must_agree(self) -> None:
        with pytest.raises(RecipeError, match=r"widths {0: 2}, but the recipe says {0: 3}"):
            Decisions({"llm": {0: np.array([0, 1])}}, kept_widths={"llm": {0: 3}})

    @pytest.mark.parametrize(
        ("start", "skipped", "message"),
        [
            (1, (), "must start at a number of at least 0 and below 1"),
            (None, (), "must start at a number"),
            (0, (1, 1), "distinct"),
            (0, (-1,), "from 0 to 9,999"),
            (0, (10**30,), "from 0 to 9,999"),
            (0, 3, "list of integers"),
            (0, "12", "list of integers"),
            (0, (1.0,), "list of integers"),
        ],
    )
    def test_unusable_phases(self, start: Any, skipped: Any, message: str) -> None:
        with pytest.raises(RecipeError, match=message):
            Phase(start, skipped)

    @pytest.mark.parametrize("starts", [(0.1,), (0, 0.5, 0.5), (0, 0.5, 0.2)])
    def test_phases_start_at_0_and_rise(self, starts: tuple[float, ...]) -> None:
        with pytest.raises(RecipeError, match="Phases must start at 0"):
            Decisions(phases=tuple(map(Phase, starts)))


class TestSwitches:
    def test_what_a_task_decided(self) -> None:
        assert RECIPE.decided("t2i") == RECIPE.decisions["t2i"]
        assert not RECIPE.needs_calibration("t2i")
        assert not RECIPE.needs_calibration("mmu")

    def test_a_technique_switched_off_has_no_decisions(self) -> None:
        recipe = changed(RECIPE, "mmu", layer_skipping=0)
        assert recipe.decided("mmu").phases == ()
        assert recipe.decided("mmu").kept_widths == {"llm": {1: 4}}
        assert changed(recipe, "mmu", ffn_pruning=0).decided("mmu") == Decisions()

    @pytest.mark.parametrize(
        ("task", "fields"),
        [
            ("t2i", {"semantic_pruning": 0.1}),
            ("t2i", {"layer_skipping": 0.1}),
            ("mmu", {"semantic_pruning": 0.1}),
        ],
    )
    def test_a_technique_switched_on_needs_calibration(self, task: str, fields: dict) -> None:
        recipe = changed(RECIPE, task, **fields)
        assert recipe.needs_calibration(task)
        assert not recipe.needs_calibration("mmu" if task == "t2i" else "t2i")

    def test_rules_need_no_calibration(self) -> None:
        recipe = Recipe(
            "rules", T2IConfig(full_ffn=0.5, head_cache=5, solver="ab2"), MMUConfig(token_pruning=0.5)
        )
        assert not recipe.needs_calibration("t2i")
        assert not recipe.needs_calibration("mmu")

    def test_neurons_that_were_not_read_are_undecided(self) -> None:
        assert Recipe.from_json(RECIPE.to_json()).needs_calibration("t2i")

    def test_resolving_fills_what_is_open(self) -> None:
        recipe = preset("flashu").resolved(points=50, guidance_scale=5.0, time_shift=3.0)
        assert (recipe.t2i.points, recipe.t2i.guidance_scale, recipe.t2i.time_shift) == (35, 5, 3)
        assert changed(recipe, "t2i", guidance_scale=None, time_shift=None) == preset("flashu")

    @pytest.mark.parametrize(
        ("name", "settings", "scales"),
        [
            ("flashu", (), [7.5, 10.0]),
            ("balanced", (), [5.625, 7.5]),
            ("exact", (), [7.5]),
            ("flashu", ("t2i.guidance=[[0, 1]]",), [7.5]),
            ("flashu", ("t2i.guidance_scale=4",), [3.0, 4.0]),
        ],
    )
    def test_guidance_of_published_models(
        self, name: str, settings: tuple[str, ...], scales: list[float]
    ) -> None:
        """7.5 is that of the authors' README; accelerated runs rise to 10."""
        recipe = override(preset(name), (*settings, "t2i.ffn_pruning=0", "t2i.layer_skipping=0")).resolved(
            points=50, guidance_scale=7.5, time_shift=3.0, accelerated_guidance_scale=10.0
        )
        assert list(dict.fromkeys(step.guidance_scale for step in recipe.plan().steps)) == scales

    def test_merging_takes_a_task_from_each(self) -> None:
        recipe = merge(RECIPE, preset("flashu"))
        assert (recipe.name, recipe.t2i, recipe.mmu) == ("both+flashu", RECIPE.t2i, preset("flashu").mmu)
        assert recipe.decisions == {"t2i": RECIPE.decisions["t2i"]}
        assert merge(RECIPE, RECIPE) == RECIPE
        assert merge(RECIPE, RECIPE, "other").name == "other"
        assert merge(RECIPE, preset("flashu")).text == preset("flashu").text != RECIPE.text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": " "}, "name must be a text"),
        ({"name": 3}, "name must be a text, not 3"),
        ({"decisions": {"video": Decisions()}}, "knows the tasks t2i, mmu, text, not 'video'"),
        (
            {"decisions": {"t2i": Decisions({"decoder": {}})}},
            "t2i prune stack 'decoder'; .* llm, semantic, head",
        ),
        ({"decisions": {"mmu": Decisions({"head": {}})}}, "mmu prune stack 'head'; .* llm, semantic"),
        ({"decisions": {"mmu": Decisions(phases=(Phase(0), Phase(0.5)))}}, "several phases"),
    ],
)
def test_recipes_that_make_no_sense(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        Recipe(**{"name": "x", **arguments})


class TestJson:
    @pytest.mark.parametrize("name", PRESETS)
    def test_presets_come_back(self, name: str) -> None:
        assert Recipe.from_json(preset(name).to_json()) == preset(name)

    def test_all_but_the_neurons_comes_back(self) -> None:
        back = Recipe.from_json(RECIPE.to_json())
        assert back.to_json() == RECIPE.to_json()
        assert back.decisions["t2i"].kept_widths == RECIPE.decisions["t2i"].kept_widths
        assert back.decisions["mmu"].phases == (Phase(0, (2, 7)),)
        assert not back.decisions["mmu"].complete

    def test_a_recipe_by_hand(self) -> None:
        text = """{"schema": 3, "name": "mine", "t2i": {"points": 20, "guidance": [[0, null], [0.3, 1]]},
                   "decisions": {"mmu": {"phases": [{"start": 0, "skipped": [5, 4]}]}}}"""
        assert Recipe.from_json(text) == Recipe(
            "mine",
            T2IConfig(20, guidance=((0, None), (0.3, 1))),
            decisions={"mmu": Decisions(phases=(Phase(0, (4, 5)),))},
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
            ({"schema": 1}, "has schema 1; this version reads 2 and 3"),
            ({"schema": None}, "no schema"),
            ({"schema": "2"}, "has schema '2'"),
            ({"schema": 3.0}, "has schema 3.0"),
            ({"name": 4}, "expected str, got int at \\$.name"),
            ({"title": 4}, "no field 'title' in .*, only name, t2i, mmu, text, decisions"),
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


neurons = st.sets(st.integers(0, 300), min_size=1).map(sorted).map(np.array)
blocks = st.dictionaries(st.integers(0, 40), neurons, max_size=3)
layers = st.sets(st.integers(0, 30)).map(tuple)


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
        phases = tuple(Phase(start, skipped) for start in (0.0, *starts))
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


class TestPresets:
    def test_exact_changes_nothing(self) -> None:
        assert (preset("exact").t2i, preset("exact").mmu) == (T2IConfig(), MMUConfig())

    def test_flashu_has_the_published_parameters(self) -> None:
        t2i, mmu = preset("flashu").t2i, preset("flashu").mmu
        assert (t2i.points, t2i.ffn_pruning, t2i.layer_skipping) == (35, 0.2, 0.2)
        assert (t2i.skipping_interval, t2i.head_cache, t2i.full_ffn * 34) == (10, 5, 10)
        assert (t2i.full_ffn_at, t2i.solver, t2i.head_extrapolation) == ("last", "euler", False)
        assert [name for name in PRESETS if preset(name).t2i.as_published] == ["flashu"]
        assert (t2i.semantic_pruning, t2i.head_pruning, t2i.width_multiple) == (0, 0, 64)
        assert t2i.guidance == ((0, 0.75), (24 / 34, 1))
        assert mmu == MMUConfig(
            ffn_pruning=0.2, layer_skipping=0.2, token_pruning=0.5, token_layer=2, token_scorer="v_norm"
        )

    def test_recipes_are_found_by_name_and_path(self, tmp_path: Path) -> None:
        RECIPE.save(tmp_path / "mine.json")
        assert find_recipe("aggressive") is preset("aggressive")
        assert find_recipe(RECIPE) is RECIPE
        assert find_recipe(tmp_path / "mine.json") == find_recipe(str(tmp_path / "mine.json")) == RECIPE
        for absent in ("fast", tmp_path):
            with pytest.raises(
                RecipeError, match=r"Unknown recipe .* exact, flashu, balanced, conservative, aggressive"
            ):
                find_recipe(absent)
        with pytest.raises(RecipeError, match="Unknown recipe 'fast'"):
            preset("fast")


def test_recipes_and_plans_need_only_numpy() -> None:
    """Serving reads them, with the packages of a base installation and no more than it must."""
    code = (
        "import sys; import flashu_compile.recipe.presets\n"
        "import flashu_compile.recipe.plan, flashu_compile.recipe.importing\n"
        "print(sorted({'torch', 'safetensors', 'onnxruntime', 'tokenizers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
