"""Copies from the host to a device that nothing waits for. It imports nothing of ours."""

import torch

_STAGED_BYTES = 64 << 10  # the most that the driver takes from ordinary memory without waiting for the GPU


def moved(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """On the device, which nothing waits for: the driver has read a small tensor when it returns, and a large
    one is copied to where it may be read later."""
    if device.type == "cuda" and tensor.device.type == "cpu" and tensor.nbytes > _STAGED_BYTES:
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)
