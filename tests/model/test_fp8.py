"""8-bit weights: rounding by hand, products by definition, and what is left of a model's accuracy."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

import emuworld
from emuworld.checkpoint_folder import check_weights
from emuworld.model import fp8
from emuworld.model.cache import StaticCache
from emuworld.model.config import sized
from emuworld.model.fused import FusedTransformer
from emuworld.model.transformer import Transformer


def built(*, seed: int = 0) -> Transformer:
    model = Transformer(sized("tiny", vocab_size=300, max_position_embeddings=512)).eval()
    model.init_weights(torch.Generator().manual_seed(seed))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(3.0)
    return model


def random_ids(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(0, 300, shape, generator=torch.Generator().manual_seed(seed))


def test_rounding_by_hand() -> None:
    weight_NK = torch.zeros(16, 16)
    weight_NK[0, :5] = torch.tensor([448.0, 1.0, 17.0, -0.3, 2.0**-10])  # the scale is 1
    weight_NK[1, :3] = torch.tensor([-4.48, 0.01, 0.17])  # the scale is 0.01
    weight = fp8.quantise(weight_NK)
    assert weight.values_NK.dtype == torch.float8_e4m3fn
    assert weight.scales_N[:2].tolist() == pytest.approx([1.0, 0.01])
    # Three bits of mantissa: 17 lies between 16 and 18 (to even), 0.3 between 0.28125 and 0.3125; the
    # smallest number is 2 ** -9, and half of it goes to even.
    back_NK = weight.dequantised()
    assert back_NK[0, :5].tolist() == [448.0, 1.0, 16.0, -0.3125, 0.0]
    assert back_NK[1, :3].tolist() == pytest.approx([-4.48, 0.01, 0.16])
    assert not back_NK[2:].any() and back_NK.isfinite().all()


def test_every_weight_keeps_three_bits() -> None:
    weight_NK = torch.randn(64, 128, generator=torch.Generator().manual_seed(0)) * torch.logspace(
        -6, 6, 64
    ).unsqueeze(1)
    error_NK = (fp8.quantise(weight_NK).dequantised() - weight_NK).abs()
    step_N1 = weight_NK.abs().amax(dim=1, keepdim=True) / 448 * 2.0**-10  # below the normal numbers
    assert (error_NK <= weight_NK.abs() * 2.0**-4 * 1.001 + step_N1).all()


@pytest.mark.parametrize("num_rows", [1, fp8.MOST_WIDE_ROWS, fp8.MOST_WIDE_ROWS + 1])
def test_products_round_activations_only_where_rows_are_many(num_rows: int) -> None:
    generator = torch.Generator().manual_seed(3)
    x_MK = torch.randn(num_rows, 32, generator=generator)
    weight = fp8.quantise(torch.randn(48, 32, generator=generator))
    wide_MN = F.linear(x_MK, weight.dequantised())
    narrow_MN = F.linear(
        fp8.quantise(F.pad(x_MK, (0, 0, 0, -num_rows % 16))).dequantised(), weight.dequantised()
    )
    expected_MN = wide_MN if num_rows <= fp8.MOST_WIDE_ROWS else narrow_MN[:num_rows]
    torch.testing.assert_close(fp8.linear(x_MK, weight), expected_MN)
    assert not torch.allclose(wide_MN, narrow_MN[:num_rows])


@torch.no_grad()
@pytest.mark.parametrize("head", ["bf16", "fp8", None])
def test_a_model_in_8_bits_is_the_model_with_rounded_weights(head: str | None) -> None:
    """Token by token nothing else is rounded: the transformer with dequantised matrices is the truth."""
    model, rounded = built(), built()
    for layer in rounded.model.layers:
        for linear in (*_linears(layer.self_attn), *_linears(layer.mlp)):
            linear.weight.copy_(fp8.quantise(linear.weight).dequantised())
    head_VD = rounded.lm_head.weight
    if head != "bf16":
        head_VD = fp8.quantise_head(head_VD).dequantised()[:300]
    form = FusedTransformer(model, weights="fp8", head=head)
    assert form.layers[0].qkv_XD.shape == (8 * 16 + 2 * 2 * 16, 64)
    assert all(not linear.weight.numel() for linear in _linears(model.model.layers[0].mlp))
    ids_BT = random_ids(2, 30)
    cache = StaticCache(form.config, num_rows=2, capacity=64)
    hidden_BTD = torch.cat([form(ids_BT[:, at : at + 3], cache=cache) for at in range(0, 30, 3)], dim=1)
    torch.testing.assert_close(hidden_BTD, rounded(ids_BT), atol=3e-5, rtol=0)
    expected_BTV = F.linear(rounded(ids_BT), head_VD)
    torch.testing.assert_close(form.logits(hidden_BTD), expected_BTV, atol=2e-4, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("num_rows", [3, fp8.MOST_WIDE_ROWS + 1])
@pytest.mark.parametrize(("start", "stop"), [(0, 300), (7, 10), (44, 300), (5, 101)])
def test_scores_of_any_range_of_ids(num_rows: int, start: int, stop: int) -> None:
    """300 ids are no multiple of 16, nor are these ranges; each product's outputs are."""
    form = FusedTransformer(built(), weights="fp8")
    assert isinstance(form.head_VD, fp8.Fp8Weight)
    hidden_MD = torch.randn(num_rows, 64, generator=torch.Generator().manual_seed(5))
    expected_MV = fp8.by_definition(hidden_MD, form.head_VD)[:, start:stop]
    found_MV = form.logits(hidden_MD, start=start, stop=stop)
    assert found_MV.shape == (num_rows, stop - start)
    torch.testing.assert_close(found_MV, expected_MV)
    outputs = []
    fp8.scores(
        hidden_MD,
        form.head_VD,
        start=start,
        stop=stop,
        product=lambda x_MK, part: outputs.append(part.shape[0]) or fp8.linear(x_MK, part),
    )
    assert outputs == [-(-(stop - start) // 16) * 16]


def _linears(module: torch.nn.Module) -> list[torch.nn.Linear]:
    return [part for part in module.modules() if isinstance(part, torch.nn.Linear)]


@torch.no_grad()
def test_accuracy_of_a_random_model() -> None:
    """About 3 % of the hidden states: an eighth of rounding a matrix, averaged over its inputs."""
    model = built()
    ids_BT = random_ids(2, 100)
    expected_BTD = model(ids_BT)
    found_BTD = FusedTransformer(copy.deepcopy(model), weights="fp8")(ids_BT)
    error = float((found_BTD - expected_BTD).norm() / expected_BTD.norm())
    assert 0.005 < error < 0.1


def test_what_does_not_fit_is_refused(tiny_folder: str) -> None:
    with pytest.raises(ValueError, match="multiples of 16"):
        fp8.quantise(torch.zeros(40, 32))
    with pytest.raises(ValueError, match="'bf16' or 'fp8', got 'int4'"):
        FusedTransformer(built(), weights="int4")
    with pytest.raises(ValueError, match="head must be 'bf16' or 'fp8', got 'int4'"):
        FusedTransformer(built(), weights="fp8", head="int4")
    with pytest.raises(ValueError, match="'bf16' or 'fp8', got 'int4'"):
        emuworld.load(tiny_folder, device="cpu", weights="int4")
    with pytest.raises(ValueError, match="needs a GPU of compute capability"):
        check_weights("fp8", torch.device("cpu"))


@pytest.mark.gpu
@torch.no_grad()
@pytest.mark.parametrize("num_rows", [1, 2, 16, 17, 64, 65, 300])
def test_products_on_the_gpu_are_those_by_definition(num_rows: int) -> None:
    """Proves the kernel for few rows and `torch._scaled_mm` with scales of rows and columns for many."""
    if not torch.cuda.is_available():
        pytest.skip("needs CUDA")
    generator = torch.Generator().manual_seed(0)
    for num_inputs, num_outputs in ((512, 768), (5120, 1024), (272, 48)):
        weight = fp8.quantise(torch.randn(num_outputs, num_inputs, generator=generator))
        x_MK = torch.randn(num_rows, num_inputs, generator=generator).bfloat16()
        expected_MN = fp8.by_definition(x_MK, weight)
        found_MN = fp8.linear(x_MK.cuda(), fp8.Fp8Weight(*(part.cuda() for part in weight))).cpu()
        error = (found_MN.float() - expected_MN.float()).norm() / expected_MN.float().norm()
        assert float(error) < 0.005


@pytest.mark.gpu
@torch.no_grad()
@pytest.mark.parametrize("split", [1, 3, 8])
@pytest.mark.parametrize("num_rows", [1, 2, 9, 16])
def test_activations_in_two_parts_lose_nothing(num_rows: int, split: int) -> None:
    """Proves the kernel whose matrix units take 8 bits, and keep 14 bits of a sum over a block of inputs."""
    if not torch.cuda.is_available():
        pytest.skip("needs CUDA")
    from emuworld.model import few_rows, fp8_kernels

    generator = torch.Generator().manual_seed(0)
    for num_inputs, num_outputs in ((512, 768), (5120, 1040), (272, 48)):
        weight = fp8.quantise(torch.randn(num_outputs, num_inputs, generator=generator))
        x_MK = torch.randn(num_rows, num_inputs, generator=generator)
        x_MK[:, 7] *= 1e3  # an outlier, as trained models have
        x_MK = x_MK.bfloat16()
        expected_MN = F.linear(x_MK.float(), weight.dequantised())
        values_NK, scales_N = (part.cuda() for part in weight)
        for outputs, block, warps in ((64, 256, 4), (128, 128, 8), (64, 512, 4)):
            plan = few_rows.Plan(outputs, block, split, warps, stages=3)
            for _ in range(2):
                found_MN = fp8_kernels.linear_in_parts(x_MK.cuda(), values_NK, scales_N, plan=plan).cpu()
                error = (found_MN.float() - expected_MN).norm() / expected_MN.norm()
                assert float(error) < 0.004


@pytest.mark.gpu
@torch.no_grad()
@pytest.mark.parametrize("num_rows", [1, 2, 16])
def test_norms_in_two_parts_are_the_norms(num_rows: int) -> None:
    """Proves that two numbers of 8 bits hold a bfloat16, beside one that is hundreds of times larger too, and
    that products of them are those of the bfloat16s.
    """
    if not torch.cuda.is_available():
        pytest.skip("needs CUDA")
    from emuworld.model import few_rows, fp8_kernels, fp8_norms, kernels

    generator = torch.Generator("cuda").manual_seed(0)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device="cuda", generator=generator).bfloat16()

    for num_inputs, num_outputs in ((5120, 1024), (272, 48), (5120, 10240)):
        x_MD, delta_MD, weight_D = noise(num_rows, num_inputs), noise(num_rows, num_inputs), noise(num_inputs)
        x_MD[:, 7] *= 300.0
        h_MD = kernels.add_rms_norm(x_MD.clone(), delta_MD, weight_D, eps=1e-5).float()
        parts = fp8_norms.add_rms_norm_in_parts(x_MD.clone(), delta_MD, weight_D, eps=1e-5)
        high_MK, low_MK = parts.values_PK.float().unflatten(0, (num_rows, 2)).unbind(1)
        sum_MK = (high_MK + low_MK / 16) * parts.scales_M[:, None]
        error_MK = (sum_MK - h_MD).abs() / h_MD.abs().amax(dim=1, keepdim=True)
        assert float(error_MK.max()) < 1e-6
        weight = fp8.quantise(noise(num_outputs, num_inputs))
        expected_MN = F.linear(h_MD, weight.dequantised())
        for outputs, block, split, warps in ((128, 256, 1, 8), (128, 128, 3, 8), (64, 256, 1, 4)):
            plan = few_rows.Plan(outputs, block, split, warps, stages=3)
            found_MN = fp8_kernels.linear_of_parts(parts, *weight, dtype=torch.bfloat16, plan=plan)
            assert float((found_MN.float() - expected_MN).norm() / expected_MN.norm()) < 0.004


@pytest.mark.gpu
@torch.no_grad()
def test_what_makes_activations_rounds_them_alike() -> None:
    """Proves that rows are rounded to the bits of the definition, and that norms and SwiGLU before products
    of many rows round alike; a norm's sum may be taken in another order.
    """
    if not torch.cuda.is_available():
        pytest.skip("needs CUDA")
    from emuworld.model import fp8_activations, fp8_kernels, kernels

    def same(found: fp8.Rounded, expected: fp8.Rounded) -> float:
        torch.testing.assert_close(found.scales_M1.cpu(), expected.scales_M1.cpu(), rtol=1e-5, atol=0)
        bits = [rounded.values_MK.cpu().view(torch.uint8) for rounded in (found, expected)]
        return float((bits[0] == bits[1]).float().mean())

    generator = torch.Generator("cuda").manual_seed(0)
    for num_rows, size in ((300, 5120), (70, 25600), (65, 1104)):
        x_MD, delta_MD, gate_MD, weight_1D = (
            torch.randn(rows, size, device="cuda", generator=generator).bfloat16()
            for rows in (num_rows, num_rows, num_rows, 1)
        )
        assert same(fp8_kernels.round_rows(x_MD), fp8._rounded(x_MD.cpu())) == 1.0
        expected, found = x_MD.clone(), x_MD.clone()
        rounded = fp8_activations.add_rms_norm(found, delta_MD, weight_1D[0], eps=1e-5)
        h_MD = kernels.add_rms_norm(expected, delta_MD, weight_1D[0], eps=1e-5)
        assert same(rounded, fp8_kernels.round_rows(h_MD)) > 0.9999
        assert torch.equal(found, expected)
        gate_up_MX = torch.cat((gate_MD, delta_MD), dim=1)
        swiglu_MD = kernels.swiglu(gate_up_MX)
        assert same(fp8_activations.swiglu(gate_up_MX), fp8_kernels.round_rows(swiglu_MD)) == 1.0


@pytest.mark.gpu
@torch.no_grad()
@pytest.mark.parametrize("num_rows", [2, 300])
def test_scores_on_the_gpu_begin_at_any_id(num_rows: int) -> None:
    """Proves that products take a head's rows whose scales are not aligned, and outputs that fill no tile."""
    if not torch.cuda.is_available():
        pytest.skip("needs CUDA")
    form = FusedTransformer(built(), weights="fp8", device=torch.device("cuda"))
    assert isinstance(form.head_VD, fp8.Fp8Weight)
    hidden_MD = torch.randn(num_rows, 64, generator=torch.Generator().manual_seed(5)).bfloat16()
    head = fp8.Fp8Weight(*(part.cpu() for part in form.head_VD))
    for start, stop in ((0, 300), (7, 10), (45, 300), (6, 101)):
        expected_MV = fp8.by_definition(hidden_MD, head)[:, start:stop].float()
        found_MV = form.logits(hidden_MD.cuda(), start=start, stop=stop).cpu().float()
        assert float((found_MV - expected_MV).norm() / expected_MV.norm()) < 0.005


@pytest.mark.gpu
def test_worlds_open_in_8_bits_on_the_gpu(tiny_folder: str) -> None:
    """Proves that loading brings the layers to the device one by one and that worlds draw with them."""
    if not torch.cuda.is_available():
        pytest.skip("needs CUDA")
    model = emuworld.load(Path(tiny_folder), device="cuda", weights="fp8")
    state = model.begin(mode="t2i", prompt="a room", seed=1)
    _, segment = model.imagine(state, "")
    assert segment.image is not None and segment.image.shape == (128, 128, 3)
