"""Copies between the host and a device that nothing waits for. It imports nothing of ours."""

from functools import cache
from typing import Any

import torch
from numpy.typing import NDArray

_STAGED_BYTES = 64 << 10  # the most that the driver takes from ordinary memory without waiting for the GPU


def moved(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """On the device, which nothing waits for: the driver has read a small tensor when it returns, and a large
    one is copied to where it may be read later."""
    if device.type == "cuda" and tensor.device.type == "cpu" and tensor.nbytes > _STAGED_BYTES:
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


class Arriving:
    """A tensor on its way to the host, which nobody changes meanwhile: who asks for it waits for the copy,
    and for nothing that was launched behind it.

    Args:
        patient: who waits takes no core, and notices later.
    """

    def __init__(self, tensor: torch.Tensor, *, patient: bool = False) -> None:
        self._here = tensor
        self._copied: torch.cuda.Event | None = None
        if tensor.is_cuda:
            self._here = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            self._copied = torch.cuda.Event(blocking=patient)
            copying = _copying(tensor.device)
            copying.wait_stream(torch.cuda.current_stream(tensor.device))
            with torch.cuda.stream(copying):
                self._here.copy_(tensor, non_blocking=True)
                self._copied.record()
            tensor.record_stream(copying)

    def numpy(self) -> NDArray[Any]:
        """In ordinary memory: who keeps it need not keep what is set aside for copies. Numpy asks for large
        pages, of which few are to be made."""
        if self._copied is None:
            return self._here.numpy()
        self._copied.synchronize()
        return self._here.numpy().copy()


@cache
def _copying(device: torch.device) -> torch.cuda.Stream:
    """What comes to the host does not keep the GPU from the next."""
    return torch.cuda.Stream(device)
