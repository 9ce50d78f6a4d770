"""Which token may come next: a finite-state machine over the answer's text and image phases.

It knows ids, counts and sizes, and nothing of probabilities, caches or batches: sampling chooses among what
`Grammar.allowed` leaves, and the same machine serves any decoder, token by token or whole images at once.

Source: the answer grammar and constrained decoding of the Emu3.5 release (fact sheet, sections 4.3 and 5.3):

    answer := [BOG thought EOG] ( text [BOC thought EOC] BOI h*w IMG rows EOI )* [text] ESS EOS

Departures from the published code, which are its bugs (fact sheet, 5.4): tokens that have no place in text
(IMG, EOI, EOL, BOS, PAD and ids without a meaning) cannot be chosen there; a size may have any number of
digits between the configured bounds; a thought that was opened is closed before anything else.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from emuworld.tokens.vocabulary import Vocabulary

_FEW = 8  # tokens that are sooner looked at one by one
_MOST_BEGINNINGS = 256  # of answers that are known: many worlds get the same command


class Phase(IntEnum):
    """Where in the answer a row stands."""

    START = 0  # nothing written yet: the only place where the thought on the whole answer may open
    TEXT = 1
    ANSWER_THOUGHT = 2  # between BOG and EOG
    IMAGE_THOUGHT = 3  # between BOC and EOC
    HEIGHT = 4  # digits after BOI
    WIDTH = 5  # digits after '*'
    VISUAL = 6  # after IMG: rows of visual tokens with EOL between them, then EOI
    CLOSING = 7  # after ESS: only EOS
    ENDED = 8


_WORDS_STAY = (Phase.TEXT, Phase.ANSWER_THOUGHT, Phase.IMAGE_THOUGHT)  # where a word changes nothing


class GrammarState(NamedTuple):
    """One row's state: small, immutable, cheap to replace.

    `height` and `width` count visual tokens. Outside images they are the size that the next image is forced
    to (0 = free); in the phases HEIGHT and WIDTH, `number` is what the digits say so far and `position` how
    many there are; in VISUAL, `position` counts tokens since IMG, separators included. `num_images` counts
    finished images.
    """

    phase: Phase
    height: int
    width: int
    position: int
    number: int
    num_images: int


class Forced(NamedTuple):
    """Exactly one token may follow."""

    token: int


@dataclass(frozen=True, eq=False)
class Span:
    """Ids `start` <= id < `stop` may follow, those where `mask` is True if there is a mask (True = allowed).

    Spans are made once and compared by identity, so that a sampler can keep a device copy of each mask.
    `visual` says that the span holds visual codes, where guidance applies; `image` that image truncation
    applies (also the digits of a size, as in the published code).
    """

    start: int
    stop: int
    mask: NDArray[np.bool_] | None = None
    visual: bool = False
    image: bool = False


@dataclass(frozen=True, kw_only=True)
class SizeBounds:
    """Smallest and largest side of an image, in visual tokens; holds for forced and for free sizes."""

    smallest: int = 1
    largest: int = 99

    def __post_init__(self) -> None:
        if not 1 <= self.smallest <= self.largest:
            raise ValueError(
                f"image sides must satisfy 1 <= smallest <= largest, got {self}; mend the bounds"
            )


class Grammar:
    """The machine. `start` gives a row's first state, `allowed` what may follow it, `advance` the state after
    a token.

    Args:
        vocabulary: the table of ids.
        digit_ids: ids of the texts "0" to "9", one token each.
        star_id: id of the text "*".
        bounds: limits of image sides in visual tokens.
    """

    def __init__(
        self,
        vocabulary: Vocabulary,
        *,
        digit_ids: Sequence[int],
        star_id: int,
        bounds: SizeBounds | None = None,
    ) -> None:
        if len(digit_ids) != 10:
            raise ValueError(f"expected the ids of ten digits, got {len(digit_ids)}")
        self.vocabulary = v = vocabulary
        self.bounds = bounds or SizeBounds()
        self._digit_ids = tuple(digit_ids)
        self._digit_of = {token: digit for digit, token in enumerate(digit_ids)}
        self._star = star_id
        self._text_spans = {
            Phase.START: self._text_span(v.bog, v.boc, v.boi, v.ess, v.eos),
            Phase.TEXT: self._text_span(v.boc, v.boi, v.ess, v.eos),
            Phase.ANSWER_THOUGHT: self._text_span(v.eog),
            Phase.IMAGE_THOUGHT: self._text_span(v.eoc),
        }
        self._visual_span = Span(v.visual_start, v.visual_stop, visual=True, image=True)
        self._size_spans: dict[tuple[int, ...], Span] = {}
        self._size_runs: dict[GrammarState, tuple[list[int], GrammarState]] = {}
        self._beginnings: dict[tuple[GrammarState, tuple[int, ...]], tuple[list[int], GrammarState]] = {}
        self._forced = {token: Forced(token) for token in (*v.control_ids, *digit_ids, star_id)}

    def start(self, size: tuple[int, int] | None = None, *, first: bool = True) -> GrammarState:
        """State before a segment. `size` in visual tokens is forced on every image; None lets the model
        choose the first.

        `first` says that the answer is still empty.
        """
        if size is not None:
            self._check_size(size)
        height, width = size or (0, 0)
        return GrammarState(Phase.START if first else Phase.TEXT, height, width, 0, 0, 0)

    def allowed(self, state: GrammarState) -> Forced | Span:
        """What may follow. ValueError once the answer has ended."""
        phase = state.phase
        if phase is Phase.VISUAL:
            row, column = divmod(state.position, state.width + 1)
            if column < state.width:
                return self._visual_span
            last = row == state.height - 1
            return self._forced[self.vocabulary.eoi if last else self.vocabulary.eol]
        if phase <= Phase.IMAGE_THOUGHT:
            return self._text_spans[phase]
        if phase is Phase.CLOSING:
            return self._forced[self.vocabulary.eos]
        if phase is Phase.ENDED:
            raise ValueError("the answer has ended; nothing may follow it")
        return self._allowed_in_size(state)

    def advance(self, state: GrammarState, token: int) -> GrammarState:
        """State after `token`. ValueError if the grammar does not allow it there."""
        self._check(state, token)
        phase, height, width, position, _, num_images = state
        v = self.vocabulary
        if phase is Phase.VISUAL:
            if token == v.eoi:
                return GrammarState(Phase.TEXT, height, width, 0, 0, num_images + 1)
            return GrammarState(phase, height, width, position + 1, 0, num_images)
        if phase is Phase.HEIGHT or phase is Phase.WIDTH:
            return self._advance_size(state, token)
        next_phase = {
            v.bog: Phase.ANSWER_THOUGHT,
            v.boc: Phase.IMAGE_THOUGHT,
            v.eog: Phase.TEXT,
            v.eoc: Phase.TEXT,
            v.boi: Phase.HEIGHT,
            v.ess: Phase.CLOSING,
            v.eos: Phase.ENDED,
        }.get(token)
        if next_phase is None:  # a word
            next_phase = Phase.TEXT if phase is Phase.START else phase
        return GrammarState(next_phase, height, width, 0, 0, num_images)

    def advance_all(self, state: GrammarState, tokens: Sequence[int]) -> GrammarState:
        """State after several tokens."""
        if state.phase is Phase.VISUAL and len(tokens) >= _FEW:
            count = min(len(tokens), state.height * (state.width + 1) - 1 - state.position)
            if self._fit_picture(state, tokens[:count]):
                state, tokens = state._replace(position=state.position + count), tokens[count:]
        for token in tokens:
            if state.phase in _WORDS_STAY and self.vocabulary.is_text(token):
                continue  # nearly all that a text is made of
            state = self.advance(state, token)
        return state

    def begun(self, state: GrammarState, forced: Sequence[int]) -> tuple[list[int], GrammarState]:
        """What is written first, the forced ids and those that must follow them, and the state after them."""
        key = (state, tuple(forced))
        if key not in self._beginnings:
            run, after = self.forced_run(self.advance_all(state, forced))
            if len(self._beginnings) == _MOST_BEGINNINGS:
                self._beginnings.clear()
            self._beginnings[key] = ([*forced, *run], after)
        ids, after = self._beginnings[key]
        return ids.copy(), after

    def _fit_picture(self, state: GrammarState, tokens: Sequence[int]) -> bool:
        """Whether these are visual tokens and separators, each in its place, none of them the EOI."""
        ids = np.asarray(tokens)
        separates = (state.position + np.arange(len(ids))) % (state.width + 1) == state.width
        span = self._visual_span
        return bool(
            np.where(separates, ids == self.vocabulary.eol, (ids >= span.start) & (ids < span.stop)).all()
        )

    def forced_run(self, state: GrammarState) -> tuple[list[int], GrammarState]:
        """The tokens that must follow (none, or several: a size prefix, EOL, EOI) and the state after
        them."""
        # A picture begins: few sizes, again and again.
        if state.phase is Phase.HEIGHT and state.position == 0:
            before = state._replace(num_images=0)
            if before not in self._size_runs:
                self._size_runs[before] = self._forced_run(before)
            run, after = self._size_runs[before]
            return run.copy(), after._replace(num_images=state.num_images)
        return self._forced_run(state)

    def _forced_run(self, state: GrammarState) -> tuple[list[int], GrammarState]:
        run: list[int] = []
        while state.phase is not Phase.ENDED:
            choice = self.allowed(state)
            if not isinstance(choice, Forced):
                break
            run.append(choice.token)
            state = self.advance(state, choice.token)
        return run, state

    def closing_run(self, state: GrammarState) -> list[int]:
        """The shortest way to the end of the answer from a text phase: closes an open thought, then ESS
        EOS."""
        v = self.vocabulary
        if state.phase > Phase.IMAGE_THOUGHT:
            raise ValueError(
                f"an answer cannot be closed in phase {state.phase.name}; finish the image first"
            )
        thought = {Phase.ANSWER_THOUGHT: [v.eog], Phase.IMAGE_THOUGHT: [v.eoc]}.get(state.phase, [])
        return [*thought, v.ess, v.eos]

    def _text_span(self, *controls: int) -> Span:
        stop = max(self.vocabulary.num_text_tokens, *(token + 1 for token in controls))
        mask = np.zeros(stop, dtype=np.bool_)
        mask[: self.vocabulary.num_text_tokens] = True
        mask[list(controls)] = True
        return Span(0, stop, mask=mask)

    def _check_size(self, size: tuple[int, int]) -> None:
        low, high = self.bounds.smallest, self.bounds.largest
        if len(size) != 2 or not all(low <= side <= high for side in size):
            raise ValueError(
                f"image size {size} in visual tokens is out of bounds: each side must lie in {low}..{high}"
            )

    def _check(self, state: GrammarState, token: int) -> None:
        choice = self.allowed(state)
        if isinstance(choice, Forced):
            fits = token == choice.token
        else:
            fits = choice.start <= token < choice.stop and (
                choice.mask is None or bool(choice.mask[token - choice.start])
            )
        if not fits:
            raise ValueError(f"token {token} may not follow in {state}; allowed: {choice}")

    def _allowed_in_size(self, state: GrammarState) -> Forced | Span:
        forced_side = state.height if state.phase is Phase.HEIGHT else state.width
        end = self._star if state.phase is Phase.HEIGHT else self.vocabulary.img
        if forced_side:
            digits = str(forced_side)
            if state.position < len(digits):
                return self._forced[self._digit_ids[int(digits[state.position])]]
            return self._forced[end]
        tokens = [self._digit_ids[d] for d in range(10) if self._can_become_side(state.number * 10 + d)]
        if self.bounds.smallest <= state.number <= self.bounds.largest:
            tokens.append(end)
        return self._choice(tuple(tokens))

    def _can_become_side(self, number: int) -> bool:
        """Whether some number in bounds begins with these digits (so a leading zero never does)."""
        least, most = number, number
        while 0 < least <= self.bounds.largest:
            if most >= self.bounds.smallest:
                return True
            least, most = least * 10, most * 10 + 9
        return False

    def _choice(self, tokens: tuple[int, ...]) -> Forced | Span:
        if len(tokens) == 1:
            return self._forced[tokens[0]]
        if tokens not in self._size_spans:
            start, stop = min(tokens), max(tokens) + 1
            mask = np.zeros(stop - start, dtype=np.bool_)
            mask[[token - start for token in tokens]] = True
            self._size_spans[tokens] = Span(start, stop, mask=mask, image=True)
        return self._size_spans[tokens]

    def _advance_size(self, state: GrammarState, token: int) -> GrammarState:
        phase, height, width, position, number, num_images = state
        digit = self._digit_of.get(token)
        if digit is not None:
            return GrammarState(phase, height, width, position + 1, number * 10 + digit, num_images)
        if phase is Phase.HEIGHT:
            return GrammarState(Phase.WIDTH, height or number, width, 0, 0, num_images)
        return GrammarState(Phase.VISUAL, height, width or number, 0, 0, num_images)
