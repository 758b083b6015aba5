#!/usr/bin/env bash
# torch 2.13.0 (CPU): the gradient that batch_norm hands to its input is wrong where its weight is a
# column of a table (one weight for each domain, say): for rows (N, C), for (N, C, 1, 1), and for
# pictures in channels last, in training and in eval mode. It is computed from other cells of the
# table. The forward pass reads the column, and pictures in the ordinary order are right. No error.
# Seen: off by more than a tenth of its size; for ordinary pictures by 0. Fails if that changes.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy
"$folder/venv/bin/python" - <<'PYTHON'
import torch
import torch.nn.functional as F

print("torch", torch.__version__)
torch.manual_seed(0)
weights = torch.tensor([[1.0, 9.0], [2.0, 9.0], [4.0, 9.0]])
mean, var = torch.zeros(3), torch.ones(3)
for shape, last in (((5, 3), False), ((5, 3, 1, 1), False), ((5, 3, 4, 2), True), ((5, 3, 4, 2), False)):
    rows, incoming = torch.randn(shape), torch.randn(shape)
    if last:
        rows, incoming = (t.contiguous(memory_format=torch.channels_last) for t in (rows, incoming))
    for training in (True, False):
        found = []
        for weight in (weights[:, 0].clone(), weights[:, 0]):
            x = rows.clone().requires_grad_()
            out = F.batch_norm(x, mean.clone(), var.clone(), weight, training=training)
            found.append((out, *torch.autograd.grad(out, x, incoming)))
        (copied, right), (column, got) = found
        assert torch.allclose(copied, column), "the forward pass has changed"
        off = float((got - right).abs().max() / right.abs().max())
        print(shape, "channels last" if last else "", "train" if training else "eval", f"off by {off:.2g}")
        ordinary = len(shape) == 4 and shape[2] > 1 and not last
        assert off < 1e-6 if ordinary else off > 0.1, "this has changed"
PYTHON
