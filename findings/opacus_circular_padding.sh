#!/usr/bin/env bash
# opacus 1.6.0 with torch 2.13.0 (CPU): for nn.Conv2d(padding_mode="circular") the per-example gradients
# are those of zero padding; they do not sum up to the layer's gradient. "reflect" and "replicate" alike.
# No error, no warning. Seen: |sum of grad_sample - grad| / |grad| above 0.1 for each of the three modes,
# below 1e-5 for "zeros". Fails if that changes.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy scipy opt_einsum
"$folder/venv/bin/pip" install --quiet --no-deps opacus==1.6.0
"$folder/venv/bin/python" -W ignore - <<'PYTHON'
import torch
from opacus import GradSampleModule

print("torch", torch.__version__)
off = {}
for mode in ("zeros", "circular", "reflect", "replicate"):
    torch.manual_seed(0)
    conv = torch.nn.Conv2d(2, 3, 3, padding=1, padding_mode=mode)
    x = torch.randn(4, 2, 4, 4)
    conv(x).square().sum().backward()
    plain = conv.weight.grad.clone()
    conv.zero_grad()
    hooked = GradSampleModule(conv, loss_reduction="sum")
    hooked(x).square().sum().backward()
    off[mode] = float((conv.weight.grad_sample.sum(0) - plain).norm() / plain.norm())
    print(mode, "relative difference", f"{off[mode]:.1e}")

assert off["zeros"] < 1e-5, "zero padding has changed"
assert all(off[m] > 0.1 for m in ("circular", "reflect", "replicate")), "padding modes have changed"
PYTHON
