#!/bin/bash
# A bare GPU host made ready for a sitting, from pieces that were brought one by one. See README.md beside this file.
#
#   host.sh models                             once the tools folder is there: makes the 7B shape, in the background
#   host.sh start PIECES SITE [ARGUMENT...]    once all pieces are there: unpacks them, then `sitting.py start ARGUMENT...`
#   host.sh look SECONDS                       what the sitting has found so far; collects into $OUT
#
# Nothing here waits without an end: time on such a host is dear.
set -u
cd "$(dirname "$0")/../.." || exit 2
sitting=tests/gpu/sitting.py
work=${SITTING_WORK:-/tmp/sitting}
unset PYTHONDONTWRITEBYTECODE

# background NAME COMMAND...: outlives this shell whole, not only its first process.
background() {
    local name=$1
    shift
    mkdir -p "$work-$name" "$work/models" "$work/tools"
    ln -sfn "$work/models" "$work-$name/models"
    ln -sfn "$work/tools" "$work-$name/tools"
    setsid "$@" --work "$work-$name" >"$work-$name/log" 2>&1 </dev/null &
}

case ${1:-} in
models)
    background model7b python3 $sitting run model7b
    ;;
start)
    pieces=$2 site=$3
    shift 3
    mkdir -p "$site"
    for stream in site extra; do
        ls "$pieces/$stream".* >/dev/null 2>&1 || continue
        cat "$pieces/$stream".* | xz -T0 -dc | tar -C "$site" -xf - || exit 1
    done
    export PYTHONPATH=$site
    # As an installation would have done: without bytecode each start takes tens of seconds more.
    python3 -m compileall -q -j 0 "$site" $(python3 -c 'import site; print(*site.getsitepackages())') >/dev/null 2>&1
    # In the background too: the stages that need a model wait for it.
    background small python3 $sitting run small
    python3 $sitting start --work "$work" "$@"
    ;;
look)
    export PYTHONPATH=${SITTING_SITE:-/opt/site}
    python3 $sitting wait "$2" --work "$work"
    tail -n 5 "$work/logs/driver.log" "$work"-*/log
    ;;
*)
    sed -n '2,8p' "$0"
    exit 2
    ;;
esac
