"""Batches replayed as CUDA graphs teach what they teach without."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from emuworld.model.transformer import Transformer, sized
from emuworld.tokens.vocabulary import builtin
from emuworld.training.examples import Batch
from emuworld.training.objective import _cross_entropies
from emuworld.training.ranks import Ranks
from emuworld.training.trainer import Optimisation, SupervisedTrainer

VOCABULARY = builtin(num_text_tokens=259, num_visual_tokens=512)
SETTINGS = Optimisation(loss_tokens=1024, compile=True)


def _batches() -> Iterator[list[Batch]]:
    """Of three shapes, the second in every other step; one is larger than `loss_tokens`, and half of its rows
    read codes as the model draws them.
    """
    step = 0
    while True:
        shapes = [(4, 300), (2, 100), (1, 64)][: 3 if step % 2 == 0 else 1]
        out = []
        for number, (rows, length) in enumerate(shapes):
            rng = np.random.default_rng((step, number))
            first = VOCABULARY.visual_start  # few ids, which is soon learnt
            ids = rng.integers(first, first + 16, (rows, length + 1))
            weights = rng.choice([0.0, 0.5, 1.0], (rows, length)).astype(np.float32)
            draws = rng.uniform(-1.0, 1.0, (rows // 2, length)).astype(np.float32) if rows == 4 else None
            out.append(Batch(kind="walk", ids=ids, inputs=ids[:, :-1].copy(), weights=weights, draws=draws))
        yield out
        step += 1


def _losses(config: Optimisation, *, steps: int) -> list[tuple[float, float, float]]:
    model = Transformer(sized("tiny", vocab_size=VOCABULARY.size, attention_dropout=0.0))
    model.init_weights(torch.Generator().manual_seed(0))
    batches, device = (
        _batches(),
        torch.device("cuda" if config.graphs or torch.cuda.is_available() else "cpu"),
    )
    trainer = SupervisedTrainer(
        model,
        config=config,
        vocabulary=VOCABULARY,
        device=device,
        ranks=Ranks(device),
        next_batches=lambda: next(batches),
    )
    figures = [trainer.step(step, 1.0) for step in range(steps)]
    return [
        (float(one["visual_loss"]), float(one["text_loss"]), float(one["gradient_norm"])) for one in figures
    ]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_replayed_batches_teach_the_same() -> None:
    plain = np.array(_losses(SETTINGS, steps=14))
    replayed = np.array(_losses(dataclasses.replace(SETTINGS, graphs=True), steps=14))
    assert plain[-1, 0] < plain[0, 0]  # it learns, so that a step that was lost would show
    np.testing.assert_allclose(replayed, plain, rtol=2e-2)


def test_graphs_need_a_gpu() -> None:
    cpu = torch.device("cpu")
    model = Transformer(sized("tiny", vocab_size=VOCABULARY.size))
    with pytest.raises(ValueError, match="this trains on cpu; set graphs=false"):
        SupervisedTrainer(
            model,
            config=dataclasses.replace(SETTINGS, graphs=True),
            vocabulary=VOCABULARY,
            device=cpu,
            ranks=Ranks(cpu),
            next_batches=list,
        )


def test_ids_that_fill_up_the_head_count_for_nothing() -> None:
    """Rows of zeros give them scores of zero, above those of most ids here."""
    logits = torch.randn(5, 71, generator=torch.Generator().manual_seed(0)) - 9.0
    targets = torch.tensor([0, 1, 2, 69, 70])
    filled = F.pad(logits, (0, -71 % 64))
    assert filled.shape == (5, 128)
    torch.testing.assert_close(
        _cross_entropies(filled, targets, 71), F.cross_entropy(logits, targets, reduction="none")
    )
