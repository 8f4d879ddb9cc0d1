"""The command line: train.sh and its recipes on tiny models, and every script's one line for bad input.

pytest -q tests/test_train_sh.py
"""

import os
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import HERE, child, log_of, rewards, together

import evaluate
import rankdpo
import synpic


def train_sh(*args, check=False, **env):
    """`bash train.sh args` that prints its commands and runs none."""
    env = {**os.environ, "DRY_RUN": "1", **env}
    command = ["bash", "train.sh", *args]
    return subprocess.run(command, cwd=HERE, env=env, capture_output=True, text=True, check=check)


def commands_of(done):
    """The commands it printed, [[word, ...]], without the + of bash."""
    return [shlex.split(line[2:]) for line in done.stdout.splitlines()]


def scripts_of(commands):
    return [next(w for w in c if w.endswith(".py")) for c in commands]


THREE = ["synpic.py", "rankdpo.py", "evaluate.py"]


def test_the_toy_task_prints_its_three_commands():
    assert scripts_of(commands_of(train_sh(check=True))) == THREE


@pytest.mark.parametrize(
    "args, env, says",
    [
        (["sd4"], {}, "sd4"),
        (["sdxl"], {}, "PROMPTS"),
        (["sdxl"], {"PROMPTS": "none.txt", "EVAL_PROMPTS": "README.md"}, "PROMPTS=none.txt"),
        (["sd3"], {"PROMPTS": "README.md"}, "EVAL_PROMPTS"),
        (["sd3"], {"PROMPTS": "README.md", "EVAL_PROMPTS": "none.txt"}, "EVAL_PROMPTS=none.txt"),
        (["sd15"], {"EVAL_PROMPTS": "README.md"}, "PICKAPIC"),
        (["sd15"], {"PICKAPIC": "none.parquet", "EVAL_PROMPTS": "README.md"}, "PICKAPIC=none.parquet"),
        (["sdxl"], {"PROMPTS": "README.md", "EVAL_PROMPTS": "README.md", "GPUS": "0"}, "GPUS=0"),
        (["sdxl"], {"PROMPTS": "README.md", "EVAL_PROMPTS": "README.md", "GPUS": "all"}, "GPUS=all"),
    ],
)
def test_train_sh_refuses_what_it_does_not_know(args, env, says):
    done = train_sh(*args, **env)
    assert done.returncode != 0 and says in done.stderr and done.stdout == ""
    assert len(done.stderr.strip().splitlines()) == 1


def test_the_balanced_recipe_is_the_papers(tmp_path):
    """BalancedDPO: 2000 steps of 128 pairs, four rewards vote, refresh 100, SD 1.5 at 512 px."""
    env = dict(
        BIN="", GPUS="8", PICKAPIC="README.md", EVAL_PROMPTS="README.md", OUT="o", REWARDS="clip=x mps"
    )
    commands = commands_of(train_sh("sd15", check=True, **env))
    assert scripts_of(commands) == ["synpic.py", "rewards.py", "synpic.py", "rankdpo.py", "evaluate.py"]
    assert commands[1][2:] == "--score o/synpic --rewards clip=x mps".split()
    options = " ".join(commands[3])
    wanted = "--loss balanced|--steps 2000|--ref_refresh 100|--global_batch_size 128|--resolution 512"
    assert all(option in options for option in wanted.split("|")) and "--label_rewards clip mps" in options
    del env["REWARDS"]
    options = " ".join(commands_of(train_sh("sd15", check=True, **env))[3])
    assert "--label_rewards pickscore hpsv2.1 clip aesthetic" in options
    options = " ".join(commands_of(train_sh("sd15", check=True, LOSS="dpo", **env))[3])
    assert "--loss dpo" in options and "--label_rewards" not in options  # phi, stored, is of those rewards


@pytest.mark.parametrize("task", ["sdxl", "sd3"])
def test_every_command_of_the_recipes_runs_on_tiny_models(tiny, tmp_path, task):
    """The commands that DRY_RUN prints, with tiny models and sizes in the variables, then run one by one:
    those of sdxl as they are, those of sd3 in children of this process, which cost no imports."""
    models = [f"{name}={tiny}/{name},steps=1" for name in ("sdxl", "sd3", "sd15")]
    models.append(f"sdxl={tiny}/sdxl,steps=1,seed=1")
    env = dict(
        BIN="",
        GPUS="2",
        PROMPTS=f"{tiny}/prompts.txt",
        EVAL_PROMPTS=f"{tiny}/prompts.txt",
        OUT=str(tmp_path),
        MODEL=f"{tiny}/{task}",
        MODELS=" ".join(models),
        REWARDS=" ".join(rewards(tiny)),
        STEPS="2",
        WARMUP="1",
        BATCH="4",
        RESOLUTION="32",
        EVAL_LIMIT="2",
        EVAL_OPTIONS="--steps 1 --seeds 2",
        REF_REFRESH="1",
        SAVE_EVERY="1",
        TRAIN_OPTIONS="--sample_every 1 --sample_steps 1",
        PATH=f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    )
    commands = commands_of(train_sh(task, check=True, **env))
    assert scripts_of(commands) == THREE and commands[0][0] == commands[1][0] == "torchrun"
    for command, script in zip(commands, (synpic, rankdpo, evaluate)):
        if task == "sd3":
            options = command[command.index(f"{script.__name__}.py") + 1 :]
            together(script.main, options, processes=1 if script is evaluate else 2)
            continue
        done = subprocess.run(
            command, cwd=HERE, env={**os.environ, **env}, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, (command, done.stderr[-2000:])
    assert (tmp_path / "rankdpo/model/model_index.json").is_file()
    assert (tmp_path / "evaluation/report.md").is_file()
    assert log_of(tmp_path / "rankdpo")[0]["world"] == 2 and (tmp_path / "rankdpo/samples.png").is_file()


WRONG = (
    "rankdpo.py --data nowhere",
    "synpic.py --prompts nowhere",
    "evaluate.py --prompts nowhere.txt --models a=b c=d",
    "rewards.py --image nowhere",
    "toy/build.py --only everything",
)


def as_script(command):
    sys.argv = [str(HERE / command[0]), *command[1:]]
    runpy.run_path(sys.argv[0], run_name="__main__")


@pytest.mark.parametrize("command", WRONG)
def test_scripts_fail_with_one_line_on_the_command_line(command, tmp_path):
    process = child(as_script, command.split(), tmp_path / "said")
    process.join()
    says = (tmp_path / "said").read_text()
    assert process.exitcode != 0 and "Traceback" not in says
    assert len(says.strip().splitlines()) == 1, says


def test_an_interpreter_of_its_own_says_nothing_else():
    command = [sys.executable, *WRONG[2].split()]  # it imports all the others
    p = subprocess.run(command, cwd=HERE, capture_output=True, text=True, timeout=120)
    assert p.returncode == 1 and len((p.stdout + p.stderr).strip().splitlines()) == 1, p.stderr
