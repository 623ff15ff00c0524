#!/bin/sh
# Bad input: each case is a one-line error that names the file and the reason, a non-zero exit, no
# crash, and nothing under the final name.
. "$(dirname "$0")/lib.sh"
if [ ! -e "$sample/config.json" ]; then echo "skipped: no sample model"; exit 77; fi
out=$work/out.h5
trace() { # trace MODEL FORMAT INPUT [OPTION...]
    m=$1 f=$2 i=$3
    shift 3
    "$sida" trace --model "$m" --format "$f" --input "$i" --output "$out" --limit 8 "$@"
}
sida_trace="$sida trace --output $out --limit 8"

# --- usage
refuses 'unknown command' 2 "unknown command 'frobnicate'" "$sida" frobnicate
refuses 'unknown option' 2 "unrecognized option '--frobnicate'" "$sida" trace --frobnicate
refuses 'missing option' 2 '--model is required' $sida_trace --format text --input "$reviews"
refuses 'option without a value' 2 "requires an argument" "$sida" trace --model
refuses 'not a number' 2 "--batch 'many': expected a whole number" $sida_trace --batch many
refuses 'out of range' 2 "--batch '0': expected" $sida_trace --batch 0
refuses 'overflowing number' 2 "--limit '99999999999999999999'" "$sida" trace --limit 99999999999999999999
refuses 'unknown format' 2 "--format 'xml': expected text" $sida_trace --format xml
refuses 'stray argument' 2 "unexpected argument 'stray'" "$sida" tokenize --model "$sample" --input "$reviews" stray

# --- the model's directory
refuses 'no model' 1 "$work/none/.*No such file" $sida_trace --model "$work/none" --format sst2 --input "$reviews"
refuse_model() { # refuse_model NAME PATTERN, with $model prepared
    refuses "$1" 1 "$2" $sida_trace --model "$model" --format sst2 --input "$reviews"
}
model_copy; rm "$model/config.json"
refuse_model 'no config' 'config.json: No such file'
model_copy; own config.json; head -c 100 "$sample/config.json" >"$model/config.json"
refuse_model 'truncated config' 'config.json: '
model_copy; own config.json; echo '[1, 2]' >"$model/config.json"
refuse_model 'config is no object' 'config.json: '
model_copy; own config.json; : >"$model/config.json"
refuse_model 'empty config' 'config.json: '
config() { # config NAME SED PATTERN
    model_copy; own config.json
    sed "$2" "$sample/config.json" >"$model/config.json"
    refuse_model "$1" "$3"
}
config 'unknown model_type' 's/"switch_transformers"/"gpt9"/' 'config.json: .*gpt9'
config 'd_model is text' 's/"d_model": *[0-9]*/"d_model": "wide"/' 'config.json: .*d_model'
config 'absurd d_model' 's/"d_model": *[0-9]*/"d_model": 1000000000000/' 'config.json: .*d_model'
config 'negative experts' 's/"num_experts": *[0-9]*/"num_experts": -4/' 'config.json: .*num_experts'
config 'no heads' 's/"num_heads": *[0-9]*/"num_heads": 0/' 'config.json: .*num_heads'
config 'other d_ff than the weights' 's/"d_ff": *[0-9]*/"d_ff": 104/' 'safetensors|wi.weight'
config 'more layers than the weights' 's/"num_layers": *[0-9]*/"num_layers": 12/' 'encoder.block.'
config 'unknown feed_forward_proj' 's/"feed_forward_proj": *"[a-z]*"/"feed_forward_proj": "gated-sine"/' 'config.json: .*gated-sine'
if [ -e "$sample/model.safetensors.index.json" ]; then
    index=model.safetensors.index.json
    model_copy; own $index; sed 's/"model-00001/"..\/model-00001/' "$sample/$index" >"$model/$index"
    refuse_model 'index leaves the folder' 'index.json: '
    model_copy; own $index; head -c 1000 "$sample/$index" >"$model/$index"
    refuse_model 'truncated index' 'index.json: '
    model_copy; own $index; echo '{"weight_map": 7}' >"$model/$index"
    refuse_model 'index without a map' 'index.json: '
fi
model_copy; rm "$model/$shard"
refuse_model 'no weights' 'safetensors'
model_copy; own "$shard"; head -c 200000 "$sample/$shard" >"$model/$shard"
refuse_model 'truncated weights' 'safetensors: '
model_copy; own "$shard"; : >"$model/$shard"
refuse_model 'empty weights' 'safetensors: '
model_copy; own "$shard"; poke "$model/$shard" 0 377 377 377 377 377 377 377 177
refuse_model 'hostile header length' 'safetensors: '
model_copy; own "$shard"; poke "$model/$shard" 8 001
refuse_model 'header is no JSON' 'safetensors: '
model_copy; own "$shard"; sed 's/"BF16"/"QQ16"/' "$sample/$shard" >"$model/$shard"
refuse_model 'unknown dtype' 'safetensors: .*QQ16'
model_copy; own "$shard"; sed 's/"shape":\[/"shape":[9/' "$sample/$shard" >"$model/$shard"
refuse_model 'shape against the bytes' 'safetensors: '
model_copy; own "$shard"; sed 's/"encoder.final_layer_norm.weight"/"encoder.final_layer_norm.waight"/' "$sample/$shard" >"$model/$shard"
model_other=$(cd "$sample" && ls ./*.safetensors | tail -n 1)
[ "$model_other" = "$shard" ] || { own "$model_other"; sed 's/"encoder.final_layer_norm.weight"/"encoder.final_layer_norm.waight"/' "$sample/$model_other" >"$model/$model_other"; }
refuse_model 'missing tensor' 'encoder.final_layer_norm.weight'
model_copy; rm "$model/spiece.model"
refuse_model 'no tokenizer' 'spiece.model: No such file'
model_copy; own spiece.model; head -c 5000 "$sample/spiece.model" >"$model/spiece.model"
refuse_model 'truncated tokenizer' 'spiece.model: '
model_copy; own spiece.model; head -c 20000 /bin/sh >"$model/spiece.model"
refuse_model 'tokenizer is a program' 'spiece.model: '
model_copy; own spiece.model; : >"$model/spiece.model"
refuse_model 'empty tokenizer' 'spiece.model: '

# --- the corpus
corpus() { # corpus NAME FORMAT PATTERN, with $work/in prepared
    refuses "$1" 1 "$3" $sida_trace --model "$sample" --format "$2" --input "$work/in"
}
rm -f "$work/in"; corpus 'no input' text 'in: No such file'
mkdir "$work/in"; corpus 'input is a folder' text 'in: '; rmdir "$work/in"
: >"$work/in"; corpus 'empty input' text 'in: '
printf 'good line\n\nanother\n' >"$work/in"; corpus 'empty line' text 'in:2: '
printf 'caf\351 au lait\n' >"$work/in"; corpus 'not UTF-8' text 'in:1: .*UTF-8'
printf 'a\000b\n' >"$work/in"; corpus 'NUL byte' text 'in:1: '
awk 'BEGIN { for (i = 0; i < 3000; i++) printf "word "; print "" }' >"$work/in"
corpus 'longer than the limit' text 'in:1: .*tokens'
printf 'sentence\tlabel\nfine film\n' >"$work/in"; corpus 'sst2 without a label' sst2 'in:2: '
printf 'sentence\tlabel\nfine film\t7\n' >"$work/in"; corpus 'sst2 label 7' sst2 'in:2: '
printf 'fine film\t1\n' >"$work/in"; corpus 'sst2 without its header' sst2 'in:1: '
printf '1\t2\t3\tonly one\n' >"$work/in"; corpus 'mrpc with four fields' mrpc 'in:1: '
printf '{"text": "ok"}\n{"text": \n' >"$work/in"; corpus 'broken JSONL' jsonl 'in:2: '
printf '{"label": 1}\n' >"$work/in"; corpus 'JSONL without a text' jsonl 'in:1: '
printf '{"text": 7}\n' >"$work/in"; corpus 'JSONL text is a number' jsonl 'in:1: '
printf '{"passage": {"text": "p"}}\n' >"$work/in"; corpus 'multirc without questions' multirc 'in:1: '
printf 'a\tb\tc\n' >"$work/in"; corpus 'tsv with three fields' tsv 'in:1: '
printf 'one\ttarget\nno target\n' >"$work/in"; corpus 'a target for some' tsv 'in:2: '
gzip -c "$reviews" | head -c 2500 >"$work/in"
refuses 'truncated gzip' 1 'in:[0-9]*:? .*gzip' "$sida" trace --model "$sample" --format sst2 --input "$work/in" --output "$out"

# --- outputs
refuses 'output in no folder' 1 "$work/none/t.h5: " "$sida" trace --model "$sample" --format sst2 --input "$reviews" --output "$work/none/t.h5"
refuses 'output is a folder' 1 "$work: " "$sida" trace --model "$sample" --format sst2 --input "$reviews" --output "$work"
refuses 'empty output name' 1 'empty' "$sida" trace --model "$sample" --format sst2 --input "$reviews" --output ''
refuses 'output in /proc' 1 '/proc/t.h5' "$sida" trace --model "$sample" --format sst2 --input "$reviews" --output /proc/t.h5
refuses 'full disk while tracing' 1 'out.h5.*(large|space|write)' sh -c "ulimit -f 8; exec $sida_trace --model $sample --format sst2 --input $reviews"
mkdir "$work/small"
if mount -t tmpfs -o size=256k tmpfs "$work/small" 2>/dev/null; then # a disk that is really full
    refuses 'disk full while tracing' 1 't.h5.*No space left' "$sida" trace --model "$sample" --format sst2 --input "$reviews" --output "$work/small/t.h5"
    [ ! -e "$work/small/t.h5" ] || problem 'disk full while tracing: a file under the final name'
    umount "$work/small"
else
    echo 'skipped: no right to mount a small disk'
fi
cases=$((cases + 1))
"$sida" tokenize --model "$sample" --input "$reviews" >/dev/full 2>"$work/stderr" && problem 'full stdout: exit 0'
grep -q '^sida: standard output: ' "$work/stderr" || problem "full stdout: $(cat "$work/stderr")"

# --- traces and predictors
accepts 'a trace' "$sida" trace --model "$sample" --format sst2 --input "$reviews" --limit 60 --output "$work/good.h5"
accepts 'a predictor' "$sida" train --trace "$work/good.h5" --valid "$work/good.h5" --epochs 1 --output "$work/p.h5"
train() { # train NAME PATTERN, with $work/bad.h5 prepared
    refuses "$1" 1 "$2" "$sida" train --trace "$work/bad.h5" --valid "$work/good.h5" --epochs 1 --output "$out"
    cp "$work/bad.h5" "$work/bad-copy.h5"
    refuses "$1, inspected" 1 "bad-copy.h5" "$sida" inspect "$work/bad-copy.h5"
}
size=$(wc -c <"$work/good.h5")
head -c $((size / 2)) "$work/good.h5" >"$work/bad.h5"; train 'truncated trace' 'bad.h5: '
cp "$work/good.h5" "$work/bad.h5"; poke "$work/bad.h5" $((size / 2)) 123 321 012; train 'flipped bits in a trace' 'bad.h5: .*checksum'
cp "$work/good.h5" "$work/bad.h5"; poke "$work/bad.h5" 20 377; train 'flipped bits in its checksum' 'bad.h5: '
: >"$work/bad.h5"; train 'empty trace' 'bad.h5: '
head -c 30000 /bin/sh >"$work/bad.h5"; train 'a program for a trace' 'bad.h5: '
tail -c +513 "$work/good.h5" | head -c 9000 >"$work/bad.h5"; train 'a damaged foreign file' 'bad.h5: '
refuses 'a predictor for a trace' 1 'p.h5: ' "$sida" train --trace "$work/p.h5" --valid "$work/good.h5" --output "$out"
refuses 'no trace' 1 'none.h5: No such file' "$sida" train --trace "$work/none.h5" --valid "$work/good.h5" --output "$out"
refuses 'a larger T than the trace has' 1 'good.h5.*top|top.*good.h5|--top' "$sida" train --trace "$work/good.h5" --valid "$work/good.h5" --top 5000 --output "$out"
refuses 'full disk while training' 1 'out.h5.*(large|space|write)' sh -c "ulimit -f 16; exec $sida train --trace $work/good.h5 --valid $work/good.h5 --epochs 1 --output $out"
head -c 30000 /bin/sh >"$work/bad.h5"
refuses 'a program for a predictor' 1 'bad.h5: ' "$sida" eval --trace "$work/good.h5" --predictor "$work/bad.h5"
model_copy; own config.json; sed 's/"dropout_rate": *[0-9.]*/"dropout_rate": 0.2/' "$sample/config.json" >"$model/config.json"
refuses 'predictor of another model' 1 'p.h5: .*[0-9a-f]{32}.*[0-9a-f]{32}' "$sida" run --model "$model" --predictor "$work/p.h5" --format sst2 --input "$reviews" --limit 2 --budget 20%
size=$(wc -c <"$work/p.h5")
head -c $((size - 100)) "$work/p.h5" >"$work/bad.h5"
refuses 'truncated predictor' 1 'bad.h5: ' "$sida" run --model "$sample" --predictor "$work/bad.h5" --format sst2 --input "$reviews" --limit 2 --budget 20%
# A run killed once it has finished a part.
sida_cut="$sida trace --model $sample --format sst2 --input $reviews --output $work/cut.h5 --batch 1"
$sida_cut --part-tokens 20 >/dev/null 2>&1 &
while [ ! -e "$work/cut.h5.parts/part-000002.h5" ] && kill -0 $! 2>/dev/null; do :; done
kill -9 $! 2>/dev/null
wait $! 2>/dev/null
[ -e "$work/cut.h5.parts/part-000002.h5" ] || problem 'the run to kill was too fast'
refuses 'parts without --resume' 1 'cut.h5.parts: .*--resume' $sida_cut --part-tokens 20
refuses 'resume with other options' 1 'options' $sida_cut --part-tokens 21 --resume
poke "$work/cut.h5.parts/part-000000.h5" 3000 123 321
refuses 'damaged part' 1 'part-000000.h5: .*checksum' $sida_cut --part-tokens 20 --resume

# --- the runtime
run() { # run NAME STATUS PATTERN OPTION...
    name=$1 want=$2 pattern=$3
    shift 3
    refuses "$name" "$want" "$pattern" "$sida" run --model "$sample" --format sst2 --input "$reviews" --limit 2 "$@"
}
run 'budget of one expert' 1 '1.*2' --budget 1-experts
run 'budget below the fixed part' 1 'budget|Budget' --budget 1MiB
run 'budget is a word' 2 "budget 'plenty'" --budget plenty
run 'budget above 100 %' 2 "budget '140%'" --budget 140%
run 'unknown policy' 2 "policy 'mru': expected" --budget 20% --policy mru
run 'unknown routing' 2 "routing 'random': expected" --budget 20% --routing random
run 'guided without a predictor' 2 'guided needs a predictor' --budget 20% --routing guided
run 'queue of none' 2 '--queue' --budget 20% --queue 0
run 'unknown device' 2 "device 'tpu'" --budget 20% --device tpu
# Without a GPU, a driver, or CUDA in the build; an empty list of devices hides those that are there.
run_hidden() { # run_hidden NAME COMMAND...
    name=$1
    shift
    refuses "$name" 1 'device cuda: .*use --device cpu' env CUDA_VISIBLE_DEVICES= "$@" --device cuda
}
run_hidden 'no GPU: run' "$sida" run --model "$sample" --format sst2 --input "$reviews" --limit 2
run_hidden 'no GPU: generate' "$sida" generate --model "$sample" --input "$reviews"
run_hidden 'no GPU: trace' $sida_trace --model "$sample" --format sst2 --input "$reviews"
run_hidden 'no GPU: bench' "$sida" bench --model "$sample" --runs 1 --warmup 1 --lengths 4
run_hidden 'no GPU: doctor' "$sida" doctor
run 'budget without room for slots' 1 'dense weights .* workspace .* predictor .* driver and libraries .* 2 slots of' --device cpu --budget 8MiB
refuses 'unknown device to trace on' 1 "device 'tpu'" $sida_trace --model "$sample" --format sst2 --input "$reviews" --device tpu
refuses 'generate: no input' 1 'none.txt: No such file' "$sida" generate --model "$sample" --input "$work/none.txt"
refuses 'inspect: nothing there' 1 'none: ' "$sida" inspect "$work/none"
finish
