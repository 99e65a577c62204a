#!/usr/bin/env bash
# The whole study, top to bottom: one start, several ways to post-train it, and every encoder opened up.
#
#   bash speedrun.sh                          one seed, five arms, up to half an hour on two CPU cores
#   SEEDS="0 1 2" bash speedrun.sh            the same for three seeds, paired
#   PAIRS=plain OUT=runs/plain bash speedrun.sh          other pairs: foreign (default), plain, own, ... (scenes.py)
#   ARMS=all STAGE1_STEPS=1500 SEEDS="0 1 2 3 4" OUT=runs/study bash speedrun.sh         the numbers in README
#   ARMS=all WORLD=large STAGE1_STEPS=20000 N_PAIRS=20000 OUT=runs/large bash speedrun.sh      for a GPU
#
# Learning rates of the default world were picked by sweep.sh. A stage whose output exists is not run again, and
# training goes on from its last save: a stopped study goes on where it was.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
SEEDS=${SEEDS:-0} STAGE1_STEPS=${STAGE1_STEPS:-600} PAIRS=${PAIRS:-foreign} OUT=${OUT:-runs}
ARMS=${ARMS:-more sft dpo grpo sft_grpo} WORLD=${WORLD:-scenes}
N_TEST=${N_TEST:-2000} PROBE_SEEDS=${PROBE_SEEDS:-3}
N_PAIRS=${N_PAIRS:-5000} EPOCHS=${EPOCHS:-2}  # 5000 pairs, 64 a step, twice: 158 steps
LR_SFT=${LR_SFT:-1e-3} LR_DPO=${LR_DPO:-3e-4} LR_DPO_SFT=${LR_DPO_SFT:-3e-4} LR_MPO=${LR_MPO:-1e-3}
LR_GRPO=${LR_GRPO:-3e-4}
MAIN=" more sft dpo dpo_sft mpo warm_sft warm_dpo grpo sft_grpo "
CONTROLS=" sft_slow dpo_fast sft_equal sft_long sft_drift other warm grpo_half "
[ "$ARMS" != all ] || ARMS=$MAIN$CONTROLS
for name in $ARMS; do
  case $MAIN$CONTROLS in *" $name "*) ;; *) echo "ARMS: there is no $name, but$MAIN$CONTROLS" >&2; exit 1 ;; esac
done
model=(--vision tiny --llm tiny)
[ "$WORLD" != large ] || model=(--vision tiny-96-8-256-6 --llm tiny-256-6 --lr 1e-3)

settings="WORLD=$WORLD ARMS=$ARMS STAGE1_STEPS=$STAGE1_STEPS PAIRS=$PAIRS N_TEST=$N_TEST PROBE_SEEDS=$PROBE_SEEDS"
settings+=" N_PAIRS=$N_PAIRS EPOCHS=$EPOCHS"
settings+=" LR_SFT=$LR_SFT LR_DPO=$LR_DPO LR_DPO_SFT=$LR_DPO_SFT LR_MPO=$LR_MPO LR_GRPO=$LR_GRPO"
source "$here/stages.sh"

wanted() { case " $ARMS " in *" $1 "*) ;; *) return 1 ;; esac; }

arm() {  # arm NAME SCRIPT FLAGS...: a stage, if it is one of ARMS
  wanted "$1" || return 0
  local output=$run/$1
  arms+=("$output")
  case $MAIN in *" $1 "*) probed+=("$output") ;; esac  # controls are asked, not probed
  shift
  stage "$output" "$@"
}

folders=()
for seed in $SEEDS; do
  run=$OUT/seed$seed
  folders+=("$run")
  stage "$run/stage1" train_sft.py --seed "$seed" --optimizer muon --batch_size 96 --n $((96 * STAGE1_STEPS)) \
    "${model[@]}" --data "$WORLD/train/sft/4"  # four questions about each picture, read once for all of them

  pairs=$WORLD/train/$PAIRS
  if [ "$PAIRS" = own ]; then
    pairs=$run/own.jsonl
    [ -e "$pairs" ] || python "$here/eval_vqa.py" "$run/stage1" --data "$WORLD/train/sft" --n "$N_PAIRS" \
      --seed "$((seed + 500))" --samples 4 --write_pairs "$pairs"
  fi
  # rows that stage 1 has not seen, in one order for all arms
  arms=("$run/stage1") probed=("$run/stage1")
  from=(--init "$run/stage1" --seed "$((seed + 1000))") all=(--n "$N_PAIRS" --epochs "$EPOCHS")
  sft=(train_sft.py "${from[@]}" "${all[@]}" --lr "$LR_SFT" --data "$pairs")
  dpo=(train_dpo.py "${from[@]}" "${all[@]}" --lr "$LR_DPO" --data "$pairs")
  arm more    "${sft[@]}" --data "$WORLD/train/sft"  # of a flag that comes twice the later counts
  arm sft     "${sft[@]}"
  arm dpo     "${dpo[@]}"
  arm dpo_sft "${dpo[@]}" --lr "$LR_DPO_SFT" --sft_weight 0.1
  arm mpo     "${dpo[@]}" --lr "$LR_MPO" --dpo_weight 0.8 --bco_weight 0.2 --sft_weight 1

  # is it the learning rate? that DPO computes more, or reads twice the text? that it moves less? would any contrast do?
  arm sft_slow "${sft[@]}" --lr "$LR_DPO"
  arm dpo_fast "${dpo[@]}" --lr "$LR_SFT"
  arm sft_equal "${sft[@]}" --epochs $((3 * EPOCHS / 2))  # DPO's FLOPs to a hundredth, its reference pass apart
  arm sft_long "${sft[@]}" --epochs $((2 * EPOCHS))
  if wanted sft_drift; then
    arm sft_drift "${sft[@]}" --max_drift "$(drift_of "$run/dpo")" --log_every 1
  fi
  arm other "${dpo[@]}" --data "$WORLD/train/other"

  # is it the shock of a new style? first only connector and LLM learn it, from other pairs (of PAIRS=own the same ones:
  # there are no others); then both arms as above
  arm warm "${sft[@]}" --lr_vision 0 --seed "$((seed + 2000))"
  arm warm_sft "${sft[@]}" --init "$run/warm"
  arm warm_dpo "${dpo[@]}" --init "$run/warm"

  # GRPO gets questions of its own, four about each picture, and as many pictures as there are pairs; or half as many,
  # alone and after SFT on half of the pairs
  half=$((N_PAIRS / 2))
  grpo=(train_grpo.py "${from[@]}" --batch_size 128 --lr "$LR_GRPO" --data "$WORLD/train/vqa/4" --n "$((4 * N_PAIRS))")
  arm grpo "${grpo[@]}"
  arm grpo_half "${grpo[@]}" --n "$((4 * half))"
  if wanted sft_grpo; then
    stage "$run/sft_half" "${sft[@]}" --n "$half"
    arm sft_grpo "${grpo[@]}" --n "$((4 * half))" --init "$run/sft_half"
  fi

  stage "$run/probe" probe.py "${probed[@]}" --seed "$seed" --n "$N_TEST" --seeds "$PROBE_SEEDS" --world "$WORLD"
  asked=("${arms[@]}" --resume --seed "$seed" --n "$N_TEST" --data "$WORLD/test/vqa")
  stage "$run/vqa"  eval_vqa.py "${asked[@]}"
  stage "$run/swap" eval_vqa.py "${asked[@]}" --reader "$run/stage1" --blind false
done
python "$here/report.py" "${folders[@]}" --out "$OUT"
