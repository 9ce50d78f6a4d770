"""Muon, with the matrices of one shape orthogonalised together; a convolution's kernel is a matrix of one row
for each channel that it gives.

`torch.optim.Muon` takes the matrices one by one: for 56 small ones that is some 2,500 kernel launches, 43 of
74 ms of a training step on an H200 (docs/log.md). The same arithmetic on stacks of equal shapes is a few
dozen launches. Equal to torch's to rounding, which a test holds. Matrices that are cut among processes are
gathered for it.

Source: Jordan et al., Muon (2024): momentum, five Newton-Schulz iterations in bf16, step; the step's size as
in Moonlight (arXiv 2502.16982), 0.2 * sqrt(longer side), so that learning rates of AdamW carry over.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_ITERATIONS = 5
_EPSILON = 1e-7


class Muon(torch.optim.Optimizer):
    """For matrices and kernels alone. Weight decay is decoupled; the momentum is Nesterov's."""

    def __init__(
        self,
        params: Iterable[Any],
        *,
        lr: float = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
    ) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})
        for group in self.param_groups:
            wrong = [list(p.shape) for p in group["params"] if p.ndim < 2]
            if wrong:
                raise ValueError(f"Muon takes matrices, got shapes {wrong[:3]}; give the others to AdamW")

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        assert closure is None, "the stages compute the gradients before the step"
        for group in self.param_groups:
            by_shape: dict[tuple[int, ...], list[Tensor]] = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    by_shape.setdefault(tuple(parameter.shape), []).append(parameter)
            for parameters in by_shape.values():
                self._update(parameters, group)

    def _update(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        gradients = [p.grad for p in parameters if p.grad is not None]
        for p in parameters:
            if "momentum_buffer" not in self.state[p]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)
        buffers = [self.state[p]["momentum_buffer"] for p in parameters]
        torch._foreach_lerp_(buffers, gradients, 1.0 - group["momentum"])
        moved = torch._foreach_lerp(gradients, buffers, group["momentum"])
        matrices = torch.stack([_whole(m).flatten(1) for m in moved])
        directions = orthogonalised(matrices).to(parameters[0].dtype)
        size = 0.2 * max(matrices.shape[1:]) ** 0.5
        torch._foreach_mul_(parameters, 1.0 - group["lr"] * group["weight_decay"])
        parts = [_part(d.view(p.shape), like=p) for d, p in zip(directions.unbind(), parameters, strict=True)]
        torch._foreach_add_(parameters, parts, alpha=-group["lr"] * size)


def _whole(matrix: Tensor) -> Tensor:
    """A matrix that is cut among processes, gathered: its singular values are those of the whole."""
    return matrix.full_tensor() if isinstance(matrix, DTensor) else matrix


def _part(matrix: Tensor, *, like: Tensor) -> Tensor:
    """What belongs to this process of a whole matrix that every process has computed."""
    if not isinstance(like, DTensor):
        return matrix
    return distribute_tensor(matrix, like.device_mesh, like.placements, src_data_rank=None)


def orthogonalised(matrices_NRC: Tensor) -> Tensor:
    """The nearest matrices with singular values about one (0.7 to 1.2), bf16 [N, R, C]."""
    x = matrices_NRC.bfloat16()
    tall = x.shape[1] > x.shape[2]
    if tall:
        x = x.mT
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp_min(_EPSILON)
    a, b, c = _COEFFICIENTS
    for _ in range(_ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x
