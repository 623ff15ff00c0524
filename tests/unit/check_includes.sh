#!/bin/sh
# Code may include only leftwards (CONTRIBUTING.md). Lists every include that breaks the rule.
set -eu
cd "${1:-.}"
allowed() { # which prefixes a folder's files may include
    case "$1" in
    formats/base) echo 'formats/base' ;;
    formats) echo 'formats' ;;
    data) echo 'data formats' ;;
    runtime/backend) echo 'runtime/backend formats' ;;
    runtime/ops) echo 'runtime/ops runtime/backend formats' ;;
    runtime/model | runtime/predictor)
        echo "$1 runtime/ops runtime/backend formats" ;;
    runtime/store) echo 'runtime/store runtime/backend formats' ;;
    runtime/engine)
        echo 'runtime/engine runtime/model runtime/predictor runtime/store runtime/ops' \
            'runtime/backend data formats' ;;
    runtime) echo 'runtime data formats' ;;
    tracer) echo 'tracer runtime data formats' ;;
    trainer) echo 'trainer runtime/predictor runtime/ops runtime/backend data formats' ;;
    tools/cli | tools/bench) echo 'tools trainer tracer runtime data formats' ;;
    tests) echo 'tests tools trainer tracer runtime data formats' ;;
    *) echo "unknown folder $1" >&2; exit 2 ;;
    esac
}
folder_of() {
    case "$1" in
    formats/base/*) echo formats/base ;;
    runtime/*/*) echo "$1" | cut -d/ -f1-2 ;;
    tools/*/*) echo "$1" | cut -d/ -f1-2 ;;
    *) echo "$1" | cut -d/ -f1 ;;
    esac
}
bad=0
seen=0
for file in $(find formats data runtime tracer trainer tools tests -name '*.[ch]' -o -name '*.cc' \
    -o -name '*.cu' -o -name '*.cuh' | sort); do
    prefixes=$(allowed "$(folder_of "$file")")
    for include in $(sed -n 's/^ *# *include *"\([^"]*\)".*/\1/p' "$file"); do
        seen=$((seen + 1))
        good=no
        for prefix in $prefixes; do
            case "$include" in "$prefix"/*) good=yes ;; esac
        done
        if [ $good = no ]; then
            echo "$file includes $include: against the direction of includes"
            bad=$((bad + 1))
        fi
    done
done
echo "$seen includes checked, $bad against the direction"
[ $seen -gt 0 ] && [ $bad -eq 0 ]
