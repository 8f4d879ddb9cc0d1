"""The trainer: the same curve however it is run, exact resume, adapters, watches, bad input.

pytest -q tests/test_rankdpo.py
"""

import json
import math
import os
import random
import shutil
import signal
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import child, fails, log_of, rows_of, together
from conftest import train as short_run
from PIL import Image
from safetensors.torch import load_file

import losses
import rankdpo
from lib import engine, memory, pictures, pipelines, store
from lib.lists import Cache, read_cached, read_lists, read_metadata


def options(data, tiny, out, *more, model="sdxl"):
    """A short run. Equalities of mathematics are looked at in fp64: there they hold to 1e-9 on any CPU."""
    names = ["--data", str(data), "--model", f"{tiny}/{model}", "--out", str(out), "--device", "cpu"]
    short = "--steps 6 --lr 1e-3 --beta 10 --global_batch_size 4 --warmup_steps 0 --precision fp64"
    return [*names, *short.split(), *map(str, more)]


def train(data, tiny, out, *more, processes=1, model="sdxl"):
    args = options(data, tiny, out, *more, model=model)
    if processes == 1:
        rankdpo.main(args)
    else:
        together(rankdpo.main, args, processes)
    return log_of(out)


def curve(log):
    return np.array(
        [
            [r[k] if r[k] is not None else 0 for k in ("loss", "accuracy", "best_s", "worst_s", "grad_norm")]
            for r in log
            if "loss" in r
        ]
    )


def weights(out, part="unet"):
    return load_file(Path(out) / f"model/{part}/diffusion_pytorch_model.safetensors")


def same_weights(a, b):
    """The weights of two fp64 runs, as saved in fp32: equal but for the last bit, where one rounds up."""
    x, y = weights(a), weights(b)
    assert x.keys() == y.keys()
    for k in x:
        assert torch.allclose(x[k], y[k], rtol=2**-22, atol=1e-9), k


def close(a, b):
    """Losses, accuracies, errors and gradient norms of two fp64 runs."""
    assert a.shape == b.shape and np.allclose(a, b, rtol=1e-9, atol=1e-9), np.abs(a - b).max(0)


@pytest.fixture(scope="module")
def whole(uneven, tiny, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole")
    return train(uneven, tiny, out, "--ref_refresh", 3), out


# ---------------------------------------------------------------------- the same curve however it is run


@pytest.mark.parametrize("m,device_batch", [(1, 32), (3, 32), (2, 2), (0, 3), (5, 1)])
def test_images_per_forward_gives_the_gradient_of_the_whole_list(
    uneven, tiny, tmp_path, whole, m, device_batch
):
    log = train(
        uneven,
        tiny,
        tmp_path,
        "--ref_refresh",
        3,
        "--images_per_forward",
        m,
        "--device_batch_size",
        device_batch,
    )
    close(curve(log), curve(whole[0]))
    same_weights(tmp_path, whole[1])


@pytest.mark.parametrize("model", ["sd3", "sd15"])
def test_images_per_forward_in_the_other_families(lists, tiny, tmp_path, model):
    a = train(lists, tiny, tmp_path / "a", "--steps", 3, model=model)
    b = train(lists, tiny, tmp_path / "b", "--steps", 3, "--images_per_forward", 3, model=model)
    close(curve(a), curve(b))


@pytest.mark.parametrize(
    "processes,more",
    [
        (2, ["--device_batch_size", "1", "--keep_gathered", "true"]),
        (4, ["--images_per_forward", "1", "--keep_gathered", "false"]),
    ],
)
def test_sharded_processes_give_the_curve_and_the_weights_of_one(
    uneven, tiny, tmp_path, whole, processes, more
):
    log = train(uneven, tiny, tmp_path, "--ref_refresh", 3, *more, processes=processes)
    assert log[0]["world"] == processes
    close(curve(log), curve(whole[0]))
    same_weights(tmp_path, whole[1])


# ----------------------------------------------------------------------------- exact resume


def same_run(a, b):
    """Bit for bit: the curve (but for the clock) and the weights."""
    drop = lambda log: [{k: v for k, v in r.items() if k not in ("lists_per_s", "tflops")} for r in log[1:]]
    assert drop(log_of(a)) == drop(log_of(b))
    x, y = weights(a), weights(b)
    assert all(torch.equal(x[k], y[k]) for k in x)


def test_ten_kills_at_random_moments_change_nothing(uneven, tiny, tmp_path):
    """kill -9, start again, until it ends: curve and weights of a run that nobody killed, bit for bit."""
    rng, kills = random.Random(1), 0
    command = lambda out: options(
        uneven, tiny, out, "--ref_refresh", 4, "--ema", 0.9, "--save_every", 1, "--keep", 2, "--steps", 8
    )
    for out in ("warm", "whole"):
        began = time.time()
        process = child(rankdpo.main, command(tmp_path / out))
        process.join()
        assert process.exitcode == 0
    length = time.time() - began
    while kills < 10:
        process = child(rankdpo.main, command(tmp_path / "killed"))
        process.join(rng.uniform(0.1, 0.6) * length)
        if process.is_alive():
            os.kill(process.pid, signal.SIGKILL)
            kills += 1
        else:
            assert process.exitcode == 0
            same_run(tmp_path / "killed", tmp_path / "whole")
            shutil.rmtree(tmp_path / "killed")  # and once more from the start
        process.join()
    process = child(rankdpo.main, command(tmp_path / "killed"))
    process.join()
    assert process.exitcode == 0 and len(list((tmp_path / "killed/checkpoints").iterdir())) == 2
    same_run(tmp_path / "killed", tmp_path / "whole")


def dying(last, args):
    """A run that is gone at its `last`-th moment: before or after a write, a rename or a removal."""
    moments = iter(range(1, 10**6))

    def around(function):
        def dies(*args, **kwargs):
            if next(moments) == last:
                os._exit(9)
            result = function(*args, **kwargs)
            if next(moments) == last:
                os._exit(9)
            return result

        return dies

    os.rename, os.replace, os.fsync = around(os.rename), around(os.replace), around(os.fsync)
    store.remove, engine.dcp.save = around(store.remove), around(engine.dcp.save)
    rankdpo.main(args)


def test_killed_between_two_writes_of_a_checkpoint_it_goes_on_bit_for_bit(lists, tiny, tmp_path):
    command = lambda out: options(lists, tiny, out, "--save_every", 1, "--steps", 2)
    rankdpo.main(command(tmp_path / "whole"))
    kills = 0
    while True:
        shutil.rmtree(tmp_path / "killed", ignore_errors=True)
        process = child(partial(dying, 5 * kills + 3), command(tmp_path / "killed"))
        process.join()
        if process.exitcode == 0:  # it came to its end before that moment
            break
        assert process.exitcode == 9
        kills += 1
        rankdpo.main(command(tmp_path / "killed"))
        same_run(tmp_path / "killed", tmp_path / "whole")
        left = {p.name for p in (tmp_path / "killed/checkpoints").iterdir()}
        assert "step-000002" in left and not list((tmp_path / "killed").rglob(".tmp*"))
    assert kills >= 12


def test_a_run_goes_on_with_another_number_of_processes(uneven, tiny, tmp_path, whole):
    train(uneven, tiny, tmp_path, "--ref_refresh", 3, "--save_every", 2, "--keep", 5)
    (tmp_path / "log.jsonl").write_text((tmp_path / "log.jsonl").read_text()[:-20])  # torn
    for step in (4, 6):
        shutil.rmtree(tmp_path / f"checkpoints/step-{step:06d}")
    log = train(uneven, tiny, tmp_path, "--ref_refresh", 3, "--save_every", 4, "--keep", 5, processes=2)
    assert len(log) == 7
    close(curve(log), curve(whole[0]))
    shutil.rmtree(tmp_path / "model")
    close(
        curve(train(uneven, tiny, tmp_path, "--ref_refresh", 3)), curve(whole[0])
    )  # and back to one, from step 4


@pytest.mark.parametrize("number,status", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_told_to_stop_it_saves_and_goes_on_later(
    uneven, tiny, tmp_path, whole, monkeypatch, capsys, number, status
):
    step = torch.optim.AdamW.step

    def told(self, *args, **kwargs):
        if len(calls := told.__dict__.setdefault("calls", [])) == 3:
            os.kill(os.getpid(), number)
        calls.append(1)
        return step(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", told)
    with pytest.raises(SystemExit) as e:
        rankdpo.main(options(uneven, tiny, tmp_path, "--ref_refresh", 3))
    assert (
        e.value.code == status
        and "stopped after 4 steps" in capsys.readouterr().err
        and not (tmp_path / "model").exists()
    )
    train(uneven, tiny, tmp_path, "--ref_refresh", 3)
    same_run(tmp_path, whole[1])


@pytest.mark.parametrize(
    "more", [("--ema", 0.9, "--ref_refresh", 3), ("--lora_rank", 2), ("--loss", "dro", "--sampler_steps", 4)]
)
def test_weights_in_channels_last_are_saved_and_go_on_bit_for_bit(lists, tiny, tmp_path, monkeypatch, more):
    """As on one GPU, where safetensors refused them: they are not contiguous, nor are AdamW's moments."""
    build, strides = engine.build_networks, set()

    def laid_out(*args):
        networks = build(*args)
        for network in filter(None, networks):
            engine.module_of(network).to(memory_format=torch.channels_last)
        strides.update(p.stride()[1] for p in engine.weights(networks.policy).values() if p.dim() == 4)
        return networks

    monkeypatch.setattr(engine, "build_networks", laid_out)
    args = (*more, "--steps", 4, "--save_every", 2, "--keep", 9)
    whole = train(lists, tiny, tmp_path, *args)
    tensors = lambda: load_file(next((tmp_path / "checkpoints/step-000004").glob("*.safetensors")))
    saved = tensors()
    shutil.rmtree(tmp_path / "checkpoints/step-000004")
    again = train(lists, tiny, tmp_path, *args)  # from step 2
    assert np.array_equal(curve(again), curve(whole)) and (more[0] == "--lora_rank" or 1 in strides)
    assert saved.keys() == tensors().keys() and all(torch.equal(t, saved[k]) for k, t in tensors().items())


def test_a_checkpoint_of_another_run_is_refused(uneven, tiny, tmp_path, capsys):
    train(uneven, tiny, tmp_path, "--save_every", 3)
    fails(
        rankdpo.main,
        options(uneven, tiny, tmp_path, "--beta", 20),
        "step-000006",
        "beta (10.0, now 20.0)",
        "--resume false",
        capsys=capsys,
    )
    assert train(uneven, tiny, tmp_path, "--beta", 20, "--resume", "false")[0]["config"]["beta"] == 20


def test_another_revision_of_a_hub_model_is_another_run():
    torch.manual_seed(0)
    one, other = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    for model in ("org/name", "org/name+org/adapters"):
        weights = lambda policy: engine.identity_of(rankdpo.Config(model=model), [], [], policy)["weights"]
        assert weights(one) == weights(one) != weights(other)


def test_a_gradient_that_is_not_a_number_stops_the_run(uneven, tiny, tmp_path, monkeypatch, capsys):
    """At once: the weights that it would ruin are not saved, and the run goes on from its checkpoint."""
    original, calls = losses.preference_loss, []

    def broken(policy_err, *args):
        loss, metrics = original(policy_err, *args)
        if policy_err.requires_grad:
            calls.append(1)
            if len(calls) == 3:
                loss = loss * float("nan")
        return loss, metrics

    monkeypatch.setattr(losses, "preference_loss", broken)
    args = options(uneven, tiny, tmp_path, "--save_every", 1)
    fails(rankdpo.main, args, "step 2: the gradient is nan", "--lr", capsys=capsys)
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-000002"]
    rankdpo.main(args)  # from the checkpoint
    assert len(log_of(tmp_path)) == 7 and all(w.isfinite().all() for w in weights(tmp_path).values())


# ----------------------------------------------------------------------------- adapters


@pytest.mark.parametrize("model,part", [("sdxl", "unet"), ("sd3", "transformer"), ("sd15", "unet")])
def test_lora_trains_and_loads_as_diffusers_loads_it(lists, tiny, tmp_path, model, part):
    log = train(
        lists, tiny, tmp_path, "--lora_rank", 4, "--lr", "1e-2", "--images_per_forward", 3, model=model
    )
    assert log[1]["best_s"] == log[1]["worst_s"] == 0 and log[-1]["worst_s"] != 0  # starts as its reference
    assert log[1]["accuracy"] == 0.5
    names = list(load_file(tmp_path / "model/pytorch_lora_weights.safetensors"))
    assert names and all(n.startswith(f"{part}.") and "lora" in n for n in names)
    base, tuned = (
        pipelines.load_pipeline(f"{tiny}/{model}"),
        pipelines.load_pipeline(f"{tiny}/{model}+{tmp_path}/model"),
    )
    draw = lambda pipe: (
        pipe(
            ["a red circle"],
            num_inference_steps=2,
            output_type="np",
            generator=torch.Generator().manual_seed(0),
            **({"max_sequence_length": 16} if model == "sd3" else {}),
        ).images
    )
    assert np.abs(draw(base) - draw(tuned)).max() > 1e-4
    again = train(
        lists, tiny, tmp_path / "again", "--steps", 1, model=f"{model}+{tmp_path}/model"
    )  # all weights, from the tuned model
    assert (
        again[1]["loss"] > 0
        and pipelines.denoiser_of(pipelines.load_pipeline(tmp_path / "again/model"))[1].state_dict().keys()
        == pipelines.denoiser_of(base)[1].state_dict().keys()
    )


def test_adapters_on_adapters_load_one_after_the_other(lists, tiny, tmp_path):
    more = ("--lora_rank", 4, "--lr", "1e-2", "--steps", 1)
    base, first = f"{tiny}/sdxl", f"{tiny}/sdxl+{tmp_path}/a/model"
    train(lists, tiny, tmp_path / "a", *more)
    train(lists, tiny, tmp_path / "b", *more, model=f"sdxl+{tmp_path}/a/model")
    weights = lambda path: pipelines.denoiser_of(pipelines.load_pipeline(path))[1].state_dict()
    both, second = weights(f"{first}+{tmp_path}/b/model"), weights(f"{base}+{tmp_path}/b/model")
    base, first = weights(base), weights(first)
    assert max((both[n] - first[n]).abs().max() for n in both) > 1e-5
    for n in both:  # the sum of two changes
        torch.testing.assert_close(both[n] - first[n], second[n] - base[n], rtol=0, atol=1e-6)


def test_lora_has_one_curve_and_resumes_with_its_refreshed_reference(uneven, tiny, tmp_path):
    more = ("--lora_rank", 4, "--ref_refresh", 2, "--lr", "1e-2", "--gradient_checkpointing", "true")
    log = train(uneven, tiny, tmp_path / "a", *more)
    assert (
        log[3]["step"] == 2 and log[3]["best_s"] == 0 and log[4]["best_s"] != 0
    )  # right after the refresh policy = reference
    close(curve(train(uneven, tiny, tmp_path / "b", *more, "--images_per_forward", 1)), curve(log))
    close(curve(train(uneven, tiny, tmp_path / "c", *more, processes=2)), curve(log))
    train(uneven, tiny, tmp_path / "d", *more, "--save_every", 3, "--keep", 9)
    shutil.rmtree(tmp_path / "d/checkpoints/step-000006")
    assert np.array_equal(curve(train(uneven, tiny, tmp_path / "d", *more, "--save_every", 3)), curve(log))


# ----------------------------------------------------------------------------- watches


def test_held_out_lists_are_not_trained_on_and_measured(uneven, tiny, tmp_path):
    log = train(uneven, tiny, tmp_path, "--holdout", 0.3, "--eval_every", 2)
    assert log[0]["lists"] == 7 and log[0]["held_out"] == 3
    assert [("held_out_accuracy" in r) for r in log[1:]] == [False, True] * 3 and 0 <= log[-1][
        "held_out_accuracy"
    ] <= 1
    two = train(uneven, tiny, tmp_path / "two", "--holdout", 0.3, "--eval_every", 2, processes=2)
    close(curve(two), curve(log))
    assert two[-1]["held_out_accuracy"] == log[-1]["held_out_accuracy"]


def test_accuracy_is_split_by_timestep(whole):
    for row in whole[0][1:]:
        present = [a for a in row["accuracy_by_time"] if a is not None]
        assert (
            len(row["accuracy_by_time"]) == 10
            and 1 <= len(present) <= 4
            and all(0 <= a <= 1 for a in present)
        )


def test_stable_diffusion_3_5_trains_and_loads_again(lists, tiny, tmp_path):
    """Its transformer normalises queries and keys and has blocks with a second attention; sharded, too."""
    from diffusers import SD3Transformer2DModel

    pipe = pipelines.load_pipeline(tiny / "sd3")
    torch.manual_seed(0)
    pipe.transformer = SD3Transformer2DModel.from_config(
        dict(pipe.transformer.config, qk_norm="rms_norm", dual_attention_layers=(0,))
    )
    pipe.save_pretrained(tmp_path / "sd35")
    args = lambda out: (lists, tmp_path, tmp_path / out, "--steps", 2, "--timesteps", "logit_normal")
    one, two = train(*args("one"), model="sd35"), train(*args("two"), model="sd35", processes=2)
    # diffusers' RMS norm rounds to fp32 whatever the model's type: so before the optimiser, and to 1e-6
    assert np.allclose(curve(one)[0], curve(two)[0], rtol=1e-6, atol=1e-6)
    before, after = (
        load_file(tmp_path / "sd35/transformer/diffusion_pytorch_model.safetensors"),
        weights(tmp_path / "one", "transformer"),
    )
    assert (
        any("norm_q" in k for k in after)
        and any("attn2" in k for k in after)
        and any(not torch.equal(before[k], after[k]) for k in after)
    )
    assert pipelines.load_pipeline(tmp_path / "two/model").transformer.config.qk_norm == "rms_norm"


def test_uniform_timesteps_of_rectified_flow():
    from diffusers import EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler

    x, noise, u = torch.randn(5, 4, 2, 2), torch.randn(5, 4, 2, 2), torch.tensor([0.1, 0.25, 0.5, 0.75, 0.9])
    x_t, t, target = pipelines.add_noise(FlowMatchEulerDiscreteScheduler(shift=3.0), x, noise, u, "uniform")
    sigma = 3 * u / (1 + 2 * u)
    assert (
        torch.allclose(t, 1000 * sigma)
        and torch.allclose(x_t, (1 - sigma.view(-1, 1, 1, 1)) * x + sigma.view(-1, 1, 1, 1) * noise)
        and torch.equal(target, noise - x)
    )
    assert torch.equal(
        pipelines.add_noise(EulerDiscreteScheduler(), x, noise, u, "uniform")[1], (1000 * u).long()
    )


@pytest.mark.parametrize("model,forward", [("sdxl", 6.76), ("sd3", 8.90)])
def test_a_list_of_four_takes_sixteen_forwards(model, forward):
    """Three per image for the policy, one for the reference, on the real configurations."""
    denoiser = pipelines.denoiser_of(pipelines.load_pipeline(f"random:{model}", "meta"))[1]
    family = pipelines.TRAINABLE[model]
    item = read_cached(Cache(None, family.shapes(denoiser.config), 4), 0)
    flops, _, _ = memory.count_flops(family, denoiser, item)
    assert 4 * flops / 1e12 == pytest.approx(16 * forward, rel=0.02)


def test_the_saved_average_is_that_of_the_steps(uneven, tiny, tmp_path):
    """After step 0 the decay is .1, as of a young average: .1 start + .9 of what a run without it saves."""
    for ema in (0, 0.75):
        train(uneven, tiny, tmp_path / str(ema), "--steps", 1, "--ema", ema)
    start, last, average = (
        load_file(tiny / "sdxl/unet/diffusion_pytorch_model.safetensors"),
        weights(tmp_path / "0"),
        weights(tmp_path / "0.75"),
    )
    assert any(not torch.equal(start[k], last[k]) for k in last)
    assert all(torch.allclose(average[k], 0.1 * start[k].float() + 0.9 * last[k], atol=1e-6) for k in last)


@pytest.mark.parametrize(
    "model,more", [("sdxl", ("--lora_rank", 2)), ("sd3", ("--precision", "fp64")), ("sd15", ())]
)
def test_samples_are_a_row_of_pictures_a_time_and_change_nothing(lists, tiny, tmp_path, model, more):
    for every in (0, 2):
        train(
            lists,
            tiny,
            tmp_path / str(every),
            "--steps",
            4,
            "--sample_every",
            every,
            "--sample_prompts",
            3,
            "--sample_steps",
            2,
            "--precision",
            "fp32",
            *more,
            model=model,
        )
    assert [p.name for p in sorted((tmp_path / "2/samples").iterdir())] == [
        "000000.png",
        "000002.png",
        "000004.png",
    ]
    first, last = (np.asarray(Image.open(tmp_path / f"2/samples/{n:06d}.png")) for n in (0, 4))
    assert (
        first.shape == last.shape == (32, 9 * 34, 3)  # three of each prompt, since the checker counts them
        and (first != last).any()
        and pictures.read_image(tmp_path / "2/samples.png").width > 9 * 64
    )
    assert np.array_equal(curve(log_of(tmp_path / "0")), curve(log_of(tmp_path / "2")))


def test_samples_start_as_the_pipeline_draws_them(lists, tiny, tmp_path):
    """Their conditioning is the pipeline's own: the first row is what the pipeline draws from prompts."""
    train(
        lists,
        tiny,
        tmp_path,
        "--steps",
        1,
        "--sample_every",
        1,
        "--sample_prompts",
        2,
        "--sample_steps",
        2,
        "--precision",
        "fp32",
    )
    prompts = [p for p in dict.fromkeys(r["prompt"] for r in read_metadata(lists)) for _ in range(3)][:6]
    images = pipelines.load_pipeline(tiny / "sdxl")(
        prompts,
        generator=[torch.Generator().manual_seed(i) for i in range(6)],
        num_inference_steps=2,
        guidance_scale=2.0,
    ).images
    row = np.asarray(Image.open(tmp_path / "samples/000000.png")).astype(int)
    for i, image in enumerate(images):
        assert abs(row[:, i * 34 : i * 34 + 32] - np.asarray(image).astype(int)).max() <= 1


def test_what_suits_a_model_is_taken_where_it_is_not_said(capsys):
    for name, adapters, beta, lr in (
        ("sdxl", 0, 2500, 2e-5),
        ("sdxl", 8, 2500, 1e-4),
        ("sd15", 0, 2500, 2e-5),
        ("sd3", 0, 50, 2e-5),
    ):
        pipe = pipelines.load_pipeline(f"random:{name}", "meta")
        cfg = rankdpo.complete(rankdpo.Config(lora_rank=adapters), pipe)
        assert (cfg.beta, cfg.lr) == (beta, lr) and f"--beta {beta}" in capsys.readouterr().out
        assert rankdpo.complete(rankdpo.Config(beta=7.0), pipe).beta == 7
    toy = rankdpo.complete(rankdpo.Config(), pipelines.load_pipeline("toy/models/sdxl"))
    assert (toy.beta, toy.lr, toy.sample_steps, toy.sample_guidance) == (100, 2e-4, 16, 2)


def test_the_work_of_a_list_is_counted(whole):
    log = [r for r in whole[0] if "loss" in r]
    assert all(r["tflops"] > 0 for r in log) and np.allclose(
        [r["tflops"] / r["lists_per_s"] for r in log], log[0]["tflops"] / log[0]["lists_per_s"]
    )


# ----------------------------------------------------------------------------- the scripts' own run


@pytest.mark.parametrize("model", ["sdxl", "sd3", "sd15"])
def test_every_family_trains_and_loads_again(lists, tiny, tmp_path, model):
    log = short_run(lists, tiny, tmp_path, model=model)
    from diffusers import DiffusionPipeline

    more = (
        dict(text_encoder_3=None, tokenizer_3=None)
        if model == "sd3"
        else dict(safety_checker=None, feature_extractor=None, image_encoder=None)
        if model == "sd15"
        else {}
    )
    tuned = DiffusionPipeline.from_pretrained(tmp_path / "model", **more)
    base = pipelines.load_pipeline(tiny / model)
    part, before = pipelines.denoiser_of(base)
    after = getattr(tuned, part)
    assert type(tuned) is type(base) and any(
        not torch.equal(a, b) for a, b in zip(before.state_dict().values(), after.state_dict().values())
    )
    for key in ("vae", "text_encoder"):
        for a, b in zip(getattr(base, key).state_dict().values(), getattr(tuned, key).state_dict().values()):
            assert torch.equal(a, b)  # only the denoiser is trained
    assert log[0]["config"]["loss"] == "rankdpo" and log[0]["torch"] == torch.__version__ and len(log) == 4
    assert (tmp_path / "curves.png").is_file()


@pytest.mark.parametrize("loss", ["rankdpo", "dpo", "gain", "balanced"])
def test_the_first_loss_is_the_weights_times_ln2(lists, tiny, tmp_path, loss):
    log = short_run(
        lists, tiny, tmp_path, "--loss", loss, "--steps", 1, "--global_batch_size", 10
    )  # the whole set once
    rows = rows_of(lists)
    total = sum(rankdpo.list_weights(rankdpo.Config(loss=loss), r).sum().item() for r in rows)
    assert log[1]["loss"] == pytest.approx(total / len(rows) * math.log(2), abs=1e-5)
    assert log[1]["accuracy"] == 0.5 and log[1]["best_s"] == 0 and log[1]["grad_norm"] > 0


def test_fine_tuning_lowers_the_winners_error(lists, tiny, tmp_path):
    for loss in ("sft", "weighted"):
        log = short_run(
            lists,
            tiny,
            tmp_path / loss,
            "--loss",
            loss,
            "--steps",
            12,
            "--lr",
            1e-3,
            "--global_batch_size",
            10,
        )
        assert log[-1]["best_s"] < 0 and log[1]["best_s"] == 0 and log[1]["accuracy"] is None


def test_reference_refresh_brings_the_loss_back(lists, tiny, tmp_path):
    log = short_run(lists, tiny, tmp_path, "--ref_refresh", 2, "--steps", 5, "--lr", 1e-3)[1:]
    assert [r["accuracy"] == 0.5 and r["best_s"] == 0 for r in log] == [True, False, True, False, True]


def test_reversed_labels_turn_the_gradient_around(lists, tiny, tmp_path):
    args = ("--steps", 6, "--lr", 1e-3, "--global_batch_size", 10, "--loser_weight", 1)
    right = short_run(lists, tiny, tmp_path / "a", *args)[-1]
    wrong = short_run(lists, tiny, tmp_path / "b", *args, "--label", "reversed")[-1]
    assert (
        right["best_s"] < right["worst_s"] and wrong["best_s"] < wrong["worst_s"]
    )  # each orders its own labels
    rows = lambda label: read_lists(rankdpo.Config(data=str(lists), label=label))
    for row, flipped, chance in zip(rows_of(lists), rows("reversed"), rows("random")):
        assert flipped["phi"] == [1 - p for p in row["phi"]]
        assert flipped["scores"]["clip"] == [-s for s in row["scores"]["clip"]]
        assert sorted(chance["phi"]) == pytest.approx([0, 1 / 3, 2 / 3, 1])
        assert chance["scores"] == {"random": chance["phi"]} and chance["file_names"] == row["file_names"]


def test_the_curve_does_not_depend_on_the_micro_batch(lists, tiny, tmp_path):
    """An equality of mathematics, so it is looked at in fp64."""
    runs = [
        short_run(
            lists,
            tiny,
            tmp_path / str(b),
            "--device_batch_size",
            b,
            "--noise",
            "independent",
            "--precision",
            "fp64",
            "--lr",
            1e-3,
        )
        for b in (4, 1, 3)
    ]
    for run in runs[1:]:
        for a, b in zip(runs[0][1:], run[1:]):
            assert b["loss"] == pytest.approx(a["loss"], rel=1e-9) and b["grad_norm"] == pytest.approx(
                a["grad_norm"], rel=1e-9
            )
            assert b["accuracy"] == pytest.approx(a["accuracy"], abs=1e-6)


def test_lists_of_different_length_and_resolution(lists, tiny, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(lists, data)
    rows = rows_of(data)
    for row, k in zip(rows, (2, 3, 4, 2, 4, 3, 2, 4, 4, 3)):
        for key in ("file_names", "phi", "models", "seeds", "rank"):
            row[key] = row[key][:k]
        row["scores"] = {n: s[:k] for n, s in row["scores"].items()}
    big = Image.open(data / rows[0]["file_names"][0]).resize((70, 50))
    big.save(data / rows[0]["file_names"][0])
    (data / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    log = short_run(data, tiny, tmp_path / "out", "--resolution", 32, "--steps", 1, "--global_batch_size", 10)
    total = sum(rankdpo.list_weights(rankdpo.Config(), r).sum().item() for r in rows)
    assert log[1]["loss"] == pytest.approx(total / len(rows) * math.log(2), abs=1e-5)


def test_changed_images_make_a_new_cache(lists, tiny, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(lists, data, ignore=shutil.ignore_patterns(".cache"))
    short_run(data, tiny, tmp_path / "a", "--steps", 2)
    short_run(data, tiny, tmp_path / "b", "--steps", 2)
    assert len(list((data / ".cache").iterdir())) == 1
    Image.new("RGB", (32, 32), "red").save(data / rows_of(data)[0]["file_names"][0])
    short_run(data, tiny, tmp_path / "c", "--steps", 2)
    assert len(list((data / ".cache").iterdir())) == 2


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_noise_and_targets_follow_the_scheduler(prediction):
    """add_noise and its targets equal the scheduler's own, and a perfect prediction gives back the image."""
    from diffusers import DDPMScheduler

    s = DDPMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type=prediction
    )
    x, noise, u = torch.randn(5, 4, 8, 8), torch.randn(5, 4, 8, 8), torch.rand(5)
    x_t, t, target = pipelines.add_noise(s, x, noise, u)
    assert torch.allclose(x_t, s.add_noise(x, noise, t), atol=1e-5)
    assert torch.allclose(
        target, s.get_velocity(x, noise, t) if prediction == "v_prediction" else noise, atol=1e-5
    )


def test_rectified_flow_points_from_the_image_to_the_noise():
    from diffusers import FlowMatchEulerDiscreteScheduler

    s = FlowMatchEulerDiscreteScheduler(shift=3.0)
    x, noise, u = torch.randn(4, 4, 8, 8), torch.randn(4, 4, 8, 8), torch.tensor([0.5, 0.1, 0.9, 0.02])
    x_t, t, target = pipelines.add_noise(s, x, noise, u)
    sigma = (t / 1000).view(-1, 1, 1, 1)
    assert sigma[0].item() == pytest.approx(3 * 0.5 / (1 + 2 * 0.5))  # SD3's shift of the median
    assert torch.allclose(x_t - sigma * target, x, atol=1e-5) and torch.allclose(
        x_t + (1 - sigma) * target, noise, atol=1e-5
    )


def test_noise_depends_on_seed_step_and_list_alone():
    cfg = rankdpo.Config()
    (u, a), (v, b) = rankdpo.draw_noise(cfg, 3, 7, (4, 4, 8, 8)), rankdpo.draw_noise(cfg, 3, 7, (4, 4, 8, 8))
    assert u == v and torch.equal(a, b) and torch.equal(a[0], a[3])  # shared over the list
    others = [
        rankdpo.draw_noise(rankdpo.Config(seed=1), 3, 7, (4, 4, 8, 8)),
        rankdpo.draw_noise(cfg, 4, 7, (4, 4, 8, 8)),
        rankdpo.draw_noise(cfg, 3, 8, (4, 4, 8, 8)),
    ]
    assert all(not torch.equal(a, o[1]) and u != o[0] for o in others)
    own = rankdpo.draw_noise(rankdpo.Config(noise="independent"), 3, 7, (4, 4, 8, 8))[1]
    assert not torch.equal(own[0], own[1])


def test_rankdpo_errors(lists, tiny, tmp_path, capsys):
    good = ["--data", lists, "--model", f"{tiny}/sdxl", "--out", tmp_path / "out"]
    bad = tmp_path / "bad"
    shutil.copytree(lists, bad)
    lines = (bad / "metadata.jsonl").read_text().splitlines()

    def with_line_3(text):
        (bad / "metadata.jsonl").write_text("\n".join(lines[:2] + [text] + lines[3:]))
        return good + ["--data", bad]

    check = lambda args, *says: fails(rankdpo.main, args, *says, capsys=capsys)
    check(["--data", "nowhere"], "nowhere/metadata.jsonl", "no such file")
    check(good + ["--loss", "ppo"], "--loss", "ppo", "rankdpo")
    check(good + ["--betta", "1"], "--betta")
    check(good + ["--beta", "much"], "--beta", "much")
    check(good + ["--beta", "-1"], "--beta", "above 0")
    check(good + ["--model", tmp_path], str(tmp_path), "model_index.json")
    check(good + ["--device", "abacus"], "abacus")
    row = json.loads(lines[2])
    check(with_line_3("{torn"), "metadata.jsonl, line 3")
    check(with_line_3(json.dumps({k: v for k, v in row.items() if k != "phi"})), "line 3", "phi")
    check(with_line_3(json.dumps({**row, "phi": [1.0]})), "line 3", "as many phi")
    check(with_line_3(json.dumps({**row, "phi": [2.0, 0.0, 0.0, 0.0]})), "line 3", "[0, 1]")
    check(
        with_line_3(json.dumps({**row, "file_names": ["images/none.png"] * 4})), "line 3", "images/none.png"
    )
    check(with_line_3(json.dumps({**row, "file_names": ["../x.png"] * 4})), "line 3", "../x.png")
    check(with_line_3("[1]"), "line 3")
    (bad / "metadata.jsonl").write_text("")
    check(good + ["--data", bad], "no rows")
    shutil.copytree(lists, tmp_path / "torn", ignore=shutil.ignore_patterns(".cache"))
    (tmp_path / "torn" / row["file_names"][0]).write_bytes(b"not a png")
    check(good + ["--data", tmp_path / "torn"], row["file_names"][0], "not a readable image")
    assert not list((tmp_path / "out").iterdir())  # nothing was begun
    check(good + ["--gradient_checkpointing", "maybe"], "--gradient_checkpointing", "maybe")
    check(good + ["--seed", "-1"], "--seed")
    shutil.copytree(lists, tmp_path / "sizes", ignore=shutil.ignore_patterns(".cache"))
    Image.new("RGB", (40, 32)).save(tmp_path / "sizes" / row["file_names"][0])
    check(good + ["--data", tmp_path / "sizes"], "40 x 32", "--resolution")
    shutil.copytree(tiny / "sdxl", tmp_path / "torn_model")
    (tmp_path / "torn_model/unet/diffusion_pytorch_model.safetensors").write_bytes(b"123")
    check(good + ["--model", tmp_path / "torn_model"], "torn_model", "could not load")
