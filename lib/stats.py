"""What scores say: means, gains, win rates, their intervals and p values. Numbers in, numbers out.

    compare({"base": {"clip": scores}, "tuned": {"clip": scores}}, tags, seed=0)     # scores (P, S)

P prompts, S seeds. A prompt that stands several times counts once: its interval is over distinct prompts.
docs/evaluation.md defines every number in words.
"""

import numpy as np
from scipy.stats import binomtest, wilcoxon

METRICS = ("toyworld", "geneval", "t2i-compbench", "dpg")  # accuracies, in [0, 1]; the first that is there


def wilson(wins, n):
    """95 % Wilson interval of a proportion."""
    interval = binomtest(wins, n).proportion_ci(confidence_level=0.95, method="wilson")
    return interval.low, interval.high


def holm(p):
    """Holm's adjustment of all p values that were looked at: below .05 together, not each by itself."""
    order = np.argsort(p)
    scaled = np.asarray(p)[order] * np.arange(len(p), 0, -1)
    return np.maximum.accumulate(np.minimum(scaled, 1))[np.argsort(order)].tolist()


def category_mean(values, tags):
    """Mean over categories of the mean in each; values (..., P), one a prompt."""
    tags = np.array(tags)
    return np.mean([values[..., tags == t].mean(-1) for t in dict.fromkeys(tags)], axis=0)


def paired_gain(base, mine, tags, seed, n=2000):
    """Gain of mine over base, (P,) means a prompt: the interval resamples prompts within categories; p is
    Wilcoxon's, two-sided, which drops prompts without a difference."""
    difference, tags, samples = mine - base, np.array(tags), []
    rng = np.random.default_rng(seed)
    for tag in dict.fromkeys(tags):
        members = difference[tags == tag]
        samples.append(members[rng.integers(len(members), size=(n, len(members)))].mean(-1))  # (n,)
    low, high = np.percentile(np.mean(samples, axis=0), [2.5, 97.5]).tolist()
    changed = difference[mine != base]
    p = float(wilcoxon(changed).pvalue) if len(changed) else 1.0
    gain = float(category_mean(difference, tags))
    return dict(gain=gain, low=low, high=high, p=p, n=len(mine))


def typical(change, tags, count=2):
    """Places of `count` prompts of each category, in their order: those whose change (P,) is nearest to the
    category's median, the first of equals. Pictures chosen so show what the numbers say."""
    chosen, tags = [], np.array(tags)
    for tag in dict.fromkeys(tags.tolist()):
        members = np.flatnonzero(tags == tag)
        off = abs(change[members] - np.median(change[members]))
        chosen += sorted(members[np.argsort(off, kind="stable")[:count]].tolist())
    return chosen


def win_rate(mine, base):
    """How often one is strictly higher; (P,) a score a prompt. p: two-sided sign test, without the ties."""
    wins, losses, n = int((mine > base).sum()), int((mine < base).sum()), len(mine)
    low, high = wilson(wins, n)
    p = float(binomtest(wins, wins + losses).pvalue) if wins + losses else 1.0
    return dict(wins=wins, ties=n - wins - losses, losses=losses, n=n, rate=wins / n, low=low, high=high, p=p)


def distinct(keys):
    """Keys (P,) -> the place of each among the distinct ones (P,), and the distinct ones in their order."""
    found = {key: n for n, key in enumerate(dict.fromkeys(keys))}
    return np.array([found[key] for key in keys]), list(found)


def by_prompt(s, places):
    """Scores (P, S) -> mean and best of each distinct prompt, both (P',). places (P,): which one it is."""
    best = np.full(places.max() + 1, -np.inf)
    np.maximum.at(best, places, s.max(1))
    return np.bincount(places, s.mean(1)) / np.bincount(places), best


def compare(scores, tags, seed, prompts=None):
    """{model: {reward: (P, S)}} -> {model: means, means by category, spread over all images; against each
    earlier model and reward the gain, the win rate of the best seed and of the mean over seeds}. tags (P,)
    categories, prompts (P,) texts, where some stand several times."""
    results, tests = {}, {"gain": [], "best": [], "mean": []}
    every_key = list(zip(tags, range(len(tags)) if prompts is None else prompts))
    judged = {}  # (P,) false for prompts of a category for which a benchmark has no scorer here
    for reward in next(iter(scores.values())):
        judged[reward] = ~np.isnan([of_model[reward] for of_model in scores.values()]).any((0, 2))
    for name, by_reward in scores.items():
        result = dict(means={}, categories={}, spread={}, against={other: {} for other in results})
        for reward, s in by_reward.items():
            if not judged[reward].any():
                continue
            keys = [every_key[i] for i in np.flatnonzero(judged[reward])]
            places, found = distinct(keys)
            s, tags = s[judged[reward]], np.array([tag for tag, _ in found])
            per_prompt, best = by_prompt(s, places)
            means = {t: float(per_prompt[tags == t].mean()) for t in dict.fromkeys(tags.tolist())}
            result["means"][reward] = float(category_mean(per_prompt, tags))
            result["categories"][reward] = means
            spread = dict(mean=s.mean(), min=s.min(), max=s.max(), std=s.std())
            result["spread"][reward] = {key: float(value) for key, value in spread.items()}
            for other in results:
                base, base_best = by_prompt(scores[other][reward][judged[reward]], places)
                pair = {"gain": paired_gain(base, per_prompt, tags, seed)}
                if reward != "diversity":  # there is no best seed of it
                    pair["best"], pair["mean"] = win_rate(best, base_best), win_rate(per_prompt, base)
                result["against"][other][reward] = pair
                for kind, test in pair.items():
                    tests[kind].append(test)
        results[name] = result
    for family in tests.values():
        for test, p in zip(family, holm([test["p"] for test in family])):
            test.update(p_holm=p, comparisons=len(family))
    return results


def entropy(share):
    """Bits of a distribution; share (..., C) adds up to 1."""
    return -(share * np.log2(np.where(share > 0, share, 1))).sum(-1)
