"""The mean of transformers that one training has led to: often better than each of them (model soups, arXiv
2203.05482), and as fast and as large as one.
"""

from collections.abc import Sequence

import torch

from emuworld.model.transformer import Transformer


def averaged(models: Sequence[Transformer]) -> Transformer:
    """A transformer whose every weight is the mean of theirs, in the type of the first; shares no memory.

    It is of use where the models have begun from the same trained weights; others meet at nothing. Raises
    ValueError where their shapes differ, or for none.
    """
    if not models:
        raise ValueError("the mean of no models: expected at least one")
    first, *others = models
    for other in others:
        if other.config != first.config:
            raise ValueError(
                f"the mean needs models of one shape: the first has {first.config}, another {other.config}"
            )
    with torch.device("meta"):
        mean = Transformer(first.config)
    weights = [model.state_dict() for model in models]
    mean.load_state_dict(
        {
            name: torch.stack([one[name].detach().float() for one in weights]).mean(0).to(tensor.dtype)
            for name, tensor in weights[0].items()
        },
        assign=True,
    )
    mean.tie_weights()
    return mean.train(first.training)
