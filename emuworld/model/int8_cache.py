"""Keys and values in 8 bits: of each token and head d numbers from -127 to 127, and one scale in fp32.

Scales lie behind the numbers of their head, in the same memory: a cache's tensor [R, K, C, d] of int8 is a
view of what lies there, and `scales` finds the other. So rows are copied, cut and grown as in 16 bits.

The numbers of values have their top bit turned, as if they began at 0: so the kernel makes halves of them in
one instruction fewer (`int8_attention`). Memory that nothing was written to is zeros: its scales are 0.

Shapes: R rows, G key-value heads, K = 2 G (keys, values), C capacity, T tokens, d head_dim.
"""

import torch

FORMAT = torch.int8
SCALE_BYTES = 4
_LARGEST = 127.0
_LEAST = 1e-30  # divides nothing but zeros


def zeros(shape: tuple[int, ...], *, device: torch.device) -> torch.Tensor:
    """A cache's tensor [R, K, C, d] of one layer."""
    *heads, capacity, head_dim = shape
    memory = torch.zeros((*heads, capacity * (head_dim + SCALE_BYTES)), device=device, dtype=FORMAT)
    return memory[..., : capacity * head_dim].unflatten(-1, (capacity, head_dim))


def scales(kv_RKCd: torch.Tensor) -> torch.Tensor:
    """[R, K, C, 1] fp32, a view of the scales of a cache's whole tensor."""
    num_rows, num_heads, capacity, head_dim = kv_RKCd.shape
    shape = (num_rows, num_heads, kv_RKCd.stride(1))
    memory = kv_RKCd.as_strided(shape, (*kv_RKCd.stride()[:2], 1))
    return memory[..., capacity * head_dim :].view(torch.float32)[..., None]


def parts(kv_RKCd: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """What a cache's whole tensor of any type consists of, each with a place for every row, head and token:
    itself; in 8 bits also its scales.
    """
    return (kv_RKCd, scales(kv_RKCd)) if kv_RKCd.dtype == FORMAT else (kv_RKCd,)


def narrowed(kv: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """Keys and values [R, K, ..., d] as the parts that a cache of this type has: [R, K, ..., d], and scales
    [R, K, ..., 1].
    """
    if dtype != FORMAT:
        return (kv.to(dtype),)
    kv = kv.float()
    largest = kv.abs().amax(dim=-1, keepdim=True) / _LARGEST
    return _turned((kv / largest.clamp_min(_LEAST)).round().to(FORMAT)), largest


def widened(kv: torch.Tensor, *scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The keys and values that such parts stand for: a copy of this type, unless they are one part."""
    return (_turned(kv) * scales[0]).to(dtype) if scales else kv


def _turned(numbers: torch.Tensor) -> torch.Tensor:
    """With the top bit of values turned."""
    keys, values = numbers.chunk(2, dim=1)
    return torch.cat((keys, values ^ -128), dim=1)
