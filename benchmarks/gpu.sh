#!/usr/bin/env bash
# The benchmark suite on a GPU: one command, within nine minutes, to be called again until it says that all is done.
#
#     bash benchmarks/gpu.sh                 # 520 seconds of pieces, results under benchmarks/results/<device>/
#     bash benchmarks/gpu.sh --budget 240    # less; finished pieces are never repeated
#     bash benchmarks/gpu.sh --list          # what there is to do, and what is done
#     bash benchmarks/gpu.sh --unpack F      # puts a suite.json that came back from another machine into the checkout
#     bash benchmarks/gpu.sh --smoke         # the same at toy sizes, on any machine: whether it works, not how fast
#
# Needs Python 3.11 or newer with jax (and its CUDA plugin), flax, optax, orbax-checkpoint and numpy; PyTorch for the
# peers. No network, no installation, no tensorflow-datasets, tyro or array_record. Where $OUT is set, everything also
# goes into one file there, $OUT/suite.json, after every piece.
#
# State: never yet run on a GPU, since none was at hand when it was written; only --smoke was, on a CPU.
set -euo pipefail
cd "$(dirname "$0")/.."

python=${PYTHON:-python3}
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
# jax would take three quarters of the memory and leave the peers too little.
export XLA_PYTHON_CLIENT_MEM_FRACTION="${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.45}"

exec "$python" -m benchmarks.gpu "$@"
