"""Random table-tops without a task: which things, and how everything looks. Tasks bring their own things.

The places come from `table_places`, the looks from `table_looks`.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np

from emuworld.envs.palette import OBJECT_COLOURS
from emuworld.envs.rooms.scenes import generator
from emuworld.envs.tabletop.drafts import HELD_OUT_TABLE_PAIRS, Draft
from emuworld.envs.tabletop.layout import BIN_LOOKS, OBJECT_KINDS, TablePlan
from emuworld.envs.tabletop.looks import sample_camera, sample_look
from emuworld.envs.tabletop.places import HELD_OUT_LAYOUTS, LAYOUTS, NoPlaceError, find_places

NOVELTIES = ("pairs", "layout", "background", "camera")
KINDS = (*OBJECT_KINDS, "plate", "bin", "drawer", "button")
_STREAM = 50


def sample_plan(
    split: str,
    seed: int,
    *,
    kinds: Sequence[str] | None = None,
    num_distractors: int | None = None,
    novel: Collection[str] = (),
) -> TablePlan:
    """The table-top of a split and a seed.

    `kinds`: what stands there, each a kind ("cube", "plate", "drawer") or a name ("red cube", "wooden bin",
    "open drawer"); default a random choice. `num_distractors` (default 0 with `kinds`, else 0 to 2) adds
    loose objects. `novel`, of `NOVELTIES` and only in the test split: what training never has.
    Raises ValueError for what it does not know, and where so many things do not fit.
    """
    strange = sorted(set(novel) - set(NOVELTIES))
    if strange or (novel and split != "test"):
        raise ValueError(
            f"novel={sorted(novel)} with split={split!r}; "
            f"expected some of {', '.join(NOVELTIES)}, for the test split"
        )
    for attempt in range(50):
        rng = generator(split, seed, _STREAM, attempt)
        chosen = _random_kinds(rng) if kinds is None else tuple(kinds)
        extra = num_distractors if num_distractors is not None else (0 if kinds else int(rng.integers(0, 3)))
        draft = _draft(rng, chosen, extra, pairs="pairs" in novel)
        layouts = HELD_OUT_LAYOUTS if "layout" in novel else LAYOUTS
        try:
            places = find_places(draft, rng, layout=str(rng.choice(layouts)))
        except NoPlaceError:
            continue
        return TablePlan(
            objects=places.objects,
            furniture=places.furniture,
            look=sample_look(rng, novel="background" in novel),
            camera=sample_camera(rng, novel="camera" in novel),
            origin={"split": split, "seed": seed, "novel": sorted(novel)},
        )
    raise ValueError(
        f"{len(chosen)} things and {extra} distractors found no places on the table; ask for fewer"
    )


def _random_kinds(rng: np.random.Generator) -> tuple[str, ...]:
    objects = [str(kind) for kind in rng.choice(OBJECT_KINDS, size=int(rng.integers(1, 5)))]
    furniture = [
        kind for kind, share in (("plate", 0.45), ("bin", 0.35), ("button", 0.2)) if rng.random() < share
    ]
    if len(furniture) < 2 and rng.random() < 0.3:
        furniture.append("drawer" if rng.random() < 0.6 else "open drawer")
    return (*objects, *furniture)


def _draft(rng: np.random.Generator, kinds: Sequence[str], num_distractors: int, *, pairs: bool) -> Draft:
    """Names for kinds, every colour once: named things keep theirs."""
    named = {item.split()[0] for item in kinds if " " in item}
    free = [str(colour) for colour in rng.permutation([c for c in OBJECT_COLOURS if c not in named])]
    movables: list[str] = []
    holders: list[str] = []
    drawer: str | None = None
    button = False
    for item in (*kinds, *(str(rng.choice(OBJECT_KINDS)) for _ in range(num_distractors))):
        *colours, kind = item.split()
        if kind not in KINDS:
            raise ValueError(f"{item!r} is no thing of the table-top; expected one of {', '.join(KINDS)}")
        if kind == "drawer":
            drawer = "open" if colours == ["open"] else "closed"
        elif kind == "button":
            button = True
        elif kind in OBJECT_KINDS:
            movables.append(item if colours else f"{_take(free, kind, pairs=pairs)} {kind}")
            pairs = pairs and bool(colours)
        else:
            wooden = kind == "bin" and not colours and "wooden bin" not in kinds and rng.random() < 0.5
            colour = next(iter(BIN_LOOKS)) if wooden else _take(free, kind, pairs=False)
            holders.append(item if colours else f"{colour} {kind}")
    return Draft(
        movables=tuple(movables), holders=tuple(holders), drawer=drawer, button=button, oracle=(), goal=()
    )


def _take(free: list[str], kind: str, *, pairs: bool) -> str:
    """The next colour for a kind; `pairs`: one that training never gives it (else never such a one)."""
    for colour in free:
        if ((colour, kind) in HELD_OUT_TABLE_PAIRS) == pairs:
            free.remove(colour)
            return colour
    raise ValueError(f"no colour is left for one more {kind}; ask for fewer things")
