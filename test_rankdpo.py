"""The trainer at scale: the same curve however it is run, exact resume, adapters, what it does when told to stop or NaN.

    pytest -q test_rankdpo.py
"""
import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import rankdpo
from test_scripts import HERE, fails, lists, log_of, rows_of, tiny   # noqa: F401 (fixtures)


@pytest.fixture(scope="module")
def uneven(lists, tmp_path_factory):
    """The tiny lists, some of them shorter: K is 4, 3 and 2."""
    folder = tmp_path_factory.mktemp("uneven") / "data"
    shutil.copytree(lists, folder)
    rows = rows_of(folder)
    for i, row in enumerate(rows):
        k = 4 - i % 3
        row.update({key: row[key][:k] for key in ("file_names", "models", "seeds", "phi", "rank")}, scores={n: v[:k] for n, v in row["scores"].items()})
    (folder / "metadata.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return folder


def options(data, tiny, out, *more, model="sdxl"):
    return ["--data", str(data), "--model", f"{tiny}/{model}", "--out", str(out), "--steps", "6", "--lr", "1e-3", "--beta", "10", "--global_batch_size", "4", "--warmup_steps", "0",
            "--device", "cpu", "--precision", "fp64", *map(str, more)]         # equalities of mathematics: in fp64 they hold to 1e-9 on any CPU


def train(data, tiny, out, *more, processes=1, model="sdxl"):
    args = options(data, tiny, out, *more, model=model)
    if processes == 1:
        rankdpo.main(args)
    else:
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes), "rankdpo.py"]
        done = subprocess.run(launch + args, cwd=HERE, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
    return log_of(out)


def curve(log):
    return np.array([[r[k] if r[k] is not None else 0 for k in ("loss", "accuracy", "best_s", "worst_s", "grad_norm")] for r in log if "loss" in r])


def weights(out, part="unet"):
    return load_file(Path(out) / f"model/{part}/diffusion_pytorch_model.safetensors")


def same_weights(a, b):
    """The weights of two fp64 runs, as saved in fp32: equal but for the last bit, where one of them rounds the other way."""
    x, y = weights(a), weights(b)
    assert x.keys() == y.keys()
    for k in x:
        assert torch.allclose(x[k], y[k], rtol=2 ** -22, atol=1e-9), k


def close(a, b):
    """Losses, accuracies, errors and gradient norms of two fp64 runs."""
    assert a.shape == b.shape and np.allclose(a, b, rtol=1e-9, atol=1e-9), np.abs(a - b).max(0)


@pytest.fixture(scope="module")
def whole(uneven, tiny, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole")
    return train(uneven, tiny, out, "--ref_refresh", 3), out


# ----------------------------------------------------------------------------- the same curve however it is run


@pytest.mark.parametrize("m,device_batch", [(1, 32), (3, 32), (2, 2), (0, 3), (5, 1)])
def test_images_per_forward_gives_the_gradient_of_the_whole_list(uneven, tiny, tmp_path, whole, m, device_batch):
    log = train(uneven, tiny, tmp_path, "--ref_refresh", 3, "--images_per_forward", m, "--device_batch_size", device_batch)
    close(curve(log), curve(whole[0]))
    same_weights(tmp_path, whole[1])


@pytest.mark.parametrize("model", ["sd3", "sd15"])
def test_images_per_forward_in_the_other_families(lists, tiny, tmp_path, model):
    a = train(lists, tiny, tmp_path / "a", "--steps", 3, model=model)
    b = train(lists, tiny, tmp_path / "b", "--steps", 3, "--images_per_forward", 3, model=model)
    close(curve(a), curve(b))


@pytest.mark.parametrize("processes,more", [(2, ["--device_batch_size", "1"]), (4, ["--images_per_forward", "1"])])
def test_sharded_processes_give_the_curve_and_the_weights_of_one(uneven, tiny, tmp_path, whole, processes, more):
    log = train(uneven, tiny, tmp_path, "--ref_refresh", 3, *more, processes=processes)
    assert log[0]["world"] == processes
    close(curve(log), curve(whole[0]))
    same_weights(tmp_path, whole[1])


# ----------------------------------------------------------------------------- exact resume


def victim(args):
    torch.set_num_threads(1)
    sys.stdout = sys.stderr = open(os.devnull, "w")
    rankdpo.main(args)


def same_run(a, b):
    """Bit for bit: the curve (but for the clock) and the weights."""
    drop = lambda log: [{k: v for k, v in r.items() if k not in ("lists_per_s", "tflops")} for r in log[1:]]
    assert drop(log_of(a)) == drop(log_of(b))
    x, y = weights(a), weights(b)
    assert all(torch.equal(x[k], y[k]) for k in x)


def test_twenty_kills_at_random_moments_change_nothing(uneven, tiny, tmp_path):
    """kill -9, start again, until it comes to its end: the curve and the weights of a run that nobody killed, bit for bit."""
    context, rng, kills = multiprocessing.get_context("forkserver"), random.Random(1), 0
    context.set_forkserver_preload(["test_rankdpo"])
    command = lambda out: options(uneven, tiny, out, "--ref_refresh", 4, "--ema", .9, "--save_every", 1, "--keep", 2, "--steps", 12)
    for out in ("warm", "whole"):
        began = time.time()
        process = context.Process(target=victim, args=(command(tmp_path / out),))
        process.start(), process.join()
        assert process.exitcode == 0
    length = time.time() - began
    while kills < 20:
        process = context.Process(target=victim, args=(command(tmp_path / "killed"),))
        process.start()
        process.join(rng.uniform(.1, .6) * length)
        if process.is_alive():
            os.kill(process.pid, signal.SIGKILL)
            kills += 1
        else:
            assert process.exitcode == 0
            same_run(tmp_path / "killed", tmp_path / "whole")
            shutil.rmtree(tmp_path / "killed")                                  # and once more from the start
        process.join()
    process = context.Process(target=victim, args=(command(tmp_path / "killed"),))
    process.start(), process.join()
    assert process.exitcode == 0 and len(list((tmp_path / "killed/checkpoints").iterdir())) == 2
    same_run(tmp_path / "killed", tmp_path / "whole")


def test_a_run_goes_on_with_another_number_of_processes(uneven, tiny, tmp_path, whole):
    train(uneven, tiny, tmp_path, "--ref_refresh", 3, "--save_every", 2, "--keep", 5)
    (tmp_path / "log.jsonl").write_text((tmp_path / "log.jsonl").read_text()[:-20])      # torn
    for step in (4, 6):
        shutil.rmtree(tmp_path / f"checkpoints/step-{step:06d}")
    log = train(uneven, tiny, tmp_path, "--ref_refresh", 3, "--save_every", 4, "--keep", 5, processes=2)
    assert len(log) == 7
    close(curve(log), curve(whole[0]))
    shutil.rmtree(tmp_path / "model")
    close(curve(train(uneven, tiny, tmp_path, "--ref_refresh", 3)), curve(whole[0]))      # and back to one, from step 4


def test_told_to_stop_it_saves_and_goes_on_later(uneven, tiny, tmp_path, whole, monkeypatch, capsys):
    step = torch.optim.AdamW.step

    def told(self, *args, **kwargs):
        if len(calls := told.__dict__.setdefault("calls", [])) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        calls.append(1)
        return step(self, *args, **kwargs)
    monkeypatch.setattr(torch.optim.AdamW, "step", told)
    with pytest.raises(SystemExit) as e:
        rankdpo.main(options(uneven, tiny, tmp_path, "--ref_refresh", 3))
    assert e.value.code == 143 and "goes on from there" in capsys.readouterr().err and not (tmp_path / "model").exists()
    train(uneven, tiny, tmp_path, "--ref_refresh", 3)
    same_run(tmp_path, whole[1])


def test_a_checkpoint_of_another_run_is_refused(uneven, tiny, tmp_path, capsys):
    train(uneven, tiny, tmp_path, "--save_every", 3)
    fails(rankdpo.main, options(uneven, tiny, tmp_path, "--beta", 20), "step-000006", "beta (10.0, now 20.0)", "--resume false", capsys=capsys)
    assert train(uneven, tiny, tmp_path, "--beta", 20, "--resume", "false")[0]["config"]["beta"] == 20


def test_a_gradient_that_is_not_a_number_skips_the_step_and_three_stop_the_run(uneven, tiny, tmp_path, monkeypatch, capsys):
    original, calls = rankdpo.preference_loss, []

    def broken(policy_err, *args):
        loss, metrics = original(policy_err, *args)
        if policy_err.requires_grad:
            calls.append(1)
            if len(calls) in bad:
                loss = loss * float("nan")
        return loss, metrics
    monkeypatch.setattr(rankdpo, "preference_loss", broken)
    bad = (2, 3, 5)
    log = train(uneven, tiny, tmp_path / "a")
    assert [r.get("skipped", 0) for r in log[1:]] == [0, 1, 2, 2, 3, 3] and log[2]["grad_norm"] is None and all(w.isfinite().all() for w in weights(tmp_path / "a").values())
    bad, calls[:] = (3, 4, 5), []
    fails(rankdpo.main, options(uneven, tiny, tmp_path / "b", "--save_every", 1), "step 4", "three times in a row", capsys=capsys)
    assert [p.name for p in (tmp_path / "b/checkpoints").iterdir()] == ["step-000004"]   # of the weights of step 2, which are good


# ----------------------------------------------------------------------------- adapters


@pytest.mark.parametrize("model,part", [("sdxl", "unet"), ("sd3", "transformer"), ("sd15", "unet")])
def test_lora_trains_and_loads_as_diffusers_loads_it(lists, tiny, tmp_path, model, part):
    log = train(lists, tiny, tmp_path, "--lora_rank", 4, "--lr", "1e-2", "--images_per_forward", 3, model=model)
    assert log[1]["best_s"] == log[1]["worst_s"] == 0 and log[-1]["worst_s"] != 0          # starts as its reference
    assert log[1]["accuracy"] == .5
    names = list(load_file(tmp_path / "model/pytorch_lora_weights.safetensors"))
    assert names and all(n.startswith(f"{part}.") and "lora" in n for n in names)
    base, tuned = rankdpo.load_pipeline(f"{tiny}/{model}"), rankdpo.load_pipeline(f"{tiny}/{model}+{tmp_path}/model")
    draw = lambda pipe: pipe(["a red circle"], num_inference_steps=2, output_type="np", generator=torch.Generator().manual_seed(0), **({"max_sequence_length": 16} if model == "sd3" else {})).images
    assert np.abs(draw(base) - draw(tuned)).max() > 1e-4
    again = train(lists, tiny, tmp_path / "again", "--steps", 1, model=f"{model}+{tmp_path}/model")                  # all weights, from the tuned model
    assert again[1]["loss"] > 0 and rankdpo.denoiser_of(rankdpo.load_pipeline(tmp_path / "again/model"))[1].state_dict().keys() == rankdpo.denoiser_of(base)[1].state_dict().keys()


def test_lora_has_one_curve_and_resumes_with_its_refreshed_reference(uneven, tiny, tmp_path):
    more = ("--lora_rank", 4, "--ref_refresh", 2, "--lr", "1e-2", "--gradient_checkpointing", "true")
    log = train(uneven, tiny, tmp_path / "a", *more)
    assert log[3]["step"] == 2 and log[3]["best_s"] == 0 and log[4]["best_s"] != 0         # right after the refresh policy = reference
    close(curve(train(uneven, tiny, tmp_path / "b", *more, "--images_per_forward", 1)), curve(log))
    close(curve(train(uneven, tiny, tmp_path / "c", *more, processes=2)), curve(log))
    train(uneven, tiny, tmp_path / "d", *more, "--save_every", 3, "--keep", 9)
    shutil.rmtree(tmp_path / "d/checkpoints/step-000006")
    assert np.array_equal(curve(train(uneven, tiny, tmp_path / "d", *more, "--save_every", 3)), curve(log))


# ----------------------------------------------------------------------------- watches


def test_held_out_lists_are_not_trained_on_and_measured(uneven, tiny, tmp_path):
    log = train(uneven, tiny, tmp_path, "--holdout", .3, "--eval_every", 2)
    assert log[0]["lists"] == 7 and log[0]["held_out"] == 3
    assert [("held_out_accuracy" in r) for r in log[1:]] == [False, True] * 3 and 0 <= log[-1]["held_out_accuracy"] <= 1
    two = train(uneven, tiny, tmp_path / "two", "--holdout", .3, "--eval_every", 2, processes=2)
    close(curve(two), curve(log))
    assert two[-1]["held_out_accuracy"] == log[-1]["held_out_accuracy"]


def test_accuracy_is_split_by_timestep(whole):
    for row in whole[0][1:]:
        present = [a for a in row["accuracy_by_time"] if a is not None]
        assert len(row["accuracy_by_time"]) == 10 and 1 <= len(present) <= 4 and all(0 <= a <= 1 for a in present)


def test_stable_diffusion_3_5_trains_and_loads_again(lists, tiny, tmp_path):
    """Its transformer normalises queries and keys and has blocks with a second attention; sharded like the others."""
    from diffusers import SD3Transformer2DModel
    pipe = rankdpo.load_pipeline(tiny / "sd3")
    torch.manual_seed(0)
    pipe.transformer = SD3Transformer2DModel.from_config(dict(pipe.transformer.config, qk_norm="rms_norm", dual_attention_layers=(0,)))
    pipe.save_pretrained(tmp_path / "sd35")
    args = lambda out: (lists, tmp_path, tmp_path / out, "--steps", 2, "--timesteps", "logit_normal")
    one, two = train(*args("one"), model="sd35"), train(*args("two"), model="sd35", processes=2)
    close(curve(one), curve(two))
    before, after = load_file(tmp_path / "sd35/transformer/diffusion_pytorch_model.safetensors"), weights(tmp_path / "one", "transformer")
    assert any("norm_q" in k for k in after) and any("attn2" in k for k in after) and any(not torch.equal(before[k], after[k]) for k in after)
    assert rankdpo.load_pipeline(tmp_path / "two/model").transformer.config.qk_norm == "rms_norm"


def test_uniform_timesteps_of_rectified_flow():
    from diffusers import EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler
    x, noise, u = torch.randn(5, 4, 2, 2), torch.randn(5, 4, 2, 2), torch.tensor([.1, .25, .5, .75, .9])
    x_t, t, target = rankdpo.add_noise(FlowMatchEulerDiscreteScheduler(shift=3.), x, noise, u, "uniform")
    sigma = 3 * u / (1 + 2 * u)
    assert torch.allclose(t, 1000 * sigma) and torch.allclose(x_t, (1 - sigma.view(-1, 1, 1, 1)) * x + sigma.view(-1, 1, 1, 1) * noise) and torch.equal(target, noise - x)
    assert torch.equal(rankdpo.add_noise(EulerDiscreteScheduler(), x, noise, u, "uniform")[1], (1000 * u).long())


@pytest.mark.parametrize("model,forward", [("sdxl", 6.76), ("sd3", 8.90)])
def test_a_list_of_four_takes_sixteen_forwards(model, forward, capsys):
    """Three per image for the policy, one for the reference, on the real configurations (meta device: nothing is computed)."""
    rankdpo.main(["--profile", model, "--device", "cpu"])
    counted = float(capsys.readouterr().out.split("takes ")[1].split(" TFLOP")[0])
    assert counted == pytest.approx(16 * forward, rel=.02)


def test_the_saved_average_is_that_of_the_steps(uneven, tiny, tmp_path):
    """After one step: decay x start + (1 - decay) x the weights of that step, which the run without an average saves."""
    for ema in (0, .75):
        train(uneven, tiny, tmp_path / str(ema), "--steps", 1, "--ema", ema)
    start, last, average = load_file(tiny / "sdxl/unet/diffusion_pytorch_model.safetensors"), weights(tmp_path / "0"), weights(tmp_path / "0.75")
    assert any(not torch.equal(start[k], last[k]) for k in last)
    assert all(torch.allclose(average[k], .75 * start[k].float() + .25 * last[k], atol=1e-6) for k in last)


@pytest.mark.parametrize("model,more", [("sdxl", ("--lora_rank", 2)), ("sd3", ()), ("sd15", ())])
def test_samples_are_a_row_of_pictures_a_time_and_change_nothing(lists, tiny, tmp_path, model, more):
    for every in (0, 2):
        train(lists, tiny, tmp_path / str(every), "--steps", 4, "--sample_every", every, "--sample_prompts", 3, "--sample_steps", 2, "--precision", "fp32", *more, model=model)
    assert [p.name for p in sorted((tmp_path / "2/samples").iterdir())] == ["000000.png", "000002.png", "000004.png"]
    first, last = (np.asarray(Image.open(tmp_path / f"2/samples/{n:06d}.png")) for n in (0, 4))
    assert first.shape == last.shape == (32, 3 * 34, 3) and (first != last).any() and Image.open(tmp_path / "2/samples.png").width > 3 * 128
    assert np.array_equal(curve(log_of(tmp_path / "0")), curve(log_of(tmp_path / "2")))


def test_samples_start_as_the_pipeline_draws_them(lists, tiny, tmp_path):
    """Their conditioning is the pipeline's own: the first row is what the untouched pipeline draws from prompts."""
    train(lists, tiny, tmp_path, "--steps", 1, "--sample_every", 1, "--sample_prompts", 2, "--sample_steps", 2, "--precision", "fp32")
    prompts = list(dict.fromkeys(r["prompt"] for r in rankdpo.read_lists(lists)))[:2]
    images = rankdpo.load_pipeline(tiny / "sdxl")(prompts, generator=[torch.Generator().manual_seed(i) for i in range(2)], num_inference_steps=2, guidance_scale=2.).images
    row = np.asarray(Image.open(tmp_path / "samples/000000.png")).astype(int)
    for i, image in enumerate(images):
        assert abs(row[:, i * 34:i * 34 + 32] - np.asarray(image).astype(int)).max() <= 1


def test_the_work_of_a_list_is_counted(whole):
    log = [r for r in whole[0] if "loss" in r]
    assert all(r["tflops"] > 0 for r in log) and np.allclose([r["tflops"] / r["lists_per_s"] for r in log], log[0]["tflops"] / log[0]["lists_per_s"])
