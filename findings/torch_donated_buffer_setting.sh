#!/usr/bin/env bash
# torch 2.13.0 (CPU, inductor): retain_graph=True through a region whose backward was compiled by an
# earlier plain step raises, and the message offers torch._functorch.config.donated_buffer=False. That
# removes the guard, but code compiled before still writes over saved tensors: a second backward pass
# through the same graph returns other gradients, no error, no warning. It is so too where the setting is
# made first of all, if the compiled code comes from the cache of a process that ran without it; only with
# an empty cache are both passes equal. Seen: the second pass off by 21 % of the first (asserted: more than
# 1 %). Fails if that changes.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy
cat > "$folder/passes.py" <<'PYTHON'
import sys

import torch
from torch._functorch import config


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(8, 6)

    def forward(self, x):
        return self.linear(x).sigmoid() * 2


def off():
    """How far a second pass through one graph is from the first, and the message if it raises."""
    loss = compiled(x).square().sum()
    try:
        one, two = [
            torch.autograd.grad(loss, model.linear.weight, retain_graph=True)[0].clone() for _ in range(2)
        ]
    except RuntimeError as error:
        return str(error)
    return float((two - one).norm() / one.norm())


name, made, expected = sys.argv[1:]
torch.manual_seed(0)
model, x = Model(), torch.randn(5, 8)
config.donated_buffer = made != "first"
compiled = torch.compile(model)
compiled(x).square().sum().backward()                  # a plain step
if made == "later":
    said = off()
    assert "set torch._functorch.config.donated_buffer=False" in str(said), said
    print("torch", torch.__version__, "says:", said)
    config.donated_buffer = False
found = off()
print(f"{name}: the second pass is off by {found}")
assert found == 0 if expected == "equal" else found > 0.01, "this has changed"
PYTHON
run() { TORCHINDUCTOR_CACHE_DIR="$folder/$1" "$folder/venv/bin/python" -W ignore "$folder/passes.py" "${@:2}"; }
run one "set after a plain step" later off
run one "set first, code from that process's cache" first off
run two "set first, empty cache" first equal
