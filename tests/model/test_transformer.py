"""The transformer against transformers' Qwen3, with and without a cache, and its CUDA path on the CPU."""

import pytest
import torch

from emuworld.model import attention
from emuworld.model.cache import StaticCache
from emuworld.model.config import SIZES, TransformerConfig, sized
from emuworld.model.transformer import Transformer

CONFIGS = {
    "tied": sized("tiny", vocab_size=300),
    "untied": sized("tiny", vocab_size=300, tie_word_embeddings=False, num_kv_heads=1),
    "heads wider than hidden": sized("tiny", vocab_size=257, num_heads=4, num_kv_heads=4, head_dim=48),
    "other eps and theta": sized("tiny", vocab_size=300, rms_norm_eps=1e-3, rope_theta=10_000.0),
}


def built(config: TransformerConfig, *, seed: int = 0) -> Transformer:
    """Random weights, three times the usual spread and uneven norms, so that a slip shows in the logits."""
    model = Transformer(config).eval()
    generator = torch.Generator().manual_seed(seed)
    model.init_weights(generator)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.uniform_(0.5, 1.5, generator=generator)
            else:
                parameter.mul_(3.0)
    return model


def random_ids(config: TransformerConfig, *shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(0, config.vocab_size, shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module", params=CONFIGS)
def pair(request: pytest.FixtureRequest) -> tuple[Transformer, torch.nn.Module]:
    """Our model and transformers' with the same weights."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    model = built(CONFIGS[request.param])
    reference = Qwen3ForCausalLM(Qwen3Config(**model.config.to_json())).eval()
    reference.load_state_dict(model.state_dict(), strict=True)
    return model, reference


@torch.no_grad()
def test_logits_are_those_of_qwen3(pair: tuple[Transformer, torch.nn.Module]) -> None:
    model, reference = pair
    ids_BT = random_ids(model.config, 2, 70)
    torch.testing.assert_close(model.logits(model(ids_BT)), reference(ids_BT).logits, atol=1e-4, rtol=0)


@torch.no_grad()
def test_cached_steps_are_those_of_qwen3(pair: tuple[Transformer, torch.nn.Module]) -> None:
    model, reference = pair
    ids_BT = random_ids(model.config, 2, 70)
    cache = StaticCache(model.config, num_rows=2, capacity=70)
    parts = [model(ids_BT[:, :30], cache=cache)]
    parts += [model(ids_BT[:, at : at + 1], cache=cache) for at in range(30, 50)]
    parts.append(model(ids_BT[:, 50:], cache=cache))
    logits = model.logits(torch.cat(parts, dim=1))
    torch.testing.assert_close(logits, reference(ids_BT).logits, atol=1e-4, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("batched", [False, True])
def test_rows_of_different_lengths(batched: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """`batched`: the one call for all rows that CUDA takes, here on the CPU, with its masks."""
    model = built(CONFIGS["tied"])
    config = model.config
    if batched:
        monkeypatch.setattr(attention, "_row_by_row", attention._all_rows)
    ids_BT = random_ids(config, 3, 60)
    lengths = [17, 40, 1]
    cache = StaticCache(config, num_rows=3, capacity=50)
    for row, length in enumerate(lengths):
        model(ids_BT[row : row + 1, :length], cache=cache.rows([row]))
    for at in range(3):
        new_B1 = torch.stack([ids_BT[row, length + at] for row, length in enumerate(lengths)])[:, None]
        hidden_B1D = model(new_B1, cache=cache)
    assert cache.lengths.tolist() == [20, 43, 4]
    block_B4 = torch.stack([ids_BT[row, length + 3 : length + 7] for row, length in enumerate(lengths)])
    hidden_B4D = model(block_B4, cache=cache)
    for row, length in enumerate(lengths):
        whole_TD = model(ids_BT[row : row + 1, : length + 7])[0]
        torch.testing.assert_close(hidden_B1D[row, 0], whole_TD[length + 2], atol=1e-4, rtol=0)
        torch.testing.assert_close(hidden_B4D[row], whole_TD[length + 3 :], atol=1e-4, rtol=0)


@torch.no_grad()
def test_a_row_that_does_not_advance_leaves_no_trace() -> None:
    model = built(CONFIGS["tied"])
    ids_BT = random_ids(model.config, 2, 12)
    cache = StaticCache(model.config, num_rows=2, capacity=20)
    model(ids_BT[:, :10], cache=cache)
    model(random_ids(model.config, 2, 1, seed=5), cache=cache, advance_B=[False, True])
    assert cache.lengths.tolist() == [10, 11]
    again = model(ids_BT[:, 10:11], cache=cache)
    torch.testing.assert_close(again[0, 0], model(ids_BT[:1, :11])[0, 10], atol=1e-4, rtol=0)


@torch.no_grad()
def test_logits_of_a_range_are_a_slice() -> None:
    model = built(CONFIGS["untied"])
    hidden_BTD = model(random_ids(model.config, 1, 5))
    part = model.logits(hidden_BTD, start=40, stop=90)
    torch.testing.assert_close(part, model.logits(hidden_BTD)[..., 40:90])


@torch.no_grad()
def test_a_given_attention_replaces_the_causal_one() -> None:
    model = built(CONFIGS["untied"])
    ids_BT = random_ids(model.config, 2, 9)
    same = model(ids_BT, attention=attention.causal_attention)
    assert torch.equal(same, model(ids_BT))

    def everything(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)

    assert not torch.allclose(model(ids_BT, attention=everything)[:, 0], same[:, 0])
    with pytest.raises(ValueError, match="attention="):
        cache = StaticCache(model.config, num_rows=2, capacity=9)
        model(ids_BT, cache=cache, attention=everything)


def test_the_training_forward_is_one_graph() -> None:
    """`torch.compile` meets no Python that depends on data; gradients reach every weight."""
    model = Transformer(sized("tiny", vocab_size=50)).train()
    model.init_weights(torch.Generator().manual_seed(0))
    ids_BT = random_ids(model.config, 2, 8)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    hidden_BTD = compiled(ids_BT)
    torch.testing.assert_close(hidden_BTD, model(ids_BT))
    model.logits(hidden_BTD).square().mean().backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in model.parameters())


def test_initialisation_follows_the_generator() -> None:
    config = sized("tiny", vocab_size=4000, num_layers=8)
    first, second = Transformer(config), Transformer(config)
    first.init_weights(torch.Generator().manual_seed(3))
    second.init_weights(torch.Generator().manual_seed(3))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert first.model.embed_tokens.weight.std().item() == pytest.approx(0.02, rel=0.02)
    assert first.model.layers[0].mlp.down_proj.weight.std().item() == pytest.approx(0.005, rel=0.05)
    assert first.lm_head.weight is first.model.embed_tokens.weight


def test_dropout_acts_in_training_only() -> None:
    model = Transformer(sized("tiny", vocab_size=50, attention_dropout=0.5))
    model.init_weights(torch.Generator().manual_seed(0))
    ids_BT = random_ids(model.config, 1, 8)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        assert not torch.equal(model.train()(ids_BT), model(ids_BT))
    assert torch.equal(model.eval()(ids_BT), model(ids_BT))


def test_the_published_size_has_the_published_number_of_parameters() -> None:
    """34,103,460,864: the sum of the published shapes (paper: 31.2 B and 2.9 B of embeddings)."""
    with torch.device("meta"):
        model = Transformer(sized("emu3.5", vocab_size=282_926))
    assert sum(parameter.numel() for parameter in model.parameters()) == 34_103_460_864
    assert list(SIZES) == ["tiny", "small", "emu3.5"]


@pytest.mark.gpu
@torch.no_grad()
@pytest.mark.parametrize("uniform", [True, False])
def test_cuda_decoding_agrees_with_whole_sequences(uniform: bool) -> None:
    """Proves the batched cache path in bf16 on CUDA: the kernels, masks and index writes of evaluation."""
    if not torch.cuda.is_available():
        pytest.skip("needs CUDA")
    config = sized("small", vocab_size=500, num_layers=2)
    model = Transformer(config)
    model.init_weights(torch.Generator().manual_seed(0))
    model = model.cuda().bfloat16().eval()
    ids_BT = random_ids(config, 4, 120).cuda()
    lengths = [60] * 4 if uniform else [60, 17, 33, 90]
    cache = StaticCache(config, num_rows=4, capacity=128, device="cuda", dtype=torch.bfloat16)
    for row, length in enumerate(lengths):
        model(ids_BT[row : row + 1, :length], cache=cache.rows([row]))
    parts = []
    for at, size in ((0, 1), (1, 1), (2, 20)):
        new = [ids_BT[row, length + at : length + at + size] for row, length in enumerate(lengths)]
        parts.append(model(torch.stack(new), cache=cache))
    hidden_BTD = torch.cat(parts, dim=1)
    for row, length in enumerate(lengths):
        whole_TD = model(ids_BT[row : row + 1, : length + 22])[0, length:]
        torch.testing.assert_close(hidden_BTD[row], whole_TD, atol=0.1, rtol=0.05)
