"""The loop on a model whose scores hash all that a row has read: one token fed wrongly changes the rest."""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import numpy as np
import pytest
import torch

from emuworld.decoding.autoregressive import Request, generate
from emuworld.decoding.grammar import Grammar, SizeBounds
from emuworld.decoding.sampling import Sampling, Truncation
from emuworld.decoding.uniforms import TokenUniforms
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

    @property
    def num_rows(self) -> int:
        return len(self.held)

    @property
    def lengths(self) -> np.ndarray:
        return np.array([len(row) for row in self.held])

    def rows(self, indices: Sequence[int]) -> Rows:
        return Rows([self.held[i] for i in indices])


class HashModel:
    """The hidden state is the hash of the row's ids; the scores are random numbers with that seed."""

    device = torch.device("cpu")

    def __init__(self, boost: dict[int, float] | None = None) -> None:
        self.num_calls = 0
        self.boost = boost or {}

    def __call__(self, ids: torch.Tensor, *, cache: Rows) -> torch.Tensor:
        self.num_calls += 1
        hidden = torch.zeros(*ids.shape, 1, dtype=torch.float64)
        for row, held in enumerate(cache.held):
            for column, token in enumerate(ids[row].tolist()):
                held.append(token)
                hidden[row, column, 0] = self.state(held)
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


def run(
    requests: dict[int, Request],
    sampling: Sampling = PLAIN,
    model: HashModel | None = None,
    num_images: int = 1,
) -> tuple[dict[int, list[int]], Rows]:
    rows = [prompt(world) for world in requests]
    if sampling.guided:
        rows += [[V.bos, V.bss] for _ in requests]
    cache = Rows(rows)
    written = generate(
        model or HashModel({V.boi: 4.0}),  # type: ignore[arg-type]
        cache,  # type: ignore[arg-type]
        list(requests.values()),
        grammar=GRAMMAR,
        sampling=sampling,
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
    assert len({tuple(ids) for ids in together.values()}) == len(together)


@pytest.mark.parametrize("sampling", [PLAIN, GUIDED])
def test_answers_are_well_formed_and_begin_with_what_is_forced(sampling: Sampling) -> None:
    requests = mixed_requests()
    written, _ = run(requests, sampling)
    sizes = {0: (4, 5), 2: (2, 2), 4: (6, 3)}
    for world, ids in written.items():
        assert ids[: len(requests[world].forced)] == list(requests[world].forced)
        parsed = parse_answer(ids, tokenizer=TOKENIZER)
        assert not [problem for segment in parsed for problem in segment.problems]
        assert ids[-1] == (V.eos if parsed.ended else V.eoi)
        if world in sizes:
            assert parsed[0].codes is not None
            assert parsed[0].codes.shape == sizes[world]


def test_the_unguided_twin_reads_image_blocks_and_nothing_else() -> None:
    requests = mixed_requests()
    written, cache = run(requests, GUIDED, num_images=2)
    for i, ids in enumerate(written.values()):
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
    ids, model = written[7], HashModel({V.boi: 4.0})
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
    for ids in written.values():
        assert len(ids) == 40 + 2
        assert ids[-2:] == [V.ess, V.eos]
    thinking = HashModel({V.bog: 99.0, V.eog: -99.0})
    for ids in run(requests, PLAIN, thinking)[0].values():
        assert (ids[0], ids[-3:]) == (V.bog, [V.eog, V.ess, V.eos])


def test_several_images_share_the_first_ones_size() -> None:
    ids = run({0: request(0, size=None)}, PLAIN, HashModel({V.boi: 9.0}), num_images=3)[0][0]
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
        sampling=PLAIN,
        on_step=lambda written, expected: seen.append((written, expected)),
    )
    total = image_length((4, 5)) + image_length((2, 3))
    assert {expected for _, expected in seen} == {total}
    assert [written for written, _ in seen] == sorted({written for written, _ in seen})
    assert seen[-1] == (total, total)


def test_a_cache_of_the_wrong_height_is_refused() -> None:
    model, cache = HashModel(), Rows([[0]])
    with pytest.raises(ValueError, match="need 2 cache rows"):
        generate(model, cache, [request(0)], grammar=GRAMMAR, sampling=GUIDED)  # type: ignore[arg-type]
