"""Anti-aliased textures: patterns averaged over each pixel.

A fine texture sampled at pixel centres would change with the resolution. Here a periodic pattern is
integrated over the pixel in closed form, so at a low resolution it fades into its mean, as in a photograph, and
a scene at two resolutions stays the same scene. Lengths are in scene units: the side is 1.
"""

from collections.abc import Callable

import numpy as np

from davae.data.scenes.canvas import Array, Paint, Texture, Window, f32, inside

TABLE = np.random.default_rng(20_240).random((6, 32, 32), dtype=np.float32)
"""Fixed numbers in [0, 1): leaves and bricks vary in the same way in every scene, so this can be learned."""


def colour(code: str) -> Array:
    """The colour [3] in [0, 1] of a hexadecimal code such as ``"e8a33d"``."""
    return np.array([int(code[i : i + 2], 16) for i in (0, 2, 4)], dtype=np.float32) / f32(255)


def mix(first: Array, second: Array, share: Array | float) -> Array:
    """``first + share (second - first)`` for colours [3] or [3, h, w], the share a number or [h, w]."""
    if isinstance(share, float | int):
        share = np.asarray(share, dtype=np.float32)
        if first.ndim == second.ndim:
            return first + share * (second - first)
    first = first[:, None, None] if first.ndim == 1 else first
    second = second[:, None, None] if second.ndim == 1 else second
    return first + share * (second - first)


def pulse(phase: Array, duty: float, footprint: Array | float) -> Array:
    """A train of bars, averaged over a pixel: bars cover [n, n + duty] for every whole n.

    ``phase`` and ``footprint`` (what a pixel spans) are in periods. The average is exact where the phase is
    linear within the pixel: the bars' integral, ``floor(t) duty + min(t - floor(t), duty)``, at both ends.
    """
    duty32, footprint = f32(duty), np.asarray(footprint, dtype=np.float32)
    start, end = phase - 0.5 * footprint, phase + 0.5 * footprint
    whole_start, whole_end = np.floor(start), np.floor(end)
    ink = np.minimum(end - whole_end, duty32) - np.minimum(start - whole_start, duty32)
    return (ink + (whole_end - whole_start) * duty32) / footprint


def gradient(top: Array, bottom: Array, start: float, end: float) -> Texture:
    """From one colour at height ``start`` to another at ``end``, downwards."""
    return lambda w: mix(top, bottom, np.clip((w.y - f32(start)) / f32(end - start), 0, 1))


def stripes(
    first: Paint, second: Array, period: float, duty: float = 0.5, *, angle: float = 0.0, origin: float = 0.0
) -> Texture:
    """Straight bars of ``second`` over ``first``; angle 0 gives vertical bars, pi / 2 horizontal ones."""
    cosine, sine = float(np.cos(angle)), float(np.sin(angle))

    def texture(w: Window) -> Array:
        along = w.x * f32(cosine / period) + w.y * f32(sine / period) - f32(origin / period)
        return mix(resolve(first, w), second, pulse(along, duty, w.pixel / period))

    return texture


def resolve(paint: Paint, window: Window) -> Array:
    """The colours [3, h, w] (or [3, 1, 1]) of a paint within a window."""
    return paint(window) if callable(paint) else paint[:, None, None]


def engraved(base: Paint, ink: Array, *, period: float, strength: float, bend: float, duty: float = 0.5) -> Texture:
    """Horizontal, gently waving lines, as in an engraved sky."""

    def texture(w: Window) -> Array:
        swell = f32(bend) * np.sin(w.x * f32(9.0) + w.y * f32(5.0))
        lines = pulse((w.y + swell) * f32(1 / period), duty, w.pixel / period)
        return mix(resolve(base, w), ink, lines * f32(strength))

    return texture


def bricks(
    base: Array, joint: Array, *, size: tuple[float, float], width: float, origin: tuple[float, float]
) -> Texture:
    """Courses of bricks, every other one shifted by half a brick; bricks differ a little in tone."""
    length, height = size

    def texture(w: Window) -> Array:
        v = (w.y - f32(origin[1])) * f32(1 / height)
        course = np.floor(v)
        u = (w.x - f32(origin[0])) * f32(1 / length) + f32(0.5) * np.mod(course, 2)
        level = pulse(v, width / height, w.pixel / height)
        upright = pulse(u, width / length, w.pixel / length)
        tone = TABLE[0, course.astype(np.int32) % 32, np.floor(u).astype(np.int32) % 32]
        body = base[:, None, None] * (f32(0.84) + f32(0.3) * tone)
        return mix(body, joint, 1 - (1 - level) * (1 - upright))

    return texture


def scallops(
    base: Paint,
    line: Array,
    *,
    size: tuple[float, float],
    width: float,
    origin: tuple[float, float],
    lift: float = 0.25,
) -> Texture:
    """Overlapping round scales or shingles: tips meet the gaps of the next row, lighter by ``lift``."""
    length, height = size

    def texture(w: Window) -> Array:
        v = (w.y - f32(origin[1])) * f32(1 / height)
        row = np.floor(v)
        u = (w.x - f32(origin[0])) * f32(1 / length) + f32(0.5) * np.mod(row, 2)
        across = (u - np.floor(u)) * 2 - 1
        depth = (v - row) - (1 - across * across)
        slope = np.sqrt(1 / height**2 + (4 * across / length) ** 2)
        distance = np.abs(depth) / slope
        half = 0.5 * width
        ink = np.clip((half - distance) / w.pixel + 0.5, 0, 1) * min(1.0, 2 * width / (width + w.pixel))
        shade = np.where(depth < 0, depth + 1, depth) * f32(lift) + f32(1 - 0.5 * lift)
        return mix(resolve(base, w) * shade, line, ink)

    return texture


def weave(light: Array, dark: Array, gap: Array, *, size: float, origin: tuple[float, float]) -> Texture:
    """Basketwork: bands that pass over and under, each shaded across its width, dark gaps between them."""

    def texture(w: Window) -> Array:
        scale = f32(1 / size)
        u, v = (w.x - f32(origin[0])) * scale, (w.y - f32(origin[1])) * scale * f32(1.6)
        row = np.floor(v)
        shifted = u * f32(0.5) + f32(0.5) * np.mod(row, 2)
        foot = w.pixel / size
        over = pulse(shifted, 0.5, foot * 0.5)
        bulge = np.sin((shifted * 2 - np.floor(shifted * 2)) * f32(np.pi)) * f32(max(0.0, 1 - foot))
        cane = mix(dark, light, over * (f32(0.45) + f32(0.55) * bulge))
        between = pulse(v, 0.24, foot * 1.6)
        return mix(cane, gap, between)

    return texture


def leaves(base: Paint, light: Array, dark: Array, *, size: float, origin: tuple[float, float]) -> Texture:
    """Foliage: small leaves in staggered rows, a dark layer under a light one, each turned its own way."""

    def layer(w: Window, shift: float, table: int) -> Array:
        scale = f32(1 / size)
        u = (w.x - f32(origin[0])) * scale + f32(shift)
        v = (w.y - f32(origin[1])) * scale + f32(shift * 0.7)
        row = np.floor(v)
        u = u + f32(0.5) * np.mod(row, 2) + f32(0.16) * np.sin(row * f32(2.3))
        column = np.floor(u)
        i, j = row.astype(np.int32) % 32, column.astype(np.int32) % 32
        angle = TABLE[table, i, j] * f32(np.pi)
        cosine, sine = np.cos(angle), np.sin(angle)
        du, dv = u - column - f32(0.5), v - row - f32(0.5)
        along, across = du * cosine + dv * sine, dv * cosine - du * sine
        # A lens: |across| below a parabola of |along|.
        distance = (np.abs(across) - f32(0.24) * (1 - (along * f32(2.1)) ** 2)) * f32(size * 0.8)
        return inside(distance, w.pixel)

    def texture(w: Window) -> Array:
        ground = mix(resolve(base, w), dark, layer(w, 0.0, 1) * f32(0.85))
        return mix(ground, light, layer(w, 0.5, 2) * f32(0.85))

    return texture


def grass(base: Paint, light: Array, dark: Array, *, horizon: float, period: float = 0.034) -> Texture:
    """Rows of leaning blades, light and dark side by side, staggered from row to row."""

    def texture(w: Window) -> Array:
        v = (w.y - f32(horizon)) * f32(1 / (1.25 * period))
        row = np.floor(v)
        fraction = v - row
        lean = f32(0.5) * fraction * fraction
        u = w.x * f32(1 / period) + f32(0.37) * row + lean
        foot = w.pixel / period
        tip = f32(0.35) + f32(0.65) * fraction
        body = mix(resolve(base, w), dark, pulse(u, 0.3, foot) * tip)
        return mix(body, light, pulse(u - f32(0.36), 0.3, foot) * tip)

    return texture


def water(base: Paint, crest: Array, trough: Array, *, horizon: float, drift: float) -> Texture:
    """Ripples: broken level lines that widen towards the viewer."""

    def texture(w: Window) -> Array:
        depth = np.maximum(w.y - f32(horizon), 0)
        # The phase grows as the root of the depth below the horizon: farther lines lie closer together.
        root = np.sqrt(depth + f32(0.03))
        v = root * f32(30.0)
        foot = f32(30.0 * 0.5 * w.pixel) / root
        row = np.floor(v)
        u = (w.x - f32(0.5)) / (f32(0.3) + root) + f32(drift) + f32(0.29) * row
        bob = f32(0.22) * np.sin(u * f32(24.0))
        breaks = np.clip(f32(0.75) + f32(0.9) * np.sin(u * f32(11.0)), 0, 1)
        body = mix(resolve(base, w), trough, pulse(v + bob, 0.34, foot) * breaks)
        return mix(body, crest, pulse(v + bob + f32(0.42), 0.3, foot) * breaks)

    return texture


def planks(base: Paint, seam: Array, grain: Array, *, board: float, period: float, angle: float = np.pi / 2) -> Texture:
    """Boards with seams, and wood grain that waves along them."""

    cosine, sine = float(np.cos(angle)), float(np.sin(angle))

    def texture(w: Window) -> Array:
        across = w.x * f32(cosine) + w.y * f32(sine)
        along = w.y * f32(cosine) - w.x * f32(sine)
        bend = f32(0.35) * np.sin(along * f32(14.0) + np.floor(across * f32(1 / board)) * f32(2.4))
        lines = pulse(across * f32(1 / period) + bend, 0.4, w.pixel / period)
        body = mix(resolve(base, w), grain, lines * f32(0.75))
        return mix(body, seam, pulse(across * f32(1 / board), 0.09, w.pixel / board))

    return texture


def modulated(base: Paint, other: Array, amount: Callable[[Window], Array]) -> Texture:
    """Any other pattern: ``amount(window)`` in [0, 1] says how much of ``other`` covers ``base``."""
    return lambda w: mix(resolve(base, w), other, amount(w))
