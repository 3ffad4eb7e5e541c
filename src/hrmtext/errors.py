"""Every error a user can meet. The message says what was got, what was expected, what to do."""


class HrmTextError(Exception):
    """Base of all errors that hrm-text raises on purpose; the CLI prints these without a trace."""


class ConfigError(HrmTextError, ValueError):
    """A configuration key, value or file is wrong."""


class DataError(HrmTextError, ValueError):
    """Input data is malformed, inconsistent or truncated."""


class CheckpointError(HrmTextError, RuntimeError):
    """A checkpoint or run folder is incomplete, of another version, or does not fit the model."""


class BackendError(HrmTextError, RuntimeError):
    """A device, attention backend or optional package that was asked for by name cannot run."""


class NonFiniteError(HrmTextError, RuntimeError):
    """The loss or a gradient is NaN or infinite; raised before any weight is changed."""


class RankError(HrmTextError, RuntimeError):
    """Another rank of a distributed run was lost, or could not be reached at the start."""


class StorageError(HrmTextError, OSError):
    """Writing failed (disk full, no permission); what existed before is untouched."""


class TrainingInterrupted(HrmTextError):
    """SIGINT or SIGTERM arrived; a checkpoint was written at the step that the message names."""
