"""Compare a published Show-o2 checkpoint stage by stage: the authors' own code on one side, this project on the other.

    python examples/showo2_stages.py --repository Show-o/show-o2 --checkpoint showlab/show-o2-1.5B \\
        --llm Qwen/Qwen2.5-1.5B-Instruct --vae Wan2.1_VAE.pth --picture photo.jpg --bundle build/show-o2

Needs the authors' repository (https://github.com/showlab/Show-o) with its requirements beside this project's, a
checkpoint, the language model's tokenizer and the VAE. Both sides compute in float32 on the CPU, from the same noise
and the same picture latents: the authors draw these at random, so the mean is given to both. One table tells for each
stage what is compared and how far it is off; with `--bundle` a compiled bundle of the checkpoint is a third side. The
exit status is 1 if a stage is off by more than `--tolerance`, or ids or tokens differ.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import flashu_compile
from flashu_compile.bundle.agreement import relative_error
from flashu_compile.bundle.noise import initial_noise
from flashu_compile.models.loading import load_model
from flashu_compile.models.showo2.config import Showo2Config
from flashu_compile.models.showo2.eager import EagerPipeline
from flashu_compile.models.showo2.reference import GenerationReference, UnderstandingReference, generate

TIME = 0.3  # of the one velocity that is compared


class Theirs(Protocol):
    """What the other side computes. Rows: 0 is the prompt, 1 the empty prompt."""

    def prompt_ids(self, prompt: str) -> tuple[Tensor, Tensor]:
        """Return ids [2, rows] in the published layout, and the row of each time token [2]."""

    def velocity(self, noise: Tensor, t: float) -> Tensor:
        """Return the velocities [2, c, h, w] of both rows, before guidance."""

    def latents(self, noise: Tensor, points: int, guidance_scale: float) -> Tensor:
        """Return the final latents [1, c, h, w]."""

    def pixels(self, latents: Tensor) -> Tensor:
        """Decode latents to pixels [1, 3, H, W] in [-1, 1]."""

    def image_embeddings(self, latents: Tensor) -> Tensor:
        """Return what enters the language model for a picture [1, tokens, hidden]."""

    def question_ids(self, question: str) -> tuple[list[int], list[int]]:
        """Return the ids before the picture, up to boi, and those behind it, from eoi on."""

    def tokens(self, latents: Tensor, question: str, limit: int) -> list[int]:
        """Return the greedy tokens of the answer, up to the end token."""


@dataclasses.dataclass(frozen=True)
class Inputs:
    """What both sides are given; without picture latents nothing is asked."""

    prompt: str
    noise: Tensor
    points: int
    guidance_scale: float
    picture: Tensor | None
    question: str
    tokens: int


@dataclasses.dataclass(frozen=True)
class Row:
    """A stage: what is off, by how much (relative L2, or the share of ids that differ)."""

    stage: str
    side: str
    error: float
    exact: bool = False

    def within(self, tolerance: float) -> bool:
        """Tell whether the stage agrees: ids have to be equal."""
        return self.error == 0 if self.exact else self.error <= tolerance


@torch.inference_mode()
def compare(theirs: Theirs, eager: EagerPipeline, given: Inputs) -> list[Row]:
    """Compare the stages of both tasks on the model itself, in the order in which they follow from one another."""
    network, config, codec = eager.network, eager.network.config, eager.codec
    rows: list[Row] = []

    def off(stage: str, value: Any, truth: Any) -> None:
        rows.append(Row(stage, "eager", relative_error(np.asarray(value), np.asarray(truth))))

    ids, offsets = theirs.prompt_ids(given.prompt)
    ours = []
    for text in (given.prompt, ""):
        prefix = codec.generation_prefix(text, config.max_prompt_tokens)
        tail = config.sequence_length - config.span_length - len(prefix)
        ours.append([*prefix, *[codec.image_pad] * config.span_length, *codec.generation_tail(tail)])
    rows.append(Row("prompt ids", "eager", differing(ours[0] + ours[1], ids.flatten().tolist()), exact=True))
    step = GenerationReference(network, ids, offsets).step(
        given.noise.expand(2, -1, -1, -1), torch.full((2,), TIME)
    )
    off(f"velocities at t = {TIME}", step.velocity, theirs.velocity(given.noise, TIME))
    made = generate(
        network, ids, offsets, given.noise, points=given.points, guidance_scale=given.guidance_scale
    ).latents
    latents = theirs.latents(given.noise, given.points, given.guidance_scale)
    off(f"latents after {given.points} points", made, latents)
    off("decoded pixels", eager.vae.decode(latents).clamp(-1, 1), theirs.pixels(latents).clamp(-1, 1))
    if given.picture is None:
        return rows
    prefix, suffix = codec.question_prefix(), codec.question_suffix(given.question)
    before, behind = theirs.question_ids(given.question)
    rows.append(Row("question ids", "eager", differing(prefix + suffix, before + behind), exact=True))
    understanding = UnderstandingReference(network, given.picture)
    off("picture embeddings", understanding.image, theirs.image_embeddings(given.picture))
    told = theirs.tokens(given.picture, given.question, given.tokens)
    said = understanding.greedy(torch.tensor([prefix]), torch.tensor([suffix]), given.tokens, codec.eos)
    rows.append(Row("tokens of the answer", "eager", differing(said, told), exact=True))
    return rows


def differing(ours: Sequence[int], theirs: Sequence[int]) -> float:
    """Return the share of places at which two sequences of ids differ."""
    places = max(len(ours), len(theirs))
    same = sum(a == b for a, b in zip(ours, theirs, strict=False))
    return (places - same) / places if places else 0.0


class Authors:
    """The authors' code, called as their scripts `inference_t2i.py` and `inference_mmu.py` call it."""

    def __init__(self, repository: Path, checkpoint: str, llm: str, vae: str, config: Showo2Config) -> None:
        sys.path.insert(0, str(repository.resolve()))
        import models as authors  # type: ignore[import-not-found]  # the repository has them
        from models import misc

        self.config, self.package, self.misc = config, authors, misc
        self.tokenizer, self.special = misc.get_text_tokenizer(
            llm, add_showo_tokens=True, return_showo_token_ids=True, llm_name="qwen2_5"
        )
        self.model = authors.Showo2Qwen2_5.from_pretrained(checkpoint, use_safetensors=False).float().eval()
        self.vae = authors.WanVAE(vae_pth=vae, dtype=torch.float32, device=torch.device("cpu"))
        self.given: dict[str, Any] = {}

    def prompt_ids(self, prompt: str) -> tuple[Tensor, Tensor]:
        """Prepare the sequences that later stages use, too."""
        config, special = self.config, self.special
        names = ("bos_id", "eos_id", "boi_id", "eoi_id")
        text, empty, positions, empty_positions = self.misc.prepare_gen_input(
            [prompt], self.tokenizer, config.span_length, *(special[name] for name in names),
            self.tokenizer.pad_token_id, special["img_pad_id"], config.max_prompt_tokens, "cpu",
        )  # fmt: skip
        tokens, positions = torch.cat([text, empty]), torch.cat([positions, empty_positions])
        self.given = {
            "text_tokens": tokens,
            "modality_positions": positions,
            "attention_mask": self._mask(tokens.shape[1], positions),
            "max_seq_len": config.sequence_length,
            "output_hidden_states": True,
        }
        return tokens, positions[:, 0, 0]

    def _mask(self, rows: int, positions: Tensor) -> Tensor:
        return self.package.omni_attn_mask_naive(len(positions), rows, positions, "cpu").float()

    def velocity(self, noise: Tensor, t: float) -> Tensor:
        """Call the model once, without guidance."""
        both, times = noise.expand(2, -1, -1, -1), torch.full((2,), t)
        return self.model(image_latents=both, t=times, guidance_scale=0.0, **self.given)[1]

    def latents(self, noise: Tensor, points: int, guidance_scale: float) -> Tensor:
        """Sample with the settings of the demo configurations: Euler, linear path, time shift."""
        from transport import Sampler, create_transport  # type: ignore[import-not-found]

        transport = create_transport(
            path_type="Linear", prediction="velocity", loss_weight=None, train_eps=None, sample_eps=None,
            snr_type="lognorm", do_shift=True, seq_len=self.config.span_length,
        )  # fmt: skip
        sample = Sampler(transport).sample_ode(
            sampling_method="euler", num_steps=points, atol=1e-6, rtol=1e-3, reverse=False,
            time_shifting_factor=self.config.time_shift,
        )  # fmt: skip
        both = noise.repeat(2, 1, 1, 1)
        return sample(both, self.model.t2i_generate, guidance_scale=guidance_scale, **self.given)[-1][:1]

    def pixels(self, latents: Tensor) -> Tensor:
        """Decode one frame."""
        return self.vae.batch_decode(latents.unsqueeze(2)).squeeze(2)

    def image_embeddings(self, latents: Tensor) -> Tensor:
        """Go through both paths, and fuse them."""
        model = self.model
        semantic = model.image_embedder_und(latents) + model.position_embedding(model.image_position_ids)
        semantic = model.und_trans(semantic)["last_hidden_state"]
        return model.fusion_proj(torch.cat([semantic, model.image_embedder_gen(latents)], dim=-1))

    def question_ids(self, question: str) -> tuple[list[int], list[int]]:
        """Tokenise each piece on its own."""

        def ids(text: str) -> list[int]:
            return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

        before = [
            self.special["bos_id"],
            *ids("system\nYou are a helpful assistant.<|im_end|>"),
            *ids("\n<|im_start|>user\n"),
            self.special["boi_id"],
        ]
        return before, [self.special["eoi_id"], *ids(question), *ids("\n<|im_start|>assistant\n")]

    def tokens(self, latents: Tensor, question: str, limit: int) -> list[int]:
        """Decode greedily, with the span that their script gives."""
        model = self.model
        before, behind = (torch.tensor([part]) for part in self.question_ids(question))
        embed = model.showo.model.embed_tokens
        parts = [embed(before)]
        if self.config.add_time_embeds:
            row = model.time_embed(torch.ones(1), parts[0].dtype)
            parts.append((model.time_embed_proj(row) if hasattr(model, "time_embed_proj") else row)[:, None])
        rows = torch.cat([*parts, self.image_embeddings(latents), embed(behind)], dim=1)
        start = before.shape[1] + int(self.config.add_time_embeds)
        tokens = self.config.position_grid**2 + int(self.config.add_time_embeds)
        found = model.mmu_generate(
            input_embeds=rows, attention_mask=self._mask(rows.shape[1], torch.tensor([[[start, tokens]]])),
            top_k=1, max_new_tokens=limit, eos_token=self.tokenizer.eos_token_id,
        )  # fmt: skip
        said = [int(token) for token in found]
        return said[:-1] if said and said[-1] == self.tokenizer.eos_token_id else said


def compare_bundle(bundle: str, theirs: Theirs, given: Inputs, seed: int, photo: str | None) -> list[Row]:
    """Compare a bundle's latents with theirs, and its answer as decoded text is made of: its tokens."""
    pipe = flashu_compile.load(bundle)
    rows = []
    if pipe.manifest.generation is not None:
        latents = pipe.latents(
            given.prompt, seed=seed, steps=given.points, guidance_scale=given.guidance_scale
        )
        truth = theirs.latents(given.noise, given.points, given.guidance_scale)
        rows.append(
            Row(f"latents after {given.points} points", "bundle", relative_error(latents, np.asarray(truth)))
        )
    if pipe.manifest.understanding is not None and given.picture is not None and photo is not None:
        told = theirs.tokens(given.picture, given.question, given.tokens)
        said, _ = pipe.logits(photo, given.question, tokens=len(told))
        rows.append(Row("tokens of the answer", "bundle", differing(said, told), exact=True))
    return rows


def show(rows: list[Row], tolerance: float) -> bool:
    """Print the table, and return whether every stage agrees."""
    table = Table("stage", "side", "off by", "", title="Against the authors' code")
    for row in rows:
        off = "equal" if row.error == 0 else f"{row.error:.1%} differ" if row.exact else f"{row.error:.1e}"
        table.add_row(row.stage, row.side, off, "ok" if row.within(tolerance) else "differs")
    Console().print(table)
    return all(row.within(tolerance) for row in rows)


def main(arguments: Sequence[str] | None = None) -> int:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    options.add_argument(
        "--repository", type=Path, required=True, help="the folder show-o2 of the authors' repository"
    )
    options.add_argument("--checkpoint", required=True, help="folder or hub id of the checkpoint")
    options.add_argument(
        "--llm", required=True, help="folder or hub id of the language model, for its tokenizer"
    )
    options.add_argument("--vae", required=True, help="Wan2.1_VAE.pth")
    options.add_argument("--resolution", help="pixels of the picture that is drawn, as for build")
    options.add_argument("--prompt", default="a red circle to the left of a blue square")
    options.add_argument(
        "--points", type=int, default=5, help="time points of the trajectory (50 takes long)"
    )
    options.add_argument("--guidance-scale", type=float, default=7.5)
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--picture", help="a picture to ask about; without one only drawing is compared")
    options.add_argument("--question", default="Describe the picture.")
    options.add_argument("--tokens", type=int, default=16)
    options.add_argument("--bundle", help="a bundle of the checkpoint, as a third side")
    options.add_argument("--tolerance", type=float, default=1e-4, help="relative L2")
    options.add_argument("--json", type=Path, help="write the rows there, too")
    given = options.parse_args(arguments)
    loaded = load_model(
        given.checkpoint, vae=given.vae, tokenizer=given.llm, resolution=given.resolution, dtype=torch.float32
    )
    eager = EagerPipeline(loaded)
    config = eager.network.config
    noise = torch.from_numpy(initial_noise(given.seed, 0, config.latent_shape))[None]
    picture = eager.latents(given.picture) if given.picture else None
    inputs = Inputs(
        given.prompt, noise, given.points, given.guidance_scale, picture, given.question, given.tokens
    )
    theirs = Authors(given.repository, given.checkpoint, given.llm, given.vae, config)
    rows = compare(theirs, eager, inputs)
    if given.bundle:
        rows += compare_bundle(given.bundle, theirs, inputs, given.seed, given.picture)
    if given.json:
        given.json.write_text(json.dumps([dataclasses.asdict(row) for row in rows], indent=2) + "\n")
    return 0 if show(rows, given.tolerance) else 1


if __name__ == "__main__":
    sys.exit(main())
