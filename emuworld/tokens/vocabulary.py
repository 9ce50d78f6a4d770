"""The one table of token ids: which ids are text, which steer the sequence, which are visual codes.

Every other file asks this one; no id and no control string is written anywhere else. The strings, meanings
and published ids are those of the Emu3.5 release (fact sheet, section 2; paper arXiv 2510.26583). The
built-in model uses the same control tokens at other ids, laid out without gaps: text, then control, then
visual.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import NamedTuple


class ControlToken(NamedTuple):
    """One control token: its string in the published tokenizer, its id there, its meaning."""

    string: str
    published_id: int
    meaning: str


CONTROL_TOKENS: dict[str, ControlToken] = {
    "pad": ControlToken("<|endoftext|>", 151643, "fills a row up to the length of the batch; never trained"),
    "boc": ControlToken("<|extra_50|>", 151696, "starts the thought before one image"),
    "eoc": ControlToken("<|extra_51|>", 151697, "ends the thought before one image"),
    "bog": ControlToken("<|extra_60|>", 151706, "starts the thought before the whole answer"),
    "eog": ControlToken("<|extra_61|>", 151707, "ends the thought before the whole answer"),
    "bss": ControlToken("<|extra_100|>", 151746, "starts the answer; the last token of every prompt"),
    "ess": ControlToken("<|extra_101|>", 151747, "ends the answer"),
    "img": ControlToken("<|image token|>", 151851, "stands between an image's size and its first row"),
    "boi": ControlToken(
        "<|image start|>", 151852, "starts an image; its size follows as text, 'h*w' in tokens"
    ),
    "eoi": ControlToken("<|image end|>", 151853, "ends an image"),
    "eol": ControlToken("<|extra_200|>", 151846, "stands between two rows of an image (none after the last)"),
    "eof": ControlToken("<|extra_201|>", 151847, "end of frame; reserved by the release, unused"),
    "tms": ControlToken("<|extra_202|>", 151848, "time stamp; reserved by the release, unused"),
    "bos": ControlToken("<|extra_203|>", 151849, "starts every sequence"),
    "eos": ControlToken("<|extra_204|>", 151850, "ends every sequence"),
}
VISUAL_STRING = "<|visual token {code:06d}|>"


@dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """Which id means what. Text ids are 0 .. `num_text_tokens` - 1, visual ids `visual_start` onwards.

    The fields `pad` to `eos` are the ids of the control tokens; `CONTROL_TOKENS` says what each one means.
    Ids that are none of text, control and visual (the published table has 196 of them) are reserved and never
    produced.

    Raises:
        ValueError: two kinds of tokens share an id, or an id lies outside 0 .. `size` - 1.
    """

    num_text_tokens: int
    pad: int
    boc: int
    eoc: int
    bog: int
    eog: int
    bss: int
    ess: int
    img: int
    boi: int
    eoi: int
    eol: int
    eof: int
    tms: int
    bos: int
    eos: int
    visual_start: int
    num_visual_tokens: int
    size: int

    def __post_init__(self) -> None:
        if self.num_text_tokens < 256:
            raise ValueError(
                f"num_text_tokens is {self.num_text_tokens}, but every byte needs one: give at least 256"
            )
        if self.num_visual_tokens < 1 or self.visual_stop > self.size:
            raise ValueError(
                f"visual ids {self.visual_start} to {self.visual_stop - 1} do not fit into size {self.size}: "
                "give at least one visual token and a size that holds them all"
            )
        if len(set(self.control_ids)) != len(CONTROL_TOKENS):
            raise ValueError(f"two control tokens share an id: {self.controls}")
        for name, token in self.controls.items():
            if not 0 <= token < self.size or self.is_text(token) or self.is_visual(token):
                raise ValueError(
                    f"{name} has id {token}, which is a text or visual id or outside 0..{self.size - 1}"
                )

    @property
    def visual_stop(self) -> int:
        """One past the last visual id."""
        return self.visual_start + self.num_visual_tokens

    @property
    def controls(self) -> dict[str, int]:
        """Control token name -> id, in the order of `CONTROL_TOKENS`."""
        return {name: int(getattr(self, name)) for name in CONTROL_TOKENS}

    @property
    def control_ids(self) -> tuple[int, ...]:
        """The ids of all control tokens, ascending."""
        return tuple(sorted(self.controls.values()))

    def is_text(self, token: int) -> bool:
        return 0 <= token < self.num_text_tokens

    def is_visual(self, token: int) -> bool:
        return self.visual_start <= token < self.visual_stop

    def visual_id(self, code: int) -> int:
        """Id of a code of the vision tokenizer (0-based)."""
        if not 0 <= code < self.num_visual_tokens:
            raise ValueError(f"code {code} is outside 0..{self.num_visual_tokens - 1}: it is no visual code")
        return self.visual_start + code

    def code(self, token: int) -> int:
        """Code of the vision tokenizer (0-based) that a visual id stands for."""
        if not self.is_visual(token):
            raise ValueError(
                f"id {token} is outside {self.visual_start}..{self.visual_stop - 1}: it is no visual token"
            )
        return token - self.visual_start

    def to_json(self) -> dict[str, int]:
        """A JSON object with every field; `from_json` reads it back."""
        return asdict(self)

    @classmethod
    def from_json(cls, fields: Mapping[str, int]) -> Vocabulary:
        """Read what `to_json` gave, refusing missing, unknown and non-integer fields."""
        expected = set(cls.__dataclass_fields__)
        if set(fields) != expected:
            raise ValueError(
                f"vocabulary fields differ: missing {sorted(expected - set(fields))}, "
                f"unknown {sorted(set(fields) - expected)}; write it with Vocabulary.to_json"
            )
        wrong = {name: value for name, value in fields.items() if type(value) is not int}
        if wrong:
            raise ValueError(f"vocabulary fields must be integers, got {wrong}")
        return cls(**fields)


def builtin(*, num_text_tokens: int = 2000, num_visual_tokens: int = 4096) -> Vocabulary:
    """Ids of a model of our own: text, then the control tokens in table order, then the visual tokens."""
    controls = {name: num_text_tokens + i for i, name in enumerate(CONTROL_TOKENS)}
    visual_start = num_text_tokens + len(CONTROL_TOKENS)
    return Vocabulary(
        num_text_tokens=num_text_tokens,
        visual_start=visual_start,
        num_visual_tokens=num_visual_tokens,
        size=visual_start + num_visual_tokens,
        **controls,
    )


EMU35 = Vocabulary(
    num_text_tokens=151643,
    visual_start=151854,
    num_visual_tokens=131072,
    size=282926,
    **{name: token.published_id for name, token in CONTROL_TOKENS.items()},
)
