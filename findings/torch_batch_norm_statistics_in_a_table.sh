#!/usr/bin/env bash
# torch 2.13.0 (CPU): in eval mode, with rows (N, C), the gradient that batch_norm hands to its input
# takes running statistics for contiguous: if they are a column of a table (one pair of statistics for
# each domain, say), it is computed from other cells of the table. The forward pass reads the column,
# and with (N, C, L) the gradient is right. No error, no warning.
# Seen: forward the same, gradient off by more than a tenth of its size for (N, C), by 0 for
# (N, C, L). Fails if that changes.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy
"$folder/venv/bin/python" - <<'PYTHON'
import torch
import torch.nn.functional as F

print("torch", torch.__version__)
torch.manual_seed(0)
mean, var = torch.randn(3, 2), torch.tensor([[1.0, 9.0], [2.0, 9.0], [4.0, 9.0]])
for shape in ((5, 3), (5, 3, 2)):
    rows = torch.randn(shape, requires_grad=True)
    copied = F.batch_norm(rows, mean[:, 0].clone(), var[:, 0].clone())
    column = F.batch_norm(rows, mean[:, 0], var[:, 0])
    incoming = torch.randn(shape)
    (right,) = torch.autograd.grad(copied, rows, incoming)
    (found,) = torch.autograd.grad(column, rows, incoming)
    off = float((found - right).abs().max() / right.abs().max())
    print(shape, "forward the same:", torch.allclose(copied, column), f"gradient off by {off:.2g}")
    assert torch.allclose(copied, column), "the forward pass has changed"
    assert off > 0.1 if len(shape) == 2 else off == 0, "the gradient has changed"
PYTHON
