"""What counts as a model's parameters, and under which names."""

from collections.abc import Iterator

import pytest
import torch
from torch import nn

from pergrad import inputs


class _Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(5, 3)
        self.body = nn.ModuleDict({"a": nn.Linear(3, 3, bias=False), "b": nn.GRU(3, 4)})
        self.again = self.body["a"]
        self.head = nn.Linear(3, 5)
        self.head.weight = self.table.weight
        self.register_parameter("none", None)
        self.scale = nn.Parameter(torch.ones(3))
        self.frozen = nn.Parameter(torch.ones(2), requires_grad=False)
        self.nothing: nn.Module | None
        self.register_module("nothing", None)


class _Chosen(nn.Linear):
    def named_parameters(self, *args: object, **kwargs: object) -> Iterator:  # type: ignore[override]
        yield "only", self.weight


def _patched() -> nn.Module:
    model = nn.Linear(2, 2)
    model.named_parameters = lambda: iter([("mine", model.bias)])  # type: ignore[assignment]
    return model


@pytest.mark.parametrize(
    "model",
    [
        _Tied(),
        nn.Sequential(_Tied(), nn.Sequential(nn.Linear(2, 2)), nn.Identity()),
        nn.utils.parametrizations.weight_norm(nn.Linear(3, 2)),
        nn.ParameterList([torch.ones(2), torch.ones(3)]),
        nn.TransformerEncoderLayer(4, 2),
        _Chosen(2, 2),
        nn.Sequential(_Chosen(2, 2), nn.Linear(2, 2)),
        _patched(),
    ],
    ids=lambda model: type(model).__name__,
)
def test_a_modules_parameters_are_those_that_it_names(model: nn.Module) -> None:
    want = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    found = list(inputs.named(model).items())
    assert [name for name, _ in found] == [name for name, _ in want]
    assert all(one is two for (_, one), (_, two) in zip(found, want, strict=True))
