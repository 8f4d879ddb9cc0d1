"""A world of coloured shapes, small enough to be judged exactly.

    prompt = "a circle left of a square"                      # any key of grammar(): {prompt: spec}
    image = render(prompt, np.random.default_rng(0))          # a random picture of it, 32 x 32
    assert check(prompt, image)                               # exact, without any model

A prompt names one to four shapes in GenEval's six categories. Nothing of the project is imported here;
toy/ holds tiny models of this world in the formats of the real ones, and toy/build.py trains them.
"""

import itertools
import zlib
from contextlib import suppress
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image
from scipy import ndimage

SIZE = 32  # pixels a side
GROUND = np.array([0.07, 0.07, 0.10])
COLORS = {
    "red": (1.0, 0.15, 0.15),
    "green": (0.15, 0.80, 0.25),
    "blue": (0.20, 0.40, 1.0),
    "yellow": (1.0, 0.85, 0.10),
    "purple": (0.85, 0.30, 0.95),
    "white": (1.0, 1.0, 1.0),
}
SHAPES = ("circle", "square", "triangle", "cross")
NUMBERS = {"two": 2, "three": 3, "four": 4}
RELATIONS = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}  # direction (dx, dy)
CATEGORIES = ("single_object", "two_object", "counting", "colors", "position", "color_attr")  # GenEval's tags
TEMPLATES = ("{}", "a photo of {}", "a picture of {}", "an image of {}", "a drawing of {}")


def knows(folder, rows):
    """Are the rows [(prompt, file_names)] of a folder of this world? Every prompt must be one of grammar()
    and the first picture 32 x 32. For such rows alone the toy's models and rewards may be a default."""
    small = True
    with suppress(OSError), Image.open(Path(folder, rows[0][1][0])) as image:
        small = image.size == (SIZE, SIZE)  # where it cannot be read, its reader says so
    return small and all(prompt in grammar() for prompt, _ in rows)


def checker(folder, rows):
    """check(), where the rows of metadata.jsonl are of this world, else None."""
    return check if knows(folder, [(row["prompt"], row["file_names"]) for row in rows]) else None


# ----------------------------------------------------------------------------- prompts


def plural(shape):
    return "crosses" if shape == "cross" else shape + "s"


WORDS = sorted(
    {w for t in TEMPLATES for w in t.replace("{}", "").split()}
    | {"a", "and", "of", "left", "right", "above", "below"}
    | {*COLORS, *NUMBERS, *SHAPES, *map(plural, SHAPES)}
)


@lru_cache(None)
def grammar():
    """Every sentence: {prompt: spec}, spec = {tag, objects [(shape, color or None)], relation or None, core}.

    The core is the sentence without its template. A picture with anything more than the objects is wrong."""
    cores = []  # (category, text, objects, relation)
    for a in SHAPES:
        cores.append(("single_object", f"a {a}", [(a, None)], None))
        cores += [("colors", f"a {c} {a}", [(a, c)], None) for c in COLORS]
        cores += [("counting", f"{w} {plural(a)}", [(a, None)] * n, None) for w, n in NUMBERS.items()]
        for b in (s for s in SHAPES if s != a):
            cores.append(("two_object", f"a {a} and a {b}", [(a, None), (b, None)], None))
            cores += [("position", f"a {a} {r} a {b}", [(a, None), (b, None)], r) for r in RELATIONS]
            for c, d in itertools.permutations(COLORS, 2):
                cores.append(("color_attr", f"a {c} {a} and a {d} {b}", [(a, c), (b, d)], None))
    sentences = {}
    for tag, text, objects, relation in cores:
        for t in TEMPLATES:
            sentences[t.format(text)] = dict(tag=tag, objects=objects, relation=relation, core=text)
    return sentences


def held_out(prompt):
    """Held-out prompts are a fixed fifth. Relations and attributions are held out as whole meanings, so that
    their composition was never seen; the small categories have too few and are held out by wording."""
    spec = grammar()[prompt]
    key = spec["core"] if spec["tag"] in ("position", "color_attr") else prompt
    return zlib.crc32(key.encode()) % 5 == 0


def prompts_of(split, per_category, seed=0):
    """`per_category` prompts (or all) of each category, from split "train" or "heldout"; shuffled."""
    rng, out, wanted = np.random.default_rng(seed), [], split == "heldout"
    for tag in CATEGORIES:
        options = [p for p, s in grammar().items() if s["tag"] == tag and held_out(p) == wanted]
        out += [options[i] for i in rng.permutation(len(options))[:per_category]]
    return [out[i] for i in rng.permutation(len(out))]


# ----------------------------------------------------------------------------- renderer


def shape_mask(shape, x, y):
    """Boolean mask of a unit shape (radius 1) at coordinates x, y (y points down)."""
    if shape == "circle":
        return x * x + y * y <= 1
    if shape == "square":
        return np.maximum(abs(x), abs(y)) <= 0.88
    if shape == "triangle":
        return (y <= 0.85) & (y >= -1 + 1.85 * abs(x))
    return (np.maximum(abs(x), abs(y)) <= 1) & (np.minimum(abs(x), abs(y)) <= 0.32)  # cross


def along_and_across(x, y, dx, dy):
    """How far an offset (x, y) goes along a relation's direction (dx, dy), and how far to its sides."""
    return x * dx + y * dy, abs(x * dy) + abs(y * dx)


def layout(spec, rng):
    """Random centres and radii that satisfy the spec: objects apart, the relation along the dominant axis."""
    n, step = len(spec["objects"]), RELATIONS.get(spec["relation"])
    while True:
        r = rng.uniform(4.0, 5.0, n)
        p = rng.uniform(r[:, None] + 1, SIZE - 1 - r[:, None], (n, 2))
        apart = np.linalg.norm(p[:, None] - p[None], axis=-1) + 99 * np.eye(n) >= r[:, None] + r[None] + 2
        if not apart.all():
            continue
        if step is None:
            return p, r
        along, across = along_and_across(*(p[0] - p[1]), *step)
        if along >= 9 and across <= 0.6 * along:
            return p, r


def coverage(shape, cx, cy, r):
    """(SIZE, SIZE) share of every pixel that a shape covers, by 3 x 3 samples."""
    grid = (np.arange(3 * SIZE) + 0.5) / 3
    mask = shape_mask(shape, (grid[None, :] - cx) / r, (grid[:, None] - cy) / r)
    return mask.reshape(SIZE, 3, SIZE, 3).mean((1, 3))


@lru_cache(None)
def moments():
    """{shape: (area, y of the centroid)} of the unit shapes."""
    g = np.linspace(-1.1, 1.1, 441)
    masks = {s: shape_mask(s, g[None, :], g[:, None]) for s in SHAPES}
    return {s: (m.mean() * 2.2**2, float((m * g[:, None]).sum() / m.sum())) for s, m in masks.items()}


def draw(objects, centres, radii):
    """[(shape, color)], (n, 2), (n,) -> (SIZE, SIZE, 3) uint8, anti-aliased."""
    image = np.tile(GROUND, (SIZE, SIZE, 1))
    for (shape, color), (cx, cy), r in zip(objects, centres, radii):
        cover = coverage(shape, cx, cy, r)[..., None]
        image = image * (1 - cover) + cover * np.array(COLORS[color])
    return (image * 255).round().astype(np.uint8)


def render(prompt, rng):
    """A random image that shows `prompt` (or its spec): PIL, SIZE x SIZE RGB. Unnamed colours are random; the
    objects of a counting prompt share theirs."""
    spec = prompt if isinstance(prompt, dict) else grammar()[prompt]
    names, objects = list(COLORS), []
    shared = names[rng.integers(len(names))]
    for shape, color in spec["objects"]:
        if color is None and spec["tag"] == "counting":
            color = shared
        objects.append((shape, color or names[rng.integers(len(names))]))
    return Image.fromarray(draw(objects, *layout(spec, rng)))


# ----------------------------------------------------------------------------- exact checker


def find_objects(image):
    """Objects in an image: [(shape or None, color, x, y)]. Colours -> components -> best template overlap."""
    image = image.convert("RGB")
    if image.size != (SIZE, SIZE):
        image = image.resize((SIZE, SIZE))
    v = np.asarray(image) / 255.0 - GROUND  # (H, W, 3)
    palette = np.array(list(COLORS.values())) - GROUND  # (6, 3)
    cosine = (v @ palette.T) / (np.linalg.norm(v, axis=-1, keepdims=True) + 1e-6)
    cosine = cosine / np.linalg.norm(palette, axis=-1)  # (H, W, 6)
    best = cosine.argmax(-1)  # hue: the nearest direction
    cover = (v * palette[best]).sum(-1) / (palette[best] ** 2).sum(-1)  # coverage along that direction
    found = []
    for c, color in enumerate(COLORS):
        labels, n = ndimage.label((best == c) & (cover > 0.5), structure=np.ones((3, 3)))
        for i in range(1, n + 1):
            if (labels == i).sum() < 8:  # a fleck, not an object
                continue
            wide = ndimage.binary_dilation(labels == i, np.ones((3, 3)))
            soft = np.where(wide, cover.clip(0, 1), 0)  # edges by coverage
            cy, cx = ndimage.center_of_mass(soft)
            overlap = {}
            for shape, (area, drop) in moments().items():  # template of equal area and centroid
                r = np.sqrt(soft.sum() / area)
                t = coverage(shape, cx + 0.5, cy + 0.5 - drop * r, r)
                overlap[shape] = np.minimum(t, soft).sum() / np.maximum(t, soft).sum()
            shape = max(overlap, key=overlap.get)
            found.append((shape if overlap[shape] >= 0.7 and soft.sum() > 16 else None, color, cx, cy))
    return found


def check(prompt, image):
    """Does the PIL `image` show exactly what `prompt` says? ValueError for a sentence outside the grammar."""
    spec = grammar().get(prompt)
    if spec is None:
        judged = "it judges prompts of toy/world.py's grammar() only"
        raise ValueError(f"world.check: {prompt!r} is not a sentence of the toy world; {judged}")
    found, wanted = find_objects(image), spec["objects"]
    if sorted(str(f[0]) for f in found) != sorted(s for s, _ in wanted):
        return False
    by_shape = {f[0]: f for f in found}  # shapes are distinct, except when counting
    if any(c and by_shape[s][1] != c for s, c in wanted):
        return False
    if spec["relation"]:
        (_, _, ax, ay), (_, _, bx, by) = (by_shape[s] for s, _ in wanted)
        along, across = along_and_across(ax - bx, ay - by, *RELATIONS[spec["relation"]])
        return along > across
    return True


def free_colours(prompt, image):
    """(C,) the share of each colour among the objects of a picture; 0 where the prompt names a colour. Each
    picture counts once, however many objects it shows."""
    named = any(color for _, color in grammar()[prompt]["objects"])
    found = [] if named else [color for _, color, _, _ in find_objects(image)]
    return np.array([found.count(color) / max(1, len(found)) for color in COLORS])


def free_place(prompt, image):
    """(9,) 1 at the cell of a 3 x 3 grid, row by row, where the prompt's first object is; 0 without such an
    object, or where the prompt names a relation. Of several such objects the topmost counts."""
    wanted, cells = grammar()[prompt]["objects"][0][0], np.zeros(9)
    if grammar()[prompt]["relation"] is None:
        for y, x in sorted((y, x) for shape, _, x, y in find_objects(image) if shape == wanted)[:1]:
            cells[3 * int(3 * y / SIZE) + int(3 * x / SIZE)] = 1
    return cells


def slip(spec, rng):
    """A spec that is wrong in its category's way: another relation, number or colour, swapped colours, ..."""
    out = dict(spec, objects=list(spec["objects"]))
    (a, c), n = out["objects"][0], len(out["objects"])

    def other(options, now):
        return [o for o in options if o != now][rng.integers(len(options) - 1)]

    if spec["tag"] == "single_object":
        out["objects"] = [(other(SHAPES, a), c)]
    elif spec["tag"] == "colors":
        out["objects"] = [(a, other(list(COLORS), c))]
    elif spec["tag"] == "counting":
        out["objects"] = [(a, None)] * other((1, 2, 3, 4), n)
    elif spec["tag"] == "position":
        out["relation"] = other(list(RELATIONS), spec["relation"])
    elif spec["tag"] == "color_attr":
        (a, c), (b, d) = out["objects"]
        out["objects"] = [(a, d), (b, c)]
    else:  # two objects: one is missing, or is the other's twin
        keep = out["objects"][rng.integers(2)]
        out["objects"] = [keep] if rng.random() < 0.5 else [keep, keep]
    return out
