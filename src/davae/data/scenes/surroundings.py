"""What the outdoor scenes share: the time of day, the sky with its clouds, hills, lawn and sea."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from davae.data.scenes.canvas import Array, Canvas, Paint, circles_distance, f32
from davae.data.scenes.textures import colour, engraved, gradient, grass, mix, water

T = TypeVar("T")
WHITE, INK = colour("ffffff"), colour("2a2530")


@dataclass(frozen=True)
class Hour:
    """A time of day: the caption's words, the sky's two colours, the sun or moon, the colour of the light."""

    words: str
    zenith: str
    horizon: str
    orb: str
    light: tuple[float, float, float]


HOURS = (
    Hour("in the morning", "7fc4e8", "fde3c0", "fff3b8", (1.0, 0.97, 0.92)),
    Hour("at noon", "3f9be0", "bfe3f5", "fffbe0", (1.0, 1.0, 1.0)),
    Hour("at dusk", "6b5aa6", "ffa565", "ffd86b", (0.97, 0.84, 0.80)),
    Hour("at night", "16244f", "44649f", "f4efd2", (0.7, 0.74, 0.9)),
)


def pick(rng: np.random.Generator, *options: T, p: Sequence[float] | None = None) -> T:
    """One of the options, uniformly or with the probabilities ``p``."""
    return options[int(rng.integers(len(options)) if p is None else rng.choice(len(options), p=p))]


def pick_hour(rng: np.random.Generator) -> Hour:
    """Day more often than night."""
    return pick(rng, *HOURS, p=(0.3, 0.34, 0.24, 0.12))


def glow(code: str, hour: Hour) -> Array:
    """A self-luminous colour: it keeps its value when `light_up` tints the scene."""
    light: Array = np.array(hour.light, dtype=np.float32)
    return np.divide(colour(code), light)


def light_up(canvas: Canvas, hour: Hour) -> None:
    """Tint the finished picture with the light of the hour."""
    canvas.rgb *= np.array(hour.light, dtype=np.float32)[:, None, None]


def sky(canvas: Canvas, rng: np.random.Generator, hour: Hour, *, horizon: float, orb_x: float, clouds: bool) -> None:
    """An engraved sky down to the horizon, with sun or moon near ``orb_x`` and, if asked for, two clouds."""
    orb_x += rng.uniform(-0.05, 0.05)
    orb_y, radius = rng.uniform(0.12, 0.2), rng.uniform(0.055, 0.075)
    first_x, first_y, second_x, second_y = rng.uniform((0.04, 0.4, 0.78, 0.2), (0.16, 0.5, 0.92, 0.34))
    zenith, low = glow(hour.zenith, hour), glow(hour.horizon, hour)
    backdrop = gradient(zenith, low, 0.0, horizon)
    canvas.fill(engraved(backdrop, mix(low, WHITE, 0.55), period=1 / 36, strength=0.42, bend=0.006, duty=0.34))
    orb = glow(hour.orb, hour)
    canvas.ellipse((orb_x, orb_y), (radius * 1.55, radius * 1.55), orb, opacity=0.3)
    canvas.ellipse((orb_x, orb_y), (radius, radius), orb)
    if clouds:
        body = mix(mix(zenith, WHITE, 0.55), low, 0.35) if hour is HOURS[3] else mix(low, WHITE, 0.75)
        puff = engraved(body, mix(body, zenith, 0.55), period=1 / 44, strength=0.7, bend=0.004, duty=0.3)
        for x, y, size in ((first_x, first_y, 0.085), (second_x, second_y, 0.07)):
            cloud(canvas, x, y, size, puff)


def cloud(canvas: Canvas, x: float, y: float, size: float, paint: Paint) -> None:
    """Three round puffs on a flat bottom."""

    def distance(px: Array, py: Array) -> Array:
        puffs = [(-0.9, 0.12, 0.55), (0.0, -0.2, 0.8), (0.95, 0.15, 0.5)]
        nearest = circles_distance(px, py, ((x + dx * size, y + dy * size, r * size) for dx, dy, r in puffs))
        return np.maximum(nearest, py - f32(y + 0.45 * size))

    canvas.shape((x - 1.6 * size, y - 1.1 * size, x + 1.6 * size, y + 0.5 * size), distance, paint)


def hills(canvas: Canvas, rng: np.random.Generator, tone: Array, *, horizon: float, height: float) -> None:
    """A soft ridge along the horizon, hatched down the slope."""
    phase = rng.uniform(0, 6.28)

    def ridge(x: Array) -> Array:
        return f32(horizon) - f32(height) * (
            f32(0.6) + f32(0.4) * np.sin(x * 7 + f32(phase)) * np.cos(x * 3 + f32(2 * phase))
        )

    paint = engraved(tone, mix(tone, INK, 0.35), period=1 / 40, strength=0.7, bend=0.02, duty=0.35)
    canvas.below(horizon - height, ridge, paint)


def lawn(canvas: Canvas, rng: np.random.Generator, *, horizon: float) -> None:
    """A green ground with blades of grass."""
    base = mix(colour("5f9e3f"), colour("86a83c"), float(rng.uniform(0, 1)))
    near, far = mix(base, colour("2f5a2a"), 0.3), mix(base, colour("d9d98a"), 0.2)
    blades = grass(
        gradient(far, near, horizon, 1.0),
        mix(base, colour("f3f0a0"), 0.5),
        mix(base, colour("123c1e"), 0.65),
        horizon=horizon,
    )
    canvas.below(horizon - 0.02, lambda x: f32(horizon) + f32(0.012) * np.sin(x * 9), blades)


def sea(canvas: Canvas, rng: np.random.Generator, hour: Hour, *, horizon: float) -> None:
    """Rippled water from the horizon to the bottom, which takes up some of the sky's colour."""
    base = mix(colour("2279a8"), colour("1d8f8f"), float(rng.uniform(0, 1)))
    far = mix(base, glow(hour.horizon, hour), 0.4)
    drift = rng.uniform(0, 0.15)
    surface = water(
        gradient(far, mix(base, colour("0b2f55"), 0.35), horizon, 1.0),
        mix(base, WHITE, 0.72),
        mix(base, colour("06203f"), 0.6),
        horizon=horizon,
        drift=drift,
    )
    canvas.rectangle(0, horizon, 1, 1, surface)
