"""Transformers, from plain ops and from torch's modules; T = 4, so that B may equal T."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.registry import case, loss

T = 4
BATCHES = (0, 1, 3, T)


def heads(x: Tensor, count: int) -> Tensor:
    """(B, T, d) -> (B, H, T, d / H)"""
    return x.unflatten(-1, (count, -1)).transpose(1, 2)


class Attention(nn.Module):
    def __init__(self, width: int, count: int = 2, *, causal: bool = False, bias: bool = True):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(width, width, bias=bias) for _ in range(3))
        self.out = nn.Linear(width, width)
        self.count, self.causal = count, causal

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        context = x if context is None else context
        q, k, v = (heads(f(y), self.count) for f, y in
                   ((self.q, x), (self.k, context), (self.v, context)))  # fmt: skip
        scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
        if self.causal:
            mask = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
            scores = scores.masked_fill(mask, float("-inf"))
        mixed = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
        return self.out(mixed)


class Block(nn.Module):
    def __init__(self, width: int, *, causal: bool = False):
        super().__init__()
        self.attention = Attention(width, causal=causal)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 6), nn.GELU(), nn.Linear(6, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


@case(batch=BATCHES, rule=True)
def transformer_block(B: int):
    """Attention from linear, softmax and matmul."""
    model = nn.Sequential(Block(4), nn.Linear(4, 3))
    return model, lambda x: loss(model(x)), (torch.randn(B, T, 4),)


class GPT(nn.Module):
    """Causal, embedding tied to the head, learned positions."""

    def __init__(self, vocabulary: int = 7, width: int = 4, *, tied: bool = True):
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.positions = nn.Parameter(torch.randn(1, T, width) * 0.3)
        self.block = Block(width, causal=True)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        if tied:
            self.head.weight = self.tokens.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids) + self.positions[:, : ids.shape[1]]
        return self.head(self.norm(self.block(x)))


def text(B: int, vocabulary: int = 7) -> tuple[Tensor, Tensor]:
    """Tokens, and targets of which the last ones are padding (but for the first example)."""
    ids, targets = torch.randint(vocabulary, (B, T)), torch.randint(vocabulary, (B, T))
    for b in range(1, B):
        targets[b, T - (b % (T - 1)) :] = -100
    return ids, targets


@case(batch=BATCHES, rule=True)
def gpt_tied(B: int):
    """Tied head, padding by ignore_index, and cross entropy of transposed logits, whose gradient
    is not contiguous.
    """
    model = GPT()

    def forward(ids: Tensor, targets: Tensor) -> Tensor:
        logits = model(ids).transpose(1, 2)
        return F.cross_entropy(logits, targets, ignore_index=-100, reduction="none").sum(1)

    return model, forward, text(B)


@case(batch=BATCHES, rule=True)
def gpt_masked_mean(B: int):
    """Flattened logits, and the mean over the tokens that count."""
    model = GPT(tied=False)

    def forward(ids: Tensor, targets: Tensor) -> Tensor:
        logits = model(ids).flatten(0, 1)
        each = F.cross_entropy(logits, targets.flatten(), reduction="none").view(targets.shape)
        mask = targets != -100
        return (each * mask).sum(1) / mask.sum(1)

    return model, forward, text(B)


@case(batch=(1, 3, T))
def gpt_shifted_sdpa(B: int):
    """scaled_dot_product_attention with is_causal, next-token loss by slices of the logits."""
    emb, qkv, out = nn.Embedding(7, 4), nn.Linear(4, 12), nn.Linear(4, 7)

    def forward(ids: Tensor) -> Tensor:
        q, k, v = (heads(y, 2) for y in qkv(emb(ids)).chunk(3, -1))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        logits = out(mixed.transpose(1, 2).flatten(2))
        wrong = F.cross_entropy(
            logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="none"
        )
        return wrong.view(ids.shape[0], -1).mean(1)

    return nn.ModuleList([emb, qkv, out]), forward, (torch.randint(7, (B, T)),)


def multihead(B: int, *, batch_first: bool, positions: int) -> tuple:
    model = nn.MultiheadAttention(4, 2, batch_first=batch_first)
    nn.init.normal_(model.in_proj_bias)
    nn.init.normal_(model.out_proj.bias)

    def forward(x: Tensor) -> Tensor:
        x = x if batch_first else x.transpose(0, 1)
        out, _ = model(x, x, x)
        return loss(out if batch_first else out.transpose(0, 1))

    return model, forward, (torch.randn(B, positions, 4),)


@case(batch=(1, 3, T))
def multihead_batch_first(B: int):
    """nn.MultiheadAttention works sequence-major inside, also under batch_first."""
    return multihead(B, batch_first=True, positions=T)


@case(batch=(1, 3, T))
def multihead_sequence_first(B: int):
    """nn.MultiheadAttention as it is by default."""
    return multihead(B, batch_first=False, positions=T)


@case(batch=(1, 3))
def multihead_one_position(B: int):
    """T = 1, where all layouts look alike."""
    return multihead(B, batch_first=True, positions=1)


@case(batch=(1, 3, T))
def multihead_with_weights_and_masks(B: int):
    """A padding mask, bias_k, bias_v and add_zero_attn: rows and columns of the model's own."""
    model = nn.MultiheadAttention(4, 2, add_bias_kv=True, add_zero_attn=True, batch_first=True)

    def forward(x: Tensor, pad: Tensor) -> Tensor:
        out, attention = model(x, x, x, key_padding_mask=pad, average_attn_weights=False)
        return loss(out) + loss(attention)

    pad = torch.arange(T)[None] >= torch.tensor([T, 2, 3, 1])[:B, None]
    return model, forward, (torch.randn(B, T, 4), pad)


@case(batch=(1, 3, T))
def multihead_other_widths(B: int):
    """kdim and vdim: three projections instead of one."""
    model = nn.MultiheadAttention(4, 2, kdim=3, vdim=5, batch_first=True)

    def forward(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return loss(model(q, k, v, need_weights=False)[0])

    return model, forward, (torch.randn(B, T, 4), torch.randn(B, 3, 3), torch.randn(B, 3, 5))


@case(batch=(1, 3, T))
def cross_attention(B: int):
    """Keys and values from a context with another number of positions: packed kv projection."""
    model = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(x: Tensor, c: Tensor) -> Tensor:
        return loss(model(x, c, c)[0])

    return model, forward, (torch.randn(B, T, 4), torch.randn(B, 3, 4))


@case(batch=BATCHES, rule=True)
def cross_attention_plain(B: int):
    """The same from plain ops."""
    model = Attention(4)
    return model, lambda x, c: loss(model(x, c)), (torch.randn(B, T, 4), torch.randn(B, 3, 4))


def encoder_layer(batch_first: bool, **more: object) -> nn.Module:
    return nn.TransformerEncoderLayer(4, 2, 6, dropout=0.0, batch_first=batch_first, **more)


@case(batch=(1, 3, T))
def encoder_layer_batch_first(B: int):
    """nn.TransformerEncoderLayer, norm last."""
    model = encoder_layer(True)
    return model, lambda x: loss(model(x)), (torch.randn(B, T, 4),)


@case(batch=(1, 3, T))
def encoder_layer_sequence_first(B: int):
    """nn.TransformerEncoderLayer as it is by default, and norm first."""
    model = encoder_layer(False, norm_first=True)

    def forward(x: Tensor) -> Tensor:
        return loss(model(x.transpose(0, 1)).transpose(0, 1))

    return model, forward, (torch.randn(B, T, 4),)


@case(batch=(1, 3, T))
def encoder_of_two_layers(B: int):
    """nn.TransformerEncoder with a padding mask and a head on the first position."""
    model = nn.ModuleList(
        [nn.TransformerEncoder(encoder_layer(True), 2, enable_nested_tensor=False), nn.Linear(4, 3)]
    )

    def forward(x: Tensor, pad: Tensor) -> Tensor:
        return loss(model[1](model[0](x, src_key_padding_mask=pad)[:, 0]))

    pad = torch.arange(T)[None] >= torch.tensor([T, 2, 3, 1])[:B, None]
    return model, forward, (torch.randn(B, T, 4), pad)


@case(batch=(1, 3))
def encoder_and_decoder(B: int):
    """nn.Transformer: two stacks that meet by cross attention."""
    model = nn.Transformer(4, 2, 1, 1, 6, dropout=0.0, batch_first=True)

    def forward(x: Tensor, y: Tensor) -> Tensor:
        return loss(model(x, y))

    return model, forward, (torch.randn(B, T, 4), torch.randn(B, 3, 4))


@case(batch=BATCHES, rule=True)
def positions_by_lookup(B: int):
    """nn.Embedding(arange(T)): no example in sight until the sum is broadcast."""
    tokens, positions, out = nn.Embedding(7, 4), nn.Embedding(T, 4), nn.Linear(4, 3)

    def forward(ids: Tensor) -> Tensor:
        return loss(out(tokens(ids) + positions(torch.arange(ids.shape[1]))))

    return nn.ModuleList([tokens, positions, out]), forward, (torch.randint(7, (B, T)),)


@case(batch=BATCHES, rule=True)
def positions_by_lookup_of_one_row(B: int):
    """position_ids of shape (1, T), as in GPT-2."""
    tokens, positions, out = nn.Embedding(7, 4), nn.Embedding(T + 2, 4), nn.Linear(4, 3)
    register = torch.arange(T + 2)[None]

    def forward(ids: Tensor) -> Tensor:
        return loss(out((tokens(ids) + positions(register[:, : ids.shape[1]])).tanh()))

    return nn.ModuleList([tokens, positions, out]), forward, (torch.randint(7, (B, T)),)


@case(batch=BATCHES, rule=True)
def position_parameter(B: int):
    """A parameter (1, T, d) added to (B, T, d)."""
    model = nn.ParameterDict({"p": torch.randn(1, T, 4), "w": torch.randn(4, 3)})

    def forward(x: Tensor) -> Tensor:
        return loss((x + model["p"]) @ model["w"])

    return model, forward, (torch.randn(B, T, 4),)


class Vision(nn.Module):
    """Class token by expand and cat, positions, LayerScale."""

    def __init__(self) -> None:
        super().__init__()
        self.cls = nn.Parameter(torch.randn(1, 1, 4))
        self.positions = nn.Parameter(torch.randn(1, T + 1, 4))
        self.attention = Attention(4)
        self.norm = nn.LayerNorm(4)
        self.gamma = nn.Parameter(torch.full((4,), 0.3))
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([self.cls.expand(x.shape[0], -1, -1), x], 1) + self.positions
        x = x + self.gamma * self.attention(self.norm(x))
        return self.head(x[:, 0])


@case(batch=BATCHES, rule=True)
def vision_transformer(B: int):
    """The class token has no example of its own, but B copies."""
    model = Vision()
    return model, lambda x: loss(model(x)), (torch.randn(B, T, 4),)


@case(batch=(1, 3, T))
def concatenated_qkv_bias(B: int):
    """A bias put together from parameters and zeros (BEiT)."""
    p = nn.ParameterDict({"w": torch.randn(12, 4), "q": torch.randn(4), "v": torch.randn(4)})

    def forward(x: Tensor) -> Tensor:
        bias = torch.cat([p["q"], torch.zeros(4), p["v"]])
        q, k, v = (heads(y, 2) for y in F.linear(x, p["w"], bias).chunk(3, -1))
        return loss((q @ k.transpose(-1, -2)).softmax(-1) @ v)

    return p, forward, (torch.randn(B, T, 4),)


class Window(nn.Module):
    """Windows of 2 x 2 in a grid of 4 x 4, shifted, with a table of relative position biases."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(4, 12), nn.Linear(4, 4)
        self.table = nn.Parameter(torch.randn(9, 2))
        where = torch.stack(torch.meshgrid(torch.arange(2), torch.arange(2), indexing="ij"))
        relative = where.flatten(1)[:, :, None] - where.flatten(1)[:, None] + 1
        self.index = relative[0] * 3 + relative[1]  # (4, 4)

    def bias(self) -> Tensor:
        return self.table[self.index.reshape(-1)].view(4, 4, 2).permute(2, 0, 1)

    def forward(self, x: Tensor) -> Tensor:  # (B, 4, 4, d)
        n, d = x.shape[0], x.shape[-1]
        x = x.roll((-1, -1), (1, 2))
        x = x.view(n, 2, 2, 2, 2, d).permute(0, 1, 3, 2, 4, 5).reshape(n * 4, 4, d)
        q, k, v = (heads(y, 2) for y in self.qkv(x).chunk(3, -1))
        scores = (q @ k.transpose(-1, -2) + self.bias()[None]).softmax(-1)
        y = self.out((scores @ v).transpose(1, 2).flatten(2))
        y = y.view(n, 2, 2, 2, 2, d).permute(0, 1, 3, 2, 4, 5).reshape(n, 4, 4, d)
        return y.roll((1, 1), (1, 2))


@case(batch=(1, 3, 4))
def swin_windows(B: int):
    """B * windows rows in attention, a rolled grid, and a bias indexed from a table."""
    model = nn.Sequential(Window(), nn.Linear(4, 3))
    return model, lambda x: loss(model(x)), (torch.randn(B, 4, 4, 4),)


class ContinuousWindow(Window):
    """As Swin v2: the bias is a small network on constant coordinates."""

    def __init__(self) -> None:
        super().__init__()
        del self.table
        self.net = nn.Sequential(nn.Linear(2, 5), nn.ReLU(), nn.Linear(5, 2, bias=False))
        steps = torch.tensor([-1.0, 0.0, 1.0])
        self.coordinates = torch.cartesian_prod(steps, steps)
        self.scale = nn.Parameter(torch.tensor([0.3, -0.2]))

    def bias(self) -> Tensor:
        table = self.net(self.coordinates)  # (9, 2)
        bias = table[self.index.reshape(-1)].view(4, 4, 2).permute(2, 0, 1)
        return 16 * torch.sigmoid(bias) * self.scale.clamp(max=4.6).exp()[:, None, None]


@case(batch=(1, 3, 4))
def swin_continuous_bias(B: int):
    """A whole sub-network of parameters alone, with linear layers of nine rows of no example."""
    model = nn.Sequential(ContinuousWindow(), nn.Linear(4, 3))
    return model, lambda x: loss(model(x)), (torch.randn(B, 4, 4, 4),)


@case(batch=(1, 3, T))
def rotary_and_grouped_queries(B: int):
    """Rotary positions by halves, and fewer key heads than query heads by repeat_interleave."""
    q, kv, out = nn.Linear(4, 8), nn.Linear(4, 4), nn.Linear(8, 3)
    angle = torch.arange(T)[:, None] * torch.tensor([1.0, 0.1])
    cos, sin = angle.cos(), angle.sin()

    def turn(x: Tensor) -> Tensor:  # (B, H, T, 2 * 1)
        a, b = x.chunk(2, -1)
        return torch.cat([a * cos[:, :1] - b * sin[:, :1], b * cos[:, :1] + a * sin[:, :1]], -1)

    def forward(x: Tensor) -> Tensor:
        k, v = (heads(y, 1).repeat_interleave(4, 1) for y in kv(x).chunk(2, -1))
        scores = turn(heads(q(x), 4)) @ turn(k).transpose(-1, -2)
        return loss(out((scores.softmax(-1) @ v).transpose(1, 2).flatten(2)))

    return nn.ModuleList([q, kv, out]), forward, (torch.randn(B, T, 4),)


@case(batch=(1, 3, T))
def perceiver_latents(B: int):
    """Learned queries, expanded over the batch, attend to the data."""
    latents, attention = nn.Parameter(torch.randn(2, 4)), Attention(4)
    model = nn.ModuleDict({"attention": attention})
    model.register_parameter("latents", latents)

    def forward(x: Tensor) -> Tensor:
        return loss(attention(latents.expand(x.shape[0], -1, -1), x))

    return model, forward, (torch.randn(B, T, 4),)


@case(batch=(1, 3, T))
def perceiver_unexpanded(B: int):
    """The same, where the query projection runs once for all examples."""
    model = Attention(4)
    model.register_parameter("latents", nn.Parameter(torch.randn(1, 2, 4)))
    return model, lambda x: loss(model(model.latents, x)), (torch.randn(B, T, 4),)


@case(batch=BATCHES)
def mamba_scan(B: int):
    """A state-space scan: exp of a parameter, decay that depends on the input, a loop in time."""
    p = nn.ParameterDict(
        {
            "A_log": torch.randn(4, 2) * 0.5,
            "D": torch.randn(4),
            "dt": torch.randn(4, 4) * 0.5,
            "dt_bias": torch.randn(4),
            "BC": torch.randn(4, 4),
            "conv": torch.randn(4, 1, 2),
        }
    )

    def forward(x: Tensor) -> Tensor:  # (B, T, d)
        x = F.conv1d(F.pad(x.transpose(1, 2), (1, 0)), p["conv"], groups=4).transpose(1, 2)
        x = F.silu(x)
        dt = F.softplus(x @ p["dt"] + p["dt_bias"])
        A = -torch.exp(p["A_log"])
        into, out = (x @ p["BC"]).chunk(2, -1)
        state, ys = x.new_zeros(x.shape[0], 4, 2), []
        for t in range(x.shape[1]):
            decay = torch.exp(dt[:, t, :, None] * A)
            state = decay * state + (dt[:, t] * x[:, t])[..., None] * into[:, t, None]
            ys.append((state * out[:, t, None]).sum(-1) + p["D"] * x[:, t])
        return loss(torch.stack(ys, 1))

    return p, forward, (torch.randn(B, T, 4),)


@case(batch=(1, 3, T))
def linear_attention(B: int):
    """Products over positions without softmax, cumulated in time."""
    qkv, decay = nn.Linear(4, 12), nn.Parameter(torch.tensor([0.5, 1.0]))

    def forward(x: Tensor) -> Tensor:
        q, k, v = (heads(y, 2) for y in qkv(x).chunk(3, -1))
        steps = torch.arange(x.shape[1])
        ages = (steps[:, None] - steps[None]).clamp(min=0)
        fade = (torch.sigmoid(decay)[:, None, None] ** ages).tril()  # (H, T, T)
        return loss((q @ k.transpose(-1, -2) * fade) @ v)

    model = nn.ModuleList([qkv])
    model.register_parameter("decay", decay)
    return model, forward, (torch.randn(B, T, 4),)
