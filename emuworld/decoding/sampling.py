"""From scores to a token: guidance, temperature, top-k, top-p and the draw by a given uniform number.

Every function works on each row for itself, so a row's choice does not depend on the rows beside it (torch's
softmax, cumsum, sort and topk along the last dimension reduce each row alone; tests/decoding/test_sampling.py
holds them to it). There is no generator here: the caller hands in one uniform number a row and the draw
inverts the distribution function, so equal seeds give equal tokens whatever the batch.

Without top-k a drawn token is one compiled function on a CPU (`compiled_draw`), which draws what is written
here but for rounding, and Triton's on CUDA (`draw_kernel`): the same distribution, but a uniform number gives
another id than on the CPU, and at the edge between two ids perhaps another one among more than 32 rows than
among fewer.

Shapes: R rows, V ids of the span that the grammar allows (not the whole vocabulary: the softmax over a part
differs from the one over all by a constant a row, which cancels in every step below).
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache as memoise
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from emuworld.shares import in_shares

if torch.cuda.is_available() and importlib.util.find_spec("triton") is not None:
    from emuworld.decoding import draw_kernel
else:
    draw_kernel = None  # type: ignore[assignment]

_NUMBER = (int, float, np.floating)
_HAS_NUMBA = importlib.util.find_spec("numba") is not None
_WORTH_A_THREAD = 1 << 17  # scores from which on rows are shared out among threads

RESAMPLINGS = ("confidence", "jump")
MOST_PASSES = 1024  # a picture of 256 px takes no more than 256 token by token
MAX_DRAFT_WINDOW = 64
"""Beyond it hardly a guess comes true, and a pass costs by the token on any device."""


@dataclass(frozen=True, kw_only=True)
class Truncation:
    """How one modality is drawn: temperature, then the `top_k` likeliest, then the likeliest that hold
    `top_p`.

    `temperature` 0 is greedy. `top_k` 0 and `top_p` 1 leave everything in.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if not isinstance(self.temperature, _NUMBER) or not 0.0 <= self.temperature < float("inf"):
            raise ValueError(
                f"temperature must be finite and at least 0 (0 = greedy), got {self.temperature!r}"
            )
        if self.top_k < 0:
            raise ValueError(f"top_k must be at least 0 (0 = no limit), got {self.top_k}")
        if not 0.0 < self.top_p <= 1.0:
            raise ValueError(f"top_p must lie in (0, 1] (1 = no limit), got {self.top_p}")


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """Settings of one generation.

    Attributes:
        text, image: how words and visual tokens (and the digits of a size) are drawn.
        guidance: how strongly words and pictures pull together, g in `guide`; 1 = off.
        image_guidance: how strongly the reference pictures pull by themselves, a in `guide`; 1 = off. Without
            reference pictures it has no effect: the two unguided rows are equal then.
        stay: what is added to the score of the code that the picture before has at the same place, where
            there is one of the same size; 0 = off. Weights that learnt with `mixture.change_weight` hold
            change for too likely, by that factor: its logarithm takes that back (logit adjustment, arXiv
            2007.07314). Pictures drawn at once do without.
        max_new_tokens: cap of the whole answer, over all its segments, in tokens; None = what the context
            holds. An answer that reaches it is closed (the two closing tokens may come on top), and a picture
            that would pass it is not begun.
        passes: passes in which a picture is drawn at once (`decoding.dida`), for checkpoints that have learnt
            it; 0 = token by token.
        guided_until: time in 0..1 of a picture drawn at once from which on it is no longer guided; the first
            pass always is.
        resample: which codes are kept after a pass: "confidence" or "jump".
        draft_window: places of a picture that go through the model together, the first of them certain, the
            others guesses that are kept where they come true (`decoding.drafting`); 0 = token by token. It
            changes how long a picture takes, not how likely it is; of the sizes from 1 on, not even which one
            it is, but for rounding. Without effect where `passes` are given.
    """

    text: Truncation = field(default_factory=Truncation)
    image: Truncation = field(default_factory=Truncation)
    guidance: float = 1.0
    image_guidance: float = 1.0
    stay: float = 0.0
    max_new_tokens: int | None = None
    passes: int = 0
    guided_until: float = 0.9
    resample: str = "confidence"
    draft_window: int = 0

    def __post_init__(self) -> None:
        for name in ("guidance", "image_guidance"):
            value = getattr(self, name)
            if not isinstance(value, _NUMBER) or not 0.0 <= value < float("inf"):
                raise ValueError(f"{name} must be finite and at least 0 (1 = off), got {value!r}")
        if not math.isfinite(self.stay):
            raise ValueError(f"stay must be finite (0 = off), got {self.stay}")
        if self.max_new_tokens is not None and self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1 (None = no cap), got {self.max_new_tokens}")
        if type(self.passes) is not int or not 0 <= self.passes <= MOST_PASSES:
            raise ValueError(
                f"passes must be an integer in 0..{MOST_PASSES} (0 = token by token), got {self.passes!r}"
            )
        if not 0.0 <= self.guided_until <= 1.0:
            raise ValueError(f"guided_until must lie in 0..1, got {self.guided_until}")
        if self.resample not in RESAMPLINGS:
            raise ValueError(f"resample must be {' or '.join(RESAMPLINGS)}, got {self.resample!r}")
        if not 0 <= self.draft_window <= MAX_DRAFT_WINDOW:
            raise ValueError(
                f"draft_window must lie in 0..{MAX_DRAFT_WINDOW} (0 = token by token), "
                f"got {self.draft_window}"
            )

    @property
    def guided(self) -> bool:
        """Whether anything is guided at all."""
        return self.guidance != 1.0 or self.image_guidance != 1.0

    @property
    def guided_by_references(self) -> bool:
        """Whether it matters that there are reference pictures."""
        return self.image_guidance != 1.0

    def num_rows(self, *, has_references: bool) -> int:
        """Cache rows a world: conditional; unguided; unguided and blind, without the reference pictures."""
        if self.guided_by_references and has_references:
            return 3
        return 2 if self.guidance != 1.0 else 1

    @classmethod
    def greedy(cls, *, guidance: float = 1.0, image_guidance: float = 1.0) -> Sampling:
        """The likeliest token everywhere."""
        likeliest = Truncation(temperature=0.0)
        return cls(text=likeliest, image=likeliest, guidance=guidance, image_guidance=image_guidance)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> Sampling:
        """Read what `to_json` gave. ValueError for a name that does not exist."""
        try:
            truncations = {name: Truncation(**fields[name]) for name in ("text", "image") if name in fields}
            return cls(**{**fields, **truncations})
        except TypeError as error:
            raise ValueError(
                f"sampling settings {dict(fields)} do not fit ({error}); known are text and image with "
                "temperature, top_k and top_p each, guidance, image_guidance, stay, max_new_tokens, passes, "
                "guided_until, resample and draft_window"
            ) from error


def guide(
    conditional_RV: Tensor,
    unguided_RV: Tensor,
    blind_RV: Tensor | None = None,
    *,
    guidance: float,
    image_guidance: float = 1.0,
) -> Tensor:
    """Classifier-free guidance in the published forms, on log-probabilities c, u, b. fp32 [R, V].

    Two rows: u + g (c - u). Three: b + a (u - b) + g (c - u), with b the row that sees no reference picture;
    a = 1 is the form with two. Source: the Emu3.5 release's `no_text` and `no_text_img_cfg` (fact sheet,
    5.1); only visual positions are guided.
    """
    c_RV = torch.log_softmax(conditional_RV.float(), dim=-1)
    u_RV = torch.log_softmax(unguided_RV.float(), dim=-1)
    if blind_RV is None:
        return u_RV + guidance * (c_RV - u_RV)
    b_RV = torch.log_softmax(blind_RV.float(), dim=-1)
    return b_RV + image_guidance * (u_RV - b_RV) + guidance * (c_RV - u_RV)


def favour(scores_RV: Tensor, ids_R: Tensor, *, amount: float) -> Tensor:
    """Scores with `amount` more for one id of each row; -1: for none. Added to every kind of row that `guide`
    takes, it comes out as it went in."""
    amounts_R1 = torch.where(ids_R < 0, 0.0, amount).to(scores_RV.dtype)[:, None]
    return scores_RV.scatter_add(1, ids_R.clamp(min=0)[:, None], amounts_R1)


def pick(scores_RV: Tensor, uniforms_R: Tensor, *, truncation: Truncation) -> Tensor:
    """Draw one index of each row, int64 [R].

    Args:
        scores_RV: unnormalised log-probabilities; -inf = cannot be drawn. Each row has at least one finite
            value.
        uniforms_R: float64 in [0, 1), one a row; unused when greedy.
        truncation: temperature, top-k, top-p, in this order.
    """
    if truncation.temperature == 0.0:
        return scores_RV.argmax(dim=-1)
    if draw := _drawer([scores_RV], truncation):
        return draw([scores_RV], uniforms_R, truncation=truncation)[0]
    p_RK, order_RK = _truncated(scores_RV, truncation)
    index_R = _invert(p_RK, uniforms_R)
    return index_R if order_RK is None else order_RK.gather(1, index_R.unsqueeze(1)).squeeze(1)


def pick_guided(
    rows: Sequence[Tensor],
    uniforms_R: Tensor,
    *,
    truncation: Truncation,
    guidance: float = 1.0,
    image_guidance: float = 1.0,
) -> Tensor:
    """`pick` from what `guide` makes of the rows: one to three logits [R, V] of any floating type, the
    conditional first. One row is not guided. int64 [R].
    """
    if draw := _drawer(rows, truncation):
        return draw(
            rows, uniforms_R, truncation=truncation, guidance=guidance, image_guidance=image_guidance
        )[0]
    scores_RV = _guided(rows, guidance=guidance, image_guidance=image_guidance)
    return pick(scores_RV, uniforms_R, truncation=truncation)


def pick_and_rate(
    rows: Sequence[Tensor],
    uniforms_R: Tensor,
    *,
    truncation: Truncation,
    guidance: float = 1.0,
    image_guidance: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """`pick_guided`, and how likely each drawn index was: the logarithm, fp32 [R], of its probability under
    the guided scores at temperature 1, before anything is cut.
    """
    if draw := _drawer(rows, truncation):
        return draw(rows, uniforms_R, truncation=truncation, guidance=guidance, image_guidance=image_guidance)
    scores_RV = _guided(rows, guidance=guidance, image_guidance=image_guidance)
    index_R = pick(scores_RV, uniforms_R, truncation=truncation)
    own_R = scores_RV.gather(1, index_R[:, None])[:, 0]
    return index_R, own_R - scores_RV.logsumexp(dim=-1)


def _guided(rows: Sequence[Tensor], *, guidance: float, image_guidance: float) -> Tensor:
    logits = [row_RV.float() for row_RV in rows]
    return logits[0] if len(logits) == 1 else guide(*logits, guidance=guidance, image_guidance=image_guidance)


def _drawer(rows: Sequence[Tensor], truncation: Truncation) -> Callable[..., tuple[Tensor, Tensor]] | None:
    """What draws such rows in one piece and rates the draw, where there is something: a kernel on CUDA, a
    compiled function on a CPU."""
    if _has_kernel(rows, truncation):
        return draw_kernel.draw
    is_compiled = rows[0].device.type == "cpu" and is_compiled_for(truncation, num_ids=rows[0].shape[-1])
    return _draw_compiled if is_compiled else None


def _has_kernel(rows: Sequence[Tensor], truncation: Truncation) -> bool:
    return (
        draw_kernel is not None
        and rows[0].device.type == "cuda"
        and truncation.temperature > 0.0
        and draw_kernel.supports(rows)
    )


def is_compiled_for(truncation: Truncation, *, num_ids: int) -> bool:
    """Whether such a draw is machine code on a CPU."""
    limited = 0 < truncation.top_k < num_ids
    return _HAS_NUMBA and truncation.temperature > 0.0 and not limited


def _draw_compiled(
    rows: Sequence[Tensor],
    uniforms_R: Tensor,
    *,
    truncation: Truncation,
    guidance: float = 1.0,
    image_guidance: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """What `pick_and_rate` gives."""
    kinds = [row_RV.detach().float().contiguous().numpy() for row_RV in rows]
    num_rows, num_ids = kinds[0].shape
    compiled, settings = compiled_draw(), compiled_settings(truncation, guidance, image_guidance)
    draws = compiled.Draws(
        uniforms_R[:, None].numpy(), settings_WS=[settings] * num_rows, num_kinds_W=[len(kinds)] * num_rows
    )
    ids_R1, starts_3 = np.empty((num_rows, 1), np.int64), [kind.ctypes.data for kind in kinds]
    starts_3 += starts_3[:1] * (3 - len(kinds))  # those that are not there are not read
    addresses_R3 = np.array(starts_3) + 4 * num_ids * np.arange(num_rows)[:, None]
    table = draws.table(addresses_R3, num_ids, ids_R1, 0)
    is_worth_it = kinds[0].size >= _WORTH_A_THREAD
    num_shares = min(num_rows, torch.get_num_threads()) if is_worth_it else 1

    def draw_share(share: int) -> None:
        part = num_rows * share // num_shares, num_rows * (share + 1) // num_shares
        compiled.draw(draws.function, table, *part)

    in_shares(num_shares, draw_share)
    return torch.from_numpy(ids_R1[:, 0]), torch.from_numpy(draws.rates_WN[:, 0])


def compiled_settings(
    truncation: Truncation, guidance: float, image_guidance: float, stay: float = 0.0
) -> tuple[float, ...]:
    """As `compiled_draw.Draws` takes them."""
    return truncation.temperature, guidance, image_guidance, truncation.top_p, stay


@memoise
def compiled_draw() -> ModuleType:
    """Imported when it is first needed, as `model.exact` does with its kernel."""
    from emuworld.decoding import compiled_draw

    return compiled_draw


def race(scores_RV: Tensor, exponentials_RV: Tensor, *, truncation: Truncation) -> Tensor:
    """Draw one index of each row, int64 [R]: the same distributions as `pick`, by an exponential race.

    Id v arrives at time e_v / p_v, and the first one wins: with probability p_v (e_v standard exponential;
    the same as adding Gumbel noise to log-probabilities). Where `pick` goes to another id when probability
    moves anywhere below its uniform number, here the winner stays while its own odds stay: with the same
    exponentials two similar distributions draw the same id with probability at least (1 - t) / (1 + t), t
    their distance in total variation (Daliri et al., arXiv 2408.07978).

    Args:
        scores_RV: as for `pick`.
        exponentials_RV: fp32, positive; standard exponential numbers, independent of each other.
        truncation: temperature, top-k, top-p, in this order.
    """
    if truncation.temperature == 0.0:
        return scores_RV.argmax(dim=-1)
    if 0 < truncation.top_k < scores_RV.shape[-1]:
        p_RK, order_RK = _truncated(scores_RV, truncation)
        assert order_RK is not None
        winner_R = (p_RK / exponentials_RV.gather(1, order_RK)).argmax(dim=-1)
        return order_RK.gather(1, winner_R.unsqueeze(1)).squeeze(1)
    p_RV = torch.softmax(scores_RV.float() / truncation.temperature, dim=-1)
    if truncation.top_p < 1.0:
        p_RV = p_RV.masked_fill(p_RV < _least_kept(p_RV, top_p=truncation.top_p), 0.0)
    return (p_RV / exponentials_RV).argmax(dim=-1)


def _least_kept(p_RV: Tensor, *, top_p: float) -> Tensor:
    """The probability [R, 1] of the least likely id among the likeliest that hold `top_p`."""
    if p_RV.device.type == "cpu":  # thirty times faster than torch's sort there
        sorted_RV = torch.from_numpy(np.sort(p_RV.numpy(), axis=-1)).flip(-1)
    else:
        sorted_RV = p_RV.sort(dim=-1, descending=True).values
    return sorted_RV.masked_fill(_beyond(sorted_RV, top_p), float("inf")).amin(dim=-1, keepdim=True)


def _beyond(p_RK: Tensor, top_p: float) -> Tensor:
    """Which of each row's probabilities, the highest first, top-p leaves out, bool [R, K]. A token stays
    while the likelier ones hold less than top_p, so the one that crosses the line stays too.
    """
    return p_RK.cumsum(dim=-1, dtype=torch.float64) - p_RK >= top_p


def _truncated(scores_RV: Tensor, truncation: Truncation) -> tuple[Tensor, Tensor | None]:
    """Unnormalised probabilities [R, K] and the ids they belong to, [R, K]; None: each its own index."""
    scaled_RV = scores_RV.float() / truncation.temperature
    limited = 0 < truncation.top_k < scores_RV.shape[-1]
    if not limited and truncation.top_p >= 1.0:
        return torch.softmax(scaled_RV, dim=-1), None
    if limited:
        sorted_RK, order_RK = scaled_RV.topk(truncation.top_k, dim=-1)
        p_RK = torch.softmax(sorted_RK, dim=-1)
    else:
        sorted_RK, order_RK = scaled_RV.sort(dim=-1, descending=True, stable=True)
        p_RK = torch.softmax(sorted_RK, dim=-1)
    if truncation.top_p < 1.0:
        p_RK = p_RK.masked_fill(_beyond(p_RK, truncation.top_p), 0.0)
    return p_RK, order_RK


def _invert(p_RV: Tensor, uniforms_R: Tensor) -> Tensor:
    """Index where the distribution function passes the uniform number; rows of `p_RV` need not add up to
    one."""
    # float64: summing thousands of fp32 terms would move the last boundaries by more than their own width.
    cdf_RV = p_RV.cumsum(dim=-1, dtype=torch.float64)
    target_R = uniforms_R * cdf_RV[:, -1]
    index_R = torch.searchsorted(cdf_RV, target_R.unsqueeze(1), right=True).squeeze(1)
    # target < total by construction, except where the product rounds up: then the last index with weight is
    # meant.
    last_R = p_RV.shape[-1] - 1 - (p_RV > 0).flip(-1).to(torch.uint8).argmax(dim=-1)
    return torch.minimum(index_R, last_R)
