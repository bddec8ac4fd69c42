#!/usr/bin/env bash
# Recipes 1 to 4 on one GPU, as much at once as they allow:
#     tools/pretrain_gpu.sh FOLDER [LOG]
# FOLDER gets checkpoints, drawings and what is made: by the sizes of the arrays 13 GB, 5 GB more in TMPDIR while it draws,
# and some 10 GB of memory (not measured). DUALREAL_ANY_DEVICE=1 tries it without a GPU. LOG (default: FOLDER) gets a log for each recipe. 41 minutes of training, plus drawing with all cores.
# The cores draw while the GPU trains the VAE; the transformer begins as soon as the encoder is final, and the
# decoder and CLIP share the GPU with it. Minutes: DUALREAL_VAE_MINUTES and so on, see the recipes.
# Stopped, it goes on where it was, when started again. DUALREAL_INSTALL=1 also copies what was made into the package.
set -euo pipefail
[ $# -ge 1 ] || { echo "usage: tools/pretrain_gpu.sh FOLDER [LOG]" >&2; exit 2; }
WORK=$(realpath -m "$1") LOG=$(realpath -m "${2:-$1}")
cd "$(dirname "${BASH_SOURCE[0]}")/.."
[ -x .venv/bin/python ] && PATH=$PWD/.venv/bin:$PATH
export DUALREAL_PRETRAIN=$WORK DUALREAL_REPO=${DUALREAL_REPO:-$PWD} PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
export PYTHONUNBUFFERED=1 OMP_NUM_THREADS=1 DUALREAL_INSTALL=${DUALREAL_INSTALL:-0}
PYTHON=$(command -v python3 || command -v python)
[ -n "${DUALREAL_ANY_DEVICE:-}" ] || "$PYTHON" -c 'import torch; raise SystemExit(not torch.cuda.is_available())' ||
    { echo "$PYTHON sees no GPU through torch: on a CPU run the recipes one by one, see nbs/recipes/01_toy_vae.ipynb" >&2; exit 2; }
mkdir -p "$WORK" "$LOG"
set -m # a process group for each job, so that none is left when this ends
trap 'for job in $(jobs -p); do kill -- -$job 2> /dev/null || true; done' EXIT
recipe() { "$PYTHON" tools/recipes.py "$1" > "$LOG/recipe-$1$2.log" 2>&1 || { tail -n 3 "$LOG/recipe-$1$2.log"; false; }; }
recipe 01 "" & VAE=$!
DUALREAL_DRAW=0 recipe 02 -draws
(DUALREAL_DRAW=1 recipe 02 -draws-names; DUALREAL_WAIT=$VAE recipe 02 "") & TRANSFORMER=$!
recipe 03 "" & CLIP=$!
for job in $VAE $TRANSFORMER $CLIP; do wait $job; done # in this order, the first that failed ends this
recipe 04 ""
cat << END
toy-base, toy-clip and toy-dino are in $WORK.
To use them, copy the three over dualreal/assets (DUALREAL_INSTALL=1 does it). All results in data/results/toy are of the
former base then; for the new one's:
    dualreal bench search --workers 16
    dualreal bench run --methods base,dualreal --seeds 0,1,2 --workers 16
    python tools/recipes.py 05
END
