#!/bin/bash
# A Slurm of one node for tests, from Debian's packages slurmctld, slurmd, slurm-client and munge; as root.
#
#   tests/slurm_node.sh start DIR    # its files are in DIR; then SLURM_CONF=DIR/slurm.conf sbatch ...
#   tests/slurm_node.sh stop DIR
set -eu
command=$1 dir=$2

if [ "$command" = stop ]; then
  for name in slurmd slurmctld munged; do
    [ ! -f "$dir/$name.pid" ] || kill "$(cat "$dir/$name.pid")" || true
  done
  exit
fi

mkdir -p "$dir"/{state,spool}
host=$(hostname -s)
dd if=/dev/urandom of="$dir/munge.key" bs=1024 count=1 status=none
chmod 600 "$dir/munge.key"
chmod 755 "$dir"
cat > "$dir/slurm.conf" <<CONF
ClusterName=cnnfamily
SlurmctldHost=$host(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket=$dir/munge.socket,cred_expire=5
CredType=cred/munge
StateSaveLocation=$dir/state
SlurmdSpoolDir=$dir/spool
SlurmctldPidFile=$dir/slurmctld.pid
SlurmdPidFile=$dir/slurmd.pid
SlurmctldLogFile=$dir/slurmctld.log
SlurmdLogFile=$dir/slurmd.log
SlurmctldPort=16817
SlurmdPort=16818
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
JobRequeue=1
KillWait=60
SchedulerParameters=sched_interval=2,bf_interval=5
NodeName=$host NodeAddr=127.0.0.1 CPUs=$(nproc) State=UNKNOWN
PartitionName=main Nodes=$host Default=YES MaxTime=INFINITE State=UP
CONF
munged --force --key-file="$dir/munge.key" --socket="$dir/munge.socket" --pid-file="$dir/munged.pid" \
  --log-file="$dir/munged.log" --seed-file="$dir/munge.seed"
export SLURM_CONF="$dir/slurm.conf"
slurmctld -c
slurmd -N "$host" || slurmd
for _ in $(seq 60); do
  case $(sinfo -h -o %T 2>/dev/null) in idle) exit 0 ;; esac
  sleep 0.5
done
sinfo; tail -5 "$dir"/*.log
exit 1
