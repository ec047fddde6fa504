"""Muon in float32: momentum whose matrix is replaced by its nearest (semi-)orthogonal one.

Jordan et al., 2024, https://kellerjordan.github.io/posts/muon/. torch.optim.Muon iterates in bfloat16, which is slow on
a CPU without bfloat16 units; this one iterates in float32.
"""

from collections.abc import Iterable

import torch

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
ITERATIONS = 5


def orthogonalize(matrix: torch.Tensor) -> torch.Tensor:
    """Bring all singular values of a matrix, (M, N), close to 1 by Newton-Schulz iterations."""
    a, b, c = COEFFICIENTS
    x = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix
    x = x / (x.norm() + 1e-7)
    for _ in range(ITERATIONS):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if matrix.shape[0] > matrix.shape[1] else x


class Muon(torch.optim.Optimizer):
    """Muon over 2-D parameters.

    Args:
        params: Matrices only; give embeddings, norms and biases to another optimizer.
        lr: Size of a step: the spectral norm of a square matrix's change.
        momentum: Nesterov momentum. weight_decay: Decoupled, times `lr`.

    Raises:
        ValueError: If a parameter is not a matrix.
    """

    def __init__(
        self, params: Iterable[torch.Tensor], lr: float = 0.01, momentum: float = 0.95, weight_decay: float = 0.0
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        shapes = {tuple(p.shape) for group in self.param_groups for p in group["params"] if p.ndim != 2}
        if shapes:
            raise ValueError(f"Muon takes 2-D parameters, got shapes {sorted(shapes)}")

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """One step from the gradients in place; `closure` is not supported."""
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["momentum"] = torch.zeros_like(p)
                state["momentum"].lerp_(p.grad, 1 - group["momentum"])
                change = orthogonalize(p.grad.lerp(state["momentum"], group["momentum"]))
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(change, alpha=-group["lr"] * max(1.0, p.shape[0] / p.shape[1]) ** 0.5)
