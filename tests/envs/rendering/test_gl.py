"""OpenGL beside other libraries in one process; what it draws is in test_render.py."""

from __future__ import annotations

import importlib.util
import subprocess
import sys

import pytest

from emuworld.envs.render import probe_gl

DRAW_THEN_LOAD = """
import mujoco, numpy as np
from emuworld.envs.rendering.camera import Camera
from emuworld.envs.render import make_renderer
model = mujoco.MjModel.from_xml_string("<mujoco><worldbody><geom size='1'/></worldbody></mujoco>")
data = mujoco.MjData(model)
mujoco.mj_forward(model, data)
camera = Camera(position=np.array([0.0, 0.0, 3.0]), rotation=np.eye(3), fovy_rad=1.0)
renderer = make_renderer("gl")
frame = renderer.render(model, data, camera, height=32, width=32)
import triton  # as the first torch.optim.Adam does
assert np.array_equal(frame, renderer.render(model, data, camera, height=32, width=32))
print("loaded")
"""


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
@pytest.mark.skipif(probe_gl() is None, reason="no OpenGL works on this machine")
def test_an_optimizer_can_be_made_after_a_frame_was_drawn() -> None:
    """Mesa's LLVM and Triton's do not get along when Mesa's comes first: the process crashed here."""
    command = [sys.executable, "-c", DRAW_THEN_LOAD]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0 and done.stdout.strip() == "loaded", done.stderr[-1000:]
