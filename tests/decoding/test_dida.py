"""Pictures drawn at once by a model whose scores name its context: what is fed, kept, guided and drawn."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch

from emuworld.decoding.autoregressive import finish
from emuworld.decoding.dida import Painter, Picture
from emuworld.decoding.noise import Noise
from emuworld.decoding.sampling import Sampling, Truncation
from emuworld.decoding.uniforms import TokenUniforms
from emuworld.model.cache import StaticCache
from emuworld.model.transformer import sized
from emuworld.tokens.vocabulary import builtin

V = builtin(num_text_tokens=256, num_visual_tokens=32)
CODEBOOK = torch.randn(32, 4, generator=torch.Generator().manual_seed(0))
SIZE = (3, 4)
Scores = Callable[[int, torch.Tensor], torch.Tensor]
"""Length of a row of the cache and the codes of its block [N] -> scores [N, 32]."""


MIXTURE = Noise(path="mixture")


class Scorer:
    """A model whose hidden states are the scores of the codes; it keeps what it was fed."""

    device = torch.device("cpu")

    def __init__(self, scores: Scores) -> None:
        self.scores = scores
        self.fed: list[tuple[list[int], torch.Tensor]] = []

    def __call__(
        self, ids: torch.Tensor, *, cache: StaticCache, advance_B: object = None, causal: bool = True
    ) -> torch.Tensor:
        assert not causal and advance_B == [False] * len(ids)
        self.fed.append((cache.lengths.tolist(), ids.clone()))
        hidden = torch.full((*ids.shape, 32), float("nan"))
        following = ids[:, 1:] != V.eol
        for row, length in enumerate(cache.lengths.tolist()):
            block = ids[row] - V.visual_start
            places = following[row].nonzero()[:, 0]
            hidden[row, places] = self.scores(length, block[block >= 0])
        return hidden

    def logits(self, hidden: torch.Tensor, *, start: int = 0, stop: int | None = None) -> torch.Tensor:
        assert (start, stop) == (V.visual_start, V.visual_stop)
        return hidden


def cache_of(*lengths: int) -> StaticCache:
    """Rows that hold so many tokens."""
    cache = StaticCache(sized("tiny", vocab_size=V.size), num_rows=len(lengths), capacity=64)
    for row, length in enumerate(lengths):
        one = cache.rows([row])
        one.finish(one.begin(length))
    return cache


def paint(model: Scorer, cache: StaticCache, *pictures: Picture, noise: Noise = MIXTURE) -> list[np.ndarray]:
    painter = Painter(model, vocabulary=V, noise=noise, codebook_KE=CODEBOOK)  # type: ignore[arg-type]
    return finish(painter.paint(cache, pictures))  # type: ignore[arg-type, return-value]


def picture(*rows: int, seed: int = 0, **settings: object) -> Picture:
    sampling = Sampling(**{"image": Truncation(temperature=0.0), **settings})  # type: ignore[arg-type]
    uniforms = TokenUniforms(seed=seed, step=0)
    return Picture(rows=rows, size=SIZE, index=0, uniforms=uniforms, sampling=sampling)


def sure_of(target: torch.Tensor) -> Scores:
    """Scores that are the surer the later the code stands."""
    heights = torch.linspace(1.0, 9.0, len(target))
    return lambda _length, _codes: torch.nn.functional.one_hot(target, 32) * heights[:, None]


def test_a_block_is_img_codes_and_line_ends_and_the_cache_stays() -> None:
    model = Scorer(sure_of(torch.arange(12)))
    cache = cache_of(5)
    (codes,) = paint(model, cache, picture(0, passes=2))
    assert cache.lengths.tolist() == [5]
    np.testing.assert_array_equal(codes, np.arange(12).reshape(SIZE))
    for _, ids in model.fed:
        assert ids[0, 0] == V.img and ids.shape == (1, 15)
        assert ids[0, [5, 10]].tolist() == [V.eol] * 2
        assert (ids[0] >= V.visual_start).sum() == 12


@pytest.mark.parametrize("passes", [1, 3, 6])
def test_the_surest_codes_stay_and_the_others_are_noise_again(passes: int) -> None:
    target = torch.arange(12)
    model = Scorer(sure_of(target))
    paint(model, cache_of(5), picture(0, passes=passes))
    assert len(model.fed) == passes
    for done, (_, ids) in enumerate(model.fed):
        codes = ids[0][ids[0] >= V.visual_start] - V.visual_start
        kept = round(12 * done / passes)
        assert torch.equal(codes[12 - kept :], target[12 - kept :])
        if kept < 9:
            assert not torch.equal(codes[: 12 - kept], target[: 12 - kept])


@pytest.mark.parametrize("ahead", [False, True])
def test_codes_are_told_when_their_last_pass_begins(monkeypatch: pytest.MonkeyPatch, ahead: bool) -> None:
    """Before the draft of that pass is heard, which is of the same codes; on a GPU also before the draft of
    the pass before, as the host is a pass behind."""
    monkeypatch.setattr("emuworld.decoding.dida.rides_along", lambda device: ahead)
    model = Scorer(sure_of(torch.arange(12)))
    pictures = [picture(row, seed=row, passes=passes) for row, passes in enumerate((2, 4, 2))]
    told: dict[int, tuple[int, np.ndarray]] = {}
    heard: list[list[tuple[int, int, int]]] = []

    def on_drawn(places: Sequence[int], codes_Phw: torch.Tensor) -> None:
        told.update({at: (len(heard), codes.numpy()) for at, codes in zip(places, codes_Phw, strict=True)})

    painting = Painter(model, vocabulary=V, noise=MIXTURE, codebook_KE=CODEBOOK).paint(  # type: ignore[arg-type]
        cache_of(5, 5, 5), pictures, on_drawn=on_drawn
    )
    while True:
        try:
            drafts = next(painting)
        except StopIteration as end:
            codes = end.value
            break
        heard.append([(draft.picture, draft.done, draft.num_passes) for draft in drafts])
    assert heard == [[(0, n, 2), (2, n, 2), (1, n, 4)] for n in (1, 2)] + [[(1, n, 4)] for n in (3, 4)]
    assert {at: one[0] for at, one in told.items()} == {0: 1 - ahead, 2: 1 - ahead, 1: 3 - ahead}
    assert all(np.array_equal(told[at][1], codes[at]) for at in range(3))


@pytest.mark.parametrize("resample", ["confidence", "jump"])
def test_masked_codes_come_and_stay(resample: str) -> None:
    target = torch.arange(12)
    model = Scorer(sure_of(target))
    drawn = picture(0, passes=4, resample=resample)
    (codes,) = paint(model, cache_of(5), drawn, noise=Noise(path="masked"))
    np.testing.assert_array_equal(codes, target.reshape(SIZE))
    fed = torch.cat([ids for _, ids in model.fed])
    fed = fed[(fed != V.img) & (fed != V.eol)].view(4, 12)
    there = fed != V.pad
    assert not there[0].any() and (there[1:] >= there[:-1]).all()
    assert torch.equal(fed[there], (target + V.visual_start).expand(4, -1)[there])
    if resample == "confidence":
        assert there.sum(dim=1).tolist() == [0, 3, 6, 9]


def test_jumps_are_as_frequent_as_the_path_says() -> None:
    """Half way of four passes, half of the codes are what the model wants (over many pictures)."""
    target = torch.full((12,), 7)
    model = Scorer(lambda _length, _codes: torch.nn.functional.one_hot(target, 32) * 50.0)
    pictures = [picture(row, seed=row, passes=4, resample="jump") for row in range(100)]
    drawn = paint(model, cache_of(*[5] * 100), *pictures)
    assert all((codes == 7).all() for codes in drawn)
    a_pass = len(model.fed) // 4
    third = torch.cat([ids for _, ids in model.fed[2 * a_pass : 3 * a_pass]])
    codes = third[third >= V.visual_start] - V.visual_start
    assert len(codes) == 1200
    assert abs(float((codes == 7).double().mean()) - (0.5 + 0.5 / 32)) < 0.05


def test_guidance_is_cut_off() -> None:
    """Rows of other lengths want other codes; guided, the conditional one is overdone; later it is alone."""
    wants = {5: 3, 9: 4}
    model = Scorer(lambda length, codes: torch.nn.functional.one_hot(codes * 0 + wants[length], 32) * 2.0)
    (codes,) = paint(model, cache_of(5, 9), picture(0, 1, passes=4, guidance=3.0, guided_until=0.5))
    assert (codes == 3).all()
    fed = [length for lengths, _ in model.fed for length in lengths]
    assert (fed.count(5), fed.count(9)) == (4, 2), "the unguided row is fed only while it is needed"
    turned = Scorer(model.scores)
    (codes,) = paint(turned, cache_of(5, 9), picture(0, 1, passes=1, guidance=0.0, guided_until=0.0))
    assert (codes == 4).all(), "the first pass is always guided: at 0 only the unguided row counts"


def test_pictures_of_other_sizes_and_settings_go_side_by_side() -> None:
    def hashed(length: int, codes: torch.Tensor) -> torch.Tensor:
        generator = torch.Generator().manual_seed(length * 1000 + int(codes.sum()))
        return torch.randn(len(codes), 32, generator=generator)

    free = {"image": Truncation(top_k=8)}
    asked = [
        picture(0, seed=0, passes=3, **free),
        picture(1, seed=1, passes=5, resample="jump", **free),
        picture(2, 3, seed=2, passes=3, guidance=2.0, **free),
        picture(4, seed=3, passes=3, **free),
    ]
    lengths = (5, 6, 7, 8, 5)
    together = paint(Scorer(hashed), cache_of(*lengths), *asked)
    for one, codes in zip(asked, together, strict=True):
        alone = Picture(
            rows=range(len(one.rows)), size=SIZE, index=0, uniforms=one.uniforms, sampling=one.sampling
        )
        (again,) = paint(Scorer(hashed), cache_of(*(lengths[row] for row in one.rows)), alone)
        np.testing.assert_array_equal(again, codes)
