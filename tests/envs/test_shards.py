"""Shards of training stories: written whole, resumed, never mixed; every kind that is asked for."""

import json
from collections import Counter
from pathlib import Path

import pytest

from emuworld.envs.shards import ShardsConfig, build_shards, shard_path
from emuworld.story import read_shard


def test_shards_are_written_resumed_and_never_mixed(tmp_path: Path) -> None:
    config = ShardsConfig(
        out=str(tmp_path),
        num_episodes=5,
        num_frames=2,
        num_pictures=1,
        episodes_per_shard=2,
        size=16,
        workers=1,
        renderer="rays",
    )
    told: list[tuple[str, int, int]] = []
    assert build_shards(config, on_progress=lambda *words: told.append(words)) == 3
    assert told == [("train shards", done, 3) for done in range(4)]
    assert build_shards(config) == 0
    names = sorted(path.name for path in tmp_path.glob("*.stories"))
    assert names == [f"train-0000000{a}-0000000{b}.stories" for a, b in ((0, 2), (2, 4), (4, 5))]
    stories = [story for path in sorted(tmp_path.glob("*.stories")) for story in read_shard(path)]
    assert [story.story_id for story in stories[:4]] == [
        "walk-train-0",
        "pictures-train-0",
        "walk-train-1",
        "pictures-train-1",
    ]
    assert len(stories) == 10
    # A file cut short by a kill is written again, the others are left alone.
    cut = shard_path(config, 2)
    whole = cut.read_bytes()
    cut.write_bytes(whole[: len(whole) // 2])
    before = shard_path(config, 0).stat().st_mtime_ns
    assert build_shards(config) == 1
    assert cut.read_bytes() == whole and shard_path(config, 0).stat().st_mtime_ns == before
    with pytest.raises(
        ValueError, match=r"made with num_frames=2, num_pictures=1, episodes_per_shard=2; say"
    ):
        build_shards(ShardsConfig(out=str(tmp_path), num_frames=3, size=16))


def test_a_folder_without_shards_takes_other_settings(tmp_path: Path) -> None:
    """A run that failed before its first shard must not bar the one that puts it right."""
    (tmp_path / "train.json").write_text(json.dumps({"num_frames": 99}))
    common = {"num_episodes": 1, "num_pictures": 0, "size": 16, "workers": 1, "renderer": "rays"}
    assert build_shards(ShardsConfig(out=str(tmp_path), num_frames=1, **common)) == 1


def test_processes_write_the_same_bytes(tmp_path: Path) -> None:
    common = {
        "num_episodes": 2,
        "num_frames": 2,
        "num_pictures": 0,
        "episodes_per_shard": 1,
        "size": 16,
        "renderer": "rays",
    }
    configs = [
        ShardsConfig(out=str(tmp_path / str(workers)), workers=workers, **common) for workers in (1, 2)
    ]
    for config in configs:
        assert build_shards(config) == 2
    for first in (0, 1):
        assert shard_path(configs[0], first).read_bytes() == shard_path(configs[1], first).read_bytes()


def test_wrong_settings_are_named() -> None:
    with pytest.raises(ValueError, match="split='dev'"):
        ShardsConfig(split="dev")
    with pytest.raises(ValueError, match="num_frames=-1"):
        ShardsConfig(num_frames=-1)
    with pytest.raises(ValueError, match="format='GIF'"):
        ShardsConfig(format="GIF")
    with pytest.raises(ValueError, match="nothing to render"):
        ShardsConfig(num_frames=0, num_pictures=0)
    with pytest.raises(ValueError, match="set num_tasks as well"):
        ShardsConfig(num_tables=2)


def test_every_kind_that_is_asked_for_is_written(tmp_path: Path) -> None:
    config = ShardsConfig(
        out=str(tmp_path),
        num_episodes=2,
        num_frames=0,
        num_pictures=0,
        num_edits=4,
        num_tales=2,
        num_tasks=1,
        num_tables=1,
        size=16,
        workers=1,
        renderer="rays",
    )
    assert build_shards(config) == 1
    stories = list(read_shard(shard_path(config, 0)))
    kinds = Counter(story.story_id.split("-")[0] for story in stories)
    assert set(kinds) - {"howto"} == {"x2i", "story", "vla", "pictures"} and kinds["story"] <= 4
    assert {story.story_id for story in stories} >= {"pictures-table-train-0", "pictures-table-train-1"}
    edits = sum(len(story.segments) for story in stories if story.story_id.startswith("x2i"))
    assert 4 <= edits <= 8
    assert all(story.question for story in stories if story.story_id.startswith("story"))


def test_a_folder_from_before_a_setting_came_is_continued(tmp_path: Path) -> None:
    """It holds what the new setting's default gives, so the same command goes on with it."""
    common = {"out": str(tmp_path), "num_frames": 1, "num_pictures": 0, "size": 16, "workers": 1}
    build_shards(ShardsConfig(num_episodes=1, episodes_per_shard=1, renderer="rays", **common))
    kept = json.loads((tmp_path / "train.json").read_text())
    for name in ("num_edits", "num_tales", "num_tasks", "num_tables"):
        del kept[name]
    (tmp_path / "train.json").write_text(json.dumps(kept))
    assert build_shards(ShardsConfig(num_episodes=2, episodes_per_shard=1, renderer="rays", **common)) == 1
    with pytest.raises(ValueError, match="choose another out"):
        build_shards(ShardsConfig(num_edits=1, episodes_per_shard=1, **common))
