"""A street's camera, canvas and colours: what the drawing of a built-in scene stands on.

Points are (x right, y up, z forward) in metres; the road is y = 0, the camera stands at x = z = 0 and sees a point at
row ``cy + f (eye - y) / z`` and column ``cx + f (x / z + bend z)``, in image heights. Image and label are one drawing
at twice the asked size: RGB is the picture, alpha holds class + 16 * material.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import numpy as np
from PIL import Image, ImageDraw

T = TypeVar("T")
Colour = tuple[float, float, float]
Points = Sequence[tuple[float, float, float]]

SKY, BUILDING, POLE, ROAD, PAVEMENT, TREE, SIGN, FENCE, CAR, PEDESTRIAN, BICYCLIST = range(11)
VOID = 15  # the alpha channel holds class + 16 * material, so void needs a number below 16
SMOOTH, GRAINY, LEAFY, CLOUDY, WORN = range(5)

MASONRY: list[Colour] = [
    (152, 142, 130),
    (128, 88, 72),
    (174, 164, 146),
    (100, 98, 100),
    (190, 184, 176),
    (122, 120, 118),
]
FOLIAGE: list[Colour] = [(64, 88, 42), (92, 96, 52), (48, 66, 40), (122, 98, 54), (88, 74, 54), (78, 104, 60)]
PAINT: list[Colour] = [
    (150, 44, 42),
    (44, 62, 118),
    (198, 198, 202),
    (34, 34, 38),
    (110, 116, 122),
    (62, 98, 72),
    (186, 156, 60),
]


class Dice:
    """Scalar draws in call order, fetched in blocks because one draw from a numpy generator costs microseconds."""

    def __init__(self, generator: np.random.Generator) -> None:
        self._generator = generator
        self._block: list[float] = []

    def __call__(self, low: float = 0.0, high: float = 1.0) -> float:
        if not self._block:
            self._block = self._generator.random(512).tolist()
        return low + (high - low) * self._block.pop()

    def chance(self, probability: float) -> bool:
        return self() < probability

    def count(self, low: int, high: int) -> int:
        return low + int(self() * (high - low + 1))

    def pick(self, options: Sequence[T]) -> T:
        return options[int(self() * len(options))]

    def near(self, colour: Colour, spread: float = 14.0) -> Colour:
        light = self(-spread, spread)
        r, g, b = (c + light + self(-spread, spread) / 3 for c in colour)
        return r, g, b


def mix(a: Colour, b: Colour, t: float) -> Colour:
    return a[0] + (b[0] - a[0]) * t, a[1] + (b[1] - a[1]) * t, a[2] + (b[2] - a[2]) * t


def dim(colour: Colour, by: float) -> Colour:
    return colour[0] * by, colour[1] * by, colour[2] * by


class Street:
    """One scene's camera, canvas, widths and colours; starts as sky, road and pavements.

    Args:
        dice: Source of every choice about this street.
        size: Height and width of the final image in pixels.
    """

    def __init__(self, dice: Dice, size: tuple[int, int]) -> None:
        self.dice = dice
        self.height, self.width = size
        self.cx, self.cy = dice(0.32, 0.68) * self.width / self.height, dice(0.41, 0.54)  # in image heights
        self.eye, self.focal, self.bend = dice(1.3, 2.3), dice(0.75, 1.1), dice(-0.004, 0.004)
        # Few colours for many surfaces: walls, ground, fences and roofs share three, cars, clothes and shops four.
        self.stone = [dice.near(dice.pick(MASONRY), 18) for _ in range(3)]
        self.paint = [dice.near(dice.pick(PAINT), 18) for _ in range(4)]
        self.leaf = [dice.near(dice.pick(FOLIAGE), 10) for _ in range(2)]
        grey = dice(150, 220)
        clear, dusk, dull = (132.0, 168.0, 214.0), (206.0, 168.0, 140.0), (grey, grey, grey * 1.02)
        self.zenith = dice.near(dice.pick([clear, dull, dull, dull, dusk, self.stone[0]]), 12)
        self.haze = mix(self.zenith, (214, 214, 212), dice(0.3, 0.9))
        self.fog = dice(0.0, 0.025) if dice.chance(0.8) else dice(0.025, 0.06)
        self.sun = dice.pick([-1.0, 1.0]) * dice(0.3, 1.6)  # shadow length per height, along x
        self.edges = (-dice(2.4, 6.0), dice(2.4, 6.0))
        self.walks = (dice(1.5, 4.5), dice(1.5, 4.5))
        self.end = dice(22, 45) if dice.chance(0.3) else 90.0
        self.asphalt = mix(dice.near((104, 102, 104), 16), dice.pick(self.stone), dice(0, 0.6))
        self.slab = dice.near(self.asphalt if dice.chance(0.5) else dice.pick(self.stone), 14)
        self._background()

    def _background(self) -> None:
        """Paints sky, road and pavements pixel by pixel, where depth follows from the row."""
        rows, cols, dice = 2 * self.height, 2 * self.width, self.dice
        v = ((np.arange(rows, dtype=np.float32) + 0.5) / rows)[:, None]
        u = ((np.arange(cols, dtype=np.float32) + 0.5) / rows)[None, :]
        pixels = np.empty((rows, cols, 4), np.uint8)
        haze, zenith, asphalt, slab = (
            np.array(c, np.float32) for c in (self.haze, self.zenith, self.asphalt, self.slab)
        )
        horizon = int(np.count_nonzero(v < self.cy))
        fade = v[:horizon, :, None] / self.cy
        pixels[:horizon, :, :3] = np.clip((1 - fade) * zenith + fade * haze, 0, 255)
        pixels[:horizon, :, 3] = SKY + 16 * CLOUDY

        z = self.focal * self.eye / np.maximum(v[horizon:] - self.cy, 0.004)
        x = (u - self.cx) * (z / self.focal) - self.bend * z * z
        road = (x > self.edges[0]) & (x < self.edges[1])
        tile = dice(0.5, 0.9)
        tiled = ~road if dice.chance(0.8) else road
        along, across = z / tile, x / tile
        joints = ((across - np.floor(across) < 0.12) | (along - np.floor(along) < 0.12)) & (z < 14) & tiled
        clear = 1 / (1 + self.fog * z)
        light = np.where(joints, 1 - 0.3 * (1 - z / 14), 1) * clear
        ground = np.where(road[..., None], asphalt, slab) * light[..., None] + haze * (1 - clear)[..., None]
        pixels[horizon:, :, :3] = np.clip(ground, 0, 255)
        pixels[horizon:, :, 3] = np.where(road, ROAD + 16 * GRAINY, PAVEMENT + 16 * GRAINY)
        self.image = Image.fromarray(pixels)
        self.draw = ImageDraw.Draw(self.image)
        self.shade = Image.new("L", (self.width, self.height), 255)
        self.shading = ImageDraw.Draw(self.shade)

    def at(self, x: float, y: float, z: float) -> tuple[float, float]:
        """The canvas position of a point; one behind the camera is moved to just before it."""
        z = max(z, 0.5)
        scale = 2 * self.height
        return (
            (self.cx + self.focal * (x / z + self.bend * z)) * scale - 0.5,
            (self.cy + self.focal * (self.eye - y) / z) * scale - 0.5,
        )

    def ink(self, colour: Colour, z: float, code: int) -> tuple[int, int, int, int]:
        r, g, b = mix(self.haze, colour, 1 / (1 + self.fog * z))
        return min(max(int(r), 0), 255), min(max(int(g), 0), 255), min(max(int(b), 0), 255), code

    def face(self, points: Points, colour: Colour, code: int) -> None:
        """A flat polygon in space."""
        self.draw.polygon([self.at(*p) for p in points], self.ink(colour, points[0][2], code))

    def wall(self, x: float, z0: float, z1: float, y0: float, y1: float, colour: Colour, code: int) -> None:
        """A rectangle along the street."""
        self.face([(x, y0, z0), (x, y1, z0), (x, y1, z1), (x, y0, z1)], colour, code)

    def floor(self, x0: float, x1: float, z0: float, z1: float, colour: Colour, code: int) -> None:
        """A rectangle on the ground."""
        z0 = max(z0, 0.5)
        while z0 < z1:  # in steps that follow the bend
            z = min(z1, z0 + 2 + 0.5 * z0)
            self.face([(x0, 0, z0), (x1, 0, z0), (x1, 0, z), (x0, 0, z)], colour, code)
            z0 = z

    def board(
        self, x0: float, x1: float, y0: float, y1: float, z: float, colour: Colour, code: int, oval: bool = False
    ) -> None:
        """A rectangle or ellipse that faces the camera, never thinner than one pixel of the label."""
        (left, top), (right, bottom) = self.at(x0, y1, z), self.at(x1, y0, z)
        shape = self.draw.ellipse if oval else self.draw.rectangle
        shape((left, top, max(right, left + 1), max(bottom, top + 1)), self.ink(colour, z, code))

    def shadow(self, x0: float, x1: float, z0: float, z1: float, tall: float) -> None:
        """Darkens the ground that something upright keeps from the sun."""
        reach = self.sun * tall
        corners = [
            (x0, z0),
            (x1, z0),
            (x1 + reach, z0 + tall * 0.3),
            (x1 + reach, z1 + tall * 0.3),
            (x0 + reach, z1),
            (x0, z1),
        ]
        flat = [self.at(x, 0, z) for x, z in corners]
        self.shading.polygon([(u / 2, v / 2) for u, v in flat], 130)
