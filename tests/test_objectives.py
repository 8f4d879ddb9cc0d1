"""The objectives in the trainer: what each takes from the labels, options of the objective, the average."""

import math
import shutil
from functools import partial

import numpy as np
import pytest
import torch
from conftest import fails, log_of, rows_of, train

import losses
import rankdpo
from lib import engine, pipelines
from lib.lists import check_scores

ALL = ("--steps", 1, "--global_batch_size", 10)  # the whole set of ten lists, once


def config(**more):
    return rankdpo.Config(**more)


def test_every_objective_begins_where_its_weights_say(lists, tiny, tmp_path):
    rows = rows_of(lists)
    for loss in ("direct", "random_scorer"):
        log = train(lists, tiny, tmp_path / loss, "--loss", loss, *ALL)
        scores = [torch.tensor(list(row["scores"].values())) for row in rows]  # (R, K)
        if loss == "direct":
            total = sum(losses.direct_weights(s.T[None]).sum().item() for s in scores)
        else:  # position p holds the p-th list of the first epoch, and one drawn reward orders it
            cfg = config(global_batch_size=10, device_batch_size=10)
            total = 0
            for p, n in rankdpo.micro_batches(cfg, rankdpo.draw_order(cfg, [range(10)]), 0)[0]:
                coin = torch.rand(2, generator=rankdpo.generator_of(config(), p, n, 1))[1].item()
                phi = losses.preference_probability(scores[n][int(coin * 3)][:, None])
                total += losses.dpo_weights(phi[None]).sum().item()
        assert log[1]["loss"] == pytest.approx(total / 10 * math.log(2), rel=1e-5)
        assert log[1]["accuracy"] == 0.5 and log[1]["grad_norm"] > 0


def test_fine_tuning_weighs_by_comparisons_won_and_by_scores(lists):
    row = rows_of(lists)[0]
    wins = [sum(p > q for q in row["phi"]) for p in row["phi"]]
    phi, scores = torch.tensor(row["phi"]), torch.tensor([row["scores"]["clip"]])
    sft = losses.list_weights("sft", phi, scores)
    assert sft.tolist() == pytest.approx([w / max(1, sum(wins)) for w in wins])
    weighted = losses.list_weights("weighted", phi, scores)
    assert weighted.tolist() == pytest.approx([max(0, x) / 4 for x in row["scores"]["clip"]])


def test_what_an_objective_lacks_is_said_before_anything_is_loaded(lists):
    rows = [{"phi": [1.0, 0.0], "scores": {"clip": [-1.0, 0.2]}, "prompt": "", "file_names": []}] * 2
    scores = lambda says, **more: fails(lambda _: check_scores(config(data="x", **more), rows), [], *says)
    scores(["list 1", "hpsv2.1", "--weight_by", "every list has clip"], loss="weighted")
    scores(["--weight_by clip", "50%", "not positive"], loss="weighted", weight_by="clip")
    check = lambda says, **options: fails(lambda _: rankdpo.check_options(config(**options)), [], *says)
    check(["--ref_refresh", "rankdpo"], ref_refresh=5, loss="dro")
    check(["--sampler_refresh", "dro"], sampler_refresh=5, loss="sft")


def test_captions_are_dropped_once_a_list_for_both_networks(lists, tiny, monkeypatch):
    """From (seed, position, list) alone, about p of them, never on held-out lists."""
    pipe = pipelines.load_pipeline(tiny / "sdxl")
    nothing = pipelines.encode_nothing(pipe, "cpu", torch.float32)
    assert not nothing["embeds"].any() and not nothing["pooled"].any()  # SDXL's guidance has zeros
    item = {name: torch.ones_like(t) for name, t in nothing.items()} | {"time_ids": torch.ones(6)}
    monkeypatch.setattr("lib.lists.read_cached", lambda _, n: dict(item, latents=torch.zeros(4, 4, 8, 8)))
    labels = rankdpo.Labels(torch.zeros(1, 4, 4), torch.ones(1, 4, dtype=torch.bool))

    def dropped(positions, p):
        cfg = config(caption_dropout=p)
        data = rankdpo.Data(None, labels, pipe.scheduler, nothing, "cpu", torch.float32)
        cond = rankdpo.load_batch(cfg, data, [(position, 0) for position in positions]).cond
        embeds = cond["embeds"]
        assert cond["time_ids"].all() and all((image == image.flatten()[0]).all() for image in embeds)
        return embeds.flatten(1)[:, 0].view(-1, 4) == 0  # (B, K)

    some = dropped(range(200), 0.2)
    assert (some == some[:, :1]).all() and 20 < some[:, 0].sum() < 60
    assert torch.equal(dropped(range(100, 200), 0.2), some[100:]) and not dropped(range(50), None).any()
    assert not dropped([rankdpo.HELD_OUT] * 3, 0.99).any()
    sd15 = pipelines.load_pipeline(tiny / "sd15")
    assert pipelines.encode_nothing(sd15, "cpu", torch.float32)["embeds"].any()  # an encoded ""


def test_accuracy_by_time_is_binned_by_sigma(lists, tiny, monkeypatch):
    """After draw and shift, and of held-out lists' accuracy the average's, where there is one."""
    metrics = {name: torch.zeros(4) for name in rankdpo.METRICS}
    metrics["accuracy"], metrics["time"] = torch.tensor([[0, 1, 1, 0], [0.05, 0.95, 1.0, 0.94]])
    by_time = rankdpo.summarise([metrics])["accuracy_by_time"]
    assert by_time[0] == 0 and by_time[9] == pytest.approx(2 / 3) and np.isnan(by_time[1:9]).all()
    pipe = pipelines.load_pipeline(tiny / "sd3")
    monkeypatch.setattr("lib.lists.read_cached", lambda _, n: {"latents": torch.zeros(2, 4, 8, 8)})
    labels = rankdpo.Labels(torch.zeros(1, 2, 2), torch.ones(1, 2, dtype=torch.bool))
    data = rankdpo.Data(None, labels, pipe.scheduler, {}, "cpu", torch.float32)
    batch = rankdpo.load_batch(config(), data, [(p, 0) for p in range(9)])
    assert torch.equal(batch.time, batch.t[::2] / 1000) and batch.time.unique().numel() == 9
    sigma = (batch.x_t / batch.target).flatten(1).mean(1)[::2]  # x = 0: x_t = sigma eps, target = eps
    assert torch.allclose(batch.time, sigma, atol=1e-5)


@pytest.mark.parametrize("more", [(), ("--lora_rank", 2)])
def test_held_out_accuracy_is_the_averages(lists, tiny, tmp_path, monkeypatch, more):
    """With a decay that keeps the first weights for ever, s stays 0 and accuracy 1/2; training does not."""
    copy = engine.copy_weights
    still = lambda policy, into, share=1.0: copy(policy, into) if share == 1 else None
    monkeypatch.setattr(engine, "copy_weights", still)
    args = ("--holdout", 0.5, "--eval_every", 1, "--lr", "1e-2", "--global_batch_size", 5, *more)
    log = train(lists, tiny, tmp_path / "ema", "--ema", 0.9, *args)
    assert [r["held_out_accuracy"] for r in log[1:]] == [0.5] * 3
    if more:
        return
    plain = train(lists, tiny, tmp_path / "plain", *args)
    assert plain[-1]["held_out_accuracy"] != 0.5
    drop = lambda rows: [{k: r[k] for k in ("loss", "best_s", "grad_norm")} for r in rows[1:]]
    assert drop(log) == drop(plain) == drop(log_of(tmp_path / "ema"))


DRO = "--loss dro --experts 12 --lr 1e-3 --precision fp64"


@pytest.fixture
def few(monkeypatch):
    """Paths of four steps, and a margin at which every hinge stays active."""
    monkeypatch.setattr(pipelines, "SAMPLER_STEPS", 4)
    monkeypatch.setattr(losses, "dro_loss", partial(losses.dro_loss, margin=10))


def norms(log):
    """Loss, errors and gradient norms of a run."""
    keys = ("loss", "accuracy", "best_s", "worst_s", "grad_norm")
    return np.array([[row.get(key, 0) for key in keys] for row in log[1:]])


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_the_sampling_path_is_dpm_solvers(kind):
    """Timesteps 950 + 7, 900 + 7, ... down to each image's own, as diffusers' scheduler goes through them."""
    from diffusers import DDPMScheduler, DPMSolverMultistepScheduler

    scheduler = DDPMScheduler(**pipelines.BETAS, prediction_type=kind)
    solver = DPMSolverMultistepScheduler.from_config(scheduler.config)
    levels = list(range(957, 0, -50))
    solver.set_timesteps(timesteps=levels)
    denoise = lambda x, t: torch.tanh(x) * (0.5 + t.view(-1, 1, 1, 1) / 2000)
    x = start = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    states = []
    for t in levels:
        states.append(x)
        x = solver.step(denoise(x, torch.tensor([t])), t, x).prev_sample
    u = (torch.tensor([957, 857, 407, 7]) + 0.5) / 1000
    path = rankdpo.sampling_path(scheduler, denoise, start.expand(4, -1, -1, -1), u)
    for i, place in enumerate((0, 2, 11, 19)):
        assert torch.allclose(path[i], states[place][0].double(), rtol=1e-4, atol=1e-5)


def test_the_path_of_rectified_flow_follows_its_velocity(few):
    """The first step is Euler's; straight paths end where they lead, whatever the shift."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    start, x = torch.randn(2, 4, 8, 8, dtype=torch.float64), torch.randn(2, 4, 8, 8, dtype=torch.float64)
    sigmas = pipelines.noise_levels(scheduler, (torch.tensor([1, 251, 501, 751]) + 0.5) / 1000, "uniform")[1]
    u = (torch.tensor([501, 1]) + 0.5) / 1000
    path = rankdpo.sampling_path(scheduler, lambda z, t: torch.sin(z), start, u)
    assert torch.allclose(path[0], start[0] + (sigmas[2] - sigmas[3]) * torch.sin(start[0]), atol=1e-5)
    straight = rankdpo.sampling_path(scheduler, lambda z, t: start - x, start, u)
    clean = start - sigmas[3] * (start - x)  # where this velocity leads from the highest level
    assert torch.allclose(straight[1], clean[1] + sigmas[0] * (start - x)[1], atol=1e-5)


def test_experts_are_the_best_images_with_their_captions(capsys):
    rows = [
        dict(prompt=p, file_names=[f"{p}{i}" for i in range(3)], phi=phi, scores={"clip": scores})
        for p, phi, scores in (("a", [0.1, 1.0, 0.5], [3, 2, 1]), ("b", [1.0, 0.0, 0.6], [0, 9, 2]))
    ]
    rows = [dict(row, pictures=row["file_names"]) for row in rows]
    names = lambda **more: [r["file_names"] for r in rankdpo.expert_rows(config(**more), rows)]
    assert names(experts=3) == [["a1"], ["b0"], ["b2"]] and "3 of 6 pictures" in capsys.readouterr().out
    assert names(experts=2, expert_by="clip") == [["b1"], ["a0"]]
    assert rankdpo.expert_rows(config(experts=2), rows)[0]["prompt"] == "a"
    cfg = config(loss="dro", expert_by="mps", data="x")
    fails(lambda _: check_scores(cfg, rows), [], "--expert_by mps", "list 1")


def test_a_picture_of_several_lists_is_one_expert():
    """As in Pick-a-Pic, where one picture stands in many pairs; with another caption it is another expert."""
    scores = {"a.png": 0.9, "b.png": 0.5, "c.png": 0.4, "d.png": 0.3}
    pairs = [("p", "a.png", "b.png"), ("p", "a.png", "c.png")]
    pairs += [("p", "d.png", "a.png"), ("q", "a.png", "d.png")]
    rows = []
    for prompt, *pair in pairs:
        values = {"pickscore": [scores[name] for name in pair]}
        rows.append(dict(prompt=prompt, file_names=pair, pictures=pair, phi=[1.0, 0.0], scores=values))

    def names(**more):
        return [(r["prompt"], *r["file_names"]) for r in rankdpo.expert_rows(config(**more), rows)]

    assert names(experts=3) == [("p", "a.png"), ("q", "a.png"), ("p", "b.png")]  # by the reward that is there
    assert len(names(experts=9)) == 6
    assert len(names(experts=3, expert_by="phi")) == 3  # the three that won a pair
    says = ("--expert_by phi", "3 pictures tie", "2 are wanted", "name a reward")
    fails(lambda _: names(experts=2, expert_by="phi"), [], *says)


@pytest.mark.parametrize("model,lora", [("sd3", 0), ("sd15", 2)])
def test_negatives_have_no_gradient_while_their_sampler_is_the_policy(
    lists, tiny, tmp_path, model, lora, monkeypatch, few
):
    """Right after a refresh the policy's errors on negatives are exactly 0, and so is their gradient: the
    errors are squares. A step later neither is."""
    list_loss, seen = rankdpo.list_loss, []

    def noted(cfg, policy_err, ref_err, batch):
        if policy_err.requires_grad:
            seen.append(policy_err.detach())
        return list_loss(cfg, policy_err, ref_err, batch)

    monkeypatch.setattr(rankdpo, "list_loss", noted)
    args = f"--sampler_refresh 2 --lora_rank {lora} --images_per_forward 3"
    log = train(lists, tiny, tmp_path, DRO, args, model=model)
    assert log[1]["loss"] == pytest.approx(10, abs=1e-12) and log[1]["accuracy"] == 0.5
    first, second, third = seen
    assert (first[:, 1] == 0).all() and (third[:, 1] == 0).all() and (second[:, 1] > 0).all()
    assert all((err[:, 0] > 0).all() for err in seen) and log[2]["worst_s"] != 0


def test_a_sampler_that_is_always_the_policy_is_warned_of(capsys):
    rankdpo.check_options(config(loss="dro", sampler_refresh=1))
    assert "exactly zero" in capsys.readouterr().out


@pytest.mark.parametrize("lora", [0, 2])
def test_dro_has_one_curve_and_resumes_exactly(lists, tiny, tmp_path, lora, few):
    args = f"{DRO} --sampler_refresh 2 --eval_every 2 --steps 4 --lora_rank {lora} --holdout 0.2"
    whole = train(lists, tiny, tmp_path / "whole", args, "--save_every 3")
    assert [p.name for p in (tmp_path / "whole/checkpoints").iterdir()] == ["step-000003"]
    shutil.rmtree(tmp_path / "whole/model")
    again = train(lists, tiny, tmp_path / "whole", args)  # from step 3, a copy one step old
    assert np.array_equal(norms(again), norms(whole)) and norms(whole)[1, 3] != 0
    if lora:
        return
    two = train(lists, tiny, tmp_path / "two", args, processes=2)
    assert np.allclose(norms(two), norms(whole), rtol=1e-9, atol=1e-9)
    assert [r.get("held_out_accuracy") for r in two[1:]] == [r.get("held_out_accuracy") for r in whole[1:]]
