#!/bin/sh
# sida eval beyond the rates of one source: figures of content and of all tokens, paired differences,
# sums a sequence, refinements, pictures, and what is refused.
. "$(dirname "$0")/lib.sh"
h5edit=$2
if [ ! -e "$sample/config.json" ]; then echo "skipped: no sample model"; exit 77; fi
out=$work/out.h5
trace() { # trace FILE FORMAT INPUT LIMIT
    accepts "trace $1" "$sida" trace --model "$sample" --format "$2" --input "$3" --limit "$4" --device cpu --output "$work/$1"
}
trace train.h5 sst2 data/sample/inputs/reviews-train.tsv 60
trace test.h5 sst2 "$reviews" 20
trace prose.h5 span-corruption data/sample/inputs/prose-test.txt 8
accepts 'check of our flags' "$sida" inspect --check "$work/prose.h5"
for source in table popular layer-hash; do
    accepts "train $source" "$sida" train --trace "$work/train.h5" --source $source --output "$work/$source.h5"
done
measure="$sida eval --trace $work/test.h5 --predictor $work/table.h5"

# --- text: what there is for each source
accepts 'eval' $measure --baseline-trace "$work/train.h5" --model "$sample" \
    --baseline "$work/popular.h5" --baseline "$work/layer-hash.h5" --per-sequence "$work/s.tsv"
says() { # says PATTERN
    grep -Eq -e "$1" "$work/stdout" || problem "$name: /$1/ is not in: $(cat "$work/stdout")"
}
says '^  of all tokens '
says '^  predicted alpha '
says '^  0\.0 to 0\.1  '
says "^  router's margin "
says '^  table is better by  hit@1 \+0\.00 \[\+0\.00, \+0\.00\]' # itself, from the training trace
[ "$(grep -c '^  table is better by' "$work/stdout")" -eq 6 ] || problem 'not six baselines'

# --- the same in the sums of the sequences: hit@1 of a source and a side is hits over pairs
rate() { # rate SOURCE SIDE: from the table
    awk -F '\t' -v source="$1" -v side="$2" \
        'NR <= 41 && $1 == source && $3 == side { n += $4; h += $5; lines++ } END { printf "%.2f of %d", 100 * h / n, lines }' "$work/s.tsv"
}
printed() { # printed SIDE: of the first source
    awk -v side="$1" '$1 == side { printf "%.2f of 20", $2; exit }' "$work/stdout"
}
for side in encoder decoder; do
    [ "$(rate table $side)" = "$(printed $side)" ] ||
        problem "$side: $(rate table $side) in the sequences, $(printed $side) printed"
done
[ "$(wc -l <"$work/s.tsv")" -eq $((1 + 7 * 20 * 2)) ] || problem 'lines of the sequences'
# Six ids "sst2 sentence:" take, with the word boundary before them 7, and </s> are no content.
pairs=$(awk -F '\t' '$1 == "table" && $3 == "encoder" { n += $4 } END { print n / 6 }' "$work/s.tsv")
all=$("$sida" inspect --json "$work/test.h5" | sed -n 's/.*"encoder_tokens": \([0-9]*\).*/\1/p' | head -n 1)
[ -z "$all" ] || [ "$pairs" -eq $((all - 8 * 20)) ] || problem "$pairs content tokens of $all"

# --- JSON
accepts 'eval --json' $measure --baseline "$work/popular.h5" --json
if command -v python3 >/dev/null; then
    python3 - "$work/stdout" "$work/popular.h5" <<'END' || problem 'the JSON of eval'
import json, sys
got = json.load(open(sys.argv[1]))
better = got["baselines"][sys.argv[2]]["better_by"]
for scope in ("overall", "encoder", "decoder"):
    theirs, interval = got["baselines"][sys.argv[2]][scope], better[scope]["hit@1"]
    assert abs(interval["mean"] - (got[scope]["hit@1"] - theirs["hit@1"])) < 1e-6, scope
    assert interval["low"] <= interval["mean"] <= interval["high"], scope
assert got["overall"]["pairs"] < got["all_tokens"]["overall"]["pairs"]
assert sum(x["pairs"] for x in got["margins"]) == got["overall"]["pairs"]
assert sum(x["pairs"] for x in got["calibration"]) == got["overall"]["pairs"] - got["overall"]["dropped"]
assert got["overall"]["alpha_constant_error"] > 0 and got["sequences"] == 20
END
fi
$measure --baseline "$work/popular.h5" --json --threads 1 >"$work/again" 2>&1
cmp -s "$work/stdout" "$work/again" || problem 'the same command printed something else'

# --- a refinement beside what was said up front and the model's routers on its hidden states
says_none() { # says_none WORD
    ! grep -q -e "$1" "$work/stdout" || problem "$name: '$1' of a source that does not refine"
}
says_none refined
accepts 'train a refinement' "$sida" train --trace "$work/train.h5" --valid "$work/test.h5" --epochs 3 \
    --device cpu --output "$work/refines.h5"
measure_refined="$sida eval --trace $work/test.h5 --predictor $work/refines.h5 --device cpu"
accepts 'eval a refinement' $measure_refined
says '^behind MoE 0, % .*refined is better by'
says '^behind MoE 1, % '
says '^         up front  .* [+-][0-9.]+ \[[+-][0-9.]+, [+-][0-9.]+\]'
says_none 'hidden state'
accepts 'eval --model --json' $measure_refined --model "$sample" --json
if command -v python3 >/dev/null; then
    python3 - "$work/stdout" <<'END' || problem 'the JSON of a refinement'
import json, sys
got = json.load(open(sys.argv[1]))
layers = {(x["side"], x["layer"]): x for x in got["layers"]}
assert [x["behind"] for x in got["refined"]] == [0, 1]
assert "decoder" in got["refined"][0] and "decoder" not in got["refined"][1]
for known in got["refined"]:
    for scope in ("overall", "encoder", "decoder"):
        if scope not in known: continue
        figures = known[scope]
        for rival in ("up_front", "hidden_state"):
            for measure, interval in figures["better_by"][rival].items():
                difference = figures["refined"][measure] - figures[rival][measure]
                assert abs(interval["mean"] - difference) < 1e-6, (scope, rival, measure)
                assert interval["low"] <= interval["mean"] <= interval["high"]
            assert figures[rival]["pairs"] == figures["refined"]["pairs"]
        assert figures["all_tokens"]["refined"]["pairs"] > figures["refined"]["pairs"]
# Up front: what stands above of the layers behind.
behind = [layers["encoder", 1], layers["encoder", 2]]
for measure in ("hit@1", "set_recall_equal"):
    mean = sum(x[measure] for x in behind) / 2
    assert abs(got["refined"][0]["encoder"]["up_front"][measure] - mean) < 1e-6
assert abs(got["refined"][1]["encoder"]["up_front"]["hit@3"] - behind[1]["hit@3"]) < 1e-6
# A router knows more from a hidden state than from the embedding.
router = got["baselines"]["router"]["layers"][2]
assert got["refined"][1]["encoder"]["hidden_state"]["hit@1"] > router["hit@1"] + 10
END
fi
# Without its first block, which has the checksum, it is a trace that other software wrote.
tail -c +513 "$work/test.h5" >"$work/otherwise.h5"
"$h5edit" "$work/otherwise.h5" set encoder/experts 0 300 7 || problem 'h5edit'
refuses 'a trace of another routing' 1 'otherwise.h5: the model in .*/model chose otherwise in [0-9]+ of [0-9]+ cases' \
    "$sida" eval --trace "$work/otherwise.h5" --predictor "$work/refines.h5" --model "$sample" --device cpu
refuses 'no such device' 1 'toaster' $measure_refined --model "$sample" --device toaster

# --- pictures
if command -v gnuplot >/dev/null; then
    accepts 'eval --plot' $measure --baseline "$work/popular.h5" --plot "$work/e.svg"
    grep -q '</svg>' "$work/e.svg" || problem 'no picture of eval'
    accepts 'train --plot' "$sida" train --trace "$work/train.h5" --valid "$work/test.h5" --epochs 2 \
        --device cpu --output "$work/net.h5" --plot "$work/t.svg"
    grep -q '</svg>' "$work/t.svg" || problem 'no picture of train'
    [ ! -s "$work/stdout" ] || problem 'train --plot prints'
    [ ! -e "$work/t.svg.tmp" ] || problem 'a temporary picture is left'
    refuses 'a picture of another type' 1 '--plot x.png: expected a name that ends in .svg' $measure --plot x.png
    refuses 'a picture nowhere' 1 '/nonexistent' $measure --plot /nonexistent/x.svg
    refuses 'a picture of a table' 2 '--plot: nothing is trained by steps' "$sida" train --trace "$work/train.h5" --source table --output "$out" --plot "$work/x.svg"
else
    echo 'not tested: pictures, no gnuplot here'
fi
# Said before the work, not after it: the trace is not even opened.
refuses 'no gnuplot, eval' 1 'needs gnuplot, which is not in PATH; install the package gnuplot-nox' env PATH=/nonexistent "$sida" eval --trace "$work/none.h5" --predictor "$work/none.h5" --plot "$work/x.svg"
refuses 'no gnuplot, train' 1 'needs gnuplot' env PATH=/nonexistent "$sida" train --trace "$work/none.h5" --valid "$work/none.h5" --output "$out" --plot "$work/x.svg"

# --- refused
refuses 'another model as baseline' 1 'of model [0-9a-f]{32}' sh -c "cp -rL $sample $work/other && chmod u+w $work/other/config.json && sed -i 's/\"dropout_rate\": *[0-9.]*/\"dropout_rate\": 0.2/' $work/other/config.json && $sida trace --model $work/other --format sst2 --input $reviews --limit 2 --device cpu --output $work/other.h5 >/dev/null && $sida train --trace $work/other.h5 --source table --output $work/other-table.h5 && exec $sida eval --trace $work/test.h5 --predictor $work/table.h5 --baseline $work/other-table.h5"
refuses 'no such baseline' 1 'none.h5: No such file' $measure --baseline "$work/none.h5"
refuses 'sums nowhere' 1 '/nonexistent' $measure --per-sequence /nonexistent/s.tsv
refuses 'full disk for the sums' 1 's.tsv.*(large|space|written)' sh -c "trap '' XFSZ; ulimit -f 1; exec $sida eval --trace $work/test.h5 --predictor $work/table.h5 --per-sequence $work/full-s.tsv"
[ ! -e "$work/full-s.tsv" ] && [ ! -e "$work/full-s.tsv.tmp" ] || problem 'a cut table is left'
set --
for i in $(seq 33); do set -- "$@" --baseline "$work/table.h5"; done
refuses 'too many baselines' 2 '--baseline is given more than 32 times' $measure "$@"
finish
