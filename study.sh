#!/usr/bin/env bash
# The studies that README reports, one after the other: hours on two CPU cores. What is there is not made again.
#
#   bash study.sh
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
bash "$here/sweep.sh"                                           # learning rates, on the tuning split
source runs/sweep/rates.sh
SEEDS="0 1 2 3 4" ARMS=all STAGE1_STEPS=1500 OUT=runs/study bash "$here/speedrun.sh"
SEEDS="0 1 3" bash "$here/path.sh"                               # when does an encoder lose it?
SEEDS="0 1" bash "$here/map.sh"                                 # what decides how much
SEEDS="0 1 2" bash "$here/transplant.sh"                        # what is an encoder worth to the next model?
