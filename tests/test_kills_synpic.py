"""synpic.py killed at moments between two writes, then asked for the first labels again: all is right."""

import builtins
import io
import json
import os
import shutil
import sys

import pytest
from conftest import rewards, rows_of
from PIL import Image

import synpic

WRITES = 2  # so many writes of each file are moments of their own; a PNG has dozens, one like the other


class DyingFile:
    """A file that calls `moment` when the first half of a write is on the disk."""

    def __init__(self, file, moment):
        self.file, self.moment, self.writes = file, moment, 0

    def write(self, data):
        self.writes += 1
        if self.writes > WRITES:
            return self.file.write(data)
        self.file.write(data[: len(data) // 2])
        self.file.flush()
        self.moment()
        return self.file.write(data[len(data) // 2 :])

    def __getattr__(self, name):
        return getattr(self.file, name)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.file.close()


def killed_at(last, args, folder, main=synpic.main):
    """Run it in a child that is gone at its `last`-th moment: half of a write done, or before or after a
    rename. False if it came to its end."""
    if child := os.fork():
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert status in (0, 9)
        return status == 9
    moments, true_open, true_replace = iter(range(1, 10**6)), builtins.open, os.replace

    def moment():
        if next(moments) == last:
            os._exit(9)

    def dying_open(path, mode="r", *more, **named):
        file = true_open(path, mode, *more, **named)
        ours = str(path).startswith(str(folder)) and mode[0] in "wa"
        return DyingFile(file, moment) if ours else file

    def dying_replace(*paths):
        moment()
        true_replace(*paths)
        moment()

    try:
        builtins.open = io.open = dying_open
        os.replace = dying_replace
        sys.stdout = sys.stderr = true_open(os.devnull, "w")
        main(args)
        os._exit(0)
    finally:
        os._exit(1)


def look(folder):
    """What a reader finds in between: each file is whole, or not there yet."""
    if (folder / "preview.png").is_file():
        Image.open(folder / "preview.png").convert("RGB").close()
    if (folder / "summary.json").is_file():
        json.loads((folder / "summary.json").read_text())
    if (folder / "metadata.jsonl").is_file():
        assert all(len(row["phi"]) == 2 for row in rows_of(folder))


def without_speed(folder):
    summary = json.loads((folder / "summary.json").read_text())
    return {k: v for k, v in summary.items() if k not in ("speed", "hours")}  # of the clock


@pytest.fixture(scope="module")
def small(tiny, tmp_path_factory):
    """Three lists of two and the command that made them."""
    folder = tmp_path_factory.mktemp("small") / "lists"
    models = [f"sdxl={tiny}/sdxl,steps=1", f"sd15={tiny}/sd15,steps=1"]
    args = ["--prompts", f"{tiny}/prompts.txt", "--limit", "3", "--batch_size", "2", "--models", *models]
    args += ["--rewards", *rewards(tiny)[:2]]
    synpic.main([*args, "--out", str(folder)])
    return folder, args


def as_before(folder, small):
    look(folder)
    assert (folder / "metadata.jsonl").read_bytes() == (small / "metadata.jsonl").read_bytes()
    for path in [small / "preview.png", *small.glob("images/*/*.png")]:
        assert (folder / path.relative_to(small)).read_bytes() == path.read_bytes()
    assert without_speed(folder) == without_speed(small)
    assert not [p for p in folder.rglob("*") if "tmp" in p.name]


def test_killed_while_it_labels_anew(small, tmp_path):
    (small, args), out, kills = small, tmp_path / "out", 0
    shutil.copytree(small, out)
    args = [*args, "--out", str(out)]
    while killed_at(2 * kills + 1, [*args, "--label", "single:clip"], out):
        kills += 1
        look(out)
        synpic.main(args)
        as_before(out, small)
    assert kills >= 4


def test_killed_while_it_draws_scores_and_labels(small, tmp_path):
    """Every eleventh moment from an empty folder, and two pictures torn as by a crash of the disk."""
    (small, args), out, kills = small, tmp_path / "out", 0
    args = [*args, "--out", str(out)]
    while killed_at(11 * kills + 1, args, out):
        kills += 1
        look(out)
        for path in sorted(out.glob("images/*/*.png"))[1:3]:
            path.write_bytes(path.read_bytes()[:-5])
        synpic.main(args)
        as_before(out, small)
        shutil.rmtree(out)
    assert kills >= 4
