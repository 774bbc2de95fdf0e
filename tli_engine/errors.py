"""Errors that are the user's to mend; the command line prints them as one line, exit status 2."""


class UserError(ValueError):
    """Wrong input: the message says what is wrong, where, and how to mend it."""


class ConfigError(UserError):
    """A configuration value is wrong; the message begins with ``where: key``."""


class TrainingError(RuntimeError):
    """Training cannot go on: a tensor without gradient, a non-finite loss."""


class NotFiniteError(TrainingError):
    """A loss or a gradient is no longer a number: most often the learning rate is too high."""


class StoppedElsewhere(Exception):
    """Another process of this run has an error, and says it; this one ends with its exit status."""

    def __init__(self, status: int) -> None:
        super().__init__("another process of the run has failed")
        self.status = status
