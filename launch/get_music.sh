#!/usr/bin/env bash
# Fetches freely licensed music to train and to test on, from Debian's packages of game music.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# package, split, hours of music (tracks of 20 s and more) it held when this list was made
packages='
wesnoth-1.16-music     train    2.13
ufoai-music            train    4.00
warzone2100-music      train    4.05
singularity-music      train    1.07
nexuiz-music           train    1.39
colobot-common-sounds  train    1.10
marsshooter-data       train    0.98
hedgewars-data         train    1.56
supertux-data          heldout  1.64
hyperrogue-music       heldout  0.40
pushover-data          heldout  0.52
'

usage() {
  cat <<'HELP'
Usage: launch/get_music.sh [--only=train|heldout|PACKAGE,...] [--output=DIR]

Fetches about 16 hours of music to train on and 2.6 hours, of other games and composers, to test on:
1.1 GB of Debian packages, fetched by name with apt-get. Nothing is installed and root is not
needed. What a package holds besides music is dropped. Packages already there are left alone, so
an interrupted run is continued by the same command.

  --only=LIST    only these: train, heldout, or names of packages, separated by commas
  --output=DIR   where to (default: data/music); the music lands in DIR/train/PACKAGE and
                 DIR/heldout/PACKAGE, its licences in DIR/licences/PACKAGE
  --help         this text

Example: launch/get_music.sh --only=heldout,wesnoth-1.16-music
HELP
}

fail() {
  echo "get_music: $*" >&2
  exit 1
}

only=train,heldout
output=data/music
for option in "$@"; do
  case $option in
    --only=?*) only=${option#*=} ;;
    --output=?*) output=${option#*=} ;;
    --help | -h) usage; exit 0 ;;
    *) fail "unknown option '$option': see launch/get_music.sh --help" ;;
  esac
done
names=$(awk 'NF { print $1 }' <<< "$packages")
for name in ${only//,/ }; do
  grep -qxF -e "$name" <<< "$names"$'\ntrain\nheldout' ||
    fail "no package '$name': pick from train, heldout," $names
done
for program in apt-get dpkg-deb; do
  command -v $program > /dev/null ||
    fail "$program not found: this script needs Debian or Ubuntu; elsewhere, train on any folder" \
      "of audio files with --config.data.root=DIR"
done
python=.venv/bin/python
[[ -x $python ]] || python=python3
command -v "$python" > /dev/null || fail 'python3 not found: install it first'
mkdir -p "$output" 2> /dev/null && [[ -w $output ]] || fail "cannot write to '$output'"
output=$(cd "$output" && pwd)

# Everything in the making lies here, on the same disk as the result, and goes when we go.
temporary=$(mktemp -d "$output/.fetching-XXXXXX")
trap 'rm -rf "$temporary"' EXIT
trap 'exit 130' INT TERM

# apt's own package lists where it has some; else lists of our own, for which no root is needed.
apt_options=(-q)
((EUID)) || apt_options+=(-o APT::Sandbox::User=root)
own_lists() {
  local lists=$temporary/apt
  [[ -d $lists ]] && return 1
  mkdir -p "$lists/lists/partial" "$lists/cache/archives/partial"
  apt_options+=(-o "Dir::State::Lists=$lists/lists" -o "Dir::Cache=$lists/cache")
  echo '  reading package lists (apt-get update)'
  apt-get "${apt_options[@]}" update > "$temporary/log" 2>&1
}

download() { # package -> a .deb in $temporary/package
  rm -rf "$temporary/package"
  mkdir "$temporary/package"
  (cd "$temporary/package" && apt-get "${apt_options[@]}" download "$1") > "$temporary/log" 2>&1
}

# Picks the music out of an unpacked package: tracks of at least 20 s at 32 kHz or more.
# Needs nothing but Python: an Ogg file tells its length by its last page.
read -r -d '' pick_music << 'PYTHON' || true
import os, pathlib, shutil, struct, sys, zipfile

def seconds(data):
  """Length of an Ogg Vorbis or Opus file; 0 for anything else and for low sample rates."""
  last = data.rfind(b'OggS')
  if not data.startswith(b'OggS') or len(data) < last + 14:
    return 0
  end = struct.unpack_from('<q', data, last + 6)[0]
  vorbis, opus = data.find(b'\x01vorbis', 0, 4096), data.find(b'OpusHead', 0, 4096)
  if vorbis >= 0:
    rate = struct.unpack_from('<I', data, vorbis + 12)[0]
    return end / rate if rate >= 32000 else 0
  return (end - struct.unpack_from('<H', data, opus + 10)[0]) / 48000 if opus >= 0 else 0

command, source = sys.argv[1], pathlib.Path(sys.argv[2])
if command == 'count':
  lengths = [seconds(path.read_bytes()) for path in source.rglob('*') if path.is_file()]
  print(len(lengths), round(sum(lengths) / 3600, 3))
  sys.exit()

music, licences, package = pathlib.Path(sys.argv[3]), pathlib.Path(sys.argv[4]), sys.argv[5]
for archive in list(source.rglob('*.pk3')):
  with zipfile.ZipFile(archive) as content:
    content.extractall(archive.with_suffix(''))
audio = sorted(path for path in source.rglob('*') if path.suffix in ('.ogg', '.opus', '.oga'))
tracks = [path for path in audio if seconds(path.read_bytes()) >= 20]
if not tracks:
  sys.exit('it holds no music')
top = pathlib.Path(os.path.commonpath([path.parent for path in tracks]))
for path in tracks:
  target = music / path.relative_to(top)
  target.parent.mkdir(parents=True, exist_ok=True)
  shutil.move(path, target)
licences.mkdir(parents=True)
texts = list((source / 'usr/share/doc' / package).iterdir())
for folder in {path.parent for path in tracks}:
  texts += folder.iterdir()
for path in texts:
  if path.name.lower().startswith(('copyright', 'licen', 'copying', 'credits', 'readme')):
    inside = path.relative_to(top).parent if path.is_relative_to(top) else pathlib.Path()
    (licences / inside).mkdir(parents=True, exist_ok=True)
    if path.suffix not in ('.ogg', '.opus', '.oga'):
      shutil.copy(path, licences / inside / path.name)
if not (licences / 'copyright').is_file():
  sys.exit('it holds no copyright file')
PYTHON

declare -A sum=([train]=0 [heldout]=0)
failed=()
while read -r name split expected; do
  [[ -n $name ]] || continue
  grep -qxF -e "$name" -e "$split" <<< "${only//,/$'\n'}" || continue
  target=$output/$split/$name
  if [[ ! -d $target ]]; then
    echo "$name: fetching"
    if ! download "$name" && ! { own_lists && download "$name"; }; then
      echo "get_music: cannot fetch $name: $(grep '^E:' "$temporary/log" | tail -1)" >&2
      failed+=("$name")
      continue
    fi
    if ! { dpkg-deb -x "$temporary"/package/*.deb "$temporary/package/root" &&
           "$python" -c "$pick_music" pick "$temporary/package/root" "$temporary/package/music" \
             "$temporary/package/licences" "$name"; } 2> "$temporary/log"; then
      echo "get_music: cannot unpack $name: $(tail -1 "$temporary/log")" >&2
      failed+=("$name")
      continue
    fi
    # The music comes last: where it lies, its licences do too.
    mkdir -p "$output/licences" "$output/$split"
    rm -rf "$output/licences/$name"
    mv "$temporary/package/licences" "$output/licences/$name"
    mv "$temporary/package/music" "$target"
    rm -rf "$temporary/package"
  fi
  read -r tracks hours <<< "$("$python" -c "$pick_music" count "$target")"
  printf '%s: %d tracks, %.2f hours, in %s\n' "$name" "$tracks" "$hours" "$split/$name"
  awk -v h="$hours" -v e="$expected" 'BEGIN { exit !(h < .9 * e || h > 1.1 * e) }' &&
    echo "get_music: warning: $name has $hours hours where $expected were expected" >&2
  sum[$split]=$(awk -v a="${sum[$split]}" -v b="$hours" 'BEGIN { print a + b }')
done <<< "$packages"
printf '%s: %.2f hours to train on, %.2f hours held out\n' \
  "$output" "${sum[train]}" "${sum[heldout]}"
((${#failed[@]} == 0)) ||
  fail "${#failed[@]} not fetched: ${failed[*]}; run the same command again, or continue without them"
