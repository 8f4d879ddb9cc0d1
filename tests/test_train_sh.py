"""The command line: train.sh and its recipes on tiny models, and every script's one line for bad input."""

import os
import shlex
import subprocess

import pytest
from conftest import HERE, log_of, rewards, together

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


BOTH = dict(PROMPTS="README.md", EVAL_PROMPTS="README.md")
THREE = ["synpic.py", "rankdpo.py", "evaluate.py"]


def test_the_toy_task_prints_its_three_commands():
    assert scripts_of(commands_of(train_sh(check=True))) == THREE


@pytest.mark.parametrize(
    "task, env, says",
    [
        ("sd4", {}, "sd4"),
        ("sdxl", {}, "PROMPTS"),
        ("sdxl", {**BOTH, "PROMPTS": "none.txt"}, "PROMPTS=none.txt"),
        ("sd3", {**BOTH, "EVAL_PROMPTS": "none.txt"}, "EVAL_PROMPTS=none.txt"),
        ("sd15", {"EVAL_PROMPTS": "README.md"}, "PICKAPIC"),
        ("sdxl", {**BOTH, "GPUS": "0"}, "GPUS=0"),
        ("sdxl", {**BOTH, "REWARDS": " "}, "REWARDS is blank"),
    ],
)
def test_train_sh_refuses_what_it_does_not_know(task, env, says):
    done = train_sh(task, **env)
    assert done.returncode != 0 and says in done.stderr and done.stdout == ""
    assert len(done.stderr.strip().splitlines()) == 1


def test_the_balanced_recipe_is_the_papers(tmp_path):
    """BalancedDPO: 2000 steps of 128 pairs, four rewards vote, refresh 100, SD 1.5 at 512 px."""
    env = dict(BIN="", GPUS="8", PICKAPIC="README.md", EVAL_PROMPTS="README.md", OUT="o")
    env["REWARDS"] = "clip=x mps"
    commands = commands_of(train_sh("sd15", check=True, **env))
    assert scripts_of(commands) == ["synpic.py", "rewards.py", "synpic.py", "rankdpo.py", "evaluate.py"]
    assert commands[1][2:] == "--score o/synpic --rewards clip=x mps".split()
    options = " ".join(commands[3])
    wanted = "--loss balanced|--steps 2000|--ref_refresh 100|--global_batch_size 128|--resolution 512"
    assert all(option in options for option in wanted.split("|")) and "--label_rewards clip mps" in options
    del env["REWARDS"]
    options = " ".join(commands_of(train_sh("sd15", check=True, **env))[3])
    assert "--label_rewards pickscore-cosine hpsv2 clip aesthetic" in options  # HPS v2.0: the paper's means
    assert "--schedule constant" in options and "--warmup_steps 500" in options
    options = " ".join(commands_of(train_sh("sd15", check=True, LOSS="dpo", **env))[3])
    assert "--loss dpo" in options and "--label_rewards" not in options  # phi, stored, is of those rewards


def test_the_dro_recipe_is_that_of_the_public_code():
    """Diffusion-DRO: 1,600 steps of 256 pairs, 500 experts by HPSv2, a constant 1e-4, EMA .9999, SD 1.5."""
    env = dict(BIN="", GPUS="8", PICKAPIC="README.md", EVAL_PROMPTS="README.md", OUT="o")
    commands = commands_of(train_sh("dro", check=True, **env))
    assert scripts_of(commands) == ["synpic.py", "rewards.py", "synpic.py", "rankdpo.py", "evaluate.py"]
    options = " ".join(commands[3])
    wanted = "--loss dro|--steps 1600|--global_batch_size 256|--resolution 512|--lr 1e-4|--schedule constant"
    wanted += "|--warmup_steps 0|--experts 500|--expert_by hpsv2|--ema .9999|--sampler_refresh 20"
    assert all(option in options for option in wanted.split("|")) and "--beta" not in options
    by_pickscore = commands_of(train_sh("dro", check=True, REWARDS="pickscore=a.safetensors", **env))[3]
    assert "--expert_by pickscore --" in " ".join(by_pickscore)


@pytest.mark.parametrize("options", ["--lora_rank=64", "--keep 2 --lora_rank  8"])
def test_adapters_get_their_rate_and_are_evaluated_upon_their_base(options):
    """They were trained at the rate of all weights, and failed at the evaluation, after all training."""
    env = dict(BIN="", GPUS="8", OUT="o", MODEL="m", **BOTH)
    _, train, evaluation = commands_of(train_sh("sdxl", check=True, TRAIN_OPTIONS=options, **env))
    assert "--lr 1e-4 " in " ".join(train) and "tuned=m+o/rankdpo/model" in evaluation
    _, train, evaluation = commands_of(train_sh("sdxl", check=True, TRAIN_OPTIONS="--lora_rank 0", **env))
    assert "--lr 2e-5 " in " ".join(train) and "tuned=o/rankdpo/model" in evaluation
    _, train, _ = commands_of(train_sh("sdxl", check=True, TRAIN_OPTIONS=options, LR="3e-4", **env))
    assert "--lr 3e-4 " in " ".join(train)


def test_all_gpus_draw_train_and_evaluate():
    env = dict(BIN="", GPUS="8", **BOTH)
    for command in commands_of(train_sh("sdxl", check=True, **env)):
        assert command[:4] == ["torchrun", "--standalone", "--nproc_per_node", "8"]


def test_every_command_of_a_recipe_runs_on_tiny_models(tiny, tmp_path):
    """The commands that DRY_RUN prints, with tiny models and sizes in the variables, then run by two children
    of this process, which cost no imports. test_engine.py has torchrun itself."""
    models = [f"{name}={tiny}/{name},steps=1" for name in ("sdxl", "sd3", "sd15")]
    models.append(f"sdxl={tiny}/sdxl,steps=1,seed=1")
    env = dict(BIN="", GPUS="2", OUT=str(tmp_path), MODEL=f"{tiny}/sdxl", MODELS=" ".join(models))
    env.update(PROMPTS=f"{tiny}/prompts.txt", EVAL_PROMPTS=f"{tiny}/prompts.txt")
    env.update(REWARDS=" ".join(rewards(tiny)), STEPS="2", WARMUP="1", BATCH="4", RESOLUTION="32")
    env.update(EVAL_LIMIT="2", EVAL_OPTIONS="--steps 1 --seeds 2", REF_REFRESH="1", SAVE_EVERY="1")
    env.update(TRAIN_OPTIONS="--sample_every 1 --sample_steps 1")
    commands = commands_of(train_sh("sdxl", check=True, **env))
    assert scripts_of(commands) == THREE and commands[0][0] == commands[1][0] == "torchrun"
    for command, script in zip(commands, (synpic, rankdpo, evaluate)):
        together(script.main, command[command.index(f"{script.__name__}.py") + 1 :])
    assert (tmp_path / "rankdpo/model/model_index.json").is_file()
    assert (tmp_path / "evaluation/report.md").is_file()
    assert log_of(tmp_path / "rankdpo")[0]["world"] == 2 and (tmp_path / "rankdpo/samples.png").is_file()
