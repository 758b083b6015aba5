"""Influence functions by several libraries on the same models: workloads and recipes.

Owns: what is compared and how each library is asked.
Does not know: how results are shown (`tables.py`).
"""
