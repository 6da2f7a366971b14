#!/usr/bin/env bash
# minislurm.sh up|down|status DIR     a throw-away SLURM cluster on one host, for the tests: no
# systemd, no root-owned paths
#   NODES=2 CPUS=8 GPUS=4 AUTH=munge|none  PORT=17000
#   NS=0|1 (own hostname + /etc/hosts per node; non-root needs user namespaces)
#   NS=net (and a network of its own per node, as root: joined by a switch at which the controller
#   is, without a default route; each node has a second network that leads nowhere, finds its own
#   name at 127.0.1.1, as on Debian, and knows no other name. Exit code 3 and the reason where the
#   machine refuses it.)
# After `up`: . DIR/env      (exports SLURM_CONF); with NS=net commands go through DIR/enter
set -euo pipefail
cmd=${1:?up|down|status}; D=$(realpath -m "${2:?dir}")
NODES=${NODES:-2} CPUS=${CPUS:-8} GPUS=${GPUS:-4} AUTH=${AUTH:-munge} PORT=${PORT:-17000}
NS=${NS:-0} ME=$(id -un)
PATH=$PATH:/usr/sbin:/sbin
if [ "$NS" = net ] && [ "$cmd" = up ] && [ -z "${IN_SWITCH:-}" ]; then
  refused=$(unshare --net bash -c 'ip link add br0 type bridge && ip link add ve0 type veth' 2>&1) || {
    echo "no network namespaces with bridges and veth pairs here: $refused" >&2; exit 3; }
  IN_SWITCH=1 exec unshare --net "$0" "$@"
fi
in_switch() { if [ -x "$D/enter" ]; then "$D/enter" "$@"; else "$@"; fi; }
stop() {  # pid files only: never kill by name
  local f p
  if [ -s "$D/run/slurmctld.pid" ] && kill -0 "$(cat "$D/run/slurmctld.pid")" 2>/dev/null; then
    # Drain jobs first: a stopped slurmd leaves its slurmstepd and tasks behind.
    export SLURM_CONF=$D/slurm.conf
    in_switch timeout 5 scancel -u "$ME" 2>/dev/null || true
    for _ in $(seq 100); do
      [ -z "$(in_switch timeout 5 squeue -h 2>/dev/null)" ] && break; sleep 0.1
    done
  fi
  for f in "$D"/run/slurmd.*.pid "$D"/run/slurmctld.pid "$D"/run/munged.pid; do
    [ -s "$f" ] || continue; p=$(cat "$f"); kill "$p" 2>/dev/null || true
    for _ in $(seq 50); do kill -0 "$p" 2>/dev/null || break; sleep 0.1; done
    kill -0 "$p" 2>/dev/null && kill -9 "$p"; rm -f "$f"
  done; }
case $cmd in
down) stop; exit 0;;
status) export SLURM_CONF=$D/slurm.conf; sinfo -N -p main -o "%N %T %c %G"; exit;;
up) ;;
*) exit 2;;
esac
stop; mkdir -p "$D"/{run,log,state,dev}; chmod 755 "$D/run"
if [ "$AUTH" = munge ]; then
  [ -s "$D/munge.key" ] || { (umask 077; head -c 1024 /dev/urandom > "$D/munge.key"); }
  munged --key-file="$D/munge.key" --socket="$D/run/munge.sock" --pid-file="$D/run/munged.pid" \
         --log-file="$D/log/munged.log" --seed-file="$D/run/munge.seed"
  auth="AuthType=auth/munge
AuthInfo=socket=$D/run/munge.sock
CredType=cred/munge"
else auth="AuthType=auth/none
CredType=cred/none"; fi
V=$(slurmd -V); V=${V##* }; V=${V%%.*}   # "slurm-wlm 22.05.8" -> 22
preempt=SlurmctldParameters=preempt_send_user_signal
[ "$V" -lt 24 ] || preempt=PreemptParameters=send_user_signal
for ((i=0;i<GPUS;i++)); do ln -sfn /dev/null "$D/dev/fakegpu$i"; done
gres=""; [ "$GPUS" -gt 0 ] && gres="Gres=gpu:$GPUS"
# Every node has a port of its own, or an address of its own.
controller=localhost nodes="NodeHostname=localhost Port=[$((PORT+1))-$((PORT+NODES))]"
if [ "$NS" = net ]; then
  controller="controller(10.213.0.254)" nodes="NodeAddr=10.213.0.[1-$NODES] Port=$((PORT+1))"
fi
cat > "$D/slurm.conf" <<CONF
ClusterName=mini
SlurmctldHost=$controller
SlurmctldPort=$((PORT-1))
$auth
SlurmUser=$ME
SlurmdUser=$ME
StateSaveLocation=$D/state
SlurmdSpoolDir=$D/spool.%n
SlurmctldPidFile=$D/run/slurmctld.pid
SlurmdPidFile=$D/run/slurmd.%n.pid
SlurmctldLogFile=$D/log/slurmctld.log
SlurmdLogFile=$D/log/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
MpiDefault=none
SwitchType=switch/none
ReturnToService=2
KillWait=2
UnkillableStepTimeout=60
SlurmdTimeout=15
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_min_interval=0,sched_interval=2,bf_interval=2
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
$preempt
JobRequeue=1
JobCompType=jobcomp/filetxt
JobCompLoc=$D/log/jobcomp.log
GresTypes=gpu
NodeName=node[1-$NODES] $nodes CPUs=$CPUS RealMemory=16000 $gres State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=10
PartitionName=low  Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=1 PreemptMode=REQUEUE GraceTime=5
PartitionName=high Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=100 PreemptMode=OFF
CONF
cat > "$D/gres.conf" <<CONF
AutoDetect=off
$( [ "$GPUS" -gt 0 ] && \
  echo "NodeName=node[1-$NODES] Name=gpu Flags=nvidia_gpu_env File=$D/dev/fakegpu[0-$((GPUS-1))]" )
CONF
rm -f "$D/cgroup.conf"; [ "$V" -lt 24 ] || echo "CgroupPlugin=disabled" > "$D/cgroup.conf"
echo "export SLURM_CONF=$D/slurm.conf" > "$D/env"
export SLURM_CONF=$D/slurm.conf
if [ "$NS" = net ]; then
  ip link set lo up; ip link add switch type bridge; ip link set switch up
  ip addr add 10.213.0.254/24 dev switch
  unshare --uts bash -c "hostname controller; exec slurmctld -c"
  for _ in $(seq 50); do [ -s "$D/run/slurmctld.pid" ] && break; sleep 0.1; done
  printf '#!/bin/sh\nexec nsenter --net=/proc/%s/ns/net -- "$@"\n' \
    "$(cat "$D/run/slurmctld.pid")" > "$D/enter"; chmod +x "$D/enter"
else slurmctld -c
fi
for ((i=1;i<=NODES;i++)); do
  mkdir -p "$D/spool.node$i"
  if [ "$NS" = net ]; then
    printf '127.0.0.1 localhost\n127.0.1.1 node%s\n' "$i" > "$D/hosts.node$i"
    unshare --net --uts --mount bash -c "
      until ip link show cable >/dev/null 2>&1; do sleep 0.05; done
      hostname node$i; mount --bind '$D/hosts.node$i' /etc/hosts; ip link set lo up
      ip link add docker0 type bridge; ip addr add 172.17.0.1/16 dev docker0
      ip link set docker0 up; ip addr add 10.213.0.$i/24 dev cable; ip link set cable up
      exec slurmd -N node$i" &
    node=$!
    until [ "$(readlink /proc/$node/ns/net)" != "$(readlink /proc/$$/ns/net)" ]; do sleep 0.05; done
    ip link add "port$i" type veth peer name cable netns "$node"
    ip link set "port$i" master switch up
  elif [ "$NS" = 1 ]; then
    { cat /etc/hosts; for ((j=1;j<=NODES;j++)); do echo "127.0.0.1 node$j"; done; } > "$D/hosts"
    NSU=""; [ "$(id -u)" = 0 ] || NSU="--map-current-user --keep-caps"
    unshare $NSU --uts --mount bash -c \
      "hostname node$i; mount --bind '$D/hosts' /etc/hosts; exec slurmd -N node$i"
  else slurmd -N node$i; fi
done
for _ in $(seq 100); do
  [ "$(sinfo -h -N -p main -t idle -o %N 2>/dev/null | wc -l)" -eq "$NODES" ] && exit 0; sleep 0.1
done
echo "nodes not idle:" >&2; sinfo -N >&2; tail -n 20 "$D"/log/*.log >&2; exit 1
