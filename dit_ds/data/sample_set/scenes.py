"""Scenes of the embedded sample set: objects, their appearance, their visible pixels, and the rendered JPEG."""

from __future__ import annotations

import io
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

SIZES = [(320, 240), (240, 320), (288, 288), (320, 256), (256, 320)]  # (width, height)
COLOURS = {
    "red": (205, 35, 40), "green": (40, 150, 60), "blue": (40, 75, 205), "yellow": (235, 210, 50),
    "purple": (135, 55, 165), "orange": (240, 130, 30), "white": (240, 240, 240), "black": (25, 25, 30),
}  # fmt: skip
FILLS = ["solid", "striped", "spotted"]
SHAPES = ["circle", "square", "triangle", "star", "ring", "cross", "heart", "bar"]
RADII = {"small": (26, 32), "big": (45, 56)}  # in pixels, far enough apart to tell the sizes
CATEGORIES = {name: i for i, name in enumerate([*SHAPES, "dots"], start=1)}
_SUPERSAMPLE = 2  # drawn at twice the size and averaged, for smooth edges
_MIN_VISIBLE = 0.55  # least visible share of a thing


@dataclass(frozen=True)
class Thing:
    """One object.

    Attributes:
        shape: of `SHAPES`, or `dots`: a group, which is annotated as one.
        colour, fill, size: of `COLOURS`, `FILLS` and `RADII`.
        radius, x, y: in pixels.
        outlines: each (points, 2), x and y in pixels; the thing is their union.
        hole: (points, 2), cut out of the outlines.
    """

    shape: str
    colour: str
    fill: str
    size: str
    radius: float
    x: float
    y: float
    outlines: tuple[np.ndarray, ...]
    hole: np.ndarray | None = None


@dataclass(frozen=True)
class Scene:
    """An image's content.

    Attributes:
        width, height: in pixels.
        things: later ones are painted over earlier ones.
        ids: (H, W) uint8, what each pixel shows: 0 the background, i+1 thing i.
    """

    width: int
    height: int
    things: tuple[Thing, ...]
    ids: np.ndarray

    def mask(self, i: int) -> np.ndarray:
        """(H, W) bool: the visible pixels of thing `i`."""
        return self.ids == i + 1

    def occluded(self, i: int) -> bool:
        """Whether something painted later hides part of thing `i`."""
        return int(self.mask(i).sum()) < int(_paint([self.things[i]], self.width, self.height).astype(bool).sum())


def _unit_outline(shape: str) -> np.ndarray:
    """(points, 2): the shape's outline about the origin, radius 1."""
    if shape in ("circle", "ring"):
        t = np.linspace(0, 2 * np.pi, 40, endpoint=False)
        return np.stack([np.cos(t), np.sin(t)], 1)
    if shape == "star":
        t = np.arange(10) * np.pi / 5 - np.pi / 2
        r = np.where(np.arange(10) % 2 == 0, 1.0, 0.45)
        return np.stack([r * np.cos(t), r * np.sin(t)], 1)
    if shape == "heart":
        t = np.linspace(0, 2 * np.pi, 40, endpoint=False)
        y = 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
        return np.stack([16 * np.sin(t) ** 3, -y - 2.5], 1) / 16
    if shape == "cross":
        a, b = 0.32, 0.95
        return np.array([(-a, -b), (a, -b), (a, -a), (b, -a), (b, a), (a, a), (a, b), (-a, b), (-a, a), (-b, a),
                         (-b, -a), (-a, -a)])  # fmt: skip
    corners = {
        "square": [(-0.85, -0.85), (0.85, -0.85), (0.85, 0.85), (-0.85, 0.85)],
        "triangle": [(0, -1), (0.95, 0.75), (-0.95, 0.75)],
        "bar": [(-1.15, -0.36), (1.15, -0.36), (1.15, 0.36), (-1.15, 0.36)],
    }
    return np.array(corners[shape], float)


def _transformed(points: np.ndarray, angle: float, radius: float, x: float, y: float) -> np.ndarray:
    """(points, 2): rotated by `angle` radians, scaled by `radius`, moved to (x, y)."""
    c, s = np.cos(angle), np.sin(angle)
    return points @ np.array([[c, s], [-s, c]]) * radius + (x, y)


def _paint(things: list[Thing], width: int, height: int) -> np.ndarray:
    """(H, W) uint8: i+1 where thing i is the topmost.

    Pillow also fills the pixels that an outline touches. Painting at three times the size and reading the centre of each
    3x3 block limits that error to a sixth of a pixel.
    """
    canvas = Image.new("L", (3 * width, 3 * height))
    draw = ImageDraw.Draw(canvas)
    for i, thing in enumerate(things, start=1):
        if thing.hole is None:
            for outline in thing.outlines:
                draw.polygon([tuple(p) for p in 3 * outline - 0.5], fill=i)
        else:  # what lies below shows through a hole
            stencil = Image.new("1", canvas.size)
            ring = ImageDraw.Draw(stencil)
            ring.polygon([tuple(p) for p in 3 * thing.outlines[0] - 0.5], fill=1)
            ring.polygon([tuple(p) for p in 3 * thing.hole - 0.5], fill=0)
            canvas.paste(i, mask=stencil)
    return np.asarray(canvas)[1::3, 1::3]


def _make_thing(rng: np.random.Generator, shape: str, colour: str, size: str, centre: tuple[float, float]) -> Thing:
    """One thing of random radius, fill and angle."""
    radius = float(rng.uniform(*RADII[size]))
    fill = str(rng.choice(FILLS, p=[0.6, 0.25, 0.15]))
    angle = rng.uniform(0, np.pi) if shape == "bar" else rng.uniform(-0.25, 0.25)
    outline = _transformed(_unit_outline(shape), angle, radius, *centre)
    hole = _transformed(_unit_outline(shape), angle, radius * 0.5, *centre) if shape == "ring" else None
    x, y = centre
    return Thing(shape, colour, fill, size, radius=radius, x=x, y=y, outlines=(outline,), hole=hole)


def _make_dots(rng: np.random.Generator, colour: str, x: float, y: float, radius: float) -> Thing:
    """A loose group of nine small discs."""
    golden = np.pi * (3 - np.sqrt(5))
    k = np.arange(9)
    r = radius * 0.85 * np.sqrt((k + 0.5) / 9)
    centres = np.stack([x + r * np.cos(k * golden), y + r * np.sin(k * golden)], 1)
    unit = _unit_outline("circle")[::4]
    discs = tuple(_transformed(unit, 0.0, float(rng.uniform(4.0, 5.0)), cx, cy) for cx, cy in centres)
    return Thing("dots", colour, "solid", "group", radius=radius, x=x, y=y, outlines=discs)


def make_scene(rng: np.random.Generator) -> Scene:
    """Draw one scene: 4 to 9 things from a few shapes and colours, so that most share one with another thing."""
    while True:
        width, height = SIZES[rng.integers(len(SIZES))]
        shapes = rng.choice(SHAPES, size=rng.integers(3, 7), replace=False)
        colours = list(rng.permutation(list(COLOURS)))  # most things get a colour that no other has
        things: list[Thing] = []
        wanted = int(rng.integers(4, 10))
        may_overlap = int(rng.integers(0, 3))
        if rng.random() < 0.1:
            radius = 30.0
            x, y = rng.uniform(radius, width - radius), rng.uniform(radius, height - radius)
            things.append(_make_dots(rng, str(colours.pop()), x, y, radius))
        for _ in range(wanted * 40):
            if len(things) == wanted:
                break
            size = "big" if rng.random() < 0.65 else "small"
            reach = RADII[size][1]
            x, y = rng.uniform(reach, width - reach), rng.uniform(reach, height - reach)
            gaps = [np.hypot(x - t.x, y - t.y) / (reach + t.radius) for t in things]
            close = [g for g in gaps if g < 1.0]
            overlaps = len(close) == 1 and close[0] > 0.6 and may_overlap > 0
            if close and not overlaps:
                continue
            may_overlap -= overlaps
            unique = colours and rng.random() < 0.75
            colour = str(colours.pop()) if unique else str(rng.choice(list(COLOURS)))
            things.append(_make_thing(rng, str(rng.choice(shapes)), colour, size, (x, y)))
        ids = _paint(things, width, height)
        areas = [int(_paint([t], width, height).astype(bool).sum()) for t in things]
        visible = [int((ids == i + 1).sum()) for i in range(len(things))]
        if len(things) >= 4 and all(v >= _MIN_VISIBLE * a for v, a in zip(visible, areas)):
            return Scene(width, height, tuple(things), ids)


def _background(rng: np.random.Generator, width: int, height: int) -> np.ndarray:
    """(H, W, 3) float: a soft texture of blotches, bands and grain in muted tones."""
    tone = rng.uniform(95, 175) + rng.uniform(-14, 14, 3)
    coarse = Image.fromarray(rng.integers(0, 256, (rng.integers(3, 9), rng.integers(3, 9)), np.uint8))
    blotches = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC), float) / 255 - 0.5
    u = np.add.outer(np.arange(height) * rng.uniform(-1, 1), np.arange(width) * rng.uniform(-1, 1))
    bands = np.sin(u * rng.uniform(0.05, 0.4))
    grain = rng.integers(-9, 10, (height, width, 1))
    return tone + 42 * blotches[..., None] + rng.uniform(0, 10) * bands[..., None] + grain


def _fill_pattern(rng: np.random.Generator, thing: Thing, width: int, height: int) -> np.ndarray:
    """(height, width, 3) uint8: the thing's colour with its stripes or spots."""
    base = np.clip(np.array(COLOURS[thing.colour]) + rng.uniform(-14, 14, 3), 0, 255)
    second = base * 0.45 if base.mean() > 90 else base * 0.4 + 150
    if thing.fill == "solid":
        on = np.zeros((height, width), bool)
    elif thing.fill == "striped":
        a = rng.uniform(0, np.pi)
        u = np.add.outer(np.arange(height) * np.sin(a), np.arange(width) * np.cos(a))
        on = (u / (5.0 * _SUPERSAMPLE)) % 2 < 0.8
    else:
        step = 9.0 * _SUPERSAMPLE
        gy, gx = np.arange(height) % step - step / 2, np.arange(width) % step - step / 2
        on = np.add.outer(gy**2, gx**2) < (0.3 * step) ** 2
    return np.where(on[..., None], second, base).astype(np.uint8)


def render_jpeg(scene: Scene, rng: np.random.Generator) -> bytes:
    """The scene as JPEG bytes."""
    s = _SUPERSAMPLE
    background = np.clip(_background(rng, scene.width, scene.height), 0, 255).astype(np.uint8)
    canvas = Image.fromarray(background).resize((scene.width * s, scene.height * s), Image.Resampling.NEAREST)
    for thing in scene.things:
        points = np.concatenate(thing.outlines) * s
        x0, y0 = np.floor(points.min(0)).astype(int) - 1
        w, h = np.ceil(points.max(0)).astype(int) + 1 - (x0, y0)
        stencil = Image.new("L", (int(w), int(h)))
        draw = ImageDraw.Draw(stencil)
        for outline in thing.outlines:
            draw.polygon([tuple(p) for p in outline * s - (x0 + 0.5, y0 + 0.5)], fill=255)
        if thing.hole is not None:
            draw.polygon([tuple(p) for p in thing.hole * s - (x0 + 0.5, y0 + 0.5)], fill=0)
        canvas.paste(Image.fromarray(_fill_pattern(rng, thing, int(w), int(h))), (int(x0), int(y0)), stencil)
    out = io.BytesIO()
    canvas.reduce(s).save(out, "JPEG", quality=90)
    return out.getvalue()
