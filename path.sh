#!/usr/bin/env bash
# On the way: when does an encoder lose what stage 1's LLM reads in it? Four arms of the study are trained again with a
# save every 8 steps, and each save is put to the swap test.
#
#   SEEDS="0 1 3" bash path.sh                ten minutes of a CPU core a seed; after speedrun.sh's study with ARMS=all
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
SEEDS=${SEEDS:-0} OUT=${OUT:-runs/path} STUDY=${STUDY:-runs/study} N_TEST=${N_TEST:-500} EVERY=${EVERY:-8}
settings="STUDY=$STUDY N_TEST=$N_TEST EVERY=$EVERY"
source "$here/stages.sh"

folders=()
for seed in $SEEDS; do
  run=$OUT/seed$seed start=$STUDY/seed$seed/stage1
  folders+=("$run")
  same=(--data scenes/train/foreign --n 5000 --epochs 2 --seed "$((seed + 1000))" --save_every "$EVERY" --keep 999
        --log_every 2)
  stage "$run/sft"      train_sft.py --init "$start" "${same[@]}" --lr 1e-3
  stage "$run/sft_slow" train_sft.py --init "$start" "${same[@]}" --lr 3e-4
  stage "$run/dpo"      train_dpo.py --init "$start" "${same[@]}" --lr 3e-4
  stage "$run/warm_sft" train_sft.py --init "$STUDY/seed$seed/warm" "${same[@]}" --lr 1e-3
  for arm in sft sft_slow dpo warm_sft; do
    stage "$run/$arm.swap" eval_vqa.py "$start" "$run/$arm"/step-* --reader "$start" --n "$N_TEST" --seed "$seed" \
      --blind false --gallery 0
  done
done
python "$here/grids.py" path "${folders[@]}" --out "$OUT"
