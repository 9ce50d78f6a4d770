"""Rows of ids -> the loss of a training step.

`Objective` is the module whose forward gives the loss: what is cut among processes, compiled or computed
again in the backward pass is cut, compiled or computed again inside it.

Shapes: B rows, of which R read codes of the model's own, T tokens, N = B T, D hidden size, V ids, K codes.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

from emuworld.model.documents import Documents
from emuworld.model.transformer import Transformer
from emuworld.tokens.vocabulary import Vocabulary
from emuworld.training import sharding

_IDS_STEP = 64  # the head's rows are filled up to a multiple of it
_MOST_SHAPES = 64  # of batches; beyond its limit PyTorch goes on uncompiled, without a word


class Objective(nn.Module):
    """Rows of ids -> weighted next-token loss.

    Args:
        model: the transformer; the module's only weights.
        autocast: type of the products where it is not that of the weights.
        tensor_mesh: the processes that share each layer, where several do.
        loss_tokens: logits of so many tokens are held at once; the backward pass computes them again.
        own_passes: how often the model draws the codes of its own that it reads, each time after those that
            it drew before.
    """

    def __init__(
        self,
        model: Transformer,
        *,
        vocabulary: Vocabulary,
        autocast: torch.dtype | None,
        tensor_mesh: DeviceMesh | None,
        loss_tokens: int,
        own_passes: int = 1,
    ) -> None:
        super().__init__()
        self.model = model
        self._vocabulary = vocabulary
        self._autocast = autocast
        self._mesh = tensor_mesh
        self._loss_tokens = loss_tokens
        self._own_passes = own_passes
        self._cross_entropies: Callable[[Tensor, Tensor, int], Tensor] = _cross_entropies
        self._draw: Callable[[Tensor, Tensor], Tensor] = _drawn

    def compile_parts(self) -> None:
        """Compile one layer for all of them, for the first shape of batch and once more for any other, and
        the cross-entropy for any number of tokens: a fraction of the minutes that the whole objective takes
        for each shape.
        """
        compile_layers(self.model)
        self._cross_entropies = torch.compile(_cross_entropies, dynamic=True)
        self._draw = torch.compile(_drawn, dynamic=True)

    def forward(
        self,
        inputs_BT: Tensor,
        targets_BT: Tensor,
        weights_BT: Tensor,
        draws_RT: Tensor | None = None,
        documents: Documents | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Sum of weighted losses, and the plain losses of text and of visual targets as sums (nats). The
        first R rows read some codes as the model draws them (`examples.Batch.draws`).
        """
        if draws_RT is not None and len(draws_RT):
            own_RT = inputs_BT[: len(draws_RT)]
            for _ in range(self._own_passes):
                own_RT = self.own_codes(own_RT, draws_RT)
            inputs_BT = torch.cat([own_RT, inputs_BT[len(draws_RT) :]])
        losses_BT = self.losses(inputs_BT, targets_BT, documents)
        visual = (targets_BT >= self._vocabulary.visual_start) & (weights_BT > 0)
        text = (targets_BT < self._vocabulary.num_text_tokens) & (weights_BT > 0)
        plain = losses_BT.detach()
        return (losses_BT * weights_BT).sum(), (plain * text).sum(), (plain * visual).sum()

    @torch.no_grad()
    def own_codes(self, inputs_BT: Tensor, draws_BT: Tensor) -> Tensor:
        """Inputs [B, T] with codes that the model draws after reading the inputs before them, wherever there
        is a number of `draws_BT` to draw with (0..1; none where it is below 0). The first column stays.
        """
        with torch.autocast(inputs_BT.device.type, self._autocast, enabled=self._autocast is not None):
            hidden_ND = self.model(inputs_BT)[:, :-1].flatten(0, 1)
            start, stop = self._vocabulary.visual_start, self._vocabulary.visual_stop
            weight_KD = self.model.lm_head.weight[start:stop]
            numbers_N = draws_BT[:, 1:].flatten()
            pieces = zip(hidden_ND.split(self._loss_tokens), numbers_N.split(self._loss_tokens), strict=True)
            codes_N = torch.cat([self._draw(F.linear(piece, weight_KD), n) for piece, n in pieces])
        drawn_BT = torch.where(numbers_N >= 0, codes_N + start, inputs_BT[:, 1:].flatten())
        return torch.cat([inputs_BT[:, :1], drawn_BT.view(len(inputs_BT), -1)], dim=1)

    def losses(self, inputs_BT: Tensor, targets_BT: Tensor, documents: Documents | None = None) -> Tensor:
        """Cross-entropy of every target in nats, fp32 [B, T]."""
        attention, positions_BT = None, None
        if documents is not None:
            dropout = self.model.config.attention_dropout if self.training else 0.0
            attention, positions_BT = partial(documents.attend, dropout=dropout), documents.positions_BT
        with torch.autocast(inputs_BT.device.type, self._autocast, enabled=self._autocast is not None):
            hidden_BTD = self.model(inputs_BT, attention=attention, positions_BT=positions_BT)
            hidden_ND = hidden_BTD.flatten(0, 1)
            targets_N = targets_BT.flatten()
            if len(targets_N) <= self._loss_tokens:
                return self._head_losses(hidden_ND, targets_N).view_as(targets_BT)
            pieces = zip(hidden_ND.split(self._loss_tokens), targets_N.split(self._loss_tokens), strict=True)
            losses = [
                checkpoint(self._head_losses, *piece, use_reentrant=False, preserve_rng_state=False)
                for piece in pieces
            ]
        return torch.cat(losses).view_as(targets_BT)

    def _head_losses(self, hidden_ND: Tensor, targets_N: Tensor) -> Tensor:
        num_ids = self.model.config.vocab_size
        if self._mesh is not None:
            logits_NV = self.model.lm_head(hidden_ND)
            return sharding.vocabulary_losses(logits_NV, targets_N, mesh=self._mesh, num_ids=num_ids)
        weight_VD = self.model.lm_head.weight
        if hidden_ND.is_cuda and not isinstance(weight_VD, DTensor):
            # Products of an odd number of ids take three times as long there.
            weight_VD = F.pad(weight_VD, (0, 0, 0, -num_ids % _IDS_STEP))
        return self._cross_entropies(F.linear(hidden_ND, weight_VD), targets_N, num_ids)


def compile_layers(model: Transformer, *, dynamic: bool | None = None) -> None:
    """As `torch.compile` takes `dynamic`: by default for the first shape and once more for any other."""
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, _MOST_SHAPES)
    for layer in model.model.layers:
        layer.compile(dynamic=dynamic)


def _cross_entropies(logits_NV: Tensor, targets_N: Tensor, num_ids: int) -> Tensor:
    """Of the first `num_ids` logits."""
    return F.cross_entropy(logits_NV[:, :num_ids].float(), targets_N, reduction="none")


def _drawn(logits_NK: Tensor, numbers_N: Tensor) -> Tensor:
    """Ids [N] of 0..K-1, each drawn with its number in 0..1 from the softmax of its logits."""
    sums_NK = logits_NK.float().softmax(dim=-1).cumsum(dim=-1)
    return (sums_NK < numbers_N[:, None]).sum(dim=-1).clamp(max=logits_NK.shape[-1] - 1)
