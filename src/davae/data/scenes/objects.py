"""Scenes of made things: balloon, basket, book, sailboat."""

import numpy as np

from davae.data.scenes.canvas import Array, Canvas, Distance, Window, f32, inside, stroke
from davae.data.scenes.surroundings import INK, WHITE, hills, lawn, light_up, pick, pick_hour, sea, sky
from davae.data.scenes.textures import TABLE, colour, gradient, mix, modulated, planks, pulse, stripes, weave


def balloon(canvas: Canvas, rng: np.random.Generator) -> str:
    """A hot-air balloon with coloured gores, a zigzag band, ropes and a wicker basket, above hills."""
    hour = pick_hour(rng)
    name, codes = pick(
        rng,
        ("red and yellow", ("d93a32", "f9c53d")),
        ("blue and white", ("2f68c4", "f4f0e4")),
        ("green and orange", ("2f9268", "f58f35")),
        ("purple and pink", ("7a45b5", "f7a6c8")),
    )
    first, second = (colour(code) for code in codes)
    middle, level, radius = rng.uniform(0.45, 0.55), rng.uniform(0.33, 0.37), rng.uniform(0.25, 0.285)
    sky(canvas, rng, hour, horizon=0.85, orb_x=0.1, clouds=True)
    hills(canvas, rng, colour("7fa07f"), horizon=0.92, height=0.12)
    lawn(canvas, rng, horizon=0.9)
    mouth = level + 1.32 * radius
    slope = 0.78

    def half_width(y: Array) -> Array:
        down = (y - f32(level)) * f32(1 / radius)
        round_part = np.sqrt(np.maximum(1 - down * down, f32(1e-4)))
        # Below 45 degrees the circle goes over into its tangent cone.
        cone = f32(np.sqrt(0.5)) - f32(slope) * (down - f32(np.sqrt(0.5)))
        return f32(radius) * np.where(down < np.sqrt(0.5), round_part, cone)

    def envelope(x: Array, y: Array) -> Array:
        dx, dy = x - f32(middle), y - f32(level)
        circle = np.hypot(dx, dy) - f32(radius)
        flank = (np.abs(dx) - half_width(y)) * f32(1 / np.hypot(1, slope))
        return np.maximum(np.where(dy < radius * np.sqrt(0.5), circle, flank), y - f32(mouth))

    def gores(w: Window) -> Array:
        width = half_width(w.y)
        across = np.clip((w.x - f32(middle)) / width, -0.995, 0.995)
        bend = np.sqrt(1 - across * across)
        phase = np.arcsin(across) * f32(6 / np.pi)
        foot = np.minimum(w.pixel * f32(6 / np.pi) / (width * bend), 2)
        cloth = mix(first, second, pulse(phase * f32(0.5) + f32(0.25), 0.5, foot * 0.5))
        zigzag = np.abs(np.mod(phase * 2, 1) * 2 - 1) * f32(0.05)
        for height, tone in ((0.0, second), (0.075, first)):
            offset = w.y - f32(level + height) - zigzag
            cloth = mix(cloth, tone, stroke(np.abs(offset), 0.03, w.pixel))
        upright = pulse(phase * 2 + f32(0.08), 0.16, foot * 2)
        across_seams = pulse((w.y - f32(level)) * f32(1 / 0.055), 0.13, w.pixel / 0.055) * f32(0.8)
        cloth = mix(cloth, mix(first, INK, 0.6), np.maximum(upright, across_seams))
        shade = np.clip(across * f32(0.3) + f32(0.1), 0, 0.4)
        return mix(cloth, INK, shade)

    canvas.shape((middle - radius, level - radius, middle + radius, mouth), envelope, gores)
    top, half = mouth + 0.1, 0.052
    for share in (-1.0, -0.4, 0.4, 1.0):
        canvas.line((middle + share * radius * 0.24, mouth), (middle + share * half, top), 0.008, INK)
    lip = radius * 0.25
    canvas.rectangle(middle - lip, mouth - 0.008, middle + lip, mouth + 0.008, mix(first, INK, 0.5))
    wicker = weave(colour("d9a05a"), colour("7a4a22"), colour("3f2412"), size=0.022, origin=(middle, top))
    canvas.rectangle(middle - half, top, middle + half, top + 0.085, wicker)
    canvas.rectangle(middle - half - 0.008, top - 0.008, middle + half + 0.008, top + 0.01, colour("5a3418"))
    light_up(canvas, hour)
    return f"a {name} hot-air balloon {hour.words}"


def basket(canvas: Canvas, rng: np.random.Generator) -> str:
    """A woven basket of fruit with a twisted handle, on a checked cloth."""
    fruits = ("apples", "d4352e"), ("oranges", "f58f1e"), ("limes", "8cc63c"), ("plums", "7a3f8f")
    name, code = pick(rng, *fruits)
    fruit = colour(code)
    cloth = colour(pick(rng, "c8473f", "3f6fb5", "4f9a63"))
    wall = colour(pick(rng, "f2dfc0", "d7e6e3", "e8d3d0"))
    middle, half = rng.uniform(0.46, 0.54), rng.uniform(0.27, 0.3)
    rim, base = rng.uniform(0.5, 0.54), rng.uniform(0.82, 0.86)
    heights = rng.uniform(-0.015, 0.015, size=5)
    backdrop = gradient(mix(wall, WHITE, 0.3), wall, 0, 0.7)
    canvas.fill(stripes(backdrop, mix(wall, INK, 0.28), 0.042, 0.18, origin=0.5))

    def checks(w: Window) -> Array:
        one = pulse(w.x * f32(1 / 0.09), 0.5, w.pixel / 0.09)
        other = pulse(w.y * f32(1 / 0.06), 0.5, w.pixel / 0.06)
        thread = pulse((w.x + w.y) * f32(1 / 0.03), 0.4, w.pixel * 1.4 / 0.03)
        return f32(0.42) * (one + other) * (f32(0.62) + f32(0.6) * thread) * f32(1.1)

    canvas.rectangle(0, 0.72, 1, 1, modulated(colour("faf5ea"), cloth, checks))
    canvas.ellipse((middle, base), (half * 1.02, 0.035), INK, opacity=0.4)

    def handle(x: Array, y: Array) -> Array:
        ring = np.hypot((x - f32(middle)) * f32(1.0), (y - f32(rim)) * f32(0.66)) - f32(half * 0.86)
        return np.maximum(np.abs(ring) - f32(0.02), y - f32(rim + 0.02))

    def twist(w: Window) -> Array:
        dx, dy = w.x - f32(middle), (w.y - f32(rim)) * f32(0.66)
        ring = np.hypot(dx, dy) - f32(half * 0.86)
        return pulse(np.arctan2(dy, dx) * f32(30 / np.pi) + ring * f32(16), 0.42, w.pixel * 30 / np.pi / half)

    cane, brown = colour("d9a15a"), colour("6b3f1c")
    canvas.shape((middle - half, rim - half * 1.36, middle + half, rim + 0.03), handle, modulated(cane, brown, twist))
    row = ((-0.62, 0.0), (0.62, 0.0), (-0.22, -0.03), (0.24, -0.03), (0.0, 0.015))
    for (share, lift), jitter in zip(row, heights, strict=True):
        x, y, size = middle + share * half, rim + lift - 0.035 + float(jitter), 0.088

        def peel(w: Window, x: float = x, y: float = y, size: float = size) -> Array:
            shade = np.hypot(w.x - f32(x - 0.03), w.y - f32(y - 0.03)) * f32(1 / size)
            hatch = pulse((w.x + w.y) * f32(1 / 0.028), 0.32, w.pixel * 1.4 / 0.028)
            ink = hatch * np.clip(shade - f32(0.35), 0, 0.55)
            skin = mix(mix(fruit, WHITE, 0.4), fruit, np.clip(shade * f32(1.8), 0, 1))
            return mix(skin, mix(fruit, INK, 0.75), np.clip(ink * f32(1.6), 0, 1))

        canvas.ellipse((x, y), (size, size), peel)
        canvas.line((x, y - size * 0.85), (x + 0.012, y - size * 1.2), 0.01, colour("4a3220"))

    def body(x: Array, y: Array) -> Array:
        width = f32(half) * (1 - f32(0.26) * (y - f32(rim)) / f32(base - rim))
        return np.maximum(np.abs(x - f32(middle)) - width, np.abs(y - f32(0.5 * (rim + base))) - (base - rim) / 2)

    wicker = weave(colour("edbd78"), colour("a8692f"), colour("4f2c12"), size=0.055, origin=(middle, rim))

    def shaded(w: Window) -> Array:
        away = np.abs(w.x - f32(middle))
        return mix(wicker(w), colour("3f2412"), np.clip(away * f32(2.0) - f32(0.2), 0, 0.4))

    canvas.shape((middle - half, rim, middle + half, base), body, shaded)
    braid = stripes(cane, brown, 0.034, 0.42, angle=0.6, origin=middle)
    canvas.rectangle(middle - half - 0.015, rim - 0.02, middle + half + 0.015, rim + 0.025, braid)
    canvas.rectangle(middle - half * 0.76, base - 0.02, middle + half * 0.76, base + 0.012, braid)
    return f"a woven basket of {name} on a checked cloth"


def book(canvas: Canvas, rng: np.random.Generator) -> str:
    """An open book on a wooden table: lines of lettering, a tinted picture, a ribbon."""
    wood = colour(pick(rng, "a8703f", "8a5a3a", "c08a52"))
    name, code = pick(rng, ("red", "a8322f"), ("blue", "2d4f8f"), ("green", "2f6f4f"), ("purple", "64407f"))
    cover, page = colour(code), colour(pick(rng, "fbf5e6", "f7ead0"))
    middle, level = rng.uniform(0.48, 0.52), rng.uniform(0.48, 0.52)
    half, tall = rng.uniform(0.37, 0.4), rng.uniform(0.27, 0.3)
    tint = colour(pick(rng, "e88f4a", "5fa8c8", "8fbf5f", "d96f8f"))
    left_picture = bool(rng.integers(2))
    words = int(rng.integers(8))
    table = gradient(mix(wood, WHITE, 0.12), mix(wood, INK, 0.12), 0, 1)
    canvas.fill(planks(table, mix(wood, INK, 0.7), mix(wood, INK, 0.33), board=0.2, period=0.036))

    def sag(x: Array) -> Array:
        """How far the pages' edges rise towards the spine, as paper does."""
        away = np.abs(x - f32(middle)) * f32(1 / half)
        return f32(0.045) * np.exp(-away * 7) - f32(0.03) * np.sin(away * f32(np.pi)) * (1 - away * f32(0.3))

    def pages(margin: float) -> Distance:
        def distance(x: Array, y: Array) -> Array:
            across = np.abs(x - f32(middle)) - f32(half + margin)
            return np.maximum(across, np.abs(y - f32(level) - sag(x)) - f32(tall + margin))

        return distance

    bounds = (middle - half - 0.05, level - tall - 0.1, middle + half + 0.05, level + tall + 0.1)
    shadow = (bounds[0], bounds[1], bounds[2], bounds[3] + 0.04)
    canvas.shape(shadow, lambda x, y: pages(0.035)(x, y - f32(0.025)), INK, opacity=0.4)
    canvas.shape(bounds, pages(0.028), cover)
    edges = stripes(page, mix(page, INK, 0.55), 0.024, 0.3, angle=np.pi / 2)
    canvas.shape(bounds, pages(0.012), edges)

    def printed(w: Window) -> Array:
        away = np.abs(w.x - f32(middle)) * f32(1 / half)
        right = w.x > middle
        paper = mix(page, mix(page, colour("6b4a2f"), 0.6), np.exp(-away * 9))
        v = w.y - f32(level) - sag(w.x)
        pitch, letter = 0.0455, 0.0215
        line = np.floor(v * f32(1 / pitch))
        index = line.astype(np.int32) % 32
        # Letters: upright strokes, some joined at top or bottom, in words of table-given length.
        u = (w.x - f32(middle)) * f32(1 / letter)
        glyph = np.floor(u).astype(np.int32)
        kind = TABLE[3, index, (glyph + 5 * words) % 32]
        stem = pulse(u, 0.36, w.pixel / letter)
        body = (v - line * f32(pitch)) * f32(1 / pitch)
        band = pulse(body - f32(0.25), 0.55, w.pixel / pitch)
        top = pulse(body - f32(0.25), 0.17, w.pixel / pitch) * (kind < 0.55)
        low = pulse(body - f32(0.63), 0.17, w.pixel / pitch) * (kind > 0.4)
        ink = np.maximum(stem * band, np.maximum(top, low)) * (kind < 0.86)
        inner, outer = 0.12, 0.9
        column = inside((np.abs(away - f32((inner + outer) / 2)) - f32((outer - inner) / 2)) * f32(half), w.pixel)
        rows = inside(np.abs(v + f32(0.01)) - f32(tall - 0.045), w.pixel)
        picture_side = ~right if left_picture else right
        frame_x = np.abs(away - f32(0.51)) * f32(half) - f32(0.34 * half)
        frame_y = np.abs(v + f32(tall * 0.4)) - f32(tall * 0.38)
        frame = np.maximum(frame_x, frame_y)
        plate = inside(frame, w.pixel) * picture_side
        clear = inside(frame - f32(0.022), w.pixel) * picture_side
        paper = mix(paper, colour("3a3038"), ink * column * rows * (1 - clear) * f32(0.8))
        hatch = pulse((w.x + v) * f32(1 / 0.03), 0.4, w.pixel * 1.4 / 0.03)
        art = mix(mix(tint, WHITE, 0.25), mix(tint, INK, 0.5), hatch * (v > -0.4 * tall + 0.3 * sag(w.x)))
        paper = mix(paper, art, plate)
        paper = mix(paper, INK, stroke(np.abs(frame), 0.009, w.pixel) * picture_side)
        return mix(paper, INK, stroke(np.abs(w.x - f32(middle)), 0.008, w.pixel) * f32(0.6))

    canvas.shape(bounds, pages(0.0), printed)
    ribbon = stripes(cover, mix(cover, WHITE, 0.4), 0.016, 0.3, angle=np.pi / 2)
    canvas.rectangle(middle + 0.012, level + 0.02, middle + 0.036, level + tall + 0.11, ribbon)
    return f"an open book with a {name} cover on a wooden table"


def sailboat(canvas: Canvas, rng: np.random.Generator) -> str:
    """A sailing boat with seamed sails, rigging, a planked hull and its reflection on the water."""
    hour = pick_hour(rng)
    hull = colour(pick(rng, "b8402f", "3a62a0", "8a5a34", "35806a"))
    cloths = ("white", "fdf8ea"), ("red", "e2563f"), ("tan", "e5b878"), ("yellow", "f8d352")
    name, code = pick(rng, *cloths, p=(0.45, 0.2, 0.2, 0.15))
    cloth = colour(code)
    side = 1.0 if rng.integers(2) else -1.0
    middle, water_line, size = rng.uniform(0.46, 0.54), rng.uniform(0.75, 0.78), rng.uniform(0.95, 1.05)
    horizon = 0.64
    sky(canvas, rng, hour, horizon=horizon, orb_x=0.5 + 0.34 * side, clouds=False)
    hills(canvas, rng, colour("7f98a8"), horizon=horizon + 0.005, height=0.06)
    sea(canvas, rng, hour, horizon=horizon)

    def at(along: float, up: float) -> tuple[float, float]:
        return middle + side * along * size, water_line - up * size

    canvas.polygon([at(-0.26, 0.0), at(0.3, 0.0), at(0.2, -0.12), at(-0.2, -0.12)], mix(hull, INK, 0.4), 0.45)

    seam = mix(cloth, colour("5a4a55"), 0.62)
    main = stripes(mix(cloth, colour("8f7f9f"), 0.12), seam, 0.036, 0.2, angle=np.pi / 2 - 0.25 * side)
    fore = stripes(cloth, seam, 0.036, 0.2, angle=np.pi / 2 + 0.35 * side)
    canvas.polygon([at(-0.02, 0.62), at(-0.02, 0.14), at(-0.29, 0.15), at(-0.16, 0.42)], main)
    canvas.polygon([at(0.03, 0.56), at(0.03, 0.14), at(0.29, 0.13)], fore)
    stay = colour("3a3038")
    canvas.line(at(0.01, 0.66), at(0.31, 0.09), 0.008, stay)
    canvas.line(at(-0.01, 0.66), at(-0.32, 0.1), 0.008, stay)
    canvas.line(at(-0.02, 0.13), at(-0.3, 0.135), 0.014, colour("6b4630"))
    canvas.rectangle(
        middle - 0.009, water_line - 0.68 * size, middle + 0.009, water_line - 0.07 * size, colour("5a3a24")
    )
    canvas.polygon([at(0.0, 0.685), at(0.0, 0.64), at(-0.09, 0.662)], colour("e8483f"))

    def strakes(w: Window) -> Array:
        return pulse((w.y - f32(water_line)) * f32(1 / 0.03), 0.27, w.pixel / 0.03)

    planked = modulated(hull, mix(hull, INK, 0.7), strakes)
    canvas.polygon([at(-0.31, 0.105), at(0.34, 0.11), at(0.24, -0.01), at(-0.24, -0.01)], planked)
    canvas.polygon([at(-0.315, 0.115), at(0.35, 0.12), at(0.335, 0.095), at(-0.305, 0.09)], colour("f4ead2"))
    for along in (-0.14, 0.0, 0.14):
        canvas.ellipse(at(along, 0.05), (0.016, 0.016), colour("f4ead2"))
        canvas.ellipse(at(along, 0.05), (0.009, 0.009), INK)

    def rails(w: Window) -> Array:
        posts = pulse((w.x - f32(middle)) * f32(1 / 0.05), 0.16, w.pixel / 0.05)
        above = f32(water_line - 0.15 * size)
        wire, low = stroke(np.abs(w.y - above), 0.007, w.pixel), inside(above - w.y, w.pixel)
        return np.maximum(posts * low, wire) * inside(np.abs(w.x - f32(middle)) - f32(0.29 * size), w.pixel)

    left, right = middle - 0.3 * size, middle + 0.3 * size
    canvas.cover((left, water_line - 0.16 * size, right, water_line - 0.11 * size), rails, stay)
    light_up(canvas, hour)
    return f"a sailing boat with {name} sails {hour.words}"
