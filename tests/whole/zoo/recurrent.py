"""Recurrent networks: cells in a loop, and torch's fused ones."""

import torch
from torch import Tensor, nn

from zoo.registry import case, loss

T = 4


@case(batch=(0, 1, 3, T), rule=True)
def unrolled_cell(B: int):
    """A hand-written cell: two weights used T times each."""
    inner, outer, head = nn.Linear(3, 4), nn.Linear(4, 4, bias=False), nn.Linear(4, 2)

    def forward(x: Tensor) -> Tensor:
        h = x.new_zeros(x.shape[0], 4)
        for t in range(x.shape[1]):
            h = torch.tanh(inner(x[:, t]) + outer(h))
        return loss(head(h))

    return nn.ModuleList([inner, outer, head]), forward, (torch.randn(B, T, 3),)


def with_cell(B: int, cell: nn.Module) -> tuple:
    def forward(x: Tensor) -> Tensor:
        state: Tensor | tuple[Tensor, Tensor] | None = None
        total = 0.0
        for t in range(x.shape[1]):
            state = cell(x[:, t], state)
            total = total + loss(state[0] if isinstance(state, tuple) else state)
        return total

    return cell, forward, (torch.randn(B, T, 3),)


@case(batch=(1, 3, T))
def rnn_cell(B: int):
    """nn.RNNCell in a loop, a loss at every step."""
    return with_cell(B, nn.RNNCell(3, 4))


@case(batch=(1, 3, T))
def lstm_cell(B: int):
    """nn.LSTMCell in a loop; its op has two outputs."""
    return with_cell(B, nn.LSTMCell(3, 4))


@case(batch=(1, 3, T))
def gru_cell(B: int):
    """nn.GRUCell in a loop."""
    return with_cell(B, nn.GRUCell(3, 4))


def with_rnn(B: int, model: nn.RNNBase) -> tuple:
    def forward(x: Tensor) -> Tensor:
        x = x if model.batch_first else x.transpose(0, 1)
        out, state = model(x)
        out = out if model.batch_first else out.transpose(0, 1)
        states = state if isinstance(state, tuple) else (state,)
        return loss(out) + sum(loss(s.transpose(0, 1)) for s in states)

    return model, forward, (torch.randn(B, T, 3),)


@case(batch=(1, 3, T))
def lstm(B: int):
    """nn.LSTM, one op for the whole sequence; both its outputs are used."""
    return with_rnn(B, nn.LSTM(3, 4, batch_first=True))


@case(batch=(1, 3, T))
def lstm_sequence_first(B: int):
    """nn.LSTM as it is by default: its output is sequence-major."""
    return with_rnn(B, nn.LSTM(3, 4))


@case(batch=(1, 3))
def lstm_bidirectional(B: int):
    """Two layers and two directions."""
    return with_rnn(B, nn.LSTM(3, 2, num_layers=2, bidirectional=True, batch_first=True))


@case(batch=(1, 3))
def lstm_projected(B: int):
    """nn.LSTM with a projection, and without biases."""
    return with_rnn(B, nn.LSTM(3, 4, proj_size=2, bias=False, batch_first=True))


@case(batch=(1, 3))
def lstm_last_output(B: int):
    """Only the last position's output: the gradient is zero at most positions."""
    model, head = nn.LSTM(3, 4, batch_first=True), nn.Linear(4, 2)

    def forward(x: Tensor) -> Tensor:
        return loss(head(model(x)[0][:, -1]))

    return nn.ModuleList([model, head]), forward, (torch.randn(B, T, 3),)


@case(batch=(1, 3))
def lstm_packed(B: int):
    """A PackedSequence: rows sorted by length, sequence-major, without the padding."""
    model, head = nn.LSTM(3, 4, batch_first=True), nn.Linear(4, 2)
    lengths = torch.tensor([2, 4, 3])[:B]

    def forward(x: Tensor, n: Tensor) -> Tensor:
        packed = nn.utils.rnn.pack_padded_sequence(x, n, batch_first=True, enforce_sorted=False)
        out, (h, _) = model(packed)
        out, _ = nn.utils.rnn.pad_packed_sequence(out, batch_first=True, total_length=T)
        return loss(head(out)) + loss(h.transpose(0, 1))

    return nn.ModuleList([model, head]), forward, (torch.randn(B, T, 3), lengths)


@case(batch=(1, 3))
def rnn_packed(B: int):
    """nn.RNN over a PackedSequence, two layers, two directions: fewer examples at each step."""
    model, head = nn.RNN(3, 4, 2, batch_first=True, bidirectional=True), nn.Linear(4, 2)
    lengths = torch.tensor([2, 4, 3])[:B]

    def forward(x: Tensor, n: Tensor) -> Tensor:
        packed = nn.utils.rnn.pack_padded_sequence(x, n, batch_first=True, enforce_sorted=False)
        return loss(head(model(packed)[1].transpose(0, 1)))

    return nn.ModuleList([model, head]), forward, (torch.randn(B, T, 3), lengths)


@case(batch=(1, 3, T))
def gru(B: int):
    """nn.GRU."""
    return with_rnn(B, nn.GRU(3, 4, batch_first=True))


@case(batch=(1, 3))
def gru_bidirectional_sequence_first(B: int):
    """nn.GRU, two directions, sequence-major."""
    return with_rnn(B, nn.GRU(3, 4, bidirectional=True))


@case(batch=(1, 3, T))
def rnn(B: int):
    """nn.RNN with relu."""
    return with_rnn(B, nn.RNN(3, 4, batch_first=True, nonlinearity="relu"))


@case(batch=(1, 3))
def rnn_learned_start(B: int):
    """The first state is a parameter, expanded over the batch."""
    model = nn.GRU(3, 4, batch_first=True)
    model.register_parameter("start", nn.Parameter(torch.randn(1, 1, 4)))

    def forward(x: Tensor) -> Tensor:
        return loss(model(x, model.start.expand(-1, x.shape[0], -1).contiguous())[0])

    return model, forward, (torch.randn(B, T, 3),)
