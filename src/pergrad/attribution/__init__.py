"""Which training examples drive a prediction: curvature, influence, and whether it is worth having.

Owns: what is built on per-example gradients of a whole data set to attribute predictions to it.
Does not know: how gradients are computed, or the command line.
"""
