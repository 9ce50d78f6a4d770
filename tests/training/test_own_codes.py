"""Rows that read codes as the model draws them itself: which are replaced, and by what."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from emuworld.model.transformer import Transformer, sized
from emuworld.tokens.bpe import train_bpe
from emuworld.tokens.sequence import template_texts
from emuworld.tokens.text import TextTokenizer
from emuworld.tokens.vocabulary import builtin
from emuworld.training.data import TokenStory
from emuworld.training.examples import Bucket, ExampleSampler, Mixture
from emuworld.training.objective import Objective, _drawn
from emuworld.training.packing import Packing
from emuworld.training.supervised import PretrainTraining

WALK = Bucket(kind="walk", frames=4, batch_size=40)


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> TextTokenizer:
    path = tmp_path_factory.mktemp("words") / "text.tiktoken"
    train_bpe(["turn left", "a red wall", *template_texts()] * 4, num_tokens=300, path=path)
    return TextTokenizer.builtin(path, vocabulary=builtin(num_text_tokens=300, num_visual_tokens=40))


def _sampler(words: TextTokenizer, mixture: Mixture) -> ExampleSampler:
    sampler = ExampleSampler(tokenizer=words, mixture=mixture, size=(2, 3))
    rng = np.random.default_rng(0)
    walk = TokenStory(
        question="look around",
        texts=("", *("turn left",) * 5),
        captions=("a red wall",) * 6,
        codes=rng.integers(0, 40, (6, 2, 3)).astype(np.uint16),
    )
    edit = TokenStory(
        question="",
        texts=("", "paint it red"),
        captions=("", ""),
        codes=rng.integers(0, 40, (2, 2, 3)).astype(np.uint16),
        kind="x2i",
        num_references=1,
    )
    sampler.add([walk, edit])
    return sampler


@pytest.mark.parametrize("bucket", [WALK, Bucket(kind="x2i", frames=2, batch_size=40)], ids=["walk", "x2i"])
def test_half_of_the_rows_draw_codes_of_what_they_answer(words: TextTokenizer, bucket: Bucket) -> None:
    sampler = _sampler(words, Mixture(own_codes=1.0, code_noise=0.9))
    batch = sampler.batch(bucket, np.random.default_rng(1))
    assert batch.draws is not None
    assert batch.draws.shape == (20, batch.inputs.shape[1])
    own = batch.draws >= 0
    assert batch.draws[own].max() < 1
    assert (batch.inputs[:20] == batch.ids[:20, :-1]).all()  # no other noise in these
    assert (batch.inputs[20:] != batch.ids[20:, :-1]).any()
    vocabulary = words.vocabulary
    codes = (batch.inputs[:20] >= vocabulary.visual_start) & (batch.inputs[:20] < vocabulary.visual_stop)
    first_picture = (batch.inputs[:20] == vocabulary.boi).cumsum(1) <= 1
    assert not own[~codes | first_picture].any()
    by_row = own.sum(1) / (codes & ~first_picture).sum(1).clip(1)
    assert 0.3 < by_row.mean() < 0.7
    assert by_row.min() < 0.2  # a share of its own for each row
    assert by_row.max() > 0.8


def test_a_picture_from_words_stays_as_it_is(words: TextTokenizer) -> None:
    sampler = _sampler(words, Mixture(own_codes=1.0))
    assert sampler.batch(Bucket(kind="picture", batch_size=8), np.random.default_rng(1)).draws is None


def test_codes_are_drawn_as_the_scores_say() -> None:
    scores = torch.randn(1, 7, generator=torch.Generator().manual_seed(0))
    numbers = (torch.arange(10_000) + 0.5) / 10_000
    drawn = _drawn(scores.expand(10_000, 7), numbers)
    shares = torch.bincount(drawn, minlength=7) / 10_000
    torch.testing.assert_close(shares, scores.softmax(-1)[0], atol=2e-4, rtol=0)


def test_what_is_read_is_what_the_model_draws_after_the_given_codes(words: TextTokenizer) -> None:
    vocabulary = words.vocabulary
    model = Transformer(sized("tiny", vocab_size=vocabulary.size))
    model.init_weights(torch.Generator().manual_seed(0))
    objective = Objective(model, vocabulary=vocabulary, autocast=None, tensor_mesh=None, loss_tokens=50)
    batch = _sampler(words, Mixture(own_codes=1.0)).batch(WALK, np.random.default_rng(2))
    assert batch.draws is not None
    given, draws = torch.from_numpy(batch.inputs[:20]), torch.from_numpy(batch.draws)
    read = objective.own_codes(given, draws)
    assert (read[draws < 0] == given[draws < 0]).all()
    row, at = (int(one[7]) for one in torch.nonzero(draws >= 0, as_tuple=True))
    with torch.no_grad():
        hidden = model(given[row : row + 1, :at])[0, -1:]
        scores = model.logits(hidden, start=vocabulary.visual_start, stop=vocabulary.visual_stop)
    expected = int(_drawn(scores, draws[row, at : at + 1])) + vocabulary.visual_start
    assert int(read[row, at]) == expected
    # Losses are those of the read codes, against the given targets.
    ids, weights = torch.from_numpy(batch.ids), torch.from_numpy(batch.weights)
    inputs = torch.from_numpy(batch.inputs)
    found, _, _ = objective(inputs, ids[:, 1:], weights, draws)
    by_hand, _, _ = objective(torch.cat([read, inputs[20:]]), ids[:, 1:], weights)
    torch.testing.assert_close(found, by_hand)
    assert not torch.equal(found, objective(inputs, ids[:, 1:], weights)[0])


def test_many_passes_give_what_drawing_code_after_code_gives(words: TextTokenizer) -> None:
    vocabulary = words.vocabulary
    model = Transformer(sized("tiny", vocab_size=vocabulary.size))
    model.init_weights(torch.Generator().manual_seed(0))
    batch = _sampler(words, Mixture(own_codes=1.0)).batch(WALK, np.random.default_rng(3))
    assert batch.draws is not None
    ids, weights = torch.from_numpy(batch.ids)[:2], torch.from_numpy(batch.weights)[:2]
    drawn, draws = ids[:, :-1].clone(), torch.from_numpy(batch.draws[:2])
    places = torch.nonzero(draws >= 0).tolist()
    assert len(places) > 8
    for row, at in places:
        with torch.no_grad():
            hidden = model(drawn[row : row + 1, :at])[0, -1:]
            scores = model.logits(hidden, start=vocabulary.visual_start, stop=vocabulary.visual_stop)
        drawn[row, at] = int(_drawn(scores, draws[row, at : at + 1])) + vocabulary.visual_start

    def loss(passes: int) -> torch.Tensor:
        settings = {"autocast": None, "tensor_mesh": None, "loss_tokens": 50, "own_passes": passes}
        objective = Objective(model, vocabulary=vocabulary, **settings)  # type: ignore[arg-type]
        return objective(ids[:, :-1], ids[:, 1:], weights, draws)[0]

    plain = Objective(model, vocabulary=vocabulary, autocast=None, tensor_mesh=None, loss_tokens=50)
    expected, _, _ = plain(drawn, ids[:, 1:], weights)
    torch.testing.assert_close(loss(len(places)), expected)
    assert not torch.allclose(loss(1), expected)


def test_settings_that_cannot_be_had_are_refused() -> None:
    with pytest.raises(ValueError, match="own_passes must be at least 1, got 0"):
        Mixture(own_codes=1.0, own_passes=0)
    with pytest.raises(ValueError, match="own_codes is a share of all codes, 0 to 1, got"):
        Mixture(own_codes=1.5)
    own = Mixture(own_codes=0.5)
    with pytest.raises(ValueError, match="cannot be had with packed rows or parallel=tp"):
        PretrainTraining(mixture=own, packing=Packing(tokens=4096))
    with pytest.raises(ValueError, match="cannot be had with packed rows or parallel=tp"):
        PretrainTraining(mixture=own, parallel="tp")
