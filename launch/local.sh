#!/usr/bin/env bash
# Several processes on this machine, for trying out what a pod does:
#
#   launch/local.sh -n 4 -- --config=configs/demo.py --workdir=runs/demo
#   launch/local.sh -n 2 --devices=2 -- --config=configs/demo.py:smoke --workdir=runs/two
#
# On the CPU with --devices virtual devices each, unless JAX_PLATFORMS says otherwise
# (JAX_PLATFORMS=cuda: each process takes the next --devices GPUs). PYTHON=... is the
# interpreter, JAX_COORDINATOR_PORT=... the port. SIGTERM and Ctrl-C make all save and
# stop. The exit code is 0 if all ended well.
set -euo pipefail

processes=2 devices=1
while (($#)); do
  case $1 in
    -n) processes=$2; shift 2 ;;
    -n*) processes=${1#-n}; shift ;;
    --devices=*) devices=${1#*=}; shift ;;
    --) shift; break ;;
    *) echo "error: $1 is not known: launch/local.sh -n N [--devices=D] -- FLAGS" >&2; exit 2 ;;
  esac
done

export JAX_PLATFORMS=${JAX_PLATFORMS:-cpu}
export JAX_NUM_CPU_DEVICES=$devices
export JAX_NUM_PROCESSES=$processes
export JAX_COORDINATOR_ADDRESS=127.0.0.1:${JAX_COORDINATOR_PORT:-$((20000 + $$ % 10000))}

pids=()
trap 'kill -TERM "${pids[@]}" 2>/dev/null || true' TERM INT
for ((rank = 0; rank < processes; rank++)); do
  ids=$(seq -s, $((rank * devices)) $((rank * devices + devices - 1)))
  JAX_PROCESS_ID=$rank JAX_LOCAL_DEVICE_IDS=$ids \
    "${PYTHON:-python3}" -m t5x_lite.train "$@" &
  pids+=($!)
done

code=0
for pid in "${pids[@]}"; do
  while :; do # a signal ends `wait` before the process
    ended=0
    wait "$pid" || ended=$?
    kill -0 "$pid" 2>/dev/null || break
  done
  ((code)) || code=$ended
done
exit "$code"
