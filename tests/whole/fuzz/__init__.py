"""Random models, judged against plain autograd. Run `python -m tests.whole.fuzz --seeds 0:1000`."""
