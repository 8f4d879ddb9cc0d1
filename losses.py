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
Shapes: B lists (prompts), K images a list, R rewards. Errors are *lower is better*; phi and rewards higher.

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
    rewards = _floats("rewards", rewards, 2)
    K, R = rewards.shape[-2:]
    if K < 2 or R < 1:
        shape = tuple(rewards.shape)
        raise ValueError(f"preference_probability: needs (..., K, R) with K >= 2 and R >= 1, got {shape}")
    wins = rewards.unsqueeze(-2) > rewards.unsqueeze(-3)  # (..., K, K, R), [i, j] = i beats j
    return wins.sum((-1, -2)).to(rewards) / (R * (K - 1))  # (..., K)


def preference_rank(phi):
    """tau (..., K) as floats, 1 = best. Tied images share their average rank: their order never matters."""
    phi = _floats("phi", phi, 1)
    better = (phi.unsqueeze(-2) > phi.unsqueeze(-1)).sum(-1)  # (..., K) images ahead of i
    equal = (phi.unsqueeze(-2) == phi.unsqueeze(-1)).sum(-1)  # (..., K) itself included
    return better + (equal.to(phi) + 1) / 2


def model_rank(s, phi):
    """tau (B, K) of the model's own order, the lowest s first: what LambdaLoss takes where RankDPO takes the
    labels'. Where s ties phi decides: at theta = reference every s is 0, and no pair would have a weight."""
    by_s, by_phi = preference_rank(-_floats("s", s, 2)), preference_rank(phi)
    # by s first, then by phi: different ranks by s differ by 1 or more, times K; ranks by phi by less than K
    return preference_rank(-(s.shape[-1] * by_s + by_phi))


def majority_vote(rewards, ties="drop", generator=None):
    """BalancedDPO, Sec. III-C: s_ij = sign(sum_r s_r), every reward one vote.

    rewards (..., K, R) -> (..., K, K) in {-1, 0, +1}, antisymmetric; +1 at [i, j] = more rewards prefer i.
    ties: "drop": equal scores of a reward vote for neither, an even vote stays 0 (no gradient); "random"
    tosses a coin for an even vote and needs a `generator`; "literal" takes the paper at its word for i < j:
    a reward's tie votes for i (its Eq. 6 has >=), an even vote is -1 (its "otherwise")."""
    rewards = _floats("rewards", rewards, 2)
    if ties not in ("drop", "literal", "random"):
        raise ValueError(f"majority_vote: ties must be 'drop', 'literal' or 'random', got {ties!r}")
    if ties == "random" and generator is None:
        raise ValueError("majority_vote: ties='random' needs a torch.Generator: one seed, one result")
    one, other = rewards.unsqueeze(-2), rewards.unsqueeze(-3)
    ballots = (one > other).to(rewards) - (one < other).to(rewards)  # (..., K, K, R)
    if ties == "literal":
        first = _antisymmetric(torch.ones_like(ballots[..., 0])).unsqueeze(-1)
        ballots = torch.where(ballots == 0, first, ballots)
    votes = ballots.sum(-1).sign()  # (..., K, K)
    if ties == "drop":
        return votes
    coin = -torch.ones_like(votes)
    if ties == "random":
        heads = torch.randint(0, 2, votes.shape, generator=generator, device=generator.device)
        coin = 2 * heads.to(votes) - 1
    return torch.where(votes == 0, _antisymmetric(coin), votes)


def _antisymmetric(x):
    """The upper triangle of (..., K, K), and its negative below; 0 on the diagonal."""
    return x.triu(1) - x.triu(1).transpose(-1, -2)


LABELS = ("phi", "sum", "normalized_sum", "majority", "random")  # and single:REWARD


def preference_labels(label, rewards, seed=0):
    """phi of every list of a data set: the choices of RankDPO's Table 4 and BalancedDPO's Table III.

    majority is the share of the other images that most rewards place below. All others are shares of pairwise
    wins: over every reward (phi), by their sum, by one reward (single:NAME; pass its column alone), or at
    random, which follows from (seed, place of the list) and needs no rewards: R may be 0.
    rewards: N tensors (K_n, R), lists of any lengths -> N tensors phi (K_n,) in [0, 1], fp32. ValueError for
    an unknown label, for single: with several rewards and as in preference_probability."""
    if label not in LABELS and not label.startswith("single:"):
        raise ValueError(f"preference_labels: {label!r} is none of {', '.join(LABELS)} and single:REWARD")
    if label.startswith("single:") and any(r.shape[-1] != 1 for r in rewards):
        raise ValueError(f"preference_labels: {label} needs the scores of that reward alone, (K, 1)")
    if label == "normalized_sum":  # rewards standardised over all images of the data set
        scale = torch.cat(rewards).std(0).clamp(min=1e-12)  # (R,)
        rewards = [r / scale for r in rewards]
    if label in ("sum", "normalized_sum"):
        rewards = [r.sum(-1, keepdim=True) for r in rewards]  # (K_n, 1)
    if label == "random":
        coins = [torch.Generator().manual_seed(seed * 1_000_003 + n) for n in range(len(rewards))]
        rewards = [torch.randperm(len(r), generator=g)[:, None] for r, g in zip(rewards, coins)]
    if label == "majority":
        return [(majority_vote(r) > 0).float().sum(-1) / (len(r) - 1) for r in rewards]
    return [preference_probability(r).float() for r in rewards]


# ----------------------------------------------------------------------------- weights (B, K, K)


def dpo_weights(phi):
    """(B, K) -> (B, K, K): 1 where i is preferred to j (phi_i > phi_j), else 0. Equal phi is no pair."""
    phi = _floats("phi", phi, 2)
    return (phi.unsqueeze(2) > phi.unsqueeze(1)).to(phi)


def gain_weights(phi):
    """(B, K) -> (B, K, K): |G_i - G_j|, G = 2^phi, where i is preferred to j, else 0. RankDPO Table 5."""
    gain = torch.exp2(_floats("phi", phi, 2))  # (B, K)
    return (gain.unsqueeze(2) - gain.unsqueeze(1)).abs() * dpo_weights(phi)


def dcg_weights(phi, tau=None):
    """(B, K) -> (B, K, K): Delta_ij where i is preferred to j, else 0. RankDPO Eq. 6:

        Delta_ij = |2^phi_i - 2^phi_j| |1/D(tau_i) - 1/D(tau_j)|,   D(tau) = ln(1 + tau)

    tau (B, K), 1 = best: the rank by phi, unless another is given (LambdaLoss: model_rank(s, phi)).
    phi = (1, 2/3, 1/3, 0) gives Delta_14 = .8214, the largest."""
    tau = preference_rank(_floats("phi", phi, 2)) if tau is None else tau
    discount = 1 / torch.log1p(tau)  # (B, K)
    return gain_weights(phi) * (discount.unsqueeze(2) - discount.unsqueeze(1)).abs()


def vote_weights(votes):
    """(B, K, K) votes in {-1, 0, +1} -> (B, K, K): 1 where the vote prefers i to j, else 0."""
    votes = _floats("votes", votes, 3)
    return (votes > 0).to(votes)


def direct_weights(rewards):
    """(B, K, R) -> (B, K, K): share of the rewards that strictly prefer i to j. BalancedDPO Eq. 10 with equal
    w_k: rewards that disagree pull a pair both ways, where the vote takes a side."""
    rewards = _floats("rewards", rewards, 3)
    return (rewards.unsqueeze(2) > rewards.unsqueeze(1)).to(rewards).mean(-1)


def smooth_weights(weights, eps):
    """(B, K, K) -> (B, K, K): each label is wrong with probability eps (conservative DPO, in none of the
    papers). The sum over a pair stays what it was."""
    return (1 - eps) * weights + eps * weights.transpose(1, 2)


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
    return _floats("scores", scores, 2).clamp(min=0) / scores.shape[1]


# ----------------------------------------------------------------------------- errors and the loss


def denoising_error(prediction, target):
    """(B, K, ...), (B, K, ...) -> (B, K): mean squared error over the trailing dimensions.

    fp32 BEFORE subtracting: a half-precision difference times beta = 2500 is worth .04 (fp16) to .29 (bf16)
    in the logit."""
    if prediction.shape != target.shape or prediction.dim() < 3:
        shapes = f"prediction {tuple(prediction.shape)} and target {tuple(target.shape)}"
        raise ValueError(f"denoising_error: {shapes} must be equal shapes (B, K, ...)")
    wide = _wide(prediction)
    return (prediction.to(wide) - target.to(wide)).square().flatten(2).mean(-1)


def preference_loss(policy_err, ref_err, weights, beta, mask=None, loser_weight=1.0):
    """The pairwise loss of the family (RankDPO Eq. 7; Diffusion-DPO for 0/1 weights):

        L_b = - sum_ij weights_ij log sigmoid(-beta (s_i - s_j)),   s = policy_err - ref_err, lower is better.

    policy_err, ref_err (B, K) errors (see "The scale of beta" above); weights (B, K, K), [i, j] = i is
    preferred to j; mask (B, K) True for real images, so that K may differ between lists. SUM over the pairs
    of a list, no mean over lists: -> loss (B,), metrics. The gradient goes through policy_err only.
    loser_weight scales the gradient through the less preferred image of each pair, and no value: 1 is the
    papers' loss. Below 1 the loser's error may not be raised at the price of the winner's; Diffusion-SDPO
    (arXiv 2511.03317) computes such a factor for every pair.

    Metrics are detached, one number a list, (B,), so that a list counts once however many pairs it has:
    accuracy (share of its preferred pairs, those with more weight one way, that s orders rightly, ties 1/2),
    best_s and worst_s (s of the image with most weight won and of the one with most weight lost), weight (of
    all pairs over the number of preferred ones), unweighted (share of its pairs without a preference). NaN
    where a list has no preferred pair; the caller reduces."""
    policy_err, ref_err, weights, real = _inputs("preference_loss", policy_err, ref_err, weights, 3, mask)
    if not beta > 0:
        raise ValueError(f"preference_loss: beta must be positive, got {beta}")
    s = policy_err - ref_err  # (B, K)                                                                Eq. 5
    loser = s.detach() + loser_weight * (s - s.detach())  # (B, K), the value of s
    margin = s.unsqueeze(2) - loser.unsqueeze(1)  # (B, K, K), s_i - s_j
    loss = -(weights * F.logsigmoid(-beta * margin)).sum((1, 2))  # (B,)                              Eq. 7
    with torch.no_grad():
        used = weights > weights.transpose(1, 2)  # (B, K, K)
        right = (margin < 0).to(s) + 0.5 * (margin == 0).to(s)
        count = used.sum((1, 2))  # (B,), 0 / 0 is NaN below
        net = weights.sum(2) - weights.sum(1)  # (B, K), weight won minus weight lost; 0 for padding
        images = real.sum(1)
        metrics = {
            "accuracy": (right * used).sum((1, 2)) / count,
            **_ends(s, net, real, count > 0),
            "weight": weights.sum((1, 2)) / count,
            "unweighted": 1 - count / (images * (images - 1) / 2).clamp(min=1),
        }
    return loss, metrics


def finetuning_loss(policy_err, ref_err, weights, mask=None):
    """Weighted fine-tuning (RankDPO Table 5, SFT and weighted): L_b = sum_i weights_i policy_err_i.

    policy_err, ref_err, weights, mask (B, K) -> loss (B,), metrics as those of preference_loss; there are no
    pairs, so accuracy and unweighted are NaN. The reference is looked at for the metrics only."""
    policy_err, ref_err, weights, real = _inputs("finetuning_loss", policy_err, ref_err, weights, 2, mask)
    loss = (weights * policy_err).sum(1)  # (B,)
    with torch.no_grad():
        nan = torch.full_like(loss, float("nan"))
        ends = _ends(policy_err - ref_err, weights, real, weights.sum(1) > 0)
        metrics = {"accuracy": nan, **ends, "weight": weights.sum(1) / real.sum(1), "unweighted": nan}
    return loss, metrics


def dro_loss(expert_err, expert_ref_err, negative_err, negative_ref_err, margin=0.001):
    """Diffusion-DRO: an expert's image against a state on the sampling path of (a copy of) the policy:

        L_b = max(0, margin + s_expert - s_negative),   s = policy error - reference error, lower is better.

    All (B,): the expert's are denoising errors of its noised latent; the negative's are those of x_t on the
    path, with the noise that the copy predicts there as a detached target. -> loss (B,), metrics as those of
    preference_loss; weight is 1 where the hinge passes a gradient, unweighted where it does not. While the
    copy IS the policy, negative_err and its gradient are exactly 0: the negative only gates the hinge."""
    errs = [_floats("err", e, 1) for e in (expert_err, expert_ref_err, negative_err, negative_ref_err)]
    if errs[0].dim() != 1 or any(e.shape != errs[0].shape for e in errs):
        raise ValueError(f"dro_loss: errors {[tuple(e.shape) for e in errs]} must be equal shapes (B,)")
    expert_s, negative_s = errs[0] - errs[1].detach(), errs[2] - errs[3].detach()  # (B,)
    loss = F.relu(margin + expert_s - negative_s)  # (B,)
    with torch.no_grad():
        accuracy = (expert_s < negative_s).to(loss) + 0.5 * (expert_s == negative_s).to(loss)
        active = (loss > 0).to(loss)
        metrics = dict(accuracy=accuracy, best_s=expert_s.detach(), worst_s=negative_s.detach())
    return loss, {**metrics, "weight": active, "unweighted": 1 - active}


def _ends(s, value, real, listed):
    """s (B, K) of the real images whose value (B, K) is largest in the list, and smallest; NaN where the list
    is not `listed` (B,)."""
    inf = float("inf")
    best = s.gather(1, value.masked_fill(~real, -inf).argmax(1, keepdim=True))[:, 0]
    worst = s.gather(1, value.masked_fill(~real, inf).argmin(1, keepdim=True))[:, 0]
    nan = torch.full_like(best, float("nan"))
    return {"best_s": torch.where(listed, best, nan), "worst_s": torch.where(listed, worst, nan)}


def rankdpo_loss(policy_err, ref_err, phi, beta):
    """RankDPO (Eq. 7) for (B, K) errors and preference probabilities phi (B, K) -> loss (B,), metrics."""
    return preference_loss(policy_err, ref_err, dcg_weights(phi), beta)


def dpo_loss(policy_err, ref_err, beta):
    """Diffusion-DPO for pairs, (B, 2) errors, winner first -> loss (B,), metrics."""
    if policy_err.shape[-1] != 2:
        shape = tuple(policy_err.shape)
        raise ValueError(
            f"dpo_loss: K must be 2, winner first, got {shape}; use dpo_weights for longer lists"
        )
    phi = torch.tensor([[1.0, 0.0]]).to(ref_err).expand_as(ref_err)
    return preference_loss(policy_err, ref_err, dpo_weights(phi), beta)


# ----------------------------------------------------------------------------- checks


def _wide(x):
    """fp32, unless the input is wider."""
    return torch.promote_types(x.dtype, torch.float32) if x.is_floating_point() else torch.float32


def _floats(name, x, dim):
    """A floating tensor of at least `dim` dimensions, in fp32 or wider; NaN only in errors, which pass it on
    to the loss. ValueError otherwise."""
    if not isinstance(x, torch.Tensor) or x.dim() < dim:
        got = tuple(x.shape) if isinstance(x, torch.Tensor) else type(x).__name__
        raise ValueError(f"{name}: expected a tensor of at least {dim} dimensions, got {got}")
    x = x.to(_wide(x))
    if name not in ("policy_err", "ref_err", "err") and torch.isnan(x).any():
        raise ValueError(f"{name}: contains NaN; drop or rescore those images first")
    return x


def _inputs(caller, policy_err, ref_err, weights, dim, mask):
    """Errors (B, K), the reference's without gradient, and weights (B, K) or (B, K, K), all 0 where the mask
    (B, K) says that there is no image; and that mask."""
    policy_err, ref_err = _floats("policy_err", policy_err, 2), _floats("ref_err", ref_err, 2)
    if policy_err.dim() != 2 or ref_err.shape != policy_err.shape:
        shapes = f"policy_err {tuple(policy_err.shape)} and ref_err {tuple(ref_err.shape)}"
        raise ValueError(f"{caller}: {shapes} must be equal shapes (B, K)")
    weights, (B, K) = _floats("weights", weights, dim), policy_err.shape
    if weights.shape != (wanted := (B, K, K)[:dim]):
        raise ValueError(f"{caller}: weights {tuple(weights.shape)} must be {wanted} for errors {(B, K)}")
    if mask is not None and mask.shape != (B, K):
        raise ValueError(f"{caller}: mask {tuple(mask.shape)} must be (B, K) = {(B, K)}")
    real = torch.ones_like(policy_err, dtype=torch.bool) if mask is None else mask.bool()
    used = real if dim == 2 else real.unsqueeze(2) & real.unsqueeze(1)
    policy_err, ref_err = (err.masked_fill(~real, 0) for err in (policy_err, ref_err.detach()))
    return policy_err, ref_err, weights.masked_fill(~used, 0), real
