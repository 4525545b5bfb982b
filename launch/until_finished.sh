#!/usr/bin/env bash
# Trains in a container of an orchestrator that restarts what fails: exits with 0 only if the run is finished.
#
#   WORKDIR=/runs/w1_0 launch/until_finished.sh --config=w1_0:recipe=tfmg_v2,path=/data/imagenet
#
# Must be set: WORKDIR  the run's folder, on a file system that all processes mount
# Needs:       SIGTERM, which is forwarded, before a SIGKILL.
# Resumes:     started again.
# A run that was stopped by SIGTERM has saved all and exits with 0, but it isn't finished before summary.json is there:
# that is 75 here, try again.
set -uo pipefail
: "${WORKDIR:?is the folder of the run, on a file system that all processes mount}"

trap 'kill -s TERM "$!"' TERM INT HUP USR1
python -m mnv2_jax.main --workdir="$WORKDIR" "$@" &
while kill -s 0 "$!" 2>/dev/null; do wait "$!"; done # a signal interrupts wait
wait "$!" || exit
[[ -e $WORKDIR/summary.json ]] || exit 75
