"""What 8-bit weights and the activations they meet are made of: for `fp8`, which says what is computed, and
for the kernels that it imports where there is CUDA.

Shapes: M rows, K inputs, N outputs, P = 2 M parts.
"""

from typing import NamedTuple

import torch

FORMAT = torch.float8_e4m3fn
LARGEST = 448.0
TINY = 1e-12  # keeps the scale of zeros finite


class Fp8Weight(NamedTuple):
    """A matrix that products are taken with: weight = values * scales."""

    values_NK: torch.Tensor
    """float8_e4m3fn."""
    scales_N: torch.Tensor
    """fp32."""

    @property
    def shape(self) -> torch.Size:
        return self.values_NK.shape

    @property
    def nbytes(self) -> int:
        return self.values_NK.nbytes + self.scales_N.nbytes

    def outputs(self, start: int, stop: int) -> "Fp8Weight":
        """Some of its rows."""
        return Fp8Weight(self.values_NK[start:stop], self.scales_N[start:stop])

    def dequantised(self) -> torch.Tensor:
        """fp32 [N, K]."""
        return self.values_NK.float() * self.scales_N[:, None]


class Rounded(NamedTuple):
    """Activations in 8 bits: values * scales."""

    values_MK: torch.Tensor
    """float8_e4m3fn."""
    scales_M1: torch.Tensor
    """fp32."""


class TwoParts(NamedTuple):
    """Activations as sums of two numbers of 8 bits: (high + low / 16) * scale, nothing lost of a bfloat16 but
    what is less than a millionth of its row's largest.
    """

    values_PK: torch.Tensor
    """float8_e4m3fn: of each row the high parts, then the low ones."""
    scales_M: torch.Tensor
    """fp32, powers of two."""


Weight = torch.Tensor | Fp8Weight
"""[N, K]."""
