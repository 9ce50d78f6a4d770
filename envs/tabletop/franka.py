"""The Franka Panda's meshes on the arm of the table-top, by option: nothing of them is in this package.

They are read from the installed package gymnasium-robotics (26 MB; its meshes are Apache-2.0), which is
looked for and never imported: its environments do not load beside MuJoCo 4. The arm's joint frames are the
Panda's already, so the meshes go onto it as they are: visual ones are drawn, the hulls of the collision ones
touch. The fingers stay ours, longer and with a wider stroke than Franka's own, so that skills, suites and
plans mean the same with both looks; a real Panda wears such fingers too.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import mujoco

from emuworld.envs.tabletop.arm_body import Cover, robot_geom
from emuworld.envs.tabletop.layout import ARMS

PACKAGE, INSTALL = "gymnasium_robotics", "uv pip install --no-deps gymnasium-robotics"
_MESHES = Path("envs/assets/kitchen_franka/franka_assets/meshes")
_LINKS = ("link0", "link1", "link2", "link3", "link4", "link5", "link6", "link7", "hand")
# Kilograms, from franka_assets/chain.xml; the base is fixed.
_MASS_KG = (2.91, 2.71, 2.73, 2.04, 2.08, 3.00, 1.32, 0.20, 0.82)
_SHELL, _JOINT = (0.92, 0.93, 0.94, 1.0), (0.80, 0.81, 0.83, 1.0)
_DRAWN, _TOUCHED = 1, 3  # geom groups: renderers draw 0 to 2, rays of the skills look past all but 0


def checked_arm(arm: str) -> str:
    """The arm, if it can be built here; ValueError for an unknown name and for missing meshes."""
    if arm not in ARMS:
        raise ValueError(f"arm={arm!r} is unknown; expected one of {', '.join(ARMS)}")
    if arm == "franka":
        mesh_folder()
    return arm


def mesh_folder() -> Path:
    """The meshes of the installed package; ValueError says what to install."""
    found = importlib.util.find_spec(PACKAGE)
    for place in (found.submodule_search_locations or ()) if found is not None else ():
        folder = Path(place) / _MESHES
        missing = [file for file in _files(folder) if not file.is_file()]
        if not missing:
            return folder
        raise ValueError(f"{PACKAGE} has no {missing[0]}; install its release 1.4.2: {INSTALL}==1.4.2")
    raise ValueError(
        "arm='franka' draws the meshes of the package gymnasium-robotics, which is not installed here; "
        f"install it ({INSTALL}), or take arm='primitive'"
    )


def franka_cover(spec: mujoco.MjSpec) -> Cover:
    """What `add_robot` takes as cover; adds the meshes to the spec."""
    folder = mesh_folder()
    for link in _LINKS:
        for kind in ("visual", "collision"):
            spec.add_mesh(name=f"robot/{kind}/{link}", file=str(folder / kind / f"{link}.stl"))

    def cover(body: mujoco.MjsBody, link: str) -> None:
        name = "link0" if link == "base" else link
        drawn = _add(body, f"visual/{name}")
        drawn.rgba = _JOINT if name in ("link2", "link4", "link6", "hand") else _SHELL
        drawn.contype = drawn.conaffinity = 0
        drawn.group, drawn.mass = _DRAWN, 0.0
        hull = _add(body, f"collision/{name}")
        hull.group, hull.mass = _TOUCHED, _MASS_KG[_LINKS.index(name)]

    return cover


def _add(body: mujoco.MjsBody, mesh: str) -> mujoco.MjsGeom:
    name = f"robot/{mesh}"
    geom = body.add_geom(name=name, type=mujoco.mjtGeom.mjGEOM_MESH, meshname=name)
    robot_geom(geom)
    return geom


def _files(folder: Path) -> list[Path]:
    return [folder / kind / f"{link}.stl" for kind in ("visual", "collision") for link in _LINKS]
