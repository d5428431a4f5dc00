"""Scenes of living things: butterfly, fish, flower, tree."""

import numpy as np

from davae.data.scenes.canvas import (
    Array,
    Canvas,
    Distance,
    Texture,
    Window,
    circles_distance,
    ellipse_distance,
    f32,
    inside,
    stroke,
    turned,
)
from davae.data.scenes.surroundings import INK, WHITE, hills, lawn, light_up, pick, pick_hour, sky
from davae.data.scenes.textures import colour, gradient, leaves, mix, modulated, planks, pulse, scallops, stripes, water


def butterfly(canvas: Canvas, rng: np.random.Generator) -> str:
    """A butterfly with spread wings: veins, a dark border with pale spots, over soft foliage."""
    name, code, inner = pick(
        rng,
        ("orange", "f08a24", "ffd166"),
        ("blue", "3d7fe0", "9fd8ff"),
        ("pink", "e0529c", "ffc2dd"),
        ("yellow", "f5cf2e", "fff3a6"),
    )
    tone, centre = colour(code), colour(inner)
    meadow = colour(pick(rng, "8fbf7f", "a9c98a", "7fb59a"))
    middle, level = rng.uniform(0.46, 0.54), rng.uniform(0.46, 0.52)
    size = rng.uniform(0.94, 1.06)
    opening = rng.uniform(-0.12, 0.12)
    backdrop = gradient(mix(meadow, WHITE, 0.35), mix(meadow, colour("2f5f3f"), 0.2), 0, 1)
    light, shade = mix(meadow, WHITE, 0.42), mix(meadow, colour("1f4f35"), 0.24)
    canvas.fill(leaves(backdrop, light, shade, size=0.08, origin=(0.5, 0.5)))

    def wing(centre_x: float, centre_y: float, radii: tuple[float, float], angle: float) -> None:
        """Both wings at once: the plane is folded along the body."""
        cx, cy, rx, ry = centre_x * size, centre_y * size, radii[0] * size, radii[1] * size

        def distance(x: Array, y: Array) -> Array:
            return ellipse_distance(np.abs(x - f32(middle)) - f32(cx), y - f32(level + cy), (rx, ry), angle)

        def pattern(w: Window) -> Array:
            x, y = np.abs(w.x - f32(middle)), w.y - f32(level)
            signed = distance(w.x, w.y)
            radius, theta = np.hypot(x, y) + f32(1e-3), np.arctan2(y, x)
            turns = f32(14 / np.pi)
            veins = pulse(theta * turns + f32(0.5 * 0.16), 0.16, np.minimum(w.pixel * turns / radius, 1))
            border = inside(-signed - f32(0.042 * size), w.pixel)
            rim = stroke(np.abs(signed + f32(0.021 * size)), 0.02 * size, w.pixel)
            spots = pulse(theta * turns * 2, 0.5, np.minimum(w.pixel * turns * 2 / radius, 1)) * rim
            cross = stroke(np.abs(signed + f32(0.085 * size)), 0.009, w.pixel)
            body = mix(centre, tone, np.clip(radius * f32(6 / size) - f32(0.4), 0, 1))
            body = mix(body, INK, np.maximum(veins, cross) * f32(0.85))
            return mix(mix(body, INK, border), WHITE, spots)

        reach = max(rx, ry)
        bounds = (middle - cx - reach, level + cy - reach, middle + cx + reach, level + cy + reach)
        canvas.shape(bounds, distance, pattern)

    wing(0.165, 0.15, (0.165, 0.125), 0.75 + opening)
    wing(0.215, -0.13, (0.235, 0.15), -0.6 - opening)
    bands = stripes(colour("3b2b2a"), colour("a8845a"), 0.03, 0.3, angle=np.pi / 2, origin=level)
    canvas.ellipse((middle, level + 0.04), (0.024, 0.19 * size), bands)
    canvas.ellipse((middle, level - 0.16 * size), (0.03, 0.032), INK)
    for side in (-1, 1):
        tip = (middle + side * 0.11, level - 0.34 * size)
        canvas.line((middle, level - 0.17 * size), tip, 0.008, INK)
        canvas.ellipse(tip, (0.012, 0.012), INK)
    return f"a butterfly with {name} wings"


def fish(canvas: Canvas, rng: np.random.Generator) -> str:
    """A fish with scales and rayed fins above a sandy bottom, with weed and bubbles."""
    name, code, back = pick(
        rng,
        ("orange", "f7943a", "b03a16"),
        ("yellow", "f7d23e", "c98a1a"),
        ("red", "e2504a", "8f2036"),
        ("violet", "b07be0", "5b3a9a"),
    )
    tone, dark = colour(code), colour(back)
    side = 1.0 if rng.integers(2) else -1.0
    middle, level = 0.5 + rng.uniform(-0.03, 0.03), rng.uniform(0.43, 0.49)
    length, height = rng.uniform(0.245, 0.275), rng.uniform(0.155, 0.185)
    drift = rng.uniform(0, 0.15)
    deep = colour(pick(rng, "0f5f8f", "136f86", "1f4f93"))
    bubbles = rng.uniform((0.0, 0.0, 0.008), (0.1, 0.32, 0.02), size=(5, 3))
    sea_light = gradient(mix(deep, colour("8fe0e8"), 0.65), mix(deep, colour("061f3f"), 0.3), 0, 0.9)
    crest, trough = mix(deep, colour("c9f5f5"), 0.42), mix(deep, colour("06203f"), 0.1)
    canvas.fill(water(sea_light, crest, trough, horizon=0.0, drift=drift))

    def grains(w: Window) -> Array:
        v = (w.y - f32(0.84)) * f32(1 / 0.03) + f32(0.45) * np.sin(w.x * f32(14))
        return pulse(v, 0.35, w.pixel / 0.03)

    sand = modulated(colour("e3c98f"), colour("a07c48"), grains)
    canvas.below(0.8, lambda x: f32(0.84) + f32(0.02) * np.sin(x * 8 + f32(drift * 20)), sand)
    for index, (x, top) in enumerate(((0.07, 0.5), (0.14, 0.6), (0.87, 0.56), (0.94, 0.46))):
        weed(canvas, x, top, colour(("2f9f5f", "1f7f5a")[index % 2]))

    def rays(origin_x: float, origin_y: float, count: float) -> Texture:
        def texture(w: Window) -> Array:
            dx, dy = (w.x - f32(origin_x)) * f32(side), w.y - f32(origin_y)
            turns = f32(count / np.pi)
            radius = np.hypot(dx, dy) + f32(1e-3)
            lines = pulse(np.arctan2(dy, dx) * turns, 0.4, np.minimum(w.pixel * turns / radius, 1))
            return mix(tone, dark, lines)

        return texture

    def at(along: float, down: float) -> tuple[float, float]:
        return middle + side * along * length, level + down * height

    # The tail's rays, and the fins', fan out from where they join the body.
    tail = rays(*at(-0.62, 0.0), 34)
    canvas.polygon([at(-0.8, 0.0), at(-1.55, -0.95), at(-1.42, -0.1), at(-0.85, 0.15)], tail)
    canvas.polygon([at(-0.8, 0.0), at(-1.55, 0.95), at(-1.42, 0.1), at(-0.85, -0.15)], tail)
    fin = rays(*at(0.1, 0.3), 44)
    canvas.polygon([at(-0.6, -0.6), at(-0.42, -1.5), at(0.05, -1.45), at(0.4, -0.8)], fin)
    fin = rays(*at(0.0, -0.2), 44)
    canvas.polygon([at(-0.45, 0.7), at(-0.42, 1.42), at(-0.02, 1.3), at(0.15, 0.85)], fin)

    skin = gradient(mix(dark, tone, 0.45), mix(tone, WHITE, 0.55), level - height, level + height)
    scales = scallops(skin, mix(dark, INK, 0.25), size=(0.05, 0.032), width=0.008, origin=(middle, level), lift=0.35)
    canvas.ellipse((middle, level), (length, height), scales)
    head_x = middle + side * length * 0.5

    def head(x: Array, y: Array) -> Array:
        whole = ellipse_distance(x - f32(middle), y - f32(level), (length, height))
        cheek = np.hypot((x - f32(middle + side * length * 1.15)), (y - f32(level)) * 0.9)
        return np.maximum(whole, cheek - f32(length * 0.62))

    bounds = (head_x - 0.12, level - height, head_x + 0.16, level + height)
    canvas.shape(bounds, head, mix(tone, WHITE, 0.25))
    canvas.shape(bounds, head, dark, outline=0.012)
    canvas.ellipse((middle, level), (length, height), dark, outline=0.012)
    eye = at(0.7, -0.2)
    canvas.ellipse(eye, (0.036, 0.036), WHITE)
    canvas.ellipse((eye[0] + side * 0.006, eye[1]), (0.02, 0.02), INK)
    canvas.line(at(0.96, 0.24), at(0.72, 0.34), 0.01, dark)
    canvas.polygon([at(0.2, 0.05), at(-0.28, -0.16), at(-0.34, 0.42)], rays(*at(0.26, 0.05), 30))
    for dx, y, radius in bubbles:
        centre = (middle + side * (length * 1.12 + float(dx)), level - 0.08 - float(y))
        canvas.ellipse(centre, (float(radius), float(radius)), colour("e9ffff"), outline=0.008)
    return f"{'an' if name == 'orange' else 'a'} {name} fish under water"


def weed(canvas: Canvas, x: float, top: float, tone: Array) -> None:
    """One swaying blade of water weed with side leaves."""

    def blade(w: Window) -> Array:
        centre = f32(x) + f32(0.014) * np.sin(w.y * f32(24))
        away = np.abs(w.x - centre)
        fronds = pulse((w.y + away * f32(0.9)) * f32(1 / 0.036), 0.4, w.pixel / 0.036)
        room = f32(0.04) * np.clip((w.y - f32(top)) * f32(5), 0.15, 1)
        rows = inside(f32(top) - w.y, w.pixel)
        grown = np.maximum(stroke(away, 0.012, w.pixel), fronds * inside(away - room, w.pixel)) * rows
        return grown * inside(w.y - f32(0.9), w.pixel)

    canvas.cover((x - 0.07, top, x + 0.07, 0.9), blade, tone)


def flower(canvas: Canvas, rng: np.random.Generator) -> str:
    """One large flower with veined petals and a seeded heart, on a leafy stem."""
    name, code, inner = pick(
        rng,
        ("yellow", "f8c61e", "f08a1c"),
        ("pink", "f27bb0", "c22f78"),
        ("white", "fbf7f0", "a892c0"),
        ("red", "e5412f", "8f1524"),
        ("violet", "9a6be0", "4f2a9a"),
    )
    tone, vein = colour(code), colour(inner)
    middle, level = rng.uniform(0.46, 0.54), rng.uniform(0.37, 0.42)
    reach, count = rng.uniform(0.27, 0.31), int(rng.integers(9, 13))
    turn, lean = rng.uniform(0, 1), rng.uniform(-0.05, 0.05)
    back = colour(pick(rng, "a8dcef", "cfe8c9", "f6e3c4"))
    backdrop = gradient(mix(back, WHITE, 0.3), mix(back, colour("6fae72"), 0.45), 0.1, 1)
    hatch = stripes(backdrop, mix(back, colour("3f7f6f"), 0.45), 0.03, 0.3, angle=np.pi / 4, origin=0.0)
    canvas.fill(hatch)
    bush = leaves(colour("3f8a45"), colour("9fd06a"), colour("1c5230"), size=0.06, origin=(0.0, 0.9))
    canvas.shape((0, 0.8, 1, 1), lambda x, y: f32(0.9) - y + f32(0.02) * np.sin(x * f32(13)), bush)
    green = colour("3f8f3f")
    foot = (middle + lean, 1.02)
    canvas.line((middle, level), foot, 0.032, green)
    canvas.line((middle + 0.006, level), (foot[0] + 0.006, foot[1]), 0.008, colour("1f5f2c"))
    for side in (-1.0, 1.0):
        leaf(canvas, middle + lean * 0.6 + side * 0.135, 0.83 + 0.03 * side, side)

    heart = reach * 0.36

    def polar(x: Array, y: Array) -> tuple[Array, Array]:
        dx, dy = x - f32(middle), y - f32(level)
        return np.hypot(dx, dy) + f32(1e-4), np.arctan2(dy, dx)

    def petals(offset: float, scale: float) -> tuple[Distance, Texture]:
        def distance(x: Array, y: Array) -> Array:
            radius, theta = polar(x, y)
            part = theta * f32(count / (2 * np.pi)) + f32(turn + offset)
            lobe = np.abs(np.sin(part * f32(np.pi)))
            edge = f32(reach * scale) * (f32(0.62) + f32(0.38) * np.sqrt(lobe))
            return (radius - edge) * f32(0.75)

        def paint(w: Window) -> Array:
            radius, theta = polar(w.x, w.y)
            turns = f32(count / (2 * np.pi))
            part = theta * turns + f32(turn + offset)
            near = np.clip(f32(1.45) - radius * f32(1.5 / reach), 0, 1)
            body = mix(tone, vein, near * f32(0.75))
            lines = pulse(part * 5 + f32(0.15), 0.3, np.minimum(w.pixel * turns * 5 / radius, 1))
            gap = pulse(part + f32(0.05), 0.1, np.minimum(w.pixel * turns / radius, 1))
            body = mix(body, vein, lines * f32(0.95))
            return mix(body, mix(vein, INK, 0.45), gap)

        return distance, paint

    bounds = (middle - reach - 0.01, level - reach - 0.01, middle + reach + 0.01, level + reach + 0.01)
    back_shape, back_paint = petals(0.5, 1.0)
    canvas.shape(bounds, back_shape, lambda w: mix(back_paint(w), mix(vein, INK, 0.3), 0.35))
    front_shape, front_paint = petals(0.0, 0.9)
    canvas.shape(bounds, front_shape, front_paint)

    def seeds(w: Window) -> Array:
        radius, theta = polar(w.x, w.y)
        # Two families of spirals cross, as in a sunflower's heart.
        spiral = np.log(radius) * f32(2.6)
        foot = np.minimum(w.pixel * f32(3.2) / radius, 1)
        one = pulse(theta * f32(10 / np.pi) + spiral, 0.42, foot)
        other = pulse(theta * f32(10 / np.pi) - spiral, 0.42, foot)
        return one * other

    canvas.ellipse((middle, level), (heart, heart), modulated(colour("6b3f1d"), colour("f0c04a"), seeds))
    canvas.ellipse((middle, level), (heart, heart), colour("3f2412"), outline=0.014)
    return f"a {name} flower"


def leaf(canvas: Canvas, x: float, y: float, side: float) -> None:
    """A broad leaf with a midrib and side veins."""
    angle = -0.5 * side

    def veins(w: Window) -> Array:
        dx, dy = w.x - f32(x), w.y - f32(y)
        along, across = turned(dx, dy, angle)
        ribs = pulse((along * f32(side) - np.abs(across)) * f32(1 / 0.034), 0.25, w.pixel * 1.4 / 0.034)
        return np.maximum(ribs, stroke(np.abs(across), 0.009, w.pixel))

    canvas.ellipse((x, y), (0.14, 0.058), modulated(colour("4fa34a"), colour("1f5f2c"), veins), angle=angle)


def tree(canvas: Canvas, rng: np.random.Generator) -> str:
    """A broad tree with leafy crown and barked trunk on a meadow."""
    hour = pick_hour(rng)
    season, code, light, dark = pick(
        rng,
        ("green", "4f9440", "b5d965", "1c4f2a"),
        ("autumn", "d9782a", "ffc558", "8a2f18"),
        ("blossoming", "eda3bd", "ffe6ee", "a84a72"),
        ("golden", "dcae2f", "fff08a", "8f6212"),
        p=(0.46, 0.2, 0.17, 0.17),
    )
    middle, level = rng.uniform(0.46, 0.54), rng.uniform(0.36, 0.4)
    size = rng.uniform(0.92, 1.06)
    wobble = rng.uniform(-0.02, 0.02, size=6)
    horizon = 0.74
    sky(canvas, rng, hour, horizon=horizon, orb_x=0.12, clouds=False)
    hills(canvas, rng, colour("86a878"), horizon=horizon + 0.01, height=0.1)
    lawn(canvas, rng, horizon=horizon)
    ground = 0.85
    canvas.ellipse((middle, ground), (0.24, 0.03), colour("173a1c"), opacity=0.5)
    bark = planks(colour("7a5233"), colour("2f1d12"), colour("43291a"), board=0.04, period=0.02, angle=0.0)

    def trunk(x: Array, y: Array) -> Array:
        spread = f32(0.042) + f32(1.2) * np.maximum(y - f32(0.74), 0) ** 1.5
        return np.maximum(np.abs(x - f32(middle)) - spread, y - f32(ground + 0.012))

    canvas.shape((middle - 0.12, level, middle + 0.12, ground + 0.02), trunk, bark)
    canvas.line((middle, 0.64), (middle - 0.13, 0.5), 0.03, colour("5e3d26"))
    canvas.line((middle, 0.66), (middle + 0.13, 0.5), 0.03, colour("5e3d26"))
    blobs = [(0.0, -0.13, 0.17), (-0.16, -0.03, 0.15), (0.16, -0.03, 0.15)]
    blobs += [(-0.1, 0.08, 0.14), (0.1, 0.08, 0.14), (0.0, 0.0, 0.18)]
    circles = [
        (middle + dx * size, level + (dy + shift) * size, radius * size)
        for (dx, dy, radius), shift in zip(blobs, wobble, strict=True)
    ]

    def crown(x: Array, y: Array) -> Array:
        # Leaves fray the edge.
        return circles_distance(x, y, circles) + f32(0.007) * np.sin(x * f32(150)) * np.sin(y * f32(150))

    def foliage(w: Window) -> Array:
        shade = (w.x - f32(middle)) * f32(1.3) + (w.y - f32(level)) * f32(1.9)
        body = mix(colour(code), colour(dark), np.clip(shade + f32(0.25), 0, 0.75))
        return leaves(lambda _: body, colour(light), colour(dark), size=0.046, origin=(middle, level))(w)

    reach = 0.33 * size
    canvas.shape((middle - reach, level - reach, middle + reach, level + 0.26 * size), crown, foliage)
    light_up(canvas, hour)
    article = "an" if season == "autumn" else "a"
    return f"{article} {season} tree on a meadow {hour.words}"
