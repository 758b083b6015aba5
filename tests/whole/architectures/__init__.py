"""Real architectures, each compared with one backward pass per example.

Owns: the registry, the comparison, and the sweep (`python -m tests.whole.architectures`).
Does not know: pergrad's inside; only what users can call.
"""
