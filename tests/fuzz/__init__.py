"""Random models, judged against plain autograd. Run `python -m tests.fuzz --seeds 0:1000`."""
