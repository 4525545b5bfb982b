#!/usr/bin/env bash
# A run on a slice of Cloud TPUs: asks for the slice as a queued resource, starts the same command on all of its
# workers, and does both again when the slice was preempted or a worker failed, until the run is finished.
#
#   launch/tpu_pod.sh up        asks for the slice and waits for it
#   launch/tpu_pod.sh run --config=w1_0:recipe=tfmg_v2,path=/mnt/shared/imagenet
#   launch/tpu_pod.sh status    the state of the slice, of the containers, and the newest lines
#   launch/tpu_pod.sh delete    saves (SIGTERM) and gives the slice back; until then it costs
#
# Must be set: NAME              of the slice, as mnv2
#              ZONE              as us-west4-a
#              ACCELERATOR_TYPE  as v5litepod-64
#              RUNTIME_VERSION   v2-alpha-tpuv5-lite (v5e), v2-alpha-tpuv5 (v5p), v2-alpha-tpuv6e (v6e),
#                                tpu-ubuntu2204-base (v4)
#              IMAGE             made by launch/Dockerfile with JAX=jax[tpu], in a registry that the workers can read
#              NFS               HOST:/SHARE, as of Filestore, in the slice's network; it is mounted as /mnt/shared.
#                                NFSv4.1, if it can: NFSv3 keeps the lock of a VM that was deleted
#              WORKDIR           the run's folder, as /mnt/shared/runs/w1_0
# May be set:  SPOT (1)          0: not as spot VMs, which are cheaper and preempted
#              MAX_RESTARTS (50)
#              POLL_S (30)       seconds between two looks at the slice
# Needs:       gcloud, logged in, with a project (gcloud config set project) and an SSH key in the agent (ssh-add
#              ~/.ssh/google_compute_engine); a quota for the accelerator; the Cloud TPU API enabled.
# Resumes:     run, started again, follows what is running, or starts it again. Ctrl-C ends only the following.
# Not taken for a fault: exit code 2, an error that is yours to mend.
set -euo pipefail

SHARE=/mnt/shared
fail() {
  echo "error: $1" >&2
  exit "${2:-1}"
}
tpus=(gcloud compute tpus)

state() { # nothing if there is no such queued resource
  "${tpus[@]}" queued-resources list --zone="$ZONE" --filter="name ~ /$NAME\$" --format='value(state.state)'
}

create() {
  local spot=()
  [[ ${SPOT:-1} == 0 ]] || spot=(--spot)
  "${tpus[@]}" queued-resources create "$NAME" --zone="$ZONE" --node-id="$NAME" \
    --accelerator-type="$ACCELERATOR_TYPE" --runtime-version="$RUNTIME_VERSION" "${spot[@]}"
}

delete() {
  "${tpus[@]}" queued-resources delete "$NAME" --zone="$ZONE" --force --quiet
}

on_workers() { # all, or the number of one; its exit code is the first of theirs that isn't 0
  "${tpus[@]}" tpu-vm ssh "$NAME" --zone="$ZONE" --worker="$1" --command="$2"
}

# The commands of a worker. gcloud repeats them when the connection breaks: each may run twice.
prepare() {
  cat <<END
set -e
if ! mountpoint -q $SHARE; then
  sudo apt-get -q update || true
  sudo apt-get -q -o DPkg::Lock::Timeout=600 install -y nfs-common
  sudo mkdir -p $SHARE
  sudo mount -t nfs ${NFS@Q} $SHARE
fi
case ${IMAGE@Q} in *.pkg.dev/*) sudo gcloud auth configure-docker ${IMAGE%%/*} --quiet ;; esac
sudo docker pull --quiet ${IMAGE@Q}
END
}
start() { # unless it is running
  cat <<END
[ "\$(sudo docker inspect --format '{{.State.Running}}' mnv2_jax 2>/dev/null)" != true ] || exit 0
sudo docker rm --force mnv2_jax >/dev/null 2>&1
exec sudo docker run --detach --init --name=mnv2_jax --privileged --network=host --volume=$SHARE:$SHARE \
--env=JAX_COMPILATION_CACHE_DIR=$SHARE/cache --entrypoint=python ${IMAGE@Q} \
-m mnv2_jax.main --workdir=${WORKDIR@Q} ${*@Q}
END
}
# shellcheck disable=SC2016  # expanded by the worker
follow='sudo docker logs --follow --tail=20 mnv2_jax; exit "$(sudo docker wait mnv2_jax || echo 75)"'

had= # the slice, and somebody else must have deleted it when it is gone: a preempted one is still listed
up() { # errors are passed on by hand: `run` wants to go on after them
  local now asked=
  while now=$(state); do
    case $now in
      ACTIVE)
        had=1
        break
        ;;
      '')
        [[ -z $had ]] || fail "$NAME was deleted; run again to ask for it anew"
        create || return
        asked=1
        ;;
      SUSPENDED | FAILED)
        if [[ -n $asked ]]; then
          echo "error: $NAME was asked for and is $now; launch/tpu_pod.sh status says why" >&2
          return 1
        fi
        delete || return
        had=
        ;;
      *)
        echo "$NAME: $now"
        sleep "${POLL_S:-30}"
        ;;
    esac
  done
  [[ $now == ACTIVE ]] || return 1
  on_workers all "$(prepare)"
}

run() {
  local restart status
  for ((restart = 0; restart <= ${MAX_RESTARTS:-50}; restart++)); do
    status=0
    { up && on_workers all "$(start "$@")" && on_workers all "$follow"; } || status=$?
    # A run that was stopped has saved and exited with 0 as well.
    if on_workers 0 "test -e ${WORKDIR@Q}/summary.json"; then
      echo "finished: $WORKDIR; launch/tpu_pod.sh delete gives the slice back"
      return
    fi
    ((status != 2)) || fail "exit code 2: mend what the lines above say, then run again" 2
    echo "not finished (exit code $status): goes on"
    sleep "${POLL_S:-30}"
  done
  fail "not finished after MAX_RESTARTS=${MAX_RESTARTS:-50} restarts; run again to go on" 75
}

: "${NAME:?is the name of the slice, as mnv2}" "${ZONE:?is the zone of the slice, as us-west4-a}"
verb=${1:-}
case $verb in
  up | run)
    : "${ACCELERATOR_TYPE:?is the kind and size of the slice, as v5litepod-64}"
    : "${RUNTIME_VERSION:?is the software of its VMs, as v2-alpha-tpuv5-lite for v5e}"
    : "${IMAGE:?is the image made by launch/Dockerfile, as REGION-docker.pkg.dev/PROJECT/REPOSITORY/mnv2_jax:tpu}"
    : "${NFS:?is the shared file system, as 10.0.0.2:/share}"
    : "${WORKDIR:?is the folder of the run, as $SHARE/runs/w1_0}"
    [[ $WORKDIR == "$SHARE"/* ]] || fail "WORKDIR=$WORKDIR is not below $SHARE: it would go with the slice" 2
    shift
    "$verb" "$@"
    ;;
  status)
    "${tpus[@]}" queued-resources describe "$NAME" --zone="$ZONE" --format='yaml(name,state,spot,tpu)'
    [[ $(state) == ACTIVE ]] || exit 0
    on_workers all 'sudo docker ps --all --filter=name=mnv2_jax --format="{{.Names}} {{.Status}}"'
    on_workers 0 'sudo docker logs --tail=20 mnv2_jax'
    ;;
  delete)
    [[ $(state) != ACTIVE ]] || on_workers all 'sudo docker stop --time=180 mnv2_jax' || true
    delete
    ;;
  *) fail "usage: $0 up | run --config=… | status | delete" 2 ;;
esac
