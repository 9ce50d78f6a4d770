"""A product of the CPU form, int8 weights laid out as its machine code reads them, and how that is called.

Shapes: M tokens, K inputs, N outputs, F fields of a layer, X whatever is needed most.
"""

from collections.abc import Sequence
from functools import cache as memoise
from types import ModuleType

import numpy as np
import torch

from emuworld.model import int8
from emuworld.model.huge_pages import HugePages
from emuworld.model.threads import crew_of

_QUANTISED_AT_ONCE = 16 << 20  # elements: 64 MiB of fp32
WORTH_A_HELPER = 1 << 20  # products of a layer or a matrix, some 50 us


class ExactLinear:
    """x @ W.T for int8 weights with one scale for each output; several weights are laid side by side.

    Weights lie in the order in which the kernel reads them: blocks of outputs (as many as a vector has
    lanes), in a block pairs of inputs, of a pair the outputs. The last block is filled up with zeros, and so
    are the inputs, to a multiple of twice the lanes.
    """

    def __init__(self, *weights_NK: torch.Tensor, pages: HugePages | None = None) -> None:
        self._lanes: int = kernel().LANES
        num_inputs, width = weights_NK[0].shape[1], 2 * self._lanes
        self._num_rows = sum(map(len, weights_NK))
        self.num_outputs = _round_up(self._num_rows, self._lanes)
        self.num_inputs = _round_up(num_inputs, width)
        self.scale_N = torch.zeros(self.num_outputs)
        weight_NK = torch.zeros(self.num_outputs, self.num_inputs, dtype=torch.int8)
        start = 0
        for rows_NK in (rows for weight in weights_NK for rows in weight.split(_rows_at_once(num_inputs))):
            stop = start + len(rows_NK)
            weight_NK[start:stop, :num_inputs], scale_N1 = int8.quantised(rows_NK)
            self.scale_N[start:stop] = scale_N1[:, 0]
            start = stop
        blocks = weight_NK.view(-1, self._lanes, self.num_inputs // 2, 2)
        memory = (HugePages() if pages is None else pages).take(weight_NK.numel())
        self.weights = memory.view(blocks.transpose(1, 2).shape).copy_(blocks.transpose(1, 2))

    @property
    def tensors(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.weights, self.scale_N

    def __call__(self, x_MK: torch.Tensor) -> torch.Tensor:
        """[M, K] fp32 -> [M, N] fp32."""
        return self.part(x_MK, start=0, stop=None)

    def part(self, x_MK: torch.Tensor, *, start: int, stop: int | None) -> torch.Tensor:
        """The outputs start to stop only."""
        start, stop, _ = slice(start, stop).indices(self._num_rows)
        fields = np.zeros((2, kernel().FIELDS), np.int64)
        *fields[0, 4:6], width, offset = self.span(start, stop)
        x_MK, num_tokens = x_MK.contiguous(), len(x_MK)
        layers_LF = torch.from_numpy(fields)
        out_MN, unit_M = torch.empty(num_tokens, width), torch.empty(num_tokens)
        integers_MX = torch.zeros(num_tokens, self.num_inputs, dtype=torch.int16)
        do_parts(
            (x_MK, out_MN, x_MK, integers_MX, unit_M, *[layers_LF] * 5),
            num_layers=1,
            parts=kernel().PRODUCT,
            sizes=(width, 1, 1, x_MK.shape[1], 0, 0, 0, 0),
            most_threads=1 + num_tokens * width * self.num_inputs // WORTH_A_HELPER,
        )
        return out_MN[:, offset : offset + stop - start].contiguous()

    def span(self, start: int, stop: int) -> tuple[int, int, int, int]:
        """Of the blocks that hold these outputs: the addresses of weights and scales, how many outputs, and
        which of them is the first."""
        first, last = start // self._lanes, -(-stop // self._lanes)
        weights = address_of(self.weights) + first * self._lanes * self.num_inputs
        scale = address_of(self.scale_N) + 4 * first * self._lanes
        return weights, scale, (last - first) * self._lanes, start - first * self._lanes


def do_parts(
    arrays: Sequence[torch.Tensor],
    *,
    num_layers: int,
    parts: tuple[int, int],
    sizes: Sequence[int],
    eps: Sequence[int] = (0, 0),
    most_threads: int,
    num_steps: int = 1,
    choice: tuple[int, int, int] = (0, 0, 0),
) -> None:
    """What `exact_kernel.run` does; `arrays` in the order of its JOB, which holds their addresses."""
    _, y_MX, wide_MX, integers_MX, unit_M, _, rotary_2Pd, _, ids_WN, embedding_VD = arrays
    widths = [array.shape[1] for array in (y_MX, wide_MX, integers_MX, rotary_2Pd, ids_WN)]
    is_half = embedding_VD.dtype == torch.bfloat16
    addresses = [array.data_ptr() for array in arrays]
    num_threads = min(torch.get_num_threads(), most_threads)
    head = (0, num_threads, len(unit_M), *addresses, *widths, int(is_half), num_layers)
    crew_of(kernel().run).do(np.array((*head, *parts, *sizes, *eps, num_steps, *choice)))


@memoise
def kernel() -> ModuleType:
    """Imported when it is first needed: it takes a second, and some more where nothing is compiled yet."""
    from emuworld.model import exact_kernel

    return exact_kernel


def address_of(tensor: torch.Tensor) -> int:
    assert tensor.is_contiguous() and tensor.device.type == "cpu"
    assert tensor.dtype in (torch.float32, torch.int8)
    return tensor.data_ptr()


def _round_up(size: int, unit: int) -> int:
    return -(-size // unit) * unit


def _rows_at_once(num_inputs: int) -> int:
    return max(1, _QUANTISED_AT_ONCE // num_inputs)
