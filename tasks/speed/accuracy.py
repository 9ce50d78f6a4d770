"""Command `bench what=fp8-accuracy`: what 8 bits cost a trained model, on any machine.

The model's own drawings are read again, word by word and code by code, by the transformer in fp32 and by each
rounded form of it; their scores of the visual ids are compared at every place of every picture. On the CPU
8-bit floating point is computed by definition.

Shapes: T tokens of a world, N places of its pictures, V visual ids.
"""

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from emuworld.model import checkpoint
from emuworld.model.cache import StaticCache
from emuworld.model.exact import ExactTransformer, exact
from emuworld.model.fused import FusedTransformer
from emuworld.model.transformer import Transformer
from emuworld.tasks.progress import OnProgress, quiet
from emuworld.tasks.run_log import Figures
from emuworld.tasks.speed import opened
from emuworld.tokens.vocabulary import Vocabulary
from emuworld.world_model import WorldModel

Reader = Callable[[list[int]], Tensor]
"""Ids of a world -> scores [N, V] of the visual ids, at every place of its pictures."""
_WINDOW = 8  # the drawings are the same, and sooner there
_FEW_TOKENS = 32  # of a call: as in decoding, activations keep their 16 bits


@dataclass(frozen=True, kw_only=True)
class Fp8Accuracy:
    """Error of the scores and agreement of the likeliest code: fp8, bf16 and int8 against fp32."""

    out: str = "outputs/bench/fp8-accuracy"  # folder of the figures
    model: str = "small"  # built-in name, or folder of a checkpoint
    device: str = "auto"  # auto | cpu | cuda
    modes: tuple[str, ...] = ("t2i", "explore")
    num_worlds: int = 6  # of each mode
    num_pictures: int = 3  # of a world that walks
    seed: int = 0
    budget_s: float = math.inf  # no part is begun that would end later


def run(config: Fp8Accuracy, *, on_progress: OnProgress = quiet) -> Path:
    """Measure; returns the file of figures."""
    model, log = opened.begin(config.model, device=config.device, out=config.out, budget_s=config.budget_s)
    plain = checkpoint.load(model.folder, device=model.device, dtype=torch.float32)
    vocabulary = model.manifest.vocabulary
    read = _reader(plain, vocabulary, num_tokens=None)
    forms = _forms(plain, vocabulary)
    for mode in config.modes:
        worlds: list[list[int]] = []
        log.run(f"{mode}: drawings", partial(_draw, worlds, config, model, mode, on_progress))
        expected = [read(ids) for ids in worlds]
        for name, form in forms.items():
            log.run(f"{mode}: {name}", partial(_compare, form, worlds, expected))
    return log.path


def _forms(plain: Transformer, vocabulary: Vocabulary) -> dict[str, Reader]:
    """The rounded forms; those in fp8 take their weights from copies."""
    in_fp8 = FusedTransformer(copy.deepcopy(plain), weights="fp8")
    head_in_bf16 = FusedTransformer(copy.deepcopy(plain), weights="fp8", head="bf16")
    forms: dict[str, Reader] = {
        "bf16": _reader(copy.deepcopy(plain).bfloat16(), vocabulary, num_tokens=None),
        "fp8, few rows (weights alone)": _reader(in_fp8, vocabulary, num_tokens=_FEW_TOKENS),
        "fp8, many rows (activations too)": _reader(in_fp8, vocabulary, num_tokens=None),
        "fp8, few rows, head as it was": _reader(head_in_bf16, vocabulary, num_tokens=_FEW_TOKENS),
        "fp8, many rows, head as it was": _reader(head_in_bf16, vocabulary, num_tokens=None),
    }
    if plain.device.type == "cpu":
        forms["int8, the exact form"] = _reader(exact(plain), vocabulary, num_tokens=None)
    return forms


def _reader(
    form: Transformer | FusedTransformer | ExactTransformer, vocabulary: Vocabulary, *, num_tokens: int | None
) -> Reader:
    """Reads a world in calls of so many tokens; None: all at once."""

    @torch.inference_mode()
    def read(ids: list[int]) -> Tensor:
        ids_1T = torch.tensor([ids], device=form.device)
        cache = StaticCache(form.config, num_rows=1, capacity=len(ids), device=form.device, dtype=form.dtype)
        parts = [form(part, cache=cache) for part in ids_1T.split(num_tokens or len(ids), dim=1)]
        hidden_TD = torch.cat(parts, dim=1)[0]
        visual = torch.tensor([vocabulary.is_visual(token) for token in ids[1:]], device=form.device)
        start, stop = vocabulary.visual_start, vocabulary.visual_stop
        places_ND = hidden_TD[:-1][visual]
        chunks = places_ND.split(num_tokens or max(1, len(places_ND)))
        return torch.cat([form.logits(chunk_ND, start=start, stop=stop).float() for chunk_ND in chunks])

    return read


def _draw(
    worlds: list[list[int]], config: Fp8Accuracy, model: WorldModel, mode: str, on_progress: OnProgress
) -> Figures:
    """Add the ids of worlds that the model draws with its own settings."""
    num_pictures = 0
    for at, state in enumerate(opened.worlds(model, mode, num_worlds=config.num_worlds, seed=config.seed)):
        on_progress(f"{mode}: drawings", at, config.num_worlds)
        sampling = replace(model.default_sampling(mode), draft_window=_WINDOW, passes=0)
        texts = opened.commands(mode, seed=config.seed + at)
        for number in range(1 if mode == "t2i" else config.num_pictures):
            state, _ = model.imagine(state, "" if number == 0 else next(texts), sampling=sampling)
            num_pictures += 1
        worlds.append(list(state.ids))
    on_progress(f"{mode}: drawings", config.num_worlds, config.num_worlds)
    return {"worlds": len(worlds), "pictures": num_pictures}


@torch.inference_mode()
def _compare(form: Reader, worlds: Sequence[list[int]], expected: Sequence[Tensor]) -> Figures:
    """Over all places: relative error of centred logits, divergence, agreement of the likeliest code."""
    squares, wholes, divergence, agreed, places = 0.0, 0.0, 0.0, 0, 0
    for ids, expected_NV in zip(worlds, expected, strict=True):
        found_NV = form(ids)
        centred_NV = expected_NV - expected_NV.mean(dim=-1, keepdim=True)
        error_NV = found_NV - found_NV.mean(dim=-1, keepdim=True) - centred_NV
        squares += float(error_NV.square().sum())
        wholes += float(centred_NV.square().sum())
        p_NV, q_NV = expected_NV.log_softmax(dim=-1), found_NV.log_softmax(dim=-1)
        divergence += float((p_NV.exp() * (p_NV - q_NV)).sum())
        agreed += int((expected_NV.argmax(dim=-1) == found_NV.argmax(dim=-1)).sum())
        places += len(found_NV)
    if not places:
        raise ValueError("nothing was drawn; give num_worlds and num_pictures of at least 1")
    share = agreed / places
    return {
        "logit_error": round((squares / wholes) ** 0.5, 5),
        "divergence_nats": round(divergence / places, 6),
        "greedy_agreement": round(share, 5),
        "places": places,
        "standard_error": round((share * (1 - share) / places) ** 0.5, 5),
    }
