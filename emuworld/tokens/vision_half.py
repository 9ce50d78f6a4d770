"""The decoder's CUDA form: codes to pictures in halves (fp16), channels last, in few passes over each layer.

Weights are copied, once. A convolution's bias is added by what reads its outputs (`vision_kernels`), and what
comes before the first one is a table of all codes. Halves end at 65,504, and weights are not known to keep
their layers below that, nor pixels where they were: `tried` decodes codes both ways and says.

Pixels of the built-in weights: 2.8 % of all values of real pictures move by one grey level, none by two. It
is not for encoding, where half precision changes one code in twelve. Runs on the CPU too, in plain PyTorch
(`vision_operations`), which is how it is tested.

Shapes: B pictures, h x w codes each, K codes, Z z_channels, C channels, H x W positions.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from emuworld.tokens import vision_operations
from emuworld.tokens.vision_network import AttnBlock, Decoder, Level, ResnetBlock, Upsample, vision_kernels
from emuworld.tokens.vision_operations import to_images

_MOST_RECORDED = 4  # shapes of codes; the memory that the largest takes stays taken
_ONE_BY_ONE = threading.Lock()  # what is recorded has one place for its codes and one for its pictures
_SIDE = 16  # codes of a side of a picture that is tried
_MOST_TRIED = 64  # pictures
_LARGEST, _SPARE = 65_504.0, 4.0  # halves end there; so many times less is taken
_MOST_APART, _MOST_MOVED = 2, 0.1  # grey levels of any value; share of values that differ at all


def tried(decoder: Decoder, vectors_KZ: Tensor) -> HalfDecoder | None:
    """The form in halves, or None where it would not do: pictures of all codes in any order, or of as many
    as that takes, come near where halves end, or show other pixels.
    """
    num_codes, device = len(vectors_KZ), vectors_KZ.device
    generator = torch.Generator().manual_seed(0)
    num_pictures = min(_MOST_TRIED, -(-num_codes // _SIDE**2))
    orders = [torch.randperm(num_codes, generator=generator) for _ in range(-(-(_SIDE**2) // num_codes))]
    codes_Bhw = torch.cat(orders).repeat(2)[: num_pictures * _SIDE**2].view(num_pictures, _SIDE, _SIDE)
    codes_Bhw = codes_Bhw.to(device)
    half = HalfDecoder(decoder, vectors_KZ)
    z_BZhw = F.embedding(codes_Bhw, vectors_KZ).permute(0, 3, 1, 2).contiguous()
    pixels, largest = _largest(decoder, z_BZhw)
    apart = (half.compute(codes_Bhw).int() - to_images(pixels).int()).abs()
    is_near = int(apart.max()) <= _MOST_APART and float((apart > 0).float().mean()) <= _MOST_MOVED
    return half if is_near and largest * _SPARE <= _LARGEST else None


def _largest(decoder: Decoder, z_BZhw: Tensor) -> tuple[Tensor, float]:
    """The decoder's pixels, and the largest magnitude that any part of it gives."""
    found: list[Tensor] = []

    def look(_part: nn.Module, _inputs: object, output: Tensor) -> None:
        found.append(output.abs().amax())

    hooks = [part.register_forward_hook(look) for part in decoder.modules()]
    try:
        pixels = decoder(z_BZhw)
    finally:
        for hook in hooks:
            hook.remove()
    return pixels, float(torch.stack(found).amax())


def _parts(decoder: Decoder) -> Iterator[nn.Module]:
    """What lies between its first convolution and its last norm, in order."""
    yield from (decoder.mid.block_1, decoder.mid.attn_1, decoder.mid.block_2)
    for level in reversed(decoder.up):
        assert isinstance(level, Level)
        for at, block in enumerate(level.block):
            yield block
            yield from level.attn[at : at + 1]
        if "upsample" in level._modules:
            yield level.get_submodule("upsample")


class HalfDecoder:
    """Codes to pictures.

    Args:
        decoder: its norms are taken as they are, its other weights are copied.
        vectors_KZ: what the decoder takes for each code, fp32.
        dtype: of weights and layers.
    """

    def __init__(self, decoder: Decoder, vectors_KZ: Tensor, *, dtype: torch.dtype = torch.float16) -> None:
        on_cuda = vectors_KZ.is_cuda and vision_kernels is not None
        ops: ModuleType = vision_kernels if on_cuda else vision_operations
        self._ops, self._patch_px = ops, decoder.patch_px
        self._table_KZ = vectors_KZ.to(dtype)
        self._conv_in, self._conv_out = (_Weight.of(c, dtype) for c in (decoder.conv_in, decoder.conv_out))
        self._norm_out = decoder.norm_out
        lacks: Tensor | None = self._conv_in.bias_C
        self._parts: list[Callable[[Tensor], Tensor]] = []
        for part in _parts(decoder):
            if isinstance(part, ResnetBlock):
                self._parts.append(_Block.of(part, lacks, ops=ops, dtype=dtype))
                lacks = None
            elif isinstance(part, AttnBlock):
                self._parts.append(_Attention.of(part, ops=ops, dtype=dtype))
            else:
                assert isinstance(part, Upsample)
                conv = _Weight.of(part.conv, dtype)
                self._parts.append(_Upsampling(conv, ops))
                lacks = conv.bias_C
        self._seen: set[torch.Size] = set()
        self._recorded: dict[torch.Size, _Recording] = {}

    @torch.no_grad()
    def images(self, codes_Bhw: Tensor) -> Tensor:
        """int64 [B, h, w] -> uint8 [B, 16 h, 16 w, 3]. On CUDA some shapes that come again are recorded as
        graphs: otherwise launching takes the host longer than the GPU works."""
        shape, recorded = codes_Bhw.shape, self._recorded
        again = shape in self._seen  # the first time warms up what a recording needs
        if not codes_Bhw.is_cuda or not again or (shape not in recorded and len(recorded) == _MOST_RECORDED):
            self._seen.add(shape)
            return self.compute(codes_Bhw)
        with _ONE_BY_ONE:
            if shape not in recorded:
                pool = next((other.pool for other in recorded.values()), None)
                recorded[shape] = _Recording(self.compute, codes_Bhw, pool=pool)
            return recorded[shape](codes_Bhw)

    def compute(self, codes_Bhw: Tensor) -> Tensor:
        """`images`, launch by launch."""
        x_BCHW = F.embedding(codes_Bhw, self._table_KZ).permute(0, 3, 1, 2)
        x_BCHW = self._conv_in(x_BCHW)
        for part in self._parts:
            x_BCHW = part(x_BCHW)
        x_BCHW = self._conv_out(self._ops.norm_swish(x_BCHW, self._norm_out))
        return self._ops.shown(x_BCHW, self._conv_out.bias_C, patch_px=self._patch_px)


class _Recording:
    """The launches for one shape of codes, as a CUDA graph. All use one `pool`, and so run one by one."""

    @torch.inference_mode()
    def __init__(self, compute: Callable[[Tensor], Tensor], codes_Bhw: Tensor, *, pool: Any) -> None:
        self._codes_Bhw = codes_Bhw.clone()
        beside, current = torch.cuda.Stream(codes_Bhw.device), torch.cuda.current_stream(codes_Bhw.device)
        beside.wait_stream(current)
        with torch.cuda.stream(beside):  # libraries keep something for each stream: made here, not recorded
            compute(self._codes_Bhw)
        current.wait_stream(beside)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, pool=pool, stream=beside, capture_error_mode="thread_local"):
            self._images_BHW3 = compute(self._codes_Bhw)
        self.pool = self._graph.pool()

    def __call__(self, codes_Bhw: Tensor) -> Tensor:
        """The caller's own pictures."""
        with torch.inference_mode(), torch.cuda.device_of(codes_Bhw):
            self._codes_Bhw.copy_(codes_Bhw)
            self._graph.replay()
        return self._images_BHW3.clone()


@dataclass(frozen=True)
class _Weight:
    """A convolution that leaves its bias to others."""

    weight: Tensor
    bias_C: Tensor  # fp32

    @classmethod
    def of(cls, conv: nn.Conv2d, dtype: torch.dtype) -> _Weight:
        assert conv.bias is not None
        weight = conv.weight.detach().to(dtype=dtype, memory_format=torch.channels_last)
        return cls(weight, conv.bias.detach().float())

    def __call__(self, x_BCHW: Tensor) -> Tensor:
        h_BCHW = F.conv2d(x_BCHW, self.weight, padding=self.weight.shape[2] // 2)
        return h_BCHW.contiguous(memory_format=torch.channels_last)


@dataclass(frozen=True)
class _Block:
    """`ResnetBlock`."""

    norms: tuple[nn.GroupNorm, nn.GroupNorm]
    convs: tuple[_Weight, _Weight]
    shortcut: _Weight | None
    lacks_C: Tensor | None  # what the inputs lack yet
    added_C: Tensor  # to both sums that the last addition is of
    ops: ModuleType

    @classmethod
    def of(cls, block: ResnetBlock, lacks_C: Tensor | None, *, ops: ModuleType, dtype: torch.dtype) -> _Block:
        convs = _Weight.of(block.conv1, dtype), _Weight.of(block.conv2, dtype)
        conv: nn.Conv2d | None = getattr(block, "nin_shortcut", None)
        shortcut = None if conv is None else _Weight.of(conv, dtype)
        added_C = convs[1].bias_C
        if conv is not None and shortcut is not None:
            added_C = added_C + shortcut.bias_C
            lacks_after = None if lacks_C is None else conv.weight.detach().float().flatten(1) @ lacks_C
        else:
            lacks_after = lacks_C
        if lacks_after is not None:
            added_C = added_C + lacks_after
        return cls((block.norm1, block.norm2), convs, shortcut, lacks_C, added_C, ops)

    def __call__(self, x_BCHW: Tensor) -> Tensor:
        first, second = self.convs
        h_BCHW = first(self.ops.norm_swish(x_BCHW, self.norms[0], bias_C=self.lacks_C))
        h_BCHW = second(self.ops.norm_swish(h_BCHW, self.norms[1], bias_C=first.bias_C))
        return self.ops.add(h_BCHW, self.shortcut(x_BCHW) if self.shortcut else x_BCHW, self.added_C)


@dataclass(frozen=True)
class _Attention:
    """`AttnBlock`, its first three projections as one product."""

    norm: nn.GroupNorm
    qkv_XC: Tensor
    bias_X: Tensor
    out_CC: Tensor
    added_C: Tensor  # fp32
    ops: ModuleType

    @classmethod
    def of(cls, block: AttnBlock, *, ops: ModuleType, dtype: torch.dtype) -> _Attention:
        convs = [_Weight.of(conv, dtype) for conv in (block.q, block.k, block.v)]
        out = _Weight.of(block.proj_out, dtype)
        qkv_XC = torch.cat([conv.weight.flatten(1) for conv in convs])
        bias_X = torch.cat([conv.bias_C for conv in convs]).to(dtype)
        return cls(block.norm, qkv_XC, bias_X, out.weight.flatten(1), out.bias_C, ops)

    def __call__(self, x_BCHW: Tensor) -> Tensor:
        B, C, H, W = x_BCHW.shape
        h_BnC = self.ops.norm_swish(x_BCHW, self.norm, swish=False).permute(0, 2, 3, 1).reshape(B, H * W, C)
        q, k, v = F.linear(h_BnC, self.qkv_XC, self.bias_X)[:, None].chunk(3, dim=-1)
        h_BnC = F.linear(F.scaled_dot_product_attention(q, k, v)[:, 0], self.out_CC)
        return self.ops.add(h_BnC.view(B, H, W, C).permute(0, 3, 1, 2), x_BCHW, self.added_C)


@dataclass(frozen=True)
class _Upsampling:
    """`Upsample`."""

    conv: _Weight
    ops: ModuleType

    def __call__(self, x_BCHW: Tensor) -> Tensor:
        return self.conv(self.ops.doubled(x_BCHW))
