"""The objectives in the trainer: what each takes from the labels, options of the objective, the average.

pytest -q tests/test_objectives.py
"""

import math

import numpy as np
import pytest
import torch
from conftest import fails, log_of, rows_of, train

import losses
import pipelines
import rankdpo

ALL = ("--steps", 1, "--global_batch_size", 10)  # the whole set of ten lists, once


def config(**more):
    return rankdpo.Config(**more)


# ----------------------------------------------------------------------------- what the labels mean


def test_every_objective_begins_where_its_weights_say(lists, tiny, tmp_path):
    rows = rows_of(lists)
    for loss in ("direct", "random_scorer"):
        log = train(lists, tiny, tmp_path / loss, "--loss", loss, *ALL)
        scores = [torch.tensor(list(row["scores"].values())) for row in rows]  # (R, K)
        if loss == "direct":
            total = sum(losses.direct_weights(s.T[None]).sum().item() for s in scores)
        else:  # position p holds the p-th list of the first epoch, and one drawn reward orders it
            lists_of_step = rankdpo.lists_of_step(config(global_batch_size=10), 0, list(range(10)))
            total = 0
            for p, n in lists_of_step:
                coin = torch.rand(2, generator=rankdpo.generator_of(config(), p, n, 1))[1].item()
                total += losses.dpo_weights(scores[n][int(coin * 3)][None]).sum().item()
        assert log[1]["loss"] == pytest.approx(total / 10 * math.log(2), rel=1e-5)
        assert log[1]["accuracy"] == 0.5 and log[1]["grad_norm"] > 0


def test_fine_tuning_weighs_by_comparisons_won_and_by_scores(lists):
    row = rows_of(lists)[0]
    wins = [sum(p > q for q in row["phi"]) for p in row["phi"]]
    sft = rankdpo.list_weights(config(loss="sft"), row, 0)
    assert sft.tolist() == pytest.approx([w / max(1, sum(wins)) for w in wins])
    weighted = rankdpo.list_weights(config(loss="weighted", weight_by="clip"), row, 0)
    assert weighted.tolist() == pytest.approx([max(0, x) / 4 for x in row["scores"]["clip"]])


def test_what_an_objective_lacks_is_said_before_anything_is_loaded(lists):
    rows = [{"phi": [1.0, 0.0], "scores": {"clip": [-1.0, 0.2]}, "prompt": "", "file_names": []}] * 2
    check = lambda says, **options: fails(
        lambda _: rankdpo.stack_labels(config(data="x", **options), rows), [], *says
    )
    check(["list 1", "hpsv2.1", "--weight_by", "every list has clip"], loss="weighted")
    check(["--weight_by clip", "50%", "not positive"], loss="weighted", weight_by="clip")
    check(["--rank_by model", "--loss rankdpo"], rank_by="model", loss="dpo")
    check(["--label_smoothing", "pairs"], label_smoothing=0.1, loss="sft")


def test_even_votes_are_counted_and_logged(lists, tiny, tmp_path):
    two = lambda a, b: {"scores": {"a": a, "b": b}}
    rows = [two([1, 0], [0, 1]), two([2, 1, 0], [0, 1, 2]), two([1, 0], [1, 0])]
    assert rankdpo.even_votes(rows) == pytest.approx(4 / 5)
    log = train(lists, tiny, tmp_path, "--loss", "balanced", "--ties", "literal", *ALL)
    assert 0 <= log[0]["even_votes"] < 1 and log[1]["unweighted"] == 0  # literal: every pair has a side


# ----------------------------------------------------------------------------- options of the objective


def test_the_models_order_weighs_padding_last():
    cfg = config(loss="rankdpo", rank_by="model", beta=2.0)
    phi = torch.tensor([[1.0, 0.5, 0.0, -1.0]])
    mask = phi >= 0
    policy, ref = torch.tensor([[0.3, 0.2, 0.1, 0.3]]), torch.zeros(1, 4)
    batch = rankdpo.Batch(None, None, None, None, mask, losses.dcg_weights(phi), phi, torch.zeros(1))
    loss, _ = rankdpo.list_loss(cfg, policy, ref, batch)
    weights = losses.dcg_weights(phi[:, :3], torch.tensor([[3.0, 2.0, 1.0]]))
    assert loss.item() == pytest.approx(
        losses.preference_loss(policy[:, :3], ref[:, :3], weights, 2.0)[0].item(), rel=1e-5
    )


def test_smoothing_and_the_winners_term_are_what_their_formulas_say():
    phi = torch.tensor([[1.0, 1.0, 0.0, -1.0]])  # two winners share the term, the last is padding
    policy, ref = torch.tensor([[0.3, 0.2, 0.1, 9.0]]).requires_grad_(), torch.zeros(1, 4)
    weights = losses.dpo_weights(phi)
    batch = rankdpo.Batch(None, None, None, None, phi >= 0, weights, phi, torch.zeros(1))
    slope = lambda **more: torch.autograd.grad(
        rankdpo.list_loss(config(loss="dpo", beta=2.0, **more), policy, ref, batch)[0].sum(), policy
    )[0]
    added = slope(sft_weight=3.0) - slope()
    assert torch.allclose(added, torch.tensor([[1.5, 1.5, 0, 0]]), atol=1e-6)
    sigmoid = lambda x: 1 / (1 + math.exp(-x))
    pulls = [0.9 * sigmoid(2 * d) - 0.1 * sigmoid(-2 * d) for d in (0.2, 0.1)]  # s_i - s_j of the two pairs
    wanted = torch.tensor([[2 * pulls[0], 2 * pulls[1], -2 * sum(pulls), 0]])
    assert torch.allclose(slope(label_smoothing=0.1), wanted, atol=1e-5)


def test_captions_are_dropped_once_a_list_for_both_networks(lists, tiny):
    """From (seed, position, list) alone, about p of them, never on held-out lists."""
    pipe = pipelines.load_pipeline(tiny / "sdxl")
    nothing = pipelines.encode_nothing(pipe, (32, 32), "cpu", torch.float32)
    assert not nothing["embeds"].any() and nothing["time_ids"].any()  # SDXL's guidance has zeros
    item = {name: torch.ones_like(t) for name, t in nothing.items()}
    read = lambda n: dict(item, latents=torch.zeros(4, 4, 8, 8))
    labels = rankdpo.Labels(torch.zeros(1, 4, 4), torch.zeros(1, 4), torch.ones(1, 4, dtype=torch.bool))

    def dropped(positions, p):
        cfg = config(caption_dropout=p)
        load = lambda some: rankdpo.load_batch(
            cfg, read, pipe.scheduler, labels, nothing, "cpu", torch.float32, some
        )
        embeds = load([(position, 0) for position in positions]).cond["embeds"]
        assert all((image == image.flatten()[0]).all() for image in embeds)
        return embeds.flatten(1)[:, 0].view(-1, 4) == 0  # (B, K)

    some = dropped(range(200), 0.2)
    assert (some == some[:, :1]).all() and 20 < some[:, 0].sum() < 60
    assert torch.equal(dropped(range(100, 200), 0.2), some[100:]) and not dropped(range(50), None).any()
    assert not dropped([rankdpo.UNSEEN] * 3, 0.99).any()
    sd15 = pipelines.load_pipeline(tiny / "sd15")
    assert pipelines.encode_nothing(sd15, (32, 32), "cpu", torch.float32)["embeds"].any()  # an encoded ""


# ----------------------------------------------------------------------------- what is measured


def test_accuracy_by_time_is_binned_by_sigma(lists, tiny, tmp_path):
    """After draw and shift, and of held-out lists' accuracy the average's, where there is one."""
    rows = torch.zeros(4, len(rankdpo.METRICS))
    rows[:, 1], rows[:, -1] = torch.tensor([0.0, 1.0, 1.0, 0.0]), torch.tensor([0.05, 0.95, 1.0, 0.94])
    by_time = rankdpo.summarise(rows)["accuracy_by_time"]
    assert by_time[0] == 0 and by_time[9] == pytest.approx(2 / 3) and np.isnan(by_time[1:9]).all()
    pipe = pipelines.load_pipeline(tiny / "sd3")
    read = lambda n: {"latents": torch.zeros(2, 4, 8, 8)}
    labels = rankdpo.Labels(torch.zeros(1, 2, 2), torch.zeros(1, 2), torch.ones(1, 2, dtype=torch.bool))
    batch = rankdpo.load_batch(
        config(), read, pipe.scheduler, labels, {}, "cpu", torch.float32, [(p, 0) for p in range(9)]
    )
    assert torch.equal(batch.time, batch.t[::2] / 1000) and batch.time.unique().numel() == 9
    sigma = (batch.x_t / batch.target).flatten(1).mean(1)[::2]  # x = 0: x_t = sigma eps, target = eps
    assert torch.allclose(batch.time, sigma, atol=1e-5)


@pytest.mark.parametrize("more", [(), ("--lora_rank", 2)])
def test_held_out_accuracy_is_the_averages(lists, tiny, tmp_path, monkeypatch, more):
    """With a decay that keeps the first weights for ever, s stays 0 and accuracy 1/2; training does not."""
    monkeypatch.setattr(rankdpo, "update_average", lambda *_: None)
    args = ("--holdout", 0.5, "--eval_every", 1, "--lr", "1e-2", "--global_batch_size", 5, *more)
    log = train(lists, tiny, tmp_path / "ema", "--ema", 0.9, *args)
    plain = train(lists, tiny, tmp_path / "plain", *args)
    assert [r["held_out_accuracy"] for r in log[1:]] == [0.5] * 3
    assert plain[-1]["held_out_accuracy"] != 0.5
    drop = lambda rows: [{k: r[k] for k in ("loss", "best_s", "grad_norm")} for r in rows[1:]]
    assert drop(log) == drop(plain) == drop(log_of(tmp_path / "ema"))
