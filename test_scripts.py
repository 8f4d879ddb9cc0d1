"""synpic, rankdpo, evaluate and train.sh from end to end, on tiny random-weight pipelines in the real formats.

    pytest -q test_scripts.py
"""
import json
import math
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import evaluate
import rankdpo
import synpic
import toyworld

HERE = Path(__file__).resolve().parent
os.environ["CUDA_VISIBLE_DEVICES"] = ""         # the tests compare runs on the CPU, also where there is a GPU
os.environ["OMP_NUM_THREADS"] = "1"            # CPU kernels round differently on another number of threads: here every run, in this
torch.set_num_threads(1)                       # process or another, has one, so that bytes can be compared on any machine
PROMPTS = ["a red circle", "two squares", "a cross left of a circle", "a photo of a triangle", "four crosses", "a blue cross and a red circle",
           "a green square", "three circles", "a drawing of a square", "a circle above a triangle"]


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """Random-weight pipelines of three families, three rewards and a prompt file, in the layouts of the real ones."""
    from diffusers import AutoencoderKL
    root = tmp_path_factory.mktemp("tiny")
    torch.manual_seed(0)
    vae = AutoencoderKL(block_out_channels=(8, 8, 8), latent_channels=4, norm_num_groups=4, mid_block_add_attention=False,
                        down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3, sample_size=32,
                        force_upcast=False, shift_factor=.1, scaling_factor=2.)
    for name in ("sdxl", "sd3", "sd15"):
        toyworld.build_pipeline(name, vae).save_pretrained(root / name)
    for name in ("clip", "hps", "pick"):
        toyworld.save_reward(name, toyworld.build_reward(name, tok := toyworld.make_tokenizer()), tok, root / "rewards" / name)
    (root / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    return root


def rewards(tiny):
    return [f"clip={tiny}/rewards/clip", f"hpsv2.1={tiny}/rewards/hps", f"pickscore={tiny}/rewards/pick"]


def synpic_args(tiny, out, *more):
    models = [f"sdxl={tiny}/sdxl,steps=2,guidance=2", f"sdxl={tiny}/sdxl,steps=2,guidance=2,seed=1", f"sd3={tiny}/sd3,steps=2", f"sd15={tiny}/sd15,steps=2"]
    return ["--prompts", f"{tiny}/prompts.txt", "--out", str(out), "--batch_size", "4", "--models", *models, "--rewards", *rewards(tiny), *more]


@pytest.fixture(scope="session")
def lists(tiny, tmp_path_factory):
    out = tmp_path_factory.mktemp("lists") / "synpic"
    synpic.main(synpic_args(tiny, out))
    return out


def rows_of(folder):
    return [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]


def log_of(folder):
    return [json.loads(line) for line in (Path(folder) / "log.jsonl").read_text().splitlines()]


def train(lists, tiny, out, *more, model="sdxl"):
    rankdpo.main(["--data", str(lists), "--model", f"{tiny}/{model}", "--out", str(out), "--steps", "3", "--global_batch_size", "4",
                  "--warmup_steps", "0", "--device", "cpu", *map(str, more)])
    return log_of(out)


# ---- synpic


def test_synpic_writes_ranked_rows(lists):
    rows = rows_of(lists)
    assert [r["prompt"] for r in rows] == PROMPTS
    for r in rows:
        assert r["models"] == ["sdxl", "sdxl", "sd3", "sd15"] and r["seeds"] == [0, 1, 0, 0] and set(r["scores"]) == {"clip", "hpsv2.1", "pickscore"}
        for i in range(4):                                                      # phi by hand: strict wins / (3 rewards x 3 others)
            wins = sum(s[i] > s[j] for s in r["scores"].values() for j in range(4))
            assert r["phi"][i] == pytest.approx(wins / 9)
            assert r["rank"][i] == 1 + sum(p > r["phi"][i] for p in r["phi"]) + (r["phi"].count(r["phi"][i]) - 1) / 2
        images = [np.asarray(Image.open(lists / f)) for f in r["file_names"]]
        assert all(im.shape == (32, 32, 3) for im in images) and not (images[0] == images[1]).all()   # another seed, another picture
    assert (lists / "preview.png").is_file()


def test_datasets_reads_the_folder(lists, tmp_path):
    from datasets import load_dataset
    data = load_dataset("imagefolder", data_dir=str(lists), split="train", cache_dir=str(tmp_path))
    assert len(data) == len(PROMPTS) and data[0]["prompt"] == PROMPTS[0] and len(data[0]["images"]) == 4
    assert data[0]["images"][0].size == (32, 32) and data[1]["phi"] == rows_of(lists)[1]["phi"]


def test_synpic_resumes_to_the_same_bytes(lists, tiny, tmp_path):
    out = tmp_path / "again"
    shutil.copytree(lists, out)
    gone = rows_of(out)[5]["file_names"]
    (out / gone[0]).unlink(), (out / gone[2]).unlink()
    scores = out / "scores/clip.jsonl"
    scores.write_text(scores.read_text()[:-30])                                 # a torn last line
    (out / "metadata.jsonl").unlink()
    before = (out / gone[1]).stat().st_mtime_ns
    synpic.main(synpic_args(tiny, out))
    assert (out / "metadata.jsonl").read_bytes() == (lists / "metadata.jsonl").read_bytes()
    for f in gone:
        assert (out / f).read_bytes() == (lists / f).read_bytes()
    assert (out / gone[1]).stat().st_mtime_ns == before                         # what was there was left alone


def test_synpic_labels_follow_the_chosen_rewards(lists, tiny, tmp_path):
    out = tmp_path / "one"
    shutil.copytree(lists, out)
    synpic.main(synpic_args(tiny, out, "--stages", "label", "--rewards", rewards(tiny)[2]))
    for r in rows_of(out):
        assert set(r["scores"]) == {"clip", "hpsv2.1", "pickscore"} and np.argmax(r["phi"]) == np.argmax(r["scores"]["pickscore"])


# ---- rankdpo


@pytest.mark.parametrize("model", ["sdxl", "sd3", "sd15"])
def test_every_family_trains_and_loads_again(lists, tiny, tmp_path, model):
    log = train(lists, tiny, tmp_path, model=model)
    from diffusers import DiffusionPipeline
    more = dict(text_encoder_3=None, tokenizer_3=None) if model == "sd3" else dict(safety_checker=None, feature_extractor=None, image_encoder=None) if model == "sd15" else {}
    tuned = DiffusionPipeline.from_pretrained(tmp_path / "model", **more)
    base = rankdpo.load_pipeline(tiny / model)
    part, before = rankdpo.denoiser_of(base)
    after = getattr(tuned, part)
    assert type(tuned) is type(base) and any(not torch.equal(a, b) for a, b in zip(before.state_dict().values(), after.state_dict().values()))
    for key in ("vae", "text_encoder"):
        for a, b in zip(getattr(base, key).state_dict().values(), getattr(tuned, key).state_dict().values()):
            assert torch.equal(a, b)                                            # only the denoiser is trained
    assert log[0]["config"]["loss"] == "rankdpo" and log[0]["torch"] == torch.__version__ and len(log) == 4
    assert (tmp_path / "curves.png").is_file()


@pytest.mark.parametrize("loss", ["rankdpo", "dpo", "gain", "balanced"])
def test_the_first_loss_is_the_weights_times_ln2(lists, tiny, tmp_path, loss):
    log = train(lists, tiny, tmp_path, "--loss", loss, "--steps", 1, "--global_batch_size", 10)   # the whole set once
    rows = rows_of(lists)
    total = sum(rankdpo.pair_weights(loss, r, "drop", 0, n).sum().item() for n, r in enumerate(rows))
    assert log[1]["loss"] == pytest.approx(total / len(rows) * math.log(2), abs=1e-5)
    assert log[1]["accuracy"] == .5 and log[1]["best_s"] == 0 and log[1]["grad_norm"] > 0


def test_fine_tuning_lowers_the_winners_error(lists, tiny, tmp_path):
    for loss in ("sft", "weighted"):
        log = train(lists, tiny, tmp_path / loss, "--loss", loss, "--steps", 12, "--lr", 1e-3, "--global_batch_size", 10)
        assert log[-1]["best_s"] < 0 and log[1]["best_s"] == 0 and log[1]["accuracy"] is None


def test_reference_refresh_brings_the_loss_back(lists, tiny, tmp_path):
    log = train(lists, tiny, tmp_path, "--ref_refresh", 2, "--steps", 5, "--lr", 1e-3)[1:]
    assert [r["accuracy"] == .5 and r["best_s"] == 0 for r in log] == [True, False, True, False, True]


def test_reversed_labels_turn_the_gradient_around(lists, tiny, tmp_path):
    right = train(lists, tiny, tmp_path / "a", "--steps", 6, "--lr", 1e-3, "--global_batch_size", 10)[-1]
    wrong = train(lists, tiny, tmp_path / "b", "--steps", 6, "--lr", 1e-3, "--global_batch_size", 10, "--labels", "reversed")[-1]
    assert right["best_s"] < right["worst_s"] and wrong["best_s"] < wrong["worst_s"]     # each orders its own labels
    row, flipped = rows_of(lists)[0], rankdpo.relabel(rows_of(lists)[0], "reversed", 0, 0)
    assert flipped["phi"] == [1 - p for p in row["phi"]] and flipped["scores"]["clip"] == [-s for s in row["scores"]["clip"]]
    shuffled = rankdpo.relabel(row, "random", 0, 0)
    assert sorted(shuffled["phi"]) == sorted(row["phi"]) and shuffled["file_names"] == row["file_names"]


def test_the_curve_does_not_depend_on_the_micro_batch(lists, tiny, tmp_path):
    """An equality of mathematics, so it is looked at in fp64."""
    runs = [train(lists, tiny, tmp_path / str(b), "--device_batch_size", b, "--noise", "independent", "--precision", "fp64", "--lr", 1e-3) for b in (4, 1, 3)]
    for run in runs[1:]:
        for a, b in zip(runs[0][1:], run[1:]):
            assert b["loss"] == pytest.approx(a["loss"], rel=1e-9) and b["grad_norm"] == pytest.approx(a["grad_norm"], rel=1e-9)
            assert b["accuracy"] == pytest.approx(a["accuracy"], abs=1e-6)


def test_two_processes_give_the_losses_of_one(lists, tiny, tmp_path):
    one = train(lists, tiny, tmp_path / "one", "--steps", 4, "--lr", 1e-3, "--precision", "fp64")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "rankdpo.py", "--data", str(lists),
               "--model", f"{tiny}/sdxl", "--out", str(tmp_path / "two"), "--steps", "4", "--lr", "1e-3", "--precision", "fp64", "--global_batch_size", "4", "--warmup_steps", "0",
               "--device", "cpu"]
    subprocess.run(command, cwd=HERE, check=True, capture_output=True, timeout=300)
    two = log_of(tmp_path / "two")
    assert two[0]["world"] == 2 and len(two) == 5 and one[-1]["loss"] != one[1]["loss"]
    for a, b in zip(one[1:], two[1:]):
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-9)


def test_lists_of_different_length_and_resolution(lists, tiny, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(lists, data)
    rows = rows_of(data)
    for row, k in zip(rows, (2, 3, 4, 2, 4, 3, 2, 4, 4, 3)):
        for key in ("file_names", "phi", "models", "seeds", "rank"):
            row[key] = row[key][:k]
        row["scores"] = {n: s[:k] for n, s in row["scores"].items()}
    big = Image.open(data / rows[0]["file_names"][0]).resize((70, 50))
    big.save(data / rows[0]["file_names"][0])
    (data / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    log = train(data, tiny, tmp_path / "out", "--resolution", 32, "--steps", 1, "--global_batch_size", 10)
    total = sum(rankdpo.pair_weights("rankdpo", r, "drop", 0, n).sum().item() for n, r in enumerate(rows))
    assert log[1]["loss"] == pytest.approx(total / len(rows) * math.log(2), abs=1e-5)


def test_changed_images_make_a_new_cache(lists, tiny, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(lists, data, ignore=shutil.ignore_patterns(".cache"))
    train(data, tiny, tmp_path / "a", "--steps", 2)
    train(data, tiny, tmp_path / "b", "--steps", 2)
    assert len(list((data / ".cache").iterdir())) == 1
    Image.new("RGB", (32, 32), "red").save(data / rows_of(data)[0]["file_names"][0])
    train(data, tiny, tmp_path / "c", "--steps", 2)
    assert len(list((data / ".cache").iterdir())) == 2


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_noise_and_targets_follow_the_scheduler(prediction):
    """add_noise and its targets equal the scheduler's own, and a perfect prediction gives back the image."""
    from diffusers import DDPMScheduler
    s = DDPMScheduler(beta_start=.00085, beta_end=.012, beta_schedule="scaled_linear", prediction_type=prediction)
    x, noise, u = torch.randn(5, 4, 8, 8), torch.randn(5, 4, 8, 8), torch.rand(5)
    x_t, t, target = rankdpo.add_noise(s, x, noise, u)
    assert torch.allclose(x_t, s.add_noise(x, noise, t), atol=1e-5)
    assert torch.allclose(target, s.get_velocity(x, noise, t) if prediction == "v_prediction" else noise, atol=1e-5)


def test_rectified_flow_points_from_the_image_to_the_noise():
    from diffusers import FlowMatchEulerDiscreteScheduler
    s = FlowMatchEulerDiscreteScheduler(shift=3.)
    x, noise, u = torch.randn(4, 4, 8, 8), torch.randn(4, 4, 8, 8), torch.tensor([.5, .1, .9, .02])
    x_t, t, target = rankdpo.add_noise(s, x, noise, u)
    sigma = (t / 1000).view(-1, 1, 1, 1)
    assert sigma[0].item() == pytest.approx(3 * .5 / (1 + 2 * .5))              # SD3's shift of the median
    assert torch.allclose(x_t - sigma * target, x, atol=1e-5) and torch.allclose(x_t + (1 - sigma) * target, noise, atol=1e-5)


def test_noise_depends_on_seed_step_and_list_alone():
    cfg = rankdpo.Config()
    (u, a), (v, b) = rankdpo.draw(cfg, 3, 7, (4, 4, 8, 8)), rankdpo.draw(cfg, 3, 7, (4, 4, 8, 8))
    assert u == v and torch.equal(a, b) and torch.equal(a[0], a[3])             # shared over the list
    others = [rankdpo.draw(rankdpo.Config(seed=1), 3, 7, (4, 4, 8, 8)), rankdpo.draw(cfg, 4, 7, (4, 4, 8, 8)), rankdpo.draw(cfg, 3, 8, (4, 4, 8, 8))]
    assert all(not torch.equal(a, o[1]) and u != o[0] for o in others)
    own = rankdpo.draw(rankdpo.Config(noise="independent"), 3, 7, (4, 4, 8, 8))[1]
    assert not torch.equal(own[0], own[1])


# ---- evaluate


def test_evaluate_compares_two_models(tiny, tmp_path, capsys):
    (tmp_path / "held.jsonl").write_text("\n".join(json.dumps({"prompt": p, "tag": toyworld.grammar()[p]["tag"]}) for p in PROMPTS))
    evaluate.main(["--models", f"base={tiny}/sdxl", f"same={tiny}/sdxl", f"other={tiny}/sd15", "--prompts", str(tmp_path / "held.jsonl"), "--rewards", "toyworld",
                   *rewards(tiny)[1:], "--seeds", "2", "--steps", "2", "--out", str(tmp_path / "out")])
    r = json.loads((tmp_path / "out/results.json").read_text())
    base, same, other = (r["models"][n] for n in ("base", "same", "other"))
    assert base["means"] == same["means"] and same["win_rate"]["pickscore"]["ties"] == len(PROMPTS) and same["gain"]["pickscore"]["gain"] == 0
    w = other["win_rate"]["pickscore"]
    assert w["wins"] + w["ties"] + w["losses"] == w["n"] == len(PROMPTS) and w["low"] <= w["rate"] <= w["high"]
    assert other["gain"]["pickscore"]["gain"] == pytest.approx(other["means"]["pickscore"] - base["means"]["pickscore"])
    assert "accuracy, exact checker" in (tmp_path / "out/report.md").read_text() and (tmp_path / "out/grid.png").is_file()
    assert r["config"]["seeds"] == 2 and r["torch"] == torch.__version__


def test_wilson_interval_golden():
    low, high = evaluate.wilson(233, 297)                                       # 78.45 % of 297, BalancedDPO's Pick-a-Pic row
    assert (round(low, 3), round(high, 3)) == (.734, .827)


def test_scores_become_win_rates_and_gains():
    tags = ["x", "x", "y"]
    scores = {"a": {"r": np.array([[0., 1.], [0., 0.], [2., 2.]])}, "b": {"r": np.array([[2., 0.], [0., 0.], [0., 1.]])}}
    r = evaluate.compare(scores, tags, 0)["b"]
    assert {k: r["win_rate"]["r"][k] for k in ("wins", "ties", "losses", "n")} == dict(wins=1, ties=1, losses=1, n=3)
    assert r["means"]["r"] == pytest.approx((.5 + .5) / 2) and r["gain"]["r"]["gain"] == pytest.approx((.25 - 1.5) / 2)
    assert r["gain"]["r"]["low"] <= r["gain"]["r"]["gain"] <= r["gain"]["r"]["high"]


# ---- errors: one clear line, a status that is not zero


def fails(main, args, *says, capsys=None):
    with pytest.raises(SystemExit) as e:
        main([str(a) for a in args])
    message = capsys.readouterr().err.strip().splitlines()[-1] if isinstance(e.value.code, int) else str(e.value.code)
    assert e.value.code != 0 and "\n" not in message and all(s in message for s in says), message


def test_rankdpo_errors(lists, tiny, tmp_path, capsys):
    good = ["--data", lists, "--model", f"{tiny}/sdxl", "--out", tmp_path / "out"]
    bad = tmp_path / "bad"
    shutil.copytree(lists, bad)
    lines = (bad / "metadata.jsonl").read_text().splitlines()

    def with_line_3(text):
        (bad / "metadata.jsonl").write_text("\n".join(lines[:2] + [text] + lines[3:]))
        return good + ["--data", bad]
    check = lambda args, *says: fails(rankdpo.main, args, *says, capsys=capsys)
    check(["--data", "nowhere"], "nowhere/metadata.jsonl", "no such file")
    check(good + ["--loss", "ppo"], "--loss", "ppo", "rankdpo")
    check(good + ["--betta", "1"], "--betta")
    check(good + ["--beta", "much"], "--beta", "much")
    check(good + ["--beta", "-1"], "--beta", "positive")
    check(good + ["--model", tmp_path], str(tmp_path), "model_index.json")
    check(good + ["--device", "abacus"], "abacus")
    row = json.loads(lines[2])
    check(with_line_3("{torn"), "metadata.jsonl, line 3")
    check(with_line_3(json.dumps({k: v for k, v in row.items() if k != "phi"})), "line 3", "phi")
    check(with_line_3(json.dumps({**row, "phi": [1.]})), "line 3", "as many phi")
    check(with_line_3(json.dumps({**row, "phi": [2., 0., 0., 0.]})), "line 3", "[0, 1]")
    check(with_line_3(json.dumps({**row, "file_names": ["images/none.png"] * 4})), "line 3", "images/none.png")
    check(with_line_3(json.dumps({**row, "file_names": ["../x.png"] * 4})), "line 3", "../x.png")
    check(with_line_3("[1]"), "line 3")
    (bad / "metadata.jsonl").write_text("")
    check(good + ["--data", bad], "no rows")
    shutil.copytree(lists, tmp_path / "torn", ignore=shutil.ignore_patterns(".cache"))
    (tmp_path / "torn" / row["file_names"][0]).write_bytes(b"not a png")
    check(good + ["--data", tmp_path / "torn"], row["file_names"][0], "not a readable image")
    assert not list((tmp_path / "out").iterdir())                               # nothing was begun
    check(good + ["--gradient_checkpointing", "maybe"], "--gradient_checkpointing", "maybe")
    check(good + ["--seed", "-1"], "--seed")
    shutil.copytree(lists, tmp_path / "sizes", ignore=shutil.ignore_patterns(".cache"))
    Image.new("RGB", (40, 32)).save(tmp_path / "sizes" / row["file_names"][0])
    check(good + ["--data", tmp_path / "sizes"], "40 x 32", "--resolution")
    shutil.copytree(tiny / "sdxl", tmp_path / "torn_model")
    (tmp_path / "torn_model/unet/diffusion_pytorch_model.safetensors").write_bytes(b"123")
    check(good + ["--model", tmp_path / "torn_model"], "torn_model", "could not load")


def test_synpic_errors(lists, tiny, tmp_path, capsys):
    check = lambda args, *says: fails(synpic.main, args, *says, capsys=capsys)
    check(["--prompts", "none.txt"], "none.txt", "no such file")
    (tmp_path / "empty.txt").write_text("\n\n")
    check(["--prompts", tmp_path / "empty.txt"], "holds no prompt")
    args = synpic_args(tiny, tmp_path / "out")
    check(args + ["--models", "midjourney", "sdxl"], "midjourney", "sdxl, sd3")
    check(args + ["--models", f"a={tiny}/sdxl,step=3", f"b={tiny}/sd3"], "step=3")
    check(args + ["--models", f"a={tiny}/sdxl", f"a={tiny}/sdxl"], "another seed")
    check(args + ["--models", f"a={tiny}/sdxl,steps=1", f"b={tiny}/nothing"], "nothing")
    check(args + ["--rewards", "toyworld"], "evaluation only")
    check(synpic_args(tiny, tmp_path / "out2", "--rewards", "beauty"), "beauty")
    check(args + ["--stages", "dance"], "dance")
    check(args + ["--frobnicate"], "--frobnicate")
    check(synpic_args(tiny, lists, "--limit", "3"), "prompts", "another --out")    # the settings of a folder do not change
    out = tmp_path / "unscored"
    shutil.copytree(lists, out)
    (out / "scores/clip.jsonl").unlink(), (out / "metadata.jsonl").unlink()
    check(synpic_args(tiny, out, "--stages", "label"), "clip.jsonl", "--stages score")
    check(synpic_args(tiny, out, "--shard", "2/2"), "--shard 2/2")
    check(synpic_args(tiny, out, "--label", "beauty"), "--label beauty")


def test_evaluate_errors(tiny, tmp_path, capsys):
    check = lambda args, *says: fails(evaluate.main, args, *says, capsys=capsys)
    two = ["--models", f"a={tiny}/sdxl", f"b={tiny}/sd15", "--out", tmp_path]
    check(["--models", f"a={tiny}/sdxl"], "two or more")
    check(["--models", f"a={tiny}/sdxl", f"b={tmp_path}/none"], "none", "no such folder")
    check(two + ["--prompts", "none.jsonl"], "none.jsonl")
    (tmp_path / "bad.jsonl").write_text('{"prompt": "a circle"}\n{"promt": 1}\n')
    check(two + ["--prompts", tmp_path / "bad.jsonl"], "bad.jsonl, line 2")
    check(two + ["--what"], "--what")
    (tmp_path / "real.txt").write_text("a horse on the moon\n")
    check(two + ["--prompts", tmp_path / "real.txt", "--steps", "1", "--seeds", "1", "--rewards", "toyworld"], "a horse on the moon")


def test_scripts_fail_with_one_line_on_the_command_line():
    for script, args in (("rankdpo.py", ["--data", "nowhere"]), ("synpic.py", ["--prompts", "nowhere"]), ("evaluate.py", ["--prompts", "nowhere.txt", "--models", "a=b", "c=d"]),
                         ("rewards.py", ["--image", "nowhere"]), ("toyworld.py", ["--only", "everything"])):
        p = subprocess.run([sys.executable, script, *args], cwd=HERE, capture_output=True, text=True, timeout=120)
        assert p.returncode != 0 and len(p.stderr.strip().splitlines()) == 1 and "Traceback" not in p.stderr, (script, p.stderr)


# ---- train.sh


def test_train_sh_toy_prints_its_three_commands():
    p = subprocess.run(["bash", "train.sh"], cwd=HERE, env={**os.environ, "DRY_RUN": "1"}, capture_output=True, text=True, check=True)
    assert [shlex.split(line)[2] for line in p.stdout.splitlines()] == ["synpic.py", "rankdpo.py", "evaluate.py"]


def test_train_sh_refuses_what_it_does_not_know():
    for args, env, says in ((["sd4"], {}, "sd4"), (["sdxl"], {}, "PROMPTS"), (["sdxl"], {"PROMPTS": "none.txt", "EVAL_PROMPTS": "x"}, "none.txt"), (["sd3"], {"PROMPTS": "README.md"}, "EVAL_PROMPTS")):
        p = subprocess.run(["bash", "train.sh", *args], cwd=HERE, env={**os.environ, "DRY_RUN": "1", **env}, capture_output=True, text=True)
        assert p.returncode != 0 and says in p.stderr and p.stdout == ""


@pytest.mark.parametrize("task", ["sdxl", "sd3"])
def test_every_command_of_the_recipes_runs_on_tiny_models(tiny, tmp_path, task):
    """The commands that DRY_RUN prints, with tiny models and sizes in the variables, then run one by one."""
    models = " ".join(f"{n}={tiny}/{n},steps=1" for n in ("sdxl", "sd3", "sd15")) + f" sdxl={tiny}/sdxl,steps=1,seed=1"
    env = {**os.environ, "DRY_RUN": "1", "BIN": "", "GPUS": "2", "PROMPTS": f"{tiny}/prompts.txt", "EVAL_PROMPTS": f"{tiny}/prompts.txt", "OUT": str(tmp_path), "MODEL": f"{tiny}/{task}", "MODELS": models,
           "REWARDS": " ".join(rewards(tiny)), "STEPS": "2", "WARMUP": "1", "BATCH": "4", "RESOLUTION": "32", "EVAL_LIMIT": "2",
           "EVAL_OPTIONS": "--steps 1 --seeds 2", "REF_REFRESH": "1", "SAVE_EVERY": "1", "TRAIN_OPTIONS": "--sample_every 1 --sample_steps 1", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    out = subprocess.run(["bash", "train.sh", task], cwd=HERE, env=env, capture_output=True, text=True, check=True).stdout.splitlines()
    commands = [shlex.split(line[2:]) for line in out]
    assert [next(w for w in c if w.endswith(".py")) for c in commands] == ["synpic.py", "rankdpo.py", "evaluate.py"] and commands[0][0] == commands[1][0] == "torchrun"
    for command in commands:
        subprocess.run(command, cwd=HERE, env=env, capture_output=True, check=True, timeout=300)
    assert (tmp_path / "rankdpo/model/model_index.json").is_file() and (tmp_path / "evaluation/report.md").is_file()
    assert log_of(tmp_path / "rankdpo")[0]["world"] == 2 and (tmp_path / "rankdpo/samples.png").is_file()
