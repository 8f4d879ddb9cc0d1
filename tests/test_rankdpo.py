"""The trainer: the same curve however it is run, exact resume, adapters, watches, samples."""

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
from conftest import child, copied, fails, log_of, rows_of, together, train_args
from conftest import train as short_run
from PIL import Image
from safetensors.torch import load_file

import losses
import rankdpo
from lib import engine, memory, pictures, pipelines, store
from lib.lists import read_lists, read_metadata


def options(data, tiny, out, *more, model="sdxl"):
    """A short run. Equalities of mathematics are looked at in fp64: there they hold to 1e-9 on any CPU."""
    return train_args(data, tiny, out, "--steps 6 --lr 1e-3 --beta 10 --precision fp64", *more, model=model)


def train(data, tiny, out, *more, processes=1, model="sdxl"):
    args = options(data, tiny, out, *more, model=model)
    if processes == 1:
        rankdpo.main(args)
    else:
        together(rankdpo.main, args, processes)
    return log_of(out)


def curve(log):
    names = ("loss", "accuracy", "best_s", "worst_s", "grad_norm")
    return np.array([[row[name] or 0 for name in names] for row in log if "loss" in row])


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
    return train(uneven, tiny, out, "--ref_refresh 3"), out


@pytest.mark.parametrize("m, device_batch", [(1, 32), (2, 2), (0, 3)])
def test_images_per_forward_gives_the_gradient_of_the_whole_list(
    uneven, tiny, tmp_path, whole, m, device_batch
):
    parts = f"--images_per_forward {m} --device_batch_size {device_batch}"
    log = train(uneven, tiny, tmp_path, "--ref_refresh 3", parts)
    close(curve(log), curve(whole[0]))
    same_weights(tmp_path, whole[1])


def test_images_per_forward_of_a_transformer(lists, tiny, tmp_path):
    a = train(lists, tiny, tmp_path / "a", "--steps 3", model="sd3")
    b = train(lists, tiny, tmp_path / "b", "--steps 3 --images_per_forward 3", model="sd3")
    close(curve(a), curve(b))


@pytest.mark.parametrize(
    "more", ["--device_batch_size 1 --keep_gathered true", "--images_per_forward 1 --keep_gathered false"]
)
def test_sharded_processes_give_the_curve_and_the_weights_of_one(uneven, tiny, tmp_path, whole, more):
    log = train(uneven, tiny, tmp_path, "--ref_refresh 3", more, processes=2)
    assert log[0]["world"] == 2
    close(curve(log), curve(whole[0]))
    same_weights(tmp_path, whole[1])


def same_run(a, b):
    """Bit for bit: the curve (but for the clock) and the weights."""
    drop = lambda log: [{k: v for k, v in r.items() if k not in ("lists_per_s", "tflops")} for r in log[1:]]
    assert drop(log_of(a)) == drop(log_of(b))
    x, y = weights(a), weights(b)
    assert all(torch.equal(x[k], y[k]) for k in x)


def test_kills_at_random_moments_change_nothing(uneven, tiny, tmp_path):
    """kill -9, start again, until it ends: curve and weights of a run that nobody killed, bit for bit."""
    rng, kills, more = random.Random(1), 0, "--ref_refresh 4 --ema 0.9 --save_every 1 --keep 2 --steps 6"
    command = lambda out: options(uneven, tiny, tmp_path / out, more)
    rankdpo.main(command("warm"))  # encodes
    began = time.time()
    rankdpo.main(command("whole"))
    length = time.time() - began
    while True:
        process = child(rankdpo.main, command("killed"))
        process.join(rng.uniform(0.2, 0.6) * length if kills < 4 else None)
        if not process.is_alive():
            break
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        kills += 1
    assert process.exitcode == 0 and kills and len(list((tmp_path / "killed/checkpoints").iterdir())) == 2
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
    command = lambda out: options(lists, tiny, out, "--save_every 1 --steps 2")
    rankdpo.main(command(tmp_path / "whole"))
    kills = 0
    while True:
        shutil.rmtree(tmp_path / "killed", ignore_errors=True)
        process = child(partial(dying, 11 * kills + 3), command(tmp_path / "killed"))
        process.join()
        if process.exitcode == 0:  # it came to its end before that moment
            break
        assert process.exitcode == 9
        kills += 1
        rankdpo.main(command(tmp_path / "killed"))
        same_run(tmp_path / "killed", tmp_path / "whole")
        left = {p.name for p in (tmp_path / "killed/checkpoints").iterdir()}
        assert "step-000002" in left and not list((tmp_path / "killed").rglob(".tmp*"))
    assert kills >= 5


def test_a_run_goes_on_with_another_number_of_processes(uneven, tiny, tmp_path, whole):
    train(uneven, tiny, tmp_path, "--ref_refresh 3 --save_every 2 --keep 5")
    (tmp_path / "log.jsonl").write_text((tmp_path / "log.jsonl").read_text()[:-20])  # torn
    for gone in ("model", "checkpoints/step-000004", "checkpoints/step-000006"):
        shutil.rmtree(tmp_path / gone)
    log = train(uneven, tiny, tmp_path, "--ref_refresh 3 --save_every 4 --keep 5", processes=2)
    assert len(log) == 7
    close(curve(log), curve(whole[0]))
    shutil.rmtree(tmp_path / "model")
    close(curve(train(uneven, tiny, tmp_path, "--ref_refresh 3")), curve(whole[0]))  # to one, from step 4


def test_told_to_stop_it_saves_and_goes_on_later(uneven, tiny, tmp_path, whole, monkeypatch, capsys):
    step, calls = torch.optim.AdamW.step, []

    def told(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", told)
    with pytest.raises(SystemExit) as e:
        rankdpo.main(options(uneven, tiny, tmp_path, "--ref_refresh 3"))
    assert e.value.code == 143 and "stopped after 4 steps" in capsys.readouterr().err
    assert not (tmp_path / "model").exists()
    train(uneven, tiny, tmp_path, "--ref_refresh 3")
    same_run(tmp_path, whole[1])
    came = engine.signals()
    os.kill(os.getpid(), signal.SIGINT)
    assert came == [130] and signal.getsignal(signal.SIGINT) == signal.SIG_DFL
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.mark.parametrize("more", ["--ema 0.9 --ref_refresh 3", "--loss dro --lora_rank 2"])
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
    monkeypatch.setattr(pipelines, "SAMPLER_STEPS", 4)
    args = f"{more} --steps 4 --save_every 2 --keep 9"
    whole = train(lists, tiny, tmp_path, args)
    tensors = lambda: load_file(next((tmp_path / "checkpoints/step-000004").glob("*.safetensors")))
    saved = tensors()
    for gone in ("model", "checkpoints/step-000004"):
        shutil.rmtree(tmp_path / gone)
    again = train(lists, tiny, tmp_path, args)  # from step 2
    assert np.array_equal(curve(again), curve(whole)) and ("--lora_rank" in more or 1 in strides)
    assert saved.keys() == tensors().keys() and all(torch.equal(t, saved[k]) for k, t in tensors().items())


def test_a_finished_run_is_not_begun_again_and_another_is_refused(uneven, tiny, tmp_path, capsys):
    """Nothing is deleted: --resume false moves what is there aside."""
    args = "--steps 2 --save_every 2 --sample_every 2 --sample_prompts 2 --sample_steps 1"
    train(uneven, tiny, tmp_path, args)
    content = lambda folder: {p: p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file()}
    before = content(tmp_path)
    train(uneven, tiny, tmp_path, args)
    assert "this run is finished" in capsys.readouterr().out and content(tmp_path) == before
    other = options(uneven, tiny, tmp_path, args, "--beta 20")
    fails(rankdpo.main, other, "another --beta (before 10.0, now 20.0)", "--resume false", capsys=capsys)
    assert content(tmp_path) == before
    assert train(uneven, tiny, tmp_path, args, "--beta 20 --resume false")[0]["config"]["beta"] == 20
    kept = {p.relative_to(tmp_path / "before-1") for p in content(tmp_path / "before-1")}
    assert kept == {p.relative_to(tmp_path) for p in before if p.name != ".lock"}


def test_content_identifies_a_run_wherever_it_lies(uneven, tiny, tmp_path, whole, monkeypatch):
    """A moved data folder, a moved model, another spelling of a path: the run goes on."""
    data, models = tmp_path / "data", tmp_path / "models"
    copied(uneven, data)
    shutil.copytree(tiny / "sdxl", models / "sdxl")
    args = "--ref_refresh 3 --save_every 3 --keep 2"
    train(data, models, tmp_path / "out", args)
    for gone in ("model", "checkpoints/step-000006"):
        shutil.rmtree(tmp_path / "out" / gone)
    data, models = data.rename(tmp_path / "moved"), models.rename(tmp_path / "others")
    monkeypatch.chdir(tmp_path)
    log = train("moved/", models, tmp_path / "out", args)
    assert [part["step"] for part in log[0]["resumed"]] == [3]
    same_run(tmp_path / "out", whole[1])


def test_another_revision_of_a_hub_model_is_another_run():
    torch.manual_seed(0)
    one, other = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    for model in ("org/name", "org/name+org/adapters"):
        recipe = partial(engine.recipe_of, rankdpo.Config(model=model), [], [])
        weights = lambda policy: recipe(policy)["weights of --model"]
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
    args = options(uneven, tiny, tmp_path, "--save_every 1")
    fails(rankdpo.main, args, "step 2: the gradient is nan", "--lr", capsys=capsys)
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-000002"]
    rankdpo.main(args)  # from the checkpoint
    assert len(log_of(tmp_path)) == 7 and all(w.isfinite().all() for w in weights(tmp_path).values())


@pytest.mark.parametrize("model,part", [("sdxl", "unet"), ("sd3", "transformer")])
def test_lora_trains_and_loads_as_diffusers_loads_it(lists, tiny, tmp_path, model, part):
    more = "--steps 3 --lora_rank 4 --lr 1e-2 --images_per_forward 3"
    log = train(lists, tiny, tmp_path, more, model=model)
    assert log[1]["best_s"] == log[1]["worst_s"] == 0 and log[-1]["worst_s"] != 0  # starts as its reference
    assert log[1]["accuracy"] == 0.5
    names = list(load_file(tmp_path / "model/pytorch_lora_weights.safetensors"))
    assert names and all(n.startswith(f"{part}.") and "lora" in n for n in names)
    tuned = f"{model}+{tmp_path}/model"
    how = dict(num_inference_steps=2, output_type="np", generator=torch.Generator())
    how.update(max_sequence_length=16) if model == "sd3" else None

    def drawn(path):
        how["generator"].manual_seed(0)
        return pipelines.load_pipeline(f"{tiny}/{path}")(["a red circle"], **how).images

    assert np.abs(drawn(model) - drawn(tuned)).max() > 1e-4
    again = train(lists, tiny, tmp_path / "again", "--steps 1", model=tuned)  # all weights, from the tuned
    state = lambda path: pipelines.denoiser_of(pipelines.load_pipeline(path))[1].state_dict()
    assert again[1]["loss"] > 0 and state(tmp_path / "again/model").keys() == state(tiny / model).keys()


def test_adapters_on_adapters_load_one_after_the_other(lists, tiny, tmp_path):
    more = "--lora_rank 4 --lr 1e-2 --steps 1"
    base, first = f"{tiny}/sdxl", f"{tiny}/sdxl+{tmp_path}/a/model"
    train(lists, tiny, tmp_path / "a", more)
    train(lists, tiny, tmp_path / "b", more, model=f"sdxl+{tmp_path}/a/model")
    weights = lambda path: pipelines.denoiser_of(pipelines.load_pipeline(path))[1].state_dict()
    both, second = weights(f"{first}+{tmp_path}/b/model"), weights(f"{base}+{tmp_path}/b/model")
    base, first = weights(base), weights(first)
    assert max((both[n] - first[n]).abs().max() for n in both) > 1e-5
    for n in both:  # the sum of two changes
        torch.testing.assert_close(both[n] - first[n], second[n] - base[n], rtol=0, atol=1e-6)


def test_lora_has_one_curve_and_resumes_with_its_refreshed_reference(uneven, tiny, tmp_path):
    more = "--steps 4 --lora_rank 4 --ref_refresh 2 --lr 1e-2 --gradient_checkpointing true"
    log = train(uneven, tiny, tmp_path / "a", more, "--save_every 3 --keep 9")
    assert log[3]["step"] == 2 and log[3]["best_s"] == 0 and log[4]["best_s"] != 0  # right after the refresh
    close(curve(train(uneven, tiny, tmp_path / "b", more, "--images_per_forward 1", processes=2)), curve(log))
    shutil.rmtree(tmp_path / "a/model")
    assert np.array_equal(curve(train(uneven, tiny, tmp_path / "a", more)), curve(log))  # from step 3


def test_stable_diffusion_3_5_trains_and_loads_again(lists, tiny, tmp_path):
    """Its transformer normalises queries and keys and has blocks with a second attention; sharded, too."""
    from diffusers import SD3Transformer2DModel

    pipe = pipelines.load_pipeline(tiny / "sd3")
    torch.manual_seed(0)
    pipe.transformer = SD3Transformer2DModel.from_config(
        dict(pipe.transformer.config, qk_norm="rms_norm", dual_attention_layers=(0,))
    )
    pipe.save_pretrained(tmp_path / "sd35")
    run = partial(train, lists, tmp_path, model="sd35")
    one, two = run(tmp_path / "one", "--steps 2"), run(tmp_path / "two", "--steps 2", processes=2)
    # diffusers' RMS norm rounds to fp32 whatever the model's type: so before the optimiser, and to 1e-6
    assert np.allclose(curve(one)[0], curve(two)[0], rtol=1e-6, atol=1e-6)
    before = load_file(tmp_path / "sd35/transformer/diffusion_pytorch_model.safetensors")
    after = weights(tmp_path / "one", "transformer")
    assert any("norm_q" in k for k in after) and any("attn2" in k for k in after)
    assert any(not torch.equal(before[k], after[k]) for k in after)
    assert pipelines.load_pipeline(tmp_path / "two/model").transformer.config.qk_norm == "rms_norm"


@pytest.mark.parametrize("model", ["sdxl", "sd3", "sd15"])
def test_every_family_trains_and_loads_again(lists, tiny, tmp_path, model, real_curves):
    from diffusers import DiffusionPipeline

    log = short_run(lists, tiny, tmp_path, model=model)
    absent = dict(sd3=["text_encoder_3", "tokenizer_3"])
    absent["sd15"] = ["safety_checker", "feature_extractor", "image_encoder"]
    tuned = DiffusionPipeline.from_pretrained(tmp_path / "model", **dict.fromkeys(absent.get(model, ())))
    base = pipelines.load_pipeline(tiny / model)
    part, _ = pipelines.denoiser_of(base)
    unchanged = lambda key: all(
        torch.equal(a, b)
        for a, b in zip(getattr(base, key).state_dict().values(), getattr(tuned, key).state_dict().values())
    )
    assert type(tuned) is type(base) and not unchanged(part)
    assert unchanged("vae") and unchanged("text_encoder")  # only the denoiser is trained
    assert log[0]["config"]["loss"] == "rankdpo" and log[0]["torch"] == torch.__version__ and len(log) == 4
    assert pictures.read_image(tmp_path / "curves.png").width == 1600


@pytest.mark.parametrize("model,forward", [("sdxl", 6.76), ("sd3", 8.90)])
def test_a_list_of_four_takes_sixteen_forwards(model, forward):
    """Three per image for the policy, one for the reference, on the real configurations."""
    denoiser = pipelines.denoiser_of(pipelines.load_pipeline(f"random:{model}", "meta"))[1]
    family = pipelines.TRAINABLE[model]
    item = {k: torch.empty(shape, device="meta") for k, shape in family.shapes(denoiser.config).items()}
    flops = memory.count_flops(family, denoiser, dict(item, latents=item["latents"][None]))[0]
    assert 4 * flops / 1e12 == pytest.approx(16 * forward, rel=0.02)


def test_the_work_of_a_list_is_counted(whole):
    log = [r for r in whole[0] if "loss" in r]
    of_list = [r["tflops"] / r["lists_per_s"] for r in log]
    assert all(r["tflops"] > 0 for r in log) and np.allclose(of_list, of_list[0])


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


def test_the_saved_average_is_that_of_the_steps(uneven, tiny, tmp_path):
    """After step 0 the decay is .1, as of a young average: .1 start + .9 of what a run without it saves."""
    for ema in (0, 0.75):
        train(uneven, tiny, tmp_path / str(ema), "--steps 1 --ema", ema)
    start = load_file(tiny / "sdxl/unet/diffusion_pytorch_model.safetensors")
    last, average = weights(tmp_path / "0"), weights(tmp_path / "0.75")
    assert any(not torch.equal(start[k], last[k]) for k in last)
    assert all(torch.allclose(average[k], 0.1 * start[k].float() + 0.9 * last[k], atol=1e-6) for k in last)


SAMPLES = "--precision fp32 --sample_steps 2 --sample_prompts 2 --sample_every"


@pytest.mark.parametrize("model,more", [("sdxl", "--lora_rank 2"), ("sd3", "--precision fp64")])
def test_samples_are_a_row_of_pictures_a_time_and_change_nothing(lists, tiny, tmp_path, model, more):
    for every in (0, 2):
        train(lists, tiny, tmp_path / str(every), "--steps 4", SAMPLES, every, more, model=model)
    files = sorted((tmp_path / "2/samples").iterdir())
    assert [p.name for p in files] == ["000000.png", "000002.png", "000004.png"]
    first, last = (np.asarray(Image.open(files[n])) for n in (0, 2))
    assert first.shape == last.shape == (32, 6 * 34, 3) and (first != last).any()  # three of each prompt
    assert pictures.read_image(tmp_path / "2/samples.png").width > 6 * 64
    assert np.array_equal(curve(log_of(tmp_path / "0")), curve(log_of(tmp_path / "2")))


def test_samples_start_as_the_pipeline_draws_them(lists, tiny, tmp_path):
    """Their conditioning is the pipeline's own: the first row is what the pipeline draws from prompts."""
    train(lists, tiny, tmp_path, "--steps 1", SAMPLES, 1)
    prompts = [p for p in dict.fromkeys(r["prompt"] for r in read_metadata(lists)) for _ in range(3)][:6]
    noise = [torch.Generator().manual_seed(i) for i in range(6)]
    how = dict(generator=noise, num_inference_steps=2, guidance_scale=2.0)
    images = pipelines.load_pipeline(tiny / "sdxl")(prompts, **how).images
    row = np.asarray(Image.open(tmp_path / "samples/000000.png")).astype(int)
    for i, image in enumerate(images):
        assert abs(row[:, i * 34 : i * 34 + 32] - np.asarray(image).astype(int)).max() <= 1


@pytest.mark.parametrize("loss", ["rankdpo", "balanced"])
def test_the_first_loss_is_the_weights_times_ln2(uneven, tiny, tmp_path, loss):
    """Of lists of several lengths, one of them with a picture of another size, which --resolution crops."""
    data = copied(uneven, tmp_path / "data")
    rows = rows_of(data)
    path = data / rows[0]["file_names"][0]
    Image.open(path).resize((70, 50)).save(path)
    more = f"--loss {loss} --steps 1 --global_batch_size 10 --resolution 32"  # the whole set once
    log = short_run(data, tiny, tmp_path / "out", more)
    labels = [(torch.tensor(row["phi"]), torch.tensor(list(row["scores"].values()))) for row in rows]
    total = sum(losses.list_weights(loss, *label).sum().item() for label in labels)
    assert log[1]["loss"] == pytest.approx(total / len(rows) * math.log(2), abs=1e-5)
    assert log[1]["accuracy"] == 0.5 and log[1]["best_s"] == 0 and log[1]["grad_norm"] > 0


@pytest.mark.parametrize("loss", ["sft", "weighted"])
def test_fine_tuning_lowers_the_winners_error(lists, tiny, tmp_path, loss):
    log = short_run(lists, tiny, tmp_path, f"--loss {loss} --steps 8 --lr 1e-3 --global_batch_size 10")
    assert log[-1]["best_s"] < 0 and log[1]["best_s"] == 0 and log[1]["accuracy"] is None


def test_reversed_labels_turn_the_gradient_around(lists, tiny, tmp_path):
    args = "--steps 6 --lr 1e-3 --global_batch_size 10 --loser_weight 1"
    right = short_run(lists, tiny, tmp_path / "a", args)[-1]
    wrong = short_run(lists, tiny, tmp_path / "b", args, "--label reversed")[-1]
    for log in (right, wrong):  # each orders its own labels
        assert log["best_s"] < log["worst_s"]
    rows = lambda label: read_lists(rankdpo.Config(data=str(lists), label=label))[1]
    for row, flipped, chance in zip(rows_of(lists), rows("reversed"), rows("random")):
        assert flipped["phi"] == [1 - p for p in row["phi"]]
        assert flipped["scores"]["clip"] == [-s for s in row["scores"]["clip"]]
        assert sorted(chance["phi"]) == pytest.approx([0, 1 / 3, 2 / 3, 1])
        assert chance["scores"] == {"random": chance["phi"]} and chance["file_names"] == row["file_names"]


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_noise_and_targets_follow_the_scheduler(prediction):
    """add_noise and its targets equal the scheduler's own."""
    from diffusers import DDPMScheduler

    s = DDPMScheduler(**pipelines.BETAS, prediction_type=prediction)
    x, noise, u = torch.randn(5, 4, 8, 8), torch.randn(5, 4, 8, 8), torch.rand(5)
    x_t, t, target = pipelines.add_noise(s, x, noise, u)
    assert torch.allclose(x_t, s.add_noise(x, noise, t), atol=1e-5)
    wanted = s.get_velocity(x, noise, t) if prediction == "v_prediction" else noise
    assert torch.allclose(target, wanted, atol=1e-5) and torch.equal(t, (1000 * u).long())


@pytest.mark.parametrize("timesteps", ["logit_normal", "uniform"])
def test_rectified_flow_points_from_the_image_to_the_noise(timesteps):
    from diffusers import FlowMatchEulerDiscreteScheduler

    x, noise, u = torch.randn(4, 4, 8, 8), torch.randn(4, 4, 8, 8), torch.tensor([0.5, 0.1, 0.9, 0.02])
    x_t, t, target = pipelines.add_noise(FlowMatchEulerDiscreteScheduler(shift=3.0), x, noise, u, timesteps)
    before = u if timesteps == "uniform" else torch.special.ndtri(u.double()).sigmoid().float()
    sigma = (3 * before / (1 + 2 * before)).view(-1, 1, 1, 1)  # SD3's shift
    assert torch.allclose(t, 1000 * sigma.flatten(), rtol=1e-4) and torch.equal(target, noise - x)
    assert torch.allclose(x_t, (1 - sigma) * x + sigma * noise, atol=1e-5)


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
