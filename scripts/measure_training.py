"""Tokens a second and model-FLOP utilisation of the training step, on random tokens.

    ./run python scripts/measure_training.py model=small
    ./run torchrun --nproc-per-node 2 scripts/measure_training.py model=emu3.5 layers=4 parallel=fsdp rows=16
    ./run torchrun --nproc-per-node 2 scripts/measure_training.py model=emu3.5 layers=4 parallel=tp

Two GPUs against one: the ratio of tokens_per_s, with twice the rows or the same (rows are those of all
processes). With equal rows all see the same tokens and begin alike, so `losses`, step by step, should be
equal but for rounding.
FLOPs are 6 a parameter and token (embedding apart), plus 6 layers T H d a token for causal attention;
peak_tflops is the device's (989: H200, bf16, dense).
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import time

import numpy as np
import torch

from emuworld.model.transformer import Transformer, sized
from emuworld.tokens.vocabulary import EMU35, builtin
from emuworld.training.devices import pick_device
from emuworld.training.examples import Batch
from emuworld.training.ranks import Ranks
from emuworld.training.trainer import Optimisation, SupervisedTrainer


@dataclasses.dataclass(frozen=True, kw_only=True)
class Measurement:
    """What is measured."""

    model: str = "small"
    layers: int = 0  # of the named size; 0: all
    tokens: int = 4096  # of a row
    rows: int = 8  # of a step, all processes together
    steps: int = 10
    warmup_steps: int = 3
    parallel: str = "fsdp"
    optimizer: str = "adamw"
    recompute_layers: bool = False
    loss_tokens: int = 8192  # logits of so many tokens are held at once
    compile: bool = False
    device: str = "auto"
    peak_tflops: float = 989.0


def settings(words: list[str]) -> Measurement:
    """From key=value words."""
    fields = {field.name: type(field.default) for field in dataclasses.fields(Measurement)}
    given = dict(word.split("=", 1) for word in words)
    unknown = given.keys() - fields.keys()
    if unknown:
        raise SystemExit(f"unknown settings {sorted(unknown)}; known: {', '.join(fields)}")
    return Measurement(
        **{
            key: value == "true" if fields[key] is bool else fields[key](value)
            for key, value in given.items()
        }
    )


def measure(config: Measurement) -> dict[str, object]:
    """Figures of the whole group."""
    device = pick_device(config.device)
    ranks = Ranks(device, parallel=config.parallel)
    vocabulary = EMU35 if config.model == "emu3.5" else builtin(num_text_tokens=512, num_visual_tokens=4096)
    shape = sized(config.model, vocab_size=vocabulary.size)
    shape = dataclasses.replace(shape, num_layers=config.layers or shape.num_layers)
    with device:
        model = Transformer(shape)
    model.init_weights(torch.Generator(device).manual_seed(0))
    num_inside = sum(p.numel() for n, p in model.named_parameters() if "embed_tokens" not in n)
    if shape.tie_word_embeddings:
        num_inside += vocabulary.size * shape.hidden_size  # the head's product
    rows, own = (config.rows, config.tokens + 1), ranks.share(config.rows)
    ids = np.random.default_rng(0).integers(vocabulary.visual_start, vocabulary.size, rows)
    ids = ids[ranks.data_rank * own : (ranks.data_rank + 1) * own]
    weights = np.ones((len(ids), config.tokens), np.float32)
    batch = Batch(kind="walk", ids=ids, inputs=ids[:, :-1].copy(), weights=weights)
    trainer = SupervisedTrainer(
        model,
        config=Optimisation(
            optimizer=config.optimizer,
            recompute_layers=config.recompute_layers,
            loss_tokens=config.loss_tokens,
            compile=config.compile,
        ),
        vocabulary=vocabulary,
        device=device,
        ranks=ranks,
        next_batches=lambda: [batch],
    )
    times, losses = [], []
    for step in range(config.warmup_steps + config.steps):
        start = time.perf_counter()
        figures = trainer.step(step, 0.1)
        float(figures["gradient_norm"])  # waits for the device
        times.append(time.perf_counter() - start)
        losses.append(ranks.total(float(figures["visual_loss"]))[0] / ranks.data_world)
    (seconds,) = ranks.highest(float(np.median(times[config.warmup_steps :])))
    tokens_per_s = config.rows * config.tokens / seconds
    attention = 6 * shape.num_layers * config.tokens * shape.num_heads * shape.head_dim
    flops = tokens_per_s * (6 * num_inside + attention)
    memory = torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else 0.0
    ranks.close()
    return {
        "processes": ranks.world,
        "parameters": float(num_inside),
        "seconds_a_step": seconds,
        "tokens_per_s": tokens_per_s,
        "flop_utilisation": flops / (config.peak_tflops * 1e12 * ranks.world),
        "memory_gib": memory,
        "losses": losses,
    }


if __name__ == "__main__":
    chosen = settings(sys.argv[1:])
    figures = measure(chosen)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    if os.environ.get("RANK", "0") == "0":
        print(json.dumps({**dataclasses.asdict(chosen), "device_name": device, **figures}))
