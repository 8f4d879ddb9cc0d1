"""Every command of docs/tables.md, in the page's order, on tiny models."""

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pandas
import pytest
from conftest import HERE, PROMPTS, log_of, rewards, rows_of
from test_import import CHOICES, pickapic
from test_rewards import aesthetic_folder

import evaluate
import rankdpo
import rewards as rewards_script
import synpic
from toy import world

PAGE = (HERE / "docs/tables.md").read_text(encoding="utf-8")
SMALL = {  # later options win: the method of a command stays, its size does not
    "synpic.py": [],
    "rewards.py": [],
    "rankdpo.py": "--steps 1 --warmup_steps 0 --global_batch_size 2 --resolution 32 --save_every 0".split(),
    "evaluate.py": "--limit 2 --seeds 1 --steps 1 --guidance 1 --resolution 0".split(),
}
MAINS = {"synpic.py": synpic, "rewards.py": rewards_script, "rankdpo.py": rankdpo, "evaluate.py": evaluate}
SAY = """
set -euf
say() { printf '%s\\037' "$@"; printf '\\n'; }
python() { say "$@"; }
torchrun() { [ "$1 $2 $3" = "--standalone --nproc_per_node 8" ]; shift 3; say "$@"; }
"""


def commands_of_the_page(env):
    """[[script, option, ...]] as bash expands the page's commands."""
    blocks = re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL)
    done = subprocess.run(
        ["bash", "-c", SAY + "\n".join(blocks)], env=env, capture_output=True, text=True, cwd=HERE
    )
    assert done.returncode == 0, done.stderr
    return [line.split("\x1f")[:-1] for line in done.stdout.splitlines()]


def write_benchmarks(folder):
    """The benchmarks' own files, of a few prompts of the toy world -> variables of the page."""
    (folder / "geneval").mkdir()
    tag = lambda prompt: world.grammar()[prompt]["tag"]
    rows = [json.dumps(dict(tag=tag(p), include=[], prompt=p)) for p in PROMPTS[:3]]
    (folder / "geneval/evaluation_metadata.jsonl").write_text("\n".join(rows) + "\n")
    (folder / "compbench").mkdir()
    (folder / "compbench/color_val.txt").write_text("a red circle\na green square\n")
    columns = "item_id,text,keywords,proposition_id,dependency,category_broad,category_detailed,tuple"
    rows = [f"{n},{p},,1,0,entity,whole,x,Is there a circle?" for n, p in enumerate(PROMPTS[:3])]
    (folder / "dpg.csv").write_text("\n".join([columns + ",question_natural_language", *rows]) + "\n")
    pandas.DataFrame({"caption": PROMPTS[:3]}).to_parquet(folder / "test.parquet")
    rows = [f"{p}\tArts\tBasic\t" for p in PROMPTS[:3]]
    (folder / "parti.tsv").write_text("\n".join(["Prompt\tCategory\tChallenge\tNote", *rows]) + "\n")
    (folder / "hpd").mkdir()
    (folder / "hpd/photo.json").write_text(json.dumps(PROMPTS[:3]))
    (folder / "safe").mkdir()
    for name in ("pickapic", "parti", "hpd"):  # one of three prompts is kept out
        (folder / f"safe/{name}.txt").write_text("\n".join(PROMPTS[:2]) + "\n")
    names = dict(GENEVAL="geneval", COMPBENCH="compbench", DPG="dpg.csv", PICKAPIC_TEST="test.parquet")
    names.update(PARTI="parti.tsv", HPD="hpd", SAFE="safe")
    return {name: f"{folder}/{file}" for name, file in names.items()}


@pytest.fixture(scope="module")
def commands(tiny, tmp_path_factory):
    root = tmp_path_factory.mktemp("page")
    (root / "aesthetic").mkdir()
    aesthetic_folder(root / "aesthetic")
    for name in ("sdxl", "sd15"):  # U-Nets as they are published, alone
        shutil.copytree(tiny / name / "unet", root / f"dpo-{name}/unet")
    many = [f"sdxl={tiny}/sdxl,steps=1", f"sd3={tiny}/sd3,steps=1", f"sd15={tiny}/sd15,steps=1"]
    one = [f"sdxl={tiny}/sdxl,steps=1,seed={seed}" for seed in range(3)]
    clip = f"clip={tiny}/rewards/clip"
    four = [f"hpsv2={tiny}/rewards/hps", clip, f"pickscore={tiny}/rewards/pick"]
    four.append(f"aesthetic={root}/aesthetic")
    labellers = " ".join(four).replace("pickscore=", "pickscore-cosine=")
    env = dict(SDXL=f"{tiny}/sdxl", SD3=f"{tiny}/sd3", SD15=f"{tiny}/sd15", PROMPTS=f"{tiny}/prompts.txt")
    env.update(DPO_SDXL=f"{root}/dpo-sdxl", DPO_SD15=f"{root}/dpo-sd15", VQASCORE=clip)
    env.update(GENERATORS=" ".join(many), ONE_GENERATOR=" ".join(one))
    env.update(REWARDS5=" ".join(rewards(tiny)), REWARDS4=" ".join(four), LABELLERS=labellers)
    env.update(PICKAPIC=str(pickapic(root / "people.parquet", CHOICES)), **write_benchmarks(root))
    return commands_of_the_page({**os.environ, **env})


def test_the_page_has_a_command_for_each_row(commands):
    """Each model that is measured was trained by a command above it, or is a published one."""
    trained, measured = set(), set()
    for script, *options in commands:
        if script == "rankdpo.py":
            trained.add(options[options.index("--out") + 1])
        if script == "evaluate.py":
            paths = [word.partition("=")[2].partition(",")[0] for word in options if "=" in word]
            used = {path.removesuffix("/model") for path in paths if path.startswith("outputs/")}
            assert used <= trained, (used - trained, options)
            measured |= used
    assert trained - measured == {"outputs/dpo-sd15"}  # stands beside the published one
    for table in ("Table 1", "Table 2", "Table 3", "Tables 4 and 5", "Figure 3", "Table 8"):
        assert f"# {table}" in PAGE
    for table in ("Table I;", "Table II", "Tables III and IV", "V and VI"):
        assert table in PAGE


def test_every_command_of_the_page_runs(commands, tmp_path, monkeypatch):
    def judge(bench, folder, rows, files, device, batch_size, sources):
        judged = bench in ("geneval", "t2i-compbench", "dpg")
        return ({bench: np.array([[0.5] * len(f) for f in files])}, []) if judged else ({}, [])

    monkeypatch.setattr(evaluate.benchmarks, "measure", judge)
    monkeypatch.setattr(evaluate, "draw_frontier", lambda *_: None)  # half a second each
    monkeypatch.chdir(tmp_path)
    for script, *options in commands:
        more = [*SMALL[script]]
        if "--study" in options:  # of two prompts
            more += ["--study", "2"]
        options = [re.sub(r",steps=\d+", ",steps=1", word) for word in options]
        MAINS[script].main([*options, *more])
    for script, *options in commands:
        out = Path(options[options.index("--out") + 1]) if "--out" in options else None
        if script == "rankdpo.py":
            assert (out / "model/model_index.json").is_file() and log_of(out)[-1]["step"] == 0
        if script == "evaluate.py":
            assert "(paper)" in (out / "report.md").read_text() and (out / "report.html").is_file()
    assert len(rows_of(tmp_path / "outputs/lists-sdxl")[0]["file_names"]) == 3
