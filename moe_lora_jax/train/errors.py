"""The errors of training; both list every problem found, like every error of this library."""

from moe_lora_interop.errors import CheckpointError


class DataError(CheckpointError):
    """A data file cannot be trained on. `.problems` has one entry per bad line: file, line number, what is wrong."""


class TrainingError(CheckpointError):
    """A run cannot start, continue or go on. `.problems` says what was found and what to do."""


class BadLine(Exception):
    """What is wrong with one line of the data, or with one prompt."""
