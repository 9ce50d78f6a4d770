"""A stage mixes picture sizes: each bucket's examples at its own, from pictures that were never enlarged."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from test_packing import lively_objective

from emuworld.cli import compose
from emuworld.model import checkpoint
from emuworld.model.documents import documents
from emuworld.story import Story, StoryImage, StorySegment, write_shard
from emuworld.tokens.bpe import train_bpe
from emuworld.tokens.sequence import AnswerSegment, answer, image_length, prompt_ids, template_texts
from emuworld.tokens.text import TextTokenizer
from emuworld.tokens.vision import VisionConfig, VisionTokenizer
from emuworld.tokens.vocabulary import builtin
from emuworld.training import supervised
from emuworld.training.data import FramePool, ShardFeed, TokenStory
from emuworld.training.distil import DidaTraining
from emuworld.training.examples import Batch, Bucket, ExampleSampler, Mixture, step_batches
from emuworld.training.loop import LoopConfig
from emuworld.training.packing import Packing, packed_batches, row_of
from emuworld.training.sizes import trained_sizes
from emuworld.training.supervised import PretrainTraining

LITTLE = VisionConfig(
    patch_px=4, width=16, width_multipliers=(1, 1, 1), z_channels=8, embed_dim=8, num_codes=32, norm_groups=4
)
PLAIN = Mixture(unconditional=0.0, code_noise=0.0)
SIZES = {(2, 2): "walk", (3, 3): "x2i", (2, 4): "story"}  # tokens
BUCKETS = (
    Bucket(kind="walk", frames=3, batch_size=2),
    Bucket(kind="x2i", frames=2, batch_size=3, size_px=48),
    Bucket(kind="story", frames=3, batch_size=2, size_px=32, width_px=64),
)


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> TextTokenizer:
    path = tmp_path_factory.mktemp("words") / "text.tiktoken"
    train_bpe(["turn left", "a red wall", *template_texts()] * 4, num_tokens=300, path=path)
    return TextTokenizer.builtin(path, vocabulary=builtin(num_text_tokens=300, num_visual_tokens=40))


def _stories(seed: int) -> list[TokenStory]:
    """A walk, an edit and a tale, every one at every size."""
    rng = np.random.default_rng(seed)
    return [
        TokenStory(
            question="look around",
            texts=("", *("turn left",) * 3),
            captions=tuple(f"a red wall {i}" for i in range(4)),
            codes=rng.integers(0, 40, (4, *size)).astype(np.uint16),
            kind=kind,
            num_references=int(kind == "x2i"),
        )
        for size in SIZES
        for kind in SIZES.values()
    ]


@pytest.fixture(scope="module")
def sampler(words: TextTokenizer) -> ExampleSampler:
    sampler = ExampleSampler(tokenizer=words, mixture=PLAIN, size=(2, 2))
    for number in range(3):
        sampler.add(_stories(number), shard=str(number))
    return sampler


def _sizes_said(ids: np.ndarray, words: TextTokenizer) -> list[tuple[tuple[int, int], int]]:
    """For each image block the h*w between BOI and IMG, and how many codes come before EOI."""
    vocabulary, found = words.vocabulary, []
    for boi in np.flatnonzero(ids == vocabulary.boi):
        img = boi + int(np.flatnonzero(ids[boi:] == vocabulary.img)[0])
        eoi = boi + int(np.flatnonzero(ids[boi:] == vocabulary.eoi)[0])
        height, width = words.decode([int(i) for i in ids[boi + 1 : img]]).split("*")
        found.append(((int(height), int(width)), int((ids[img:eoi] >= vocabulary.visual_start).sum())))
    return found


def test_rows_say_their_size_and_have_its_length(sampler: ExampleSampler, words: TextTokenizer) -> None:
    rng = np.random.default_rng(0)
    for bucket, size in zip(BUCKETS, SIZES, strict=True):
        batch = sampler.batch(bucket, rng)
        longest = bucket.frames * image_length(size)
        assert batch.ids.shape[1] - 1 == bucket.row_length((2, 2)) > longest
        for row in batch.ids:
            said = _sizes_said(row, words)
            assert said and set(said) == {(size, size[0] * size[1])}


def test_an_example_is_its_prompt_and_its_picture_at_the_buckets_size(words: TextTokenizer) -> None:
    """One story at two sizes: the ids that the prompt builder and the answer's own give, to the last."""
    rng = np.random.default_rng(0)
    sampler = ExampleSampler(tokenizer=words, mixture=PLAIN, size=(2, 2))
    story = TokenStory(
        question="", texts=("",), captions=("a red wall",), codes=np.zeros((1, 2, 2), np.uint16)
    )
    wide = dataclasses.replace(story, codes=rng.integers(0, 40, (1, 2, 4)).astype(np.uint16))
    sampler.add([story, wide])
    for bucket, codes in (
        (Bucket(kind="picture", batch_size=1), story.codes),
        (Bucket(kind="picture", batch_size=1, size_px=32, width_px=64), wide.codes),
    ):
        example = sampler.example(bucket, rng)
        picture = AnswerSegment(codes=codes[0].astype(np.int64))
        prompt = prompt_ids("t2i", question="a red wall", tokenizer=words)
        assert example.ids == prompt + answer([picture], tokenizer=words)[0]


def test_packed_sizes_do_not_see_each_other(sampler: ExampleSampler) -> None:
    """Losses of documents of three sizes in one row are those of each alone, to 1e-5 nats."""
    rng = np.random.default_rng(3)
    objective = lively_objective(sampler)

    def losses(row: Batch, *, masked: bool = True) -> torch.Tensor:
        assert row.documents is not None
        ids, inputs, weights = (torch.from_numpy(a) for a in (row.ids, row.inputs, row.weights))
        numbers = documents(torch.from_numpy(row.documents)) if masked else None
        return (objective.losses(inputs, ids[:, 1:], numbers) * weights)[0].detach()

    examples = [sampler.example(bucket, rng) for bucket in BUCKETS]
    length = sum(len(example.ids) for example in examples) + 20
    row = row_of(sampler, examples, tokens=length, rng=rng)
    together, blind, start = losses(row), losses(row, masked=False), 0
    for number, example in enumerate(examples):
        alone = losses(row_of(sampler, [example], tokens=len(example.ids) - 1, rng=rng))
        stop = start + len(alone)
        torch.testing.assert_close(together[start:stop], alone, rtol=0, atol=1e-5)
        assert number == 0 or not torch.allclose(blind[start:stop], alone, atol=1e-3)
        start = stop + 1


def test_rows_of_one_process_are_those_of_three(sampler: ExampleSampler, words: TextTokenizer) -> None:
    """Every size is in them, each document of one; shards that come in another order change nothing."""
    packing = Packing(tokens=900, rows=6, rows_at_once=2)
    late = ExampleSampler(tokenizer=words, mixture=PLAIN, size=(2, 2))
    for number in (2, 0, 1):
        parts = [[story for story in _stories(number) if story.codes.shape[1:] == size] for size in SIZES]
        for stories in parts if number else parts[::-1]:
            late.add(stories, shard=str(number))

    def rows(source: ExampleSampler, rank: int, world: int) -> list[Batch]:
        return packed_batches(source, BUCKETS, packing=packing, seed=5, step=9, rank=rank, world=world)

    whole = rows(sampler, 0, 1)
    for source, world in ((sampler, 3), (late, 1)):
        shared = [batch for rank in range(world) for batch in rows(source, rank, world)]
        for one, other in zip(whole, shared, strict=True):
            np.testing.assert_array_equal(one.ids, other.ids)
    met = set()
    for batch in whole:
        assert batch.documents is not None
        for ids, numbers in zip(batch.ids, batch.documents, strict=True):
            for number in np.unique(numbers)[:-1]:
                said = {size for size, _ in _sizes_said(ids[:-1][numbers == number], words)}
                assert len(said) == 1
                met |= said
    assert met == set(SIZES)


def test_one_size_is_drawn_as_before(words: TextTokenizer) -> None:
    """Digests of the ids and inputs that the code before sizes drew, with buckets that take turns."""
    sampler = ExampleSampler(tokenizer=words, mixture=Mixture(), size=(2, 2))
    for number in range(3):
        stories = [story for story in _stories(number) if story.codes.shape[1:] == (2, 2)]
        sampler.add(stories, shard=str(number))
    buckets = (
        Bucket(kind="walk", frames=3, batch_size=4),
        Bucket(kind="picture", batch_size=4),
        Bucket(kind="x2i", frames=2, batch_size=3),
        Bucket(kind="story", frames=3, batch_size=3, every=2, at_least=2),
    )
    packing = Packing(tokens=600, rows=4)
    for batches, expected in (
        (
            [b for step in range(4) for b in step_batches(sampler, buckets, seed=3, step=step)],
            "c33a79d421e8f770",
        ),
        (
            packed_batches(sampler, buckets, packing=packing, seed=3, step=7, rank=0, world=1),
            "ce70cd885d76d1f7",
        ),
    ):
        digest = hashlib.sha256()
        for batch in batches:
            digest.update(batch.ids.tobytes() + batch.inputs.tobytes() + batch.weights.tobytes())
        assert digest.hexdigest()[:16] == expected


def _bands(height: int, width: int, *, seed: int = 0) -> np.ndarray:
    """Red, green and blue from left to right, a quarter, a half and a quarter, with a little noise."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[:, : width // 4, 0] = pixels[:, width // 4 : -(width // 4), 1] = pixels[:, -(width // 4) :, 2] = (
        200
    )
    return pixels + np.random.default_rng(seed).integers(0, 9, pixels.shape).astype(np.uint8)


def _feed(folder: Path, size: tuple[int, int], *kinds: str) -> ShardFeed:
    return ShardFeed(folder, size=size, kinds=kinds or ("walk", "pictures"))


def test_pictures_are_cut_to_their_middle_and_made_smaller(tmp_path: Path) -> None:
    wide = _bands(64, 128)
    image = StoryImage.from_array(wide)
    segments = (StorySegment(images=(image,)),)
    write_shard(
        tmp_path / "a.stories", [Story(story_id=f"{k}-0", segments=segments) for k in ("walk", "x2i")]
    )
    same = _feed(tmp_path, (64, 128)).wait()
    small = _feed(tmp_path, (32, 32), "x2i").wait()
    assert same is not None and small is not None
    np.testing.assert_array_equal(same.frames[0].numpy(), wide)
    assert [story.kind for story in small.stories] == ["x2i"] and small.frames.shape == (1, 32, 32, 3)
    assert (small.frames[0, :, 3:-3].float().mean((0, 1)) - torch.tensor([4.0, 204.0, 4.0])).abs().max() < 2


def test_nothing_is_enlarged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A story with one picture that is too small is left out whole, told once; nothing left is an error."""
    large, small = (StoryImage.from_array(_bands(side, side)) for side in (64, 48))
    for name in ("a", "b"):
        stories = [
            Story(story_id="walk-0", segments=(StorySegment(images=(large,)), StorySegment(images=(second,))))
            for second in (large, small)
        ]
        write_shard(tmp_path / f"{name}.stories", stories)
    feed = _feed(tmp_path, (64, 64))
    shards = [feed.wait(), feed.wait()]
    assert [(len(s.stories), len(s.frames), s.too_small) for s in shards if s is not None] == [(1, 2, 1)] * 2
    said = capsys.readouterr().err
    assert said.count("smaller than 64x64 px") == 1 and "1 of a" in said and "size=64" in said
    pool = FramePool(_feed(tmp_path, (80, 80)), capacity=8, device=torch.device("cpu"))
    with pytest.raises(ValueError, match=r"80x80 px or more; build them with size=80"):
        pool.fill(1)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of walks at 32 px and of edits at 64, and tokenizers that have learnt nothing."""
    folder = tmp_path_factory.mktemp("prepared")
    rng = np.random.default_rng(0)

    def images(side: int, number: int) -> list[StoryImage]:
        return [
            StoryImage.from_array(_bands(side, side, seed=int(rng.integers(1 << 30))), caption="a wall")
            for _ in range(number)
        ]

    for shard in range(2):
        stories = []
        for number in range(4):
            walk = tuple(StorySegment(text="turn left", images=(image,)) for image in images(32, 4))
            stories.append(Story(question="look around", segments=walk, story_id=f"walk-train-{number}"))
            given, *answers = images(64, 3)
            edits = tuple(StorySegment(text="turn red", images=(image,)) for image in answers)
            stories.append(Story(reference_images=(given,), segments=edits, story_id=f"x2i-train-{number}"))
        write_shard(folder / f"mixed-{shard}.stories", stories)
    lines = ["turn left red look around a wall", *template_texts()] * 4
    train_bpe(lines, num_tokens=280, path=folder / "text.tiktoken")
    torch.manual_seed(0)
    VisionTokenizer(LITTLE).save(folder)
    return folder


def _config(prepared: Path, out: Path, *, tokens: int) -> PretrainTraining:
    return PretrainTraining(
        shards=str(prepared),
        validation_shards=str(prepared),
        vision=str(prepared),
        text=str(prepared / "text.tiktoken"),
        out=str(out),
        size_px=32,
        first_frames=10_000,
        device="cpu",
        model="tiny",
        buckets=(
            Bucket(kind="walk", frames=3, batch_size=2),
            Bucket(kind="x2i", frames=2, batch_size=2, size_px=64),
            Bucket(kind="x2i", frames=2, batch_size=2, size_px=48),
        ),
        packing=Packing(tokens=tokens, rows=2),
        validation_batches=1,
        loop=LoopConfig(max_steps=6, warmup_steps=2, log_every_steps=1, decay_fraction=0.0),
    )


@pytest.mark.parametrize("tokens", [0, 512])
def test_a_run_of_three_sizes_resumes_to_the_bit(prepared: Path, tmp_path: Path, tokens: int) -> None:
    torch.set_num_threads(1)
    whole = _config(prepared, tmp_path / "whole", tokens=tokens)
    figures = supervised.train(whole)
    for name in ("walk_32x32", "x2i_48x48", "x2i_64x64"):
        assert 0.0 < figures[f"validation_visual_loss_{name}"] < 10.0
    parts = dataclasses.replace(whole, out=str(tmp_path / "parts"))
    supervised.train(dataclasses.replace(parts, loop=dataclasses.replace(parts.loop, max_steps=3)))
    caches = sorted((tmp_path / "parts").glob("tokens-train-*"))
    assert [path.name.split("-", 3)[3] for path in caches] == ["32x32-walk", "48x48-x2i", "64x64-x2i"]
    written = {path: path.stat().st_mtime_ns for cache in caches for path in cache.iterdir()}
    assert len(written) == 6
    assert supervised.train(parts) == figures
    assert {path: path.stat().st_mtime_ns for path in written} == written  # encoded once
    one, two = (
        checkpoint.load(c.out, device="cpu", dtype=torch.float32).state_dict() for c in (whole, parts)
    )
    assert all(torch.equal(one[name], two[name]) for name in one)
    lines = (tmp_path / "whole" / "pretrain.log.jsonl").read_text().splitlines()
    assert json.loads(lines[-1])["frames"] == 2 * 4 * 2 * (4 + 3 + 3)  # and mirrored
    manifest = json.loads((tmp_path / "whole" / "emuworld.json").read_text())
    assert (manifest["default_size"], manifest["smallest_side"], manifest["largest_side"]) == (
        [32, 32],
        32,
        512,
    )


def test_the_folder_says_what_was_trained(prepared: Path, tmp_path: Path) -> None:
    """No bucket at the stage's own size: the checkpoint draws the smallest that was."""
    config = dataclasses.replace(
        _config(prepared, tmp_path, tokens=0),
        size_px=256,
        buckets=(
            Bucket(kind="walk", frames=3, batch_size=2, size_px=720, width_px=1280),
            Bucket(kind="x2i", frames=2, batch_size=2, size_px=1024),
        ),
    )
    words = supervised.text_tokenizer(config.text, num_visual_tokens=32)
    supervised.complete_folder(config, vocabulary=words.vocabulary)
    manifest = json.loads((tmp_path / "emuworld.json").read_text())
    assert (manifest["default_size"], manifest["smallest_side"], manifest["largest_side"]) == (
        [720, 1280],
        128,
        1280,
    )


def test_bad_sizes_are_named(prepared: Path, tmp_path: Path, words: TextTokenizer) -> None:
    with pytest.raises(ValueError, match="multiples of 16, got 100 and 0 for walk; the nearest below are 96"):
        Bucket(kind="walk", batch_size=1, size_px=100)
    with pytest.raises(ValueError, match="multiples of 16, got -16"):
        Bucket(kind="walk", batch_size=1, size_px=-16)
    with pytest.raises(ValueError, match="width_px=64 needs its height"):
        Bucket(kind="walk", batch_size=1, width_px=64)
    config = _config(prepared, tmp_path, tokens=512)
    with pytest.raises(ValueError, match="size_px must be a multiple of 16"):
        dataclasses.replace(config, size_px=40)
    with pytest.raises(
        ValueError, match=r"2 pictures of 256x256 px .* 704 tokens, more than a packed row of 512"
    ):
        dataclasses.replace(config, buckets=(Bucket(kind="x2i", frames=2, batch_size=1, size_px=256),))
    with pytest.raises(ValueError, match="dida has one picture size"):
        DidaTraining(buckets=BUCKETS)


def test_a_size_without_stories_is_told_before_training(
    prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = _config(prepared, tmp_path, tokens=512)
    for bucket, found in (
        (Bucket(kind="walk", frames=2, batch_size=1, size_px=48), "16 of its kind, 0 of these at 48x48 px"),
        (Bucket(kind="vla", frames=2, batch_size=1, size_px=48), "0 of its kind"),
        (Bucket(kind="walk", frames=9, batch_size=1), "16 of its kind, 16 of these at 32x32 px"),
    ):
        with pytest.raises(ValueError, match=f"{found}.*leave the bucket out"):
            supervised.train(dataclasses.replace(config, buckets=(*config.buckets[:2], bucket)))
    assert "smaller than 48x48 px" in capsys.readouterr().err


@pytest.mark.parametrize("stage", ["pretrain1", "pretrain2", "sft1", "sft2"])
def test_the_papers_stages_have_its_sizes(stage: str) -> None:
    expected = {
        "pretrain1": {512},
        "pretrain2": {512, 768, 1024},
        "sft1": {512, 720, 768},
        "sft2": {720, 1024},
    }
    config, _ = compose("train", f"emu3_5/{stage}", [])
    sizes = trained_sizes(config.buckets, size_px=config.size_px)
    assert set(sizes) == {(side, side) for side in expected[stage]}
    if stage.startswith("sft"):
        edits, exploration = {"sft1": (768, 720), "sft2": (1024, 720)}[stage]
        assert "x2i" in sizes[edits, edits] and "walk" in sizes[exploration, exploration]
    small, _ = compose("train", stage, [])
    assert len(trained_sizes(small.buckets, size_px=small.size_px)) == 1
