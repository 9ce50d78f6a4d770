"""Our Muon against torch's, which takes the matrices one by one."""

from __future__ import annotations

import pytest
import torch

from emuworld.training.muon import Muon, orthogonalised

SHAPES = [(32, 16), (32, 16), (16, 48), (16, 48), (24, 24)]


def _parameters(generator: torch.Generator) -> list[torch.nn.Parameter]:
    return [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]


def test_steps_equal_torchs() -> None:
    ours, theirs = (_parameters(torch.Generator().manual_seed(0)) for _ in range(2))
    start = [p.detach().clone() for p in ours]
    muon = Muon(ours, lr=3e-3, weight_decay=0.1)
    torchs = torch.optim.Muon(
        theirs, lr=3e-3, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw"
    )
    generator = torch.Generator().manual_seed(1)
    for _ in range(5):
        for one, other in zip(ours, theirs, strict=True):
            one.grad = torch.randn(one.shape, generator=generator)
            other.grad = one.grad.clone()
        muon.step()
        torchs.step()
    for one, other, before in zip(ours, theirs, start, strict=True):
        moved = (other - before).norm()
        assert moved > 0.01
        assert (one - other).norm() < 0.01 * moved  # bf16 iterations, rounded in another order


def test_directions_have_singular_values_about_one() -> None:
    matrices = torch.randn(3, 20, 50, generator=torch.Generator().manual_seed(2))
    values = torch.linalg.svdvals(orthogonalised(matrices).float())
    assert values.min() > 0.5
    assert values.max() < 1.3


def test_vectors_are_refused() -> None:
    with pytest.raises(ValueError, match="AdamW"):
        Muon([torch.nn.Parameter(torch.zeros(3))])


def test_state_goes_through_a_dict() -> None:
    parameters = _parameters(torch.Generator().manual_seed(0))
    muon = Muon(parameters)
    for p in parameters:
        p.grad = torch.ones_like(p)
    muon.step()
    other = Muon(parameters)
    other.load_state_dict(muon.state_dict())
    for p in parameters:
        assert torch.equal(other.state[p]["momentum_buffer"], muon.state[p]["momentum_buffer"])
