"""Small models, each hard in one way that real models are.

Each has inputs of six examples with five positions of eight numbers (or tokens, or pictures) and
gives logits (6, 4); the loss is cross entropy. Linear layers see (B, T, features), which is what
libraries for language models expect. Every model is built anew from the same seed for each library.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

B, T, D, C, V = 6, 5, 8, 4, 11

CASES: dict[str, tuple[str, Callable[[], tuple[nn.Module, Tensor]]]] = {}


def case(name: str, what: str) -> Callable:
    def enter(build: Callable[[], tuple[nn.Module, Tensor]]) -> Callable:
        CASES[name] = what, build
        return build

    return enter


def build(name: str) -> tuple[nn.Module, Tensor, Tensor]:
    """A model, its input and the labels."""
    torch.manual_seed(0)
    model, x = CASES[name][1]()
    return model, x, torch.arange(B) % C


class Model(nn.Module):
    """Whose `forward` is a function of its modules and the input."""

    def __init__(self, forward: Callable[..., Tensor], **parts: nn.Module) -> None:
        super().__init__()
        self.run = forward
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x)


def rows() -> Tensor:
    return torch.randn(B, T, D)


def tokens() -> Tensor:
    return torch.randint(1, V, (B, T))


def pictures() -> Tensor:
    return torch.randn(B, 4, 6, 6)


def head() -> nn.Linear:
    return nn.Linear(D, C)


@case("linear", "two linear layers with biases")
def _() -> tuple[nn.Module, Tensor]:
    def forward(m: nn.Module, x: Tensor) -> Tensor:
        return m.head(torch.relu(m.inner(x))).mean(1)

    return Model(forward, inner=nn.Linear(D, D), head=head()), rows()


@case("frozen bias", "a linear layer whose bias does not require grad")
def _() -> tuple[nn.Module, Tensor]:
    model, x = CASES["linear"][1]()
    model.inner.bias.requires_grad_(False)
    return model, x


@case("frozen layer", "the first of two linear layers does not require grad")
def _() -> tuple[nn.Module, Tensor]:
    model, x = CASES["linear"][1]()
    model.inner.requires_grad_(False)
    return model, x


@case("4-D input", "linear layers on inputs (B, S, T, features)")
def _() -> tuple[nn.Module, Tensor]:
    def forward(m: nn.Module, x: Tensor) -> Tensor:
        return m.head(torch.relu(m.inner(x))).mean((1, 2))

    return Model(forward, inner=nn.Linear(D, D), head=head()), torch.randn(B, 3, T, D)


@case("in-place writes", "rows written into a layer's output, then `relu_`")
def _() -> tuple[nn.Module, Tensor]:
    def forward(m: nn.Module, x: Tensor) -> Tensor:
        hidden = m.inner(x)
        hidden[:, 0] = 0.5 * x[:, 1]
        return m.head(hidden.relu_()).mean(1)

    return Model(forward, inner=nn.Linear(D, D), head=head()), rows()


@case("reused layer", "one linear layer called twice")
def _() -> tuple[nn.Module, Tensor]:
    def forward(m: nn.Module, x: Tensor) -> Tensor:
        return m.head(torch.tanh(m.inner(torch.tanh(m.inner(x))))).mean(1)

    return Model(forward, inner=nn.Linear(D, D), head=head()), rows()


@case("functional use", "`F.linear(x, layer.weight, layer.bias)` in place of `layer(x)`")
def _() -> tuple[nn.Module, Tensor]:
    def forward(m: nn.Module, x: Tensor) -> Tensor:
        return m.head(torch.relu(F.linear(x, m.inner.weight, m.inner.bias))).mean(1)

    return Model(forward, inner=nn.Linear(D, D), head=head()), rows()


class Scaled(nn.Module):
    """A vector of scales held by the model itself."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.rand(D) + 0.5)
        self.head = head()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(x * self.scale)).mean(1)


@case("bare parameter", "an `nn.Parameter` that multiplies the activations")
def _() -> tuple[nn.Module, Tensor]:
    return Scaled(), rows()


@case("adapter", "a frozen linear layer with a trained low-rank adapter beside it (LoRA)")
def _() -> tuple[nn.Module, Tensor]:
    def forward(m: nn.Module, x: Tensor) -> Tensor:
        return m.head(torch.relu(m.inner(x) + m.up(m.down(x)))).mean(1)

    inner = nn.Linear(D, D).requires_grad_(False)
    down, up = nn.Linear(D, 2, bias=False), nn.Linear(2, D, bias=False)
    return Model(forward, inner=inner, down=down, up=up, head=head()), rows()


@case("embedding", "`nn.Embedding`, a token twice in an example")
def _() -> tuple[nn.Module, Tensor]:
    def forward(m: nn.Module, x: Tensor) -> Tensor:
        return m.head(torch.tanh(m.words(x))).mean(1)

    x = tokens()
    x[:, 1] = x[:, 0]
    return Model(forward, words=nn.Embedding(V, D), head=head()), x


@case("padding rows", "`nn.Embedding(padding_idx=0)` with padded examples")
def _() -> tuple[nn.Module, Tensor]:
    def forward(m: nn.Module, x: Tensor) -> Tensor:
        return m.head(torch.tanh(m.words(x))).mean(1)

    x = tokens()
    for b in range(B):
        x[b, T - b % 3 :] = 0
    return Model(forward, words=nn.Embedding(V, D, padding_idx=0), head=head()), x


@case("sparse embedding", "`nn.Embedding(sparse=True)`")
def _() -> tuple[nn.Module, Tensor]:
    def forward(m: nn.Module, x: Tensor) -> Tensor:
        return m.head(torch.tanh(m.words(x))).mean(1)

    return Model(forward, words=nn.Embedding(V, D, sparse=True), head=head()), tokens()


@case("positions by arange", "position embeddings looked up once for the batch, as in GPT-2")
def _() -> tuple[nn.Module, Tensor]:
    def forward(m: nn.Module, x: Tensor) -> Tensor:
        return m.head(torch.tanh(m.words(x) + m.places(torch.arange(T)))).mean(1)

    parts = {"words": nn.Embedding(V, D), "places": nn.Embedding(T, D), "head": head()}
    return Model(forward, **parts), tokens()


@case("tied weights", "the embedding's weight is the head's, as in most language models")
def _() -> tuple[nn.Module, Tensor]:
    def forward(m: nn.Module, x: Tensor) -> Tensor:
        return m.head(torch.tanh(m.inner(m.words(x)))).mean(1)

    words, tied = nn.Embedding(V, D), nn.Linear(D, V, bias=False)
    tied.weight = words.weight
    return Model(forward, words=words, inner=nn.Linear(D, D), head=tied), tokens()


@case("GPT-2's Conv1D", "`transformers.pytorch_utils.Conv1D`, a transposed linear layer")
def _() -> tuple[nn.Module, Tensor]:
    from transformers.pytorch_utils import Conv1D

    def forward(m: nn.Module, x: Tensor) -> Tensor:
        return m.head(torch.relu(m.inner(x))).mean(1)

    return Model(forward, inner=Conv1D(D, D), head=head()), rows()


@case("layer norm", "`nn.LayerNorm` with scale and shift")
def _() -> tuple[nn.Module, Tensor]:
    def forward(m: nn.Module, x: Tensor) -> Tensor:
        return m.head(torch.relu(m.norm(x))).mean(1)

    return Model(forward, norm=nn.LayerNorm(D), head=head()), rows()


@case("RMS norm", "`nn.RMSNorm`")
def _() -> tuple[nn.Module, Tensor]:
    def forward(m: nn.Module, x: Tensor) -> Tensor:
        return m.head(torch.relu(m.norm(x))).mean(1)

    return Model(forward, norm=nn.RMSNorm(D), head=head()), rows()


@case("group norm", "a convolution and `nn.GroupNorm`")
def _() -> tuple[nn.Module, Tensor]:
    def forward(m: nn.Module, x: Tensor) -> Tensor:
        hidden = torch.tanh(m.norm(m.conv(x))).flatten(2).transpose(1, 2)
        return m.head(hidden).mean(1)

    conv, norm = nn.Conv2d(4, D, 3, padding=1), nn.GroupNorm(2, D)
    return Model(forward, conv=conv, norm=norm, head=head()), pictures()


def _with(conv: nn.Module) -> tuple[nn.Module, Tensor]:
    def forward(m: nn.Module, x: Tensor) -> Tensor:
        return m.head(torch.tanh(m.conv(x)).flatten(2).transpose(1, 2)).mean(1)

    return Model(forward, conv=conv, head=head()), pictures()


@case("convolution", "`nn.Conv2d` with padding")
def _() -> tuple[nn.Module, Tensor]:
    return _with(nn.Conv2d(4, D, 3, padding=1))


@case("grouped convolution", "`nn.Conv2d(groups=2)`")
def _() -> tuple[nn.Module, Tensor]:
    return _with(nn.Conv2d(4, D, 3, padding=1, groups=2))


@case("circular convolution", '`nn.Conv2d(padding_mode="circular")`')
def _() -> tuple[nn.Module, Tensor]:
    return _with(nn.Conv2d(4, D, 3, padding=1, padding_mode="circular"))


@case("LSTM", "`nn.LSTM`, one layer")
def _() -> tuple[nn.Module, Tensor]:
    def forward(m: nn.Module, x: Tensor) -> Tensor:
        return m.head(m.inner(x)[0]).mean(1)

    return Model(forward, inner=nn.LSTM(D, D, batch_first=True), head=head()), rows()


@case("attention", "`nn.MultiheadAttention`")
def _() -> tuple[nn.Module, Tensor]:
    def forward(m: nn.Module, x: Tensor) -> Tensor:
        return m.head(m.inner(x, x, x, need_weights=False)[0]).mean(1)

    return Model(forward, inner=nn.MultiheadAttention(D, 2, batch_first=True), head=head()), rows()
