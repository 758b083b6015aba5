"""Claim: `pergrad.norms` costs less than the training step it replaces.

At most 0.75 of a plain forward and backward pass on a perceptron, at most 0.95 on a GPT-like
model, at most 1.1 times the plain step's peak memory.

    python benchmarks/norms.py                 # all workloads
    python benchmarks/norms.py gpt --rounds 50
    python benchmarks/norms.py gpt --profile   # where pergrad.norms spends its time

To add a model, write a function that returns a `Step` and decorate it with `@workload`; to add a
method, write a function of a `Step` and decorate it with `@contestant`.
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

import harness
import pergrad
from harness import Step, contestant, workload

# --- workloads -------------------------------------------------------------------------------


@workload(
    "mlp",
    "perceptron 256-512-512-1, B=1024, squared error",
    time=0.75,
    memory=1.1,
)
def mlp() -> Step:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(256, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 1)
    )
    x, y = torch.randn(1024, 256), torch.randn(1024, 1)

    def loss(call: Callable[..., Tensor], x: Tensor, y: Tensor) -> Tensor:
        return (call(x) - y).square().sum(1)

    return Step(model, (x, y), loss)


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for part in self.qkv(self.norm1(x)).chunk(3, -1)
        )
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class GPT(nn.Module):
    def __init__(self, vocabulary: int, width: int, layers: int, heads: int, length: int) -> None:
        super().__init__()
        self.token = nn.Embedding(vocabulary, width)
        self.position = nn.Embedding(length, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.token(ids) + self.position(torch.arange(ids.shape[1], device=ids.device))
        return self.head(self.norm(self.blocks(x)))


@workload(
    "gpt",
    "GPT-like: 4 layers, width 256, 4 heads, vocabulary 1000; T=128, B=16, mean cross entropy",
    time=0.95,
    memory=1.1,
)
def gpt() -> Step:
    torch.manual_seed(0)
    model = GPT(vocabulary=1000, width=256, layers=4, heads=4, length=128)
    ids = torch.randint(1000, (16, 129))

    def loss(call: Callable[..., Tensor], ids: Tensor, targets: Tensor) -> Tensor:
        logits = call(ids)
        each = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
        return each.view_as(targets).mean(1)

    return Step(model, (ids[:, :-1].contiguous(), ids[:, 1:].contiguous()), loss)


# --- contestants -----------------------------------------------------------------------------


@contestant("plain", "plain forward and backward", memory=True)
def plain(step: Step) -> None:
    step.model.zero_grad(set_to_none=True)
    step.losses().mean().backward()


@contestant("norms", "`pergrad.norms`", memory=True)
def norms(step: Step) -> Tensor:
    step.model.zero_grad(set_to_none=True)
    return pergrad.norms(step.losses(), step.model)


@contestant("backward", "`pergrad.backward`: norms and `.grad`", memory=True)
def backward(step: Step) -> Tensor:
    step.model.zero_grad(set_to_none=True)
    return pergrad.backward(step.losses(), step.model)


@contestant("vmap", "`torch.func`: `vmap(grad)`, then norms", rounds=5, memory=True)
def by_vmap(step: Step) -> Tensor:
    params = {name: p.detach() for name, p in step.model.named_parameters()}

    def one(params: dict[str, Tensor], *example: Tensor) -> Tensor:
        def call(*inputs: Tensor) -> Tensor:
            return functional_call(step.model, params, inputs)

        return step.loss(call, *(t[None] for t in example))[0]

    axes = (None, *(0 for _ in step.batch))
    with sdpa_kernel(SDPBackend.MATH):  # vmap has no rule for the fused attention, and loops
        grads = vmap(grad(one), axes)(params, *step.batch)
    return sum(g.flatten(1).square().sum(1) for g in grads.values()).sqrt()


@contestant("loop", "a backward pass for each example on its own", rounds=5)
def loop(step: Step) -> Tensor:
    params = list(step.model.parameters())
    found = []
    for i in range(len(step.batch[0])):
        losses = step.loss(step.model, *(t[i : i + 1] for t in step.batch))
        grads = torch.autograd.grad(losses[0], params)
        found.append(sum(g.square().sum() for g in grads).sqrt())
    return torch.stack(found)


def profile(step: Step) -> None:
    norms(step)
    with torch.profiler.profile() as run:
        for _ in range(5):
            norms(step)
    print(run.key_averages().table(sort_by="self_cpu_time_total", row_limit=25))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("workloads", nargs="*", help=f"of {', '.join(harness.WORKLOADS)}")
    parser.add_argument("--only", nargs="*", help=f"of {', '.join(harness.CONTESTANTS)}")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--memory", type=int, default=5, help="child processes per measurement")
    parser.add_argument("--out", type=Path, default=harness.RESULTS, help="folder for the JSON")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--memory-child", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()

    if args.memory_child:
        name, way = args.memory_child
        harness.memory_child(harness.WORKLOADS[name].build, harness.CONTESTANTS[way].run)
        return
    unknown = [n for n in args.workloads if n not in harness.WORKLOADS]
    unknown += [n for n in args.only or () if n not in harness.CONTESTANTS]
    if unknown:
        parser.error(f"unknown: {', '.join(unknown)}")
    contestants = [
        c
        for name, c in harness.CONTESTANTS.items()
        if args.only is None or name == "plain" or name in args.only
    ]
    for name in args.workloads or harness.WORKLOADS:
        chosen = harness.WORKLOADS[name]
        if args.profile:
            profile(chosen.build())
            continue
        harness.measure(
            chosen,
            Path(__file__),
            contestants=contestants,
            rounds=args.rounds,
            memory_repeats=args.memory,
            folder=args.out,
        )


if __name__ == "__main__":
    main()
