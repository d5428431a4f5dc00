"""A small resolution-free painter: analytic shapes, anti-aliased over one pixel, on the unit square.

Coordinates run from (0, 0) at the top left to (1, 1) at the bottom right. A shape gives a *coverage* in
[0, 1], the share of a pixel that lies within it, computed from a signed distance. There is no supersampling,
and work is restricted to each shape's bounding box: a scene costs a few milliseconds.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache, reduce
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

Array: TypeAlias = NDArray[np.float32]
Point: TypeAlias = tuple[float, float]
Bounds: TypeAlias = tuple[float, float, float, float]  # left, top, right, bottom
f32 = np.float32


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
    return np.clip(0.5 - distance * f32(1 / pixel), 0, 1)


def stroke(distance: Array, width: float, pixel: float) -> Array:
    """Coverage of a line of the given width, from the distance to its axis.

    Both edges are filtered, so a line thinner than a pixel keeps its ink: it becomes fainter, not wider.
    """
    scaled = distance * f32(1 / pixel)
    half = f32(0.5 * width / pixel)
    return np.clip(half + 0.5 - scaled, 0, 1) - np.clip(0.5 - half - scaled, 0, 1)


class Canvas:
    """An RGB picture [3, R, R], float32, painted back to front."""

    def __init__(self, resolution: int) -> None:
        self.resolution = resolution
        self.pixel = 1.0 / resolution
        self.rgb: Array = np.zeros((3, resolution, resolution), dtype=np.float32)

    def window(self, left: float = 0, top: float = 0, right: float = 1, bottom: float = 1) -> Window | None:
        """The pixels that a shape with these bounds can touch; None if it is outside the picture."""
        size = self.resolution
        first_x, last_x = max(int(left * size - 1), 0), min(int(right * size + 2), size)
        first_y, last_y = max(int(top * size - 1), 0), min(int(bottom * size + 2), size)
        if first_x >= last_x or first_y >= last_y:
            return None
        columns, rows = slice(first_x, last_x), slice(first_y, last_y)
        centres = _centres(size)
        return Window(rows, columns, centres[None, columns], centres[rows, None], self.pixel)

    def blend(self, window: Window, coverage: Array, paint: Paint) -> None:
        """Blend paint into a window: ``rgb += coverage * (paint - rgb)``."""
        colour = paint(window) if callable(paint) else paint[:, None, None]
        region = self.rgb[:, window.rows, window.columns]
        region += coverage * (colour - region)

    def fill(self, paint: Paint) -> None:
        """Cover the whole picture."""
        self.cover((0, 0, 1, 1), lambda _: np.ones((1, 1), dtype=np.float32), paint)

    def cover(self, bounds: Bounds, coverage: Callable[[Window], Array], paint: Paint, opacity: float = 1.0) -> None:
        """Blend paint within ``bounds``, weighted by ``coverage`` in [0, 1]."""
        window = self.window(*bounds)
        if window is not None:
            self.blend(window, coverage(window) * f32(opacity), paint)

    def rectangle(
        self, left: float, top: float, right: float, bottom: float, paint: Paint, opacity: float = 1.0
    ) -> None:
        """An upright rectangle; its coverage is exact."""

        def coverage(w: Window) -> Array:
            half, scale = 0.5 * w.pixel, f32(1 / w.pixel)
            across = np.minimum(w.x + half, right) - np.maximum(w.x - half, left)
            down = np.minimum(w.y + half, bottom) - np.maximum(w.y - half, top)
            return np.clip(across * scale, 0, 1) * np.clip(down * scale, 0, 1)

        self.cover((left, top, right, bottom), coverage, paint, opacity)

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
        reach = max(radii) if angle else 0.0
        reach_x, reach_y = max(reach, radii[0]) + outline, max(reach, radii[1]) + outline
        (x, y) = centre
        self.shape(
            (x - reach_x, y - reach_y, x + reach_x, y + reach_y),
            lambda px, py: ellipse_distance(px - f32(x), py - f32(y), radii, angle),
            paint,
            opacity=opacity,
            outline=outline,
        )

    def polygon(self, points: Sequence[Point], paint: Paint, opacity: float = 1.0) -> None:
        """A convex polygon, its corners in either orientation."""
        xs, ys = [p[0] for p in points], [p[1] for p in points]
        middle_x, middle_y = sum(xs) / len(xs), sum(ys) / len(ys)

        def distance(x: Array, y: Array) -> Array:
            sides = []
            for (x0, y0), (x1, y1) in zip(points, [*points[1:], points[0]], strict=True):
                length = float(np.hypot(x1 - x0, y1 - y0))
                normal_x, normal_y = (y1 - y0) / length, (x0 - x1) / length
                if (middle_x - x0) * normal_x + (middle_y - y0) * normal_y > 0:
                    normal_x, normal_y = -normal_x, -normal_y
                offset = f32(x0 * normal_x + y0 * normal_y)
                sides.append(x * f32(normal_x) + (y * f32(normal_y) - offset))
            return reduce(np.maximum, sides)

        self.shape((min(xs), min(ys), max(xs), max(ys)), distance, paint, opacity=opacity)

    def line(self, start: Point, end: Point, width: float, paint: Paint, opacity: float = 1.0) -> None:
        """A straight line with round ends."""
        (x0, y0), (x1, y1) = start, end
        half = 0.5 * width
        along_x, along_y = f32(x1 - x0), f32(y1 - y0)

        def coverage(w: Window) -> Array:
            from_x, from_y = w.x - f32(x0), w.y - f32(y0)
            share = np.clip((from_x * along_x + from_y * along_y) / (along_x**2 + along_y**2), 0, 1)
            return stroke(np.hypot(from_x - share * along_x, from_y - share * along_y), width, w.pixel)

        bounds = (min(x0, x1) - half, min(y0, y1) - half, max(x0, x1) + half, max(y0, y1) + half)
        self.cover(bounds, coverage, paint, opacity)

    def shape(
        self, bounds: Bounds, distance: Distance, paint: Paint, *, opacity: float = 1.0, outline: float = 0.0
    ) -> None:
        """Any shape, from its signed distance, or its outline of that width."""

        def coverage(w: Window) -> Array:
            signed = distance(w.x, w.y)
            return stroke(np.abs(signed), outline, w.pixel) if outline else inside(signed, w.pixel)

        self.cover(bounds, coverage, paint, opacity)

    def below(self, top: float, height: Callable[[Array], Array], paint: Paint) -> None:
        """Everything under the curve ``y = height(x)``, none of which lies above ``top``."""
        self.shape((0, top, 1, 1), lambda x, y: height(x) - y, paint)

    def to_uint8(self) -> NDArray[np.uint8]:
        """The picture as [R, R, 3] bytes."""
        scaled = np.clip(self.rgb * f32(255) + f32(0.5), 0, 255)
        return np.ascontiguousarray(scaled.transpose(1, 2, 0).astype(np.uint8))


def turned(x: Array, y: Array, angle: float) -> tuple[Array, Array]:
    """Coordinates along and across an axis at ``angle`` (radians, clockwise on screen)."""
    cosine, sine = f32(np.cos(angle)), f32(np.sin(angle))
    return x * cosine + y * sine, y * cosine - x * sine


def circles_distance(x: Array, y: Array, circles: Iterable[tuple[float, float, float]]) -> Array:
    """Signed distance to the union of circles (centre x, centre y, radius)."""
    return reduce(np.minimum, (np.hypot(x - f32(cx), y - f32(cy)) - f32(radius) for cx, cy, radius in circles))


def ellipse_distance(x: Array, y: Array, radii: Point, angle: float = 0.0) -> Array:
    """Signed distance to an ellipse about the origin, exact to first order near its edge.

    With ``k0 = |p / r|`` and ``k1 = |p / r^2|`` it is ``k0 (k0 - 1) / k1``.
    """
    if angle:
        x, y = turned(x, y, angle)
    rx, ry = f32(radii[0]), f32(radii[1])
    scaled = np.sqrt((x / rx) ** 2 + (y / ry) ** 2)
    gradient = np.sqrt((x / rx**2) ** 2 + (y / ry**2) ** 2)
    return scaled * (scaled - 1) / np.maximum(gradient, f32(1e-6))
