"""The numbers printed by the notebook that this project grew from, in one pass each."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import pergrad

CASES = json.loads((Path(__file__).parents[1] / "data" / "seed_notebook.json").read_text())["cases"]


def network(dims: list[int]) -> nn.Module:
    inputs, hidden, outputs = dims
    return nn.Sequential(
        nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(),
        nn.Linear(hidden, outputs),
    )  # fmt: skip


def replay(case: dict) -> tuple[nn.Module, dict[str, Tensor]]:
    """The model and data, drawn in the order in which the notebook drew them."""
    single = isinstance(case["dims"], str)  # "one Linear(1,1,bias=False)"
    inputs = 1 if single else case["dims"][0]
    made: dict = {}
    for what in case["order"].split(", "):
        if what == "manual_seed":
            torch.manual_seed(case["seed"])
        elif what == "model":
            made["model"] = network(case["dims"])
        elif what == "w":
            weight = torch.randn(1, 1)  # drawn before the layer, whose own start draws too
            made["model"] = nn.Linear(1, 1, bias=False)
            made["model"].weight.data = weight
        else:
            rows = 1 if what.endswith("_ref") else case["batch"]
            made[what] = torch.randn(rows, inputs if what.startswith("x") else 1)
    return made.pop("model"), made


def errors(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return (model(x) - y).square().sum(1)


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c['what'][:5]}-{c['batch']}-{c['seed']}")
def test_reproduces_the_notebook(case: dict) -> None:
    with torch.random.fork_rng():
        model, data = replay(case)
    losses = errors(model, data["x"], data["y"])
    if case["what"] == "norms":
        got = pergrad.norms(losses, model)
    else:
        reference = pergrad.gradients(errors(model, data["x_ref"], data["y_ref"]), model)
        got = pergrad.dots(losses, model, against=reference)[:, 0]
    for printed in ("loop", "fast"):
        want = torch.tensor(case[printed])
        assert (got - want).abs().max() <= 1e-5 * want.abs().max()
