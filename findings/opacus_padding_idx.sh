#!/usr/bin/env bash
# opacus 1.6.0 with torch 2.13.0 (CPU): the per-example gradient of nn.Embedding(padding_idx=0) has a row
# for the padding token, which the embedding's own gradient leaves at zero. Where examples are padded,
# their norms are too large, by an amount that grows with the padding; also in ghost clipping.
# No error, no warning. Seen: row 0 of grad_sample nonzero, row 0 of grad zero; norms 1.41 times too
# large where each example has as many padding tokens as others. Fails if that changes.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy scipy opt_einsum
"$folder/venv/bin/pip" install --quiet --no-deps opacus==1.6.0
"$folder/venv/bin/python" -W ignore - <<'PYTHON'
import torch
from opacus import GradSampleModule
from opacus.grad_sample import GradSampleModuleFastGradientClipping as Ghost

print("torch", torch.__version__)
tokens = torch.tensor([[1, 0], [2, 0]])  # one token and one of padding


def embedding():
    torch.manual_seed(0)
    return torch.nn.Embedding(4, 3, padding_idx=0)


plain = embedding()
plain(tokens).sum().backward()
hooked = GradSampleModule(embedding(), loss_reduction="sum")
hooked(tokens).sum().backward()
rows = next(hooked.parameters()).grad_sample
print("padding row of the gradient", plain.weight.grad[0].tolist())
print("padding row of the sum of grad_sample", rows.sum(0)[0].tolist())

ghost = Ghost(embedding(), loss_reduction="sum", max_grad_norm=1.0, use_ghost_clipping=True)
ghost(tokens).sum().backward()
right = torch.full((2,), 3.0).sqrt()  # one row of three ones
ratio = ghost.get_norm_sample() / right
print("ghost norms through right ones", ratio.tolist())

assert plain.weight.grad[0].tolist() == [0.0, 0.0, 0.0], "torch has changed"
assert rows.sum(0)[0].tolist() == [2.0, 2.0, 2.0], "grad_sample of the padding row has changed"
assert torch.allclose(ratio, torch.tensor(2.0).sqrt()), "ghost norms have changed"
PYTHON
