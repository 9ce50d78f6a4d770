"""The transformer's hyper-parameters, their named sizes, and their form as a `config.json`: Qwen3's, which
`transformers` reads, or that of the Emu3.5 release."""

import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from emuworld.tokens.vocabulary import EMU35

PUBLISHED_TYPE = "Emu3"  # not transformers' own "emu3", which is the model of 2024 with the vision inside
_REQUIRED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
# What a published config.json may leave out: defaults of the release's class (fact sheet, section 1.1).
_PUBLISHED_DEFAULTS: dict[str, Any] = {
    "num_key_value_heads": 8,
    "head_dim": 128,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1_000_000.0,
    "max_position_embeddings": 9216,
    "attention_dropout": 0.1,
    "tie_word_embeddings": False,
}
_MAX_SIZE = 1 << 24  # of anything that a config.json counts: sixty times the largest in the release
_MAX_LAYERS = 1024


@dataclass(frozen=True, kw_only=True)
class TransformerConfig:
    """Shape of one decoder-only transformer; rope_theta and initializer_range default to Emu3.5's."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope_theta: float = 1_000_000.0
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = True
    max_position_embeddings: int = 32_768
    attention_dropout: float = 0.0
    """One probability for embeddings, attention weights and both outputs of a layer, as published."""
    initializer_range: float = 0.02

    def __post_init__(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads ({self.num_heads}) must be a multiple of num_kv_heads ({self.num_kv_heads})"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim must be even for rotary positions, got {self.head_dim}")

    def to_json(self) -> dict[str, Any]:
        """The dictionary for `config.json`; transformers reads it as a Qwen3ForCausalLM."""
        return {
            "architectures": ["Qwen3ForCausalLM"],
            "model_type": "qwen3",
            "attention_bias": False,
            **self._sizes(),
            "use_sliding_window": False,
        }

    def to_published_json(self) -> dict[str, Any]:
        """The dictionary for `config.json` as the release has it. ValueError for another vocabulary."""
        if self.vocab_size != EMU35.size:
            raise ValueError(
                f"a vocabulary of {self.vocab_size} ids has no place in the published layout, whose "
                f"{EMU35.size} ids are fixed: export it as a Qwen3ForCausalLM"
            )
        names = ("pad", "bos", "eos", "img", "boi", "eoi", "eol", "eof")
        return {
            "architectures": ["Emu3ForCausalLM"],
            "model_type": PUBLISHED_TYPE,
            **self._sizes(),
            **{f"{name}_token_id": EMU35.controls[name] for name in names},
            "image_area": 518_400,  # 720 x 720 px, to which the release scales reference pictures
            "pretraining_tp": 1,
            "use_cache": True,
        }

    def _sizes(self) -> dict[str, Any]:
        return {
            "attention_dropout": self.attention_dropout,
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "hidden_size": self.hidden_size,
            "initializer_range": self.initializer_range,
            "intermediate_size": self.intermediate_size,
            "max_position_embeddings": self.max_position_embeddings,
            "num_attention_heads": self.num_heads,
            "num_hidden_layers": self.num_layers,
            "num_key_value_heads": self.num_kv_heads,
            "rms_norm_eps": self.rms_norm_eps,
            "rope_scaling": None,
            "rope_theta": self.rope_theta,
            "tie_word_embeddings": self.tie_word_embeddings,
            "vocab_size": self.vocab_size,
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "TransformerConfig":
        """Read a Qwen3 or published Emu3.5 `config.json`; dead keys are ignored.

        Raises ValueError for a missing key and for settings that this transformer does not compute.
        """
        kind = values.get("model_type")
        if kind not in (None, "qwen3", PUBLISHED_TYPE):
            raise ValueError(
                f"config.json: model_type is {reprlib.repr(kind)}; expected 'qwen3' or '{PUBLISHED_TYPE}'"
            )
        missing = [name for name in _REQUIRED if name not in values]
        if missing:
            raise ValueError(
                f"config.json: no {', '.join(missing)}; expected a Qwen3 or Emu3.5 configuration"
            )
        if kind == PUBLISHED_TYPE:
            values = {**_PUBLISHED_DEFAULTS, **values}
        rope = _check_computed(values)
        num_heads = _count(values, "num_attention_heads")
        hidden_size = _count(values, "hidden_size")
        return cls(
            vocab_size=_count(values, "vocab_size"),
            hidden_size=hidden_size,
            intermediate_size=_count(values, "intermediate_size"),
            num_layers=_count(values, "num_hidden_layers", most=_MAX_LAYERS),
            num_heads=num_heads,
            num_kv_heads=_count(values, "num_key_value_heads", default=num_heads),
            head_dim=_count(values, "head_dim", default=hidden_size // num_heads),
            rope_theta=_number(values, "rope_theta", default=rope.get("rope_theta", 1_000_000.0)),
            rms_norm_eps=_number(values, "rms_norm_eps", default=1e-6),
            tie_word_embeddings=bool(values.get("tie_word_embeddings", False)),
            max_position_embeddings=_count(values, "max_position_embeddings", default=32_768),
            attention_dropout=_number(values, "attention_dropout", default=0.0),
            initializer_range=_number(values, "initializer_range", default=0.02),
        )


def _check_computed(values: Mapping[str, Any]) -> Mapping[str, Any]:
    """The rotary settings; ValueError for what this transformer does not compute."""
    rope = values.get("rope_scaling") or values.get("rope_parameters") or {}
    if not isinstance(rope, Mapping) or rope.get("rope_type", rope.get("type", "default")) != "default":
        raise ValueError(f"config.json: rope_scaling {reprlib.repr(rope)} is not supported; expected none")
    if values.get("hidden_act", "silu") != "silu":
        raise ValueError(f"config.json: hidden_act is {values['hidden_act']!r}; expected 'silu'")
    if values.get("attention_bias", False):
        raise ValueError("config.json: attention_bias is true; expected projections without biases")
    if values.get("use_sliding_window", False):
        raise ValueError("config.json: use_sliding_window is true; expected attention to the whole sequence")
    return rope


def _count(values: Mapping[str, Any], name: str, *, default: int = 0, most: int = _MAX_SIZE) -> int:
    value = values.get(name)
    value = default if value is None else value
    if type(value) is not int or not 1 <= value <= most:
        raise ValueError(f"config.json: {name} must be an integer in 1..{most}, got {reprlib.repr(value)}")
    return value


def _number(values: Mapping[str, Any], name: str, *, default: float) -> float:
    value = values.get(name)
    value = default if value is None else value
    if type(value) not in (int, float) or not 0 <= value < float("inf"):
        raise ValueError(f"config.json: {name} must be a number, at least 0, got {reprlib.repr(value)}")
    return float(value)


SIZES: dict[str, dict[str, Any]] = {
    "tiny": {
        "hidden_size": 64,
        "intermediate_size": 160,
        "num_layers": 2,
        "num_heads": 8,
        "num_kv_heads": 2,
        "head_dim": 16,
    },
    "small": {
        "hidden_size": 512,
        "intermediate_size": 1152,
        "num_layers": 8,
        "num_heads": 8,
        "num_kv_heads": 2,
        "head_dim": 64,
    },
    "emu3.5": {  # paper, table 1; tied would not reach its 34.1 B parameters
        "hidden_size": 5120,
        "intermediate_size": 25600,
        "num_layers": 64,
        "num_heads": 64,
        "num_kv_heads": 8,
        "head_dim": 128,
        "tie_word_embeddings": False,
    },
}


def sized(name: str, *, vocab_size: int, **changes: Any) -> TransformerConfig:
    """The named size over a vocabulary, as `sized("small", vocab_size=12_000)`; `changes` override fields."""
    if name not in SIZES:
        raise ValueError(f"unknown transformer size {name!r}; expected one of {', '.join(SIZES)}")
    return TransformerConfig(**{**SIZES[name], "vocab_size": vocab_size, **changes})
