"""Language models: LSTM, GRU, a selective state space, LoRA, packed sequences."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..registry import Problem, alive, architecture

BATCH, LENGTH, VOCABULARY = 3, 6, 31


def _tokens(number: int, length: int = LENGTH + 1) -> Tensor:
    generator = torch.Generator().manual_seed(number)
    return torch.randint(0, VOCABULARY, (BATCH, length), generator=generator)


def _next_token(model: nn.Module) -> Problem:
    def losses(number: int) -> Tensor:
        ids = _tokens(number)
        logits = model(ids[:, :-1])
        return F.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none").mean(1)

    return Problem(model, losses)


class Recurrent(nn.Module):
    """A recurrent language model, embedding and head tied."""

    def __init__(self, kind: type[nn.Module], **how: object) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, 12)
        self.layers = kind(12, 12, batch_first=True, **how)
        self.head = nn.Linear(12, VOCABULARY)
        self.head.weight = self.embedding.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.layers(self.embedding(ids))[0])


@architecture("lstm-language-model", "By hand", quick=True, recurrent=True)
def lstm() -> Problem:
    return _next_token(alive(Recurrent(nn.LSTM, num_layers=2).double()))


@architecture("lstm-language-model-float32", "By hand", dtype=torch.float32, recurrent=True)
def lstm_single() -> Problem:
    """In float32 the whole layer is one op, by oneDNN."""
    return _next_token(alive(Recurrent(nn.LSTM, num_layers=2)))


@architecture("gru-language-model", "By hand", recurrent=True)
def gru() -> Problem:
    return _next_token(alive(Recurrent(nn.GRU, num_layers=2).double()))


@architecture("bidirectional-lstm-packed", "By hand", recurrent=True)
def packed() -> Problem:
    """Sentences of different lengths, packed; a tag for every word."""
    embedding = nn.Embedding(VOCABULARY, 8)
    layers = nn.LSTM(8, 6, batch_first=True, bidirectional=True)
    head = nn.Linear(12, 5)
    model = alive(nn.ModuleList([embedding, layers, head]).double())

    def losses(number: int) -> Tensor:
        ids, lengths = _tokens(number, LENGTH), torch.tensor([4, 6, 3])
        rows = nn.utils.rnn.pack_padded_sequence(
            embedding(ids), lengths, batch_first=True, enforce_sorted=False
        )
        states, _ = nn.utils.rnn.pad_packed_sequence(layers(rows)[0], batch_first=True)
        each = F.cross_entropy(head(states).transpose(1, 2), ids % 5, reduction="none")
        return (each * (torch.arange(LENGTH) < lengths[:, None])).sum(1)

    return Problem(model, losses)


class SelectiveStateSpace(nn.Module):
    """The block of Mamba: gate, causal depthwise convolution, a recurrence steered by the input."""

    def __init__(self, width: int = 8, states: int = 4, rank: int = 2) -> None:
        super().__init__()
        inner = 2 * width
        self.sizes = rank, states
        self.norm = nn.RMSNorm(width)
        self.enter = nn.Linear(width, 2 * inner, bias=False)
        self.conv = nn.Conv1d(inner, inner, 3, padding=2, groups=inner)
        self.select = nn.Linear(inner, rank + 2 * states, bias=False)
        self.step = nn.Linear(rank, inner)
        self.log_decay = nn.Parameter(torch.log(torch.arange(1.0, states + 1)).repeat(inner, 1))
        self.skip = nn.Parameter(torch.ones(inner))
        self.leave = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        length = x.shape[1]
        u, gate = self.enter(self.norm(x)).chunk(2, -1)
        u = F.silu(self.conv(u.transpose(1, 2))[..., :length].transpose(1, 2))
        rank, states = self.sizes
        low, into, out = self.select(u).split([rank, states, states], -1)
        step = F.softplus(self.step(low))
        decay = torch.exp(step[..., None] * -torch.exp(self.log_decay))
        drive = (step * u)[..., None] * into[:, :, None]
        state = torch.zeros_like(drive[:, 0])
        seen = []
        for t in range(length):
            state = decay[:, t] * state + drive[:, t]
            seen.append(torch.einsum("bds,bs->bd", state, out[:, t]))
        y = torch.stack(seen, 1) + u * self.skip
        return x + self.leave(y * F.silu(gate))


@architecture("mamba-block", "By hand", quick=True)
def mamba() -> Problem:
    layers = [nn.Embedding(VOCABULARY, 8), SelectiveStateSpace(), SelectiveStateSpace(),
              nn.RMSNorm(8), nn.Linear(8, VOCABULARY)]  # fmt: skip
    return _next_token(alive(nn.Sequential(*layers).double()))


class LowRank(nn.Module):
    """A frozen linear layer plus a trained product of two thin matrices, merged or not."""

    def __init__(self, base: nn.Linear, rank: int = 2, merged: bool = False) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down = nn.Parameter(torch.randn(rank, base.in_features) / math.sqrt(rank))
        self.up = nn.Parameter(torch.randn(base.out_features, rank))
        self.merged = merged

    def forward(self, x: Tensor) -> Tensor:
        if self.merged:
            return F.linear(x, self.base.weight + 0.5 * self.up @ self.down, self.base.bias)
        return self.base(x) + 0.5 * (x @ self.down.T) @ self.up.T


@architecture("lora-by-hand", "By hand", quick=True)
def lora() -> Problem:
    """Only low-rank updates are trained, one of them merged into its weight."""
    table = nn.Embedding(VOCABULARY, 8).requires_grad_(False)
    first, second = LowRank(nn.Linear(8, 12)), LowRank(nn.Linear(12, 8), merged=True)
    head = nn.Linear(8, VOCABULARY)
    return _next_token(nn.Sequential(table, first, nn.GELU(), second, head).double())


class Seq2Seq(nn.Module):
    """torch's own transformer, sequence first, with masks and padding."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, width)
        self.positions = nn.Embedding(LENGTH, width)
        self.body = nn.Transformer(width, 2, 2, 2, 16)
        self.head = nn.Linear(width, VOCABULARY)

    def forward(self, source: Tensor, target: Tensor, padded: Tensor) -> Tensor:
        where = self.positions(torch.arange(target.shape[1]))[:, None]
        causal = nn.Transformer.generate_square_subsequent_mask(target.shape[1])
        states = self.body(
            self.embedding(source).transpose(0, 1),
            self.embedding(target).transpose(0, 1) + where,
            tgt_mask=causal.to(where.dtype),
            src_key_padding_mask=padded,
            memory_key_padding_mask=padded,
        )
        return self.head(states)  # (T, B, V)


@architecture("encoder-decoder-sequence-first", "By hand")
def encoder_decoder() -> Problem:
    model = alive(Seq2Seq().double().eval())

    def losses(number: int) -> Tensor:
        source, target = _tokens(number, 5), _tokens(number + 7, LENGTH)
        padded = torch.zeros(BATCH, 5, dtype=torch.bool)
        padded[2, 3:] = True
        bias = torch.zeros(BATCH, 5, dtype=torch.float64).masked_fill(padded, float("-inf"))
        logits = model(source, target, bias)
        return F.cross_entropy(logits.permute(1, 2, 0), target, reduction="none").sum(1)

    return Problem(model, losses)


@architecture("tied-byte-transformer", "By hand")
def tied() -> Problem:
    """One block applied three times, head tied to the embedding, learned attention bias."""

    class Model(nn.Module):
        def __init__(self, width: int = 8) -> None:
            super().__init__()
            self.embedding = nn.Embedding(VOCABULARY, width)
            self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
            self.norm = nn.LayerNorm(width)
            self.bias = nn.Parameter(torch.randn(2, 2 * LENGTH - 1))

        def forward(self, ids: Tensor) -> Tensor:
            x = self.embedding(ids)
            steps = torch.arange(ids.shape[1])
            bias = self.bias[:, steps[:, None] - steps + LENGTH - 1]
            for _ in range(3):
                q, k, v = (
                    y.unflatten(2, (2, -1)).transpose(1, 2)
                    for y in self.qkv(self.norm(x)).chunk(3, -1)
                )
                y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
                x = x + self.out(y.transpose(1, 2).flatten(2))
            return x @ self.embedding.weight.T

    return _next_token(alive(Model().double()))
