"""The facade on the tiny checkpoint: determinism, sizes, text that stays text, limits, handles."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from emuworld.checkpoint_folder import find, open_parts
from emuworld.decoding.sampling import Sampling, Truncation
from emuworld.tokens.sequence import image_block
from emuworld.world_model import ContextFull, Segment, SnapshotError, WorldModel, WorldState, load

UNGUIDED = Sampling()
GUIDED = Sampling(text=Truncation(top_p=0.9), image=Truncation(top_k=20), guidance=3.0)
COMMANDS = ("turn left", "", None, "move forward", "go to the red ball", None, "look up", "turn right")


def picture(seed: int, height: int = 128, width: int = 128) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def start(model: WorldModel, seed: int) -> WorldState:
    """Worlds of unequal prompts, some with a reference picture."""
    images = [picture(seed)] if seed % 3 == 2 else []
    return model.begin(mode="explore", prompt="a room " * (1 + seed % 4), images=images, seed=seed)


def same(one: tuple[WorldState, Segment], other: tuple[WorldState, Segment]) -> bool:
    """Equal states (ids and all), and equal bytes in the pictures."""
    (state, segment), (twin_state, twin_segment) = one, other
    pictures = [
        None if s.image is None else (s.image.shape, s.image.tobytes()) for s in (segment, twin_segment)
    ]
    words = [(s.text, s.thought, s.ended) for s in (segment, twin_segment)]
    return state == twin_state and pictures[0] == pictures[1] and words[0] == words[1]


@pytest.fixture(params=[UNGUIDED, GUIDED], ids=["unguided", "guided"])
def sampling(request: pytest.FixtureRequest) -> Sampling:
    return request.param


@pytest.fixture
def model(tiny_model: WorldModel) -> Iterator[WorldModel]:
    """The shared handle without anything that earlier tests left in its caches."""
    tiny_model.caches.clear()
    yield tiny_model


def two_steps(
    model: WorldModel, worlds: list[int], sampling: Sampling
) -> dict[int, list[tuple[WorldState, Segment]]]:
    """Two steps of each world, all worlds in one batch; a world that has ended stays behind."""
    states = {world: start(model, world) for world in worlds}
    history: dict[int, list[tuple[WorldState, Segment]]] = {world: [] for world in worlds}
    for step in range(2):
        alive = [world for world in worlds if not states[world].ended]
        texts = [COMMANDS[(world + step) % len(COMMANDS)] for world in alive]
        results = model.imagine_batch([states[world] for world in alive], texts, sampling=sampling)
        for world, result in zip(alive, results, strict=True):
            states[world] = result[0]
            history[world].append(result)
    return history


def test_same_seed_same_world_in_any_batch(model: WorldModel, sampling: Sampling) -> None:
    """1, 2 and 8 rows, in order and shuffled, unequal prompts and phases: equal ids and equal bytes."""
    worlds = list(range(8))
    together = two_steps(model, worlds, sampling)
    drawn = {s.image.tobytes() for results in together.values() for _, s in results if s.image is not None}
    assert len(drawn) > 8, "worlds of different seeds differ"
    batches = [[5, 2, 7, 0, 4, 1, 6, 3], [1, 6], [0, 2], *([world] for world in worlds)]
    for batch in batches:
        model.caches.clear()
        for world, results in two_steps(model, batch, sampling).items():
            assert len(results) == len(together[world])
            for one, other in zip(results, together[world], strict=True):
                assert same(one, other), (batch, world)


def test_restored_worlds_go_on_as_running_ones(model: WorldModel, sampling: Sampling) -> None:
    """Cold caches, other rows and neighbours: the bytes after a restore are those of the running world."""
    state, running, snapshots = start(model, 2), [], []
    for text in ("turn left", "move forward", "look up", ""):
        snapshots.append((text, state.to_bytes()))
        state, segment = model.imagine(state, text, sampling=sampling)
        running.append((state, segment))
    for clear in (False, True):
        for (text, snapshot), expected in reversed(list(zip(snapshots, running, strict=True))):
            if clear:
                model.caches.clear()
            restored = WorldState.from_bytes(snapshot)
            result = model.imagine_batch([start(model, 1), restored], ["look up", text], sampling=sampling)[1]
            assert same(result, expected)


def test_branches_equal_single_walks_and_share_their_trunk(model: WorldModel, sampling: Sampling) -> None:
    trunk, _ = model.imagine(start(model, 0), "turn left", sampling=sampling)
    before = model.caches.num_prefills
    texts = ["turn left", "turn right", "move forward", "turn left"]
    branches = model.imagine_batch([trunk] * 4, texts, sampling=sampling)
    rows = 2 if sampling.guided else 1
    assert model.caches.num_prefills - before == rows, "one prefill of the new chunk for all four"
    assert same(branches[0], branches[3])
    assert len({segment.image.tobytes() for _, segment in branches[:3] if segment.image is not None}) == 3
    for text, branch in zip(texts, branches, strict=True):
        model.caches.clear()
        assert same(model.imagine(trunk, text, sampling=sampling), branch)


def test_small_caches_change_nothing_but_the_time(tiny_folder: str, sampling: Sampling) -> None:
    parts = open_parts(find(tiny_folder), device=torch.device("cpu"))
    roomy, tight = WorldModel(parts), WorldModel(parts, cache_bytes=1)
    expected = two_steps(roomy, [0, 1, 2], sampling)
    for world, results in two_steps(tight, [0, 1, 2], sampling).items():
        assert all(same(one, other) for one, other in zip(results, expected[world], strict=True))
    assert tight.caches.num_bytes == 0


_WALK = """
import hashlib, multiprocessing, os, sys, warnings
from emuworld.decoding.sampling import Sampling
from emuworld.world_model import load

def walk():
    digest = hashlib.sha256()
    for guidance in (1.0, 3.0):
        state = model.begin(mode="explore", prompt="a room", seed=11)
        for text in ("turn left", None, "look up"):
            if not state.ended:
                state, segment = model.imagine(state, text, sampling=Sampling(guidance=guidance))
                digest.update(b"" if segment.image is None else segment.image.tobytes())
        digest.update(state.to_bytes())
    return digest.hexdigest()

model = load(sys.argv[1], device="cpu")
digests = [walk()]
if hasattr(os, "fork"):
    warnings.simplefilter("ignore")
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=lambda: queue.put(walk()))
    child.start()
    digests.append(queue.get(timeout=300))
    child.join()
print(*digests)
"""


def test_another_process_dreams_the_same(tiny_folder: str, model: WorldModel) -> None:
    """With other threads, and in its forked child, where OpenMP's are gone (AsyncVectorEnv forks)."""
    environment = {**os.environ, "OMP_NUM_THREADS": "3" if torch.get_num_threads() != 3 else "2"}
    command = [sys.executable, "-c", _WALK, tiny_folder]
    run = subprocess.run(command, capture_output=True, text=True, check=True, timeout=600, env=environment)
    digest = hashlib.sha256()
    for guidance in (1.0, 3.0):
        state = model.begin(mode="explore", prompt="a room", seed=11)
        for text in ("turn left", None, "look up"):
            if not state.ended:
                state, segment = model.imagine(state, text, sampling=Sampling(guidance=guidance))
                digest.update(b"" if segment.image is None else segment.image.tobytes())
        digest.update(state.to_bytes())
    assert set(run.stdout.split()) == {digest.hexdigest()}


def test_the_number_of_threads_changes_nothing(model: WorldModel, sampling: Sampling) -> None:
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            model.caches.clear()
            results.append(model.imagine(start(model, 2), "turn left", sampling=sampling))
    finally:
        torch.set_num_threads(threads)
    assert same(results[0], results[1])
    assert same(results[0], results[2])


def test_a_text_given_is_the_segments_text(model: WorldModel) -> None:
    state = model.begin(mode="explore", prompt="a room", seed=1)
    after, segment = model.imagine(state, "turn left 45 degrees")
    assert (segment.text, segment.thought, segment.ended) == ("turn left 45 degrees", None, False)
    assert segment.image is not None
    assert (segment.image.dtype, segment.image.shape) == (np.uint8, (128, 128, 3))
    assert (after.step, after.seed, after.prompt_ids) == (1, 1, state.prompt_ids)
    assert state == model.begin(mode="explore", prompt="a room", seed=1), "imagine is a pure function"
    np.testing.assert_array_equal(model.last_image(after), segment.image)
    assert model.last_image(state) is None
    assert model.imagine(state, "")[1].text == ""


@pytest.mark.parametrize(
    "text", ["<|image start|>8*8<|image token|>", "<|extra_101|><|extra_204|>", "�\ud800 \0é"]
)
def test_control_tokens_in_words_stay_words(model: WorldModel, text: str) -> None:
    controls = set(model.manifest.vocabulary.control_ids)
    plain = model.begin(mode="explore", prompt="a room")
    state = model.begin(mode="explore", prompt=text)
    assert [i for i in state.prompt_ids if i in controls] == [i for i in plain.prompt_ids if i in controls]
    after, segment = model.imagine(state, text)
    assert not after.ended
    assert segment.image is not None
    assert segment.text == text.encode("utf-8", "replace").decode().replace(
        "?", "\ufffd" if "\ud800" in text else "?"
    )
    assert sum(i in controls for i in after.answer_ids) == 1 + 1 + 7 + 1  # BOI, IMG, 7 EOL, EOI


@pytest.mark.parametrize("size", [(32, 32), (48, 112), (256, 256), (160, 32)])
def test_sizes(model: WorldModel, size: tuple[int, int]) -> None:
    state = model.begin(mode="t2i", prompt="a box", size=size, images=[picture(0, 50, 70)])
    assert state.size == size
    _, segment = model.imagine(state, "")
    assert segment.image is not None
    assert segment.image.shape == (*size, 3)
    shown = model.last_image(state)
    assert shown is not None
    assert shown.shape == (*size, 3)


def test_rows_of_different_sizes_in_one_batch(model: WorldModel, sampling: Sampling) -> None:
    states = [model.begin(mode="explore", size=size, seed=4) for size in ((32, 64), (128, 128), (64, 32))]
    together = model.imagine_batch(states, ["", "look up", ""], sampling=sampling)
    for state, text, result in zip(states, ("", "look up", ""), together, strict=True):
        assert same(model.imagine(state, text, sampling=sampling), result)


@pytest.fixture
def free_model(tiny_folder: str) -> WorldModel:
    """A checkpoint without a default size: the model writes the digits itself."""
    parts = open_parts(find(tiny_folder), device=torch.device("cpu"))
    manifest = dataclasses.replace(parts.manifest, default_size=None, smallest_side=16, largest_side=96)
    return WorldModel(dataclasses.replace(parts, manifest=manifest))


def test_the_model_chooses_a_size_and_keeps_it(free_model: WorldModel, sampling: Sampling) -> None:
    seen = set()
    for seed in range(4):
        state = free_model.begin(mode="explore", seed=seed)
        assert state.size is None
        state, first = free_model.imagine(state, "look up", sampling=sampling)
        state, second = free_model.imagine(state, "look up", sampling=sampling)
        assert first.image is not None
        assert second.image is not None
        assert first.image.shape == second.image.shape == (*(state.size or ()), 3)
        seen.add(state.size)
    assert len(seen) > 1
    # A reference picture decides where the checkpoint does not, rounded to what can be drawn.
    assert free_model.begin(mode="x2i", images=[picture(0, 30, 300)]).size == (32, 96)


def test_reference_pictures_are_what_the_model_sees(model: WorldModel) -> None:
    image = picture(5)
    codes = model.encode([image])[0]
    state = model.begin(mode="explore", prompt="a room", images=[picture(6), image])
    block = image_block(codes, tokenizer=model.tokenizer)
    assert tuple(block) == state.prompt_ids[state.prompt_ids.index(block[-1]) + 1 :][: len(block)]
    np.testing.assert_array_equal(model.last_image(state), model.decode([codes])[0])
    assert codes.shape == (8, 8)


def test_fits_tells_what_imagine_refuses(model: WorldModel) -> None:
    state = model.begin(mode="explore", prompt="a room")
    word = "\x01"  # a byte of its own: one token each
    free = model.max_tokens - len(state.prompt_ids) - (3 + 2 + 64 + 7 + 1) - 2
    assert model.fits(state, word * free)
    assert not model.fits(state, word * (free + 1))
    with pytest.raises(ContextFull, match=f"context of {model.max_tokens} tokens is full"):
        model.imagine(state, word * (free + 1))
    full, segment = model.imagine(state, word * free)
    assert segment.image is not None
    assert len(full.ids) == model.max_tokens - 2
    assert not model.fits(full, "")
    assert not model.fits(full, None)
    with pytest.raises(ContextFull):
        model.imagine(full, "")
    over, last = model.imagine(full, None)
    assert (last.text, last.image, last.ended, last.stop_reason) == ("", None, True, "context")
    assert (over.ended, len(over.ids)) == (True, model.max_tokens)
    with pytest.raises(ContextFull):
        model.begin(mode="explore", prompt=word * model.max_tokens)


def test_states_of_other_models_and_damaged_ones_are_refused(model: WorldModel) -> None:
    state = model.begin(mode="explore", prompt="a room", images=[picture(0)])
    vocabulary = model.manifest.vocabulary
    foreign = dataclasses.replace(state, fingerprint=bytes(16))
    with pytest.raises(SnapshotError, match="belongs to model 0000"):
        model.imagine(foreign, "")
    broken = list(state.prompt_ids)
    broken.remove(vocabulary.eol)
    for prompt in ((), (vocabulary.size,), tuple(broken)):
        damaged = dataclasses.replace(state, prompt_ids=prompt)
        with pytest.raises(SnapshotError, match="damaged"):
            model.last_image(damaged)
        with pytest.raises(SnapshotError, match="damaged"):
            model.imagine(damaged, "", sampling=GUIDED)
    with pytest.raises(SnapshotError, match="mode"):
        model.imagine(dataclasses.replace(state, mode="nothing"), "")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"mode": "dream"}, "mode 'dream'"),
        ({"prompt": 3}, "prompt must be a str"),
        ({"seed": -1}, "seed must be"),
        ({"seed": 2**64}, "seed must be"),
        ({"seed": 0.5}, "seed must be"),
        ({"size": (100, 128)}, "multiples of 16"),
        ({"size": (16, 128)}, "in 32..256"),
        ({"images": [np.zeros((8, 8), np.uint8)]}, "uint8 .H, W, 3."),
        ({"images": [np.zeros((8, 8, 3))]}, "uint8 .H, W, 3."),
    ],
)
def test_begin_says_what_is_wrong(model: WorldModel, fields: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        model.begin(**{"mode": "explore", **fields})  # type: ignore[arg-type]


def test_imagine_says_what_is_wrong(model: WorldModel) -> None:
    state = model.begin(mode="explore")
    with pytest.raises(ValueError, match="text must be a str"):
        model.imagine(state, 3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="expected a WorldState, got bytes"):
        model.imagine(state.to_bytes(), "")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="2 states, 1 texts"):
        model.imagine_batch([state, state], [""])
    with pytest.raises(ValueError, match="2 texts and 3 settings"):
        model.imagine_batch([state, state], ["", ""], sampling=[None] * 3)
    assert model.imagine_batch([], []) == []


def test_a_handle_is_shared_and_never_copied(tiny_folder: str, tiny_model: WorldModel) -> None:
    assert load(tiny_folder, device="cpu") is tiny_model
    assert load(Path(tiny_folder), device="cpu") is tiny_model
    assert copy.deepcopy({"model": tiny_model})["model"] is tiny_model
    data = pickle.dumps(tiny_model)
    assert len(data) < 500
    assert pickle.loads(data) is tiny_model
    in_memory = WorldModel(open_parts(find(tiny_folder), device=torch.device("cpu")))
    with pytest.raises(TypeError, match="built in memory"):
        pickle.dumps(in_memory)


def test_load_says_what_is_missing(tmp_path: Path, tiny_folder: str) -> None:
    with pytest.raises(ValueError, match=r"'no-such-model' is neither 'small' nor a folder"):
        load("no-such-model")
    with pytest.raises(ValueError, match=r"has no config\.json, model\.safetensors"):
        load(tmp_path)
    with pytest.raises(ValueError, match="device 'abacus'"):
        load(tiny_folder, device="abacus")
    with pytest.raises(ValueError, match="device 'cuda:99'"):
        load(tiny_folder, device="cuda:99")


def test_files_written_again_are_opened_again(tmp_path: Path, tiny_folder: str) -> None:
    folder = Path(shutil.copytree(tiny_folder, tmp_path / "checkpoint"))
    first = load(folder, device="cpu")
    assert load(folder, device="cpu") is first
    assert first.fingerprint == load(tiny_folder, device="cpu").fingerprint
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"] = weights["model.norm.weight"] * 2
    save_file(weights, folder / "model.safetensors")
    again = load(folder, device="cpu")
    assert again.fingerprint != first.fingerprint
    with pytest.raises(SnapshotError, match="belongs to model"):
        again.imagine(first.begin(mode="explore"), "")


@pytest.mark.parametrize(
    "name", ["model.safetensors", "vision.safetensors", "emuworld.json", "text.tiktoken"]
)
def test_damaged_files_are_named(tmp_path: Path, tiny_folder: str, name: str) -> None:
    folder = Path(shutil.copytree(tiny_folder, tmp_path / "checkpoint"))
    (folder / name).write_bytes((folder / name).read_bytes()[:100])
    with pytest.raises(ValueError, match=name):
        load(folder, device="cpu")


def test_importing_emuworld_imports_no_torch() -> None:
    code = (
        "import sys, emuworld, gymnasium\n"
        "assert 'torch' not in sys.modules and 'mujoco' not in sys.modules\n"
        "assert 'EmuWorld/Explore-v0' in gymnasium.registry\n"
        "assert {'load', 'WorldModel', 'WorldState', 'Segment'} <= set(dir(emuworld))\n"
        "assert not hasattr(emuworld, 'nothing') and 'torch' not in sys.modules\n"
        "assert callable(emuworld.load) and 'torch' in sys.modules\n"
        "assert 'transformers' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=600)


def test_in_bulk_worlds_are_the_same_but_for_rounding(tiny_folder: str) -> None:
    """Words of unequal length, a fork, pictures: states of the same form, and nearly all tokens equal."""
    parts = open_parts(find(tiny_folder), device=torch.device("cpu"))
    model = WorldModel(parts)
    texts = ["turn left", "go to the red ball beside the green door and then turn right", "look up"]
    images = [np.full((128, 128, 3), 40 * k, np.uint8) for k in range(3)]

    def walked(in_bulk: bool) -> list[WorldState]:
        model.in_bulk = in_bulk
        model.caches.clear()
        codes = model.encode(images)
        states = [
            model.begin(mode="explore", prompt="a room " * (k + 1), images=[one], seed=k)
            for k, one in enumerate(codes)
        ]
        first = [state for state, _ in model.imagine_batch(states, texts)]
        again = model.imagine_batch([first[0], *first], ["look up", *reversed(texts)])
        free = model.imagine_batch(first, [None] * 3)  # words of its own, of any length
        assert any(one.image is not None for _, one in free)
        assert all(one.image is not None and one.image.shape == (128, 128, 3) for _, one in again)
        return [state for state, _ in again]

    alone, bulk = walked(False), walked(True)
    for one, other in zip(alone, bulk, strict=True):
        assert len(one.ids) == len(other.ids) and one.step == other.step == 2
    equal = np.mean(
        [a == b for x, y in zip(alone, bulk, strict=True) for a, b in zip(x.ids, y.ids, strict=True)]
    )
    assert equal > 0.9, "what differs is rounding"
