"""GRPO on the tiny checkpoint: arithmetic by hand, and a reward that goes up on prompts it never asked."""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from emuworld.decoding.sampling import Sampling
from emuworld.training import grpo
from emuworld.training.checkpoints import open_source
from emuworld.training.grpo import GrpoTrainer, GrpoTraining, Rows, advantages, policy_loss
from emuworld.training.loop import LoopConfig
from emuworld.training.prompt_file import read_prompts
from emuworld.training.rewards import Answer, Blend, Open, Scale
from emuworld.training.rollouts import Drawer, Prompt
from emuworld.training.trainer import make_optimizers
from emuworld.world_model import load

SIZE_PX = 32
COLOURS = {"red": (200, 90, 90), "blue": (90, 90, 200)}


def _colour(answers: Sequence[Answer]) -> list[float]:
    """How near the picture's mean colour is to the one that the truth names, in levels (negative)."""
    return [
        -float(np.abs(answer.pictures[0].mean(axis=(0, 1)) - answer.truth["colour"]).mean())
        for answer in answers
    ]


def _contrast(answers: Sequence[Answer]) -> list[float]:
    return [float(answer.pictures[0].std()) for answer in answers]


TERMS: dict[str, Open] = {
    "colour": lambda scale, device: _colour,
    "contrast": lambda scale, device: _contrast,
}
SCALES = (
    Scale(name="colour", weight=3.0, low=-53.0, high=-48.0),  # what random codes can draw
    Scale(name="contrast", low=60.0, high=0.0),
    Scale(name="preservation", weight=1.0, low=0.3, high=0.9),
)


def _prompts(folder: Path, name: str, wordings: Sequence[str]) -> str:
    lines: list[Mapping[str, object]] = [
        {"mode": "t2i", "prompt": words.format(colour), "truth": {"colour": rgb}}
        for words in wordings
        for colour, rgb in COLOURS.items()
    ]
    (folder / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(folder / name)


def _config(tiny_folder: str, folder: Path, *, steps: int) -> GrpoTraining:
    return GrpoTraining(
        prompts=_prompts(folder, "train.jsonl", ["a {} room", "a room with a {} box"]),
        held_out=_prompts(folder, "held.jsonl", ["turn to the {} ball", "beside a {} door"]),
        init_from=tiny_folder,
        out=str(folder / "out"),
        rewards=SCALES,
        prompts_per_step=4,
        rows_at_once=32,
        learning_rate=3e-3,
        embedding_learning_rate=3e-3,
        size_px=SIZE_PX,
        measure_every_steps=1000,
        measured_answers=12,
        device="cpu",
        loop=LoopConfig(max_steps=steps, warmup_steps=2, decay_fraction=0.0, log_every_steps=1),
    )


def test_a_reward_goes_up_on_prompts_that_were_never_asked(tiny_folder: str, tmp_path: Path) -> None:
    torch.set_num_threads(1)
    config = _config(tiny_folder, tmp_path, steps=12)
    after = grpo.train(config, terms=TERMS)
    before = json.loads((tmp_path / "out" / "before.json").read_text())
    assert after["held_out_reward"] > before["held_out_reward"] + 0.7
    assert after["held_out_reward_colour"] > before["held_out_reward_colour"]
    sheets = sorted(path.name for path in (tmp_path / "out" / "pictures").iterdir())
    assert sheets[0] == "end.png" and sheets[1] == "step-000000.png"
    lines = [json.loads(line) for line in (tmp_path / "out" / "grpo.log.jsonl").read_text().splitlines()]
    assert (
        len(lines) == 12 and {"reward", "reward_colour", "reward_contrast", "kl", "loss"} <= lines[0].keys()
    )
    assert "reward_preservation" not in lines[0]  # it does not apply to t2i
    assert lines[0]["kl"] < 1e-6 < lines[-1]["kl"]
    state, segment = (model := load(tmp_path / "out", device="cpu")).imagine(
        model.begin(mode="t2i", prompt="a red room", size=(SIZE_PX, SIZE_PX)), ""
    )
    assert segment.image is not None and state.ended


@pytest.fixture(scope="module")
def trainer(tiny_folder: str, tmp_path_factory: pytest.TempPathFactory) -> GrpoTrainer:
    config = _config(tiny_folder, tmp_path_factory.mktemp("grpo"), steps=1)
    source = open_source(tiny_folder, device=torch.device("cpu"))
    model = grpo.checkpoint.load(source.weights, dtype=torch.float32).train()
    return GrpoTrainer(
        model,
        config=config,
        source=source,
        prompts=read_prompts(config.prompts, source, size_px=SIZE_PX),
        blend=Blend(SCALES, handed_down=TERMS, device=torch.device("cpu")),
        device=torch.device("cpu"),
    )


def test_what_is_learnt_is_what_was_drawn(trainer: GrpoTrainer) -> None:
    """Only the codes of a picture are chosen; their log probabilities are those of the draw: over many
    answers the commonest first code comes as often as they say.
    """
    rollouts, scores = trainer.answers(trainer.prompts[:1], stream=3, group=200)
    vocabulary = trainer.vocabulary
    rows = Rows(rollouts, config=trainer.config, vocabulary=vocabulary)
    learnt = rows.ids[:, 1:][rows.weights > 0]
    assert (learnt >= vocabulary.visual_start).all() and len(learnt) == 200 * 4
    assert scores.total.min() >= 1.0 and scores.total.max() <= 10.0
    at = int(rows.weights[0].nonzero()[0])
    with torch.no_grad():
        logs = trainer.log_probabilities(trainer.policy.eval(), rows.ids)
    trainer.policy.train()
    codes, counts = rows.ids[:, at + 1].unique(return_counts=True)
    commonest = codes[counts.argmax()]
    told = float(logs[rows.ids[:, at + 1] == commonest][0, at].exp())
    assert abs(told - float(counts.max()) / 200) < 4 * (told * (1 - told) / 200) ** 0.5
    again, _ = trainer.answers(trainer.prompts[:1], stream=3, group=200)
    assert [one.answer_ids for one in again] == [one.answer_ids for one in rollouts]


def test_a_copy_draws_with_the_weights_of_the_moment(trainer: GrpoTrainer) -> None:
    """As on a GPU: in the fused form, whose memory stays where graphs expect it."""
    source = open_source(str(trainer.config.init_from), device=torch.device("cpu"))
    policy = copy.deepcopy(trainer.policy)
    alone, apart = (
        Drawer(
            policy,
            vision=source.vision,
            tokenizer=source.tokenizer,
            manifest=source.manifest,
            size_px=SIZE_PX,
            apart=apart,
        )
        for apart in (False, True)
    )
    grid = np.random.default_rng(0).integers(0, 64, (2, 2))
    shown = Prompt(mode="x2i", text="a red room", codes=(grid,))
    asked = [trainer.prompts[0], shown, trainer.prompts[1], shown]
    greedy = Sampling.greedy()
    answers = []
    for step in range(3):
        one, two = (drawer.draw(asked, range(4), sampling=greedy, at_once=3) for drawer in (alone, apart))
        assert [a.answer_ids for a in one] == [a.answer_ids for a in two]
        for a, b in zip(one, two, strict=True):
            assert (
                len(a.answer.references)
                == len(b.answer.references)
                == len(a.answer.pictures) - (a.answer.mode == "t2i")
            )
            for mine, theirs in zip(a.answer.pictures, b.answer.pictures, strict=True):
                assert np.abs(mine.astype(int) - theirs.astype(int)).max() <= 1
        answers.append([a.answer_ids for a in one])
        with torch.no_grad():
            generator = torch.Generator().manual_seed(step)
            for parameter in policy.parameters():
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    assert answers[0] != answers[1] != answers[2]
    memory = apart._caches._working.memory  # type: ignore[union-attr]
    apart.draw(asked, range(4), sampling=greedy, at_once=3)
    assert apart._caches._working.memory is memory  # type: ignore[union-attr]


def test_one_update_needs_no_pass_before_it(trainer: GrpoTrainer) -> None:
    """Of what it drew it learns the same as with the probabilities worked out before."""
    rollouts, _ = trainer.answers(trainer.prompts[:2], stream=5, group=3)
    gains = np.array([1.0, -1.0, 0.5, -0.5, 1.0, -1.0])
    assert trainer._before(rollouts)[0] is None
    with torch.no_grad():
        whole = [
            trainer.log_probabilities(
                trainer.policy, Rows([r], config=trainer.config, vocabulary=trainer.vocabulary).ids
            )[0]
            for r in rollouts
        ]
    start = copy.deepcopy(trainer.policy.state_dict())
    results = []
    for then in (None, whole):
        trainer.policy.load_state_dict(start)
        trainer.optimizers = make_optimizers(trainer.policy, trainer.config)
        figures = trainer._update(np.arange(6), rollouts, gains, then, None)
        results.append((figures["gradient_norm"], trainer.policy.state_dict()["model.norm.weight"].clone()))
    trainer.policy.load_state_dict(start)
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-4)
    torch.testing.assert_close(results[0][1], results[1][1], rtol=1e-4, atol=1e-6)


def test_advantages_are_of_the_group() -> None:
    totals = np.array([[1.0, 3.0], [5.0, 5.0], [2.0, 8.0]])
    np.testing.assert_allclose(advantages(totals, normalise=True), [[-1, 1], [0, 0], [-1, 1]])
    np.testing.assert_allclose(advantages(totals, normalise=False), [[-1, 1], [0, 0], [-3, 3]])
    gains = advantages(totals, normalise=True, least_spread=2.0)
    np.testing.assert_allclose(gains, [[-0.5, 0.5], [0, 0], [-1, 1]])


def test_the_loss_by_hand() -> None:
    config = GrpoTraining(kl_weight=0.5, clip_low=0.2, clip_high=0.3)
    then = torch.log(torch.tensor([[0.5, 0.2, 0.4], [0.5, 0.2, 0.4]]))
    now = torch.log(torch.tensor([[0.5, 0.4, 0.9], [0.5, 0.1, 0.9]])).requires_grad_()
    weights = torch.tensor([[1.0, 1.0, 0.0], [1.0, 1.0, 0.0]])
    reference = torch.log(torch.tensor([[0.5, 0.4, 0.1], [0.25, 0.1, 0.1]]))
    loss, figures = policy_loss(now, then, reference, torch.tensor([1.0, -1.0]), weights, config=config)
    # Up: ratios 1 and 2, the second clipped to 1.3. Down: 1 and 0.5, where the clipped 0.8 is the worse.
    gains = torch.tensor([(1.0 + 1.3) / 2, (-1.0 - 0.8) / 2])
    half = 0.5 - float(np.log(0.5)) - 1.0  # KL estimate of a token whose reference is half as likely
    kl = torch.tensor([0.0, half / 2])
    torch.testing.assert_close(loss, (0.5 * kl - gains).mean())
    assert float(figures["clipped_share"]) == 0.5
    loss.backward()
    assert now.grad is not None
    assert now.grad[0, 1] == 0 and now.grad[1, 1] == 0 and (now.grad[:, 2] == 0).all()  # clipped; no weight
    torch.testing.assert_close(now.grad[0, 0], torch.tensor(-0.25))  # half of an answer, half of the batch


def test_settings_and_prompts_that_cannot_work_are_named(trainer: GrpoTrainer, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="group must be 2"):
        GrpoTraining(group=1)
    source = open_source(str(trainer.config.init_from), device=torch.device("cpu"))
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"mode": "t2i", "prompt": "a"}\n{"mode": "film", "prompt": "b"}\n')
    with pytest.raises(ValueError, match="line 2"):
        read_prompts(str(bad), source, size_px=SIZE_PX)
    wordy = tmp_path / "wordy.jsonl"
    wordy.write_text('{"mode": "t2i", "prompt": "a", "truth": {"words": ["A"], "boxes": [[0, 0, 1, 1]]}}\n')
    assert read_prompts(str(wordy), source, size_px=SIZE_PX)[0].truth["words"] == ["A"]
    wordy.write_text('{"mode": "t2i", "prompt": "a", "truth": {"words": "A"}}\n')
    with pytest.raises(ValueError, match=r"line 1.*truth\.words must be a list"):
        read_prompts(str(wordy), source, size_px=SIZE_PX)
    with pytest.raises(ValueError, match="no such file"):
        read_prompts(str(tmp_path / "none"), source, size_px=SIZE_PX)
    assert dataclasses.replace(trainer.config, updates_per_step=2).updates_per_step == 2
