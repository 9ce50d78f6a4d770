"""Convolutions in halves: the same on any number of threads, and what the whole one gives."""

import pytest
import torch
from torch import nn

from emuworld.shares import one_thread
from emuworld.tokens import vision_network
from emuworld.tokens.vision_network import Convolution


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
