"""Training of the built-in BPE: repeatable, whole words, short templates, honest about small corpora."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from emuworld.tokens.bpe import train_bpe
from emuworld.tokens.sequence import MODES, template_texts
from emuworld.tokens.text import TextTokenizer, read_ranks

LETTERS = random.Random(0)
RARE = ["".join(LETTERS.choices("abcdefghij", k=9)) for _ in range(100)]
LINES = [f"move forward {i} metres to the violet cupboard" for i in range(300)] + RARE


def test_same_lines_give_the_same_file(tmp_path: Path) -> None:
    first = train_bpe(LINES, num_tokens=380, path=tmp_path / "a")
    train_bpe(iter(LINES), num_tokens=380, path=tmp_path / "b")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert read_ranks(tmp_path / "a") == first
    assert sorted(first.values()) == list(range(380))


def test_frequent_words_become_one_token_and_digits_stay_single(tmp_path: Path) -> None:
    train_bpe(LINES, num_tokens=380, path=tmp_path / "ranks")
    text = TextTokenizer.builtin(tmp_path / "ranks")
    ids = text.encode("move forward 123 metres to the violet cupboard")
    words = ["move", " forward", " ", "1", "2", "3", " metres", " to", " the", " violet", " cupboard"]
    assert [text.decode([i]) for i in ids] == words


def test_templates_are_short_in_every_mode(tmp_path: Path) -> None:
    """One token a word or sign. "You are a helpful assistant for explore task. USER:" is 11."""
    train_bpe(LINES, num_tokens=400, path=tmp_path / "ranks")
    text = TextTokenizer.builtin(tmp_path / "ranks")
    assert len(text.encode("You are a helpful assistant for explore task. USER:")) == 11
    for template in template_texts():
        signs = sum(template.count(sign) for sign in ".:") + template.count("2") * 2
        assert len(text.encode(template)) <= len(template.split()) + signs + 2, template
    assert len(template_texts()) == len(MODES) + 1


def test_too_small_a_corpus_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"gives only .* tokens, 5000 were asked for: add more varied lines"):
        train_bpe(LINES, num_tokens=5000, path=tmp_path / "ranks")
    assert not (tmp_path / "ranks").exists()
    with pytest.raises(ValueError, match="every byte"):
        train_bpe(LINES, num_tokens=255, path=tmp_path / "ranks")


def test_no_lines_but_templates_still_train(tmp_path: Path) -> None:
    train_bpe([], num_tokens=260, path=tmp_path / "ranks")
    text = TextTokenizer.builtin(tmp_path / "ranks")
    assert text.decode(text.encode("où? 🙂")) == "où? 🙂"
