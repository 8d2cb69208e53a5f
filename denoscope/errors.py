"""Errors that a user can mend. Each message is one sentence that names what is wrong and what to do about it."""


class DenoscopeError(Exception):
    """Base of every error that denoscope raises on purpose; the command line prints it without a traceback."""


class InputError(DenoscopeError, ValueError):
    """An argument, file content or configuration is wrong."""


class MissingError(DenoscopeError, FileNotFoundError):
    """A file, folder or model that was asked for is not there."""


def counted(number: int, noun: str) -> str:
    """ "1 pair", "2 pairs": for messages."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
