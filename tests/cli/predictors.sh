#!/bin/sh
# tools/bench/predictors over made-up sets of a few rows: every row of its tables is there, --resume
# measures nothing again and prints the same, what goes to GPUs and to PyTorch, reports of several files,
# the parts of trainer/README.md, and what is refused. And tools/bench/train-topk.
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
sizes='--quick --rows 20 --valid-rows 8 --test-rows 6 --steps 2 --threads 1 --commit test'
tool="tools/bench/predictors $sets --sida $sida $sizes --device cpu --work $work/runs --output $result"
accepts 'predictors' $tool --agreement cpu --prose-every 8
for row in "the layer's most popular" 'token-id table' '(token before, token) table' layer-hash \
    "the paper's net" "the paper's net, our loss" 'the same, in two directions' \
    'the model itself in fp32' '**the default**'; do
    [ "$(grep -cF "| $row |" "$work/stdout")" -ge 5 ] || problem "no row of $row"
done
for title in 'SST-2 |' 'MRPC |' 'MultiRC |' 'prose |' 'prose, decoder |' 'trained on SST-2 |' \
    "router's margin" 'α, points: mean error |' "the default's α |" 'training |' 'chosen from |' \
    'set | part |' 'predicting |'; do
    says "$name" "| $title"
done
grep -q '^| SST-2, MoE layer 0 | \*\*the refinement\*\* | ' "$work/stdout" || problem 'no refinement'
grep -q '^| SST-2, MoE layer 1 | their routers on the hidden state | ' "$work/stdout" || problem 'no hidden state'
# The model on the CPU agrees with itself on the CPU.
says "$name" '| the model itself in fp32 | 100.0 | 100.0 | 100.0 |'
# One answer a question, and the block that the model's own training left out.
says "$name" '| MultiRC | test | 6 |'
says "$name" '| prose | test | 1 |'
cp "$work/stdout" "$work/first"
accepts 'predictors, resumed' $tool --agreement cpu --prose-every 8 --resume
cmp -s "$work/first" "$work/stdout" || problem 'resumed: other tables'
[ ! -s "$work/stderr" ] || problem "resumed: ran again: $(cat "$work/stderr")"
accepts 'report' tools/bench/predictors --report "$result"
cmp -s "$work/first" "$work/stdout" || problem 'report: other tables'

# Trainings and what is to be cuda's go to the GPUs, the rest does not; and what PyTorch predicts is
# measured: here a script in its place predicts what was traced.
cat >"$work/sida" <<END
#!/bin/sh
echo "\$1 gpu \${CUDA_VISIBLE_DEVICES:-none}" >>$work/log
for word; do
    shift
    [ "\$word" != cuda ] || word=cpu
    set -- "\$@" "\$word"
done
exec $sida "\$@"
END
cat >"$work/python" <<END
#!/bin/sh
echo "python gpu \${CUDA_VISIBLE_DEVICES:-none} \$*" >>$work/log
for word; do
    case \$word in *=*) cp "\${word%=*}" "\${word#*=}" ;; esac
done
echo 'epoch 1/1  loss 1  valid hit@1 50.00' >&2
echo '{"valid": {"overall": {"hit@1": 50.0}}, "steps": 4, "kept_epoch": 1}'
END
chmod +x "$work/sida" "$work/python"
accepts 'GPUs and PyTorch' tools/bench/predictors "$sets" --sida "$work/sida" $sizes --gpus 3,5 --jobs 2 --sets mrpc \
    --agreement cuda --torch "$work/python" --twice --output "$work/mrpc.json"
says "$name" '| the same, in PyTorch | 100.0 | 100.0 | 100.0 |'
says "$name" '| a wide Transformer in PyTorch | 100.0 | 100.0 | 100.0 |'
says "$name" '| the model itself in bf16 | 100.0 | 100.0 | 100.0 |'
grep -Eq '^\| MRPC \| [0-9.]+.* \| 100.0 \| -[0-9.]+ \| [0-9.]+' "$work/stdout" || problem 'no difference to PyTorch'
grep -Eq '^\| MRPC, \*\*the default\*\* .* \| [+-][0-9.]+ \| [0-9]+ \|$' "$work/stdout" || problem 'nothing of twice the steps'
# two seeds of three networks, two rates and one more of the paper's, twice the steps of four; one hash.
[ "$(grep -c '^train gpu [35]$' "$work/log")" -eq 13 ] || problem "trainings on GPUs: $(sort "$work/log" | uniq -c)"
[ "$(grep -c '^train gpu none$' "$work/log")" -eq 2 ] || problem 'the fixed hash is made on a GPU'
[ "$(grep -c '^trace gpu none$' "$work/log")" -eq 3 ] || problem 'traces on a GPU'
[ "$(grep -c '^trace gpu [35]$' "$work/log")" -eq 1 ] || problem 'no trace in bf16'
grep -q '^eval gpu [35]$' "$work/log" && problem 'an evaluation on a GPU'
[ "$(grep -c '^python gpu [35] .*--kind lstm --tkd l1-renorm --lambda 0.005 --lr ' "$work/log")" -eq 3 ] || problem "PyTorch's trainings"

# Of several files the latest counts for each set.
accepts 'two files' tools/bench/predictors --report "$work/mrpc.json" "$result"
says "$name" '| a wide Transformer in PyTorch | 100.0 | 100.0 | 100.0 |'
[ "$(grep -c '^| MRPC | hit@1' "$work/stdout")" -eq 1 ] || problem 'MRPC is not there once'
says "$name" '| SST-2 | hit@1'
printf 'x\n<!-- other: begin -->\nkept\n<!-- other: end -->\n<!-- sources: begin -->\nold\n<!-- sources: end -->\ny\n' >"$work/README.md"
accepts 'a part of a file' tools/bench/predictors --report "$result" --write "$work/README.md"
[ "$(sed -n '1,5p;$p' "$work/README.md" | tr '\n' '|')" = 'x|<!-- other: begin -->|kept|<!-- other: end -->|<!-- sources: begin -->|y|' ] || problem 'other lines changed'
grep -q '^| prose | hit@1' "$work/README.md" || problem 'nothing was put there'
grep -q '^old$' "$work/README.md" && problem 'the old part is still there'
cp trainer/README.md "$work/README.md"
accepts 'the README' tools/bench/predictors --report --write "$work/README.md"
cmp -s trainer/README.md "$work/README.md" ||
    problem "trainer/README.md is not what results/ gives; run tools/bench/predictors --report --write trainer/README.md"

echo '{"format": "x"}' >"$work/other.json"
echo 'nothing' >"$work/plain.md"
refuses 'report of another file' 1 'not a file of this program' tools/bench/predictors --report "$work/other.json"
refuses 'no place for tables' 1 'plain.md: has no line <!-- NAME: begin -->' tools/bench/predictors --report "$result" --write "$work/plain.md"
refuses 'no such program' 1 'none: No such file' tools/bench/predictors --sida "$work/none" "$sets"
refuses 'what sida refuses' 1 "exit status 1: sida: .*no-model" tools/bench/predictors --sida "$sida" --model "$work/no-model" "$sets"
refuses 'no time' 1 'not started: --time-limit' tools/bench/predictors --sida "$sida" --time-limit 0.000001 "$sets"
rm "$sets/mrpc/msr_paraphrase_test.txt.gz"
refuses 'a set is missing' 1 'msr_paraphrase_test.txt.gz: No such file' $tool

# tools/bench/train-topk, with traces that are there in place of those that PyTorch would make.
cat >"$work/python" <<END
#!/bin/sh
case \$1 in
*make_tiny_moe.py) mkdir "\$3" && touch "\$3/config.json" ;;
*)
    for word; do last=\$word; done
    part=test
    case \$last in *-test.h5) ;; *) part=train ;; esac
    cp tests/cli/foreign/qwen3-moe-\$part.h5 "\$last"
    ;;
esac
END
accepts 'train-topk' tools/bench/train-topk --sida "$sida" --python "$work/python" --families qwen3_moe --seeds 2 \
    --epochs 2 --commit test --output "$work/topk.json"
for row in popular table bigram 'lstm, even' 'lstm, weight' 'lstm, best' '\*\*the default\*\*'; do
    grep -Eq "^\| qwen3_moe, $row( \| [0-9.]+){7} \|" "$work/stdout" || problem "no row of $row"
done
refuses 'no such family' 1 "families 'x': expected some of" sh -c \
    'tools/bench/train-topk --families x 2>&1 | tail -n 1 >&2; exit 1'
refuses 'no Python' 1 'train-topk: .*none: No such file' tools/bench/train-topk --python "$work/none" --sida "$sida"

# PyTorch itself, where there is one: what it counts is what sida counts of what it wrote.
python=${PYTHON:-python3}
if $python -c 'import torch, h5py' 2>/dev/null; then
    for kind in 'lstm --tkd l1-renorm --lambda 0.005' 'transformer --hidden 32 --heads 2 --blocks 1'; do
        accepts "PyTorch, $kind" $python tools/bench/predictors_torch.py --kind $kind --device cpu --threads 1 \
            --epochs 2 --trace "$work/runs/prose-train.h5" --valid "$work/runs/prose-valid.h5" \
            --predict "$work/runs/prose-test.h5=$work/predicted.h5"
        theirs=$(sed 's/.*predicted[^}]*"hit@1": \([0-9.]*\), "hit@3": \([0-9.]*\), "all_tokens": {"hit@1": \([0-9.]*\),.*/\1 \2 \3/' "$work/stdout")
        accepts "sida eval, $kind" "$sida" eval --json --trace "$work/runs/prose-test.h5" --predictor "$work/predicted.h5"
        ours=$(python3 -c 'import json, sys; x = json.load(sys.stdin); y = x["overall"]; print(y["hit@1"], y["hit@3"], x["all_tokens"]["overall"]["hit@1"])' <"$work/stdout")
        echo "$theirs $ours" | awk '{ for (i = 1; i <= 3; i++) if (($i - $(i + 3)) ^ 2 > 1e-8) exit 1 }' ||
            problem "$kind: PyTorch counts $theirs, sida $ours"
    done
fi
finish
