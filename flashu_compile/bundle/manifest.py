"""The bundle's manifest: what engines there are, what they take and give, and the hash of every file.

Pure data (no torch, no onnxruntime): written by the compiler, read by the pipeline. `SCHEMA` rises whenever an
older reader would misunderstand a newer bundle.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from pathlib import Path, PurePosixPath

from flashu_compile import arguments, reading
from flashu_compile.bundle.dimensions import parsed
from flashu_compile.bundle.settings import (
    DrawingSettings,
    GenerationSettings,
    TextSettings,
    UnderstandingSettings,
)
from flashu_compile.errors import BundleError, BundleVersionError, ConfigurationError
from flashu_compile.reading import Count
from flashu_compile.system.paths import absolute
from flashu_compile.tasks import MMU, TEXT

# Far more than any model has; they only keep memory finite where a manifest is damaged.
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
        if self.generation is not None and self.drawing is not None:
            raise BundleError("The manifest makes pictures both of latents and of codes.")
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

    @property
    def picture_size(self) -> tuple[int, int] | None:
        """The size of pictures that are drawn, width and height in pixels; None if there are none."""
        drawn = self.drawing or self.generation
        return None if drawn is None else drawn.picture_size

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
