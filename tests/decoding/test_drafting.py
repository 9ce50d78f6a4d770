"""Windows draw what token by token draws: the same tokens for any window, the distribution by definition."""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch

from emuworld.decoding import autoregressive, cache_rows
from emuworld.decoding.autoregressive import Request, Written, generate, write
from emuworld.decoding.drafting import exponentials
from emuworld.decoding.grammar import Grammar, SizeBounds
from emuworld.decoding.sampling import MAX_DRAFT_WINDOW, Sampling, Truncation, guide, race
from emuworld.decoding.uniforms import TokenUniforms
from emuworld.model.cache import StaticCache
from emuworld.model.config import sized
from emuworld.model.exact import ExactTransformer, exact
from emuworld.model.transformer import Transformer, TransformerConfig
from emuworld.tokens.text import TextTokenizer
from emuworld.tokens.vocabulary import builtin

TOKENIZER = TextTokenizer(
    {bytes([i]): i for i in range(256)}, vocabulary=builtin(num_text_tokens=256, num_visual_tokens=4)
)
V = TOKENIZER.vocabulary
GRAMMAR = Grammar(
    V,
    digit_ids=[TOKENIZER.encode(digit)[0] for digit in "0123456789"],
    star_id=TOKENIZER.encode("*")[0],
    bounds=SizeBounds(smallest=1, largest=9),
)
CPU = torch.device("cpu")


class HeldRows:
    """A cache that holds ids."""

    capacity = 1 << 20
    config = sized("tiny", vocab_size=120, max_position_embeddings=capacity)

    def __init__(self, rows: Sequence[list[int]]) -> None:
        self.held = list(rows)

    @property
    def num_rows(self) -> int:
        return len(self.held)

    @property
    def lengths(self) -> np.ndarray:
        return np.array([len(row) for row in self.held])

    def rows(self, indices: Sequence[int]) -> HeldRows:
        return HeldRows([self.held[i] for i in indices])

    def truncate(self, row: int, length: int) -> None:
        del self.held[row][length:]

    def truncate_all(self, lengths: np.ndarray) -> None:
        for row, length in enumerate(lengths.tolist()):
            self.truncate(row, length)


class HashModel:
    """Scores are random numbers seeded by all that a row has read: whoever reads a wrong token draws others.

    Some tokens are likely whatever was read, so that a share of the guesses comes true.
    """

    device = CPU

    def __init__(self) -> None:
        self.num_passes = 0
        self.num_tokens: list[int] = []

    def __call__(
        self, ids: torch.Tensor, *, cache: HeldRows, advance_B: np.ndarray | None = None
    ) -> torch.Tensor:
        self.num_passes += 1
        self.num_tokens.append(ids.shape[1])
        assert max(cache.lengths) + ids.shape[1] <= cache.config.max_position_embeddings
        hidden = torch.zeros(*ids.shape, 1, dtype=torch.float64)
        for row, held in enumerate(cache.held):
            for column, token in enumerate(ids[row].tolist()):
                held.append(token)
                hidden[row, column, 0] = zlib.crc32(np.array(held, dtype=np.int64).tobytes())
            if advance_B is not None and not advance_B[row]:
                del held[-ids.shape[1] :]
        return hidden

    def logits(self, hidden: torch.Tensor, *, start: int = 0, stop: int | None = None) -> torch.Tensor:
        return torch.stack([self._scores(int(state))[start:stop] for state in hidden[:, 0].tolist()])

    def _scores(self, state: int) -> torch.Tensor:
        scores = np.random.default_rng(state).normal(size=V.size)
        scores[V.boi] += 4.0
        scores[V.visual_start + 1] += 1.5
        return torch.from_numpy(scores)


def prompt(world: int) -> list[int]:
    return [V.bos, *range(world + 2), V.bss]


def request(world: int, sampling: Sampling, *, num_rows: int = 2) -> Request:
    """Pictures of unequal sizes, some behind free text, one whose size the model writes itself."""
    size = ((4, 5), (1, 3), (7, 2), None, (3, 1))[world % 5]
    return Request(
        state=GRAMMAR.start(size),
        hidden_D=torch.tensor([zlib.crc32(np.array(prompt(world), dtype=np.int64).tobytes())]).double(),
        uniforms=TokenUniforms(seed=world, step=3),
        sampling=sampling,
        num_rows=num_rows,
        forced=[*TOKENIZER.encode("go on"), V.boi] if world % 2 else [],
        max_text_tokens=40,
    )


def run(requests: dict[int, Request], model: HashModel | None = None) -> tuple[dict[int, Written], HeldRows]:
    rows = [prompt(world) for world in requests]
    for rank in (2, 3):
        rows += [[V.bos, rank, V.bss] for one in requests.values() if one.num_rows >= rank]
    cache = HeldRows(rows)
    written = generate(
        model or HashModel(),  # type: ignore[arg-type]
        cache,  # type: ignore[arg-type]
        list(requests.values()),
        grammar=GRAMMAR,
        num_images=2,
    )
    return dict(zip(requests, written, strict=True)), cache


GUIDED = Sampling(image=Truncation(top_k=3, temperature=0.8), guidance=2.5)


@pytest.mark.parametrize("num_rows", [1, 2, 3])
@pytest.mark.parametrize("image", [Truncation(), GUIDED.image, Truncation(top_p=0.7)])
def test_every_window_draws_the_same_tokens(image: Truncation, num_rows: int) -> None:
    sampling = replace(GUIDED, image=image, image_guidance=1.5)
    results, passes = [], []
    for window in (1, 2, 3, 7, MAX_DRAFT_WINDOW):
        model = HashModel()
        asked = replace(sampling, draft_window=window)
        written, _ = run({world: request(world, asked, num_rows=num_rows) for world in range(5)}, model)
        results.append(written)
        passes.append(model.num_passes)
    assert all(result == results[0] for result in results)
    assert passes[2] < 0.9 * passes[0], "guesses never come true"


def test_greedy_pictures_are_those_of_token_by_token() -> None:
    greedy = Sampling.greedy(guidance=2.0)
    expected, _ = run({world: request(world, greedy) for world in range(5)})
    for window in (1, 4, 16):
        drafted = replace(greedy, draft_window=window)
        assert run({world: request(world, drafted) for world in range(5)})[0] == expected


def test_worlds_in_any_company_write_what_they_write_alone() -> None:
    """Windows, settings, rows and phases differ; some worlds do not draft at all."""
    settings = [replace(GUIDED, draft_window=window) for window in (0, 5, 1, 3, 5, 0, 8)]
    requests = {
        world: request(world, sampling, num_rows=1 + world % 3) for world, sampling in enumerate(settings)
    }
    together, _ = run(requests)
    backwards, _ = run(dict(reversed(requests.items())))
    alone = {world: run({world: one})[0][world] for world, one in requests.items()}
    assert together == backwards == alone


@pytest.mark.parametrize("context", [1 << 20, 75])
def test_rows_that_ride_along_and_windows_of_one_shape_change_nothing(
    monkeypatch: pytest.MonkeyPatch, context: int
) -> None:
    """What a GPU does: rows with nothing to read go through, and windows stay whole at a picture's end,
    unless the context ends there."""
    settings = [replace(GUIDED, draft_window=window) for window in (5, 0, 5, 5, 9)]
    requests = {world: request(world, sampling) for world, sampling in enumerate(settings)}
    requests = {world: one for world, one in requests.items() if world != 1 or context > 1000}
    trimmed, model = HashModel(), HashModel()
    expected, _ = run(requests, trimmed)
    monkeypatch.setattr(cache_rows, "rides_along", lambda device: True)
    monkeypatch.setattr(autoregressive, "rides_along", lambda device: True)
    monkeypatch.setattr(HeldRows, "config", sized("tiny", vocab_size=120, max_position_embeddings=context))
    assert run(requests, model)[0] == expected
    if context > 1000:
        assert model.num_tokens.count(5) > trimmed.num_tokens.count(5)


def test_no_wrong_guess_stays_in_the_cache() -> None:
    requests = {world: request(world, replace(GUIDED, draft_window=6)) for world in range(5)}
    written, cache = run(requests)
    for i, (ids, *_) in enumerate(written.values()):
        whole = [*prompt(i), *ids]
        conditional, unguided = cache.held[i], cache.held[len(requests) + i][3:]
        assert conditional == whole[: len(conditional)]
        assert len(whole) - len(conditional) == 2
        blocks = [list(block) for block in _blocks(ids)]
        assert unguided == list(itertools.chain(*blocks))[: len(unguided)]


def _blocks(ids: Sequence[int]) -> list[list[int]]:
    starts = [at for at, token in enumerate(ids) if token == V.boi]
    return [list(ids[start : ids.index(V.eoi, start) + 1]) for start in starts]


def test_news_tell_every_token_once() -> None:
    requests = {world: request(world, replace(GUIDED, draft_window=4)) for world in (0, 2)}
    expected, _ = run(requests)
    rows = [prompt(0), prompt(2), [V.bos, 2, V.bss], [V.bos, 2, V.bss]]
    writing = write(HashModel(), HeldRows(rows), list(requests.values()), grammar=GRAMMAR, num_images=2)  # type: ignore[arg-type]
    told: dict[int, list[int]] = {0: [], 1: []}
    for news in writing:
        for world, ids in news:
            told[world] += ids
    assert [told[0], told[1]] == [one.ids for one in expected.values()]


# The distribution ---------------------------------------------------------------------------------------

PICTURE = (2, 2)
SETTINGS = [
    Sampling(guidance=2.0),
    Sampling(image=Truncation(top_k=3, temperature=0.8), guidance=3.0),
    Sampling(image=Truncation(top_p=0.8)),
]


@pytest.fixture(scope="module")
def model() -> ExactTransformer:
    """One layer, four codes; scores differ much from context to context."""
    config = TransformerConfig(
        vocab_size=V.size,
        hidden_size=32,
        intermediate_size=32,
        num_layers=1,
        num_heads=2,
        num_kv_heads=1,
        head_dim=16,
        initializer_range=0.15,
        tie_word_embeddings=False,
        max_position_embeddings=256,
    )
    transformer = Transformer(config)
    transformer.init_weights(torch.Generator().manual_seed(4))
    return exact(transformer)


def draw_many(model: ExactTransformer, sampling: Sampling, *, num_worlds: int) -> np.ndarray:
    """Codes [worlds, 4] of pictures of two by two, each world with its own seed."""
    num_rows = 2 if sampling.guided else 1
    forced = [V.boi]
    starts = [[V.bos, 65, V.bss]] * num_worlds + [[V.bos, V.bss]] * (num_worlds * (num_rows - 1))
    cache = StaticCache(model.config, num_rows=len(starts), capacity=64, dtype=model.dtype)
    hidden_D = torch.zeros(model.config.hidden_size)
    for begin, stop in ((0, num_worlds), (num_worlds, len(starts))):
        if begin < stop:
            model(torch.tensor(starts[begin:stop]), cache=cache.rows(list(range(begin, stop))))
    requests = [
        Request(
            state=GRAMMAR.start(PICTURE),
            hidden_D=hidden_D,
            uniforms=TokenUniforms(seed=world, step=0),
            sampling=sampling,
            num_rows=num_rows,
            forced=forced,
        )
        for world in range(num_worlds)
    ]
    written = generate(model, cache, requests, grammar=GRAMMAR)
    codes = [[token - V.visual_start for token in ids if V.is_visual(token)] for ids, *_ in written]
    return np.array(codes)


def joint_by_definition(model: ExactTransformer, sampling: Sampling) -> np.ndarray:
    """Probability [4, 4, 4, 4] of every picture: the product of its tokens', each from a pass of its own."""
    head = [V.boi, *TOKENIZER.encode("2*2"), V.img]
    joint = np.zeros((4,) * 4)
    for codes in itertools.product(range(4), repeat=4):
        visual = [V.visual_start + code for code in codes]
        block = [*head, *visual[:2], V.eol, *visual[2:]]
        rows = [[V.bos, 65, V.bss], [V.bos, V.bss]][: 2 if sampling.guided else 1]
        scores = []
        for row in rows:
            hidden = model(torch.tensor([[*row, *block]]))[0]
            at = [len(row) + len(head) - 1 + k for k in (0, 1, 3, 4)]
            scores.append(model.logits(hidden[at], start=V.visual_start, stop=V.visual_stop).float())
        guided = guide(*scores, guidance=sampling.guidance) if sampling.guided else scores[0]
        joint[codes] = np.prod([_p(row, sampling.image)[c] for row, c in zip(guided, codes, strict=True)])
    return joint


def _p(scores: torch.Tensor, truncation: Truncation) -> np.ndarray:
    scaled = scores.double().numpy() / truncation.temperature
    order = np.argsort(-scaled)[: truncation.top_k or None]
    p = np.exp(scaled[order] - scaled.max())
    p /= p.sum()
    num = int(np.searchsorted(np.cumsum(p), truncation.top_p)) + 1 if truncation.top_p < 1 else len(p)
    out = np.zeros(len(scaled))
    out[order[:num]] = p[:num] / p[:num].sum()
    return out


@pytest.mark.parametrize("window", [0, 3, 6])
@pytest.mark.parametrize("sampling", SETTINGS)
def test_pictures_have_the_joint_distribution_of_their_tokens(
    model: ExactTransformer, sampling: Sampling, window: int
) -> None:
    """Chi-square over 1,500 whole pictures (256 possible ones; the rare ones together)."""
    num_worlds = 1500
    codes = draw_many(model, replace(sampling, draft_window=window), num_worlds=num_worlds)
    expected = joint_by_definition(model, sampling).ravel() * num_worlds
    assert expected.sum() == pytest.approx(num_worlds, rel=1e-4)
    counts = np.bincount(np.ravel_multi_index(tuple(codes.T), (4,) * 4), minlength=256)
    assert counts[expected == 0].sum() == 0
    common = expected >= 5
    counts = np.append(counts[common], counts[~common].sum())
    expected = np.append(expected[common], expected[~common].sum() + 1e-9)
    degrees = len(expected) - 1
    assert degrees > 20, "the model is too sure of itself for a test"
    chi2 = ((counts - expected) ** 2 / expected).sum()
    # Wilson and Hilferty: 99.99 % of chi-square.
    bound = degrees * (1 - 2 / (9 * degrees) + 3.72 * (2 / (9 * degrees)) ** 0.5) ** 3
    assert chi2 < bound, f"{chi2:.1f} with {degrees} degrees of freedom"


def test_exponential_numbers_are_exponential_and_keep_their_values() -> None:
    keys = [TokenUniforms(seed=7, step=0).image_key(0, place) for place in range(300)]
    numbers = exponentials(keys, num_ids=1000, device=CPU).double().numpy()
    assert numbers.min() > 0
    sorted_u = np.sort(1 - np.exp(-numbers.ravel()))
    distance = np.abs(sorted_u - (np.arange(numbers.size) + 0.5) / numbers.size).max()
    assert distance < 2.2 / numbers.size**0.5  # Kolmogorov: 99.99 %
    for lag in (1, 2, 7):
        assert abs(np.corrcoef(numbers[:, lag:].ravel(), numbers[:, :-lag].ravel())[0, 1]) < 0.008
        assert abs(np.corrcoef(numbers[lag:].ravel(), numbers[:-lag].ravel())[0, 1]) < 0.008
    # SplitMix64 from 1234567: its published first outputs.
    first = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    expected = [-np.log(((value >> 12) + 0.5) * 2.0**-52) for value in first]
    assert exponentials([1234567], num_ids=3, device=CPU)[0].tolist() == pytest.approx(expected, rel=1e-6)


def test_image_keys_are_neither_shared_nor_remembered() -> None:
    worlds = [TokenUniforms(seed=seed, step=step) for seed in (0, 1, 2**64 - 1) for step in (0, 5)]
    keys = [world.image_key(index, place) for world in worlds for index in (0, 1) for place in range(50)]
    assert len(set(keys)) == len(keys)
    again = TokenUniforms(seed=0, step=0)
    assert [again.image_key(0, place) for place in reversed(range(50))] == keys[:50][::-1]


def test_a_race_between_similar_distributions_has_mostly_one_winner() -> None:
    num = 20_000
    p = torch.tensor([0.4, 0.3, 0.2, 0.1, 0.0])
    q = torch.tensor([0.3, 0.35, 0.15, 0.1, 0.1])
    noise = exponentials(np.arange(1, num + 1).tolist(), num_ids=5, device=CPU)
    first, second = (
        race(one.log().expand(num, -1), noise, truncation=Truncation()).numpy() for one in (p, q)
    )
    distance = 0.5 * float((p - q).abs().sum())
    assert (first == second).mean() > (1 - distance) / (1 + distance)
    for drawn, one in ((first, p), (second, q)):
        counts, expected = np.bincount(drawn, minlength=5), one.numpy() * num
        inside = expected > 0
        assert counts[~inside].sum() == 0
        assert ((counts[inside] - expected[inside]) ** 2 / expected[inside]).sum() < 27.9  # 99.99 % of 5
