"""Stages are compared with data of the published code, and the authors' code is called as their scripts call it."""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from examples import showo2_stages
from examples.showo2_authors import INPUTS, RECORDED, SETTINGS, Authors
from examples.showo2_shapes.saving import save_model
from examples.showo2_stages import Row, compare_answer, compare_drawing, differing, settings_of, show
from flashu_compile.models.showo2.eager import EagerPipeline
from flashu_compile.models.showo2.modeling import Showo2
from flashu_compile.models.showo2.reference import GenerationReference, UnderstandingReference, generate
from tests.support.oracle import ORACLES, Oracle, load_oracle, relative_error
from tests.support.tiny import VAE, tiny_model, tokenizer

EOS = 1 << 20  # no token ends an answer of the oracles


class Codec:
    """Gives the ids that the oracle was made with."""

    eos = EOS

    def __init__(self, oracle: Oracle) -> None:
        self.oracle, self.image_pad = oracle, oracle.geometry["token_ids"]["img_pad"]

    def generation_prefix(self, prompt: str, limit: int) -> list[int]:
        row = 0 if prompt else 1
        return self.oracle.text[row, : self.oracle.offsets[row]].tolist()

    def generation_tail(self, length: int) -> list[int]:
        row = 0 if length < self.oracle.text.shape[1] - self.oracle.offsets[1] - self.span else 1
        return self.oracle.text[row, -length:].tolist()

    @property
    def span(self) -> int:
        return self.oracle.model.config.span_length

    def question_prefix(self) -> list[int]:
        return self.oracle.prefix[0].tolist()

    def question_suffix(self, question: str) -> list[int]:
        return self.oracle.suffix[0].tolist()


@pytest.fixture(scope="module", params=ORACLES)
def oracle(request: pytest.FixtureRequest) -> Oracle:
    return load_oracle(request.param)


@pytest.fixture
def eager(oracle: Oracle) -> EagerPipeline:
    made = EagerPipeline.__new__(EagerPipeline)
    made.network, made.vae, made.codec = oracle.model, VAE, Codec(oracle)  # type: ignore[assignment]
    return made


@pytest.fixture
def settings(oracle: Oracle, eager: EagerPipeline) -> dict[str, Any]:
    facts = oracle.geometry
    return settings_of(
        eager, prompt="a prompt", points=facts["baseline_points"], guidance_scale=facts["guidance_scale"],
        question="a question", tokens=8,
    )  # fmt: skip


@pytest.fixture
def inputs(oracle: Oracle) -> dict[str, Tensor]:
    return {"noise": oracle.tensors["noise"], "picture": oracle.tensors["mmu_latents"]}


@pytest.fixture
def recorded(oracle: Oracle) -> dict[str, Tensor]:
    """The published code's own results."""
    tensors = oracle.tensors
    return {
        "prompt_ids": oracle.text,
        "offsets": oracle.offsets,
        "velocity": tensors["velocity_t0.3"],
        "latents": tensors["baseline_final"],
        "pixels": VAE.decode(tensors["baseline_final"]),
        "before": oracle.prefix[0],
        "behind": oracle.suffix[0],
        "image_embeddings": tensors["image_embeds"],
        "answer": tensors["mmu_greedy_tokens"][0, :8],
    }


def test_every_stage_agrees_with_the_published_code(
    recorded: dict[str, Tensor],
    eager: EagerPipeline,
    inputs: dict[str, Tensor],
    settings: dict[str, Any],
) -> None:
    rows = compare_drawing(recorded, eager, inputs, settings)
    rows += compare_answer(recorded, eager, inputs["picture"], settings)
    assert [row.stage for row in rows] == [
        "prompt ids", "velocities at t = 0.3", f"latents after {settings['points']} points", "decoded pixels",
        "question ids", "picture embeddings", "tokens of the answer",
    ]  # fmt: skip
    assert all(row.within(1e-5) for row in rows), rows
    assert show(rows, 1e-5)


def test_a_stage_that_is_off_is_named(
    recorded: dict[str, Tensor],
    eager: EagerPipeline,
    inputs: dict[str, Tensor],
    settings: dict[str, Any],
    capsys: pytest.CaptureFixture[str],
) -> None:
    recorded["velocity"] = 1.001 * recorded["velocity"]
    rows = compare_drawing(recorded, eager, inputs, settings)
    assert [row.stage for row in rows if not row.within(1e-4)] == ["velocities at t = 0.3"]
    assert not show(rows, 1e-4)
    assert "differs" in capsys.readouterr().out


def test_an_answer_that_ends_is_compared_with_its_end(
    recorded: dict[str, Tensor], eager: EagerPipeline, inputs: dict[str, Tensor], settings: dict[str, Any]
) -> None:
    told = recorded["answer"]
    for answer, equal in ((told[:3], True), (torch.cat([told[:3], torch.tensor([EOS])]), False)):
        row = compare_answer({**recorded, "answer": answer}, eager, inputs["picture"], settings)[-1]
        assert row.within(1) is equal


def test_ids_have_to_be_equal() -> None:
    assert differing([1, 2, 3], [1, 2, 3]) == 0
    assert differing([1, 2, 3, 4], [1, 2]) == differing([1, 2], [1, 2, 3, 4]) == 0.5
    assert not Row("ids", "eager", 1e-9, exact=True).within(1)


class Network:
    """A model with the interface of the authors', computed by this project's."""

    def __init__(self, model: Showo2) -> None:
        self.own, config = model, model.config
        self.image_embedder_und, self.image_embedder_gen = model.image_embedder_und, model.image_embedder_gen
        self.position_embedding, self.fusion_proj = model.position_embedding, model.fusion_proj
        self.image_position_ids = torch.arange(config.position_grid**2)[None]
        self.showo = model.showo
        if model.bridged:
            self.time_embed_proj = model.time_embed_proj

    def float(self) -> Network:
        return self

    def eval(self) -> Network:
        return self

    def und_trans(self, rows: Tensor) -> dict[str, Tensor]:
        return {"last_hidden_state": self.own.und_trans(inputs_embeds=rows).last_hidden_state}

    def time_embed(self, t: Tensor, dtype: torch.dtype) -> Tensor:
        return self.own.time_embed(t)

    def __call__(self, text_tokens: Tensor, image_latents: Tensor, t: Tensor, modality_positions: Tensor,
                 **_: Any) -> tuple[None, Tensor]:  # fmt: skip
        reference = GenerationReference(self.own, text_tokens, modality_positions[:, 0, 0])
        return None, reference.step(image_latents, t).velocity

    def t2i_generate(self, latents: Tensor, t: Tensor, guidance_scale: float, **given: Any) -> Tensor:
        prompt, empty = self(image_latents=latents, t=t, **given)[1]
        return (empty + guidance_scale * (prompt - empty)).expand(2, -1, -1, -1)

    def mmu_generate(
        self, input_embeds: Tensor, attention_mask: Tensor, top_k: int, max_new_tokens: int, eos_token: int
    ) -> list[Tensor]:
        told: list[Tensor] = []
        while len(told) < max_new_tokens:
            count = input_embeds.shape[1]
            mask = torch.full((1, 1, count, count), -torch.inf).triu(1)
            first = attention_mask.shape[-1]
            mask[..., :first, :first] = attention_mask
            tables = self.own.tables(torch.zeros(1, count, dtype=torch.bool), torch.arange(count)[None])
            hidden = self.own.llm(input_embeds, tables._replace(mask=mask))
            told.append(self.own.logits(hidden)[0, -1].argmax())
            input_embeds = torch.cat([input_embeds, self.showo.model.embed_tokens(told[-1])[None, None]], 1)
        return told


class Words:
    """A tokenizer whose pieces are those of the oracle."""

    eos_token_id = EOS

    def __init__(self, oracle: Oracle) -> None:
        self.pad_token_id = oracle.geometry["token_ids"]["pad"]
        self.pieces = {
            "system\nYou are a helpful assistant.<|im_end|>": oracle.prefix[0, 1:-1].tolist(),
            "a question": oracle.suffix[0, 1:].tolist(),
            "a prompt": oracle.text[0, 1 : oracle.offsets[0] - 1].tolist(),
        }

    def __call__(self, text: str, add_special_tokens: bool) -> dict[str, list[int]]:
        return {"input_ids": self.pieces.get(text, [])}


def naive_mask(count: int, rows: int, positions: Tensor, device: str) -> Tensor:
    mask = torch.ones(count, 1, rows, rows).tril()
    for row, ((offset, length),) in zip(mask, positions.tolist(), strict=True):
        row[:, offset : offset + length, offset : offset + length] = 1
    return torch.zeros_like(mask).masked_fill(mask == 0, torch.finfo(torch.float32).min)


def prepare_gen_input(prompts: list[str], text_tokenizer: Words, num_image_tokens: int, bos_id: int, eos_id: int,
                      boi_id: int, eoi_id: int, pad_id: int, img_pad_id: int, max_text_len: int,
                      device: str) -> tuple[Tensor, ...]:  # fmt: skip
    """Lay out a prompt and the empty one as the oracle's are."""
    rows, places = [], []
    for text in (text_tokenizer(prompts[0], add_special_tokens=False)["input_ids"], []):
        rows.append(torch.tensor([[bos_id, *text, boi_id, *[img_pad_id] * num_image_tokens, eoi_id, eos_id,
                                   *[pad_id] * (max_text_len - len(text))]]))  # fmt: skip
        places.append(torch.tensor([[[len(text) + 2, num_image_tokens]]]))
    return (*rows, *places)


def create_transport(*, path_type: str, prediction: str, loss_weight: None, train_eps: None, sample_eps: None,
                     snr_type: str, do_shift: bool, seq_len: int) -> dict[str, Any]:  # fmt: skip
    return {"path_type": path_type, "prediction": prediction}


class Sampler:
    """Integrates as the authors' does."""

    def __init__(self, transport: dict[str, Any]) -> None:
        assert transport == {"path_type": "Linear", "prediction": "velocity"}

    def sample_ode(
        self, *, num_steps: int, time_shifting_factor: float, sampling_method: str, **_: Any
    ) -> Any:
        assert sampling_method == "euler"

        def sample(state: Tensor, call: Any, **given: Any) -> list[Tensor]:
            t = torch.linspace(0, 1, num_steps)
            t = t / (t + time_shifting_factor - time_shifting_factor * t)
            for now, then in itertools.pairwise(t):
                state = state + (then - now) * call(state, torch.full((len(state),), float(now)), **given)
            return [state]

        return sample


@pytest.fixture
def authors(
    oracle: Oracle, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Authors:
    """Their repository, stood in for by modules of the same names and calls."""
    package, misc, transport = ModuleType("models"), ModuleType("models.misc"), ModuleType("transport")
    special = {
        f"{name}_id": oracle.geometry["token_ids"][name] for name in ("bos", "eos", "boi", "eoi", "img_pad")
    }
    made: dict[str, Any] = {
        "misc": misc,
        "omni_attn_mask_naive": naive_mask,
        "Showo2Qwen2_5": SimpleNamespace(from_pretrained=lambda path, use_safetensors: Network(oracle.model)),
        "WanVAE": lambda vae_pth, dtype, device: SimpleNamespace(
            batch_decode=lambda z: VAE.decode(z[:, :, 0])[:, :, None]
        ),
    }
    for name, value in made.items():
        setattr(package, name, value)
    misc.get_text_tokenizer = lambda *a, **k: (Words(oracle), special)  # type: ignore[attr-defined]
    misc.prepare_gen_input = prepare_gen_input  # type: ignore[attr-defined]
    transport.Sampler, transport.create_transport = Sampler, create_transport  # type: ignore[attr-defined]
    for name, module in (("models", package), ("models.misc", misc), ("transport", transport)):
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(sys, "path", list(sys.path))
    return Authors(tmp_path, "checkpoint", "llm", "vae", settings)


def test_calls_of_the_authors_code_give_what_it_gave(
    authors: Authors, recorded: dict[str, Tensor], inputs: dict[str, Tensor]
) -> None:
    made = authors.record(inputs)
    assert made.keys() == recorded.keys()
    for name, value in recorded.items():
        assert made[name].shape == value.shape, name
        if value.dtype.is_floating_point:
            assert relative_error(made[name], value) < 1e-5, name
        else:
            assert torch.equal(made[name], value), name


def test_without_a_picture_only_drawing_is_recorded(authors: Authors, inputs: dict[str, Tensor]) -> None:
    assert "answer" not in authors.record({"noise": inputs["noise"]})


def test_the_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A checkpoint with its own VAE and tokenizer against itself: the table, and the exit status."""
    network, words = tiny_model(), tokenizer()
    save_model(tmp_path / "m", network, words, VAE)
    folder = tmp_path / "stages"
    picture = tmp_path / "picture.png"
    Image.new("RGB", (20, 30), (200, 40, 40)).save(picture)
    about = ("--checkpoint", str(tmp_path / "m"), "--folder", str(folder))
    assert (
        showo2_stages.main(["prepare", *about, "--picture", str(picture), "--points", "3", "--tokens", "2"])
        == 0
    )
    given = json.loads((folder / SETTINGS).read_text())
    assert given["points"] == 3
    assert given["time"] == 0.3
    eager = showo2_stages.opened(showo2_stages.parser().parse_args(["compare", *about]))
    inputs = load_file(folder / INPUTS)
    recorded = of_itself(eager, inputs, given)
    save_file(recorded, folder / RECORDED)
    assert showo2_stages.main(["compare", *about]) == 0
    save_file({**recorded, "answer": recorded["answer"] + 1}, folder / RECORDED)
    assert showo2_stages.main(["compare", *about]) == 1
    assert "tokens of the answer" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        showo2_stages.main(["prepare", *about, "--guidance-scale", "0"])


def of_itself(eager: EagerPipeline, inputs: dict[str, Tensor], given: dict[str, Any]) -> dict[str, Tensor]:
    """What the authors' code would record of this project's model."""
    codec, noise = eager.codec, inputs["noise"]
    ids, places = eager.published_rows(given["prompt"])
    step = GenerationReference(eager.network, ids, places).step(
        noise.repeat(2, 1, 1, 1), torch.full((2,), 0.3)
    )
    latents = generate(
        eager.network, ids, places, noise, points=given["points"], guidance_scale=given["guidance_scale"]
    ).latents
    prefix, suffix = codec.question_prefix(), codec.question_suffix(given["question"])
    asked = UnderstandingReference(eager.network, inputs["picture"])
    told = asked.greedy(torch.tensor([prefix]), torch.tensor([suffix]), given["tokens"], None)
    found = {
        "prompt_ids": ids, "offsets": places, "velocity": step.velocity, "latents": latents,
        "pixels": eager.vae.decode(latents), "before": torch.tensor(prefix), "behind": torch.tensor(suffix),
        "image_embeddings": asked.image, "answer": torch.tensor(told),
    }  # fmt: skip
    return {name: value.clone().contiguous() for name, value in found.items()}
