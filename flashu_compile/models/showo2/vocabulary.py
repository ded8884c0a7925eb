"""The tokenizer of a published Show-o2 checkpoint: that of its language model and four tokens more."""

from __future__ import annotations

from tokenizers import AddedToken, Tokenizer

from flashu_compile.errors import CheckpointError
from flashu_compile.models.showo2.prompts import PromptCodec
from flashu_compile.models.tokenizing import check_kept, written_and_read

_PAD = "[PAD]"
# The order gives the ids. Only the pad token is special.
_ADDED = ("<image>", "<|vid_start|>", "<|vid_end|>")
_PROBE = "What is in the picture?"


def extend(tokenizer: Tokenizer) -> Tokenizer:
    """Return `tokenizer` with the tokens Show-o2 adds to Qwen2.5's; the same object if it has `[PAD]` already."""
    if tokenizer.token_to_id(_PAD) is not None:
        return tokenizer
    extended = written_and_read(tokenizer)
    extended.add_special_tokens([AddedToken(_PAD, special=True, normalized=False)])
    extended.add_tokens(list(_ADDED))
    return extended


def check_usable(tokenizer: Tokenizer) -> None:
    """Raise `CheckpointError` if a bundle that holds `tokenizer` could not be loaded, or could not encode prompts.

    A bundle stores the tokenizer as a file, so the check is of the one read back from such a file.
    """
    read_back = check_kept(tokenizer)
    try:
        codec = PromptCodec(read_back)
        codec.decode([*codec.question_prefix(), *codec.question_suffix(_PROBE)])
    except CheckpointError:
        raise
    except Exception as error:  # the tokenizers library raises bare Exception
        raise CheckpointError(f"The tokenizer cannot encode the text {_PROBE!r}: {error}.") from error
