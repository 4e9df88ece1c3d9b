# Sourced by the scripts beside it, from the repository's root. One function:
#   make_environment DIRECTORY EXTRAS
# makes a virtual environment that holds m2l2 (editable) with the extras named, and reuses it as
# long as the requirements, the Python and the place are the same. PYTHON=... chooses the Python.

say() { printf '%s\n' "$*" >&2; }

give_up() { say "$(basename "$0"): $*"; exit 1; }

# A folder's name for programs that XLA compiled, for launch/test.sh: its tests keep theirs apart from the user's. They
# are machine code: one folder for each kind of processor, so that a disk moved to another machine never serves them.
compilation_cache() {
  printf 'xla-%s\n' "$( { grep -m1 '^flags' /proc/cpuinfo || uname -a; } 2>/dev/null | cksum | tr -d ' ')"
}

find_python() {
  local name
  for name in ${PYTHON:+"$PYTHON"} python3.12 python3.11 python3 python3.13 python; do
    if "$name" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then
      printf '%s\n' "$name"
      return
    elif [ -n "${PYTHON:-}" ]; then
      give_up "PYTHON=$PYTHON is not a Python 3.11 or newer"
    fi
  done
  give_up 'no Python 3.11 or newer in PATH; install one (Debian, Ubuntu: apt install python3 python3-venv)'
}

# Debian ships Python without the part that puts pip into an environment.
ensure_venv_module() {
  local python=$1 package
  "$python" -c 'import ensurepip, venv' >/dev/null 2>&1 && return
  package=$("$python" -c 'import sys; print("python%d.%d-venv" % sys.version_info[:2])')
  if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    say "installing $package"
    { apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install -y "$package"; } \
      </dev/null >/dev/null 2>&1 || true
  fi
  "$python" -c 'import ensurepip, venv' >/dev/null 2>&1 ||
    give_up "$python cannot make environments: install $package (apt install $package) and run this again"
}

make_environment() {
  local directory=$1 extras=$2 python stamp
  unset PYTHONPATH PYTHONHOME  # another project's packages have no business here
  export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_INPUT=1
  python=$(find_python)
  stamp=$(
    { cat setup.cfg setup.py pyproject.toml; pwd; printf '%s\n' "$extras"
      "$python" -c 'import platform, sys; print(sys.version, platform.platform())'; } |
    "$python" -c 'import hashlib, sys; print(hashlib.sha256(sys.stdin.buffer.read()).hexdigest())')
  if [ "$(cat "$directory/stamp" 2>/dev/null)" = "$stamp" ]; then return; fi
  ensure_venv_module "$python"
  say "making $directory with $("$python" --version 2>&1): half a minute to two, 1 GB"
  if [ -e "$directory/pyvenv.cfg" ] && [ ! -e "$directory/made-by-m2l2" ]; then
    give_up "$directory was not made by this script; move it away and run this again"
  fi
  rm -rf "$directory"
  "$python" -m venv "$directory" || give_up "could not make $directory"
  touch "$directory/made-by-m2l2"
  "$directory/bin/python" launch/install.py ".[$extras]" </dev/null ||
    give_up "pip could not install m2l2[$extras]; its message is above"
  printf '%s\n' "$stamp" > "$directory/stamp"  # last: a broken install is made anew
}
