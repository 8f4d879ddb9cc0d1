"""Preference losses for diffusion models, as pure functions of tensors. Copy what you need: only torch is imported.

    from losses import rankdpo_loss
    loss, metrics = rankdpo_loss(policy_err, ref_err, phi, beta=2500.)      # (B,), dict
    loss.mean().backward()

The whole family is ONE pairwise loss (`preference_loss`) with different weight matrices (B, K, K):

    DPO              dpo_weights(phi)                1 where image i is preferred to image j      Diffusion-DPO
    DPO + gain       gain_weights(phi)               |2^phi_i - 2^phi_j|                          RankDPO, Table 5
    RankDPO          dcg_weights(phi)                |2^phi_i - 2^phi_j| |1/D_i - 1/D_j|          RankDPO, Eq. 6
    BalancedDPO      vote_weights(majority_vote(r))  1 where most rewards prefer i to j           BalancedDPO, Sec. III-C

Shapes: B lists (prompts), K images a list, R rewards. Errors are *lower is better*; phi and rewards higher.

The scale of beta. Here an error is the MEAN of the squared error over C, H, W, without a factor 1/2. Then
    beta = beta_half / 2     if your code has sigmoid(-0.5 * beta_half * ...): 5000 there is 2500 here
    beta = beta_sum * D      if your code SUMS over C, H, W: D = 16,384 (SD 1.5 at 512 px), 65,536 (SDXL at 1024),
                             262,144 (SD3 at 1024)
Betas do not carry over between noise, v and velocity errors either: those differ by factors of alpha and sigma.

Papers: RankDPO and Syn-Pic, arXiv 2410.18013; BalancedDPO, arXiv 2503.12575; Diffusion-DPO, arXiv 2311.12908.
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
        raise ValueError(f"preference_probability: needs at least 2 images and 1 reward, got rewards of shape {tuple(rewards.shape)} = (..., K, R)")
    wins = rewards.unsqueeze(-2) > rewards.unsqueeze(-3)                        # (..., K, K, R), [i, j] = i beats j
    return wins.sum((-1, -2)).to(rewards) / (R * (K - 1))                       # (..., K)


def preference_rank(phi):
    """tau (..., K) as floats, 1 = best. Tied images share their average rank, so the order they come in never matters."""
    phi = _floats("phi", phi, 1)
    better = (phi.unsqueeze(-2) > phi.unsqueeze(-1)).sum(-1)                    # (..., K) images ahead of i
    equal = (phi.unsqueeze(-2) == phi.unsqueeze(-1)).sum(-1)                    # (..., K) itself included
    return better + (equal.to(phi) + 1) / 2


def majority_vote(rewards, ties="drop", generator=None):
    """BalancedDPO, Sec. III-C: s_ij = sign(sum_r s_r), every reward one vote.

    rewards (..., K, R) -> (..., K, K) in {-1, 0, +1}, antisymmetric; +1 at [i, j] = more rewards prefer i to j.
    ties: "drop" leaves an even vote 0 (no gradient); "literal" makes it -1 for i < j, as the paper's prose reads;
    "random" tosses a coin and needs a `generator`. Equal scores of one reward are a vote for neither."""
    rewards = _floats("rewards", rewards, 2)
    if ties not in ("drop", "literal", "random"):
        raise ValueError(f"majority_vote: ties must be 'drop', 'literal' or 'random', got {ties!r}")
    diff = rewards.unsqueeze(-2) - rewards.unsqueeze(-3)                        # (..., K, K, R)
    diff = torch.where(rewards.unsqueeze(-2) == rewards.unsqueeze(-3), torch.zeros_like(diff), diff)   # inf - inf
    votes = diff.sign().sum(-1).sign()                                          # (..., K, K)
    if ties == "drop":
        return votes
    if ties == "random" and generator is None:
        raise ValueError("majority_vote: ties='random' needs a torch.Generator, so that one seed gives one result")
    if ties == "random":
        coin = 2 * torch.randint(0, 2, votes.shape, generator=generator, device=generator.device).to(votes) - 1
    else:
        coin = -torch.ones_like(votes)
    upper = coin.triu(1)
    return torch.where(votes == 0, upper - upper.transpose(-1, -2), votes)


# ----------------------------------------------------------------------------- weights (B, K, K)


def dpo_weights(phi):
    """(B, K) -> (B, K, K): 1 where i is preferred to j (phi_i > phi_j), else 0. Equal phi is no pair."""
    phi = _floats("phi", phi, 2)
    return (phi.unsqueeze(2) > phi.unsqueeze(1)).to(phi)


def gain_weights(phi):
    """(B, K) -> (B, K, K): |G_i - G_j|, G = 2^phi, where i is preferred to j, else 0. RankDPO Table 5, "DPO + gain"."""
    gain = torch.exp2(_floats("phi", phi, 2))                                   # (B, K)
    return (gain.unsqueeze(2) - gain.unsqueeze(1)).abs() * dpo_weights(phi)


def dcg_weights(phi):
    """(B, K) -> (B, K, K): Delta_ij = |2^phi_i - 2^phi_j| |1/D(tau_i) - 1/D(tau_j)| where i is preferred to j, else 0.

    RankDPO Eq. 6 with D(tau) = ln(1 + tau). phi = (1, 2/3, 1/3, 0) gives Delta_14 = .8214, the largest."""
    discount = 1 / torch.log1p(preference_rank(_floats("phi", phi, 2)))         # (B, K)
    return gain_weights(phi) * (discount.unsqueeze(2) - discount.unsqueeze(1)).abs()


def vote_weights(votes):
    """(B, K, K) votes in {-1, 0, +1} -> (B, K, K): 1 where the vote prefers i to j, else 0."""
    votes = _floats("votes", votes, 3)
    return (votes > 0).to(votes)


# ----------------------------------------------------------------------------- errors and the loss


def denoising_error(prediction, target):
    """(B, K, ...), (B, K, ...) -> (B, K): mean squared error over the trailing dimensions.

    fp32 BEFORE subtracting: a half-precision difference times beta = 2500 is worth .04 (fp16) to .29 (bf16) in the logit."""
    if prediction.shape != target.shape or prediction.dim() < 3:
        raise ValueError(f"denoising_error: prediction {tuple(prediction.shape)} and target {tuple(target.shape)} must be equal shapes (B, K, ...)")
    wide = _wide(prediction)
    return (prediction.to(wide) - target.to(wide)).square().flatten(2).mean(-1)


def preference_loss(policy_err, ref_err, weights, beta, mask=None):
    """The pairwise loss of the family (RankDPO Eq. 7; Diffusion-DPO for 0/1 weights):

        L_b = - sum_ij weights_ij log sigmoid(-beta (s_i - s_j)),   s = policy_err - ref_err,   lower s is better.

    policy_err, ref_err (B, K) errors (see "The scale of beta" above); weights (B, K, K), [i, j] = i is preferred to j;
    mask (B, K) True for real images, so that K may differ between lists. SUM over the pairs of a list, no mean over
    lists: -> loss (B,), metrics. The gradient goes through policy_err only.
    Metrics, detached () tensors: accuracy (share of weighted pairs that s orders rightly, ties 1/2; NaN without a pair),
    best_s and worst_s (mean s of the image with most weight won and of the one with most weight lost), weight (mean
    over pairs that have one), unweighted (share of the pairs that have none)."""
    policy_err, ref_err, weights = _floats("policy_err", policy_err, 2), _floats("ref_err", ref_err, 2), _floats("weights", weights, 3)
    B, K = policy_err.shape
    if ref_err.shape != (B, K) or weights.shape != (B, K, K):
        raise ValueError(f"preference_loss: policy_err {(B, K)}, ref_err {tuple(ref_err.shape)} and weights {tuple(weights.shape)} "
                         "must be (B, K), (B, K), (B, K, K)")
    if mask is not None and mask.shape != (B, K):
        raise ValueError(f"preference_loss: mask {tuple(mask.shape)} must be (B, K) = {(B, K)}")
    if not beta > 0:
        raise ValueError(f"preference_loss: beta must be positive, got {beta}")
    real = torch.ones_like(policy_err, dtype=torch.bool) if mask is None else mask.bool()   # (B, K)
    pairs = real.unsqueeze(2) & real.unsqueeze(1)                               # (B, K, K)
    weights = torch.where(pairs, weights, torch.zeros_like(weights))
    s = policy_err - ref_err.detach()                                           # (B, K)                       Eq. 5
    s = torch.where(real, s, torch.zeros_like(s))                               # whatever pads a short list stays out
    margin = s.unsqueeze(2) - s.unsqueeze(1)                                    # (B, K, K), s_i - s_j
    loss = -(weights * F.logsigmoid(-beta * margin)).sum((1, 2))                # (B,)                         Eq. 7
    with torch.no_grad():
        used = weights > 0
        right = (margin < 0).to(s) + .5 * (margin == 0).to(s)
        n_pairs = (pairs.sum((1, 2)) - real.sum(1)).sum() / 2                   # unordered pairs
        net = (weights.sum(2) - weights.sum(1)).masked_fill(~real, 0)           # weight won minus weight lost
        listed = used.any(2).any(1)                                             # lists that say anything
        best, worst = net.argmax(1, keepdim=True), net.argmin(1, keepdim=True)
        metrics = {
            "accuracy": right[used].mean(),
            "best_s": s.gather(1, best)[listed].mean(),
            "worst_s": s.gather(1, worst)[listed].mean(),
            "weight": weights[used].mean(),
            "unweighted": 1 - used.sum() / n_pairs.clamp(min=1),
        }
    return loss, metrics


def rankdpo_loss(policy_err, ref_err, phi, beta):
    """RankDPO (Eq. 7) for (B, K) errors and preference probabilities phi (B, K) -> loss (B,), metrics."""
    return preference_loss(policy_err, ref_err, dcg_weights(phi), beta)


def dpo_loss(policy_err, ref_err, beta):
    """Diffusion-DPO for pairs, (B, 2) errors, winner first -> loss (B,), metrics."""
    if policy_err.shape[-1] != 2:
        raise ValueError(f"dpo_loss: K must be 2, winner first, got errors of shape {tuple(policy_err.shape)}; use dpo_weights for longer lists")
    return preference_loss(policy_err, ref_err, dpo_weights(torch.tensor([[1., 0.]]).to(ref_err).expand_as(ref_err)), beta)


# ----------------------------------------------------------------------------- checks


def _wide(x):
    """fp32, unless the input is wider."""
    return torch.promote_types(x.dtype, torch.float32) if x.is_floating_point() else torch.float32


def _floats(name, x, dim):
    """A floating tensor of at least `dim` dimensions without NaN, in fp32 or wider; ValueError otherwise."""
    if not isinstance(x, torch.Tensor) or x.dim() < dim:
        raise ValueError(f"{name}: expected a tensor of at least {dim} dimensions, got {tuple(x.shape) if isinstance(x, torch.Tensor) else type(x).__name__}")
    x = x.to(_wide(x))
    if name in ("rewards", "phi", "votes", "weights") and torch.isnan(x).any():
        raise ValueError(f"{name}: contains NaN; drop or rescore those images first")
    return x
