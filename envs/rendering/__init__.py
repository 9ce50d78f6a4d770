"""How frames are drawn: OpenGL where a probe finds it, else rays; `emuworld.envs.render` chooses."""
