"""What models said of pictures, kept on disk: scores of rewards, answers of a benchmark's judge."""

import json
import os
import sys
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from lib import pictures, store
from lib.common import fail
from lib.lists import is_number
from lib.scorers import WEIGHTS
from lib.store import appending, digest, file_digest

BESIDE = "config.json open_clip_config.json tokenizer.json tokenizer_config.json".split()  # the weights
BESIDE += "vocab.txt vocab.json merges.txt spiece.model".split()


def files_version(parts, source):
    """The hash of `parts` and of the weights, config and tokenizer of a local file or folder."""
    parts, path = list(parts), Path(source)
    files = [path] if source else []  # Path("") would be the working folder
    if source and path.is_dir():
        files = sorted(path.rglob("*"))
    for file in files:
        if file == path or file.suffix in WEIGHTS or file.name in BESIDE:
            parts.append([file.name, file_digest(file)])
    return digest(parts)


def picture_version(path):
    """The digest by which a picture that was replaced is noticed; None if it is not there."""
    try:
        return remembered_digest(path, os.stat(path).st_ctime_ns)
    except (OSError, ValueError):
        return None


@lru_cache(maxsize=None)
def remembered_digest(path, changed):
    return file_digest(path, pictures.ENDS)


class Store(NamedTuple):
    """Where a model's answers about pictures are kept: one line per prompt in folder/PLACE/NAME.jsonl."""

    folder: str
    name: str
    version: str  # of the model: the answers of another version do not count
    place: str = "scores"


def stored_row(line, place="scores"):
    """A line of a store as a dict; None if it is no row of answers. Scores may come from other programs."""
    try:
        row = json.loads(line)
        files, scores, names = row["file_names"], row["scores"], [row["prompt"], *row["file_names"]]
        whole = len(files) == len(scores) == len(row.get("pictures") or files)
        whole &= all(isinstance(name, str) for name in names)
        whole &= place != "scores" or all(map(is_number, scores))
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
        return None
    return row if whole else None


def stored_lines(folder, name, place="scores"):
    """Yield (file, line number, row or None) of a store, the files of parallel runs included."""
    for path in store.parallel_files(Path(folder) / place, name):
        for n, line in enumerate(store.whole_lines(path), 1):
            yield path, n, stored_row(line, place)


def read_answers(store, rows):
    """{row index: [k answers]} of a store."""
    lines = stored_lines(store.folder, store.name, store.place)
    return stored_scores(store.folder, store.name, lines, rows, store.version)[0]


def stored_scores(folder, name, lines, rows, version):
    """{row index: answers of this version} from stored_lines, and the indices of rows whose answers do not
    count: another version's, or of pictures that were replaced since."""
    stored, others, foreign, found, replaced, outdated = {}, set(), [], {}, [], []
    for path, n, row in lines:
        if row is None:
            foreign.append(f"{path}, line {n}")
        elif row.get("version") == version:
            stored[(row["prompt"], *row["file_names"])] = row
        else:
            others.add((row["prompt"], *row["file_names"]))
    for i, (prompt, files) in enumerate(rows):
        row = stored.get((prompt, *files))
        if row is None:
            outdated += [i] if (prompt, *files) in others else []
            continue
        now = [picture_version(f"{folder}/{f}") for f in files]
        if any(b not in (a, None) for a, b in zip(row.get("pictures") or now, now)):
            replaced.append(i)
        else:
            found[i] = row["scores"]
    if foreign:
        print(f"{foreign[0]}: no row of scores; {len(foreign)} such lines are not counted", file=sys.stderr)
    if replaced:
        what = f"pictures of {len(replaced)} rows were replaced since {name} scored them"
        first = rows[replaced[0]][1][0]
        print(f"{folder}/scores: {what}, which does not count (the first: {first})", file=sys.stderr)
    return found, [*outdated, *replaced]


def stream_rows(scorer, folder, rows, todo, batch_size):
    """Yield (row index, [(score, problem)]) of the rows in `todo`. Batches are cut by position among all
    images, whatever is done already: a resumed run computes what an unbroken one does, to the bit."""
    places = [(i, file) for i, (_, files) in enumerate(rows) for file in files]
    batches = [places[n : n + batch_size] for n in range(0, len(places), batch_size)]
    places = [place for batch in batches if any(i in todo for i, _ in batch) for place in batch]
    images, prompts = [Path(folder) / file for _, file in places], [rows[i][0] for i, _ in places]
    results = []
    for (i, _), result in zip(places, scorer.stream(images, prompts, batch_size)):
        if i in todo:
            results.append(result)
            if len(results) == len(rows[i][1]):
                yield i, scorer.of_row(results)
                results = []


def answer_rows(store, rows, load, batch_size, on_error, part=""):
    """Append load()'s answers about the rows [(prompt, file_names)] that lack them, one line per row as it
    comes. `part` goes into the file's name, so that processes side by side do not share one.

    A row with an unreadable image, an empty prompt or a score that is not finite ends the run
    (on_error="stop"), or is left out and tried again next time ("skip"). Returns how many rows were answered,
    and {row index: problem} of the others."""
    todo = set(range(len(rows))) - read_answers(store, rows).keys()
    if not todo:
        return 0, {}
    scorer, skipped = load(), {}
    path = Path(store.folder) / store.place / f"{store.name}{part}.jsonl"
    total = sum(len(rows[i][1]) for i in todo)
    try:
        bar = tqdm(total=total, desc=f"score {store.name}", unit="image")
        with appending(path, "another run is scoring there") as f, bar:
            for i, results in stream_rows(scorer, store.folder, rows, todo, batch_size):
                bar.update(len(results))
                prompt, files = rows[i]
                paths, scores = [Path(store.folder) / file for file in files], [score for score, _ in results]
                if bad := [(p, problem) for p, (_, problem) in zip(paths, results) if problem]:
                    skipped[i] = f"{bad[0][0]}, prompt {prompt!r}: {bad[0][1]}"
                    if on_error == "stop":
                        advice = "mend that row, or leave such rows out with --on_error skip"
                        fail(f"reward {store.name}: {skipped[i]}; {advice}")
                    continue
                row = dict(version=store.version, prompt=prompt, file_names=files, scores=scores)
                row["pictures"] = list(map(picture_version, paths))
                f.write(json.dumps(row).encode() + b"\n")
                f.flush()
    except OSError as e:
        e.filename = e.filename or str(path)  # a full disk has no name
        raise
    if skipped:
        what = f"{len(skipped)} of {len(rows)} rows skipped, the first: {next(iter(skipped.values()))}"
        print(f"reward {store.name}: {what}", file=sys.stderr)
    return len(todo) - len(skipped), skipped
