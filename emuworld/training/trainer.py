"""Transformer, optimisers and one training step, on one device or on many.

Shapes: B rows, T tokens.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from emuworld.model.adapter import Adapter
from emuworld.model.documents import Documents, documents
from emuworld.model.transformer import Transformer
from emuworld.tokens.vocabulary import Vocabulary
from emuworld.training import sharding
from emuworld.training.examples import Batch
from emuworld.training.graphed import BatchGraphs
from emuworld.training.muon import Muon
from emuworld.training.objective import Objective
from emuworld.training.ranks import Ranks

PRECISIONS = ("auto", "bf16", "fp32")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Optimisation:
    """How weights are moved, and in which arithmetic; defaults are the built-in model's."""

    optimizer: str = "muon"  # muon | adamw; the paper has adamw
    learning_rate: float = 3e-3  # of the matrices inside the layers
    embedding_learning_rate: float = 2e-3  # of everything else
    weight_decay: float = 0.1  # of the matrices inside the layers
    gradient_clip: float = 1.0  # the norm beyond which gradients are scaled down
    precision: str = "auto"  # of the products: bf16, fp32, or bf16 on a GPU; weights are kept in fp32
    compile: bool = False  # layers and loss by torch.compile: faster steps, after some half a minute
    graphs: bool = False  # replay batches as CUDA graphs: less work for the processor, more memory
    recompute_layers: bool = False  # activation checkpoints: less memory, a third more time
    loss_tokens: int = 8_192  # logits of so many tokens are held at once

    def __post_init__(self) -> None:
        if self.optimizer not in ("muon", "adamw"):
            raise ValueError(f"optimizer {self.optimizer!r} is not known; expected 'muon' or 'adamw'")
        if self.precision not in PRECISIONS:
            raise ValueError(f"precision {self.precision!r} is not known; expected {', '.join(PRECISIONS)}")
        if self.loss_tokens < 1:
            raise ValueError(f"loss_tokens must be at least 1, got {self.loss_tokens}")

    def dtype(self, device: torch.device) -> torch.dtype:
        """Of the products."""
        bf16 = self.precision == "bf16" or (self.precision == "auto" and device.type == "cuda")
        return torch.bfloat16 if bf16 else torch.float32


class SupervisedTrainer:
    """One optimiser step after the other over batches that somebody draws.

    Args:
        model: initialised, alike in every process; it is moved, and cut where there are several processes.
        next_batches: the batches of this process's row for the next step.
        own_passes: as `Objective` takes it.
        seed: of dropout, where the transformer has it.
        adapter: trained in place of the model that it is attached to.
    """

    def __init__(
        self,
        model: Transformer,
        *,
        config: Optimisation,
        vocabulary: Vocabulary,
        device: torch.device,
        ranks: Ranks,
        next_batches: Callable[[], list[Batch]],
        own_passes: int = 1,
        seed: int = 0,
        adapter: Adapter | None = None,
    ) -> None:
        if adapter is not None and ranks.world > 1:
            raise ValueError("an adapter trains in one process: start the stage without torchrun")
        if config.graphs:
            _check_graphs(model, device=device, ranks=ranks, adapter=adapter)
        self.config = config
        self.adapter = adapter
        self.device = device
        self.ranks = ranks
        self.vocabulary = vocabulary
        self.model = model.to(device)
        self._next_batches = next_batches
        self._seed = seed
        dtype = config.dtype(device)
        alone = ranks.mesh is None
        tensor_mesh = ranks.mesh["tensor"] if ranks.mesh is not None and ranks.tensor > 1 else None
        self.objective = Objective(
            self.model,
            vocabulary=vocabulary,
            autocast=torch.bfloat16 if alone and dtype == torch.bfloat16 else None,
            tensor_mesh=tensor_mesh,
            loss_tokens=config.loss_tokens,
            own_passes=own_passes,
        )
        self._cut(tensor_mesh, dtype)
        self._graphs = BatchGraphs(self._learn, device=device) if config.graphs else None
        self.optimizers = (
            make_optimizers(self.model, config) if adapter is None else adapter_optimizers(adapter, config)
        )

    def _cut(self, tensor_mesh: DeviceMesh | None, dtype: torch.dtype) -> None:
        """Everything that stands between one device and many."""
        if self.config.recompute_layers:
            sharding.checkpoint_layers(self.model)
        if tensor_mesh is not None:
            sharding.tensor_parallel(self.model, tensor_mesh)
        if self.config.compile:
            self.objective.compile_parts()
        if self.ranks.mesh is None:
            return
        sharding.fully_sharded(
            self.objective,
            self.model,
            self.ranks.mesh["data"],
            param_dtype=None if dtype == torch.float32 else dtype,
        )

    def step(self, step: int, factor: float) -> Mapping[str, float | Tensor]:
        """One optimiser step over the batches of all rows; losses are means over its tokens, in nats."""
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["base_lr"] * factor
            optimizer.zero_grad(set_to_none=self._graphs is None)
        batches = self.ranks.from_leader(self._next_batches() if self.ranks.leads_row else None)
        # Processes average their gradients: each divides by its share of the weight of all.
        (weight,) = self.ranks.total(float(sum(batch.weights.sum() for batch in batches)))
        share = torch.full((), self.ranks.data_world / max(weight, 1e-9), device=self.device)
        text = visual = torch.zeros((), device=self.device)
        with self._random(step):
            for number, batch in enumerate(batches, start=1):
                self._reduce_gradients(number == len(batches))
                inputs, targets, weights, draws, packed = self._to_device(batch)
                rows = (inputs, targets, weights, draws, share)
                if self._graphs is not None and packed is None:
                    text_sum, visual_sum = self._graphs(*rows)
                else:
                    text_sum, visual_sum = self._learn(*rows, packed)
                text, visual = text + text_sum, visual + visual_sum
        trained = self.adapter or self.model
        self.ranks.average_gradients(trained.parameters())
        norm = torch.nn.utils.clip_grad_norm_(trained.parameters(), self.config.gradient_clip)
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        for optimizer in self.optimizers:
            optimizer.step()
        counts = [self._counts(batch) for batch in batches]
        return {
            "visual_loss": visual / max(1, sum(c[1] for c in counts)),
            "text_loss": text / max(1, sum(c[0] for c in counts)),
            "gradient_norm": norm,
            "tokens": float(sum(batch.weights.size for batch in batches) * self.ranks.data_world),
        }

    def _learn(
        self,
        inputs_BT: Tensor,
        targets_BT: Tensor,
        weights_BT: Tensor,
        draws_RT: Tensor,
        share: Tensor,
        packed: Documents | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Add a batch's gradients, times `share`; sums of the losses of text and of visual targets (nats)."""
        with self._adapted(inputs_BT):
            loss, text_sum, visual_sum = self.objective(inputs_BT, targets_BT, weights_BT, draws_RT, packed)
            (loss * share).backward()
        return text_sum, visual_sum

    def _reduce_gradients(self, now: bool) -> None:
        """Of several batches a step only the last one's backward pass adds up over the processes."""
        if self.ranks.mesh is not None:
            self.objective.set_requires_gradient_sync(now)  # type: ignore[operator]  # FSDP2's

    def _adapted(self, inputs_BT: Tensor) -> contextlib.AbstractContextManager[None]:
        """The adapter, where there is one, is active on every token, in the backward pass too: layers may be
        computed again there.
        """
        if self.adapter is None:
            return contextlib.nullcontext()
        return self.adapter.active(torch.ones_like(inputs_BT, dtype=torch.bool))

    @contextlib.contextmanager
    def _random(self, step: int) -> Iterator[None]:
        """Dropout draws from the step and the row, so that a resumed run goes on as an unbroken one."""
        if not self.model.config.attention_dropout:
            yield
            return
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices):
            key = np.random.SeedSequence((self._seed, step, self.ranks.data_rank))
            torch.manual_seed(int(key.generate_state(1)[0]))
            yield

    def validation_losses(self, batches: list[Batch]) -> dict[str, float]:
        """Mean losses in nats over given batches, and of pictures for each kind of bucket by itself. All
        processes call it with the same batches.
        """
        self.objective.eval()
        sums = {
            kind: self._sums([b for b in batches if b.kind == kind])
            for kind in sorted({b.kind for b in batches})
        }
        self.objective.train()
        text, num_text, visual, num_visual = np.sum(list(sums.values()), axis=0)
        figures = {
            "validation_visual_loss": float(visual / max(1, num_visual)),
            "validation_text_loss": float(text / max(1, num_text)),
        }
        for kind, of_kind in sums.items():
            figures[f"validation_visual_loss_{kind}"] = of_kind[2] / max(1, of_kind[3])
        return figures

    @torch.no_grad()
    def _sums(self, batches: list[Batch]) -> tuple[float, int, float, int]:
        """Sum of text losses and number of text targets, the same of visual ones."""
        text, num_text, visual, num_visual = 0.0, 0, 0.0, 0
        for batch in batches:
            inputs, targets, weights, _, packed = self._to_device(batch)
            # What was compiled for training would be compiled again to measure.
            with self._adapted(inputs), torch.compiler.set_stance("force_eager"):
                _, text_sum, visual_sum = self.objective(inputs, targets, weights, documents=packed)
            counts = self._counts(batch)
            text, num_text = text + float(text_sum), num_text + counts[0]
            visual, num_visual = visual + float(visual_sum), num_visual + counts[1]
        return text, num_text, visual, num_visual

    def _to_device(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor, Tensor, Documents | None]:
        """Inputs, targets and weights, [B, T] each, draws [R, T], and what packed documents see."""
        draws = np.empty((0, batch.inputs.shape[1]), np.float32) if batch.draws is None else batch.draws
        arrays = (batch.inputs, batch.ids, batch.weights, draws)
        inputs, ids, weights, drawn = (self._moved(array) for array in arrays)
        packed = None if batch.documents is None else documents(self._moved(batch.documents))
        return inputs, ids[:, 1:], weights, drawn, packed

    def _moved(self, array: np.ndarray) -> Tensor:
        """On the device; from pinned memory, because a plain copy waits until the GPU has nothing to do."""
        tensor = torch.from_numpy(array)
        if self.device.type != "cuda":
            return tensor.to(self.device)
        return tensor.pin_memory().to(self.device, non_blocking=True)

    def _counts(self, batch: Batch) -> tuple[int, int]:
        targets, trained = batch.ids[:, 1:], batch.weights > 0
        text = int(((targets < self.vocabulary.num_text_tokens) & trained).sum())
        return text, int(((targets >= self.vocabulary.visual_start) & trained).sum())

    def whole_model(self, dtype: torch.dtype) -> Transformer | None:
        """A copy of the trained transformer on the CPU, for the first process; every process calls it."""
        weights = sharding.whole_tensors(self.model, keep=self.ranks.first, dtype=dtype)
        if not self.ranks.first:
            return None
        with torch.device("meta"):
            copy = Transformer(self.model.config)
        copy.load_state_dict(weights, assign=True)
        copy.tie_weights()
        return copy


def _check_graphs(model: Transformer, *, device: torch.device, ranks: Ranks, adapter: Adapter | None) -> None:
    """ValueError where batches cannot be replayed."""
    why = None
    if device.type != "cuda":
        why = f"graphs are CUDA's, and this trains on {device}"
    elif ranks.mesh is not None:
        why = "parallel=fsdp and parallel=tp cut the weights, and only parallel=ddp can replay batches"
    elif model.config.attention_dropout:
        why = "dropout draws anew for every batch"
    elif adapter is not None:
        why = "an adapter learns in its place"
    if why is not None:
        raise ValueError(f"graphs=true cannot be had: {why}; set graphs=false")


def adapter_optimizers(adapter: Adapter, config: Optimisation) -> list[torch.optim.Optimizer]:
    """AdamW for matrices of low rank; their product is what decay would be about, so there is none."""
    group = {"params": list(adapter.parameters()), "base_lr": config.learning_rate, "weight_decay": 0.0}
    return [torch.optim.AdamW([group], betas=(0.9, 0.95), eps=1e-8)]


def make_optimizers(model: Transformer, config: Optimisation) -> list[torch.optim.Optimizer]:
    """AdamW for all, or Muon for the matrices inside the layers and AdamW for the rest."""
    matrices = [p for n, p in model.named_parameters() if ".layers." in n and p.ndim == 2]
    inside = {id(p) for p in matrices}
    embeddings = [p for p in model.parameters() if id(p) not in inside and p.ndim == 2]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    groups: list[dict[str, Any]] = [
        {"params": embeddings, "base_lr": config.embedding_learning_rate, "weight_decay": 0.0},
        {"params": vectors, "base_lr": config.embedding_learning_rate, "weight_decay": 0.0},
    ]
    fused = model.device.type == "cuda"
    if config.optimizer == "adamw":
        groups.append(
            {"params": matrices, "base_lr": config.learning_rate, "weight_decay": config.weight_decay}
        )
        return [torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-8, fused=fused)]
    muon = Muon([{"params": matrices, "base_lr": config.learning_rate}], weight_decay=config.weight_decay)
    return [torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-8, fused=fused), muon]
