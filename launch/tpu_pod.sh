#!/usr/bin/env bash
# One training run on all workers of a Cloud TPU pod: makes the pod if asked, installs, trains, resumes.
# Usage: NAME=opd ZONE=us-west4-a launch/tpu_pod.sh CONFIG [key=value …]
# The workers share no disk: models, data and run_dir in CONFIG have to be gs:// paths.
set -euo pipefail

NAME=${NAME:-opd}                       # of the pod
ZONE=${ZONE:-}                          # required
ACCELERATOR=${ACCELERATOR:-}            # to make the pod where there is none, e.g. v5litepod-16, v6e-16, v5p-32
RUNTIME=${RUNTIME:-v2-alpha-tpuv5-lite} # image of a new pod; for v5p v2-alpha-tpuv5, for v6e v2-alpha-tpuv6e
SPOT=${SPOT:-}                          # 1: cheaper, may be taken away; it is then made anew
PACKAGE=${PACKAGE:-opd-jax[tpu,gcs]}    # what to install: a requirement, as also NAME[extras] @ git+https://…
RESTARTS=${RESTARTS:-20}                # give up after so many
PAUSE=${PAUSE:-30}                      # seconds before a restart

if [[ $# -lt 1 || ! -f $1 || -z $ZONE ]]; then
  sed -n '2,4s/^# //p' "$0" >&2
  exit 2
fi
files=$(mktemp -d)
trap 'rm -rf "$files"' EXIT
cp "$1" "$files/opd-config.yaml"
shift
arguments=
[[ $# -eq 0 ]] || arguments=$(printf ' %q' "$@")
cat > "$files/opd-run.sh" << END
opd-jax/bin/opd train opd-config.yaml --auto-resume$arguments > opd.log 2>&1
echo \$? > opd.exit
END

tpu() { gcloud compute tpus tpu-vm "$@" --zone="$ZONE" --quiet; }
everywhere() { tpu ssh "$NAME" --worker=all --command="$1"; }

make_pod() { # leaves one that is ready
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

# The images bring an older Python than 3.11, hence uv.
install="python3 -m pip install --quiet --user uv \
  && python3 -m uv venv --quiet --allow-existing --python 3.11 opd-jax \
  && python3 -m uv pip install --quiet --python opd-jax/bin/python $(printf %q "$PACKAGE")"
# Apart from the connection, which may break: gcloud then repeats its command, and to wait twice does no harm.
start="pgrep -x opd > /dev/null || { rm -f opd.exit opd.log; setsid -f bash opd-run.sh < /dev/null > /dev/null 2>&1; }"
wait="tail -n +1 -F opd.log 2> /dev/null & until [ -f opd.exit ]; do sleep 1; done; sleep 1; kill \$!; exit \$(cat opd.exit)"

for ((restart = 0; restart <= RESTARTS; restart++)); do
  make_pod
  code=0
  everywhere "$install" && tpu scp "$files"/* "$NAME:" --worker=all && everywhere "$start" || code=$?
  [[ $code -eq 0 || $code -eq 255 ]] || exit "$code" # 255: no connection, perhaps not yet
  [[ $code -ne 0 ]] || everywhere "$wait" || code=$?
  # 3: stopped and saved; 1: a worker was lost. 2 is a mistake that the next attempt would repeat.
  [[ $code -eq 1 || $code -eq 3 || $code -eq 255 ]] || exit "$code"
  echo "exit code $code; resuming (restart $((restart + 1)) of $RESTARTS)" >&2
  sleep "$PAUSE"
done
exit "$code"
