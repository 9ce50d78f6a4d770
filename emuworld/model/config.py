"""The transformer's hyper-parameters, their named sizes, and their form as a Hugging Face `config.json`."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

_REQUIRED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")


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
            "use_sliding_window": False,
            "vocab_size": self.vocab_size,
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "TransformerConfig":
        """Read a Qwen3 or published Emu3.5 `config.json`; dead keys are ignored.

        Raises ValueError for a missing key and for settings that this transformer does not compute.
        """
        missing = [name for name in _REQUIRED if name not in values]
        if missing:
            raise ValueError(
                f"config.json: no {', '.join(missing)}; expected a Qwen3 or Emu3.5 configuration"
            )
        rope = values.get("rope_scaling") or values.get("rope_parameters") or {}
        if rope.get("rope_type", rope.get("type", "default")) != "default":
            raise ValueError(f"config.json: rope_scaling {rope} is not supported; expected none")
        if values.get("hidden_act", "silu") != "silu":
            raise ValueError(f"config.json: hidden_act is {values['hidden_act']!r}; expected 'silu'")
        if values.get("attention_bias", False):
            raise ValueError("config.json: attention_bias is true; expected projections without biases")
        num_heads = int(values["num_attention_heads"])
        return cls(
            vocab_size=int(values["vocab_size"]),
            hidden_size=int(values["hidden_size"]),
            intermediate_size=int(values["intermediate_size"]),
            num_layers=int(values["num_hidden_layers"]),
            num_heads=num_heads,
            num_kv_heads=int(values.get("num_key_value_heads", num_heads)),
            head_dim=int(values.get("head_dim") or values["hidden_size"] // num_heads),
            rope_theta=float(values.get("rope_theta", rope.get("rope_theta", 1_000_000.0))),
            rms_norm_eps=float(values.get("rms_norm_eps", 1e-6)),
            tie_word_embeddings=bool(values.get("tie_word_embeddings", False)),
            max_position_embeddings=int(values.get("max_position_embeddings", 32_768)),
            attention_dropout=float(values.get("attention_dropout", 0.0)),
            initializer_range=float(values.get("initializer_range", 0.02)),
        )


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
