#!/bin/sh
# tools/bench/predictors over made-up sets of a few rows: every row of its tables is there, --resume
# measures nothing again and prints the same, --report reads the file, and what is refused.
. "$(dirname "$0")/lib.sh"
if ! command -v python3 >/dev/null; then echo 'skipped: no python3'; exit 77; fi
if [ ! -e "$sample/config.json" ]; then echo "skipped: no sample model"; exit 77; fi
inputs=data/sample/inputs
sets=$work/sets
mkdir -p "$sets/sst2" "$sets/mrpc" "$sets/multirc" "$sets/corpus"
head -n 31 $inputs/reviews-train.tsv >"$sets/sst2/train.tsv"
head -n 13 "$reviews" | gzip >"$sets/sst2/dev.tsv.gz"
awk 'NR <= 36 { printf "%d\t1\t2\t%s\t%s\n", NR % 2, substr($0, 1, 60), substr($0, 20, 50) }' \
    $inputs/prose-train.txt >"$sets/mrpc/msr_paraphrase_train.txt"
head -n 10 "$sets/mrpc/msr_paraphrase_train.txt" | gzip >"$sets/mrpc/msr_paraphrase_test.txt.gz"
awk 'NR <= 20 { gsub(/["\\\\]/, ""); printf "{\"passage\":{\"text\":\"%s\",\"questions\":[{\"question\":\"Who?\",\"answers\":[{\"text\":\"he\",\"label\":1},{\"text\":\"she\",\"label\":0}]}]}}\n", substr($0, 1, 120) }' \
    $inputs/prose-train.txt >"$sets/multirc/train.jsonl"
head -n 6 "$sets/multirc/train.jsonl" >"$sets/multirc/val.jsonl"
# 50 blocks of 16 short lines: the tenth chooses the epoch, the 25th is held out.
awk '{ for (i = 1; i + 8 <= NF && lines < 800; i += 8) { lines++; print $i, $(i + 1), $(i + 2), $(i + 3), $(i + 4), $(i + 5) } }' \
    $inputs/prose-train.txt $inputs/prose-test.txt >"$sets/corpus/a.txt"
result=$work/results.json
tool="tools/bench/predictors $sets --sida $sida --quick --rows 20 --valid-rows 8 --test-rows 6 --steps 2 --threads 1 --device cpu --commit test --work $work/runs --output $result"
accepts 'predictors' $tool --agreement
for row in popular table bigram layer-hash router "the paper's" 'lstm, our loss' \
    'lstm, two directions' 'itself on the CPU' default; do
    [ "$(grep -c "^| $row |" "$work/stdout")" -ge 5 ] || problem "no row of $row"
done
for title in 'SST-2 |' 'MRPC |' 'MultiRC |' 'prose |' 'prose, decoder |' 'trained on SST-2 |' \
    "router's margin" 'α, points |' 'default: predicted α' 'training |' 'chosen from |' 'set | part |'; do
    says "$name" "| $title"
done
# The model on the CPU agrees with itself on the CPU.
says "$name" '| itself on the CPU | 100.0 | 100.0 | 100.0 | 100.0 | 100.0 | 100.0 |'
# One answer a question, and the block that the model's own training left out.
says "$name" '| MultiRC | test | 6 |'
says "$name" '| prose | test | 1 |'
cp "$work/stdout" "$work/first"
accepts 'predictors, resumed' $tool --agreement --resume
cmp -s "$work/first" "$work/stdout" || problem 'resumed: other tables'
[ ! -s "$work/stderr" ] || problem "resumed: ran again: $(cat "$work/stderr")"
accepts 'report' tools/bench/predictors --report "$result"
cmp -s "$work/first" "$work/stdout" || problem 'report: other tables'
echo '{"format": "x"}' >"$work/other.json"
refuses 'report of another file' 1 'not a file of this program' tools/bench/predictors --report "$work/other.json"
refuses 'no such program' 1 'none: No such file' tools/bench/predictors --sida "$work/none" "$sets"
refuses 'what sida refuses' 1 "exit status 1: sida: .*no-model" tools/bench/predictors --sida "$sida" --model "$work/no-model" "$sets"
rm "$sets/mrpc/msr_paraphrase_test.txt.gz"
refuses 'a set is missing' 1 'msr_paraphrase_test.txt.gz: No such file' $tool
finish
