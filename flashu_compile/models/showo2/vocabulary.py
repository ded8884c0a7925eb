"""The tokenizer of a published Show-o2 checkpoint: that of its language model and four tokens more."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer

from flashu_compile.bundle.prompts import PromptCodec, read_tokenizer
from flashu_compile.errors import BundleError, CheckpointError
from flashu_compile.models import hub
from flashu_compile.system.paths import absolute

FILE = "tokenizer.json"

_PAD = "[PAD]"
# The order gives the ids. Only the pad token is special.
_ADDED = ("<image>", "<|vid_start|>", "<|vid_end|>")
_LARGEST_ID = 2**24
_PROBE = "What is in the picture?"


def extend(tokenizer: Tokenizer) -> Tokenizer:
    """Return `tokenizer` with the tokens Show-o2 adds to Qwen2.5's; the same object if it has `[PAD]` already."""
    if tokenizer.token_to_id(_PAD) is not None:
        return tokenizer
    extended = _written_and_read(tokenizer)
    extended.add_special_tokens([AddedToken(_PAD, special=True, normalized=False)])
    extended.add_tokens(list(_ADDED))
    return extended


def read(path: Path) -> Tokenizer:
    """Read a tokenizer in the tokenizers format, from a file or a directory that holds `tokenizer.json`.

    Raises:
        CheckpointError: there is none, or it is damaged.
    """
    path = path / FILE if path.is_dir() else path
    return read_tokenizer(path, CheckpointError)


def resolve(tokenizer: Any) -> Tokenizer:
    """Resolve a tokenizer given by a user: of the tokenizers library, of transformers, a path, or a hub id.

    Raises:
        CheckpointError: it cannot be found or read, or is of another kind.
    """
    if isinstance(tokenizer, Tokenizer):
        return tokenizer
    if isinstance(tokenizer, (str, Path)):
        path = absolute(tokenizer)
        if not path.exists() and hub.is_hub_id(str(tokenizer)):
            path = hub.fetch(str(tokenizer), [FILE], instead="pass the path of its tokenizer.json").directory
        return read(path)
    backend = getattr(tokenizer, "backend_tokenizer", None)  # a "fast" tokenizer of transformers
    if isinstance(backend, Tokenizer):
        return backend
    raise CheckpointError(
        f"A {type(tokenizer).__name__} is no tokenizer of the tokenizers library; pass a "
        "tokenizers.Tokenizer, a fast tokenizer of transformers, or the path of a tokenizer.json."
    )


def check_usable(tokenizer: Tokenizer) -> None:
    """Raise `CheckpointError` if a bundle that holds `tokenizer` could not be loaded, or could not encode prompts.

    A bundle stores the tokenizer as a file, so the check is of the one read back from such a file.
    """
    read_back = _written_and_read(tokenizer)
    if read_back.get_vocab(with_added_tokens=True) != tokenizer.get_vocab(with_added_tokens=True):
        raise CheckpointError(
            "The tokenizer has another vocabulary after it is written to a file and read back; pass the path of the "
            "tokenizer.json that it was made from."
        )
    try:
        codec = PromptCodec(read_back)
        codec.decode([*codec.question_prefix(), *codec.question_suffix(_PROBE)])
    except BundleError as error:
        raise CheckpointError(str(error)) from error
    except Exception as error:  # the tokenizers library raises bare Exception
        raise CheckpointError(f"The tokenizer cannot encode the text {_PROBE!r}: {error}.") from error


def _written_and_read(tokenizer: Tokenizer) -> Tokenizer:
    if (highest := _highest(tokenizer)) > _LARGEST_ID:  # writing takes time for every id that no token has
        raise CheckpointError(
            f"The tokenizer has ids up to {highest:,}; one that works has none above {_LARGEST_ID:,}."
        )
    try:
        return Tokenizer.from_str(tokenizer.to_str())
    except Exception as error:  # the tokenizers library raises bare Exception
        raise CheckpointError(
            f"The tokenizer cannot be written to a file and read back ({error}); a bundle needs one made of the "
            "tokenizers library's own parts."
        ) from error


def check_size(tokenizer: Tokenizer, rows: int) -> None:
    """Raise `CheckpointError` if the tokenizer has ids beyond the `rows` of the embedding table."""
    highest = _highest(tokenizer)
    if highest >= rows:
        raise CheckpointError(
            f"The tokenizer has ids up to {highest}, the model embeds {rows}; they do not belong together."
        )


def _highest(tokenizer: Tokenizer) -> int:
    return max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)
