#!/usr/bin/env bash
# The whole study, top to bottom: one start, three ways to post-train it, and every encoder opened up.
#
#   bash speedrun.sh                          one seed, up to half an hour on two CPU cores
#   SEEDS="0 1 2" bash speedrun.sh            the same for three seeds, paired
#   SEEDS="0 1 2" STAGE1_STEPS=1500 OUT=runs/long bash speedrun.sh   stage 1 for longer: the numbers in README
#   PAIRS=plain OUT=runs/plain bash speedrun.sh          other pairs: foreign (default), plain, own
#
# A stage whose output exists is not run again, and training goes on from its last save: a stopped study goes on
# where it was.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
SEEDS=${SEEDS:-0} STAGE1_STEPS=${STAGE1_STEPS:-600} PAIRS=${PAIRS:-foreign} OUT=${OUT:-runs}
N_TEST=${N_TEST:-2000} PROBE_SEEDS=${PROBE_SEEDS:-3}
N_PAIRS=${N_PAIRS:-5000} EPOCHS=${EPOCHS:-2}  # 5000 pairs, 64 a step, twice: 158 steps
LR_SFT=${LR_SFT:-1e-3} LR_DPO=${LR_DPO:-1e-3} LR_GRPO=${LR_GRPO:-3e-4}

settings="STAGE1_STEPS=$STAGE1_STEPS PAIRS=$PAIRS N_TEST=$N_TEST PROBE_SEEDS=$PROBE_SEEDS N_PAIRS=$N_PAIRS"
settings+=" EPOCHS=$EPOCHS LR_SFT=$LR_SFT LR_DPO=$LR_DPO LR_GRPO=$LR_GRPO"
source "$here/stages.sh"

folders=()
for seed in $SEEDS; do
  run=$OUT/seed$seed
  folders+=("$run")
  stage "$run/stage1" train_sft.py --seed "$seed" --optimizer muon --batch_size 96 --n $((96 * STAGE1_STEPS)) \
    --data scenes/train/sft/4  # four questions about each picture, which is then read once for all of them

  pairs=scenes/train/$PAIRS
  if [ "$PAIRS" = own ]; then
    pairs=$run/own.jsonl
    [ -e "$pairs" ] || python "$here/eval_vqa.py" "$run/stage1" --data scenes/train/sft --n "$N_PAIRS" \
      --seed "$((seed + 500))" --samples 4 --write_pairs "$pairs"
  fi
  # rows that stage 1 has not seen, in one order for all arms
  same=(--init "$run/stage1" --n "$N_PAIRS" --epochs "$EPOCHS" --seed "$((seed + 1000))")
  stage "$run/more" train_sft.py "${same[@]}" --lr "$LR_SFT" --data scenes/train/sft/4
  stage "$run/sft"  train_sft.py "${same[@]}" --lr "$LR_SFT" --data "$pairs"
  stage "$run/dpo"  train_dpo.py "${same[@]}" --lr "$LR_DPO" --data "$pairs"

  # GRPO gets questions of its own, four about each picture, and as many pictures as there are pairs; after SFT on half
  # of the pairs (the later --n counts) half as many
  half=$((N_PAIRS / 2)) grpo=(--seed "$((seed + 1000))" --batch_size 128 --lr "$LR_GRPO" --data scenes/train/vqa/4)
  stage "$run/grpo" train_grpo.py --init "$run/stage1" --n "$((4 * N_PAIRS))" "${grpo[@]}"
  stage "$run/sft_half" train_sft.py "${same[@]}" --n "$half" --lr "$LR_SFT" --data "$pairs"
  stage "$run/sft_grpo" train_grpo.py --init "$run/sft_half" --n "$((4 * half))" "${grpo[@]}"

  arms=("$run/stage1" "$run/more" "$run/sft" "$run/dpo" "$run/grpo" "$run/sft_grpo")
  stage "$run/probe" probe.py    "${arms[@]}" --seed "$seed" --n "$N_TEST" --seeds "$PROBE_SEEDS"
  stage "$run/vqa"   eval_vqa.py --resume "${arms[@]}" --seed "$seed" --n "$N_TEST"
  stage "$run/swap"  eval_vqa.py --resume "${arms[@]}" --seed "$seed" --n "$N_TEST" --reader "$run/stage1"
done
python "$here/report.py" "${folders[@]}" --out "$OUT"
