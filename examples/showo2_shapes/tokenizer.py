"""Train the byte-level BPE tokenizer of showo2-shapes on every sentence of the shapes world."""

from __future__ import annotations

from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from examples.showo2_shapes.world.language import corpus
from flashu_compile.models.showo2.prompts import BOI, BOS, EOI, EOS, IMAGE_PAD, PAD

VOCABULARY = 512
TEMPLATE_LINES = ["system\nYou are a helpful assistant.", "\nuser\n", "\nassistant\n"]


def train_tokenizer() -> Tokenizer:
    """Words of the world become single tokens; any other text falls back to bytes, so nothing is unknown."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = [AddedToken(t, special=True, normalized=False) for t in (PAD, BOS, EOS, BOI, EOI, IMAGE_PAD)]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([*TEMPLATE_LINES, *corpus()], trainer)
    return tokenizer


def main(path: Path) -> None:
    train_tokenizer().save(str(path))


if __name__ == "__main__":
    main(Path(__file__).parents[2] / "flashu_compile" / "models" / "showo2_shapes" / "tokenizer.json")
