"""Bad input to the trainer: every case ends in one clear line, or is mended with a notice; none silently."""

import json
import os
import pickle
import shutil

import huggingface_hub
import pytest
import torch
from conftest import copied, fails, log_of, rows_of, train, train_args, write_rows
from PIL import Image
from safetensors.torch import load_file, save_file

import rankdpo
from lib import engine, pipelines, store
from lib.lists import encoded_sizes, read_lists

OPTIONS = """
--lr nan | --lr inf | --lr 0 | --lr -1 | --lr fast | --beta nan | --beta inf | --beta 0 | --beta -5
--beta much | --ema 1 | --ema -.1 | --ema nan | --max_grad_norm -1 | --max_grad_norm nan | --max_grad_norm inf
--weight_decay -1 | --weight_decay nan | --holdout 1 | --holdout -.5 | --holdout nan | --steps 0 | --steps 1.5
--steps many | --seed -1 | --seed x | --resolution -1 | --keep 0 | --save_every -1 | --eval_every 0
--warmup_steps -1 | --global_batch_size 0 | --device_batch_size 0 | --images_per_forward -1 | --lora_rank -1
--sample_every -1 | --sample_prompts 0 | --sample_steps 0 | --sample_guidance nan | --sample_guidance -1
--ref_refresh -1 | --loss ppo | --timesteps late | --data nowhere | --betta 1
--label wrong | --label single:none | --precision fp8 | --gradient_checkpointing maybe | --resume perhaps
--device abacus
--learning_rate 1 | --lr | --steps 99999999999999999999 | --resolution 9223372036854775808 | --lora_rank 1e400
"""


@pytest.mark.parametrize("case", [c.strip() for c in OPTIONS.replace("\n", "|").split("|") if c.strip()])
def test_an_option_that_cannot_be_is_refused_by_name(case, lists, tiny, tmp_path, capsys):
    good = train_args(lists, tiny, tmp_path / "out")
    fails(rankdpo.main, good + case.split(), case.split()[0], capsys=capsys)
    assert not [p for p in tmp_path.glob("out/*") if p.name != ".lock"]


@pytest.mark.parametrize(
    "options, says",
    [
        ("--label_rewards clip", "--label_rewards"),
        ("--label single:clip --label_rewards pickscore", "--label_rewards"),
        ("--label random --label_rewards clip", "--label_rewards"),
        ("--label reversed --loss weighted --weight_by clip", "--label reversed"),
        ("--loss dro --experts 0", "--experts"),
        ("--holdout .01", "leaves no list to measure"),
        ("--holdout .99", "leaves no list to train on"),
        ("--label voting", "--label voting"),
        ("--label phi --label_rewards clip mps", "no such scores: mps"),
        ("--loss balanced --label sum", "at no phi"),
        ("--data random --label single:clip", "no such scores: clip"),
        ("--data random --label_rewards clip", "--label_rewards"),
        ("--data random --loss dro --expert_by clip", "--expert_by clip"),
    ],
)
def test_options_that_would_be_ignored_or_cannot_be_are_refused(options, says, lists, tiny, tmp_path, capsys):
    fails(rankdpo.main, train_args(lists, tiny, tmp_path, options), says, capsys=capsys)


@pytest.fixture(scope="module")
def data(lists, tmp_path_factory):
    folder = copied(lists, tmp_path_factory.mktemp("bad") / "data")
    os.symlink("/etc/hostname", folder / "link.png")
    return folder


def test_a_picture_that_is_not_there_or_cannot_be_read_is_named_with_its_line(data, tiny, tmp_path, capsys):
    """Nothing is begun, and each picture is opened once by the run that is right."""
    names, args = ["images/00000/sdxl_0.png", "images/00000/sdxl_1.png"], train_args(data, tiny, tmp_path)
    row, path = dict(prompt="a", file_names=names, phi=[1.0, 0.0]), data / names[1]
    write_rows(data, [dict(row, prompt="another", file_names=[names[0], "link.png"]), row])
    fails(rankdpo.main, args, "line 1: image 'link.png'", "a link out of the folder", capsys=capsys)
    write_rows(data, [dict(row, prompt="another", file_names=names[::-1]), row])
    whole = path.read_bytes()
    for content, says in (
        (None, f"line 1: image {names[1]} is not in the folder; mend or delete that row"),
        (b"no picture", f"line 1: image {names[1]} is not a readable image"),
        (whole[:-200], f"{names[1]}: not a readable image"),  # whose header is right
    ):
        path.unlink(missing_ok=True)
        if content:
            path.write_bytes(content)
        fails(rankdpo.main, args, says, capsys=capsys)
    assert {p.name for p in tmp_path.iterdir()} <= {".lock", "recipe.json"}
    path.write_bytes(whole)


def test_each_picture_is_opened_once_for_its_size_and_its_digest(lists, monkeypatch):
    opened, real = [], Image.open
    noted = lambda file, *more, **how: opened.append(file.name) or real(file, *more, **how)
    monkeypatch.setattr(Image, "open", noted)
    cfg, rows = read_lists(rankdpo.Config(data=str(lists)))
    assert encoded_sizes(cfg, rows) == [(32, 32)] * 10
    assert sorted(opened) == sorted(f"{lists}/{name}" for row in rows for name in row["file_names"])


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


WEIGHTS, SCHEDULER = "diffusion_pytorch_model.safetensors", "scheduler/scheduler_config.json"
INDEX = lambda **values: lambda m: edit(m / "model_index.json", **values)
MODELS = {  # damage to a copy of a pipeline -> what the message says
    "no index": (lambda m: (m / "model_index.json").unlink(), "model_index.json"),
    "torn index": (lambda m: (m / "model_index.json").write_text("{"), "damaged"),
    "no tokenizer": (lambda m: shutil.rmtree(m / "tokenizer"), "tokenizer"),
    "empty tokenizer": (lambda m: (m / "tokenizer_2/tokenizer.json").unlink(), "tokenizer_2"),
    "unet lacks a tensor": (lambda m: drop_tensor(m / "unet" / WEIGHTS), "unet"),
    "torn unet": (lambda m: (m / "unet" / WEIGHTS).write_bytes(b"1"), "could not be loaded"),
    "no unet": (lambda m: shutil.rmtree(m / "unet"), "unet is missing"),
    "vae not finite": (lambda m: poison(m / "vae" / WEIGHTS), "vae holds"),
    "text encoder not finite": (lambda m: poison(m / "text_encoder_2/model.safetensors"), "encoder_2 holds"),
    "scale not finite": (lambda m: edit(m / "vae/config.json", scaling_factor=float("nan")), "encodes"),
    "noise": (lambda m: edit(m / SCHEDULER, beta_start=float("nan")), "no noise level"),
    "no vae": (INDEX(vae=[None, None]), "has no vae"),
    "no denoiser": (INDEX(unet=[None, None]), "has no denoiser"),
    "another family": (INDEX(_class_name="StableDiffusionPipeline"), "do not fit together"),
    "no length of the text": (lambda m: (m / "tokenizer/tokenizer_config.json").unlink(), "model_max_length"),
    "not finite": (lambda m: poison(m / "unet" / WEIGHTS), "not finite"),
}


@pytest.mark.parametrize("kind", MODELS)
def test_a_model_that_is_not_whole_is_refused(kind, lists, tiny, tmp_path, capsys):
    shutil.copytree(tiny / "sdxl", tmp_path / "sdxl")
    damage, says = MODELS[kind]
    damage(tmp_path / "sdxl")
    fails(rankdpo.main, train_args(lists, tmp_path, tmp_path / "out", "--steps 1"), says, capsys=capsys)
    assert not (tmp_path / "out/model").exists()


def test_tensors_that_the_config_does_not_use_are_said(tiny, tmp_path, capsys):
    """A notice, not an end: checkpoints of real size carry leftovers that no test here can know."""
    shutil.copytree(tiny / "sdxl", tmp_path / "model")
    add_tensor(tmp_path / "model/unet/diffusion_pytorch_model.safetensors")
    pipelines.load_pipeline(tmp_path / "model")
    assert "1 tensors of unet are not used by its config" in capsys.readouterr().out


@pytest.mark.parametrize("model", ["nobody/nothing", "random:sd9", "./nowhere", "toy"])
def test_a_model_that_is_not_there_is_refused(model, lists, tiny, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)  # or it tries again for long
    args = train_args(lists, tiny, tmp_path, "--model", model)
    fails(rankdpo.main, args, model.removeprefix("./"), capsys=capsys)


def test_adapters_that_are_not_whole_or_of_another_model_are_refused(lists, tiny, tmp_path, capsys):
    train(lists, tiny, tmp_path / "out", "--lora_rank 2 --steps 1")
    folder = tmp_path / "out/model"
    for model in ("sd3", "sdxl"):
        args = train_args(lists, tiny, tmp_path / "second", model=f"{model}+{folder}")
        fails(rankdpo.main, args, str(folder), "adapters", capsys=capsys)
        drop_tensor(folder / "pytorch_lora_weights.safetensors")


def test_a_model_in_the_folder_that_the_run_writes_is_refused(lists, tiny, tmp_path, capsys):
    """It would lose its base."""
    shutil.copytree(tiny / "sdxl", tmp_path / "out/sdxl")
    fails(rankdpo.main, train_args(lists, tmp_path / "out", tmp_path / "out"), "lies in --out", capsys=capsys)


def test_the_toys_model_is_the_default_for_the_toys_lists_alone(lists, data, capsys):
    """It trained the toy's SDXL on anybody's pictures where --model was forgotten."""
    assert rankdpo.with_defaults(rankdpo.Config(data=str(lists))).model.endswith("toy/models/sdxl")
    named = rankdpo.Config(data=str(data), model="mine")
    rows = [dict(row, prompt="a cat on a sofa") for row in rows_of(data)[:1]]
    write_rows(data, rows)
    assert rankdpo.with_defaults(named).model == "mine"
    for folder in (data, "random"):
        fails(rankdpo.main, ["--data", folder], "--model: must be named", capsys=capsys)


def test_a_vote_wants_the_same_rewards_for_every_list(data, tiny, tmp_path, capsys):
    names = ["images/00000/sdxl_0.png", "images/00000/sdxl_1.png"]
    row = lambda name: dict(prompt=name, file_names=names, phi=[1.0, 0.0], scores={name: [1, 0]})
    write_rows(data, [row("clip"), row("pickscore")])
    args = train_args(data, tiny, tmp_path, "--loss balanced")
    fails(rankdpo.main, args, "the scores of every reward for every list", capsys=capsys)


@pytest.fixture(scope="module")
def run(lists, tiny, tmp_path_factory):
    """(command, folder) of a run of four steps with a checkpoint after each."""
    out, more = tmp_path_factory.mktemp("run") / "out", "--steps 4 --save_every 1 --keep 9"
    train(lists, tiny, out, more)
    return lambda out, *less: train_args(lists, tiny, out, more, *less), out


@pytest.fixture
def unfinished(run, tmp_path):
    """(command, a copy of that run's folder without its model)."""
    out = copied(run[1], tmp_path / "out", "model")
    return run[0](out), out


def newest(out):
    return sorted((out / "checkpoints").glob("step-*"))[-1]


def tensors_of(folder):
    return next(folder.glob("*.safetensors"))


CHECKPOINTS = {
    "the recipe is gone": lambda c: (c / "recipe.json").unlink(),
    "the recipe is another's": lambda c: edit(c / "recipe.json", seed=1),
    "the list of files is torn": lambda c: (c / ".contents").write_text('{"recipe'),
    "the list of files is gone": lambda c: (c / ".contents").unlink(),
    "the list of files is a list": lambda c: (c / ".contents").write_text("[]"),
    "the list of files is binary": lambda c: (c / ".contents").write_bytes(b"\xff\x00"),
    "tensors are torn": lambda c: tensors_of(c).write_bytes(tensors_of(c).read_bytes()[:-100]),
    "tensors are gone": lambda c: tensors_of(c).unlink(),
    "tensors are junk of that size": lambda c: tensors_of(c).write_bytes(b"x" * tensors_of(c).stat().st_size),
    "it is empty": lambda c: [p.unlink() for p in c.iterdir()],
    "it is a file": lambda c: (shutil.rmtree(c), c.write_text("x")),
}


def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_it_taken(run, unfinished, tmp_path, capsys):
    command, out = unfinished
    for n, kind in enumerate(CHECKPOINTS):
        folder = shutil.copytree(newest(out), tmp_path / str(n))
        assert store.is_whole(folder), kind
        CHECKPOINTS[kind](folder)
        assert not store.is_whole(folder), kind
    CHECKPOINTS["tensors are torn"](newest(out))
    for name in (".metadata", "__0_0.distcp", "state.pt"):  # where torch's own format keeps code
        (out / "checkpoints/step-000003" / name).write_bytes(pickle.dumps(Code(tmp_path / "executed")))
    rankdpo.main(command)
    assert "step-000004: damaged, set aside" in capsys.readouterr().out
    assert (out / "checkpoints/damaged-step-000004").exists() and not (tmp_path / "executed").exists()
    whole = run[1]
    assert [r["loss"] for r in log_of(out)[1:]] == [r["loss"] for r in log_of(whole)[1:]]
    after, before = (load_file(next(o.glob("model/unet/*.safetensors"))) for o in (out, whole))
    assert all(torch.equal(after[k], before[k]) for k in before)
    assert {p.suffix for p in newest(whole).iterdir()} == {".json", ".safetensors", ""}


class Code:
    """A planted pickle, which makes a folder if it is opened."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


def test_tensors_of_another_model_are_refused(unfinished, capsys):
    command, out = unfinished
    folder = newest(out)
    save_file({"weights.x": torch.zeros(3)}, tensors_of(folder))
    (folder / ".contents").write_text(json.dumps(store.contents(folder)))
    fails(rankdpo.main, command, "step-000004", "does not fit", capsys=capsys)


LISTS = {  # what is changed in a copy of the data
    "labels": lambda data, rows: rows[3].update(phi=rows[3]["phi"][::-1]),
    "rows": lambda data, rows: rows.pop(),
    "a picture": lambda data, rows: Image.new("RGB", (32, 32), "red").save(data / rows[0]["file_names"][0]),
}


def test_a_run_does_not_go_on_with_other_lists_or_another_base(lists, tiny, tmp_path, capsys):
    """Nor with a picture of the same size in bytes in the place of another, or a weight changed in the midst
    of a tensor: content counts, not names, sizes or dates."""
    data, model = copied(lists, tmp_path / "data"), shutil.copytree(tiny / "sdxl", tmp_path / "sdxl")
    rows = rows_of(data)
    picture = data / rows[0]["file_names"][0]
    flat = Image.new("RGB", (32, 32), (1, 2, 3))
    flat.save(picture, compress_level=0)
    args = train_args(data, tmp_path, tmp_path / "out", "--steps 1 --lora_rank 2 --save_every 1")
    rankdpo.main(args)
    before, size = (data / "metadata.jsonl").read_bytes(), picture.stat().st_size
    refused = lambda what: fails(rankdpo.main, args, f"another {what}", "--resume false", capsys=capsys)
    for change in LISTS.values():
        kept, changed = picture.read_bytes(), json.loads(json.dumps(rows))
        change(data, changed)
        write_rows(data, changed)
        refused("lists of --data")
        picture.write_bytes(kept)
        (data / "metadata.jsonl").write_bytes(before)
    flat.putpixel((20, 20), (1, 2, 4))
    flat.save(picture, compress_level=0)
    assert picture.stat().st_size == size
    refused("lists of --data")
    picture.write_bytes(kept)
    path = model / "unet/diffusion_pytorch_model.safetensors"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    refused("weights of --model")


LOGS = {
    "torn": lambda p: p.write_text(p.read_text()[:-30]),
    "gone": lambda p: p.unlink(),
    "without rows": lambda p: p.write_text(""),
}


def test_a_damaged_log_does_not_stop_a_run_and_one_of_something_else_is_named(unfinished, capsys):
    command, out = unfinished
    for kind in LOGS.values():
        kind(out / "log.jsonl")
        log = engine.Log(rankdpo.Config(out=str(out)), 10, 0, 3, 1.0, torch.device("cpu"), torch.float32)
        log.file.close()
        assert "config" in log_of(out)[0] and all(row["step"] < 3 for row in log_of(out)[1:])
    for text in (b"\xff\xfe", b"not json\n{}\n", b'{"config": 1}\n{"step": "x"}\n'):
        (out / "log.jsonl").write_bytes(text)
        fails(rankdpo.main, command, "log.jsonl", capsys=capsys)


def test_a_damaged_cache_or_another_lists_file_is_made_again(lists, tiny, tmp_path):
    data = copied(lists, tmp_path / "data")
    first = train(data, tiny, tmp_path / "a")
    cached = sorted((data / ".cache").rglob("*.safetensors"))
    whole = [path.read_bytes() for path in cached]
    for n, content in ((0, b""), (3, b"junk"), (5, whole[5][:-7]), (6, whole[7])):
        cached[n].write_bytes(content)
    assert [r["loss"] for r in train(data, tiny, tmp_path / "b")[1:]] == [r["loss"] for r in first[1:]]
    assert [path.read_bytes() for path in cached] == whole


def test_two_trainers_in_one_folder_are_refused(lists, tiny, tmp_path, capsys):
    with store.lock(tmp_path / ".lock", "held"):
        fails(rankdpo.main, train_args(lists, tiny, tmp_path), "another rankdpo.py is at work", capsys=capsys)


def test_what_somebody_else_left_in_out_stays(lists, tiny, tmp_path, capsys):
    """A model/ without a recipe is not replaced, nor one of ours that holds a stranger's file."""
    (tmp_path / "a/model").mkdir(parents=True)
    (tmp_path / "a/model/thesis.txt").write_text("years of work")
    says = ("a: holds model, but no recipe.json that says what made it", "--resume false")
    fails(rankdpo.main, train_args(lists, tiny, tmp_path / "a"), *says, capsys=capsys)
    assert [p.name for p in (tmp_path / "a").iterdir() if p.name != ".lock"] == ["model"]
    args = "--steps 1 --save_every 1"
    train(lists, tiny, tmp_path / "b", args)
    (tmp_path / "b/model/thesis.txt").write_text("years of work")
    (tmp_path / "b/model/unet/config.json").write_text("{}")  # or the run would be finished
    fails(rankdpo.main, train_args(lists, tiny, tmp_path / "b", args), "b/model: holds", "not written here")
    assert (tmp_path / "b/model/thesis.txt").read_text() == "years of work"


def full_disk(*args, **kwargs):
    raise OSError(28, "No space left on device", "somewhere")


@pytest.mark.parametrize("place", ["os.fsync", "os.replace", "lib.lists.save_file", "lib.engine.dcp.save"])
def test_a_full_disk_ends_in_one_line(place, lists, tiny, tmp_path, capsys, monkeypatch):
    data = copied(lists, tmp_path / "data")
    monkeypatch.setattr(place, full_disk)
    args = train_args(data, tiny, tmp_path / "out", "--steps 1 --save_every 1")
    fails(rankdpo.main, args, "No space left on device", capsys=capsys)
    assert not list((tmp_path / "out").glob(".tmp*")) and not (tmp_path / "out/model").exists()


def test_an_interruption_ends_in_one_line(lists, tiny, tmp_path, capsys, monkeypatch):
    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(rankdpo, "load_batch", interrupt)
    fails(rankdpo.main, train_args(lists, tiny, tmp_path), "interrupted", capsys=capsys)


def test_a_folder_that_cannot_be_written_is_found_at_once(lists, tiny, tmp_path, capsys):
    (tmp_path / "file").write_text("x")
    args = train_args(lists, tiny, tmp_path / "file/out")
    fails(rankdpo.main, args, "--out", "cannot be written", capsys=capsys)


def test_no_prompt_is_trained_on_and_held_out():
    rows = [{"prompt": prompt} for prompt in "abacbdadce"]
    seen, held = rankdpo.split(rows, 0.4, 0)
    prompts = lambda of: {rows[n]["prompt"] for n in of}
    assert sorted(seen + held) == list(range(10)) and len(prompts(held)) == 2
    assert not prompts(seen) & prompts(held)
