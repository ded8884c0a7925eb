"""The oracle data of `tests/data/oracle` (see the README there), with the model it belongs to."""

from __future__ import annotations

import dataclasses
import itertools
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from flashu_compile.models.showo2.config import HeadConfig, LLMConfig, SemanticConfig, Showo2Config
from flashu_compile.models.showo2.modeling import Showo2

ORACLES = ("tiny", "phases")
_DATA = Path(__file__).parents[1] / "data" / "oracle"


@dataclasses.dataclass(frozen=True)
class FlashuDecisions:
    """Parameters and decisions of an oracle's patched run. Steps are evaluations counted from 1.

    `guidance_scale` is s₀; `guidance_spans` are (evaluations, scale) one after the other, the last one counting a
    step more than is run. `kept_neurons`: LLM layer → neurons, ascending. `skip_lists`: step a list is computed
    on → LLM layers; nothing is skipped on that step, and the list holds from the next one. `full_steps`: how many
    steps, the last ones, run everything (one fewer than the published τ).
    """

    points: int
    time_shift: float
    guidance_scale: float
    guidance_spans: tuple[tuple[int, float], ...]
    ffn_pruning: float
    kept_neurons: dict[int, list[int]]
    layer_skipping: float
    skipping_interval: int
    skip_lists: dict[int, tuple[int, ...]]
    head_cache: int
    full_steps: int

    @property
    def evaluations(self) -> int:
        return self.points - 1

    @property
    def scales(self) -> list[float]:
        """The guidance scale of every evaluation."""
        scales = [scale for count, scale in self.guidance_spans for _ in range(count)]
        return scales[: self.evaluations]

    @property
    def guidance(self) -> tuple[tuple[float, float], ...]:
        """(from this fraction of the evaluations on, factor on s₀), as `T2IConfig` takes it."""
        starts = itertools.accumulate((count for count, _ in self.guidance_spans), initial=0)
        spans = zip(starts, self.guidance_spans, strict=False)
        return tuple((start / self.evaluations, scale / self.guidance_scale) for start, (_, scale) in spans)

    @property
    def full(self) -> range:
        """The steps that run everything."""
        return range(self.evaluations - self.full_steps + 1, self.evaluations + 1)

    @property
    def phases(self) -> tuple[tuple[float, tuple[int, ...]], ...]:
        """(from this fraction of the evaluations on, LLM layers to skip), nothing on the steps lists come from."""
        return tuple(
            phase
            for step, layers in self.skip_lists.items()
            for phase in (((step - 1) / self.evaluations, ()), (step / self.evaluations, layers))
        )


@dataclasses.dataclass(frozen=True)
class Oracle:
    """`model` is a fresh network in eval mode, loaded strictly; `tensors` are inputs and expected outputs."""

    geometry: dict[str, Any]
    tensors: dict[str, Tensor]
    model: Showo2

    @property
    def text(self) -> Tensor:
        """Ids of the prompt and of the empty prompt in the published layout [2, rows]."""
        return self.tensors["text_tokens"]

    @property
    def offsets(self) -> Tensor:
        """The row of each time token [2]."""
        return self.tensors["modality_positions"][:, 0, 0]

    @property
    def prefix(self) -> Tensor:
        """Ids before the picture in the understanding sequence, boi included [1, prefix]."""
        return torch.tensor([[*self.geometry["mmu_prefix_ids"], self.geometry["token_ids"]["boi"]]])

    @property
    def suffix(self) -> Tensor:
        """Ids after the picture, eoi included [1, suffix]."""
        return torch.tensor([[self.geometry["token_ids"]["eoi"], *self.geometry["mmu_question_ids"]]])

    @property
    def flashu(self) -> FlashuDecisions:
        """What the published patch was told and what it decided."""
        facts = self.geometry["flashu"]
        layers = range(self.geometry["num_hidden_layers"])
        kept = {i: sorted(self.tensors[f"flashu_kept_neurons.{i}"].tolist()) for i in layers}
        lists = {int(step): tuple(skips) for step, skips in facts["skip_lists_by_step"].items()}
        return FlashuDecisions(
            points=facts["points"],
            time_shift=3.0,
            guidance_scale=facts["fallback_guidance"],
            guidance_spans=tuple((count, scale) for count, scale in facts["guidance"]),
            ffn_pruning=facts["r_p"],
            kept_neurons=kept,
            layer_skipping=facts["r_LS"],
            skipping_interval=facts["T_LS"],
            skip_lists=dict(sorted(lists.items())),
            head_cache=facts["T_cache"],
            full_steps=facts["tau"] - 1,
        )


def load_oracle(name: str, dtype: torch.dtype = torch.float32) -> Oracle:
    """The oracle `name` of `ORACLES`, its model in `dtype`."""
    folder = _DATA / name
    geometry = json.loads((folder / "geometry.json").read_text())
    tensors = load_file(folder / "oracle.safetensors")
    model = Showo2(_config(geometry, tensors["text_tokens"].shape[1]))
    model.load_state_dict(load_file(folder / "model.safetensors"), strict=True)
    return Oracle(geometry, tensors, model.to(dtype).eval())


def relative_error(value: Tensor, expected: Tensor) -> float:
    """Relative L2 distance, computed in float64."""
    value, expected = value.double(), expected.double()
    return ((value - expected).norm() / expected.norm()).item()


def _config(geometry: dict[str, Any], rows: int) -> Showo2Config:
    return Showo2Config(
        llm=LLMConfig(
            vocab_size=geometry["vocab_size"],
            hidden_size=geometry["hidden_size"],
            intermediate_size=geometry["intermediate_size"],
            num_hidden_layers=geometry["num_hidden_layers"],
            num_attention_heads=geometry["num_attention_heads"],
            num_key_value_heads=geometry["num_key_value_heads"],
            tie_word_embeddings=geometry.get("tie_word_embeddings", True),
        ),
        semantic=SemanticConfig(
            hidden_size=geometry["clip_hidden_size"],
            intermediate_size=geometry["clip_intermediate_size"],
            num_hidden_layers=geometry["clip_num_layers"],
            num_attention_heads=geometry["clip_num_heads"],
        ),
        head=HeadConfig(
            hidden_size=geometry["head_hidden_size"],
            intermediate_size=geometry["head_intermediate_size"],
            num_hidden_layers=geometry["head_num_layers"],
        ),
        latent_grid=geometry["latent_grid"],
        position_grid=geometry["latent_grid"],
        sequence_length=rows,
        guidance_scale=geometry["guidance_scale"],
    )
