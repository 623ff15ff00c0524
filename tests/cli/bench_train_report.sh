#!/bin/sh
# tools/bench/gpu-train and its report. The report: ratios from a results file with made-up samples,
# and files that it refuses. The runner, on the CPU with small sizes, the sample in place of a random
# model and nothing in place of PyTorch: what it writes the report can read, and jobs that fail are
# recorded and stop nothing.
. "$(dirname "$0")/lib.sh"
if ! command -v python3 >/dev/null; then echo 'skipped: no python3'; exit 77; fi
made_up=tests/cli/bench_train_report.json

# --- the report
accepts 'report' tools/bench/report $made_up
# 1.1 is the median of both runs' six samples, 4.5 TF32's.
says 'report' "| E=128, L=32: tokens/s against PyTorch's best way | 4.00 × | 2.50 × | 4.09 × | goal |"
says 'report' "| E=128, L=512: tokens/s against PyTorch's best way | 2.00 × | 1.50 × | 1.80 × | at least |"
# Beside the lowest of PyTorch's peaks: 400 of 1200 MiB.
says 'report' "L=512: peak memory over PyTorch's lowest, own count |  | 0.500 | 0.333 | yes |"
says 'report' "L=32: peak memory over PyTorch's lowest, the driver's |  | 0.500 | 0.600 | **no** |"
says 'report' 'L=32: step / LSTM alone on cuDNN (sida-cudnn-tf32) |  | 1.400 | 1.467 | **no** |'
says 'report' 'L=512: step / LSTM alone on cuDNN (sida-cudnn-tf32) |  | 1.400 | 1.250 | yes |'
says 'report' 'E=128, L=32: idle |  | 5.0% | 4.0% | yes |'
says 'report' 'E=128, L=512: idle |  | 5.0% |  | not measured |'
says 'report' '| tracing against the forward alone |  | 90.0% | 93.8% | yes |'
says 'report' '| tracing against Transformers with hooks |  | 10.00 × | 25.00 × | yes |'
says 'report' '| bytes a traced token |  | 800 bytes | 750 bytes | yes |'
says 'report' 'training alone: against PyTorch |  |  | 5.00 × | reported |'
says 'report' '| 128 | 32 | l1-renorm | 1.100 | 1,861,818 | 1.155 | 1.500 | 6.000 | 4.500 |  | 4.09 | 0.750 | sida-cudnn-tf32 | 0.600 |'
says 'report' '| 128 | 32 | 1.250 | 40.0% | 30.0% | 20.0% | 5.0% | 2.0% | 4.0% | 4.0% | 8 |'
says 'report' '| `sida trace` | 180,000 | 90,000 | 72,000 | 750 | 15.0 | 2 |'
says 'report' '| PyTorch, TF32 | 15 | 1410 | 20.0 | 135,000 | 9.0 | 65.5 |'
says 'report' '`trace: sida trace --input valid.tsv`: ended after 240 s'

mangled() { # mangled NAME SED PATTERN
    sed "$2" $made_up >"$work/mangled.json"
    cmp -s $made_up "$work/mangled.json" && problem "$1: nothing was mangled"
    refuses "$1" 1 "mangled.json: $3" tools/bench/report "$work/mangled.json"
}
mangled 'a sample was changed' 's/\[5.0, 4.0, 4.5\]/[5.0, 4.0, 4.6]/' '.*latency_ms is 4.5, its samples say 4.6'
mangled 'a rate was changed' '0,/"tokens_per_s": 341333/s//"tokens_per_s": 351333/' '.*tokens_per_s'
mangled 'samples longer than all' '0,/"with_finish_ms": 1.155/s//"with_finish_ms": 0.9/' '.*the samples take longer'
mangled 'no samples' 's/\[1.3, 1.0, 1.1\]/[]/' '.*no samples'
mangled 'busier than time' 's/"busy_ms": 24.0/"busy_ms": 26.0/' '.*busy for 26.0 of 25.0 ms'
mangled 'less than it was busy' 's/"ms": 10.0/"ms": 1.0/' '.*took less than the time'
mangled 'another rate of hooks' 's/"tokens_per_s": 3600.0/"tokens_per_s": 360.0/' '.*its samples say otherwise'
mangled 'other steps' '0,/"steps": 1410/s//"steps": 1400/' 'whole: 1400 steps beside 1410'
mangled 'two devices' '0,/"device": "a device that is not there",$/s//"device": "another",/' 'measured on different devices'
mangled 'no kernels' 's/"own_kernels"/"others"/' "not what tools/bench/gpu-train writes.*own_kernels"
mangled 'another format' 's/sida-bench-train 1/sida-bench-train 2/' 'not a results file'

# --- the runner
if [ ! -e "$sample/config.json" ]; then finish; fi
cat >"$work/python" <<END
#!/bin/sh
# trace_hf.py: leaves the sample in place of its model; there is no PyTorch
case "\$*" in
*trace_hf.py*' --write $work/sida-bench-train/model') ;;
*) echo 'no torch' >&2; exit 1 ;;
esac
cp -rL $sample $work/sida-bench-train/model
echo '{"kind": "row", "experts": 64, "batch": 16, "tokens": [8, 8], "tokens_per_s": 4000.0, "samples_ms": [1.0, 3.0]}'
END
chmod +x "$work/python"
bench="tools/bench/gpu-train --device cpu --sida $sida --python $work/python --commit none --scratch $work"
bench="$bench --experts 8 --middle 8 --lengths 5,9 --batch 4 --d-model 96 --hidden 64 --vocabulary 99 --blocks 2"
bench="$bench --block 2 --rows 30 --valid-rows 9 --epochs 2 --output $work/results.json"
# runs STATUS ARGUMENT...
runs() {
    want=$1
    shift
    cases=$((cases + 1))
    timeout 300 $bench "$@" >"$work/stdout" 2>"$work/stderr" </dev/null
    got=$?
    [ $got -eq "$want" ] || problem "gpu-train $*: exit status $got: $(cat "$work/stdout" "$work/stderr")"
}
runs 1 --parts step
says 'steps' '--experts 8 --length 9 --tkd rest --lambda 0.5 --clip 1 --blocks 2 --block 2: ok'
says 'steps' '--tkd l1-renorm --lambda 0.005 --clip 0 --modes compile --experts 8 --lengths 5 9 --blocks 5 --block 10: exit status 1: no torch'
says 'steps' 'bench_lstm 4 64 2 2 5 9: '
runs 0 --parts trace --keep
says 'a trace' '--dry-run: ok'
runs=$(grep -c -e '--dry-run: ok' "$work/stdout")
[ "$runs" -eq 2 ] || problem "a trace: $runs runs of the forward alone"
runs 1 --parts whole --keep
says 'a training' "--output $work/sida-bench-train/predictor.h5: ok"
says 'a training' '1 jobs failed'
runs 1 --parts trace,whole --resume
says 'resumed' '--dry-run: kept'
[ ! -e "$work/sida-bench-train" ] || problem 'the scratch folder is still there'
runs 1 --parts whole
says 'no trace' 'run the part trace before'
cp "$work/results.json" "$work/before.json"
runs 0 --parts trace --resume # what it made is gone, but for the dry run it is made again
says 'made again' "--output $work/sida-bench-train/train.h5: ok"
runs 1 --parts share
says 'no timeline' 'exit status 1: bench_train: '
refuses 'unknown part' 2 "parts 'all'" sh -c "$bench --parts all 2>&1 >/dev/null | tail -n 1 >&2; exit 2"
accepts 'a report of it' tools/bench/report "$work/before.json"
grep -Eq '^\| 8 \| 9 \| l1-renorm \| [0-9.]+ \| [0-9,]+ \| [0-9.]+ \| [0-9.]+ \|  \|  \|  \|  \|' "$work/stdout" ||
    problem "a report of it: $(cat "$work/stdout")"
says 'a report of it' '| Transformers with hooks | 16 | 4,000 |  |  |'
refuses 'results of the other program' 1 'not a file of this program' \
    tools/bench/gpu --device cpu --sida "$sida" --commit none --output "$work/before.json"

# --- the scripts that it runs, where there is a PyTorch
for script in trainer_torch trace_hf; do
    accepts "$script.py compiles" python3 -c "compile(open('tools/bench/$script.py').read(), '$script', 'exec')"
done
if python3 -c 'import torch' 2>/dev/null; then
    accepts 'the trainer in PyTorch' tools/bench/trainer_torch.py --device cpu --modes eager lstm --experts 8 \
        --lengths 9 --batch 2 --blocks 2 --block 2 --vocabulary 99
    says 'the trainer in PyTorch' '"mode": "lstm-torch-tf32", "experts": 0, "batch": 2, "length": 9, "samples_ms": ['
fi
finish
