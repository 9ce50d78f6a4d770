"""One step of stage `dida`: rows with noisy copies of their pictures, whose codes are learnt."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from time import monotonic as _now
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from emuworld.checkpoint_folder import BUILTIN
from emuworld.decoding.noise import Path as NoisePath
from emuworld.decoding.noise import noisy_ids
from emuworld.model.adapter import Adapter, load_adapter
from emuworld.model.attention import AttentionFunction
from emuworld.model.transformer import Transformer
from emuworld.tokens.vocabulary import Vocabulary
from emuworld.training.examples import Batch
from emuworld.training.noisy_blocks import NoisyRows, dense_attention, flex_attention, lay_out
from emuworld.training.objective import compile_layers

if TYPE_CHECKING:
    from emuworld.training.distil import DidaTraining

_LATEST = 0.999  # of the times that are trained: at 1 nothing is left to learn (URSA)
_BANDS = 4  # of times, whose validation losses are told apart


class DidaTrainer:
    """Transformer, adapter, optimiser and one training step."""

    def __init__(
        self,
        config: DidaTraining,
        *,
        model: Transformer,
        vocabulary: Vocabulary,
        path: NoisePath,
    ) -> None:
        self.config, self.model, self.vocabulary, self.path = config, model, vocabulary, path
        self.batches: Callable[[], list[Batch]] = list
        self.validation_s = 3.0  # that the last validation took
        self.adapter: Adapter | None = None
        if config.adaptation == "adapter":
            generator = torch.Generator().manual_seed(config.seed)
            self.adapter = Adapter(model, rank=config.rank, generator=generator).to(model.device)
            if config.adapter_from:
                folder = BUILTIN.get(config.adapter_from, config.adapter_from)
                self.adapter.start_from(load_adapter(folder, model))
            self.adapter.attach(model)
        else:
            model.requires_grad_(True)
        self.trained = list((self.adapter or model).parameters())
        fused = model.device.type == "cuda"
        self.optimizer = torch.optim.AdamW(
            [
                {"params": [p for p in self.trained if p.ndim > 1], "weight_decay": config.weight_decay},
                {"params": [p for p in self.trained if p.ndim == 1], "weight_decay": 0.0},
            ],
            lr=config.learning_rate,
            betas=(0.9, 0.95),
            fused=fused,
        )

    def step(self, step: int, factor: float) -> Mapping[str, float | Tensor]:
        """One optimiser step over a batch of each bucket; losses are means in nats."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.learning_rate * factor
        self.optimizer.zero_grad(set_to_none=True)
        rng = self._generator(step)
        batches = self.batches()
        noisy = causal = torch.zeros((), device=self.model.device)
        for batch in batches:
            noisy_loss, causal_loss = self.losses(batch, rng=rng)
            loss = noisy_loss.mean() + self.config.causal_weight * causal_loss
            (loss / len(batches)).backward()
            noisy = noisy + noisy_loss.detach().mean() / len(batches)
            causal = causal + causal_loss.detach() / len(batches)
        norm = torch.nn.utils.clip_grad_norm_(self.trained, self.config.gradient_clip)
        self.optimizer.step()
        figures = {"noisy_loss": noisy, "gradient_norm": norm}
        return figures if self.adapter else {**figures, "causal_loss": causal}

    def compile_layers(self) -> None:
        """One layer for all, once a shape of rows; the attention function is compiled along."""
        compile_layers(self.model, dynamic=False)
        if self.adapter is not None:  # or the first layer, whose input asks for none, would be another case
            self.model.model.embed_tokens.register_forward_hook(_with_gradient)

    def losses(
        self, batch: Batch, *, rng: torch.Generator, time: float | None = None
    ) -> tuple[Tensor, Tensor]:
        """Loss of every noisy code [N] at random times, or all at one; mean loss of the clean tokens (0 with
        an adapter, which does not change it)."""
        rows, device = self.rows(batch), self.model.device
        # Found on the host: nothing here waits for the device.
        learnt = torch.from_numpy(np.flatnonzero(rows.targets >= 0)).to(device)
        on_device = {
            field.name: torch.from_numpy(getattr(rows, field.name)).to(device)
            for field in dataclasses.fields(NoisyRows)
        }
        blocks, positions = on_device["blocks"], on_device["positions"]
        ids = self._corrupted(rows, on_device, rng=rng, time=time)
        attention = self.attention(blocks, on_device["starts"], on_device["reach"])
        with torch.autocast(device.type, torch.bfloat16, enabled=self._autocast):
            hidden_BSD = self._hidden(ids, positions, blocks, attention)
            start, stop = self.vocabulary.visual_start, self.vocabulary.visual_stop
            logits_NV = self.model.logits(hidden_BSD.flatten(0, 1)[learnt], start=start, stop=stop)
        targets_N = on_device["targets"].flatten()[learnt]
        noisy = F.cross_entropy(logits_NV.float(), targets_N, reduction="none")
        if self.adapter:
            return noisy, noisy.new_zeros(())
        return noisy, self._causal_loss(hidden_BSD, batch)

    @property
    def _autocast(self) -> bool:
        """On a GPU, unless the weights have 16 bits themselves."""
        return self.model.device.type == "cuda" and self.model.dtype == torch.float32

    def attention(self, blocks: Tensor, starts: Tensor, reach: Tensor) -> AttentionFunction:
        """Who sees whom in such rows, in the form that the device computes."""
        flex = self.config.attention == "flex" or (self.config.attention == "auto" and blocks.is_cuda)
        return (flex_attention if flex else dense_attention)(blocks, starts, reach)

    def _hidden(self, ids: Tensor, positions: Tensor, blocks: Tensor, attention: AttentionFunction) -> Tensor:
        if self.adapter is None:
            hidden: Tensor = self.model(ids, attention=attention, positions_BT=positions)
            return hidden
        with self.adapter.active(blocks > 0):
            hidden = self.model(ids, attention=attention, positions_BT=positions)
        return hidden

    def _causal_loss(self, hidden_BSD: Tensor, batch: Batch) -> Tensor:
        """As in pretraining, over the clean tokens."""
        targets = torch.from_numpy(batch.ids[:, 1:]).to(hidden_BSD.device)
        weights = torch.from_numpy(batch.weights).to(hidden_BSD.device)
        with torch.autocast(hidden_BSD.device.type, torch.bfloat16, enabled=self._autocast):
            logits_BTV = self.model.logits(hidden_BSD[:, : targets.shape[1]])
        losses = F.cross_entropy(logits_BTV.flatten(0, 1).float(), targets.flatten(), reduction="none")
        return (losses * weights.flatten()).sum() / weights.sum().clamp_min(1e-6)

    def rows(self, batch: Batch) -> NoisyRows:
        """The batch with a noisy copy of each picture, not corrupted yet."""
        ids_BT = batch.ids[:, :-1]
        return lay_out(
            ids_BT,
            inputs_BT=batch.inputs,
            documents_BT=batch.documents,
            num_blocks=self.config.num_blocks(batch.kind, ids_BT.shape[1]),
            block_length=self.config.block_length,
            vocabulary=self.vocabulary,
        )

    def _corrupted(
        self, rows: NoisyRows, on_device: Mapping[str, Tensor], *, rng: torch.Generator, time: float | None
    ) -> Tensor:
        """The ids with each noisy picture at a time of its own."""
        ids, blocks = on_device["ids"], on_device["blocks"]
        noisy = np.flatnonzero((rows.blocks > 0) & (rows.ids >= self.vocabulary.visual_start))
        places = torch.from_numpy(noisy).to(ids.device)
        times_BK = _spread_times((len(ids), max(1, int(rows.blocks.max()))), rng=rng)
        times_BK = self.config.noise.shifted(times_BK) if time is None else torch.full_like(times_BK, time)
        times_BS = times_BK.gather(1, (blocks - 1).clamp_min(0))
        kept, drawn = torch.rand((2, len(noisy)), generator=rng, device=ids.device, dtype=torch.float64)
        codes = ids.flatten()[places] - self.vocabulary.visual_start
        corrupted = self.path.corrupt(codes, times_BS.flatten()[places], kept_N=kept, drawn_N=drawn)
        return ids.flatten().index_copy(0, places, noisy_ids(corrupted, self.vocabulary)).view_as(ids)

    def validation_losses(self, batches: Sequence[Batch]) -> dict[str, float]:
        """Mean loss of noisy codes in nats, over all times and at the middle of each band of them."""
        begun = _now()
        bands = [(band + 0.5) / _BANDS for band in range(_BANDS)]
        means = []
        with self._measuring():
            for time in bands:
                rng = self._generator(-1)
                losses = [self.losses(batch, rng=rng, time=time)[0].detach() for batch in batches]
                means.append(float(torch.cat(losses).mean()))
        figures = {f"validation_loss_t{time:.3f}": mean for time, mean in zip(bands, means, strict=True)}
        self.validation_s = _now() - begun
        return {"validation_loss": sum(means) / len(means), **figures}

    @contextlib.contextmanager
    def _measuring(self) -> Iterator[None]:
        """Compiled layers measure as they train, or each would be compiled once more without gradients."""
        if self.config.compile and not self.model.config.attention_dropout:
            yield
            return
        with torch.no_grad():
            self.model.eval()
            yield
            self.model.train()

    def _generator(self, step: int) -> torch.Generator:
        seed = int(np.random.SeedSequence((self.config.seed, step + 1)).generate_state(1, np.uint64)[0] >> 1)
        return torch.Generator(self.model.device).manual_seed(seed)

    def state(self) -> dict[str, Any]:
        return {"model": (self.adapter or self.model).state_dict(), "optimizer": self.optimizer.state_dict()}

    def set_state(self, state: Mapping[str, Any]) -> None:
        (self.adapter or self.model).load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])


def _with_gradient(_module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
    return output.requires_grad_() if torch.is_grad_enabled() else output


def _spread_times(shape: tuple[int, int], *, rng: torch.Generator) -> Tensor:
    """Uniform times of which a batch has early, middle and late ones in equal numbers: the loss of a picture
    near the noise is ten times that of one near its codes, and would drown what a step changes."""
    count = shape[0] * shape[1]
    offset, order = torch.rand((2, count), generator=rng, device=rng.device)
    spread = (offset[0] + torch.arange(count, device=rng.device) / count) % 1.0
    return spread[order.argsort()].view(shape) * _LATEST
