#!/bin/sh
# sida run --score: what it prints and writes, and the bench that is made of it.
. "$(dirname "$0")/lib.sh"
if [ ! -e "$sample/config.json" ]; then echo "skipped: no sample model"; exit 77; fi
value() { sed -n "s/^ *\"$1\": \"\{0,1\}\([^\",]*\)\"\{0,1\},\{0,1\}\$/\1/p" "$work/stdout" | head -n 1; }
is() { # is WHAT VALUE WANTED
    [ "$2" = "$3" ] || problem "$1 is '$2', expected '$3'"
}
score() { # score FORMAT INPUT OPTION...
    form=$1 input=$2
    shift 2
    accepts "score $form $*" "$sida" run --model "$sample" --device cpu --score --format "$form" \
        --input "$input" --limit 12 "$@"
}
prose=data/sample/inputs/prose-test.txt
accepts trace "$sida" trace --model "$sample" --device cpu --format sst2 --input "$reviews" --limit 12 --output "$work/t.h5"
score sst2 "$reviews" --json --output "$work/answers"
is 'flips of exact routing' "$(value label_flips)" 0
is 'target tokens' "$(value target_tokens)" 24
is 'records' "$(wc -l <"$work/answers")" 12
# answer, -log p, tokens, target; the score is what the file says.
right=$(awk -F'\t' 'NF == 4 && $2 > 0 && $3 == 2 && $1 ~ /^(positive|negative)$/ { n += $1 == $4 } END { print n / NR }' "$work/answers")
[ "$(value score | cut -c 1-6)" = "$(printf '%s' "$right" | cut -c 1-6)" ] || problem "score $(value score), the file says $right"
loss=$(awk -F'\t' '{ sum += $2; n += $3 } END { printf "%.6f", sum / n }' "$work/answers")
[ "$(printf '%.6f' "$(value loss)")" = "$loss" ] || problem "loss $(value loss), the file says $loss"
score sst2 "$reviews" --predictor "$work/t.h5" --routing guided --top-k 1 --no-compare
grep -Eq '^allowed, encoder +[0-9.]+ %: [0-9.]+ [0-9.]+ [0-9.]+$' "$work/stdout" || problem 'no shares by layer'
grep -Eq '^predicting .* ms a batch' "$work/stdout" || problem 'no time of predicting'
score span-corruption "$prose" --json
first=$(value loss)
is 'flips without labels' "$(value label_flips)" -1
score span-corruption "$prose" --json --batch 4 --budget 20%
is 'loss in batches of 4' "$(value loss)" "$first"
score span-corruption "$prose" --json --seed 1
[ "$(value loss)" != "$first" ] || problem 'the seed changes nothing'

refuses 'share of nothing' 2 "--active-share '0': expected a number from 0.001 to 100" "$sida" run --model "$sample" --format sst2 --input "$reviews" --active-share 0%
refuses 'share above 1' 2 "--active-share '140'" "$sida" run --model "$sample" --format sst2 --input "$reviews" --active-share 140%
refuses 'share of exact routing' 2 'of guided routing, not of exact' "$sida" run --model "$sample" --device cpu --format sst2 --input "$reviews" --active-share 40%
refuses 'random exact routing' 2 'baseline of guided and predicted' "$sida" run --model "$sample" --device cpu --format sst2 --input "$reviews" --random 1
refuses 'scores of text' 2 'no targets to score' "$sida" run --model "$sample" --device cpu --format text --input "$prose" --score
refuses 'targets that are too long' 2 'more than max-new-tokens 3' "$sida" run --model "$sample" --device cpu --format span-corruption --input "$prose" --score --max-new-tokens 3

# The bench: a table for each task, all counts in the file.
if command -v python3 >/dev/null; then
    accepts 'tools/bench/fidelity' tools/bench/fidelity --sida "$sida" --seeds 1 --random-seeds 1 --rows 40 --limit 6 \
        --train-options '--epochs 1' --task sst2 data/sample/inputs/reviews-train.tsv "$reviews" "$work/bench"
    is 'tables' "$(grep -c '^### .*: 6 records$' "$work/stdout")" 2
    is 'rows' "$(grep -c '^| guided\|^| predicted' "$work/stdout")" 14
    is 'runs in the file' "$(grep -c '"mode": ' "$work/bench/fidelity.json")" 30
    is 'flips in the file' "$(grep -c '"flips": ' "$work/bench/fidelity.json")" 15
fi
finish
