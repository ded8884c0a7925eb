"""Calibration against eager hooks on the modules, and against the scores of the published method."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image
from torch import Tensor, nn

from flashu_compile.compiler.export import calibrate
from flashu_compile.compiler.metadata import generation, understanding
from flashu_compile.errors import CalibrationError, RecipeError
from flashu_compile.measure.calibration import calibrate_mmu, calibrate_t2i
from flashu_compile.measure.recorder import Recorder
from flashu_compile.measure.samples import CalibrationSamples, calibration_samples
from flashu_compile.measure.statistics import Statistics, keep_neurons, skip_layers
from flashu_compile.models.loading import LoadedModel, load_model
from flashu_compile.models.showo2.adapter import capture_specs
from flashu_compile.models.showo2.eager import EagerPipeline
from flashu_compile.models.showo2.modeling import Showo2
from flashu_compile.models.showo2.prompts import PromptCodec
from flashu_compile.models.showo2.reference import UnderstandingReference
from flashu_compile.program.program import Program, Role
from flashu_compile.program.trace import capture_program
from flashu_compile.recipe.config import MMUConfig, T2IConfig
from flashu_compile.recipe.decisions import Decisions
from flashu_compile.recipe.recipe import Recipe
from flashu_compile.system import workers
from tests.support.oracle import ORACLES, load_oracle
from tests.support.tiny import VAE, PaddedSpaceToDepth, tiny_model, tokenizer

PROMPTS = ("a red circle", "two blue squares and a cat")
CONFIG = T2IConfig(
    points=6,
    guidance_scale=2.0,
    time_shift=3.0,
    pruning={"llm": 0.25, "semantic": 0.25, "head": 0.25},
    width_multiple=8,
    layer_skipping={"llm": 0.5},
    skipping_interval=2,
    head_cache=2,
)


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    return load_model(tiny_model(), vae=VAE, tokenizer=tokenizer())


@contextlib.contextmanager
def hooks(modules: list[nn.Module], see: Callable[[int, Tensor, Tensor], None]) -> Iterator[None]:
    """`see(index, first input, output)` of every call of a module."""
    with contextlib.ExitStack() as stack:
        for index, module in enumerate(modules):

            def hook(
                _module: nn.Module, given: tuple[Tensor, ...], result: Tensor, index: int = index
            ) -> None:
                see(index, given[0], result)

            stack.callback(module.register_forward_hook(hook).remove)
        yield


def wanda(squares: Tensor, down: nn.Linear) -> np.ndarray:
    return (squares.sqrt() * down.weight.double().abs().sum(0)).detach().numpy()


@pytest.mark.parametrize("name", ORACLES)
def test_scores_of_the_published_calibration(name: str) -> None:
    """Token ids as they stand in place of the image and the time row, every position counted: the oracle's scores."""
    oracle = load_oracle(name)
    program = capture_program(capture_specs("t2i", oracle.model, PaddedSpaceToDepth())[0])
    statistics = Statistics(program, ["llm"], [])
    ids, offset = oracle.text[:1], int(oracle.offsets[0])
    end = offset + oracle.model.config.span_length
    entry = statistics.blocks["llm"][0].entry
    recorder = Recorder(program, statistics.taps(), {entry: oracle.model.embed_text(ids)})
    recorder.record(
        {
            Role.PROMPT_IDS: ids[:, :offset],
            Role.PROMPT_MASK: torch.ones(1, offset, dtype=torch.bool),
            Role.TAIL_IDS: ids[:, end:],
            Role.LATENTS: oracle.tensors["noise"],
            Role.TIMESTEP: torch.tensor([0.3]),
        }
    )
    for layer, scores in statistics.scores()["llm"].items():
        truth = oracle.tensors[f"flashu_wanda_scores.{layer}"].double().numpy()
        assert np.linalg.norm(scores - truth) <= 1e-5 * np.linalg.norm(truth)
        kept = keep_neurons(scores, oracle.flashu.ffn_pruning, 64, "")
        assert kept.tolist() == oracle.flashu.kept_neurons[layer]


def test_generation_statistics_equal_eager_hooks(loaded: LoadedModel, denoise: Program) -> None:
    """FFN scores of all stacks and layer importance by phase, over the live rows of both branches."""
    made = calibrate_t2i(denoise, PromptCodec(loaded.tokenizer), generation(loaded), CONFIG, PROMPTS, seed=4)
    model = loaded.network
    stacks = {
        "llm": [layer.mlp.down_proj for layer in model.showo.model.layers],
        "semantic": [layer.mlp.fc2 for layer in model.und_trans.layers],
        "head": [block.mlp.down_proj for block in model.diffusion_head_a],
    }
    downs = [(name, i, down) for name, modules in stacks.items() for i, down in enumerate(modules)]
    squares = [torch.zeros(down.in_features, dtype=torch.float64) for _, _, down in downs]
    layers = list(model.showo.model.layers)
    phases = 3  # five evaluations, two in each phase
    cosines, rows = torch.zeros(phases, len(layers), dtype=torch.float64), torch.zeros(phases, len(layers))
    live = torch.zeros(0)
    calls = [0] * len(layers)

    def select(value: Tensor) -> Tensor:
        return value[live] if value.shape[1] == live.shape[1] else value.flatten(0, 1)

    def see_down(index: int, given: Tensor, _result: Tensor) -> None:
        squares[index] += select(given).double().square().sum(0)

    def see_layer(index: int, given: Tensor, result: Tensor) -> None:
        cosine = torch.cosine_similarity(select(given).double(), select(result).double(), dim=-1)
        phase = calls[index] // 2
        calls[index] += 1
        cosines[phase, index] += cosine.sum()
        rows[phase, index] += len(cosine)

    eager = EagerPipeline(loaded)
    for number, prompt in enumerate(PROMPTS):
        live = _live(eager, prompt)
        calls = [0] * len(layers)
        with hooks([down for _, _, down in downs], see_down), hooks(layers, see_layer):
            eager.trajectory(prompt, seed=4 + number, steps=6, guidance_scale=2.0)

    for (name, block, down), total in zip(downs, squares, strict=True):
        np.testing.assert_allclose(made.scores[name][block], wanda(total, down), rtol=1e-5)
        assert made.decisions.kept_widths[name][block] == down.in_features * 3 // 4 // 8 * 8
    importance = [phase["importance"] for phase in made.figures["layer_importance"]["llm"]]
    np.testing.assert_allclose(importance, 1 - cosines / rows, rtol=1e-4, atol=1e-7)
    assert [phase.start for phase in made.decisions.phases] == [0.0, 0.4, 0.8]
    assert [len(phase.layers.get("llm", ())) for phase in made.decisions.phases] == [1, 1, 1]


def _live(eager: EagerPipeline, prompt: str) -> Tensor:
    """The rows of the published layout that are text or image [2, rows]."""
    config = eager.network.config
    lengths = [len(eager.codec.generation_prefix(text, config.max_prompt_tokens)) for text in (prompt, "")]
    index = torch.arange(config.sequence_length)
    return torch.stack([index < length + config.span_length for length in lengths])


def test_understanding_statistics_equal_eager_hooks(loaded: LoadedModel, understand: Program) -> None:
    generator = np.random.default_rng(0)
    picture = Image.fromarray(generator.integers(0, 256, (20, 20, 3), dtype=np.uint8))
    config = MMUConfig(pruning={"llm": 0.5}, width_multiple=8, layer_skipping={"llm": 0.5})
    codec, facts = PromptCodec(loaded.tokenizer), understanding(loaded)
    questions = [(picture, "what color is it?"), (picture, "how many?")]
    made = calibrate_mmu(understand, codec, facts, config, questions)

    model, eager = loaded.network, EagerPipeline(loaded)
    downs = [layer.mlp.down_proj for layer in model.showo.model.layers]
    squares = [torch.zeros(down.in_features, dtype=torch.float64) for down in downs]
    cosines, counted = torch.zeros(len(downs), dtype=torch.float64), 0
    for image, question in questions:
        answer = _greedy(eager, image, question)
        seen: dict[int, Tensor] = {}
        last: dict[int, Tensor] = {}

        def see_down(index: int, given: Tensor, _result: Tensor, seen: dict[int, Tensor] = seen) -> None:
            seen[index] = given[0].double().square().sum(0)

        tokens = len(answer) + 1

        def see_layer(
            index: int, given: Tensor, result: Tensor, last: dict[int, Tensor] = last, tokens: int = tokens
        ) -> None:
            pair = given[0, -tokens:].double(), result[0, -tokens:].double()
            last[index] = torch.cosine_similarity(*pair, dim=-1).sum()

        with hooks(downs, see_down), hooks(list(model.showo.model.layers), see_layer):
            _forward(eager, image, [*codec.question_suffix(question), *answer])
        for index in range(len(downs)):
            squares[index] += seen[index]
            cosines[index] += last[index]
        counted += len(answer) + 1
    for index, down in enumerate(downs):
        np.testing.assert_allclose(made.scores["llm"][index], wanda(squares[index], down), rtol=1e-5)
    np.testing.assert_allclose(
        made.figures["layer_importance"]["llm"], 1 - cosines / counted, rtol=1e-4, atol=1e-7
    )
    assert [len(phase.layers.get("llm", ())) for phase in made.decisions.phases] == [1]
    assert all(figure["image"] > 0 and figure["text"] > 0 for figure in made.figures["value_norms"])


@torch.inference_mode()
def _forward(eager: EagerPipeline, image: Image.Image, suffix: list[int]) -> Tensor:
    reference = UnderstandingReference(eager.network, eager.latents(image))
    return reference.logits(torch.tensor([eager.codec.question_prefix()]), torch.tensor([suffix]))[:, -1]


def _greedy(eager: EagerPipeline, image: Image.Image, question: str) -> list[int]:
    suffix, answer = eager.codec.question_suffix(question), []
    while len(answer) < 16:
        token = int(_forward(eager, image, [*suffix, *answer])[0].argmax())
        if token == eager.codec.eos:
            break
        answer.append(token)
    return answer


def test_the_same_samples_give_the_same_decisions(loaded: LoadedModel, denoise: Program) -> None:
    codec, facts = PromptCodec(loaded.tokenizer), generation(loaded)
    first, second = (calibrate_t2i(denoise, codec, facts, CONFIG, PROMPTS[:1], seed=1) for _ in range(2))
    assert first.decisions == second.decisions
    assert first.figures == second.figures


def test_decisions_do_not_depend_on_the_number_of_threads(
    loaded: LoadedModel, denoise: Program, understand: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    codec, config = PromptCodec(loaded.tokenizer), MMUConfig(pruning={"llm": 0.5}, width_multiple=8)
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 20, 3), dtype=np.uint8))
    questions = [(picture, text) for text in ("what color is it?", "how many?", "what is it?")]
    made = []
    for cores in (1, 3):
        monkeypatch.setattr(workers, "default_threads", lambda cores=cores: cores)
        drawn = calibrate_t2i(denoise, codec, generation(loaded), CONFIG, (*PROMPTS, "a circle"), seed=1)
        asked = calibrate_mmu(understand, codec, understanding(loaded), config, questions)
        made.append((drawn, asked))
    for one, other in zip(*made, strict=True):
        assert one.decisions == other.decisions
        assert one.figures == other.figures
        for stack, blocks in one.scores.items():
            for block, scores in blocks.items():
                np.testing.assert_array_equal(scores, other.scores[stack][block])


def test_activations_that_are_not_finite_are_an_error(loaded: LoadedModel) -> None:
    model: Showo2 = tiny_model()
    with torch.no_grad():
        model.showo.model.layers[1].mlp.up_proj.weight[3, 3] = torch.nan
    program = capture_program(capture_specs("t2i", model, VAE)[0])
    with pytest.raises(CalibrationError, match=r"FFN 1 of stack 'llm' are not finite on prompt 0 \('a red"):
        calibrate_t2i(program, PromptCodec(loaded.tokenizer), generation(loaded), CONFIG, PROMPTS)


def test_a_sample_that_fails_is_an_error(loaded: LoadedModel, denoise: Program) -> None:
    codec, facts = PromptCodec(loaded.tokenizer), generation(loaded)
    with pytest.raises(CalibrationError, match=r"failed on prompt 1 .*too long|prompt 1 .*tokens"):
        calibrate_t2i(denoise, codec, facts, CONFIG, ("a circle", "very " * 100))


def test_a_question_that_fails_is_an_error(loaded: LoadedModel, understand: Program) -> None:
    codec, facts = PromptCodec(loaded.tokenizer), understanding(loaded)
    with pytest.raises(CalibrationError, match="failed on question 0"):
        calibrate_mmu(understand, codec, facts, MMUConfig(), [("no-such.png", "what?")])


def test_questions_may_share_a_picture_that_no_one_has_read_yet(
    loaded: LoadedModel, understand: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (900, 900, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "noise.jpg")
    codec, facts = PromptCodec(loaded.tokenizer), understanding(loaded)
    config = MMUConfig(pruning={"llm": 0.5}, width_multiple=8)
    made = []
    for cores in (1, 4):
        monkeypatch.setattr(workers, "default_threads", lambda cores=cores: cores)
        with Image.open(tmp_path / "noise.jpg") as picture:
            made.append(calibrate_mmu(understand, codec, facts, config, [(picture, "what is it?")] * 4))
    assert made[0].figures == made[1].figures


def test_no_samples_are_an_error(loaded: LoadedModel, denoise: Program, understand: Program) -> None:
    codec = PromptCodec(loaded.tokenizer)
    with pytest.raises(CalibrationError, match="needs prompts"):
        calibrate_t2i(denoise, codec, generation(loaded), CONFIG, ())
    with pytest.raises(CalibrationError, match="needs pairs"):
        calibrate_mmu(understand, codec, understanding(loaded), MMUConfig(), ())


@given(
    hnp.arrays(np.float64, st.integers(8, 64), elements=st.sampled_from([0.0, 1.0, 2.0])),
    st.floats(0, 0.8),
    st.sampled_from([1, 2, 8]),
)
def test_kept_neurons_are_the_best_and_stable(scores: np.ndarray, ratio: float, multiple: int) -> None:
    if int((1 - ratio) * len(scores) + 1e-9) < multiple:
        with pytest.raises(RecipeError, match="less than one multiple"):
            keep_neurons(scores, ratio, multiple, "FFN 0")
        return
    kept = keep_neurons(scores, ratio, multiple, "FFN 0")
    assert len(kept) % multiple == 0
    assert len(kept) <= (1 - ratio) * len(scores) + 1e-9 < len(kept) + multiple
    assert (np.diff(kept) > 0).all()
    # Python's sort is stable: of equal scores the lower index comes first.
    ranked = sorted(range(len(scores)), key=lambda j: -scores[j])
    assert set(kept.tolist()) == set(ranked[: len(kept)])


def test_skipped_layers_are_the_least_important_and_stable() -> None:
    assert skip_layers([0.3, 0.1, 0.1, 0.2, 0.1], 0.4) == (1, 2)
    assert skip_layers([0.3, 0.1], 0.4) == ()
    assert skip_layers([0.1] * 10, 0.3) == (0, 1, 2)


class TestSamples:
    def test_lists_are_told_apart_by_what_they_hold(self) -> None:
        assert calibration_samples(["a", "b"]).prompts == ("a", "b")
        here = Path("x.png").absolute()
        assert calibration_samples([("x.png", "what?")]).questions == ((here, "what?"),)

    @pytest.mark.parametrize(
        ("value", "message"),
        [
            ([], "is empty"),
            ({}, "is empty"),
            (7, "not int"),
            ({"pictures": []}, "no entry 'pictures'"),
            ({"prompts": "a red circle"}, "'prompts' must be a list"),
            ({"prompts": [1]}, "prompt 0 is not a string"),
            ([("x.png", "what?"), ("y.png",)], "question 1 must be a pair"),
            ("no-such-file.json", "no-such-file.json does not exist"),
        ],
    )
    def test_bad_samples_are_named(self, value: object, message: str) -> None:
        with pytest.raises(CalibrationError, match=message):
            calibration_samples(value)

    def test_choice_follows_from_the_seed(self) -> None:
        samples = CalibrationSamples(tuple(f"p{i}" for i in range(50)))
        first, again, other = samples.chosen(5, 0), samples.chosen(5, 0), samples.chosen(5, 1)
        assert first.prompts == again.prompts != other.prompts
        assert len(first.prompts) == 5
        assert list(first.prompts) == sorted(first.prompts, key=lambda p: int(p[1:]))
        assert samples.chosen(100, 3).prompts == samples.prompts


def test_decisions_that_are_there_stay(loaded: LoadedModel) -> None:
    """Calibration takes the open ones alone."""
    neurons = {block: np.arange(0, 64) for block in range(loaded.network.config.llm.num_hidden_layers)}
    given = Recipe("mine", CONFIG, decisions={"t2i": Decisions({"llm": neurons})})
    made = calibrate(
        loaded.network, "t2i", recipe=given, calibration=PROMPTS, vae=loaded.vae, tokenizer=loaded.tokenizer
    )
    decided = made.decided("t2i")
    assert all(np.array_equal(decided.kept_neurons["llm"][b], kept) for b, kept in neurons.items())
    assert decided.phases
