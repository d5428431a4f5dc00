"""A small resolution-free painter: analytic shapes, anti-aliased over one pixel, on the unit square.

Coordinates run from (0, 0) at the top left to (1, 1) at the bottom right. A shape gives a *coverage* in
[0, 1], the share of a pixel that lies within it, computed from a signed distance. There is no supersampling,
and work is restricted to each shape's bounding box: a scene costs a few milliseconds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

Array: TypeAlias = NDArray[np.float32]
Point: TypeAlias = tuple[float, float]


@dataclass(frozen=True)
class Window:
    """A rectangle of pixels: where it lies in the canvas and the coordinates of its pixel centres."""

    rows: slice
    columns: slice
    x: Array  # [1, w]
    y: Array  # [h, 1]
    pixel: float  # side of a pixel in scene units


Texture: TypeAlias = Callable[[Window], Array]
"""Maps a window to colours [3, h, w]."""

Distance: TypeAlias = Callable[[Array, Array], Array]
"""Maps coordinates x [1, w], y [h, 1] to signed distances [h, w] in scene units, negative within."""

Paint: TypeAlias = Array | Texture
"""What a shape is filled with: one colour [3], or a texture."""


@lru_cache(maxsize=16)
def _centres(resolution: int) -> Array:
    centres = (np.arange(resolution, dtype=np.float32) + 0.5) / resolution
    centres.flags.writeable = False
    return centres.astype(np.float32)


def inside(distance: Array, pixel: float) -> Array:
    """Coverage of a shape from its signed distance (negative within), a ramp of one pixel across the edge."""
    return np.clip(0.5 - distance * np.float32(1 / pixel), 0, 1)


def stroke(distance: Array, width: float, pixel: float) -> Array:
    """Coverage of a line of the given width, from the distance to its axis.

    Both edges are filtered, so a line thinner than a pixel keeps its ink: it grows fainter and not wider.
    """
    scaled = distance * np.float32(1 / pixel)
    half = np.float32(0.5 * width / pixel)
    return np.clip(half + 0.5 - scaled, 0, 1) - np.clip(0.5 - half - scaled, 0, 1)


class Canvas:
    """An RGB picture [3, R, R], float32, painted back to front."""

    def __init__(self, resolution: int) -> None:
        self.resolution = resolution
        self.pixel = 1.0 / resolution
        self.rgb: Array = np.zeros((3, resolution, resolution), dtype=np.float32)

    def window(self, left: float = 0, top: float = 0, right: float = 1, bottom: float = 1) -> Window | None:
        """The pixels that a shape with these bounds can touch; None where it is outside the picture."""
        size = self.resolution
        first_x, last_x = max(int(left * size - 1), 0), min(int(right * size + 2), size)
        first_y, last_y = max(int(top * size - 1), 0), min(int(bottom * size + 2), size)
        if first_x >= last_x or first_y >= last_y:
            return None
        columns, rows = slice(first_x, last_x), slice(first_y, last_y)
        centres = _centres(size)
        return Window(rows, columns, centres[None, columns], centres[rows, None], self.pixel)

    def blend(self, window: Window, coverage: Array, paint: Paint) -> None:
        """Lay paint over a window: ``rgb += coverage * (paint - rgb)``."""
        colour = paint(window) if callable(paint) else paint[:, None, None]
        region = self.rgb[:, window.rows, window.columns]
        region += coverage * (colour - region)

    def fill(self, paint: Paint) -> None:
        """Cover the whole picture."""
        window = self.window()
        assert window is not None
        self.blend(window, np.ones((1, 1), dtype=np.float32), paint)

    def rectangle(
        self, left: float, top: float, right: float, bottom: float, paint: Paint, opacity: float = 1.0
    ) -> None:
        """An upright rectangle; its coverage is exact."""
        window = self.window(left, top, right, bottom)
        if window is None:
            return
        half = 0.5 * self.pixel
        across = np.minimum(window.x + half, right) - np.maximum(window.x - half, left)
        down = np.minimum(window.y + half, bottom) - np.maximum(window.y - half, top)
        scale = np.float32(1 / self.pixel)
        coverage = np.clip(across * scale, 0, 1) * np.clip(down * scale, 0, 1)
        self.blend(window, coverage * np.float32(opacity), paint)

    def ellipse(
        self,
        centre: Point,
        radii: Point,
        paint: Paint,
        *,
        angle: float = 0.0,
        opacity: float = 1.0,
        outline: float = 0.0,
    ) -> None:
        """An ellipse turned by ``angle`` (radians, clockwise on screen), or its outline of that width."""
        reach = max(radii) + outline if angle else 0.0
        reach_x, reach_y = (reach, reach) if angle else (radii[0] + outline, radii[1] + outline)
        window = self.window(
            centre[0] - reach_x, centre[1] - reach_y, centre[0] + reach_x, centre[1] + reach_y
        )
        if window is None:
            return
        distance = ellipse_distance(
            window.x - np.float32(centre[0]), window.y - np.float32(centre[1]), radii, angle
        )
        if outline:
            coverage = stroke(np.abs(distance), outline, self.pixel)
        else:
            coverage = inside(distance, self.pixel)
        self.blend(window, coverage * np.float32(opacity), paint)

    def polygon(self, points: Sequence[Point], paint: Paint, opacity: float = 1.0) -> None:
        """A convex polygon, its corners in either order."""
        xs, ys = [p[0] for p in points], [p[1] for p in points]
        window = self.window(min(xs), min(ys), max(xs), max(ys))
        if window is None:
            return
        middle_x, middle_y = sum(xs) / len(xs), sum(ys) / len(ys)
        distance: Array | None = None
        for (x0, y0), (x1, y1) in zip(points, [*points[1:], points[0]], strict=True):
            length = float(np.hypot(x1 - x0, y1 - y0))
            normal_x, normal_y = (y1 - y0) / length, (x0 - x1) / length
            if (middle_x - x0) * normal_x + (middle_y - y0) * normal_y > 0:
                normal_x, normal_y = -normal_x, -normal_y
            offset = np.float32(x0 * normal_x + y0 * normal_y)
            side = window.x * np.float32(normal_x) + (window.y * np.float32(normal_y) - offset)
            distance = side if distance is None else np.maximum(distance, side)
        assert distance is not None
        self.blend(window, inside(distance, self.pixel) * np.float32(opacity), paint)

    def line(self, start: Point, end: Point, width: float, paint: Paint, opacity: float = 1.0) -> None:
        """A straight line with round ends."""
        (x0, y0), (x1, y1) = start, end
        half = 0.5 * width
        window = self.window(min(x0, x1) - half, min(y0, y1) - half, max(x0, x1) + half, max(y0, y1) + half)
        if window is None:
            return
        along_x, along_y = np.float32(x1 - x0), np.float32(y1 - y0)
        from_x, from_y = window.x - np.float32(x0), window.y - np.float32(y0)
        share = np.clip((from_x * along_x + from_y * along_y) / (along_x**2 + along_y**2), 0, 1)
        distance = np.hypot(from_x - share * along_x, from_y - share * along_y)
        self.blend(window, stroke(distance, width, self.pixel) * np.float32(opacity), paint)

    def shape(
        self,
        bounds: tuple[float, float, float, float],
        distance: Distance,
        paint: Paint,
        *,
        opacity: float = 1.0,
        outline: float = 0.0,
    ) -> None:
        """Any shape, from its signed distance, or its outline of that width.

        ``bounds`` is left, top, right, bottom.
        """
        window = self.window(*bounds)
        if window is None:
            return
        signed = distance(window.x, window.y)
        coverage = stroke(np.abs(signed), outline, self.pixel) if outline else inside(signed, self.pixel)
        self.blend(window, coverage * np.float32(opacity), paint)

    def below(self, top: float, height: Callable[[Array], Array], paint: Paint) -> None:
        """Everything under the curve ``y = height(x)``, none of which lies above ``top``."""
        self.shape((0, top, 1, 1), lambda x, y: height(x) - y, paint)

    def to_uint8(self) -> NDArray[np.uint8]:
        """The picture as [R, R, 3] bytes."""
        scaled = np.clip(self.rgb * np.float32(255) + np.float32(0.5), 0, 255)
        return np.ascontiguousarray(scaled.transpose(1, 2, 0).astype(np.uint8))


def ellipse_distance(x: Array, y: Array, radii: Point, angle: float = 0.0) -> Array:
    """Signed distance to an ellipse about the origin, exact to first order near its edge.

    With ``k0 = |p / r|`` and ``k1 = |p / r^2|`` it is ``k0 (k0 - 1) / k1``.
    """
    if angle:
        cosine, sine = np.float32(np.cos(angle)), np.float32(np.sin(angle))
        x, y = x * cosine + y * sine, y * cosine - x * sine
    rx, ry = np.float32(radii[0]), np.float32(radii[1])
    scaled = np.sqrt((x / rx) ** 2 + (y / ry) ** 2)
    gradient = np.sqrt((x / rx**2) ** 2 + (y / ry**2) ** 2)
    return scaled * (scaled - 1) / np.maximum(gradient, np.float32(1e-6))
