"""Steps that are compiled once: a function of the user's, what is asked of its losses, one graph.

Owns: the face (`step`), what is asked and how (`asked`), one graph of a function (`record`).
Does not know: torch's tracers (`graph.nodes.capture`), how a gradient is had (`engine`).
"""
