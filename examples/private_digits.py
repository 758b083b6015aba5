"""Train handwritten digits with differential privacy, to a stated epsilon.

scikit-learn's digits, a sixth of them held out. `pergrad.Private` draws the batches, clips each
example's gradient and adds the noise; Opacus's accountant says what has been spent. Training ends
with the epoch before the budget would be exceeded. The same loop without noise and clipping is
beside it, so that the price is seen.

    pip install 'pergrad[demo,private]'
    python private_digits.py [--out private_digits_output] [--epsilon 3]    # half a minute
"""

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import pergrad
from digits import SEED, load

DELTA = 1e-4  # below 1 / examples
NOISE = 1.5
CLIP = 1.0
BATCH = 128
LEARNING_RATE = 1.0
MOST_EPOCHS = 60


def network() -> nn.Module:
    """One hidden layer, always the same at the start."""
    torch.manual_seed(SEED)
    return nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 10))


def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Of the pictures given, the share that is told right."""
    with torch.no_grad():
        return float((model(images).argmax(1) == labels).double().mean())


def plainly(data: TensorDataset, held_out: tuple[Tensor, Tensor]) -> float:
    """What the same network reaches without privacy."""
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    images, labels = data.tensors
    generator = torch.Generator().manual_seed(SEED)
    for _ in range(20):
        for batch in torch.randperm(len(images), generator=generator).split(BATCH):
            optimizer.zero_grad()
            F.cross_entropy(model(images[batch]), labels[batch]).backward()
            optimizer.step()
    return accuracy(model, *held_out)


def draw(path: Path, spent: list[float], reached: list[float], plain: float) -> None:
    """Accuracy over what was spent."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(5.2, 3.4))
    axis.plot(spent, reached, marker="o", markersize=3, label="private")
    axis.axhline(plain, color="#999999", linestyle=":", label="without privacy")
    axis.set(xlabel=f"epsilon, at delta {DELTA:g}", ylabel="held out digits told right")
    axis.legend(frameon=False, loc="lower right")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(out: Path, budget: float) -> dict[str, float]:
    """Train, and say what was spent and reached."""
    images, labels, _ = load(torch.Generator().manual_seed(SEED))
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(SEED))
    images, labels = images[order], labels[order]
    kept = len(images) * 5 // 6
    data = TensorDataset(images[:kept], labels[:kept])
    held_out = images[kept:], labels[kept:]
    plain = plainly(data, held_out)
    print(f"{kept} digits to train on, {len(images) - kept} held out: {plain:.1%} without privacy.")

    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)
    private = pergrad.Private(model, optimizer, CLIP, NOISE, data, BATCH / kept, most=64)
    spent: list[float] = []
    reached: list[float] = []
    for epoch in range(MOST_EPOCHS):
        private.steps += len(private)  # what one epoch more would come to
        too_much = private.epsilon(DELTA) > budget
        private.steps -= len(private)
        if too_much:
            break
        for x, y in private:
            private.backward(F.cross_entropy(model(x), y, reduction="none"))
        spent.append(private.epsilon(DELTA))
        reached.append(accuracy(model, *held_out))
        if epoch % 3 == 0:
            print(f"  epoch {epoch + 1:>2}: epsilon {spent[-1]:.2f}, {reached[-1]:.1%} held out")
    print(
        f"After {private.steps} steps: epsilon {spent[-1]:.2f} at delta {DELTA:g}, "
        f"{reached[-1]:.1%} of the held out digits."
    )
    out.mkdir(parents=True, exist_ok=True)
    draw(out / "private_digits.png", spent, reached, plain)
    return {"epsilon": spent[-1], "accuracy": reached[-1], "plain": plain, "steps": private.steps}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("private_digits_output"), help="a folder")
    parser.add_argument("--epsilon", type=float, default=3.0, help="the budget")
    arguments = parser.parse_args()
    main(arguments.out, arguments.epsilon)
