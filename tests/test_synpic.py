"""Syn-Pic at scale: every family of generators, the same bytes however it is run, labels, bad images."""

import itertools
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import (
    PROMPTS,
    copied,
    fails,
    rewards,
    rows_of,
    synpic_args,
    t5_tokenizer,
    tiny_vae,
    together,
    train,
    write_rows,
)
from PIL import Image
from scipy.stats import kendalltau

import rankdpo
import rewards as reward_models
import synpic
from lib import draw, pictures, tables
from lib.lists import LABELS, preference_labels, read_lists
from toy import build


def images_of(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(Path(folder).glob("images/*/*.png"))}


def test_synpic_writes_ranked_rows(lists):
    rows = rows_of(lists)
    assert [r["prompt"] for r in rows] == PROMPTS and (lists / "preview.png").is_file()
    for r in rows:
        assert r["models"] == ["sdxl", "sdxl", "sd3", "sd15"] and r["seeds"] == [0, 1, 0, 0]
        assert set(r["scores"]) == {"clip", "hpsv2.1", "pickscore"}
        for i, phi in enumerate(r["phi"]):  # by hand: strict wins / (3 rewards x 3 others)
            wins = sum(s[i] > s[j] for s in r["scores"].values() for j in range(4))
            above, ties = sum(p > phi for p in r["phi"]), r["phi"].count(phi) - 1
            assert phi == pytest.approx(wins / 9) and r["rank"][i] == 1 + above + ties / 2
        images = [np.asarray(Image.open(lists / f)) for f in r["file_names"]]
        assert all(im.shape == (32, 32, 3) for im in images)
        assert not (images[0] == images[1]).all()  # another seed, another picture


def test_datasets_reads_the_folder(lists, tmp_path):
    from datasets import load_dataset

    data = load_dataset("imagefolder", data_dir=str(lists), split="train", cache_dir=str(tmp_path))
    assert len(data) == len(PROMPTS) and data[0]["prompt"] == PROMPTS[0] and len(data[0]["images"]) == 4
    assert data[0]["images"][0].size == (32, 32) and data[1]["phi"] == rows_of(lists)[1]["phi"]


def test_synpic_resumes_to_the_same_bytes(lists, tiny, tmp_path):
    out = copied(lists, tmp_path / "again")
    gone = rows_of(out)[5]["file_names"]
    (out / gone[0]).unlink(), (out / gone[2]).unlink()
    scores = out / "scores/clip.jsonl"
    scores.write_text(scores.read_text()[:-30])  # a torn last line
    (out / "metadata.jsonl").unlink()
    before = (out / gone[1]).stat().st_mtime_ns
    synpic.main(synpic_args(tiny, out))
    assert (out / "metadata.jsonl").read_bytes() == (lists / "metadata.jsonl").read_bytes()
    for f in gone:
        assert (out / f).read_bytes() == (lists / f).read_bytes()
    assert (out / gone[1]).stat().st_mtime_ns == before  # what was there was left alone


@pytest.fixture(scope="module")
def others(tmp_path_factory):
    """Random-weight PixArt-Sigma and Stable Cascade, in the layouts of the real ones."""
    from diffusers import (
        DDPMWuerstchenScheduler,
        DPMSolverMultistepScheduler,
        PixArtSigmaPipeline,
        PixArtTransformer2DModel,
        StableCascadeCombinedPipeline,
        StableCascadeUNet,
    )
    from diffusers.pipelines.stable_cascade.pipeline_stable_cascade import PaellaVQModel
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection, T5Config, T5EncoderModel

    root = tmp_path_factory.mktemp("others")
    torch.manual_seed(0)
    (root / "t5").mkdir()
    tok = t5_tokenizer(root / "t5")
    vae = tiny_vae()
    size = dict(sample_size=32, patch_size=2, in_channels=4, out_channels=8)
    size.update(attention_head_dim=8, num_attention_heads=2, caption_channels=32, cross_attention_dim=16)
    transformer = PixArtTransformer2DModel(num_layers=1, use_additional_conditions=False, **size)
    text = dict(d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=4, feed_forward_proj="gated-gelu")
    t5 = T5EncoderModel(T5Config(vocab_size=len(tok), **text))
    parts = dict(tokenizer=tok, text_encoder=t5, vae=vae, transformer=transformer)
    PixArtSigmaPipeline(**parts, scheduler=DPMSolverMultistepScheduler()).save_pretrained(root / "pixart")

    tok = build.make_tokenizer()
    text = {f"{name}_token_id": getattr(tok, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    text.update(hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=4)
    text.update(vocab_size=len(tok), max_position_embeddings=16, projection_dim=32)
    text = CLIPTextModelWithProjection(CLIPTextConfig(**text))
    size = dict(block_out_channels=(128, 128), num_attention_heads=(2, 2), clip_image_in_channels=768)
    size.update(down_num_layers_per_block=(1, 1), up_num_layers_per_block=(1, 1), switch_level=(False,))
    size.update(conditioning_dim=128, clip_text_in_channels=32, clip_text_pooled_in_channels=32)
    prior = StableCascadeUNet(**size)
    blocks = ("SDCascadeResBlock", "SDCascadeTimestepBlock", "SDCascadeAttnBlock")
    size = dict(in_channels=4, out_channels=4, conditioning_dim=128, block_out_channels=(16, 32, 64, 128))
    size.update(num_attention_heads=(-1, -1, 1, 2), down_num_layers_per_block=(1,) * 4, dropout=(0.1,) * 4)
    size.update(down_blocks_repeat_mappers=(1,) * 4, up_blocks_repeat_mappers=(3, 3, 2, 2))
    size.update(up_num_layers_per_block=(1,) * 4, switch_level=None, clip_text_pooled_in_channels=32)
    decoder = StableCascadeUNet(block_types_per_layer=(blocks[:2],) * 2 + (blocks,) * 2, **size)
    parts = dict(text_encoder=text, tokenizer=tok, prior_text_encoder=text, prior_tokenizer=tok)
    parts.update(
        decoder=decoder, prior_prior=prior, vqgan=PaellaVQModel(bottleneck_blocks=1, num_vq_embeddings=2)
    )
    parts.update(scheduler=DDPMWuerstchenScheduler(), prior_scheduler=DDPMWuerstchenScheduler())
    StableCascadeCombinedPipeline(**parts).save_pretrained(root / "cascade")
    index = json.loads((root / "cascade/model_index.json").read_text())
    index["vqgan"] = ["wuerstchen", "PaellaVQModel"]  # as the hub's repository has it
    (root / "cascade/model_index.json").write_text(json.dumps(index))
    return root


def test_the_papers_four_generators_and_sd15_draw(tiny, others, tmp_path):
    models = [f"{name}={tiny}/{name},steps=2" for name in ("sdxl", "sd3", "sd15")]
    others = [f"pixart={others}/pixart,steps=2", f"cascade={others}/cascade,steps=2,resolution=128"]
    models[2:2] = others
    out = tmp_path / "out"
    args = synpic_args(tiny, out, "--limit 3 --batch_size 2")
    synpic.main([*args, "--models", *models])
    rows = rows_of(out)
    assert len(rows) == 3 and rows[0]["models"] == ["sdxl", "sd3", "pixart", "cascade", "sd15"]
    sizes = [pictures.read_image(out / f).size for f in rows[0]["file_names"]]
    assert sizes == [(32, 32), (32, 32), (128, 128), (128, 128), (32, 32)]
    for k in range(5):  # prompts differ, and so do their pictures
        assert not np.array_equal(*(np.asarray(Image.open(out / r["file_names"][k])) for r in rows[:2]))


def test_defaults_come_from_the_table_and_can_be_overridden():
    card = synpic.parse_model("sd3")
    path = "stabilityai/stable-diffusion-3-medium-diffusers"
    how = dict(steps=28, guidance=7.0, resolution=1024, dtype="fp16", seed=0)
    assert card == dict(name="sd3", path=path, **how)
    changed = dict(card, steps=40, guidance=4.5, dtype="bf16", seed=2)
    assert synpic.parse_model("sd3,steps=40,guidance=4.5,dtype=bf16,seed=2") == changed
    assert synpic.parse_model("mine=some/folder,steps=9")["resolution"] == 0
    assert set(synpic.MODELS) >= {"sdxl", "sd3", "pixart", "cascade"}


def test_shards_make_the_same_data_set(lists, tiny, tmp_path):
    out = tmp_path / "parts"
    for i in (1, 0):
        synpic.main(synpic_args(tiny, out, "--shard", f"{i}/2"))
        assert not (out / "metadata.jsonl").exists()
    synpic.main(synpic_args(tiny, out, "--stages", "label"))
    assert images_of(out) == images_of(lists)
    assert (out / "metadata.jsonl").read_bytes() == (lists / "metadata.jsonl").read_bytes()


def test_two_ranks_make_the_same_data_set(lists, tiny, tmp_path):
    out = tmp_path / "ranks"
    together(synpic.main, synpic_args(tiny, out, "--device", "cpu"))
    assert images_of(out) == images_of(lists) and rows_of(out) == rows_of(lists)


def test_another_batch_size_draws_the_same_pictures(lists, tiny, tmp_path):
    out = tmp_path / "batch"
    synpic.main([*synpic_args(tiny, out, "--stages", "generate"), "--batch_size", "3"])
    a, b = images_of(lists), images_of(out)
    assert a.keys() == b.keys()
    pixels = lambda path: np.asarray(Image.open(path)).astype(int)
    for name in a:
        assert np.abs(pixels(lists / name) - pixels(out / name)).max() <= 2


def test_a_second_process_is_refused(lists, tiny, tmp_path, capsys):
    out = copied(lists, tmp_path / "locked")
    with draw.folder_lock(out, 0, 1):
        fails(synpic.main, synpic_args(tiny, out), "another synpic.py is at work", capsys=capsys)
        fails(synpic.main, synpic_args(tiny, out, "--shard", "0/2"), "another synpic.py", capsys=capsys)
    with draw.folder_lock(out, 0, 2):
        fails(synpic.main, synpic_args(tiny, out, "--shard", "0/2"), "another synpic.py", capsys=capsys)
        synpic.main(synpic_args(tiny, out, "--shard", "1/2"))  # another part may


def test_changed_settings_are_refused_and_named(lists, tiny, capsys):
    args = synpic_args(tiny, lists)
    models = args[args.index("--models") + 1 :][:4]
    check = lambda more, *says: fails(synpic.main, [*args, *more], *says, capsys=capsys)
    check(["--batch_size", "5"], "another batch_size (before 4, now 5)", "another --out")
    check(["--limit", "3"], "another prompts count (before 10, now 3)")
    check(["--models", *models[:3], f"sd15={tiny}/sd3,steps=2"], "models sd15_0 path", "and 3 more")


def test_prompt_files_of_every_kind(tmp_path, capsys):
    import pyarrow
    import pyarrow.parquet

    want = ['a sign that says "hi"', "two, three\tfour".replace("\t", " "), "a cat"]
    (tmp_path / "a.txt").write_text("\n".join([want[0], "", want[1], want[2], want[2]]) + "\n")
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"tag": 1, "prompt": p}) for p in want))
    (tmp_path / "a.csv").write_text('id,Prompt\n1,"a sign that says ""hi"""\n2,"two, three four"\n3,a cat\n')
    (tmp_path / "a.tsv").write_text(
        'Prompt\tCategory\na sign that says "hi"\tX\ntwo, three four\tY\na cat\tZ\n'
    )  # PartiPrompts: a quote is a character like any other
    pyarrow.parquet.write_table(pyarrow.table({"caption": want, "n": [1, 2, 3]}), tmp_path / "a.parquet")
    texts = lambda name, **more: [row["prompt"] for row in tables.read_prompts(tmp_path / name, **more)]
    for kind in ("txt", "jsonl", "csv", "tsv", "parquet"):
        assert texts(f"a.{kind}") == want, kind
    assert "5 rows, 2 blank or repeated ones dropped, 3 prompts kept" in capsys.readouterr().out
    assert texts("a.csv", limit=2) == want[:2]
    assert texts("a.tsv", column="Category") == ["X", "Y", "Z"]
    (tmp_path / "DrawBench.csv").write_text("Prompts,Category\nA red circle.,Colors\n")
    assert texts("DrawBench.csv") == ["A red circle."]
    (tmp_path / "genai.json").write_text('{"0": {"id": "0", "prompt": "a"}, "1": {"id": "1", "prompt": "b"}}')
    assert texts("genai.json") == ["a", "b"]


def test_a_folder_of_shards_is_read_by_its_prompts_alone(tmp_path):
    import pyarrow
    import pyarrow.parquet

    pictures = pyarrow.array([b"no picture is read"] * 2)
    for n in range(2):
        texts = [f"prompt {n}", "both"]
        table = pyarrow.table({"jpg_0": pictures, "caption": texts, "tag": ["x", "y"], "other": [1, 2]})
        (tmp_path / "data").mkdir(exist_ok=True)
        pyarrow.parquet.write_table(table, tmp_path / f"data/train-0000{n}-of-00002.parquet")
    rows = tables.read_prompts(tmp_path)
    assert [row["prompt"] for row in rows] == ["prompt 0", "both", "prompt 1"]
    assert all(set(row) == {"prompt", "caption", "tag"} for row in rows)
    assert tables.read_prompts(tmp_path, also=("other",))[1]["other"] == 2
    with pytest.raises(SystemExit, match="00000-of-00002.parquet, row 1: no text under 'title'"):
        tables.read_prompts(tmp_path, column="title")
    pyarrow.parquet.write_table(table, tmp_path / "data/test-00000-of-00001-5f3a.parquet")
    with pytest.raises(SystemExit, match="shards of test, train"):
        tables.read_prompts(tmp_path)


def test_every_label_against_hand_made_ones():
    # (1, 3 images, 3 rewards)
    R = torch.tensor([[[3.0, 10, 0], [2, 30, 1], [1, 20, 2]]], dtype=torch.float64)
    phi = lambda label, rewards=R: preference_labels(label, list(rewards))[0].tolist()
    third = pytest.approx([2 / 6, 4 / 6, 3 / 6])  # wins: 2+0+0, 1+2+1, 0+1+2 of 3 rewards x 2 others
    assert phi("phi") == third
    assert phi("single:a", R[..., :1]) == [1, 0.5, 0] and phi("single:b", R[..., 1:2]) == [0, 1, 0.5]
    assert phi("sum") == [0, 1, 0.5]  # 13, 33, 23: the reward of the largest scale decides
    # standard deviations 1, 10, 1: 3 + 1 + 0, 2 + 3 + 1, 1 + 2 + 2
    assert phi("normalized_sum") == [0, 1, 0.5]
    big = R * torch.tensor([1.0, 1e-6, 1e-3])  # the scale of the rewards does not matter
    assert phi("sum", big) == [1, 0.5, 0] and phi("normalized_sum", big) == [0, 1, 0.5]
    assert phi("majority") == pytest.approx([0, 1, 0.5])  # 0 loses to 1 and 2 by 2:1, 1 beats 2 by 2:1
    draws = [tuple(p.tolist()) for p in preference_labels("random", list(R[..., :0].expand(60, 3, 0)), 0)]
    assert set(draws) == set(itertools.permutations((0, 0.5, 1)))
    assert draws[:9] == [tuple(p.tolist()) for p in preference_labels("random", list(R.expand(9, 3, 3)), 0)]
    with pytest.raises(ValueError, match="voting"):
        preference_labels("voting", list(R))


def test_lists_of_several_lengths_share_one_scale_and_keep_their_places():
    g = torch.Generator().manual_seed(0)
    rewards = [torch.randn(k, 2, generator=g, dtype=torch.float64) for k in (4, 2, 3, 2, 4, 9)]
    for r in rewards:
        r[:, 1] *= 50 if len(r) == 2 else 0.1
    scale = torch.cat(rewards).std(0)
    for label in ("phi", "normalized_sum", "majority"):
        for r, phi in zip(rewards, preference_labels(label, rewards)):
            beats = r[:, None] > r  # (K, K, R)
            if label == "normalized_sum":
                both = (r / scale).sum(1)
                beats = (both[:, None] > both)[..., None]
            if label == "majority":
                votes = beats.sum(-1)  # (K, K)
                beats = (votes > votes.T)[..., None]
            assert torch.allclose(phi, beats.float().mean(-1).sum(1) / (len(r) - 1))
    pairs = [torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([[0.0, 0.0], [0.0, 4.0]])]
    longer = torch.tensor([[-100.0, 0.0], [100.0, 0.0], [0.0, 1.0]])
    assert preference_labels("normalized_sum", pairs)[0].tolist() == [1, 0]  # 1 / .5 against 1 / 1.9
    assert preference_labels("normalized_sum", [*pairs, longer])[0].tolist() == [0, 1]


def test_the_trainer_makes_the_labels_that_synpic_writes(uneven, tmp_path, monkeypatch):
    """One folder, several labels: the trainer's rows are those of a folder that was labelled anew."""
    out = copied(uneven, tmp_path / "copy")
    rows = lambda *more: read_lists(rankdpo.Config(data=str(out), **dict(more)))[1]
    monkeypatch.setattr(synpic, "draw_preview", lambda *_: None)  # half a second
    for label in (*LABELS, "single:clip"):
        for chosen in ((), ("clip", "pickscore")):
            mine = rows(("label", label), ("label_rewards", chosen))
            wanted = ["--rewards", *chosen] if chosen else []
            synpic.main(["--out", str(out), "--stages", "label", "--label", label, *wanted])
            assert [row["phi"] for row in mine] == [row["phi"] for row in rows_of(out)], (label, chosen)
            names = {"random"} if label == "random" else set(chosen or mine[0]["scores"])
            assert set(mine[0]["scores"]) == ({"clip"} if label == "single:clip" else names)


def test_labels_that_cannot_be_are_refused(lists, capsys):
    label = ["--out", lists, "--stages", "label"]
    fails(synpic.main, [*label, "--label", "voting"], "--label voting", "majority", capsys=capsys)
    fails(synpic.main, [*label, "--label", "single:mps"], "no such scores: mps", "clip", capsys=capsys)


def test_relabelling_rewrites_phi_and_rank_only(lists, tiny, tmp_path):
    out = copied(lists, tmp_path / "relabel")
    before, drop = rows_of(out), lambda r: {k: v for k, v in r.items() if k not in ("phi", "rank")}
    synpic.main(["--out", str(out), "--stages", "label", "--label", "single:pickscore"])
    after = rows_of(out)
    assert [drop(r) for r in after] == [drop(r) for r in before] and after != before
    for r in after:
        s = r["scores"]["pickscore"]
        assert r["phi"] == pytest.approx([sum(a > b for b in s) / 3 for a in s])
    synpic.main(["--out", str(out), "--stages", "label"])
    assert rows_of(out) == before  # and back


def test_lists_from_elsewhere_are_scored_labelled_and_trained_on(tiny, tmp_path, capsys):
    rng, rows = np.random.default_rng(0), []
    for i, k in enumerate((2, 3, 2, 3)):  # pairs and lists of three, side by side
        files = [f"pictures/{i}_{j}.png" for j in range(k)]
        for f in files:
            (tmp_path / "pictures").mkdir(exist_ok=True)
            Image.fromarray(rng.integers(0, 255, (32, 32, 3), dtype=np.uint8)).save(tmp_path / f)
        rows.append({"prompt": PROMPTS[i], "file_names": files, "source": "elsewhere"})
    write_rows(tmp_path, rows)
    label = ["--out", str(tmp_path), "--stages", "label"]
    fails(synpic.main, label, "score first", capsys=capsys)
    synpic.main([*label, "--label", "random"])  # needs no scores
    reward_models.main(["--score", str(tmp_path), "--rewards", *rewards(tiny)[:2], "--device", "cpu"])
    synpic.main(label)
    for r in rows_of(tmp_path):
        assert r["source"] == "elsewhere" and set(r["scores"]) == {"clip", "hpsv2.1"}
        assert len(r["phi"]) == len(r["file_names"])
    synpic.main([*label, "--label", "majority"])
    store, before = tmp_path / "scores/clip.jsonl", rows_of(tmp_path)[0]["scores"]
    lines = [json.loads(line) for line in store.read_text().splitlines()]
    newer = dict(version="another", prompt=PROMPTS[0], file_names=rows[0]["file_names"], scores=[7.0, 8.0])
    write = lambda lines: store.write_text("".join(json.dumps(line) + "\n" for line in lines))
    write([*lines, newer])
    named = [*label, "--rewards", *rewards(tiny)[:2]]
    fails(synpic.main, label, "clip.jsonl: scores of 2 versions of clip", capsys=capsys)
    synpic.main(named)
    assert rows_of(tmp_path)[0]["scores"] == before
    write([dict(line, version="another") for line in [*lines, newer]])
    synpic.main(label)
    assert rows_of(tmp_path)[0]["scores"]["clip"] == [7.0, 8.0]  # scores made since are taken
    assert train(tmp_path, tiny, tmp_path / "run")[-1]["step"] == 2


def test_only_scores_that_can_be_trusted_label(lists, tiny, tmp_path, capsys):
    """Those of the exact checker do not, nor those of a picture that was replaced; no reward is left out
    because the first list lacks it."""
    out = copied(lists, tmp_path / "out")
    rows, label = rows_of(out), ["--out", str(out), "--stages", "label"]
    files = rows[0]["file_names"]
    line = dict(prompt=rows[0]["prompt"], file_names=files, scores=[1.0] * len(files))
    (out / "scores/toyworld.jsonl").write_text(json.dumps(line) + "\n")
    synpic.main(label)
    assert rows_of(out) == rows
    Image.new("RGB", (32, 32), "red").save(out / files[0])
    fails(synpic.main, label, "row 1: no scores of", capsys=capsys)
    shutil.rmtree(out / "scores")
    del rows[0]["scores"]["clip"]
    write_rows(out, rows)
    fails(synpic.main, label, "row 1: no scores of clip", capsys=capsys)


def test_the_summary_counts_what_is_there(lists):
    s, rows = json.loads((lists / "summary.json").read_text()), rows_of(lists)
    assert s["generators"] == ["sdxl_0", "sdxl_1", "sd3_0", "sd15_0"]
    assert s["lists"] == 10 and s["images"] == 40
    assert s["win_matrix"][0][2] == pytest.approx(np.mean([r["phi"][0] > r["phi"][2] for r in rows]))
    taus = [kendalltau(r["scores"]["clip"], r["scores"]["pickscore"]).statistic for r in rows]
    assert s["kendall_tau"][0][2] == pytest.approx(np.mean(taus))
    assert s["kendall_tau"][1][1] == pytest.approx(1)
    assert s["speed"]["generate"]["sd3_0"]["images"] == 10 and s["speed"]["score"]["clip"]["images"] == 40


def test_the_summary_says_how_varied_each_generator_is(lists, tiny):
    found, rows = json.loads((lists / "summary.json").read_text())["variety"], rows_of(lists)
    scorer, apart = reward_models.load_reward(f"diversity={tiny}/rewards/clip"), []
    for row in rows:
        files = [lists / file for file in row["file_names"][:2]]
        a, b = (embedding for embedding, _ in scorer.stream(files, [row["prompt"]] * 2))
        apart.append(1 - float(np.dot(a, b)))
    assert found["sdxl"]["distance"] == pytest.approx(np.mean(apart), abs=1e-5)
    assert "distance" not in found["sd3"] and "distance" not in found["sd15"]  # of one seed
    assert all(0 <= of["bits"] <= np.log2(6) for of in found.values())


@pytest.fixture
def faulty(monkeypatch):
    """A generator that raises on one prompt, draws not-a-number on another and black on a third."""
    from diffusers import StableDiffusionPipeline

    original = StableDiffusionPipeline.__call__

    def call(self, prompt, *args, **kwargs):
        if PROMPTS[1] in prompt:
            raise RuntimeError("this prompt is too much")
        out = original(self, *args, prompt=prompt, **kwargs)
        for p, x in zip(prompt, out.images):
            x[...] = np.nan if p == PROMPTS[4] else 0 if p == PROMPTS[7] else x
        return out

    monkeypatch.setattr(StableDiffusionPipeline, "__call__", call)


def test_bad_images_stop_the_run_or_are_left_out(faulty, tiny, tmp_path, capsys):
    out = tmp_path / "bad"
    says = ("sd15_0.png", PROMPTS[1], "too much", "--on_error skip")
    fails(synpic.main, synpic_args(tiny, out), *says, capsys=capsys)
    synpic.main(synpic_args(tiny, out, "--on_error skip"))
    said = capsys.readouterr().out
    for i, what in ((1, "too much"), (4, "not a number"), (7, "all-black")):
        names = {path.name for path in (out / f"images/0000{i}").iterdir()}
        assert what in said and names == {"sdxl_0.png", "sdxl_1.png", "sd3_0.png"}
    assert "3 images could not be drawn" in said
    assert [r["prompt"] for r in rows_of(out)] == [p for i, p in enumerate(PROMPTS) if i not in (1, 4, 7)]


def test_a_full_disk_ends_the_run_and_loses_nothing(tiny, lists, tmp_path, monkeypatch, capsys):
    out, save, room = tmp_path / "full", Image.Image.save, [6]

    def full(self, *args, **kwargs):
        room[0] -= 1
        if room[0] < 0:
            raise OSError(28, "No space left on device")
        return save(self, *args, **kwargs)

    monkeypatch.setattr(Image.Image, "save", full)
    fails(synpic.main, synpic_args(tiny, out), "No space left on device", capsys=capsys)
    monkeypatch.setattr(Image.Image, "save", save)
    assert not list(out.glob("images/*/*.tmp")) and len(images_of(out)) == 6
    synpic.main(synpic_args(tiny, out))
    assert images_of(out) == images_of(lists)


def test_missing_scores_are_named(lists, tiny, tmp_path, capsys):
    out = copied(lists, tmp_path / "unscored", "clip.jsonl", "metadata.jsonl")
    args = synpic_args(tiny, out, "--stages label")
    fails(synpic.main, args, "clip.jsonl", "--stages score", capsys=capsys)
