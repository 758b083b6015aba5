"""Complex numbers between real parameters and real losses; a complex parameter is refused."""

from collections.abc import Callable

import pytest
import torch

import pergrad

X = torch.randn(3, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
Z = torch.complex(X, X.flip(0))
USES: dict[str, Callable] = {
    "sum": lambda w, W: Z + w,
    "product": lambda w, W: Z * w,
    "in front": lambda w, W: w / (Z + 2),
    "parts": lambda w, W: Z[:, :2] * torch.view_as_complex(w.reshape(2, 2)),
    "made": lambda w, W: Z * torch.complex(w, w.sin()),
    "cast": lambda w, W: Z @ W.to(torch.complex128),
    "matrix": lambda w, W: Z @ torch.polar(W, W + 1),
    "batched": lambda w, W: Z.unsqueeze(1) @ torch.complex(W, W).expand(3, 4, 2),
    "fourier": lambda w, W: torch.fft.ifft(torch.fft.fft(X) * w),
    "both": lambda w, W: (Z * w) @ W.to(torch.complex128),
    "every row": lambda w, W: Z + torch.complex(W.sum(1), w).expand(3, 4),
}


@pytest.mark.parametrize("name", USES)
@pytest.mark.filterwarnings("ignore::pergrad.FallbackWarning")
def test_real_parameters_used_with_complex_numbers(name: str) -> None:
    w = X[0].clone().requires_grad_()
    W = X[:, :2].repeat(2, 1)[:4].clone().requires_grad_()
    params = {"w": w, "W": W}

    def forward() -> torch.Tensor:
        return (USES[name](w, W) + 0.1).abs().reshape(3, -1).sum(1)

    losses = forward()
    rows = []
    for loss in losses:
        grads = torch.autograd.grad(loss, [w, W], retain_graph=True, allow_unused=True)
        rows.append(torch.cat([torch.zeros_like(p).flatten() if g is None else g.flatten()
                               for p, g in zip((w, W), grads, strict=True)]))  # fmt: skip
    J = torch.stack(rows)
    torch.testing.assert_close(pergrad.norms(forward(), params), J.norm(dim=1))
    torch.testing.assert_close(pergrad.gram(forward(), params), J @ J.T)
    torch.testing.assert_close(pergrad.gradients(forward(), params).flat(), J)
    pergrad.backward(forward(), params, weights=X[:, 0])
    grads = torch.cat([torch.zeros(p.numel()) if p.grad is None else p.grad.flatten()
                       for p in (w, W)])  # fmt: skip
    torch.testing.assert_close(grads.double(), J.T @ X[:, 0])


def test_complex_parameter_is_refused() -> None:
    w = Z[0].clone().requires_grad_()
    with pytest.raises(pergrad.UnsupportedError, match="view_as_complex"):
        pergrad.norms((Z * w).abs().sum(1), {"w": w})
