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

A world that is done may make room for another while the others go on (`Exchange`).

Shapes: W worlds, R cache rows, T tokens of one feed, D hidden size, V ids of a span.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence

from torch import Tensor

from emuworld.decoding.cache_rows import CacheRows, rides_along
from emuworld.decoding.dida import Draft, OnDrawn, Painter, Picture
from emuworld.decoding.drafting import Drafter
from emuworld.decoding.draws import draw_run, draws_of
from emuworld.decoding.grammar import Grammar, Span
from emuworld.decoding.language_model import LanguageModel
from emuworld.decoding.request import Progress, Request, Stop, Written, picture_blocks
from emuworld.model.cache import StaticCache
from emuworld.tokens.vocabulary import Vocabulary

__all__ = [
    "Draft",
    "Exchange",
    "LanguageModel",
    "News",
    "OnDrawn",
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
Exchange = Callable[[list[tuple[int, Written]]], Mapping[int, Request]]
"""Gets the worlds that are done, with what they wrote, and gives requests for the places of any that are done
by now; their cache rows, the first of the place's, hold the requests' prefixes then."""


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
    on_drawn: OnDrawn | None = None,
    num_rows: Sequence[int] | None = None,
    exchange: Exchange | None = None,
) -> Generator[News, None, list[Written]]:
    """Write each request's ids: up to the EOI of its `num_images`-th image, or up to the end of its answer.

    The cache must hold the prefixes of all rows, laid out by `row_layout`, and room for what comes. The
    tokens written last (those behind which a world stops) are not in the cache afterwards. `painter` draws
    the pictures of requests that want them at once; `on_drawn` gets their worlds and codes before the host
    has these. With `exchange`, which is asked whenever a place is free, `num_rows` says how many rows each
    place has; the requests take the first places.

    Yields:
        After every step (a token, the rest of an image's row, a pass over an image), what is new. Ids that
        were told stay.

    Returns:
        The ids of each request, forced ones included, and why it stopped; nothing where `exchange` was told.
    """
    places = row_layout([request.num_rows for request in requests] if num_rows is None else num_rows)
    if cache.num_rows != sum(map(len, places)):
        raise ValueError(
            f"requests for {[len(rows) for rows in places]} rows need {sum(map(len, places))} cache rows, "
            f"got {cache.num_rows}"
        )
    layout = [list(rows) for rows in places]  # a world may need fewer rows than its place has
    rows = CacheRows(model, cache, layout, requests[0].hidden_D)
    worlds: dict[int, Progress] = {}

    def begin(joining: Mapping[int, Request]) -> None:
        for i, request in joining.items():
            if painter is None and request.sampling.passes:
                raise ValueError("pictures are to be drawn at once, and there is no painter; set passes=0")
            layout[i][:] = places[i][: request.num_rows]
            worlds[i] = Progress(request, grammar, num_images=num_images)
        rows.begin({i: request.hidden_D for i, request in joining.items()})

    begin(dict(enumerate(requests)))
    drafter = _drafter(model, rows, layout, grammar.vocabulary)
    banned: dict[Span, Tensor] = {}
    yield _news(worlds)
    while True:
        if exchange is not None and any(i not in worlds or worlds[i].done for i in range(len(places))):
            done = {i: worlds.pop(i) for i in sorted(worlds) if worlds[i].done}
            begin(exchange([(i, world.written) for i, world in done.items()]))
        active = [i for i in sorted(worlds) if not worlds[i].done]
        if not active:
            break
        rows.feed_pending(worlds, active)
        waiting = [i for i in active if worlds[i].draws_at_once]
        if painter is not None and waiting == active:
            yield from _paint(
                painter, cache, worlds, active, layout=layout, on_step=on_step, on_drawn=on_drawn
            )
            continue
        drafting = [i for i in active if worlds[i].drafts]
        if drafting:
            drafter.step(worlds, drafting)
        if members := [i for i in active if i not in waiting and i not in drafting]:
            draws = draws_of(worlds, members, grammar=grammar, layout=layout, banned=banned)
            draw_run(model, rows, worlds, draws)
        if on_step is not None:
            on_step(*_tokens(worlds))
        yield _news(worlds)
    return [worlds[i].written for i in sorted(worlds)]


def _drafter(
    model: LanguageModel, rows: CacheRows, layout: Sequence[Sequence[int]], vocabulary: Vocabulary
) -> Drafter:
    start, stop = vocabulary.visual_start, vocabulary.visual_stop
    return Drafter(
        rows,
        lambda hidden_ND: model.logits(hidden_ND, start=start, stop=stop),
        layout=layout,
        vocabulary=vocabulary,
        device=model.device,
        pads=rides_along(model.device),
    )


def _paint(
    painter: Painter,
    cache: StaticCache,
    worlds: Mapping[int, Progress],
    active: Sequence[int],
    *,
    layout: Sequence[Sequence[int]],
    on_step: StepCallback | None,
    on_drawn: OnDrawn | None,
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

    def tell(places: Sequence[int], codes_Phw: Tensor) -> None:
        if on_drawn is not None:
            on_drawn([active[place] for place in places], codes_Phw)

    painting = painter.paint(cache, pictures, on_drawn=tell)
    written, expected = _tokens(worlds)
    finished = [0] * len(pictures)
    while True:
        try:
            drafts = next(painting)
        except StopIteration as end:
            blocks = picture_blocks(end.value, painter.vocabulary)
            for i, codes_hw, block in zip(active, end.value, blocks, strict=True):
                worlds[i].write_picture(codes_hw, block)
            break
        for draft in drafts:
            finished[draft.picture] = draft.codes.size * draft.done // draft.num_passes
        if on_step is not None:
            on_step(written + sum(finished), expected)
        yield [draft._replace(picture=active[draft.picture]) for draft in drafts]
    yield _news(worlds)


def _news(worlds: Mapping[int, Progress]) -> News:
    return [(i, ids) for i, world in worlds.items() if (ids := world.take_news())]


def _tokens(worlds: Mapping[int, Progress]) -> tuple[int, int]:
    """Tokens written, and those expected when all are done."""
    return sum(len(w.ids) for w in worlds.values()), sum(w.expected_tokens() for w in worlds.values())
