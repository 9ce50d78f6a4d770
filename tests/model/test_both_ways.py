"""Tokens that see each other both ways behind a cache: all forms of the model, row by row and all at once."""

from __future__ import annotations

import pytest
import torch

from emuworld.model.attention import _all_rows, _row_by_row
from emuworld.model.cache import StaticCache
from emuworld.model.exact import exact
from emuworld.model.fused import fused
from emuworld.model.transformer import Transformer, sized

PREFIX = torch.tensor([[3, 1, 4, 1, 5, 9, 2], [2, 7, 1, 8, 2, 8, 1]])
BLOCK = torch.tensor([[6, 5, 3, 5, 8], [1, 4, 1, 4, 2]])


@pytest.fixture(scope="module")
def model() -> Transformer:
    transformer = Transformer(sized("tiny", vocab_size=32, initializer_range=0.2)).eval()
    transformer.init_weights(torch.Generator().manual_seed(0))
    return transformer


def behind(form: Transformer, block: torch.Tensor, *, causal: bool) -> torch.Tensor:
    cache = StaticCache(form.config, num_rows=2, capacity=64, dtype=form.dtype)
    form(PREFIX, cache=cache)
    hidden = form(block, cache=cache, advance_B=[False] * 2, causal=causal).clone()
    assert cache.lengths.tolist() == [7, 7]
    return hidden


@torch.inference_mode()
def test_every_token_of_a_block_sees_every_other_and_only_its_row(model: Transformer) -> None:
    plain = behind(model, BLOCK, causal=False)
    for place in range(BLOCK.shape[1]):
        changed = BLOCK.clone()
        changed[0, place] = 30
        other = behind(model, changed, causal=False)
        assert not torch.isclose(other[0], plain[0]).all(dim=-1).any(), "all tokens of the row hear of it"
        assert torch.equal(other[1], plain[1])
    causal = behind(model, BLOCK, causal=True)
    assert not torch.allclose(causal[:, 0], plain[:, 0])


@torch.inference_mode()
def test_the_forms_agree(model: Transformer) -> None:
    expected = behind(model, BLOCK, causal=False)
    copy = Transformer(model.config).eval()
    copy.load_state_dict(model.state_dict())
    torch.testing.assert_close(
        behind(fused(copy), BLOCK, causal=False),  # type: ignore[arg-type]
        expected,
        rtol=1e-4,
        atol=1e-4,
    )
    quantised = behind(exact(model), BLOCK, causal=False)  # type: ignore[arg-type]
    assert (quantised - expected).norm() < 0.05 * expected.norm(), "int8 weights"


@pytest.mark.parametrize("lengths", [(7, 7), (7, 3), (0, 0)])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("dtype", "within"), [(torch.float32, 1e-5), (torch.bfloat16, 0.02)])
def test_all_rows_at_once_equal_row_by_row(
    model: Transformer, lengths: tuple[int, int], causal: bool, dtype: torch.dtype, within: float
) -> None:
    """The way of a GPU, on the CPU; in 16 bits heads stay where they lie if all keys are seen."""
    generator = torch.Generator().manual_seed(1)
    cache = StaticCache(model.config, num_rows=2, capacity=64, dtype=dtype)
    for kv_RKCd in cache.memory.kv_RKCd:
        kv_RKCd.normal_(generator=generator)
    for row, length in enumerate(lengths):
        one = cache.rows([row])
        one.finish(one.begin(length))
    step = cache.begin(5, causal=causal)
    q_RTHd = torch.randn(2, 5, model.config.num_heads, model.config.head_dim, generator=generator).to(dtype)
    found, expected = (
        way(q_RTHd.transpose(1, 2), cache, layer=0, step=step) for way in (_all_rows, _row_by_row)
    )
    torch.testing.assert_close(found, expected, rtol=within, atol=within)
