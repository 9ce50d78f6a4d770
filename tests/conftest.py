"""A tiny checkpoint with random weights, made from the real classes: what every test of worlds and
environments opens."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:  # one core for each of the processes that share the tests
    os.environ.setdefault("OMP_NUM_THREADS", "1")

if TYPE_CHECKING:  # torch is imported only by the tests that ask for a fixture
    from emuworld.world_model import WorldModel

TINY_WORDS = (
    "turn left 45 degrees",
    "turn right",
    "move forward",
    "look up",
    "go to the red ball",
    "a room with a red ball and a blue box beside a green door",
)
TINY_TEXT_TOKENS = 300
TINY_CODES = 64


@pytest.fixture(params=[1, 2, 3])
def num_threads(request: pytest.FixtureRequest) -> Iterator[int]:
    """Torch's threads in this test: the CPU form takes as many."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Checkpoint folder: 2 layers of width 64, 300 text tokens, 64 codes, 128 px, a context of 4,096 tokens.

    Weights are random, so text and pictures are noise (where the model writes the text itself, a few letters,
    and about every second time a picture); sizes, modes and files are those of any checkpoint.
    """
    folder = tmp_path_factory.mktemp("tiny")
    write_tiny_checkpoint(folder)
    return str(folder)


@pytest.fixture(scope="session")
def tiny_model(tiny_folder: str) -> WorldModel:
    """The tiny checkpoint, opened on the CPU."""
    from emuworld.world_model import load

    return load(tiny_folder, device="cpu")


def write_tiny_checkpoint(folder: Path, *, seed: int = 0) -> None:
    """Write the checkpoint of `tiny_folder`; another seed gives other weights."""
    import torch

    from emuworld.decoding.sampling import Sampling, Truncation
    from emuworld.manifest import Manifest
    from emuworld.model import checkpoint
    from emuworld.model.transformer import Transformer, sized
    from emuworld.tokens.bpe import train_bpe
    from emuworld.tokens.sequence import template_texts
    from emuworld.tokens.vision import VisionConfig, VisionTokenizer
    from emuworld.tokens.vocabulary import builtin

    train_bpe(
        [*TINY_WORDS, *template_texts()] * 3, num_tokens=TINY_TEXT_TOKENS, path=folder / "text.tiktoken"
    )
    vocabulary = builtin(num_text_tokens=TINY_TEXT_TOKENS, num_visual_tokens=TINY_CODES)
    Manifest(
        vocabulary=vocabulary,
        default_size=(128, 128),
        smallest_side=32,
        largest_side=256,
        max_text_tokens=24,
        sampling={
            "t2i": Sampling(image=Truncation(top_k=32), guidance=3.0),
            "explore": Sampling(text=Truncation(top_p=0.9), guidance=1.5),
        },
        commands={"explore": TINY_WORDS[:5]},
    ).save(folder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        transformer = Transformer(
            sized(
                "tiny",
                vocab_size=vocabulary.size,
                max_position_embeddings=4096,
                initializer_range=0.2,
                tie_word_embeddings=False,
            )
        )
        transformer.init_weights()
        with torch.no_grad():
            # Column 0 is alike in every hidden state, so what a row of the head has there makes its token
            # likelier:
            # about one word in ten is BOI, and most texts lead to a picture.
            transformer.model.embed_tokens.weight[:, 0] = 0.6
            transformer.lm_head.weight[:, 0] = 0.0
            transformer.lm_head.weight[[vocabulary.boi, vocabulary.ess], 0] = torch.tensor([4.0, 2.0])
        vision = VisionTokenizer(
            VisionConfig(
                patch_px=1,
                width=32,
                width_multipliers=(1,) * 5,
                z_channels=8,
                embed_dim=8,
                num_codes=TINY_CODES,
            )
        )
    checkpoint.save(folder, transformer, dtype=torch.bfloat16)
    vision.save(folder)
