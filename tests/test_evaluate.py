"""evaluate.py: statistics against hand-made ones, a comparison from end to end, what it resumes and refuses,
a blind study."""

import base64
import io
import json
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import PROMPTS, fails, rewards
from PIL import Image
from test_kills_synpic import killed_at

import evaluate
import rewards as scorers
from lib import answers, draw, pictures, pipelines, stats
from toy import diversity, world


def command(tiny, out, *more, models=("base={}/sdxl", "same={}/sdxl", "other={}/sd15"), seeds=2):
    """Ten prompts in GenEval's form, the exact checker and two rewards (clip brings diversity)."""
    prompts = out.parent / "held.jsonl"
    rows = [{"prompt": p, "tag": world.grammar()[p]["tag"]} for p in PROMPTS]
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    first = ["--models", *(m.format(tiny) for m in models), "--prompts", prompts, "--out", out]
    scored = ["--rewards", "toyworld", *rewards(tiny)[::2], "--batch_size", 4]
    return [str(a) for a in (*first, *scored, "--seeds", seeds, "--steps", 2, "--guidance", 2, *more)]


@pytest.fixture(scope="module")
def compared(tiny, tmp_path_factory):
    """Three models compared; nobody writes into that folder."""
    out = tmp_path_factory.mktemp("compared") / "out"
    evaluate.main(command(tiny, out))
    return out


def results(out):
    return json.loads((out / "results.json").read_text())


def data_of(page):
    text = page.read_text()
    return json.loads(text.split('id="data">')[1].split("</script>")[0])


def test_wilson_interval_golden():
    low, high = stats.wilson(233, 297)  # 78.45 % of 297, BalancedDPO's Pick-a-Pic row
    assert (round(low, 3), round(high, 3)) == (0.734, 0.827)


def test_holm_golden():
    assert stats.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert stats.holm([0.5, 0.9]) == [1.0, 1.0]


def test_scores_become_win_rates_and_gains():
    tags = ["x", "x", "y"]
    scores = {
        "a": {"r": np.array([[0.0, 1.0], [0.0, 0.0], [2.0, 2.0]])},
        "b": {"r": np.array([[2.0, 0.0], [0.0, 0.0], [0.0, 1.0]])},
    }
    r = stats.compare(scores, tags, 0)["b"]
    pair = r["against"]["a"]["r"]
    wins = {k: pair["best"][k] for k in ("wins", "ties", "losses", "n")}
    assert wins == dict(wins=1, ties=1, losses=1, n=3) and pair["best"]["p"] == 1
    assert pair["mean"]["wins"] == 1 and pair["mean"]["ties"] == 1  # 1 above .5, 0 = 0, .5 below 2
    gain = pair["gain"]
    assert r["means"]["r"] == pytest.approx((0.5 + 0.5) / 2)
    assert gain["gain"] == pytest.approx((0.25 - 1.5) / 2) and gain["low"] <= gain["gain"] <= gain["high"]
    assert r["spread"]["r"] == pytest.approx(dict(mean=0.5, min=0, max=2, std=np.std([2, 0, 0, 0, 0, 1])))


def test_p_values_see_what_is_there_and_nothing_else():
    rng = np.random.default_rng(0)
    base = rng.normal(size=(60, 1))
    scores = {"a": {"r": base}, "b": {"r": base + 0.5}, "c": {"r": base + 0.01 * rng.normal(size=(60, 1))}}
    r = stats.compare(scores, ["all"] * 60, 0)
    better, none = r["b"]["against"]["a"]["r"], r["c"]["against"]["a"]["r"]
    assert better["gain"]["p"] == pytest.approx(1.6e-11, rel=1)
    assert better["best"]["p"] == pytest.approx(2 / 2**60)
    assert none["gain"]["p"] > 0.05 and none["best"]["p"] > 0.05
    assert better["gain"]["comparisons"] == 3 and better["gain"]["p_holm"] > better["gain"]["p"]


def test_entropy_of_free_colours():
    same, even = np.zeros((5, 6)), np.ones((5, 6)) / 6
    same[:, 2] = 1
    r = diversity.colour_entropy({"even": even, "same": same}, world.COLORS, seed=0)
    assert r["even"]["bits"] == pytest.approx(np.log2(6)) and r["same"]["bits"] == pytest.approx(0, abs=1e-9)
    assert r["same"]["change"]["gain"] == pytest.approx(-np.log2(6)) and r["same"]["share"]["blue"] == 1


def test_distance_among_right_pictures_is_compared_where_both_have_two():
    apart = {"base": np.array([0.5, np.nan, 0.3]), "tuned": np.array([0.4, 0.2, np.nan])}
    r = diversity.compare_right(apart, 0)
    assert r["base"] == dict(mean=pytest.approx(0.4), n=2, change=None)
    assert r["tuned"]["mean"] == pytest.approx(0.3) and r["tuned"]["change"]["n"] == 1
    assert r["tuned"]["change"]["gain"] == pytest.approx(-0.1)


def test_right_distances_leave_wrong_pictures_out(tiny, compared):
    files = [f"00003/samples/000{s}.png" for s in range(2)]
    pictures = evaluate.Pictures("", f"{compared}/base", [(PROMPTS[3], files)] * 2, {})
    scorer = scorers.load_reward(f"diversity={tiny}/rewards/clip")
    found = diversity.right_distances(scorer, pictures, np.array([[1.0, 1.0], [1.0, 0.0]]))
    stored = results(compared)["scores"]["base"]["diversity"][3][0]
    assert found[0] == pytest.approx(stored, abs=2e-6) and np.isnan(found[1])


def test_typical_prompts_have_their_categorys_median_change():
    change = np.array([4, 0, 1, -2, 3, 3])
    assert stats.typical(change, ["x", "x", "x", "x", "y", "y"], count=1) == [1, 4]  # median .5 and 3
    assert stats.typical(change, ["x", "x", "x", "x", "y", "y"]) == [1, 2, 4, 5]


def test_diversity_is_the_mean_pairwise_distance(tiny, compared):
    files = [compared / f"base/00003/samples/000{s}.png" for s in range(2)]
    spec = f"diversity={tiny}/rewards/clip"
    e = scorers.load_reward(spec)(files, [PROMPTS[3]] * 2)  # (2, D)
    stored = np.array(results(compared)["scores"]["base"]["diversity"][3])
    assert stored == pytest.approx(1 - (e[0] @ e[1]).item(), abs=2e-6) and stored[0] == stored[1]
    assert stored[0] > 1e-3
    same = [files[0]] * 2
    rows = [("a", [str(f) for f in same])]
    assert list(answers.stream_rows(scorers.load_reward(spec), "/", rows, {0}, 4))[0][1][0][0] < 1e-6


def test_three_models_are_compared(tiny, compared):
    r = results(compared)
    first, *points = r["headline"]["points"]
    assert r["headline"]["what"] == "accuracy" and first["gain"] is None and first["model"] == "base"
    assert points[0]["gain"]["gain"] == 0 and points[1]["change"]["n"] == len(PROMPTS)
    assert points[1]["value"] == r["models"]["other"]["means"]["toyworld"]
    assert pictures.read_image(compared / "frontier.png").width > 300
    base, same, other = (r["models"][n] for n in ("base", "same", "other"))
    pair = same["against"]["base"]["pickscore"]
    assert base["means"] == same["means"] and pair["best"]["ties"] == len(PROMPTS)
    assert pair["gain"]["gain"] == 0 and pair["gain"]["p"] == 1
    assert set(other["against"]) == {"base", "same"} and set(other["means"]) == set(r["scores"]["base"])
    w = other["against"]["base"]["pickscore"]["best"]
    assert w["wins"] + w["ties"] + w["losses"] == w["n"] == len(PROMPTS)
    assert w["low"] <= w["rate"] <= w["high"]
    gain = other["means"]["pickscore"] - base["means"]["pickscore"]
    assert other["against"]["base"]["pickscore"]["gain"]["gain"] == pytest.approx(gain)
    report = (compared / "report.md").read_text()
    places = [report.index(w) for w in ("accuracy, exact checker", "CLIP distance", "other over base")]
    assert places == sorted(places)
    assert r["config"]["seeds"] == 2 and r["torch"] == torch.__version__ and (compared / "grid.png").is_file()
    a, b = ((compared / name / "00000/samples/0001.png").read_bytes() for name in ("base", "same"))
    assert a == b  # the same noise, whatever the name


def test_the_page_holds_every_score_and_thumbnails_only(compared):
    data, r = data_of(compared / "report.html"), results(compared)
    assert [row["prompt"] for row in data["rows"]] == r["prompts"]
    assert data["models"] == ["base", "same", "other"]
    scores = r["scores"]["other"]["pickscore"]
    place = data["rewards"].index("pickscore")
    assert [row["scores"][2][place] for row in data["rows"]] == pytest.approx(np.mean(scores, 1), abs=1e-4)
    source = data["rows"][4]["pictures"][2][1].removeprefix("data:image/webp;base64,")
    shown = Image.open(io.BytesIO(base64.b64decode(source))).convert("RGB")
    drawn = Image.open(compared / "other/00004/samples/0001.png").convert("RGB")
    assert np.array_equal(shown, drawn)  # tiny ones keep every pixel
    assert "http" not in (compared / "report.html").read_text()  # it opens offline


def test_a_prompt_cannot_break_the_page(tmp_path):
    data = {"rows": [{"prompt": "</script><img src=x>"}], "setting": "<b>", "tables": ["<u>"]}
    for template in ("report.html", "study.html"):
        evaluate.write_page(tmp_path / "page.html", template, data)
        text = (tmp_path / "page.html").read_text()
        assert data_of(tmp_path / "page.html") == data and "innerHTML" not in text  # all of it is set as text
        assert not any(word in text for word in ("<u>", "<img src=x", json.dumps(data)[:20] + "</"))


@pytest.mark.skipif(not Path("/usr/bin/chromium").is_file(), reason="no chromium here")
def test_the_page_sorts_and_filters_in_a_browser(compared, tmp_path):
    r = results(compared)
    of = lambda name: np.mean(r["scores"][name]["clip"], 1)
    difference, tags = of("other") - of("base"), np.array(r["tags"])

    def shown(state):
        browser = ["/usr/bin/chromium", "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom"]
        page = f"file://{compared}/report.html#reward=clip&a=other&b=base&{state}"
        more = [f"--user-data-dir={tmp_path}", "--virtual-time-budget=2000", page]
        dom = subprocess.run([*browser, *more], capture_output=True, text=True, timeout=120).stdout
        return [h2.split(" <small")[0] for h2 in dom.split("<article><h2>")[1:]]

    assert shown("order=worst") == [r["prompts"][i] for i in np.argsort(difference)]
    assert shown("order=up&reward=none&a=nobody&tag=x") == r["prompts"]  # what is not there does not count
    counting = np.flatnonzero(tags == "counting")
    best = counting[np.argsort(-difference[counting])]
    assert shown("order=best&tag=counting") == [r["prompts"][i] for i in best]


def test_more_models_and_seeds_draw_only_what_is_new(tiny, compared, tmp_path, monkeypatch):
    out, drawn, generate_each = tmp_path / "out", [], draw.generate_each
    shutil.copytree(compared, out)

    def noted(pipe, prompts, seeds, settings):
        drawn.extend((settings["name"], settings["seed"]) for _ in prompts)
        return generate_each(pipe, prompts, seeds, settings)

    monkeypatch.setattr(draw, "generate_each", noted)
    elsewhere = f"elsewhere={compared}/other"  # a folder of pictures in the place of a model
    models = ("base={}/sdxl", "other={}/sd15", elsewhere, "third={}/sd3")
    evaluate.main(command(tiny, out, models=models))
    assert set(drawn) == {("third", 1234), ("third", 1235)} and len(drawn) == 2 * len(PROMPTS)
    r = results(out)["scores"]
    assert r["elsewhere"] == r["other"] == results(compared)["scores"]["other"]
    drawn.clear()
    evaluate.main([*command(tiny, out, models=models[:2], seeds=3), "--stages", "draw"])
    assert set(drawn) == {("base", 1236), ("other", 1236)}


REPORT = ("report.md", "report.html", "grid.png")


def content(out):
    """All that a report is made of, but for the folder's own name."""
    return [(out / name).read_bytes() for name in REPORT], {**results(out), "config": None}


def test_killed_at_many_moments_it_comes_to_the_same_report(tiny, tmp_path):
    args = command(tiny, tmp_path / "whole", "--limit", 3, models=("base={}/sdxl", "other={}/sd15"))
    evaluate.main(args)
    out, last, kills = tmp_path / "out", 1, 0
    args = [str(out) if a == str(tmp_path / "whole") else a for a in args]
    while killed_at(last, args, out, evaluate.main):
        kills += 1
        last += 53  # every 53rd moment: within a picture, between rows of scores, within the report
        evaluate.main(args)
        assert content(out) == content(tmp_path / "whole")
        shutil.rmtree(out)
    assert kills >= 2


def test_parts_draw_and_score_what_one_process_does(tiny, compared, tmp_path):
    args = command(tiny, tmp_path / "out")
    for part in (1, 0):
        evaluate.main([*args, "--shard", f"{part}/2"])
    evaluate.main([*args, "--stages", "report"])
    assert content(tmp_path / "out") == content(compared)


def noted(tiny, out, monkeypatch, *more, models, seeds=1):
    """What a run would draw, [(name, steps, guidance, resolution, seed of the noise, prompt)]."""
    drawn, white = [], Image.new("RGB", (32, 32), "white")

    def note(pipe, prompts, noises, settings):
        how = [settings[key] for key in ("name", "steps", "guidance", "resolution")]
        drawn.extend((*how, noise, prompt) for noise, prompt in zip(noises, prompts))
        return [(white, None)] * len(prompts)

    monkeypatch.setattr(draw, "generate_each", note)
    evaluate.main([*command(tiny, out, *more, models=models, seeds=seeds), "--stages", "draw"])
    return drawn


def test_each_model_may_have_its_own_sampling(tiny, tmp_path, monkeypatch, capsys):
    models = ("base={}/sdxl", "turbo={}/sdxl,steps=1,guidance=0,resolution=64x32")
    drawn = noted(tiny, tmp_path / "out", monkeypatch, "--limit", 2, models=models)
    how = {name: rest for name, *rest in ((d[0], *d[1:4]) for d in drawn)}
    assert how == {"base": [2, 2.0, 0], "turbo": [1, 0.0, "64x32"]}
    noises = lambda name: {d[5]: d[4] for d in drawn if d[0] == name}
    assert noises("base") == noises("turbo") and len(noises("base")) == 2
    args = command(tiny, tmp_path / "out", models=("base={}/sdxl", "t={}/sdxl,seed=1"))
    fails(evaluate.main, args, "same noise", capsys=capsys)


def test_repeats_of_a_prompt_have_noises_of_their_own(tiny, tmp_path, monkeypatch):
    row = dict(tag="counting", include=[{"class": "bench", "count": 2}], prompt="two benches")
    other = dict(row, prompt="two chairs", include=[{"class": "chair", "count": 2}])
    path = tmp_path / "repeats.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in (row, other, row, row)))
    more = ("--bench", "geneval", "--prompts", path, "--rewards", rewards(tiny)[0])
    models = ("base={}/sdxl", "other={}/sd15")
    drawn = noted(tiny, tmp_path / "out", monkeypatch, *more, models=models)
    noises = [d[4] for d in drawn if d[0] == "base"]
    assert len(set(noises)) == 4 and noises == [d[4] for d in drawn if d[0] == "other"]
    assert noises[0] == pipelines.noise_seed("two benches", "", 1234)  # the first is as without repeats


def test_intervals_are_over_distinct_prompts():
    rng = np.random.default_rng(0)
    scores = {name: {"r": rng.normal(size=(6, 2))} for name in "ab"}
    prompts, tags = ["x", "y", "x", "z", "x", "y"], ["t", "t", "t", "u", "t", "t"]
    found = stats.compare(scores, tags, 0, prompts)["b"]["against"]["a"]["r"]
    merge = lambda s: np.array([np.resize(s[of].reshape(-1), 12) for of in ([0, 2, 4], [1, 5], [3])])
    merged = stats.compare({n: {"r": merge(of["r"])} for n, of in scores.items()}, ["t", "t", "u"], 0)
    for kind, of in merged["b"]["against"]["a"]["r"].items():
        assert found[kind] == pytest.approx(of) and of["n"] == 3


def test_the_log_beside_a_model_says_its_drift(tmp_path):
    head = dict(device="NVIDIA A100", world=8, config=dict(global_batch_size=1024, data=str(tmp_path)))
    rows = [dict(step=n, lists_per_s=10.0) for n in range(400)]
    rows[199]["held_out_best_s"], rows[399]["held_out_best_s"] = 0.002, -0.004
    (tmp_path / "summary.json").write_text('{"images": 232000}')
    log = tmp_path / "log.jsonl"
    log.write_text("".join(json.dumps(row) + "\n" for row in (head, *rows)) + '{"step": 400, "held_out_b')
    found = evaluate.training(f"some/base+{tmp_path}/model-000200")
    assert found["drift"] == 0.002 and found["Images"] == 232000
    assert found["GPU days"] == pytest.approx(200 * 1024 / 10 * 8 / 86400)
    assert evaluate.training(f"{tmp_path}/model")["drift"] == -0.004
    log.write_text("not a log\n")
    assert not any(map(evaluate.training, (f"{tmp_path}/model", "", "hub/model")))


def test_without_an_accuracy_the_rewards_vote():
    a, b = np.array([[0.0, 0.0], [1.0, 1.0]]), np.array([[1.0, 2.0], [1.0, 1.0]])
    scores = {"a": {"clip": a, "pick": a}, "b": {"clip": b, "pick": -b}}
    first = evaluate.headline(scores, stats.compare(scores, ["x"] * 2, 0), ["x"] * 2, 0)
    assert first["what"] == "preferred by 2 rewards"
    values = [p["value"] for p in first["points"]]
    assert values == [0.5, pytest.approx(((1 + 0) / 2 + (0.5 + 0) / 2) / 2)]
    assert first["points"][1]["diversity"] is None


def test_pictures_of_other_programs_are_found(tmp_path):
    rows = [dict(prompt="a", tag="anime", index=0), dict(prompt="b", tag="photo", index=3)]
    find = lambda name, seeds: evaluate.benchmarks.pictures_from_elsewhere(name, tmp_path, rows, seeds)
    assert find("hpdv2", 1) == (None, "metadata.jsonl or pictures/00000/0.png or anime/00000.jpg")
    for file in ("00001/samples/00001.png", "photo/00003.jpg"):
        (tmp_path / file).parent.mkdir(parents=True)
        (tmp_path / file).write_bytes(b"x")
    assert find("geneval", 2)[0][1] == ["00001/samples/00000.png", "00001/samples/00001.png"]
    assert find("hpdv2", 1)[0] == [["anime/00000.jpg"], ["photo/00003.jpg"]]
    assert find("hpdv2", 2)[0] is None  # it has one picture a prompt


def test_links_out_of_a_folder_of_pictures_are_refused(tiny, compared, tmp_path, capsys):
    shutil.copytree(compared / "other", tmp_path / "theirs")
    file = tmp_path / "theirs/00001/samples/0000.png"
    shutil.move(file, tmp_path / "elsewhere.png")
    file.symlink_to(tmp_path / "elsewhere.png")
    (tmp_path / "theirs/metadata.jsonl").unlink()
    args = command(tiny, tmp_path / "out", models=("base={}/sdxl", f"theirs={tmp_path}/theirs"))
    fails(evaluate.main, args, "theirs", "00001/samples/0000.png", "a link out of the folder", capsys=capsys)


def test_columns_and_subsets_of_prompts(tiny, tmp_path, monkeypatch, capsys):
    path, keep = tmp_path / "bench.csv", tmp_path / "keep.txt"
    path.write_text("Text,Kind\na red circle,Colors\ntwo squares,Counting\na cross,Other\n")
    keep.write_text("a cross\na red circle\n")
    more = ["--prompts", path, "--field", "Text", "--tag", "Kind", "--keep", keep]
    more += ["--rewards", rewards(tiny)[0]]
    models = ("base={}/sdxl", "other={}/sd15")
    drawn = noted(tiny, tmp_path / "out", monkeypatch, *more, models=models)
    assert [d[5] for d in drawn if d[0] == "base"] == ["a red circle", "a cross"]
    args = command(tiny, tmp_path / "out", *more)
    keep.write_text("a cross\na horse\n")
    fails(evaluate.main, args, "1 of 2 prompts", "'a horse'", capsys=capsys)


def test_markdown_shows_any_text_as_it_is():
    table = evaluate.markdown(["<b>", "a|b"], [["bold", "line\nbreak `x` [y](z) *i*"]])
    assert "<b>" not in table and "&lt;b&gt;" in table and "a\\|b" in table and "bold" in table
    assert "line break \\`x\\` \\[y\\](z) \\*i\\*" in table and table.count("\n") == 4


def test_a_grid_keeps_proportions_and_says_what_it_cannot_write(tmp_path):
    wide = Image.new("RGB", (64, 32), "red")
    rows = [("a prompt " * 40 + "\u4e2d\u6587", [(wide, "rankdpo right")] * 3)]
    pictures.picture_grid(rows, tmp_path / "g.png", side=96)
    pixels = np.array(Image.open(tmp_path / "g.png"))
    assert not (pixels == pictures.GREEN).all(-1).any()
    red = (pixels == (255, 0, 0)).all(-1)
    assert red.any(0).sum() == 3 * 96 and red.any(1).sum() == 48  # 2 to 1, as it is
    assert pictures.in_font("red \u4e2d\u6587 circle") == "red [2 CJK] circle"
    assert pictures.in_font("Ёж") == "Ёж"
    assert pictures.in_font("a \U0001f53a") == "a [1 SYMBOL]"


def test_a_right_picture_has_a_green_frame(tmp_path):
    red = Image.new("RGB", (32, 32), "red")
    pictures.picture_grid([("row", [(red, "", True), (red, "", False)])], tmp_path / "g.png", side=96)
    green = (np.array(Image.open(tmp_path / "g.png")) == pictures.GREEN).all(-1)
    assert green.sum() == 102**2 - 96**2 and not green[:, 120:].any()


def test_sentences_that_the_checker_does_not_know_are_named(tiny, tmp_path, capsys):
    (tmp_path / "real.txt").write_text("a horse on the moon\n")
    args = command(tiny, tmp_path / "out", "--prompts", tmp_path / "real.txt")
    fails(evaluate.main, args, "a horse on the moon", capsys=capsys)


def test_other_settings_are_refused_by_name(tiny, compared, tmp_path, capsys):
    shutil.copytree(compared, tmp_path / "out")
    args = command(tiny, tmp_path / "out")
    says = ("out/base: was made with another models base_1234 steps (before 2, now 3)",)
    fails(evaluate.main, [*args, "--steps", 3], *says, capsys=capsys)
    swapped = [a.replace("other=", "same2=").replace("same=", "other=") for a in args]
    fails(evaluate.main, swapped, "out/other", "another models other_1234 path", capsys=capsys)


def test_a_reward_that_fails_to_load_loses_no_picture(tiny, compared, tmp_path, capsys, monkeypatch):
    out = tmp_path / "out"
    args = [*command(tiny, out, models=("base={}/sdxl", "other={}/sd15")), "--rewards"]

    def broken(*args):
        raise ValueError("broken weights")

    monkeypatch.setitem(scorers.LOADERS, "pickscore", (broken, *scorers.LOADERS["pickscore"][1:]))
    fails(evaluate.main, [*args, *rewards(tiny)], "pickscore", "broken weights", capsys=capsys)
    monkeypatch.undo()
    monkeypatch.setattr(draw, "generate_each", broken)  # it would be named
    scorers.main(["--score", str(out / "base"), "--rewards", rewards(tiny)[2]])  # as in another environment
    evaluate.main([*args, *rewards(tiny)])
    mine, known = results(out)["scores"], results(compared)["scores"]
    assert mine["base"]["pickscore"] == pytest.approx(np.array(known["base"]["pickscore"]), abs=1e-5)


def test_missing_and_torn_pictures_are_named_and_left_out(tiny, compared, tmp_path, capsys):
    shutil.copytree(compared / "other", tmp_path / "theirs")
    (tmp_path / "theirs/00001/samples/0000.png").unlink()
    torn = tmp_path / "theirs/00005/samples/0001.png"
    torn.write_bytes(torn.read_bytes()[:600])
    models = ("base={}/sdxl", f"theirs={tmp_path}/theirs")
    shutil.copytree(compared / "base", tmp_path / "out/base")
    args = command(tiny, tmp_path / "out", models=models)
    fails(evaluate.main, args, "2 of 10 prompts", "00001/samples/0000.png", "--on_error skip", capsys=capsys)
    evaluate.main([*args, "--on_error", "skip"])
    r = results(tmp_path / "out")
    assert list(r["left_out"]) == [PROMPTS[1], PROMPTS[5]] and len(r["prompts"]) == 8
    assert "2 prompts are left out for all models" in (tmp_path / "out/report.md").read_text()
    known = results(compared)["scores"]["base"]["clip"]
    assert r["scores"]["base"]["clip"] == [s for i, s in enumerate(known) if i not in (1, 5)]


def test_a_blind_study_from_pairs_to_win_rates(tiny, compared, tmp_path, capsys):
    shutil.copytree(compared, tmp_path / "out")
    args = [*command(tiny, tmp_path / "out"), "--stages", "report"]
    evaluate.main([*args, "--study", "6"])
    key = json.loads((tmp_path / "out/key.json").read_text())
    page = (tmp_path / "out/study/index.html").read_text()
    assert len(key["pairs"]) == 12 and not any(name in page for name in ("sdxl", "sd15", "other", "key.json"))
    assert len(list((tmp_path / "out/study").glob("*.webp"))) == 24
    assert {tuple(p["models"]) for p in key["pairs"]} >= {("base", "other"), ("other", "base")}
    for pair in key["pairs"]:
        for side, file in enumerate(pair["files"], 1):
            shown = Image.open(tmp_path / f"out/study/{pair['id']}_{side}.webp").convert("RGB")
            assert np.array_equal(shown, Image.open(file).convert("RGB"))
            assert f"/{pair['models'][side - 1]}/" in file
    likes_other = {p["id"]: "12"[p["models"].index("other")] for p in key["pairs"] if "other" in p["models"]}
    ties = {p["id"]: "tie" for p in key["pairs"]}
    for name, said in (("ann", likes_other), ("bob", {**ties, **likes_other})):
        text = json.dumps({"study": key["study"], "rater": name, "answers": said})
        (tmp_path / f"{name}.json").write_text(text)
    files = ["--out", str(tmp_path / "out"), "--study_answers", str(tmp_path / "ann.json")]
    evaluate.main([*files, str(tmp_path / "bob.json")])
    r = json.loads((tmp_path / "out/study.json").read_text())
    assert r["other over base"]["votes"]["wins"] == 12 and r["other over base"]["majority"]["n"] == 6
    assert r["other over base"]["agreement"] == 1 and r["same over base"]["votes"]["ties"] == 6
    assert "other over base" in capsys.readouterr().out
    (tmp_path / "eve.json").write_text('{"study": "1", "answers": {}}')
    fails(evaluate.main, [*files, tmp_path / "eve.json"], "eve.json", "of study 1", capsys=capsys)
    shutil.copy(tmp_path / "ann.json", tmp_path / "again.json")
    twice = [*files, tmp_path / "again.json"]
    fails(evaluate.main, twice, "again.json", "a person counts once", capsys=capsys)
    for pair in key["pairs"]:
        assert len({Path(file).name for file in pair["files"]}) == 1  # one seed, so one noise
    kept = (tmp_path / "out/key.json").read_bytes()
    evaluate.main([*args, "--study", "6"])  # the same once more
    fails(evaluate.main, [*args, "--study", "5"], "another study is out", capsys=capsys)
    assert (tmp_path / "out/key.json").read_bytes() == kept


def test_agreement_golden():
    # Fleiss (1971) as in Wikipedia's example has five categories; this is the same by hand for three
    counts = np.array([[3, 0, 0], [0, 0, 3], [2, 0, 1], [1, 1, 1]])
    observed = (1 + 1 + 1 / 3 + 0) / 4
    chance = (6 / 12) ** 2 + (1 / 12) ** 2 + (5 / 12) ** 2
    assert evaluate.agreement(counts) == pytest.approx((observed, (observed - chance) / (1 - chance)))


def test_a_benchmark_stands_beside_the_papers(tiny, tmp_path, monkeypatch):
    rows = [dict(tag=world.grammar()[p]["tag"], include=[], prompt=p) for p in PROMPTS]
    (tmp_path / "evaluation_metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def judge(bench, folder, rows, files, device, batch_size, sources):
        values = np.array([[float(Path(folder).name == "other")] * len(of_row) for of_row in files])
        values[3] = np.nan  # as where a category has no judge
        return {bench: values}, [f"judged by {sources['detector']}"]

    monkeypatch.setattr(evaluate.benchmarks, "measure", judge)
    args = command(tiny, tmp_path / "out", models=("base={}/sdxl", "other={}/sd15"))
    args += ["--bench", "geneval", "--prompts", tmp_path, "--bench_models", "detector=mine", "--limit", 4]
    evaluate.main([*map(str, args), "--rewards", rewards(tiny)[0]])
    own = [*map(str, args), "--out", str(tmp_path / "own")]  # no rewards: its own metric alone
    del own[own.index("--rewards") : own.index("--rewards") + 4]
    evaluate.main(own)
    assert list(results(tmp_path / "own")["models"]["other"]["means"]) == ["geneval"]
    r, report = results(tmp_path / "out"), (tmp_path / "out/report.md").read_text()
    pair = r["models"]["other"]["against"]["base"]["geneval"]
    assert pair["gain"]["gain"] == 1 and pair["best"]["n"] == 3
    assert r["scores"]["base"]["geneval"][3] == [None] * 2
    assert "SDXL + RankDPO (paper) | 553 | 0.61 | 1.00" in report and "judged by mine" in report
    assert json.loads((tmp_path / "out/base/00002/metadata.jsonl").read_text()) == rows[2]
    assert data_of(tmp_path / "out/report.html")["rows"][3]["scores"][0][-1] is None
    # that folder is the benchmark's layout: it can be named instead of a model, but not for other prompts
    (tmp_path / "out/other/metadata.jsonl").unlink()
    again = [*map(str, args), "--rewards", rewards(tiny)[0], "--out", str(tmp_path / "again"), "--models"]
    again += [f"base={tmp_path}/out/base", f"other={tmp_path}/out/other"]
    evaluate.main(again)
    assert results(tmp_path / "again")["scores"] == r["scores"]
    (tmp_path / "evaluation_metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[::-1]))
    fails(evaluate.main, again, "other=", "of another prompt")


def test_a_metric_without_a_judge_is_left_out():
    """T2I-CompBench's spatial prompts alone: all NaN."""
    scores = {"spatial": np.full((4, 2), np.nan), "clip": np.arange(8.0).reshape(4, 2)}
    found = stats.compare({"a": scores, "b": scores}, ["x"] * 4, seed=0)
    assert found["b"]["means"] == {"clip": 3.5} and list(found["b"]["against"]["a"]) == ["clip"]


def test_a_benchmark_without_a_metric_needs_rewards(tiny, tmp_path, capsys):
    (tmp_path / "PartiPrompts.tsv").write_text("Prompt\tCategory\na cat\tAnimals\n")
    models = ["--models", f"a={tiny}/sdxl", f"b={tiny}/sd15"]
    bench = ["--bench", "parti", "--prompts", tmp_path, "--out", tmp_path / "out"]
    fails(evaluate.main, [*models, *bench], "--bench parti", "--rewards", capsys=capsys)
