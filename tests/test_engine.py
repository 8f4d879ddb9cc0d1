"""The trainer's engine: start-up, cache, communication, memory; what a run costs."""

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from conftest import HERE, copied, fails, log_of, train
from huggingface_hub import ModelCard
from PIL import Image
from safetensors.torch import load_file

import rankdpo
from lib import common, engine, pipelines
from lib.lists import find_cache, read_metadata


@pytest.fixture
def alone():
    """A process group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def cache_of(data):
    (folder,) = (data / ".cache").iterdir()
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir())}


def test_the_cache_has_one_content_whoever_writes_it(lists, tiny, tmp_path, monkeypatch):
    """In chunks by place: what a killed run left, or another number of processes, changes no bit; and prompts
    encoded together are those encoded alone, to rounding."""
    data, read = copied(lists, tmp_path / "data"), []
    load_parts = pipelines.load_parts

    def noted(*args):
        parts = load_parts(*args)
        read.append({name for name, part in parts.items() if part is not None})
        return parts

    monkeypatch.setattr(pipelines, "load_parts", noted)
    monkeypatch.setattr("lib.lists.CHUNK", 4)
    train(data, tiny, tmp_path / "a")
    whole = cache_of(data)
    folder = next((data / ".cache").iterdir())
    for n in (1, 7):
        (folder / f"{n:07d}.safetensors").unlink()
    train(data, tiny, tmp_path / "b")
    assert cache_of(data) == whole and len(whole) == 10
    train(data, tiny, tmp_path / "c", "--steps", 1)  # VAE and text encoders only where they are needed:
    assert [parts == {"unet"} for parts in read] == [False, False, False, False, True, False]  # also to save

    pipe = pipelines.load_pipeline(tiny / "sdxl")
    for n, row in enumerate(read_metadata(data)):
        cond = pipelines.family_of(pipe).encode_prompts(pipe, [row["prompt"]], (32, 32))
        cached = load_file(folder / f"{n:07d}.safetensors")
        assert all(torch.allclose(cached[name], c[0], atol=1e-6) for name, c in cond.items())


def test_only_lists_that_the_steps_visit_are_encoded(lists, tiny, tmp_path):
    """One step of four lists of ten encodes four; another run on the same data adds what it lacks."""
    data = copied(lists, tmp_path / "data")
    log = train(data, tiny, tmp_path / "a", "--steps", 1)
    cfg = rankdpo.Config(steps=1, global_batch_size=4, device_batch_size=4)
    order = rankdpo.draw_order(cfg, [range(10)])
    first = {n for _, n in rankdpo.micro_batches(cfg, order, 0)[0]}
    assert {int(name[:7]) for name in cache_of(data)} == first and len(first) == 4
    train(data, tiny, tmp_path / "b", "--steps", 1, "--holdout", 0.5)
    assert len(first) < len(cache_of(data)) < 10
    train(data, tiny, tmp_path / "c")
    assert len(cache_of(data)) == 10 and log_of(tmp_path / "c")[1]["loss"] == log[1]["loss"]


def test_every_list_is_encoded_by_one_process(monkeypatch, tmp_path):
    shares, rows = [], [{"prompt": "", "file_names": [], "pictures": []}] * 100
    cfg = rankdpo.Config(data=str(tmp_path), model="org/name")
    for rank in range(3):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", "3")
        shares.append(find_cache(cfg, rows, torch.float32, range(100))[1])
    assert sorted(sum(shares, [])) == list(range(100)) and all(len(share) >= 32 for share in shares)


def test_work_ahead_keeps_the_order_and_passes_errors_on():
    assert list(common.ahead(lambda n: n * n, range(20), depth=3, threads=4)) == [n * n for n in range(20)]
    with pytest.raises(SystemExit, match="list 3"):
        list(common.ahead(lambda n: common.fail("list 3") if n == 3 else n, range(9), depth=2))


def test_what_one_process_reads_the_others_receive(alone, monkeypatch):
    """Weights, buffers that are not saved and tensors that are mere attributes, through the meta device."""
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
    model[0].register_buffer("unsaved", torch.arange(3.0), persistent=False)
    model[1].table = torch.arange(4) * 1j
    before = {name: value.clone() for name, value in model.state_dict().items()}
    values = engine.to_meta(model)
    assert all(p.is_meta for p in [*model.parameters(), *model.buffers()])
    for _ in range(2):  # the policy and the reference
        engine.receive(model, values, torch.device("cpu"))
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
        assert torch.equal(model[0].unsaved, torch.arange(3.0))
        assert torch.equal(model[1].table, torch.arange(4) * 1j)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert engine.to_meta(model) == ({}, {})


def test_other_processes_read_no_weights(tiny):
    pipe = pipelines.load_pipeline(tiny / "sd3", denoiser=False, encoders=False)
    assert pipe.vae is None and pipe.text_encoder is None and pipe.tokenizer is not None
    assert all(p.is_meta for p in pipe.transformer.parameters())


COUNTS = """
import atexit, json, os, signal, rankdpo, torch, torch.distributed as dist
counts, step, calls = {}, torch.optim.AdamW.step, []

def dies(self, *args, **kwargs):
    calls.append(1)
    if len(calls) == 4 and os.environ["RANK"] == "1" and not os.path.exists(sys.argv[2]):
        open(sys.argv[2], "w").close()
        os.kill(os.getpid(), signal.SIGKILL)
    return step(self, *args, **kwargs)

def counted(name, collective):
    def call(*args, **kwargs):
        counts[name] = counts.get(name, 0) + 1
        return collective(*args, **kwargs)
    return call

for name, older in (("all_gather_single", "all_gather_into_tensor"),
                    ("reduce_scatter_single", "reduce_scatter_tensor")):
    name = name if hasattr(dist, name) else older
    setattr(dist, name, counted(name[:6], getattr(dist, name)))
atexit.register(lambda: open(sys.argv[1], "w").write(json.dumps(counts)))
torch.optim.AdamW.step = dies
rankdpo.main(sys.argv[3:])
"""


def test_a_lost_process_is_started_again_and_each_step_gathers_once(lists, tiny, tmp_path, monkeypatch):
    """torchrun starts all again when one dies; they go on from the checkpoint, with one process's losses.
    The policy is gathered and reduced once a step, the reference gathered once, for all micro-batches."""
    monkeypatch.setenv("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")  # or the dead one's address is called again
    script = tmp_path / "dies.py"
    script.write_text(f"import sys\nsys.path.insert(0, {str(HERE)!r})\n{COUNTS}")
    torchrun = "-m torch.distributed.run --standalone --nproc_per_node 2 --max_restarts 1".split()
    paths = ["--data", lists, "--model", f"{tiny}/sdxl", "--out", tmp_path / "out", "--device", "cpu"]
    short = "--steps 4 --global_batch_size 4 --warmup_steps 0 --precision fp64".split()
    micro = "--device_batch_size 1 --images_per_forward 3 --save_every 2".split()
    files = [script, tmp_path / "counts", tmp_path / "died"]
    command = [str(a) for a in (sys.executable, *torchrun, *files, *paths, *short, *micro)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "died").exists()
    one = train(lists, tiny, tmp_path / "one", *short)
    for a, b in zip(one[1:], log_of(tmp_path / "out")[1:], strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-9)
    counts = json.loads((tmp_path / "counts").read_text())  # of the second start: two steps
    units = counts["reduce"] // 2
    assert units > 3 and counts == {"reduce": 2 * units, "all_ga": 3 * units}


def test_the_rounded_reference_changes_nothing(lists, tiny, tmp_path, monkeypatch):
    """bf16: weights that autocast rounds at each pass are rounded once; s is exactly 0 at the start and after
    a refresh, and the curve is the same bit for bit."""
    more = ("--precision", "bf16", "--ref_refresh", 2, "--lr", 1e-3)
    rounded = train(lists, tiny, tmp_path / "a", *more)[1:]
    monkeypatch.setattr(engine, "in_compute_type", lambda model, dtype: None)
    plain = train(lists, tiny, tmp_path / "b", *more)[1:]
    for a, b in zip(rounded, plain, strict=True):
        assert all(a[k] == b[k] for k in ("loss", "accuracy", "best_s", "worst_s", "grad_norm"))
    assert [r["best_s"] == r["worst_s"] == 0 for r in rounded] == [True, False, True]


@pytest.mark.parametrize("adapters", [True, False])
def test_the_card_of_a_tuned_folder(tmp_path, adapters):
    (tmp_path / "README.md").write_text("---\nlicense: other\nlicense_name: some-licence\n---\n# Base\n")
    about = {"Options": {"beta": 2500.0, "data": "lists"}, "Last step": {"accuracy": 0.61}}
    for base, licence in ((str(tmp_path), "some-licence"), (f"{tmp_path}/none", None)):
        (tmp_path / "none").mkdir(exist_ok=True)
        card = ModelCard(pipelines.model_card(base, adapters, about))
        assert card.data.to_dict().get("license_name") == licence and card.data.library_name == "diffusers"
        assert card.data.pipeline_tag == "text-to-image" and ("lora" in card.data.tags) == adapters
        assert all(text in card.text for text in ("| beta | 2500.0 |", "| accuracy | 0.61 |", base))
        assert ("not known" in card.text) == (licence is None)


def test_a_resumed_run_goes_on_in_wandb(tmp_path, monkeypatch):
    """A module in wandb's place notes what is said to it: one id for both parts, pictures, how each ended."""
    starts, said, ends = [], [], []
    run = SimpleNamespace(define_metric=lambda *_, **__: None, log=said.append)
    run.finish = lambda exit_code: ends.append(exit_code)
    module = SimpleNamespace(login=lambda: True, Image=Image.open)
    module.init = lambda **how: starts.append(how) or run
    monkeypatch.setitem(sys.modules, "wandb", module)
    cfg = rankdpo.Config(report="wandb", out=str(tmp_path / "sweep:1/a"), sample_every=2)
    (tmp_path / "sweep:1/a/samples").mkdir(parents=True)
    for n in (0, 2, 4):
        Image.new("RGB", (n + 1, 4)).save(tmp_path / f"sweep:1/a/samples/{n:06d}.png")

    @common.one_line_errors
    def part(steps):
        start, end = steps
        log = engine.Log(cfg, 0, 0, start, 1.0, torch.device("cpu"), torch.float32)
        for step in range(start, end):
            row = dict.fromkeys(("loss", "accuracy", "best_s", "worst_s", "grad_norm"), step / 10)
            picture = {"samples": f"samples/{step + 1:06d}.png"} if step % 2 else {}
            log.write({"step": step, **row, "accuracy_by_time": [0.5], **picture})
        log.file.close()
        return common.fail("lost") if end < 4 else None

    with pytest.raises(SystemExit):
        part((0, 3))
    part((2, 4))  # from the checkpoint before it was lost
    assert [start["id"] for start in starts] == [starts[0]["id"]] * 2 and ends == [1, 0]
    assert starts[0]["project"] == "sweep-1" and starts[0]["name"] == "a"
    assert starts[0]["config"]["steps"] == 400
    assert [row["step"] for row in said] == [0, 0, 1, 2, 2, 3]  # the first are the base's pictures
    assert [row["loss"] for row in said[1:]] == [0, 0.1, 0.2, 0.2, 0.3] and "accuracy_by_time" not in said[1]
    assert {n: row["samples"].width for n, row in enumerate(said) if "samples" in row} == {0: 1, 2: 3, 5: 5}
    engine.Log(cfg, 0, 0, 0, 1.0, torch.device("cpu"), torch.float32).file.close()  # --resume false
    assert starts[2]["id"] != starts[0]["id"]
    common.cleanup.close()


def test_tensorboard_gets_the_same_numbers(lists, tiny, tmp_path, monkeypatch):
    said, closed = {}, []
    board = SimpleNamespace(close=lambda: closed.append(1))
    board.add_scalar = lambda name, value, step: said.update({(name, step): value})
    board.add_image = lambda name, image, step, dataformats: said.update({(name, step): image.shape})
    module = SimpleNamespace(SummaryWriter=lambda folder, purge_step: board)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    options = ("--steps", 2, "--sample_every", 2, "--sample_steps", 1, "--sample_prompts", 2)
    rows = train(lists, tiny, tmp_path, "--report", "tensorboard", *options)[1:]
    assert [said["loss", row["step"]] for row in rows] == [row["loss"] for row in rows] and closed
    assert said["samples", 0] == said["samples", 1] == (32, 6 * 34, 3)


def test_what_is_not_installed_is_said_before_anything_is_computed(tiny, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)  # as where it is missing
    args = ["--data", tmp_path / "none", "--model", "none", "--report", "wandb"]
    fails(rankdpo.main, args, "--report wandb", "pip install wandb")
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(login=lambda: 1 / 0))
    fails(rankdpo.main, args, "--report wandb", "division", "WANDB_MODE=offline")
