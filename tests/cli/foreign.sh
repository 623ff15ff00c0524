#!/bin/sh
# Traces that other software wrote: what `sida inspect --check` says of damaged ones, and that
# `sida train` and `sida eval` work on a sound one of a decoder-only model with top-k routing. The two
# traces were written by tools/reference/trace_hf.py (foreign/README.md has the commands).
. "$(dirname "$0")/lib.sh"
h5edit=$2
out=$work/out.h5
folder=$(dirname "$0")/foreign
train=$folder/qwen3-moe-train.h5
held=$folder/qwen3-moe-test.h5
bad=$work/bad.h5

damage() { # damage COMMAND...: $bad is the held-out trace, damaged
    cp "$held" "$bad"
    "$h5edit" "$bad" "$@" || problem "h5edit $*"
}

# told LINE...: inspect --check says these lines, in this order, and no others.
told() {
    cases=$((cases + 1))
    "$sida" inspect --check "$bad" >"$work/stdout" 2>"$work/stderr"
    got=$?
    [ $got -eq 1 ] || problem "check: exit status $got, expected 1 and: $*"
    [ ! -s "$work/stdout" ] || problem "check: printed to stdout: $(head -c 200 "$work/stdout")"
    for line in "$@"; do echo "sida: $bad: $line"; done >"$work/expected"
    cmp -s "$work/expected" "$work/stderr" ||
        problem "check: said: $(cat "$work/stderr") -- expected: $(cat "$work/expected")"
}

# --- a sound one
accepts 'check a sound trace' "$sida" inspect --check "$held"
grep -Eq '^check +sound$' "$work/stdout" || problem "a sound trace: $(cat "$work/stdout")"
accepts 'check as JSON' "$sida" inspect --check --json "$held"
grep -q '"check": "sound"' "$work/stdout" || problem "sound as JSON: $(cat "$work/stdout")"

# --- structure
damage delete decoder/alpha
told 'dataset decoder/alpha is missing'
damage strip top_k
told 'attribute top_k is missing'
damage strip format
told 'attribute format is missing'
damage text format other
told "attribute format is 'other', not 'sida-trace'"
damage number version 2
told 'attribute version is 2, not 1 to 1'
damage text model 'Qwen3-MoE'
told "attribute model is 'Qwen3-MoE', not 32 hexadecimal digits"
damage number experts 70000
told 'attribute experts is 70000, not 1 to 65536'
damage number top 3
told 'attribute top is 3, fewer than top_k, 4' \
    'dataset decoder/top_ids has extent 6 on axis 2, but top is 3' \
    'dataset decoder/top_logp has extent 6 on axis 2, but top is 3'
damage number layers_decoder 3
told 'dataset decoder/experts has extent 2 on axis 1, but layers_decoder is 3' \
    'dataset decoder/alpha has extent 2 on axis 1, but layers_decoder is 3' \
    'dataset decoder/dropped has extent 2 on axis 1, but layers_decoder is 3' \
    'dataset decoder/top_ids has extent 2 on axis 1, but layers_decoder is 3' \
    'dataset decoder/top_logp has extent 2 on axis 1, but layers_decoder is 3'
damage number layers_decoder 0
told 'layers_encoder and layers_decoder are 0'
damage number layers_encoder 1
told 'dataset encoder/tokens is missing' 'dataset encoder/offsets is missing' \
    'dataset encoder/experts is missing' 'dataset encoder/alpha is missing' \
    'dataset encoder/dropped is missing' 'dataset encoder/top_ids is missing' \
    'dataset encoder/top_logp is missing'
damage remake decoder/dropped u8 599 2 0
told 'dataset decoder/dropped has extent 599 on axis 0, but the number of tokens is 600'
damage remake decoder/dropped u8 600 0 0
told 'dataset decoder/dropped has 1 axes, expected 2'
damage remake decoder/top_logp f32 600 2 6
told 'dataset decoder/top_logp: its type does not fit f16'
damage remake decoder/experts i64 600 2 4
told 'dataset decoder/experts: its type does not fit u16'
damage rows sequence/label 9
told 'dataset sequence/label has extent 9 on axis 0, but the length of sequence/line is 10'
damage rows embedding/rows 39
told 'dataset embedding/rows has extent 39 on axis 0, but the length of embedding/ids is 40'
damage number d_model 33
told 'dataset embedding/rows has extent 32 on axis 1, but d_model is 33'

# --- contents; a token is 60 a sequence, 2 layers, k 4, T 6
damage set decoder/offsets 2 1 50
told 'decoder/offsets: sequence 1: ends before it begins'
damage set decoder/offsets 0 1 3
told 'decoder/offsets: starts at 3, not at 0'
damage set decoder/offsets 10 1 599
told 'decoder/offsets: ends at 599, but there are 600 tokens'
damage rows decoder/offsets 10
told 'dataset decoder/offsets has extent 10 on axis 0, but the number of sequences + 1 is 11'
damage set decoder/tokens 7 3 256
told 'decoder/tokens: token 7: an id outside the vocabulary, 256 (and 2 more)'
damage set decoder/tokens 7 1 255
told 'embedding/ids: id 255: occurs, but has no row'
damage set decoder/experts 9 1 16
told 'decoder/experts: token 1, MoE layer 0: an expert past the number of experts, 16'
damage copy decoder/experts 12 14
told_like() { # told_like PATTERN: one line that matches
    refuses "check: $1" 1 "^sida: $bad: $1\$" "$sida" inspect --check "$bad"
}
told_like 'decoder/experts: token 1, MoE layer 1: an expert chosen twice, [0-9]+'
damage copy decoder/top_ids 0 5
told_like 'decoder/top_ids: token 0, MoE layer 0: an expert listed twice, [0-9]+'
damage set decoder/alpha 17 1 nan
told 'decoder/alpha: token 2, MoE layer 0: not finite'
damage set decoder/alpha 17 2 -0.5
told 'decoder/alpha: token 2, MoE layer 0: below 0 (and 1 more)'
damage set decoder/dropped 5 1 2
told 'decoder/dropped: token 2, MoE layer 1: a flag that is neither 0 nor 1'
damage set decoder/top_logp 20 1 nan
told 'decoder/top_logp: token 1, MoE layer 1: not finite'
damage set decoder/top_logp 12 1 1.5
told 'decoder/top_logp: token 1, MoE layer 0: a probability above 1'
damage copy decoder/top_logp 17 15
told 'decoder/top_logp: token 1, MoE layer 0: not falling'
damage set decoder/top_logp 12 6 -1
told 'decoder/top_logp: token 1, MoE layer 0: probabilities above 1 in all'
damage set sequence/line 0 1 0
told 'sequence/line: sequence 0: a line below 1, 0'
damage set sequence/label 4 1 -2
told 'sequence/label: sequence 4: a label below -1, -2'
damage set sequence/generated 4 2 7
told 'sequence/generated: sequence 4: a flag that is neither 0 nor 1 (and 1 more)'
damage set embedding/rows 33 1 inf
told 'embedding/rows: row 1: not finite'
damage copy embedding/ids 1 0
"$sida" inspect --check "$bad" 2>&1 | grep -q 'embedding/ids: row 1: not rising' ||
    problem 'embedding ids that do not rise'
empty='rows decoder/tokens 0 rows decoder/experts 0 rows decoder/alpha 0 rows decoder/dropped 0
    rows decoder/top_ids 0 rows decoder/top_logp 0 rows decoder/offsets 1 rows sequence/line 0
    rows sequence/label 0 rows sequence/generated 0 rows embedding/ids 0 rows embedding/rows 0'
# shellcheck disable=SC2086
damage $empty
told 'it has no sequences' 'it has no tokens'

# --- several at once, as text and as JSON; no HDF5 at all
damage delete decoder/top_ids set decoder/alpha 0 1 nan set decoder/tokens 0 1 -1 strip config
told 'attribute config is missing' 'decoder/tokens: token 0: an id outside the vocabulary, -1' \
    'decoder/alpha: token 0, MoE layer 0: not finite' 'dataset decoder/top_ids is missing'
cases=$((cases + 1))
"$sida" inspect --check --json "$bad" >"$work/stdout" 2>"$work/stderr"
[ $? -eq 1 ] || problem 'problems as JSON: exit status'
grep -q '"check": "unsound"' "$work/stdout" || problem 'problems as JSON: unsound'
[ "$(grep -c "$bad: " "$work/stdout")" -eq 4 ] || problem "problems as JSON: $(cat "$work/stdout")"
head -c 20000 "$held" >"$bad"
refuses 'check half a file' 1 'bad.h5: not written by sida, and no sound HDF5' "$sida" inspect --check "$bad"

# --- training and evaluation refuse them, too
refuse_data() { # refuse_data NAME PATTERN, with $bad prepared
    refuses "$1: train" 1 "$2" "$sida" train --trace "$bad" --valid "$held" --epochs 1 --output "$out"
    refuses "$1: valid" 1 "$2" "$sida" train --trace "$train" --valid "$bad" --epochs 1 --output "$out"
    refuses "$1: eval" 1 "$2" "$sida" eval --trace "$bad" --predictor "$work/p.h5"
}
accepts 'train on a foreign trace' "$sida" train --trace "$train" --valid "$held" --epochs 20 \
    --batch 2 --json --output "$work/p.h5"
# shellcheck disable=SC2086
damage $empty
refuse_data 'an empty split' 'bad.h5: an empty trace'
damage set decoder/tokens 7 1 256
refuse_data 'a token outside the vocabulary' 'bad.h5: decoder/tokens has a token id outside'
damage set decoder/tokens 7 1 255
refuse_data 'a token outside the embedding' 'bad.h5: token id 255 has no embedding row'
damage set decoder/alpha 17 1 nan
refuse_data 'NaN factors' 'bad.h5: decoder/alpha has a value that is not finite'
damage set decoder/top_logp 20 1 nan
refuses 'NaN log-probabilities' 1 'bad.h5: decoder/top_logp has a NaN' \
    "$sida" train --trace "$bad" --valid "$held" --epochs 1 --output "$out"
damage number experts 17
refuses 'other experts than the training trace' 1 'qwen3-moe-train.h5 has 16 experts a layer, .*bad.h5 has 17' \
    "$sida" train --trace "$train" --valid "$bad" --epochs 1 --output "$out"
refuses 'other experts than the predictor' 1 'the predictor has 0 \+ 2 layers of 16 experts, .*bad.h5 0 \+ 2 of 17' \
    "$sida" eval --trace "$bad" --predictor "$work/p.h5"
damage number layers_decoder 1 remake decoder/experts u16 600 1 4 remake decoder/alpha f32 600 1 4 \
    remake decoder/dropped u8 600 1 0 remake decoder/top_ids u16 600 1 6 \
    remake decoder/top_logp f16 600 1 6
refuses 'other layers than the training trace' 1 'qwen3-moe-train.h5 has 2 MoE layers in the decoder, .*bad.h5 has 1' \
    "$sida" train --trace "$train" --valid "$bad" --epochs 1 --output "$out"
refuses 'other layers than the predictor' 1 'the predictor has 0 \+ 2 layers of 16 experts, .*bad.h5 0 \+ 1 of 16' \
    "$sida" eval --trace "$bad" --predictor "$work/p.h5"
damage text model 00000000000000000000000000000001
refuses 'a trace of another model' 1 '[0-9a-f]{32}.*[0-9a-f]{32}' \
    "$sida" eval --trace "$bad" --predictor "$work/p.h5"

# --- what was learnt: routing of this random model depends on the token and on those before it
value() { # value NAME: of "overall" in $work/stdout, which comes first
    grep -m 1 "\"$1\":" "$work/stdout" | sed 's/.*: *\([0-9.]*\).*/\1/'
}
above() { # above NAME LOW HIGH
    got=$(value "$1")
    echo "$1 ${got:-missing}"
    awk -v got="${got:-0}" -v low="$2" -v high="$3" 'BEGIN { exit !(got >= low && got <= high) }' ||
        problem "$1 is ${got:-missing}, not $2 to $3"
}
accepts 'eval on a foreign trace' "$sida" eval --trace "$held" --predictor "$work/p.h5" --json
# Chance is 25 (slots), 50 (2 k) and 1 in 1820 (sets); the layers' popular experts get 47, 75, 2.
above slot_recall 54 75
above slot_recall_2k 80 95
above exact_set 5 30
above weight_recall 60 85
above weight_recall_2k 84 98
above hit@1 30 60
accepts 'eval prints a table' "$sida" eval --trace "$held" --predictor "$work/p.h5" --baseline-trace "$train"
grep -q 'its 4 experts, % *slot@k slot@2k *exact *weight@k' "$work/stdout" ||
    problem "no slots in: $(cat "$work/stdout")"
grep -q 'encoder' "$work/stdout" && problem 'an encoder in a decoder-only trace'
for labels in weight best; do
    accepts "train --labels $labels" "$sida" train --trace "$train" --valid "$held" --epochs 1 \
        --labels $labels --json --output "$work/q.h5"
    grep -q "\"labels\": \"$labels\"" "$work/stdout" || problem "labels $labels are not in the summary"
done
refuses 'unknown labels' 2 "--labels 'odd': expected even, weight or best" "$sida" train \
    --trace "$train" --valid "$held" --labels odd --output "$out"
finish
