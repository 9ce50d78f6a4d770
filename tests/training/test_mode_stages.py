"""Examples of every mode: the prompt that the environments ask, and a loss on the answer alone."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import numpy as np
import pytest

from emuworld.cli import compose
from emuworld.tokens.bpe import train_bpe
from emuworld.tokens.sequence import (
    MODES,
    ParsedAnswer,
    parse_answer,
    prompt_ids,
    template_texts,
    unconditional_ids,
)
from emuworld.tokens.text import TextTokenizer
from emuworld.tokens.vocabulary import builtin
from emuworld.training.data import TokenStory
from emuworld.training.examples import BUCKET_MODES, Bucket, ExampleSampler, Mixture
from emuworld.training.modes import (
    Shares,
    answer_example,
    change_gains,
    edit_example,
    edit_steps,
    table_example,
)

NUM_CODES = 64
ALWAYS_ASKED = Shares(unconditional=0.0, midway=0.0, picture_first=0.0)
PLOT = "A red ball and a blue box are in a room. The red ball hides behind the blue box. Night falls."


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> TextTokenizer:
    path = tmp_path_factory.mktemp("words") / "text.tiktoken"
    train_bpe([PLOT, "make the red ball blue", *template_texts()] * 4, num_tokens=320, path=path)
    return TextTokenizer.builtin(path, vocabulary=builtin(num_text_tokens=320, num_visual_tokens=NUM_CODES))


def _story(kind: str, *, references: int, steps: int, question: str = PLOT, side: int = 2) -> TokenStory:
    """A story whose picture `i` is made of code `i` alone."""
    codes = np.repeat(np.arange(references + steps, dtype=np.uint16), side * side).reshape(-1, side, side)
    return TokenStory(
        question=question,
        texts=("",) * references + tuple(f"make it {i}" for i in range(steps)),
        captions=tuple(f"view {i}" for i in range(references + steps)),
        codes=codes,
        kind=kind,
        num_references=references,
    )


def _answer(ids: list[int], prompt: list[int], tokenizer: TextTokenizer) -> ParsedAnswer:
    assert ids[: len(prompt)] == prompt
    parsed = parse_answer(ids[len(prompt) :], tokenizer=tokenizer)
    assert not any(segment.problems for segment in parsed)
    return parsed


def _shown(parsed: ParsedAnswer) -> list[int]:
    return [int(segment.codes[0, 0]) for segment in parsed if segment.codes is not None]


def _picture(code: int) -> np.ndarray:
    return np.full((2, 2), code)


def test_an_edit_is_asked_of_the_references_then_of_the_last_picture(tokenizer: TextTokenizer) -> None:
    """As `Worlds.edit` asks it: all given pictures at first, then the last picture alone."""
    rng = np.random.default_rng(0)
    chain = _story("x2i", references=1, steps=3, question="")
    assert edit_steps(chain, 2) == [1, 2, 3] and edit_steps(chain, 3) == []
    both = _story("x2i", references=2, steps=2, question="")
    assert edit_steps(both, 3) == [2] and edit_steps(both, 2) == [3]
    for story, at, seen in ((chain, 1, (0,)), (chain, 3, (2,)), (both, 2, (0, 1)), (both, 3, (2,))):
        example = edit_example(story, at, rng, shares=ALWAYS_ASKED, tokenizer=tokenizer)
        prompt = prompt_ids(
            "x2i", question=story.texts[at], images=[_picture(code) for code in seen], tokenizer=tokenizer
        )
        assert example.prompt_tokens == len(prompt)
        parsed = _answer(example.ids, prompt, tokenizer)
        assert _shown(parsed) == [at] and parsed[0].text == "" and parsed.ended


def test_unguided_edits_see_pictures_or_nothing(tokenizer: TextTokenizer) -> None:
    rng = np.random.default_rng(1)
    shares = Shares(unconditional=1.0, midway=0.0, picture_first=0.0)
    story = _story("x2i", references=1, steps=1)
    prompts = [unconditional_ids(images, tokenizer=tokenizer) for images in ([_picture(0)], [])]
    seen = [0, 0]
    for _ in range(40):
        example = edit_example(story, 1, rng, shares=shares, tokenizer=tokenizer)
        which = [example.ids[: len(prompt)] == prompt for prompt in prompts].index(True)
        assert example.prompt_tokens == len(prompts[which])
        seen[which] += 1
    assert min(seen) > 8


def test_an_answer_goes_on_from_question_and_first_frame(tokenizer: TextTokenizer) -> None:
    rng = np.random.default_rng(2)
    story = _story("vla", references=1, steps=3)
    example = answer_example(
        story, rng, frames=4, max_tokens=10_000, shares=ALWAYS_ASKED, tokenizer=tokenizer
    )
    prompt = prompt_ids("vla", question=PLOT, images=[_picture(0)], tokenizer=tokenizer)
    parsed = _answer(example.ids, prompt, tokenizer)
    assert _shown(parsed) == [1, 2, 3] and parsed.ended and example.prompt_tokens == len(prompt)
    assert [segment.text for segment in parsed] == ["make it 0", "make it 1", "make it 2"]
    tale = _story("story", references=0, steps=3)
    example = answer_example(tale, rng, frames=3, max_tokens=10_000, shares=ALWAYS_ASKED, tokenizer=tokenizer)
    prompt = prompt_ids("story", question=PLOT, tokenizer=tokenizer)
    assert _shown(_answer(example.ids, prompt, tokenizer)) == [0, 1, 2]


def test_long_answers_are_cut_and_do_not_say_that_they_end(tokenizer: TextTokenizer) -> None:
    rng = np.random.default_rng(3)
    story = _story("vla", references=1, steps=5)
    prompt = prompt_ids("vla", question=PLOT, images=[_picture(0)], tokenizer=tokenizer)
    for frames, room, shown in ((3, 10_000, [1, 2]), (6, len(prompt) + 80, [1, 2])):
        example = answer_example(
            story, rng, frames=frames, max_tokens=room, shares=ALWAYS_ASKED, tokenizer=tokenizer
        )
        parsed = _answer(example.ids, prompt, tokenizer)
        assert _shown(parsed)[:1] == [1] and not parsed.ended
        assert len(example.ids) <= room and (room < 1_000 or _shown(parsed) == shown)
    with pytest.raises(ValueError, match="use longer rows"):
        answer_example(story, rng, frames=6, max_tokens=60, shares=ALWAYS_ASKED, tokenizer=tokenizer)


def test_stories_begin_midway_from_a_picture(tokenizer: TextTokenizer) -> None:
    """Picture k becomes the given one, and the answer is what follows it."""
    rng = np.random.default_rng(4)
    shares = Shares(unconditional=0.0, midway=1.0, picture_first=1.0)
    starts = set()
    for story in (_story("vla", references=1, steps=3), _story("story", references=0, steps=4)):
        for _ in range(30):
            example = answer_example(
                story, rng, frames=9, max_tokens=10_000, shares=shares, tokenizer=tokenizer
            )
            for given in range(3):
                images = [_picture(given)]
                prompt = prompt_ids(story.kind, question=PLOT, images=images, tokenizer=tokenizer)
                if example.ids[: len(prompt)] == prompt:
                    parsed = _answer(example.ids, prompt, tokenizer)
                    assert _shown(parsed) == list(range(given + 1, 4)) and parsed.ended
                    starts.add((story.kind, given))
    assert {("vla", 1), ("vla", 2), ("story", 0), ("story", 1), ("story", 2)} <= starts
    assert ("vla", 0) not in starts


def test_subtasks_that_nobody_ordered_never_end(tokenizer: TextTokenizer) -> None:
    story = _story("vla", references=1, steps=2, question="")
    example = answer_example(
        story,
        np.random.default_rng(0),
        frames=9,
        max_tokens=10_000,
        shares=ALWAYS_ASKED,
        tokenizer=tokenizer,
    )
    prompt = prompt_ids("vla", question="", images=[_picture(0)], tokenizer=tokenizer)
    parsed = _answer(example.ids, prompt, tokenizer)
    assert _shown(parsed) == [1, 2] and not parsed.ended


def test_a_table_is_painted_from_its_caption_or_its_instruction(tokenizer: TextTokenizer) -> None:
    rng = np.random.default_rng(5)
    story = _story("vla", references=1, steps=1)
    asked = {
        question: prompt_ids("t2i", question=question, tokenizer=tokenizer)
        for question in (PLOT, "view 0", "view 1")
    }
    drawn = dict.fromkeys(asked, 0)
    for _ in range(60):
        example = table_example(story, rng, shares=ALWAYS_ASKED, tokenizer=tokenizer)
        question = next(q for q, prompt in asked.items() if example.ids[: len(prompt)] == prompt)
        parsed = _answer(example.ids, asked[question], tokenizer)
        assert _shown(parsed) == [int(question == "view 1")]
        drawn[question] += 1
    assert min(drawn.values()) > 5


def test_buckets_draw_their_kinds_and_learn_the_answer_alone(tokenizer: TextTokenizer) -> None:
    sampler = ExampleSampler(tokenizer=tokenizer, mixture=Mixture(code_noise=0.0), size=(2, 2))
    stories = [
        _story("walk", references=0, steps=4),
        _story("pictures-table", references=0, steps=1, question=""),
        _story("x2i", references=1, steps=2, question=""),
        _story("story", references=0, steps=4),
        _story("howto", references=1, steps=3),
        _story("vla", references=1, steps=3),
    ]
    sampler.add(stories)
    rng = np.random.default_rng(6)
    for kind, mode in BUCKET_MODES.items():
        bucket = Bucket(kind=kind, frames=2, batch_size=24)
        batch = sampler.batch(bucket, rng)
        vocabulary = tokenizer.vocabulary
        named = 0
        for ids, weights in zip(batch.ids, batch.weights, strict=True):
            bss = int(np.flatnonzero(ids == vocabulary.bss)[0])  # the prompt's last id
            end = int((ids != vocabulary.pad).sum())
            named += f"for {mode} task" in tokenizer.decode(
                [int(i) for i in ids[:bss] if vocabulary.is_text(i)]
            )
            trained = weights > 0
            assert trained[bss : end - 1].all() and not trained[end - 1 :].any()
            assert trained[:bss].all() if kind in ("walk", "picture") else not trained[:bss].any()
        assert named >= 18  # the others are unguided rows
    lone = ExampleSampler(tokenizer=tokenizer, mixture=Mixture(), size=(2, 2))
    lone.add(stories[:1])
    with pytest.raises(ValueError, match="leave the bucket out"):
        lone.batch(Bucket(kind="vla", frames=4, batch_size=1), rng)


def test_what_an_edit_changes_counts_more_and_its_picture_no_more(tokenizer: TextTokenizer) -> None:
    codes = np.array([[[1, 2], [3, 4]], [[1, 2], [3, 9]], [[5, 6], [7, 8]]], np.uint16)
    edits = TokenStory(
        question="",
        texts=("", "paint it", "paint all"),
        captions=("",) * 3,
        codes=codes,
        kind="x2i",
        num_references=1,
    )
    mixture = Mixture(unconditional=0.0, code_noise=0.0, visual_weight=0.5, change_weight=4.0)
    sampler = ExampleSampler(tokenizer=tokenizer, mixture=mixture, size=(2, 2))
    start, shares = (
        tokenizer.vocabulary.visual_start,
        Shares(unconditional=0.0, midway=0.0, picture_first=0.0),
    )

    def of_codes(at: int) -> list[float]:
        example = edit_example(edits, at, np.random.default_rng(0), shares=shares, tokenizer=tokenizer)
        row = np.array(example.ids)
        weights = sampler.weights(example)
        assert not weights[: example.prompt_tokens].any()
        return [float(w) for w in weights[(row >= start) & (weights > 0)]]

    gain = 4 / (1 + 1 + 1 + 4)  # of four codes one is another
    assert of_codes(1) == pytest.approx([0.5 * gain] * 3 + [4 * 0.5 * gain])
    assert of_codes(2) == pytest.approx([0.5] * 4)  # all are others
    cut = change_gains(codes.reshape(-1)[:11], size=(2, 2), weight=4.0)
    assert cut[:4].tolist() == [1.0] * 4 and cut[8:].tolist() == [1.0] * 3
    with pytest.raises(ValueError, match="change_weight must be above 0"):
        Mixture(change_weight=0.0)
    with pytest.raises(ValueError, match="begin_weight must be above 0"):
        Mixture(begin_weight=-1.0)


def test_where_a_change_begins_counts_more() -> None:
    changed = np.array(
        [
            [0, 0, 1, 1],  # begins at its first code
            [0, 1, 1, 0],  # goes on below: the code above to the right is another one
            [0, 0, 0, 0],
            [1, 0, 0, 1],  # two things begin
        ]
    )
    codes = np.concatenate([np.zeros(16, int), changed.ravel()])
    gains = change_gains(codes, size=(4, 4), weight=3.0, begin_weight=5.0)
    counts = np.where(changed, 3.0, 1.0)
    counts[0, 2], counts[3, 0], counts[3, 3] = 15.0, 15.0, 15.0
    assert gains[:16].tolist() == [1.0] * 16
    assert gains[16:] == pytest.approx((counts / counts.mean()).ravel())


def test_long_rows_may_be_kept_for_long_stories(tokenizer: TextTokenizer) -> None:
    sampler = ExampleSampler(
        tokenizer=tokenizer,
        mixture=Mixture(midway=0.0, unconditional=0.0, code_noise=0.0, visual_weight=1.0),
        size=(32, 32),
    )
    sampler.add([_story("vla", references=1, steps=steps, side=32) for steps in (1, 1, 1, 5)])
    rng = np.random.default_rng(0)

    def lengths(at_least: int) -> set[int]:
        batch = sampler.batch(Bucket(kind="vla", frames=6, batch_size=16, at_least=at_least), rng)
        return set((batch.weights > 0).sum(1).tolist())

    assert len(lengths(1)) == 2 and len(lengths(5)) == 1
    with pytest.raises(ValueError, match="build shards"):
        lengths(8)


def test_wrong_buckets_are_named() -> None:
    with pytest.raises(ValueError, match="'film' is not known; expected one of walk"):
        Bucket(kind="film", batch_size=1)
    with pytest.raises(ValueError, match="frames=2 or more"):
        Bucket(kind="x2i", batch_size=1)


def test_the_recipe_gives_settings_that_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    """The words that the script hands to the command line, read as the command line reads them."""
    script = Path(__file__).parents[2] / "scripts" / "train_small.sh"
    monkeypatch.setenv("EMUWORLD", "echo")
    for stage in ("text", "pretrain"):
        said = subprocess.run(["bash", str(script), stage], capture_output=True, text=True, check=True)
        words = said.stdout.split()
        assert words[:2] == ["train", f"stage={stage}"]
        config, _ = compose("train", stage, words[2:])
    assert {BUCKET_MODES[bucket.kind] for bucket in config.buckets} == set(MODES)


def test_one_command_makes_everything_once(tmp_path: Path) -> None:
    """With a command line that only speaks: which phases, in which order, and what is laid out to be kept."""
    kept = {
        "tokenizer": ("vision.json", "vision.safetensors", "tokenizer.log.jsonl"),
        "pretrain": (
            "config.json",
            "emuworld.json",
            "model.safetensors",
            "text.tiktoken",
            "pretrain.log.jsonl",
        ),
        "dida": ("dida.safetensors", "emuworld.json", "dida.log.jsonl"),
        "detector": ("detector.safetensors",),
        "measured": ("x.tar.gz",),
        "train/tables-0": ("train-0-1.stories",),
    }
    for folder, names in kept.items():
        (tmp_path / folder).mkdir(parents=True)
        for name in names:
            (tmp_path / folder / name).write_bytes(bytes(16_000_000 if name == "model.safetensors" else 10))
    script = Path(__file__).parents[2] / "scripts" / "make_small.sh"
    settings = {"WORK": str(tmp_path), "EMUWORLD": "echo", "PYTHON": "echo", "BUDGET_S": "100"}
    for _ in range(2):
        subprocess.run(["bash", str(script)], env=os.environ | settings, check=True, timeout=120)
    ended = [line.split(":")[0] for line in (tmp_path / "phases").read_text().splitlines()]
    assert sorted(ended) == sorted(
        ["data", "text", "tokenizer", "pretrain", "detector", "dida", "suites", "passes", "pack"]
    )
    assert ended.index("tokenizer") < ended.index("pretrain") < ended.index("dida") < ended.index("suites")
    pieces = {path.name for path in (tmp_path / "ship").iterdir()}
    assert {"tokenizer.tar.00", "pretrain.tar.00", "pretrain.tar.01", "dida.tar.00", "x.tar.gz"} <= pieces
    assert "loop.max_seconds=45" in (tmp_path / "log" / "pretrain.log").read_text()
