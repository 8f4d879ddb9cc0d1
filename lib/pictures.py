"""Pictures: the one reader of image files, curves of a log, and grids of captioned pictures."""

import functools
import itertools
import os
import textwrap
import unicodedata
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps, features

from lib.common import about
from lib.store import ends_digest, publish, whole

# PIL would start Ghostscript for a PostScript file, whatever its name is: these formats only
IMAGE_FORMATS = ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "JPEG2000", "PPM"]
IMAGE_FORMATS += ["AVIF"] if features.check("avif") else []
SUFFIXES = [suffix for suffix, kind in Image.registered_extensions().items() if kind in IMAGE_FORMATS]
ORIENTATION = 0x0112  # EXIF: how a camera was held
GREEN = (0, 170, 60)  # the frame of a right picture


def open_image(image):
    """Read a file, or a PIL image, in its own mode; ValueError if it cannot be read.

    16-bit grey becomes 8-bit by its high byte. PIL's own conversion would clip it to white. A picture is
    turned as its EXIF orientation says, as viewers and datasets' imagefolder show it."""
    try:
        if isinstance(image, str | Path) and os.path.exists(image) and not os.path.isfile(image):
            raise ValueError("a folder, a pipe or a device")
        opened = isinstance(image, Image.Image)
        image = image if opened or not os.path.isfile(image) else whole(image)
        with nullcontext(image) if opened else Image.open(image, formats=IMAGE_FORMATS) as image:
            image.load()
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith(("I", "F")):
            deep = np.asarray(image)
            if image.mode == "F" or deep.min() < 0 or deep.max() > 65535:
                raise ValueError("32-bit pixels have no fixed range; save it with 8 or 16 bits")
            image = Image.fromarray((deep // 256).astype(np.uint8))
        return image
    except Exception as e:  # besides OSError, each format of PIL has its own
        raise ValueError(f"not a readable image ({e})") from None


def read_image(image):
    """open_image, converted to 8-bit RGB; alpha is dropped."""
    return open_image(image).convert("RGB")


def read_pixels(path, resolution):
    """An image file as (3, H, W) in [-1, 1]. With a resolution: shorter side resized to it, centre crop."""
    with about(path):
        image = read_image(path)
    if resolution:
        image = ImageOps.fit(image, (resolution, resolution), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 127.5 - 1


ENDS = 4096  # bytes at each end of a picture that stand for it: PNG keeps a checksum of all pixels there


def look_at(folder, name):
    """([height, width, digest] of an image as read_pixels gives it, "") or (None, what is wrong). The file is
    opened once, and not decoded."""
    try:
        with open(f"{folder}/{name}", "rb") as file, Image.open(file, formats=IMAGE_FORMATS) as image:
            turn = Image.Image.getexif(image).get(ORIENTATION)  # PNG's own method would decode
            on_its_side = (
                turn in (5, 6, 7, 8) and image.format != "TIFF"
            )  # PIL turns TIFF without being asked
            width, height = image.size[::-1] if on_its_side else image.size
            return [height, width, ends_digest(file, ENDS)], ""
    except FileNotFoundError:
        return None, "is not in the folder"
    except Exception as e:  # besides OSError, each format of PIL has its own
        return None, f"is not a readable image ({e})"


def plot_curves(rows, panels, path):
    """Draw the rows of a log as a PNG. `panels` is {title: {key: label}}; a bold line is the mean over a
    twentieth of the curve."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4 * len(panels), 3.2), layout="constrained")
    axes = figure.subplots(1, len(panels))
    for axis, (title, lines) in zip(axes, panels.items()):
        for key, label in lines.items():
            y = np.array([np.nan if row[key] is None else row[key] for row in rows])
            (line,) = axis.plot(y, alpha=0.3)
            width = max(1, len(y) // 20)
            smooth = np.convolve(y, np.ones(width) / width, "valid")
            axis.plot(np.arange(len(smooth)) + width // 2, smooth, color=line.get_color(), label=label)
        axis.set(title=title, xlabel="step")
        if len(lines) > 1:
            axis.axhline(0, color="k", lw=0.5)
            axis.legend()
    publish(path, lambda tmp: figure.savefig(tmp, dpi=100))


@functools.lru_cache(maxsize=1)
def grid_font():
    import matplotlib  # it brings DejaVu Sans: Latin, Greek, Cyrillic, Arabic, Hebrew

    path = f"{matplotlib.get_data_path()}/fonts/ttf/DejaVuSans.ttf"
    return ImageFont.truetype(path, 10, layout_engine=ImageFont.Layout.BASIC)  # raqm raises for lone marks


def in_font(text):
    """The text on one line; what the font of picture_grid cannot draw is counted and named, as in [3 CJK]."""
    box, parts = bytes(grid_font().getmask("\uffff")), []
    for lacking, group in itertools.groupby(text[:500], lambda c: bytes(grid_font().getmask(c)) == box):
        part = "".join(group)
        symbol = unicodedata.category(part[0]) == "So"  # an emoji
        kind = "SYMBOL" if symbol else unicodedata.name(part[0], "CHARACTERS").split()[0]
        parts.append(f"[{len(part)} {kind}]" if lacking else part)
    return " ".join("".join(parts).split())


def picture_grid(rows, path, side=128):
    """Draw [(title, [(image, caption), ...]), ...] as a PNG: a row of pictures under each title, which has at
    most four lines. A picture fits into `side` pixels, its proportions kept; a caption has at most three. The
    cell (image, caption, True) of a right picture gets a green frame."""
    columns = max(len(cells) for _, cells in rows)
    width, canvas, top = max(columns * (side + 8) + 8, 420), [], 6
    for title, cells in rows:
        lines = textwrap.wrap(in_font(title), width // 6)[:4]
        captions = [textwrap.wrap(in_font(caption), side // 6)[:3] for _, caption, *_ in cells]
        canvas.append((lines, captions, top))
        top += 13 * len(lines) + side + 13 * max(map(len, captions), default=0) + 16
    page = Image.new("RGB", (width, top), "white")
    pen = ImageDraw.Draw(page)
    for (_, cells), (lines, captions, top) in zip(rows, canvas):
        pen.text((8, top), "\n".join(lines), fill="black", font=grid_font(), spacing=2)
        top += 13 * len(lines) + 4
        for c, ((image, _, *right), caption) in enumerate(zip(cells, captions)):
            left, smaller = 8 + c * (side + 8), max(image.size) < side
            how = Image.Resampling.NEAREST if smaller else Image.Resampling.LANCZOS
            page.paste(ImageOps.pad(image.convert("RGB"), (side, side), how, "white"), (left, top))
            if any(right):
                pen.rectangle((left - 3, top - 3, left + side + 2, top + side + 2), outline=GREEN, width=3)
            pen.text((left, top + side + 3), "\n".join(caption), fill="black", font=grid_font(), spacing=1)
    publish(path, page.save)
