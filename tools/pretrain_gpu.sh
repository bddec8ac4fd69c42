#!/usr/bin/env bash
# Recipes 1 to 4 on one GPU, as much at once as they allow: tools/pretrain_gpu.sh FOLDER [LOG]
# The cores draw while the GPU trains the VAE; the transformer begins as soon as the encoder is final, and the
# decoder and CLIP share the GPU with it. Minutes: DUALREAL_VAE_MINUTES and so on, see the recipes.
# Stopped, it goes on where it was. Recipe 4 copies what was made into the package, at the end.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
WORK=$1 LOG=${2:-$1}
export DUALREAL_PRETRAIN=$WORK DUALREAL_REPO=${DUALREAL_REPO:-$PWD} PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 OMP_NUM_THREADS=1
mkdir -p "$WORK" "$LOG"
run() { python3 tools/recipes.py "$1" > "$LOG/$2.log" 2>&1 && s=0 || s=$?; echo "$2: status $s, second $SECONDS"; }
recipe() { run "$1" "recipe-$1"; }
recipe 01 &
draw() { (renice -n 10 $BASHPID > /dev/null; DUALREAL_DRAW=$1 run 02 "draw-$1"); }
draw 0
draw 1 &
DUALREAL_WAIT=1 recipe 02 &
recipe 03
wait # recipe 4 compares both encoders, and copies all that was made into the package
recipe 04
