"""The stage `dida` on little worlds: what was drawn token by token is then drawn in a few passes."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from emuworld.checkpoint_folder import BUILTIN, find, open_parts
from emuworld.decoding.noise import Noise, make_path
from emuworld.decoding.sampling import Sampling, Truncation
from emuworld.manifest import Manifest
from emuworld.model import checkpoint
from emuworld.story import Story, StoryImage, StorySegment, write_shard
from emuworld.tokens.vision import VisionTokenizer
from emuworld.training.data import TokenStory
from emuworld.training.distil import DidaTraining, train, write_folder
from emuworld.training.distil_trainer import DidaTrainer
from emuworld.training.examples import Batch, Bucket, ExampleSampler, Mixture
from emuworld.training.loop import LoopConfig
from emuworld.training.own_stories import Answerer, OwnStories
from emuworld.training.packing import Packing, packed_batches
from emuworld.world_model import WorldModel, load

SIDE = 3
COMMANDS = ("turn left", "turn right", "look up")
PLAIN = Mixture(image_prompt=0.0, unconditional=0.0, code_noise=0.0)
BUCKET = Bucket(kind="walk", frames=2, batch_size=3)
GREEDY = Sampling(image=Truncation(temperature=0.0))


def few_walks(num_codes: int) -> list[TokenStory]:
    """Three rooms of random codes, each with a walk of two views: nothing to learn but by heart."""
    rng = np.random.default_rng(0)
    return [
        TokenStory(
            question=f"room {room}",
            texts=("", str(rng.choice(COMMANDS))),
            captions=("",) * 2,
            codes=rng.integers(0, num_codes, (2, SIDE, SIDE)).astype(np.uint16),
        )
        for room in range(3)
    ]


@pytest.fixture(scope="module")
def by_heart(tiny_folder: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[TokenStory]]:
    """A checkpoint that has learnt three walks by heart, token by token."""
    source = find(tiny_folder)
    parts = open_parts(source, device=torch.device("cpu"))
    stories = few_walks(parts.vision.num_codes)
    model = checkpoint.load(source, dtype=torch.float32).train()
    model.init_weights(torch.Generator().manual_seed(0))
    sampler = sampler_of(stories, parts.tokenizer)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(150):
        batch = sampler.batch(BUCKET, np.random.default_rng(step))
        ids = torch.from_numpy(batch.ids)
        logits = model.logits(model(ids[:, :-1]))
        losses = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
        loss = (losses * torch.from_numpy(batch.weights).flatten()).sum() / batch.weights.sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    folder = tmp_path_factory.mktemp("heart")
    for name in ("vision.json", "vision.safetensors", "text.tiktoken", "emuworld.json"):
        (folder / name).write_bytes((source / name).read_bytes())
    checkpoint.save(folder, model, dtype=torch.bfloat16)
    return folder, stories


def sampler_of(stories: list[TokenStory], tokenizer: object) -> ExampleSampler:
    sampler = ExampleSampler(tokenizer=tokenizer, mixture=PLAIN, size=(SIDE, SIDE))  # type: ignore[arg-type]
    sampler.add(stories)
    return sampler


def walked(model: WorldModel, story: TokenStory, sampling: Sampling) -> list[np.ndarray]:
    state = model.begin(mode="explore", prompt=story.question, size=(16 * SIDE, 16 * SIDE), seed=5)
    for text in story.texts:
        state, _ = model.imagine(state, text, sampling=sampling)
    return model.picture_codes(state)


@pytest.mark.parametrize(
    ("adaptation", "path"), [("adapter", "mixture"), ("full", "metric"), ("adapter", "masked")]
)
def test_few_passes_draw_the_pictures_of_token_by_token(
    by_heart: tuple[Path, list[TokenStory]], tmp_path: Path, adaptation: str, path: str
) -> None:
    folder, stories = by_heart
    config = DidaTraining(
        init_from=str(folder),
        out=str(tmp_path),
        adaptation=adaptation,
        rank=16,
        noise=Noise(path=path),
        learning_rate=1e-2 if adaptation == "adapter" else 3e-3,
        buckets=(BUCKET,),
        mixture=PLAIN,
        size_px=16 * SIDE,
    )
    parts = open_parts(folder, device=torch.device("cpu"))
    trainer = DidaTrainer(
        config,
        model=checkpoint.load(folder, dtype=torch.float32).train(),
        vocabulary=parts.manifest.vocabulary,
        path=make_path(config.noise, codebook_KE=parts.vision.quantize.embedding.weight.detach()),
    )
    sampler = sampler_of(stories, parts.tokenizer)
    drawn: list[Batch] = [sampler.batch(BUCKET, np.random.default_rng(i)) for i in range(20)]
    before = trainer.validation_losses(drawn[:1])["validation_loss"]
    for step in range(260):
        trainer.batches = lambda step=step: [drawn[step % len(drawn)]]  # type: ignore[misc]
        trainer.step(step, min(1.0, (260 - step) / 100, (step + 1) / 10))
    assert trainer.validation_losses(drawn[:1])["validation_loss"] < 0.2 * before
    write_folder(config, trainer, source=folder, manifest=parts.manifest)
    token_by_token, adapted = load(folder, device="cpu"), load(tmp_path, device="cpu")
    right = dict.fromkeys((1, 4, 8), 0)
    for story in stories:
        taught = walked(token_by_token, story, GREEDY)
        np.testing.assert_array_equal(np.stack(taught), story.codes)
        np.testing.assert_array_equal(np.stack(walked(adapted, story, GREEDY)), story.codes)
        for passes in right:
            at_once = walked(adapted, story, dataclasses.replace(GREEDY, passes=passes))
            right[passes] += int((np.stack(at_once) == story.codes).sum())
    total = sum(story.codes.size for story in stories)
    assert right[8] == right[4] == total
    assert right[1] > 0.8 * total


def test_an_adapter_touches_noisy_tokens_only(by_heart: tuple[Path, list[TokenStory]]) -> None:
    """To the bit: hidden states of clean tokens are those of the same rows without the adapter."""
    folder, stories = by_heart
    parts = open_parts(folder, device=torch.device("cpu"))
    config = DidaTraining(rank=4, buckets=(BUCKET,), size_px=16 * SIDE)
    model = checkpoint.load(folder, dtype=torch.float32)
    trainer = DidaTrainer(
        config,
        model=model,
        vocabulary=parts.manifest.vocabulary,
        path=make_path(config.noise, codebook_KE=parts.vision.quantize.embedding.weight.detach()),
    )
    assert trainer.adapter is not None
    with torch.no_grad():
        for up_Or in trainer.adapter.up_Or.values():
            up_Or.normal_(generator=torch.Generator().manual_seed(0))
    batch = sampler_of(stories, parts.tokenizer).batch(BUCKET, np.random.default_rng(0))
    rows = trainer.rows(batch)
    blocks = torch.from_numpy(rows.blocks)
    with torch.inference_mode():
        attention = trainer.attention(blocks, torch.from_numpy(rows.starts), torch.from_numpy(rows.reach))
        ids, positions = torch.from_numpy(rows.ids), torch.from_numpy(rows.positions)
        plain = model(ids, attention=attention, positions_BT=positions)
        with trainer.adapter.active(blocks > 0):
            adapted = model(ids, attention=attention, positions_BT=positions)
    assert torch.equal(adapted[blocks == 0], plain[blocks == 0])
    assert not torch.isclose(adapted[blocks > 0], plain[blocks > 0]).all(dim=-1).any()


def test_own_stories_are_what_the_model_draws_and_are_kept(
    by_heart: tuple[Path, list[TokenStory]], tmp_path: Path
) -> None:
    folder, stories = by_heart
    parts = open_parts(folder, device=torch.device("cpu"))
    answerer = Answerer(parts, config=OwnStories(batch=2, frames=2), seed=0)
    given = [dataclasses.replace(story, codes=story.codes.copy()) for story in stories]
    for story in given:
        story.codes[1:] = 0  # to be drawn anew
    answered = answerer.kept(given, tmp_path)
    for own, story in zip(answered, stories, strict=True):
        assert own.texts == story.texts and own.question == story.question
        assert not any(own.captions), "what the model's pictures show is not what the story's show"
        np.testing.assert_array_equal(own.codes[0], story.codes[0])
        assert own.codes.shape == story.codes.shape
        assert own.codes[1:].any()
    files = sorted(tmp_path.glob("own-*.npz"))
    times = [file.stat().st_mtime_ns for file in files]
    again = answerer.kept(given, tmp_path)
    assert [file.stat().st_mtime_ns for file in files] == times, "nothing is drawn twice"
    assert all(np.array_equal(a.codes, b.codes) for a, b in zip(again, answered, strict=True))
    painted = TokenStory(
        question="", texts=("",), captions=("a red ball",), codes=stories[0].codes[:1], kind="pictures"
    )
    edited = TokenStory(
        question="",
        texts=("", "look up"),
        captions=("", ""),
        codes=stories[0].codes[:2],
        kind="x2i",
        num_references=1,
    )
    own_painted, own_edited = answerer.answer([painted, edited])
    assert not np.array_equal(own_painted.codes, painted.codes)
    np.testing.assert_array_equal(own_edited.codes[0], edited.codes[0])


def write_shards(folder: Path) -> None:
    rng = np.random.default_rng(0)
    stories = []
    for _ in range(6):
        images = [
            StoryImage.from_array(rng.integers(0, 256, (64, 64, 3), np.uint8), caption="a room")
            for _ in range(3)
        ]
        segments = tuple(
            StorySegment(text=COMMANDS[i] if i else "", images=(im,)) for i, im in enumerate(images)
        )
        stories.append(Story(question="a room", segments=segments))
    write_shard(folder / "walk-0.stories", stories)
    painted = [StorySegment(images=segment.images) for segment in stories[0].segments]
    write_shard(folder / "pictures-0.stories", [Story(segments=tuple(painted), story_id="pictures-0")])


@pytest.mark.parametrize("adaptation", ["adapter", "full"])
def test_the_stage_resumes_and_writes_what_can_be_opened(
    tiny_folder: str, tmp_path: Path, adaptation: str
) -> None:
    write_shards(tmp_path)

    def settings(out: str, steps: int) -> DidaTraining:
        return DidaTraining(
            init_from=tiny_folder,
            shards=str(tmp_path),
            out=str(tmp_path / out),
            own=OwnStories(num_stories=4, frames=2),
            adaptation=adaptation,
            rank=4,
            default_passes=2,
            gpu_passes=4,
            size_px=64,
            device="cpu",
            buckets=(BUCKET, Bucket(kind="picture", batch_size=2)),
            validation_batches=1,
            loop=LoopConfig(max_steps=steps, warmup_steps=2, log_every_steps=2, decay_fraction=0.0),
        )

    whole = train(settings("whole", 8))
    train(settings("parts", 4))
    parts = train(settings("parts", 8))
    assert whole == parts, "a resumed run ends where an unbroken one does"
    log = [json.loads(line) for line in (tmp_path / "whole" / "dida.log.jsonl").read_text().splitlines()]
    assert log[-1]["step"] == 8 and all(line["noisy_loss"] < 6 for line in log)
    model = load(tmp_path / "whole", device="cpu")
    assert model.manifest.dida == Noise()
    assert model.default_sampling("explore").passes == 2
    told = Manifest.load(tmp_path / "whole")
    on_gpu = told.for_device("cuda")
    assert (on_gpu.sampling_for("explore").passes, on_gpu.sampling_for("t2i").passes) == (4, 2)
    state = model.begin(mode="explore", prompt="a room", seed=0, size=(64, 64))
    _, segment = model.imagine(state, "turn left")
    assert segment.image is not None
    assert Manifest.load(find(tiny_folder)).dida is None
    changed = model.fingerprint != load(tiny_folder, device="cpu").fingerprint
    assert changed


def test_walks_and_pictures_are_answered_in_parts_of_one_kind(
    by_heart: tuple[Path, list[TokenStory]], tmp_path: Path
) -> None:
    folder, (story, *_) = by_heart
    long = dataclasses.replace(
        story,
        question="a room",
        texts=("", *(f"turn {at}" for at in range(1, 6))),
        captions=tuple("abcdef"),
        codes=np.concatenate([story.codes[:1]] * 6),
    )
    painted = dataclasses.replace(long, kind="pictures", texts=("",) * 6)
    answerer = Answerer(
        open_parts(folder, device=torch.device("cpu")),
        config=OwnStories(batch=2, frames=3, kinds=("walk", "pictures")),
        seed=0,
    )
    edited = dataclasses.replace(story, kind="x2i")
    answered = answerer.kept([long, edited, painted], tmp_path)
    assert [(one.kind, len(one.codes)) for one in answered] == [("walk", 3)] * 2 + [("pictures", 2)] * 3
    walks, pictures = answered[:2], answered[2:]
    assert [one.question for one in walks] == ["a room", "c"], "a part is asked with what it begins with"
    assert [one.texts for one in walks] == [("", "turn 1", "turn 2"), ("", "turn 3", "turn 4")]
    assert [one.captions for one in pictures] == [("a", "b"), ("c", "d"), ("e", "f")]
    with pytest.raises(ValueError, match=r"own.kinds has \['walks'\]; known are walk, pictures"):
        OwnStories(kinds=("walks",))


def packed_settings(tiny_folder: str, folder: Path, out: str, steps: int) -> DidaTraining:
    return DidaTraining(
        init_from=tiny_folder,
        shards=str(folder),
        out=str(folder / out),
        stories="both",
        own=OwnStories(num_stories=6, frames=2, batch=2, max_seconds=1e-3),
        rank=4,
        size_px=64,
        device="cpu",
        buckets=(BUCKET, Bucket(kind="picture", batch_size=2)),
        packing=Packing(tokens=320, rows=2, rows_at_once=2),
        validation_batches=1,
        loop=LoopConfig(max_steps=steps, warmup_steps=2, log_every_steps=2, decay_fraction=0.0),
    )


def test_packed_rows_of_both_kinds_of_stories_resume(
    tiny_folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_shards(tmp_path)
    whole = train(packed_settings(tiny_folder, tmp_path, "whole", 6))
    said = capsys.readouterr().out
    assert "dida: 2 own stories" in said and "dida: 4 own stories" not in said, "there was time for one batch"
    train(packed_settings(tiny_folder, tmp_path, "parts", 4))
    assert train(packed_settings(tiny_folder, tmp_path, "parts", 6)) == whole
    assert load(tmp_path / "whole", device="cpu").manifest.dida == Noise()


def test_codes_of_a_pretraining_are_read_and_not_made(tiny_folder: str, tmp_path: Path) -> None:
    write_shards(tmp_path)
    encoded = dataclasses.replace(packed_settings(tiny_folder, tmp_path, "a", 2), stories="data")
    expected = train(encoded)
    digest = VisionTokenizer.load(find(tiny_folder)).code_fingerprint()[:12]
    (made,) = (tmp_path / "a").glob("tokens-*")
    made.rename(tmp_path / f"tokens-train-{digest}-64x64")
    reading = dataclasses.replace(
        encoded, out=str(tmp_path / "b"), codes=str(tmp_path), shards="nowhere", num_stories=6
    )
    assert train(reading) == expected
    with pytest.raises(ValueError, match="has no tokens-train-"):
        train(dataclasses.replace(reading, codes=str(tmp_path / "a"), out=str(tmp_path / "c")))


def test_a_stage_ends_in_time(tiny_folder: str, tmp_path: Path) -> None:
    """Its preparation counts, and the end is left room for."""
    write_shards(tmp_path)
    settings = packed_settings(tiny_folder, tmp_path, "out", 100_000)
    begun = time.monotonic()
    train(dataclasses.replace(settings, loop=dataclasses.replace(settings.loop, stage_seconds=14.0)))
    assert time.monotonic() - begun < 14.0
    log = (tmp_path / "out" / "dida.log.jsonl").read_text().splitlines()
    assert log, "and there was time to learn"


def test_an_adapter_is_trained_on(
    by_heart: tuple[Path, list[TokenStory]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, stories = by_heart
    config = DidaTraining(
        init_from=str(folder), out=str(tmp_path / "one"), rank=4, buckets=(BUCKET,), size_px=16 * SIDE
    )
    parts = open_parts(folder, device=torch.device("cpu"))
    path = make_path(config.noise, codebook_KE=parts.vision.quantize.embedding.weight.detach())

    def begun(config: DidaTraining) -> DidaTrainer:
        model = checkpoint.load(folder, dtype=torch.float32).train()
        return DidaTrainer(config, model=model, vocabulary=parts.manifest.vocabulary, path=path)

    first = begun(config)
    first.batches = lambda: [sampler_of(stories, parts.tokenizer).batch(BUCKET, np.random.default_rng(0))]
    for step in range(3):
        first.step(step, 1.0)
    write_folder(config, first, source=folder, manifest=parts.manifest)
    monkeypatch.setitem(BUILTIN, "small", tmp_path / "one")
    second = begun(dataclasses.replace(config, adapter_from="small"))
    assert first.adapter is not None and second.adapter is not None
    wider = begun(dataclasses.replace(config, rank=6, adapter_from=str(tmp_path / "one")))
    assert wider.adapter is not None
    for key, up_Or in first.adapter.up_Or.items():
        product = up_Or @ first.adapter.down_rI[key]
        for adapter in (second.adapter, wider.adapter):
            taken = adapter.up_Or[key] @ adapter.down_rI[key]
            assert (taken - product).norm() < 0.02 * product.norm(), key
            # Both of a direction's vectors are alike long: a step of training is small for each.
            downs_r, ups_r = adapter.down_rI[key].norm(dim=1), adapter.up_Or[key].norm(dim=0)
            torch.testing.assert_close(downs_r[:4], ups_r[:4])
    with pytest.raises(ValueError, match="rank 4, above rank=2"):
        begun(dataclasses.replace(config, rank=2, adapter_from=str(tmp_path / "one")))
    with pytest.raises(ValueError, match="adaptation=full trains none"):
        dataclasses.replace(config, adaptation="full", adapter_from="x")


def learnt(trainer: DidaTrainer, sampler: ExampleSampler, *, steps: int) -> list[float]:
    """Training and validation losses of each step over packed rows; compiled where the settings say so."""
    if trainer.config.compile:
        trainer.compile_layers()
    losses = []
    for step in range(steps):
        drawn = packed_batches(
            sampler, (BUCKET,), packing=trainer.config.packing, seed=0, step=step, rank=0, world=1
        )
        trainer.batches = lambda drawn=drawn: drawn  # type: ignore[misc]
        losses += [float(trainer.step(step, 1.0)["noisy_loss"])]
        losses += [trainer.validation_losses(drawn)["validation_loss"]]
    return losses


def test_a_layer_with_an_adapter_is_compiled_once(
    by_heart: tuple[Path, list[TokenStory]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """For all layers and steps, whatever the mask holds; and it computes the same."""
    folder, _ = by_heart
    parts = open_parts(folder, device=torch.device("cpu"))
    compiled = []

    def backend(graph: torch.fx.GraphModule, _inputs: object) -> Callable[..., Any]:
        compiled.append(graph)
        return graph.forward

    whole = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda *a, **kw: whole(*a, **kw, backend=backend))
    config = DidaTraining(
        rank=4, buckets=(BUCKET,), size_px=16 * SIDE, packing=Packing(tokens=256, rows=2, rows_at_once=2)
    )
    results = []
    sampler = sampler_of(few_walks(parts.vision.num_codes), parts.tokenizer)
    for compiles in (False, True):
        trainer = DidaTrainer(
            dataclasses.replace(config, compile=compiles),
            model=checkpoint.load(folder, dtype=torch.float32).train(),
            vocabulary=parts.manifest.vocabulary,
            path=make_path(config.noise, codebook_KE=parts.vision.quantize.embedding.weight.detach()),
        )
        results.append(learnt(trainer, sampler, steps=3))
    assert len(compiled) == 1
    np.testing.assert_allclose(*results, rtol=1e-5)


@pytest.mark.gpu
def test_a_compiled_step_on_a_gpu_learns_what_a_dense_one_does(
    by_heart: tuple[Path, list[TokenStory]],
) -> None:
    """FlexAttention inside compiled layers, with an adapter, packed rows and gradients."""
    if not torch.cuda.is_available():
        pytest.skip("needs CUDA")
    folder, stories = by_heart
    device = torch.device("cuda")
    parts = open_parts(folder, device=device)
    config = DidaTraining(
        rank=4, buckets=(BUCKET,), size_px=16 * SIDE, packing=Packing(tokens=256, rows=2, rows_at_once=2)
    )
    sampler, results = sampler_of(stories, parts.tokenizer), []
    for compiles in (False, True):
        attention = "flex" if compiles else "dense"
        trainer = DidaTrainer(
            dataclasses.replace(config, compile=compiles, attention=attention),
            model=checkpoint.load(folder, device=device, dtype=torch.bfloat16).train(),
            vocabulary=parts.manifest.vocabulary,
            path=make_path(config.noise, codebook_KE=parts.vision.quantize.embedding.weight.detach()),
        )
        results.append(learnt(trainer, sampler, steps=4))
    np.testing.assert_allclose(*results, rtol=2e-2)


def test_what_is_unknown_is_named() -> None:
    with pytest.raises(ValueError, match="adaptation='lora' is not known; expected adapter or full"):
        DidaTraining(adaptation="lora")
    with pytest.raises(ValueError, match="noise path 'linear'"):
        Noise(path="linear")
