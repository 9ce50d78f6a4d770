"""Weights in 8-bit floating point (e4m3: 3 bits of mantissa, up to 448): half the bytes that a step reads.

Every output channel has a scale of its own. Where few rows meet a weight, reading it is all that costs, and
the activations stay as they are; where many do (prefill, refinement of whole pictures), they are brought to
8 bits too, with a scale for every row, and the product runs at twice the speed of 16 bits. Embedding and
norms stay in 16 bits.

On the CPU it is computed by definition, from the same rounded numbers: for tests and for the accuracy report
(`emuworld bench what=fp8-accuracy`), not for speed.

Shapes: M rows, K inputs, N outputs.
"""

import importlib.util
from collections.abc import Callable

import torch
from torch.nn import functional as F

from emuworld.model.fp8_numbers import FORMAT, LARGEST, TINY, Fp8Weight, Rounded, Weight

if torch.cuda.is_available() and importlib.util.find_spec("triton") is not None:
    from emuworld.model import fp8_kernels
else:
    fp8_kernels = None  # type: ignore[assignment]

MOST_WIDE_ROWS = 64
"""Up to so many rows activations keep their 16 bits."""
_ALIGNED = 16  # of both sides of a weight, for `torch._scaled_mm` and for the kernel's loads


def supports(device: torch.device) -> bool:
    """Whether this GPU computes with 8-bit floating point: from compute capability 8.9 on (Ada, Hopper)."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)


def quantise(weight_NK: torch.Tensor) -> Fp8Weight:
    """The nearest numbers, each row scaled so that its largest is the largest of the format.

    ValueError for sides that are no multiples of 16.
    """
    if any(side % _ALIGNED for side in weight_NK.shape):
        raise ValueError(
            f"fp8 needs weights whose sides are multiples of {_ALIGNED}, got {tuple(weight_NK.shape)}; "
            "open this model with weights='bf16'"
        )
    values_NK, scales_N1 = _rounded(weight_NK)
    return Fp8Weight(values_NK, scales_N1[:, 0])


def quantise_head(head_VD: torch.Tensor) -> Fp8Weight:
    """The same of a matrix with any number of ids, of which any range is multiplied (`scores`): rows of zeros
    behind them make the last range a multiple of 16 too.
    """
    return quantise(F.pad(head_VD, (0, 0, 0, -len(head_VD) % _ALIGNED + _ALIGNED)))


def scores(
    hidden: torch.Tensor,
    head: Fp8Weight,
    *,
    start: int,
    stop: int,
    product: Callable[[torch.Tensor, Fp8Weight], torch.Tensor],
) -> torch.Tensor:
    """[..., D] -> [..., stop - start] by a product of so many outputs as it can take."""
    filled = start + -(-(stop - start) // _ALIGNED) * _ALIGNED
    scores_MN = product(hidden.reshape(-1, hidden.shape[-1]), head.outputs(start, filled))
    return scores_MN[:, : stop - start].reshape(*hidden.shape[:-1], stop - start)


def linear(x_MK: torch.Tensor, weight: Weight) -> torch.Tensor:
    """x @ weight.T in the type of x, [M, N]."""
    if isinstance(weight, torch.Tensor):
        return F.linear(x_MK, weight)
    if not x_MK.is_cuda:
        return by_definition(x_MK, weight)
    if len(x_MK) <= MOST_WIDE_ROWS and fp8_kernels is not None:
        return fp8_kernels.linear(x_MK, weight.values_NK, weight.scales_N)
    rounded = fp8_kernels.round_rows(x_MK) if fp8_kernels is not None else _rounded(x_MK)
    return linear_of_rounded(rounded, weight, dtype=x_MK.dtype)


def linear_of_rounded(x: Rounded, weight: Fp8Weight, *, dtype: torch.dtype) -> torch.Tensor:
    """x @ weight.T on CUDA by the library, [M, N]."""
    # Scales of rows and columns are taken along by the product itself. Its sums keep some 14 bits ("fast"),
    # an eighth of the rounding of what is summed at most, and take two thirds of the time.
    return torch._scaled_mm(
        x.values_MK,
        weight.values_NK.t(),
        scale_a=x.scales_M1,
        scale_b=_aligned(weight.scales_N)[None],
        out_dtype=dtype,
        use_fast_accum=True,
    )


def _aligned(scales_N: torch.Tensor) -> torch.Tensor:
    """Where the library may read four at once: a head's ids may begin anywhere."""
    return scales_N.clone() if scales_N.data_ptr() % 16 else scales_N


def by_definition(x_MK: torch.Tensor, weight: Fp8Weight) -> torch.Tensor:
    """`linear` in fp32, rounded where it rounds."""
    x32_MK = x_MK.float()
    if len(x_MK) > MOST_WIDE_ROWS:
        values_MK, scales_M1 = _rounded(x_MK)
        x32_MK = values_MK.float() * scales_M1
    return F.linear(x32_MK, weight.dequantised()).to(x_MK.dtype)


def _rounded(x_MK: torch.Tensor) -> Rounded:
    x32_MK = x_MK.float()
    scales_M1 = x32_MK.abs().amax(dim=-1, keepdim=True).clamp_min(TINY) / LARGEST
    # The quotient may round to a hair above the largest, which has no 8-bit number.
    return Rounded((x32_MK / scales_M1).clamp(-LARGEST, LARGEST).to(FORMAT), scales_M1)
