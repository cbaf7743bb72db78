"""Referring expressions for a scene: English that is true of exactly one thing, by a margin that excludes doubt."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from dit_ds.data.sample_set.scenes import Scene, Thing

_MARGIN = 22.0  # least distance in pixels at which one thing is called left of or above another
_BIGGER = 1.35  # least ratio of radii at which one thing is called bigger than another
_ORDINALS = ["first", "second", "third", "fourth"]
_SIDES: dict[str, tuple[Callable[[Thing], float], str, list[str]]] = {
    # side: (sort key, least at that side; adjective for the extreme of three or more; phrases for one of two)
    "left": (lambda t: t.x, "leftmost", ["left {n}", "{n} on the left"]),
    "right": (lambda t: -t.x, "rightmost", ["right {n}", "{n} on the right"]),
    "top": (lambda t: t.y, "topmost", ["top {n}", "{n} at the top"]),
    "bottom": (lambda t: -t.y, "lowest", ["bottom {n}", "{n} at the bottom"]),
}


class NounPhrase:
    """Adjectives and a noun; `text` and `members`: the things of the scene that it describes."""

    def __init__(self, scene: Scene, size: str = "", fill: str = "", colour: str = "", shape: str = ""):
        self.members = [
            t
            for t in scene.things
            if size in ("", t.size) and fill in ("", t.fill) and colour in ("", t.colour) and shape in ("", t.shape)
        ]
        noun = "group of {}dots" if shape == "dots" else "{}" + (shape or "thing")
        adjectives = [w for w in (size, fill, colour) if w]
        if shape == "dots":
            adjectives = [colour] if colour else []
        self.text = noun.format("".join(w + " " for w in adjectives))

    def unique(self) -> bool:
        """Whether it describes exactly one thing."""
        return len(self.members) == 1


# how often people name which properties: colour above all
_NAMES = {
    "colour shape": 5.0, "colour": 2.0, "size colour shape": 2.0, "fill colour shape": 1.5, "shape": 0.7, "size shape": 0.4,
    "fill shape": 0.4, "fill colour": 0.5, "size fill colour shape": 0.5,
}  # fmt: skip


def _phrases(scene: Scene, thing: Thing, rng: np.random.Generator) -> list[NounPhrase]:
    """Noun phrases true of `thing`, in a seeded order in which common ones tend to come first."""
    if thing.shape == "dots":
        return [NounPhrase(scene, shape="dots"), NounPhrase(scene, shape="dots", colour=thing.colour)]
    weights = np.array(list(_NAMES.values()))
    order = rng.choice(list(_NAMES), len(_NAMES), replace=False, p=weights / weights.sum())
    return [NounPhrase(scene, **{word: getattr(thing, word) for word in str(kind).split()}) for kind in order]


def _attributes(scene: Scene, thing: Thing, rng: np.random.Generator) -> Iterator[str]:
    """By appearance alone: "the striped red star"."""
    for phrase in _phrases(scene, thing, rng):
        if phrase.unique():
            yield phrase.text


def _ranked(members: list[Thing], key: Callable[[Thing], float]) -> list[Thing] | None:
    """The members in order of `key`, or None where two neighbours are closer than `_MARGIN`."""
    ranked = sorted(members, key=key)
    apart = all(key(b) - key(a) >= _MARGIN for a, b in zip(ranked, ranked[1:]))
    return ranked if apart else None


def _positions(scene: Scene, thing: Thing, rng: np.random.Generator) -> Iterator[str]:
    """By an extreme position: "the left star", "the lowest thing", "the star in the top left corner"."""
    for phrase in _phrases(scene, thing, rng):
        for side in rng.permutation(list(_SIDES)):
            key, extreme, one_of_two = _SIDES[str(side)]
            others = [key(t) for t in phrase.members if t is not thing]
            if not others or min(others) - key(thing) < _MARGIN:
                continue
            if len(phrase.members) == 2:
                yield str(rng.choice(one_of_two)).format(n=phrase.text)
            else:
                yield f"{extreme} {phrase.text}"
        corner = _corner(scene, thing)
        if corner and not any(_near_corner(scene, t, corner) for t in phrase.members if t is not thing):
            yield f"{phrase.text} in the {corner} corner"


def _corner(scene: Scene, thing: Thing) -> str | None:
    """The corner that `thing` is in, as "top left", or None."""
    u, v = thing.x / scene.width, thing.y / scene.height
    if min(u, 1 - u) > 0.35 or min(v, 1 - v) > 0.35:
        return None
    return f"{'top' if v < 0.5 else 'bottom'} {'left' if u < 0.5 else 'right'}"


def _near_corner(scene: Scene, thing: Thing, corner: str) -> bool:
    """Whether `thing` might also be said to be in that corner: the whole quarter of the image and a bit more."""
    u, v = thing.x / scene.width, thing.y / scene.height
    return (u < 0.58 if "left" in corner else u > 0.42) and (v < 0.58 if "top" in corner else v > 0.42)


def _ordinals(scene: Scene, thing: Thing, rng: np.random.Generator) -> Iterator[str]:
    """By rank among at least three: "the second star from the left"."""
    for phrase in _phrases(scene, thing, rng):
        for side in rng.permutation(["left", "right", "top", "bottom"]):
            ranked = _ranked(phrase.members, _SIDES[str(side)][0]) if len(phrase.members) >= 3 else None
            if ranked and ranked.index(thing) < len(_ORDINALS):
                yield f"{_ORDINALS[ranked.index(thing)]} {phrase.text} from the {side}"


def _comparatives(scene: Scene, thing: Thing, rng: np.random.Generator) -> Iterator[str]:
    """By size within one shape: "the bigger star" of two, "the smallest star" of more."""
    for phrase in _phrases(scene, thing, rng):
        others = [t for t in phrase.members if t is not thing]
        if thing.shape == "dots" or not others or len({t.shape for t in phrase.members}) > 1:
            continue  # people don't compare sizes across shapes
        for word, ratios in (("bigg", [thing.radius / t.radius for t in others]),
                             ("small", [t.radius / thing.radius for t in others])):  # fmt: skip
            if min(ratios) >= _BIGGER:
                yield f"{word}{'er' if len(others) == 1 else 'est'} {phrase.text}"


def _relation(name: str, t: Thing, o: Thing) -> bool | None:
    """Whether `t` is, say, left of `o`: True, False, or None where people could disagree."""
    dx, dy = t.x - o.x, t.y - o.y
    along, across = {"left of": (-dx, dy), "right of": (dx, dy), "above": (-dy, dx), "below": (dy, dx)}[name]
    if along >= _MARGIN and abs(across) <= 0.6 * along:
        return True
    return False if along <= 0 or abs(across) >= 1.8 * along else None


def _relations(scene: Scene, thing: Thing, rng: np.random.Generator) -> Iterator[str]:
    """By relation to another thing with a unique phrase: "the small ring above the blue square"."""
    anchors = [(o, p) for o in scene.things if o is not thing for p in _phrases(scene, o, rng)[:3] if p.unique()]
    for i in rng.permutation(len(anchors)):
        anchor, anchor_phrase = anchors[i]
        for name in rng.permutation(["left of", "right of", "above", "below"]):
            if _relation(str(name), thing, anchor) is not True:
                continue
            for phrase in _phrases(scene, thing, rng)[:5]:
                rivals = [t for t in phrase.members if t is not thing and t is not anchor]
                if all(_relation(str(name), t, anchor) is False for t in rivals):
                    link = f"to the {name}" if name in ("left of", "right of") and rng.random() < 0.5 else str(name)
                    yield f"{phrase.text} {link} the {anchor_phrase.text}"


# generators and how often each is drawn: people name appearance and position first
KINDS = {
    "attribute": (_attributes, 0.6),
    "position": (_positions, 0.17),
    "relation": (_relations, 0.13),
    "ordinal": (_ordinals, 0.04),
    "comparative": (_comparatives, 0.06),
}


def expressions(scene: Scene, i: int, rng: np.random.Generator, count: int = 4) -> list[str]:
    """Up to `count` different expressions of thing `i`, each true of no other thing in the scene."""
    sources = {kind: make(scene, scene.things[i], rng) for kind, (make, _) in KINDS.items()}
    found: list[str] = []
    while sources and len(found) < count:
        weights = np.array([KINDS[kind][1] for kind in sources])
        kind = str(rng.choice(list(sources), p=weights / weights.sum()))
        text = next((t for t in sources[kind] if t not in found), None)
        if text is None:
            del sources[kind]
        else:
            found.append(text)
    return [text if rng.random() < 0.5 else f"the {text}" for text in found]
