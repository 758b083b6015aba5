"""Per-example gradients in the training loop.

Owns: what is read in the user's own backward pass, and what is made of it while a model trains.
Does not know: data sets and stores of scores (`scans`), attribution.
"""
