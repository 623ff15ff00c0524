#!/bin/sh
# sida doctor and sida bench on the CPU: what they print, and what they refuse.
. "$(dirname "$0")/lib.sh"

has() { # has NAME PATTERN: the last command printed a line of that kind
    grep -Eq -e "$2" "$work/stdout" || problem "$1: /$2/ is not in: $(cat "$work/stdout")"
}

# --- doctor
accepts 'doctor' "$sida" doctor --device cpu
has 'doctor' '^cpu .* kernels$'
has 'doctor' '^used +--device cpu is cpu'
has 'doctor' '^host to device +1 MiB: [0-9.]+ GB/s'
accepts 'doctor as JSON' "$sida" doctor --json --device cpu
for key in openblas hdf5 memlock_bytes kernels link memory_gb_per_s devices; do
    has 'doctor as JSON' "\"$key\":"
done
refuses 'doctor: unknown device' 2 "device 'tpu': expected" "$sida" doctor --device tpu
refuses 'doctor: stray argument' 2 "unexpected argument 'x'" "$sida" doctor x

# --- bench
bench="$sida bench --device cpu --runs 2 --warmup 1"
accepts 'base-8' $bench --synthetic base-8 --lengths 8 --json
has 'base-8' '"model": "base-8"'
has 'base-8' '"latency_ms": [0-9.]*[1-9]'
has 'base-8' '"experts_touched": [1-9]'
if [ -e "$sample/config.json" ]; then
    accepts 'the sample under a budget' $bench --model "$sample" --lengths 20,40 --batch 2 --budget 20% --digest --json
    has 'the sample under a budget' '"slots": 64'
    for key in belady_bytes belady_ms loading_bytes_per_s busy_seconds bytes_a_batch mean_ms \
        driver_bytes driver_bytes_peak; do
        has 'the sample under a budget' "\"$key\": [0-9.e-]*[1-9]"
    done
    [ "$(grep -c '"bytes_moved": [1-9]' "$work/stdout")" -eq 2 ] ||
        problem "the sample under a budget: $(cat "$work/stdout")"
    grep '"digest"' "$work/stdout" >"$work/budget"
    accepts 'the sample resident' $bench --model "$sample" --lengths 20,40 --batch 2 --digest --json
    grep '"digest"' "$work/stdout" | cmp -s - "$work/budget" || problem 'digests under a budget and resident differ'
    [ "$(sort -u "$work/budget" | wc -l)" -eq 2 ] || problem "no two digests: $(cat "$work/budget")"
    accepts 'tables with mistakes' $bench --model "$sample" --lengths 20,40 --batch 2 --budget 20% --digest --json \
        --prefetch recall --recall 65,86 --queue 1
    has 'tables with mistakes' '"places": 3'
    has 'tables with mistakes' '"hit_first": 0\.6[2-8]'
    has 'tables with mistakes' '"hit_any": 0\.8[4-8]'
    grep '"digest"' "$work/stdout" | cmp -s - "$work/budget" || problem 'digests with other tables differ'
    accepts 'tables of one' $bench --model "$sample" --lengths 20 --budget 20% --prefetch recall --recall 100
    has 'tables of one' 'tables of 1 experts a token: 100.0% in the first place, 100.0% in any'
    accepts 'a size' $bench --model "$sample" --lengths 20 --budget 9MiB --json
    has 'a size' '"cap_bytes": 9437184'
    accepts 'the sample on demand' $bench --model "$sample" --lengths 20 --budget 2-experts --prefetch none --policy fifo
    has 'the sample on demand' '2 slots: .* 0 late'
fi
refuses 'no model' 2 'one of --synthetic and --model' $bench
refuses 'two models' 2 'one of --synthetic and --model' $bench --synthetic base-8 --model "$sample"
refuses 'unknown geometry' 2 "synthetic 'large-8': expected" $bench --synthetic large-8
refuses 'no experts' 2 "synthetic 'base-0': expected" $bench --synthetic base-0
refuses 'unknown type' 2 "dtype 'f64': expected" $bench --synthetic base-8 --dtype f64
refuses 'a length of none' 2 "lengths '25,,60': expected" $bench --synthetic base-8 --lengths 25,,60
refuses 'too many lengths' 2 'lengths .*: expected up to 16' $bench --synthetic base-8 --lengths 1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16,17
refuses 'no runs' 2 "runs '0': expected" $bench --synthetic base-8 --runs 0
refuses 'bench: budget is a word' 2 "budget 'plenty'" $bench --synthetic base-8 --budget plenty
refuses 'bench: unknown policy' 2 "policy 'mru': expected" $bench --synthetic base-8 --policy mru
refuses 'unknown prefetch' 2 "prefetch 'lstm': expected" $bench --synthetic base-8 --prefetch lstm
refuses 'a recall that falls' 2 "recall '86,65': expected" $bench --synthetic base-8 --prefetch recall --recall 86,65
refuses 'a recall of three' 2 "recall '1,2,3': expected" $bench --synthetic base-8 --prefetch recall --recall 1,2,3
refuses 'bench: unknown device' 2 "device 'tpu'" $bench --synthetic base-8 --device tpu
refuses 'bench: no such model' 1 "$work/none/.*No such file" $bench --model "$work/none"
refuses 'bench: budget below the fixed part' 1 'budget of 1048576 bytes' $bench --model "$sample" --budget 1MiB
finish
