"""Wrong input of synpic.py and evaluate.py: each ends in one line that names it, before anything is drawn."""

import json
import os
import shutil

import pytest
from conftest import copied, fails, rewards, rows_of, synpic_args, write_rows
from diffusers import DiffusionPipeline

import evaluate
import synpic
from lib import draw, tables
from lib.lists import read_metadata

DEEP = "[" * 200_000 + "]" * 200_000


@pytest.fixture(autouse=True)
def nothing_is_drawn(monkeypatch):
    """A bad input is found before the first picture."""
    drawn = lambda *args: pytest.fail("it was drawn")
    monkeypatch.setattr(draw, "generate_each", drawn)  # evaluate.py draws with it, too


BAD_OPTIONS = [  # (options, what the line says)
    ("--batch_size 0", "--batch_size", "at least 1"),
    ("--shard 2/2", "--shard 2/2"),
    ("--stages dance", "--stages", "dance"),
    ("--device abacus", "abacus"),
    ("--frobnicate", "--frobnicate"),
    ("--field words", "words", "--field"),
    ("--prompts nowhere.txt", "nowhere.txt", "no such file"),
    ("--out {tiny}/prompts.txt", "--out", "cannot be written"),
    ("--models sdxl", "at least two"),
    ("--models midjourney sdxl", "midjourney", "sdxl, sd3"),
    ("--models a/b=x {good}", "letters, digits"),
    ("--models {good} {good}", "another seed"),
    ("--models {good},step=3 {other}", "step"),
    ("--models {good},steps=1,steps=2 {other}", "steps appears twice"),
    ("--models {good},guidance=-1 {other}", "guidance", "negative"),
    ("--models {good},resolution=100 {other}", "multiple of 8"),
    ("--models {good},dtype=int8 {other}", "dtype"),
    ("--models {good},path={tiny}/sd3 {other}", "no option 'path'"),
    ("--models {good} b={tiny}/nothing", "nothing", "model_index.json"),
    ("--models {good} b=some/one", "some/one", "hub"),
    ("--models {good} b={tiny}/sdxl+{tiny}/no_adapters", "no_adapters"),
    ("--rewards clip diversity", "diversity: is for evaluation only"),
    ("--rewards clip={tiny}/none", "none"),
    ("--rewards clip={tiny}/rewards/clip clip={tiny}/rewards/pick", "clip", "twice"),
]


load_config = DiffusionPipeline.load_config


def no_hub(path, **more):
    if not os.path.isdir(path):
        raise OSError("no hub here")
    return load_config(path, **more)


@pytest.mark.parametrize("options, says", [(row[0], row[1:]) for row in BAD_OPTIONS])
def test_bad_options_of_synpic(tiny, tmp_path, monkeypatch, capsys, options, says):
    monkeypatch.setattr(DiffusionPipeline, "load_config", no_hub)
    good, other = f"a={tiny}/sdxl", f"b={tiny}/sd15"
    words = options.format(tiny=tiny, good=good, other=other).split(" ")
    fails(synpic.main, [*synpic_args(tiny, tmp_path / "out"), *words], *says, capsys=capsys)
    assert not (tmp_path / "out/recipe.json").exists() and not list(tmp_path.glob("out/**/*.png"))


BAD_EVALUATIONS = [
    ("--resolution -8", "--resolution", "negative"),
    ("--models a={tiny}/sdxl", "two or more"),
    ("--models a={tiny}/sdxl a={tiny}/sd15", "different names"),
    ("--models a={tiny}/sdxl b=", "name=path"),
    ("--models a={tiny}/sdxl b={tiny}/nothing", "nothing", "no such folder"),
    ("--models a={tiny}/sdxl b=outputs/no/run", "outputs/no/run", "rankdpo.py"),
    ("--models a={tiny}/sdxl b=some/one", "some/one", "hub"),
    ("--models ../a={tiny}/sdxl b={tiny}/sd15", "../a", "a name is"),
    ("--models a={tiny}/sdxl A={tiny}/sd15", "given twice"),
    ("--rewards toyworld --limit 3 --study 4", "--study 4", "there are 3 prompts"),
    ("--shard 2/2", "--shard 2/2"),
    ("--models a={tiny}/sdxl Key.json={tiny}/sd15", "Key.json", "is a file of the report"),
    ("--out {tiny}/prompts.txt", "--out", "cannot be written"),
]


@pytest.mark.parametrize("options, says", [(row[0], row[1:]) for row in BAD_EVALUATIONS])
def test_bad_options_of_evaluate(tiny, tmp_path, monkeypatch, capsys, options, says):
    monkeypatch.setattr(DiffusionPipeline, "load_config", no_hub)
    models = ["--models", f"a={tiny}/sdxl", f"b={tiny}/sd15"]
    good = [*models, "--prompts", f"{tiny}/prompts.txt", "--rewards", *rewards(tiny), "--out", tmp_path]
    fails(evaluate.main, [*good, *options.format(tiny=tiny).split(" ")], *says, capsys=capsys)
    assert not list(tmp_path.iterdir())


BAD_PROMPTS = [  # (name, content, what the line says)
    ("a.docx", "a red circle", ".txt, .json"),
    ("a.txt", "", "holds no prompt"),
    ("c.txt", b"caf\xe9\n", "not UTF-8"),
    ("a.jsonl", '{"prompt": "a"}\n{torn\n', "a.jsonl, line 2"),
    ("b.jsonl", '{"prompt": 3}\n', "row 1: no text"),
    ("e.jsonl", '{"prompt": "\\ud83d"}\n', "e.jsonl, line 1"),
    ("a.json", "{torn", "a.json", "not JSON"),
    ("b.json", '{"prompt": "a"}', "b.json", "list"),
    ("a.csv", "id,words\n1,a\n", "--field"),
    ("d.csv", 'prompt\n"torn\n', "d.csv"),
    ("a.tsv", "id\tPhrase\n1\tx\n", "--field"),
    ("a.parquet", "no", "a.parquet"),
]


@pytest.mark.parametrize("name, content, says", [(row[0], row[1], row[2:]) for row in BAD_PROMPTS])
def test_bad_prompt_files(tmp_path, name, content, says):
    """As synpic.py and evaluate.py read them."""
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    fails(lambda args: tables.read_prompts(*args), [tmp_path / name], *says)


def test_every_model_is_looked_at_before_the_first_draws(tiny, tmp_path, capsys):
    shutil.copytree(tiny / "sd15", tmp_path / "sd15")
    shutil.rmtree(tmp_path / "sd15/tokenizer")
    models = ["--models", f"a={tiny}/sdxl", f"b={tmp_path}/sd15"]
    args = [*synpic_args(tiny, tmp_path / "out"), *models]
    fails(synpic.main, args, "tokenizer is", capsys=capsys)
    prompts = ["--prompts", f"{tiny}/prompts.txt", "--rewards", *rewards(tiny), "--out", tmp_path / "e"]
    fails(evaluate.main, [*models, *prompts], "tokenizer is", capsys=capsys)
    assert not (tmp_path / "out/recipe.json").exists()


@pytest.mark.parametrize("content", [b"{torn", b"\xff\xfe", b'{"models": 3}'])
def test_a_damaged_recipe_is_refused(lists, tiny, tmp_path, capsys, content):
    out = copied(lists, tmp_path / "out")
    (out / "recipe.json").write_bytes(content)
    says = "was made with another" if b"models" in content else "holds images, but no recipe.json"
    fails(synpic.main, synpic_args(tiny, out), says, "another --out", capsys=capsys)
    assert (out / "recipe.json").read_bytes() == content


def test_what_can_be_made_again_is(lists, tiny, tmp_path, capsys):
    """Damaged summary, preview, metadata are written anew; what timings lost is said."""
    out = copied(lists, tmp_path / "out")
    for name in ("summary.json", "preview.png", "metadata.jsonl"):
        (out / name).write_bytes(b"\xff\x00 junk")
    with open(out / "timings.jsonl", "ab") as f:
        f.write(b'{"torn\n\xff\n[]\n{"stage": 1}\n')
        f.write(b'{"stage": "score", "name": "x", "images": 1e999, "seconds": NaN}\n{"unended')
    capsys.readouterr()
    synpic.main(synpic_args(tiny, out))
    assert capsys.readouterr().out.count("damaged line") == 5
    for name in ("metadata.jsonl", "preview.png"):
        assert (out / name).read_bytes() == (lists / name).read_bytes(), name
    assert json.loads((out / "summary.json").read_text()) == json.loads((lists / "summary.json").read_text())


def test_the_content_of_a_pipeline_is_part_of_what_pictures_depend_on(tiny, tmp_path):
    """Other adapters under the same name and of the same size count; test_pipelines.py has every part."""
    base, adapters = tmp_path / "model", tmp_path / "a.safetensors"
    shutil.copytree(tiny / "sd15", base)
    adapters.write_bytes(b"some")
    cfg, rows = synpic.Config(out=str(tmp_path)), [("a", ["x.png"])]
    recipe = lambda at=base: draw.recipe_of(cfg, rows, [synpic.parse_model(f"sd15={at}+{adapters}")])
    before = recipe()
    draw.check_recipe(tmp_path, before, write=True)
    (base / "README.md").write_text("a model card draws nothing")
    assert recipe() == before == recipe(shutil.copytree(base, tmp_path / "moved"))
    adapters.write_bytes(b"same")
    with pytest.raises(SystemExit, match=r"made with another models sd15_0 path \+1 .before '"):
        draw.check_recipe(tmp_path, recipe())
    hub = lambda base: draw.recipe_of(cfg, rows, [dict(name="m", seed=0, path=f"{base}+{adapters}")])
    assert hub("org/one") != hub("org/other")  # the base of the same adapters


def test_lists_that_were_not_drawn_here_are_not_drawn_over(lists, tiny, tmp_path, capsys):
    out = copied(lists, tmp_path / "out", "scores", "recipe.json")
    before = (out / "metadata.jsonl").read_bytes()
    fails(synpic.main, synpic_args(tiny, out), "holds images, but no recipe.json", capsys=capsys)
    assert (out / "metadata.jsonl").read_bytes() == before and not (out / "recipe.json").exists()


def test_the_toys_models_are_for_the_toys_prompts(tiny, tmp_path, capsys):
    mine = ["--prompts", tiny / "prompts.txt", "--out", tmp_path / "out"]
    fails(synpic.main, mine, "--models: must be named", capsys=capsys)
    models = ["--models", f"a={tiny}/sdxl", f"b={tiny}/sd15"]
    fails(synpic.main, [*mine, *models], "--rewards: must be named", capsys=capsys)
    real = ["--models", "sdxl", "sdxl,seed=1", "--out", tmp_path / "out"]
    fails(synpic.main, real, "--rewards: must be named", capsys=capsys)
    assert not (tmp_path / "out").exists()
    cfg = synpic.with_toy_models(synpic.Config())
    assert cfg.models == synpic.TOY_MODELS and cfg.rewards == synpic.TOY_REWARDS


def test_a_path_that_exists_may_hold_a_comma_or_a_plus(tmp_path):
    base, adapters = tmp_path / "a,b+c", tmp_path / "d,seed=3"
    base.mkdir()
    adapters.mkdir()
    for path in (f"{base}", f"{base}+{adapters}"):
        model = synpic.parse_model(f"x={path},steps=3,seed=1")
        assert (model["path"], model["steps"], model["seed"]) == (path, 3, 1)


BAD_ROWS = [  # (what is changed in the third row, or the line that takes its place; what the line says)
    ("", "{torn", "line 3"),
    ("", DEEP, "line 3", "deep"),
    ("", '{"prompt": "\\ud83d", "file_names": ["a"]}', "line 3"),
    ("", b"\xff", "not UTF-8"),
    ("prompt", None, "line 3", "needs prompt"),
    ("file_names", [], "line 3", "needs prompt"),
    ("file_names", ["images/00002/sdxl_0.png"], "line 3", "at least two"),
    ("file_names", ["images/00002/sdxl_0.png"] * 5, "line 3", "5 times"),
    ("file_names", ["images/00002/sdxl_0.png", "a\0b"], "line 3", "inside the folder"),
    ("file_names", ["images/00002/sdxl_0.png", "../x.png"], "line 3", "../x.png"),
    ("file_names", ["images/00002/sdxl_0.png", "link.png"], "line 3", "link.png", "link out"),
    ("scores", {"clip": [1.0]}, "line 3", "scores of clip"),
    ("scores", {"clip": [1.0, 2.0, float("nan"), 1.0]}, "line 3", "finite"),
    ("scores", {"clip": ["1", "2", "3", "4"]}, "line 3", "finite"),
    ("scores", 0, "line 3", "scores must be an object"),
    ("file_names", ["images/00002/sdxl_0.png", "./images/00002/sdxl_0.png"], "line 3", "2 times"),
    ("phi", [1.0], "line 3", "needs as many phi"),
    ("phi", [2, 0, 0, 0], "line 3", "phi must lie in"),
    ("phi", [float("nan"), 0, 0, 0], "line 3", "phi must lie in"),
    ("", '{"prompt": "a", "prompt": "b"}', "line 3", "a key stands twice"),
]


@pytest.fixture(scope="module")
def linked(lists, tmp_path_factory):
    """(a copy of the lists with links out of it, its lines)."""
    root = tmp_path_factory.mktemp("linked")
    out = copied(lists, root / "out", "scores", "recipe.json")
    (root / "outside").mkdir()
    shutil.copy(out / "images/00000/sd3_0.png", root / "outside/a.png")
    os.symlink(root / "outside/a.png", out / "link.png")
    return out, (out / "metadata.jsonl").read_bytes().split(b"\n")


@pytest.mark.parametrize("key, value, says", [(row[0], row[1], row[2:]) for row in BAD_ROWS])
def test_bad_rows_are_named(linked, lists, key, value, says):
    """As the trainer and synpic.py --stages label read them."""
    out, lines = linked
    if key:
        row = {k: v for k, v in rows_of(lists)[2].items() if k not in (key, "scores")}
        value = json.dumps({**row, key: value} if value is not None else row)
    third = value if isinstance(value, bytes) else value.encode()
    (out / "metadata.jsonl").write_bytes(b"\n".join([*lines[:2], third, *lines[3:]]))
    fails(lambda _: read_metadata(out, lists=True, labelled=True), [], "metadata.jsonl", *says)


def test_doubled_and_absent_rows_and_torn_pictures_are_named(lists, tmp_path, capsys):
    out = copied(lists, tmp_path / "out")
    label = ["--out", out, "--stages", "label"]
    text = (out / "metadata.jsonl").read_text()
    (out / "metadata.jsonl").write_text(text + text.split("\n")[3] + "\n")
    fails(synpic.main, label, "line 11", "same prompt and images as line 4", capsys=capsys)
    (out / "metadata.jsonl").write_text("\n")
    fails(synpic.main, label, "no rows", capsys=capsys)
    (out / "metadata.jsonl").write_text(text)
    (out / rows_of(out)[0]["file_names"][1]).write_bytes(b"not a png")
    fails(synpic.main, label, rows_of(out)[0]["file_names"][1], "not a readable image", capsys=capsys)
    del (rows := rows_of(out))[2]["scores"]["clip"]
    shutil.rmtree(out / "scores")
    shutil.copy(out / rows[0]["file_names"][0], out / rows[0]["file_names"][1])
    fails(
        synpic.main, ["--out", write_rows(out, rows), *label[2:]], "row 3: no scores of clip", capsys=capsys
    )


def test_odd_rows_that_are_right_are_taken(lists, tmp_path):
    """U+2028 in a prompt, blank lines, makers that are not told in full, a reward with a name of its own."""
    out = copied(lists, tmp_path / "out", "scores", "recipe.json")
    rows = rows_of(out)
    rows[0]["prompt"] = "one\u2028prompt\u0085only, 猫 \U0001f408 \x00"
    rows[1]["models"] = ["sdxl"]
    del rows[2]["seeds"]
    for row in rows:
        row["scores"].update({"mine": [3, 1, 2, 0], "$a$_{": [1, 1, 1, 1]})
    text = "\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    (out / "metadata.jsonl").write_text(text)
    (out / "scores").mkdir()
    other = {"version": "", "prompt": rows[3]["prompt"], "file_names": rows[3]["file_names"]}
    (out / "scores/other.jsonl").write_text(json.dumps({**other, "scores": [1.0, 2.0, 3.0, 4.0]}) + "\n")
    synpic.main(["--out", str(out), "--stages", "label", "--label", "single:mine"])
    assert "NaN" not in (out / "summary.json").read_text()
    labelled = rows_of(out)
    assert all(row["phi"] == pytest.approx([1, 1 / 3, 2 / 3, 0]) for row in labelled)
    assert labelled[0]["prompt"] == rows[0]["prompt"] and labelled[3]["scores"]["other"] == [1, 2, 3, 4]


def test_a_label_may_count_stored_scores_of_any_name(lists, tmp_path, capsys):
    """Of a function of the user's, or of another program: `--rewards mine` is a name, without its file."""
    out = copied(lists, tmp_path / "out", "recipe.json")
    rows = rows_of(out)
    lines = []
    for n, row in enumerate(rows):
        row["scores"]["theirs"] = [0, 1, 2, 3]
        scored = dict(version="v", prompt=row["prompt"], file_names=row["file_names"], scores=[3, 2, 1, n])
        lines.append(json.dumps(scored) + "\n")
    write_rows(out, rows)
    (out / "scores/mine.jsonl").write_text("".join(lines))
    label = ["--out", str(out), "--stages", "label", "--rewards"]
    synpic.main([*label, "theirs"])
    assert [row["rank"] for row in rows_of(out)] == [[4, 3, 2, 1]] * 10
    synpic.main([*label, "mine"])
    assert rows_of(out)[0]["rank"] == [1, 2, 3, 4] and rows_of(out)[9]["rank"] == [2, 3, 4, 1]
    fails(synpic.main, [*label, "mien"], "no such scores: mien", "mine", capsys=capsys)


def test_an_imagefolder_is_read_or_its_metadata_is_named(lists, tmp_path, capsys):
    folder = tmp_path / "data/train"
    shutil.copytree(lists / "images/00000", folder)
    (folder / "metadata.csv").write_text('file_name,text\nsd3_0.png,"a circle,\nred"\nsd15_0.png,a square\n')
    rows = read_metadata(folder)
    assert [(row["prompt"], row["file_names"]) for row in rows] == [
        ("a circle,\nred", ["sd3_0.png"]),
        ("a square", ["sd15_0.png"]),
    ]
    with pytest.raises(SystemExit, match="metadata.csv, line 2: needs at least two file_names"):
        read_metadata(folder, lists=True)
    with pytest.raises(SystemExit, match="data/train/metadata.csv"):
        read_metadata(tmp_path / "data")
