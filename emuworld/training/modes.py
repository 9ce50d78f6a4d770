"""Stories of every mode but walks -> one training example each: which prompt, which pictures, what is learnt.

What a prompt looks like is what the environments ask: x2i is asked an instruction about one picture or, at
first, about all reference pictures; vla, story and howto go on from a question and at most one picture. A
story that is longer than the example begins in its middle, or is cut off without the end of the answer.
Pure functions; `examples.py` draws and batches.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from emuworld.tokens.sequence import AnswerSegment, answer, prompt_ids, unconditional_ids
from emuworld.tokens.text import TextTokenizer
from emuworld.training.data import TokenStory

ANSWERED_KINDS = ("story", "howto", "vla")  # a question, and an answer of text and pictures in turn
TABLE_KINDS = ("pictures-table", "vla")  # what t2i learns table-tops from


@dataclasses.dataclass(frozen=True, kw_only=True)
class Example:
    """One row: its ids, and how many of them belong to the prompt that is not learnt. `edited_size`: height
    and width of the pictures in codes where each is the one before with something changed; else None.
    """

    ids: list[int]
    prompt_tokens: int = 0
    edited_size: tuple[int, int] | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shares:
    """What is drawn at random about an example, as shares of all.

    `unconditional`: rows as the unguided twin sees them, pictures only. `midway`: vla stories that begin in
    their middle; `picture_first`: stories and guides that begin from a given picture.
    """

    unconditional: float
    midway: float
    picture_first: float


def edit_steps(story: TokenStory, pictures: int) -> list[int]:
    """Indices of the pictures of a story that answer an edit of `pictures` - 1 pictures."""
    steps = range(story.num_references, len(story.codes))
    return [at for at in steps if len(edit_references(story, at)) == pictures - 1]


def edit_references(story: TokenStory, at: int) -> np.ndarray:
    """Codes of what picture `at` is an edit of: the reference pictures, later the picture before."""
    first = 0 if at == story.num_references else at - 1
    return story.codes[first:at].astype(np.int64)


def edit_example(
    story: TokenStory, at: int, rng: np.random.Generator, *, shares: Shares, tokenizer: TextTokenizer
) -> Example:
    """The edit that gives picture `at`. Unconditional rows see the references, or (for guidance by pictures)
    not even them.
    """
    references = edit_references(story, at)
    if rng.random() < shares.unconditional:
        shown = references if rng.random() < 0.5 else references[:0]
        prompt = unconditional_ids(shown, tokenizer=tokenizer)
    else:
        prompt = prompt_ids("x2i", question=story.texts[at], images=references, tokenizer=tokenizer)
    picture = AnswerSegment(codes=story.codes[at].astype(np.int64))
    return Example(
        ids=prompt + answer([picture], tokenizer=tokenizer)[0],
        prompt_tokens=len(prompt),
        edited_size=_size(story),
    )


def answer_example(
    story: TokenStory,
    rng: np.random.Generator,
    *,
    frames: int,
    max_tokens: int,
    shares: Shares,
    tokenizer: TextTokenizer,
) -> Example:
    """A question and the answer's segments, at most `frames` pictures in at most `max_tokens` ids.

    Raises ValueError where not even one segment fits.
    """
    first = _first_step(story, rng, shares)
    from_picture = first > story.num_references or (
        story.num_references > 0 and (story.kind == "vla" or rng.random() < shares.picture_first)
    )
    shown = story.codes[first - 1 : first].astype(np.int64) if from_picture else story.codes[:0]
    unconditional = rng.random() < shares.unconditional
    if unconditional:
        prompt = unconditional_ids(shown, tokenizer=tokenizer)
    else:
        prompt = prompt_ids(story.kind, question=story.question, images=shown, tokenizer=tokenizer)
    for stop in range(min(len(story.codes), first + frames - len(shown)), first, -1):
        ids = prompt + _segments(story, first, stop, worded=not unconditional, tokenizer=tokenizer)
        if len(ids) <= max_tokens:
            edited_size = None if story.kind == "story" else _size(story)
            return Example(ids=ids, prompt_tokens=len(prompt), edited_size=edited_size)
    raise ValueError(
        f"no step of a {story.kind} story fits {max_tokens} tokens and {frames} pictures; the question has "
        f"{len(story.question)} characters: use longer rows"
    )


def _first_step(story: TokenStory, rng: np.random.Generator, shares: Shares) -> int:
    """Index of the picture that is answered first; later than the first one where the example begins midway.

    Stories and guides that have no reference picture begin from a picture only by beginning midway.
    """
    start = story.num_references
    midway = shares.midway
    if story.kind != "vla":
        midway = shares.picture_first / 2
    if len(story.codes) - start < 2 or rng.random() >= midway:
        return start
    return int(rng.integers(start + 1, len(story.codes)))


def _segments(
    story: TokenStory, first: int, stop: int, *, worded: bool, tokenizer: TextTokenizer
) -> list[int]:
    segments = [
        AnswerSegment(text=story.texts[at] if worded else "", codes=story.codes[at].astype(np.int64))
        for at in range(first, stop)
    ]
    # Who asked nothing is never done: subtasks that nobody ordered stop anywhere.
    ended = stop == len(story.codes) and bool(story.question)
    return answer(segments, tokenizer=tokenizer, ended=ended)[0]


def table_example(
    story: TokenStory, rng: np.random.Generator, *, shares: Shares, tokenizer: TextTokenizer
) -> Example:
    """A picture of a table-top from its caption; a robot's first picture from its instruction too, because
    the vla environment paints its start from that.
    """
    questions = [(caption, at) for at, caption in enumerate(story.captions) if caption]
    if story.kind == "vla" and story.question and (not questions or rng.random() < 0.5):
        questions = [(story.question, 0)]
    if not questions:
        raise ValueError("a table-top story has no captions; build the shards with captions")
    question, at = questions[int(rng.integers(len(questions)))]
    if rng.random() < shares.unconditional:
        prompt = unconditional_ids(tokenizer=tokenizer)
    else:
        prompt = prompt_ids("t2i", question=question, tokenizer=tokenizer)
    picture = AnswerSegment(codes=story.codes[at].astype(np.int64))
    return Example(ids=prompt + answer([picture], tokenizer=tokenizer)[0], prompt_tokens=len(prompt))


def change_gains(
    codes: np.ndarray, *, size: tuple[int, int], weight: float, begin_weight: float = 1.0
) -> np.ndarray:
    """How much each code [N] of a row of pictures of `size` (height, width) counts: `weight` times as much
    where the picture before has another one at the same place, and `begin_weight` times as much again where
    that begins: none of its neighbours that are drawn before it (left, and the three above) is another one.
    The mean over a picture is 1, so that it counts no more than others; 1 in the first picture and in one
    that is cut off.
    """
    a_picture = size[0] * size[1]
    pictures = codes[: len(codes) // a_picture * a_picture].reshape(-1, *size)
    changed = pictures[1:] != pictures[:-1]
    padded = np.pad(changed, ((0, 0), (1, 0), (1, 1)))  # a row above, a column on either side
    earlier = padded[:, 1:, :-2] | padded[:, :-1, :-2] | padded[:, :-1, 1:-1] | padded[:, :-1, 2:]
    counts = np.where(changed, weight, 1.0) * np.where(changed & ~earlier, begin_weight, 1.0)
    gains = np.ones(len(codes))
    gains[a_picture : pictures.size] = (counts / counts.mean((1, 2), keepdims=True)).ravel()
    return gains


def _size(story: TokenStory) -> tuple[int, int]:
    return story.codes.shape[1], story.codes.shape[2]


def of_kinds(stories: Sequence[TokenStory], kinds: Sequence[str]) -> list[int]:
    """Indices of the stories of some kinds."""
    return [index for index, story in enumerate(stories) if story.kind in kinds]
