#!/usr/bin/env bash
# N processes on this machine as if they were N hosts: the same program as on a pod, on CPU devices.
#
#   launch/local_multihost.sh 2 --config=configs/w0_35.py:data=digits --workdir=runs/two
#
# May be set: DEVICES (1)      CPU devices of each process
#             PORT (8482)      of the coordinator, which is process 0
#             PYTHON (python)  the interpreter, as .venv/bin/python
#             GRACE (60)       once a process has failed, the others have so many seconds to end by themselves; then
#                              they get SIGTERM, and after as many again SIGKILL. If this script is killed: at once
# Needs:      bash 4.4 or newer.
# Resumes:    started again, with any N and DEVICES that divide the batch.
# SIGTERM, as which SIGHUP and SIGUSR1 count, and SIGINT go to all processes, which save at the same step. Each line of
# output starts with the number of its process. Exits with 0 if all did, otherwise with the first other code.
set -uo pipefail

if ! [[ ${1:-} =~ ^[1-9][0-9]*$ ]]; then
  echo "error: usage: $0 NUMBER_OF_PROCESSES --config=… --workdir=…" >&2
  exit 2
fi
processes=$1
shift
grace=${GRACE:-60}
export JAX_PLATFORMS=cpu PYTHONUNBUFFERED=1
export XLA_FLAGS="${XLA_FLAGS:-} --xla_force_host_platform_device_count=${DEVICES:-1}"

# Is told the process groups, then `failed` or `ended`. The end of its input means that this script was killed.
guard() {
  trap '' TERM INT HUP
  local groups=() word second
  while read -r word; do
    case $word in
      ended) return ;;
      failed)
        read -r -t "$grace" word
        [[ $word != ended ]] || return
        break
        ;;
      *) groups+=("-$word") ;;
    esac
  done
  kill -s TERM -- "${groups[@]}" || return
  for ((second = 0; second < grace; second++)); do
    sleep 1
    kill -s 0 -- "${groups[@]}" || return
  done
  kill -s KILL -- "${groups[@]}"
}
exec {told}> >(guard 2>/dev/null)
tell() {
  echo "$1" >&"$told"
} 2>/dev/null

pids=() outputs=()
trap 'kill -s TERM "${pids[@]}" 2>/dev/null' TERM HUP USR1
trap 'kill -s INT "${pids[@]}" 2>/dev/null' INT

for ((number = 0; number < processes; number++)); do
  exec {output}> >(
    exec {told}>&-
    trap '' TERM INT HUP # it ends with the process that it reads from
    exec sed -u "s/^/[$number] /"
  )
  outputs+=($!)
  set -m # a group for itself and its workers; the terminal's Ctrl-C reaches it once, by us
  "${PYTHON:-python}" -m mnv2_jax.main "$@" \
    --coordinator_address="localhost:${PORT:-8482}" --num_processes="$processes" --process_id="$number" \
    </dev/null >&"$output" 2>&1 {output}>&- {told}>&- &
  set +m
  pids+=($!)
  tell "$!"
  exec {output}>&-
done

trap '' PIPE # the guard is gone once it has done its work
code=0
running=("${pids[@]}")
while ((${#running[@]})); do
  sleep 0.1 & # in the background, so that a signal is forwarded at once
  wait $!
  for number in "${!running[@]}"; do
    kill -s 0 "${pids[number]}" 2>/dev/null && continue
    wait "${pids[number]}"
    status=$?
    kill -s KILL -- "-${pids[number]}" 2>/dev/null # its workers, if it was killed
    unset "running[number]"
    if ((status && !code)); then
      code=$status
      tell failed
    fi
  done
done
tell ended
for sed in "${outputs[@]}"; do
  while kill -s 0 "$sed" 2>/dev/null; do sleep 0.05; done
done
exit "$code"
