"""The next segments of worlds: what is asked, what the caches hold, how much room there is, what was written.

It stands between the facade, which knows pixels and locks, and the loop of `emuworld.decoding`, which knows
only rows of a cache.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Generator, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from emuworld.cache_pool import CachedModel, CachePool
from emuworld.context import Context, in_tokens
from emuworld.decoding.autoregressive import (
    News,
    OnDrawn,
    Request,
    StepCallback,
    Stop,
    Written,
    row_layout,
    write,
)
from emuworld.decoding.dida import Painter
from emuworld.decoding.grammar import Grammar
from emuworld.decoding.sampling import Sampling
from emuworld.decoding.uniforms import TokenUniforms
from emuworld.pictures import Codes, Decode, Pixels, ToHost
from emuworld.readings import Ids, Reading
from emuworld.state import Segment, WorldState
from emuworld.tokens.sequence import ParsedAnswer, image_length, parse_answer
from emuworld.tokens.text import TextTokenizer
from emuworld.tokens.token_ids import TokenIds
from emuworld.tokens.vision import DOWNSAMPLE

# A working cache begins with room for so many words before the picture, and grows where a text is longer: the
# published model may write as many as its context holds, and 32,768 tokens of a row are 8 GiB.
_TEXT_ROOM_TOKENS = 512
_ONE_PICTURE = ("t2i", "x2i")  # modes whose answer is over with its first picture (fact sheet, 5.3)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """One state's next segment: what is forced, how it is drawn, how much may be written, in how many rows.

    `overrun` is what is told when `max_tokens` are reached.
    """

    state: WorldState
    forced: Ids
    sampling: Sampling
    num_rows: int
    max_tokens: int
    overrun: Stop


@dataclass(frozen=True, kw_only=True)
class Places:
    """Room for so many worlds of so many rows each, which are left and taken while the others write.

    `exchange` gets the places whose segments are written and gives plans for free places, none with more rows
    than a place has.
    """

    num_worlds: int
    num_rows: int
    exchange: Callable[[list[tuple[int, Written]]], Mapping[int, Plan]]


class SegmentWriter:
    """Plans segments, writes them, any number of worlds together, and reads them back."""

    def __init__(
        self,
        transformer: CachedModel,
        *,
        context: Context,
        caches: CachePool,
        painter: Painter | None = None,
    ) -> None:
        manifest, tokenizer = context.manifest, context.tokenizer
        self._transformer = transformer
        self._painter = painter
        self._context = context
        self._caches = caches
        self._grammar = Grammar(
            manifest.vocabulary,
            digit_ids=[_single(tokenizer, digit) for digit in "0123456789"],
            star_id=_single(tokenizer, "*"),
            bounds=manifest.bounds,
        )

    def plan_all(
        self,
        states: Sequence[WorldState],
        texts: Sequence[str | None],
        sampling: Sampling | Sequence[Sampling | None] | None,
    ) -> list[Plan]:
        """`plan` for each; one sampling for all, or one for each."""
        settings = (
            [sampling] * len(states) if sampling is None or isinstance(sampling, Sampling) else list(sampling)
        )
        if not len(states) == len(texts) == len(settings):
            raise ValueError(
                f"got {len(states)} states, {len(texts)} texts and {len(settings)} settings; give one text "
                "(or None) for each state, and one sampling for all or for each"
            )
        return [self.plan(*one) for one in zip(states, texts, settings, strict=True)]

    def plan(self, state: WorldState, text: str | None, sampling: Sampling | None) -> Plan:
        """What the next segment of a state takes; see `WorldModel.imagine_batch` for what is refused."""
        context, manifest = self._context, self._context.manifest
        if text is not None and not isinstance(text, str):
            raise ValueError(f"text must be a str or None, got {type(text).__name__}")
        context.check(state)
        if state.ended:
            raise ValueError("this world's answer has ended; begin another, or go back to an earlier state")
        sampling = sampling or manifest.sampling_for(state.mode)
        manifest.check_sampling(sampling)
        forced: Ids = ()
        if text is not None:
            words = context.tokenizer.encode(text)
            context.require(state, num_text_tokens=len(words))
            forced = (*words, manifest.vocabulary.boi)
        max_tokens, overrun = context.max_tokens - state.num_tokens, Stop.CONTEXT
        if sampling.max_new_tokens is not None:
            left = sampling.max_new_tokens - len(state.answer_ids)
            if left < max_tokens:
                max_tokens, overrun = left, Stop.TOKEN_LIMIT
        has_references = sampling.guided_by_references and context.has_references(state)
        return Plan(
            state=state,
            forced=forced,
            sampling=sampling,
            num_rows=sampling.num_rows(has_references=has_references),
            max_tokens=max_tokens,
            overrun=overrun,
        )

    def write(
        self,
        plans: Sequence[Plan],
        on_step: StepCallback | None = None,
        *,
        on_drawn: OnDrawn | None = None,
        places: Places | None = None,
    ) -> Generator[News, None, list[Written]]:
        """Write the segments, all in one batch; yields, tells and returns what `autoregressive.write` does.

        With `places` the plans take the first of them, and others follow. The caller holds the model's lock
        whenever this runs, its closing included.
        """
        num_rows = (
            [plan.num_rows for plan in plans] if places is None else [places.num_rows] * places.num_worlds
        )
        layout = row_layout(num_rows)
        sequences: list[Sequence[Ids]] = [[] for _ in range(sum(num_rows))]
        for plan, rows in zip(plans, layout, strict=False):
            for row, chunks in zip(rows, self._readings(plan), strict=False):
                sequences[row] = chunks
        with self._caches.lend(sequences, room=max(self._room(plan) for plan in plans)) as prepared:

            def joining(written: list[tuple[int, Written]]) -> dict[int, Request]:
                requests = {}
                assert places is not None
                for place, plan in places.exchange(written).items():
                    rows, chunks = layout[place][: plan.num_rows], self._readings(plan)
                    hidden_D, *_ = [
                        prepared.refill(*one, self._room(plan)) for one in zip(rows, chunks, strict=True)
                    ]
                    requests[place] = self._request(plan, hidden_D)
                return requests

            return (
                yield from write(
                    self._transformer,
                    prepared.cache,
                    [self._request(*one) for one in zip(plans, prepared.hiddens_D, strict=False)],
                    grammar=self._grammar,
                    painter=self._painter,
                    on_step=on_step,
                    on_drawn=on_drawn,
                    num_rows=num_rows,
                    exchange=None if places is None else joining,
                )
            )

    def read(self, plan: Plan, written: Written, *, decode: Decode) -> tuple[WorldState, Segment]:
        """State and segment after the ids of one segment; `decode` makes pictures of codes."""
        return self.read_all([plan], [written], decode=decode)[0]

    def read_all(
        self,
        plans: Sequence[Plan],
        written: Sequence[Written],
        *,
        decode: Decode,
        begun: ToHost | None = None,
        ahead: bool = False,
    ) -> list[tuple[WorldState, Segment]]:
        """`read` for many, whose pictures are made together: on a GPU while their answers are read. With
        `ahead` it then has the caches read what was drawn, while pixels are on their way; all else that can
        wait comes after that. `begun`: pictures of some of them, by place, which are on their way already.
        """
        begun, answers = begun or ToHost(), dict[int, ParsedAnswer]()
        rest = {at: one for at, one in enumerate(written) if at not in begun.places}
        drawn = [one.codes_hw for one in rest.values() if one.codes_hw is not None]
        coming = decode(drawn if len(drawn) == len(rest) else self._parsed(rest, answers))
        ids = [TokenIds(one.ids) for one in written]
        readings = [
            self._context.read_on(plan.state, own, block_tokens=_block_tokens(one))
            for plan, own, one in zip(plans, ids, written, strict=True)
        ]
        if ahead:
            self._read_ahead(plans, readings)
        unread = {at: one for at, one in enumerate(written) if at not in answers}
        num_pictures = len(list(self._parsed(unread, answers)))
        assert num_pictures == len(unread), "a picture that was drawn at once is in its answer"
        parsed = [answers[at] for at in range(len(written))]
        states = list(map(_after, plans, ids, parsed))
        for plan, state, rows in zip(plans, states, readings, strict=True):
            if state.size == plan.state.size:  # another size was never checked
                self._context.remember(state, rows)
        drawn_later = [at for at in rest if _codes(answers[at]) is not None]
        images = begun.by_place() | dict(zip(drawn_later, coming.received(), strict=True))
        segments = map(_segment, states, written, parsed, map(images.get, range(len(written))))
        return list(zip(states, segments, strict=True))

    def _parsed(
        self, written: Mapping[int, Written], answers: MutableMapping[int, ParsedAnswer]
    ) -> Iterator[Codes]:
        """The codes of all pictures, one by one; the answers that they are found in go to `answers`."""
        alike: dict[tuple[int, ...], ParsedAnswer] = {}  # many worlds get the same command
        for at, one in written.items():
            words = tuple(one.ids[: len(one.ids) - _block_tokens(one)])
            if one.codes_hw is None:
                answer = parse_answer(words, tokenizer=self._context.tokenizer)
            elif words in alike:
                answer = alike[words].with_last_codes(one.codes_hw)
            else:
                answer = parse_answer(words, tokenizer=self._context.tokenizer, last_codes=one.codes_hw)
                alike[words] = answer
            answers[at] = answer
            if (found := _codes(answer)) is not None:
                yield found

    def _read_ahead(self, plans: Sequence[Plan], readings: Sequence[Sequence[Reading]]) -> None:
        """Have the caches read what worlds that go on will need at their next step. That is only a matter of
        speed: an error in it must not lose what was drawn.
        """
        rows_of = [
            rows[: plan.num_rows] if plan.state.mode not in _ONE_PICTURE else []
            for plan, rows in zip(plans, readings, strict=True)
        ]
        try:
            self._caches.read_ahead([rows[rank] for rank in range(3) for rows in rows_of if rank < len(rows)])
        except Exception as error:
            warnings.warn(f"pictures are read at the next step, not ahead: {error}", stacklevel=2)

    def _readings(self, plan: Plan) -> list[Reading]:
        return self._context.readings(plan.state, num_rows=plan.num_rows)

    def _room(self, plan: Plan) -> int:
        text = len(plan.forced) or min(self._context.manifest.max_text_tokens, _TEXT_ROOM_TOKENS)
        picture = self._context.block_tokens(plan.state.size) + plan.sampling.draft_window
        return max(1, min(text + picture, plan.max_tokens))

    def _request(self, plan: Plan, hidden_D: Tensor) -> Request:
        state = plan.state
        return Request(
            state=self._grammar.start(in_tokens(state.size), first=not state.answer_ids),
            hidden_D=hidden_D,
            uniforms=TokenUniforms(seed=state.seed, step=state.step),
            sampling=plan.sampling,
            num_rows=plan.num_rows,
            before=self._context.last_picture(state) if plan.sampling.stay else None,
            forced=plan.forced,
            max_text_tokens=self._context.manifest.max_text_tokens,
            max_tokens=plan.max_tokens,
            overrun=plan.overrun,
        )


def _block_tokens(written: Written) -> int:
    """Length of the picture with which the ids end, where it was drawn at once; else 0."""
    if written.codes_hw is None:
        return 0
    h, w = written.codes_hw.shape
    return image_length((h, w))


def _after(plan: Plan, ids: TokenIds, parsed: ParsedAnswer) -> WorldState:
    state, codes = plan.state, _codes(parsed)
    return state.after(
        ids,
        size=state.size if codes is None else (DOWNSAMPLE * codes.shape[0], DOWNSAMPLE * codes.shape[1]),
        ended=parsed.ended or (codes is not None and state.mode in _ONE_PICTURE),
    )


def _segment(state: WorldState, written: Written, parsed: ParsedAnswer, image: Pixels | None) -> Segment:
    """`state` is the one behind it."""
    last = parsed.segments[-1] if parsed.segments else None
    return Segment(
        text=last.text if last else "",
        image=image,
        thought=last.thought if last else None,
        ended=state.ended,
        answer_thought=parsed.thought,
        stop_reason=written.stop,
    )


def _codes(answer: ParsedAnswer) -> Codes | None:
    """Of the last picture."""
    return answer.segments[-1].codes if answer.segments else None


def _single(tokenizer: TextTokenizer, text: str) -> int:
    """The one id of a text that must have one: sizes are written with these."""
    ids = tokenizer.encode(text)
    if len(ids) != 1:
        raise ValueError(
            f"{text!r} must be one token, got {len(ids)}; the text tokenizer does not fit this model"
        )
    return ids[0]
