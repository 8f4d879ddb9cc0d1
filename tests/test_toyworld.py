"""The toy world: grammar, renderer, exact checker, and what is shipped in toy/."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from lib.pipelines import generate, load_pipeline, noise_seed
from rewards import TOY_REWARDS, load_reward
from synpic import TOY_MODELS, parse_model
from toy import build
from toy.build import TOY
from toy.world import (
    CATEGORIES,
    WORDS,
    check,
    draw,
    find_objects,
    grammar,
    held_out,
    prompts_of,
    render,
    slip,
)


def sample(n, seed):
    """n (prompt, render) a category, over the whole grammar."""
    rng, out = np.random.default_rng(seed), []
    for tag in CATEGORIES:
        options = [p for p, s in grammar().items() if s["tag"] == tag]
        out += [(p, render(p, rng)) for p in (options[rng.integers(len(options))] for _ in range(n))]
    return out


@pytest.fixture(scope="module")
def renders():
    return sample(200, seed=3)


def test_the_checker_accepts_its_own_renders(renders):
    for tag in CATEGORIES:
        passed = [check(p, image) for p, image in renders if grammar()[p]["tag"] == tag]
        assert np.mean(passed) >= 0.99, tag


def can_both_be_true(p, q):
    """Might one picture show both? "a red circle" shows "a circle" too; that is no mistake of the checker."""
    a, b = grammar()[p], grammar()[q]
    if sorted(s for s, _ in a["objects"]) != sorted(s for s, _ in b["objects"]):
        return False
    x, y = dict(a["objects"]), dict(b["objects"])
    return all(x[s] is None or y[s] is None or x[s] == y[s] for s in x)


def test_the_checker_rejects_renders_of_another_prompt():
    """Random pairs over the grammar, then pairs within each category, where the pictures are most alike."""
    rng = np.random.default_rng(4)
    for tag in (None,) + CATEGORIES:
        options = [p for p, s in grammar().items() if tag in (None, s["tag"])]
        pairs = rng.integers(len(options), size=(400, 2))
        pairs = [(options[i], options[j]) for i, j in pairs]
        wrong = [check(p, render(q, rng)) for p, q in pairs if not can_both_be_true(p, q)]
        assert len(wrong) > 200 and np.mean(wrong) <= 0.01, tag


def test_the_checker_rejects_slips(renders):
    rng = np.random.default_rng(5)
    assert np.mean([check(p, render(slip(grammar()[p], rng), rng)) for p, _ in renders]) <= 0.01


def test_the_checker_judges_relations_colours_and_numbers():
    red_left = Image.fromarray(draw([("circle", "red"), ("square", "blue")], [(8, 16), (24, 17)], [4.5, 4.5]))
    for prompt, right in (
        ("a circle left of a square", True),
        ("a square right of a circle", True),
        ("a circle right of a square", False),
        ("a circle above a square", False),
        ("a red circle and a blue square", True),
        ("a blue circle and a red square", False),
        ("a circle and a square", True),
        ("a circle", False),
        ("two circles", False),
    ):
        assert check(prompt, red_left) == right, prompt
    assert [o[:2] for o in find_objects(red_left)] == [("circle", "red"), ("square", "blue")]


def test_the_checker_on_what_is_not_of_this_world():
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (32, 32, 3), dtype=np.uint8))
    blank = Image.new("RGB", (32, 32))
    assert not check("a circle", noise) and not check("a circle", blank)
    big = render("a circle", np.random.default_rng(1)).resize((128, 128), Image.Resampling.BICUBIC)
    assert check("a circle", big)  # other sizes are brought to 32 first
    with pytest.raises(ValueError, match="not a sentence"):
        check("a horse", blank)


def test_training_and_heldout_prompts_are_disjoint():
    train, held = set(prompts_of("train", 10**6)), set(prompts_of("heldout", 10**6))
    assert not train & held and train | held == set(grammar()) and 0.1 < len(held) / len(grammar()) < 0.3
    specs = {split: [grammar()[p] for p in prompts] for split, prompts in (("train", train), ("held", held))}
    composed = ("position", "color_attr")
    cores = {split: {s["core"] for s in some if s["tag"] in composed} for split, some in specs.items()}
    assert not cores["train"] & cores["held"]  # whole meanings are unseen
    for prompts in (train, held):
        assert {grammar()[p]["tag"] for p in prompts} == set(CATEGORIES)


def test_the_tokenizer_knows_every_word():
    tok = build.make_tokenizer()
    assert all(len(tok(w).input_ids) == 3 for w in WORDS)
    assert max(len(tok(p).input_ids) for p in grammar()) <= tok.model_max_length
    assert tok.eos_token_id == len(tok) - 1  # CLIP pools at the largest id


# ---- what is shipped


def test_shipped_prompts_come_from_their_splits():
    train = (TOY / "prompts.txt").read_text().splitlines()
    rows = [json.loads(line) for line in (TOY / "heldout.jsonl").read_text().splitlines()]
    assert len(train) >= 400 and not any(held_out(p) for p in train)
    assert all(held_out(r["prompt"]) for r in rows)
    assert all(r["tag"] == grammar()[r["prompt"]]["tag"] and r["include"] for r in rows)


def test_toy_holds_safetensors_only_and_is_small():
    files = [f for f in TOY.rglob("*") if f.is_file() and f.suffix not in (".py", ".pyc")]
    assert sum(f.stat().st_size for f in files) <= 12 * 2**20
    assert {f.suffix for f in files} <= {".safetensors", ".json", ".jsonl", ".txt"}


def test_the_vae_is_no_ceiling():
    from diffusers import AutoencoderKL

    vae = AutoencoderKL.from_pretrained(TOY / "models/sdxl/vae", dtype=torch.float32)
    pairs = sample(60, seed=11)
    x = build.pixels([image for _, image in pairs])
    with torch.no_grad():
        y = vae.decode(vae.encode(x).latent_dist.mean).sample
    assert np.mean([check(p, image) for (p, _), image in zip(pairs, build.to_pil(y))]) >= 0.97


def test_shipped_generators_and_rewards_know_the_world():
    """Each generator draws most single objects; each reward mostly puts a picture above its slip."""
    prompts = [p for p, s in grammar().items() if s["tag"] == "single_object"]
    kinds = dict(sdxl="XL", sd3="3", sd15="")
    for model in {m["name"]: m for m in map(parse_model, TOY_MODELS)}.values():
        pipe = load_pipeline(model["path"])
        assert type(pipe).__name__ == f"StableDiffusion{kinds[model['name']]}Pipeline"
        results = generate(pipe, prompts, [noise_seed(p, "", 0) for p in prompts], model)
        right = [check(p, image) for p, (image, _) in zip(prompts, results)]
        assert np.mean(right) >= 0.5, model["name"]
    rng, pairs = np.random.default_rng(6), sample(40, seed=12)
    captions = [p for p, _ in pairs]
    slips = [render(slip(grammar()[p], rng), rng) for p in captions]
    for spec in TOY_REWARDS:
        score = load_reward(spec)
        assert (score([i for _, i in pairs], captions) > score(slips, captions)).float().mean() >= 0.65, spec
