"""The loop on a model whose scores hash all that a row has read: one token fed wrongly changes the rest."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch

from emuworld.decoding import cache_rows
from emuworld.decoding.autoregressive import Request, Stop, Written, generate, write
from emuworld.decoding.grammar import Grammar, SizeBounds
from emuworld.decoding.sampling import Sampling, Truncation
from emuworld.decoding.uniforms import TokenUniforms
from emuworld.model.config import sized
from emuworld.tokens.sequence import image_length, parse_answer
from emuworld.tokens.text import TextTokenizer
from emuworld.tokens.vocabulary import builtin

TOKENIZER = TextTokenizer(
    {bytes([i]): i for i in range(256)}, vocabulary=builtin(num_text_tokens=256, num_visual_tokens=16)
)
V = TOKENIZER.vocabulary
GRAMMAR = Grammar(
    V,
    digit_ids=[TOKENIZER.encode(digit)[0] for digit in "0123456789"],
    star_id=TOKENIZER.encode("*")[0],
    bounds=SizeBounds(smallest=2, largest=6),
)
PLAIN = Sampling()
GUIDED = Sampling(image=Truncation(top_k=8), guidance=2.5)


class Rows:
    """What a cache is to the loop: rows that hold ids."""

    def __init__(self, rows: Sequence[list[int]]) -> None:
        self.held = list(rows)

    capacity = 1 << 20
    config = sized("tiny", vocab_size=120, max_position_embeddings=1 << 20)

    @property
    def num_rows(self) -> int:
        return len(self.held)

    @property
    def lengths(self) -> np.ndarray:
        return np.array([len(row) for row in self.held])

    def rows(self, indices: Sequence[int]) -> Rows:
        return Rows([self.held[i] for i in indices])

    def truncate(self, row: int, length: int) -> None:
        del self.held[row][length:]

    def truncate_all(self, lengths: np.ndarray) -> None:
        for row, length in enumerate(lengths.tolist()):
            self.truncate(row, length)


class HashModel:
    """The hidden state is the hash of the row's ids; the scores are random numbers with that seed."""

    device = torch.device("cpu")

    def __init__(self, boost: dict[int, float] | None = None) -> None:
        self.num_calls = 0
        self.boost = boost or {}

    def __call__(
        self, ids: torch.Tensor, *, cache: Rows, advance_B: np.ndarray | None = None
    ) -> torch.Tensor:
        self.num_calls += 1
        hidden = torch.zeros(*ids.shape, 1, dtype=torch.float64)
        for row, held in enumerate(cache.held):
            length = len(held)
            for column, token in enumerate(ids[row].tolist()):
                held.append(token)
                hidden[row, column, 0] = self.state(held)
            if advance_B is not None and not advance_B[row]:
                del held[length:]
        return hidden

    def logits(self, hidden: torch.Tensor, *, start: int = 0, stop: int | None = None) -> torch.Tensor:
        return torch.stack([self.scores(int(h), start, stop) for h in hidden[:, 0].tolist()])

    def scores(self, state: int, start: int, stop: int | None) -> torch.Tensor:
        scores = np.random.default_rng(state).normal(size=V.size)
        for token, bonus in self.boost.items():
            scores[token] += bonus
        return torch.from_numpy(scores[start:stop])

    @staticmethod
    def state(ids: Sequence[int]) -> int:
        return zlib.crc32(np.array(ids, dtype=np.int64).tobytes())


def request(world: int, *, forced: Sequence[int] = (), size: tuple[int, int] | None = (4, 5)) -> Request:
    return Request(
        state=GRAMMAR.start(size),
        hidden_D=torch.tensor([HashModel.state(prompt(world))], dtype=torch.float64),
        uniforms=TokenUniforms(seed=world, step=0),
        forced=forced,
        max_text_tokens=40,
    )


def prompt(world: int) -> list[int]:
    return [V.bos, *range(world + 2), V.bss]


REFERENCE = [V.boi, V.img, V.eoi]  # what stands for a reference picture: no more than a mark


def run(
    requests: dict[int, Request],
    sampling: Sampling | Mapping[int, Sampling] = PLAIN,
    model: HashModel | None = None,
    num_images: int = 1,
    has_references: bool = False,
) -> tuple[dict[int, Written], Rows]:
    settings = dict.fromkeys(requests, sampling) if isinstance(sampling, Sampling) else sampling
    asked = [
        replace(
            one,
            sampling=settings[world],
            num_rows=settings[world].num_rows(has_references=has_references),
        )
        for world, one in requests.items()
    ]
    rows = [prompt(world) for world in requests]
    for rank, uncond in ((2, [V.bos, *REFERENCE * has_references, V.bss]), (3, [V.bos, V.bss])):
        rows += [list(uncond) for one in asked if one.num_rows >= rank]
    cache = Rows(rows)
    written = generate(
        model or HashModel({V.boi: 4.0}),  # type: ignore[arg-type]
        cache,  # type: ignore[arg-type]
        asked,
        grammar=GRAMMAR,
        num_images=num_images,
    )
    return dict(zip(requests, written, strict=True)), cache


def mixed_requests() -> dict[int, Request]:
    """Rows in different phases: forced texts of different lengths, free texts, forced and free sizes."""
    forced = [*TOKENIZER.encode("turn left"), V.boi]
    return {
        0: request(0, forced=forced),
        1: request(1),
        2: request(2, forced=[V.boi], size=(2, 2)),
        3: request(3, size=None),
        4: request(4, forced=forced, size=(6, 3)),
        5: request(5),
    }


@pytest.mark.parametrize("sampling", [PLAIN, GUIDED])
def test_rows_in_any_company_write_what_they_write_alone(sampling: Sampling) -> None:
    requests = mixed_requests()
    together, _ = run(requests, sampling)
    backwards, _ = run(dict(reversed(requests.items())), sampling)
    alone = {world: run({world: requests[world]}, sampling)[0][world] for world in requests}
    assert together == backwards == alone
    assert len({tuple(one.ids) for one in together.values()}) == len(together)


@pytest.mark.parametrize("sampling", [PLAIN, GUIDED])
def test_answers_are_well_formed_and_begin_with_what_is_forced(sampling: Sampling) -> None:
    requests = mixed_requests()
    written, _ = run(requests, sampling)
    sizes = {0: (4, 5), 2: (2, 2), 4: (6, 3)}
    for world, (ids, stop, _) in written.items():
        assert ids[: len(requests[world].forced)] == list(requests[world].forced)
        parsed = parse_answer(ids, tokenizer=TOKENIZER)
        assert not [problem for segment in parsed for problem in segment.problems]
        assert ids[-1] == (V.eos if parsed.ended else V.eoi)
        assert stop == ("end" if parsed.ended else "image")
        if world in sizes:
            assert parsed[0].codes is not None
            assert parsed[0].codes.shape == sizes[world]


def test_the_unguided_twin_reads_image_blocks_and_nothing_else() -> None:
    requests = mixed_requests()
    written, cache = run(requests, GUIDED, num_images=2)
    for i, (ids, *_) in enumerate(written.values()):
        blocks: list[int] = []
        inside = False
        for token in ids:
            inside = inside or token == V.boi
            if inside:
                blocks.append(token)
            inside = inside and token != V.eoi
        conditional, twin = cache.held[i], cache.held[len(requests) + i]
        read = twin[2:]
        assert read == blocks[: len(read)]
        # Both stop reading at the last draw: what a row stops behind is never fed.
        unread = len(prompt(i)) + len(ids) - len(conditional)
        assert conditional == [*prompt(i), *ids][: len(conditional)]
        if ids[-1] == V.eoi:
            assert unread == 2
            assert len(read) == len(blocks) - 2


def test_guidance_blends_the_two_rows() -> None:
    """Greedy with guidance picks the argmax of u + g (c - u), computed here from the two rows' hashes."""
    sampling = Sampling.greedy(guidance=2.5)
    written, _ = run({7: request(7, forced=[V.boi])}, sampling)
    ids, model = written[7].ids, HashModel({V.boi: 4.0})
    start = ids.index(V.img) + 1
    for position in range(start, len(ids)):
        if not V.is_visual(ids[position]):
            continue
        c, u = (
            torch.log_softmax(
                model.scores(model.state([*before, *ids[:position]]), V.visual_start, V.visual_stop).float(),
                0,
            )
            for before in (prompt(7), [V.bos, V.bss])
        )
        assert ids[position] == V.visual_start + int((u + 2.5 * (c - u)).argmax())


def test_forced_tokens_cost_no_step_of_their_own() -> None:
    """A 4 x 5 image: one call for the prefix, one for each visual token but the last; separators ride."""
    model = HashModel()
    run({0: request(0, forced=[*TOKENIZER.encode("turn left"), V.boi])}, PLAIN, model)
    assert model.num_calls == 1 + 4 * 5 - 1


def test_text_that_never_ends_is_closed() -> None:
    requests = {0: request(0), 1: request(1)}
    never = HashModel({V.boi: -99.0, V.ess: -99.0, V.eos: -99.0, V.boc: -99.0, V.bog: -99.0})
    written, _ = run(requests, PLAIN, never)
    for ids, stop, _ in written.values():
        assert stop == "text_limit"
        assert len(ids) == 40 + 2
        assert ids[-2:] == [V.ess, V.eos]
    thinking = HashModel({V.bog: 99.0, V.eog: -99.0})
    for ids, *_ in run(requests, PLAIN, thinking)[0].values():
        assert (ids[0], ids[-3:]) == (V.bog, [V.eog, V.ess, V.eos])


def test_several_images_share_the_first_ones_size() -> None:
    ids = run({0: request(0, size=None)}, PLAIN, HashModel({V.boi: 9.0}), num_images=3)[0][0].ids
    parsed = parse_answer(ids, tokenizer=TOKENIZER)
    shapes = [segment.codes.shape for segment in parsed if segment.codes is not None]
    assert len(shapes) == 3
    assert len(set(shapes)) == 1


def test_progress_rises_to_what_was_expected() -> None:
    seen: list[tuple[int, int]] = []
    requests = {0: request(0, forced=[V.boi]), 1: request(1, forced=[V.boi], size=(2, 3))}
    rows = Rows([prompt(0), prompt(1)])
    generate(
        HashModel(),  # type: ignore[arg-type]
        rows,  # type: ignore[arg-type]
        list(requests.values()),
        grammar=GRAMMAR,
        on_step=lambda written, expected: seen.append((written, expected)),
    )
    total = image_length((4, 5)) + image_length((2, 3))
    assert {expected for _, expected in seen} == {total}
    assert [written for written, _ in seen] == sorted({written for written, _ in seen})
    assert seen[-1] == (total, total)


def test_a_cache_of_the_wrong_height_is_refused() -> None:
    one = replace(request(0), sampling=GUIDED, num_rows=2)
    with pytest.raises(ValueError, match="need 2 cache rows, got 1"):
        generate(HashModel(), Rows([[0]]), [one], grammar=GRAMMAR)  # type: ignore[arg-type]


BLIND = Sampling.greedy(guidance=2.5, image_guidance=1.75)


def test_three_way_guidance_blends_three_rows() -> None:
    """Greedy picks the argmax of b + a (u - b) + g (c - u), from the hashes of rows made here by hand."""
    written, cache = run({7: request(7, forced=[V.boi])}, BLIND, num_images=2, has_references=True)
    ids, model = written[7].ids, HashModel({V.boi: 4.0})
    prefixes = (prompt(7), [V.bos, *REFERENCE, V.bss], [V.bos, V.bss])
    blocks: list[int] = []  # what the unguided rows have read
    inside, num_visual, changed = False, 0, 0
    for position, token in enumerate(ids):
        if V.is_visual(token):
            c, u, b = (
                torch.log_softmax(
                    model.scores(model.state([*before, *read]), V.visual_start, V.visual_stop).float(), 0
                )
                for before, read in zip(prefixes, (ids[:position], blocks, blocks), strict=True)
            )
            assert token == V.visual_start + int((b + 1.75 * (u - b) + 2.5 * (c - u)).argmax())
            changed += token != V.visual_start + int((u + 2.5 * (c - u)).argmax())
            num_visual += 1
        inside = inside or token == V.boi
        blocks += [token] * inside
        inside = inside and token != V.eoi
    assert (num_visual, cache.num_rows) == (2 * 4 * 5, 3)
    assert changed > 5, "the third row matters"


def test_image_guidance_without_references_is_the_form_with_two_rows() -> None:
    requests = mixed_requests()
    two, _ = run(requests, Sampling.greedy(guidance=2.5))
    three, cache = run(requests, BLIND)
    assert three == two
    assert cache.num_rows == 2 * len(requests)
    unguided, cache = run(requests, Sampling.greedy(image_guidance=1.75))
    assert unguided == run(requests, Sampling.greedy())[0]
    assert cache.num_rows == len(requests)


MIXED = {
    0: GUIDED,
    1: PLAIN,
    2: BLIND,
    3: Sampling(text=Truncation(temperature=0.5), image=Truncation(top_p=0.5), guidance=2.5),
    4: Sampling(image=Truncation(top_k=8), guidance=4.0, image_guidance=1.5),
    5: Sampling.greedy(guidance=2.5),
}


def test_worlds_of_different_settings_and_row_counts_share_a_batch() -> None:
    requests = mixed_requests()
    together, cache = run(requests, MIXED, has_references=True)
    assert cache.num_rows == 2 + 1 + 3 + 2 + 3 + 2
    for world, one in requests.items():
        assert run({world: one}, MIXED[world], has_references=True)[0][world] == together[world]
    assert run(dict(reversed(requests.items())), MIXED, has_references=True)[0] == together


def test_rows_that_ride_along_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a GPU does with rows that have nothing to read: they go through and do not advance. And with those
    that have more or less to read than others: they are filled up and cut back."""
    requests = mixed_requests()
    model, apart = HashModel(), HashModel()
    expected, cache = run(requests, MIXED, apart, has_references=True)
    monkeypatch.setattr(cache_rows, "rides_along", lambda device: True)
    written, together = run(requests, MIXED, model, has_references=True)
    assert written == expected
    assert together.held == cache.held
    assert model.num_calls < apart.num_calls


def test_passes_over_rows_of_many_lengths_fill_up_little_and_stay_inside_the_cache() -> None:
    cache = Rows([[0] * start for start in (10, 12, 0, 30, 5, 9)])
    lengths = {0: 8, 1: 26, 2: 300, 3: 270, 4: 262, 5: 60}
    most_tokens = cache_rows.tokens_at_once(cache.config)
    assert cache_rows.passes_over(lengths, cache=cache, most_tokens=most_tokens) == [  # type: ignore[arg-type]
        ([2, 3], 304),
        ([4], 272),
        ([5], 64),
        ([0, 1], 32),
    ]
    cache.capacity = 37  # row 3 has no room for the longest run, and row 1 none for whole steps of it
    lengths = {1: 21, 0: 20, 3: 7}
    found = cache_rows.passes_over(lengths, cache=cache, most_tokens=most_tokens)  # type: ignore[arg-type]
    assert found == [([0, 1], 25), ([3], 7)]
    lengths = {0: 100, 1: 89, 2: 60, 3: 59, 4: 50, 5: 48}
    cache = Rows([[] for _ in range(6)])
    cache.capacity = 1000
    found = cache_rows.passes_over(lengths, cache=cache, most_tokens=130)  # type: ignore[arg-type]
    assert found == [([0], 112), ([1], 96), ([2, 3], 64), ([4, 5], 64)]


def test_more_tokens_share_a_pass_of_a_small_model() -> None:
    """As many as fit into half a GiB of its widest activations: 256 rows of a picture of 256 px in one."""
    small = sized("small", vocab_size=120)
    large = replace(small, hidden_size=5120, intermediate_size=25_600)
    at_once = cache_rows.tokens_at_once(small)
    assert at_once > 256 * 304 and at_once * 2 * small.intermediate_size * 2 <= 512 << 20
    assert cache_rows.tokens_at_once(large) == 32_768


def test_news_add_up_to_what_is_written() -> None:
    """Also for images of a free size, whose head is told late, and for one that is taken back."""
    requests = {**mixed_requests(), 6: replace(request(6, size=None, forced=[V.boi]), max_tokens=12)}
    model, rows = HashModel({V.boi: 4.0}), Rows([prompt(world) for world in requests])
    writing = write(model, rows, list(requests.values()), grammar=GRAMMAR)  # type: ignore[arg-type]
    told: dict[int, list[int]] = {i: [] for i in range(len(requests))}
    while True:
        try:
            for i, ids in next(writing):
                told[i] += ids
        except StopIteration as end:
            assert list(told.values()) == [one.ids for one in end.value]
            assert end.value[-1] == Written([V.ess, V.eos], Stop.CONTEXT)
            break


def test_a_text_that_fills_its_room_is_closed_inside_it() -> None:
    never = HashModel({V.boi: -99.0, V.ess: -99.0, V.eos: -99.0, V.boc: -99.0, V.bog: -99.0})
    thinking = HashModel({V.bog: 99.0, V.eog: -99.0})
    for room in (0, 1, 2, 3, 4, 5, 17):
        for model in (never, thinking):
            one = replace(request(0), max_tokens=room, overrun=Stop.TOKEN_LIMIT)
            ids, stop, _ = run({0: one}, GUIDED, model)[0][0]
            assert stop == "token_limit"
            assert ids[-2:] == [V.ess, V.eos]
            assert max(room - 1, 2) <= len(ids) <= max(room, 2)
            assert (V.eog in ids) == (V.bog in ids)


def test_a_picture_is_drawn_where_it_fits_and_not_begun_where_not() -> None:
    words = TOKENIZER.encode("look")
    whole = len(words) + image_length((4, 5)) + 2  # the two tokens that end an answer stay free
    for size in ((4, 5), None):
        forced = [*words, V.boi]
        free = HashModel({TOKENIZER.encode("4")[0]: 50.0}) if size is None else HashModel()
        side = (4, 4) if size is None else (4, 5)
        whole = len(words) + image_length(side) + 2
        for room, drawn in ((whole, True), (whole - 1, False)):
            one = replace(request(0, forced=forced, size=size), max_tokens=room)
            ids, stop, _ = run({0: one}, GUIDED, free)[0][0]
            assert stop == ("image" if drawn else "context")
            assert ids[-1] == (V.eoi if drawn else V.eos)
            assert drawn or ids == [*words, V.ess, V.eos]
            assert len(ids) <= room


def test_a_long_text_makes_the_cache_grow() -> None:
    class Growing(Rows):
        capacity = 12

        def reserve(self, capacity: int) -> None:
            assert capacity > self.capacity
            self.capacity = capacity

    cache = Growing([prompt(0)])
    model = HashModel({V.boi: -99.0, V.ess: -99.0, V.eos: -99.0})
    generate(model, cache, [request(0)], grammar=GRAMMAR)  # type: ignore[arg-type]
    assert 40 < len(cache.held[0]) <= cache.capacity < 80


def test_numbers_of_a_run_are_those_of_its_places() -> None:
    uniforms = TokenUniforms(seed=3, step=1)
    for position, count in ((0, 5), (500, 30), (512, 3)):
        assert uniforms.image_run(2, position, count) == [
            uniforms.image(2, position + k) for k in range(count)
        ]
