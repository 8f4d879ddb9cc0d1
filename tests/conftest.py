"""What the tests share: tiny random-weight pipelines in the real formats, lists made with them, helpers."""

import json
import multiprocessing
import os
import shutil
import socket
import sys
import tempfile
import threading
from pathlib import Path

# CPU kernels round differently on another number of threads: here every run, in this process or another, has
# one, so that bytes can be compared on any machine. Runs are compared on the CPU, also where there is a GPU.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["CUDA_VISIBLE_DEVICES"] = ""

HERE = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(HERE))

import pytest
import torch
from PIL import Image
from tqdm import tqdm

import rankdpo
import synpic
from lib import common, memory, pictures
from toy import build

plot_curves = pictures.plot_curves
torch.set_num_threads(1)
# tqdm's bars in forked processes share a lock, and a child that is killed while it holds that would stop its
# parent for ever: each child has a lock of its own
os.register_at_fork(after_in_child=lambda: tqdm.set_lock(threading.RLock()))
PROMPTS = [
    "a red circle",
    "two squares",
    "a cross left of a circle",
    "a photo of a triangle",
    "four crosses",
    "a blue cross and a red circle",
    "a green square",
    "three circles",
    "a drawing of a square",
    "a circle above a triangle",
]
OURS = r"(lib\.\w+|toy\.\w+|losses|rewards|synpic|rankdpo|evaluate|conftest|test_\w+)$"
WARNINGS = (  # those whose cause is known and not ours to mend; ours are errors; later lines win
    # diffusers' schedulers call np.array on a tensor, and torch's __array__ does not know numpy 2's copy
    "ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning:diffusers",
    # open_clip and timm decorate functions with torch.jit.script as they are imported
    "ignore:`torch.jit.script:FutureWarning:torch",
    # children are forked while pytest's own threads wait; they start none of those
    "ignore:This process .* is multi-threaded, use of fork:DeprecationWarning",
    # torch says so each time that one process saves or loads a checkpoint alone, as is meant
    "ignore:torch.distributed is disabled:UserWarning:torch",
    f"error:::{OURS}",
)


def pytest_configure(config):
    for line in WARNINGS:
        config.addinivalue_line("filterwarnings", line)


def remembered(function, key):
    """The function, computed once for each key(*args)."""
    known = {}

    def call(*args, **kwargs):
        place = key(*args, **kwargs)
        if place not in known:
            known[place] = function(*args, **kwargs)
        return known[place]

    return call


def model_and_shapes(family, denoiser, item, lora_rank=0):
    shapes = {name: tuple(t.shape) for name, t in item.items()}
    return json.dumps([str(family), str(denoiser.config), shapes, lora_rank])


@pytest.fixture(scope="session", autouse=True)
def cheaper():
    """More than half of the time of a run of three steps: counting FLOPs of a model that was counted before,
    asking git for the commit, and drawing curves.png, which one test looks at (real_curves)."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memory, "count_flops", remembered(memory.count_flops, model_and_shapes))
        patch.setattr(common, "provenance", remembered(common.provenance, str))
        empty = lambda rows, panels, path: Image.new("1", (1, 1)).save(path)
        patch.setattr(pictures, "plot_curves", empty)
        yield


@pytest.fixture
def real_curves(monkeypatch):
    monkeypatch.setattr(pictures, "plot_curves", plot_curves)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """Random-weight pipelines of three families, three rewards and a prompt file, in the real layouts."""
    root = tmp_path_factory.mktemp("tiny")
    torch.manual_seed(0)
    vae = tiny_vae(force_upcast=False, shift_factor=0.1, scaling_factor=2.0)
    for name in ("sdxl", "sd3", "sd15"):
        build.build_pipeline(name, vae).save_pretrained(root / name)
    tokenizer = build.make_tokenizer()
    for name in ("clip", "hps", "pick"):
        build.save_reward(name, build.build_reward(name, tokenizer), tokenizer, root / "rewards" / name)
    (root / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    return root


@pytest.fixture(scope="session")
def lists(tiny, tmp_path_factory):
    """A folder of Syn-Pic: lists of four for every prompt, scored and labelled."""
    out = tmp_path_factory.mktemp("lists") / "synpic"
    synpic.main(synpic_args(tiny, out))
    return out


@pytest.fixture(scope="session")
def uneven(lists, tmp_path_factory):
    """The tiny lists, some of them shorter: K is 4, 3 and 2."""
    folder = copied(lists, tmp_path_factory.mktemp("uneven") / "data")
    rows = rows_of(folder)
    for i, row in enumerate(rows):
        k = 4 - i % 3
        for key in ("file_names", "models", "seeds", "phi", "rank"):
            row[key] = row[key][:k]
        row["scores"] = {name: values[:k] for name, values in row["scores"].items()}
    return write_rows(folder, rows)


def tiny_vae(**more):
    """A random AutoencoderKL, 3 x 32 x 32 -> 4 x 8 x 8."""
    from diffusers import AutoencoderKL

    more.update(down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3)
    more.update(block_out_channels=(8, 8, 8), latent_channels=4, norm_num_groups=4, sample_size=32)
    return AutoencoderKL(mid_block_add_attention=False, **more)


def rewards(tiny):
    return [f"clip={tiny}/rewards/clip", f"hpsv2.1={tiny}/rewards/hps", f"pickscore={tiny}/rewards/pick"]


def words(*more):
    """The words of a command line: "--steps 3" are two."""
    return " ".join(map(str, more)).split()


def synpic_args(tiny, out, *more):
    sdxl = f"sdxl={tiny}/sdxl,steps=2,guidance=2"
    models = [sdxl, f"{sdxl},seed=1", f"sd3={tiny}/sd3,steps=2", f"sd15={tiny}/sd15,steps=2"]
    first = ["--prompts", f"{tiny}/prompts.txt", "--out", str(out), "--batch_size", "4"]
    return [*first, "--models", *models, "--rewards", *rewards(tiny), *words(*more)]


def train_args(lists, tiny, out, *more, model="sdxl"):
    short = "--steps 3 --global_batch_size 4 --warmup_steps 0 --device cpu"
    return words("--data", lists, f"--model {tiny}/{model} --out", out, short, *more)


def train(lists, tiny, out, *more, model="sdxl", processes=1):
    """Three steps of the trainer, or what `more` says -> the rows of its log."""
    args = train_args(lists, tiny, out, *more, model=model)
    if processes == 1:
        rankdpo.main(args)
    else:
        together(rankdpo.main, args, processes)
    return log_of(out)


def rows_of(folder):
    return [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]


def write_rows(folder, rows):
    """metadata.jsonl of these rows; returns the folder."""
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def copied(lists, folder, *without):
    """A copy of a folder of lists without its cache and what is named."""
    return shutil.copytree(lists, folder, ignore=shutil.ignore_patterns(".cache", *without))


def log_of(folder):
    return [json.loads(line) for line in (Path(folder) / "log.jsonl").read_text().splitlines()]


def fails(main, args, *says, capsys=None):
    """main(args) ends with a status that is not zero and one line, which says what `says` says."""
    with pytest.raises(SystemExit) as e:
        main([str(a) for a in args])
    message = str(e.value.code)
    if isinstance(e.value.code, int):  # printed already, and the code is the status
        message = capsys.readouterr().err.strip().splitlines()[-1]
    assert e.value.code != 0 and "\n" not in message
    assert all(s in message for s in says), message


def quietly(main, args, said, env):
    os.environ.update(env)
    sys.stdout = sys.stderr = open(said, "w")
    main(args)


def child(main, args, said=os.devnull, **env):
    """main(args) in a process of its own, which has imported what this one has: to be killed, or to be one of
    several. What it prints goes to the file `said`."""
    process = multiprocessing.get_context("fork").Process(target=quietly, args=(main, args, said, env))
    process.start()
    return process


def together(main, args, processes=2):
    """main(args) by several processes, as torchrun would start them, until they are done."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free.getsockname()[1]))
    with tempfile.TemporaryDirectory() as folder:
        said, started = [Path(folder) / str(rank) for rank in range(processes)], []
        for rank in range(processes):
            env = dict(address, RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(processes))
            started.append(child(main, args, said[rank], **env))
        for process in started:
            process.join()
        assert not any(p.exitcode for p in started), [path.read_text()[-2000:] for path in said]


def t5_tokenizer(folder):
    """A T5 tokenizer of a few words and all letters, saved to `folder`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = "\u2581 \u2581Yes \u2581a \u2581red \u2581circle \u2581two \u2581figure \u2581show \u2581USER :"
    pieces = ["<pad>", "</s>", "<unk>", *words.split(" "), *map(chr, range(33, 127))]
    scored = [(p, -float(len(pieces) - i) / 9) for i, p in enumerate(dict.fromkeys(pieces))]
    raw = Tokenizer(models.Unigram(scored, unk_id=2))
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    raw.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    special = dict(eos_token="</s>", pad_token="<pad>", unk_token="<unk>")
    tok = PreTrainedTokenizerFast(tokenizer_object=raw, **special)
    tok.save_pretrained(folder)
    return tok
