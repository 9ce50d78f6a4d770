"""The grammar writes only what `parse_answer` reads without complaint, and reads all that `answer` writes."""

from __future__ import annotations

import numpy as np
import pytest

from emuworld.decoding.grammar import Forced, Grammar, GrammarState, Phase, SizeBounds, Span
from emuworld.tokens.sequence import AnswerSegment, answer, image_block, parse_answer
from emuworld.tokens.text import TextTokenizer
from emuworld.tokens.vocabulary import EMU35, builtin

TOKENIZER = TextTokenizer(
    {bytes([i]): i for i in range(256)}, vocabulary=builtin(num_text_tokens=256, num_visual_tokens=16)
)
V = TOKENIZER.vocabulary
DIGITS = [TOKENIZER.encode(digit)[0] for digit in "0123456789"]
STAR = TOKENIZER.encode("*")[0]
TEXT_PHASES = (Phase.START, Phase.TEXT, Phase.ANSWER_THOUGHT, Phase.IMAGE_THOUGHT)


def make_grammar(smallest: int = 1, largest: int = 12) -> Grammar:
    bounds = SizeBounds(smallest=smallest, largest=largest)
    return Grammar(V, digit_ids=DIGITS, star_id=STAR, bounds=bounds)


def choices(grammar: Grammar, state: GrammarState) -> list[int]:
    allowed = grammar.allowed(state)
    if isinstance(allowed, Forced):
        return [allowed.token]
    ids = np.arange(allowed.start, allowed.stop)
    return (ids if allowed.mask is None else ids[allowed.mask]).tolist()


def walk(grammar: Grammar, rng: np.random.Generator, size: tuple[int, int] | None) -> list[int]:
    """A random answer: control tokens are drawn as often as words, so that answers are short and eventful."""
    ids: list[int] = []
    state = grammar.start(size)
    while state.phase is not Phase.ENDED and len(ids) < 4000:
        options = choices(grammar, state)
        controls = [token for token in options if token in V.control_ids]
        if controls and len(controls) < len(options) and rng.random() < 0.5:
            options = controls
        token = int(rng.choice(options))
        ids.append(token)
        state = grammar.advance(state, token)
    return ids


@pytest.mark.parametrize("size", [None, (2, 3), (12, 1)])
def test_whatever_the_grammar_allows_parses_without_problems(size: tuple[int, int] | None) -> None:
    grammar, rng = make_grammar(), np.random.default_rng(0)
    num_images = 0
    for _ in range(60):
        parsed = parse_answer(walk(grammar, rng, size), tokenizer=TOKENIZER)
        assert parsed.ended
        assert not [problem for segment in parsed for problem in segment.problems]
        shapes = {segment.codes.shape for segment in parsed if segment.codes is not None}
        assert len(shapes) <= 1, "the first image fixes the size of the later ones"
        assert size is None or shapes <= {size}
        num_images += sum(segment.codes is not None for segment in parsed)
    assert num_images > 20


def test_every_well_formed_answer_is_accepted() -> None:
    rng = np.random.default_rng(1)
    for _ in range(50):
        shape = tuple(rng.integers(1, 13, 2))
        segments = [
            AnswerSegment(
                text=str(rng.choice(["", "go on", "näher 64*64"])),
                codes=rng.integers(0, 16, shape) if i < 3 else None,
                thought="a thought" if rng.random() < 0.3 else None,
            )
            for i in range(rng.integers(1, 5))
        ]
        ids, _ = answer(segments, tokenizer=TOKENIZER, thought="plan" if rng.random() < 0.3 else None)
        for size in (None, shape):
            grammar = make_grammar()
            state = grammar.advance_all(grammar.start(size), ids)
            assert state.phase is Phase.ENDED
            assert state.num_images == sum(segment.codes is not None for segment in segments)


def test_text_can_neither_draw_nor_break_the_structure() -> None:
    grammar = make_grammar()
    forbidden = {V.img, V.eoi, V.eol, V.eof, V.tms, V.bos, V.pad, V.bss}
    for phase in TEXT_PHASES:
        allowed = set(choices(grammar, GrammarState(phase, 0, 0, 0, 0, 0)))
        assert allowed >= set(range(256))
        assert not allowed & forbidden
        assert not any(V.is_visual(token) for token in allowed)


def test_thoughts_are_closed_before_anything_else() -> None:
    grammar = make_grammar()
    controls = {
        phase: set(choices(grammar, GrammarState(phase, 0, 0, 0, 0, 0))) - set(range(256))
        for phase in TEXT_PHASES
    }
    assert controls[Phase.START] == {V.bog, V.boc, V.boi, V.ess, V.eos}
    assert controls[Phase.TEXT] == {V.boc, V.boi, V.ess, V.eos}
    assert controls[Phase.ANSWER_THOUGHT] == {V.eog}
    assert controls[Phase.IMAGE_THOUGHT] == {V.eoc}


@pytest.mark.parametrize(("smallest", "largest"), [(1, 12), (8, 32), (10, 99), (7, 7), (95, 105), (1, 1)])
def test_free_sizes_are_exactly_those_within_bounds(smallest: int, largest: int) -> None:
    grammar = make_grammar(smallest, largest)

    def sides(state: GrammarState) -> set[int]:
        """All numbers that can be written before the phase ends."""
        found = set()
        for token in choices(grammar, state):
            if token in DIGITS:
                found |= sides(grammar.advance(state, token))
            else:
                found.add(state.number)
        return found

    state = grammar.advance(grammar.start(), V.boi)
    assert sides(state) == set(range(smallest, largest + 1))
    height = grammar.advance_all(state, [DIGITS[int(digit)] for digit in str(largest)])
    assert sides(grammar.advance(height, STAR)) == set(range(smallest, largest + 1))


def test_forced_size_and_separators_come_as_runs() -> None:
    grammar = make_grammar()
    state = grammar.advance(grammar.start((2, 11)), V.boi)
    run, state = grammar.forced_run(state)
    assert run == [*TOKENIZER.encode("2*11"), V.img]
    visual = grammar.allowed(state)
    assert isinstance(visual, Span)
    assert (visual.start, visual.stop, visual.visual) == (V.visual_start, V.visual_stop, True)
    state = grammar.advance_all(state, [V.visual_start] * 11)
    assert grammar.forced_run(state)[0] == [V.eol]
    state = grammar.advance_all(state, [V.eol, *[V.visual_start] * 11])
    assert grammar.forced_run(state)[0] == [V.eoi]


def test_closing_run_ends_any_text() -> None:
    grammar = make_grammar()
    for opening in ([], [V.bog], TOKENIZER.encode("words"), [V.boc, *TOKENIZER.encode("words")]):
        state = grammar.advance_all(grammar.start(), opening)
        ids = [*opening, *grammar.closing_run(state)]
        assert grammar.advance_all(grammar.start(), ids).phase is Phase.ENDED
        assert parse_answer(ids, tokenizer=TOKENIZER).ended


def test_published_vocabulary() -> None:
    """The published ids of digits and star (fact sheet, section 2); unnamed special ids cannot be drawn."""
    grammar = Grammar(EMU35, digit_ids=range(15, 25), star_id=9)
    span = grammar.allowed(grammar.start())
    assert isinstance(span, Span)
    assert span.mask is not None
    assert span.mask.sum() == 151643 + 5
    assert not span.mask[151644]
    assert span.stop <= EMU35.visual_start
    run, _ = grammar.forced_run(grammar.advance(grammar.start((64, 64)), EMU35.boi))
    assert run == [21, 19, 9, 21, 19, EMU35.img]


def test_wrong_tokens_and_sizes_are_refused() -> None:
    grammar = make_grammar()
    block = image_block(np.zeros((2, 2), np.int64), tokenizer=TOKENIZER)
    for wrong in ([V.visual_start], [V.eoi], [*block[:-1], V.eol], [V.ess, V.boi], [V.boi, DIGITS[0]]):
        with pytest.raises(ValueError, match="may not follow"):
            grammar.advance_all(grammar.start(), wrong)
    with pytest.raises(ValueError, match="has ended"):
        grammar.allowed(grammar.advance(grammar.start(), V.eos))
    with pytest.raises(ValueError, match=r"each side must lie in 1\.\.12"):
        grammar.start((13, 2))
    with pytest.raises(ValueError, match="finish the image"):
        grammar.closing_run(grammar.advance(grammar.start(), V.boi))
