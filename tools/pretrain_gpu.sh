#!/usr/bin/env bash
# Recipes 1 to 4 on one GPU, as much at once as they allow: tools/pretrain_gpu.sh FOLDER [LOG]
# The cores draw while the GPU trains the VAE; the transformer begins as soon as the encoder is final, and the
# decoder and CLIP share the GPU with it. Minutes: DUALREAL_VAE_MINUTES and so on, see the recipes.
# Stopped, it goes on where it was. Recipe 4 copies what was made into the package, if all went well.
set -euo pipefail
WORK=$(realpath -m "$1") LOG=$(realpath -m "${2:-$1}")
cd "$(dirname "${BASH_SOURCE[0]}")/.."
mkdir -p "$WORK" "$LOG"
export DUALREAL_PRETRAIN=$WORK DUALREAL_REPO=${DUALREAL_REPO:-$PWD} PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
export PYTHONUNBUFFERED=1 OMP_NUM_THREADS=1
recipe() { python3 tools/recipes.py "$1" > "$LOG/recipe-$1$2.log" 2>&1 || { tail -n 3 "$LOG/recipe-$1$2.log"; false; }; }
recipe 01 "" & VAE=$!
DUALREAL_DRAW=0 recipe 02 -draws
(DUALREAL_DRAW=1 recipe 02 -draws-names; DUALREAL_WAIT=$VAE recipe 02 "") & TRANSFORMER=$!
recipe 03 "" & CLIP=$!
for job in $VAE $TRANSFORMER $CLIP; do wait $job; done # the first that failed ends this
recipe 04 ""
