"""Lists of several sizes in one run: refused before anything is encoded, or trained on in buckets."""

import io
import shutil
from collections import Counter

import numpy as np
import pandas
import pytest
import torch
from conftest import copied, fails, rows_of, train, train_args
from PIL import Image
from safetensors.torch import load_file

import rankdpo
import synpic
from lib import engine, memory
from lib.lists import encoded_sizes, list_pixels, look_at_pictures
from lib.pictures import IMAGE_FORMATS, look_at, read_pixels

WIDTHS = (32, 32, 48, 32, 48, 32, 48, 32, 48, 32)  # of the ten lists; 48 x 32 pixels is the rarer size
SIZES = [(32, width) for width in WIDTHS]


def resized(lists, folder, sizes):
    """A copy of the lists in which the images of list n have sizes[n] (height, width)."""
    copied(lists, folder)
    for row, (h, w) in zip(rows_of(folder), sizes):
        for name in row["file_names"]:
            Image.open(folder / name).resize((w, h)).save(folder / name)
    return folder


@pytest.fixture(scope="module")
def mixed(lists, tmp_path_factory):
    return resized(lists, tmp_path_factory.mktemp("mixed") / "data", SIZES)


OPTIONS = "--steps 5 --lr 1e-3 --beta 10 --precision fp64 --holdout .4 --eval_every 2 --caption_dropout .3"


def run(data, tiny, out, *more, processes=1):
    return train(data, tiny, out, OPTIONS, *more, processes=processes)


def curve(log):
    """(steps, metrics): of steps, and of held-out lists where they were measured."""
    names = (
        "loss accuracy best_s worst_s grad_norm held_out_accuracy held_out_best_s held_out_worst_s".split()
    )
    return np.array([[row.get(name) or 0 for name in names] for row in log[1:]])


@pytest.fixture(scope="module")
def whole(mixed, tiny, tmp_path_factory):
    """(log, folder, [(held out?, h, w) of each batch], sizes that memory and samples were planned for)"""
    out, shapes, chosen = tmp_path_factory.mktemp("whole"), [], []
    load, choose, prepare = rankdpo.load_batch, memory.choose, engine.prepare_samples

    def loaded(*args):
        batch = load(*args)
        shapes.append((args[2][0][0] >= rankdpo.HELD_OUT, *batch.x_t.shape[2:]))
        return batch

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rankdpo, "load_batch", loaded)
        of_memory = lambda *args: chosen.append(args[3]["latents"].shape[2:]) or choose(*args)
        of_samples = lambda *args: chosen.append(args[3]) or prepare(*args)
        patch.setattr(memory, "choose", of_memory)
        patch.setattr(engine, "prepare_samples", of_samples)
        log = run(mixed, tiny, out, "--device_batch_size", 3)
    return log, out, shapes, chosen


def test_processes_share_a_step(monkeypatch):
    cfg = rankdpo.Config(steps=3, global_batch_size=8, device_batch_size=3)
    order = rankdpo.draw_order(cfg, [range(10), range(10, 15)])
    alone = sum(rankdpo.micro_batches(cfg, order, 1), [])
    monkeypatch.setenv("WORLD_SIZE", "2")
    shares = []
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        shares.append(rankdpo.micro_batches(cfg, order, 1))
    assert sum(shares[0] + shares[1], []) == alone
    assert [[len(batch) for batch in share] for share in shares] == [[3, 1], [3, 1]]


def test_each_step_has_one_size_and_all_lists_are_visited_equally_often():
    buckets = [list(range(50)), list(range(50, 80)), list(range(80, 97)), [97, 98], [99]]
    cfg = rankdpo.Config(steps=400, global_batch_size=4)
    order, of = rankdpo.draw_order(cfg, buckets), {n: b for b, bucket in enumerate(buckets) for n in bucket}
    turns = [{of[n] for n in step} for step in order.tolist()]
    assert all(len(turn) == 1 for turn in turns) and turns[0] == {0}
    visits = Counter(order.flatten().tolist())
    assert set(visits.values()) == {16}  # 400 x 4 / 100
    for b, bucket in enumerate(buckets):  # also on the way: never more than a step from its share
        taken = np.cumsum([turn == {b} for turn in turns])
        assert np.abs(taken - len(bucket) / 100 * np.arange(1, 401)).max() <= 1
    of_first = order[[turn == {0} for turn in turns]].flatten()
    assert sorted(of_first[:50]) == sorted(of_first[50:100]) == buckets[0]  # an epoch, and another
    assert of_first[:50].tolist() != of_first[50:100].tolist()


def test_a_batch_has_one_size_and_memory_is_chosen_for_the_largest(whole):
    log, _, shapes, chosen = whole
    assert set(shapes) == {(held_out, 8, w) for held_out in (True, False) for w in (8, 12)}
    assert chosen == [(8, 12), (32, 32)]  # latents, pixels
    assert log[0]["held_out"] == 4 and log[0]["lists"] == 6
    assert ["held_out_accuracy" in row for row in log[1:]] == [False, True, False, True, False]


def test_the_curve_is_the_same_on_two_processes(mixed, tiny, tmp_path, whole):
    log = run(mixed, tiny, tmp_path, "--device_batch_size", 1, processes=2)
    assert np.allclose(curve(log), curve(whole[0]), rtol=1e-9, atol=1e-9) and curve(log)[:, -3].any()


def test_the_curve_is_the_same_list_by_list_and_goes_on_bit_for_bit(mixed, tiny, tmp_path, whole):
    more = ("--device_batch_size", 1, "--save_every", 3, "--keep", 9)
    log = run(mixed, tiny, tmp_path, *more)
    assert np.allclose(curve(log), curve(whole[0]), rtol=1e-9, atol=1e-9)
    weights = lambda: load_file(tmp_path / "model/unet/diffusion_pytorch_model.safetensors")
    before = weights()
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-000003"]
    shutil.rmtree(tmp_path / "model")
    again = run(mixed, tiny, tmp_path, *more)  # from step 3
    assert np.array_equal(curve(again), curve(log)) and "resumed" in again[0]
    assert all(torch.equal(t, before[name]) for name, t in weights().items())


def test_lists_are_conditioned_on_their_own_size(mixed, whole):
    for n, (h, w) in enumerate(SIZES):
        (folder,) = (mixed / ".cache").iterdir()
        item = load_file(folder / f"{n:07d}.safetensors")
        assert item["time_ids"].tolist() == [h, w, 0, 0, h, w]
        assert item["latents"].shape[2:] == (h // 4, w // 4)


def test_sizes_that_do_not_fit_are_refused_before_anything_is_encoded(lists, tiny, tmp_path, capsys):
    data = resized(lists, tmp_path / "data", SIZES)
    lines = (data / "metadata.jsonl").read_text().splitlines()
    (data / "metadata.jsonl").write_text("\n".join([*lines[:2], "", *lines[2:]]) + "\n")
    args, name = train_args(data, tiny, tmp_path / "out"), rows_of(lists)[9]["file_names"][3]
    image = Image.open(data / name)
    image.resize((48, 32)).save(data / name)
    says = ("metadata.jsonl, line 11", "32 x 32, 32 x 32, 32 x 32, 48 x 32 pixels", "--resolution")
    fails(rankdpo.main, args, *says, capsys=capsys)
    for other in rows_of(lists)[9]["file_names"]:
        image.resize((30, 32)).save(data / other)
    says = (rows_of(lists)[9]["file_names"][0], "30 x 32 pixels", "multiples of 4", "--resolution")
    fails(rankdpo.main, args, *says, capsys=capsys)
    assert not (data / ".cache").exists()


def test_what_resolution_crops_is_said_once(mixed, lists, capsys):
    looks = lambda data: look_at_pictures(data, rows_of(data))
    sizes = lambda data, side: encoded_sizes(rankdpo.Config(data=str(data), resolution=side), looks(data))
    assert sizes(mixed, 16) == [(16, 16)] * 10
    said = "--resolution 16: crops 4 of 10 lists, by up to 33 % of a picture\n"
    assert capsys.readouterr().out == said
    assert sizes(lists, 16) == [(16, 16)] * 10 and sizes(mixed, 0) == SIZES
    assert capsys.readouterr().out == ""


TURNED = ("PNG", "JPEG", "WEBP", "TIFF", "AVIF")  # that can hold EXIF


@pytest.mark.parametrize("kind", [kind.lower() for kind in IMAGE_FORMATS if kind in TURNED])
def test_a_header_gives_the_size_of_the_turned_picture(kind, tmp_path):
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        Image.new("RGB", (10, 6)).save(path := tmp_path / f"{orientation}.{kind}", exif=exif)
        (height, width, _), problem = look_at(tmp_path, path.name)
        assert not problem and (height, width) == read_pixels(path, 0).shape[1:]
        assert (height, width) == ((10, 6) if orientation > 4 else (6, 10))


def test_a_lying_picture_is_imported_and_measured_as_it_is_read(tmp_path):
    upright = Image.fromarray(np.random.default_rng(0).integers(0, 255, (32, 48, 3), dtype=np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6
    pair = [io.BytesIO(), io.BytesIO()]
    upright.save(pair[0], "JPEG")
    upright.transpose(Image.Transpose.ROTATE_90).save(pair[1], "JPEG", exif=exif)
    labels = dict(label_0=1.0, label_1=0.0, caption="a red circle")
    row = dict(jpg_0=pair[0].getvalue(), jpg_1=pair[1].getvalue(), **labels)
    pandas.DataFrame([row]).to_parquet(tmp_path / "a.parquet")
    out = tmp_path / "data"
    synpic.main(["--stages", "import", "--from", str(tmp_path / "a.parquet"), "--out", str(out)])
    rows, cfg = rows_of(out), rankdpo.Config(data=str(out))
    (size,) = encoded_sizes(cfg, look_at_pictures(out, rows))
    standing, lying = list_pixels(cfg, rows[0], size)  # (3, 32, 48) each
    assert size == (32, 48) and (standing - lying).abs().mean() < 0.1  # the same picture but for JPEG
