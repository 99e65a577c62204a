#!/usr/bin/env bash
# Which learning rate for which arm? From a start of its own, asked on layouts (the tuning split) that no result sees.
#
#   bash sweep.sh                             20 runs, half an hour of two CPU cores
#
# The arms that read pairs are all asked the same: is the chosen answer to a pair they have not met likelier than the
# rejected one? The lowest rate within 2 points of the best is taken (GRPO reads no pairs: within 0.3 points of the best
# mean reward in the second half of its training). The whole grid is printed, with what each rate costs elsewhere, and
# OUT/rates.sh sets the rates for speedrun.sh and map.sh, whose defaults they are.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
SEED=${SEED:-100} STAGE1_STEPS=${STAGE1_STEPS:-1500} OUT=${OUT:-runs/sweep} N_TEST=${N_TEST:-1000}
N_PAIRS=${N_PAIRS:-5000} EPOCHS=${EPOCHS:-2} RATES=${RATES:-1e-4 3e-4 1e-3 3e-3}
settings="SEED=$SEED STAGE1_STEPS=$STAGE1_STEPS N_TEST=$N_TEST N_PAIRS=$N_PAIRS EPOCHS=$EPOCHS RATES=$RATES"
source "$here/stages.sh"

stage "$OUT/stage1" train_sft.py --seed "$SEED" --optimizer muon --batch_size 96 --n $((96 * STAGE1_STEPS)) \
  --data scenes/train/sft/4
from=(--init "$OUT/stage1" --seed "$((SEED + 1000))")
pairs=("${from[@]}" --n "$N_PAIRS" --epochs "$EPOCHS" --data scenes/train/foreign)
runs=("$OUT/stage1")
for lr in $RATES; do
  stage "$OUT/sft-$lr"     train_sft.py "${pairs[@]}" --lr "$lr"
  stage "$OUT/dpo-$lr"     train_dpo.py "${pairs[@]}" --lr "$lr"
  stage "$OUT/dpo_sft-$lr" train_dpo.py "${pairs[@]}" --lr "$lr" --sft_weight 0.1
  stage "$OUT/mpo-$lr"     train_dpo.py "${pairs[@]}" --lr "$lr" --dpo_weight 0.8 --bco_weight 0.2 --sft_weight 1
  stage "$OUT/grpo-$lr"    train_grpo.py "${from[@]}" --lr "$lr" --n "$((4 * N_PAIRS))" --batch_size 128 \
    --data scenes/train/vqa/4
  for arm in sft dpo dpo_sft mpo grpo; do runs+=("$OUT/$arm-$lr"); done
done
asked=(--resume --seed "$SEED" --n "$N_TEST" --blind false --gallery 0)
stage "$OUT/pairs" eval_vqa.py "${runs[@]}" "${asked[@]}" --data scenes/tune/foreign
stage "$OUT/vqa"   eval_vqa.py "${runs[@]}" "${asked[@]}" --data scenes/tune/vqa
stage "$OUT/swap"  eval_vqa.py "${runs[@]}" "${asked[@]}" --data scenes/tune/vqa --reader "$OUT/stage1"
python "$here/grids.py" sweep "$OUT"
