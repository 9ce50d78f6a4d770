"""Draws of several worlds together: from hidden states to ids, and on through the rest of an image's row.

Worlds that stand before the same span with the same settings share a draw. In the CPU form the rest of a row
is one call, in which machine code draws and reads without Python between two tokens
(`ExactTransformer.draw_ahead`); each token has the same bits as one by one.

Shapes: W worlds, R cache rows, B of them that read what is drawn, D hidden size, N draws, V ids of a span.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from emuworld.decoding.cache_rows import CacheRows, index_tensor
from emuworld.decoding.grammar import Grammar, Span
from emuworld.decoding.language_model import LanguageModel
from emuworld.decoding.request import Progress
from emuworld.decoding.sampling import (
    Truncation,
    compiled_draw,
    compiled_settings,
    favour,
    is_compiled_for,
    pick_guided,
)
from emuworld.model.exact import ExactTransformer
from emuworld.staging import moved

if TYPE_CHECKING:
    from emuworld.decoding.compiled_draw import Draws


class Draw:
    """One draw for the worlds `members`, which stand before the same span with the same settings.

    `scales` are guidance and image guidance, as many as the worlds have rows beside the conditional one;
    `stay` is that of the settings where visual tokens are drawn, else 0.
    """

    def __init__(
        self,
        members: list[int],
        *,
        span: Span,
        truncation: Truncation,
        scales: tuple[float, ...],
        stay: float,
        layout: Sequence[Sequence[int]],
        banned: Tensor | None,
    ) -> None:
        self.members = members
        self.stay = stay
        self.span = span
        self._truncation = truncation
        self._scales = scales
        self.world_rows = [layout[i][: 1 + len(scales)] for i in members]
        """The rows whose scores count, world by world."""
        self._rows = [row for kind in zip(*self.world_rows, strict=True) for row in kind]
        self._banned_V = banned
        self._index: Tensor | None = None

    @property
    def is_compiled(self) -> bool:
        """Whether machine code can draw this many times on a CPU."""
        num_ids = self.span.stop - self.span.start
        return self._banned_V is None and is_compiled_for(self._truncation, num_ids=num_ids)

    @property
    def settings(self) -> tuple[float, ...]:
        """As machine code takes them."""
        guidance, image_guidance = (*self._scales, 1.0, 1.0)[:2]
        return compiled_settings(self._truncation, guidance, image_guidance, self.stay)

    def __call__(
        self, model: LanguageModel, hidden_RD: Tensor, uniforms_W: Tensor, stays_W: Tensor | None
    ) -> Tensor:
        """Logits of the span, guidance, what is allowed, the draw: ids [W] on the device."""
        if self._index is None:
            self._index = index_tensor(self._rows, hidden_RD.device)
            self._all = self._rows == list(range(len(hidden_RD)))
        if not self._all:
            hidden_RD = hidden_RD[self._index]
        logits_RV = model.logits(hidden_RD, start=self.span.start, stop=self.span.stop)
        if stays_W is not None:
            logits_RV = favour(logits_RV, stays_W.repeat(1 + len(self._scales)), amount=self.stay)
        conditional_WV, *unguided_WV = logits_RV.split(len(self.members))
        if self._banned_V is not None:
            conditional_WV = conditional_WV.masked_fill(self._banned_V, float("-inf"))
        guidance, image_guidance = (*self._scales, 1.0, 1.0)[:2]
        drawn_W = pick_guided(
            [conditional_WV, *unguided_WV],
            uniforms_W,
            truncation=self._truncation,
            guidance=guidance,
            image_guidance=image_guidance,
        )
        return drawn_W + self.span.start


def draws_of(
    worlds: Mapping[int, Progress],
    active: Sequence[int],
    *,
    grammar: Grammar,
    layout: Sequence[Sequence[int]],
    banned: dict[Span, Tensor],
) -> list[Draw]:
    """The draws that the active worlds are before, worlds with the same one together."""
    groups: dict[tuple[Span, Truncation, tuple[float, ...], float], list[int]] = {}
    for i in active:
        request = worlds[i].request
        span = grammar.allowed(worlds[i].state)
        assert isinstance(span, Span), "forced tokens are written with the token before them"
        truncation = request.sampling.image if span.image else request.sampling.text
        scales = (request.sampling.guidance, request.sampling.image_guidance)[: request.num_rows - 1]
        stay = request.sampling.stay if span.visual and request.before is not None else 0.0
        groups.setdefault((span, truncation, scales if span.visual else (), stay), []).append(i)
        if span.mask is not None and span not in banned:
            banned[span] = torch.from_numpy(~span.mask).to(request.hidden_D.device)  # True = may not be drawn
    return [
        Draw(
            members,
            span=span,
            truncation=truncation,
            scales=scales,
            stay=stay,
            layout=layout,
            banned=banned.get(span),
        )
        for (span, truncation, scales, stay), members in groups.items()
    ]


def draw_run(
    model: LanguageModel, rows: CacheRows, worlds: Mapping[int, Progress], draws: Sequence[Draw]
) -> None:
    """Draw a token for each world, or as many as are visual for all of them, and write them down."""
    members = [i for draw in draws for i in draw.members]
    count = max(1, min(worlds[i].visual_run for i in members))
    uniforms_WN = [worlds[i].uniforms(count) for i in members]
    uniforms_NW = moved(torch.tensor(uniforms_WN, dtype=torch.float64), model.device).t()
    stays = [_stays(draw, worlds, count, device=model.device) for draw in draws]
    drawn_rows, places = rows.rows_of(members)
    tokens_NW: list[Tensor] = []
    is_one_call = isinstance(model, ExactTransformer) and all(draw.is_compiled for draw in draws)
    for n, uniforms_W in enumerate(uniforms_NW):
        if tokens_NW and is_one_call:
            tokens_NW += _draw_ahead(rows, draws, tokens_NW[0], uniforms_NW[1:], stays)
            break
        if tokens_NW:
            rows.feed_drawn(drawn_rows, tokens_NW[-1][places])
        parts = uniforms_W.split([len(draw.members) for draw in draws])
        drawn = [
            draw(model, rows.hidden_RD, part, None if stays_NW is None else stays_NW[n])
            for draw, part, stays_NW in zip(draws, parts, stays, strict=True)
        ]
        tokens_NW.append(drawn[0] if len(drawn) == 1 else torch.cat(drawn))
    for i, tokens in zip(members, torch.stack(tokens_NW, dim=1).tolist(), strict=True):
        worlds[i].write(tokens)


def _draw_ahead(
    rows: CacheRows,
    draws: Sequence[Draw],
    tokens_W: Tensor,
    uniforms_NW: Tensor,
    stays: Sequence[Tensor | None],
) -> list[Tensor]:
    """What is drawn behind `tokens_W`, N times ids [W]."""
    members = [i for draw in draws for i in draw.members]
    read_rows, sources_R = rows.rows_of(members)
    num_draws, place = len(uniforms_NW), {row: at for at, row in enumerate(read_rows)}
    free_NW = torch.full_like(uniforms_NW, -1, dtype=torch.int64)
    stays_NW = [
        free_NW[:, : len(draw.members)] if favoured_NW is None else favoured_NW[1:]
        for draw, favoured_NW in zip(draws, stays, strict=True)
    ]
    chooser = _RowDraws(
        uniforms_NW.t().numpy(),
        settings_WS=[draw.settings for draw in draws for _ in draw.members],
        places_W=[[place[row] for row in world_rows] for draw in draws for world_rows in draw.world_rows],
        stays_WN=torch.cat(stays_NW, dim=1).t().numpy(),
        first_id=draws[0].span.start,
    )
    ids_WN = np.empty((len(members), 1 + num_draws), np.int64)
    ids_WN[:, 0] = tokens_W
    rows.draw_ahead(read_rows, sources_R, ids_WN, span=draws[0].span, chooser=chooser)
    return list(torch.from_numpy(ids_WN[:, 1:]).t())


class _RowDraws:
    """The draws of some worlds for `ExactTransformer.draw_ahead`, which calls it a chooser.

    Args:
        uniforms_WN: float64, in [0, 1).
        settings_WS: as for `compiled_draw.Draws`, from `sampling.compiled_settings`.
        places_W: of each world, where in the rows of the call its own stand: the conditional, the unguided,
            the blind one.
        stays_WN: codes that `Sampling.stay` favours, -1: none.
        first_id: the first of the span.
    """

    def __init__(
        self,
        uniforms_WN: np.ndarray,
        *,
        settings_WS: Sequence[Sequence[float]],
        places_W: Sequence[Sequence[int]],
        stays_WN: np.ndarray,
        first_id: int,
    ) -> None:
        self._places_W3 = np.array([(*places, places[0], places[0])[:3] for places in places_W])
        self._draws: Draws = compiled_draw().Draws(
            uniforms_WN,
            settings_WS=settings_WS,
            num_kinds_W=[len(places) for places in places_W],
            stays_WN=stays_WN,
            first_id=first_id,
        )

    @property
    def function(self) -> int:
        return self._draws.function

    def argument(self, scores_BV: np.ndarray, ids_WN: np.ndarray) -> int:
        addresses_W3 = scores_BV.ctypes.data + scores_BV.strides[0] * self._places_W3
        return self._draws.table(addresses_W3, scores_BV.shape[1], ids_WN, 1)


def _stays(draw: Draw, worlds: Mapping[int, Progress], count: int, *, device: torch.device) -> Tensor | None:
    """What `Sampling.stay` favours in the next draws, codes int64 [N, W] or -1; None where it is off."""
    if not draw.stay:
        return None
    positions = [(worlds[i], worlds[i].state.position) for i in draw.members]
    codes_WN = [world.stays(range(position, position + count)) for world, position in positions]
    return moved(torch.tensor(codes_WN, dtype=torch.int64), device).t()
