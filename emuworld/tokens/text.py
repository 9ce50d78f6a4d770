"""Words <-> ids: byte-level BPE at run time, with the published ranks or with our own.

Ranks come from a file in tiktoken's format (`base64 rank` a line) and run in tiktoken. Training them is in
`emuworld.tokens.bpe`. Text is only text: a control token's string in a user's words is encoded letter by
letter, unless `allow_control=True` asks for the published behaviour, which parses it.
"""

from __future__ import annotations

import base64
import binascii
import os
import re
import unicodedata
from collections.abc import Iterable, Mapping
from pathlib import Path

import tiktoken

from emuworld.files import write_text
from emuworld.tokens.vocabulary import CONTROL_TOKENS, EMU35, VISUAL_STRING, Vocabulary, builtin

# Where text is cut before merging (fact sheet, section 2): English contractions; a word with at most one sign
# or space before it; one digit; signs with at most one space before them; line ends; other white space.
PUBLISHED_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# The same idea for our own ranks. Bounded repeats keep the time linear for any input: BPE over one huge piece
# is not.
BUILTIN_SPLIT = r" ?\p{L}{1,40}|\p{N}| ?[^\s\p{L}\p{N}]{1,20}|\s{1,20}"

_PUBLISHED_RESERVED = {"<|im_start|>": 151644, "<|im_end|>": 151645} | {
    f"<|extra_{i}|>": 151646 + i for i in range(205)
}
# The published pattern backtracks over runs of white space, and the engine gives up (panics) at a million.
_LONG_RUN = re.compile(r"(\s{100000})")
_SHORT, _MOST_KNOWN = 300, 20_000  # characters of a text whose ids are kept, and how many are
_CONTROL = re.compile(r"(<\|[a-z0-9_ ]{1,24}\|>)")
_VISUAL = re.compile(r"<\|visual token (\d{6})\|>")


class TextTokenizer:
    """Text <-> ids under one vocabulary. Input is NFC-normalised; decoding gives that form back.

    Args:
        ranks: bytes of a token -> its id, 0 .. `vocabulary.num_text_tokens` - 1; every single byte is among
        them. vocabulary: what all ids mean. split: regular expression whose matches are merged apart from
        each other. reserved: further strings that `allow_control` parses, with their ids.

    Raises:
        ValueError: the ranks do not fit the vocabulary, or a byte has none.
    """

    def __init__(
        self,
        ranks: Mapping[bytes, int],
        *,
        vocabulary: Vocabulary,
        split: str = BUILTIN_SPLIT,
        reserved: Mapping[str, int] | None = None,
    ) -> None:
        _check_ranks(ranks, num_text_tokens=vocabulary.num_text_tokens)
        self.vocabulary = vocabulary
        self._ranks = dict(ranks)
        self._known: dict[str, list[int]] = {}  # prompts and commands say the same words again and again
        self._encoding = tiktoken.Encoding(
            "emuworld", pat_str=split, mergeable_ranks=self._ranks, special_tokens={}
        )
        controls = {token.string: vocabulary.controls[name] for name, token in CONTROL_TOKENS.items()}
        self._id_of_string = {**(reserved or {}), **controls}
        self._string_of_id = {token: string for string, token in self._id_of_string.items()}

    @classmethod
    def builtin(cls, path: str | os.PathLike[str], *, vocabulary: Vocabulary | None = None) -> TextTokenizer:
        """Ranks that `bpe.train_bpe` wrote; the vocabulary is the default built-in one unless given."""
        ranks = read_ranks(path)
        return cls(ranks, vocabulary=vocabulary or builtin(num_text_tokens=len(ranks)))

    @classmethod
    def published(cls, folder: str | os.PathLike[str]) -> TextTokenizer:
        """The Emu3.5 release's, from `emu3.tiktoken` and `emu3_vision_tokens.txt` in `folder`."""
        folder = Path(folder)
        ranks = read_ranks(folder / "emu3.tiktoken")
        _check_vision_tokens(folder / "emu3_vision_tokens.txt")
        return cls(ranks, vocabulary=EMU35, split=PUBLISHED_SPLIT, reserved=_PUBLISHED_RESERVED)

    def save_published(self, folder: str | os.PathLike[str]) -> None:
        """Write the two files that `published` reads. ValueError unless the ids are those of the release."""
        if self.vocabulary != EMU35:
            raise ValueError(
                f"a vocabulary of {self.vocabulary.size} ids has no place in the published files, whose "
                f"{EMU35.size} ids are fixed: keep the files of the built-in kind"
            )
        write_ranks(self._ranks, path=Path(folder) / "emu3.tiktoken")
        write_text(Path(folder) / "emu3_vision_tokens.txt", _vision_tokens())

    def encode(self, text: str, *, allow_control: bool = False) -> list[int]:
        """Ids of a text; any string encodes, lone surrogates as U+FFFD.

        `allow_control` also parses the strings of control and visual tokens, as the release always does.
        """
        text = unicodedata.normalize("NFC", text)
        if not allow_control:
            return self._encode_plain(text)
        ids: list[int] = []
        for piece in _CONTROL.split(text):
            control = self._control_id(piece)
            ids.extend(self._encode_plain(piece) if control is None else [control])
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ids; control and visual tokens become their strings, broken UTF-8 becomes U+FFFD.

        Raises:
            ValueError: an id that the vocabulary does not name.
        """
        ids = list(map(int, ids))
        if all(map(self.vocabulary.is_text, ids)):
            return self._encoding.decode_bytes(ids).decode("utf-8", errors="replace")
        data = bytearray()
        for token in ids:
            if self.vocabulary.is_text(token):
                data += self._encoding.decode_single_token_bytes(token)
            elif self.vocabulary.is_visual(token):
                data += VISUAL_STRING.format(code=self.vocabulary.code(token)).encode()
            elif token in self._string_of_id:
                data += self._string_of_id[token].encode()
            else:
                raise ValueError(f"id {token} is no token of this vocabulary (size {self.vocabulary.size})")
        return data.decode("utf-8", errors="replace")

    def token_bytes(self, token: int) -> bytes:
        """UTF-8 bytes of a text token, which may begin or end inside a character."""
        return self._encoding.decode_single_token_bytes(token)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the ranks for `builtin` to read."""
        write_ranks(self._ranks, path=path)

    def _encode_plain(self, text: str) -> list[int]:
        known = self._known.get(text)
        if known is None:
            known = [token for run in _LONG_RUN.split(text) for token in self._encoding.encode_ordinary(run)]
            if len(text) <= _SHORT and len(self._known) < _MOST_KNOWN:
                self._known[text] = known
        return known.copy()

    def _control_id(self, piece: str) -> int | None:
        match = _VISUAL.fullmatch(piece)
        if match and int(match[1]) < self.vocabulary.num_visual_tokens:
            return self.vocabulary.visual_id(int(match[1]))
        return self._id_of_string.get(piece)


def read_ranks(path: str | os.PathLike[str]) -> dict[bytes, int]:
    """Token bytes -> rank from a tiktoken file; ValueError names the line that is none."""
    try:
        lines = Path(path).read_bytes().splitlines()
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror}): give the file of BPE ranks") from error
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(lines, start=1):
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error) as error:
            raise ValueError(f"{path}, line {number}: expected 'base64 rank', got {line[:60]!r}") from error
    return ranks


def write_ranks(ranks: Mapping[bytes, int], *, path: str | os.PathLike[str]) -> None:
    """Write token bytes -> rank as a tiktoken file, in the order of the ranks."""
    in_order = sorted(ranks.items(), key=lambda item: item[1])
    lines = [f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in in_order]
    write_text(path, "".join(lines))


def _check_ranks(ranks: Mapping[bytes, int], *, num_text_tokens: int) -> None:
    if sorted(ranks.values()) != list(range(num_text_tokens)):
        raise ValueError(
            f"{len(ranks)} ranks do not number 0..{num_text_tokens - 1} without gaps: "
            "the ranks file and the vocabulary belong to different models"
        )
    missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if missing:
        raise ValueError(
            f"bytes {missing[:8]} have no rank, so not every text encodes: train the ranks again"
        )


def _check_vision_tokens(path: Path) -> None:
    """The file's order fixes the published ids above the text; refuse any other order."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror}): put it beside emu3.tiktoken") from error
    if lines != _vision_tokens().splitlines():
        raise ValueError(f"{path} has {len(lines)} lines and is not the list of the Emu3.5 release")


def _vision_tokens() -> str:
    """The published list, one string a line: IMG, BOI, EOI, then all visual tokens."""
    controls = [CONTROL_TOKENS[name].string for name in ("img", "boi", "eoi")]
    visual = [VISUAL_STRING.format(code=code) for code in range(EMU35.num_visual_tokens)]
    return "".join(f"{string}\n" for string in controls + visual)
