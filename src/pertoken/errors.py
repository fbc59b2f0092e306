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
    ├── OutputLost               2   standard output could not be written, and was what the command is for;
    │                          141   the same where its reader has left (`| head`), without a word
    └── Interrupted  129, 130, 143   stopped by SIGHUP, SIGINT or SIGTERM; saved, where a step was made

Anything else that escapes was not foreseen. A caller of `pertoken.train` gets it as it is, with its traceback, after
the last whole step was saved, and with a note that says so. The command line ends with 70 and one line; the stack goes
into a file that the line names (`bug_report.py`), or with PERTOKEN_TRACEBACK=1 to stderr.
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
    "OutputLost",
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


class OutputLost(PertokenError):
    """Standard output could not be written; without a message where nobody reads it any more."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.exit_code = 2 if message else 141  # 128 + SIGPIPE, as a shell has it of other tools


class Interrupted(PertokenError):
    """Training was stopped by a signal: after saving a checkpoint, or before there was a step to save."""

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message)
        self.exit_code = 128 + signal_number
