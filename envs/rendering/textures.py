"""MuJoCo's textures for the ray renderer: mipmap pyramids and the sampling rules of OpenGL's fixed pipeline.

Trilinear, as the classic renderer sets it up (GL_LINEAR_MIPMAP_LINEAR, repeat for 2D textures, clamp for
cubes), without anisotropy. Coordinates and cube faces follow the OpenGL 2.1 specification, sections 3.8.6 to
3.8.8.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass

import mujoco
import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Integers = NDArray[np.int64] | np.int64

# Cube faces +x -x +y -y +z -z: which coordinate is s, t and the major axis, and the signs of s and t.
_S_AXIS = np.array([2, 2, 0, 0, 0, 0])
_T_AXIS = np.array([1, 1, 2, 2, 1, 1])
_S_SIGN = np.array([-1, 1, 1, 1, 1, -1], np.float32)
_T_SIGN = np.array([-1, -1, 1, -1, -1, -1], np.float32)


@dataclass(frozen=True, kw_only=True)
class Texture:
    """One texture as a pyramid. `texels` holds all faces and levels, rows of RGB in 0..1."""

    texels: Floats  # [sum over faces and levels, 3]
    offsets: NDArray[np.int64]  # [faces, levels] first row of texels
    widths: NDArray[np.int64]  # [levels]
    heights: NDArray[np.int64]  # [levels]
    repeat: bool

    @property
    def is_cube(self) -> bool:
        return not self.repeat

    def sample(self, face: NDArray[np.int64] | None, st: Floats, lod: Floats) -> Floats:
        """Colours [n, 3] at texture coordinates st [n, 2] and levels of detail [n] (0 = one texel a pixel).

        face [n] is the side of a cube; None for a 2D texture.
        """
        top = len(self.widths) - 1
        minified = np.flatnonzero(lod > 0)
        if not top or not len(minified):
            return self._bilinear(face, st, None)
        lod = np.clip(lod, 0.0, top)
        fine = lod.astype(np.int64)
        colour = self._bilinear(face, st, fine)
        coarse = np.minimum(fine[minified] + 1, top)
        coarser = self._bilinear(None if face is None else face[minified], st[minified], coarse)
        blend = (lod[minified] - fine[minified])[:, None]
        colour[minified] += blend * (coarser - colour[minified])
        return colour

    def _bilinear(
        self, face: NDArray[np.int64] | None, st: Floats, level: NDArray[np.int64] | None
    ) -> Floats:
        width, height, first = self._place(face, level)
        x, y = st[:, 0] * width - 0.5, st[:, 1] * height - 0.5
        left, upper = np.floor(x), np.floor(y)
        across, down = (x - left).astype(np.float32)[:, None], (y - upper).astype(np.float32)[:, None]
        x0, y0 = left.astype(np.int64), upper.astype(np.int64)
        x1, y1 = x0 + 1, y0 + 1
        if self.repeat:
            x0, x1, y0, y1 = x0 % width, x1 % width, y0 % height, y1 % height
        else:
            right, bottom = width - 1, height - 1
            x0, x1 = np.clip(x0, 0, right), np.clip(x1, 0, right)
            y0, y1 = np.clip(y0, 0, bottom), np.clip(y1, 0, bottom)
        row0, row1 = first + y0 * width, first + y1 * width
        take = self.texels.take
        above, below = take(row0 + x0, axis=0, mode="clip"), take(row1 + x0, axis=0, mode="clip")
        above += across * (take(row0 + x1, axis=0, mode="clip") - above)
        below += across * (take(row1 + x1, axis=0, mode="clip") - below)
        below -= above
        below *= down
        above += below
        return above

    def _place(
        self, face: NDArray[np.int64] | None, level: NDArray[np.int64] | None
    ) -> tuple[Integers, Integers, Integers]:
        """Width, height and first row of texels of each point's level; scalars where points share them."""
        if level is None:
            offsets = self.offsets[:, 0]
            return self.widths[0], self.heights[0], offsets[0] if face is None else offsets[face]
        if face is None:
            return self.widths[level], self.heights[level], self.offsets[0, level]
        return self.widths[level], self.heights[level], self.offsets[face, level]

    def at_plane(self, st: Floats, st_dx: Floats, st_dy: Floats) -> Floats:
        """Colours [n, 3] of a 2D texture at st [n, 2], whose changes to the next pixels are given."""
        size = np.array([self.widths[0], self.heights[0]], np.float32)
        return self.sample(None, st, _level_of_detail(st_dx * size, st_dy * size))

    def in_direction(self, direction: Floats, dx: Floats, dy: Floats) -> Floats:
        """Colours [n, 3] of a cube texture in directions [n, 3], whose change to the next pixel is given."""
        axis = np.argmax(np.abs(direction), axis=1)
        rows = np.arange(len(direction))
        major = direction[rows, axis]
        face = 2 * axis + (major < 0)
        s_axis, t_axis = _S_AXIS[face], _T_AXIS[face]
        s_sign, t_sign = _S_SIGN[face], _T_SIGN[face]
        scale = 1.0 / np.maximum(np.abs(major), 1e-12)
        s, t = s_sign * direction[rows, s_axis] * scale, t_sign * direction[rows, t_axis] * scale
        half_px = 0.5 * float(self.widths[0])
        slopes = []
        for change in (dx, dy):
            change = np.broadcast_to(change, direction.shape)
            shrink = np.sign(major) * change[rows, axis]
            ds = (s_sign * change[rows, s_axis] - s * shrink) * scale
            dt = (t_sign * change[rows, t_axis] - t * shrink) * scale
            slopes.append((np.stack([ds, dt], axis=1) * half_px).astype(np.float32))
        st = np.stack([s, t], axis=1) * 0.5 + 0.5
        return self.sample(face, st.astype(np.float32), _level_of_detail(*slopes))


def _level_of_detail(dx: Floats, dy: Floats) -> Floats:
    """log2 of the longer side of a pixel's footprint, in texels."""
    longest = np.maximum(np.einsum("ij,ij->i", dx, dx), np.einsum("ij,ij->i", dy, dy))
    return (0.5 * np.log2(np.maximum(longest, 1e-12))).astype(np.float32)


def _pyramid(image: Floats) -> list[Floats]:
    """The image and its halvings down to one texel, by 2 by 2 means as glGenerateMipmap makes them."""
    levels = [image]
    while max(levels[-1].shape[:2]) > 1:
        last = levels[-1]
        height, width = last.shape[:2]
        even = last[: height - height % 2 or 1, : width - width % 2 or 1]
        if height > 1:
            even = 0.5 * (even[0::2] + even[1::2])
        if width > 1:
            even = 0.5 * (even[:, 0::2] + even[:, 1::2])
        levels.append(even.astype(np.float32))
    return levels


def _decode(pixels: NDArray[np.uint8], *, srgb: bool) -> Floats:
    values = np.arange(256, dtype=np.float64) / 255.0
    if srgb:
        values = np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)
    return values.astype(np.float32)[pixels[..., :3]]


def _build(model: mujoco.MjModel, index: int) -> Texture:
    height, width = int(model.tex_height[index]), int(model.tex_width[index])
    channels, start = int(model.tex_nchannel[index]), int(model.tex_adr[index])
    flat = bool(model.tex_type[index] == int(mujoco.mjtTexture.mjTEXTURE_2D))
    pixels = model.tex_data[start : start + height * width * channels].reshape(-1, width, channels)
    srgb = flat and int(model.tex_colorspace[index]) == int(mujoco.mjtColorSpace.mjCOLORSPACE_SRGB)
    faces = [pixels] if flat or height == width else list(pixels.reshape(6, width, width, channels))
    pyramids = [_pyramid(_decode(face, srgb=srgb)) for face in faces]
    sizes = np.array([level.shape[0] * level.shape[1] for level in pyramids[0]])
    starts = np.concatenate([[0], np.cumsum(sizes)[:-1]])
    offsets = starts[None] + np.arange(len(faces))[:, None] * sizes.sum()
    return Texture(
        texels=np.concatenate([level.reshape(-1, 3) for pyramid in pyramids for level in pyramid]),
        offsets=np.repeat(offsets, 6, axis=0) if not flat and len(faces) == 1 else offsets,
        widths=np.array([level.shape[1] for level in pyramids[0]]),
        heights=np.array([level.shape[0] for level in pyramids[0]]),
        repeat=flat,
    )


class TextureCache:
    """Pyramids by texture content, so that models built from one asset list share them."""

    def __init__(self) -> None:
        self._of_model: weakref.WeakKeyDictionary[mujoco.MjModel, dict[int, Texture]] = (
            weakref.WeakKeyDictionary()
        )
        self._by_content: dict[tuple[object, ...], Texture] = {}

    def get(self, model: mujoco.MjModel, index: int) -> Texture:
        """Texture `index` of a model. A texture must not be edited in place once it was drawn."""
        mine = self._of_model.setdefault(model, {})
        if index not in mine:
            mine[index] = self._find(model, index)
        return mine[index]

    def _find(self, model: mujoco.MjModel, index: int) -> Texture:
        shape = (int(model.tex_height[index]), int(model.tex_width[index]), int(model.tex_nchannel[index]))
        start = int(model.tex_adr[index])
        content = model.tex_data[start : start + int(np.prod(shape))].tobytes()
        key = (shape, int(model.tex_type[index]), int(model.tex_colorspace[index]), content)
        if key not in self._by_content:
            if len(self._by_content) >= 256:  # a process that makes new textures all the time must not grow
                self._by_content.clear()
            self._by_content[key] = _build(model, index)
        return self._by_content[key]
