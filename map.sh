#!/usr/bin/env bash
# The map: what decides the sign of DPO minus SFT? How far stage 1 was taken, how foreign and how wrong the chosen
# answers are, who wrote them, beta, the number of pairs, the size of the model.
#
#   SEEDS="0 1" bash map.sh                   an hour of a CPU core a seed
#   WORLD=large STARTS="2000 20000" N_PAIRS=20000 SIZES="5000 40000" OUT=runs/large_map bash map.sh      for a GPU
#
# A condition is an SFT and a DPO run from one start, with the rates that sweep.sh picked for foreign pairs. A stage
# whose output exists is not run again.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
SEEDS=${SEEDS:-0} OUT=${OUT:-runs/map} WORLD=${WORLD:-scenes} N_TEST=${N_TEST:-1000} N_PAIRS=${N_PAIRS:-5000}
STARTS=${STARTS:-300 600 1500} STYLES=${STYLES:-plain taught_poor foreign_exact foreign foreign_poor}
BETAS=${BETAS-0.03 0.3 1} SIZES=${SIZES-1250 10000} OWN=${OWN-yes} WIDE=${WIDE-yes}  # set to nothing: left out
LR_SFT=${LR_SFT:-1e-3} LR_DPO=${LR_DPO:-3e-4}
model=(--vision tiny --llm tiny)
wide=(--vision tiny-36-6-128-4 --llm tiny-128-3)  # twice as wide
if [ "$WORLD" = large ]; then
  model=(--vision tiny-96-8-256-6 --llm tiny-256-6 --lr 1e-3) wide=(--vision tiny-96-8-512-6 --llm tiny-512-6 --lr 5e-4)
fi
settings="WORLD=$WORLD N_TEST=$N_TEST N_PAIRS=$N_PAIRS STARTS=$STARTS STYLES=$STYLES BETAS=$BETAS SIZES=$SIZES OWN=$OWN"
settings+=" WIDE=$WIDE LR_SFT=$LR_SFT LR_DPO=$LR_DPO"
source "$here/stages.sh"

folders=()
for seed in $SEEDS; do
  run=$OUT/seed$seed
  folders+=("$run")
  stage1=(train_sft.py --seed "$seed" --optimizer muon --batch_size 96 --data "$WORLD/train/sft/4")
  pair() {  # pair START CONDITION FLAGS...: both arms from START; both get the flags
    local start=$1 name=$1.$2; shift 2
    local same=(--init "$run/$start" --n "$N_PAIRS" --epochs 2 --seed "$((seed + 1000))")
    stage "$run/$name.sft" train_sft.py "${same[@]}" --lr "$LR_SFT" "$@"
    stage "$run/$name.dpo" train_dpo.py "${same[@]}" --lr "$LR_DPO" "$@"
  }
  for steps in $STARTS; do
    stage "$run/$steps" "${stage1[@]}" "${model[@]}" --n $((96 * steps))
    for style in $STYLES; do
      pair "$steps" "$style" --data "$WORLD/train/$style"
    done
  done
  pair "$steps" foreign --data "$WORLD/train/foreign"  # what beta and the sizes are compared with, whatever STYLES says
  for beta in $BETAS; do  # SFT has none: its run is that of the foreign pairs
    stage "$run/$steps.beta$beta.dpo" train_dpo.py --init "$run/$steps" --n "$N_PAIRS" --epochs 2 --lr "$LR_DPO" \
      --seed "$((seed + 1000))" --beta "$beta" --data "$WORLD/train/foreign"
  done
  for n in $SIZES; do  # as many steps, of fewer or more different pairs; N has to divide twice N_PAIRS
    pair "$steps" "n$n" --data "$WORLD/train/foreign" --n "$n" --epochs $((2 * N_PAIRS / n))
  done
  if [ -n "$OWN" ]; then
    [ -e "$run/own.jsonl" ] || python "$here/eval_vqa.py" "$run/$steps" --data "$WORLD/train/sft" --n "$N_PAIRS" \
      --seed "$((seed + 500))" --samples 4 --write_pairs "$run/own.jsonl"
    [ ! -s "$run/own.jsonl" ] || pair "$steps" own --data "$run/own.jsonl"  # a model that errs nowhere has none
  fi
  if [ -n "$WIDE" ]; then
    stage "$run/wide$steps" "${stage1[@]}" "${wide[@]}" --n $((96 * steps))
    pair "wide$steps" foreign --data "$WORLD/train/foreign"
  fi
  asked=(--resume --seed "$seed" --n "$N_TEST" --data "$WORLD/test/vqa" --blind false --gallery 0)
  for start in $STARTS ${WIDE:+wide$steps}; do
    stage "$run/vqa-$start"  eval_vqa.py "$run/$start" "$run/$start".*.{sft,dpo} "${asked[@]}"
    stage "$run/swap-$start" eval_vqa.py "$run/$start" "$run/$start".*.{sft,dpo} "${asked[@]}" --reader "$run/$start"
  done
done
python "$here/grids.py" map "${folders[@]}" --out "$OUT"
