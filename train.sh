#!/usr/bin/env bash
# bash train.sh                       set up .venv, then the toy pipeline: synpic -> rankdpo -> evaluate (CPU, minutes)
# bash train.sh test                  set up .venv, then every test
# PROMPTS=prompts.txt EVAL_PROMPTS=heldout.txt bash train.sh sdxl
#                                     the paper's recipe for SDXL on all GPUs of this machine (8 x A100 80 GB)
# PROMPTS=... EVAL_PROMPTS=... bash train.sh sd3     the same for SD3-Medium
#   OUT=outputs/sdxl  folder of the run        BETA, LR, STEPS, REF_REFRESH  what the papers leave open, see below
#   GPUS=8            processes for torchrun   DRY_RUN=1  only print the commands of the recipe
set -euo pipefail
cd "$(dirname "$0")"
task=${1:-toy}

usage() { sed -n '2,8p' "$0" | sed 's/^# \{0,1\}//'; }
case "$task" in
  toy|test|sdxl|sd3) ;;
  -h|--help|help) usage; exit 0 ;;
  *) echo "train.sh: unknown task '$task'; use one of: toy (default), test, sdxl, sd3" >&2; exit 2 ;;
esac

setup() {  # .venv with requirements.txt; done once for each content of that file
  local python; python=${PYTHON:-python3}
  "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null \
    || { echo "train.sh: needs Python 3.10 or newer as $python; set PYTHON=/path/to/python" >&2; exit 1; }
  if ! cmp -s requirements.txt .venv/installed.txt; then
    [ -x .venv/bin/python ] || "$python" -m venv .venv
    echo "installing requirements.txt into .venv (torch with CUDA: about 6 GB on disk, a few minutes)"
    .venv/bin/python -m pip install -q -r requirements.txt
    cp requirements.txt .venv/installed.txt
  fi
}

run() { printf '+'; printf ' %q' "$@"; echo; [ -n "${DRY_RUN:-}" ] || "$@"; }

if [ "$task" = test ]; then
  setup
  .venv/bin/python -m pytest -q
  exit
fi

if [ "$task" = toy ]; then
  [ -n "${DRY_RUN:-}" ] || setup
  run .venv/bin/python synpic.py
  run .venv/bin/python rankdpo.py --sample_every 100
  run .venv/bin/python evaluate.py
  [ -n "${DRY_RUN:-}" ] || echo "pictures: outputs/synpic/preview.png outputs/rankdpo/samples.png outputs/rankdpo/curves.png outputs/evaluation/grid.png"
  exit
fi

# ---- the paper's recipe: four generators, lists of four, 400 steps (arXiv 2410.18013, Sec. 4 and A.3).
# It gives no beta, learning rate or optimiser: BETA and LR are the usual values of public DPO trainers. VQAScore's 11 B
# model needs 24 GB; the weights of MPS are a port that states no licence.
: "${PROMPTS:?set PROMPTS to a text file with one prompt a line (the paper: 58 k prompts of Pick-a-Pic v2)}"
: "${EVAL_PROMPTS:?set EVAL_PROMPTS to held-out prompts, one a line, or a .jsonl as GenEval has it}"
[ -f "$PROMPTS" ] || { echo "train.sh: PROMPTS=$PROMPTS: no such file" >&2; exit 1; }
out=${OUT:-outputs/$task}
if [ "$task" = sdxl ]; then
  model=${MODEL:-stabilityai/stable-diffusion-xl-base-1.0} beta=${BETA:-2500} steps_guidance="--steps 40 --guidance 5"
else
  model=${MODEL:-stabilityai/stable-diffusion-3-medium-diffusers} beta=${BETA:-50} steps_guidance="--steps 28 --guidance 7"
fi
[ -n "${DRY_RUN:-}" ] || setup
bin=${BIN-.venv/bin/}
gpus=${GPUS:-$( (nvidia-smi -L 2>/dev/null || true) | grep -c . || true)}
[ "$gpus" -gt 0 ] || gpus=1
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-900}   # torchrun kills 30 s after a SIGTERM; a step and a checkpoint take longer
run ${bin}torchrun --nproc_per_node "$gpus" synpic.py --prompts "$PROMPTS" --out "$out/synpic" --models ${MODELS:-sdxl sd3 pixart cascade} \
  --rewards ${REWARDS:-hpsv2.1 mps pickscore vqascore imagereward} --batch_size ${GEN_BATCH:-8} ${SYNPIC_OPTIONS:-}
run ${bin}torchrun --nproc_per_node "$gpus" rankdpo.py --data "$out/synpic" --model "$model" --out "$out/rankdpo" \
  --loss "${LOSS:-rankdpo}" --beta "$beta" --lr "${LR:-2e-5}" --steps "${STEPS:-400}" --warmup_steps "${WARMUP:-40}" --ref_refresh "${REF_REFRESH:-0}" \
  --global_batch_size "${BATCH:-1024}" --device_batch_size "${DEVICE_BATCH:-1}" --resolution "${RESOLUTION:-1024}" --gradient_checkpointing true \
  --save_every "${SAVE_EVERY:-20}" ${TRAIN_OPTIONS:---sample_every 100 --sample_steps 28 --sample_guidance 5}
run ${bin}python evaluate.py --models "base=$model" "tuned=$out/rankdpo/model" --prompts "$EVAL_PROMPTS" --limit "${EVAL_LIMIT:-500}" \
  --rewards ${EVAL_REWARDS:-${REWARDS:-hpsv2.1 pickscore imagereward vqascore}} --out "$out/evaluation" ${EVAL_OPTIONS:-$steps_guidance --resolution 1024 --batch_size 8 --seeds 5}
