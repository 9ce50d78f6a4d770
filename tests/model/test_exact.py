"""The CPU form: what a row gets is equal to the last bit whatever is beside it, and close to fp32."""

import pytest
import torch

from emuworld.model.cache import StaticCache
from emuworld.model.config import TransformerConfig, sized
from emuworld.model.exact import ExactTransformer, exact
from emuworld.model.exact_linear import ExactLinear
from emuworld.model.transformer import Transformer

SMALL = sized("small", vocab_size=400, num_layers=2)
ODD = sized("tiny", vocab_size=101, hidden_size=72, intermediate_size=150, num_heads=6)
"""Sizes that no vector width divides: every loop has a remainder."""

LENGTHS = [1, 63, 512, 511, 513, 700, 30, 31, 257, 5, 640, 100, 2, 399, 77, 600]


def built(config: TransformerConfig, *, seed: int = 0) -> Transformer:
    model = Transformer(config).eval()
    model.init_weights(torch.Generator().manual_seed(seed))
    return model


class Rows:
    """Prompts of all LENGTHS in one cache, the tokens that follow them, and each row's results alone."""

    def __init__(self, config: TransformerConfig) -> None:
        self.model = exact(built(config))
        generator = torch.Generator().manual_seed(1)
        self.base = StaticCache(config, num_rows=len(LENGTHS), capacity=max(LENGTHS), dtype=torch.float16)
        for row, length in enumerate(LENGTHS):
            prompt_1T = torch.randint(0, config.vocab_size, (1, length), generator=generator)
            self.model(prompt_1T, cache=self.base.rows([row]))
        self.next_RT = torch.randint(0, config.vocab_size, (len(LENGTHS), 3), generator=generator)
        self.alone = [self.run([row]) for row in range(len(LENGTHS))]

    def run(self, rows: list[int], *, waiting: int | None = None) -> list[list[bytes]]:
        """Three steps of these rows together: [row][step] hidden state. Row `waiting` does step 1 twice."""
        config = self.model.config
        cache = StaticCache(config, num_rows=len(rows), capacity=max(LENGTHS) + 3, dtype=torch.float16)
        for place, row in enumerate(rows):
            cache.copy_row(row, place, origin=self.base)
        results: list[list[bytes]] = [[] for _ in rows]
        for step in range(3):
            advance = [not (row == waiting and step == 1) for row in rows]
            at = [1 if row == waiting and step == 2 else step for row in rows]
            hidden = self.model(self.next_RT[rows, at][:, None], cache=cache, advance_B=advance)
            for place, state in enumerate(hidden):
                results[place].append(state.numpy().tobytes())
        return results


@pytest.mark.parametrize("config", [SMALL, ODD], ids=["small", "odd"])
def test_a_row_is_the_same_alone_and_among_others(config: TransformerConfig, num_threads: int) -> None:
    rows = Rows(config)
    everyone = list(range(len(LENGTHS)))
    for chosen in (everyone[:2], everyone[3:5], everyone[::2], everyone[::-1], everyone[5:] + everyone[:5]):
        for row, states in zip(chosen, rows.run(chosen), strict=True):
            assert [states] == rows.alone[row], f"row {row} among {chosen}"
    waiting = rows.run(everyone, waiting=7)
    for row in everyone:
        (alone,) = rows.alone[row]
        assert waiting[row] == ([alone[0], alone[1], alone[1]] if row == 7 else alone)


@pytest.mark.parametrize("config", [SMALL, ODD], ids=["small", "odd"])
def test_a_prefilled_row_is_the_same_alone_and_among_others(
    config: TransformerConfig, num_threads: int
) -> None:
    model = exact(built(config))
    ids_BT = torch.randint(0, config.vocab_size, (5, 271), generator=torch.Generator().manual_seed(2))
    together = model(ids_BT)
    scores = model.logits(together[:, -1], start=7, stop=90)
    for row in range(5):
        alone = model(ids_BT[row : row + 1])
        assert torch.equal(alone[0], together[row])
        assert torch.equal(model.logits(alone[0, -1], start=7, stop=90), scores[row])


def test_one_and_two_threads_give_equal_bits() -> None:
    before = torch.get_num_threads()
    ids_BT = torch.randint(0, 400, (1, 600), generator=torch.Generator().manual_seed(3))
    results = []
    try:
        for num_threads in (1, 2):
            torch.set_num_threads(num_threads)
            model = exact(built(SMALL))
            cache = StaticCache(SMALL, num_rows=1, capacity=640, dtype=torch.float16)
            states = [model(ids_BT, cache=cache), model(ids_BT[:, :1], cache=cache)]
            results.append([state.numpy().tobytes() for state in states])
    finally:
        torch.set_num_threads(before)
    assert results[0] == results[1]


def test_rotary_positions_do_not_depend_on_the_capacity() -> None:
    model, other = exact(built(ODD)), exact(built(ODD))
    ids_BT = torch.randint(0, 101, (1, 50), generator=torch.Generator().manual_seed(4))
    small = model(ids_BT, cache=StaticCache(ODD, num_rows=1, capacity=50, dtype=torch.float16))
    assert torch.equal(
        other(ids_BT, cache=StaticCache(ODD, num_rows=1, capacity=5000, dtype=torch.float16)), small
    )
    assert torch.equal(other(ids_BT), small)


@pytest.mark.parametrize("tied", [True, False])
def test_close_to_the_model_it_was_made_of(tied: bool) -> None:
    """int8 weights of normal distribution carry about 1 % error each; 8 layers measured 2.7 % together."""
    config = sized("small", vocab_size=2000, tie_word_embeddings=tied)
    model = built(config)
    form = exact(model)
    ids_BT = torch.randint(0, 2000, (1, 60), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        wanted = model.logits(model(ids_BT))
    got = form.logits(form(ids_BT))
    assert (got - wanted).norm() / wanted.norm() < 0.04
    cache = StaticCache(config, num_rows=1, capacity=60, dtype=torch.float16)
    steps = [form(ids_BT[:, :40], cache=cache)]
    steps += [form(ids_BT[:, at : at + 1], cache=cache) for at in range(40, 60)]
    torch.testing.assert_close(form.logits(torch.cat(steps, dim=1)), got, atol=2e-3, rtol=0)


def test_integer_weights_are_exact() -> None:
    """Weights that int8 and inputs that 15 bits hold exactly: the product has fp32's error only."""
    generator = torch.Generator().manual_seed(6)
    weight_NK = torch.randint(-127, 128, (40, 64), generator=generator).float()
    weight_NK[:, 0] = 127
    x_MK = torch.randint(-16256, 16257, (3, 64), generator=generator).float()
    x_MK[:, 0] = 16256
    wanted = (x_MK.double() @ weight_NK.double().T).float()
    linear = ExactLinear(weight_NK[:10], weight_NK[10:])
    torch.testing.assert_close(linear(x_MK), wanted, rtol=1e-6, atol=1.0)
    torch.testing.assert_close(linear.part(x_MK, start=5, stop=12), wanted[:, 5:12], rtol=1e-6, atol=1.0)
    assert not linear(torch.zeros(2, 64)).any()


def test_exact_of_an_exact_form_is_itself() -> None:
    model = exact(built(ODD))
    assert isinstance(model, ExactTransformer) and exact(model) is model
    with pytest.raises(ValueError, match="2 rows, the cache 1"):
        model(
            torch.zeros(2, 1, dtype=torch.int64),
            cache=StaticCache(ODD, num_rows=1, capacity=4, dtype=torch.float16),
        )
