"""The maths of losses.py: golden numbers, a slow double loop, limits, symmetries, errors. Under 10 seconds.

pytest -q test_losses.py
"""

import math

import pytest
import torch

from losses import (
    dcg_weights,
    denoising_error,
    dpo_loss,
    dpo_weights,
    gain_weights,
    majority_vote,
    preference_loss,
    preference_probability,
    preference_rank,
    rankdpo_loss,
    vote_weights,
)

PHI = torch.tensor([[1.0, 2 / 3, 1 / 3, 0.0]])


def rand(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def slow_delta(phi):
    """Eq. 6 as the paper writes it, for one list, with plain floats."""
    K, out = len(phi), {}
    rank = [1 + sum(q > p for q in phi) + (sum(q == p for q in phi) - 1) / 2 for p in phi]
    for i in range(K):
        for j in range(K):
            if phi[i] > phi[j]:
                discount = abs(1 / math.log(1 + rank[i]) - 1 / math.log(1 + rank[j]))
                out[i, j] = abs(2 ** phi[i] - 2 ** phi[j]) * discount
    return out


# ---- labels


def test_preference_probability_is_the_share_of_strict_wins():
    rewards = torch.tensor([[3.0, 1.0], [2.0, 2.0], [1.0, 3.0], [0.0, 0.0]])  # (K, R)
    assert preference_probability(rewards).tolist() == pytest.approx([4 / 6, 4 / 6, 4 / 6, 0])
    tied = torch.tensor([[1.0], [1.0], [0.0]])
    assert preference_probability(tied).tolist() == pytest.approx([0.5, 0.5, 0])  # a tie is a win for neither


def test_preference_probability_against_a_double_loop():
    r = torch.randint(0, 4, (5, 6, 3), generator=torch.Generator().manual_seed(1)).float()
    phi = preference_probability(r)
    for b in range(5):
        for i in range(6):
            wins = sum(bool(r[b, i, n] > r[b, j, n]) for n in range(3) for j in range(6) if j != i)
            assert phi[b, i].item() == pytest.approx(wins / (3 * 5))


def test_preference_rank_averages_ties():
    assert preference_rank(torch.tensor([1.0, 0.0, 0.5])).tolist() == [1, 3, 2]
    assert preference_rank(torch.tensor([0.5, 1.0, 0.5, 0.0])).tolist() == [2.5, 1, 2.5, 4]
    assert preference_rank(torch.tensor([0.2, 0.2])).tolist() == [1.5, 1.5]


def test_majority_vote():
    r = torch.tensor([[1.0, 1.0, 0.0], [0.0, 0.0, 1.0], [0.0, 5.0, 1.0]])  # (K = 3, R = 3)
    v = majority_vote(r)
    assert v.tolist() == [[0, 1, -1], [-1, 0, -1], [1, 1, 0]]  # 2:1; 1:2; 0:1, a tie votes for neither
    assert torch.equal(v, -v.T)


def test_majority_vote_ties():
    even = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [-1.0, -1.0]]])  # images 0 and 1 split 1:1, both beat 2
    assert majority_vote(even)[0, 0, 1] == 0
    literal = majority_vote(even, "literal")[0]
    assert literal[0, 1] == -1 and literal[1, 0] == 1 and literal[0, 2] == 1
    assert literal.diagonal().abs().sum() == 0
    tosses = [majority_vote(even, "random", torch.Generator().manual_seed(s))[0] for s in range(40)]
    assert {t[0, 1].item() for t in tosses} == {-1, 1} and all(torch.equal(t, -t.T) for t in tosses)
    assert all(t[0, 2] == 1 for t in tosses)  # a clear vote is never tossed


# ---- weights


def test_golden_dcg_weights():
    d = dcg_weights(PHI)[0]
    gold = {(0, 1): 0.2197, (0, 2): 0.5339, (0, 3): 0.8214, (1, 2): 0.0619, (1, 3): 0.1697, (2, 3): 0.0260}
    for (i, j), value in gold.items():
        assert d[i, j].item() == pytest.approx(value, abs=5e-5) and d[j, i] == 0
    assert d.sum().item() == pytest.approx(1.8325, abs=5e-5)


def test_weights_against_a_double_loop():
    rewards = torch.randint(0, 3, (20, 5, 2), generator=torch.Generator().manual_seed(2))
    phi = preference_probability(rewards.float())
    d, g, o = dcg_weights(phi), gain_weights(phi), dpo_weights(phi)
    for b in range(20):
        p, slow = phi[b].double().tolist(), slow_delta(phi[b].double().tolist())
        for i in range(5):
            for j in range(5):
                assert d[b, i, j].item() == pytest.approx(slow.get((i, j), 0), abs=1e-6)
                assert o[b, i, j].item() == float(p[i] > p[j])
                gain = abs(2 ** p[i] - 2 ** p[j]) * (p[i] > p[j])
                assert g[b, i, j].item() == pytest.approx(gain, abs=1e-6)


def test_vote_weights_keep_the_winner_side():
    assert vote_weights(torch.tensor([[[0, 1], [-1, 0]]])).tolist() == [[[0, 1], [0, 0]]]


# ---- the loss


def test_golden_loss_at_the_reference():
    err = rand(1, 4).square()
    for beta in (1.0, 2500.0):
        loss, m = rankdpo_loss(err, err, PHI, beta)
        assert loss.item() == pytest.approx(1.2702, abs=5e-5)  # sum of weights x ln 2, whatever beta is
        assert m["accuracy"] == 0.5 and m["best_s"] == 0 and m["worst_s"] == 0


@pytest.mark.parametrize("weights", [dcg_weights, dpo_weights, gain_weights])
def test_loss_is_sum_of_weights_times_ln2_at_the_reference(weights):
    phi, err = torch.rand(6, 5, generator=torch.Generator().manual_seed(3)), rand(6, 5).square()
    w = weights(phi)
    loss, _ = preference_loss(err, err, w, 500.0)
    assert torch.allclose(loss, w.sum((1, 2)) * math.log(2), atol=1e-6)


def test_loss_against_a_double_loop():
    B, K, beta = 7, 5, 3.0
    policy, ref = rand(B, K, dtype=torch.float64).square(), rand(B, K, seed=1, dtype=torch.float64).square()
    phi = torch.rand(B, K, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    phi[0, :2] = phi[0, 2]  # ties
    loss, _ = rankdpo_loss(policy, ref, phi, beta)
    for b in range(B):
        s = (policy - ref)[b].tolist()
        slow = 0
        for (i, j), delta in slow_delta(phi[b].tolist()).items():
            slow -= delta * math.log(1 / (1 + math.exp(beta * (s[i] - s[j]))))
        assert loss[b].item() == pytest.approx(slow, rel=1e-10)


def test_two_images_are_dpo_times_the_gain():
    policy, ref = rand(8, 2).square(), rand(8, 2, seed=1).square()
    phi = torch.tensor([[1.0, 0.0]]).expand(8, 2)
    rank, dpo = rankdpo_loss(policy, ref, phi, 2.0)[0], dpo_loss(policy, ref, 2.0)[0]
    factor = 1 / math.log(2) - 1 / math.log(3)  # |2 - 1| |1/D(1) - 1/D(2)| = .5325
    assert factor == pytest.approx(0.5325, abs=5e-5)
    assert torch.allclose(rank, factor * dpo, atol=1e-6)
    s = policy - ref
    assert torch.allclose(dpo, -torch.nn.functional.logsigmoid(-2.0 * (s[:, 0] - s[:, 1])), atol=1e-6)


def test_gradient_lowers_the_winner_and_raises_the_loser():
    err = rand(1, 4).square().requires_grad_()
    rankdpo_loss(err, err.detach().clone(), PHI, 10.0)[0].sum().backward()
    assert err.grad[0, 0] > 0 > err.grad[0, 3]  # descent subtracts it
    assert err.grad.sum().abs() < 1e-5  # only differences matter


def test_no_gradient_reaches_the_reference():
    policy, ref = rand(2, 4).square().requires_grad_(), rand(2, 4, seed=1).square().requires_grad_()
    rankdpo_loss(policy, ref, PHI.expand(2, 4), 10.0)[0].sum().backward()
    assert ref.grad is None and policy.grad.abs().sum() > 0


def test_permuting_the_images_changes_nothing():
    policy, ref = rand(1, 5, dtype=torch.float64).square(), rand(1, 5, seed=1, dtype=torch.float64).square()
    for phi in (torch.tensor([[1.0, 0.6, 0.6, 0.6, 0.0]]), torch.tensor([[0.5, 0.5, 0.2, 0.2, 0.9]])):
        first, m = rankdpo_loss(policy, ref, phi.double(), 5.0)
        for seed in range(5):
            p = torch.randperm(5, generator=torch.Generator().manual_seed(seed))
            again, n = rankdpo_loss(policy[:, p], ref[:, p], phi.double()[:, p], 5.0)
            assert again.item() == pytest.approx(first.item(), rel=1e-12) and n["accuracy"] == m["accuracy"]


@pytest.mark.parametrize("filler", [0.0, 1e4, float("nan")])
def test_a_mask_equals_the_shorter_list(filler):
    policy, ref = rand(1, 3).square(), rand(1, 3, seed=1).square()
    short, m = rankdpo_loss(policy, ref, PHI[:, :3], 5.0)
    w = torch.full((1, 5, 5), 7.0)
    w[:, :3, :3] = dcg_weights(PHI[:, :3])
    mask = torch.tensor([[1, 1, 1, 0, 0]])
    fill = torch.full((1, 2), filler)
    long_policy = torch.cat([policy, fill], 1).requires_grad_()
    long, n = preference_loss(long_policy, torch.cat([ref, fill * 2], 1), w, 5.0, mask)
    assert long.item() == pytest.approx(short.item(), rel=1e-6)
    for k in m:
        assert n[k].item() == pytest.approx(m[k].item(), abs=1e-6), k
    long.sum().backward()
    assert long_policy.grad.isfinite().all() and (long_policy.grad[0, 3:] == 0).all()


def test_metrics():
    phi = torch.tensor([[1.0, 0.5, 0.5, 0.0]])
    policy, ref = torch.tensor([[0.1, 0.3, 0.2, 0.5]]), torch.tensor([[0.2, 0.2, 0.2, 0.2]])
    _, m = preference_loss(policy, ref, dpo_weights(phi), 1.0)
    assert m["accuracy"] == 1
    assert m["best_s"].item() == pytest.approx(-0.1) and m["worst_s"].item() == pytest.approx(0.3)
    assert m["weight"] == 1 and m["unweighted"].item() == pytest.approx(1 / 6)  # the tied pair
    _, m = preference_loss(ref, policy, dpo_weights(phi), 1.0)
    assert m["accuracy"] == 0


def test_a_list_without_pairs_has_no_loss():
    loss, m = rankdpo_loss(rand(2, 3).square(), rand(2, 3, seed=1).square(), torch.full((2, 3), 0.5), 10.0)
    assert loss.tolist() == [0, 0] and m["accuracy"].isnan().all() and (m["unweighted"] == 1).all()


# ---- precision


def test_denoising_error_is_fp32_before_subtracting():
    target = rand(2, 3, 4, 8, 8)
    for dtype, tolerance in ((torch.float16, 2e-3), (torch.bfloat16, 2e-2)):
        low = (target + 1e-2).to(dtype)
        err = denoising_error(low, target.to(dtype))
        assert err.dtype == torch.float32 and err.shape == (2, 3) and err.isfinite().all()
        wide = (low.float() - target.to(dtype).float()).square().mean((2, 3, 4))
        assert torch.equal(err, wide)
        err = denoising_error((target * 1.1).to(dtype), target.to(dtype))
        assert torch.allclose(err, (target * 0.1).square().mean((2, 3, 4)), atol=tolerance)
    big = torch.full((1, 1, 4), 300.0, dtype=torch.float16)  # 300^2 overflows fp16
    assert denoising_error(big, torch.zeros_like(big)).item() == 90_000


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_errors_give_a_finite_loss_near_the_fp32_one(dtype):
    policy, ref = rand(4, 4).square().to(dtype), rand(4, 4, seed=1).square().to(dtype)
    loss, _ = rankdpo_loss(policy, ref, PHI.expand(4, 4).to(dtype), 2500.0)
    exact, _ = rankdpo_loss(policy.float(), ref.float(), PHI.expand(4, 4).to(dtype).float(), 2500.0)
    assert loss.dtype == torch.float32 and loss.isfinite().all() and torch.allclose(loss, exact, rtol=1e-6)


def test_gradcheck():
    ref = rand(3, 4, seed=1, dtype=torch.float64).square()
    phi = torch.rand(3, 4, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    policy = rand(3, 4, dtype=torch.float64).square().requires_grad_()
    assert torch.autograd.gradcheck(lambda p: rankdpo_loss(p, ref, phi, 2.0)[0], policy)
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1], [1, 1, 0, 0]])
    weights = gain_weights(phi)
    assert torch.autograd.gradcheck(lambda p: preference_loss(p, ref, weights, 2.0, mask)[0], policy)


# ---- errors


@pytest.mark.parametrize(
    "call",
    [
        lambda: preference_probability(torch.tensor([[float("nan")], [1.0]])),
        lambda: preference_probability(torch.ones(1, 3)),
        lambda: preference_probability(torch.ones(3)),
        lambda: preference_probability(torch.ones(3, 0)),
        lambda: preference_rank(torch.tensor(1.0)),
        lambda: preference_rank(torch.tensor([1.0, float("nan")])),
        lambda: majority_vote(torch.tensor([[float("nan")], [1.0]])),
        lambda: majority_vote(torch.ones(2, 2), "sometimes"),
        lambda: majority_vote(torch.ones(2, 2), "random"),
        lambda: dcg_weights(torch.ones(3)),
        lambda: dpo_weights(torch.tensor([[float("nan"), 1.0]])),
        lambda: vote_weights(torch.ones(2, 2)),
        lambda: denoising_error(torch.ones(1, 2, 3), torch.ones(1, 2, 4)),
        lambda: denoising_error(torch.ones(2, 3), torch.ones(2, 3)),
        lambda: preference_loss(torch.ones(1, 3), torch.ones(1, 2), torch.ones(1, 3, 3), 1.0),
        lambda: preference_loss(torch.ones(1, 3), torch.ones(1, 3), torch.ones(1, 2, 2), 1.0),
        lambda: preference_loss(torch.ones(1, 3), torch.ones(1, 3), torch.full((1, 3, 3), float("nan")), 1.0),
        lambda: preference_loss(torch.ones(1, 3), torch.ones(1, 3), torch.ones(1, 3, 3), 0.0),
        lambda: preference_loss(
            torch.ones(1, 3), torch.ones(1, 3), torch.ones(1, 3, 3), 1.0, torch.ones(1, 2)
        ),
        lambda: dpo_loss(torch.ones(1, 3), torch.ones(1, 3), 1.0),
        lambda: preference_rank([1.0, 2.0]),
    ],
)
def test_bad_input_is_a_value_error_that_says_what(call):
    with pytest.raises(ValueError, match=r".{20,}"):
        call()
