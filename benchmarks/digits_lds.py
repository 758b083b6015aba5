"""Do influences foretell retraining? Digits, a perceptron, 400 retrainings; minutes on one core.

    python benchmarks/digits_lds.py OUT

scikit-learn's digits, shuffled by a seed; 1000 for training, the next 200 as queries; a perceptron
64-64-10; 300 steps of full-batch gradient descent, rate .2, momentum .9, weight decay 1e-3. 100
random halves of the training set, retrained from 4 seeds each; the model that is scored is one
trained on all. Prints the linear datamodelling score of every method; goes on after a stop.
"""

import json
import sys
import time
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

import pergrad


def losses(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """The cross entropy of each image."""
    return nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="none")


def train(x: Tensor, y: Tensor, seed: int) -> nn.Module:
    """The recipe, from a start that the seed decides."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9, weight_decay=1e-3)
    for _ in range(300):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    return model


def main(out: Path) -> None:
    """Fit, score, retrain, compare."""
    torch.set_num_threads(1)
    digits = load_digits()
    order = torch.randperm(len(digits.data), generator=torch.Generator().manual_seed(0))
    x = (torch.tensor(digits.data, dtype=torch.float32) / 16)[order]
    y = torch.tensor(digits.target)[order]
    data = list(zip(x[:1000], y[:1000].tolist(), strict=True))
    queries = list(zip(x[1000:1200], y[1000:1200].tolist(), strict=True))
    model = train(x[:1000], y[:1000], 100)
    job = pergrad.Job(model, data, losses, outputs=lambda m, batch: m(batch[0]))
    found, seconds = {}, {}

    def score(name: str, **how: object) -> None:
        start = time.perf_counter()
        found[name] = pergrad.influence(job, queries, out / name, **how)
        seconds[name] = time.perf_counter() - start

    score("dots")
    score("cosines", cosine=True)
    for kind in ("kfac", "ekfac", "shampoo"):
        fit = pergrad.curvature(job, out / f"fit-{kind}", kind=kind, labels="all")
        score(kind, curvature=fit, refine=0)
    fit = pergrad.curvature(job, out / "fit-ekfac", labels="all")
    score("ekfac-terms-8", curvature=fit, refine=0, terms=8)
    score("ekfac-refined", curvature=fit)
    score("kernel", method="kernel")
    for size in (256, 1024):
        start = time.perf_counter()
        index = pergrad.sketch(job, out / f"sketch-{size}", curvature=fit, size=size)
        found[f"ekfac-sketch-{size}"] = index.scores(queries)
        seconds[f"ekfac-sketch-{size}"] = time.perf_counter() - start
        start = time.perf_counter()
        index = pergrad.sketch(job, out / f"tensorsketch-{size}", size=size)
        found[f"dots-sketch-{size}"] = index.scores(queries)
        seconds[f"dots-sketch-{size}"] = time.perf_counter() - start
    result = pergrad.evaluate(
        lambda rows, seed: train(x[:1000][rows], y[:1000][rows], seed), job, queries, found,
        out=out / "retrained", subsets=100, seeds=4,
    )  # fmt: skip
    print(result)
    table = {
        name: {"lds": s.lds, "low": s.low, "high": s.high, "seconds": seconds.get(name)}
        for name, s in result.scores.items()
    }
    answer = {"torch": torch.__version__, "ceiling": result.ceiling, "methods": table}
    (out / "results.json").write_text(json.dumps(answer, indent=1) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
