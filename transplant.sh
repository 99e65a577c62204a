#!/usr/bin/env bash
# The transplant (PIVOT's last stage): what is an encoder worth to the next model? Each encoder is frozen, gets a fresh
# connector and a fresh LLM, and all are trained on the same rows for as long.
#
#   bash transplant.sh                        three seeds, under two hours of one CPU core
#   SEEDS=0 OUT=runs/try bash transplant.sh   one seed
#
# In the noisy world, whose pixels an encoder has to compress well: each patch is a whole cell, 432 numbers under heavy
# noise, of which the encoder passes on 32. (Where a random encoder passes on everything, the fresh LLM does the seeing,
# and it scores as well as a trained one.) A stage whose output exists is not run again.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
SEEDS=${SEEDS:-0 1 2} OUT=${OUT:-runs/transplant} STAGE1_STEPS=${STAGE1_STEPS:-1000} STEPS=${STEPS:-500}
N_TEST=${N_TEST:-2000} PROBE_SEEDS=${PROBE_SEEDS:-3} N_PAIRS=${N_PAIRS:-5000}
LR=${LR:-1e-3}  # for all arms; no sweep was made in this world (speedrun.sh's for DPO is 3e-4)
SMALL=tiny-36-12-32-4 LARGE=tiny-36-12-64-6

settings="STAGE1_STEPS=$STAGE1_STEPS STEPS=$STEPS N_TEST=$N_TEST PROBE_SEEDS=$PROBE_SEEDS N_PAIRS=$N_PAIRS LR=$LR"
source "$here/stages.sh"

folders=()
for seed in $SEEDS; do
  run=$OUT/seed$seed
  folders+=("$run")
  stage1=(--data noisy/train/sft/4 --pool 1 --optimizer muon --batch_size 96 --n $((96 * STAGE1_STEPS)) --seed "$seed")
  stage "$run/start" train_sft.py "${stage1[@]}" --vision $SMALL
  stage "$run/large" train_sft.py "${stage1[@]}" --vision $LARGE
  same=(--init "$run/start" --n "$N_PAIRS" --epochs 2 --lr "$LR" --seed "$((seed + 1000))")
  stage "$run/more" train_sft.py "${same[@]}" --data noisy/train/sft  # as many pictures as the arms see
  stage "$run/sft"  train_sft.py "${same[@]}" --data noisy/train/foreign
  stage "$run/dpo"  train_dpo.py "${same[@]}" --data noisy/train/foreign

  fresh=(--llm tiny --lr_vision 0 --data noisy/train/sft/4 --pool 1 --optimizer muon --batch_size 96 --n $((96 * STEPS))
         --seed "$((seed + 2000))")
  heads=()
  for connector in linear mlp; do
    stage "$run/random.$connector" train_sft.py "${fresh[@]}" --vision $SMALL --connector $connector
    heads+=("$run/random.$connector")
    for arm in start more sft dpo large; do
      stage "$run/$arm.$connector" train_sft.py "${fresh[@]}" --vision "$run/$arm/vision" --connector $connector
      heads+=("$run/$arm.$connector")
    done
  done
  for arm in start sft dpo; do  # the paper's "1+1": the first connector layer comes along, frozen too
    stage "$run/$arm.1+1" train_sft.py "${fresh[@]}" --vision "$run/$arm/vision" --connector_from "$run/$arm"
    heads+=("$run/$arm.1+1")
  done
  stage "$run/probe" probe.py "$run/start" "$run/more" "$run/sft" "$run/dpo" "$run/large" --world noisy --n "$N_TEST" \
    --seed "$seed" --seeds "$PROBE_SEEDS"
  stage "$run/vqa" eval_vqa.py --resume "${heads[@]}" --data noisy/test/vqa --n "$N_TEST" --seed "$seed"
done
python "$here/report.py" "${folders[@]}" --transplant --out "$OUT"
