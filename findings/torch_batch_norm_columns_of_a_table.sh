#!/usr/bin/env bash
# torch 2.13.0 (CPU): the gradient that batch_norm hands to its input is wrong where its weight, or in
# eval mode its running statistics, are a column of a table (one set for each domain, say): for rows
# (N, C), for (N, C, 1, 1), and for pictures in channels last. A weight is read from other cells of the
# table; with statistics the wrong numbers are others in each run, NaN among them. The forward pass reads
# the column, and pictures in the ordinary order are right. No error, no warning.
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
table = torch.tensor([[1.0, 9.0], [2.0, 9.0], [4.0, 9.0]])
for shape, last in (((5, 3), False), ((5, 3, 1, 1), False), ((5, 3, 4, 2), True), ((5, 3, 4, 2), False)):
    rows, incoming = torch.randn(shape), torch.randn(shape)
    if last:
        rows, incoming = (t.contiguous(memory_format=torch.channels_last) for t in (rows, incoming))
    for which, training in (("weight", True), ("weight", False), ("statistics", False)):
        found = []
        for column in (table[:, 0].clone(), table[:, 0]):
            mean, var, weight = torch.zeros(3), torch.ones(3), torch.ones(3)
            if which == "weight":
                weight = column
            else:
                mean, var = column, column
            x = rows.clone().requires_grad_()
            out = F.batch_norm(x, mean, var, weight, training=training)
            found.append((out, *torch.autograd.grad(out, x, incoming)))
        (copied, right), (strewn, got) = found
        assert torch.allclose(copied, strewn), "the forward pass has changed"
        off = float((got - right).abs().max() / right.abs().max())
        order, mode = "channels last" if last else "", "train" if training else "eval"
        print(which, shape, order, mode, f"off by {off:.2g}")
        ordinary = len(shape) == 4 and shape[2] > 1 and not last
        assert off < 1e-6 if ordinary else not off <= 0.1, "this has changed"  # NaN is wrong, too
PYTHON
