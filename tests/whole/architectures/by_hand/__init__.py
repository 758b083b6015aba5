"""Architectures written by hand in plain torch: what no package here brings along.

Owns: the models, small, and their losses.
Does not know: how results are compared.
"""

from . import graphs, physics, pictures, recommenders, sequences

_ = (graphs, physics, pictures, recommenders, sequences)
