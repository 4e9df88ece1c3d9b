#!/usr/bin/env bash
# Runs a command until it is done; m2l2 train resumes from its last checkpoint each time.
#   launch/cloud/restart.sh m2l2 train --stopped_exit_code=75 ...
# Status 0 ends it. After any other it waits and starts again: 10 s after 75 (stopped and saved, because
# another machine of the run was stopped), longer each time after failures, and 8 failures in a row
# end it. An attempt of 10 minutes resets the count. In the environment: ATTEMPTS=8
# FIRST_WAIT=10 HEALTHY=600, the latter two in seconds.
# SIGTERM is passed on and ends it once the command has saved.
set -uo pipefail

say() { printf 'restart.sh: %s\n' "$*" >&2; }
case "${1:-}" in
  '' | -h | --help) sed -n '2,9s/^# \{0,1\}//p' "$0"; exit $(($# == 0)) ;;
esac

attempts=${ATTEMPTS:-8} first_wait=${FIRST_WAIT:-10} healthy=${HEALTHY:-600}
failures=0 wait=$first_wait stopping='' child=''
trap 'stopping=1; [ -z "$child" ] || kill -TERM "$child" 2>/dev/null' TERM INT

while [ -z "$stopping" ]; do
  began=$SECONDS
  "$@" &
  child=$!
  # A signal ends `wait` early: it is asked again until the command itself has ended.
  while :; do
    wait "$child"
    code=$?
    kill -0 "$child" 2>/dev/null || break
  done
  child=''
  [ "$code" = 0 ] && exit 0
  [ -n "$stopping" ] && break
  if [ "$code" = 75 ] || ((SECONDS - began >= healthy)); then failures=0 wait=$first_wait; fi
  [ "$code" = 75 ] || failures=$((failures + 1))
  if ((failures >= attempts)); then
    say "exit code $code; giving up after $failures failures in a row"
    exit 1
  fi
  say "exit code $code; once more in $wait s ($failures failures in a row, $attempts end it)"
  sleep "$wait" &
  child=$!
  wait "$child"
  child='' wait=$((wait * 2 > 600 ? 600 : wait * 2))
done
say 'stopped'
