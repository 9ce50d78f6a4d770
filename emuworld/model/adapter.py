"""A low-rank adapter of the transformer's matrices, which is active on some tokens only (LoRA, arXiv
2106.09685).

With it a model learns to draw pictures at once (`emuworld.training.distil`) while its weights, and all that
it computes for other tokens, stay as they are. For decoding it is merged into a second set of weights.

Shapes: B batch, T tokens, I inputs and O outputs of a matrix, r rank.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from emuworld.files import written
from emuworld.model.int8 import quantised
from emuworld.model.transformer import Transformer

FILE_NAME = "dida.safetensors"
_DOWN, _UP, _SCALE = ".down", ".up", ".scale"
_BASE = "base"  # in the header


class Adapter(nn.Module):
    """For every matrix W inside the layers: W x + up(down(x)) on the tokens where it is active.

    It begins as nothing: `up` is zero. Which tokens those are is said by `active`, around each forward of the
    model that it was attached to.
    """

    def __init__(self, model: Transformer, *, rank: int, generator: torch.Generator | None = None) -> None:
        super().__init__()
        if rank < 1:
            raise ValueError(f"the rank of an adapter must be at least 1, got {rank}")
        self.down_rI, self.up_Or = nn.ParameterDict(), nn.ParameterDict()
        self._active_BT1: Tensor | None = None
        for name, linear in _matrices(model):
            key = _key(name)
            down_rI = torch.empty(rank, linear.in_features)
            down_rI.normal_(0.0, linear.in_features**-0.5, generator=generator)
            self.down_rI[key] = nn.Parameter(down_rI)
            self.up_Or[key] = nn.Parameter(torch.zeros(linear.out_features, rank))

    @torch.no_grad()
    def start_from(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over what `load_adapter` gives, what is left of the rank adding nothing yet; ValueError where
        it has a higher one.

        In 8 bits a direction's scale stands with one of its vectors, a million times as large as the other:
        steps of training would wipe that out. So both become equally long.
        """
        for key, down_rI in self.down_rI.items():
            taken_rI, taken_Or = tensors[_name(key) + _DOWN], tensors[_name(key) + _UP]
            if (rank := len(taken_rI)) > len(down_rI):
                raise ValueError(f"the adapter to go on from has rank {rank}, above rank={len(down_rI)}")
            down_r, up_r = taken_rI.float().norm(dim=1), taken_Or.float().norm(dim=0)
            ratio_r = torch.where((down_r > 0) & (up_r > 0), (up_r / down_r).sqrt(), 1.0)
            down_rI[:rank].copy_(taken_rI * ratio_r[:, None])
            self.up_Or[key][:, :rank].copy_(taken_Or / ratio_r)

    def attach(self, model: Transformer) -> None:
        """From now on the model's matrices add this; its own weights get no gradient."""
        model.requires_grad_(False)
        for name, linear in _matrices(model):
            key = _key(name)
            linear.register_forward_hook(_Hook(self, self.down_rI[key], self.up_Or[key]))

    @contextmanager
    def active(self, tokens_BT: Tensor) -> Iterator[None]:
        """Active on the tokens that are True, as long as the context is open; elsewhere nothing is added."""
        self._active_BT1 = tokens_BT[..., None]
        try:
            yield
        finally:
            self._active_BT1 = None

    @property
    def active_BT1(self) -> Tensor | None:
        """Where it is active now; None: nowhere."""
        return self._active_BT1

    def named(self) -> dict[str, Tensor]:
        """Its tensors under the names of the matrices."""
        tensors: dict[str, Tensor] = {}
        for key, down_rI in self.down_rI.items():
            tensors[_name(key) + _DOWN] = down_rI.detach()
            tensors[_name(key) + _UP] = self.up_Or[key].detach()
        return tensors


class _Hook:
    """Adds the adapter's part behind a matrix.

    It holds the two matrices themselves: by a name, which differs from layer to layer, a compiled layer would
    be compiled again for each.
    """

    def __init__(self, adapter: Adapter, down_rI: nn.Parameter, up_Or: nn.Parameter) -> None:
        self._adapter, self._down_rI, self._up_Or = adapter, down_rI, up_Or

    def __call__(self, _module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor:
        active_BT1, (x_BTI,) = self._adapter.active_BT1, inputs
        if active_BT1 is None:
            return output
        low_BTr = nn.functional.linear(x_BTI, self._down_rI.to(x_BTI.dtype))
        return output + nn.functional.linear(low_BTr * active_BT1, self._up_Or.to(x_BTI.dtype))


def save_adapter(folder: str | os.PathLike[str], adapter: Adapter, *, base: str = "") -> None:
    """Write `dida.safetensors` beside and rename it. `base`: names the weights it belongs to.

    In 8 bits: of each of a matrix's r directions the two vectors as int8, and an fp32 scale for both, as
    `MATRIX.scale` [r].
    """
    write_adapter(folder, adapter.named(), base=base)


def write_adapter(folder: str | os.PathLike[str], tensors: Mapping[str, Tensor], *, base: str) -> None:
    """`save_adapter` of tensors as `load_adapter` gives them."""
    stored: dict[str, Tensor] = {}
    for name in sorted(name.removesuffix(_UP) for name in tensors if name.endswith(_UP)):
        stored[name + _DOWN], down_r1 = quantised(tensors[name + _DOWN].cpu())
        up_rO, up_r1 = quantised(tensors[name + _UP].cpu().t())
        stored[name + _UP], stored[name + _SCALE] = up_rO.t().contiguous(), (down_r1 * up_r1)[:, 0]
    with written(Path(folder) / FILE_NAME) as beside:
        save_file(stored, beside, metadata={_BASE: base} if base else None)


def adapter_base(folder: str | os.PathLike[str]) -> str:
    """What `save_adapter` was told of the weights that the adapter belongs to; "" where nothing."""
    try:
        with safe_open(Path(folder) / FILE_NAME, "pt") as file:
            return str((file.metadata() or {}).get(_BASE, ""))
    except (SafetensorError, OSError):
        return ""  # `load_adapter` says what is wrong


def load_adapter(folder: str | os.PathLike[str], model: Transformer) -> dict[str, Tensor]:
    """The tensors in `dida.safetensors`, as `merge_adapter` takes them: in 8 bits, or in floats without
    scales as it was written before. ValueError where they are damaged or do not fit the model."""
    path = Path(folder) / FILE_NAME
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{path}: damaged or cut short ({error}); expected an adapter, copy it again"
        ) from error
    matrices = dict(_matrices(model))
    ends = (_DOWN, _UP, _SCALE) if any(name.endswith(_SCALE) for name in tensors) else (_DOWN, _UP)
    wrong = {name + end for name in matrices for end in ends} ^ tensors.keys()
    for name, linear in matrices.items():
        if wrong:
            break
        up, down = tensors[name + _UP], tensors[name + _DOWN]
        shapes = (*up.shape, *down.shape[::-1])
        if len(shapes) != 4 or shapes[1] != shapes[3] or (shapes[0], shapes[2]) != linear.weight.shape:
            wrong = {name}
        elif (scale := tensors.pop(name + _SCALE, None)) is not None:
            if scale.shape == down.shape[:1]:
                tensors[name + _UP], tensors[name + _DOWN] = up * scale, down.float()
            else:
                wrong = {name}
    if wrong:
        raise ValueError(
            f"{path}: {len(wrong)} tensors, as {min(wrong)}, are missing, unexpected or mis-shaped; the "
            "adapter belongs to another model"
        )
    return tensors


@torch.no_grad()
def merge_adapter(model: Transformer, tensors: Mapping[str, Tensor]) -> None:
    """Make the model what the adapted one computes where the adapter is active."""
    for name, linear in _matrices(model):
        added_OI = tensors[name + _UP].float() @ tensors[name + _DOWN].float()
        merged_OI = linear.weight.float() + added_OI.to(linear.weight.device)
        linear.weight = nn.Parameter(merged_OI.to(linear.weight.dtype), requires_grad=False)


def _matrices(model: Transformer) -> Iterator[tuple[str, nn.Linear]]:
    """Every matrix inside the layers, with its name."""
    for name, module in model.model.layers.named_modules():
        if isinstance(module, nn.Linear):
            yield name, module


def _key(name: str) -> str:
    return name.replace(".", "-")  # parameter names may not have dots


def _name(key: str) -> str:
    return key.replace("-", ".")
