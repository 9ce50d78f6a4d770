"""Token by token: rows of a static cache write their answers, each at its own place in the grammar.

The loop knows the grammar, the sampling and the model's two calls (hidden states, logits of a range of ids);
it does not know prompts, worlds or pixels. Rows never share anything but the batch: which tokens go through
the model together is decided row by row, so a row's result is the same in any company wherever the model's
own arithmetic is (it is for the exact form on the CPU).

B worlds, R cache rows: rows 0 .. B-1 are conditional. With guidance R = 2 B, and row B + i is the unguided
twin of row i:
it sees the unconditional prompt and the image blocks that row i writes, nothing else (published rule, fact
sheet 5.3).

Shapes: R rows, T tokens of one feed, D hidden size, V ids of a span.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from emuworld.decoding.grammar import Grammar, GrammarState, Phase, Span
from emuworld.decoding.sampling import Sampling, guide, pick
from emuworld.decoding.uniforms import TokenUniforms
from emuworld.model.cache import StaticCache
from emuworld.tokens.sequence import image_length

StepCallback = Callable[[int, int], None]
"""Called after every step with the tokens written so far and those expected, over all rows."""


class LanguageModel(Protocol):
    """What the loop needs of a transformer."""

    @property
    def device(self) -> torch.device: ...

    def __call__(self, ids_BT: Tensor, *, cache: StaticCache) -> Tensor:
        """Append the tokens to every row of the cache; hidden states [B, T, D]."""

    def logits(self, hidden: Tensor, *, start: int = 0, stop: int | None = None) -> Tensor:
        """[..., D] -> [..., stop - start]."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Request:
    """What one row is to write.

    `state`: the grammar state behind what the cache row holds. `hidden_D`: the hidden state there. `forced`:
    ids to write first, as the grammar allows them. `max_text_tokens`: words (forced ones apart) after which
    the answer is closed; an open thought is closed first.
    """

    state: GrammarState
    hidden_D: Tensor
    uniforms: TokenUniforms
    forced: Sequence[int] = ()
    max_text_tokens: int = 512


class _Row:
    """A request on its way: mutable, one a world."""

    __slots__ = ("done", "ids", "pending", "request", "state", "text_left", "twin_pending")

    def __init__(self, request: Request, grammar: Grammar) -> None:
        self.request = request
        self.ids = list(request.forced)
        run, self.state = grammar.forced_run(grammar.advance_all(request.state, self.ids))
        self.ids += run
        self.pending = list(self.ids)  # written, not yet in the cache
        self.twin_pending = _from_image(self.pending, grammar)  # the same for the unguided twin
        self.text_left = request.max_text_tokens
        self.done = self.state.phase is Phase.ENDED

    def uniform(self) -> float:
        state, uniforms = self.state, self.request.uniforms
        if state.phase is Phase.VISUAL:
            return uniforms.image(state.num_images, state.position)
        return uniforms.text(len(self.ids))

    def write(self, token: int, grammar: Grammar, num_images: int) -> None:
        """Take a drawn token and what it forces; notice the end."""
        in_text = self.state.phase <= Phase.IMAGE_THOUGHT
        self.text_left -= in_text
        run, self.state = grammar.forced_run(grammar.advance(self.state, token))
        self.pending = [token, *run]
        self.twin_pending = _from_image(self.pending, grammar) if in_text else self.pending
        self.ids += self.pending
        self.close_where_due(grammar, num_images)

    def close_where_due(self, grammar: Grammar, num_images: int) -> None:
        """Finished behind the last image or the answer's end; text that grew too long is ended here."""
        if self.state.phase is Phase.ENDED or self.state.num_images >= num_images:
            self.done = True
        elif self.text_left <= 0 and self.state.phase <= Phase.IMAGE_THOUGHT:
            closing = grammar.closing_run(self.state)
            self.ids += closing
            self.state = grammar.advance_all(self.state, closing)
            self.done = True

    def expected_tokens(self) -> int:
        state = self.state
        if self.done:
            return len(self.ids)
        if state.phase is Phase.VISUAL:
            return len(self.ids) + state.height * (state.width + 1) - state.position
        size = (state.height, state.width)
        return len(self.ids) + (image_length(size) if all(size) else 0)


def generate(
    model: LanguageModel,
    cache: StaticCache,
    requests: Sequence[Request],
    *,
    grammar: Grammar,
    sampling: Sampling,
    num_images: int = 1,
    on_step: StepCallback | None = None,
) -> list[list[int]]:
    """Write each request's ids: up to the EOI of its `num_images`-th image, or up to the end of its answer.

    The cache must hold the rows' prefixes and room for what comes. The tokens written last (those behind
    which a row stops) are not in the cache afterwards.

    Returns:
        The ids of each request, forced ones included.
    """
    num_worlds = len(requests)
    if cache.num_rows != num_worlds * (2 if sampling.guided else 1):
        raise ValueError(
            f"{num_worlds} requests with guidance {sampling.guidance} need "
            f"{num_worlds * (2 if sampling.guided else 1)} cache rows, got {cache.num_rows}"
        )
    rows = [_Row(request, grammar) for request in requests]
    for row in rows:
        row.close_where_due(grammar, num_images)
    drawer = _Drawer(model, sampling, num_worlds)
    hidden_RD = torch.stack([request.hidden_D for request in requests] * (2 if sampling.guided else 1))
    while active := [i for i, row in enumerate(rows) if not row.done]:
        hidden_RD = _feed(model, cache, rows, active, hidden_RD, twins=sampling.guided)
        by_span: dict[Span, list[int]] = {}
        for i in active:
            span = grammar.allowed(rows[i].state)
            assert isinstance(span, Span), "forced tokens are written with the token before them"
            by_span.setdefault(span, []).append(i)
        for span, members in by_span.items():
            uniforms = [rows[i].uniform() for i in members]
            for i, token in zip(members, drawer.draw(hidden_RD, members, uniforms, span), strict=True):
                rows[i].write(token, grammar, num_images)
        if on_step is not None:
            on_step(sum(len(row.ids) for row in rows), sum(row.expected_tokens() for row in rows))
    return [row.ids for row in rows]


def _feed(
    model: LanguageModel,
    cache: StaticCache,
    rows: Sequence[_Row],
    active: Sequence[int],
    hidden_RD: Tensor,
    *,
    twins: bool,
) -> Tensor:
    """Put all pending tokens into the cache; the hidden states behind them, rows without any keeping theirs.

    How a row's tokens are cut into calls is the row's own affair: always all that are pending at once.
    """
    runs: dict[int, list[int]] = {}
    for i in active:
        runs[i] = rows[i].pending
        if twins:
            runs[len(rows) + i] = rows[i].twin_pending
        rows[i].pending = rows[i].twin_pending = []
    groups: dict[tuple[int, int], list[int]] = {}
    lengths = cache.lengths
    for i in sorted(i for i, run in runs.items() if run):
        # One or two tokens a row: any rows may go together. Longer ones only from equal places, where no mask
        # of the batch can depend on the company.
        start = int(lengths[i]) if len(runs[i]) > 2 else -1
        groups.setdefault((start, len(runs[i])), []).append(i)
    for members in groups.values():
        ids_RT = torch.tensor([runs[i] for i in members], device=model.device)
        if len(members) == cache.num_rows:
            return model(ids_RT, cache=cache)[:, -1]
        hidden_RD = hidden_RD.clone()
        hidden_RD[members] = model(ids_RT, cache=cache.rows(members))[:, -1]
    return hidden_RD


def _from_image(run: list[int], grammar: Grammar) -> list[int]:
    """The part of a run of text that belongs to an image block, which is what the unguided twin sees."""
    boi = grammar.vocabulary.boi
    return run[run.index(boi) :] if boi in run else []


class _Drawer:
    """Logits of the span that the grammar allows, guidance where it applies, the draw."""

    def __init__(self, model: LanguageModel, sampling: Sampling, num_worlds: int) -> None:
        self._model = model
        self._sampling = sampling
        self._num_worlds = num_worlds
        self._banned: dict[Span, Tensor] = {}

    def draw(self, hidden_RD: Tensor, members: list[int], uniforms: list[float], span: Span) -> list[int]:
        """One id for each of the rows `members`, all of which stand before the same span."""
        guided = span.visual and self._sampling.guided
        indices = [*members, *(self._num_worlds + i for i in members)] if guided else members
        if len(indices) != len(hidden_RD):
            hidden_RD = hidden_RD[indices]
        logits_RV = self._model.logits(hidden_RD, start=span.start, stop=span.stop).float()
        if guided:
            conditional_RV, unguided_RV = logits_RV.split(len(members))
            logits_RV = guide(conditional_RV, unguided_RV, guidance=self._sampling.guidance)
        if span.mask is not None:
            logits_RV = logits_RV.masked_fill(self._banned_in(span, logits_RV.device), float("-inf"))
        truncation = self._sampling.image if span.image else self._sampling.text
        uniforms_R = torch.tensor(uniforms, dtype=torch.float64, device=logits_RV.device)
        picked: list[int] = pick(logits_RV, uniforms_R, truncation=truncation).tolist()
        return [span.start + index for index in picked]

    def _banned_in(self, span: Span, device: torch.device) -> Tensor:
        """True = may not be drawn."""
        if span not in self._banned:
            self._banned[span] = torch.from_numpy(~span.mask).to(device)  # type: ignore[operator]
        return self._banned[span]
