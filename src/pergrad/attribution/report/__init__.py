"""The report of influences: one HTML page that a person opens and understands.

Owns: the page's words, markup and script.
Does not know: models, gradients, files of scores.
"""
