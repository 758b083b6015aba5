"""Errors and warnings: what happened, where in the user's model, why, and what to do."""

import sys


class PergradError(Exception):
    """Base of every error that pergrad raises on purpose."""


class UsageError(PergradError, ValueError):
    """The input is wrong: losses, parameters, weights, options, or two matrices that differ."""


class MixedExamplesError(PergradError):
    """An op makes examples interact, so an example has no gradient of its own by itself."""


class UnsupportedError(PergradError):
    """These gradients cannot be had at all."""


class StoreError(PergradError):
    """A folder of scores cannot be read or written, or is about something else."""


class MissingExtraError(PergradError, ImportError):
    """A package is not installed that this part of pergrad needs."""


class WorkerError(PergradError):
    """Workers of a distributed scan were lost. What they had finished is stored."""


class FallbackWarning(UserWarning):
    """An op has no rule: its per-example gradients are exact, but cost a backward per example."""


class WorkerWarning(RuntimeWarning):
    """A worker of a distributed scan died or does not start; the scan goes on without it."""


def users_line() -> int:
    """For a warning raised by the caller: how far up the first line outside pergrad is."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None and frame.f_globals["__name__"].startswith("pergrad."):
        level, frame = level + 1, frame.f_back
    return level
