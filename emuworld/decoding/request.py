"""What one world is to write, how far it is, and why it stops. No model, cache or batch is known here.

A `Request` is what the caller asks; `Progress` walks it through the grammar token by token, takes what the
grammar forces along, and notices the end: the last picture, the answer's end, or a limit. Every limit ends
the answer cleanly: an open thought is closed, a picture that would not fit is not begun, and what was written
stays.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from emuworld.decoding.grammar import Grammar, GrammarState, Phase
from emuworld.decoding.sampling import Sampling
from emuworld.decoding.uniforms import TokenUniforms
from emuworld.tokens.sequence import image_length
from emuworld.tokens.vocabulary import Vocabulary

END_TOKENS = 2  # ESS EOS: room that is kept behind every picture, so that its answer can be ended
_NO_LIMIT = 1 << 40


class Stop(StrEnum):
    """Why a segment is over; each compares equal to its value."""

    IMAGE = "image"
    """Its picture is finished."""
    END = "end"
    """The model ended its answer."""
    TEXT_LIMIT = "text_limit"
    """The model wrote as many words as one segment may have; the answer was closed."""
    TOKEN_LIMIT = "token_limit"
    """The answer reached `Sampling.max_new_tokens`, or its next picture would have; it was closed."""
    CONTEXT = "context"
    """The context is full, or has no room for the picture that the model began; the answer was closed."""


class Written(NamedTuple):
    """Ids of a segment, forced ones included, and why it stopped."""

    ids: list[int]
    stop: Stop
    codes_hw: NDArray[np.int64] | None = None
    """Those of the picture, where it was drawn at once: nobody has to look for them in the ids."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Request:
    """What one world is to write.

    Attributes:
        state: the grammar state behind what its cache rows hold.
        hidden_D: the hidden state of the conditional row there.
        uniforms: its random numbers.
        sampling: its settings.
        num_rows: cache rows, 1 to 3: conditional, unguided, blind; see `Sampling.num_rows`.
        before: codes [h, w] of the picture before, for `Sampling.stay`; None: there is none.
        forced: ids to write first, as the grammar allows them.
        max_text_tokens: words and control tokens (forced ones apart) after which the answer is closed.
        max_tokens: tokens that may be written in all, the two closing ones included.
        overrun: what is told when `max_tokens` are reached.
    """

    state: GrammarState
    hidden_D: Tensor
    uniforms: TokenUniforms
    sampling: Sampling = field(default_factory=Sampling)
    num_rows: int = 1
    before: NDArray[np.int64] | None = None
    forced: Sequence[int] = ()
    max_text_tokens: int = 512
    max_tokens: int = _NO_LIMIT
    overrun: Stop = Stop.CONTEXT


def picture_blocks(pictures: Sequence[NDArray[np.int64]], vocabulary: Vocabulary) -> list[list[int]]:
    """What follows IMG in each picture of these codes [h, w]: its rows, EOL between them, EOI."""
    if len({codes_hw.shape for codes_hw in pictures}) > 1:
        return [block for codes_hw in pictures for block in picture_blocks([codes_hw], vocabulary)]
    height, width = pictures[0].shape
    rows_PhW = np.full((len(pictures), height, width + 1), vocabulary.eol)
    np.stack(pictures, out=rows_PhW[:, :, :-1])
    rows_PhW[:, :, :-1] += vocabulary.visual_start
    rows_PhW[:, -1, -1] = vocabulary.eoi
    blocks: list[list[int]] = rows_PhW.reshape(len(pictures), -1).tolist()
    return blocks


class Progress:
    """A request on its way: mutable, one a world.

    `pending` are ids that are written but not yet in the conditional row; `image_pending` the part of them
    that belongs to an image block, which is all that unguided rows see (fact sheet, 5.3).
    """

    __slots__ = (
        "_codes_hw", "_grammar", "_num_images", "_num_told", "_text_left", "ids", "image_pending", "pending",
        "request", "state", "stop",
    )  # fmt: skip

    def __init__(self, request: Request, grammar: Grammar, *, num_images: int = 1) -> None:
        self.request = request
        self._grammar = grammar
        self._num_images = num_images
        self._text_left = request.max_text_tokens
        self._num_told = 0
        self._codes_hw: NDArray[np.int64] | None = None
        self.stop: Stop | None = None
        self.ids, self.state = grammar.begun(request.state, request.forced)
        self.pending = list(self.ids)
        boi = grammar.vocabulary.boi
        self.image_pending = self.pending[self.pending.index(boi) :] if boi in self.pending else []
        self._notice_the_end()

    @property
    def done(self) -> bool:
        return self.stop is not None

    @property
    def written(self) -> Written:
        assert self.stop is not None, "asked before the request was done"
        return Written(self.ids, self.stop, self._codes_hw)

    @property
    def draws_at_once(self) -> bool:
        """Whether a picture is next, all of it drawn at once; its IMG stays pending until it is there."""
        begins = self.state.phase is Phase.VISUAL and self.state.position == 0
        return begins and self.request.sampling.passes > 0 and not self.done

    @property
    def drafts(self) -> bool:
        """Whether it is inside a picture that is drawn through a window; what the window begins with stays
        pending."""
        sampling = self.request.sampling
        window = sampling.draft_window if not sampling.passes else 0
        return window > 0 and self.state.phase is Phase.VISUAL and not self.done

    @property
    def visual_run(self) -> int:
        """How many visual tokens must follow before anything else may: what is left of an image's row."""
        state = self.state
        return state.width - state.position % (state.width + 1) if state.phase is Phase.VISUAL else 0

    def uniforms(self, count: int) -> list[float]:
        """Random numbers for the next tokens; more than one only inside a `visual_run`."""
        state, uniforms = self.state, self.request.uniforms
        if state.phase is Phase.VISUAL:
            return uniforms.image_run(state.num_images, state.position, count)
        assert count == 1, "only visual tokens are drawn ahead"
        return [uniforms.text(len(self.ids))]

    def stays(self, places: Iterable[int]) -> list[int]:
        """The codes that the picture before has at these places of this one, counted from IMG and with those
        of EOL; -1 where there is none."""
        state, before = self.state, self.request.before
        if before is None or before.shape != (state.height, state.width):
            return [-1 for _ in places]
        found = (divmod(place, state.width + 1) for place in places)
        return [
            int(before[row, column]) if column < state.width and row < state.height else -1
            for row, column in found
        ]

    def write(self, tokens: Sequence[int]) -> None:
        """Take drawn tokens and what the last one forces; all but the last are in the cache already."""
        state, eol = self.state, self._grammar.vocabulary.eol
        if 1 < len(tokens) == self.visual_run and state.position // (state.width + 1) < state.height - 1:
            # The rest of a row that is not the last, drawn from its span: nothing else follows, nothing ends.
            self.ids += (*tokens, eol)
            self.state = state._replace(position=state.position + len(tokens) + 1)
            self.pending = self.image_pending = [tokens[-1], eol]
            return
        *before, last = tokens
        self.ids += before
        self.state = self._grammar.advance_all(self.state, before)
        in_text = self.state.phase <= Phase.IMAGE_THOUGHT
        self._text_left -= in_text
        run, self.state = self._grammar.forced_run(self._grammar.advance(self.state, last))
        self.pending = [last, *run]
        is_image = not in_text or last == self._grammar.vocabulary.boi
        self.image_pending = self.pending if is_image else []
        self.ids += self.pending
        self._notice_the_end()

    def take_pending(self) -> tuple[list[int], list[int]]:
        """`pending` and `image_pending`, which go into the cache now."""
        taken, image_taken = self.pending, self.image_pending
        self.pending = self.image_pending = []
        if self.drafts and self.state.position:  # read with the guesses behind them
            self.pending, self.image_pending = taken, image_taken
            return [], []
        if self.draws_at_once or self.drafts:
            taken, image_taken = taken[:-1], image_taken[:-1]
            self.pending = self.image_pending = [self._grammar.vocabulary.img]
        return taken, image_taken

    def write_picture(self, codes_hw: NDArray[np.int64], block: list[int]) -> None:
        """Take a picture that was drawn at once, its codes and what follows IMG; all of it is pending."""
        self.ids += block
        self._codes_hw = codes_hw
        self.state = self._grammar.advance(self.state._replace(position=len(block) - 1), block[-1])
        self._notice_the_end()
        if not self.done:
            self.pending = self.image_pending = [self._grammar.vocabulary.img, *block]

    def take_news(self) -> list[int]:
        """Ids since the last call. The head of an image is kept back until its size is known to fit."""
        if self.state.phase in (Phase.HEIGHT, Phase.WIDTH):
            return []
        news = self.ids[self._num_told :]
        self._num_told = len(self.ids)
        return news

    def expected_tokens(self) -> int:
        """Tokens when it is done, as far as is known now."""
        state = self.state
        if self.done:
            return len(self.ids)
        if state.phase is Phase.VISUAL:
            return len(self.ids) + state.height * (state.width + 1) - state.position
        size = (state.height, state.width)
        return len(self.ids) + (image_length(size) if all(size) else 0)

    def _notice_the_end(self) -> None:
        state, limit = self.state, self.request.max_tokens
        if state.phase is Phase.ENDED:
            self.stop = Stop.END
        elif state.num_images >= self._num_images:
            self.stop = Stop.IMAGE
        elif state.phase is Phase.VISUAL and state.position == 0:
            if len(self.ids) + state.height * (state.width + 1) + END_TOKENS > limit:
                self._take_image_back()
        elif state.phase <= Phase.IMAGE_THOUGHT:
            closing = self._grammar.closing_run(state)
            # The next token may open a thought, which takes one more to close.
            longest = max(len(closing), END_TOKENS + 1)
            if len(self.ids) + longest >= limit:
                self._close(closing, self.request.overrun)
            elif self._text_left <= 0:
                self._close(closing, Stop.TEXT_LIMIT)

    def _take_image_back(self) -> None:
        """Close the answer in place of an image that was begun and has no room."""
        vocabulary = self._grammar.vocabulary
        del self.ids[len(self.ids) - 1 - self.ids[::-1].index(vocabulary.boi) :]
        self._close([vocabulary.ess, vocabulary.eos], self.request.overrun)

    def _close(self, closing: Sequence[int], stop: Stop) -> None:
        self.ids += closing
        self.state = self.state._replace(phase=Phase.ENDED)
        self.stop = stop
