"""Scenes with something built: bridge, house, lighthouse, windmill."""

import numpy as np

from davae.data.scenes.canvas import Array, Canvas, Window, f32, inside, stroke, turned
from davae.data.scenes.surroundings import INK, WHITE, glow, hills, lawn, light_up, pick, pick_hour, sea, sky
from davae.data.scenes.textures import bricks, colour, mix, modulated, planks, pulse, scallops, stripes


def bridge(canvas: Canvas, rng: np.random.Generator) -> str:
    """A suspension bridge over water: two towers, main cables, hangers and a trussed deck."""
    hour = pick_hour(rng)
    name, code = pick(rng, ("red", "c8402f"), ("green", "2f7d6b"), ("grey", "6d7787"))
    # At night a bridge is floodlit, or it would vanish against the sky.
    tone = mix(colour(code), WHITE, 0.4) if hour.words == "at night" else colour(code)
    dark = mix(tone, INK, 0.55)
    deck, top = rng.uniform(0.58, 0.64), rng.uniform(0.16, 0.22)
    middle, half = rng.uniform(0.46, 0.54), rng.uniform(0.255, 0.285)
    horizon = deck + rng.uniform(0.06, 0.1)
    sky(canvas, rng, hour, horizon=horizon, orb_x=0.5, clouds=False)
    ridge = mix(colour("6f8fa0"), colour("8aa06f"), float(rng.uniform()))
    hills(canvas, rng, ridge, horizon=horizon + 0.01, height=0.13)
    sea(canvas, rng, hour, horizon=horizon)
    towers = (middle - half, middle + half)

    def cable(x: Array) -> Array:
        # Parabolas that meet at the towers' tops: one between them and half of one on either side.
        share = np.abs(x - f32(middle)) / f32(half)
        between = np.minimum(share, 1) ** 2
        outside = (np.maximum(2 - share, 0)) ** 2
        return f32(deck - 0.03) + f32(top - deck + 0.03) * np.where(share < 1, between, outside)

    def ropes(w: Window) -> Array:
        line = cable(w.x)
        slope = np.sqrt(1 + (np.gradient(line[0]) / w.pixel) ** 2).astype(np.float32)
        main = stroke(np.abs(w.y - line) / slope, 0.013, w.pixel)
        hangers = pulse((w.x - f32(middle)) * f32(1 / 0.042) + 0.1, 0.17, w.pixel / 0.042)
        return np.maximum(main, hangers * inside(line - w.y, w.pixel))

    canvas.cover((0, top - 0.01, 1, deck), ropes, dark)
    for x in towers:
        canvas.rectangle(x - 0.032, top - 0.03, x - 0.012, horizon + 0.05, tone)
        canvas.rectangle(x + 0.012, top - 0.03, x + 0.032, horizon + 0.05, tone)
        canvas.rectangle(x + 0.024, top - 0.03, x + 0.032, horizon + 0.05, dark, 0.6)
        for y in (top - 0.03, top + 0.1, top + 0.23):
            canvas.rectangle(x - 0.036, y, x + 0.036, y + 0.022, tone)
        canvas.rectangle(x - 0.05, horizon + 0.04, x + 0.05, horizon + 0.09, mix(colour("8d8a86"), INK, 0.2))

    def truss(w: Window) -> Array:
        zigzag = np.abs(np.mod((w.x - f32(middle)) * f32(1 / 0.06), 1) * 2 - 1)
        level = (w.y - f32(deck)) * f32(1 / 0.045)
        return stroke(np.abs(level - zigzag) * f32(0.045 * 0.55), 0.009, w.pixel)

    canvas.rectangle(0, deck, 1, deck + 0.045, modulated(mix(tone, WHITE, 0.35), dark, truss))
    canvas.rectangle(0, deck - 0.014, 1, deck + 0.004, tone)
    canvas.rectangle(0, deck + 0.043, 1, deck + 0.055, dark)
    light_up(canvas, hour)
    return f"a {name} suspension bridge over water {hour.words}"


def house(canvas: Canvas, rng: np.random.Generator) -> str:
    """A brick house with a shingled roof, sash windows, a door, a chimney, and a picket fence."""
    hour = pick_hour(rng)
    wall = colour(pick(rng, "b5523a", "c97b4a", "a8443f", "cf9a62"))
    roof = colour(pick(rng, "4b4a63", "6b3a34", "3f5c66"))
    door = colour(pick(rng, "2f6f5e", "2d4f8f", "8f2d3a", "d9a531"))
    middle, half = rng.uniform(0.47, 0.53), rng.uniform(0.255, 0.295)
    eaves, ridge = rng.uniform(0.42, 0.46), rng.uniform(0.16, 0.2)
    side = 1 if rng.integers(2) else -1
    ground = 0.8
    sky(canvas, rng, hour, horizon=0.74, orb_x=0.5 - 0.38 * side, clouds=False)
    hills(canvas, rng, colour("7d9f6a"), horizon=0.75, height=0.1)
    lawn(canvas, rng, horizon=0.74)

    chimney = middle + side * half * 0.55
    mortar = mix(wall, colour("f6ead8"), 0.75)
    stone = bricks(wall, mortar, size=(0.066, 0.033), width=0.0075, origin=(middle, eaves))
    canvas.rectangle(chimney - 0.035, ridge - 0.03, chimney + 0.035, eaves, stone)
    canvas.rectangle(chimney - 0.045, ridge - 0.045, chimney + 0.045, ridge - 0.02, mix(wall, INK, 0.5))
    canvas.rectangle(middle - half, eaves, middle + half, ground, stone)
    canvas.rectangle(middle - half, eaves, middle + half, eaves + 0.03, INK, 0.3)
    shingles = scallops(roof, mix(roof, INK, 0.7), size=(0.05, 0.032), width=0.008, origin=(middle, ridge), lift=0.55)
    left, right = middle - half - 0.05, middle + half + 0.05  # of the eaves, which hang over
    gable = [(middle - half * 0.62, ridge), (middle + half * 0.62, ridge)]
    canvas.polygon([(left, eaves + 0.012), *gable, (right, eaves + 0.012)], shingles)
    canvas.rectangle(left, eaves + 0.004, right, eaves + 0.018, mix(roof, INK, 0.5))

    canvas.rectangle(middle - 0.06, ground - 0.2, middle + 0.06, ground, WHITE)
    panels = stripes(door, mix(door, INK, 0.55), 0.024, 0.25, origin=middle)
    canvas.rectangle(middle - 0.046, ground - 0.186, middle + 0.046, ground, panels)
    canvas.ellipse((middle + 0.03, ground - 0.09), (0.008, 0.008), colour("f4d35e"))
    pane = glow("ffd977", hour) if hour.words in ("at night", "at dusk") else colour("a9d6ea")
    for x in (middle - half * 0.62, middle + half * 0.62):
        y = eaves + 0.13
        canvas.rectangle(x - 0.066, y - 0.066, x + 0.066, y + 0.076, WHITE)
        canvas.rectangle(x - 0.054, y - 0.054, x + 0.054, y + 0.06, pane)
        canvas.rectangle(x - 0.054, y - 0.054, x + 0.054, y - 0.03, mix(pane, INK, 0.2))
        for step in (-0.018, 0.018):
            canvas.rectangle(x + step - 0.004, y - 0.054, x + step + 0.004, y + 0.06, WHITE)
            canvas.rectangle(x - 0.054, y + 0.003 + step - 0.004, x + 0.054, y + 0.003 + step + 0.004, WHITE)
        canvas.rectangle(x - 0.076, y + 0.07, x + 0.076, y + 0.084, mix(WHITE, INK, 0.3))
    path = [(middle - 0.055, 1.0), (middle + 0.055, 1.0), (middle + 0.04, ground), (middle - 0.04, ground)]
    canvas.polygon(path, colour("d9c7a4"))
    fence(canvas, 0.0, middle - 0.12, 0.83)
    fence(canvas, middle + 0.12, 1.0, 0.83)
    light_up(canvas, hour)
    return f"a brick house with a garden fence {hour.words}"


def fence(canvas: Canvas, left: float, right: float, top: float) -> None:
    """White pickets on two rails."""
    white = colour("f5f1e6")
    canvas.rectangle(left, top + 0.025, right, top + 0.037, white)
    canvas.rectangle(left, top + 0.075, right, top + 0.087, white)

    def pickets(w: Window) -> Array:
        bars = pulse((w.x - f32(0.5)) * f32(1 / 0.034), 0.42, w.pixel / 0.034)
        height = np.clip((w.y - f32(top)) * f32(1 / w.pixel), 0, 1) * inside(w.y - f32(top + 0.11), w.pixel)
        return bars * height * ((w.x > left) & (w.x < right))

    canvas.cover((left, top, right, top + 0.11), pickets, white)


def lighthouse(canvas: Canvas, rng: np.random.Generator) -> str:
    """A banded lighthouse on a rocky cliff above the sea."""
    hour = pick_hour(rng)
    colours = ("red", "cf3a33"), ("blue", "2c5aa0"), ("black", "34323d")
    name, code = pick(rng, *colours, p=(0.6, 0.25, 0.15))
    band, pale = colour(code), colour("f6efe2")
    middle, base, top = rng.uniform(0.44, 0.56), rng.uniform(0.74, 0.78), rng.uniform(0.24, 0.28)
    width = rng.uniform(0.088, 0.1)
    horizon = 0.68
    sky(canvas, rng, hour, horizon=horizon, orb_x=0.16, clouds=True)
    sea(canvas, rng, hour, horizon=horizon)
    dark_hours = hour.words in ("at night", "at dusk")
    if dark_hours:
        for side in (-1, 1):
            far = middle + side * 0.7
            beam = [(middle, top - 0.055), (far, top - 0.14), (far, top + 0.04)]
            canvas.polygon(beam, glow("fff2b0", hour), 0.4)

    rock = mix(colour("6d5f57"), colour("8a7a62"), float(rng.uniform()))

    def cliff(x: Array) -> Array:
        away = np.abs(x - f32(middle)) * f32(1 / 0.36)
        jag = np.abs(np.mod(x * f32(11), 1) - f32(0.5)) * f32(0.03)
        return f32(base) + f32(0.3) * away**3 + jag * np.minimum(away * 2, 1)

    def cracks(w: Window) -> Array:
        u = w.x * f32(1 / 0.05) + f32(0.5) * np.sin(w.y * f32(22))
        v = w.y * f32(1 / 0.042) + f32(0.5) * np.sin(w.x * f32(17))
        return np.maximum(pulse(u, 0.2, w.pixel / 0.05), pulse(v, 0.26, w.pixel / 0.042))

    canvas.below(base, cliff, modulated(rock, mix(rock, INK, 0.65), cracks))
    canvas.shape((0, base - 0.01, 1, 1), lambda x, y: np.abs(y - cliff(x)) - f32(0.012), colour("6fa04a"))

    height = base - top

    def tower(x: Array, y: Array) -> Array:
        half = f32(width) * (f32(0.62) + f32(0.38) * (y - f32(top)) / f32(height))
        return np.maximum(np.abs(x - f32(middle)) - half, np.abs(y - f32((top + base) / 2)) - height / 2)

    def bands(w: Window) -> Array:
        return pulse((w.y - f32(top)) * f32(2.5 / height), 0.5, w.pixel * 2.5 / height)

    def masonry(w: Window) -> Array:
        painted = mix(pale, band, bands(w))
        v = (w.y - f32(top)) * f32(1 / 0.032)
        u = (w.x - f32(middle)) * f32(1 / 0.055) + f32(0.5) * np.mod(np.floor(v), 2)
        joints = np.maximum(pulse(v, 0.24, w.pixel / 0.032), pulse(u, 0.14, w.pixel / 0.055))
        shadow = np.clip((w.x - f32(middle)) * f32(4.5), 0, 0.45)
        return mix(mix(painted, INK, joints * f32(0.42)), INK, shadow)

    canvas.shape((middle - width, top, middle + width, base), tower, masonry)
    for y in (top + 0.16, top + 0.32):
        canvas.rectangle(middle - 0.014, y, middle + 0.014, y + 0.042, INK)
    lamp = glow("ffe98a", hour) if dark_hours else colour("bfe3ea")
    room = width * 0.5
    canvas.rectangle(middle - width * 0.85, top - 0.012, middle + width * 0.85, top + 0.008, INK)
    panes = stripes(lamp, INK, 0.026, 0.22, origin=middle)
    canvas.rectangle(middle - room, top - 0.085, middle + room, top - 0.012, panes)
    canvas.rectangle(middle - width * 0.85, top - 0.042, middle + width * 0.85, top - 0.036, INK)
    eaves = room * 1.25
    canvas.polygon([(middle - eaves, top - 0.083), (middle, top - 0.145), (middle + eaves, top - 0.083)], band)
    canvas.line((middle, top - 0.145), (middle, top - 0.18), 0.008, INK)
    light_up(canvas, hour)
    return f"a {name} and white lighthouse on a cliff {hour.words}"


def windmill(canvas: Canvas, rng: np.random.Generator) -> str:
    """A tower mill with four lattice sails, in a field of flowers."""
    hour = pick_hour(rng)
    body = colour(pick(rng, "e9dcc3", "b9846a", "8e9aa6"))
    cap = colour(pick(rng, "a33b32", "3f6b50", "4b4668"))
    flower = colour(pick(rng, "e8455a", "f2b632", "a95fc0"))
    middle, hub = rng.uniform(0.46, 0.54), rng.uniform(0.35, 0.39)
    turn = rng.uniform(0.25, 1.3)
    reach = rng.uniform(0.29, 0.33)
    base, horizon = 0.82, 0.72
    sky(canvas, rng, hour, horizon=horizon, orb_x=0.13, clouds=True)
    hills(canvas, rng, colour("8fae76"), horizon=horizon + 0.01, height=0.07)
    lawn(canvas, rng, horizon=horizon)

    def beds(w: Window) -> Array:
        v = (w.y - f32(0.86)) * f32(1 / 0.047)
        u = w.x * f32(1 / 0.038) + f32(0.5) * np.mod(np.floor(v), 2)
        du, dv = np.mod(u, 1) - f32(0.5), np.mod(v, 1) - f32(0.4)
        return inside(np.hypot(du * f32(0.038), dv * f32(0.047)) - f32(0.0125), w.pixel)

    canvas.cover((0, 0.86, 1, 1), beds, flower)

    def tower(x: Array, y: Array) -> Array:
        half = f32(0.085) + f32(0.075) * (y - f32(hub)) / f32(base - hub)
        return np.maximum(np.abs(x - f32(middle)) - half, np.abs(y - f32((hub + base) / 2)) - (base - hub) / 2)

    stone = bricks(body, mix(body, INK, 0.5), size=(0.064, 0.036), width=0.0075, origin=(middle, hub))

    def shaded(w: Window) -> Array:
        return mix(stone(w), INK, np.clip((w.x - f32(middle)) * f32(3), 0, 0.4))

    canvas.shape((middle - 0.17, hub, middle + 0.17, base), tower, shaded)
    tiles = scallops(cap, mix(cap, INK, 0.65), size=(0.044, 0.028), width=0.008, origin=(middle, hub), lift=0.5)

    def dome(x: Array, y: Array) -> Array:
        return np.maximum(np.hypot(x - f32(middle), (y - f32(hub)) * 0.95) - 0.105, y - f32(hub + 0.008))

    canvas.shape((middle - 0.11, hub - 0.12, middle + 0.11, hub + 0.01), dome, tiles)
    door = planks(colour("6b4630"), INK, INK, board=0.02, period=0.01, angle=0)
    canvas.rectangle(middle - 0.034, base - 0.13, middle + 0.034, base, door)
    canvas.rectangle(middle - 0.022, hub + 0.14, middle + 0.022, hub + 0.2, INK)
    canvas.rectangle(middle - 0.016, hub + 0.146, middle + 0.016, hub + 0.194, colour("a9d6ea"))

    centre_y = hub - 0.03
    wood, cloth = colour("4a3528"), colour("fbf6e8")

    def sails(w: Window) -> tuple[Array, Array]:
        dx, dy = w.x - f32(middle), w.y - f32(centre_y)
        p, q = turned(dx, dy, turn)
        # Turn every point into the quadrant of the first sail: along its arm, across it.
        flat = np.abs(p) >= np.abs(q)
        along = np.where(flat, np.abs(p), np.abs(q))
        across = np.where(flat, np.where(p > 0, q, -q), np.where(q > 0, -p, p))
        arm = inside(np.maximum(np.abs(across) - f32(0.009), along - f32(reach)), w.pixel)
        middle_along, half_along = 0.5 * (reach + 0.07), 0.5 * (reach - 0.07)
        frame = np.maximum(
            np.abs(across - f32(0.045)) - f32(0.036), np.abs(along - f32(middle_along)) - f32(half_along)
        )
        bars = np.maximum(
            pulse((along - f32(0.07)) * f32(1 / 0.036), 0.25, w.pixel / 0.036),
            pulse((across - f32(0.0063)) * f32(1 / 0.036), 0.2, w.pixel / 0.036),
        )
        sheet = inside(frame, w.pixel)
        rim = stroke(np.abs(frame), 0.008, w.pixel)
        return sheet, np.maximum(np.maximum(arm, rim), sheet * bars)

    window = canvas.window(
        middle - reach - 0.05, centre_y - reach - 0.05, middle + reach + 0.05, centre_y + reach + 0.05
    )
    assert window is not None
    sheet, bars = sails(window)
    canvas.blend(window, sheet * f32(0.85), cloth)
    canvas.blend(window, bars, wood)
    canvas.ellipse((middle, centre_y), (0.022, 0.022), INK)
    light_up(canvas, hour)
    return f"a windmill in a field of flowers {hour.words}"
