"""The whole way from a prompt to its ids against a straight-line implementation of the published one.

The second implementation is written here from the fact sheet (sections 4.1, 4.2, 5.1 and 5.3) and shares no
line with ours: prompts are strings whose control tokens are parsed, the transformer is `transformers`' Qwen3,
every sequence has a growing cache of its own, the guided and the unguided pass follow each other, and scores
are those of the whole vocabulary. Greedy, so equal ids need no equal random numbers. From 5.4 it takes what
we mend: text holds no stray control tokens. Limits of text are ours.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from emuworld.checkpoint_folder import find, open_parts
from emuworld.decoding.sampling import Sampling
from emuworld.model import checkpoint
from emuworld.tokens.text import TextTokenizer
from emuworld.world_model import WorldModel

HOWTO = " Please generate a response with interleaved text and images."
CONDITIONAL = "<|extra_203|>You are a helpful assistant for {task} task.{extra} USER: {question}{image}"
CONDITIONAL_X2I = "<|extra_203|>You are a helpful assistant for {task} task.{extra} USER: {image}{question}"
UNCONDITIONAL = "<|extra_203|>You are a helpful assistant. USER: {image}"
TAIL = " ASSISTANT: <|extra_100|>"
BOG, EOG, BOC, EOC = "<|extra_60|>", "<|extra_61|>", "<|extra_50|>", "<|extra_51|>"
BOI, EOI, IMG, EOL = "<|image start|>", "<|image end|>", "<|image token|>", "<|extra_200|>"
ESS, EOS = "<|extra_101|>", "<|extra_204|>"
MAX_WORDS = 24  # the tiny checkpoint's


class Sequence:
    """One sequence with its own growing cache; `scores` are the logits behind its last token."""

    def __init__(self, qwen: torch.nn.Module, ids: list[int]) -> None:
        self.qwen, self.past = qwen, None
        self.feed(ids)

    def feed(self, ids: list[int]) -> None:
        out = self.qwen(torch.tensor([ids]), past_key_values=self.past, use_cache=True)
        self.past, self.scores = out.past_key_values, out.logits[0, -1].float()


@dataclass(kw_only=True)
class StraightLine:
    """An answer on its way. `sizes`: every side from the smallest to the largest, where the size is free."""

    qwen: torch.nn.Module
    tokenizer: TextTokenizer
    guidance: float
    image_guidance: float = 1.0
    size: tuple[int, int] | None = None
    sides: range = range(0)

    def begin(self, task: str, question: str, codes: list[np.ndarray]) -> None:
        strings = "".join(image_string(grid) for grid in codes)
        template = CONDITIONAL_X2I if task == "x2i" else CONDITIONAL
        extra = HOWTO if task == "howto" else ""
        head = template.format(task=task, extra=extra, question=question, image=strings)
        self.conditional = Sequence(self.qwen, self.encode(head + TAIL))
        self.unguided = Sequence(self.qwen, self.encode(UNCONDITIONAL.format(image=strings) + TAIL))
        self.blind = Sequence(self.qwen, self.encode(UNCONDITIONAL.format(image="") + TAIL))
        self.answer: list[int] = []

    def encode(self, string: str) -> list[int]:
        return self.tokenizer.encode(string, allow_control=True)

    def control(self, string: str) -> int:
        (token,) = self.encode(string)
        return token

    def put(self, token: int, *, in_image: bool) -> None:
        self.answer.append(token)
        for sequence in (self.conditional, self.unguided, self.blind) if in_image else (self.conditional,):
            sequence.feed([token])

    def best(self, scores: torch.Tensor, allowed: list[int]) -> int:
        masked = torch.full_like(scores, float("-inf"))
        masked[allowed] = scores[allowed]
        return int(masked.argmax())

    def segment(self, text: str | None) -> None:
        if text is None:
            if not self.write_text():
                return
        else:
            for token in self.encode(text):
                self.put(token, in_image=False)
        self.draw()

    def write_text(self) -> bool:
        """Words and thoughts; True: an image comes, False: the answer is over."""
        words = list(range(self.tokenizer.vocabulary.num_text_tokens))
        thought = ""
        for _ in range(MAX_WORDS):
            outside = [BOC, BOI, ESS, EOS] + [BOG] * (not self.answer)
            controls = [thought] if thought else outside
            token = self.best(self.conditional.scores, words + [self.control(c) for c in controls])
            if token == self.control(BOI):
                return True
            self.put(token, in_image=False)
            if token == self.control(EOS):
                return False
            if token == self.control(ESS):
                self.put(self.control(EOS), in_image=False)
                return False
            openers = {self.control(BOG): EOG, self.control(BOC): EOC}
            if thought and token == self.control(thought):
                thought = ""
            elif not thought:
                thought = openers.get(token, "")
        for control in [thought] * bool(thought) + [ESS, EOS]:
            self.put(self.control(control), in_image=False)
        return False

    def draw(self) -> None:
        self.put(self.control(BOI), in_image=True)
        if self.size is None:
            self.size = self.choose_side("*"), self.choose_side(IMG)
        else:
            for token in [*self.encode("{}*{}".format(*self.size)), self.control(IMG)]:
                self.put(token, in_image=True)
        h, w = self.size
        visual = [self.control(f"<|visual token {code:06d}|>") for code in range(64)]
        for p in range(1, h * (w + 1) + 1):
            if p == h * (w + 1):
                token = self.control(EOI)
            elif p % (w + 1) == 0:
                token = self.control(EOL)
            else:
                token = self.best(self.guided(), visual)
            self.put(token, in_image=True)

    def guided(self) -> torch.Tensor:
        c, u, b = (torch.log_softmax(s.scores, dim=-1) for s in (self.conditional, self.unguided, self.blind))
        if self.image_guidance == 1.0:
            return u + self.guidance * (c - u)
        return b + self.image_guidance * (u - b) + self.guidance * (c - u)

    def choose_side(self, end: str) -> int:
        """Digits by the model, unguided, so long as some side begins with them; then `end`."""
        digits = ""
        while True:
            nexts = [d for d in "0123456789" if any(str(n).startswith(digits + d) for n in self.sides)]
            ends = [end] if digits and int(digits) in self.sides else []
            choice = {self.control(c): c for c in nexts + ends}
            token = self.best(self.conditional.scores, list(choice))
            self.put(token, in_image=True)
            if choice[token] == end:
                return int(digits)
            digits += choice[token]


def image_string(codes: np.ndarray) -> str:
    rows = ["".join(f"<|visual token {code:06d}|>" for code in row) for row in codes.tolist()]
    return f"{BOI}{codes.shape[0]}*{codes.shape[1]}{IMG}{EOL.join(rows)}{EOI}"


@pytest.fixture(scope="module")
def models(tiny_folder: str) -> tuple[WorldModel, torch.nn.Module]:
    """Ours in fp32 without a default size, and Qwen3 of `transformers` with the same weights."""
    transformers = pytest.importorskip("transformers")
    parts = open_parts(find(tiny_folder), device=torch.device("cpu"))
    ours = checkpoint.load(parts.folder, device="cpu", dtype=torch.float32)
    v = parts.manifest.vocabulary
    likelier = {v.boi: 6.0, v.boc: 3.0, v.bog: 8.0, v.eoc: 7.0, v.eog: 7.0, v.ess: 3.0}
    with torch.no_grad():  # greedy texts that come to pictures, to thoughts and to an end
        ours.lm_head.weight[list(likelier), 0] = torch.tensor(list(likelier.values()))
    c = ours.config
    qwen = transformers.Qwen3ForCausalLM(
        transformers.Qwen3Config(
            vocab_size=c.vocab_size, hidden_size=c.hidden_size, intermediate_size=c.intermediate_size,
            num_hidden_layers=c.num_layers, num_attention_heads=c.num_heads,
            num_key_value_heads=c.num_kv_heads, head_dim=c.head_dim, rms_norm_eps=c.rms_norm_eps,
            rope_parameters={"rope_type": "default", "rope_theta": c.rope_theta}, rope_theta=c.rope_theta,
            tie_word_embeddings=False, max_position_embeddings=c.max_position_embeddings,
        )
    ).eval()  # fmt: skip
    qwen.load_state_dict(ours.state_dict())
    manifest = dataclasses.replace(parts.manifest, default_size=None, smallest_side=16, largest_side=192)
    return WorldModel(dataclasses.replace(parts, transformer=ours, manifest=manifest)), qwen


CASES = {
    "t2i, small": ("t2i", "a red ball", 0, (32, 48), 2.0, 1.0, ("",)),
    "t2i, large": ("t2i", "a red ball and a blue box", 0, (128, 112), 5.0, 1.0, ("",)),
    "t2i, unguided": ("t2i", "a door", 0, (48, 48), 1.0, 1.0, ("",)),
    "t2i, the model's size": ("t2i", "a door", 0, None, 3.0, 1.0, ("",)),
    "t2i, the model's words": ("t2i", "a box", 0, (32, 32), 3.0, 1.0, (None,)),
    "x2i": ("x2i", "make it blue", 1, (64, 48), 3.0, 1.0, ("",)),
    "x2i, two pictures": ("x2i", "put both together", 2, (48, 64), 5.0, 1.0, ("",)),
    "x2i, three-way": ("x2i", "make it green", 2, (48, 64), 3.0, 1.75, ("",)),
    "x2i, three-way without words": ("x2i", "", 1, (32, 32), 1.0, 2.0, ("",)),
    "story": ("story", "a walk", 0, (48, 32), 3.0, 1.0, ("turn left", None, "", "look up", None)),
    "story from a picture": ("story", "on", 1, (32, 64), 2.0, 1.0, (None, "go", "é🤖", None)),
    "story, three-way": ("story", "on", 1, (32, 32), 2.0, 1.5, ("turn right", None, "go", "go")),
    "story, the model's size": ("story", "rooms", 0, None, 3.0, 1.0, ("look up", "look up", None)),
    "howto": ("howto", "stack cubes", 0, (32, 32), 3.0, 1.0, ("pick", None, "place")),
    "explore": ("explore", "a room", 0, (32, 48), 1.0, 1.0, (None, "turn left", None)),
    "vla": ("vla", "push the box", 1, (32, 32), 4.0, 1.0, (None, "push", None)),
}


@pytest.mark.parametrize("name", CASES)
def test_ids_are_those_of_the_straight_line(models: tuple[WorldModel, torch.nn.Module], name: str) -> None:
    model, qwen = models
    mode, prompt, num_images, size, guidance, image_guidance, texts = CASES[name]
    rng = np.random.default_rng(5)
    codes = [rng.integers(0, 64, shape) for shape in ((3, 4), (2, 6))[:num_images]]
    reference = StraightLine(
        qwen=qwen,
        tokenizer=model.tokenizer,
        guidance=guidance,
        image_guidance=image_guidance,
        size=None if size is None else (size[0] // 16, size[1] // 16),
        sides=range(1, 13),
    )
    state = model.begin(mode=mode, prompt=prompt, images=codes, size=size or "auto")
    assert state.size == size
    sampling = Sampling.greedy(guidance=guidance, image_guidance=image_guidance)
    num_pictures = 0
    v = model.manifest.vocabulary
    with torch.inference_mode():
        reference.begin(mode, prompt, codes)
        for text in texts:
            state, segment = model.imagine(state, text, sampling=sampling)
            reference.segment(text)
            assert list(state.answer_ids) == reference.answer
            num_pictures += segment.image is not None
            if state.ended:
                break
    assert num_pictures >= max(1, len(texts) - 1), "the case is about pictures, in story after words"
    assert (name != "t2i, the model's words") or v.boc in state.answer_ids, "and one about a thought"
