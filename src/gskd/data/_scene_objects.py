"""What stands and drives in the built-in scenes' streets. ``x`` and ``z`` are where it meets the ground, in metres."""

from __future__ import annotations

from gskd.data._scene_canvas import (
    BICYCLIST,
    CAR,
    GRAINY,
    LEAFY,
    PEDESTRIAN,
    POLE,
    ROAD,
    SIGN,
    SMOOTH,
    TREE,
    VOID,
    Colour,
    Street,
    dim,
)


def tree(s: Street, x: float, z: float) -> None:
    dice = s.dice
    trunk, wide, bole = dice(0.1, 0.22), dice(1.3, 2.8), dice(1.8, 3.2)
    leaf = dice.near(dice.pick(s.leaf), 12)
    s.shadow(x - wide * 0.7, x + wide * 0.7, z - 0.5, z + 0.8, 2.5)
    s.board(
        x - trunk,
        x + trunk,
        0,
        bole + 1,
        z,
        dice.pick([(84.0, 74.0, 64.0), (110.0, 106.0, 100.0)]),
        TREE + 16 * GRAINY,
    )
    for _ in range(9):
        u, y, r = x + dice(-0.7, 0.7) * wide, bole + dice(0.3, 1.7) * wide, wide * dice(0.35, 0.65)
        s.board(u - r, u + r, y - r * 0.9, y + r * 0.9, z, dice.near(leaf, 16), TREE + 16 * LEAFY, oval=True)


def pole(s: Street, x: float, z: float) -> None:
    dice = s.dice
    signed = dice.chance(0.6)
    tall, thick = dice(2.4, 3.4) if signed else dice(4, 8), dice(0.05, 0.1)
    metal = dice.near(
        dice.pick([(100.0, 100.0, 100.0), (60.0, 62.0, 62.0), (150.0, 150.0, 148.0), (96.0, 84.0, 70.0)]), 10
    )
    s.shadow(x - thick, x + thick, z, z + 0.1, tall * 0.6)
    s.board(x - thick, x + thick, 0, tall, z, metal, POLE + 16 * SMOOTH)
    if not signed:
        arm = dice(0.5, 1.6) * (-1 if x > 0 else 1)
        s.board(min(x, x + arm), max(x, x + arm), tall - 0.08, tall + 0.05, z, metal, POLE + 16 * SMOOTH)
        if dice.chance(0.6):
            return
        tall = dice(2.4, 3.4)
    code, half = SIGN + 16 * SMOOTH, dice(0.3, 0.6)
    kind = dice.count(0, 4)
    face = dice.pick([*s.paint, (46.0, 50.0, 58.0), (204.0, 200.0, 196.0)])
    inner = dice.pick([(204.0, 200.0, 196.0), (40.0, 40.0, 44.0), dice.pick(s.paint)])
    if kind == 0:  # traffic light
        s.board(x - 0.16, x + 0.16, tall - 0.95, tall, z, (38, 38, 40), code)
        s.board(
            x - 0.09,
            x + 0.09,
            tall - 0.3,
            tall - 0.1,
            z,
            dice.pick([(210.0, 60.0, 50.0), (80.0, 190.0, 110.0)]),
            code,
        )
    elif kind == 1:
        points = [(x - half, tall - half, z), (x + half, tall - half, z), (x, tall + half, z)]
        s.face(points, face, code)
    else:
        wide = half * (dice(1.3, 2.2) if kind == 2 else 1)
        s.board(x - wide, x + wide, tall - half, tall + half, z, face, code, oval=kind == 3)
        s.board(x - wide * 0.7, x + wide * 0.7, tall - half * 0.5, tall + half * 0.5, z, inner, code, oval=kind == 3)


def person(s: Street, x: float, y: float, z: float, code: int) -> None:
    dice = s.dice
    tall, half, stride = dice(1.5, 1.85), dice(0.2, 0.27), dice(0.02, 0.2)
    coat, legs = (
        dice.near(dice.pick([*s.paint, *s.stone]), 10),
        dice.pick([(40.0, 42.0, 52.0), dice.pick(s.paint)]),
    )
    for foot in (-stride, stride):
        s.board(x + foot - 0.09, x + foot + 0.09, y, y + tall * 0.5, z, legs, code)
    s.board(x - half, x + half, y + tall * 0.45, y + tall * 0.84, z, coat, code)
    s.board(
        x - 0.12,
        x + 0.12,
        y + tall * 0.83,
        y + tall,
        z,
        dice.pick([(176.0, 134.0, 112.0), (110.0, 78.0, 62.0)]),
        code,
        oval=True,
    )


def pedestrian(s: Street, x: float, z: float) -> None:
    s.shadow(x - 0.2, x + 0.2, z, z + 0.3, 1.6)
    person(s, x, 0, z, PEDESTRIAN + 16 * SMOOTH)


def bicyclist(s: Street, x: float, z: float) -> None:
    dice, code = s.dice, BICYCLIST + 16 * SMOOTH
    dark = dice.near((44, 44, 48), 8)
    s.shadow(x - 0.3, x + 0.3, z, z + 0.6, 1.4)
    across = dice.chance(0.5)
    if across:
        thin = max(2, int(0.07 * s.focal / z * 2 * s.height))
        for wheel in (-0.52, 0.52):
            (u0, v0), (u1, v1) = s.at(x + wheel - 0.34, 0.68, z), s.at(x + wheel + 0.34, 0, z)
            s.draw.ellipse((u0, v0, max(u1, u0 + 1), max(v1, v0 + 1)), None, s.ink(dark, z, code), thin)
        frame = [s.at(x + u, y, z) for u, y in ((-0.52, 0.34), (-0.1, 0.85), (0.45, 0.85), (0.0, 0.3), (-0.52, 0.34))]
        s.draw.line(frame, s.ink(dice.pick(s.paint), z, code), thin)
    else:
        s.board(x - 0.05, x + 0.05, 0, 0.8, z, dark, code)
        s.board(x - 0.28, x + 0.28, 0.95, 1.03, z, dark, code)
    lean = 0.3 if across else 0.0
    coat, half = dice.near(dice.pick([*s.paint, *s.stone]), 10), 0.14 if across else 0.21
    s.face([(x - 0.1, 0.4, z), (x + 0.12, 0.4, z), (x + 0.15, 1.0, z), (x - 0.15, 1.0, z)], dim(coat, 0.5), code)
    s.face([(x - half, 0.9, z), (x + half, 0.9, z), (x + half + lean, 1.45, z), (x - half + lean, 1.45, z)], coat, code)
    s.board(x - 0.12 + lean, x + 0.12 + lean, 1.43, 1.7, z, dice.pick([(176.0, 134.0, 112.0), dark]), code, oval=True)


def car(s: Street, x: float, z: float) -> None:
    dice, code = s.dice, CAR + 16 * SMOOTH
    across = dice.chance(0.12)
    van = dice.chance(0.2)
    wide, deep = (4.2, 1.8) if across else (1.8, 5.0 if van else 4.2)
    tall, waist = (dice(2.0, 2.6), 1.1) if van else (dice(1.35, 1.55), 0.85)
    body = dice.near(dice.pick([*s.paint, s.stone[0], s.asphalt]), 12)
    glass = dice.pick([(44.0, 48.0, 56.0), dim(s.zenith, 0.75), (70.0, 76.0, 82.0)])
    left, right = x - wide / 2, x + wide / 2
    s.shadow(left, right, z, z + deep, tall)
    s.floor(left - 0.05, right + 0.05, z - 0.15, z + deep, dim(s.asphalt, 0.4), ROAD + 16 * SMOOTH)
    inset = 0.05 if van else 0.22 * wide / 1.8
    near, flank = (left, left + inset) if x > 0 else (right, right - inset)
    s.wall(near, z, z + deep, 0.28, waist, dim(body, 0.8), code)
    roof = [
        (near, waist, z),
        (flank, tall, z + 0.5),
        (flank, tall, z + deep * 0.75),
        (near, waist, z + deep * 0.95),
    ]
    s.face(roof, dim(glass, 0.85) if not van else dim(body, 0.85), code)
    for wheel in (0.7, deep - 0.9):
        if not across:
            s.wall(near, z + wheel - 0.32, z + wheel + 0.32, 0, 0.6, (32, 32, 34), code)
    s.face(
        [(left + inset, tall, z + 0.5), (right - inset, tall, z + 0.5), (right, waist, z), (left, waist, z)],
        body,
        code,
    )
    a, b = inset + 0.12, inset * 0.4 + 0.12
    s.face(
        [
            (left + a, tall - 0.12, z + 0.3),
            (right - a, tall - 0.12, z + 0.3),
            (right - b, waist, z),
            (left + b, waist, z),
        ],
        glass,
        code,
    )
    s.board(left, right, 0.25, waist, z, body, code)
    lamp: Colour = dice.pick([(170.0, 40.0, 36.0), (220.0, 214.0, 196.0)])
    for u in (left, right - 0.25):
        s.board(u, u + 0.25, waist - 0.3, waist - 0.1, z, lamp, code)
        tyre = u + (0.5 if u == left else -0.7) if across else u
        s.board(tyre, tyre + (0.62 if across else 0.22), 0, 0.6 if across else 0.28, z, (30, 30, 32), code, oval=across)
    if not across:
        s.board(x - 0.27, x + 0.27, 0.42, 0.55, z, (206, 196, 150), code)


def clutter(s: Street, x: float, z: float) -> None:
    """Bins and boxes nobody labelled."""
    half, tall = s.dice(0.25, 0.6), s.dice(0.6, 1.2)
    s.board(x - half, x + half, 0, tall, z, s.dice.near(s.dice.pick([*s.paint, *s.stone]), 10), VOID)
