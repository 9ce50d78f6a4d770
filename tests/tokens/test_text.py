"""Text tokenizers: any Unicode goes in and comes back, users' words stay words, ids as published."""

from __future__ import annotations

import random
import subprocess
import sys
import unicodedata
from itertools import pairwise
from pathlib import Path

import pytest

from emuworld.tokens.sequence import prompt_ids
from emuworld.tokens.text import TextTokenizer, read_ranks, write_ranks
from emuworld.tokens.vocabulary import CONTROL_TOKENS, EMU35, builtin

PUBLISHED_FOLDER = Path(__file__).resolve().parents[3] / "shared" / "data"  # as in conftest.py
WORDS = ["", " ", "go to the red ball", "It's 45 degrees\r\n\n  left", "日本語 текст 🙂👩‍👩‍👧"]
WORDS += ["e\u0301 \x00 \u202e", "a" * 500]


NUM_STRINGS = 10_000
CODE_POINTS = [*range(0xD800), *range(0xE000, 0x110000, 37)]  # all planes, without surrogates
PIECES = [
    "<|image start|>",
    " ",
    "\n",
    "7",
    "it's",
    "<|extra_100|>",
    "é",
    "e\u0301",
    "日本",
    "👩‍👩‍👧",
    " \r\n ",
]


def random_text(rng: random.Random) -> str:
    """Unicode of all planes, mixed with white space, digits, words and control strings."""
    pieces = PIECES + [chr(c) for c in rng.choices(CODE_POINTS, k=9)]
    return "".join(rng.choices(pieces, k=rng.randrange(40)))


@pytest.mark.parametrize("name", ["tokenizer", "published"])
def test_any_unicode_comes_back(name: str, request: pytest.FixtureRequest) -> None:
    text: TextTokenizer = request.getfixturevalue(name)
    rng = random.Random(0)
    for words in WORDS + [random_text(rng) for _ in range(NUM_STRINGS)]:
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


# Fact sheet, section 2, as its table stands there.
PUBLISHED_IDS = """
<|endoftext|> 151643, <|im_start|> 151644, <|im_end|> 151645, <|extra_0|> 151646, <|extra_204|> 151850,
<|extra_50|> 151696, <|extra_51|> 151697, <|extra_60|> 151706, <|extra_61|> 151707, <|extra_100|> 151746,
<|extra_101|> 151747, <|extra_200|> 151846, <|extra_201|> 151847, <|extra_202|> 151848, <|extra_203|> 151849,
<|image token|> 151851, <|image start|> 151852, <|image end|> 151853, <|visual token 000000|> 151854,
<|visual token 131071|> 282925, 0 15, 9 24, * 9
"""


def test_published_ids(published: TextTokenizer) -> None:
    for entry in PUBLISHED_IDS.replace("\n", " ").split(", "):
        string, token = entry.strip().rsplit(" ", 1)
        assert published.encode(string, allow_control=True) == [int(token)], string
        assert published.decode([int(token)]) == string
    assert published.vocabulary.size == 282_926
    assert published.encode(" ") == [220]


def test_published_sanity_cases(published: TextTokenizer) -> None:
    """Fact sheet, section 2: the prompt for "a cat" is 22 ids; the space before BSS is a token of its own."""
    prompt = "<|extra_203|>You are a helpful assistant for t2i task. USER: a cat ASSISTANT: <|extra_100|>"
    ids = published.encode(prompt, allow_control=True)
    assert ids == prompt_ids("t2i", question="a cat", tokenizer=published)
    assert len(ids) == 22
    assert ids[0] == EMU35.bos
    assert ids[-2:] == [220, EMU35.bss]
    assert published.encode("Hello world") == [9707, 1879]  # the same ranks as Qwen's


def merged(word: bytes, ranks: dict[bytes, int]) -> list[int]:
    """Byte-pair encoding as its definition has it: merge the pair of the lowest rank until there is none."""
    parts = [word[i : i + 1] for i in range(len(word))]
    while True:
        pairs = [ranks.get(a + b, len(ranks)) for a, b in pairwise(parts)]
        if not pairs or min(pairs) == len(ranks):
            return [ranks[part] for part in parts]
        at = pairs.index(min(pairs))
        parts[at : at + 2] = [parts[at] + parts[at + 1]]


def test_published_ids_are_those_of_the_definition(published: TextTokenizer) -> None:
    """Another engine: the split pattern in Python's `regex`, then merges one by one."""
    regex = pytest.importorskip("regex", reason="the independent splitter needs the regex package")
    ranks = read_ranks(PUBLISHED_FOLDER / "emu3.tiktoken")
    pattern = regex.compile(
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    rng = random.Random(1)
    for words in WORDS + [random_text(rng) for _ in range(300)]:
        pieces = pattern.findall(unicodedata.normalize("NFC", words))
        assert published.encode(words) == [i for piece in pieces for i in merged(piece.encode(), ranks)], (
            words
        )


def test_published_files_are_written_back(published: TextTokenizer, tmp_path: Path) -> None:
    published.save_published(tmp_path)
    for name in ("emu3.tiktoken", "emu3_vision_tokens.txt"):
        assert (tmp_path / name).read_bytes() == (PUBLISHED_FOLDER / name).read_bytes()


def test_own_ids_are_not_written_as_published(tokenizer: TextTokenizer, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no place in the published files"):
        tokenizer.save_published(tmp_path)


def test_published_files_are_checked(tmp_path: Path, ranks_path: Path) -> None:
    with pytest.raises(ValueError, match=r"emu3\.tiktoken cannot be read"):
        TextTokenizer.published(tmp_path)
    (tmp_path / "emu3.tiktoken").write_bytes(ranks_path.read_bytes())
    with pytest.raises(ValueError, match=r"vision_tokens\.txt cannot be read"):
        TextTokenizer.published(tmp_path)
    for content in (b"<|image start|>\n<|image token|>\n", b"\xff\xfe", b""):
        (tmp_path / "emu3_vision_tokens.txt").write_bytes(content)
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
