"""The sampler on engines made by hand, whose velocity field is known, against a loop of a few lines in float64."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from flashu_compile.bundle.manifest import EngineSpec, TensorSpec
from flashu_compile.errors import BundleError, InputError, NotFiniteError
from flashu_compile.recipe.config import T2IConfig
from flashu_compile.recipe.plan import Step, StepPlan, compile_plan
from flashu_compile.runtime.engine import Tensors
from flashu_compile.runtime.sampler import sample, schedules
from tests.support.plans import uniform_plan

SHAPE = (1, 2, 3, 3)
NOISE = np.random.default_rng(0).standard_normal(SHAPE).astype(np.float32)
TEXT = {"prompt_ids": np.array([[4, 5], [0, 3]]), "prompt_mask": np.array([[True, True], [False, True]])}
POWER = np.array([0.9, 0.3])  # what the text of each branch comes to

Array = NDArray[Any]


def features(x: Array, t: Any, text: Any) -> Array:
    """The slow part: what a step that reuses does not compute."""
    return np.sin(2 * x + text) - 0.5 * x + text * t


def velocity(features: Array, t: Any) -> Array:
    """The fast part, of current time."""
    return features * (1.5 - t) + np.cos(4 * t)


class Engines:
    """`denoise` and `reuse`, with the calls made: (engine, text rows, time). Rows 0 and 1 have the ids of TEXT."""

    def __init__(
        self, slow: Callable[[Array, Any, Any], Array] = features, *, gives_features: bool = True
    ) -> None:
        self.calls: list[tuple[str, tuple[int, ...], float]] = []
        self.reused: list[Array] = []  # the head features given to `reuse`
        self.slow, self.gives_features = slow, gives_features

    precision = "float16"

    def engine(self, name: str) -> Engine:
        return Engine(self, name)


class Scheduled(Engines):
    """The same, but `denoise` takes time as its schedule gives it."""

    def __init__(self) -> None:
        super().__init__()
        self.points: list[float] = []

    def engine(self, name: str) -> Any:
        return _Schedule(self) if name == "denoise_schedule" else _Late(self)


class Engine:
    def __init__(self, owner: Engines, name: str) -> None:
        self._owner, self._name = owner, name
        inputs = ["head_features", "prompt_mask", "timestep"]
        if name != "reuse":
            inputs = ["latents", "timestep", "prompt_ids"]
        if name == "strange":
            inputs.append("depth_map")
        tensors = tuple(TensorSpec(n, "float32", ("batch",)) for n in inputs)
        self.spec = EngineSpec(name, "t2i", "", tensors, (), "")

    def run(self, inputs: Tensors) -> dict[str, Array]:
        assert list(inputs) == [tensor.name for tensor in self.spec.inputs]
        t = inputs["timestep"].astype(np.float64).reshape(-1, 1, 1, 1)
        assert t.shape == (1, 1, 1, 1)
        if self._name == "reuse":
            rows = [TEXT["prompt_mask"].tolist().index(row) for row in inputs["prompt_mask"].tolist()]
            slow = inputs["head_features"]
            self._owner.reused.append(slow)
        else:
            rows = [TEXT["prompt_ids"].tolist().index(row) for row in inputs["prompt_ids"].tolist()]
            assert inputs["latents"].dtype == np.float32
            assert len(inputs["latents"]) == 1
            slow = self._owner.slow(inputs["latents"].astype(np.float64), t, POWER[rows].reshape(-1, 1, 1, 1))
        self._owner.calls.append((self._name, tuple(rows), float(t[0, 0, 0, 0])))
        outputs = {"velocity": velocity(slow, t).astype(np.float32)}
        return outputs | ({"head_features": slow} if self._owner.gives_features else {})


class _Schedule:
    def __init__(self, owner: Scheduled) -> None:
        self._points = owner.points

    def run(self, inputs: Tensors) -> dict[str, Array]:
        (point,) = inputs["timestep"].tolist()
        self._points.append(point)
        return {"embedded": inputs["timestep"] + 1}


class _Late:
    """`denoise` behind its schedule."""

    def __init__(self, owner: Scheduled) -> None:
        self._plain = Engine(owner, "denoise")
        tensors = tuple(TensorSpec(n, "float32", ("batch",)) for n in ("latents", "embedded", "prompt_ids"))
        self.spec = EngineSpec("denoise", "t2i", "", tensors, (), "", schedule="denoise_schedule")

    def run(self, inputs: Tensors) -> dict[str, Array]:
        assert list(inputs) == [tensor.name for tensor in self.spec.inputs]
        x, embedded, ids = inputs.values()
        return self._plain.run({"latents": x, "timestep": embedded - 1, "prompt_ids": ids})


def follow(plan: StepPlan, slow: Callable[[Array, Any, Any], Array] = features) -> Array:
    """Where the plan leads, computing both branches at every step."""
    x, stored, before = NOISE.astype(np.float64), [], None
    for step in plan.steps:
        f = np.concatenate([slow(x, step.t, text) for text in POWER])
        if step.engine == "reuse":
            t1, f = stored[-1]
            if step.extrapolate:
                t0, f0 = stored[-2]
                f = f0 + (f - f0) * (step.t - t0) / (t1 - t0)
        if step.store:
            stored.append((step.t, f))
        c, u = velocity(f, step.t)
        v = step.guidance_scale * c + (1 - step.guidance_scale) * u
        if plan.solver == "ab2" and before is not None:
            r = step.dt / before[0]
            x = x + step.dt * ((1 + r / 2) * v - r / 2 * before[1])
        else:
            x = x + step.dt * v
        before = step.dt, v
    return x


def plan(points: int = 13, **fields: Any) -> StepPlan:
    return compile_plan(T2IConfig(points, 3.0, 3.0, **fields))


@pytest.mark.parametrize("solver", ["euler", "ab2"])
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"head_cache": 3},
        {"head_cache": 3, "as_published": True},
        {"head_cache": 3, "head_extrapolation": True},
        {"head_cache": 2, "full_ffn": 0.4},
        {"head_cache": 3, "full_ffn": 0.3, "full_ffn_at": "first"},
        {"guidance": ((0, 0.5), (0.4, 1.0))},
        {"guidance": ((0, None), (0.3, 1.0), (0.7, None))},
        {"guidance": ((0, None), (0.25, 1.0), (0.6, None)), "head_cache": 3, "head_extrapolation": True},
        {"guidance": ((0, 1.0), (0.5, 0.0)), "head_cache": 4},
        {"guidance": ((0, None), (0.5, 0.0)), "head_cache": 3},
    ],
)
def test_any_plan_leads_where_the_loop_goes(solver: str, fields: dict[str, Any]) -> None:
    steps = plan(solver=solver, **fields)
    latents = sample(Engines(), steps, TEXT, NOISE)
    assert latents.dtype == np.float32
    np.testing.assert_allclose(latents, follow(steps), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("ab2", 2)])
def test_order_of_convergence(solver: str, order: int) -> None:
    """Twice the evaluations, a half or a quarter of the error, on the warped grid."""
    exact = follow(plan(1000, solver="ab2"))
    errors = [
        np.abs(sample(Engines(), plan(n + 1, solver=solver), TEXT, NOISE) - exact).max() for n in (24, 48, 96)
    ]
    orders = np.log2(np.array(errors[:-1]) / errors[1:])
    np.testing.assert_allclose(orders, order, atol=0.25)


def test_a_step_runs_its_engine_once_with_the_branches_it_needs() -> None:
    engines = Engines()
    steps = plan(11, guidance=((0, None), (0.3, 1.0), (0.9, 0.0)), head_cache=3)
    sample(engines, steps, TEXT, NOISE)
    assert [(name, rows) for name, rows, _ in engines.calls] == [
        *[("denoise", (0,))] * 3,
        *[("denoise", (0, 1))] * 3,
        *[("reuse", (0, 1))] * 2,
        ("denoise", (0, 1)),
        ("denoise", (1,)),
    ]
    np.testing.assert_allclose([t for _, _, t in engines.calls], [step.t for step in steps.steps], rtol=1e-6)


def test_a_single_branch_reuses_its_row_of_both() -> None:
    engines = Engines()
    steps = plan(9, guidance=((0, 1.0), (0.5, None)), head_cache=4)
    latents = sample(engines, steps, TEXT, NOISE)
    assert [(name, rows) for name, rows, _ in engines.calls[3:7]] == [
        ("denoise", (0, 1)),
        *[("reuse", (0,))] * 3,
    ]
    np.testing.assert_allclose(latents, follow(steps), rtol=1e-5, atol=1e-5)


def test_features_on_a_line_are_extrapolated_exactly() -> None:
    def line(x: Array, t: Any, text: Any) -> Array:
        return np.zeros_like(x) + text * (2 - 3 * t)

    held, extended = Engines(line), Engines(line)
    sample(held, plan(11, head_cache=2), TEXT, NOISE)
    sample(extended, plan(11, head_cache=2, head_extrapolation=True), TEXT, NOISE)
    times = [step.t for step in plan(11).steps]
    # Reused on steps 3, 5, 7 and 9; before the first of these only one was stored.
    used = [times[1], times[4], times[6], times[8]]
    for engines, at in ((held, [times[1], times[3], times[5], times[7]]), (extended, used)):
        for given, t in zip(engines.reused, at, strict=True):
            np.testing.assert_allclose(
                given, np.stack([line(NOISE[0], t, text) for text in POWER]), rtol=1e-5
            )


def test_noise_and_text_are_left_as_they_were() -> None:
    noise, text = NOISE.copy(), {name: value.copy() for name, value in TEXT.items()}
    sample(Engines(), plan(9, head_cache=2, solver="ab2"), text, noise)
    np.testing.assert_array_equal(noise, NOISE)
    assert all(np.array_equal(text[name], TEXT[name]) for name in TEXT)


def test_progress_comes_after_every_evaluation() -> None:
    engines, seen = Engines(), []
    sample(engines, plan(9, head_cache=3), TEXT, NOISE, lambda: seen.append(len(engines.calls)))
    assert seen == list(range(1, 9))


def _steps(*steps: Step) -> StepPlan:
    return StepPlan(len(steps) + 1, 3.0, "euler", steps)


COMPUTE = Step(0.0, 0.5, 3.0, "denoise")
LATER = Step(0.5, 0.5, 3.0, "denoise")
REUSE = dataclasses.replace(LATER, engine="reuse")


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        (_steps(dataclasses.replace(COMPUTE, engine="strange"), LATER), "'strange' takes depth_map, unknown"),
        (_steps(COMPUTE, REUSE), "reuses head features at t = 0.5000 that no step before has stored"),
        (
            _steps(dataclasses.replace(COMPUTE, store=True), dataclasses.replace(REUSE, extrapolate=True)),
            "reuses head features at t = 0.5000",
        ),
        (
            _steps(dataclasses.replace(COMPUTE, store=True, guidance_scale=1.0), REUSE),
            "reuses head features at t = 0.5000",
        ),
    ],
)
def test_plans_that_cannot_be_followed(steps: StepPlan, message: str) -> None:
    with pytest.raises(BundleError, match=message):
        sample(Engines(), steps, TEXT, NOISE)


def test_an_engine_without_features_to_store() -> None:
    with pytest.raises(BundleError, match="stores head features of engine 'denoise', which gives none"):
        sample(
            Engines(gives_features=False),
            _steps(dataclasses.replace(COMPUTE, store=True), LATER),
            TEXT,
            NOISE,
        )
    sample(Engines(gives_features=False), uniform_plan(4, 3.0, 3.0), TEXT, NOISE)


def test_guidance_that_drives_latents_away_is_blamed() -> None:
    """The branches differ by more the farther the latents are, so that a large scale feeds on itself."""

    def apart(x: Array, t: Any, text: Any) -> Array:
        return np.clip(text * x, -1e37, 1e37)

    steps = uniform_plan(60, 1e4, 3.0)
    with pytest.raises(InputError, match=r"guidance scale of 10000 drove them away .* lower it"):
        sample(Engines(apart), steps, TEXT, NOISE)
    assert np.isfinite(sample(Engines(apart), uniform_plan(60, 3.0, 3.0), TEXT, NOISE)).all()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(("branch", "scale"), [(0, 3.0), (1, 3.0), (0, 1.0), (1, 0.0)])
def test_an_engine_that_gives_no_numbers_is_blamed(value: float, branch: int, scale: float) -> None:
    def broken(x: Array, t: Any, text: Any) -> Array:
        slow = features(x, t, text)
        return np.where((text == POWER[branch]) & (t > 0.6), value, slow)

    with pytest.raises(
        NotFiniteError, match=r"Engine 'denoise', computing in float16, gave velocities"
    ) as caught:
        sample(Engines(broken), uniform_plan(9, scale, 3.0), TEXT, NOISE)
    assert 'precision="decoder=float16"' in str(caught.value)
    assert "guidance" not in str(caught.value)


def test_an_engine_whose_velocities_are_too_large_is_blamed() -> None:
    """They are finite, and so are the latents for a few steps; guidance has no part in it."""

    def wild(x: Array, t: Any, text: Any) -> Array:
        return 1e12 * (x + text)

    with pytest.raises(NotFiniteError, match=r"Engine 'denoise', .* at evaluation 1 of 39"):
        sample(Engines(wild), uniform_plan(40, 3.0, 3.0), TEXT, NOISE)


def test_a_schedule_that_gives_no_numbers_is_blamed() -> None:
    class Broken(Scheduled):
        def engine(self, name: str) -> Any:
            engine = super().engine(name)
            if name == "denoise_schedule":
                engine.run = lambda inputs: {"embedded": inputs["timestep"] * np.nan}
                outputs = (TensorSpec("embedded", "float32", (1,)),)
                engine.spec = EngineSpec(name, "t2i", "", (), outputs, "")
            return engine

    with pytest.raises(NotFiniteError, match=r"Engine 'denoise_schedule', .* gave values of 'embedded'"):
        sample(Broken(), plan(5), TEXT, NOISE)


def test_a_schedule_runs_once_for_each_point_of_a_plan() -> None:
    steps, engines = plan(7), Scheduled()
    known = schedules(engines)
    first = sample(engines, steps, TEXT, NOISE, scheduled=known)
    np.testing.assert_allclose(first, follow(steps), rtol=1e-5, atol=1e-5)
    assert engines.points == pytest.approx([step.t for step in steps.steps])
    np.testing.assert_array_equal(sample(engines, steps, TEXT, NOISE, scheduled=known), first)
    assert len(engines.points) == len(steps.steps), "a second picture has it all"
    sample(engines, plan(13), TEXT, NOISE, scheduled=known)
    shared = {step.t for step in steps.steps} & {step.t for step in plan(13).steps}
    assert len(engines.points) == len(steps.steps) + 12 - len(shared), "and another plan the points it shares"
