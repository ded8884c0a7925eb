"""The bundle's manifest: what engines there are, what they take and give, and the hash of every file.

Pure data (no torch, no onnxruntime): written by the compiler, read by the pipeline. `SCHEMA` rises whenever an
older reader would misunderstand a newer bundle.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Literal

from flashu_compile import arguments, reading
from flashu_compile.bundle.dimensions import parsed
from flashu_compile.bundle.preparing import LARGEST_SIDE, PictureRules, check_number
from flashu_compile.bundle.sampling import Sampling
from flashu_compile.errors import BundleError, BundleVersionError, ConfigurationError, InputError
from flashu_compile.reading import Count
from flashu_compile.system.paths import absolute
from flashu_compile.tasks import MMU, TEXT

# Far more than any model has; they only keep memory finite where a manifest is damaged.
_LARGEST_LENGTH = 2**20
_LONGEST_NAME = 255  # bytes, as in most file systems
_ENGINE_NAME = "[A-Za-z0-9_-]{1,200}"

SCHEMA = 6
BUILD_AGAIN = "build the bundle again"  # what to do about a damaged one
MANIFEST = "manifest.json"
PLAN, RECIPE, TOKENIZER, REPORT, REPORT_PAGE, WEIGHTS = (
    "plan.json",
    "recipe.json",
    "tokenizer.json",
    "report.json",
    "report.html",
    "weights.bin",
)


@dataclasses.dataclass(frozen=True)
class TensorSpec:
    """An engine input or output. `shape` holds an int for a fixed dimension, a name for a dynamic one.

    Raises `ConfigurationError` on a dimension that is no expression.
    """

    name: str
    dtype: str
    shape: tuple[Count | str, ...]

    def __post_init__(self) -> None:
        for size in self.shape:
            if isinstance(size, str):
                parsed(size)


@dataclasses.dataclass(frozen=True)
class EngineSpec:
    """One engine: its file, its signature, and a recorded run (`reference`, safetensors) to verify it against.

    The reference file holds `input.<name>` and `output.<name>` tensors, and a `tolerance` where the precision's own is
    too narrow; outputs are the captured program's, or where passes were lossy those of the program that the engine was
    made of. `prologue` is the engine that, run once, gives what inputs of this one keep from call to call; `schedule`
    the one that gives, run once for each time point, what follows from that alone.
    """

    name: str
    task: str
    file: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    reference: str
    prologue: str | None = None
    schedule: str | None = None


@dataclasses.dataclass(frozen=True)
class Template:
    """What a model reads of a text: the ids `before`, those of `left`, the text and `right` as one, the ids `after`.

    `strip` says on which sides white space around the text is left out. `picture`: how many of the ids `before` and
    `after` precede the rows of a picture, None if there is none; `placeholder` is the id that stands for each of these
    rows where ids are counted. `size`: how many of the ids `before` precede `size_text`, in which its size in cells
    stands for `{height}` and `{width}`, None if there is no such text. Raises `BundleError` if there are fewer ids.
    """

    before: tuple[Count, ...] = ()
    left: str = ""
    right: str = ""
    after: tuple[Count, ...] = ()
    strip: Literal["", "left", "right", "both"] = ""
    picture: Count | None = None
    placeholder: Count | None = None
    size: Count | None = None
    size_text: str = ""

    def __post_init__(self) -> None:
        if self.picture is not None and self.picture > self.length:
            raise BundleError(
                f"The manifest puts a picture behind {self.picture} ids of a template that has {self.length}."
            )
        if self.size is not None and (
            self.picture is None or self.size > min(self.picture, len(self.before))
        ):
            raise BundleError("The manifest's template tells a picture's size where no picture follows.")

    @property
    def length(self) -> int:
        """The number of ids around the text, but for those of a picture and its size."""
        return len(self.before) + len(self.after)

    @property
    def letters(self) -> int:
        """No fewer letters than those have that are encoded with a text, or for a picture's size."""
        return len(self.left.encode()) + len(self.right.encode()) + len(self.size_text.encode())


@dataclasses.dataclass(frozen=True)
class GenerationSettings:
    """What the t2i pipeline must know of a model with latents. Sizes in pixels (width, height), tokens or rows.

    `pad_id` fills sequences up. Raises `BundleError` on sizes of the wrong type, out of range, or that do not go
    together, and on a template without a picture.
    """

    latent_shape: tuple[int, int, int]
    sequence_length: int
    span_length: int
    max_prompt_tokens: int
    picture_size: tuple[int, int]
    template: Template
    pad_id: Count

    def __post_init__(self) -> None:
        for name in ("latent_shape", "picture_size"):
            for size in getattr(self, name):
                arguments.integer(f"A size of the manifest's {name}", size, 1, LARGEST_SIDE, BundleError)
        _check_settings(self, {"sequence_length": _LARGEST_LENGTH})
        _check_settings(
            self, {"span_length": self.sequence_length, "max_prompt_tokens": self.sequence_length}
        )
        if self.template.picture is None or self.template.picture <= len(self.template.before):
            raise BundleError("The manifest's template of t2i has no place for a picture behind the prompt.")
        if self.max_prompt_tokens + self.span_length + self.template.length > self.sequence_length:
            raise BundleError(
                f"The manifest's sequence_length {self.sequence_length} cannot hold a span of {self.span_length} and "
                f"prompts of {self.max_prompt_tokens} tokens."
            )


@dataclasses.dataclass(frozen=True)
class Unprompted:
    """What guidance's second branch reads in place of a prompt: one of the two.

    Attributes:
        text: this text in the prompt's template.
        pad_id: the prompt's own ids, each overwritten by this one, except those in `kept_ids`.

    Raises `BundleError` unless exactly one of them is given.
    """

    text: str | None = None
    pad_id: Count | None = None
    kept_ids: tuple[Count, ...] = ()

    def __post_init__(self) -> None:
        if (self.text is None) == (self.pad_id is None):
            raise BundleError("The manifest's second branch of guidance needs either a text or a pad_id.")


@dataclasses.dataclass(frozen=True)
class DrawingSettings:
    """What the t2i pipeline must know of a model that draws a picture code by code.

    Raises `BundleError` on sizes of the wrong type, out of range, or that do not go together, and on a template with a
    picture.

    Attributes:
        template: the ids that a picture's first code follows, around the prompt.
        unprompted: what guidance's second branch reads.
        grid: rows and columns of codes in a picture, which are drawn row by row.
        codes: the number of different codes; that of the engine's logits.
        first_code_id: the id that the engine reads for code 0; the others follow it.
        row_end: ids that follow the codes of each row but the last.
        max_prompt_tokens: the longest prompt.
        picture_size: width and height in pixels.
        temperature, top_k, top_p: how codes are chosen unless a caller says otherwise; see `Sampling`.
    """

    template: Template
    unprompted: Unprompted
    grid: tuple[Count, Count]
    codes: Count
    first_code_id: Count
    row_end: tuple[Count, ...]
    max_prompt_tokens: Count
    picture_size: tuple[Count, Count]
    temperature: float = 1.0
    top_k: Count = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        for name in ("grid", "picture_size"):
            for size in getattr(self, name):
                check_number(name, size, 1, LARGEST_SIDE)
        for name in ("codes", "max_prompt_tokens"):
            check_number(name, getattr(self, name), 1, _LARGEST_LENGTH)
        if self.length > _LARGEST_LENGTH:
            raise BundleError(f"The manifest's pictures of {self.length:,} codes are too large.")
        if self.template.picture is not None:
            raise BundleError(
                "The manifest's template of t2i has a picture, where codes follow the template."
            )
        try:
            Sampling(self.temperature, self.top_k, self.top_p)
        except InputError as error:
            raise BundleError(f"The manifest's way to choose codes is none: {error}") from error

    @property
    def length(self) -> int:
        """The number of codes of a picture."""
        return self.grid[0] * self.grid[1]


@dataclasses.dataclass(frozen=True)
class TextSettings:
    """What a pipeline that answers must know of the model. Raises `BundleError` on sizes of the wrong type or range.

    `stop_ids` end an answer. `repetition_penalty` divides positive logits of tokens that were there before, and
    multiplies negative ones. `not_used` are settings of the checkpoint that decoding, which is greedy, does not follow.
    """

    template: Template
    stop_ids: tuple[Count, ...]
    max_question_tokens: int
    max_new_tokens: int
    repetition_penalty: float = 1.0
    not_used: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        _check_settings(self, dict.fromkeys(("max_question_tokens", "max_new_tokens"), _LARGEST_LENGTH))
        arguments.number(
            "The manifest's repetition_penalty", self.repetition_penalty, 0, 100, BundleError, above=True
        )


@dataclasses.dataclass(frozen=True)
class UnderstandingSettings(TextSettings):
    """The same of answers about a picture, which `pictures` prepares.

    `most_rows`: the most rows that a picture takes where pictures differ in size. Raises `BundleError`, too, on a
    template that has no picture before its text, or that tells a size of pictures that have no cells.
    """

    pictures: PictureRules = dataclasses.field(kw_only=True)
    most_rows: Count | None = dataclasses.field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.template.picture is None or self.template.picture > len(self.template.before):
            raise BundleError("The manifest's template of mmu has no picture before the question.")
        if self.template.size is not None and self.pictures.cell is None:
            raise BundleError(
                "The manifest's template of mmu tells a size in cells, which its pictures do not have."
            )
        if (self.most_rows is None) != (self.pictures.cell is None):
            raise BundleError("The manifest does not say how many rows its pictures of any size take.")
        if self.most_rows is not None:
            check_number("most_rows", self.most_rows, 1, _LARGEST_LENGTH)

    @property
    def prefix(self) -> tuple[int, ...]:
        """The ids ahead of the picture's rows."""
        return self.template.before[: self.template.picture]


def _check_settings(settings: GenerationSettings | TextSettings, largest: Mapping[str, int]) -> None:
    for name, high in largest.items():
        check_number(name, getattr(settings, name), 1, high)


@dataclasses.dataclass(frozen=True)
class FileEntry:
    """The SHA-256 and the size in bytes of a file."""

    sha256: str
    bytes: Count


#: The part of `Manifest.origins` that tells of a configuration given beside a checkpoint.
LLM_CONFIG = "llm_config"


@dataclasses.dataclass(frozen=True)
class Origin:
    """Where weights, and the settings beside them, were read from: files, by name; None for an object in memory.

    `repository` and `revision`, a commit, are those on the Hugging Face hub, if they came from there. `license` is what
    the model's card or configuration says.
    """

    files: dict[str, FileEntry] | None
    repository: str | None = None
    revision: str | None = None
    license: str | None = None


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What a bundle is. `origins` are those of the weights, by part of the model: `model`, `vae`.

    Raises `BundleError` if a file's name leads out of the bundle.
    """

    model: str
    tasks: tuple[str, ...]
    backend: str
    precision: str
    recipe: str
    engines: tuple[EngineSpec, ...]
    generation: GenerationSettings | None
    understanding: UnderstandingSettings | None
    versions: dict[str, str]
    files: dict[str, FileEntry]
    origins: dict[str, Origin] = dataclasses.field(default_factory=dict)
    text: TextSettings | None = None
    drawing: DrawingSettings | None = None
    schema: int = SCHEMA

    def __post_init__(self) -> None:
        if self.text is not None and self.text.template.picture is not None:
            raise BundleError("The manifest's template of text has a place for a picture.")
        for name in self.files:
            inside(name)
        for engine in self.engines:
            if not re.fullmatch(_ENGINE_NAME, engine.name):
                raise BundleError(
                    f"The engine name {arguments.shown(engine.name)} is not of letters, digits, '-' and '_'."
                )

    def engine(self, name: str) -> EngineSpec:
        """Return the engine called `name`. Raises `BundleError` naming the engines there are."""
        for engine in self.engines:
            if engine.name == name:
                return engine
        known = ", ".join(e.name for e in self.engines)
        raise BundleError(f"The bundle has no engine {name!r}; it has: {known}.")

    def answering(self, task: str) -> TextSettings | None:
        """Return the settings of a task that answers questions; None if the bundle lacks it, or it answers none."""
        return {MMU.name: self.understanding, TEXT.name: self.text}.get(task)

    def to_json(self) -> str:
        """Serialise the manifest as JSON text, which `from_json` reads."""
        return json.dumps(dataclasses.asdict(self), indent=1, sort_keys=True) + "\n"

    @classmethod
    def from_json(cls, text: str | bytes, where: Path) -> Manifest:
        """Parse a manifest. Raises `BundleVersionError` on another schema, `BundleError` on anything malformed."""
        data = reading.parse(text, str(where), BundleError, BUILD_AGAIN)
        schema = data.get("schema") if isinstance(data, dict) else None
        if type(schema) is not int:
            raise BundleError(f"{where} is not a bundle manifest: it has no schema; {BUILD_AGAIN}.")
        if schema != SCHEMA:
            advice = "upgrade flashu_compile" if schema > SCHEMA else BUILD_AGAIN
            raise BundleVersionError(
                f"{where} has bundle schema {schema}; this version reads {SCHEMA}: {advice}."
            )
        return reading.convert(data, cls, str(where), BundleError, advice=BUILD_AGAIN)


def inside(name: str) -> PurePosixPath:
    """Return the relative path of a file in a bundle. Raises `BundleError` if it leads out of it."""
    path = PurePosixPath(name)
    long = len(name.encode()) > _LONGEST_NAME
    if path.is_absolute() or ".." in path.parts or "\\" in name or "\0" in name or not path.parts or long:
        raise BundleError(
            f"The manifest names {arguments.shown(name)}, which is not a file inside the bundle."
        )
    return path


def file_entry(path: Path) -> FileEntry:
    """Compute the size and SHA-256 of a file, read in chunks."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return FileEntry(digest, file.tell())


def read_manifest(directory: Path, *, digest: str | None = None) -> Manifest:
    """Read the manifest of the bundle at `directory`.

    Raises `BundleError` if there is none, or if its SHA-256 is not `digest`, where that is given;
    `ConfigurationError` if `digest` is no SHA-256.
    """
    path = absolute(directory / MANIFEST)
    reason = f"has no {MANIFEST}" if directory.exists() else "does not exist"
    absent = f"{directory} {reason}; it is not a bundle. Build one with `flashu-compile build`."
    content = reading.read_bytes(path, BundleError, absent=absent)
    _check_digest(path, content, digest)
    return Manifest.from_json(content, path)


def _check_digest(path: Path, content: bytes, digest: str | None) -> None:
    if digest is None:
        return
    if not re.fullmatch("[0-9a-fA-F]{64}", arguments.name_of("digest", digest)):
        raise ConfigurationError(
            f"A digest is a SHA-256, 64 hexadecimal digits, not {arguments.shown(digest)}."
        )
    found = hashlib.sha256(content).hexdigest()
    if found != digest.lower():
        raise BundleError(
            f"{path} has the SHA-256 {found}, not the digest {digest.lower()}: this is not the bundle that you mean."
        )
