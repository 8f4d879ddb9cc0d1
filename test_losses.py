"""The maths of losses.py: golden numbers, a slow double loop, limits, symmetries, errors. Under 10 seconds.

pytest -q test_losses.py
"""

import math

import pytest
import torch

from lib.lists import preference_labels
from losses import (
    dcg_weights,
    denoising_error,
    direct_weights,
    dpo_loss,
    dpo_weights,
    dro_loss,
    finetuning_loss,
    gain_weights,
    majority_vote,
    preference_loss,
    preference_probability,
    preference_rank,
    rankdpo_loss,
    score_weights,
    sft_weights,
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


def test_literal_ties_are_the_printed_formulas():
    """s_k = 1 if r_k(x1) >= r_k(x2) else -1; s = 1 if sum_k s_k > 0 else -1, for every pair i < j."""
    rewards = torch.randint(0, 3, (40, 4, 4), generator=torch.Generator().manual_seed(7)).float()
    rewards[0, 0, 0] = rewards[0, 1, 0] = float("-inf")
    votes, evens = majority_vote(rewards, "literal"), 0
    for b in range(40):
        for i in range(4):
            for j in range(i + 1, 4):
                ballots = sum(1 if rewards[b, i, k] >= rewards[b, j, k] else -1 for k in range(4))
                evens += ballots == 0
                assert votes[b, i, j] == (1 if ballots > 0 else -1) == -votes[b, j, i]
    assert evens > 20
    pair = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])  # 1 : 1, and one reward that ties
    assert majority_vote(pair)[0, 1] == 0 and majority_vote(pair, "literal").tolist() == [[0, 1], [-1, 0]]
    assert votes.diagonal(dim1=1, dim2=2).abs().sum() == 0


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


def test_golden_direct_weights_and_loss():
    """BalancedDPO Eq. 10, two of three rewards for image 1, s_1 - s_2 = -.1 and beta 10:
    - 2/3 log sigmoid(1) - 1/3 log sigmoid(-1) = .6466, at the reference ln 2."""
    w = direct_weights(torch.tensor([[[1.0, 3.0, 0.0], [0.0, 2.0, 1.0]]]))
    assert torch.allclose(w, torch.tensor([[[0, 2 / 3], [1 / 3, 0]]]))
    policy, ref = torch.tensor([[0.4, 0.5]]), torch.tensor([[0.5, 0.5]])
    loss, m = preference_loss(policy, ref, w, 10.0)
    assert loss.item() == pytest.approx(0.6466, abs=5e-5) and m["accuracy"] == 1 and m["unweighted"] == 0
    assert preference_loss(ref, ref, w, 10.0)[0].item() == pytest.approx(math.log(2))
    even = direct_weights(torch.tensor([[[1.0, 0.0, 5.0], [0.0, 1.0, 5.0]]]))  # a tie prefers neither
    _, m = preference_loss(policy, ref, even, 10.0)
    assert even[0, 0, 1] == even[0, 1, 0] == torch.tensor(1 / 3) and m["unweighted"] == 1


def test_sft_weights_are_the_winners_of_all_comparisons():
    phi = torch.tensor([[1.0, 2 / 3, 1 / 3, 0.0], [0.9, 0.5, 0.5, 0.0], [0.5, 0.5, 0.5, 0.5]])
    wanted = torch.tensor([[3, 2, 1, 0], [3 * 6 / 5, 6 / 5, 6 / 5, 0], [0, 0, 0, 0]]) / 6
    assert torch.allclose(sft_weights(phi), wanted)
    assert sft_weights(torch.tensor([[0.2, 0.8]])).tolist() == [[0, 1]]
    assert score_weights(torch.tensor([[0.25, -1.0]])).tolist() == [[0.125, 0]]


def test_weights_of_ranks_that_tie_in_half_precision_are_those_of_fp32():
    phi = PHI.to(torch.bfloat16)
    assert torch.equal(dcg_weights(phi), dcg_weights(phi.float())) and dcg_weights(phi).dtype == torch.float32


def test_vote_weights_keep_the_winner_side():
    assert vote_weights(torch.tensor([[[0, 1], [-1, 0]]])).tolist() == [[[0, 1], [0, 0]]]


# ---- the loss


def test_golden_loss_at_the_reference():
    err = rand(1, 4).square()
    for beta in (1.0, 2500.0):
        loss, m = rankdpo_loss(err, err, PHI, beta)
        assert loss.item() == pytest.approx(1.2702, abs=5e-5)  # sum of weights x ln 2, whatever beta is
        assert m["accuracy"] == 0.5 and m["best_s"] == 0 and m["worst_s"] == 0


def test_a_losers_weight_scales_its_gradient_and_no_value():
    """Each image of a list is the winner of some pairs and the loser of others: slow double loop."""
    g, beta, w = torch.Generator().manual_seed(0), 3.0, 0.3
    err, ref, phi = (torch.rand(2, 4, generator=g, dtype=torch.float64) for _ in range(3))
    weights, plain, err = dcg_weights(phi), err.clone().requires_grad_(), err.requires_grad_()
    loss, _ = preference_loss(err, ref, weights, beta, loser_weight=w)
    assert torch.equal(loss, preference_loss(plain, ref, weights, beta)[0])
    loss.sum().backward()
    expected, s = torch.zeros(2, 4, dtype=torch.float64), (err - ref).detach()
    for b in range(2):
        for i in range(4):
            for j in range(4):
                slope = weights[b, i, j] * beta * torch.sigmoid(beta * (s[b, i] - s[b, j]))
                expected[b, i] += slope
                expected[b, j] -= w * slope
    assert torch.allclose(err.grad, expected)


def test_golden_hinge():
    """.001 + (.30 - .32) - (.50 - .51) < 0: no loss; .001 + (.33 - .32) - (.50 - .51) = .021."""
    policy = torch.tensor([0.30, 0.33, 0.32], dtype=torch.float64, requires_grad=True)
    negative = torch.tensor([0.50, 0.50, 0.51], dtype=torch.float64, requires_grad=True)
    refs = torch.tensor([0.32] * 3, dtype=torch.float64), torch.tensor([0.51] * 3, dtype=torch.float64)
    loss, m = dro_loss(policy, refs[0], negative, refs[1])
    assert loss.tolist() == pytest.approx([0, 0.021, 0.001], abs=1e-12)  # at the reference: the margin
    loss.sum().backward()
    assert policy.grad.tolist() == [0, 1, 1] and negative.grad.tolist() == [0, -1, -1]
    assert m["accuracy"].tolist() == [1, 0, 0.5] and m["weight"].tolist() == [0, 1, 1]
    assert m["best_s"].tolist() == pytest.approx([-0.02, 0.01, 0])


def slow_pairs(weights):
    """Gradient of the pairwise loss for plain floats: each pair pulls at both of its images."""

    def slope(s, beta, b):
        grad = [0.0] * len(s)
        for i in range(len(s)):
            for j in range(len(s)):
                pull = weights(b, i, j) * beta / (1 + math.exp(-beta * (s[i] - s[j])))
                grad[i] += pull
                grad[j] -= pull
        return grad

    return slope


def objectives(phi, rewards):
    """{name: (weights (B, K, K), the same for one pair of plain floats)}."""
    p, r = phi.tolist(), rewards.tolist()
    delta = [slow_delta(x) for x in p]
    gain = lambda b, i, j: max(0, 2 ** p[b][i] - 2 ** p[b][j])
    ballots = lambda b, i, j: sum((r[b][i][k] > r[b][j][k]) - (r[b][i][k] < r[b][j][k]) for k in range(3))
    share = lambda b, i, j: sum(r[b][i][k] > r[b][j][k] for k in range(3)) / 3
    return {
        "rankdpo": (dcg_weights(phi), lambda b, i, j: delta[b].get((i, j), 0)),
        "gain": (gain_weights(phi), gain),
        "dpo": (dpo_weights(phi), lambda b, i, j: p[b][i] > p[b][j]),
        "balanced": (vote_weights(majority_vote(rewards)), lambda b, i, j: ballots(b, i, j) > 0),
        "direct": (direct_weights(rewards), share),
    }


@pytest.mark.parametrize("name", ["rankdpo", "gain", "dpo", "balanced", "direct"])
def test_the_gradient_of_every_preference_loss_against_a_double_loop(name):
    B, K, beta = 6, 5, 3.0
    policy, ref = (rand(B, K, seed=n, dtype=torch.float64).square() for n in (8, 9))
    rewards = torch.randint(0, 4, (B, K, 3), generator=torch.Generator().manual_seed(6)).double()
    phi = preference_probability(rewards)
    weights, slow = objectives(phi, rewards)[name]
    policy.requires_grad_()
    loss, _ = preference_loss(policy, ref, weights, beta)
    (grad,) = torch.autograd.grad(loss.sum(), policy)
    for b in range(B):
        wanted = slow_pairs(slow)((policy - ref)[b].tolist(), beta, b)
        assert grad[b].tolist() == pytest.approx(wanted, rel=1e-10, abs=1e-10)


def test_the_gradients_without_pairs_against_a_loop():
    policy, ref = (rand(6, 5, seed=n, dtype=torch.float64).square() for n in (8, 9))
    scores = torch.rand(6, 5, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    for weights in (sft_weights(scores), score_weights(scores)):
        policy = policy.detach().requires_grad_()
        finetuning_loss(policy, ref, weights)[0].sum().backward()
        for b, row in enumerate(scores.tolist()):
            wins = [sum(x > y for y in row) / 10 for x in row]  # ten comparisons of five images
            wanted = wins if weights[b].sum() > 0.999 else [x / 5 for x in row]
            assert policy.grad[b].tolist() == pytest.approx(wanted, rel=1e-10)
    expert, negative = (e.detach().flatten().requires_grad_() for e in (policy, ref))
    refs = [rand(30, seed=n, dtype=torch.float64).square() for n in (1, 2)]
    dro_loss(expert, refs[0], negative, refs[1], margin=0.5)[0].sum().backward()
    for b in range(30):
        on = 0.5 + (expert[b] - refs[0][b]) - (negative[b] - refs[1][b]) > 0
        assert (expert.grad[b], negative.grad[b]) == (float(on), -float(on))
    assert 0 < expert.grad.sum() < 30


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


def test_no_gradient_reaches_the_reference_and_only_differences_matter():
    policy, ref = rand(2, 4).square().requires_grad_(), rand(2, 4, seed=1).square().requires_grad_()
    rankdpo_loss(policy, ref, PHI.expand(2, 4), 10.0)[0].sum().backward()
    assert ref.grad is None and policy.grad.abs().sum() > 0 and (policy.grad.sum(1).abs() < 1e-5).all()


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


@pytest.mark.parametrize("mask", [[1, 1, 1, 0, 0], [0, 1, 0, 1, 1]])
def test_a_masked_image_is_not_fine_tuned_on(mask):
    policy, ref, weights = (rand(1, 5, seed=seed).square() for seed in range(3))
    here = torch.tensor(mask).bool()
    short, m = finetuning_loss(policy[:, here], ref[:, here], weights[:, here])
    filled = policy.masked_fill(~here, float("nan")).requires_grad_()
    long, n = finetuning_loss(filled, ref, weights, here[None])
    assert long.item() == pytest.approx(short.item(), rel=1e-6)
    for k in ("best_s", "worst_s", "weight"):
        assert n[k].item() == pytest.approx(m[k].item(), abs=1e-6), k
    long.sum().backward()
    assert (filled.grad[:, ~here] == 0).all() and (filled.grad[:, here] != 0).all()


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
        lambda: direct_weights(torch.ones(2, 2)),
        lambda: score_weights(torch.tensor([[0.2, float("nan")]])),
        lambda: dro_loss(torch.ones(2), torch.ones(2), torch.ones(3), torch.ones(3)),
        lambda: dro_loss(*[torch.ones(2, 2)] * 4),
        lambda: denoising_error(torch.ones(1, 2, 3), torch.ones(1, 2, 4)),
        lambda: denoising_error(torch.ones(2, 3), torch.ones(2, 3)),
        lambda: preference_loss(torch.ones(1, 3), torch.ones(1, 2), torch.ones(1, 3, 3), 1.0),
        lambda: preference_loss(torch.ones(1, 3), torch.ones(1, 3), torch.ones(1, 2, 2), 1.0),
        lambda: preference_loss(torch.ones(1, 3), torch.ones(1, 3), torch.ones(1, 3, 3), 0.0),
        lambda: preference_loss(
            torch.ones(1, 3), torch.ones(1, 3), torch.ones(1, 3, 3), 1.0, torch.ones(1, 2)
        ),
        lambda: dpo_loss(torch.ones(1, 3), torch.ones(1, 3), 1.0),
        lambda: preference_rank([1.0, 2.0]),
        lambda: dcg_weights(torch.tensor([[1.0, 1.5]])),
        lambda: gain_weights(torch.tensor([[1.0, -0.5]])),
        lambda: sft_weights(torch.tensor([[1.0, 100.0]])),
        lambda: finetuning_loss(torch.ones(1, 3), torch.ones(1, 3), torch.ones(1, 2)),
        lambda: preference_loss(torch.ones(3), torch.ones(3), torch.ones(3, 3), 1.0),
        lambda: preference_labels("single:clip", [torch.ones(3, 2)]),
    ],
)
def test_bad_input_is_a_value_error_that_says_what(call):
    with pytest.raises(ValueError, match=r".{20,}"):
        call()
