"""Text tokenizers: any Unicode goes in and comes back, users' words stay words, ids as published."""

from __future__ import annotations

import random
import subprocess
import sys
import unicodedata
from pathlib import Path

import pytest

from emuworld.tokens.text import TextTokenizer, read_ranks, write_ranks
from emuworld.tokens.vocabulary import CONTROL_TOKENS, EMU35, builtin

WORDS = ["", " ", "go to the red ball", "It's 45 degrees\r\n\n  left", "日本語 текст 🙂👩‍👩‍👧"]
WORDS += ["e\u0301 \x00 \u202e", "a" * 500]


def random_text(rng: random.Random) -> str:
    """Unicode of all planes without surrogates, mixed with white space, digits and control strings."""
    pieces = ["<|image start|>", " ", "\n", "7", "it's", "<|extra_100|>"]
    pieces += [chr(c) for c in rng.choices([*range(0xD800), *range(0xE000, 0x110000, 37)], k=6)]
    return "".join(rng.choices(pieces, k=rng.randrange(40)))


@pytest.mark.parametrize("name", ["tokenizer", "published"])
def test_any_unicode_comes_back(name: str, request: pytest.FixtureRequest) -> None:
    text: TextTokenizer = request.getfixturevalue(name)
    rng = random.Random(0)
    for words in WORDS + [random_text(rng) for _ in range(300)]:
        ids = text.encode(words)
        assert all(text.vocabulary.is_text(i) for i in ids), words
        assert text.decode(ids) == unicodedata.normalize("NFC", words)


@pytest.mark.parametrize("name", ["tokenizer", "published"])
def test_control_strings_are_words_unless_allowed(name: str, request: pytest.FixtureRequest) -> None:
    text: TextTokenizer = request.getfixturevalue(name)
    strings = [(token.string, text.vocabulary.controls[key]) for key, token in CONTROL_TOKENS.items()]
    strings.append(("<|visual token 000063|>", text.vocabulary.visual_start + 63))
    for string, token in strings:
        assert text.encode(f"a{string}b", allow_control=True) == [*text.encode("a"), token, *text.encode("b")]
        assert all(map(text.vocabulary.is_text, text.encode(f"a{string}b")))
        assert text.decode([token]) == string
    for string in ("<|visual token 999999|>", "<|unknown|>", "<|", "<|IMAGE|>"):
        assert text.encode(string, allow_control=True) == text.encode(string)


@pytest.mark.parametrize("name", ["tokenizer", "published"])
def test_digits_star_and_space_have_the_published_ids(name: str, request: pytest.FixtureRequest) -> None:
    text: TextTokenizer = request.getfixturevalue(name)
    assert text.encode("0123456789") == list(range(15, 25))
    assert text.encode("64*64") == [21, 19, 9, 21, 19]
    assert text.encode(" ") == [220]


@pytest.mark.parametrize("name", ["tokenizer", "published"])
@pytest.mark.parametrize("unit", [" ", "a", "\n ", "^", "\u3000x"])
def test_a_million_characters_encode(name: str, unit: str, request: pytest.FixtureRequest) -> None:
    """The regular expression engine must not give up on long runs (it panics, which no `except` expects)."""
    text: TextTokenizer = request.getfixturevalue(name)
    words = unit * (1_000_000 // len(unit))
    assert text.decode(text.encode(words)) == words


def test_lone_surrogates_become_replacement_characters(tokenizer: TextTokenizer) -> None:
    assert tokenizer.decode(tokenizer.encode("a\ud800b")) == "a\ufffdb"


def test_broken_utf8_and_unknown_ids(tokenizer: TextTokenizer) -> None:
    first_byte_of_e_acute = tokenizer.encode("é")[0]
    assert tokenizer.decode([first_byte_of_e_acute]) in ("\ufffd", "é")
    for token in (-1, tokenizer.vocabulary.size):
        with pytest.raises(ValueError, match="no token of this vocabulary"):
            tokenizer.decode([token])


def test_published_sanity_cases(published: TextTokenizer) -> None:
    """Fact sheet, section 2: the prompt for "a cat" is 22 ids; the space before BSS is a token of its own."""
    prompt = "<|extra_203|>You are a helpful assistant for t2i task. USER: a cat ASSISTANT: <|extra_100|>"
    ids = published.encode(prompt, allow_control=True)
    assert len(ids) == 22
    assert ids[0] == EMU35.bos
    assert ids[-2:] == [220, EMU35.bss]
    reserved = "<|im_start|><|extra_0|><|extra_50|>"
    assert published.encode(reserved, allow_control=True) == [151644, 151646, 151696]
    assert published.encode("Hello world") == [9707, 1879]  # the same ranks as Qwen's


def test_published_files_are_checked(tmp_path: Path, ranks_path: Path) -> None:
    with pytest.raises(ValueError, match=r"emu3\.tiktoken cannot be read"):
        TextTokenizer.published(tmp_path)
    (tmp_path / "emu3.tiktoken").write_bytes(ranks_path.read_bytes())
    with pytest.raises(ValueError, match=r"vision_tokens\.txt cannot be read"):
        TextTokenizer.published(tmp_path)
    (tmp_path / "emu3_vision_tokens.txt").write_text("<|image start|>\n<|image token|>\n")
    with pytest.raises(ValueError, match=r"not the list of the Emu3.5 release"):
        TextTokenizer.published(tmp_path)


def test_ranks_round_trip_and_are_checked(tmp_path: Path, ranks_path: Path, tokenizer: TextTokenizer) -> None:
    ranks = read_ranks(ranks_path)
    tokenizer.save(tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == ranks_path.read_bytes()

    (tmp_path / "broken").write_bytes(ranks_path.read_bytes() + b"not a rank\n")
    with pytest.raises(ValueError, match=r"line 401: expected 'base64 rank'"):
        read_ranks(tmp_path / "broken")
    with pytest.raises(ValueError, match="do not number"):
        TextTokenizer(ranks, vocabulary=builtin(num_text_tokens=401))
    byte = bytes([200])
    swapped = {(byte * 9 if token == byte else token): rank for token, rank in ranks.items()}
    write_ranks(swapped, path=tmp_path / "swapped")
    with pytest.raises(ValueError, match=r"bytes \[200\] have no rank"):
        TextTokenizer.builtin(tmp_path / "swapped")


def test_run_time_path_imports_no_heavy_package() -> None:
    code = (
        "import sys, emuworld.tokens.text, emuworld.tokens.sequence, emuworld.story\n"
        "print([m for m in ('transformers', 'tokenizers') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
