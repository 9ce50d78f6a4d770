"""Which device a stage trains on."""

from __future__ import annotations

import torch


def pick_device(name: str) -> torch.device:
    """ "auto" is the GPU where there is one; ValueError for a device that is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"device {name!r} is not known; expected auto, cpu or cuda") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            f"device {name!r} was asked for, but torch sees no GPU; use device=auto or device=cpu"
        )
    return device
