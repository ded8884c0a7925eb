"""Stages are compared with data of the published code, and the authors' code is called as their scripts call it."""

from __future__ import annotations

import dataclasses
import itertools
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from examples import showo2_stages
from examples.showo2_stages import TIME, Authors, Inputs, Row, compare, differing, show
from flashu_compile.models.showo2.eager import EagerPipeline
from flashu_compile.models.showo2.modeling import Showo2
from flashu_compile.models.showo2.reference import GenerationReference
from tests.support.oracle import ORACLES, Oracle, load_oracle, relative_error
from tests.support.tiny import VAE

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


class Recorded:
    """The published code's own results."""

    def __init__(self, oracle: Oracle) -> None:
        self.oracle, self.tensors = oracle, oracle.tensors

    def prompt_ids(self, prompt: str) -> tuple[Tensor, Tensor]:
        return self.oracle.text, self.oracle.offsets

    def velocity(self, noise: Tensor, t: float) -> Tensor:
        assert t == TIME
        return self.tensors["velocity_t0.3"]

    def latents(self, noise: Tensor, points: int, guidance_scale: float) -> Tensor:
        return self.tensors["baseline_final"]

    def pixels(self, latents: Tensor) -> Tensor:
        return VAE.decode(latents)

    def image_embeddings(self, latents: Tensor) -> Tensor:
        return self.tensors["image_embeds"]

    def question_ids(self, question: str) -> tuple[list[int], list[int]]:
        return self.oracle.prefix[0].tolist(), self.oracle.suffix[0].tolist()

    def tokens(self, latents: Tensor, question: str, limit: int) -> list[int]:
        return self.tensors["mmu_greedy_tokens"][0].tolist()[:limit]


@pytest.fixture(scope="module", params=ORACLES)
def oracle(request: pytest.FixtureRequest) -> Oracle:
    return load_oracle(request.param)


@pytest.fixture
def given(oracle: Oracle) -> Inputs:
    facts = oracle.geometry
    return Inputs(
        "a prompt", oracle.tensors["noise"], facts["baseline_points"], facts["guidance_scale"],
        oracle.tensors["mmu_latents"], "a question", 8,
    )  # fmt: skip


def eager(oracle: Oracle) -> EagerPipeline:
    made = EagerPipeline.__new__(EagerPipeline)
    made.network, made.vae, made.codec = oracle.model, VAE, Codec(oracle)  # type: ignore[assignment]
    return made


def test_every_stage_agrees_with_the_published_code(oracle: Oracle, given: Inputs) -> None:
    rows = compare(Recorded(oracle), eager(oracle), given)
    assert [row.stage for row in rows] == [
        "prompt ids", "velocities at t = 0.3", f"latents after {given.points} points", "decoded pixels",
        "question ids", "picture embeddings", "tokens of the answer",
    ]  # fmt: skip
    assert all(row.within(1e-5) for row in rows), rows
    assert show(rows, 1e-5)


def test_without_a_picture_only_drawing_is_compared(oracle: Oracle, given: Inputs) -> None:
    rows = compare(Recorded(oracle), eager(oracle), dataclasses.replace(given, picture=None))
    assert rows[-1].stage == "decoded pixels"


def test_a_stage_that_is_off_is_named(
    oracle: Oracle, given: Inputs, capsys: pytest.CaptureFixture[str]
) -> None:
    theirs = Recorded(oracle)
    theirs.tensors = {**oracle.tensors, "baseline_final": 1.001 * oracle.tensors["baseline_final"]}
    rows = compare(theirs, eager(oracle), given)
    assert [row.stage for row in rows if not row.within(1e-4)] == [f"latents after {given.points} points"]
    assert not show(rows, 1e-4)
    assert "differs" in capsys.readouterr().out


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

    pad_token_id, eos_token_id = 0, EOS

    def __init__(self, oracle: Oracle) -> None:
        self.pieces = {
            "system\nYou are a helpful assistant.<|im_end|>": oracle.prefix[0, 1:-1].tolist(),
            "a question": oracle.suffix[0, 1:].tolist(),
        }

    def __call__(self, text: str, add_special_tokens: bool) -> dict[str, list[int]]:
        return {"input_ids": self.pieces.get(text, [])}


def naive_mask(count: int, rows: int, positions: Tensor, device: str) -> Tensor:
    mask = torch.ones(count, 1, rows, rows).tril()
    for row, ((offset, length),) in zip(mask, positions.tolist(), strict=True):
        row[:, offset : offset + length, offset : offset + length] = 1
    return torch.zeros_like(mask).masked_fill(mask == 0, torch.finfo(torch.float32).min)


class Sampler:
    """Integrates as the authors' does."""

    def __init__(self, transport: dict[str, Any]) -> None:
        assert transport["path_type"] == "Linear"

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
def authors(oracle: Oracle, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Authors:
    """Their repository, stood in for by modules of the same names and calls."""
    package, misc, transport = ModuleType("models"), ModuleType("models.misc"), ModuleType("transport")
    special = {
        f"{name}_id": oracle.geometry["token_ids"][name] for name in ("bos", "eos", "boi", "eoi", "img_pad")
    }
    special["bos_id"] = int(oracle.prefix[0, 0])
    positions = oracle.tensors["modality_positions"]
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
    misc.prepare_gen_input = lambda prompts, *rest: (  # type: ignore[attr-defined]
        oracle.text[:1], oracle.text[1:], positions[:1], positions[1:]
    )  # fmt: skip
    transport.Sampler, transport.create_transport = Sampler, dict  # type: ignore[attr-defined]
    for name, module in (("models", package), ("models.misc", misc), ("transport", transport)):
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(sys, "path", list(sys.path))
    return Authors(tmp_path, "checkpoint", "llm", "vae", oracle.model.config)


@torch.inference_mode()
def test_calls_of_the_authors_code_give_what_it_gave(authors: Authors, oracle: Oracle, given: Inputs) -> None:
    recorded = Recorded(oracle)
    ids, offsets = authors.prompt_ids(given.prompt)
    assert torch.equal(ids, oracle.text)
    assert torch.equal(offsets, oracle.offsets)
    for mine, theirs in (
        (authors.velocity(given.noise, TIME), recorded.velocity(given.noise, TIME)),
        (
            authors.latents(given.noise, given.points, given.guidance_scale),
            recorded.latents(given.noise, 0, 0),
        ),
        (authors.image_embeddings(oracle.tensors["mmu_latents"]), oracle.tensors["image_embeds"]),
    ):
        assert mine.shape == theirs.shape
        assert relative_error(mine, theirs) < 1e-5
    assert authors.question_ids("a question") == recorded.question_ids("a question")
    told = authors.tokens(oracle.tensors["mmu_latents"], "a question", 8)
    assert told == recorded.tokens(oracle.tensors["mmu_latents"], "a question", 8)
    assert all(row.within(1e-5) for row in compare(authors, eager(oracle), given))


def test_help_says_what_it_needs(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        showo2_stages.main(["--help"])
    assert "--repository" in capsys.readouterr().out
