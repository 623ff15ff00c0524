#!/bin/sh
# tools/bench/gpu and tools/bench/report. The report: ratios from a results file with made-up samples,
# and files that it refuses. The runner, on the CPU with the sample in place of synthetic models: what
# it writes the report can read, and a job that fails is recorded and stops nothing.
. "$(dirname "$0")/lib.sh"
if ! command -v python3 >/dev/null; then echo 'skipped: no python3'; exit 77; fi
made_up=tests/cli/bench_report.json

# --- the report
accepts 'report' tools/bench/report $made_up
# 2.0 is the median of both runs' six samples.
says 'report' '| all resident, base-128, L=25: against Standard | 60.00 × | 30.00 × | 40.00 × | at least |'
says 'report' '| all resident, base-256, L=25: against Standard | 60.00 × | 30.00 × | 70.00 × | goal |'
says 'report' '| all resident, base-256, L=300: against Standard | 40.00 × | 20.00 × |  | not measured |'
says 'report' 'share of the memory floor | 45.0% | 30.0% | 30.0% | at least |'
# Moving is the bound with 25 tokens (8 ms), computing with 300 (5 ms).
says 'report' "L=25, oracle: time / max(compute, Belady's bytes / link) | 1.100 | 1.250 | 1.250 | at least |"
says 'report' "L=300, oracle: time / max(compute, Belady's bytes / link) | 1.100 | 1.250 | 1.020 | goal |"
says 'report' 'L=25, oracle: loading / link | 95.0% | 90.0% | 92.0% | at least |'
says 'report' 'L=25, recall: against Standard |  | 1.00 × | 5.00 × | yes |'
says 'report' 'L=300, recall: against on demand | 1.00 × |  | 0.92 × | **no** |'
says 'report' 'L=25, recall: against Accelerate | 30.00 × | 14.00 × | 30.00 × | goal |'
says 'report' 'GPU memory saved against Standard resident | 80.0% | 75.0% | 80.0% | goal |'
says 'report' 'GPU memory saved against sida resident | 80.0% | 75.0% | 60.0% | **no** |'
says 'report' '| 8 | 25 | 4.00 | 50,000 | 90.0 | 22.5 | 125 / 126 |'
says 'report' '| base-128 | 20% | tables, 65% and 86% | 25 | 16.00 | 2.00 | 5.00 | 2.00 | 92% | 60% | 20% |'
says 'report' '| 25 | 1.25 | 0.50 | 2.50 | 0.75 |'
says 'report' 'standard_hf.py --experts 256`: ended after 240 s'
if command -v gnuplot >/dev/null; then
    accepts 'pictures' tools/bench/report $made_up --plot "$work/pictures"
    for name in length batch experts budget; do
        grep -q '</svg>' "$work/pictures/cost-$name.svg" || problem "no picture of $name"
    done
fi

mangled() { # mangled NAME SED PATTERN
    sed "$2" $made_up >"$work/mangled.json"
    cmp -s $made_up "$work/mangled.json" && problem "$1: nothing was mangled"
    refuses "$1" 1 "mangled.json: $3" tools/bench/report "$work/mangled.json"
}
mangled 'a sample was changed' 's/\[70.0, 80.0, 90.0\]/[70.0, 81.0, 90.0]/' '.*latency_ms is 80.0, its samples say 81.0'
mangled 'a median was changed' 's/"latency_ms": 16.0/"latency_ms": 15.0/' '.*latency_ms is 15.0'
mangled 'a rate was changed' 's/"tokens_per_s": 12500.0/"tokens_per_s": 13500.0/' '.*tokens_per_s'
mangled 'the memory rate was changed' '0,/2400000000000.0/s//3400000000000.0/' '.*floor_ms'
mangled 'a mean was changed' 's/"mean_ms": 16.0/"mean_ms": 15.0/' '.*mean_ms'
mangled 'a bound was changed' '0,/"belady_ms": 8.0/s//"belady_ms": 9.0/' '.*belady_ms'
mangled 'a sample below 0' 's/\[70.0, 80.0, 90.0\]/[-70.0, 80.0, 90.0]/' '.*no samples'
mangled 'no samples' 's/\[70.0, 80.0, 90.0\]/[]/' '.*no samples'
mangled 'two devices' '0,/"device_name": "a device/s//"device_name": "another device/' 'measured on different devices'
mangled 'no parts' 's/"parts"/"pieces"/' "not what tools/bench/gpu writes.*parts"
mangled 'another format' 's/sida-bench-gpu 1/sida-bench-gpu 2/' 'not a results file'
mangled 'no JSON' '$d' '.*delimiter'
refuses 'no such file' 1 "none.json.*No such file" tools/bench/report "$work/none.json"

# --- the runner
if [ ! -e "$sample/config.json" ]; then finish; fi
cat >"$work/sida" <<END
#!/bin/sh
# bench --json --device cpu --synthetic base-E --dtype TYPE …, but with the sample
case "\$*" in
doctor*) exec "$sida" "\$@" ;;
*'--dtype f32'*) echo 'sida: as if memory were out' >&2; exit 1 ;;
esac
shift 8
exec "$sida" bench --json --device cpu --model $sample "\$@"
END
chmod +x "$work/sida"
bench="tools/bench/gpu --device cpu --sida $work/sida --python false --commit none --lengths 8,25 --runs 3 --budget-runs 4"
bench="$bench --experts 8 --output $work/results.json"
# runs STATUS ARGUMENT...
runs() {
    want=$1
    shift
    cases=$((cases + 1))
    timeout 300 $bench "$@" >"$work/stdout" 2>"$work/stderr" </dev/null
    got=$?
    [ $got -eq "$want" ] || problem "gpu $*: exit status $got: $(cat "$work/stdout" "$work/stderr")"
}
runs 1 --parts resident,budget
says 'a run' '--dtype f32 --batch 1 --lengths 8,25 --runs 3: exit status 1: sida: as if memory were out'
says 'a run' 'standard_hf.py --device cpu --dtype bfloat16 --experts 8 --batch 1 --lengths 8 25 --runs 10: exit status 1'
says 'a run' '--runs 4 --warmup 8 --budget 20% --prefetch recall --recall 65,86: ok'
says 'a run' '3 jobs failed'
runs 1 --parts resident --resume
says 'resumed' '--dtype bf16 --batch 1 --lengths 8,25 --runs 3: kept'
runs 1 --parts accelerate --experts 128
says 'no 20 % run of that model' 'run the part budget first'
runs 1 --parts resident --sida "$work/none"
says 'no program' 'No such file'
runs 1 --parts budget --time-limit 0
says 'no time' 'not started: --time-limit'
refuses 'unknown part' 2 "parts 'all'" sh -c "$bench --parts all 2>&1 >/dev/null | tail -n 1 >&2; exit 2"
runs 1 --parts resident,budget
accepts 'a report of it' tools/bench/report "$work/results.json"
grep -Eq '^\| base-8 \| bf16 \| 25 \| [0-9.]+ \| [0-9,]+ \|  \|  \| [1-9][0-9]* /  \|' "$work/stdout" ||
    problem "a report of it: $(cat "$work/stdout")"
# Time, its bound, the rate of loading and the hits are there.
grep -Eq '^\| base-8 \| 20% \| tables, [0-9]+% and [0-9]+% \| 25 \| [0-9.]+ \| [0-9.]+ \|  \| [0-9.]+ \| [0-9]+% \| [0-9]+% \|' \
    "$work/stdout" || problem "a report of a budget: $(cat "$work/stdout")"
sed -i 's/a device that is not there/another/; s/"device": "cpu"/"device": "another"/' "$work/results.json"
refuses 'results of another device' 1 'results.json: measured on another' sh -c "$bench >/dev/null"

# --- the scripts that it runs, where there is a PyTorch
for script in standard_hf predictor_torch; do
    accepts "$script.py compiles" python3 -c "compile(open('tools/bench/$script.py').read(), '$script', 'exec')"
done
if python3 -c 'import torch, transformers' 2>/dev/null; then
    accepts 'Standard, tiny' tools/bench/standard_hf.py --tiny --device cpu --experts 16 --lengths 9 --runs 2
    says 'Standard, tiny' '"experts_touched_a_layer": ['
    accepts 'the predictor in PyTorch' tools/bench/predictor_torch.py --device cpu --lengths 9 --runs 2
    says 'the predictor in PyTorch' '"samples_ms": ['
fi
finish
