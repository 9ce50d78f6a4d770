"""The published way, which speeds are compared with: it must compute the same model."""

import pytest
import torch

from emuworld.model.config import sized
from emuworld.model.transformer import Transformer
from emuworld.tasks.published_way import ATTENTIONS, Branch, PublishedWay

CONFIG = sized("tiny", vocab_size=200, tie_word_embeddings=False)
VISUAL = slice(120, 190)


@pytest.fixture(scope="module")
def model() -> Transformer:
    model = Transformer(CONFIG).eval()
    model.init_weights(torch.Generator().manual_seed(0))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3.0)
    return model


@torch.no_grad()
@pytest.mark.parametrize("attention", ATTENTIONS)
def test_growing_caches_give_the_transformers_logits(model: Transformer, attention: str) -> None:
    ids_1T = torch.randint(0, CONFIG.vocab_size, (1, 25), generator=torch.Generator().manual_seed(1))
    expected_TV = model.logits(model(ids_1T))[0]
    way, branch = PublishedWay(model, attention=attention), Branch()
    torch.testing.assert_close(way.logits(ids_1T[:, :20], branch)[0], expected_TV[19], atol=1e-4, rtol=0)
    for at in range(20, 25):
        found_1V = way.logits(ids_1T[:, at : at + 1], branch)
        torch.testing.assert_close(found_1V[0], expected_TV[at], atol=1e-4, rtol=0)
    assert branch.length == 25


@torch.no_grad()
def test_the_draw_follows_the_guided_scores(model: Transformer) -> None:
    """With top_k = 1 the likeliest visual token under u + g (c - u), both branches reading what was drawn."""
    generator = torch.Generator().manual_seed(2)
    prompts = [torch.randint(0, 100, (1, length), generator=generator) for length in (12, 7)]
    way, branches = PublishedWay(model), (Branch(), Branch())
    for prompt_1T, branch in zip(prompts, branches, strict=True):
        way.logits(prompt_1T, branch)
    written = [VISUAL.start]
    for _ in range(6):
        written.append(way.draw(*branches, written[-1], visual=VISUAL, guidance=3.0, top_k=1))
        ids_1T = torch.tensor([written[:-1]])
        c_V, u_V = (
            torch.log_softmax(model.logits(model(torch.cat((prompt, ids_1T), dim=1)))[0, -1], dim=-1)
            for prompt in prompts
        )
        scores_V = (u_V + 3.0 * (c_V - u_V))[VISUAL]
        assert written[-1] == VISUAL.start + int(scores_V.argmax())
    assert len(set(written)) > 2


def test_an_unknown_attention_is_refused(model: Transformer) -> None:
    with pytest.raises(ValueError, match="one of sdpa, eager"):
        PublishedWay(model, attention="flash")
