"""Every exception this project raises on purpose. All derive from `FlashuError`."""


class FlashuError(Exception):
    """Common base: `except FlashuError` catches every error that flashu_compile reports about its input."""


class MissingDependencyError(FlashuError):
    """An optional library is absent; the message names the extra that installs it."""


class ConfigurationError(FlashuError):
    """A parameter or configuration value is unknown, out of range or inconsistent."""


class CheckpointError(FlashuError):
    """A checkpoint cannot be found, read or matched with a supported model."""


class UnsupportedModelError(FlashuError):
    """No adapter supports this kind of model."""


class UnknownTaskError(FlashuError):
    """The compiler or the bundle does not know the task."""


class RecipeError(FlashuError):
    """A recipe is malformed, unknown, or needs calibration data that was not given."""


class DeclinedError(RecipeError):
    """A technique that a recipe asks for does nothing to the model; the message says why."""


class CalibrationError(FlashuError):
    """Calibration samples are missing or unusable, or a model's activations on one are not finite."""


class CaptureError(FlashuError):
    """The model could not be captured as a Program."""


class PassError(FlashuError):
    """A graph pass failed; the message names the pass and where in the pipeline it stood."""


class StructureError(PassError):
    """A program lacks a structure that an analysis looked for; the message says what and where."""


class EmissionError(FlashuError):
    """A backend could not turn a Program into an engine."""


class BundleError(FlashuError):
    """A bundle is missing, damaged, or cannot be written."""


class BundleVersionError(BundleError):
    """A bundle was written with a schema this version cannot read."""


class OutputExistsError(BundleError):
    """The output directory exists and is not empty."""


class BackendUnavailableError(FlashuError):
    """A backend or execution provider cannot be used on this machine; the message says what is missing."""


class PathError(FlashuError):
    """A given path cannot be that of a file; the message says why."""


class ResourceError(FlashuError):
    """There is not enough memory or disk for a build; the message gives the numbers."""


class CacheError(FlashuError):
    """A directory cannot serve as the cache, or no cache directory is known."""


class NotFiniteError(FlashuError):
    """An engine or a model computed values that are not finite; the message names it, and says what to do."""


class PipelineError(FlashuError):
    """A pipeline is used after `close`, in a forked process, or as an object to pickle; the message says what to do."""


class InputError(FlashuError):
    """A prompt, picture, tensor or sampling parameter given at run time is unusable."""


class EvaluationError(FlashuError):
    """A bundle cannot be measured or judged as asked: data, splits, scores or sides do not allow it."""
