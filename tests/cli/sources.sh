#!/bin/sh
# Every hash source through train, eval and run: each predicts, none changes exact routing's output;
# the oracle misses nothing; and what is refused.
. "$(dirname "$0")/lib.sh"
if [ ! -e "$sample/config.json" ]; then echo "skipped: no sample model"; exit 77; fi
out=$work/out.h5
value() { sed -n "s/^ *\"$1\": \"\{0,1\}\([^\",]*\)\"\{0,1\},\{0,1\}\$/\1/p" "$work/stdout" | head -n 1; }
is() { # is WHAT VALUE WANTED
    [ "$2" = "$3" ] || problem "$1 is '$2', expected '$3'"
}
trace() { # trace FILE FORMAT INPUT LIMIT
    accepts "trace $1" "$sida" trace --model "$sample" --format "$2" --input "$3" --limit "$4" --output "$work/$1"
}
trace train.h5 sst2 data/sample/inputs/reviews-train.tsv 80
trace test.h5 sst2 "$reviews" 12
run() { # run OPTION...
    accepts "run $*" "$sida" run --model "$sample" --format sst2 --input "$reviews" --limit 12 \
        --device cpu --budget 20% --json --digest "$@"
}
run
digest=$(value digest)
[ -n "$digest" ] || problem 'no digest'
for source in lstm table bigram popular layer-hash; do
    set -- --trace "$work/train.h5" --output "$work/$source.h5" --source $source
    [ $source = lstm ] && set -- "$@" --valid "$work/test.h5" --epochs 2
    accepts "train $source" "$sida" train "$@"
    accepts "eval $source" "$sida" eval --trace "$work/test.h5" --predictor "$work/$source.h5" --json
    is "eval's source" "$(value source)" $source
    run --predictor "$work/$source.h5"
    is "digest with $source" "$(value digest)" "$digest"
    accepts "inspect $source" "$sida" inspect --json "$work/$source.h5"
    is "inspect's source" "$(value source)" $source
done
accepts 'train layer-hash, random' "$sida" train --trace "$work/train.h5" --output "$work/random.h5" \
    --source layer-hash --hash random --seed 3 --valid "$work/test.h5" --json
is "summary's source" "$(value source)" layer-hash

# The oracle: hits and recalls are whole.
accepts 'eval oracle' "$sida" eval --trace "$work/test.h5" --predictor "$work/test.h5" --json
is "eval's source" "$(value source)" oracle
is 'hit@1 of the oracle' "$(value hit@1)" 100.0
is 'recall of the oracle' "$(value set_recall)" 100.0
is 'equal recall of the oracle' "$(value set_recall_equal)" 100.0
run --predictor "$work/test.h5" --top-k 1
is 'digest with the oracle' "$(value digest)" "$digest"

accepts 'baselines' "$sida" eval --trace "$work/test.h5" --predictor "$work/lstm.h5" \
    --baseline-trace "$work/train.h5" --model "$sample"
for name in lstm table popular bigram router; do
    grep -q "^$name, %" "$work/stdout" || problem "no figures of $name"
done

# --- export
accepts 'export' "$sida" export --predictor "$work/lstm.h5" --output "$work/p.safetensors"
head -c 300 "$work/p.safetensors" | grep -q '"format":"pt"' || problem 'no meta data in the export'
refuses 'export of a table' 1 "table.h5: a 'table' has no network" "$sida" export --predictor "$work/table.h5" --output "$out"
refuses 'export in another format' 2 "--format 'onnx': expected safetensors" "$sida" export --predictor "$work/lstm.h5" --output "$out" --format onnx
refuses 'export without a predictor' 2 '--predictor is required' "$sida" export --output "$out"
refuses 'full disk while exporting' 1 'out.h5.*(large|space|write)' sh -c "ulimit -f 16; exec $sida export --predictor $work/lstm.h5 --output $out"

# --- what is refused
fit() { # fit NAME STATUS PATTERN OPTION...
    name=$1 want=$2 pattern=$3
    shift 3
    refuses "$name" "$want" "$pattern" "$sida" train --trace "$work/train.h5" --output "$out" "$@"
}
fit 'unknown source' 2 "--source 'guess': unknown; expected lstm or one of popular, table" --source guess
fit 'oracle to train' 2 'give the trace itself' --source oracle
fit 'steps of a table' 2 '--lr: nothing is trained by steps' --source table --lr 0.1
fit 'no validation for a network' 2 '--valid is required' --source lstm
fit 'unknown hash' 2 "--hash 'odd'" --source layer-hash --hash odd
refuses 'oracle of other inputs' 1 'train.h5: has no sequence with these' "$sida" eval --trace "$work/test.h5" --predictor "$work/train.h5"
refuses 'run with an oracle of other inputs' 1 'train.h5: has no sequence with these' "$sida" run --model "$sample" --format sst2 --input "$reviews" --limit 2 --device cpu --budget 20% --predictor "$work/train.h5"
refuses 'table of another model' 1 'of model [0-9a-f]{32}' sh -c "cp -rL $sample $work/other && chmod u+w $work/other/config.json && sed -i 's/\"dropout_rate\": *[0-9.]*/\"dropout_rate\": 0.2/' $work/other/config.json && exec $sida run --model $work/other --format sst2 --input $reviews --limit 2 --device cpu --budget 20% --predictor $work/table.h5"
refuses 'routers of another model' 1 "$work/other is another, [0-9a-f]{32}" "$sida" eval --trace "$work/test.h5" --predictor "$work/lstm.h5" --model "$work/other"
refuses 'routers of nothing' 1 'none/config.json: No such file' "$sida" eval --trace "$work/test.h5" --predictor "$work/lstm.h5" --model "$work/none"
finish
