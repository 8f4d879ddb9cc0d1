#!/usr/bin/env bash
# bash train.sh         set up .venv, then the toy pipeline: synpic -> rankdpo -> evaluate (CPU, minutes)
# bash train.sh test    set up .venv, then lint and every test
# bash train.sh study   what each objective buys in the toy world: docs/study.md (hours; resumes)
# PROMPTS=prompts.txt EVAL_PROMPTS=heldout.txt bash train.sh sdxl
#                       RankDPO's recipe for SDXL on all GPUs of this machine (the paper: 8 x A100 80 GB)
# PROMPTS=... EVAL_PROMPTS=... bash train.sh sd3        the same for SD3-Medium
# PICKAPIC=parquets EVAL_PROMPTS=heldout.txt bash train.sh sd15
#                       BalancedDPO's setting: people's pairs, four rewards' votes, SD 1.5 at 512 px
# PICKAPIC=parquets EVAL_PROMPTS=heldout.txt bash train.sh dro
#                       Diffusion-DRO's setting: 500 experts against the policy's own pictures, SD 1.5
#   OUT=outputs/sdxl    folder of the run    BETA, LR, STEPS, REF_REFRESH    what the papers leave open
#   GPUS=8              processes            DRY_RUN=1                       only print the commands
set -euo pipefail
set -f  # REWARDS=clip=models/* is a name, not a pattern of files
CDPATH='' cd -- "$(dirname -- "$0")"
task=${1:-toy}

usage() { sed -n '2,13p' "$0" | sed 's/^# \{0,1\}//'; }

fail() {  # message [status]
  echo "train.sh: $1" >&2
  exit "${2:-1}"
}

setup() {  # .venv with requirements.txt; done once for each content of that file
  local python=${PYTHON:-python3}
  "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null \
    || fail "needs Python 3.10 or newer as $python; set PYTHON=/path/to/python"
  if ! cmp -s requirements.txt .venv/installed.txt; then
    [ -x .venv/bin/python ] || "$python" -m venv .venv
    echo "installing requirements.txt into .venv (torch with CUDA: about 6 GB on disk, a few minutes)"
    .venv/bin/python -m pip install -q -r requirements.txt
    cp requirements.txt .venv/installed.txt
  fi
}

run() {  # print a command, and run it unless DRY_RUN is set
  printf '+'
  printf ' %q' "$@"
  echo
  [ -n "${DRY_RUN:-}" ] || "$@"
}

experts=()  # options of Diffusion-DRO
case "$task" in
  -h | --help | help)
    usage
    exit
    ;;
  test)
    setup
    .venv/bin/ruff check --config .ci/ruff.toml .
    # no:logging: each checkpoint logs thousands of lines for debugging, which pytest would collect
    .venv/bin/python -m pytest -q -n 2 --dist worksteal -p no:logging test_losses.py tests
    exit
    ;;
  toy)
    [ -n "${DRY_RUN:-}" ] || setup
    run .venv/bin/python synpic.py
    run .venv/bin/python rankdpo.py --sample_every 100
    run .venv/bin/python evaluate.py
    if [ -z "${DRY_RUN:-}" ]; then
      echo "pictures: outputs/synpic/preview.png outputs/rankdpo/samples.png outputs/rankdpo/curves.png" \
        "outputs/evaluation/grid.png"
    fi
    exit
    ;;
  study)
    [ -n "${DRY_RUN:-}" ] || setup
    run .venv/bin/python synpic.py
    run .venv/bin/python toy/study.py
    run .venv/bin/python toy/study.py --report
    exit
    ;;
  sdxl)
    model=stabilityai/stable-diffusion-xl-base-1.0
    : "${BETA:=2500}"
    sampling="--steps 40 --guidance 5"
    ;;
  sd3)
    model=stabilityai/stable-diffusion-3-medium-diffusers
    : "${BETA:=50}"
    sampling="--steps 28 --guidance 7"
    ;;
  sd15)  # arXiv 2503.12575, Sec. IV: 2000 steps of 128 pairs, the reference refreshed every 100
    model=stable-diffusion-v1-5/stable-diffusion-v1-5
    sampling="--steps 50 --guidance 7.5"
    # PickScore's unit is the papers' cosine, so that LOSS=dpo with --label sum adds what they add
    [ -n "${REWARDS-}" ] || : "${EVAL_REWARDS:=pickscore hpsv2 clip aesthetic}"
    : "${REWARDS=pickscore-cosine hpsv2 clip aesthetic}" "${LOSS:=balanced}" "${REF_REFRESH:=100}" "${BETA:=2500}"
    : "${STEPS:=2000}" "${BATCH:=128}" "${RESOLUTION:=512}" "${SCHEDULE:=constant}" "${WARMUP:=500}"
    : "${LR:=1.3e-6}" "${SAVE_EVERY:=100}" "${TRAIN_OPTIONS:=--sample_every 500}"  # 1e-8 times the batch
    ;;
  dro)  # arXiv 2510.18353 and its public code; what differs stands in docs/departures.md
    model=stable-diffusion-v1-5/stable-diffusion-v1-5
    sampling="--steps 50 --guidance 7.5"
    : "${REWARDS:=hpsv2}" "${EVAL_REWARDS:=pickscore hpsv2 clip aesthetic imagereward}" "${LOSS:=dro}"
    : "${STEPS:=1600}" "${BATCH:=256}" "${RESOLUTION:=512}" "${SCHEDULE:=constant}" "${WARMUP:=0}"
    : "${LR:=1e-4}" "${SAVE_EVERY:=100}" "${TRAIN_OPTIONS:=--sample_every 400}"
    expert_by=${REWARDS%%[ =]*}  # the first reward's name
    experts=(--experts "${EXPERTS:-500}" --expert_by "$expert_by" --sampler_refresh 20 --ema .9999)
    ;;
  *) fail "unknown task '$task'; use one of: toy (default), test, study, sdxl, sd3, sd15, dro" 2 ;;
esac

# ---- the paper's recipe: four generators, lists of four, 400 steps (arXiv 2410.18013, Sec. 4 and A.3).
# It gives no beta, learning rate or optimiser: BETA and LR are the usual values of public DPO trainers.
# VQAScore's 11 B model needs 46 GB in fp32, 23 GB as vqascore-bf16 (computed); the weights of MPS are a port
# that states no licence.
case "$task" in
  sdxl | sd3) needed=(PROMPTS EVAL_PROMPTS) ;;
  *) needed=(PICKAPIC EVAL_PROMPTS) ;;
esac
PROMPTS_IS="a file with a prompt a line, or parquet (the paper: 58 k of Pick-a-Pic v2)"
PICKAPIC_IS="a parquet of Pick-a-Pic v2, or a folder of its shards"
EVAL_PROMPTS_IS="held-out prompts, one a line, or GenEval's .jsonl"
for name in "${needed[@]}"; do
  meaning=${name}_IS
  [ -n "${!name:-}" ] || fail "set $name to ${!meaning}; docs/recipes.md says where they come from"
  [ -e "${!name}" ] || fail "$name=${!name}: no such file"
done
for name in REWARDS EVAL_REWARDS MODELS; do
  value=${!name-unset}
  [ -n "${value//[[:space:]]/}" ] || fail "$name is blank; name at least one, or unset it"
done
gpus=${GPUS:-$( (nvidia-smi -L 2>/dev/null || true) | grep -c . || true)}
[ -n "${GPUS:-}" ] || [ "$gpus" -gt 0 ] || gpus=1  # none was found
[[ $gpus =~ ^[1-9][0-9]*$ ]] || fail "GPUS=$gpus: a number of processes, 1 or more, is wanted"

out=${OUT:-outputs/$task}
model=${MODEL:-$model}
bin=${BIN-.venv/bin/}
torchrun=("${bin}torchrun" --standalone --nproc_per_node "$gpus")
# torchrun kills 30 s after a SIGTERM; a step and a checkpoint take longer
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-900}
# torch 2.14 else calls, in a restart, the addresses of processes that are gone
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
[ -n "${DRY_RUN:-}" ] || setup

# ---- data
case "$task" in
  sd15 | dro)  # people drew and chose; the rewards judge beside them, on one GPU
    run "${bin}python" synpic.py --stages import --from "$PICKAPIC" --out "$out/synpic" --on_error skip
    run "${bin}python" rewards.py --score "$out/synpic" --rewards $REWARDS
    run "${bin}python" synpic.py --stages label --out "$out/synpic" --rewards $REWARDS
    ;;
  *)
    run "${torchrun[@]}" synpic.py \
      --prompts "$PROMPTS" --out "$out/synpic" \
      --models ${MODELS:-sdxl sd3 pixart cascade} \
      --rewards ${REWARDS:-hpsv2.1 mps pickscore vqascore imagereward} \
      --batch_size "${GEN_BATCH:-8}" ${SYNPIC_OPTIONS:-}
    ;;
esac

# ---- training
: "${LOSS:=rankdpo}" "${TRAIN_OPTIONS=--sample_every 100 --sample_steps 28 --sample_guidance 5}"
voters=()  # names of rewards, without =source: not what people chose. The other losses take the stored phi
case "$task $LOSS" in
  "sd15 balanced" | "sd15 direct" | "sd15 random_scorer")
    for spec in $REWARDS; do voters+=("${spec%%=*}"); done
    ;;
esac
adapters=
[[ " $TRAIN_OPTIONS " =~ \ --lora_rank[=\ ]+[1-9] ]] && adapters=yes
rate=${LR:-$([ -n "$adapters" ] && echo 1e-4 || echo 2e-5)}

run "${torchrun[@]}" rankdpo.py \
  --data "$out/synpic" --model "$model" --out "$out/rankdpo" \
  --loss "$LOSS" ${BETA:+--beta "$BETA"} --lr "$rate" --schedule "${SCHEDULE:-linear}" \
  --steps "${STEPS:-400}" --warmup_steps "${WARMUP:-40}" --ref_refresh "${REF_REFRESH:-0}" \
  --global_batch_size "${BATCH:-1024}" ${DEVICE_BATCH:+--device_batch_size "$DEVICE_BATCH"} \
  --resolution "${RESOLUTION:-1024}" --save_every "${SAVE_EVERY:-20}" \
  ${voters[@]:+--label_rewards "${voters[@]}"} ${experts[@]:+"${experts[@]}"} $TRAIN_OPTIONS

# ---- evaluation
run "${torchrun[@]}" evaluate.py \
  --models "base=$model" "tuned=${adapters:+$model+}$out/rankdpo/model" \
  --prompts "$EVAL_PROMPTS" --limit "${EVAL_LIMIT:-500}" \
  --rewards ${EVAL_REWARDS:-${REWARDS:-hpsv2.1 pickscore imagereward vqascore}} --out "$out/evaluation" \
  ${EVAL_OPTIONS:-$sampling --resolution "${RESOLUTION:-1024}" --batch_size 8 --seeds 5}
