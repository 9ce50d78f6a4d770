"""Stage `grpo`: a model learns to give answers that score higher (group relative policy optimisation).

Each step asks some prompts, draws a group of answers to each with the weights as they are, scores them
(`rewards.py`), and makes what scored above its group's mean likelier and what scored below it less likely:
the clipped ratio of PPO with the advantage normalised in the group, and a penalty for leaving the model that
it began from (KL, estimated as in the GRPO paper, arXiv 2402.03300, eq. 4).

Words and picture tokens count alike unless weighted; ids that were given or that the grammar forces count
nothing. Probabilities are over the picture codes where a code was drawn, over all ids elsewhere. The paper of
Emu3.5 gives groups of 8, batches of 640 and a learning rate of 1e-6; clip range, KL weight, guidance in
rollouts and the normalisation it leaves open: each is a setting here, explained beside its default.
"""

from __future__ import annotations

import copy
import dataclasses
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recomputed

from emuworld.decoding.sampling import Sampling, Truncation
from emuworld.model import checkpoint
from emuworld.model.transformer import Transformer
from emuworld.tokens.vocabulary import Vocabulary
from emuworld.training import loop, rewards, sharding
from emuworld.training.checkpoints import Source, open_source, save_checkpoint
from emuworld.training.devices import pick_device
from emuworld.training.held_out import HeldOut, means_of
from emuworld.training.prompt_file import picture_side, read_prompts
from emuworld.training.ranks import Ranks
from emuworld.training.rollouts import Drawer, Prompt, Rollout
from emuworld.training.states import ShardedStore
from emuworld.training.supervised import with_dropout
from emuworld.training.trainer import Optimisation, make_optimizers


@dataclasses.dataclass(frozen=True, kw_only=True)
class GrpoTraining(Optimisation):
    """Settings of the stage."""

    prompts: str = "prompts.jsonl"  # lines with mode, prompt, and where they apply images, commands, truth
    held_out: str = ""  # file of prompts that are only measured; "": none
    init_from: str = "small"  # the built-in model, a checkpoint folder, or a published one
    out: str = "outputs/train/grpo"  # a checkpoint folder, with its log, state and sheets of pictures
    rewards: tuple[rewards.Scale, ...] = ()  # terms by name, with weight, low and high
    group: int = 8  # answers to a prompt (paper)
    prompts_per_step: int = 8  # the paper's 640 answers a step are 80
    updates_per_step: int = 1  # the answers of a step are learnt in so many parts; 1: strictly on policy
    answers_at_once: int = 128  # that are drawn together
    rows_at_once: int = 8  # of one forward and backward pass
    clip_low: float = 0.2  # PPO's; matters where updates_per_step > 1
    clip_high: float = 0.2  # the same, upwards
    kl_weight: float = 0.01  # DeepSeekMath has 0.04 for 7 B; pictures need room to move
    normalise: bool = True  # divide by the group's standard deviation; false: only by the scale of rewards
    least_spread: float = 0.0  # by no less than this, of 1 to 10: among near equals the best is chance
    text_weight: float = 1.0  # of text tokens in the loss
    visual_weight: float = 1.0  # of picture tokens
    guidance: float = 1.0  # in rollouts; above 1 answers come from a sharper model than the one that learns
    temperature: float = 1.0  # in rollouts
    size_px: int = 0  # picture side; 0: the model's own
    measure_every_steps: int = 25  # of held_out; before and after as well
    measured_answers: int = 2  # of each held-out prompt
    optimizer: str = "adamw"
    learning_rate: float = 1e-6  # the paper's is 1e-6
    embedding_learning_rate: float = 1e-6
    weight_decay: float = 0.0
    device: str = "auto"  # auto | cpu | cuda
    seed: int = 0
    loop: loop.LoopConfig = dataclasses.field(
        default_factory=lambda: loop.LoopConfig(
            max_steps=150, warmup_steps=5, decay_fraction=0.0, log_every_steps=1
        )
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if min(self.group - 1, *self._counts) < 1:
            raise ValueError(
                "group must be 2 or more, prompts_per_step, updates_per_step, answers_at_once and "
                f"rows_at_once 1 or more, got {self.group} and {self._counts}"
            )
        if (
            min(self.temperature, self.clip_low, self.clip_high) <= 0
            or min(self.kl_weight, self.least_spread) < 0
        ):
            raise ValueError(
                "temperature and the clip range must be above 0, kl_weight and least_spread 0 or more, got "
                f"{self.temperature}, {self.clip_low}, {self.clip_high}, {self.kl_weight} and "
                f"{self.least_spread}"
            )

    @property
    def _counts(self) -> tuple[int, ...]:
        return self.prompts_per_step, self.updates_per_step, self.answers_at_once, self.rows_at_once

    @property
    def sampling(self) -> Sampling:
        """Of rollouts: nothing is cut off, so that what is learnt is what was drawn from."""
        free = Truncation(temperature=self.temperature)
        return Sampling(text=free, image=free, guidance=self.guidance)


class Rows:
    """Rollouts as padded rows: `ids` [B, T + 1], `weights` [B, T] of the targets (0 = not learnt)."""

    def __init__(self, rollouts: Sequence[Rollout], *, config: GrpoTraining, vocabulary: Vocabulary) -> None:
        length = max(len(r.prompt_ids) + len(r.answer_ids) for r in rollouts)
        ids = np.full((len(rollouts), length), vocabulary.pad, np.int64)
        weights = np.zeros((len(rollouts), length), np.float32)
        for row, kept, rollout in zip(ids, weights, rollouts, strict=True):
            start = len(rollout.prompt_ids)
            stop = start + len(rollout.answer_ids)
            row[:stop] = rollout.prompt_ids + rollout.answer_ids
            visual = row[start:stop] >= vocabulary.visual_start
            kept[start:stop] = rollout.drawn * np.where(visual, config.visual_weight, config.text_weight)
        self.ids, self.weights = torch.from_numpy(ids), torch.from_numpy(weights[:, 1:])


def advantages(totals: np.ndarray, *, normalise: bool, least_spread: float = 0.0) -> np.ndarray:
    """[groups, answers] rewards -> how far each is above its group's mean, in standard deviations of its
    group, each taken for `least_spread` at least. A group of equals teaches nothing.
    """
    centred = totals - totals.mean(axis=1, keepdims=True)
    spread = totals.std(axis=1, keepdims=True)
    one = (rewards.HIGHEST - rewards.LOWEST) / 9
    scale = np.maximum(spread, least_spread) if normalise else np.full_like(spread, one)
    return np.where(spread > 1e-6, centred / np.maximum(scale, 1e-6), 0.0)


def policy_loss(
    now: Tensor, then: Tensor, reference: Tensor, advantage: Tensor, weights: Tensor, *, config: GrpoTraining
) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss [] and figures of log probabilities [B, T] under the weights now, at the draw and at the start;
    advantage [B]. Each answer counts alike, however long it is.
    """
    ratio = (now - then).exp()
    clipped = ratio.clamp(1.0 - config.clip_low, 1.0 + config.clip_high)
    gain = torch.minimum(ratio * advantage[:, None], clipped * advantage[:, None])
    away = reference - now
    kl = away.exp() - away - 1.0  # unbiased and never negative
    per_answer = weights.sum(dim=1).clamp_min(1e-6)
    loss = (((config.kl_weight * kl - gain) * weights).sum(dim=1) / per_answer).mean()
    learnt = weights > 0
    outside = ((ratio - clipped).abs() > 0) & learnt
    figures = {
        "kl": (kl.detach() * weights).sum() / weights.sum().clamp_min(1e-6),
        "clipped_share": outside.sum() / learnt.sum().clamp_min(1),
    }
    return loss, figures


class GrpoTrainer:
    """The policy, the model that it began from, and one step."""

    def __init__(
        self,
        policy: Transformer,
        *,
        config: GrpoTraining,
        source: Source,
        prompts: Sequence[Prompt],
        blend: rewards.Blend,
        device: torch.device,
    ) -> None:
        self.config, self.device, self.prompts, self.blend = config, device, list(prompts), blend
        self.vocabulary = source.tokenizer.vocabulary
        self.policy = policy.to(device)
        self.reference: Transformer | None = None
        if config.kl_weight:
            self.reference = copy.deepcopy(policy).requires_grad_(False).eval()
        self.drawer = Drawer(
            policy,
            vision=source.vision,
            tokenizer=source.tokenizer,
            manifest=source.manifest,
            size_px=picture_side(config.size_px, source),
        )
        self.optimizers = make_optimizers(policy, config)
        if config.recompute_layers:  # behind the copies above, which need no gradients
            sharding.checkpoint_layers(policy)

    def step(self, step: int, factor: float) -> Mapping[str, float | Tensor]:
        """Draw, score, learn. Figures: mean reward, each term's mean, KL, clipped share, gradient norm, and
        how long drawing and scoring took, and the rest."""
        begun = time.monotonic()
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["base_lr"] * factor
        rollouts, scores = self.answers(self._asked(step), stream=step, group=self.config.group)
        answered = time.monotonic()
        totals = scores.total.reshape(-1, self.config.group)
        config = self.config
        gains = advantages(totals, normalise=config.normalise, least_spread=config.least_spread).ravel()
        order = np.random.default_rng((self.config.seed, step, 1)).permutation(len(rollouts))
        then, reference = self._before(rollouts)
        figures: list[dict[str, float]] = []
        for part in np.array_split(order, self.config.updates_per_step):
            figures.append(self._update(part, rollouts, gains, then, reference))
        means = {name: float(np.mean([one[name] for one in figures])) for name in figures[0]}
        times = {"answering_s": answered - begun, "learning_s": time.monotonic() - answered}
        return {**means_of(scores), **means, **times}

    def answers(
        self, prompts: Sequence[Prompt], *, stream: int, group: int
    ) -> tuple[list[Rollout], rewards.Scores]:
        """`group` answers to each prompt, side by side, and their scores."""
        asked = [prompt for prompt in prompts for _ in range(group)]
        keys = np.random.SeedSequence((self.config.seed, stream)).generate_state(len(asked), np.uint64)
        rollouts = self.drawer.draw(
            asked,
            [int(key) for key in keys],
            sampling=self.config.sampling,
            at_once=self.config.answers_at_once,
        )
        return rollouts, self.blend([rollout.answer for rollout in rollouts])

    def _asked(self, step: int) -> list[Prompt]:
        """The prompts of a step: all of them in turn, in an order of its own each round."""
        first = step * self.config.prompts_per_step
        chosen = []
        for number in range(first, first + self.config.prompts_per_step):
            turn, at = divmod(number, len(self.prompts))
            order = np.random.default_rng((self.config.seed, turn)).permutation(len(self.prompts))
            chosen.append(self.prompts[order[at]])
        return chosen

    def _before(self, rollouts: Sequence[Rollout]) -> tuple[list[Tensor] | None, list[Tensor] | None]:
        """Log probabilities [T] of each answer's row, under the weights that drew it and at the start. None
        where they are those of the update itself: it is the only one, or there is no reference.
        """
        moves = self.config.updates_per_step > 1
        then: list[Tensor | None] = [None] * len(rollouts)
        reference: list[Tensor | None] = [None] * len(rollouts)
        with torch.no_grad():
            for part in self._parts(np.arange(len(rollouts)), rollouts):
                rows = self._rows([rollouts[i] for i in part])
                for model, found in ((self.policy if moves else None, then), (self.reference, reference)):
                    if model is not None:
                        logs_BT = self.log_probabilities(model, rows.ids, learnt_BT=rows.weights > 0)
                        for i, row in zip(part, logs_BT, strict=True):
                            found[i] = row
        return _whole(then), _whole(reference)

    def _update(
        self,
        chosen: np.ndarray,
        rollouts: Sequence[Rollout],
        gains: np.ndarray,
        then: Sequence[Tensor] | None,
        reference: Sequence[Tensor] | None,
    ) -> dict[str, float]:
        """One optimiser step over some of the answers."""
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        sums: dict[str, float] = {}
        for part in self._parts(chosen, rollouts):
            rows = self._rows([rollouts[i] for i in part])
            length = rows.weights.shape[1]
            now = self.log_probabilities(self.policy, rows.ids, learnt_BT=rows.weights > 0)
            before = now.detach() if then is None else _padded([then[i] for i in part], length)
            loss, figures = policy_loss(
                now,
                before,
                before if reference is None else _padded([reference[i] for i in part], length),
                torch.tensor(gains[part], dtype=torch.float32, device=self.device),
                rows.weights.to(self.device),
                config=self.config,
            )
            share = len(part) / len(chosen)
            (loss * share).backward()
            for name, value in {"loss": loss, **figures}.items():
                sums[name] = sums.get(name, 0.0) + float(value.detach()) * share
        norm = torch.nn.utils.clip_grad_norm_(self.policy.parameters(), self.config.gradient_clip)
        for optimizer in self.optimizers:
            optimizer.step()
        return {**sums, "gradient_norm": float(norm)}

    def _parts(self, chosen: np.ndarray, rollouts: Sequence[Rollout]) -> Iterator[np.ndarray]:
        """Answers that go through the model together: of like length, so that little is padding."""
        lengths = [len(rollouts[i].prompt_ids) + len(rollouts[i].answer_ids) for i in chosen]
        chosen = chosen[np.argsort(lengths, kind="stable")]
        for start in range(0, len(chosen), self.config.rows_at_once):
            yield chosen[start : start + self.config.rows_at_once]

    def _rows(self, rollouts: Sequence[Rollout]) -> Rows:
        return Rows(rollouts, config=self.config, vocabulary=self.vocabulary)

    def log_probabilities(
        self, model: Transformer, ids_BT: Tensor, *, learnt_BT: Tensor | None = None
    ) -> Tensor:
        """[B, T] of ids[:, 1:], fp32, as rollouts draw them: codes among codes, at the temperature. 0 where
        `learnt_BT` is False; None: everywhere computed."""
        learnt_BT = torch.ones_like(ids_BT[:, 1:], dtype=torch.bool) if learnt_BT is None else learnt_BT
        index_N = learnt_BT.cpu().flatten().nonzero()[:, 0].to(self.device)
        dtype = self.config.dtype(self.device)
        ids_BT = ids_BT.to(self.device)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
            hidden_ND = model(ids_BT[:, :-1]).flatten(0, 1)[index_N]
            targets_N = ids_BT[:, 1:].flatten()[index_N]
            pieces = zip(
                hidden_ND.split(self.config.loss_tokens),
                targets_N.split(self.config.loss_tokens),
                strict=True,
            )
            found = [recomputed(self._piece, model, *piece, use_reentrant=False) for piece in pieces]
        logs_N = torch.cat(found)
        return logs_N.new_zeros(learnt_BT.numel()).index_copy(0, index_N, logs_N).view(learnt_BT.shape)

    def _piece(self, model: Transformer, hidden_ND: Tensor, targets_N: Tensor) -> Tensor:
        logits_NV = model.logits(hidden_ND).float() / self.config.temperature
        start, stop = self.vocabulary.visual_start, self.vocabulary.visual_stop
        visual_N = (targets_N >= start) & (targets_N < stop)
        among_codes_N = logits_NV[:, start:stop].logsumexp(dim=-1)
        among_all_N = logits_NV.logsumexp(dim=-1)
        chosen_N = logits_NV.gather(1, targets_N[:, None])[:, 0]
        return chosen_N - torch.where(visual_N, among_codes_N, among_all_N)


def train(config: GrpoTraining, *, terms: Mapping[str, rewards.Open] | None = None) -> dict[str, float]:
    """Run the stage; writes a checkpoint folder into `config.out` whenever it saves its state, and scores and
    pictures of held-out prompts before, on the way and after. `terms` open rewards that others hand down, by
    name.
    """
    begun, device = time.monotonic(), pick_device(config.device)
    ranks = Ranks(device)
    if ranks.world > 1:
        raise ValueError("stage grpo trains in one process: start it without torchrun")
    source, out = open_source(config.init_from, device=device), Path(config.out)
    blend = rewards.Blend(config.rewards, handed_down=terms or {}, device=device)
    model = with_dropout(checkpoint.load(source.weights, dtype=torch.float32), 0.0).train()
    asked = [
        read_prompts(file, source, size_px=picture_side(config.size_px, source))
        for file in (config.prompts, config.held_out)
        if file
    ]
    trainer = GrpoTrainer(model, config=config, source=source, prompts=asked[0], blend=blend, device=device)
    held = HeldOut(
        trainer.answers, asked[1] if len(asked) > 1 else [], group=config.measured_answers, out=out
    )
    store = ShardedStore(out, "grpo", module=model, optimizers=trainer.optimizers, ranks=ranks)
    before = held.before(resume=config.loop.resume)

    def on_log(step: int) -> Mapping[str, float]:
        return held.measure(step) if step % config.measure_every_steps == 0 else {}

    loop.run(
        config.loop,
        out=out,
        name="grpo",
        train_step=trainer.step,
        store=store,
        on_log=on_log,
        on_save=lambda: save_checkpoint(out, model, source=source),
        begun=begun,
        closing_s=lambda: held.took_s,
    )
    after = held.measure()
    for name in after:
        print(f"grpo: {name} {before[name]:.3f} -> {after[name]:.3f}", flush=True)
    return after


def _whole(rows: Sequence[Tensor | None]) -> list[Tensor] | None:
    """All rows, or None where there are none."""
    there = [row for row in rows if row is not None]
    return there if there else None


def _padded(rows: Sequence[Tensor], length: int) -> Tensor:
    """[B, length] of rows that may be shorter or longer: what is cut or filled up has no weight."""
    return torch.stack([nn.functional.pad(row, (0, length - len(row))) for row in rows])
