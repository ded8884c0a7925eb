"""Run the authors' own Show-o2 code on inputs that `showo2_stages.py prepare` wrote, and record what each stage gives.

    python showo2_authors.py --repository Show-o/show-o2 --checkpoint showlab/show-o2-1.5B \\
        --llm Qwen/Qwen2.5-1.5B-Instruct --vae Wan2.1_VAE.pth --folder stages

For an environment of the authors' (their `build_env.sh`: older versions of PyTorch and transformers than this project
takes). It needs nothing of this project but this file, and downloads what their code asks for: configuration and
tokenizer of the language model, and the SigLIP model that they start from. float32 on the CPU.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

INPUTS, SETTINGS, RECORDED = "inputs.safetensors", "inputs.json", "authors.safetensors"


class Authors:
    """The authors' code, called as their scripts `inference_t2i.py` and `inference_mmu.py` call it.

    `settings` are those that `showo2_stages.py prepare` wrote.
    """

    def __init__(
        self, repository: Path, checkpoint: str, llm: str, vae: str, settings: dict[str, Any]
    ) -> None:
        sys.path.insert(0, str(repository.resolve()))
        import models as authors  # type: ignore[import-not-found]  # the repository has them
        from models import misc

        self.settings, self.package, self.misc = settings, authors, misc
        self.tokenizer, self.special = misc.get_text_tokenizer(
            llm, add_showo_tokens=True, return_showo_token_ids=True, llm_name="qwen2_5"
        )
        self.model = authors.Showo2Qwen2_5.from_pretrained(checkpoint, use_safetensors=False).float().eval()
        self.vae = authors.WanVAE(vae_pth=vae, dtype=torch.float32, device=torch.device("cpu"))

    @torch.no_grad()
    def record(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """Run every stage on the noise, and on the picture latents if there are any."""
        drawn = self._drawn(inputs["noise"])
        return {**drawn, **self._asked(inputs["picture"])} if "picture" in inputs else drawn

    def _drawn(self, noise: Tensor) -> dict[str, Tensor]:
        settings, special = self.settings, self.special
        text, empty, positions, empty_positions = self.misc.prepare_gen_input(
            [settings["prompt"]], self.tokenizer, settings["span_length"], special["bos_id"], special["eos_id"],
            special["boi_id"], special["eoi_id"], self.tokenizer.pad_token_id, special["img_pad_id"],
            settings["max_prompt_tokens"], "cpu",
        )  # fmt: skip
        tokens, positions = torch.cat([text, empty]), torch.cat([positions, empty_positions])
        given = {
            "text_tokens": tokens,
            "modality_positions": positions,
            "attention_mask": self._mask(tokens.shape[1], positions),
            "max_seq_len": tokens.shape[1],
            "output_hidden_states": True,
        }
        both, time = noise.repeat(2, 1, 1, 1), torch.full((2,), settings["time"])
        velocity = self.model(image_latents=both, t=time, guidance_scale=0.0, **given)[1]
        latents = self._sample(both, {"guidance_scale": settings["guidance_scale"], **given})
        return {
            "prompt_ids": tokens,
            "offsets": positions[:, 0, 0],
            "velocity": velocity,
            "latents": latents,
            "pixels": self.vae.batch_decode(latents.unsqueeze(2)).squeeze(2),
        }

    def _sample(self, both: Tensor, given: dict[str, Any]) -> Tensor:
        """Sample with the settings of the demo configurations: Euler, linear path, time shift."""
        from transport import Sampler, create_transport  # type: ignore[import-not-found]

        transport = create_transport(
            path_type="Linear", prediction="velocity", loss_weight=None, train_eps=None, sample_eps=None,
            snr_type="lognorm", do_shift=True, seq_len=self.settings["span_length"],
        )  # fmt: skip
        sample = Sampler(transport).sample_ode(
            sampling_method="euler", num_steps=self.settings["points"], atol=1e-6, rtol=1e-3, reverse=False,
            time_shifting_factor=self.settings["time_shift"],
        )  # fmt: skip
        return sample(both, self.model.t2i_generate, **given)[-1][:1]

    def _asked(self, latents: Tensor) -> dict[str, Tensor]:
        """Go through both paths of a picture, fuse them, and decode an answer greedily."""
        model, embed, settings = self.model, self.model.showo.model.embed_tokens, self.settings
        ids = model.image_position_ids[:, : settings["position_grid"] ** 2]
        semantic = model.image_embedder_und(latents) + model.position_embedding(ids)
        semantic = model.und_trans(semantic)["last_hidden_state"]
        image = model.fusion_proj(torch.cat([semantic, model.image_embedder_gen(latents)], dim=-1))
        before, behind = self._question()
        parts, timed = [embed(before)], settings["add_time_embeds"]
        if timed:
            row = model.time_embed(torch.ones(1), parts[0].dtype)
            parts.append((model.time_embed_proj(row) if hasattr(model, "time_embed_proj") else row)[:, None])
        rows = torch.cat([*parts, image, embed(behind)], dim=1)
        # As in their script, the span begins at the first image token and takes in eoi.
        span = torch.tensor([[[before.shape[1] + int(timed), image.shape[1] + int(timed)]]])
        found = model.mmu_generate(
            input_embeds=rows, attention_mask=self._mask(rows.shape[1], span), top_k=1,
            max_new_tokens=settings["tokens"], eos_token=self.tokenizer.eos_token_id,
        )  # fmt: skip
        told = torch.tensor([int(token) for token in found])
        return {"before": before[0], "behind": behind[0], "image_embeddings": image, "answer": told}

    def _question(self) -> tuple[Tensor, Tensor]:
        """Return the ids before and behind the picture [1, rows], each piece tokenised on its own."""

        def ids(text: str) -> list[int]:
            return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

        system = ids("system\nYou are a helpful assistant.<|im_end|>")
        before = [self.special["bos_id"], *system, *ids("\n<|im_start|>user\n"), self.special["boi_id"]]
        asked = ids(self.settings["question"])
        behind = [self.special["eoi_id"], *asked, *ids("\n<|im_start|>assistant\n")]
        return torch.tensor([before]), torch.tensor([behind])

    def _mask(self, rows: int, positions: Tensor) -> Tensor:
        return self.package.omni_attn_mask_naive(len(positions), rows, positions, "cpu").float()


def main() -> None:
    """Record every stage in the folder."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    options.add_argument("--repository", type=Path, required=True, help="show-o2 in the authors' repository")
    options.add_argument("--checkpoint", required=True, help="folder or hub id of the checkpoint")
    options.add_argument("--llm", required=True, help="folder or hub id of its language model")
    options.add_argument("--vae", required=True, help="Wan2.1_VAE.pth")
    options.add_argument("--folder", type=Path, required=True, help="where the inputs lie")
    given = options.parse_args()
    if not (given.folder / SETTINGS).is_file():
        options.error(f"{given.folder} has no {SETTINGS}: run `showo2_stages.py prepare` first")
    settings = json.loads((given.folder / SETTINGS).read_text(encoding="utf-8"))
    authors = Authors(given.repository, given.checkpoint, given.llm, given.vae, settings)
    recorded = authors.record(load_file(given.folder / INPUTS))
    save_file({name: value.contiguous() for name, value in recorded.items()}, given.folder / RECORDED)


if __name__ == "__main__":
    main()
