"""Convolutions in halves: the same on any number of threads, and what the whole one gives. And the kernels
that norm a GPU's layers."""

import importlib.util
from pathlib import Path

import pytest
import torch
from torch import nn
from triton_cases import run_cases

from emuworld.shares import one_thread
from emuworld.tokens import vision, vision_network
from emuworld.tokens.vision_network import Convolution, Decoder, VisionConfig

HAS_TRITON = importlib.util.find_spec("triton") is not None
NORM_SCRIPT = Path(__file__).with_name("norm_cases.py")


@pytest.mark.parametrize("sizes", [(160, 128, 3, 1), (128, 48, 3, 1), (96, 65, 1, 1), (64, 96, 3, 2)])
def test_halves_are_the_same_on_any_number_of_threads(
    sizes: tuple[int, int, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vision_network, "_WORTH_HALVES", 1)
    in_channels, out_channels, kernel, stride = sizes
    torch.manual_seed(0)
    halved = Convolution(in_channels, out_channels, kernel, stride=stride, padding=kernel // 2)
    whole = nn.Conv2d(in_channels, out_channels, kernel, stride=stride, padding=kernel // 2)
    whole.load_state_dict(halved.state_dict())
    x = torch.randn(1, in_channels, 24, 20).contiguous(memory_format=torch.channels_last)
    found, before = [], torch.get_num_threads()
    try:
        for num_threads in (1, 2, 3):
            torch.set_num_threads(num_threads)
            with torch.inference_mode(), one_thread(x.device):
                found.append(halved(x))
                expected = whole(x)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
    torch.testing.assert_close(found[0], expected)
    assert found[0].stride() == expected.stride()


def test_training_sees_whole_convolutions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vision_network, "_WORTH_HALVES", 1)
    monkeypatch.setattr(vision_network, "in_shares", None)
    convolution = Convolution(4, 6, 3, padding=1)
    convolution(torch.randn(1, 4, 8, 8)).sum().backward()
    assert convolution.weight.grad is not None


@pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")
def test_the_norms_of_a_gpu_agree_with_plain_pytorch() -> None:
    """In Triton's interpreter, in a process of its own: what `import triton` finds decides."""
    printed = run_cases(NORM_SCRIPT, "compare", TRITON_INTERPRET="1", OMP_NUM_THREADS="1")
    assert printed.count("agrees") == 64 and printed.count("the same pixels") == 6


@pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")
def test_the_norms_compile_for_the_published_sizes(tmp_path: Path) -> None:
    """To machine code for compute capability 9.0, which needs no GPU."""
    printed = run_cases(NORM_SCRIPT, "compile", TRITON_CACHE_DIR=str(tmp_path))
    assert printed.count("compiled") == 30


@pytest.mark.gpu
@pytest.mark.parametrize("size", [(16, 16), (9, 13)])
@torch.inference_mode()
def test_a_decoder_whose_channels_lie_last_gives_the_same_pixels(
    size: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Proves that a GPU takes the kernels for every norm before a swish, and that no pixel moves but by
    rounding."""
    if not torch.cuda.is_available():
        pytest.skip("needs CUDA")
    torch.manual_seed(0)
    config = VisionConfig()
    decoder = Decoder(config).eval().cuda()
    z = torch.randn(5, config.z_channels, *size, device="cuda")
    norm_swish, taken = vision_network.vision_kernels.norm_swish, []
    monkeypatch.setattr(
        vision_network.vision_kernels,
        "norm_swish",
        lambda x, norm: taken.append(x.shape) or norm_swish(x, norm),
    )
    with vision._precision(z.device, "ieee"):
        expected = decoder(z)
        assert not taken
        found = decoder.to(memory_format=torch.channels_last)(z)
    assert len(taken) == 17, "two of each of eight blocks, and the last"
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
