"""Options, processes, files and readers: what common.py promises to every script."""

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from conftest import HERE, child, fails
from PIL import Image, ImageOps

from lib import answers, benchmarks, common, lists, pictures, store
from lib.common import option
from lib.pictures import open_image, read_pixels
from lib.store import CONTENTS, appending, publish, write_text


@dataclass
class Example:
    # first things
    lora_rank: int = option(0, "rank of the adapters", at_least=0)
    # last things
    out: str = option("here", "folder")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--lora_rnak", "4"], "did you mean --lora_rank?"),
        (["--lorarank=4"], "did you mean --lora_rank?"),
        (["--lora_rank", "-1"], "must not be negative"),
    ],
)
def test_a_wrong_option_ends_in_one_line_that_names_the_nearest(words, says, capsys):
    fails(lambda args: common.parse(Example, "", args), words, says, capsys=capsys)


def test_help_has_the_headings_of_the_dataclass(capsys):
    with pytest.raises(SystemExit):
        common.parse(Example, "", ["--help"])
    text = capsys.readouterr().out.partition("options:")[2]  # below the usage
    first, last = text.index("first things:"), text.index("last things:")
    assert first < text.index("--lora_rank LORA_RANK") < last < text.index("--out OUT")


def test_common_is_imported_without_torch():
    """Scripts parse their options before they import torch: --help is there at once."""
    code = "import sys, lib.common; sys.exit(any(m in sys.modules for m in ('torch', 'diffusers', 'pandas')))"
    assert subprocess.run([sys.executable, "-c", code], cwd=HERE).returncode == 0


@pytest.mark.parametrize(
    ("script", "wrong", "right"),
    [
        ("synpic", "--devise", "--device"),
        ("rankdpo", "--lorarank", "--lora_rank"),
        ("evaluate", "--modles", "--models"),
        ("rewards", "--rewords", "--rewards"),
    ],
)
def test_help_and_a_misspelt_option_need_no_torch(script, wrong, right, tmp_path):
    (tmp_path / "torch.py").write_text("raise ImportError")
    env = {**os.environ, "PYTHONPATH": str(tmp_path)}
    run = lambda *words: subprocess.run(
        [sys.executable, f"{script}.py", *words], cwd=HERE, env=env, capture_output=True, text=True
    )
    told = run("--help")
    text = " ".join(told.stdout.split())
    assert told.returncode == 0 and right in text
    names = {"synpic": lists.LABELS, "rankdpo": lists.LABELS, "evaluate": tuple(benchmarks.READERS)}
    assert all(name in text for name in names.get(script, ()))
    refused = run(wrong, "1")
    assert refused.returncode == 2 and f"did you mean {right}?" in refused.stderr
    assert len(refused.stderr.splitlines()) == 1


def start(args):
    common.start_processes("cpu")


@pytest.mark.parametrize(
    ("env", "says"),
    [
        (dict(RANK="abc"), "RANK=abc"),
        (dict(RANK="5", WORLD_SIZE="2"), "RANK=5 WORLD_SIZE=2"),
        (dict(RANK="0", WORLD_SIZE="0"), "WORLD_SIZE=0"),
        (dict(RANK="0", WORLD_SIZE="many"), "WORLD_SIZE=many"),
        (dict(RANK="1"), "RANK=1: not what torchrun sets"),
        (dict(RANK="-1", WORLD_SIZE="2"), "RANK=-1"),
        (dict(LOCAL_RANK="x"), "LOCAL_RANK=x"),
        (dict(RANK="0", WORLD_SIZE="2"), "MASTER_ADDR expected, but not set); start with torchrun"),
        (dict(WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT="1"), "RANK expected, but not set"),
        (dict(RANK="0", WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT="many"), "127.0.0.1:many"),
    ],
)
def test_variables_that_a_scheduler_left_end_in_one_line(env, says, monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    fails(start, [], says)


def test_a_gpu_that_torch_cannot_use_is_not_passed_over(monkeypatch):
    """An old driver: training would start on the CPU and take weeks."""
    there = os.path.exists
    monkeypatch.setattr(os.path, "exists", lambda path: path == "/dev/nvidiactl" or there(path))
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    with pytest.raises(SystemExit, match="cannot use this machine's GPU.*--device cpu"):
        common.pick_device()
    assert common.pick_device("cpu").type == "cpu"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert common.pick_device().type == "cpu"


def write_folder(name):
    def write(tmp):
        tmp.mkdir()
        (tmp / name).write_text(name)

    return write


def test_publish_replaces_its_own_folder_and_an_empty_one(tmp_path):
    (tmp_path / "model").mkdir()
    publish(tmp_path / "model", write_folder("a"))
    publish(tmp_path / "model", write_folder("b"))
    assert {p.name for p in (tmp_path / "model").iterdir()} == {"b", CONTENTS}
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("new", ["a file", "a folder"])
def test_publish_never_deletes_somebodys_folder(new, tmp_path):
    """evaluate.py drew a model named results.json into OUT/results.json, which its report then replaced."""
    (tmp_path / "x.json").mkdir()
    (tmp_path / "x.json/thesis.txt").write_text("years of work")
    write = write_folder("a") if new == "a folder" else lambda tmp: tmp.write_text("{}")
    with pytest.raises(SystemExit, match="x.json: holds thesis.txt, which was not written here"):
        publish(tmp_path / "x.json", write)
    assert (tmp_path / "x.json/thesis.txt").read_text() == "years of work"
    assert [p.name for p in tmp_path.iterdir()] == ["x.json"]


def test_a_file_does_not_replace_a_folder_of_our_own(tmp_path):
    publish(tmp_path / "model", write_folder("a"))
    with pytest.raises(SystemExit, match="a file would replace this folder"):
        write_text(tmp_path / "model", "text")
    assert (tmp_path / "model/a").is_file() and [p.name for p in tmp_path.iterdir()] == ["model"]


def test_a_kill_between_the_two_renames_of_a_folder_leaves_both_on_the_disk(tmp_path, monkeypatch):
    publish(tmp_path / "model", write_folder("a"))
    with monkeypatch.context() as m:
        m.setattr(os, "replace", lambda *_: os._exit(9))
        process = child(lambda args: publish(tmp_path / "model", write_folder("b")), [], tmp_path / "said")
        process.join(60)
    assert process.exitcode == 9
    assert (tmp_path / ".old.model/a").is_file() and (tmp_path / ".tmp.model/b").is_file()
    publish(tmp_path / "model", write_folder("c"))
    assert {p.name for p in (tmp_path / "model").iterdir()} == {"c", CONTENTS}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model", "said"]


def test_a_folder_with_a_strangers_file_or_a_changed_one_is_not_replaced(tmp_path):
    model = tmp_path / "model"
    publish(model, write_folder("a"))
    assert store.is_whole(model) and not store.strangers(model)
    (model / "mine.txt").write_text("years of work")
    with pytest.raises(SystemExit, match="model: holds mine.txt, which was not written here; move it away"):
        publish(model, write_folder("b"))
    (model / "mine.txt").unlink()
    (model / "a").write_text("b")  # of equal size
    assert not store.is_whole(model)
    with pytest.raises(SystemExit, match="model: holds a, which was not written here"):
        publish(model, write_folder("b"))
    store.discard(model)
    assert (model / "a").read_text() == "b"


def test_a_byte_in_the_midst_of_a_large_file_is_another_file(tmp_path):
    """Of 100 MB, most of them a hole: a partial fine-tuning changes neither size nor ends."""
    path = tmp_path / "model.safetensors"
    with open(path, "wb") as f:
        f.truncate(100_000_000)
    before, version = store.file_digest(path), answers.files_version(["clip"], path)
    with open(path, "r+b") as f:
        f.seek(50_000_000)
        f.write(b"x")
    assert store.file_digest(path) != before and answers.files_version(["clip"], path) != version


def test_a_folder_is_gone_on_with_by_its_own_recipe_alone(tmp_path):
    same = lambda recipe: store.same(tmp_path, recipe, ("images", "model-[0-9]*"), "do that")
    same({"size": (1, 2), "models": {"a": "x"}})
    same({"size": [1, 2], "models": {"a": "x"}})
    with pytest.raises(
        SystemExit, match=r"another size .before \[1, 2\], now 3., models b .before missing, now"
    ):
        same({"size": 3, "models": {"a": "x", "b": "y"}})
    store.set_aside(tmp_path, ("recipe.json", "images"))
    same({"size": 3})
    store.set_aside(tmp_path, ("recipe.json",))
    assert {p.name for p in tmp_path.iterdir()} == {"before-1", "before-2"}
    (tmp_path / "model-000200").mkdir()
    with pytest.raises(
        SystemExit, match="holds model-000200, but no recipe.json that says what made it; do that"
    ):
        same({"size": 3})


def test_lines_are_appended_after_a_torn_end_by_one_process(tmp_path):
    path = tmp_path / "scores/clip.jsonl"
    with appending(path, "busy") as f:
        f.write(b"one\nanother program's\n")
        with pytest.raises(SystemExit, match="clip.jsonl: another run is there"):
            with appending(path, "another run is there"):
                pass
    path.write_bytes(path.read_bytes() + b"torn")
    with appending(path, "busy") as f:
        f.write(b"two\n")
    assert path.read_bytes() == b"one\nanother program's\ntwo\n"


@pytest.mark.parametrize("linked", ["scores/clip.jsonl", "scores"])
def test_no_line_is_appended_through_a_link(linked, tmp_path):
    there = tmp_path / "elsewhere"
    there.mkdir()
    (there / "clip.jsonl").write_text("not scores\n")
    album = tmp_path / "album"
    (album / linked).parent.mkdir(parents=True)
    (album / linked).symlink_to(there / "clip.jsonl" if linked.endswith("jsonl") else there)
    with pytest.raises(SystemExit, match="is a link"):
        with appending(album / "scores/clip.jsonl", "busy") as f:
            f.write(b"{}\n")
    assert (there / "clip.jsonl").read_text() == "not scores\n"
    assert [p.name for p in there.iterdir()] == ["clip.jsonl"]


def test_postscript_is_not_opened_whatever_its_name_is(tmp_path, monkeypatch):
    """PIL starts Ghostscript, where it is installed, for a PostScript file."""
    from PIL import EpsImagePlugin

    Image.new("RGB", (8, 8)).save(tmp_path / "a.eps")
    os.rename(tmp_path / "a.eps", tmp_path / "a.png")
    started = []
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *args, **more: started.append(args))
    with pytest.raises(ValueError, match="not a readable image"):
        open_image(tmp_path / "a.png")
    assert not started


def test_the_formats_that_people_have_are_read(tmp_path):
    for kind in ("png", "jpg", "webp", "gif", "bmp", "tiff", "ppm", "jp2"):
        Image.new("RGB", (8, 8), "red").save(tmp_path / f"a.{kind}")
        red = np.asarray(pictures.read_image(tmp_path / f"a.{kind}"))[4, 4].astype(int)
        assert red[0] > 240 and red[1] < 20 and red[2] < 20, kind


def test_a_pipe_in_place_of_a_picture_does_not_hang(tmp_path):
    os.mkfifo(tmp_path / "a.png")
    with pytest.raises(ValueError, match="a folder, a pipe or a device"):
        open_image(tmp_path / "a.png")


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_picture_is_turned_as_its_exif_says(orientation, tmp_path):
    rng = np.random.default_rng(0)
    upright = Image.fromarray(rng.integers(0, 255, (6, 10, 3), np.uint8))
    undo = "FLIP_LEFT_RIGHT ROTATE_180 FLIP_TOP_BOTTOM TRANSPOSE ROTATE_90 TRANSVERSE ROTATE_270".split()
    lying = upright  # 1; for the others the transpose that undoes what a viewer does
    if orientation > 1:
        lying = upright.transpose(Image.Transpose[undo[orientation - 2]])
    exif = Image.Exif()
    exif[0x0112] = orientation
    lying.save(tmp_path / "lying.png", exif=exif)
    upright.save(tmp_path / "upright.png")
    assert np.array_equal(read_pixels(tmp_path / "lying.png", 0), read_pixels(tmp_path / "upright.png", 0))
    assert np.array_equal(np.asarray(pictures.read_image(Image.open(tmp_path / "lying.png"))), upright)
    assert ImageOps.exif_transpose(Image.open(tmp_path / "lying.png")).size == upright.size


def test_every_locked_file_is_a_file_of_its_own(tmp_path):
    (tmp_path / "elsewhere").write_text("")
    (tmp_path / ".clip.lock").symlink_to(tmp_path / "not there")
    with pytest.raises(OSError):
        with store.lock(tmp_path / ".clip.lock", "taken"):
            pass
    assert not (tmp_path / "not there").exists() and Path(tmp_path / ".clip.lock").is_symlink()
