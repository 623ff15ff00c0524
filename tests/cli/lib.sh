# Shared by the CLI tests: cases, counts, and mangled copies. Sourced with $1 = the sida program;
# runs in the source tree.
set -u
sida=$1
cases=0
failed=0
work=$(mktemp -d "${TMPDIR:-/tmp}/sida-cli-XXXXXX")
trap 'chmod -R u+w "$work" 2>/dev/null; rm -rf "$work"' EXIT
sample=data/sample/model
reviews=data/sample/inputs/reviews-test.tsv

problem() {
    failed=$((failed + 1))
    echo "FAILED: $*"
}

# refuses NAME STATUS PATTERN COMMAND...: exits with STATUS, says one line on stderr that matches the
# extended regular expression, nothing on stdout, and leaves nothing at $out.
refuses() {
    name=$1 want=$2 pattern=$3
    shift 3
    cases=$((cases + 1))
    rm -rf "$work/out.h5" "$work/out.h5.parts"
    timeout 60 "$@" >"$work/stdout" 2>"$work/stderr" </dev/null
    got=$?
    [ $got -eq "$want" ] || problem "$name: exit status $got, expected $want: $(head -c 300 "$work/stderr")"
    sed -i '/^epoch /d' "$work/stderr" # a training's progress is not the error
    [ "$(wc -l <"$work/stderr")" -eq 1 ] || problem "$name: not one line: $(cat "$work/stderr")"
    grep -Eq -e "$pattern" "$work/stderr" || problem "$name: /$pattern/ is not in: $(cat "$work/stderr")"
    [ ! -s "$work/stdout" ] || problem "$name: printed to stdout: $(head -c 200 "$work/stdout")"
    [ ! -e "$work/out.h5" ] || problem "$name: left a file under the final name"
    [ ! -e "$work/out.h5.tmp" ] || problem "$name: left a temporary file"
    rm -f "$work/out.h5.tmp"
}

# accepts NAME COMMAND...: exits with 0; stdout stays in $work/stdout.
accepts() {
    name=$1
    shift
    cases=$((cases + 1))
    timeout 300 "$@" >"$work/stdout" 2>"$work/stderr" </dev/null
    got=$?
    [ $got -eq 0 ] || problem "$name: exit status $got: $(cat "$work/stderr")"
}

# model_copy: a fresh folder of links to the sample model, in $model.
model_copy() {
    model=$work/model-$cases
    rm -rf "$model"
    mkdir "$model"
    for file in "$sample"/*; do ln -s "$PWD/$file" "$model/"; done
    shard=$(cd "$sample" && ls ./*.safetensors | head -n 1)
}

# own FILE: turns a link of $model into a file of its own.
own() {
    cp -L "$model/$1" "$work/own" && rm "$model/$1" && mv "$work/own" "$model/$1"
    chmod u+w "$model/$1"
}

# poke FILE OFFSET OCTAL...: overwrites bytes in place.
poke() {
    target=$1 offset=$2
    shift 2
    printf "$(printf '\\%s' "$@")" | dd of="$target" bs=1 seek="$offset" conv=notrunc 2>/dev/null
}

says() { # says NAME TEXT: the last command printed that
    grep -Fq -e "$2" "$work/stdout" || problem "$1: '$2' is not in: $(cat "$work/stdout")"
}

finish() {
    echo "$cases cases, $failed failures"
    [ $failed -eq 0 ]
    exit
}
