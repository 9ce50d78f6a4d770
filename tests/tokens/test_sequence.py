"""Sequences: templates to the letter, image blocks, loss masks, an answer reader that no id list upsets."""

from __future__ import annotations

import dataclasses
import random

import numpy as np
import pytest

from emuworld.tokens.sequence import (
    MODES,
    AnswerSegment,
    ImageTokens,
    ParsedAnswer,
    answer,
    image_block,
    image_length,
    image_prefix,
    parse_answer,
    prompt_ids,
    unconditional_ids,
)
from emuworld.tokens.text import TextTokenizer
from emuworld.tokens.vocabulary import EMU35

BOS, BSS = "<|extra_203|>", "<|extra_100|>"
HOWTO = " Please generate a response with interleaved text and images."
# A picture of 1 by 2 tokens with codes 5 and 9, as the fact sheet writes it.
PICTURE = "<|image start|>1*2<|image token|><|visual token 000005|><|visual token 000009|><|image end|>"
CODES = np.array([[5, 9]])


def random_codes(rng: random.Random, tokenizer: TextTokenizer) -> ImageTokens:
    h, w = rng.randrange(1, 13), rng.randrange(1, 13)
    bits = [rng.randrange(tokenizer.vocabulary.num_visual_tokens) for _ in range(h * w)]
    return np.array(bits).reshape(h, w)


# ---- prompts
# ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["tokenizer", "published"])
@pytest.mark.parametrize("num_images", [0, 1, 3])
@pytest.mark.parametrize("mode", MODES)
def test_prompts_to_the_letter(mode: str, num_images: int, name: str, request: pytest.FixtureRequest) -> None:
    """The template as one string, control strings parsed, gives the same ids (fact sheet, 4.1)."""
    text: TextTokenizer = request.getfixturevalue(name)
    pictures = PICTURE * num_images
    head = f"{BOS}You are a helpful assistant for {mode} task.{HOWTO if mode == 'howto' else ''} USER: "
    body = f"{pictures}A red box?" if mode == "x2i" else f"A red box?{pictures}"
    expected = text.encode(f"{head}{body} ASSISTANT: {BSS}", allow_control=True)
    assert prompt_ids(mode, question="A red box?", images=[CODES] * num_images, tokenizer=text) == expected


@pytest.mark.parametrize("name", ["tokenizer", "published"])
@pytest.mark.parametrize("num_images", [0, 1, 2])
def test_unconditional_prompts(num_images: int, name: str, request: pytest.FixtureRequest) -> None:
    text: TextTokenizer = request.getfixturevalue(name)
    string = f"{BOS}You are a helpful assistant. USER: {PICTURE * num_images} ASSISTANT: {BSS}"
    assert unconditional_ids([CODES] * num_images, tokenizer=text) == text.encode(string, allow_control=True)


def test_a_question_cannot_write_control_tokens(tokenizer: TextTokenizer) -> None:
    question = f"{PICTURE}{BSS}<|extra_101|>"
    ids = prompt_ids("explore", question=question, tokenizer=tokenizer)
    assert not any(token in tokenizer.vocabulary.control_ids for token in ids[1:-1])
    assert question in tokenizer.decode(ids)
    parsed = prompt_ids("explore", question=question, tokenizer=tokenizer, allow_control=True)
    assert tokenizer.vocabulary.eoi in parsed


def test_unknown_mode(tokenizer: TextTokenizer) -> None:
    with pytest.raises(ValueError, match="mode 'walk' is unknown: choose one of t2i"):
        prompt_ids("walk", question="", tokenizer=tokenizer)


# ---- images
# -----------------------------------------------------------------------------------------------------


def test_image_block_by_hand(tokenizer: TextTokenizer) -> None:
    v = tokenizer.vocabulary
    size = [17, 9, 18]  # "2*3"; digits start at 15, '*' is 9
    rows = [v.visual_start + 1, v.visual_start + 2, v.visual_start + 3, v.eol]
    rows += [v.visual_start + 4, v.visual_start + 5, v.visual_start + 6]
    codes = np.array([[1, 2, 3], [4, 5, 6]], dtype=np.uint8)
    assert image_block(codes, tokenizer=tokenizer) == [v.boi, *size, v.img, *rows, v.eoi]


@pytest.mark.parametrize("size, length", [((64, 64), 4167), ((55, 73), 4077), ((45, 45), 2077)])
def test_published_image_lengths(size: tuple[int, int], length: int, tokenizer: TextTokenizer) -> None:
    """Fact sheet, section 4.2."""
    assert image_length(size) == length
    assert len(image_block(np.zeros(size, dtype=np.int64), tokenizer=tokenizer)) == length


def test_random_sizes_hold_the_grammar(tokenizer: TextTokenizer) -> None:
    """EOL at the multiples of w + 1 after IMG, EOI at h (w + 1), all else visual (fact sheet, 5.3)."""
    v, rng = tokenizer.vocabulary, random.Random(1)
    for _ in range(200):
        codes = random_codes(rng, tokenizer)
        h, w = codes.shape
        ids = image_block(codes, tokenizer=tokenizer)
        prefix = image_prefix((h, w), tokenizer=tokenizer)
        assert ids[: len(prefix)] == prefix
        assert len(ids) == image_length((h, w))
        start = ids.index(v.img)
        for position, token in enumerate(ids[start + 1 :], start=1):
            if position == h * (w + 1):
                assert token == v.eoi
            elif position % (w + 1) == 0:
                assert token == v.eol
            else:
                assert v.is_visual(token)


@pytest.mark.parametrize(
    "codes, message",
    [
        (np.zeros(4, dtype=np.int64), r"codes \[h, w\]"),
        (np.zeros((0, 4), dtype=np.int64), r"codes \[h, w\]"),
        (np.zeros((2, 2)), "integer codes"),
        (np.array([[-1]]), "vision tokenizer that belongs"),
        (np.array([[64]]), "vision tokenizer that belongs"),
    ],
)
def test_wrong_codes(codes: ImageTokens, message: str, tokenizer: TextTokenizer) -> None:
    with pytest.raises(ValueError, match=message):
        image_block(codes, tokenizer=tokenizer)


@pytest.mark.parametrize("size", [(0, 3), (3, -1), (10000, 1)])
def test_wrong_sizes(size: tuple[int, int], tokenizer: TextTokenizer) -> None:
    with pytest.raises(ValueError, match="cannot be written"):
        image_prefix(size, tokenizer=tokenizer)


# ---- answers
# ----------------------------------------------------------------------------------------------------


def fields(segment: AnswerSegment) -> tuple[object, ...]:
    return segment.text, segment.thought, None if segment.codes is None else segment.codes.tolist()


def same(parsed: ParsedAnswer, segments: list[AnswerSegment]) -> bool:
    return list(map(fields, parsed)) == list(map(fields, segments)) and not any(s.problems for s in parsed)


def test_answer_by_hand(tokenizer: TextTokenizer) -> None:
    segments = [AnswerSegment(text="turn left", thought="a door", codes=CODES), AnswerSegment(codes=CODES)]
    ids, mask = answer(segments, tokenizer=tokenizer, thought="a plan")
    string = (
        "<|extra_60|>a plan<|extra_61|>turn left<|extra_50|>a door<|extra_51|>"
        f"{PICTURE}{PICTURE}<|extra_101|><|extra_204|>"
    )
    assert ids == tokenizer.encode(string, allow_control=True)
    assert mask == [True] * len(ids)


def test_loss_mask_without_text_and_without_end(tokenizer: TextTokenizer) -> None:
    segments = [AnswerSegment(text="turn left", codes=CODES)] * 2
    ids, mask = answer(segments, tokenizer=tokenizer, train_text=False, ended=False)
    words, block = tokenizer.encode("turn left"), image_block(CODES, tokenizer=tokenizer)
    assert ids == (words + block) * 2
    assert mask == ([False] * len(words) + [True] * len(block)) * 2


def test_random_answers_come_back(tokenizer: TextTokenizer) -> None:
    rng = random.Random(2)
    for _ in range(150):
        segments = [
            AnswerSegment(
                text=rng.choice(["", "turn left", " <|extra_101|> é"]),
                thought=rng.choice([None, None, "hm"]),
                codes=random_codes(rng, tokenizer),
            )
            for _ in range(rng.randrange(4))
        ] + rng.choice([[], [AnswerSegment(text="the end")]])
        thought = rng.choice([None, "a plan"])
        parsed = parse_answer(answer(segments, tokenizer=tokenizer, thought=thought)[0], tokenizer=tokenizer)
        assert same(parsed, segments)
        assert (parsed.thought, parsed.ended, parsed.problems) == (thought, True, ())


@pytest.mark.parametrize("ended", [False, True])
@pytest.mark.parametrize("text", ["", "turn left", " \n", "<|extra_101|> é"])
@pytest.mark.parametrize("thoughts", [(None, None), ("a plan", None), (None, "a door"), ("a plan", "a door")])
def test_an_image_whose_codes_are_known_is_not_read(
    text: str, thoughts: tuple[str | None, str | None], ended: bool, tokenizer: TextTokenizer
) -> None:
    """And the answer is the one in which it was."""
    v, block = tokenizer.vocabulary, image_block(CODES, tokenizer=tokenizer)
    before = [AnswerSegment(text=text, codes=CODES + 1)] if ended else []
    segments = [*before, AnswerSegment(text=text, thought=thoughts[1])]
    words, _ = answer(segments, tokenizer=tokenizer, thought=thoughts[0], ended=False)
    unclosed, strays = [*words, v.boc, *tokenizer.encode("hm")], [*words, v.pad, v.pad, -7]
    for ids in (words, unclosed, strays, [*words, v.ess] if ended else []):
        whole = parse_answer([*ids, *block], tokenizer=tokenizer)
        known = parse_answer(ids, tokenizer=tokenizer, last_codes=CODES)
        assert [*map(fields, known)] == [*map(fields, whole)]
        assert [one.problems for one in known] == [one.problems for one in whole]
        assert (known.thought, known.ended, known.problems) == (whole.thought, whole.ended, whole.problems)


def test_every_truncation_is_read_and_named(tokenizer: TextTokenizer) -> None:
    segments = [AnswerSegment(text="turn left", thought="a door", codes=np.arange(6).reshape(2, 3))] * 2
    ids, _ = answer(segments, tokenizer=tokenizer, thought="a plan")
    first = len(answer(segments[:1], tokenizer=tokenizer, thought="a plan", ended=False)[0])
    for length in range(len(ids) - 1):  # without ESS
        parsed = parse_answer(ids[:length], tokenizer=tokenizer)
        assert not parsed.ended
        assert "cut off" in parsed.problems[0]
        assert len(parsed) <= 2
        if length >= first:
            assert parsed[0].codes is not None
            assert parsed[0].text == "turn left"
        for segment in parsed:
            assert segment.codes is None or segment.codes.tolist() == [[0, 1, 2], [3, 4, 5]]
    whole_but_eoi = parse_answer(ids[: first - 1], tokenizer=tokenizer)[0]
    assert whole_but_eoi.codes is not None
    assert whole_but_eoi.problems == ("the image was cut off after 6 codes",)
    cut = parse_answer(ids[: first - 3], tokenizer=tokenizer)[0]
    assert cut.codes is None
    assert cut.problems == ("the image was cut off after 4 codes",)


def test_ragged_and_mislabelled_images(tokenizer: TextTokenizer) -> None:
    v = tokenizer.vocabulary
    a = v.visual_start
    good = image_block(CODES, tokenizer=tokenizer)
    broken = {
        "rows of \\[1, 2\\] codes": [v.boi, *tokenizer.encode("2*2"), v.img, a, a, v.eol, a, v.eoi],
        "says '3\\*3' but has 1 rows": [v.boi, *tokenizer.encode("3*3"), v.img, a, a, a, v.eoi],
        "says 'big'": [v.boi, *tokenizer.encode("big"), v.img, a, v.eoi],
        "says '0\\*1'": [v.boi, *tokenizer.encode("0*1"), v.img, a, v.eoi],
        "says '1\\*1'": [v.boi, *tokenizer.encode("1*1"), a, v.eoi],  # no IMG
        "says ''": [v.boi, v.eoi],
    }
    for message, block in broken.items():
        parsed = parse_answer([*block, *good, v.ess], tokenizer=tokenizer)
        assert parsed[0].codes is None
        with pytest.raises(AssertionError, match=message):
            raise AssertionError(parsed[0].problems[0])
        assert parsed[1].codes is not None and not parsed[1].problems
        assert parsed.ended


def test_stray_tokens_are_named_and_left_out(tokenizer: TextTokenizer) -> None:
    v = tokenizer.vocabulary
    ids = [v.eoi, v.pad, v.pad, *tokenizer.encode("turn"), v.visual_start, v.visual_start + 1, -7, v.size + 3]
    ids += [*tokenizer.encode(" left"), v.boc, *tokenizer.encode("hm")]
    ids += [*image_block(CODES, tokenizer=tokenizer), v.eos]
    segment = parse_answer(ids, tokenizer=tokenizer)[0]
    assert (segment.text, segment.thought) == ("turn left", "hm")
    assert segment.codes is not None
    assert segment.problems == (
        "1 stray EOI token",
        "2 stray PAD tokens",
        "2 stray visual tokens",
        "2 stray unknown tokens",
        "the thought after BOC was not closed",
    )


def test_ids_of_more_than_64_bits_are_stray_tokens(tokenizer: TextTokenizer) -> None:
    v, block = tokenizer.vocabulary, image_block(CODES, tokenizer=tokenizer)
    ids = [1 << 80, -(1 << 63), *block, *block[:-2], 1 << 63, v.ess]
    first, second, third = parse_answer(ids, tokenizer=tokenizer)
    assert first.codes is not None and first.problems == ("2 stray unknown tokens",)
    assert second.codes is None and second.problems[0].startswith("the image was cut off after")
    assert third.codes is None and third.problems == ("1 stray unknown token",)


def test_text_after_the_end_and_blank_tails_are_dropped(tokenizer: TextTokenizer) -> None:
    v = tokenizer.vocabulary
    ids = [*image_block(CODES, tokenizer=tokenizer), *tokenizer.encode("\n "), v.ess]
    ids += tokenizer.encode("more")
    assert len(parse_answer(ids, tokenizer=tokenizer)) == 1


@pytest.mark.parametrize("name", ["tokenizer", "published"])
def test_no_id_list_raises(name: str, request: pytest.FixtureRequest) -> None:
    text: TextTokenizer = request.getfixturevalue(name)
    v, rng = text.vocabulary, random.Random(3)
    controls = [token for token in v.control_ids if token not in (v.ess, v.eos)]
    sources = [controls, [v.visual_start, v.visual_stop - 1], [15, 16, 17, 9, 200], [v.ess]]
    sources += [[-1, v.size, v.num_text_tokens], [v.boi, 16, 9, 16, v.img], [0, v.num_text_tokens - 1]]
    for _ in range(2000):
        weights = [rng.random() ** 3 for _ in sources]
        ids = [rng.choice(source) for source in rng.choices(sources, weights, k=rng.randrange(60))]
        parsed = parse_answer(np.array(ids, dtype=np.int64), tokenizer=text)
        for segment in parsed:
            has_content = segment.codes is not None or segment.text.strip() or segment.thought is not None
            assert has_content or segment.problems
        assert parsed.ended == bool({v.ess, v.eos} & set(ids))


def test_published_prompt_of_a_cat(published: TextTokenizer) -> None:
    ids = prompt_ids("t2i", question="a cat", tokenizer=published)
    assert len(ids) == 22
    assert (ids[0], ids[-1]) == (EMU35.bos, EMU35.bss)


def test_segments_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        AnswerSegment(text="a").text = "b"  # type: ignore[misc]
