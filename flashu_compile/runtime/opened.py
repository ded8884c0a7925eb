"""OpenedBundle: what a pipeline has of a bundle, and that it can be closed."""

from __future__ import annotations

from flashu_compile.bundle.manifest import Manifest
from flashu_compile.bundle.prompts import TextCodec
from flashu_compile.errors import UnknownTaskError
from flashu_compile.recipe.plan import StepPlan
from flashu_compile.recipe.recipe import Recipe
from flashu_compile.recipe.token_plan import TokenPlan
from flashu_compile.runtime.choice import Choice
from flashu_compile.runtime.engine import Engines
from flashu_compile.runtime.lifetime import Closing, OwnedEngines
from flashu_compile.runtime.sampler import schedules
from flashu_compile.tasks import TaskRecord


class OpenedBundle(Closing):
    """The parts of an open bundle; `Pipeline` says what they are."""

    def __init__(
        self,
        manifest: Manifest,
        plan: StepPlan | TokenPlan | None,
        recipe: Recipe | None,
        codec: TextCodec,
        engines: Engines,
        *,
        backend: str | None = None,
    ) -> None:
        self.manifest = manifest
        self.backend = backend or manifest.backend
        self.choice: Choice | None = None
        self.plan = plan
        self.recipe = recipe
        self.codec = codec
        self._engines = engines
        self._schedules = schedules(engines)

    @property
    def engines(self) -> Engines:
        """The bundle's engines by name; for measuring and checking."""
        return self._engines

    def close(self) -> None:
        """Release sessions, weights and their maps. Methods that need one raise `PipelineError` afterwards."""
        if isinstance(self._engines, OwnedEngines):
            self._engines.close()
        self._schedules = schedules(self._engines)  # without the values it remembered

    def __repr__(self) -> str:
        return f"<Pipeline {self.manifest.model}: {', '.join(self.manifest.tasks)}>"

    def _lacks(self, task: TaskRecord) -> UnknownTaskError:
        return UnknownTaskError(
            f"This bundle was built for {', '.join(self.manifest.tasks)} and cannot {task.purpose}: "
            f"build one with task {task.name!r}."
        )
