#!/usr/bin/env bash
# A real Slurm of one node, for the tests of clusters: as root on Debian, without systemd.
#   scripts/slurm_one_node.sh start DIR    state, logs and configuration go to DIR; then: export SLURM_CONF=DIR/slurm.conf
#   scripts/slurm_one_node.sh stop DIR
set -euo pipefail
action=$1
dir=$(realpath -m "$2")

start() {
  command -v slurmctld slurmd munged >/dev/null || apt-get install -y -q slurm-wlm munge >/dev/null
  mkdir -p "$dir"/{state,spool,log} /run/munge
  # The key and the socket's folder must be munge's own, or it refuses to start.
  [ -s /etc/munge/munge.key ] || dd if=/dev/urandom of=/etc/munge/munge.key bs=1 count=1024 status=none
  chown munge: /etc/munge/munge.key /run/munge && chmod 400 /etc/munge/munge.key && chmod 755 /run/munge
  pgrep -x munged >/dev/null || setpriv --reuid munge --regid munge --clear-groups munged --force
  cat >"$dir/slurm.conf" <<EOF
ClusterName=one
SlurmctldHost=$(hostname)(127.0.0.1)
SlurmUser=root
AuthType=auth/munge
CredType=cred/munge
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
JobRequeue=1
# A minute of grace before the last signal, as clusters give for checkpoints.
KillWait=60
MpiDefault=none
StateSaveLocation=$dir/state
SlurmdSpoolDir=$dir/spool
SlurmctldPidFile=$dir/slurmctld.pid
SlurmdPidFile=$dir/slurmd.pid
SlurmctldLogFile=$dir/log/slurmctld.log
SlurmdLogFile=$dir/log/slurmd.log
NodeName=$(hostname) NodeAddr=127.0.0.1 CPUs=$(nproc) RealMemory=$(awk '/MemTotal/ {print int($2 / 1024 * 0.8)}' /proc/meminfo)
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
EOF
  export SLURM_CONF=$dir/slurm.conf
  slurmctld -c -f "$SLURM_CONF"
  slurmd -c -f "$SLURM_CONF"
  for _ in $(seq 60); do
    sinfo -h -o %T 2>/dev/null | grep -qx idle && return
    sleep 0.5
  done
  echo "the node did not come up; see $dir/log" >&2
  return 1
}

stop() {
  for daemon in slurmd slurmctld; do
    [ -f "$dir/$daemon.pid" ] && kill "$(cat "$dir/$daemon.pid")" 2>/dev/null || true
  done
}

case $action in start | stop) "$action" ;; *) sed -n 2,4p "$0" >&2; exit 2 ;; esac
