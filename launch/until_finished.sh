#!/usr/bin/env bash
# Trains in a container whose orchestrator restarts failures. Exits with 0 only if the run is finished.
#
#   WORKDIR=/runs/w1_0 launch/until_finished.sh --config=w1_0:recipe=tfmg_v2,path=/data/imagenet
#
# Must be set: WORKDIR  the run folder, on a file system that all processes mount
# Needs:       an orchestrator that sends SIGTERM, which this script forwards, some time before SIGKILL.
# Resumes:     run it again.
# A run that gets SIGTERM saves a checkpoint and exits with 0, but only a finished run has a summary.json. Without that
# file this script exits with 75, so that the orchestrator tries again.
set -uo pipefail
if [[ -z ${WORKDIR:-} ]]; then
  echo "error: WORKDIR must be set to the run folder, on a file system that all processes mount" >&2
  exit 2
fi

trap 'kill -s TERM "$!"' TERM INT HUP USR1
python -m mnv2_jax.main --workdir="$WORKDIR" "$@" &
while kill -s 0 "$!" 2>/dev/null; do wait "$!"; done # a signal interrupts wait
wait "$!" || exit
[[ -e $WORKDIR/summary.json ]] || exit 75
