"""Scores of a whole data set: computed example by example, stored, resumed, read.

Owns: what `pergrad.scan` and `pergrad.open_scores` are made of.
Does not know: how a batch's numbers come about; it calls the verbs.
"""
