"""The version of pergrad.

Owns: `__version__`, the only place where it is written.
Does not know: anything.
"""

__version__ = "0.1.0"
