"""What prompts of the toy world leave free, and how varied a model's pictures are there.

    free_choices(models, scores, scorer, seed)     # for the report of evaluate.py

An errant model looks diverse, because its errors differ: the distance among right pictures leaves them out.
"""

import numpy as np

from lib.pictures import read_image
from lib.stats import entropy, paired_gain
from toy.world import COLORS, free_colours, free_place


def free_choices(models, scores, scorer, seed):
    """What prompts of the toy world leave free, by the exact object finder: `colours`, and `places` of the
    first object (colour_entropy of both), and with diversity's scorer `right`, the distance among a prompt's
    right pictures."""
    found = dict(colours={}, places={}, right={})
    for key, of_picture, names in (("colours", free_colours, COLORS), ("places", free_place, range(9))):
        counts = {name: [] for name in models}
        for name, pictures in models.items():
            for prompt, files in pictures.rows:
                seen = [of_picture(prompt, read_image(f"{pictures.folder}/{file}")) for file in files]
                counts[name].append(np.sum(seen, axis=0))
        told = np.any(list(counts.values()), axis=(0, 2))  # (P,) whether the prompt leaves it free
        found[key] = colour_entropy({n: np.array(c)[told] for n, c in counts.items()}, names, seed)
    if scorer:
        apart = {n: right_distances(scorer, p, scores[n]["toyworld"]) for n, p in models.items()}
        found["right"] = compare_right(apart, seed)
    return found


def right_distances(scorer, pictures, passed):
    """(P,) CLIP distance among the right pictures of a prompt; nan where fewer than two are right. Among all
    pictures a model that errs looks diverse, because its errors differ."""
    found = np.full(len(passed), np.nan)
    for i, (prompt, files) in enumerate(pictures.rows):
        right = [f"{pictures.folder}/{file}" for file, ok in zip(files, passed[i]) if ok]
        if len(right) > 1:
            results = scorer.of_row(list(scorer.stream(right, [prompt] * len(right))))
            found[i] = np.mean([distance for distance, _ in results])
    return found


def compare_right(apart, seed):
    """{model: (P,)} distances, nan where a prompt has none -> {model: their mean, how many, and the change to
    the first model over the prompts that have one of both}."""
    base, results = next(iter(apart.values())), {}
    for name, values in apart.items():
        there = ~np.isnan(values)
        both, change = there & ~np.isnan(base), None
        if values is not base and both.any():
            change = paired_gain(base[both], values[both], ["all"] * both.sum(), seed)
        if there.any():
            results[name] = dict(mean=float(values[there].mean()), n=int(there.sum()), change=change)
    return results


def colour_entropy(counts, colours, seed, n=2000):
    """{model: (P', C)}, names of C colours, or of cells -> {model: entropy in bits of the colours of all, the
    share of each, and the change to the first model with a paired 95 % bootstrap interval over prompts}."""
    base, results = next(iter(counts.values())), {}
    if not base.sum() or not all(c.sum() for c in counts.values()):
        return {}
    sample = np.random.default_rng(seed).integers(len(base), size=(n, len(base)))
    bits = lambda c: entropy(c / np.maximum(c.sum(-1, keepdims=True), 1e-12))
    for name, c in counts.items():
        total, share = float(bits(c.sum(0))), dict(zip(colours, (c.sum(0) / c.sum()).tolist()))
        low, high = np.percentile(bits(c[sample].sum(1)) - bits(base[sample].sum(1)), [2.5, 97.5]).tolist()
        change = dict(gain=total - float(bits(base.sum(0))), low=low, high=high)
        results[name] = dict(bits=total, change=change, prompts=len(c), share=share)
    return results
