"""The eager twin of the runtime Pipeline: same prompts, noise and pictures, through the reference loops.

For comparing: what a bundle gives must equal what this gives.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from PIL import Image
from torch import Tensor

from flashu_compile import arguments
from flashu_compile.arguments import LARGEST_POINTS
from flashu_compile.bundle.images import engine_pixels, to_picture
from flashu_compile.bundle.noise import initial_noise
from flashu_compile.errors import CheckpointError, InputError
from flashu_compile.models.adapter import LoadedModel, Picture
from flashu_compile.models.showo2.modeling import Showo2
from flashu_compile.models.showo2.prompts import PromptCodec, picture_rules
from flashu_compile.models.showo2.reference import (
    Trajectory,
    UnderstandingReference,
    generate,
    model_source,
)
from flashu_compile.recipe.config import LARGEST_SCALE


class EagerPipeline:
    """`generate` and `ask` with the interface of a `Pipeline`, run on the model itself, in the dtype of its weights."""

    def __init__(self, loaded: LoadedModel) -> None:
        if loaded.vae is None:
            raise CheckpointError(f"Model {loaded.name!r} has no VAE; pass one to load_model(…, vae=…).")
        self.network: Showo2 = loaded.network
        self.vae = loaded.vae
        self.codec = PromptCodec(loaded.tokenizer)

    def published_rows(self, prompt: str) -> tuple[Int[Tensor, "2 rows"], Int[Tensor, "2"]]:
        """Lay out a prompt and the empty one as published; return their ids, and where their image spans begin.

        Raises `InputError` if the prompt is too long.
        """
        config, codec = self.network.config, self.codec
        rows, offsets = [], []
        for text in (prompt, ""):
            prefix = codec.generation_prefix(text, config.max_prompt_tokens)
            tail = config.sequence_length - config.span_length - len(prefix)
            rows.append(prefix + [codec.image_pad] * config.span_length + codec.generation_tail(tail))
            offsets.append(len(prefix))
        return torch.tensor(rows), torch.tensor(offsets)

    def trajectory(
        self,
        prompt: str,
        *,
        seed: int = 0,
        steps: int | None = None,
        guidance_scale: float | None = None,
        time_shift: float | None = None,
    ) -> Trajectory:
        """Sample one prompt in the published padded layout; return the final latents and every guided velocity.

        Raises `InputError` if an argument is out of range, `NotFiniteError` if the latents are not finite at the end.
        """
        config = self.network.config
        points = config.steps if steps is None else steps
        points = arguments.integer("steps", points, 2, LARGEST_POINTS, InputError)
        scale = config.guidance_scale if guidance_scale is None else guidance_scale
        scale = arguments.number("guidance_scale", scale, 0, LARGEST_SCALE, InputError)
        rows, offsets = self.published_rows(prompt)
        noise = torch.from_numpy(initial_noise(seed, 0, config.latent_shape))[None]
        noise = noise.to(torch.promote_types(noise.dtype, self.network.dtype))
        made = generate(
            self.network,
            rows,
            offsets,
            noise,
            points=points,
            guidance_scale=scale,
            shift=time_shift,
        )
        model_source(self.network).check("latents", made.latents.float().numpy())
        return made

    @torch.inference_mode()
    def generate(
        self, prompt: str, *, seed: int = 0, steps: int | None = None, guidance_scale: float | None = None
    ) -> Image.Image:
        """Generate a picture of the prompt; see `Pipeline.generate`."""
        latents = self.trajectory(prompt, seed=seed, steps=steps, guidance_scale=guidance_scale).latents
        return to_picture(self.vae.decode(latents)[0].float().numpy(), model_source(self.network))

    @torch.inference_mode()
    def ask(self, image: Picture, question: str, *, max_new_tokens: int = 300) -> str:
        """Answer a question about a picture; see `Pipeline.ask`."""
        prefix, suffix = self.codec.question_prefix(), self.codec.question_suffix(question)
        reference = UnderstandingReference(self.network, self.latents(image))
        tokens = reference.greedy(
            torch.tensor([prefix]), torch.tensor([suffix]), max_new_tokens, self.codec.eos
        )
        return self.codec.decode(tokens)

    def logits(self, image: Picture, question: str, answer: Sequence[int]) -> Float[Tensor, "tokens vocab"]:
        """Return the logits of each token of `answer`, given the tokens before it; the whole runs anew for each."""
        prefix, suffix = self.codec.question_prefix(), self.codec.question_suffix(question)
        reference = UnderstandingReference(self.network, self.latents(image))
        behind = [torch.tensor([[*suffix, *answer[:count]]]) for count in range(len(answer))]
        return torch.stack([reference.logits(torch.tensor([prefix]), ids)[0, -1] for ids in behind])

    @torch.inference_mode()
    def answer(self, image: Picture, question: str, tokens: int) -> None:
        """Decode just so many tokens of an answer, whatever would end it; for timing."""
        prefix, suffix = self.codec.question_prefix(), self.codec.question_suffix(question)
        reference = UnderstandingReference(self.network, self.latents(image))
        reference.greedy(torch.tensor([prefix]), torch.tensor([suffix]), tokens, None)

    def latents(self, image: Picture) -> Float[Tensor, "1 c h w"]:
        """Encode a picture, preprocessed as the runtime does, to normalised latents."""
        size = self.network.config.understanding_side * self.vae.spatial_factor
        return self.vae.encode(torch.from_numpy(engine_pixels(image, picture_rules(size))))
