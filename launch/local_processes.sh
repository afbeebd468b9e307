#!/usr/bin/env bash
# One training run as several processes of this machine, each with simulated CPU devices: a pod in small.
# Usage: launch/local_processes.sh PROCESSES DEVICES CONFIG [key=value …] [--resume]
set -uo pipefail
set -m # a process group each: Ctrl-C comes here first

OPD=${OPD:-opd}     # the command, e.g. .venv/bin/opd
PORT=${PORT:-8476}  # of the coordinator; runs at the same time need different ones
GRACE=${GRACE:-90}  # seconds that the others have to say who failed and to end

if [[ $# -lt 3 || ! $1 =~ ^[1-9][0-9]*$ || ! $2 =~ ^[1-9][0-9]*$ ]]; then
  sed -n '2,3s/^# //p' "$0" >&2
  exit 2
fi
export OPD_COORDINATOR=127.0.0.1:$PORT OPD_PROCESSES=$1 JAX_PLATFORMS=cpu JAX_NUM_CPU_DEVICES=$2
shift 2

running=()
for ((i = 0; i < OPD_PROCESSES; i++)); do
  OPD_PROCESS_ID=$i "$OPD" train "$@" < /dev/null > >(sed -u "s/^/[$i] /") 2> >(sed -u "s/^/[$i] /" >&2) &
  running+=($!)
done
stop() { kill "-$1" "${running[@]}" 2> /dev/null; }
trap 'stop TERM' INT TERM # they save, and end with code 3
trap 'stop KILL' EXIT

code=0 deadline=
while true; do
  wait -n "${running[@]}" 2> /dev/null
  status=$?
  [[ $status -eq 127 ]] && break # all have ended
  [[ $status -eq 0 || $code -ne 0 ]] && continue
  code=$status
  (sleep "$GRACE" && stop KILL) > /dev/null 2>&1 &
  deadline=$!
  disown "$deadline"
done
[[ -z $deadline ]] || kill -- "-$deadline" 2> /dev/null
exit "$code"
