"""Train showo2-shapes, the bundled model, from scratch.

    python -m examples.showo2_shapes.train --output runs/shapes --steps 3000

Stops and resumes at will: `state.pt` holds weights, optimiser state and the step; batches depend on (seed, step)
alone. The learning rate is constant and falls linearly to zero over the last `--cooldown` steps, so a longer
training can go on from a state saved before the cooldown (`state-plateau.pt`).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from examples.showo2_shapes.data import (
    IGNORE,
    GenerationBatch,
    QuestionBatch,
    generation_batch,
    question_batch,
)
from flashu_compile.models.loading import load_model
from flashu_compile.models.showo2.config import HeadConfig, LLMConfig, SemanticConfig, Showo2Config
from flashu_compile.models.showo2.layout import attention_mask, row_positions
from flashu_compile.models.showo2.modeling import Showo2
from flashu_compile.models.showo2.prompts import PromptCodec
from flashu_compile.models.vae import SpaceToDepth

HERE = Path(__file__).parent
TOKENIZER = HERE.parents[1] / "flashu_compile" / "models" / "showo2_shapes" / "tokenizer.json"
CANVAS = 32
VAE = SpaceToDepth(factor=4, mean=0.78, std=0.39)


def shapes_config(vocabulary: int) -> Showo2Config:
    return Showo2Config(
        llm=LLMConfig(
            vocab_size=vocabulary,
            hidden_size=192,
            intermediate_size=640,
            num_hidden_layers=12,
            num_attention_heads=6,
            num_key_value_heads=2,
        ),
        semantic=SemanticConfig(
            hidden_size=160, intermediate_size=480, num_hidden_layers=3, num_attention_heads=5
        ),
        head=HeadConfig(
            hidden_size=256,
            intermediate_size=768,
            num_hidden_layers=3,
            num_attention_heads=8,
            num_key_value_heads=2,
        ),
        latent_channels=VAE.latent_channels,
        patch_size=1,
        latent_grid=CANVAS // VAE.spatial_factor,
        position_grid=CANVAS // VAE.spatial_factor,
        sequence_length=128,
        guidance_scale=4.0,
        understanding_span_start="time",
    )


def initialise(model: Showo2) -> None:
    """Zero the final projection and the modulations; gates start at 1 on the image span as they are elsewhere."""
    nn.init.normal_(model.position_embedding.weight, std=0.02)
    nn.init.zeros_(model.diffusion_head_b.linear.weight)
    nn.init.zeros_(model.diffusion_head_b.linear.bias)
    for block in [*model.diffusion_head_a, model.diffusion_head_b]:
        modulation = block.adaLN_modulation[1]
        nn.init.zeros_(modulation.weight)
        nn.init.zeros_(modulation.bias)
        if modulation.out_features == 6 * modulation.in_features:
            gates = modulation.bias.data.view(6, -1)
            gates[2], gates[5] = 1.0, 1.0


@contextlib.contextmanager
def matmul_attention() -> Iterator[None]:
    """Attention as plain bf16 matrix products: 1.7 times faster to train on CPU than the fused kernel."""

    def attention(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor, **_: object) -> Tensor:
        query, key, value = (x.to(torch.bfloat16) for x in (query * query.shape[-1] ** -0.5, key, value))
        scores = query @ key.transpose(-1, -2)
        if attn_mask is not None:
            scores = scores + torch.where(attn_mask, 0.0, -1e4).to(scores.dtype)
        with torch.autocast("cpu", enabled=False):
            weights = scores.softmax(-1)
        return weights @ value

    functions: Any = F  # PyTorch declares its parameters positionally
    fused, functions.scaled_dot_product_attention = F.scaled_dot_product_attention, attention
    try:
        yield
    finally:
        functions.scaled_dot_product_attention = fused


def generation_loss(model: Showo2, batch: GenerationBatch) -> Tensor:
    """Flow matching: x_t = t x + (1 - t) noise, target velocity x - noise."""
    data, noise = VAE.encode(batch.pixels), F.pixel_unshuffle(batch.noise, VAE.spatial_factor)
    weight = batch.t[:, None, None, None]
    with torch.autocast("cpu", torch.bfloat16):
        time_features, time_row = model.embed_time(batch.t)
        assert time_row is not None, "the model embeds time"
        image = model.embed_image(weight * data + (1 - weight) * noise)
        rows = torch.cat([model.embed_text(batch.ids), time_row, image], dim=1)
        count, prefix = rows.shape[1], batch.ids.shape[1]
        span = (torch.arange(count) >= prefix).expand(len(rows), -1)
        valid = F.pad(batch.valid, (0, count - prefix), value=True)
        tables = model.tables(span, row_positions(valid), valid)
        features = model.head(model.llm(rows, tables), time_features, tables)
        velocity = model.velocity(features[:, prefix + 1 :], time_features)
    return F.mse_loss(velocity.float(), data - noise)


def question_loss(model: Showo2, batch: QuestionBatch) -> Tensor:
    """Cross-entropy of the answers. Packed questions see the picture and themselves, never one another."""
    prefix, size = batch.prefix.shape[1], len(batch.prefix)
    image_rows = model.config.span_length
    with torch.autocast("cpu", torch.bfloat16):
        _, time_row = model.embed_time(torch.ones(size))
        assert time_row is not None, "the model embeds time"
        image = model.embed_image(VAE.encode(batch.pixels))
        rows = torch.cat(
            [model.embed_text(batch.prefix), time_row, image, model.embed_text(batch.ids)], dim=1
        )
        start = prefix + image_rows
        index = torch.arange(rows.shape[1])
        positions = torch.where(index < start, index, 0).expand(size, -1).clone()
        positions[:, start:] = start + batch.positions
        tables = model.tables(torch.zeros(size, rows.shape[1], dtype=torch.bool), positions)
        tables = tables._replace(mask=_packed_mask(model.config, batch, prefix, rows.shape[1]))
        logits = model.logits(model.llm(rows, tables)[:, start:])
    return F.cross_entropy(logits.float().flatten(0, 1), batch.targets.flatten(), ignore_index=IGNORE)


def _packed_mask(config: Showo2Config, batch: QuestionBatch, prefix: int, rows: int) -> Tensor:
    """The understanding mask of each question on its own, for all packed questions at once.

    The span is the time token and the image (`understanding_span_start="time"`): eoi comes after it, once per
    question.
    """
    start = prefix + config.span_length
    span = torch.zeros(len(batch.ids), rows, dtype=torch.bool)
    span[:, prefix:start] = True
    segments = F.pad(batch.segments, (start, 0))
    same = segments[:, :, None] == segments[:, None, :]
    to_prefix = (torch.arange(rows) < start)[None, None, :]
    return attention_mask(span) & (same | to_prefix)[:, None]


def optimisers(model: Showo2, muon_lr: float, adam_lr: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the three stacks, Adam for embeddings, norms, modulations and projections."""
    muon: list[Tensor] = []
    adam: list[Tensor] = []
    for name, parameter in model.named_parameters():
        stack = name.startswith(("showo.model.layers.", "und_trans.layers.", "diffusion_head_a."))
        matrix = parameter.ndim == 2 and "adaLN" not in name
        (muon if stack and matrix else adam).append(parameter)
    return [
        torch.optim.Muon(muon, lr=muon_lr, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(adam, lr=adam_lr, betas=(0.9, 0.97), weight_decay=0.0),
    ]


def rate(step: int, steps: int, cooldown: int, warmup: int = 100) -> float:
    return min(1.0, (step + 1) / warmup, (steps - step) / cooldown)


def save(path: Path, state: dict) -> None:
    partial = path.with_suffix(".partial")
    torch.save(state, partial)
    os.replace(partial, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--cooldown", type=int, default=600)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch", type=int, default=32, help="captioned pictures per step")
    parser.add_argument("--asked", type=int, default=6, help="pictures with questions per step")
    parser.add_argument("--each", type=int, default=8, help="questions on each of them")
    parser.add_argument("--resume", type=Path, help="a saved state to go on from (default: OUTPUT/state.pt)")
    parser.add_argument("--weights", type=Path, help="start from the weights of this model directory")
    parser.add_argument("--threads", type=int, help="CPU threads (default: all cores)")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    arguments.output.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(arguments.seed)

    codec = PromptCodec.from_file(TOKENIZER)
    model = Showo2(shapes_config(codec.tokenizer.get_vocab_size()))
    initialise(model)
    if arguments.weights is not None:
        model.load_state_dict(load_model(arguments.weights).network.state_dict())
    average = {k: v.clone() for k, v in model.state_dict().items()}
    optimisation = optimisers(model, muon_lr=2e-3, adam_lr=1e-3)
    base = [o.param_groups[0]["lr"] for o in optimisation]
    first = 0
    if arguments.resume is not None and not arguments.resume.is_file():
        parser.error(f"--resume {arguments.resume} is not a file")
    resume = arguments.resume or arguments.output / "state.pt"
    if resume.is_file():
        state = torch.load(resume, weights_only=True)
        model.load_state_dict(state["model"])
        average = state["average"]
        for optimiser, saved in zip(optimisation, state["optimisers"], strict=True):
            optimiser.load_state_dict(saved)
        first = state["step"]
    log = (arguments.output / "log.jsonl").open("a", buffering=1)
    log.write(json.dumps({"start": first, **{k: str(v) for k, v in vars(arguments).items()}}) + "\n")

    with matmul_attention():
        _train(arguments, codec, model, average, optimisation, base, first, log)


def _train(arguments, codec, model, average, optimisation, base, first, log) -> None:
    started = time.perf_counter()
    for step in range(first, arguments.steps):
        factor = rate(step, arguments.steps, arguments.cooldown)
        for optimiser, lr in zip(optimisation, base, strict=True):
            optimiser.param_groups[0]["lr"] = lr * factor
        drawn = generation_batch(codec, arguments.seed, step, arguments.batch, CANVAS)
        flow = generation_loss(model, drawn)
        flow.backward()
        asked = question_batch(codec, arguments.seed, step, arguments.asked, CANVAS, arguments.each)
        answer = question_loss(model, asked)
        (0.3 * answer).backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimiser in optimisation:
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
        decay = min(0.998, (1 + step) / (10 + step))
        with torch.no_grad():
            for name, value in model.state_dict().items():
                average[name].lerp_(value, 1 - decay)
        if step % 20 == 0:
            row = {"step": step, "flow": flow.item(), "answer": answer.item(), "norm": norm.item()}
            row |= {"rate": factor, "seconds": time.perf_counter() - started}
            log.write(json.dumps({k: round(v, 5) for k, v in row.items()}) + "\n")
        done = step + 1
        if done % 50 == 0 or done == arguments.steps:
            state = {"model": model.state_dict(), "average": average, "step": done}
            state["optimisers"] = [o.state_dict() for o in optimisation]
            save(arguments.output / "state.pt", state)
            if done <= arguments.steps - arguments.cooldown:
                save(arguments.output / "state-plateau.pt", state)


if __name__ == "__main__":
    main()
