"""The stages on little synthetic stories: they learn, resume, and write what can be opened again."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from emuworld.model import checkpoint
from emuworld.story import Story, StoryImage, StorySegment, write_shard
from emuworld.tokens.bpe import train_bpe
from emuworld.tokens.vision import VisionConfig, VisionTokenizer
from emuworld.training import supervised, tokenizer
from emuworld.training.data import TokenStory, in_share, load_tokens, mirrored
from emuworld.training.encoding import TokenFeed
from emuworld.training.examples import Bucket, ExampleSampler, Mixture
from emuworld.training.loop import LoopConfig
from emuworld.training.shard_files import find_shards
from emuworld.training.supervised import PretrainTraining
from emuworld.training.tokenizer import TokenizerTraining

SIZE = 32
COLOURS = {"red": (220, 30, 30), "green": (30, 200, 40), "blue": (40, 60, 220)}
# Every setting that decides whether so short a run learns is given here, so that the recipe of the built-in
# model may change. Of 14 seeds tried with 80 steps, 13 drew flat colours to within 10 grey levels.
LITTLE = VisionConfig(
    patch_px=4, width=16, width_multipliers=(1, 1, 1), z_channels=8, embed_dim=8, num_codes=32, norm_groups=4
)


def _story(rng: np.random.Generator, frames: int) -> Story:
    """A walk past flat colours: each command names the colour that comes next."""
    segments = []
    for i in range(frames):
        name = rng.choice(list(COLOURS))
        pixels = np.full((SIZE, SIZE, 3), COLOURS[name], np.uint8)
        image = StoryImage.from_array(pixels, caption=f"a {name} wall")
        segments.append(StorySegment(text=f"go to {name}" if i else "", images=(image,)))
    return Story(question="look at walls", segments=tuple(segments))


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    rng = np.random.default_rng(0)
    for i in range(2):
        write_shard(folder / f"walk-{i}.stories", [_story(rng, 6) for _ in range(8)])
    lines = [f"go to {c} a {c} wall look at walls" for c in COLOURS] * 4
    train_bpe(lines, num_tokens=270, path=folder / "text.tiktoken")
    return folder


def _tokenizer_config(shards: Path, out: Path, *, steps: int) -> TokenizerTraining:
    return TokenizerTraining(
        shards=str(shards),
        validation_shards=str(shards),
        out=str(out),
        size_px=SIZE,
        frames_in_memory=128,
        first_frames=32,
        batch_size=8,
        learning_rate=1e-3,
        kernel_learning_rate=1e-2,
        quantisation_weight=0.1,
        entropy_weight=0.05,
        batch_entropy_gain=2.0,
        entropy_temperature=0.3,
        codebook_length=4.0,
        restart_every_steps=0,
        device="cpu",
        workers=0,
        model=LITTLE,
        loop=LoopConfig(max_steps=steps, warmup_steps=5, log_every_steps=10),
    )


@pytest.fixture(scope="module")
def vision_folder(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("tokenizer")
    tokenizer.train(_tokenizer_config(shards, out, steps=100))
    return out


def _pretrain_config(shards: Path, vision: Path, out: Path, *, steps: int) -> PretrainTraining:
    return PretrainTraining(
        shards=str(shards),
        validation_shards=str(shards),
        vision=str(vision),
        text=str(shards / "text.tiktoken"),
        out=str(out),
        size_px=SIZE,
        first_frames=32,
        device="cpu",
        workers=0,
        model="tiny",
        buckets=(Bucket(kind="walk", frames=4, batch_size=8), Bucket(kind="picture", batch_size=8)),
        validation_batches=1,
        loop=LoopConfig(max_steps=steps, warmup_steps=5, log_every_steps=10),
    )


def test_tokenizer_learns_flat_colours(vision_folder: Path, shards: Path) -> None:
    model = VisionTokenizer.load(vision_folder)
    images = torch.stack([torch.tensor(c, dtype=torch.uint8).expand(SIZE, SIZE, 3) for c in COLOURS.values()])
    drawn = model.decode(model.encode(images))
    # Two colours drawn alike cost 38 levels or more, all three alike 76.
    assert (drawn.float() - images.float()).abs().mean() < 10
    lines = [json.loads(line) for line in (vision_folder / "tokenizer.log.jsonl").read_text().splitlines()]
    assert lines[-1]["psnr_db"] > lines[0]["psnr_db"] + 5


def test_pretraining_learns_which_wall_comes_next(shards: Path, vision_folder: Path, tmp_path: Path) -> None:
    figures = supervised.train(_pretrain_config(shards, vision_folder, tmp_path, steps=60))
    log = [json.loads(line) for line in (tmp_path / "pretrain.log.jsonl").read_text().splitlines()]
    assert figures["validation_visual_loss"] < 0.5 * log[0]["visual_loss"]
    assert figures["validation_text_loss"] < 0.5 * log[0]["text_loss"]
    assert checkpoint.load(tmp_path, device="cpu", dtype=torch.float32).config.hidden_size == 64


def _painted(name: str) -> StoryImage:
    return StoryImage.from_array(np.full((SIZE, SIZE, 3), COLOURS[name], np.uint8), caption=f"a {name} wall")


def _modes(rng: np.random.Generator, number: int) -> list[Story]:
    """An edit chain and a robot's story over flat colours: the words say which colour comes."""
    first, *others = rng.choice(list(COLOURS), size=3).tolist()
    steps = tuple(StorySegment(text=f"go to {name}", images=(_painted(name),)) for name in others)
    given = (_painted(first),)
    question = " ".join(f"go to {name}" for name in others)
    return [
        Story(reference_images=given, segments=steps, story_id=f"x2i-train-{number}"),
        Story(question=question, reference_images=given, segments=steps, story_id=f"vla-train-{number}"),
    ]


def test_pretraining_takes_each_kind_and_tells_its_loss(
    shards: Path, vision_folder: Path, tmp_path: Path
) -> None:
    """Losses of edits and of plans fall well below the first step's, and the folder names both modes."""
    rng = np.random.default_rng(1)
    stories = [story for number in range(24) for story in _modes(rng, number)]
    write_shard(tmp_path / "modes.stories", stories)
    config = dataclasses.replace(
        _pretrain_config(tmp_path, vision_folder, tmp_path / "out", steps=45),
        text=str(shards / "text.tiktoken"),
        buckets=(
            Bucket(kind="x2i", frames=2, batch_size=8),
            Bucket(kind="vla", frames=3, batch_size=8),
        ),
        mixture=Mixture(unconditional=0.0, code_noise=0.0),
    )
    figures = supervised.train(config)
    log = [json.loads(line) for line in (tmp_path / "out" / "pretrain.log.jsonl").read_text().splitlines()]
    for kind in ("x2i", "vla"):
        assert figures[f"validation_visual_loss_{kind}"] < 0.4 * log[0]["visual_loss"]
    assert figures["validation_text_loss"] < 0.3 * log[0]["text_loss"]
    assert json.loads((tmp_path / "out" / "emuworld.json").read_text())["modes"] == ["vla", "x2i"]


def test_robots_are_not_mirrored_and_old_files_are_read(
    shards: Path, vision_folder: Path, tmp_path: Path
) -> None:
    """Pictures that are red on the left; mirrored, the blue half is there. A robot's stay as they are."""
    half = np.zeros((SIZE, SIZE, 3), np.uint8)
    half[:, : SIZE // 2], half[:, SIZE // 2 :] = COLOURS["red"], COLOURS["blue"]
    image = StoryImage.from_array(half)
    stories = [
        Story(
            question="turn left",
            reference_images=(image,),
            segments=(StorySegment(text="go left", images=(image,)),),
            story_id=f"{kind}-train-0",
        )
        for kind in ("vla", "x2i", "pictures-table")
    ]
    write_shard(tmp_path / "one.stories", stories)
    vision = VisionTokenizer.load(vision_folder)
    feed = TokenFeed(
        str(tmp_path),
        vision=vision,
        cache=tmp_path / "cache",
        size=(SIZE, SIZE),
        workers=0,
        compile=False,
        device=torch.device("cpu"),
        follow=False,
        mirror=True,
        share=(0, 1),
    )
    shard = feed.wait()
    assert shard is not None
    read = shard.stories
    assert read is not None
    assert [(story.kind, story.question) for story in read] == [
        ("vla", "turn left"),
        ("x2i", "turn left"),
        ("pictures-table", "turn left"),
        ("x2i", "turn right"),
    ]
    expected = vision.encode(torch.from_numpy(half[:, ::-1].copy())[None])[0].numpy()
    np.testing.assert_array_equal(read[3].codes[0], expected)
    assert not (read[3].codes == read[1].codes).all()
    (cached,) = [shard.stories for shard in feed.cached()]
    assert [(s.kind, s.num_references, s.texts) for s in cached] == [
        (s.kind, s.num_references, s.texts) for s in read
    ]
    # What the first release kept says no kind: walks have words, sets of pictures none.
    old = [{"question": "", "texts": texts, "captions": ["a"]} for texts in (["go"], [""])]
    np.savez(tmp_path / "old.npz", codes=np.zeros((2, 2, 2), np.uint16), words=np.array(json.dumps(old)))
    assert [story.kind for story in load_tokens(tmp_path / "old.npz")] == ["walk", "pictures"]


def test_a_resumed_run_equals_an_unbroken_one(shards: Path, vision_folder: Path, tmp_path: Path) -> None:
    """Stop after 6 of 12 steps with the schedule of 12, resume: the same weights to the bit on one thread."""
    torch.set_num_threads(1)
    whole = _pretrain_config(shards, vision_folder, tmp_path / "whole", steps=12)
    whole = dataclasses.replace(
        whole, loop=dataclasses.replace(whole.loop, decay_fraction=0.0), first_frames=192
    )
    supervised.train(whole)
    parts = dataclasses.replace(whole, out=str(tmp_path / "parts"))
    supervised.train(dataclasses.replace(parts, loop=dataclasses.replace(parts.loop, max_steps=6)))
    supervised.train(parts)
    one = checkpoint.load(whole.out, device="cpu", dtype=torch.float32).state_dict()
    two = checkpoint.load(parts.out, device="cpu", dtype=torch.float32).state_dict()
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_a_damaged_state_says_what_to_do(shards: Path, vision_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "pretrain.state-3").mkdir()
    (tmp_path / "pretrain.state-3" / ".metadata").write_bytes(b"not a training state")
    with pytest.raises(ValueError, match=r"loop\.resume=false"):
        supervised.train(_pretrain_config(shards, vision_folder, tmp_path, steps=1))


def test_no_shards_says_how_to_make_them(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="emuworld data build"):
        tokenizer.train(_tokenizer_config(tmp_path / "nothing", tmp_path, steps=1))


def test_shards_behind_links_are_found_and_two_of_one_name_refused(tmp_path: Path) -> None:
    for name in ("here/one", "elsewhere/two"):
        path = tmp_path / f"{name}.stories"
        path.parent.mkdir()
        path.touch()
    (tmp_path / "here" / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "back").symlink_to(tmp_path / "here")  # a circle
    assert [path.stem for path in find_shards(tmp_path / "here")] == ["one", "two"]
    (tmp_path / "here" / "two.stories").touch()
    with pytest.raises(ValueError, match="two shards have one name"):
        find_shards(tmp_path / "here")


def test_a_tokenizer_goes_on_from_a_trained_one(shards: Path, vision_folder: Path, tmp_path: Path) -> None:
    """One step at a thousandth of the learning rate leaves the trained weights nearly as they were."""
    config = _tokenizer_config(shards, tmp_path, steps=1)
    slow = {"learning_rate": 1e-6, "kernel_learning_rate": 1e-6}
    tokenizer.train(dataclasses.replace(config, init_from=str(vision_folder), codebook_length=0.0, **slow))
    before, after = (VisionTokenizer.load(folder).state_dict() for folder in (vision_folder, tmp_path))
    assert all(torch.allclose(before[name], after[name], atol=1e-3) for name in before)


def test_a_decoder_is_trained_alone(shards: Path, vision_folder: Path, tmp_path: Path) -> None:
    """What makes codes stays to the bit, what draws them moves."""
    config = _tokenizer_config(shards, tmp_path, steps=3)
    tokenizer.train(dataclasses.replace(config, init_from=str(vision_folder), decoder_only=True))
    tokenizers = [VisionTokenizer.load(folder) for folder in (vision_folder, tmp_path)]
    assert len({one.code_fingerprint() for one in tokenizers}) == 1  # codes that are kept stay of use
    before, after = (one.state_dict() for one in tokenizers)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved and all(name.startswith(("decoder.", "post_quant_conv.")) for name in moved)
    with pytest.raises(ValueError, match="init_from=FOLDER"):
        dataclasses.replace(config, decoder_only=True)
    with pytest.raises(ValueError, match="second_look_weight"):
        dataclasses.replace(config, decoder_only=True, init_from="x", second_look_weight=1.0)
    with pytest.raises(ValueError, match="multiples of 16, got 100"):
        dataclasses.replace(config, size_px=100)


def test_mirrored_words_exchange_left_and_right() -> None:
    story = TokenStory(
        question="Explore a room with a red ball to the left of a blue box",
        texts=("", "turn right 45 degrees", "step to the left"),
        captions=("a bright cleft", "a ball to the right of a box", ""),
        codes=np.zeros((3, 1, 1), np.uint16),
    )
    other = mirrored(story)
    assert other.question == "Explore a room with a red ball to the right of a blue box"
    assert other.texts == ("", "turn left 45 degrees", "step to the right")
    assert other.captions == ("a bright cleft", "a ball to the left of a box", "")
    assert mirrored(other).texts == story.texts


def test_code_noise_changes_some_codes_that_are_read_and_no_target(shards: Path, vision_folder: Path) -> None:
    words = supervised.text_tokenizer(str(shards / "text.tiktoken"), num_visual_tokens=LITTLE.num_codes)
    rng = np.random.default_rng(3)
    codes = rng.integers(0, LITTLE.num_codes, (6, 2, 2)).astype(np.uint16)
    story = TokenStory(question="", texts=("go to red",) * 6, captions=("",) * 6, codes=codes)
    sampler = ExampleSampler(tokenizer=words, mixture=Mixture(code_noise=0.5), size=(2, 2))
    sampler.add([story])
    batch = sampler.batch(Bucket(kind="walk", frames=4, batch_size=64), rng)
    changed = batch.inputs != batch.ids[:, :-1]
    codes_read = batch.ids[:, :-1] >= words.vocabulary.visual_start
    assert not changed[~codes_read].any()
    assert (batch.inputs[changed] >= words.vocabulary.visual_start).all()
    by_row = changed.sum(1) / codes_read.sum(1)
    assert 0.3 < (by_row == 0).mean() < 0.75  # every second row is left as it is
    assert by_row.max() > 0.2


def test_a_run_that_dies_leaves_a_folder_that_opens(
    shards: Path, vision_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = _pretrain_config(shards, vision_folder, tmp_path, steps=12)
    config = dataclasses.replace(config, loop=dataclasses.replace(config.loop, save_every_s=0.0))
    step = supervised.SupervisedTrainer.step

    def die_at_three(trainer: supervised.SupervisedTrainer, number: int, factor: float) -> object:
        if number == 3:
            raise RuntimeError("the machine is gone")
        return step(trainer, number, factor)

    monkeypatch.setattr(supervised.SupervisedTrainer, "step", die_at_three)
    with pytest.raises(RuntimeError, match="gone"):
        supervised.train(config)
    words = supervised.text_tokenizer(config.text, num_visual_tokens=LITTLE.num_codes)
    written = checkpoint.load(tmp_path, device="cpu", dtype=torch.float32)
    assert written.config.vocab_size == words.vocabulary.size
    assert (tmp_path / "emuworld.json").exists()
    assert VisionTokenizer.load(tmp_path).num_codes == LITTLE.num_codes


def test_a_second_look_draws_the_drawing_again(shards: Path, vision_folder: Path, tmp_path: Path) -> None:
    """Without a move it is the tokenizer's own round trip of its drawing, measured against the picture."""
    config = dataclasses.replace(
        _tokenizer_config(shards, tmp_path, steps=2), init_from=str(vision_folder), second_look_weight=1.0
    )
    tokenizer.train(config)
    lines = [json.loads(line) for line in (tmp_path / "tokenizer.log.jsonl").read_text().splitlines()]
    assert lines[0]["second_look_db"] > 5.0
    trainer = tokenizer.TokenizerTrainer(config, pool=None, device=torch.device("cpu"))  # type: ignore[arg-type]
    model = VisionTokenizer.load(vision_folder)
    images = torch.randint(0, 256, (4, SIZE, SIZE, 3), generator=torch.Generator().manual_seed(0)).byte()
    pixels = tokenizer.to_pixels(images)
    drawn = model.pixels(model.vectors(model.encode(images)))
    stay = torch.eye(2, 3).expand(2, 2, 3)
    _, squared_B = trainer._second_look(drawn, pixels, stay)
    kept = drawn[:2].clamp(-1, 1)
    again = model.pixels(model.vectors(model.quantize.codes(model.latents(kept))))
    expected_B = (again - pixels[:2]).square().mean(dim=(1, 2, 3))
    torch.testing.assert_close(squared_B, expected_B, rtol=1e-3, atol=1e-5)


def test_moves_stay_within_their_bounds() -> None:
    moves = tokenizer.random_moves(500, np.random.default_rng(0))
    assert moves.shape == (500, 2, 3)
    assert 0.8 < moves[:, 0, 0].min() < 0.85 and 1.2 < moves[:, 0, 0].max() < 1.25
    assert 0.9 < np.abs(moves[:, 0, 2]).max() <= 1.0 and 0.45 < np.abs(moves[:, 1, 2]).max() <= 0.5
    assert not moves[:, 0, 1].any() and not moves[:, 1, 0].any()


def test_a_truncated_shard_is_told_once_and_left_out(
    shards: Path, vision_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "data"
    data.mkdir()
    for path in shards.glob("*.stories"):
        (data / path.name).write_bytes(path.read_bytes())
    whole = (shards / "walk-0.stories").read_bytes()
    (data / "walk-00-cut.stories").write_bytes(whole[: len(whole) // 2])
    config = _pretrain_config(shards, vision_folder, tmp_path / "out", steps=2)
    supervised.train(dataclasses.replace(config, shards=str(data), first_frames=10_000))
    said = capsys.readouterr().err
    assert said.count("a shard is left out") == 1 and "walk-00-cut.stories" in said
    lines = (tmp_path / "out" / "pretrain.log.jsonl").read_text().splitlines()
    assert json.loads(lines[-1])["frames"] == 2 * 2 * 8 * 6  # of the whole shards, and mirrored


def test_shards_are_shared_out_from_the_first() -> None:
    """By name alone, each to one reader; and no reader of two waits long for its first."""
    names = [f"train-{first:08d}-{first + 8:08d}" for first in range(0, 8 * 400, 8)]
    for world in (1, 2, 3, 8):
        readers = [[r for r in range(world) if in_share(name, rank=r, world=world)] for name in names]
        assert all(len(mine) == 1 for mine in readers)
        shares = [sum(mine == [r] for mine in readers) for r in range(world)]
        assert min(shares) > 0.7 * len(names) / world
    assert len({tuple(mine) for mine in readers[:40]}) == 8
    assert {in_share(name, rank=0, world=2) for name in names[:8]} == {True, False}
