"""How a built-in scene's street is laid out: the view's end, the ground, the rows on both sides, the rest."""

from __future__ import annotations

from collections.abc import Callable

from gskd.data._scene_canvas import (
    BUILDING,
    FENCE,
    GRAINY,
    LEAFY,
    PAVEMENT,
    ROAD,
    SMOOTH,
    TREE,
    VOID,
    WORN,
    Street,
    dim,
)
from gskd.data._scene_objects import bicyclist, car, clutter, pedestrian, person, pole, tree

Thing = Callable[[Street, float, float], None]
"""Draws something whose foot is at x, z."""


def markings(s: Street) -> None:
    """Lane lines, crossings, repairs and puddles: all of them road; a kerb on each side."""
    dice, code = s.dice, ROAD + 16 * GRAINY
    left, right = s.edges
    white = dice.near((200, 198, 190), 20)
    for _ in range(dice.count(0, 4)):
        x, z = dice(left, right - 1), dice(2.5, 16)
        stain = dice.pick([dim(s.asphalt, dice(0.6, 0.85)), s.slab, dice.pick(s.stone)])
        s.floor(x, min(x + dice(0.5, 3), right), z, z + dice(0.5, 5), stain, code)
    middle = dice(-0.6, 0.6) + (left + right) / 2
    step, dashed = dice(3, 6), dice.chance(0.7)
    for i in range(10):
        z = 1.5 + i * step
        s.floor(middle - 0.08, middle + 0.08, z, z + step * (0.45 if dashed else 1.0), white, code)
    for x in (left + 0.3, right - 0.3):
        if dice.chance(0.4):
            s.floor(x - 0.07, x + 0.07, 1, 60, white, code)
    if dice.chance(0.25):
        z, x = dice(5, 14), left + 0.4
        while x < right - 0.5:
            s.floor(x, x + 0.5, z, z + 2.5, white, code)
            x += 1.0
    for _ in range(dice.count(1, 3) if dice.chance(0.35) else 0):
        x, z, wide = dice(left + 0.5, right - 1), dice(3.5, 14), dice(0.5, 1.6)
        (u0, v0), (u1, v1) = s.at(x - wide, 0, z + wide), s.at(min(x + wide, right), 0, z)
        s.draw.ellipse((u0, v0, max(u1, u0), max(v1, v0)), s.ink(dim(s.zenith, 0.92), z, ROAD + 16 * SMOOTH))
    for side, edge in zip((-1, 1), s.edges, strict=True):
        kerb = dice.near(dim(s.slab, dice(0.75, 1.25)), 8)
        s.floor(edge, edge + side * 0.18, 1, 60, kerb, PAVEMENT + 16 * GRAINY)


def row(s: Street, side: int) -> None:
    """Houses, gardens, fences, hedges and side streets, nearest last."""
    dice = s.dice
    k = (side + 1) // 2
    x = s.edges[k] + side * s.walks[k]
    z = dice(-4, 1.5)
    plots: list[tuple[float, float, str]] = []
    open_side = dice(0.15, 0.6)
    while z < s.end and len(plots) < 11:
        deep = dice(5, 13)
        kind = (
            "house"
            if not dice.chance(open_side)
            else dice.pick(["fence", "fence", "hedge", "street", "fenced house", "fenced house"])
        )
        plots.append((z, z + deep, kind))
        z += deep
    for z0, z1, kind in reversed(plots):
        if kind == "street":
            s.floor(s.edges[k] - side * 0.1, x + side * 40, z0, z1, s.asphalt, ROAD + 16 * GRAINY)
        elif kind == "house":
            house(s, x, side, z0, z1)
        elif kind == "fenced house":
            house(s, x + side * dice(3, 6), side, z0, z1)
        if kind == "hedge" or (kind == "fence" and dice.chance(0.6)):
            hedge(s, x + side * 0.6, z0, z1, dice(1.2, 3.2))
        if kind == "fence" or (kind != "house" and dice.chance(0.5)):
            tree(s, x + side * dice(1.5, 4), max(z0 + dice(1, 4), 4))
        if kind in ("fence", "fenced house"):
            fence(s, x, z0, z1)


def house(s: Street, x: float, side: int, z0: float, z1: float) -> None:
    dice = s.dice
    tall, back = dice(4.0, 12.0), x + side * 9
    # Ivy and green paint look like trees, glass looks like sky; only shape and place tell.
    look = dice()
    wall = dice.near(dice.pick(s.leaf) if look < 0.14 else s.zenith if look < 0.24 else dice.pick(s.stone), 16)
    code = BUILDING + 16 * (LEAFY if look < 0.08 else dice.pick([SMOOTH, GRAINY, WORN]))
    front = dim(wall, dice(0.7, 1.1))
    z0 = max(z0, 0.5)
    if dice.chance(0.5):
        roof = dice.near(dice.pick(s.stone), 16)
        ridge = tall + dice(1, 3)
        middle = x + side * 4.5
        s.face([(x, tall, z0), (middle, ridge, z0), (middle, ridge, z1), (x, tall, z1)], roof, code)
        s.face([(x, tall, z0), (middle, ridge, z0), (back, tall, z0)], front, code)
    s.board(min(x, back), max(x, back), 0, tall, z0, front, code)
    s.wall(x, z0, z1, 0, tall, wall, code)
    if s.sun * side < 0:
        s.shadow(x, x, z0, z1, tall)
    if z0 > 32:
        return
    glass = dice.pick([(46.0, 50.0, 58.0), dim(s.zenith, 0.9), dim(wall, 0.55), dice.pick(s.paint)])
    pane = BUILDING + 16 * SMOOTH
    storey, bay = dice(2.6, 3.6), dice(1.8, 3.2)
    wide, high, first = bay * dice(0.35, 0.7), storey * dice(0.4, 0.65), dice(0.5, 1.1)
    floors = min(int(tall / storey), 4)
    for j in range(floors):
        y = first + j * storey
        for i in range(min(int((z1 - z0) / bay), 5)):
            z = z0 + (i + 0.2) * bay
            if z + wide > 1.0:
                s.wall(x, z, z + wide, y, y + high, dice.near(glass, 12), pane)
        if j < 3 and z0 > 3:
            for i in range(min(int(9 / bay), 3)):
                u = x + side * (i + 0.3) * bay
                s.board(min(u, u + side * wide), max(u, u + side * wide), y, y + high, z0, dice.near(glass, 12), pane)
    if dice.chance(0.5):
        z = dice(z0, z1 - 1.2)
        s.wall(x, z, z + 1.1, 0, 2.1, dice.pick(s.paint), pane)
    if dice.chance(0.35):
        s.wall(x, z0, z1, 2.5, 3.2, dice.pick(s.paint), pane)  # a shop's fascia
    if z0 > 3 and dice.chance(0.4):
        # A poster: people and cars that are part of a building.
        u = x + side * dice(1.0, 3.0)
        if dice.chance(0.5):
            person(s, u, dice(0.3, 2.0), z0, pane)
        else:
            s.board(u - 0.8, u + 0.8, 1.0, 2.2, z0, dice.pick(s.paint), pane)
            s.board(u - 0.6, u + 0.6, 1.6, 2.1, z0, (60, 66, 74), pane)


def hedge(s: Street, x: float, z0: float, z1: float, tall: float) -> None:
    dice, code = s.dice, TREE + 16 * LEAFY
    leaf = dice.near(dice.pick(s.leaf), 10)
    s.wall(x, max(z0, 0.5), z1, 0, tall, leaf, code)
    for i in range(4):
        z = z0 + (i + 0.5) * (z1 - z0) / 4
        if z > 1.5:
            s.board(x - 0.9, x + 0.9, tall - 0.8, tall + dice(0.1, 1.2), z, dice.near(leaf, 8), code, oval=True)


def fence(s: Street, x: float, z0: float, z1: float) -> None:
    dice, tall = s.dice, s.dice(1.0, 2.1)
    colour = dice.near(dice.pick([*s.stone, s.slab, dice.pick(s.paint), dice.pick(s.leaf)]), 10)
    code = FENCE + 16 * dice.pick([SMOOTH, GRAINY, WORN])
    z0 = max(z0, 0.5)
    s.wall(x, z0, z1, 0, tall, colour, code)
    rails = dice.chance(0.6)
    gap = dim(colour, dice(0.5, 0.8))
    for i in range(12 if rails else 4):
        z = z0 + (i + 0.3) * (z1 - z0) / 12 if rails else z0 + i * (z1 - z0) / 4
        s.wall(x, z, z + ((z1 - z0) / 24 if rails else 0.12), 0.15, tall - 0.1, gap, code)


def things(s: Street) -> None:
    """Everything that stands apart from the rows, drawn far to near."""
    dice, (left, right) = s.dice, s.edges
    kerbs = (left - 0.5, right + 0.5)
    paths = (left - 0.6 * s.walks[0], right + 0.6 * s.walks[1])
    items: list[tuple[float, Thing, float]] = []

    def put(count: int, make: Thing, x: Callable[[], float], near: float, far: float) -> None:
        for _ in range(count):
            items.append((near + (far - near) * dice() * dice(), make, x()))

    put(dice.count(1, 6), tree, lambda: dice.pick(paths) * dice(1.0, 1.5), 4.5, 28)
    put(dice.count(2, 6), pole, lambda: dice.pick(kerbs), 3.5, 22)
    put(dice.count(0, 3), clutter, lambda: dice.pick(paths), 4, 18)
    put(dice.count(0, 5), pedestrian, lambda: dice.pick(paths) + dice(-0.4, 0.4), 5, 20)
    put(dice.count(0, 1), pedestrian, lambda: dice(left, right), 7, 20)
    put(dice.count(0, 2), bicyclist, lambda: dice.pick([left + 0.8, right - 0.8, 0.0]) + dice(-0.5, 0.5), 6, 20)
    put(dice.count(0, 5), car, lambda: dice.pick([left + 1.1, right - 1.1]), 4.5, 35)
    put(dice.count(0, 2), car, lambda: dice.pick([left * 0.4, right * 0.4]), 7, 35)
    for z, make, x in sorted(items, key=lambda item: -item[0]):
        if z < s.end:
            make(s, x, z)


def skyline(s: Street) -> None:
    """What closes the view: far houses and trees, near ones where the street ends."""
    dice, z = s.dice, s.end
    x = -z * 0.9
    while x < z * 0.9:
        wide, tall = dice(0.06, 0.16) * z, dice(4, 12) if z < 60 else dice(3, 14)
        if dice.chance(0.35):
            s.board(x, x + wide, 0, tall * 0.6, z, dice.pick(s.leaf), TREE + 16 * LEAFY)
            s.board(x, x + wide, tall * 0.3, tall * 0.8, z, dice.pick(s.leaf), TREE + 16 * LEAFY, oval=True)
        else:
            s.board(x, x + wide, 0, tall, z, dice.near(dice.pick(s.stone), 14), BUILDING + 16 * SMOOTH)
        x += wide


def paint(s: Street) -> None:
    """Paints everything, far to near."""
    dice = s.dice
    skyline(s)
    markings(s)
    row(s, -1)
    row(s, 1)
    things(s)
    if dice.chance(0.25):  # the bonnet of the camera's own car
        high, wide = dice(0.03, 0.1), s.width / s.height
        box = tuple(2 * s.height * c for c in (-0.1 * wide, 1 - high, 1.1 * wide, 1 + 2.5 * high))
        s.draw.ellipse(box, s.ink(dice.pick(s.paint), 0, VOID))
