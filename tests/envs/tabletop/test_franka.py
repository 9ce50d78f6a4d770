"""The Franka option: found without an import, clear where it is missing, the same robot in all else.

Most of it runs on tetrahedra in place of the meshes, so that it needs no package; where gymnasium-robotics is
installed, its own meshes are put on and a subtask is carried out with them.
"""

from __future__ import annotations

import importlib.util
import struct
import sys
from pathlib import Path

import gymnasium
import mujoco
import numpy as np
import pytest

from emuworld.envs.render import RayRenderer
from emuworld.envs.tabletop import franka
from emuworld.envs.tabletop.layout import TablePlan
from emuworld.envs.tabletop.orders import task_of_prompt
from emuworld.envs.tabletop.robot import HOME_RAD
from emuworld.envs.tabletop.scene import TableScene

TASK = task_of_prompt("put the red cube on the blue plate", "train", 2)
IS_INSTALLED = importlib.util.find_spec(franka.PACKAGE) is not None


def write_tetrahedron(path: Path, size_m: float) -> None:
    """A binary STL of four faces."""
    corners = size_m * np.array([[1, 1, 1], [1, -1, -1], [-1, 1, -1], [-1, -1, 1]], np.float32)
    faces = [corners[[a, b, c]] for a, b, c in ((0, 1, 2), (0, 3, 1), (0, 2, 3), (1, 3, 2))]
    records = [np.zeros(3, np.float32).tobytes() + face.tobytes() + b"\0\0" for face in faces]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(bytes(80) + struct.pack("<I", 4) + b"".join(records))


@pytest.fixture
def meshes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package of that name with small meshes; importing it fails, as the true one does on MuJoCo 4."""
    package = tmp_path / franka.PACKAGE
    for link in franka._LINKS:
        for kind in ("visual", "collision"):
            write_tetrahedron(package / franka._MESHES / kind / f"{link}.stl", 0.03)
    (package / "__init__.py").write_text("raise AssertionError('imported')")
    monkeypatch.delitem(sys.modules, franka.PACKAGE, raising=False)
    monkeypatch.syspath_prepend(str(tmp_path))
    importlib.invalidate_caches()
    return package


def test_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for build in (
        lambda: TableScene.from_dict({**TASK.scene, "arm": "franka"}),
        lambda: gymnasium.make("EmuWorld/VLASim-v0", arm="franka"),
    ):
        with pytest.raises(ValueError, match=r"gymnasium-robotics.*not installed.*pip install"):
            build()
    with pytest.raises(ValueError, match="primitive, franka"):
        TablePlan(arm="stanford")


def test_a_package_without_its_meshes_is_named(meshes: Path) -> None:
    (meshes / franka._MESHES / "visual" / "link3.stl").unlink()
    with pytest.raises(ValueError, match=r"link3\.stl"):
        franka.mesh_folder()


def test_meshes_stand_in_the_frames_of_the_links(meshes: Path) -> None:
    plain = TableScene.from_dict(TASK.scene)
    scene = TableScene.from_dict({**TASK.scene, "arm": "franka"})
    for link in franka._LINKS:
        body = "robot/hand" if link == "hand" else "world" if link == "link0" else f"robot/{link}"
        for kind in ("visual", "collision"):
            geom = scene.data.geom(f"robot/{kind}/{link}")  # a tetrahedron's middle is its frame's origin
            assert np.allclose(geom.xpos, plain.data.body(body).xpos, atol=1e-5)
    drawn = scene.model.geom("robot/visual/link3")
    assert drawn.contype == 0 and drawn.group[0] == 1
    assert scene.model.geom("robot/collision/link3").group[0] == 3
    assert scene.model.nq == plain.model.nq and scene.model.nu == plain.model.nu


def test_a_plan_keeps_its_arm_and_the_default_stays_out(meshes: Path) -> None:
    spec = {**TASK.scene, "arm": "franka"}
    scene = TableScene.from_dict(spec)
    assert scene.to_dict()["arm"] == "franka" and TableScene.from_dict(scene.to_dict()).plan == scene.plan
    plain = TableScene.from_dict(TASK.scene)
    assert "arm" not in plain.to_dict() and plain.scene_hash() != scene.scene_hash()


def test_the_environment_takes_it_and_its_state_keeps_it(meshes: Path) -> None:
    env = gymnasium.make("EmuWorld/VLASim-v0", arm="franka", size=64, renderer="rays").unwrapped
    env.reset(seed=0, options={"task": TASK})
    env.step("put the red cube on the blue plate")
    assert env._info["success"]
    other = gymnasium.make("EmuWorld/VLASim-v0", size=64, renderer="rays").unwrapped
    frame, _ = other.reset(options={"state": env.save_state()})
    assert other.scene.plan.arm == "franka" and np.array_equal(frame, env._observation())


@pytest.mark.skipif(not IS_INSTALLED, reason="gymnasium-robotics is not installed")
def test_the_true_meshes_work() -> None:
    scene = TableScene.from_dict({**TASK.scene, "arm": "franka"})
    camera = scene.camera()
    ids = RayRenderer().segmentation(scene.model, scene.data, camera, height=128, width=128)
    kinds = {scene.model.geom(int(one)).name for one in np.unique(ids[ids >= 0])}
    assert {"robot/visual/link0", "robot/visual/link1"} <= kinds
    assert not any("collision" in kind for kind in kinds)
    assert scene.execute(TASK.oracle[0]).done and all(scene.holds(goal) for goal in TASK.goal)
    at_rest = np.abs(scene.data.qpos[[scene.model.joint(f"robot/joint{n}").qposadr[0] for n in range(1, 8)]])
    assert np.allclose(at_rest, np.abs(HOME_RAD), atol=0.02)
    assert mujoco.mj_getTotalmass(scene.model) > 15  # the Panda's links have their own
