#!/usr/bin/env bash
# Runs N processes on this machine as if they were N hosts: the same program as on a pod, on CPU devices.
#
#   launch/local_multihost.sh 2 --config=configs/w0_35.py:data=digits --workdir=runs/two
#
# May be set: DEVICES (1)      number of CPU devices per process
#             PORT (8482)      port of the coordinator, which is process 0
#             PYTHON (python)  the interpreter, e.g. .venv/bin/python
#             GRACE (60)       seconds in which the other processes may end by themselves after one has failed; then
#                              they get SIGTERM, and after the same time again SIGKILL. If this script is killed, they
#                              get SIGTERM at once
# Needs:      bash 4.4 or newer.
# Resumes:    run it again, with any N and DEVICES that divide the batch.
# SIGTERM and SIGINT are forwarded to all processes, which save at the same step; SIGHUP and SIGUSR1 are forwarded as
# SIGTERM. Each line of output starts with the number of its process. The script exits with 0 if all processes did, and
# otherwise with the first other exit code.
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

# Stops processes that would be left over. Reads their process groups, then `failed` or `ended`, from standard input,
# which is closed without `ended` if this script is killed.
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
    trap '' TERM INT HUP # it ends when the process that it reads from ends
    exec sed -u "s/^/[$number] /"
  )
  outputs+=($!)
  set -m # own process group for the process and its workers, so that it gets Ctrl-C only once, from this script
  "${PYTHON:-python}" -m mnv2_jax.main "$@" \
    --coordinator_address="localhost:${PORT:-8482}" --num_processes="$processes" --process_id="$number" \
    </dev/null >&"$output" 2>&1 {output}>&- {told}>&- &
  set +m
  pids+=($!)
  tell "$!"
  exec {output}>&-
done

trap '' PIPE # the guard may have ended already
code=0
running=("${pids[@]}")
while ((${#running[@]})); do
  sleep 0.1 & # in the background, so that a signal interrupts the wait and is forwarded at once
  wait $!
  for number in "${!running[@]}"; do
    kill -s 0 "${pids[number]}" 2>/dev/null && continue
    wait "${pids[number]}"
    status=$?
    kill -s KILL -- "-${pids[number]}" 2>/dev/null # stop its workers in case it was killed
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
