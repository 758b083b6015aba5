#!/usr/bin/env bash
# torch 2.13.0 (CPU): an ordinary model trains with wrong gradients. Series as pictures one wide,
# (N, C, T, 1), go through Conv2d and BatchNorm2d, then squeeze(-1).transpose(1, 2) and a Linear. The
# gradient that comes back to the batch norm is dense in the order of channels last, its input dense in
# the ordinary order; both count as "contiguous" by their strides, and the backward takes them for
# alike. So it is for one picture that was turned from (height, width, channels) to a batch of one by
# permute(2, 0, 1)[None], as pictures from files are. In training and in eval mode; batch norm's own
# weight and all below. The forward pass is right. No error, no warning.
# Seen: off by more than a third of the largest element (series; with the input in channels last it is
# right) and by more than a tenth (picture; a contiguous copy is right). Fails if that changes.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy
"$folder/venv/bin/python" - <<'PYTHON'
import torch
from torch import nn

print("torch", torch.__version__)
torch.manual_seed(0)
x = torch.randn(4, 2, 5, 1, dtype=torch.float64)
conv, norm, head = (m.double() for m in (nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3), nn.Linear(3, 2)))


def loss(turned):
    h = conv(x)
    if turned:
        h = h.contiguous(memory_format=torch.channels_last)
    return head(norm(h).squeeze(-1).transpose(1, 2)).square().sum()


params = [conv.weight, norm.weight, norm.bias]
for train in (True, False):
    norm.train(train)
    assert torch.allclose(loss(False), loss(True)), "the forward pass has changed"
    wrong, right = (torch.autograd.grad(loss(turned), params) for turned in (False, True))
    off = [float((a - b).abs().max() / b.abs().max()) for a, b in zip(wrong, right)]
    print("series", "train" if train else "eval", "off by", [f"{o:.2g}" for o in off])
    step, at = 1e-6, conv.weight.data.view(-1)
    with torch.no_grad():  # by finite differences, over the ordinary order
        found = []
        for i in range(len(at)):
            kept = at[i].item()
            at[i] = kept + step
            up = loss(False).item()
            at[i] = kept - step
            found.append((up - loss(False).item()) / (2 * step))
            at[i] = kept
    assert torch.allclose(torch.tensor(found, dtype=at.dtype), right[0].view(-1), atol=1e-5)
    assert min(off) > 0.3, "this has changed"

picture = torch.rand(5, 6, 3, dtype=torch.float64)  # height, width, channels
turned = picture.permute(2, 0, 1)[None]
incoming = torch.randn(1, 3, 5, 6, dtype=torch.float64)
for train in (True, False):
    norm = nn.BatchNorm2d(3, dtype=torch.float64).train(train)
    found = []
    for batch in (turned.clone(memory_format=torch.contiguous_format), turned):
        batch = batch.detach().requires_grad_()
        out = norm(batch)
        found.append([out, *torch.autograd.grad(out, [batch, norm.weight], incoming)])
    assert torch.allclose(found[0][0], found[1][0]), "the forward pass has changed"
    off = [float((b - a).detach().abs().max() / a.detach().abs().max()) for a, b in zip(*found)][1:]
    print("picture", "train" if train else "eval", "off by", [f"{x:.2g}" for x in off])
    assert min(off) > 0.1, "this has changed"
PYTHON
