"""The README's pictures, from an evaluation of the toy world: all held-out pictures; one row per category.

    python evaluate.py --models base=toy/models/sdxl rankdpo=outputs/rankdpo/model
    python toy/figures.py outputs/evaluation       # -> docs/before_after.png, docs/by_category.png

The first model is compared with the second. A green frame marks a picture that the exact checker finds right.
"""

import json
import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

TOY = Path(__file__).resolve().parent
sys.path.insert(0, str(TOY.parent))

from lib.pictures import GREEN, read_image
from lib.stats import typical
from lib.store import publish
from toy.world import CATEGORIES

DOCS, TITLES = TOY.parent / "docs", ("before: the base model", "after: tuned by RankDPO")
WIDE, GAP, INK = 20, 4, (30, 30, 30)  # pictures beside each other; pixels between them; text


def font(size):
    import matplotlib

    return ImageFont.truetype(f"{matplotlib.get_data_path()}/fonts/ttf/DejaVuSans.ttf", size)


def load(folder):
    """{category: prompts, right (2, P, S), pictures [[of each model] of each prompt]} of an evaluation."""
    found = json.loads((folder / "results.json").read_text())
    names, tags = list(found["scores"])[:2], np.array(found["tags"])
    right = np.array([found["scores"][name]["toyworld"] for name in names], int)  # (2, P, S)
    groups = {}
    for tag in CATEGORIES:
        places = np.flatnonzero(tags == tag)
        files = [
            [sorted((folder / name / f"{i:05d}/samples").glob("*.png")) for name in names] for i in places
        ]
        prompts = [found["prompts"][i] for i in places]
        groups[tag] = dict(prompts=prompts, right=right[:, places], files=files)
    return groups


def paste(page, pen, file, right, left, top, side):
    page.paste(read_image(file).resize((side, side), Image.Resampling.NEAREST), (left, top))
    if right:
        edge = GAP // 2 + side // 32
        box = (left - edge, top - edge, left + side + edge - 1, top + side + edge - 1)
        pen.rectangle(box, outline=GREEN, width=edge)


def mosaic(groups, path, side=32):
    """Every picture of the first model on the left, of the second on the right, category after category."""
    cell, counts = (
        side + 2 * GAP,
        {tag: len(of["files"]) * of["right"].shape[2] for tag, of in groups.items()},
    )
    half, lines = WIDE * cell, {tag: -(-n // WIDE) for tag, n in counts.items()}
    page = Image.new("RGB", (2 * half + 60, 70 + sum(34 + n * cell for n in lines.values())), "white")
    pen, total = ImageDraw.Draw(page), sum(counts.values())
    for m, title in enumerate(TITLES):
        left, top = 10 + m * (half + 40), 70
        passed = sum(int(of["right"][m].sum()) for of in groups.values())
        pen.text((left, 8), f"{title}: {passed} of {total} right", fill=INK, font=font(30))
        for tag, of in groups.items():
            text = f"{tag.replace('_', ' ')}: {of['right'][m].sum()} of {counts[tag]}"
            pen.text((left, top), text, fill=INK, font=font(19))
            files = [file for each in of["files"] for file in each[m]]
            for n, (file, right) in enumerate(zip(files, of["right"][m].ravel())):
                at = left + n % WIDE * cell + GAP, top + 28 + n // WIDE * cell + GAP
                paste(page, pen, file, right, *at, side)
            top += 34 + lines[tag] * cell
    publish(path, lambda tmp: page.save(tmp, format="PNG", optimize=True))


def by_category(groups, path, side=96):
    """Of each category the prompt whose change is the median: four pictures of each model, the same noise."""
    cell, block = side + 3 * GAP, 34 + side + 3 * GAP
    page = Image.new("RGB", (8 * cell + 60, 44 + len(groups) * block), "white")
    pen = ImageDraw.Draw(page)
    for m, title in enumerate(TITLES):
        pen.text((10 + m * (4 * cell + 40), 6), title, fill=INK, font=font(22))
    for n, of in enumerate(groups.values()):
        change = (of["right"][1] - of["right"][0]).sum(1)  # (P,)
        (i,), top = typical(change, ["all"] * len(change), 1), 44 + n * block
        for m in range(2):
            left, right = 10 + m * (4 * cell + 40), of["right"][m, i]
            prompt = f"{of['prompts'][i]}: " if m == 0 else ""
            pen.text((left, top), f"{prompt}{right.sum()} of {len(right)}", fill=INK, font=font(15))
            for s, file in enumerate(of["files"][i][m][:4]):
                paste(page, pen, file, right[s], left + s * cell + GAP, top + 26, side)
    publish(path, lambda tmp: page.save(tmp, format="PNG", optimize=True))


if __name__ == "__main__":
    if len(sys.argv) != 2 or not Path(sys.argv[1], "results.json").is_file():
        sys.exit("toy/figures.py: expected the folder of an evaluation, as in outputs/evaluation")
    groups = load(Path(sys.argv[1]))
    mosaic(groups, DOCS / "before_after.png")
    by_category(groups, DOCS / "by_category.png")
