"""FlashU's image generation a second time: plain PyTorch over the Showo2 module, for comparing compiled bundles.

It runs the published padded sequence, all rows, both guidance branches. Pruned neurons are set to zero where
they enter the down projection, which is what leaving them out comes to; skipped layers are not called. Nothing
here knows recipes, plans, passes or captured graphs: decisions are plain numbers, lists and mappings.

Steps are evaluations counted from 1. Stacks are named "llm", "semantic" and "head".
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from flashu_compile.models.showo2.layers import at_least_float32
from flashu_compile.models.showo2.modeling import RowTables, Showo2
from flashu_compile.models.showo2.reference import place_span, time_grid

Kept = Mapping[str, Mapping[int, Sequence[int]]]
"""stack → block → the hidden neurons that stay; a stack or block not named stays whole."""


def floor(value: float) -> int:
    """Round down, forgiving what a decimal share loses in binary: (1 - 0.8) · 320 is 64."""
    return math.floor(value + 1e-9)


# --- decisions -------------------------------------------------------------------------------------------------


@torch.inference_mode()
def wanda_scores(
    model: Showo2, text: Int[Tensor, "1 rows"], offset: int
) -> dict[int, Float[Tensor, " neurons"]]:
    """LLM layer → score of each hidden neuron, calibrated as the published script does.

    ‖X_j‖₂ · Σ_i |W_down[i, j]|, X being the input of the down projection over all rows of one padded sequence of
    ids: no image, no time embedding, but the mask with its image span at `offset`.
    """
    inputs: dict[int, Tensor] = {}

    def record(block: int) -> Callable[..., None]:
        def hook(_module: nn.Module, arguments: tuple[Tensor]) -> None:
            inputs[block] = arguments[0][0]

        return hook

    downs = _down_projections(model)["llm"]
    with contextlib.ExitStack() as stack:
        for block, down in enumerate(downs):
            stack.callback(down.register_forward_pre_hook(record(block)).remove)
        tables = model.published_tables(torch.tensor([offset]), model.config.span_length, text.shape[1])
        model.llm(model.embed_text(text), tables)
    return {block: x.norm(dim=0) * downs[block].weight.abs().sum(dim=0) for block, x in inputs.items()}


def kept_neurons(scores: Float[Tensor, " neurons"], pruned_share: float, multiple: int = 64) -> list[int]:
    """The best neurons, ascending; their number is (1 - share) · width rounded down to a multiple."""
    count = floor((1 - pruned_share) * len(scores)) // multiple * multiple
    best = scores.argsort(descending=True, stable=True)[:count]
    return sorted(best.tolist())


def least_important(importance: Float[Tensor, " layers"], share: float) -> list[int]:
    """The share of layers (rounded down) to skip, ascending; the lower index is the less important on ties."""
    return sorted(importance.argsort(stable=True)[: floor(share * len(importance))].tolist())


def in_force(computed: Mapping[int, Sequence[int]]) -> dict[int, list[int]]:
    """`skipped` of FlashuTwin from lists by the step they are computed on: nothing there, the list from the next."""
    phases: dict[int, list[int]] = {}
    for step, layers in sorted(computed.items()):
        phases |= {step: [], step + 1: list(layers)}
    return phases


# --- the sampler -----------------------------------------------------------------------------------------------


class TwinTrajectory(NamedTuple):
    """What sampling gave.

    latents [1, c, h, w]; velocities [evaluations, c, h, w], guided; importance: step of `rank_on` → [LLM layers];
    computed: the steps whose head features were computed, the others having reused stored ones.
    """

    latents: Tensor
    velocities: Tensor
    importance: dict[int, Tensor]
    computed: tuple[int, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class FlashuTwin:
    """The patched sampler.

    - scales: guidance scale of each evaluation; None or 1 runs the conditional branch alone.
    - shift: of the time grid, which has one point more than there are evaluations.
    - kept: neurons that stay on steps that are not full.
    - skipped: LLM layers left out from a step on until the next entry's, on steps that are not full.
    - full: steps on which nothing is pruned, skipped or cached.
    - whole: steps on which nothing is pruned or skipped, and whose features are stored.
    - cache_interval: the head stack runs on multiples of it, and where nothing usable is stored; 1 is no cache.
      Multiples store; full steps empty the store; one branch stored does not serve two.
    - extrapolate: a reusing step continues the line through the last two stored features instead of holding
      the last, when both serve.
    - solver: "euler", or "ab2": Adams–Bashforth 2 on the grid as it is, its first step Euler.
    - rank_on: steps whose LLM layers are measured, on all rows of the branches that run; nothing is skipped there,
      and a reusing step runs the LLM for this alone.
    - rank_share: None measures only; a share makes that part of the layers, the least important, the skipped ones
      from the next step on (then `skipped` must be empty).

    Raises `ValueError` on an unknown solver, and where layers are both given and ranked.
    """

    model: Showo2
    scales: Sequence[float | None]
    shift: float = 3.0
    kept: Kept = dataclasses.field(default_factory=dict)
    skipped: Mapping[int, Sequence[int]] = dataclasses.field(default_factory=dict)
    full: Collection[int] = ()
    whole: Collection[int] = ()
    cache_interval: int = 1
    extrapolate: bool = False
    solver: str = "euler"
    rank_on: Collection[int] = ()
    rank_share: float | None = None

    def __post_init__(self) -> None:
        if self.solver not in ("euler", "ab2"):
            raise ValueError(f"Unknown solver {self.solver!r}; use 'euler' or 'ab2'.")
        if self.rank_share is not None and self.skipped:
            raise ValueError("Layers are either given in `skipped` or ranked with `rank_share`, not both.")

    @torch.inference_mode()
    def run(
        self, text: Int[Tensor, "2 rows"], offsets: Int[Tensor, "2"], noise: Float[Tensor, "1 c h w"]
    ) -> TwinTrajectory:
        """Sample from `noise`. Rows of `text`: the prompt, the empty prompt; `offsets`: where their spans start."""
        both = _Sequence(self.model, text, offsets)
        prompt = _Sequence(self.model, text[:1], offsets[:1])
        grid = time_grid(len(self.scales) + 1, self.shift).tolist()
        latents, velocities = noise, list[Tensor]()
        store, computed = list[tuple[float, Tensor]](), list[int]()
        phases, importance = {0: list[int](), **self.skipped}, dict[int, Tensor]()

        for step, scale in enumerate(self.scales, start=1):
            t, guided = grid[step - 1], scale is not None and scale != 1
            sequence = both if guided else prompt
            full, ranks = step in self.full, step in self.rank_on
            whole = full or step in self.whole
            due = self.cache_interval > 1 and step % self.cache_interval == 0
            stores = (due or step in self.whole) and not full
            if full:
                store.clear()
            usable = _serving(store, 2 if guided else 1)
            reuses = bool(usable) and not stores

            states = list[Tensor]()
            with pruned(self.model, {} if whole else self.kept):
                if ranks or not reuses:
                    layers = phases[max(start for start in phases if start <= step)]
                    states = sequence.states(latents, t, [] if whole or ranks else layers)
                    if ranks:
                        importance[step] = _importance(states)
                    if ranks and self.rank_share is not None:
                        phases[step + 1] = least_important(importance[step], self.rank_share)
                if reuses:
                    features = self._reused(usable, t)
                else:
                    features = sequence.features(states[-1], t)
                    computed.append(step)
            if stores:
                store.append((t, features))

            outputs = sequence.velocity(features, t).to(noise)
            velocity = outputs[:1] if scale is None or not guided else _guide(outputs, scale)
            latents = latents + self._increment([*velocities, velocity], grid, step)
            velocities.append(velocity)
        return TwinTrajectory(latents, torch.cat(velocities), importance, tuple(computed))

    def _reused(self, usable: Sequence[tuple[float, Tensor]], t: float) -> Tensor:
        last_t, last = usable[-1]
        if not self.extrapolate or len(usable) < 2:
            return last
        first_t, first = usable[-2]
        return last + (t - last_t) / (last_t - first_t) * (last - first)

    def _increment(self, velocities: Sequence[Tensor], grid: Sequence[float], step: int) -> Tensor:
        dt = grid[step] - grid[step - 1]
        if self.solver == "euler" or step == 1:
            return dt * velocities[-1]
        ratio = dt / (grid[step - 1] - grid[step - 2])
        return dt * ((1 + ratio / 2) * velocities[-1] - ratio / 2 * velocities[-2])


def _guide(outputs: Float[Tensor, "2 c h w"], scale: float) -> Float[Tensor, "1 c h w"]:
    conditional, unconditional = outputs.split(1)
    return unconditional + scale * (conditional - unconditional)


def _serving(store: Sequence[tuple[float, Tensor]], branches: int) -> list[tuple[float, Tensor]]:
    """The last two stored features, cut to `branches` rows; only the last, or none, where one has fewer."""
    serving: list[tuple[float, Tensor]] = []
    for t, features in reversed(store[-2:]):
        if len(features) < branches:
            break
        serving.insert(0, (t, features[:branches]))
    return serving


def _importance(states: Sequence[Float[Tensor, "b rows hidden"]]) -> Float[Tensor, " layers"]:
    """1 − mean cosine of each layer's input and output, over all rows; the last output is after the final norm."""
    pairs = itertools.pairwise(at_least_float32(state) for state in states)
    return torch.stack([1 - F.cosine_similarity(a, b, dim=-1).mean() for a, b in pairs])


class _Sequence:
    """One padded batch: what depends on its ids alone, and the network in three parts."""

    def __init__(self, model: Showo2, text: Int[Tensor, "b rows"], offsets: Int[Tensor, " b"]) -> None:
        self.model, self.offsets = model, offsets
        self.text = model.embed_text(text)
        self.tables: RowTables = model.published_tables(offsets, model.config.span_length, text.shape[1])

    def states(self, latents: Tensor, t: float, skipped: Sequence[int]) -> list[Tensor]:
        """The rows before every LLM layer (a skipped one leaves them as they are), then after the final norm."""
        model = self.model
        image = model.embed_image(latents.expand(len(self.text), -1, -1, -1))
        time_row = model.embed_time(self._times(t))[1]
        span = image if time_row is None else torch.cat([time_row, image], dim=1)
        states = [place_span(self.text, span, self.offsets.tolist())]
        for index, layer in enumerate(model.showo.model.layers):
            rows = states[-1]
            if index not in skipped:
                mask, rotary = self.tables.mask, self.tables.llm_rotary
                rows = layer(rows, attention_mask=mask, position_embeddings=rotary)
            states.append(rows)
        return [*states[:-1], model.showo.model.norm(states[-1])]

    def features(self, hidden: Tensor, t: float) -> Float[Tensor, "b tokens head_hidden"]:
        """The head stack's output on the image tokens."""
        rows = self.model.head(hidden, self.model.embed_time(self._times(t))[0], self.tables)
        ends = (self.offsets + self.model.config.span_length).tolist()
        tokens = self.model.config.image_tokens
        return torch.stack([row[end - tokens : end] for row, end in zip(rows, ends, strict=True)])

    def velocity(self, features: Tensor, t: float) -> Float[Tensor, "b c h w"]:
        return self.model.velocity(features, self.model.embed_time(self._times(t))[0])

    def _times(self, t: float) -> Float[Tensor, " b"]:
        return torch.full((len(self.text),), t, dtype=self.model.dtype)


# --- pruning ---------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def pruned(model: Showo2, kept: Kept) -> Iterator[None]:
    """Within it every hidden neuron that is not kept is zero where it enters its down projection.

    Raises `KeyError` and `IndexError` on stacks, blocks and neurons the model does not have.
    """
    downs = _down_projections(model)
    with contextlib.ExitStack() as stack:
        for name, blocks in kept.items():
            for block, neurons in blocks.items():
                down = downs[name][block]
                mask = torch.zeros(down.in_features, dtype=down.weight.dtype)
                mask[list(neurons)] = 1
                stack.callback(down.register_forward_pre_hook(_masking(mask)).remove)
        yield


def _masking(mask: Tensor) -> Callable[[nn.Module, tuple[Tensor]], tuple[Tensor]]:
    return lambda _module, arguments: (arguments[0] * mask,)


def _down_projections(model: Showo2) -> dict[str, list[nn.Linear]]:
    stacks: dict[str, tuple[Iterable[Any], str]] = {
        "llm": (model.showo.model.layers, "down_proj"),
        "semantic": (model.und_trans.layers, "fc2"),
        "head": (model.diffusion_head_a, "down_proj"),
    }
    return {stack: [getattr(b.mlp, name) for b in blocks] for stack, (blocks, name) in stacks.items()}
