#!/usr/bin/env bash
# backpack-for-pytorch 1.7.1 with torch 2.13.0 (CPU): BatchL2Grad of a grouped convolution's weight is not
# the squared norm of the per-example gradients that BatchGrad of the same library returns, which are
# right. No error, no warning. Seen: squares 1.7 to 2.3 times too large for groups=2 (asserted: more than
# 1 % off), 1.0 for groups=1. Fails if that changes.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy einops unfoldNd einconv
"$folder/venv/bin/pip" install --quiet --no-deps backpack-for-pytorch==1.7.1
"$folder/venv/bin/python" -W ignore - <<'PYTHON'
import torch
from backpack import backpack, extend
from backpack.extensions import BatchGrad, BatchL2Grad

print("torch", torch.__version__)
off = {}
for groups in (1, 2):
    torch.manual_seed(0)
    conv = torch.nn.Conv2d(4, 4, 3, groups=groups)
    model = extend(torch.nn.Sequential(conv, torch.nn.Flatten(), torch.nn.Linear(16, 3)))
    x, y = torch.randn(5, 4, 4, 4), torch.tensor([0, 1, 2, 0, 1])
    loss = extend(torch.nn.CrossEntropyLoss(reduction="sum"))(model(x), y)
    with backpack(BatchGrad(), BatchL2Grad()):
        loss.backward()
    rows = [
        torch.autograd.grad(torch.nn.functional.cross_entropy(model(x[b:b+1]), y[b:b+1]), conv.weight)[0]
        for b in range(5)
    ]
    right = torch.stack(rows).flatten(1).square().sum(1)
    own = conv.weight.grad_batch.flatten(1).square().sum(1)
    print("groups", groups, "BatchL2Grad / right", (conv.weight.batch_l2 / right).tolist())
    print("groups", groups, "squares of BatchGrad / right", (own / right).tolist())
    assert torch.allclose(own, right, rtol=1e-4), "BatchGrad has changed"
    off[groups] = float((conv.weight.batch_l2 / right - 1).abs().max())

assert off[1] < 1e-4, "one group has changed"
assert off[2] > 0.01, "groups have changed"
PYTHON
