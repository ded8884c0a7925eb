"""Language models of transformers that read a picture as rows among those of text: what their families share.

The picture's rows stand where the chat template has its placeholder; the language model's forward and masks are the
library's own. A family says how pixels become rows, and what its processor does to pictures and texts.
"""

from __future__ import annotations

import functools
from abc import abstractmethod
from collections.abc import Collection, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import AutoModelForImageTextToText

from flashu_compile.bundle.preparing import PictureRules
from flashu_compile.bundle.prompts import TextCodec
from flashu_compile.bundle.settings import DrawingSettings, UnderstandingSettings
from flashu_compile.errors import BundleError, CheckpointError
from flashu_compile.models import pictures, pretrained, reducing
from flashu_compile.models.adapter import EagerModel, LoadedModel, ModelAdapter, ModelSource, Settings
from flashu_compile.models.chat import PictureMark, text_settings
from flashu_compile.models.picture_forward import EagerQuestions, Given, QuestionForward, Reading, count_rows
from flashu_compile.models.stacks import LLM, SEMANTIC
from flashu_compile.models.tokenizing import take_chat_template
from flashu_compile.program.program import BATCH, Input, Role
from flashu_compile.program.trace import CaptureSpec
from flashu_compile.tasks import MMU, UNDERSTAND

#: The share of a model's positions that a picture may take at most where pictures differ in size.
_MOST_OF_POSITIONS = 0.75


class PictureLMAdapter(ModelAdapter):
    """A family of such models.

    `model_type` and `architecture` are the library's names of it, `vision` is the module path of its vision tower, and
    `unused` are settings of generation that its text does not follow. `own_names` are the types and classes by which
    its authors' own code names it, whose layout is not read, and `converted` are checkpoints in that of the library.
    """

    model_type: ClassVar[str]
    architecture: ClassVar[str]
    vision: ClassVar[str]
    unused: ClassVar[frozenset[str]] = frozenset()
    own_names: ClassVar[frozenset[str]]
    converted: ClassVar[str]

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

    def rules(self, processor: Any, side: int) -> PictureRules:
        """Return the rules by which an image processor makes pixels of `side` × `side`."""
        return pictures.picture_rules(processor, side)

    def drawing(self, given: Given) -> DrawingSettings:
        """Return what the loop that draws must know, for families that have one."""
        raise NotImplementedError

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
            rules = self.preparing(source, network, processor)
        except (BundleError, TypeError, ValueError, AttributeError) as error:  # of odd settings
            raise CheckpointError(
                f"Pictures of {source} cannot be prepared as its settings say: {error}"
            ) from error
        rows = self.most_rows(network, rules)
        positions = pretrained.check_decoder(source, config)
        if rules.cell is not None:  # larger pictures are refused when they are asked about
            rows = min(rows, int(positions * _MOST_OF_POSITIONS))
        if rows >= positions:
            raise CheckpointError(
                f"A picture takes up to {rows} rows, and {source} has {positions} positions."
            )
        every = pretrained.generation_of(network, options)
        generation = {name: value for name, value in every.items() if name not in self.unused}
        told = text_settings(
            tokenizer,
            TextCodec(kept),
            generation,
            positions - rows,
            getattr(config, "eos_token_id", None),
            self.mark(source, network, tokenizer, options.get("image_processor")),
        )
        most = None if rules.cell is None else rows
        given = Given(network, tokenizer, TextCodec(kept), every, options)
        drawing = functools.cache(functools.partial(self.drawing, given))
        details = Reading(
            UnderstandingSettings(**vars(told), pictures=rules, most_rows=most), rows, drawing, every
        )
        model = LoadedModel(source.name, network, None, kept, details=details, adapter=self)
        return pretrained.with_origin(model, source, files)

    def preparing(self, source: ModelSource, network: Any, processor: Any) -> PictureRules:
        """Return the rules by which an image processor makes pixels for the network."""
        return self.rules(processor, pictures.square_side(source, network.config.vision_config))

    def most_rows(self, network: Any, rules: PictureRules) -> int:
        """Count the rows of a picture; the most where pictures differ in size."""
        return count_rows(self.features, network, rules)

    def forward(self, network: Any) -> tuple[nn.Module, Role]:
        """Return the forward from pixels to logits, and the role of the picture's rows in what it gives."""
        return QuestionForward(network, self.features), Role.IMAGE_EMBEDS

    def captures(self, loaded: LoadedModel, task: str) -> tuple[CaptureSpec, ...]:
        """Return the forward of a question about a picture."""
        generator, rules = torch.Generator().manual_seed(0), loaded.details.settings.pictures
        words = loaded.network.get_input_embeddings().weight.shape[0]
        ids = torch.randint(words, (2, 20), generator=generator)
        sides: tuple[int, int] = rules.height, rules.width
        axes: tuple[str | None, ...] = None, None
        if (cell := rules.cell) is not None:  # any size tells; a small one takes little time
            sides, axes = (5 * cell, 7 * cell), (f"{cell} * height", f"{cell} * width")
        module, rows = self.forward(loaded.network)
        return (
            CaptureSpec(
                name=UNDERSTAND,
                task=MMU.name,
                module=module,
                inputs=(
                    Input(Role.PIXELS, (BATCH, None, *axes)),
                    Input(Role.PREFIX_IDS, (BATCH, "prefix")),
                    Input(Role.SUFFIX_IDS, (BATCH, "suffix")),
                ),
                outputs=(Role.LOGITS, rows),
                stacks={stack: f"model.{root}" for stack, root in self.stacks(loaded).items()},
                sample={
                    Role.PIXELS: torch.rand(2, 3, *sides, generator=generator, dtype=loaded.network.dtype) * 2
                    - 1,
                    Role.PREFIX_IDS: ids[:, :8].contiguous(),
                    Role.SUFFIX_IDS: ids[:, 8:].contiguous(),
                },
            ),
        )

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
            self.count_layers(small.network, len(layers[SEMANTIC]))
        return small

    def count_layers(self, network: Any, count: int) -> None:
        """Tell the vision tower of a copy of a network, in a configuration of its own, how many layers it has."""
        reducing.tell_depth(network.get_submodule(self.vision), count)

    def eager(self, loaded: LoadedModel) -> EagerModel:
        """Return the model with the library's own loop."""
        return EagerQuestions(loaded)

    def image_rows(self, loaded: LoadedModel) -> int:
        """Count a picture's rows, and at most two of a template beside them."""
        return loaded.details.rows + 2
