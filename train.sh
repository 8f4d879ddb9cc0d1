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
#
# Variables of every task
#   DRY_RUN          1: print the commands and run none
#   BIN              folder of your own python and torchrun, as /env/bin/, or BIN= for those on PATH: no .venv
#   PYTHON           what .venv is made with (default: python3)
# Variables of the recipes sdxl, sd3, sd15, dro
#   PROMPTS          sdxl, sd3: a file with a prompt a line, or parquet (the paper: 58 k of Pick-a-Pic v2)
#   PICKAPIC         sd15, dro: a parquet of Pick-a-Pic v2, or a folder of its shards
#   EVAL_PROMPTS     held-out prompts, one a line, or GenEval's .jsonl
#   OUT              folder of the run (default: outputs/TASK)
#   GPUS             processes (default: the GPUs of this machine)
#   MODEL            the model to train
#   MODELS           sdxl, sd3: the generators
#   GEN_BATCH        sdxl, sd3: pictures drawn at once (8)
#   REWARDS          the rewards that rank
#   EVAL_REWARDS     the rewards that judge in the end
#   EVAL_LIMIT       held-out prompts to judge on (500)
#   EXPERTS          dro: how many of the best pictures are experts (500)
#   LOSS, BETA, LR, SCHEDULE, STEPS, WARMUP, REF_REFRESH, BATCH, DEVICE_BATCH, RESOLUTION, SAVE_EVERY
#                    options of rankdpo.py: --loss, --beta, ..., --global_batch_size, --device_batch_size, ...
#   SYNPIC_OPTIONS, TRAIN_OPTIONS, EVAL_OPTIONS
#                    more options of synpic.py, rankdpo.py, evaluate.py; they win over the recipe's
set -euo pipefail
set -f  # REWARDS=clip=models/* is a name, not a pattern of files
CDPATH='' cd -- "$(dirname -- "$0")"
task=${1:-toy}

script=${0##*/}  # here, after the cd

usage() { sed -n '2,/^set /p' "$script" | sed -n 's/^# \{0,1\}//p'; }

fail() {  # message [status]
  echo "train.sh: $1" >&2
  exit "${2:-1}"
}

note() { echo "train.sh: $1" >&2; }

near() {  # do two words differ by one letter, or by two neighbours that are swapped?
  local a=$1 b=$2
  while [ -n "$a" ] && [ "${a:0:1}" = "${b:0:1}" ]; do a=${a:1} b=${b:1}; done
  while [ -n "$a" ] && [ "${a: -1}" = "${b: -1}" ]; do a=${a%?} b=${b%?}; done
  [ "${#a}${#b}" = 22 ] && [ "$a" = "${b:1}${b:0:1}" ] && return
  [ "${#a}" -le 1 ] && [ "${#b}" -le 1 ]
}

check_names() {  # refuse a variable that is called almost like one of the table above; LR, BIN, OUT are too short
  local known name other
  known=" $(sed -n 's/^#   \([A-Z_][A-Z_, ]*\).*/\1/p' "$script" | tr -s ', \n' ' ') "
  for name in $(compgen -e); do
    [[ $known == *" $name "* ]] && continue
    for other in $known; do
      [ "${#other}" -gt 3 ] && near "$name" "$other" || continue
      fail "$name=${!name}: is no variable of train.sh; did you mean $other? Else unset $name"
    done
  done
}

setup() {  # .venv with requirements.txt; done once for each content of that file
  local python=${PYTHON:-python3}
  [ -z "${DRY_RUN:-}${BIN+set}" ] || return 0
  "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null \
    || fail "needs Python 3.10 or newer as $python; set PYTHON=/path/to/python"
  if ! cmp -s requirements.txt .venv/installed.txt; then
    [ -x .venv/bin/python ] || "$python" -m venv .venv
    echo "installing requirements.txt into .venv (torch with CUDA: about 6 GB on disk, a few minutes)"
    .venv/bin/python -m pip install -q -r requirements.txt
    cp requirements.txt .venv/installed.txt
  fi
}

step() {  # "1 of 3", and what it does
  echo "== $1 of $steps: $2" >&2
}

run() {  # print a command, and run it unless DRY_RUN is set
  printf '+'
  printf ' %q' "$@"
  echo
  [ -n "${DRY_RUN:-}" ] || "$@"
}

bin=${BIN-.venv/bin/}
experts=()             # options of Diffusion-DRO
samples="--sample_every 100"  # of the recipes; steps and guidance are the model's own
check_names
case "$task" in
  -h | --help | help)
    usage
    exit
    ;;
  test)
    setup
    "${bin}python" -m ruff check --config .ci/ruff.toml .
    # no:logging: each checkpoint logs thousands of lines for debugging, which pytest would collect
    "${bin}python" -m pytest -q -n 2 --dist worksteal -p no:logging test_losses.py tests
    exit
    ;;
  toy)
    setup
    steps=3
    step 1 "pictures and their ranks (all three together: minutes on 2 CPU cores)"
    run "${bin}python" synpic.py
    step 2 "training, 400 steps"
    run "${bin}python" rankdpo.py --sample_every 100
    step 3 "base and tuned model on 100 held-out prompts"
    run "${bin}python" evaluate.py
    if [ -z "${DRY_RUN:-}" ]; then
      echo "pictures: outputs/synpic/preview.png outputs/rankdpo/samples.png outputs/rankdpo/curves.png" \
        "outputs/evaluation/grid.png"
    fi
    exit
    ;;
  study)
    setup
    run "${bin}python" synpic.py
    run "${bin}python" toy/study.py
    run "${bin}python" toy/study.py --report
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
    : "${LR:=1.3e-6}" "${SAVE_EVERY:=100}"  # 1e-8 times the batch
    samples="--sample_every 500"
    ;;
  dro)  # arXiv 2510.18353 and its public code; what differs stands in docs/departures.md
    model=stable-diffusion-v1-5/stable-diffusion-v1-5
    sampling="--steps 50 --guidance 7.5"
    : "${REWARDS:=hpsv2}" "${EVAL_REWARDS:=pickscore hpsv2 clip aesthetic imagereward}" "${LOSS:=dro}"
    : "${STEPS:=1600}" "${BATCH:=256}" "${RESOLUTION:=512}" "${SCHEDULE:=constant}" "${WARMUP:=0}"
    : "${LR:=1e-4}" "${SAVE_EVERY:=100}"
    samples="--sample_every 400"
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
if [ -z "${GPUS:-}" ] && [ "$gpus" -lt 1 ]; then
  gpus=1
  note "no NVIDIA GPU was found here, so these commands are for one process; GPUS=8 is for eight"
fi
[[ $gpus =~ ^[1-9][0-9]*$ ]] || fail "GPUS=$gpus: a number of processes, 1 or more, is wanted"

out=${OUT:-outputs/$task}
model=${MODEL:-$model}
torchrun=("${bin}torchrun" --standalone --nproc_per_node "$gpus")
# torchrun kills 30 s after a SIGTERM; a step and a checkpoint take longer
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-900}
# torch 2.14 else calls, in a restart, the addresses of processes that are gone
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
setup
case "$task" in sd15 | dro) steps=5 ;; *) steps=3 ;; esac
note "hours, not minutes: python rankdpo.py --model random:sdxl --plan 8x80 counts them for each part"

# ---- data
case "$task" in
  sd15 | dro)  # people drew and chose; the rewards judge beside them, on one GPU
    step 1 "the pairs become lists"
    run "${bin}python" synpic.py --stages import --from "$PICKAPIC" --out "$out/synpic" --on_error skip
    step 2 "scores, on one GPU"
    run "${bin}python" rewards.py --score "$out/synpic" --rewards $REWARDS
    step 3 "ranks"
    run "${bin}python" synpic.py --stages label --out "$out/synpic" --rewards $REWARDS
    ;;
  *)
    step 1 "pictures and their ranks"
    run "${torchrun[@]}" synpic.py \
      --prompts "$PROMPTS" --out "$out/synpic" \
      --models ${MODELS:-sdxl sd3 pixart cascade} \
      --rewards ${REWARDS:-hpsv2.1 mps pickscore vqascore imagereward} \
      --batch_size "${GEN_BATCH:-8}" ${SYNPIC_OPTIONS:-}
    ;;
esac

# ---- training
: "${LOSS:=rankdpo}"
train_options="$samples ${TRAIN_OPTIONS:-}"  # of an option that is there twice the later one counts
voters=()  # names of rewards, without =source: not what people chose. The other losses take the stored phi
case "$task $LOSS" in
  "sd15 balanced" | "sd15 direct" | "sd15 random_scorer")
    for spec in $REWARDS; do voters+=("${spec%%=*}"); done
    ;;
esac
adapters=
[[ " $train_options" =~ .*\ --lora_rank[=\ ]+([0-9]+) ]] && [ "${BASH_REMATCH[1]}" -gt 0 ] && adapters=yes
rate=${LR:-$([ -n "$adapters" ] && echo 1e-4 || echo 2e-5)}

step $((steps - 1)) "training"
run "${torchrun[@]}" rankdpo.py \
  --data "$out/synpic" --model "$model" --out "$out/rankdpo" \
  --loss "$LOSS" ${BETA:+--beta "$BETA"} --lr "$rate" --schedule "${SCHEDULE:-linear}" \
  --steps "${STEPS:-400}" --warmup_steps "${WARMUP:-40}" --ref_refresh "${REF_REFRESH:-0}" \
  --global_batch_size "${BATCH:-1024}" ${DEVICE_BATCH:+--device_batch_size "$DEVICE_BATCH"} \
  --resolution "${RESOLUTION:-1024}" --save_every "${SAVE_EVERY:-20}" \
  ${voters[@]:+--label_rewards "${voters[@]}"} ${experts[@]:+"${experts[@]}"} $train_options

# ---- evaluation
step "$steps" "base and tuned model on held-out prompts"
run "${torchrun[@]}" evaluate.py \
  --models "base=$model" "tuned=${adapters:+$model+}$out/rankdpo/model" \
  --prompts "$EVAL_PROMPTS" --limit "${EVAL_LIMIT:-500}" \
  --rewards ${EVAL_REWARDS:-${REWARDS:-hpsv2.1 pickscore imagereward vqascore}} --out "$out/evaluation" \
  $sampling --resolution "${RESOLUTION:-1024}" --batch_size 8 --seeds 5 ${EVAL_OPTIONS:-}
