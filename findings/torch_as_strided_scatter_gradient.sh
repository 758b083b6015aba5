#!/usr/bin/env bash
# torch 2.13.0 (CPU): the gradient of torch.as_strided_scatter depends on where the incoming gradient
# lies in memory. Behind torch.stack or torch.cat, whose backward hands on slices, the source's
# gradient is that of the first piece twice; and the input keeps a gradient in the cells that
# were overwritten, whatever lies above. No error, no warning.
# Seen: stack [[2.0, 4.0], [8.0, 10.0]], expected [[11.0, 13.0], [17.0, 19.0]]; the overwritten cells
# of the input have gradient [1.0, 2.0, 4.0, 5.0], expected zeros. Fails if that changes.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy
"$folder/venv/bin/python" - <<'PYTHON'
import torch

print("torch", torch.__version__)
cells = torch.tensor([1, 2, 4, 5])  # of a 3 by 3 matrix: what sizes, strides and offset cover


def written(matrix, block):
    return torch.as_strided_scatter(matrix, block, (2, 2), (3, 1), 1)


matrix = torch.zeros(3, 3, requires_grad=True)
block = torch.ones(2, 2, requires_grad=True)
weights = torch.arange(18.0).view(2, 3, 3)

stacked = (torch.stack([written(matrix, block), written(matrix, block)]) * weights).sum()
(of_block,) = torch.autograd.grad(stacked, block)
expected = weights.sum(0).flatten()[cells].view(2, 2)  # d/d block of sum_k w_k . written
print("stack", of_block.tolist(), "expected", expected.tolist())

(of_matrix,) = torch.autograd.grad((written(matrix, block) * weights[0]).sum(), matrix)
overwritten = of_matrix.flatten()[cells]
print("gradient of overwritten cells", overwritten.tolist(), "expected zeros")

assert of_block.tolist() == [[2.0, 4.0], [8.0, 10.0]], "the gradient behind stack has changed"
assert overwritten.tolist() == [1.0, 2.0, 4.0, 5.0], "the input's gradient has changed"
PYTHON
