"""Tales: two objects of a room act out a plot, panel by panel, before one camera.

The characters look alike in every panel because they are the same MuJoCo objects; a panel's sentence says
what has changed since the one before. The question is the plot in words, or its theme. Half of the tales call
their characters by name. `tale_story` depends on nothing but its arguments.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np

from emuworld.envs.episodes import stored_view
from emuworld.envs.palette import object_pairs, with_article
from emuworld.envs.render import Renderer
from emuworld.envs.rooms.captions import caption
from emuworld.envs.rooms.commands import Outcome, Pose
from emuworld.envs.rooms.edits import brightened
from emuworld.envs.rooms.floorplan import choice
from emuworld.envs.rooms.placement import new_object
from emuworld.envs.rooms.scenes import RoomScene, generator
from emuworld.envs.rooms.shots import CLEAR_PX, Shot
from emuworld.envs.rooms.tale_events import (
    EVENTS,
    MIDDLE_M,
    NEAR_M,
    SIDE_M,
    Cast,
    Event,
    Scenery,
    Spot,
    reach_m,
)
from emuworld.story import Story, StoryImage, StorySegment

NUM_PANELS = (4, 6)
NAMES = ("Ruby", "Max", "Lily", "Tom", "Mia", "Leo", "Nora", "Sam", "Ella", "Finn", "Zoe", "Ben")
_STREAM = 13
_NIGHT = 0.55  # of the light by day
_HIDDEN = 0.6  # of a character's pixels at most are seen where it hides


@dataclass(frozen=True, kw_only=True)
class _Panel:
    event: str
    who: int
    sentence: str
    shot: Shot


# Question, how the tale opens (both there, or the first one alone), and how it ends (None: anyhow).
_THEMES: tuple[tuple[str, str, str | None], ...] = (
    ("the story of {a} that looks for {b}.", "alone", "beside"),
    ("{a} and {b} meet in a room.", "alone", None),
    ("how {a} and {b} became friends.", "apart", "beside"),
)
_PLOT_SHARE = 0.5  # of the tales whose question tells what happens


def tale_story(
    split: str,
    seed: int,
    *,
    index: int = 0,
    renderer: Renderer,
    size: int = 256,
    format: str = "JPEG",
    scene: RoomScene | None = None,
) -> Story | None:
    """The `index`-th tale in the room of a split and a seed; None where the room has no stage for it.

    Each panel's feature "truth" names the event, who acts, and the characters.
    """
    scene = RoomScene.sample(split, seed) if scene is None else scene
    rng = generator(split, seed, _STREAM, index)
    cast = _draw_cast(split, rng)
    empty = scene.edited(replace(scene.plan, objects=()))
    theme = None if rng.random() < _PLOT_SHARE else choice(rng, _THEMES)
    for _ in range(6):
        pose = _stage(empty, rng)
        panels = None if pose is None else _play(empty, pose, cast, theme, rng)
        if panels is not None:
            break
    else:
        return None

    def image(panel: _Panel) -> StoryImage:
        return stored_view(
            panel.shot.scene,
            Outcome(pose=panel.shot.pose),
            panel.shot.view,
            caption=caption(panel.shot.view, rng, split=split),
            renderer=renderer,
            size=size,
            format=format,
            truth={"tale": _tale_truth(panel, cast)},
        )

    return Story(
        question=_question(theme, panels, cast),
        segments=tuple(StorySegment(text=panel.sentence, images=(image(panel),)) for panel in panels),
        story_id=f"story-{split}-{seed}-{index}",
    )


def _draw_cast(split: str, rng: np.random.Generator) -> Cast:
    """Two characters that differ in colour and in shape."""
    pairs = object_pairs(split)
    first = choice(rng, pairs)
    second = choice(rng, tuple(p for p in pairs if p[0] != first[0] and p[1] != first[1]))
    items = (new_object(rng, first, 0.0, 0.0), new_object(rng, second, 0.0, 0.0))
    named = bool(rng.random() < 0.5)
    names = (f"the {items[0].identity}", f"the {items[1].identity}")
    if named:
        one, other = (NAMES[int(i)] for i in rng.choice(len(NAMES), size=2, replace=False))
        names = (one, other)
    return Cast(items=items, names=names, named=named)


def _stage(scene: RoomScene, rng: np.random.Generator) -> Pose | None:
    """A pose with a free floor before it, wide enough for two characters."""
    corners = [
        Spot(ahead_m=ahead, left_m=side) for ahead in (NEAR_M, MIDDLE_M) for side in (-SIDE_M, 0.0, SIDE_M)
    ]
    for _ in range(30):
        pose = scene.random_pose(rng)
        points = np.array([_on_floor(pose, spot) for spot in corners])
        if float(scene.obstacles.distance(points).min()) > 0.3:
            return pose
    return None


def _play(
    scene: RoomScene,
    pose: Pose,
    cast: Cast,
    theme: tuple[str, str, str | None] | None,
    rng: np.random.Generator,
) -> list[_Panel] | None:
    """The panels of one tale, or None where its end cannot be shown on this stage."""
    count = int(rng.integers(NUM_PANELS[0], NUM_PANELS[1] + 1))
    alone = rng.random() < 0.5 if theme is None else theme[1] == "alone"
    scenery = Scenery(spots=(Spot(ahead_m=MIDDLE_M, left_m=SIDE_M), Spot(ahead_m=MIDDLE_M, left_m=-SIDE_M)))
    if rng.random() < 0.5:
        scenery = replace(scenery, spots=(scenery.spots[1], scenery.spots[0]))
    scenery = scenery.moved(1, None) if alone else scenery
    shot = _shown(scene, pose, cast, scenery)
    if shot is None:
        return None
    panels = [_Panel(event="opening", who=0, sentence=_opening(cast, alone), shot=shot)]
    told = theme is not None or not alone  # whether the words have said what the second one looks like
    while len(panels) < count:
        last = theme is not None and theme[2] is not None and len(panels) == count - 1
        event = theme[2] if theme is not None and last else None
        step = _step(scene, panels[-1].shot, cast, scenery, rng, event=event, told=told)
        if step is None:
            return None
        scenery, panel = step
        told = told or panel.event == "appear"
        panels.append(panel)
    both = any(len(panel.shot.view.objects) == 2 for panel in panels)
    return panels if both else None


def _step(
    scene: RoomScene,
    before: Shot,
    cast: Cast,
    scenery: Scenery,
    rng: np.random.Generator,
    *,
    event: str | None,
    told: bool,
) -> tuple[Scenery, _Panel] | None:
    """The next thing that happens: `event`, or any that changes what is seen. `told`: see `_sentence`."""
    pose, weights = before.pose, tuple(one.weight for one in EVENTS.values())
    for _ in range(12):
        name, who = event or choice(rng, tuple(EVENTS), weights), int(rng.integers(2))
        after = EVENTS[name].act(scenery, cast, who)
        shot = None if after is None or after == scenery else _shown(scene, pose, cast, after)
        if after is None or shot is None:
            continue
        if after.night == scenery.night and shot.view.objects == before.view.objects:
            continue
        if name == "hide":
            if not _hidden(scene, pose, cast, after, who, shot):
                continue
        elif not all(shot.pixels().get(item.identity, 0) >= CLEAR_PX for item in shot.scene.plan.objects):
            continue
        words = _sentence(EVENTS[name], cast, who, rng, scene.split, told=told or name != "appear")
        return after, _Panel(event=name, who=who, sentence=words, shot=shot)
    return None


def _shown(scene: RoomScene, pose: Pose, cast: Cast, scenery: Scenery) -> Shot | None:
    """The view, or None where a character would stand in something, or the foremost could not be seen."""
    placed = []
    for item, spot in zip(cast.items, scenery.spots, strict=True):
        if spot is None:
            continue
        x, y = _on_floor(pose, spot)
        here = replace(item, x_m=x, y_m=y, base_m=spot.base_m)
        if not scene.obstacles.clears(here.footprint(), 0.03):
            return None
        placed.append(here)
    if len(placed) == 2 and not placed[0].base_m and not placed[1].base_m:
        apart = math.dist((placed[0].x_m, placed[0].y_m), (placed[1].x_m, placed[1].y_m))
        if apart < reach_m(cast):
            return None
    light = brightened(scene.plan.light, _NIGHT) if scenery.night else scene.plan.light
    shot = Shot(scene=scene.edited(replace(scene.plan, objects=tuple(placed), light=light)), pose=pose)
    front = min(placed, key=lambda item: math.hypot(item.x_m - pose.x_m, item.y_m - pose.y_m))
    return shot if shot.pixels().get(front.identity, 0) >= CLEAR_PX else None


def _hidden(scene: RoomScene, pose: Pose, cast: Cast, scenery: Scenery, who: int, shot: Shot) -> bool:
    """Whether the other one really covers a good part of `who`."""
    alone = _shown(scene, pose, cast, scenery.moved(1 - who, None))
    name = cast.items[who].identity
    return alone is not None and shot.pixels().get(name, 0) < _HIDDEN * alone.pixels()[name]


def _on_floor(pose: Pose, spot: Spot) -> tuple[float, float]:
    cos, sin = math.cos(pose.yaw_rad), math.sin(pose.yaw_rad)
    return (
        pose.x_m + spot.ahead_m * cos - spot.left_m * sin,
        pose.y_m + spot.ahead_m * sin + spot.left_m * cos,
    )


def _opening(cast: Cast, alone: bool) -> str:
    first, second = (with_article(item.identity) for item in cast.items)
    if cast.named:
        first, second = f"{cast.names[0]} is {first}", f"{cast.names[1]} is {second}"
        return f"{first}." if alone else f"{first} and {second}."
    return _upper(f"{first} is in a room." if alone else f"{first} and {second} are in a room.")


def _sentence(event: Event, cast: Cast, who: int, rng: np.random.Generator, split: str, *, told: bool) -> str:
    """What happens in words. `told`: false where `who` comes in and no word says yet what it is."""
    templates = (*event.templates, *(event.held_out if split == "test" else ()))
    template = templates[0] if rng.random() < 0.5 else choice(rng, templates)
    a = cast.names[who] if told else cast.introduced(who)
    return _upper(template.format(a=a, b=cast.names[1 - who]).replace(",.", "."))


def _question(theme: tuple[str, str, str | None] | None, panels: list[_Panel], cast: Cast) -> str:
    """The theme in a sentence, or all that happens, sentence by sentence."""
    if theme is None:
        return " ".join(panel.sentence for panel in panels)
    words = theme[0].format(a=cast.introduced(0), b=cast.introduced(1))
    return _upper(words.replace(",.", "."))


def _upper(words: str) -> str:
    return words[0].upper() + words[1:]


def _tale_truth(panel: _Panel, cast: Cast) -> dict[str, object]:
    return {
        "event": panel.event,
        "who": cast.items[panel.who].identity,
        "characters": [item.identity for item in cast.items],
    }
