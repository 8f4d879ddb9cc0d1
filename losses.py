"""Preference losses for diffusion models, as pure functions of tensors. To copy: it needs torch alone.

    from losses import rankdpo_loss
    loss, metrics = rankdpo_loss(policy_err, ref_err, phi, beta=2500.)      # (B,), dict
    loss.mean().backward()

The whole family is ONE pairwise loss (`preference_loss`) with different weight matrices (B, K, K):

    Diffusion-DPO              dpo_weights(phi)                1 where image i is preferred to image j
    DPO + gain (Table 5)       gain_weights(phi)               |2^phi_i - 2^phi_j|
    RankDPO (Eq. 6)            dcg_weights(phi)                |2^phi_i - 2^phi_j| |1/D_i - 1/D_j|
    BalancedDPO (Sec. III-C)   vote_weights(majority_vote(r))  1 where most rewards prefer i to j
    direct (its Eq. 10)        direct_weights(r)               share of the rewards that prefer i to j

one sum for the fine-tuning baselines (`finetuning_loss`) with weights (B, K),

    SFT (Table 5)              sft_weights(phi)                share of the list's comparisons that i wins
    weighted (Table 5)         score_weights(scores)           the score itself, of one reward

and Diffusion-DRO's hinge between an expert's image and the policy's own (`dro_loss`).
Shapes: B lists (prompts), K images per list, R rewards. Errors are *lower is better*; phi and rewards higher.

The scale of beta. Here an error is the MEAN of the squared error over C, H, W, without a factor 1/2. Then
    beta = beta_half / 2   if your code has sigmoid(-0.5 * beta_half * ...): 5000 there is 2500 here
    beta = beta_sum * D    if your code SUMS over C, H, W: D = 16,384 for SD 1.5 at 512 px, 65,536 for SDXL,
                           262,144 for SD3 at 1024 px
Betas do not carry over between noise, v and velocity errors: those differ by factors of alpha and sigma.

Papers: RankDPO and Syn-Pic, arXiv 2410.18013; BalancedDPO, arXiv 2503.12575; Diffusion-DPO, arXiv 2311.12908;
Diffusion-DRO, arXiv 2510.18353.
"""

import torch
import torch.nn.functional as F

# ----------------------------------------------------------------------------- labels


def preference_probability(rewards):
    """Share of pairwise wins (RankDPO, Algorithm 1): phi_i = #{(r, j): R_r(x_i) > R_r(x_j)} / (R (K - 1)).

    rewards (..., K, R) -> phi (..., K) in [0, 1], fp32 or wider. A tie is a win for neither image.
    ValueError if K < 2, R < 1 or a reward is NaN."""
    rewards = _scores("rewards", rewards, 2)
    K, R = rewards.shape[-2:]
    if K < 2 or R < 1:
        shape = tuple(rewards.shape)
        raise ValueError(f"preference_probability: needs (..., K, R) with K >= 2 and R >= 1, got {shape}")
    wins = rewards.unsqueeze(-2) > rewards.unsqueeze(-3)  # (..., K, K, R), [i, j] = i beats j
    return wins.sum((-1, -2)).to(rewards) / (R * (K - 1))  # (..., K)                       Algorithm 1


def preference_rank(phi, mask=None):
    """tau (..., K) as floats, 1 = best. Tied images share their average rank: their order never matters. With
    a mask (..., K) only real images, those that are True, count.

    ValueError unless phi (..., K) is in [0, 1]: all weights below are made of ranks, so labels are checked
    here, once a list, and not in the loss, where a look at a GPU's values would hold the step up."""
    if not isinstance(phi, torch.Tensor) or phi.dim() < 1:
        raise ValueError(f"phi: expected a tensor (..., K), got {phi!r:.100}")
    if not ((phi >= 0) & (phi <= 1)).all():  # also NaN
        raise ValueError("phi: must lie in [0, 1]; it is the share of an image's pairwise wins")
    real = torch.ones_like(phi, dtype=torch.bool) if mask is None else mask.bool()
    better = (real.unsqueeze(-2) & (phi.unsqueeze(-2) > phi.unsqueeze(-1))).sum(-1)  # (..., K) ahead of i
    equal = (real.unsqueeze(-2) & (phi.unsqueeze(-2) == phi.unsqueeze(-1))).sum(-1)  # (..., K) and itself
    return better + (equal.to(torch.promote_types(phi.dtype, torch.float32)) + 1) / 2


def majority_vote(rewards, ties="drop"):
    """BalancedDPO, Sec. III-C: s_ij = sign(sum_r s_r), every reward one vote.

    rewards (..., K, R) -> (..., K, K) in {-1, 0, +1}, antisymmetric; +1 at [i, j] = more rewards prefer i.
    ties: "drop": equal scores of a reward vote for neither, an even vote stays 0 (no gradient); "literal"
    takes the paper at its word for i < j: a reward's tie votes for i (its Eq. 6 has >=), an even vote is -1
    (its "otherwise")."""
    rewards = _scores("rewards", rewards, 2)
    if ties not in ("drop", "literal"):
        raise ValueError(f"majority_vote: ties must be 'drop' or 'literal', got {ties!r}")
    one, other = rewards.unsqueeze(-2), rewards.unsqueeze(-3)
    ballots = (one > other).to(rewards) - (one < other).to(rewards)  # (..., K, K, R)
    if ties == "drop":
        return ballots.sum(-1).sign()  # (..., K, K)
    ones = torch.ones_like(ballots[..., 0])
    first = ones.triu(1) - ones.tril(-1)  # +1 for i < j
    votes = torch.where(ballots == 0, first.unsqueeze(-1), ballots).sum(-1).sign()
    return torch.where(votes == 0, -first, votes)


def _scores(name, x, dim):
    """Scores, or votes, in fp32 or wider. ValueError for fewer than `dim` dimensions and for NaN."""
    if not isinstance(x, torch.Tensor) or x.dim() < dim:
        got = tuple(x.shape) if isinstance(x, torch.Tensor) else type(x).__name__
        raise ValueError(f"{name}: expected a tensor of at least {dim} dimensions, got {got}")
    if torch.isnan(x).any():
        raise ValueError(f"{name}: contains NaN; drop or rescore those images first")
    return x.to(torch.promote_types(x.dtype, torch.float32))


# ----------------------------------------------------------------------------- weights (B, K, K)


def dpo_weights(phi):
    """(B, K) -> (B, K, K): 1 where i is preferred to j (phi_i > phi_j), else 0. Equal phi is no pair."""
    tau = _ranks("dpo_weights", phi)  # (B, K)
    return (tau.unsqueeze(2) < tau.unsqueeze(1)).to(tau)


def gain_weights(phi):
    """(B, K) -> (B, K, K): |G_i - G_j|, G = 2^phi, where i is preferred to j, else 0. RankDPO Table 5."""
    preferred = dpo_weights(phi)  # (B, K, K)
    gain = torch.exp2(phi.to(preferred))  # (B, K)
    return preferred * (gain.unsqueeze(2) - gain.unsqueeze(1)).abs()


def _ranks(name, phi, mask=None):
    if not isinstance(phi, torch.Tensor) or phi.dim() != 2:
        got = tuple(phi.shape) if isinstance(phi, torch.Tensor) else type(phi).__name__
        raise ValueError(f"{name}: phi must be a tensor (B, K), got {got}")
    return preference_rank(phi, mask)


def dcg_weights(phi, mask=None):
    """(B, K) -> (B, K, K): Delta_ij where i is preferred to j, else 0. RankDPO Eq. 6:

        Delta_ij = |2^phi_i - 2^phi_j| |1/D(tau_i) - 1/D(tau_j)|,   D(tau) = ln(1 + tau),   tau = 1 is best

    phi = (1, 2/3, 1/3, 0) gives Delta_14 = .8214, the largest."""
    tau = _ranks("dcg_weights", phi, mask)  # (B, K)
    preferred = tau.unsqueeze(2) < tau.unsqueeze(1)  # (B, K, K)
    gain, discount = torch.exp2(phi.to(tau)), 1 / torch.log1p(tau)  # (B, K)
    gains = (gain.unsqueeze(2) - gain.unsqueeze(1)).abs()  # (B, K, K)
    discounts = (discount.unsqueeze(2) - discount.unsqueeze(1)).abs()
    return preferred * gains * discounts  #                                                           Eq. 6


def vote_weights(votes):
    """(B, K, K) votes in {-1, 0, +1} -> (B, K, K): 1 where the vote prefers i to j, else 0."""
    votes = _scores("votes", votes, 3)
    return (votes > 0).to(votes)


def direct_weights(rewards):
    """(B, K, R) -> (B, K, K): share of the rewards that strictly prefer i to j. BalancedDPO Eq. 10 with equal
    w_k: rewards that disagree pull a pair both ways, where the vote takes a side."""
    rewards = _scores("rewards", rewards, 3)
    return (rewards.unsqueeze(2) > rewards.unsqueeze(1)).to(rewards).mean(-1)


# ----------------------------------------------------------------------------- weights (B, K)


def sft_weights(phi):
    """(B, K) -> (B, K), sum 1: the winner of every pairwise comparison (RankDPO Table 5): four ranked images
    weigh 3 : 2 : 1 : 0, two 1 : 0. A tie gives neither image a win; a list that ties throughout weighs 0."""
    wins = dpo_weights(phi).sum(2)  # (B, K)
    return wins / wins.sum(1, keepdim=True).clamp(min=1)


def score_weights(scores):
    """(B, K) scores of one reward -> (B, K): r_i / K, so that the loss is the mean over the list of score
    times error. RankDPO Table 5 weighs by HPSv2.1 "similar to" Lee et al. (2302.12192), whose weight is the
    reward itself. A score below 0, which would make an image worse, weighs 0."""
    return _scores("scores", scores, 2).clamp(min=0) / scores.shape[1]


def list_weights(loss, phi, rewards):
    """What the labels of one list, phi (K,) and rewards (R, K), mean to an objective of rankdpo.py: weights
    of its pairs (K, K), for random_scorer those of each reward (R, K, K), for sft and weighted of its images
    (K,)."""
    phi = phi[None]  # (1, K)
    if loss == "rankdpo":
        return dcg_weights(phi)[0]
    if loss in ("dpo", "dro"):
        return dpo_weights(phi)[0]
    if loss == "gain":
        return gain_weights(phi)[0]
    if loss == "sft":
        return sft_weights(phi)[0]
    if loss == "weighted":
        return score_weights(rewards)[0]
    if loss == "direct":
        return direct_weights(rewards.T[None])[0]
    if loss == "random_scorer":
        return dpo_weights(torch.stack([preference_probability(reward[:, None]) for reward in rewards]))
    if loss == "balanced":
        return vote_weights(majority_vote(rewards.T[None]))[0]
    raise ValueError(f"list_weights: no objective is called {loss!r}")


# ----------------------------------------------------------------------------- errors and the loss


def denoising_error(prediction, target, K=None):
    """(B, K, C, h, w) or (B, K, D), both -> (B, K): mean squared error over the trailing dimensions. With K
    both are a network's flat output and its target, (B K, ...).

    ValueError for four dimensions without K: (B K, C, h, w) and packed tokens (B, K, T, D) look alike.
    fp32 BEFORE subtracting: a half-precision difference times beta = 2500 is worth .04 (fp16) to .29 (bf16)
    in the logit."""
    shapes = f"denoising_error: prediction {tuple(prediction.shape)} and target {tuple(target.shape)}"
    if K and prediction.shape == target.shape and prediction.dim() > 1 and len(prediction) % K == 0:
        prediction, target = prediction.unflatten(0, (-1, K)), target.unflatten(0, (-1, K))
    elif K or prediction.shape != target.shape or prediction.dim() < 3:
        raise ValueError(f"{shapes} must be equal shapes (B, K, ...), or with K given (B K, ...)")
    elif prediction.dim() == 4:
        raise ValueError(f"{shapes}: give K if they are (B K, C, h, w), or (B K, T, D) of (B, K, T, D)")
    wide = torch.promote_types(prediction.dtype, torch.float32)
    return (prediction.to(wide) - target.to(wide)).square().flatten(2).mean(-1)


def preference_loss(policy_err, ref_err, weights, beta, mask=None, loser_weight=1.0):
    """The pairwise loss of the family (RankDPO Eq. 7; Diffusion-DPO for 0/1 weights):

        L_b = - sum_ij weights_ij log sigmoid(-beta (s_i - s_j)),   s = policy_err - ref_err, lower is better.

    policy_err, ref_err (B, K) errors (see "The scale of beta" above); weights (B, K, K), [i, j] = i is
    preferred to j; mask (B, K) True for real images, so that K may differ between lists. SUM over the pairs
    of a list, no mean over lists: -> loss (B,), fp32 or wider, metrics (see preference_metrics). The gradient
    goes through policy_err only. ValueError for other shapes.

    loser_weight scales the gradient through the less preferred image of each pair, and no value: 1 is the
    papers' loss. Below 1 the losers' errors rise less at the price of the winners'; Diffusion-SDPO (arXiv
    2511.03317) computes such a factor for every pair."""
    B, K = policy_err.shape if policy_err.dim() == 2 else (0, 0)
    wanted = {"ref_err": (ref_err, (B, K)), "weights": (weights, (B, K, K)), "mask": (mask, (B, K))}
    for name, (x, shape) in wanted.items():
        if K < 2 or (x is not None and x.shape != shape):
            shapes = f"policy_err {tuple(policy_err.shape)}, {name} {tuple(x.shape)}"
            raise ValueError(
                f"preference_loss: errors are (B, K), weights (B, K, K), mask (B, K), got {shapes}"
            )
    if not beta > 0:
        raise ValueError(f"preference_loss: beta must be positive, got {beta}")
    wide = torch.promote_types(policy_err.dtype, torch.float32)
    real = torch.ones(B, K, dtype=torch.bool, device=ref_err.device) if mask is None else mask.bool()
    weights = weights.to(wide).masked_fill(~(real.unsqueeze(2) & real.unsqueeze(1)), 0)  # (B, K, K)

    s = policy_err.to(wide) - ref_err.detach().to(wide)  # (B, K)                                     Eq. 5
    s = s.masked_fill(~real, 0)
    loser = s.detach() + loser_weight * (s - s.detach())  # (B, K), the value of s
    margin = s.unsqueeze(2) - loser.unsqueeze(1)  # (B, K, K), s_i - s_j
    loss = -(weights * F.logsigmoid(-beta * margin)).sum((1, 2))  # (B,)                              Eq. 7
    return loss, preference_metrics(s.detach(), weights, real)


def preference_metrics(s, weights, real):
    """s (B, K), weights (B, K, K), real (B, K) -> {name: (B,)}, one number per list, so that a list counts
    once however many pairs it has. NaN where a list has no preferred pair; the caller reduces.

    accuracy: share of the preferred pairs, those with more weight one way, that s orders rightly, ties 1/2;
    best_s, worst_s: s of the image with most weight won and of the one with most weight lost;
    weight: of all pairs over the number of preferred ones; unweighted: share of pairs with no preference."""
    used = weights > weights.transpose(1, 2)  # (B, K, K)
    margin = s.unsqueeze(2) - s.unsqueeze(1)  # (B, K, K)
    right = (margin < 0).to(s) + 0.5 * (margin == 0).to(s)
    count, images = used.sum((1, 2)), real.sum(1)  # (B,); 0 / 0 is NaN below
    nan, inf = torch.full_like(s[:, 0], float("nan")), float("inf")
    net = weights.sum(2) - weights.sum(1)  # (B, K), weight won minus weight lost
    best = net.masked_fill(~real, -inf).argmax(1, keepdim=True)  # (B, 1)
    worst = net.masked_fill(~real, inf).argmin(1, keepdim=True)
    return {
        "accuracy": (right * used).sum((1, 2)) / count,
        "best_s": torch.where(count > 0, s.gather(1, best)[:, 0], nan),
        "worst_s": torch.where(count > 0, s.gather(1, worst)[:, 0], nan),
        "weight": weights.sum((1, 2)) / count,
        "unweighted": 1 - count / (images * (images - 1) / 2).clamp(min=1),
    }


def finetuning_loss(policy_err, ref_err, weights, mask=None):
    """Weighted fine-tuning (RankDPO Table 5, SFT and weighted): L_b = sum_i weights_i policy_err_i.

    policy_err, ref_err, weights, mask (B, K) -> loss (B,), metrics named as those of preference_loss. There
    are no pairs, so accuracy and unweighted are NaN. Only the metrics look at the reference."""
    if policy_err.dim() != 2 or not policy_err.shape == ref_err.shape == weights.shape:
        shapes = [tuple(x.shape) for x in (policy_err, ref_err, weights)]
        raise ValueError(f"finetuning_loss: errors and weights must be equal shapes (B, K), got {shapes}")
    wide = torch.promote_types(policy_err.dtype, torch.float32)
    real = torch.ones_like(weights, dtype=torch.bool) if mask is None else mask.bool()
    policy_err, ref_err, weights = (x.to(wide).masked_fill(~real, 0) for x in (policy_err, ref_err, weights))
    loss = (weights * policy_err).sum(1)  # (B,)

    s, nan, inf = (policy_err - ref_err).detach(), torch.full_like(loss.detach(), float("nan")), float("inf")
    best = weights.masked_fill(~real, -inf).argmax(1, keepdim=True)  # (B, 1)
    worst = weights.masked_fill(~real, inf).argmin(1, keepdim=True)
    weighed = weights.sum(1) > 0  # (B,)
    return loss, {
        "accuracy": nan,
        "best_s": torch.where(weighed, s.gather(1, best)[:, 0], nan),
        "worst_s": torch.where(weighed, s.gather(1, worst)[:, 0], nan),
        "weight": weights.sum(1) / real.sum(1),
        "unweighted": nan,
    }


def dro_loss(expert_err, expert_ref_err, negative_err, negative_ref_err, margin=0.001):
    """Diffusion-DRO: an expert's image against a state on the sampling path of (a copy of) the policy:

        L_b = max(0, margin + s_expert - s_negative),   s = policy error - reference error, lower is better.

    All (B,): the expert's are denoising errors of its noised latent; the negative's are those of x_t on the
    path, with the noise that the copy predicts there as a detached target. -> loss (B,), metrics named as
    those of preference_loss; weight is 1 where the hinge passes a gradient, unweighted where it does not.
    While the copy IS the policy, negative_err and its gradient are exactly 0: the negative only gates the
    hinge. fp32 or wider; ValueError for other shapes."""
    errs = (expert_err, expert_ref_err, negative_err, negative_ref_err)
    if expert_err.dim() != 1 or any(e.shape != expert_err.shape for e in errs):
        raise ValueError(f"dro_loss: errors {[tuple(e.shape) for e in errs]} must be equal shapes (B,)")
    wide = torch.promote_types(expert_err.dtype, torch.float32)
    expert_s = expert_err.to(wide) - expert_ref_err.detach().to(wide)  # (B,)
    negative_s = negative_err.to(wide) - negative_ref_err.detach().to(wide)
    loss = F.relu(margin + expert_s - negative_s)  # (B,)
    expert_s, negative_s, active = expert_s.detach(), negative_s.detach(), (loss > 0).to(wide)
    return loss, {
        "accuracy": (expert_s < negative_s).to(wide) + 0.5 * (expert_s == negative_s).to(wide),
        "best_s": expert_s,
        "worst_s": negative_s,
        "weight": active,
        "unweighted": 1 - active,
    }


def rankdpo_loss(policy_err, ref_err, phi, beta, mask=None):
    """RankDPO (Eq. 7) for (B, K) errors and preference probabilities phi (B, K) -> loss (B,), metrics.

    phi: the share of an image's pairwise wins, preference_probability(rewards (B, K, R)). Ranks, 1 = best,
    are one such reward: preference_probability(-rank.unsqueeze(-1)).
    beta: of errors that are MEANS, without a factor 1/2: 2500 is usual for noise and v prediction, 50 for
    rectified flow. See "The scale of beta" above for other code's numbers.
    mask (B, K): True for real images where lists differ in length; phi of the others is any of [0, 1]."""
    return preference_loss(policy_err, ref_err, dcg_weights(phi, mask), beta, mask)


def dpo_loss(policy_err, ref_err, beta):
    """Diffusion-DPO for pairs, (B, 2) errors, winner first -> loss (B,), metrics."""
    if policy_err.shape[-1] != 2:
        shape = tuple(policy_err.shape)
        raise ValueError(f"dpo_loss: K is 2, winner first, got {shape}; dpo_weights is for longer lists")
    phi = torch.tensor([[1.0, 0.0]]).to(ref_err).expand_as(ref_err)
    return preference_loss(policy_err, ref_err, dpo_weights(phi), beta)
