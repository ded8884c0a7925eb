"""Language models of transformers that read a picture as rows among those of text: what their families share.

The picture's rows stand where the chat template has its placeholder; the language model's forward and masks are the
library's own. A family says how pixels become rows, and what its processor does to pictures and texts.
"""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from collections.abc import Collection, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import AutoModelForImageTextToText

from flashu_compile.bundle import areas
from flashu_compile.bundle.preparing import PictureRules
from flashu_compile.bundle.prompts import TextCodec
from flashu_compile.bundle.settings import UnderstandingSettings
from flashu_compile.errors import BundleError, CheckpointError
from flashu_compile.models import captures, pictures, pretrained, reducing
from flashu_compile.models.adapter import LoadedModel, ModelAdapter, ModelSource, Settings
from flashu_compile.models.chat import PictureMark, text_settings
from flashu_compile.models.eager import EagerModel
from flashu_compile.models.eager_lm import EagerQuestions
from flashu_compile.models.generation import generation_of
from flashu_compile.models.language_forward import QuestionForward, count_rows
from flashu_compile.models.stacks import LLM, SEMANTIC
from flashu_compile.models.tokenizing import take_chat_template
from flashu_compile.program.program import Role
from flashu_compile.program.trace import CaptureSpec
from flashu_compile.tasks import MMU

#: The share of a model's positions that a picture may take at most where pictures differ in size.
_MOST_OF_POSITIONS = 0.75


@dataclasses.dataclass(frozen=True)
class Reading:
    """What a model reads: its settings, and the number of rows that a picture has, the most where they differ.

    `tokenizer` is the library's, `generation` the settings of generation as they hold, `options` are a user's.
    """

    settings: UnderstandingSettings
    rows: int
    tokenizer: Any = dataclasses.field(compare=False)
    generation: Mapping[str, Any] = dataclasses.field(compare=False)
    options: Mapping[str, Any] = dataclasses.field(compare=False)


class PictureLMAdapter(ModelAdapter):
    """A family of such models.

    `model_type` and `architecture` are the library's names of it, `vision` is the module path of its vision tower, and
    `unused` are settings of generation that its text does not follow. `line_end` is how many rows follow each line of
    cells where pictures differ in size. `own_names` are the types and classes by which its authors' own code names it,
    whose layout is not read, and `converted` are checkpoints in that of the library; a family may have neither.
    """

    model_type: ClassVar[str]
    architecture: ClassVar[str]
    vision: ClassVar[str]
    unused: ClassVar[frozenset[str]] = frozenset()
    line_end: ClassVar[int] = 0
    own_names: ClassVar[frozenset[str]] = frozenset()
    converted: ClassVar[str] = ""

    tasks: ClassVar[tuple[str, ...]] = (MMU.name,)
    options: ClassVar[Mapping[str, str]] = {
        **pretrained.OPTIONS,
        "image_processor": "an image processor of transformers, or the directory of one; needed with a model in memory",
    }

    @staticmethod
    @abstractmethod
    def features(network: Any, pixels: Tensor) -> Tensor:
        """Compute a picture's rows [b, rows, width] from its pixels."""

    @abstractmethod
    def mark(self, source: ModelSource, network: Any, tokenizer: Any, processor: Any) -> PictureMark:
        """Return how the processor, which may be given, puts a picture into a text."""

    def rules(self, source: ModelSource, network: Any, processor: Any) -> PictureRules:
        """Return the rules by which an image processor makes pixels for the network."""
        return pictures.picture_rules(processor, pictures.square_side(source, network.config.vision_config))

    def prepared(self, network: Any) -> Any:
        """Return the network without layers that no row depends on."""
        return network

    def recognise(self, config: Mapping[str, Any], names: Collection[str]) -> bool:
        """Recognise a model by the class that its configuration names, or in memory by its type and its head."""
        named = config.get("architectures")
        if isinstance(named, list) and named:
            return named == [self.architecture]
        return config.get("model_type") == self.model_type and "lm_head.weight" in names

    def instead(self, config: Mapping[str, Any], names: Collection[str]) -> str | None:
        """Return what to give instead of a model in its authors' own layout, by the names in its configuration."""
        classes = config.get("architectures")
        named = [config.get("model_type"), *(classes if isinstance(classes, list) else ())]
        if any(isinstance(name, str) and name in self.own_names for name in named):
            return f"one converted for transformers, such as {self.converted},"
        return None

    def load(self, source: ModelSource, options: Mapping[str, Any], dtype: torch.dtype | None) -> LoadedModel:
        """Load a model, its tokenizer and its way with pictures.

        Raises `UnsupportedModelError` on layers that do not see all rows before.
        """
        tokenizer = pretrained.read_tokenizer(options.get("tokenizer", source.directory))
        if "tokenizer" not in options:
            take_chat_template(tokenizer, source.directory)
        processor = pictures.read_processor(options.get("image_processor", source.directory))
        files = pretrained.weight_files(source)
        network = self.prepared(pretrained.read_network(source, AutoModelForImageTextToText, dtype))
        config = network.config.get_text_config()
        kept = pretrained.kept_tokenizer(tokenizer, network)
        try:
            rules = self.rules(source, network, processor)
        except (BundleError, TypeError, ValueError, AttributeError) as error:  # of odd settings
            raise CheckpointError(
                f"Pictures of {source} cannot be prepared as its settings say: {error}"
            ) from error
        rows, positions = self._rows(network, rules), pretrained.check_decoder(source, config)
        if rules.cell is not None:  # larger pictures are refused when they are asked about
            rows = min(rows, int(positions * _MOST_OF_POSITIONS))
        if rows >= positions:
            raise CheckpointError(
                f"A picture takes up to {rows} rows, and {source} has {positions} positions."
            )
        generation = generation_of(network, options)
        told = text_settings(
            tokenizer,
            TextCodec(kept),
            {name: value for name, value in generation.items() if name not in self.unused},
            positions - rows,
            getattr(config, "eos_token_id", None),
            self.mark(source, network, tokenizer, options.get("image_processor")),
        )
        most = None if rules.cell is None else rows
        settings = UnderstandingSettings(**vars(told), pictures=rules, most_rows=most, line_end=self.line_end)
        details = Reading(settings, rows, tokenizer, generation, options)
        model = LoadedModel(source.name, network, None, kept, details=details, adapter=self)
        return pretrained.with_origin(model, source, files)

    def _rows(self, network: Any, rules: PictureRules) -> int:
        """Count the rows of a picture; where pictures differ in size, the most, or some more."""
        if rules.cell is None:
            return count_rows(self.features, network, rules)
        (step,) = rules.areas
        side, pixels = areas.bounds(step.height, *step.area)
        return pixels // rules.cell**2 + self.line_end * (side // rules.cell)

    def forward(self, network: Any) -> tuple[nn.Module, Role]:
        """Return the forward from pixels to logits, and the role of the picture's rows in what it gives."""
        return QuestionForward(network, self.features), Role.IMAGE_EMBEDS

    def captures(self, loaded: LoadedModel, task: str) -> tuple[CaptureSpec, ...]:
        """Return the forward of a question about a picture."""
        network, rules, stacks = loaded.network, loaded.details.settings.pictures, self.stacks(loaded)
        module, rows = self.forward(network)
        sides: tuple[int, int] = rules.height, rules.width
        axes: tuple[str | None, str | None] = None, None
        if (cell := rules.cell) is not None:  # any size tells; a small one takes little time
            sides, axes = (5 * cell, 7 * cell), (f"{cell} * height", f"{cell} * width")
        words, dtype = pretrained.words(network), network.dtype
        return (captures.of_question(module, words, sides, dtype, stacks, axes=axes, rows=rows),)

    def settings(self, loaded: LoadedModel, task: str) -> Settings:
        """Return the template, the ends of answers, their limits, and the rules for pictures."""
        return loaded.details.settings

    def stacks(self, loaded: LoadedModel) -> Mapping[str, str]:
        """Return the roots of the language model's layers and of the vision tower's."""
        roots = {LLM: "model.language_model", SEMANTIC: self.vision}
        return {stack: pretrained.layer_list(loaded.network, root) for stack, root in roots.items()}

    def reduced(
        self, loaded: LoadedModel, layers: Mapping[str, Sequence[int]], token_pruning: float
    ) -> LoadedModel:
        """Return a small copy, whose vision tower knows how many layers it has."""
        small = super().reduced(loaded, layers, token_pruning)
        if SEMANTIC in layers:
            reducing.tell_depth(small.network.get_submodule(self.vision), len(layers[SEMANTIC]))
        return small

    def eager(self, loaded: LoadedModel) -> EagerModel:
        """Return the model with the library's own loop."""
        return EagerQuestions(loaded)

    def image_rows(self, loaded: LoadedModel) -> int:
        """Count a picture's rows, and at most two of a template beside them."""
        return loaded.details.rows + 2
