#!/bin/sh
# Prints what `uv export` finds in uv.lock, each file by its hash: `deploy/requirements.sh --extra NAME ...`.
# With `--extra cpu`, and UV_FIND_LINKS naming a page or folder of CPU builds, torch is one of torch-cpu.txt, without CUDA.
set -eu
locked() { uv export --quiet --frozen --no-emit-workspace "$@"; }
case "${UV_FIND_LINKS:-} $* " in
  " "*) locked "$@" ;;
  *" --extra cpu "*)
    others=$(locked --no-hashes "$@" | sed -nE 's/^(torch|triton|(nvidia|cuda)-[a-z0-9-]+)(==|\[).*/--no-emit-package \1/p')
    # shellcheck disable=SC2086
    locked "$@" $others
    cat "$(dirname "$0")/torch-cpu.txt" ;;
  *) locked "$@" ;;
esac
