from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from examples.showo2_shapes.world.render import render
from examples.showo2_shapes.world.scenes import sample_scene, sample_spec
from flashu_compile.errors import EvaluationError
from flashu_compile.evaluation.agreement import Agreement, clean, flat, noise
from flashu_compile.evaluation.evaluators import AGREEMENT, Evaluator, find_evaluator
from flashu_compile.evaluation.judging import Part, Rules, Side, judge
from tests.evaluation.planted import CANVAS, Draws, Noisy, OfAnotherPrompt, SpeckledCorner, prompts

SCORING = Path(__file__).parents[2] / "examples" / "showo2_shapes" / "scoring.py"
RULES = Rules(keep=0.97, floor=0.95)


def nothing(stage: str, fraction: float | None) -> None:
    return None


def judged(bundle: Any, count: int = 170, evaluators: Sequence[Evaluator] | None = None) -> dict[str, Part]:
    sides = [Side(title, pipe, nothing) for title, pipe in (("bundle", bundle), ("exact", Draws()))]
    if evaluators is None:
        evaluators = [
            Evaluator(AGREEMENT, Agreement(sides[1], None, {})),
            find_evaluator(f"{SCORING}:score"),
        ]
    samples = {"t2i": list(prompts(count).prompts)}
    return {part.name: part for part in judge(*sides, samples, evaluators, RULES)}


class TestPlantedFaults:
    def test_exact_against_itself_passes(self) -> None:
        parts = judged(Draws())
        assert set(parts) == {"ssim", "clean", "conditions", "right", "flat"}
        assert all(part.failed == () for part in parts.values()), parts
        assert all(part.kept == 1 and part.bound < 1 for part in parts.values())

    def test_the_lowest_score_is_that_of_a_sample(self) -> None:
        part = judged(SpeckledCorner())["ssim"]
        assert 0 < part.lowest < part.score < 1

    def test_what_is_being_made_is_told_with_how_many_there_will_be(self) -> None:
        told: list[str] = []
        samples = {"t2i": list(prompts(2).prompts)}
        side = Side("one", Draws(), lambda stage, fraction: told.append(stage), samples=samples)
        for colour in ("red", "red", "blue", "green"):
            side.generate(f"a {colour} circle")
        assert told == ["one: picture 1 of 2", "one: picture 2 of 2", "one: picture 3"]

    @pytest.mark.parametrize(
        ("side", "seen_by"),
        [
            (Noisy(), {"ssim", "clean", "flat"}),
            (SpeckledCorner(), {"ssim", "clean"}),
            (OfAnotherPrompt(), {"ssim", "conditions", "right"}),
        ],
    )
    def test_faults_fail(self, side: Any, seen_by: set[str]) -> None:
        parts = judged(side)
        assert seen_by <= {name for name, part in parts.items() if part.failed}

    def test_a_speckled_corner_of_a_large_busy_picture(self) -> None:
        # SSIM stays above 0.99 here; noise of the worst block does not.
        rng = np.random.default_rng(0)
        smooth = np.kron(rng.integers(0, 256, (8, 8, 3)), np.ones((32, 32, 1)))
        speckled = smooth.copy()
        speckled[:24, :24] += rng.normal(0, 20, (24, 24, 3))
        assert clean(smooth, smooth) == 1
        assert clean(speckled, smooth) < 0.5

    def test_noise_is_measured_in_levels(self) -> None:
        picture = 128 + np.random.default_rng(0).normal(0, 8, (64, 64, 3))
        # The pixel is one of nine whose median is taken off.
        assert noise(picture, flat(picture)) == pytest.approx(np.full((4, 4), 8), rel=0.15)

    def test_the_more_noise_the_less_clean(self) -> None:
        grey, rng = np.full((64, 64, 3), 128.0), np.random.default_rng(0)
        speckle = rng.normal(0, 1, grey.shape)
        scores = [clean((grey + level * speckle).clip(0, 255), grey) for level in range(61)]
        assert scores == sorted(scores, reverse=True)
        assert scores[1] > 0.95
        assert set(scores[10:]) == {0}

    @pytest.mark.parametrize("moved", [1, 3, 5])
    def test_an_object_elsewhere_is_no_noise(self, moved: int) -> None:
        rng, scores = np.random.default_rng(0), []
        for _ in range(50):
            scene = sample_scene(sample_spec(rng), rng, CANVAS)
            first, *others = scene.objects
            other = replace(scene, objects=(replace(first, x=first.x + moved), *others))
            scores.append(clean(render(other).astype(float), render(scene).astype(float)))
        assert np.mean(scores) > 0.97

    @pytest.mark.parametrize("level", [10, 20, 30, 60])
    def test_noise_without_flat_areas_is_not_free_of_noise(self, level: int) -> None:
        class Flooded(Draws):
            def changed(self, picture: np.ndarray, rng: np.random.Generator) -> np.ndarray:
                return picture + rng.normal(0, level, picture.shape)

        assert judged(Flooded())["flat"].score < 0.01


class TestRules:
    def test_right_has_a_floor_and_no_bound(self) -> None:
        def scorer(pipeline: Any, samples: Sequence[Any]) -> Mapping[str, Sequence[float]]:
            lost = pipeline.title == "bundle"
            return {"right": [float(not lost or number % 25 > 0) for number in range(len(samples))]}

        part = judged(Draws(), evaluators=[Evaluator("mine", scorer)])["right"]
        assert part.bound < 0.95 < part.kept < 0.97
        assert part.failed == ()

    def test_a_kind_below_90_percent_fails_alone(self) -> None:
        def scorer(pipeline: Any, samples: Sequence[Any]) -> Mapping[str, Sequence[float]]:
            lost = pipeline.title == "bundle"
            return {"x": [0.8 if lost and sample.kind == "single" else 1 for sample in samples]}

        part = judged(Draws(), 600, [Evaluator("mine", scorer)])["x"]
        assert part.bound >= 0.97
        assert part.failed == ("of kind 'single' 80.0% is kept, below 90%",)

    def test_too_few_samples_name_the_number_needed(self) -> None:
        with pytest.raises(
            EvaluationError, match=r"With 143 different prompts .* give at least 144 different prompts"
        ):
            judged(Draws(), 143)

    def test_a_bundle_that_is_better_may_do_with_fewer(self) -> None:
        def scorer(pipeline: Any, samples: Sequence[Any]) -> Mapping[str, Sequence[float]]:
            better = pipeline.title == "bundle"
            return {
                "better": [float(number % 2 or better) for number in range(len(samples))],
                "equal": [float(number % 2) for number in range(len(samples))],
            }

        parts = judged(Draws(), 170, [Evaluator("mine", scorer)])
        assert parts["better"].failed == ()
        assert parts["better"].bound > 1
        (reason,) = parts["equal"].failed
        assert reason.endswith("below 97.0% (a bundle that loses nothing takes 287 different prompts)")

    def test_parts_with_a_floor_need_no_number_of_samples(self) -> None:
        only_right = Evaluator("mine", lambda pipeline, samples: {"right": [1] * len(samples)})
        assert judged(Draws(), 12, [only_right])["right"].failed == ()

    def test_a_kind_of_which_the_other_side_keeps_nothing_has_no_share(self) -> None:
        def scorer(pipeline: Any, samples: Sequence[Any]) -> Mapping[str, Sequence[float]]:
            better = pipeline.title == "bundle"
            return {"x": [float(better or sample.kind != "single") for sample in samples]}

        part = judged(Draws(), 600, [Evaluator("mine", scorer)])["x"]
        assert part.failed == ()
        assert part.kinds["single"].kept is None
        assert not part.kinds["single"].judged
        assert part.kinds["count"].kept == 1


class TestScorers:
    @pytest.mark.parametrize(
        ("body", "message"),
        [
            ("1 / 0", "Scorer .*mine.py:score raised ZeroDivisionError: division by zero"),
            ("return {'x': [float('nan')] * len(samples)}", "gave nan as 'x' of sample 0"),
            ("return {'x': [1.5] * len(samples)}", "gave 1.5 as 'x' of sample 0"),
            ("return {'x': ['1'] * len(samples)}", "gave '1' as 'x' of sample 0"),
            ("return {'x': [1]}", "must give 170 scores of 'x', one for each sample, not 1"),
            ("return {'x': 1.0}", "must give 170 scores of 'x', one for each sample, not no list"),
            ("return {'x': (1 / 0 for _ in samples)}", "score raised ZeroDivisionError: division by zero"),
            ("return {'x': [10**400] * len(samples)}", "gave 1000.* as 'x' of sample 0"),
            ("return [1]", "must give a mapping from parts to scores"),
            ("return np.ones(len(samples))", "must give a mapping from parts to scores"),
            ("return None", "judges none of the tasks: t2i"),
            ("return {'x': [0] * len(samples)}", "nothing can be kept: all scores of the other side are 0"),
            (
                "return {'right': [0] * len(samples)}",
                "nothing can be kept: all scores of the other side are 0",
            ),
            ("return {pipeline.title: [1] * len(samples)}", "gave other parts for one side"),
        ],
    )
    def test_what_a_scorer_may_not_do(self, body: str, message: str, tmp_path: Path) -> None:
        path = tmp_path / "mine.py"
        path.write_text(f"import numpy as np\ndef score(pipeline, samples):\n    {body}\n")
        with pytest.raises(EvaluationError, match=message):
            judged(Draws(), evaluators=[find_evaluator(f"{path}:score")])

    def test_scores_may_be_of_numpy(self) -> None:
        for values in (np.ones(2, bool), np.ones(2, np.float32), iter([True, 1])):
            found = Evaluator("mine", lambda pipeline, samples, given=values: {"x": given})
            assert found.parts(Draws(), [1, 2]) == {"x": [1.0, 1.0]}

    def test_a_scorer_that_cannot_be_found(self, tmp_path: Path) -> None:
        (tmp_path / "mine.py").write_text("x = 1\n")
        (tmp_path / "broken.py").write_text("import nothing_of_that_name\n")
        for name, message in (
            ("accuracy", "There is no scorer 'accuracy'; there are agreement, answers"),
            (f"{tmp_path}/none.py:score", "none.py does not exist"),
            (f"{tmp_path}/mine.py:score", "has no function 'score'"),
            (f"{tmp_path}/broken.py:score", "raised ModuleNotFoundError while it was read"),
        ):
            with pytest.raises(EvaluationError, match=message):
                find_evaluator(name)

    def test_pictures_are_made_once_for_all_scorers(self) -> None:
        class Counting(Draws):
            made = 0

            def generate(self, prompt: str, *, seed: int, steps: Any = None) -> Image.Image:
                Counting.made += 1
                return super().generate(prompt, seed=seed)

        judged(Counting())
        assert Counting.made == 170
