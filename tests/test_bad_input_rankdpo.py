"""Bad input to the trainer: every case ends in one clear line, or is mended with a notice; none silently.

pytest -q tests/test_bad_input_rankdpo.py
"""

import json
import os
import pickle
import shutil

import huggingface_hub
import numpy as np
import pytest
import torch
from conftest import fails, log_of, rows_of
from PIL import Image
from safetensors.torch import load_file, save_file

import rankdpo
from lib import pictures, pipelines, store
from lib.lists import read_metadata, split

OPTIONS = """
--lr nan | --lr inf | --lr 0 | --lr -1 | --lr fast | --beta nan | --beta inf | --beta 0 | --beta -5
--beta much | --ema 1 | --ema -.1 | --ema nan | --max_grad_norm -1 | --max_grad_norm nan | --max_grad_norm inf
--weight_decay -1 | --weight_decay nan | --holdout 1 | --holdout -.5 | --holdout nan | --steps 0 | --steps 1.5
--steps many | --seed -1 | --seed x | --resolution -1 | --keep 0 | --save_every -1 | --eval_every 0
--warmup_steps -1 | --global_batch_size 0 | --device_batch_size 0 | --images_per_forward -1 | --lora_rank -1
--sample_every -1 | --sample_prompts 0 | --sample_steps 0 | --sample_guidance nan | --sample_guidance -1
--ref_refresh -1 | --loss ppo | --ties lucky | --noise loud | --timesteps late
--label wrong | --label single:none | --precision fp8 | --gradient_checkpointing maybe | --resume perhaps
--device abacus
--learning_rate 1 | --lr | --steps 99999999999999999999 | --resolution 9223372036854775808 | --lora_rank 1e400
"""


@pytest.mark.parametrize(
    "case", [c.strip() for line in OPTIONS.strip().splitlines() for c in line.split("|")]
)
def test_an_option_that_cannot_be_is_refused_by_name(case, lists, tiny, tmp_path, capsys):
    good = ["--data", lists, "--model", f"{tiny}/sdxl", "--out", tmp_path / "out"]
    fails(rankdpo.main, good + case.split(), case.split()[0], capsys=capsys)
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())


ROW = {"prompt": "a", "file_names": ["images/00000/sdxl_0.png", "images/00000/sdxl_1.png"], "phi": [1.0, 0.0]}
DEEP = '{"prompt": ' + "[" * 100_000 + "]" * 100_000 + "}"
LINES = {  # line 2 of metadata.jsonl -> what the message says
    "{torn": "line 2",
    "[1]": "line 2: not a JSON object",
    DEEP: "line 2: nested too deep",
    '{"prompt": "\\ud800", "file_names": ["a", "b"], "phi": [1, 0]}': "line 2",
    json.dumps({**ROW, "prompt": None}): "line 2: needs prompt",
    json.dumps({**ROW, "prompt": 3}): "line 2: needs prompt",
    json.dumps({**ROW, "file_names": "ab"}): "line 2: needs prompt",
    json.dumps({**ROW, "file_names": []}): "line 2: needs prompt",
    json.dumps({**ROW, "file_names": [1, 2]}): "line 2: image 1",
    json.dumps({**ROW, "file_names": ["/etc/passwd", "b"]}): "line 2: image '/etc/passwd'",
    json.dumps({**ROW, "file_names": ["../a.png", "b"]}): "line 2: image '../a.png'",
    json.dumps({**ROW, "file_names": ["link.png", ROW["file_names"][0]]}): "line 2: image 'link.png'",
    json.dumps({**ROW, "file_names": [ROW["file_names"][0]] * 2}): "2 times in the list",
    json.dumps({**ROW, "file_names": ["no.png", ROW["file_names"][0]]}): "line 2: image no.png",
    json.dumps({**ROW, "file_names": ROW["file_names"][:1], "phi": [1]}): "line 2: needs at least two",
    json.dumps({**ROW, "phi": [1.0]}): "line 2: needs as many phi",
    json.dumps({**ROW, "phi": "ab"}): "line 2: needs as many phi",
    json.dumps({**ROW, "phi": [2, 0]}): "line 2: phi must lie in",
    json.dumps({**ROW, "phi": ["a", 0]}): "line 2",
    json.dumps({**ROW, "phi": [float("nan"), 0]}): "line 2: phi must lie in",
    json.dumps({**ROW, "scores": {"clip": [1]}}): "line 2: scores of clip",
    json.dumps({**ROW, "scores": {"clip": [1, None]}}): "line 2: scores of clip",
    json.dumps({**ROW, "scores": {"clip": [1, float("inf")]}}): "line 2: scores of clip",
    json.dumps({**ROW, "scores": {"clip": 7}}): "line 2",
    json.dumps({**ROW, "scores": 0}): "line 2: scores must be an object",
    json.dumps({**ROW, "file_names": [ROW["file_names"][0], "./" + ROW["file_names"][0]]}): "2 times",
    json.dumps(ROW)[:-1] + ', "phi": [0, 1]}': "line 2: a key stands twice",
    json.dumps({**ROW, "scores": {"two\nlines": 7}}): "scores of two lines",
    json.dumps({**ROW, "scores": [1, 2]}): "line 2",
}


@pytest.fixture(scope="module")
def data(lists, tmp_path_factory):
    folder = tmp_path_factory.mktemp("bad") / "data"
    shutil.copytree(lists, folder, ignore=shutil.ignore_patterns(".cache"))
    os.symlink("/etc/hostname", folder / "link.png")
    return folder


@pytest.mark.parametrize("line", LINES)
def test_a_bad_row_is_refused_with_file_and_line(line, data, tiny, tmp_path, capsys):
    first = json.dumps({**ROW, "prompt": "another"})
    (data / "metadata.jsonl").write_text(f"{first}\n{line}\n")
    good = ["--data", data, "--model", f"{tiny}/sdxl", "--out", tmp_path / "out"]
    fails(rankdpo.main, good, "metadata.jsonl", LINES[line], capsys=capsys)


def test_bytes_that_are_no_text_and_lists_that_stand_twice(data, tiny, tmp_path, capsys):
    good = ["--data", data, "--model", f"{tiny}/sdxl", "--out", tmp_path / "out"]
    (data / "metadata.jsonl").write_bytes(b'{"prompt": "caf\xe9"}\n')
    fails(rankdpo.main, good, "metadata.jsonl", "not UTF-8", capsys=capsys)
    (data / "metadata.jsonl").write_text(2 * (json.dumps(ROW) + "\n"))
    fails(rankdpo.main, good, "line 2: the same prompt and images as line 1", capsys=capsys)
    separators = {**ROW, "prompt": "one\u2028two\u0085three"}  # no line ends of a JSON lines file
    (data / "metadata.jsonl").write_text(json.dumps(separators, ensure_ascii=False) + "\n")
    assert read_metadata(data)[0]["prompt"] == separators["prompt"]


def bomb(path):
    Image.new("1", (20_000, 20_000)).save(path)


PICTURES = {"junk": lambda p: p.write_bytes(b"no picture"), "torn": None, "bomb": bomb, "text": None}


@pytest.mark.parametrize("kind", PICTURES)
def test_a_picture_that_cannot_be_read_is_named(kind, data, tiny, tmp_path, capsys):
    path = data / ROW["file_names"][0]
    whole = path.read_bytes()
    (data / "metadata.jsonl").write_text(json.dumps(ROW) + "\n")
    if kind == "torn":
        path.write_bytes(whole[:-200])
    elif kind == "text":
        path.write_text("GIF89a")
    else:
        PICTURES[kind](path)
    good = ["--data", data, "--model", f"{tiny}/sdxl", "--out", tmp_path / "out"]
    try:
        fails(rankdpo.main, good, ROW["file_names"][0], "not a readable image", capsys=capsys)
    finally:
        path.write_bytes(whole)


def test_sixteen_bit_grey_trains_as_what_it_shows(tmp_path):
    grey = np.random.default_rng(0).integers(0, 256, (20, 20)).astype(np.uint16)
    Image.fromarray(grey * 257).save(tmp_path / "deep.png")
    pixels = pictures.read_pixels(tmp_path / "deep.png", 0)
    assert torch.allclose(pixels[0], torch.from_numpy(grey.astype(np.float32)) / 127.5 - 1, atol=1e-6)


# ----------------------------------------------------------------------------- models


def drop_tensor(path):
    state = load_file(path)
    save_file(dict(list(state.items())[1:]), path, {"format": "pt"})


def add_tensor(path):
    save_file({**load_file(path), "more": torch.zeros(3)}, path, {"format": "pt"})


def edit(path, **values):
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def poison(path):
    state = load_file(path)
    next(iter(state.values())).flatten()[0] = float("nan")
    save_file(state, path, {"format": "pt"})


MODELS = {  # damage to a copy of a pipeline -> what the message says
    "no index": (lambda m: (m / "model_index.json").unlink(), "model_index.json"),
    "torn index": (lambda m: (m / "model_index.json").write_text("{"), "damaged"),
    "index of another": (
        lambda m: (m / "model_index.json").write_text('{"_class_name": "X"}'),
        "could not load",
    ),
    "no tokenizer": (lambda m: shutil.rmtree(m / "tokenizer"), "tokenizer"),
    "empty tokenizer": (lambda m: (m / "tokenizer_2/tokenizer.json").unlink(), "tokenizer_2"),
    "no text encoder": (lambda m: shutil.rmtree(m / "text_encoder"), "text_encoder"),
    "text encoder lacks a tensor": (
        lambda m: drop_tensor(m / "text_encoder/model.safetensors"),
        "text_encoder",
    ),
    "vae lacks a tensor": (lambda m: drop_tensor(m / "vae/diffusion_pytorch_model.safetensors"), "vae"),
    "unet lacks a tensor": (lambda m: drop_tensor(m / "unet/diffusion_pytorch_model.safetensors"), "unet"),
    "torn unet": (
        lambda m: (m / "unet/diffusion_pytorch_model.safetensors").write_bytes(b"1"),
        "could not load",
    ),
    "no unet": (lambda m: shutil.rmtree(m / "unet"), "unet is missing"),
    "no scheduler": (lambda m: shutil.rmtree(m / "scheduler"), "scheduler is missing"),
    "vae not finite": (lambda m: poison(m / "vae/diffusion_pytorch_model.safetensors"), "vae holds"),
    "text encoder not finite": (
        lambda m: poison(m / "text_encoder_2/model.safetensors"),
        "text_encoder_2 holds",
    ),
    "scale not finite": (lambda m: edit(m / "vae/config.json", scaling_factor=float("nan")), "encodes"),
    "noise not finite": (
        lambda m: edit(m / "scheduler/scheduler_config.json", beta_start=float("nan")),
        "no noise level",
    ),
    "no vae": (lambda m: edit(m / "model_index.json", vae=[None, None]), "has no vae"),
    "no second text encoder": (
        lambda m: edit(m / "model_index.json", text_encoder_2=[None, None]),
        "has no text_encoder_2",
    ),
    "no denoiser": (lambda m: edit(m / "model_index.json", unet=[None, None]), "has no denoiser"),
    "another family": (
        lambda m: edit(m / "model_index.json", _class_name="StableDiffusionPipeline"),
        "do not fit together",
    ),
    "no length of the text": (lambda m: (m / "tokenizer/tokenizer_config.json").unlink(), "model_max_length"),
    "not finite": (lambda m: poison(m / "unet/diffusion_pytorch_model.safetensors"), "not finite"),
}


@pytest.mark.parametrize("kind", MODELS)
def test_a_model_that_is_not_whole_is_refused(kind, lists, tiny, tmp_path, capsys):
    shutil.copytree(tiny / "sdxl", tmp_path / "model")
    MODELS[kind][0](tmp_path / "model")
    more = ["--steps", "1", "--device", "cpu", "--out", tmp_path / "out"]
    fails(
        rankdpo.main, ["--data", lists, "--model", tmp_path / "model", *more], MODELS[kind][1], capsys=capsys
    )
    assert not (tmp_path / "out/model").exists()


def test_tensors_that_the_config_does_not_use_are_said(tiny, tmp_path, capsys):
    """A notice, not an end: checkpoints of real size carry leftovers that no test here can know."""
    shutil.copytree(tiny / "sdxl", tmp_path / "model")
    add_tensor(tmp_path / "model/unet/diffusion_pytorch_model.safetensors")
    pipelines.load_pipeline(tmp_path / "model")
    assert "1 tensors of unet are not used by its config" in capsys.readouterr().out


@pytest.mark.parametrize("model", ["nobody/nothing", "random:sd9", "./nowhere", "toy"])
def test_a_model_that_is_not_there_is_refused(model, lists, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)  # or it tries again for long
    args = ["--data", lists, "--model", model, "--out", tmp_path / "out", "--device", "cpu"]
    fails(rankdpo.main, args, model.removeprefix("./"), capsys=capsys)


@pytest.mark.parametrize("model", ["sdxl", "sd3"])
def test_adapters_that_are_not_whole_or_of_another_model_are_refused(model, lists, tiny, tmp_path, capsys):
    short = "--lora_rank 2 --steps 1 --global_batch_size 4 --device cpu".split()
    args = ["--data", str(lists), *short, "--out", str(tmp_path / "out"), "--model"]
    rankdpo.main([*args, f"{tiny}/sdxl"])
    path = tmp_path / "out/model/pytorch_lora_weights.safetensors"
    if model == "sdxl":
        drop_tensor(path)
    args[args.index("--out") + 1] = str(tmp_path / "second")
    fails(rankdpo.main, [*args, f"{tiny}/{model}+{path.parent}"], str(path.parent), "adapters", capsys=capsys)


def test_a_model_in_the_folder_that_the_run_writes_is_refused(lists, tiny, tmp_path, capsys):
    """It would lose its base."""
    shutil.copytree(tiny / "sdxl", tmp_path / "out/model")
    args = ["--data", lists, "--model", tmp_path / "out/model", "--out", tmp_path / "out"]
    fails(rankdpo.main, args, "lies in --out", capsys=capsys)


@pytest.mark.parametrize("save_every", ["0", "1"])
def test_a_finished_run_is_not_replaced_by_another(save_every, lists, tiny, tmp_path, capsys):
    """Its identity is in its log, with or without checkpoints. --resume false starts again."""
    short = "--steps 1 --global_batch_size 4 --device cpu --save_every".split()
    args = ["--data", lists, "--model", f"{tiny}/sdxl", "--out", tmp_path, *short, save_every]
    rankdpo.main([str(a) for a in args])
    before = (tmp_path / "log.jsonl").read_bytes()
    fails(rankdpo.main, [*args, "--beta", 7], "beta (100.0, now 7.0)", "--resume false", capsys=capsys)
    assert (tmp_path / "log.jsonl").read_bytes() == before
    rankdpo.main([str(a) for a in (*args, "--beta", 7, "--resume", "false")])
    assert log_of(tmp_path)[0]["config"]["beta"] == 7


def test_the_toys_model_is_the_default_for_the_toys_lists_alone(lists, data, capsys):
    """It trained the toy's SDXL on anybody's pictures where --model was forgotten."""
    assert rankdpo.with_model(rankdpo.Config(data=str(lists))).model.endswith("toy/models/sdxl")
    named = rankdpo.Config(data=str(data), model="mine")
    rows = [dict(row, prompt="a cat on a sofa") for row in rows_of(data)[:1]]
    (data / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    assert rankdpo.with_model(named) is named
    for folder in (data, "random"):
        fails(rankdpo.main, ["--data", folder], "--model: must be named", capsys=capsys)


def test_random_lists_have_no_labels_to_choose_from(tmp_path, capsys):
    dro = ["--loss", "dro", "--expert_by", "clip"]
    for option in (["--label", "single:clip"], ["--label_rewards", "clip"], dro):
        fails(
            rankdpo.main,
            ["--data", "random", "--model", "random:sdxl", "--out", tmp_path, *option],
            option[-2],
            capsys=capsys,
        )


def test_a_vote_wants_the_same_rewards_for_every_list(data, tiny, tmp_path, capsys):
    rows = [{**ROW, "prompt": name, "scores": {name: [1, 0]}} for name in ("clip", "pickscore")]
    (data / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    args = ["--data", data, "--model", f"{tiny}/sdxl", "--out", tmp_path / "out", "--loss", "balanced"]
    fails(rankdpo.main, args, "the scores of every reward for every list", capsys=capsys)


# ----------------------------------------------------------------------------- our own state


@pytest.fixture(scope="module")
def run(lists, tiny, tmp_path_factory):
    """(command, folder) of a run of four steps with a checkpoint after each."""
    out = tmp_path_factory.mktemp("run")
    short = "--steps 4 --global_batch_size 4 --save_every 1 --keep 9 --device cpu".split()
    command = ["--data", str(lists), "--model", f"{tiny}/sdxl", *short]
    rankdpo.main([*command, "--out", str(out / "whole")])
    return command, out / "whole"


def newest(out):
    return sorted((out / "checkpoints").glob("step-*"))[-1]


def tensors_of(folder):
    return next(folder.glob("*.safetensors"))


CHECKPOINTS = {
    "run.json is torn": lambda c: (c / "run.json").write_text('{"step"'),
    "run.json is gone": lambda c: (c / "run.json").unlink(),
    "run.json is a list": lambda c: (c / "run.json").write_text("[]"),
    "run.json has no identity": lambda c: edit(c / "run.json", identity="x"),
    "run.json is another's": lambda c: (c / "run.json").write_text('{"step": 4}'),
    "run.json is binary": lambda c: (c / "run.json").write_bytes(b"\xff\x00"),
    "tensors are torn": lambda c: tensors_of(c).write_bytes(tensors_of(c).read_bytes()[:-100]),
    "tensors are gone": lambda c: tensors_of(c).unlink(),
    "tensors are junk": lambda c: tensors_of(c).write_bytes(b"junk"),
    "tensors are junk of that size": lambda c: tensors_of(c).write_bytes(b"x" * tensors_of(c).stat().st_size),
    "it is empty": lambda c: [p.unlink() for p in c.iterdir()],
    "it is a file": lambda c: (shutil.rmtree(c), c.write_text("x")),
}


@pytest.mark.parametrize("kind", CHECKPOINTS)
def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_it_taken(kind, run, tmp_path, capsys):
    command, whole = run
    shutil.copytree(whole, tmp_path / "out", ignore=shutil.ignore_patterns("model", "tensorboard"))
    CHECKPOINTS[kind](newest(tmp_path / "out"))
    rankdpo.main([*command, "--out", str(tmp_path / "out")])
    assert "step-000004: damaged, set aside" in capsys.readouterr().out
    assert (tmp_path / "out/checkpoints/damaged-step-000004").exists()
    assert [r["loss"] for r in log_of(tmp_path / "out")[1:]] == [r["loss"] for r in log_of(whole)[1:]]
    after, before = (load_file(next(o.glob("model/unet/*.safetensors"))) for o in (tmp_path / "out", whole))
    assert all(torch.equal(after[k], before[k]) for k in before)


def test_a_checkpoint_is_data_and_never_code(run, tmp_path):
    """A planted pickle, where torch's own format keeps one, is not opened."""

    class Code:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "executed"),)

    command, whole = run
    shutil.copytree(whole, tmp_path / "out", ignore=shutil.ignore_patterns("model", "tensorboard"))
    for name in (".metadata", "__0_0.distcp", "state.pt"):
        (newest(tmp_path / "out") / name).write_bytes(pickle.dumps(Code()))
    rankdpo.main([*command, "--out", str(tmp_path / "out")])
    assert not (tmp_path / "executed").exists()
    assert {p.suffix for p in newest(whole).iterdir()} == {".json", ".safetensors"}


def test_tensors_of_another_model_are_refused(run, tmp_path, capsys):
    command, whole = run
    shutil.copytree(whole, tmp_path / "out", ignore=shutil.ignore_patterns("model", "tensorboard"))
    checkpoint = newest(tmp_path / "out")
    state = load_file(tensors_of(checkpoint))
    save_file({"weights.x": torch.zeros(3)}, tensors_of(checkpoint))
    seen = json.loads((checkpoint / "run.json").read_text())
    seen["files"] = {tensors_of(checkpoint).name: tensors_of(checkpoint).stat().st_size}
    (checkpoint / "run.json").write_text(json.dumps(seen))
    fails(rankdpo.main, [*command, "--out", tmp_path / "out"], "step-000004", "does not fit", capsys=capsys)
    assert len(state) > 10


@pytest.mark.parametrize("change", ["labels", "rows", "picture"])
def test_a_run_does_not_go_on_with_other_lists(change, run, lists, tiny, tmp_path, capsys):
    command, whole = run
    shutil.copytree(lists, tmp_path / "data", ignore=shutil.ignore_patterns(".cache"))
    command = ["--data", str(tmp_path / "data"), *command[2:], "--out", str(tmp_path / "out")]
    rankdpo.main([*command, "--steps", "1"])
    rows = rows_of(tmp_path / "data")
    if change == "labels":
        rows[3]["phi"] = rows[3]["phi"][::-1]
    elif change == "rows":
        rows = rows[:-1]
    else:
        Image.new("RGB", (32, 32), "red").save(tmp_path / "data" / rows[0]["file_names"][0])
    (tmp_path / "data/metadata.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    fails(rankdpo.main, [*command, "--steps", "1"], "another lists", "--resume false", capsys=capsys)


def test_a_run_does_not_go_on_over_another_base(lists, tiny, tmp_path, capsys):
    shutil.copytree(tiny / "sdxl", tmp_path / "base")
    short = "--steps 1 --lora_rank 2 --global_batch_size 4 --save_every 1 --device cpu".split()
    args = ["--data", lists, "--model", tmp_path / "base", "--out", tmp_path / "out", *short]
    rankdpo.main([str(a) for a in args])
    path = tmp_path / "base/unet/diffusion_pytorch_model.safetensors"
    save_file({k: v + 0.01 for k, v in load_file(path).items()}, path, {"format": "pt"})
    fails(rankdpo.main, args, "another weights", "--resume false", capsys=capsys)


LOGS = {
    "torn": lambda p: p.write_text(p.read_text()[:-30]),
    "gone": lambda p: p.unlink(),
    "without rows": lambda p: p.write_text(""),
}


@pytest.mark.parametrize("kind", LOGS)
def test_a_damaged_log_does_not_stop_a_run(kind, run, tmp_path):
    command, whole = run
    shutil.copytree(whole, tmp_path / "out", ignore=shutil.ignore_patterns("model", "tensorboard"))
    shutil.rmtree(newest(tmp_path / "out"))
    LOGS[kind](tmp_path / "out/log.jsonl")
    rankdpo.main([*command, "--out", str(tmp_path / "out")])
    log = log_of(tmp_path / "out")
    assert log[-1]["step"] == 3 and "config" in log[0]


@pytest.mark.parametrize("text", [b"\xff\xfe", b"not json\n{}\n", b'{"config": 1}\n{"step": "x"}\n'])
def test_a_log_of_something_else_is_named(text, run, tmp_path, capsys):
    command, whole = run
    shutil.copytree(whole, tmp_path / "out", ignore=shutil.ignore_patterns("model", "tensorboard"))
    (tmp_path / "out/log.jsonl").write_bytes(text)
    fails(rankdpo.main, [*command, "--out", tmp_path / "out"], "log.jsonl", capsys=capsys)


@pytest.mark.parametrize("text", [b"", b"junk"])
def test_a_damaged_cache_is_made_again(text, lists, tiny, tmp_path):
    shutil.copytree(lists, tmp_path / "data", ignore=shutil.ignore_patterns(".cache"))
    short = "--steps 2 --global_batch_size 4 --device cpu --resume false".split()
    command = [
        "--data",
        str(tmp_path / "data"),
        "--model",
        f"{tiny}/sdxl",
        *short,
        "--out",
        str(tmp_path / "out"),
    ]
    rankdpo.main(command)
    first = log_of(tmp_path / "out")
    cached = sorted((tmp_path / "data/.cache").rglob("*.safetensors"))
    cached[3].write_bytes(text)
    cached[5].write_bytes(cached[5].read_bytes()[:-7])
    rankdpo.main(command)
    assert [r["loss"] for r in log_of(tmp_path / "out")[1:]] == [r["loss"] for r in first[1:]]


def test_the_cached_file_of_another_list_is_made_again(lists, tiny, tmp_path):
    shutil.copytree(lists, tmp_path / "data", ignore=shutil.ignore_patterns(".cache"))
    paths = ["--data", tmp_path / "data", "--model", tiny / "sdxl", "--out", tmp_path / "out"]
    short = "--steps 3 --global_batch_size 4 --device cpu --resume false".split()
    command = [str(a) for a in (*paths, *short)]
    rankdpo.main(command)
    first, cached = log_of(tmp_path / "out"), sorted((tmp_path / "data/.cache").rglob("*.safetensors"))
    cached[3].write_bytes(cached[5].read_bytes())
    rankdpo.main(command)
    assert cached[3].read_bytes() != cached[5].read_bytes()
    assert [r["loss"] for r in log_of(tmp_path / "out")[1:]] == [r["loss"] for r in first[1:]]


def test_two_trainers_in_one_folder_are_refused(lists, tiny, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    with store.lock(tmp_path / "out", "held"):
        args = ["--data", lists, "--model", f"{tiny}/sdxl", "--out", tmp_path / "out", "--device", "cpu"]
        fails(rankdpo.main, args, "another rankdpo.py is at work", capsys=capsys)


# ----------------------------------------------------------------------------- the machine


def full_disk(*args, **kwargs):
    raise OSError(28, "No space left on device", "somewhere")


@pytest.mark.parametrize("place", ["fsync", "replace", "cache", "checkpoint"])
def test_a_full_disk_ends_in_one_line(place, lists, tiny, tmp_path, capsys, monkeypatch):
    shutil.copytree(lists, tmp_path / "data", ignore=shutil.ignore_patterns(".cache"))
    if place in ("fsync", "replace"):
        monkeypatch.setattr(os, place, full_disk)
    if place == "cache":
        monkeypatch.setattr("lists.save_file", full_disk)
    if place == "checkpoint":
        monkeypatch.setattr("engine.dcp.save", full_disk)
    short = "--steps 1 --save_every 1 --global_batch_size 4 --device cpu".split()
    args = ["--data", tmp_path / "data", "--model", f"{tiny}/sdxl", "--out", tmp_path / "out", *short]
    fails(rankdpo.main, args, "No space left on device", capsys=capsys)
    assert not list((tmp_path / "out").glob(".tmp*")) and not (tmp_path / "out/model").exists()


def test_an_interruption_ends_in_one_line(lists, tiny, tmp_path, capsys, monkeypatch):
    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(rankdpo, "load_batch", interrupt)
    args = ["--data", lists, "--model", f"{tiny}/sdxl", "--out", tmp_path / "out", "--device", "cpu"]
    fails(rankdpo.main, args, "interrupted", capsys=capsys)


def test_a_folder_that_cannot_be_written_is_found_at_once(lists, tiny, tmp_path, capsys):
    (tmp_path / "file").write_text("x")
    args = ["--data", lists, "--model", f"{tiny}/sdxl", "--out", tmp_path / "file/out", "--device", "cpu"]
    fails(rankdpo.main, args, "--out", "cannot be written", capsys=capsys)


@pytest.mark.parametrize(
    "options, says",
    [
        ("--label_rewards clip", "--label_rewards"),
        ("--label single:clip --label_rewards pickscore", "--label_rewards"),
        ("--label random --label_rewards clip", "--label_rewards"),
        ("--label reversed --loss weighted --weight_by clip", "--label reversed"),
        ("--loss dro --margin 0", "--margin"),
        ("--holdout .01", "leaves no list to measure"),
        ("--holdout .99", "leaves no list to train on"),
    ],
)
def test_options_that_would_be_ignored_or_cannot_be_are_refused(options, says, lists, tiny, tmp_path, capsys):
    paths = ["--data", lists, "--model", tiny / "sdxl", "--out", tmp_path, "--device", "cpu"]
    fails(rankdpo.main, [*paths, *options.split()], says, capsys=capsys)


def test_no_prompt_is_trained_on_and_held_out():
    rows = [{"prompt": prompt} for prompt in "abacbdadce"]
    seen, held = split(rows, 0.4, 0)
    prompts = lambda of: {rows[n]["prompt"] for n in of}
    assert sorted(seen + held) == list(range(10)) and len(prompts(held)) == 2
    assert not prompts(seen) & prompts(held)
