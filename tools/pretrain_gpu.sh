#!/usr/bin/env bash
# Recipes 1 to 4 on one GPU, as much at once as they allow: tools/pretrain_gpu.sh FOLDER [LOG]
# The cores draw while the GPU trains the VAE; the transformer begins as soon as the encoder is final, and the
# decoder, CLIP and DINO share the GPU with it. Minutes: DUALREAL_VAE_MINUTES and so on, see the recipes.
# The new files are left in FOLDER; `tools/recipes.py 04` run once more copies them into the package.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
WORK=$1 LOG=${2:-$1}
export DUALREAL_PRETRAIN=$WORK DUALREAL_REPO=${DUALREAL_REPO:-$PWD} PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 OMP_NUM_THREADS=1
mkdir -p "$WORK" "$LOG"
run() { python3 tools/recipes.py "$1" > "$LOG/$2.log" 2>&1 && s=0 || s=$?; echo "$2: status $s, second $SECONDS"; }
recipe() { run "$1" "recipe-$1"; }
recipe 01 & VAE=$!
while [ ! -e "$WORK/pool-0.npy" ] && kill -0 $VAE 2>/dev/null; do sleep 1; done
echo "drawing, second $SECONDS"
draw() { (renice -n 10 $BASHPID > /dev/null; DUALREAL_DRAW=$1 run 02 "draw-$1"); }
draw 0
draw 1 &
while [ ! -e "$WORK/toy-vae" ] && kill -0 $VAE 2>/dev/null; do sleep 1; done
recipe 02 & recipe 03 & CLIP=$!
wait $CLIP
recipe 04
wait
