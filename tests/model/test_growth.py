"""`model.growth`: a grown transformer begins where the trained one was."""

import pytest
import torch

from emuworld.model.growth import deepened
from emuworld.model.transformer import Transformer, TransformerConfig

CONFIG = TransformerConfig(
    vocab_size=50,
    hidden_size=16,
    intermediate_size=24,
    num_layers=3,
    num_heads=2,
    num_kv_heads=1,
    head_dim=8,
)


def trained() -> Transformer:
    model = Transformer(CONFIG)
    model.init_weights(torch.Generator().manual_seed(0))
    return model


@pytest.mark.parametrize("num_layers", [3, 4, 6, 8])
def test_a_grown_model_computes_the_same(num_layers: int) -> None:
    model = trained().eval()
    grown = deepened(model, num_layers)
    assert grown.config.num_layers == num_layers and not grown.training
    ids_BT = torch.randint(0, 50, (2, 11), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(grown(ids_BT), model(ids_BT), rtol=0, atol=0)


def test_new_layers_learn() -> None:
    grown = deepened(trained().train(), 6)
    assert grown.training
    optimizer = torch.optim.SGD(grown.parameters(), lr=0.1)
    ids_BT = torch.arange(12).view(1, 12)
    for _ in range(2):
        optimizer.zero_grad()
        grown.logits(grown(ids_BT)).logsumexp(-1).mean().backward()
        optimizer.step()
    for layer in grown.model.layers:
        for name, weight in layer.named_parameters():
            assert weight.grad is not None and weight.grad.abs().sum() > 0, name


def test_memory_is_not_shared() -> None:
    model = trained()
    grown = deepened(model, 4)
    theirs = {tensor.data_ptr() for tensor in model.state_dict().values()}
    assert not theirs & {tensor.data_ptr() for tensor in grown.state_dict().values()}
    assert grown.lm_head.weight is grown.model.embed_tokens.weight


def test_fewer_layers_are_refused() -> None:
    with pytest.raises(ValueError, match="num_layers=2, but the model has 3 layers"):
        deepened(trained(), 2)
