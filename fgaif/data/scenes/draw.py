"""Draw a scene with Pillow: 72 x 72 pixels, one 24-pixel cell per thing, plain pale background."""

import math
import random
from collections.abc import Callable

from PIL import Image, ImageDraw

from fgaif.data.scenes.world import GRID, Scene

CELL = 24
IMAGE_SIZE = GRID * CELL
BACKGROUND = 240
"""Mean shade of the background, per channel; it varies by 15 from image to image."""

_RGB = {
    "red": (220, 40, 40),
    "green": (40, 170, 60),
    "blue": (50, 80, 220),
    "yellow": (235, 210, 40),
    "purple": (150, 50, 180),
    "brown": (140, 90, 45),
}
_RADIUS = {"small": 6.5, "large": 10.5}
_SHIFT = {"small": 3.0, "large": 1.0}

_Colour = tuple[int, int, int]
_Points = list[tuple[float, float]]


def draw_scene(scene: Scene) -> Image.Image:
    """Return the scene's RGB image; jitter of place, size and shade follows from its seed."""
    rng = random.Random(f"fgaif drawing {scene.seed}")
    image = Image.new(
        "RGB", (IMAGE_SIZE, IMAGE_SIZE), _shade((BACKGROUND, BACKGROUND, BACKGROUND), 15, rng)
    )
    canvas = ImageDraw.Draw(image)
    for thing in scene.things:
        radius = _RADIUS[thing.size] + rng.uniform(-0.5, 0.5)
        shift = _SHIFT[thing.size]
        x = (thing.column + 0.5) * CELL + rng.uniform(-shift, shift)
        y = (thing.row + 0.5) * CELL + rng.uniform(-shift, shift)
        _SHAPES[thing.noun](canvas, x, y, radius, _shade(_RGB[thing.colour], 15, rng))
    return image


def _shade(colour: _Colour, spread: int, rng: random.Random) -> _Colour:
    red, green, blue = (max(0, min(255, c + rng.randint(-spread, spread))) for c in colour)
    return red, green, blue


def _at(x: float, y: float, r: float, points: _Points) -> _Points:
    return [(x + r * px, y + r * py) for px, py in points]


def _circle(d: ImageDraw.ImageDraw, x: float, y: float, r: float, fill: _Colour) -> None:
    d.ellipse((x - r, y - r, x + r, y + r), fill=fill)


def _square(d: ImageDraw.ImageDraw, x: float, y: float, r: float, fill: _Colour) -> None:
    d.rectangle((x - 0.85 * r, y - 0.85 * r, x + 0.85 * r, y + 0.85 * r), fill=fill)


def _triangle(d: ImageDraw.ImageDraw, x: float, y: float, r: float, fill: _Colour) -> None:
    d.polygon(_at(x, y, r, [(0, -1), (0.95, 0.8), (-0.95, 0.8)]), fill=fill)


def _star(d: ImageDraw.ImageDraw, x: float, y: float, r: float, fill: _Colour) -> None:
    tips = [(1.0 if i % 2 == 0 else 0.42, i * math.pi / 5) for i in range(10)]
    d.polygon(_at(x, y, r, [(k * math.sin(a), -k * math.cos(a)) for k, a in tips]), fill=fill)


def _cross(d: ImageDraw.ImageDraw, x: float, y: float, r: float, fill: _Colour) -> None:
    d.rectangle((x - r, y - 0.3 * r, x + r, y + 0.3 * r), fill=fill)
    d.rectangle((x - 0.3 * r, y - r, x + 0.3 * r, y + r), fill=fill)


def _ring(d: ImageDraw.ImageDraw, x: float, y: float, r: float, fill: _Colour) -> None:
    d.ellipse((x - r, y - r, x + r, y + r), outline=fill, width=max(2, int(0.35 * r)))


def _heart(d: ImageDraw.ImageDraw, x: float, y: float, r: float, fill: _Colour) -> None:
    d.ellipse((x - r, y - 0.9 * r, x, y + 0.1 * r), fill=fill)
    d.ellipse((x, y - 0.9 * r, x + r, y + 0.1 * r), fill=fill)
    d.polygon(_at(x, y, r, [(-0.95, -0.2), (0.95, -0.2), (0, 1)]), fill=fill)


def _moon(d: ImageDraw.ImageDraw, x: float, y: float, r: float, fill: _Colour) -> None:
    d.chord((x - r, y - r, x + r, y + r), 90, 270, fill=fill)


def _tree(d: ImageDraw.ImageDraw, x: float, y: float, r: float, fill: _Colour) -> None:
    d.polygon(_at(x, y, r, [(0, -1), (0.8, 0.3), (-0.8, 0.3)]), fill=fill)
    d.rectangle((x - 0.2 * r, y + 0.3 * r, x + 0.2 * r, y + r), fill=fill)


def _house(d: ImageDraw.ImageDraw, x: float, y: float, r: float, fill: _Colour) -> None:
    d.polygon(_at(x, y, r, [(0, -1), (1, -0.1), (-1, -0.1)]), fill=fill)
    wall = (x - 0.7 * r, y - 0.1 * r, x + 0.7 * r, y + 0.9 * r)
    d.rectangle(wall, outline=fill, width=max(2, int(0.25 * r)))


_SHAPES: dict[str, Callable[[ImageDraw.ImageDraw, float, float, float, _Colour], None]] = {
    "circle": _circle,
    "square": _square,
    "triangle": _triangle,
    "star": _star,
    "cross": _cross,
    "ring": _ring,
    "heart": _heart,
    "moon": _moon,
    "tree": _tree,
    "house": _house,
}
