"""Errors and warnings: what happened, where in the user's model, why, and what to do."""


class PergradError(Exception):
    """Base of every error that pergrad raises on purpose."""


class UsageError(PergradError, ValueError):
    """The input is wrong: losses, parameters, weights, options, or two matrices that differ."""


class MixedExamplesError(PergradError):
    """An op makes examples interact, so an example has no gradient of its own by itself."""


class UnsupportedError(PergradError):
    """These gradients cannot be had at all."""


class WorkerError(PergradError, RuntimeError):
    """Workers of a distributed scan died; what they had finished is stored, the rest is missing."""


class WorkerWarning(RuntimeWarning):
    """A worker of a distributed scan died or does not start; the scan goes on without it."""


class FallbackWarning(UserWarning):
    """An op has no rule: its per-example gradients are exact, but cost a backward per example."""
