"""Layers in strips equal layers held whole, and keep an encode of 1024 px at full size below 2 GB."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from emuworld.tokens import strips
from emuworld.tokens.vision import PUBLISHED, VisionConfig, VisionTokenizer, to_pixels

CONFIG = VisionConfig(
    patch_px=1,
    width=32,
    width_multipliers=(1, 1, 2, 2, 4),
    num_res_blocks=2,
    z_channels=16,
    embed_dim=8,
    norm_groups=32,
)


@pytest.fixture(scope="module")
def tokenizer() -> VisionTokenizer:
    generator = torch.Generator().manual_seed(0)
    model = VisionTokenizer(CONFIG).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.05)
    return model


@torch.no_grad()
@pytest.mark.parametrize("strip_bytes", [40_000, 150_000])
@pytest.mark.parametrize("height, width", [(112, 80), (64, 48), (16, 32)])
def test_strips_change_the_last_bits_only(
    tokenizer: VisionTokenizer, height: int, width: int, strip_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (2, height, width, 3), dtype=torch.uint8, generator=generator)
    codes = torch.randint(0, 4096, (2, height // 16, width // 16), generator=generator)
    z, pixels = tokenizer.latents(to_pixels(images)), tokenizer.pixels(tokenizer.vectors(codes))
    monkeypatch.setattr(strips, "LIMIT_BYTES", 0)
    monkeypatch.setattr(strips, "STRIP_BYTES", strip_bytes)
    in_strips = tokenizer.latents(to_pixels(images)), tokenizer.pixels(tokenizer.vectors(codes))
    for plain, stripped in zip((z, pixels), in_strips, strict=True):
        assert not torch.equal(plain, stripped), "the strips should have been used"
        torch.testing.assert_close(stripped, plain, atol=3e-5 * float(plain.abs().max()), rtol=0)
    one_by_one = torch.cat([tokenizer.encode(image[None]) for image in images])
    assert torch.equal(tokenizer.encode(images), one_by_one)


def test_training_never_runs_in_strips(tokenizer: VisionTokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(strips, "LIMIT_BYTES", 0)
    x = torch.ones(1, 32, 16, 16, requires_grad=True)
    tokenizer.encoder.down[0](x).sum().backward()
    assert x.grad is not None and x.grad.any()


class LiveBytes(TorchDispatchMode):
    """The most bytes of tensors that lived at once, counted at every operation; works on the meta device."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._seen: set[int] = set()

    def __torch_dispatch__(
        self,
        func: Any,
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self._count(tensor.untyped_storage())
        return out

    def _count(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._seen:
            return
        self._seen.add(key)
        self.live += storage.nbytes()
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._drop, key, storage.nbytes())

    def _drop(self, key: int, num_bytes: int) -> None:
        self._seen.discard(key)
        self.live -= num_bytes


@torch.no_grad()
def test_an_encode_of_1024_px_at_full_size_stays_below_2_gb() -> None:
    """Counted over the operations on the meta device, where nothing is computed."""
    with torch.device("meta"):
        model = VisionTokenizer(PUBLISHED).eval()
        images = torch.empty(1, 1024, 1024, 3, dtype=torch.uint8)
    with LiveBytes() as counter:
        model.encode(images)
    assert 1 << 30 < counter.peak < 2_000_000_000
