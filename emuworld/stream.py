"""One segment, told while it is imagined: what the loop has written since it was last asked, as events."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import torch

from emuworld.decoding.autoregressive import Draft, News, Written
from emuworld.events import (
    Event,
    EventReader,
    ImageDone,
    ImageDraft,
    SegmentDone,
    TextPiece,
    ThoughtPiece,
)
from emuworld.pictures import Decode
from emuworld.segments import Plan, SegmentWriter
from emuworld.tokens.text import TextTokenizer


def stream(
    plan: Plan,
    *,
    writer: SegmentWriter,
    tokenizer: TextTokenizer,
    decode: Decode,
    lock: threading.RLock,
) -> Iterator[Event]:
    """See `WorldModel.stream`. The lock is held from one event to the next, and free while one is heard."""
    reader, writing = EventReader(tokenizer), writer.write([plan])
    try:
        written: Written | None = None
        while written is None:
            news: News = []
            with lock, torch.inference_mode():
                try:
                    news = next(writing)
                except StopIteration as end:
                    (written,) = end.value
            for one in news:
                if isinstance(one, Draft):
                    yield ImageDraft(codes=one.codes, done=one.done, num_passes=one.num_passes)
                else:
                    yield from reader.read(one[1])
    finally:
        with lock:
            writing.close()
    state, segment = writer.read(plan, written, decode=decode)
    if segment.image is not None:
        yield ImageDone(image=segment.image)
    yield SegmentDone(state=state, segment=segment)


def words_of(events: Iterator[Event]) -> str | None:
    """The words of a segment, heard until its picture begins; None where it has none."""
    words = []
    for event in events:
        if isinstance(event, TextPiece):
            words.append(event.text)
        elif isinstance(event, SegmentDone):
            return None if event.segment.image is None else event.segment.text
        elif not isinstance(event, ThoughtPiece):
            break
    return "".join(words)
