"""Figures that compare frames, and the intervals that go with them: numpy only, no model and no simulator.

Frames are uint8 [H, W, 3]; masks are bool [H, W] with True = this pixel counts. A figure over a mask that
holds fewer than `MIN_MASK_PX` pixels is NaN, and every mean skips NaN, so an empty mask never turns into a
number.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

Frame = NDArray[np.uint8]  # [H, W, 3]
Mask = NDArray[np.bool_]  # [H, W], True = counts
Floats = NDArray[np.float64]

MIN_MASK_PX = 64
BLOCK_PX = 16  # of a visual token
_SAME_GREY = 6  # levels of 256: nearer than this two pixels of the simulator show the same
# Variance of the rounding to 8 bits (uniform over one step). Two equal frames count as this far apart, 58.9
# dB, so that a mean over frames stays finite when some of them are equal.
ROUNDING_MSE = 1.0 / 12.0
Z_95 = 1.959963984540054  # two-sided 95 % point of the normal distribution

_SSIM_RADIUS = 5  # 11 x 11 window, sigma 1.5, K1 0.01, K2 0.03: Wang et al. 2004, section III-B
_SSIM_SIGMA = 1.5
_SSIM_C1 = (0.01 * 255.0) ** 2
_SSIM_C2 = (0.03 * 255.0) ** 2


class CameraLike(Protocol):
    """What the masks need of a camera: position [3], rotation [3, 3] (columns: x right, y up, z backward),
    field of view.
    """

    @property
    def position(self) -> NDArray[np.floating]: ...
    @property
    def rotation(self) -> NDArray[np.floating]: ...
    @property
    def fovy_rad(self) -> float: ...


# Frames ---------------------------------------------------------------------------------------------------


def mse(frame: Frame, reference: Frame, *, mask: Mask | None = None) -> float:
    """Mean squared difference in grey levels squared, over all pixels or those of `mask`; NaN for an empty
    mask.
    """
    _check_pair(frame, reference, mask)
    squared = _squares(frame, reference, np.float32) / np.float32(3.0)
    if mask is None:
        return float(squared.mean(dtype=np.float64))
    return float(squared[mask].mean(dtype=np.float64)) if mask.sum() >= MIN_MASK_PX else float("nan")


def squared_error(frame: NDArray[np.uint8] | Floats, reference: Frame) -> Floats:
    """Squared difference of each pixel [H, W] in grey levels squared, averaged over its channels."""
    exact = np.float32 if frame.dtype == np.uint8 else np.float64  # squares of grey levels: whole numbers
    squared: Floats = _squares(frame, reference, exact).astype(np.float64) / 3.0
    return squared


def _squares(frame: NDArray[Any], reference: Frame, dtype: type[np.floating]) -> NDArray[Any]:
    """Squared differences [H, W] summed over the channels, in place: GRPO asks for hundreds a step. (numpy's
    own sum over an axis of three takes twenty times as long.)
    """
    apart = frame.astype(dtype)
    apart -= reference
    apart *= apart
    return apart[..., 0] + apart[..., 1] + apart[..., 2]


def block_means(values: Floats) -> Floats:
    """Means of the blocks of `BLOCK_PX` x `BLOCK_PX` pixels of [H, W]; what does not fill one is left out."""
    height, width = (side // BLOCK_PX for side in values.shape)
    whole = values[: height * BLOCK_PX, : width * BLOCK_PX]
    means: Floats = whole.reshape(height, BLOCK_PX, width, BLOCK_PX).mean((1, 3))
    return means


def differ(frame: Frame, other: Frame) -> Mask:
    """Pixels at which two pictures of the simulator show different things."""
    apart = np.abs(frame.astype(np.int16) - other) > _SAME_GREY
    mask: Mask = apart[..., 0] | apart[..., 1] | apart[..., 2]
    return mask


def psnr(frame: Frame, reference: Frame, *, mask: Mask | None = None) -> float:
    """Peak signal-to-noise ratio in dB, at most 58.9 (see ROUNDING_MSE); NaN for an empty mask."""
    return psnr_from_mse(mse(frame, reference, mask=mask))


def psnr_from_mse(value: float) -> float:
    """10 log10(255^2 / MSE) in dB, with the rounding error of 8 bits as the smallest MSE."""
    return 10.0 * float(np.log10(255.0**2 / np.maximum(value, ROUNDING_MSE)))


def ssim_map(frame: Frame, reference: Frame) -> NDArray[np.float32]:
    """Structural similarity per pixel, averaged over the three channels: [H, W], edges mirrored."""
    _check_pair(frame, reference, None)
    x, y = frame.astype(np.float32), reference.astype(np.float32)
    mean_x, mean_y = _blur(x), _blur(y)
    # Filtered squares minus squared means are the windows' variances; the small negative ones are rounding.
    var_x = np.maximum(_blur(x * x) - mean_x * mean_x, 0.0)
    var_y = np.maximum(_blur(y * y) - mean_y * mean_y, 0.0)
    covariance = _blur(x * y) - mean_x * mean_y
    top = (2.0 * mean_x * mean_y + _SSIM_C1) * (2.0 * covariance + _SSIM_C2)
    bottom = (mean_x**2 + mean_y**2 + _SSIM_C1) * (var_x + var_y + _SSIM_C2)
    similarity: NDArray[np.float32] = (top / bottom).mean(axis=-1)
    return similarity


def ssim(frame: Frame, reference: Frame, *, mask: Mask | None = None) -> float:
    """Mean of `ssim_map` over the windows that lie wholly inside the frame, and inside `mask` where given."""
    similarity = ssim_map(frame, reference)
    return mean_inside(similarity, mask=mask)


def mean_inside(similarity: NDArray[np.float32], *, mask: Mask | None = None) -> float:
    """Mean of an SSIM map without its mirrored border; NaN for an empty mask."""
    inside = (slice(_SSIM_RADIUS, -_SSIM_RADIUS),) * 2
    if mask is None:
        return float(similarity[inside].mean(dtype=np.float64))
    chosen = similarity[inside][mask[inside]]
    return float(chosen.mean(dtype=np.float64)) if chosen.size >= MIN_MASK_PX else float("nan")


def _blur(image: NDArray[np.float32]) -> NDArray[np.float32]:
    """The 11 x 11 Gaussian window as two passes of 11 taps, edges mirrored: [H, W, 3] -> [H, W, 3]."""
    offsets = np.arange(-_SSIM_RADIUS, _SSIM_RADIUS + 1)
    taps = np.exp(-0.5 * (offsets / _SSIM_SIGMA) ** 2)
    taps = (taps / taps.sum()).astype(np.float32)
    for axis in (0, 1):
        length = image.shape[axis]
        pad = [(0, 0)] * image.ndim
        pad[axis] = (_SSIM_RADIUS, _SSIM_RADIUS)
        padded = np.pad(image, pad, mode="symmetric")
        blurred = np.zeros_like(image)
        for tap, start in zip(taps, range(2 * _SSIM_RADIUS + 1), strict=True):
            window = padded[start : start + length] if axis == 0 else padded[:, start : start + length]
            blurred += tap * window
        image = blurred
    return image


def _check_pair(frame: Frame, reference: Frame, mask: Mask | None) -> None:
    if (
        frame.shape != reference.shape
        or frame.ndim != 3
        or frame.dtype != np.uint8
        or reference.dtype != np.uint8
    ):
        raise ValueError(
            f"expected two uint8 frames [H, W, 3] of one size, got {frame.dtype} {frame.shape} and "
            f"{reference.dtype} {reference.shape}; render both at the same height and width"
        )
    if mask is not None and (mask.shape != frame.shape[:2] or mask.dtype != np.bool_):
        raise ValueError(
            f"expected a bool mask {frame.shape[:2]} (True = counts), got {mask.dtype} {mask.shape}"
        )


# What was in view before ----------------------------------------------------------------------------------


def seen_before_mask(
    depth: NDArray[np.floating],
    camera: CameraLike,
    earlier: Sequence[tuple[NDArray[np.floating], CameraLike]],
    *,
    tolerance_m: float = 0.03,
    relative_tolerance: float = 0.02,
) -> Mask:
    """True = the surface point under this pixel was visible in at least one earlier frame of the same still
    scene.

    `depth` [H, W] in metres along the optical axis, inf where nothing was hit (never counts as seen). Each
    pixel is lifted into the world, projected into the earlier cameras and compared with the nearest of the
    four earlier depths around it; points within `tolerance_m + relative_tolerance * depth` are the same
    surface. The relative part covers floors seen at a low angle, where the depth changes by centimetres
    from pixel to pixel.
    """
    points = unproject(depth, camera)  # [H, W, 3]
    open_points = np.argwhere(np.isfinite(depth))  # [P, 2] row and column of what is not yet known as seen
    seen = np.zeros(depth.shape, dtype=np.bool_)
    for earlier_depth, earlier_camera in reversed(earlier):  # the latest frame has most of it
        height, width = earlier_depth.shape
        at = points[open_points[:, 0], open_points[:, 1]]
        row, column, distance = project(at, earlier_camera, height=height, width=width)
        error = _nearest_depth_error(earlier_depth, row, column, distance)
        hit = error <= tolerance_m + relative_tolerance * np.nan_to_num(distance)
        seen[open_points[hit, 0], open_points[hit, 1]] = True
        open_points = open_points[~hit]
    return seen


def unproject(depth: NDArray[np.floating], camera: CameraLike) -> Floats:
    """World coordinates [H, W, 3] in metres of the points that a camera sees at `depth` [H, W]; NaN at
    infinite depth.
    """
    height, width = depth.shape
    half = np.tan(camera.fovy_rad / 2.0)
    right = ((np.arange(width) + 0.5) * 2.0 / width - 1.0) * half * width / height
    up = (1.0 - (np.arange(height) + 0.5) * 2.0 / height) * half
    finite = np.where(np.isfinite(depth), depth, np.nan).astype(np.float64)
    in_camera = np.stack([right[None, :] * finite, up[:, None] * finite, -finite], axis=-1)
    points: Floats = in_camera @ np.asarray(camera.rotation, dtype=np.float64).T + np.asarray(
        camera.position, dtype=np.float64
    )
    return points


def project(points: Floats, camera: CameraLike, *, height: int, width: int) -> tuple[Floats, Floats, Floats]:
    """Row and column (pixel centres at integers) and depth in metres of world points [..., 3]; NaN behind
    the camera.
    """
    in_camera = (points - np.asarray(camera.position, dtype=np.float64)) @ np.asarray(
        camera.rotation, dtype=np.float64
    )
    distance = np.where(in_camera[..., 2] < -1e-6, -in_camera[..., 2], np.nan)
    scale = height / (2.0 * np.tan(camera.fovy_rad / 2.0)) / distance
    column = in_camera[..., 0] * scale + width / 2.0 - 0.5
    row = -in_camera[..., 1] * scale + height / 2.0 - 0.5
    return row, column, distance


def _nearest_depth_error(
    depth: NDArray[np.floating], row: Floats, column: Floats, distance: Floats
) -> Floats:
    """Smallest |depth - distance| over the four pixels around (row, column); inf outside the frame."""
    height, width = depth.shape
    inside = (row >= -0.5) & (row <= height - 0.5) & (column >= -0.5) & (column <= width - 0.5)
    top = np.floor(np.where(inside, row, 0.0)).astype(np.int64)
    left = np.floor(np.where(inside, column, 0.0)).astype(np.int64)
    error = np.full(row.shape, np.inf)
    for down in (0, 1):
        for right in (0, 1):
            there = depth[np.clip(top + down, 0, height - 1), np.clip(left + right, 0, width - 1)]
            error = np.fmin(error, np.abs(there - distance))
    return np.where(inside, error, np.inf)


# Does the world follow the command? -----------------------------------------------------------------------


def counterfactual_retrieval(imagined: Sequence[Frame], true: Sequence[Frame]) -> float:
    """Share of branches whose imagined frame is nearer (MSE) to its own true frame than to those of the
    others.

    CAF = 1/m sum_i [argmin_j d(imagined_i, true_j) = i], chance 1/m; a tie with another branch counts as a
    miss.
    """
    if len(imagined) != len(true) or len(true) < 2:
        raise ValueError(
            f"expected as many imagined as true frames, at least two, got {len(imagined)} and {len(true)}"
        )
    hits = 0
    for index, frame in enumerate(imagined):
        distances = [mse(frame, reference) for reference in true]
        hits += all(distances[index] < other for j, other in enumerate(distances) if j != index)
    return hits / len(true)


def shuffle_gap_db(
    under_true_commands: Sequence[Frame], under_other_commands: Sequence[Frame], true: Sequence[Frame]
) -> Floats:
    """Per step, by how many dB the frames under the true commands are nearer to the truth than those under
    others.
    """
    pairs = zip(under_true_commands, under_other_commands, true, strict=True)
    return np.array([psnr(right, truth) - psnr(wrong, truth) for right, wrong, truth in pairs])


# Intervals ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A figure with its 95 % interval; `count` is the number of independent units (episodes, prompts)
    behind it.
    """

    value: float
    low: float
    high: float
    count: int

    def as_dict(self) -> dict[str, float | int | None]:
        """For JSON, which has no NaN: unknown numbers become None."""
        numbers = {"value": self.value, "low": self.low, "high": self.high}
        return {name: float(v) if np.isfinite(v) else None for name, v in numbers.items()} | {
            "count": self.count
        }

    @staticmethod
    def from_dict(stored: dict[str, float | int | None]) -> "Estimate":
        """The reverse of `as_dict`."""
        value, low, high = (
            np.nan if stored[key] is None else float(stored[key] or 0.0) for key in ("value", "low", "high")
        )
        return Estimate(value=value, low=low, high=high, count=int(stored["count"] or 0))


def wilson(successes: int, trials: int) -> Estimate:
    """A rate with Wilson's score interval (Wilson 1927), which stays inside [0, 1] and is honest at 0 and
    100 %.
    """
    if not 0 <= successes <= trials:
        raise ValueError(f"expected 0 <= successes <= trials, got {successes} of {trials}")
    if trials == 0:
        return Estimate(value=np.nan, low=0.0, high=1.0, count=0)
    rate, z2 = successes / trials, Z_95**2
    centre = (rate + z2 / (2 * trials)) / (1 + z2 / trials)
    half = Z_95 * np.sqrt(rate * (1 - rate) / trials + z2 / (4 * trials**2)) / (1 + z2 / trials)
    return Estimate(value=rate, low=max(0.0, centre - half), high=min(1.0, centre + half), count=trials)


def bootstrap(
    values: Sequence[float] | Floats,
    *,
    weights: Sequence[float] | Floats | None = None,
    seed: int = 0,
    resamples: int = 2000,
) -> Estimate:
    """Mean over episodes with a percentile bootstrap interval over episodes; NaN values are left out.

    With `weights` the figure is the ratio sum(values) / sum(weights), both per episode: a rate of events
    that come in clusters (several sightings in one walk), where resampling whole episodes keeps what is
    dependent together. For a paired comparison give the differences of the two sides, episode by episode.
    """
    top = np.asarray(values, dtype=np.float64)
    bottom = np.ones_like(top) if weights is None else np.asarray(weights, dtype=np.float64)
    known = np.isfinite(top) & np.isfinite(bottom)
    top, bottom = top[known], bottom[known]
    if top.size == 0 or bottom.sum() == 0:
        return Estimate(value=np.nan, low=np.nan, high=np.nan, count=0)
    means = _resampled_means(top, bottom, rng=np.random.default_rng(seed), resamples=resamples)
    low, high = np.quantile(means[np.isfinite(means)], [0.025, 0.975])
    return Estimate(
        value=float(top.sum() / bottom.sum()), low=float(low), high=float(high), count=int(top.size)
    )


def bootstrap_of_groups(groups: Sequence[Floats], *, seed: int = 0, resamples: int = 2000) -> Estimate:
    """Mean of the groups' means, each group counting alike, with a percentile bootstrap interval: episodes
    are resampled inside their group. `count` is that of all episodes. For one value or more in each group.
    """
    rng = np.random.default_rng(seed)
    means = [_resampled_means(one, np.ones_like(one), rng=rng, resamples=resamples) for one in groups]
    low, high = np.quantile(np.mean(means, axis=0), [0.025, 0.975])
    return Estimate(
        value=float(np.mean([one.mean() for one in groups])),
        low=float(low),
        high=float(high),
        count=sum(one.size for one in groups),
    )


def _resampled_means(top: Floats, bottom: Floats, *, rng: np.random.Generator, resamples: int) -> Floats:
    """sum(top) / sum(bottom) of episodes drawn anew, [resamples]; NaN where the weights drawn are all 0."""
    draws = rng.multinomial(top.size, np.full(top.size, 1.0 / top.size), size=resamples)
    totals = draws @ bottom
    means: Floats = (draws @ top) / np.where(totals > 0, totals, np.nan)
    return means


def by_step(
    episodes: Sequence[Sequence[float | None]], *, estimate: Callable[[Floats], Estimate] = bootstrap
) -> list[Estimate]:
    """One estimate per step from one list of per-step values per episode (None = unknown)."""
    if not episodes:
        return []
    table = np.array(
        [[np.nan if value is None else value for value in row] for row in episodes], dtype=np.float64
    )
    return [estimate(table[:, step]) for step in range(table.shape[1])]
