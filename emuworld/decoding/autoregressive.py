"""Token by token: worlds write their answers into rows of a static cache, each at its own place in the
grammar.

The loop knows the grammar, the sampling and the model's two calls (hidden states, logits of a range of ids);
it does not know prompts, worlds or pixels. Worlds never share anything but the batch: which tokens go through
the model together is decided world by world, so a world's result is the same in any company wherever the
model's own arithmetic is (it is for the exact form on the CPU). Settings may differ from world to world.

A world has one to three cache rows: the conditional one; the unguided one, which sees the unconditional
prompt; the blind one, which sees that prompt without reference pictures. The last two read the image blocks
that the world writes, and nothing else (published rule, fact sheet 5.1 and 5.3). `row_layout` says which.

The tokens of one row of an image follow each other without a question to the grammar, so they stay on the
device: while all worlds draw images the host waits once an image row, not once a token.

Where a world's settings say so, its pictures are drawn at once (`decoding.dida`). Such worlds wait at the
IMG token until no world has anything else to do, so that their passes are shared.

Shapes: W worlds, R cache rows, T tokens of one feed, D hidden size, V ids of a span.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence

import numpy as np
import torch
from torch import Tensor

from emuworld.decoding.dida import Draft, Painter, Picture
from emuworld.decoding.grammar import Grammar, Span
from emuworld.decoding.language_model import LanguageModel
from emuworld.decoding.request import Progress, Request, Stop, Written
from emuworld.decoding.sampling import Truncation, guide, pick
from emuworld.model.cache import StaticCache

__all__ = [
    "Draft",
    "LanguageModel",
    "News",
    "Request",
    "StepCallback",
    "Stop",
    "Written",
    "finish",
    "generate",
    "row_layout",
    "write",
]

StepCallback = Callable[[int, int], None]
"""Called after every step with the tokens written so far and those expected, over all worlds."""
News = list[tuple[int, list[int]] | Draft]
"""A world and the ids that it has written since the last news; or the draft of a picture that is drawn at
once, whose `picture` is the world."""
_SHORT = 2  # tokens of one feed up to which rows of any lengths go together: a token, and the EOL behind it

_GROWTH = 1.5  # a cache that a long text fills grows by this factor, so that copying it stays rare


def row_layout(num_rows: Sequence[int]) -> list[list[int]]:
    """The cache rows of each world, given how many it has: all conditional rows, then the unguided, then the
    blind ones."""
    layout: list[list[int]] = [[] for _ in num_rows]
    row = 0
    for rank in range(max(num_rows, default=0)):
        for world, count in enumerate(num_rows):
            if rank < count:
                layout[world].append(row)
                row += 1
    return layout


def generate(
    model: LanguageModel,
    cache: StaticCache,
    requests: Sequence[Request],
    *,
    grammar: Grammar,
    num_images: int = 1,
    painter: Painter | None = None,
    on_step: StepCallback | None = None,
) -> list[Written]:
    """`write` from beginning to end."""
    return finish(
        write(
            model,
            cache,
            requests,
            grammar=grammar,
            num_images=num_images,
            painter=painter,
            on_step=on_step,
        )
    )


def finish(writing: Generator[News, None, list[Written]]) -> list[Written]:
    """Run `write` to its end without listening."""
    while True:
        try:
            next(writing)
        except StopIteration as end:
            written: list[Written] = end.value
            return written


def write(
    model: LanguageModel,
    cache: StaticCache,
    requests: Sequence[Request],
    *,
    grammar: Grammar,
    num_images: int = 1,
    painter: Painter | None = None,
    on_step: StepCallback | None = None,
) -> Generator[News, None, list[Written]]:
    """Write each request's ids: up to the EOI of its `num_images`-th image, or up to the end of its answer.

    The cache must hold the prefixes of all rows, laid out by `row_layout`, and room for what comes. The
    tokens written last (those behind which a world stops) are not in the cache afterwards. `painter` draws
    the pictures of requests that want them at once.

    Yields:
        After every step (a token, the rest of an image's row, a pass over an image), what is new. Ids that
        were told stay.

    Returns:
        The ids of each request, forced ones included, and why it stopped.
    """
    layout = row_layout([request.num_rows for request in requests])
    if cache.num_rows != sum(map(len, layout)):
        raise ValueError(
            f"requests for {[len(rows) for rows in layout]} rows need {sum(map(len, layout))} cache rows, "
            f"got {cache.num_rows}"
        )
    if painter is None and any(request.sampling.passes for request in requests):
        raise ValueError("pictures are to be drawn at once, and there is no painter; set passes=0")
    worlds = [Progress(request, grammar, num_images=num_images) for request in requests]
    rows = _Rows(model, cache, layout, [request.hidden_D for request in requests])
    banned: dict[Span, Tensor] = {}
    yield _news(worlds)
    while active := [i for i, world in enumerate(worlds) if not world.done]:
        rows.feed_pending(worlds, active)
        waiting = [i for i in active if worlds[i].draws_at_once]
        if painter is not None and waiting == active:
            yield from _paint(painter, cache, worlds, active, layout=layout, on_step=on_step)
            continue
        active = [i for i in active if i not in waiting]
        draws = _draws(worlds, active, grammar=grammar, layout=layout, banned=banned)
        members = [i for draw in draws for i in draw.members]
        count = max(1, min(worlds[i].visual_run for i in active))
        uniforms_WN = [worlds[i].uniforms(count) for i in members]
        uniforms_NW = torch.tensor(uniforms_WN, dtype=torch.float64).t().to(model.device)
        drawn_rows, places = rows.rows_of(members)
        tokens_NW: list[Tensor] = []
        for uniforms_W in uniforms_NW:
            if tokens_NW:
                rows.feed_drawn(drawn_rows, tokens_NW[-1][places])
            parts = uniforms_W.split([len(draw.members) for draw in draws])
            drawn = [draw(model, rows.hidden_RD, part) for draw, part in zip(draws, parts, strict=True)]
            tokens_NW.append(drawn[0] if len(drawn) == 1 else torch.cat(drawn))
        for i, tokens in zip(members, torch.stack(tokens_NW, dim=1).tolist(), strict=True):
            worlds[i].write(tokens)
        if on_step is not None:
            on_step(sum(len(w.ids) for w in worlds), sum(w.expected_tokens() for w in worlds))
        yield _news(worlds)
    return [world.written for world in worlds]


def _paint(
    painter: Painter,
    cache: StaticCache,
    worlds: Sequence[Progress],
    active: Sequence[int],
    *,
    layout: Sequence[Sequence[int]],
    on_step: StepCallback | None,
) -> Generator[News, None, None]:
    """Draw the pictures before which the active worlds stand, each in its passes."""
    pictures = [
        Picture(
            rows=layout[i],
            size=(worlds[i].state.height, worlds[i].state.width),
            index=worlds[i].state.num_images,
            uniforms=worlds[i].request.uniforms,
            sampling=worlds[i].request.sampling,
        )
        for i in active
    ]
    painting = painter.paint(cache, pictures)
    written = sum(len(world.ids) for world in worlds)
    finished = [0] * len(pictures)
    while True:
        try:
            drafts = next(painting)
        except StopIteration as end:
            for i, codes_hw in zip(active, end.value, strict=True):
                worlds[i].write_picture(codes_hw)
            break
        for draft in drafts:
            finished[draft.picture] = draft.codes.size * draft.done // draft.num_passes
        if on_step is not None:
            on_step(written + sum(finished), sum(world.expected_tokens() for world in worlds))
        yield [draft._replace(picture=active[draft.picture]) for draft in drafts]
    yield _news(worlds)


def _news(worlds: Sequence[Progress]) -> News:
    return [(i, ids) for i, world in enumerate(worlds) if (ids := world.take_news())]


class _Rows:
    """The cache rows of all worlds and the hidden state behind each: what puts tokens into the model."""

    def __init__(
        self,
        model: LanguageModel,
        cache: StaticCache,
        layout: Sequence[Sequence[int]],
        hiddens_D: Sequence[Tensor],
    ) -> None:
        self._model = model
        self._cache = cache
        self._layout = layout
        self._indices: dict[tuple[int, ...], Tensor] = {}
        world_of = {row: world for world, rows in enumerate(layout) for row in rows}
        self.hidden_RD = torch.stack([hiddens_D[world_of[row]] for row in range(len(world_of))])

    def feed_pending(self, worlds: Sequence[Progress], active: Sequence[int]) -> None:
        """Put all pending tokens into the cache; rows without any keep their hidden states.

        How a row's tokens are cut into calls is the row's own affair: always all that are pending at once.
        """
        runs: dict[int, list[int]] = {}
        for i in active:
            conditional, *unguided = self._layout[i]
            runs[conditional], image_run = worlds[i].take_pending()
            runs |= dict.fromkeys(unguided, image_run)
        groups: dict[tuple[int, int], list[int]] = {}
        lengths = self._cache.lengths
        for row in sorted(row for row, run in runs.items() if run):
            # Short runs: any rows may go together. Longer ones only from equal places, where no mask of the
            # batch can depend on the company.
            start = int(lengths[row]) if len(runs[row]) > _SHORT else -1
            groups.setdefault((start, len(runs[row])), []).append(row)
        for rows in groups.values():
            self._feed(rows, torch.tensor([runs[row] for row in rows], device=self._model.device))

    def rows_of(self, members: Sequence[int]) -> tuple[list[int], Tensor]:
        """All rows of these worlds in ascending order, and where in `members` the world of each stands."""
        place = {row: at for at, i in enumerate(members) for row in self._layout[i]}
        rows = sorted(place)
        return rows, _index([place[row] for row in rows], self._model.device)

    def feed_drawn(self, rows: list[int], tokens_R: Tensor) -> None:
        """Put one drawn visual token into each of these rows; nothing waits for the device."""
        self._feed(rows, tokens_R[:, None])

    def _feed(self, rows: list[int], ids_RT: Tensor) -> None:
        needed = int(self._cache.lengths.max()) + ids_RT.shape[1]
        if needed > self._cache.capacity:
            self._cache.reserve(max(needed, int(_GROWTH * self._cache.capacity)))
        if len(rows) == self._cache.num_rows:
            self.hidden_RD = self._model(ids_RT, cache=self._cache)[:, -1]
            return
        key = tuple(rows)
        if key not in self._indices:  # kept, because making one waits for the device
            self._indices[key] = _index(rows, self._model.device)
        index = self._indices[key]
        neighbours = rows[-1] - rows[0] + 1 == len(rows)
        if not _rides_along(self._model.device) or neighbours or ids_RT.shape[1] > _SHORT:
            hidden_RD = self._model(ids_RT, cache=self._cache.rows(rows))[:, -1]
        else:
            all_RT = ids_RT.new_zeros((self._cache.num_rows, ids_RT.shape[1])).index_copy_(0, index, ids_RT)
            advance_R = np.isin(np.arange(self._cache.num_rows), rows)
            hidden_RD = self._model(all_RT, cache=self._cache, advance_B=advance_R)[index, -1]
        self.hidden_RD = self.hidden_RD.index_copy(0, index, hidden_RD)


def _rides_along(device: torch.device) -> bool:
    """Whether rows that have nothing to read go through the model with the others and do not advance.

    On a GPU leaving out rows from between others copies the cache of all that stay; on a CPU it saves work.
    """
    return device.type != "cpu"


def _index(numbers: Sequence[int], device: torch.device) -> Tensor:
    return torch.tensor(numbers, device=device)


class _Draw:
    """One draw for the worlds `members`, which stand before the same span with the same settings.

    `scales` are guidance and image guidance, as many as the worlds have rows beside the conditional one.
    """

    def __init__(
        self,
        members: list[int],
        *,
        span: Span,
        truncation: Truncation,
        scales: tuple[float, ...],
        layout: Sequence[Sequence[int]],
        banned: Tensor | None,
    ) -> None:
        self.members = members
        self._span = span
        self._truncation = truncation
        self._scales = scales
        self._rows = [layout[i][rank] for rank in range(1 + len(scales)) for i in members]
        self._banned_V = banned
        self._index: Tensor | None = None

    def __call__(self, model: LanguageModel, hidden_RD: Tensor, uniforms_W: Tensor) -> Tensor:
        """Logits of the span, guidance, what is allowed, the draw: ids [W] on the device."""
        if self._index is None:
            self._index = _index(self._rows, hidden_RD.device)
            self._all = self._rows == list(range(len(hidden_RD)))
        if not self._all:
            hidden_RD = hidden_RD[self._index]
        logits_RV = model.logits(hidden_RD, start=self._span.start, stop=self._span.stop).float()
        if self._scales:
            guidance, image_guidance = (*self._scales, 1.0)[:2]
            rows_WV = logits_RV.split(len(self.members))
            logits_RV = guide(*rows_WV, guidance=guidance, image_guidance=image_guidance)
        if self._banned_V is not None:
            logits_RV = logits_RV.masked_fill(self._banned_V, float("-inf"))
        return pick(logits_RV, uniforms_W, truncation=self._truncation) + self._span.start


def _draws(
    worlds: Sequence[Progress],
    active: Sequence[int],
    *,
    grammar: Grammar,
    layout: Sequence[Sequence[int]],
    banned: dict[Span, Tensor],
) -> list[_Draw]:
    """The draws that the active worlds are before, worlds with the same one together."""
    groups: dict[tuple[Span, Truncation, tuple[float, ...]], list[int]] = {}
    for i in active:
        request = worlds[i].request
        span = grammar.allowed(worlds[i].state)
        assert isinstance(span, Span), "forced tokens are written with the token before them"
        truncation = request.sampling.image if span.image else request.sampling.text
        scales = (request.sampling.guidance, request.sampling.image_guidance)[: request.num_rows - 1]
        groups.setdefault((span, truncation, scales if span.visual else ()), []).append(i)
        if span.mask is not None and span not in banned:
            banned[span] = torch.from_numpy(~span.mask).to(request.hidden_D.device)  # True = may not be drawn
    return [
        _Draw(
            members, span=span, truncation=truncation, scales=scales, layout=layout, banned=banned.get(span)
        )
        for (span, truncation, scales), members in groups.items()
    ]
