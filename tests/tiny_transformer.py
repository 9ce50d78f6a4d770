"""The transformer that tests of checkpoint folders write: untrained, of the tiny size."""

import torch

from emuworld.model.config import sized
from emuworld.model.transformer import Transformer


def built(**changes: object) -> Transformer:
    model = Transformer(sized("tiny", vocab_size=120, **changes)).eval()
    model.init_weights(torch.Generator().manual_seed(0))
    return model
