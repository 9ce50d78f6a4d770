"""How worlds fill the context: their ids checked, cut into chunks of a cache, and what room is left."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from emuworld.decoding.request import END_TOKENS
from emuworld.manifest import Manifest
from emuworld.readings import Reading, Readings
from emuworld.state import (
    ContextFull,
    SnapshotError,
    WorldState,
    block_codes,
    image_blocks,
    split_chunks,
)
from emuworld.tokens.sequence import MODES, image_length, unconditional_ids
from emuworld.tokens.text import TextTokenizer
from emuworld.tokens.token_ids import TokenIds
from emuworld.tokens.vision import DOWNSAMPLE


@dataclass(frozen=True, kw_only=True, eq=False)
class Context:
    """The context of one model (named by `fingerprint`). `max_tokens`: its length, prompt and answer
    together."""

    manifest: Manifest
    tokenizer: TextTokenizer
    fingerprint: bytes
    max_tokens: int
    _known: Readings = field(default_factory=Readings, init=False, repr=False)

    def check(self, state: WorldState) -> None:
        """Raise unless the state is one of this model's and its ids are ids.

        Raises:
            SnapshotError: a state of another model, or a damaged one.
            ValueError: no state at all.
        """
        if not isinstance(state, WorldState):
            raise ValueError(
                f"expected a WorldState, got {type(state).__name__}; read bytes with WorldState.from_bytes"
            )
        if self._known.get(state) is not None:
            return
        if state.fingerprint != self.fingerprint:
            raise SnapshotError(
                f"the state belongs to model {state.fingerprint.hex()}, this one is "
                f"{self.fingerprint.hex()}; load the checkpoint that made it"
            )
        ids = state.ids.numbers
        if len(state.prompt_ids) == 0 or ids.min() < 0 or ids.max() >= self.manifest.vocabulary.size:
            raise SnapshotError(
                "the state holds ids that this model does not have; it is damaged, save it again"
            )
        if state.mode not in MODES:
            raise SnapshotError(f"the state's mode {state.mode!r} is none of {', '.join(MODES)}")
        if state.size is not None:
            self.manifest.check_size(state.size)
        self._known.put(state, [])

    def readings(self, state: WorldState, *, num_rows: int) -> list[Reading]:
        """What each row of a world has read: the conditional, the unguided, the blind one."""
        known = self._known.get(state)
        rows = [] if known is None else known
        for row in range(len(rows), num_rows):
            chunks = (
                self.unguided_chunks(state, with_references=row == 1)
                if row
                else self.conditional_chunks(state)
            )
            rows.append(Reading(chunks))
        return rows[:num_rows]

    def read_on(self, state: WorldState, ids: TokenIds, *, block_tokens: int = 0) -> list[Reading]:
        """What is known of its rows once these ids of an answer stand behind it; nothing where they do not
        begin and end with a whole chunk. `block_tokens`: length of the only picture in them, at their end;
        0: pictures have to be looked for.
        """
        vocabulary, known, answer = self.manifest.vocabulary, self._known.get(state), state.answer_ids
        if not known or not ids or ids[-1] != vocabulary.eoi or (answer and answer[-1] != vocabulary.eoi):
            return []
        chunks = [ids] if block_tokens else split_chunks(ids, eoi=vocabulary.eoi)
        blocks: list[TokenIds] = []
        if len(known) > 1:
            blocks = [ids[-block_tokens:]] if block_tokens else image_blocks(ids, vocabulary)
        return [Reading(blocks if row else chunks, before=before) for row, before in enumerate(known)]

    def remember(self, state: WorldState, rows: list[Reading]) -> None:
        """Of a state that this model has made."""
        if rows:
            self._known.put(state, rows)

    def conditional_chunks(self, state: WorldState) -> list[TokenIds]:
        """The prompt, then the answer cut behind every EOI: what the conditional row has read."""
        return [state.prompt_ids, *split_chunks(state.answer_ids, eoi=self.manifest.vocabulary.eoi)]

    def has_references(self, state: WorldState) -> bool:
        """Whether there are pictures in the prompt."""
        return self.manifest.vocabulary.boi in state.prompt_ids

    def unguided_chunks(self, state: WorldState, *, with_references: bool = True) -> list[TokenIds]:
        """The unconditional prompt, with the reference pictures or without, then the pictures drawn; no
        words."""
        vocabulary = self.manifest.vocabulary
        blocks = image_blocks(state.prompt_ids, vocabulary) if with_references else []
        references = [block_codes(block, vocabulary) for block in blocks]
        prompt = unconditional_ids(references, tokenizer=self.tokenizer)
        return [TokenIds(prompt), *image_blocks(state.answer_ids, vocabulary)]

    def last_picture(self, state: WorldState) -> NDArray[np.int64] | None:
        """Codes [h, w] of the last picture in the prompt and the answer; None: there is none."""
        for ids in (state.answer_ids, state.prompt_ids):
            if blocks := image_blocks(ids, self.manifest.vocabulary):
                return block_codes(blocks[-1], self.manifest.vocabulary)
        return None

    def text_tokens(self, text: str | None) -> int:
        """Tokens of a text; of one that the model is still to write (None), at least one."""
        return 1 if text is None else len(self.tokenizer.encode(text))

    def block_tokens(self, size: tuple[int, int] | None) -> int:
        """Length of a picture's block (`size` in pixels); the longest there is where the size is open."""
        largest = self.manifest.bounds.largest
        return image_length(in_tokens(size) or (largest, largest))

    def free_tokens(self, state: WorldState, *, num_text_tokens: int = 0) -> int:
        """What is left behind so much text, a picture and the end of the answer; below 0: they do not fit."""
        used = state.num_tokens + num_text_tokens
        return self.max_tokens - used - self.block_tokens(state.size) - END_TOKENS

    def require(self, state: WorldState, *, num_text_tokens: int = 0) -> int:
        """`free_tokens`, or ContextFull where it is below 0."""
        free = self.free_tokens(state, num_text_tokens=num_text_tokens)
        if free < 0:
            needed = num_text_tokens + self.block_tokens(state.size) + END_TOKENS
            raise ContextFull(
                f"the context of {self.max_tokens} tokens is full: {state.num_tokens} are used, and a text "
                f"of {num_text_tokens} with a picture needs {needed} more; begin a new world from the last "
                "picture, say it in fewer words, or take smaller pictures"
            )
        return free


def in_tokens(size: tuple[int, int] | None) -> tuple[int, int] | None:
    """A size in pixels as one in visual tokens."""
    return None if size is None else (size[0] // DOWNSAMPLE, size[1] // DOWNSAMPLE)
