"""Training of the built-in BPE: lines of text in, a ranks file for `TextTokenizer.builtin` out.

Not on the run-time path: nothing but training imports this module, because it needs the `tokenizers` package
(which comes with transformers and takes a second to import). Only the training happens there; the result is
plain ranks.
"""

from __future__ import annotations

import os
from collections.abc import Iterable

from tokenizers import Regex, Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel, Sequence, Split
from tokenizers.trainers import BpeTrainer

from emuworld.tokens.sequence import template_texts
from emuworld.tokens.text import BUILTIN_SPLIT, write_ranks

_TEMPLATE_SHARE = 4  # one line in four is a prompt template: every training sequence starts with one


def train_bpe(lines: Iterable[str], *, num_tokens: int, path: str | os.PathLike[str]) -> dict[bytes, int]:
    """Learn `num_tokens` byte-level tokens from `lines` and the prompt templates, and write them to `path`.

    The 256 bytes come first, in the published order ('0' is 15 and ' ' is 220 in both tokenizers), then one
    token a merge. The same lines give the same file.

    Raises:
        ValueError: fewer than 256 tokens asked for, or the lines hold too few different words for so many.
    """
    if num_tokens < 256:
        raise ValueError(f"num_tokens is {num_tokens}, but every byte needs a token: ask for at least 256")
    corpus = list(lines)
    templates = template_texts()
    corpus += templates * max(1, len(corpus) // (len(templates) * _TEMPLATE_SHARE))
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = Sequence(
        [Split(Regex(BUILTIN_SPLIT), "isolated"), ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    trainer = BpeTrainer(
        vocab_size=num_tokens, min_frequency=1, show_progress=False, initial_alphabet=ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(corpus, trainer)
    ranks = _to_ranks(tokenizer.get_vocab())
    if len(ranks) < num_tokens:
        raise ValueError(
            f"the corpus of {len(corpus)} lines gives only {len(ranks)} tokens, {num_tokens} were asked for: "
            "add more varied lines or ask for fewer tokens"
        )
    write_ranks(ranks, path=path)
    return ranks


def _to_ranks(vocab: dict[str, int]) -> dict[bytes, int]:
    """Undo the byte alphabet, which writes every byte as one printable character."""
    byte_of = _byte_alphabet()
    return {bytes(byte_of[character] for character in token): rank for token, rank in vocab.items()}


def _byte_alphabet() -> dict[str, int]:
    """Character -> byte: printable Latin-1 stands for itself, the other bytes follow in order from U+0100."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}
