#!/usr/bin/env bash
# What launch/cloud/tpu.sh has each worker of a TPU slice do; run there, not by hand.
#   worker.sh setup                  a Python 3.12 environment with m2l2[train,tpu] in ~/m2l2-venv
#   worker.sh start BUCKET DATA_BUCKET FLAGS...  mounts both ('-': none), the second one read-only, and trains, as
#                                    the service m2l2
#   worker.sh outcome                absent, running, done or failed
#   worker.sh stop                   SIGTERM, and waits until the run has saved
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
source launch/environment.sh
source launch/cloud/cloud.sh
home=$HOME/m2l2-run
mkdir -p "$home"

setup() {
  # TPU images come with Python 3.10, and uv brings a newer one from anywhere.
  python3 -m pip install --quiet --user uv || give_up 'pip could not install uv'
  local uv=$HOME/.local/bin/uv
  "$uv" python install --quiet 3.12 || give_up 'uv could not fetch Python 3.12'
  PYTHON=$("$uv" python find 3.12) make_environment "$HOME/m2l2-venv" train,tpu
}

mount_bucket() {  # mount_bucket BUCKET PLACE OPTIONS
  if mountpoint -q "$2"; then
    local mounted
    mounted=$(findmnt --noheadings --output SOURCE "$2")
    [ "$mounted" != "$1" ] || return 0
    give_up "$2 holds gs://$mounted, this run asks for gs://$1: unmount it, take its line out of /etc/fstab"
  fi
  command -v gcsfuse >/dev/null || sudo apt-get install -y gcsfuse >/dev/null ||
    give_up 'no gcsfuse on this image, and apt does not know it: install it and run this again'
  sudo mkdir -p "$2"
  # In fstab, so that it is there again after a reboot, before the service.
  printf '%s %s gcsfuse %s,_netdev,allow_other,implicit_dirs,uid=%s,gid=%s\n' \
    "$1" "$2" "$3" "$(id -u)" "$(id -g)" | sudo tee -a /etc/fstab >/dev/null
  sudo mount "$2" || give_up "could not mount gs://$1: may this machine's service account read it?"
}

# A service and not nohup: it starts again after a reboot (maintenance of the host does that).
# KillMode=mixed: the signal goes to restart.sh alone, and the processes that load data live on
# while m2l2 saves.
start() {
  local bucket=$1 data_bucket=$2
  local cached=metadata_cache_ttl_secs=-1,stat_cache_max_size_mb=-1,type_cache_max_size_mb=-1
  shift 2
  [ "$bucket" = - ] ||
    mount_bucket "$bucket" "$mount_point" rw,metadata_cache_ttl_secs=0,metadata_cache_negative_ttl_secs=0
  [ "$data_bucket" = - ] ||
    mount_bucket "$data_bucket" "$data_mount_point" "ro,$cached,kernel_list_cache_ttl_secs=-1"
  {
    printf 'exec '
    quoted "$PWD/launch/cloud/restart.sh" "$HOME/m2l2-venv/bin/m2l2" train "$@"
  } > "$home/train.sh"
  sudo tee /etc/systemd/system/m2l2.service >/dev/null <<UNIT
[Unit]
Description=m2l2 train
Wants=network-online.target
After=network-online.target remote-fs.target
[Service]
User=$(id -un)
WorkingDirectory=$PWD
ExecStart=/bin/bash $home/train.sh
StandardOutput=append:$home/train.log
StandardError=append:$home/train.log
KillMode=mixed
TimeoutStopSec=900
LimitNOFILE=1048576
[Install]
WantedBy=multi-user.target
UNIT
  sudo systemctl daemon-reload
  sudo systemctl enable --quiet m2l2
  sudo systemctl restart m2l2
}

outcome() {
  local unit
  unit=$(systemctl show m2l2 --property=LoadState --property=ActiveState --value | sort | tr '\n' ' ')
  case $unit in
    *not-found*) echo absent ;;
    *failed*) echo failed ;;
    *inactive*) echo 'done' ;;
    *) echo running ;;
  esac
}

case "${1:-}" in
  setup | start | outcome) "$@" ;;
  stop) sudo systemctl disable --quiet --now m2l2 ;;
  *) give_up 'knows setup, start, outcome and stop; launch/cloud/tpu.sh calls it' ;;
esac
