"""Pairs from people: each published format, written here as it is published, becomes a Syn-Pic folder."""

import io
import json
import os
import shutil
import zipfile

import numpy as np
import pandas
import pytest
from conftest import fails, rewards, rows_of, train
from PIL import Image
from test_kills_synpic import killed_at

import rewards as reward_models
import synpic
from lib import people


def picture(n, kind="JPEG", side=32):
    """The bytes of a picture that no other number has."""
    pixels = np.random.default_rng(n).integers(0, 255, (side, side, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file := io.BytesIO(), kind)
    return file.getvalue()


def pickapic(path, choices, kind="JPEG", **columns):
    """Pick-a-Pic v2 as it is published: a parquet of (prompt, picture, picture, label of the first)."""
    rows = []
    for n, (prompt, one, other, label) in enumerate(choices):
        pair = dict(jpg_0=picture(one, kind), jpg_1=picture(other, kind))
        other_label = None if label is None else 1 - label
        labels = dict(label_0=label, label_1=other_label, has_label=label is not None)
        names = dict(image_0_uid=f"u{one}", image_1_uid=f"u{other}", model_0="a", model_1="b")
        rows.append(dict(caption=prompt, **pair, **labels, **names, are_different=label != 0.5))
        rows[-1].update({name: values[n] for name, values in columns.items()})
    path.parent.mkdir(parents=True, exist_ok=True)
    pandas.DataFrame(rows).to_parquet(path, row_group_size=2)
    return path


CHOICES = [  # the same prompt three times, a shared picture, a tie, no label, a row that stands twice
    ("a red circle", 0, 1, 1.0),
    ("a red circle", 2, 0, 0.0),
    ("two\r\n squares", 3, 4, 0.5),
    ("two squares", 3, 5, None),
    ("a cross", 5, 6, 0.0),
    ("a red circle", 0, 1, 1.0),
    ("a cross", 7, 7, 1.0),
]


def imported(source, out, *more):
    synpic.main([str(a) for a in ("--stages", "import", "--from", source, "--out", out, *more)])
    return rows_of(out)


def pixels_of(out, row):
    return [(out / name).read_bytes() for name in row["file_names"]]


def content(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def stored(out):
    return len(list((out / "images").rglob("*.*")))


def test_pickapic(tmp_path, capsys):
    out = tmp_path / "out"
    rows = imported(pickapic(tmp_path / "train.parquet", CHOICES), out)
    assert [row["prompt"] for row in rows] == ["a red circle", "a red circle", "two squares", "a cross"]
    for row, (_, one, other, label) in zip(rows, [CHOICES[n] for n in (0, 1, 2, 4)]):
        assert pixels_of(out, row) == [picture(one), picture(other)]  # the bytes as they came
        assert row["scores"] == {"human": [label, 1 - label]}
        assert row["phi"] == [float(label > 0.5), float(label < 0.5)]
        assert row["rank"] == {1: [1, 2], 0: [2, 1], 0.5: [1.5, 1.5]}[label]
    assert stored(out) == 8  # 0 to 7: rows share pictures
    said = capsys.readouterr().out
    assert "4 lists, 8 images, 1 ties, 2 without a choice, 1 doubled" in said
    before = content(out)
    imported(tmp_path / "train.parquet", out)  # again: nothing to do
    assert content(out) == before and "imported already" in capsys.readouterr().out


def test_a_folder_of_shards_is_one_data_set(tmp_path):
    pickapic(tmp_path / "v2/data/train-00000.parquet", CHOICES[:3])
    pickapic(tmp_path / "v2/data/train-00001.parquet", CHOICES[3:])
    pickapic(tmp_path / "whole.parquet", CHOICES)
    assert imported(tmp_path / "v2", tmp_path / "a") == imported(tmp_path / "whole.parquet", tmp_path / "b")


def test_hpdv2(tmp_path, capsys):
    for n in range(6):
        (tmp_path / "train").mkdir(exist_ok=True)
        (tmp_path / f"train/{n:05d}.jpg").write_bytes(picture(n))
    train = [
        dict(prompt="a", file_path=["00000.jpg", "00001.jpg"], human_preference=[1, 0], user_hash="x"),
        dict(prompt="a", file_path=["00001.jpg", "00002.jpg"], human_preference=[0, 1], user_hash="y"),
    ]
    (tmp_path / "train.json").write_text(json.dumps(train))
    out = tmp_path / "pairs"
    rows = imported(tmp_path / "train.json", out, "--pictures", tmp_path / "train")
    assert [row["phi"] for row in rows] == [[1, 0], [0, 1]] and stored(out) == 3
    assert pixels_of(out, rows[1]) == [picture(1), picture(2)]
    names = [f"train/{n:05d}.jpg" for n in range(5)]
    test = [dict(prompt="b", image_path=names, rank=[3.0, 1.2, 4.5, 1.2, 4.0], raw_annotations=[])]
    (tmp_path / "test.json").write_text(json.dumps(test))
    (row,) = imported(tmp_path / "test.json", tmp_path / "lists")  # pictures lie where the file lies
    assert row["rank"] == [3, 1.5, 5, 1.5, 4] and row["phi"] == [0.5, 0.75, 0, 0.75, 0.25]
    assert row["scores"]["human"] == [-3.0, -1.2, -4.5, -1.2, -4.0] and "1 ties" in capsys.readouterr().out


@pytest.mark.parametrize("packed", [False, True])
def test_imagereward(tmp_path, packed):
    """Rows of a prompt_id are a list, wherever they stand; pictures are in folders, or in the zips."""
    rows, folder = [], tmp_path / "db"
    for n, (name, rank) in enumerate((("p1", 2), ("p2", 1), ("p1", 1), ("p2", 2), ("p1", 2), ("p3", 1))):
        path = f"images/train/train_1/{n}.webp"
        ratings = dict(classification="", overall_rating=5, image_text_alignment_rating=4, fidelity_rating=3)
        rows.append(dict(image_path=path, prompt_id=name, prompt=f"of {name}", rank=rank, **ratings))
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(picture(n, "WEBP"))
    pandas.DataFrame(rows).to_parquet(folder / "metadata-train.parquet")
    if packed:
        with zipfile.ZipFile(folder / "images/train/train_1.zip", "w") as archive:
            for path in (folder / "images/train/train_1").iterdir():
                archive.write(path, f"train_1/{path.name}")
        shutil.rmtree(folder / "images/train/train_1")
    first, second = imported(folder / "metadata-train.parquet", tmp_path / "out")  # p3 is one picture alone
    assert (first["prompt"], first["rank"], second["rank"]) == ("of p1", [2.5, 1, 2.5], [1, 2])
    assert pixels_of(tmp_path / "out", first) == [picture(n, "WEBP") for n in (0, 2, 4)]
    assert all(name.endswith(".webp") for name in first["file_names"])


def test_hpdv3(tmp_path):
    for n in range(2):
        (tmp_path / f"{n}.png").write_bytes(picture(n, "PNG"))
    pairs = [dict(prompt="a", path1="1.png", path2="0.png", confidence=None, model1="m", model2="n")]
    (tmp_path / "train.json").write_text(json.dumps(pairs))
    (row,) = imported(tmp_path / "train.json", tmp_path / "out")
    assert row["phi"] == [1, 0] and pixels_of(tmp_path / "out", row) == [picture(1, "PNG"), picture(0, "PNG")]


def test_imagerewards_own_test_file_and_json_lines(tmp_path):
    for n in range(3):
        (tmp_path / f"{n}.webp").write_bytes(picture(n, "WEBP"))
    ranked = [dict(id="1-2", prompt="a", generations=["0.webp", "1.webp", "2.webp"], ranking=[2, 1, 3])]
    (tmp_path / "test.json").write_text(json.dumps(ranked))
    (row,) = imported(tmp_path / "test.json", tmp_path / "lists")
    assert row["rank"] == [2, 1, 3] and row["scores"]["human"] == [-2, -1, -3]  # rank 1 is the best
    pairs = [dict(prompt=p, path1=f"{n}.webp", path2="2.webp") for n, p in enumerate(("a\u2028b", "c"))]
    lines = "".join(json.dumps(pair, ensure_ascii=False) + "\n" for pair in pairs)
    (tmp_path / "pairs.jsonl").write_text(lines)
    rows = imported(tmp_path / "pairs.jsonl", tmp_path / "pairs")
    assert [row["phi"] for row in rows] == [[1, 0]] * 2


def test_pictures_as_datasets_saves_them(tmp_path, capsys):
    """{bytes, path}: the bytes, else a file of that name in the folder."""
    (tmp_path / "1.jpg").write_bytes(picture(1))
    struct = lambda data, path: dict(bytes=data, path=path)
    ones = [struct(picture(0), "x.jpg"), struct(None, "1.jpg"), struct(None, None)]
    choices = [(prompt, n, 5, 1.0) for n, prompt in enumerate("abc")]
    source = pickapic(tmp_path / "a.parquet", choices, jpg_0=ones)
    rows = imported(source, tmp_path / "out", "--on_error", "skip")
    assert [pixels_of(tmp_path / "out", row)[0] for row in rows] == [picture(0), picture(1)]
    said = capsys.readouterr().out
    assert "row 3: picture 0 of 'c'" in said and max(map(len, said.splitlines())) < 300


@pytest.mark.parametrize("torn", ["a member", "the end"])
def test_a_torn_zip_is_named_or_its_pictures_left_out(torn, tmp_path, capsys):
    folder = tmp_path / "in"
    folder.mkdir()
    for n in (2, 3):
        (folder / f"{n}.png").write_bytes(picture(n, "PNG"))
    with zipfile.ZipFile(folder / "pictures.zip", "w") as archive:
        archive.writestr("somewhere/0.png", picture(0, "PNG"))
    whole = (folder / "pictures.zip").read_bytes()
    data = whole[:-30] if torn == "the end" else whole[:60] + bytes(30) + whole[90:]
    (folder / "pictures.zip").write_bytes(data)
    pairs = [dict(prompt=p, path1=a, path2="3.png") for p, a in (("a", "0.png"), ("b", "2.png"))]
    (folder / "a.json").write_text(json.dumps(pairs))
    command = ["--stages", "import", "--from", folder / "a.json", "--out", tmp_path / "out"]
    says = "is not in" if torn == "the end" else "CRC"
    fails(synpic.main, command, "row 1: picture 0 of 'a'", says)
    assert torn == "a member" or "pictures.zip: cannot be read" in capsys.readouterr().out
    rows = imported(folder / "a.json", tmp_path / "out", "--on_error", "skip")
    assert [row["prompt"] for row in rows] == ["b"]


def test_a_picture_that_is_too_large_is_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr(people, "LARGEST", 100)
    (tmp_path / "a.json").write_text('[{"prompt": "a", "path1": "0.png", "path2": "1.png"}]')
    (tmp_path / "0.png").write_bytes(picture(0, "PNG"))
    command = ["--stages", "import", "--from", tmp_path / "a.json", "--out", tmp_path / "out"]
    fails(synpic.main, command, "larger")


def test_an_import_that_fails_or_finds_nothing_leaves_its_folder_free(tmp_path, capsys):
    out = tmp_path / "out"
    bad = pickapic(tmp_path / "bad.parquet", [("a", 0, 1, 1.0)], jpg_0=[b"no picture"])
    command = ["--stages", "import", "--out", out, "--on_error", "skip", "--from"]
    fails(synpic.main, [*command, bad], "0 lists", "nothing was imported", capsys=capsys)
    assert not (out / "metadata.jsonl").exists()
    unlabelled = pickapic(tmp_path / "unlabelled.parquet", [("a", 0, 1, None)])
    fails(synpic.main, [*command, unlabelled], "1 without a choice", "nothing was imported", capsys=capsys)
    good = pickapic(tmp_path / "good.parquet", CHOICES[:1])
    assert len(imported(good, out)) == 1
    fails(synpic.main, [*command, bad], "another imported", capsys=capsys)


def test_torn_pictures_stop_the_import_or_are_counted(tmp_path, capsys):
    torn, out = picture(1)[:-200], tmp_path / "out"
    bytes_0 = [picture(0), torn, b"no picture", picture(3), None, picture(0)]
    choices = [(f"prompt {n}", n, n + 10, 1.0) for n in range(5)] + [(" ", 8, 9, 1.0)]
    source = pickapic(tmp_path / "a.parquet", choices, jpg_0=bytes_0)
    command = ["--stages", "import", "--from", source, "--out", out]
    fails(synpic.main, command, "a.parquet, row 2", "picture 0 of 'prompt 1'", "--on_error", capsys=capsys)
    assert not (out / "metadata.jsonl").exists()
    rows = imported(source, out, "--on_error", "skip")
    assert [row["prompt"] for row in rows] == ["prompt 0", "prompt 3"]
    said = capsys.readouterr().out
    assert "4 lists could not be read" in said and all(f"row {n}: " in said for n in (2, 3, 5, 6))


FILES = {  # name, what it holds: what the message says
    ("a.json", '{"prompt": "a"}'): "not a list of objects",
    ("a.json", '[{"prompt": "a", "path1": "0.png"}]'): "has prompt, path1, which is no known format",
    ("a.json", '[{"prompt": "a", "path1": "0.png", "path2": "../b.png"}]'): "row 1: picture 1",
    ("a.json", '[{"prompt": "a", "file_path": ["a", "b"], "human_preference": [1]}]'): "not the fields",
    ("a.json", '[{"prompt": "a", "path1": "0.png", "path2": "b/../../0.png"}]'): "inside the folder",
    ("a.json", '[{"prompt": "a", "path1": "0.png", "path2": "link.png"}]'): "a link out of the folder",
    ("a.json", '[{"prompt": "a", "path1": "0.png", "path2": "pipe.png"}]'): "pipe.png is not in",
    ("a.jsonl", '{"prompt": "a"}\n{torn'): "line 2: not JSON",
    ("a.parquet", "PAR1"): "not a readable file",
    ("b/none.txt", ""): "--from",
}


@pytest.mark.parametrize("file", FILES)
def test_files_that_are_none_of_these_are_refused_by_name(file, tmp_path, capsys):
    (tmp_path / "b").mkdir()
    (tmp_path / "0.png").write_bytes(picture(0, "PNG"))
    os.symlink("/etc/hosts", tmp_path / "link.png")
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / file[0]).write_text(file[1])
    source = tmp_path / file[0].split("/")[0]
    fails(synpic.main, ["--stages", "import", "--from", source, "--out", tmp_path / "out"], FILES[file])
    assert not (tmp_path / "out/metadata.jsonl").exists()


def test_a_folder_holds_one_import(lists, tmp_path, capsys):
    one = pickapic(tmp_path / "one.parquet", CHOICES[:1])
    other = pickapic(tmp_path / "other.parquet", CHOICES[2:3])
    imported(one, tmp_path / "out")
    command = ["--stages", "import", "--out"]
    says = ("another imported one.parquet", "imported other.parquet (before missing", "another --out")
    fails(synpic.main, [*command, tmp_path / "out", "--from", other], *says, capsys=capsys)
    fails(synpic.main, [*command, lists, "--from", one], "was made with another", capsys=capsys)
    fails(synpic.main, [*command, tmp_path / "new"], "--from", capsys=capsys)
    nowhere = [*command, tmp_path / "new", "--from", one, "--pictures", "no"]
    fails(synpic.main, nowhere, "no such", capsys=capsys)
    fails(synpic.main, [*command, lists, "--stages", "import", "label"], "stands alone", capsys=capsys)


def test_an_import_that_is_killed_goes_on_to_the_same_bytes(tmp_path):
    """At every third moment: half of a write on the disk, before or after a rename."""
    source, whole = pickapic(tmp_path / "a.parquet", CHOICES[:5]), tmp_path / "whole"
    imported(source, whole)
    command, out, kills = ["--stages", "import", "--from", str(source), "--out"], tmp_path / "out", 0
    while True:
        shutil.rmtree(out, ignore_errors=True)
        if not killed_at(3 * kills + 1, [*command, str(out)], out):
            break
        kills += 1
        if (out / "metadata.jsonl").is_file():
            assert rows_of(out) == rows_of(whole)
        imported(source, out)
        assert content(out) == content(whole)
    assert kills >= 7


def test_from_import_to_training(tiny, tmp_path):
    """People's choices, then rewards beside them, in one folder; people's are never lost."""
    out = tmp_path / "lists"
    human = imported(pickapic(tmp_path / "a.parquet", CHOICES, "PNG"), out)
    log = train(out, tiny, tmp_path / "human", "--steps 2 --loss dpo --resolution 32")
    reward_models.main(["--score", str(out), "--rewards", *rewards(tiny)[:2], "--device", "cpu"])
    synpic.main(["--out", str(out), "--stages", "label", "--rewards", *rewards(tiny)[:2]])
    rows = rows_of(out)
    assert [row["phi"] for row in rows] != [row["phi"] for row in human]
    assert all(list(row["scores"]) == ["human", "clip", "hpsv2.1"] for row in rows)
    again = train(out, tiny, tmp_path / "again", "--steps 2 --loss dpo --label single:human")
    assert [row["loss"] for row in again[1:]] == [row["loss"] for row in log[1:]]
    votes = "--loss balanced --label_rewards clip hpsv2.1 --steps 1"
    assert len(train(out, tiny, tmp_path / "votes", votes)) == 2
    synpic.main(["--out", str(out), "--stages", "label", "--label", "single:human"])
    assert [row["phi"] for row in rows_of(out)] == [row["phi"] for row in human]
