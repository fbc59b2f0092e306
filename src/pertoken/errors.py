"""The exceptions that a user can cause, and the exit code each one ends a command with.

    PertokenError                2
    ├── RecipeError              2   a recipe, an override or a command line that cannot be meant
    ├── DataError                2   a data file; the message says file:line
    ├── ModelError               2   a model folder or architecture that pertoken cannot be
    ├── CompilerError            2   kernels that cannot be compiled on this machine, and were asked for
    ├── CheckpointError          2   a run folder or checkpoint that cannot be used
    ├── CheckFailed              1   a check ran and its answer is no
    ├── NonFiniteError           3   training became non-finite; the weights were not touched
    ├── SpikeError               3   a gradient norm was an outlier, and train.on_spike = "stop"; the same
    └── Interrupted    130 or 143   stopped by SIGINT or SIGTERM after saving

Anything else that escapes is a bug of pertoken's and keeps its traceback.
"""

from __future__ import annotations

__all__ = [
    "CheckFailed",
    "CheckpointError",
    "CompilerError",
    "DataError",
    "Interrupted",
    "ModelError",
    "NonFiniteError",
    "PertokenError",
    "RecipeError",
    "SpikeError",
]


class PertokenError(Exception):
    """Base of all errors that a user can cause. The message names the field, the value and the remedy."""

    exit_code = 2


class RecipeError(PertokenError):
    """A recipe, an override or an argument is wrong."""


class DataError(PertokenError):
    """The data is wrong. Every line of the message starts with `file:line:` where a line is at fault."""


class ModelError(PertokenError):
    """A model folder, a weights file or an architecture cannot be used."""


class CompilerError(PertokenError):
    """The kernels cannot be compiled on this machine."""


class CheckpointError(PertokenError):
    """A run folder or a checkpoint cannot be written, read or continued."""


class CheckFailed(PertokenError):
    """A check ran to its end and failed."""

    exit_code = 1


class NonFiniteError(PertokenError):
    """A loss or a gradient norm was NaN or infinite. Raised before the weights are touched."""

    exit_code = 3


class SpikeError(PertokenError):
    """A gradient norm was far above the usual, and the recipe says to stop there. Raised before the weights change."""

    exit_code = 3


class Interrupted(PertokenError):
    """Training was stopped by a signal, after saving a checkpoint."""

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message)
        self.exit_code = 128 + signal_number
