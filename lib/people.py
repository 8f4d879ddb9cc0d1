"""Data sets of people's choices as ranked lists: Pick-a-Pic, HPDv2, HPDv3, ImageRewardDB."""

import hashlib
import io
import json
import os
from collections import Counter
from functools import lru_cache, partial
from pathlib import Path
from zipfile import ZipFile

import torch
from PIL import Image
from tqdm import tqdm

from lib import common, pictures, store, tables
from lib.common import about, fail
from lib.lists import is_number, preference_labels
from lib.store import path_inside, publish, write_text
from lib.tables import read_jsonl, read_text
from losses import preference_rank

LARGEST = 1 << 28  # bytes of a picture: a larger member of a zip is a bomb or no picture

# Published choices of people: the fields of a prompt, of its pictures and of a number for each, and 1 where
# higher is better, -1 for ranks. One field alone holds a list. Without numbers the first picture is better.
FORMATS = {
    "Pick-a-Pic v2": ("caption", ["jpg_0", "jpg_1"], ["label_0", "label_1"], 1),
    "ImageRewardDB": ("prompt", ["image_path"], ["rank"], -1),
    "ImageReward test": ("prompt", ["generations"], ["ranking"], -1),
    "HPDv2 test": ("prompt", ["image_path"], ["rank"], -1),
    "HPDv2": ("prompt", ["file_path"], ["human_preference"], 1),
    "HPDv3": ("prompt", ["path1", "path2"], [], 1),
}
FIELDS = {name: [prompt, *pictures, *labels] for name, (prompt, pictures, labels, _) in FORMATS.items()}
FIELDS["ImageRewardDB"].append("prompt_id")  # a row is a picture, and this is its list


def format_of(path, fields):
    """The name in FORMATS of a file with these fields."""
    for name, wanted in FIELDS.items():
        if set(wanted) <= set(fields):
            return name
    known = "; ".join(f"{name} has {', '.join(wanted)}" for name, wanted in FIELDS.items())
    found = ", ".join(map(str, fields)) or "no fields"
    fail(f"--from {path}: has {found}, which is no known format. {known}")


def read_records(path):
    """Yield (file, place in it, format, record) of a file; a parquet is read one row group after the other.
    Of ImageRewardDB the rows of a prompt_id are one record."""
    with about(f"--from {path}: not a readable file"):  # pyarrow has its own errors
        if path.suffix == ".parquet":
            from pyarrow.parquet import ParquetFile

            file = ParquetFile(store.whole(path))
            kind = format_of(path, file.schema_arrow.names)
            columns = [c for c in file.schema_arrow.names if c in (*FIELDS[kind], "has_label")]
            groups = (file.read_row_group(n, columns) for n in range(file.num_row_groups))
            batches = (batch for group in groups for batch in group.to_batches(64))  # iter_batches keeps all
            rows = (row for batch in batches for row in batch.to_pylist())
        else:
            lines = path.suffix == ".jsonl"
            rows = [row for _, row in read_jsonl(path)] if lines else tables.parse_json(read_text(path))
            if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
                raise ValueError("not a list of objects")
            kind = format_of(path, rows[0] if rows else ())
        what = "list" if kind == "ImageRewardDB" else "row"
        if what == "list":
            lists = {}
            for row in rows:
                empty = {"prompt": row["prompt"], "image_path": [], "rank": []}
                of_list = lists.setdefault((row["prompt_id"], row["prompt"]), empty)
                of_list["image_path"].append(row["image_path"])
                of_list["rank"].append(row["rank"])
            rows = lists.values()
        yield from ((path, f"{what} {n}", kind, row) for n, row in enumerate(rows, 1))


@lru_cache(maxsize=None)
def zipped(folder):
    """{file name: [(zip, member), ...]} of all zips in a folder. Members go by their last name, since
    publishers cut the paths before it differently."""
    members = {}
    for path in sorted(folder.rglob("*.zip")):
        try:
            archive = ZipFile(path)
        except Exception as e:  # zipfile has several kinds
            print(f"{path}: cannot be read ({e})")
            continue
        for member in archive.infolist():
            members.setdefault(Path(member.filename).name, []).append((archive, member))
    return members


def picture_bytes(picture, folder):
    """The bytes of a picture of a record, which is bytes, or the name of a file in the folder or in a zip
    there, or both as datasets saves them: {"bytes", "path"}. ValueError if it cannot be read."""
    if isinstance(picture, dict):
        picture = picture.get("bytes") or picture.get("path")
    if isinstance(picture, bytes):
        return picture
    path = path_inside(folder, picture)
    if os.path.isfile(path):
        size, read = os.path.getsize(path), Path(path).read_bytes
    else:
        found = zipped(folder).get(Path(picture).name, [])
        if len(found) != 1:
            raise ValueError(f"{picture} is {'twice' if found else 'not'} in {folder} and its zips")
        archive, member = found[0]
        size, read = member.file_size, partial(archive.read, member)
        picture = f"{picture} in {archive.filename}"
    if size > LARGEST:
        raise ValueError(f"{picture}: larger than {LARGEST >> 20} MB")
    try:
        return read()
    except Exception as e:  # a password, an unknown method, torn data: each method has its own errors
        raise ValueError(f"{picture}: {e}") from None


def keep_picture(out, data):
    """The name of a picture in the folder, made of its bytes: rows share it, and a second run finds it."""
    try:
        image = Image.open(io.BytesIO(data), formats=pictures.IMAGE_FORMATS)  # its head alone
    except Exception as e:  # besides OSError, each format of PIL has its own
        raise ValueError(f"not a readable image ({e})") from None
    digest = hashlib.sha256(data).hexdigest()[:32]
    name = f"images/{digest[:2]}/{digest}.{image.format.lower()}"
    path = Path(out) / name
    if not path.is_file() or path.stat().st_size != len(data):
        pictures.open_image(image)
        publish(path, lambda tmp: tmp.write_bytes(data), sync=False)
    return name


def imported_row(out, kind, record, folder):
    """A row of metadata.jsonl with the people's choice as the scores `human`, or None without one. ValueError
    with what is wrong with the record."""
    if record.get("has_label") is False:
        return None
    prompt, *fields, sign = FORMATS[kind]
    values = lambda names: record[names[0]] if len(names) == 1 else [record[name] for name in names]
    try:
        prompt = " ".join(record[prompt].split())
        pictures, labels = map(values, fields)
        scores = [sign * label for label in labels] or [1, 0]
        fits = prompt and len(pictures) == len(scores) and all(map(is_number, scores))
    except (KeyError, TypeError, AttributeError):
        fits = False
    if not fits:
        raise ValueError(f"not the fields of {kind}: a prompt, pictures and as many labels are wanted")
    if len(pictures) < 2:
        return None
    files = []
    for n, picture in enumerate(pictures):
        try:
            files.append(keep_picture(out, picture_bytes(picture, folder)))
        except ValueError as e:
            raise ValueError(f"picture {n} of {common.one_line(repr(prompt), 80)}: {e}") from None
    if len(set(files)) < len(files):
        return None  # nothing to choose between
    phi = preference_labels("phi", [torch.tensor(scores, dtype=torch.float64)[:, None]])[0]
    labels = dict(scores={"human": scores}, phi=phi.tolist(), rank=preference_rank(phi).tolist())
    return dict(prompt=prompt, file_names=files, **labels)


def import_lists(cfg, paths, metadata):
    """Write the lists of all files to `metadata`, and print how many of which kind."""
    counts, problems, seen = Counter(lists=0), [], set()
    records = (record for path in paths for record in read_records(path))
    with open(metadata, "w", encoding="utf-8") as f:
        for path, place, kind, record in tqdm(records, desc="import", unit="list"):
            try:
                row = imported_row(cfg.out, kind, record, Path(cfg.pictures or path.parent))
            except ValueError as e:
                problems.append(f"{path}, {place}: {e}")
                if cfg.on_error == "stop":
                    fail(f"{problems[0]}; mend it, or leave such lists out with --on_error skip")
                continue
            key = row and hash((row["prompt"], *row["file_names"]))
            if row is None or key in seen:
                counts["without a choice" if row is None else "doubled"] += 1
                continue
            seen.add(key)
            human = row["scores"]["human"]
            counts.update(lists=1, images=len(human), ties=int(len(set(human)) < len(human)))
            f.write(json.dumps(row) + "\n")
    common.print_problems(problems, "lists could not be read")
    said = ", ".join(f"{count} {name}" for name, count in counts.items())
    if not counts["lists"]:
        fail(f"--from {cfg.from_}: {said}, so nothing was imported")
    print(f"{cfg.out}/metadata.jsonl: {said}")


def import_stage(cfg):
    """metadata.jsonl and images/ from what people chose. The pictures are there first, under names that
    follow from their bytes, so that a run that was killed writes what is missing, and the same rows.
    recipe.json says what was imported."""
    source, out = Path(cfg.from_), Path(cfg.out)
    paths = tables.shards(source) if source.is_dir() else [source]
    if not cfg.from_ or not paths or not all(path.is_file() for path in paths):
        fail(f"--from {source}: name a .parquet, .json or .jsonl file, or a folder of .parquet files")
    if cfg.pictures and not Path(cfg.pictures).is_dir():
        fail(f"--pictures {cfg.pictures}: no such folder")
    recipe = {"imported": {path.name: store.file_digest(path, ends=1 << 20) for path in paths}}
    if store.read_recipe(out).keys() == {"imported"} and not (out / "metadata.jsonl").is_file():
        write_text(out / store.RECIPE, json.dumps(recipe, indent=1))  # the import before came to nothing
    store.same(out, recipe, ("metadata.jsonl", "images"), "choose another --out")
    if (out / "metadata.jsonl").is_file():
        print(f"{out}: was imported already; delete its metadata.jsonl to do it again")
        return
    publish(out / "metadata.jsonl", lambda tmp: import_lists(cfg, paths, tmp))
