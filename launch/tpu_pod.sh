#!/usr/bin/env bash
# Trains on a slice of Cloud TPUs. Requests the slice as a queued resource and starts the same command on all of its
# workers. Repeats both when the slice is preempted or a worker fails, until the run is finished.
#
#   launch/tpu_pod.sh up        requests the slice and waits for it
#   launch/tpu_pod.sh run --config=w1_0:recipe=tfmg_v2,path=/mnt/shared/imagenet
#   launch/tpu_pod.sh status    shows the state of the slice and its containers, and the newest log lines
#   launch/tpu_pod.sh delete    stops the run, which saves a checkpoint, and deletes the slice, which costs until then
#
# Must be set: NAME              name of the slice, e.g. mnv2
#              ZONE              e.g. us-west4-a
#              ACCELERATOR_TYPE  e.g. v5litepod-64
#              RUNTIME_VERSION   v2-alpha-tpuv5-lite (v5e), v2-alpha-tpuv5 (v5p), v2-alpha-tpuv6e (v6e),
#                                tpu-ubuntu2204-base (v4)
#              IMAGE             built from launch/Dockerfile with JAX=jax[tpu], in a registry that the workers can read
#              NFS               HOST:/SHARE in the slice's network, e.g. Filestore; mounted as /mnt/shared. Use NFSv4.1
#                                if possible: NFSv3 keeps the lock of a deleted VM
#              WORKDIR           the run folder, e.g. /mnt/shared/runs/w1_0
# May be set:  SPOT (1)          0 requests no spot VMs; spot VMs are cheaper but can be preempted
#              MAX_RESTARTS (50)
#              POLL_S (30)       seconds between two checks of the slice
# Needs:       gcloud, logged in, with a project (gcloud config set project) and an SSH key in the agent (ssh-add
#              ~/.ssh/google_compute_engine); a quota for the accelerator; the Cloud TPU API enabled.
# Resumes:     run the same command again: it follows the log of a running command, or starts the command again. Ctrl-C
#              only stops following. Exit code 2, an error that you must fix, is not retried; exit code 1, as after a
#              loss that isn't finite, is retried once.
set -euo pipefail

SHARE=/mnt/shared
fail() {
  echo "error: $1" >&2
  exit "${2:-1}"
}
need() { # VARIABLE WHAT_IT_IS
  [[ -n ${!1:-} ]] || fail "$1 must be set to $2" 2
}
tpus=(gcloud compute tpus)

state() { # prints nothing if the queued resource doesn't exist
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

# WORKER COMMAND; WORKER is a number or all. Returns the first exit code of a worker that isn't 0. A connection on which
# nothing arrives for 2 minutes is given up (255).
on_workers() {
  "${tpus[@]}" tpu-vm ssh "$NAME" --zone="$ZONE" --worker="$1" \
    --ssh-flag='-o ConnectTimeout=30 -o ServerAliveInterval=30 -o ServerAliveCountMax=4' --command="$2"
}

# Commands for the workers. gcloud repeats a command when the connection breaks, so each may run twice.
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
start() { # does nothing if the container is running
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

had= # set once the slice was active. If it then isn't listed, somebody deleted it: a preempted slice is still listed
up() { # returns errors explicitly, since `run` continues after them
  local now asked=
  while now=$(state); do
    case $now in
      ACTIVE)
        had=1
        break
        ;;
      '')
        [[ -z $had ]] || fail "$NAME was deleted; run the command again to request it again"
        create || return
        asked=1
        ;;
      SUSPENDED | FAILED)
        if [[ -n $asked ]]; then
          echo "error: the request for $NAME is $now; launch/tpu_pod.sh status shows the reason" >&2
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
  local restart status ended ones=0
  for ((restart = 0; restart <= ${MAX_RESTARTS:-50}; restart++)); do
    status=0 ended=
    { up && on_workers all "$(start "$@")" && { on_workers all "$follow" || status=$? ended=$?; }; } || status=$?
    # A run that was stopped early has exited with 0 too; only a finished run has a summary.json.
    if on_workers 0 "test -e ${WORKDIR@Q}/summary.json"; then
      echo "finished: $WORKDIR; to delete the slice, run launch/tpu_pod.sh delete"
      return
    fi
    ((status != 2)) || fail "exit code 2: fix the error in the lines above, then run the command again" 2
    [[ $ended == 1 ]] && ((++ones)) || ones=0
    ((ones < 2)) || fail "exit code 1 twice, as after a loss that isn't finite: fix the error in the lines above" 1
    echo "not finished (exit code $status): restarting"
    sleep "${POLL_S:-30}"
  done
  fail "not finished after MAX_RESTARTS=${MAX_RESTARTS:-50} restarts; run the command again to resume" 75
}

need NAME "the name of the slice, e.g. mnv2"
need ZONE "the zone of the slice, e.g. us-west4-a"
verb=${1:-}
case $verb in
  up | run)
    need ACCELERATOR_TYPE "the type and size of the slice, e.g. v5litepod-64"
    need RUNTIME_VERSION "the software of its VMs, e.g. v2-alpha-tpuv5-lite for v5e"
    need IMAGE "the image, e.g. REGION-docker.pkg.dev/PROJECT/REPOSITORY/mnv2_jax:tpu"
    need NFS "the shared file system, e.g. 10.0.0.2:/share"
    need WORKDIR "the run folder, e.g. $SHARE/runs/w1_0"
    [[ $WORKDIR == "$SHARE"/* ]] || fail "WORKDIR=$WORKDIR must be below $SHARE, or it is lost with the slice" 2
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
