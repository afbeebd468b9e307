#!/usr/bin/env bash
# One training run on all workers of a Cloud TPU pod: makes the pod if asked, installs, trains, resumes.
# Usage: NAME=opd ZONE=us-west4-a launch/tpu_pod.sh CONFIG [key=value …]
# CONFIG and what it names (models, data, run_dir) are read on the workers, which share no disk: use gs:// paths.
set -euo pipefail

NAME=${NAME:-opd}                                # of the pod
ZONE=${ZONE:-}                                   # required
PROJECT=${PROJECT:-$(gcloud config get project)} # billed
ACCELERATOR=${ACCELERATOR:-}                     # to make the pod where there is none, e.g. v5litepod-16, v6e-16
RUNTIME=${RUNTIME:-v2-alpha-tpuv5-lite}          # image of a new pod; v2-alpha-tpuv5 (v5p), v2-alpha-tpuv6e (v6e)
SPOT=${SPOT:-}                                   # 1: cheaper, may be taken away; it is then made anew
PACKAGE=${PACKAGE:-opd-jax[tpu,gcs]}             # what to install: a requirement, a git+https:// or a wheel's URL
RESTARTS=${RESTARTS:-20}                         # give up after so many

if [[ $# -lt 1 || ! -f $1 || -z $ZONE ]]; then
  sed -n '2,4s/^# //p' "$0" >&2
  exit 2
fi
config=$1
shift

tpu() { gcloud compute tpus tpu-vm "$@" --project="$PROJECT" --zone="$ZONE" --quiet; }
everywhere() { tpu ssh "$NAME" --worker=all --command="$1"; }

make_pod() { # leaves a pod that is ready
  local state
  state=$(tpu describe "$NAME" --format='value(state)' 2> /dev/null || true)
  [[ $state != READY ]] || return 0
  if [[ -z $ACCELERATOR ]]; then
    echo "$NAME in $ZONE is ${state:-not there}; set ACCELERATOR to have it made" >&2
    exit 2
  fi
  [[ -z $state ]] || tpu delete "$NAME"
  tpu create "$NAME" --accelerator-type="$ACCELERATOR" --version="$RUNTIME" ${SPOT:+--spot}
}

install() { # a virtual environment, since the images bring an older Python than 3.11
  everywhere "python3 -m pip install --quiet --user uv \
    && python3 -m uv venv --quiet --allow-existing --python 3.11 opd-jax \
    && python3 -m uv pip install --quiet --python opd-jax/bin/python $(printf %q "$PACKAGE")" \
    && tpu scp "$config" "$NAME:opd-config.yaml" --worker=all
}

arguments=
[[ $# -eq 0 ]] || arguments=$(printf ' %q' "$@")
for ((restart = 0; restart <= RESTARTS; restart++)); do
  make_pod
  code=0
  install || code=$?
  [[ $code -eq 0 || $code -eq 255 ]] || exit "$code" # 255: no connection, perhaps not yet
  if [[ $code -eq 0 ]]; then
    # a process that the last attempt left behind would hold the chips
    everywhere "pkill -KILL -x opd; opd-jax/bin/opd train opd-config.yaml --auto-resume$arguments" || code=$?
  fi
  # 3: stopped and saved; 1 and 255: a worker was lost, or the connection to it
  [[ $code -eq 1 || $code -eq 3 || $code -eq 255 ]] || exit "$code"
  echo "exit code $code; resuming (restart $((restart + 1)) of $RESTARTS)" >&2
  sleep 30
done
exit "$code"
