#!/usr/bin/env bash
# One training run on one machine with one or several NVIDIA GPUs: one process drives them all.
# Usage: [GPUS=0,1,2,3] launch/gpu_node.sh CONFIG [key=value …]
set -euo pipefail

OPD=${OPD:-opd}  # the command, e.g. .venv/bin/opd
GPUS=${GPUS:-}   # indices of those to use; none given: all
MEMORY=${MEMORY:-0.92} # share of each GPU's memory that JAX takes at the start

if [[ $# -lt 1 || ! -f $1 ]]; then
  sed -n '3s/^# //p' "$0" >&2
  exit 2
fi
if ! nvidia-smi --list-gpus; then
  echo "no NVIDIA GPU here (nvidia-smi finds none)" >&2
  exit 2
fi
[[ -z $GPUS ]] || export CUDA_VISIBLE_DEVICES=$GPUS
export JAX_PLATFORMS=cuda # without this a broken driver means training on the CPU
export XLA_PYTHON_CLIENT_MEM_FRACTION=$MEMORY
# Ctrl-C and SIGTERM reach the process itself: it saves and ends with code 3; the same command goes on from there
exec "$OPD" train "$@" --auto-resume
