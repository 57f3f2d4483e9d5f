#!/usr/bin/env bash
# A SLURM cluster of one node on this machine, all of it in one directory.
#
#   apt-get install slurmctld slurmd slurm-client munge     # or slurm-wlm munge
#   tests/slurm/setup.sh start DIR && export SLURM_CONF=DIR/slurm.conf
#   sbatch ...
#   tests/slurm/setup.sh stop DIR
#
# The node is called localhost, which is where jax then looks for its coordinator.
# Its two GPUs are /dev/null and /dev/zero: SLURM hands them out as it would real ones.
# SLURMCTLD_PORT and SLURMD_PORT are taken from the environment where they are set.
set -euo pipefail

start() {
  mkdir -p "$1"/{state,spool,munge}
  chmod 755 "$1" "$1/munge"
  head -c 1024 /dev/urandom >"$1/munge/key"
  chmod 600 "$1/munge/key"
  munged --force --key-file="$1/munge/key" --socket="$1/munge/socket" \
    --pid-file="$1/munge/pid" --log-file="$1/munge/log" --seed-file="$1/munge/seed"

  local memory_mib
  memory_mib=$(awk '/MemTotal/ {print int($2 / 1024 * 0.9)}' /proc/meminfo)
  cat >"$1/gres.conf" <<EOF
Name=gpu File=/dev/null
Name=gpu File=/dev/zero
EOF
  cat >"$1/slurm.conf" <<EOF
ClusterName=t5x
SlurmctldHost=$(hostname -s)(127.0.0.1)
SlurmctldPort=${SLURMCTLD_PORT:-16817}
SlurmdPort=${SLURMD_PORT:-16818}
SlurmUser=$(id -un)
SlurmdUser=$(id -un)
StateSaveLocation=$1/state
SlurmdSpoolDir=$1/spool
SlurmctldPidFile=$1/slurmctld.pid
SlurmdPidFile=$1/slurmd.pid
SlurmctldLogFile=$1/slurmctld.log
SlurmdLogFile=$1/slurmd.log
# A requeued job waits until its old credential has expired (120 s if not said).
AuthInfo=socket=$1/munge/socket,cred_expire=5
AuthType=auth/munge
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=batch_sched_delay=0,sched_interval=2
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
MailProg=/bin/true
ReturnToService=2
KillWait=5
InactiveLimit=0
OverTimeLimit=0
GresTypes=gpu
NodeName=localhost NodeHostname=$(hostname -s) NodeAddr=127.0.0.1 CPUs=$(nproc) RealMemory=$memory_mib Gres=gpu:2 State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
EOF
  slurmctld -f "$1/slurm.conf"
  slurmd -f "$1/slurm.conf"
  for _ in $(seq 100); do
    [[ $(sinfo --noheader --format=%T 2>&1) == idle ]] && return
    sleep 0.1
  done
  tail -n 20 "$1"/*.log >&2
  echo "setup.sh: the node did not come up within 10 s" >&2
  return 1
}

stop() {
  scancel --user="$(id -un)" || true
  for _ in $(seq 200); do
    [[ -z $(squeue --noheader 2>&1) ]] && break
    sleep 0.1
  done
  scontrol shutdown || true
  [[ -s $1/munge/pid ]] && kill "$(<"$1/munge/pid")"
  for _ in $(seq 100); do
    [[ -e $1/slurmd.pid || -e $1/slurmctld.pid || -e $1/munge/pid ]] || return 0
    sleep 0.1
  done
  kill "$(cat "$1"/*.pid)"
}

if [[ $# -ne 2 || ! $1 =~ ^(start|stop)$ ]]; then
  echo "usage: tests/slurm/setup.sh start|stop DIR" >&2
  exit 2
fi
dir=$(realpath --canonicalize-missing "$2")
export SLURM_CONF=$dir/slurm.conf
"$1" "$dir"
