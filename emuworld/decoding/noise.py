"""What a picture looks like on its way from noise to codes, and how it takes the next step: discrete flows.

Time t runs from 0 (nothing but noise) to 1 (the clean codes). Training corrupts codes to a time, decoding
walks through a grid of times; both ask the same path.

- `mixture`: at t each code is right with probability t, else a uniformly random one (Gat et al., arXiv
  2407.15595, the path with a uniform source).
- `metric`: p_t(x | clean) = softmax over x of -beta_t d(x, clean), where d is the squared distance of the
  two codes' vectors, each of length one, and beta_t = scale (t / (1 - t)) ** exponent (URSA, arXiv
  2510.24717): noise goes first to codes that look unlike, then to ones that look alike.
- `masked`: at t each code is right with probability t, else it is not there: PAD stands in its place, and the
  model need not ask which codes to believe (MaskGIT, arXiv 2202.04200; Gat et al., the path with a mask).

Departure from URSA: a step from t to t' uses beta_t' - beta_t where it has dt beta'_t, which has no limit at
t = 0 for exponents below 1.

All random numbers are given by the caller, one uniform number for each thing to draw, and every position is
computed from its own alone. Shapes: N positions, K codes, E length of a code's vector.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from emuworld.decoding.sampling import Truncation, pick
from emuworld.tokens.vocabulary import Vocabulary

PATHS = ("mixture", "metric", "masked")
_SCORES_AT_ONCE = 64 << 20  # positions times codes: 256 MiB of fp32
_ALL = Truncation()


@dataclass(frozen=True, kw_only=True)
class Noise:
    """How a checkpoint's pictures were corrupted when it learnt to draw them at once; part of its manifest.

    Attributes:
        path: one of `PATHS`.
        shift: times are put to t / (t + shift (1 - t)): above 1, more of the steps are spent near the noise,
            which larger pictures need (URSA).
        exponent, scale: beta_t of the metric path; its defaults are URSA's.
    """

    path: str = "masked"  # mixture | metric | masked
    shift: float = 1.0  # above 1: more of the time near the noise, for larger pictures
    exponent: float = 0.9  # of the metric path
    scale: float = 3.0  # of the metric path

    def __post_init__(self) -> None:
        if self.path not in PATHS:
            raise ValueError(f"noise path {self.path!r} is not known; expected one of {', '.join(PATHS)}")
        for name in ("shift", "exponent", "scale"):
            if not 0.0 < getattr(self, name) < float("inf"):
                raise ValueError(f"{name} of the noise must be above 0, got {getattr(self, name)}")

    def shifted(self, times: Tensor) -> Tensor:
        """Times in 0..1 put through the shift."""
        return times / (times + self.shift * (1.0 - times))

    def grid(self, num_steps: int) -> list[float]:
        """`num_steps` + 1 times from 0 to 1."""
        times: list[float] = self.shifted(
            torch.arange(num_steps + 1, dtype=torch.float64) / num_steps
        ).tolist()
        return times

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> Noise:
        """Read what `to_json` gave. ValueError for a name that does not exist."""
        try:
            return cls(**fields)
        except TypeError as error:
            raise ValueError(
                f"noise settings {dict(fields)} do not fit ({error}); known are path, shift, exponent, scale"
            ) from error


class Path(Protocol):
    """A path from noise to codes."""

    def start(self, drawn: Callable[[], Tensor], *, like: Tensor) -> Tensor:
        """Codes at time 0, int64, in the shape of `like` and where it is; `drawn` makes uniform numbers."""

    def corrupt(self, clean_N: Tensor, times_N: Tensor, *, kept_N: Tensor, drawn_N: Tensor) -> Tensor:
        """Codes at their times, int64. `kept_N` and `drawn_N` are uniform numbers, float64 in [0, 1)."""

    def step(
        self, codes_N: Tensor, clean_N: Tensor, *, now: float, then: float, kept_N: Tensor, drawn_N: Tensor
    ) -> Tensor:
        """Codes at the time `then`, given those at `now` and what they are thought to become."""


def make_path(noise: Noise, *, codebook_KE: Tensor) -> Path:
    """The path of some settings; `codebook_KE` are the vision tokenizer's vectors."""
    if noise.path == "mixture":
        return MixturePath(len(codebook_KE))
    if noise.path == "masked":
        return MaskedPath(len(codebook_KE))
    return MetricPath(codebook_KE, exponent=noise.exponent, scale=noise.scale)


def uniform_codes(drawn_N: Tensor, num_codes: int) -> Tensor:
    """A code each, all equally likely, int64."""
    return (drawn_N * num_codes).long().clamp_(max=num_codes - 1)


def noisy_ids(codes: Tensor, vocabulary: Vocabulary) -> Tensor:
    """The id of each code; PAD where it is not there."""
    return torch.where(codes < vocabulary.num_visual_tokens, codes + vocabulary.visual_start, vocabulary.pad)


class MixturePath:
    """Each code is right, or it is any."""

    def __init__(self, num_codes: int) -> None:
        self.num_codes = num_codes

    def start(self, drawn: Callable[[], Tensor], *, like: Tensor) -> Tensor:
        return uniform_codes(drawn(), self.num_codes)

    def corrupt(self, clean_N: Tensor, times_N: Tensor, *, kept_N: Tensor, drawn_N: Tensor) -> Tensor:
        return torch.where(kept_N < times_N, clean_N, uniform_codes(drawn_N, self.num_codes))

    def step(
        self, codes_N: Tensor, clean_N: Tensor, *, now: float, then: float, kept_N: Tensor, drawn_N: Tensor
    ) -> Tensor:
        """A code jumps with the share of what is still noise at `now` and no longer at `then`."""
        return torch.where(kept_N < (then - now) / (1.0 - now), clean_N, codes_N)


class MaskedPath:
    """Each code is right, or it is not there: the one behind the last."""

    def __init__(self, num_codes: int) -> None:
        self.num_codes = num_codes

    def start(self, drawn: Callable[[], Tensor], *, like: Tensor) -> Tensor:
        return torch.full_like(like, self.num_codes, dtype=torch.int64)

    def corrupt(self, clean_N: Tensor, times_N: Tensor, *, kept_N: Tensor, drawn_N: Tensor) -> Tensor:
        """`drawn_N` is not needed."""
        return torch.where(kept_N < times_N, clean_N, self.num_codes)

    def step(
        self, codes_N: Tensor, clean_N: Tensor, *, now: float, then: float, kept_N: Tensor, drawn_N: Tensor
    ) -> Tensor:
        """A code that is not there comes with the share of what is noise at `now` and no longer at `then`;
        one that is there stays."""
        comes_N = (codes_N == self.num_codes) & (kept_N < (then - now) / (1.0 - now))
        return torch.where(comes_N, clean_N, codes_N)


class MetricPath:
    """Codes near the right one are likelier, the more so the later."""

    def __init__(self, codebook_KE: Tensor, *, exponent: float, scale: float) -> None:
        self._unit_KE = torch.nn.functional.normalize(codebook_KE.detach().float(), dim=-1)
        self._exponent, self._scale = exponent, scale

    @property
    def num_codes(self) -> int:
        return len(self._unit_KE)

    def start(self, drawn: Callable[[], Tensor], *, like: Tensor) -> Tensor:
        return uniform_codes(drawn(), self.num_codes)

    def corrupt(self, clean_N: Tensor, times_N: Tensor, *, kept_N: Tensor, drawn_N: Tensor) -> Tensor:
        """One number a code decides; `kept_N` is not needed."""
        parts = []
        for clean, times, drawn in self._split(clean_N, times_N, drawn_N):
            scores_NK = -self._beta(times.float())[:, None] * self._distances(clean)
            parts.append(pick(scores_NK, drawn, truncation=_ALL))
        # beta has no bound at 1, where nothing is corrupted
        return torch.where(times_N < 1.0, torch.cat(parts), clean_N)

    def step(
        self, codes_N: Tensor, clean_N: Tensor, *, now: float, then: float, kept_N: Tensor, drawn_N: Tensor
    ) -> Tensor:
        """A code jumps nearer to its clean one, the likelier the more there is to gain."""
        if then >= 1.0:
            return clean_N
        beta, beta_then = (float(self._beta(torch.tensor(time))) for time in (now, then))
        parts = []
        for codes, clean, kept, drawn in self._split(codes_N, clean_N, kept_N, drawn_N):
            distances_NK = self._distances(clean)
            gain_NK = (distances_NK.gather(1, codes[:, None]) - distances_NK).clamp_min_(0.0)
            rates_NK = (-beta * distances_NK).softmax(dim=-1) * gain_NK * (beta_then - beta)
            jumps_N = kept < -torch.expm1(-rates_NK.sum(dim=-1))
            # A row without any rate never jumps; its draw only has to be possible.
            targets_N = pick(rates_NK.add_(1e-30).log_(), drawn, truncation=_ALL)
            parts.append(torch.where(jumps_N, targets_N, codes))
        return torch.cat(parts)

    def _beta(self, times: Tensor) -> Tensor:
        return self._scale * (times / (1.0 - times).clamp_min(1e-6)) ** self._exponent

    def _distances(self, codes_N: Tensor) -> Tensor:
        """Squared distances [N, K] of codes to all codes: 2 - 2 cos."""
        return 2.0 - 2.0 * (self._unit_KE[codes_N] @ self._unit_KE.T)

    def _split(self, *tensors_N: Tensor) -> list[tuple[Tensor, ...]]:
        size = max(1, _SCORES_AT_ONCE // self.num_codes)
        return list(zip(*(tensor.split(size) for tensor in tensors_N), strict=True))
