"""The tables of tools/bench/predictors: means over seeds; an interval goes from the lowest end of a
seed's to the highest of another's, so it is no narrower than any of them."""

import json
from statistics import mean, median

SETS = ["sst2", "mrpc", "multirc", "prose"]
TITLES = {"sst2": "SST-2", "mrpc": "MRPC", "multirc": "MultiRC", "prose": "prose"}
METRICS = {"hit@1": "hit@1", "hit@3": "hit@3", "set_recall_equal": "equal recall"}
SIDES = ("encoder", "decoder")
PAPER, AGAIN, FIRST = "the paper's", "the paper's, PyTorch", "default"
# In the order of the tables; what the others are compared with comes last.
ROWS = {
    "popular": "the layer's most popular",
    "layer-hash": "layer-hash",
    "router": "the routers on LN(embedding)",
    "table": "token-id table",
    "bigram": "(token before, token) table",
    PAPER: "the paper's net",
    AGAIN: "the same, in PyTorch",
    "lstm, our loss": "the paper's net, our loss",
    "lstm, two directions": "the same, in two directions",
    "ceiling": "a wide Transformer in PyTorch",
    "itself in bf16": "the model itself in bf16",
    "itself in fp32": "the model itself in fp32",
    FIRST: "**the default**",
}
WAYS = {
    "refined": "**the refinement**",
    "up_front": "what was said up front",
    "hidden_state": "their routers on the hidden state",
}
KNOWS_NO_FACTORS = ("popular", "layer-hash", "router")


# --- the files


def load(paths, form):
    """One set of results, of each set what was measured last. runs: {set: settings, commit, …}"""
    files = []
    for path in paths:
        with open(path, encoding="utf-8") as file:
            results = json.load(file)
        if results.get("format") != form:
            raise ValueError(f"{path}: not a file of this program ({form})")
        files.append(results)
    merged = {"runs": {}, "traces": {}, "sweep": [], "trained": [], "evaluations": []}
    for results in sorted(files, key=lambda x: x["date"]):
        names = results["settings"]["sets"]
        for name in names:
            run = {key: results[key] for key in ("settings", "commit", "machine", "date")}
            merged["runs"][name] = run | {"traces": results["traces"]}
        for key, of in (("sweep", "set"), ("trained", "set"), ("evaluations", "trained_on")):
            merged[key] = [x for x in merged[key] if x[of] not in names] + results[key]
        if "shares" in results:
            merged["shares"] = results["shares"]
            merged["shares_machine"] = results["machine"]
    merged["runs"] = {name: merged["runs"][name] for name in SETS if name in merged["runs"]}
    return merged


def of(results, learnt, name):
    return [x for x in results["evaluations"] if (x["trained_on"], x["set"]) == (learnt, name)]


def rows_of(runs):
    """Those that all have."""
    return [row for row in ROWS if runs and all(row in run["rows"] for run in runs)]


# --- cells


def values(runs, row, scope, metric, all_tokens=False):
    found = [run["rows"][row] for run in runs]
    found = [x["all_tokens"] for x in found] if all_tokens else found
    return [x[scope][metric] for x in found if scope in x]


def figure(found):
    """A mean, and how far seeds go to either side where they differ."""
    if not found:
        return ""
    spread = max(max(found) - mean(found), mean(found) - min(found))
    return f"{mean(found):.1f}" + (f" ± {spread:.1f}" if spread >= 0.05 else "")


def interval(runs, row, metric, scope="overall"):
    found = [run["rows"][row].get("better_by", {}).get(scope, {}).get(metric) for run in runs]
    return "" if None in found else spanning(found)


def spanning(found):
    if not found:
        return ""
    low, high = min(x["low"] for x in found), max(x["high"] for x in found)
    return f"{mean(x['mean'] for x in found):+.1f} [{low:+.1f}, {high:+.1f}]"


def settings(results, name):
    """What was trained on how much, in a line."""
    run, size = results["runs"][name], results["runs"][name]["traces"][name]
    s, train, test = run["settings"], size["train"], size["test"]
    longest = max((x["steps"] or 0 for x in results["trained"] if x["set"] == name), default=0)
    said = "A quick run, whose figures say nothing. " if s["quick"] else ""
    said += f"**{TITLES[name]}**: {train['sequences']:,} sequences to train on "
    tokens = (f"{train[side + '_tokens']:,} {side}" for side in SIDES)
    said += f"({' and '.join(tokens)} tokens), {longest:,} steps of {s['batch']}; "
    said += f"{test['sequences']:,} held out; seeds {', '.join(map(str, s['seeds']))}; "
    return said + f"commit {run['commit'][:12]}, {run['machine']['device']}.\n"


# --- tables: (head, lines)


def in_domain(results, name):
    runs = of(results, name, name)
    head = [TITLES[name], *METRICS.values(), "α error"]
    head += [f"all tokens: {x}" for x in METRICS.values()]
    head += [f"default better: {x}" for x in METRICS.values()]
    lines = []
    for row in rows_of(runs):
        line = [ROWS[row]] + [figure(values(runs, row, "overall", x)) for x in METRICS]
        line.append(figure(values(runs, row, "overall", "alpha_error")))
        line += [f"{mean(values(runs, row, 'overall', x, True)):.1f}" for x in METRICS]
        lines.append(line + [interval(runs, row, x) for x in METRICS])
    return head, lines


def decoders(results):
    """The decoder alone, where it says something: on span corruption."""
    runs = of(results, "prose", "prose")
    head = ["prose, decoder", *METRICS.values()]
    head += [f"default better: {x}" for x in METRICS.values()]
    lines = []
    for row in rows_of(runs):
        line = [ROWS[row]] + [figure(values(runs, row, "decoder", x)) for x in METRICS]
        lines.append(line + [interval(runs, row, x, "decoder") for x in METRICS])
    return head, lines


def torch(results):
    """The same network and settings, trained here and in PyTorch."""
    head = ["the paper's net", "hit@1", "in PyTorch", "difference"]
    head += ["hit@3", "in PyTorch", "difference"]
    lines = []
    for name in results["runs"]:
        runs = of(results, name, name)
        if AGAIN not in rows_of(runs):
            continue
        line = [TITLES[name]]
        for metric in ("hit@1", "hit@3"):
            ours, theirs = (values(runs, row, "overall", metric) for row in (PAPER, AGAIN))
            line += [figure(ours), figure(theirs), f"{mean(ours) - mean(theirs):+.2f}"]
        lines.append(line)
    return head, lines


def shift(results):
    head = ["trained on SST-2"]
    for name in SETS[1:]:
        head += [f"{TITLES[name]}: hit@1", "drop", "equal recall", "drop"]
    lines = []
    there = {name: of(results, "sst2", name) for name in SETS[1:]}
    rows = [x for x in rows_of(there["mrpc"]) if x != "router"]  # it learns nothing
    for row in rows:
        line = [ROWS[row]]
        for name, runs in there.items():
            at_home = of(results, name, name)
            for metric in ("hit@1", "set_recall_equal"):
                found = values(runs, row, "overall", metric)
                line.append(figure(found))
                known = row in rows_of(at_home) and values(at_home, row, "overall", metric)
                line.append(f"{mean(known) - mean(found):.1f}" if known else "")
        lines.append(line)
    return head, lines


def margins(results):
    head = ["router's margin, fifths from low to high", "1", "2", "3", "4", "5"]
    lines = []
    for name in results["runs"]:
        bins = [run["rows"][FIRST]["margins"] for run in of(results, name, name)]
        top = [f"{x['from']:.3f}–{x['to']:.3f}" for x in bins[0]]
        lines.append([f"{TITLES[name]}: p1 − p2", *top])
        for metric in ("hit@1", "hit@3"):
            found = [figure([x[i][metric] for x in bins]) for i in range(5)]
            lines.append([f"{TITLES[name]}: {metric}", *found])
    return head, lines


def alphas(results):
    head = ["α, points: mean error", "encoder", "its mean instead", "decoder", "its mean instead"]
    lines = []
    for name in results["runs"]:
        runs = of(results, name, name)
        for row in rows_of(runs):
            if row in KNOWS_NO_FACTORS:
                continue
            line = [f"{TITLES[name]}, {ROWS[row]}"]
            for side in SIDES:
                line.append(figure(values(runs, row, side, "alpha_error")))
                line.append(figure(values(runs, row, side, "alpha_constant_error")))
            lines.append(line)
    return head, lines


def calibration(results):
    head = ["the default's α"] + [f"{b / 10:.1f}–{(b + 1) / 10:.1f}" for b in range(10)]
    lines = []
    for name in results["runs"]:
        runs = of(results, name, name)
        bins = [run["rows"][FIRST]["calibration"] for run in runs]

        def across(key, bins=bins):
            cells = []
            for b in range(10):
                pairs = sum(x[b]["pairs"] for x in bins)
                total = sum(x[b][key] * x[b]["pairs"] for x in bins)
                cells.append(f"{total / pairs:.1f}" if pairs else "")
            return cells

        total = sum(x["pairs"] for run in bins for x in run)
        of_pairs = [sum(x[b]["pairs"] for x in bins) / total for b in range(10)]
        lines.append([f"{TITLES[name]}: mean", *across("predicted")])
        lines.append([f"{TITLES[name]}: applied", *across("applied")])
        lines.append([f"{TITLES[name]}: of all pairs", *(f"{x:.1%}" for x in of_pairs)])
    return head, lines


def refinement(results):
    """The layers behind one whose true routing is known, all ways with as many experts."""
    head = ["layers behind", "predicted by", *METRICS.values()]
    head += [f"refined better: {x}" for x in METRICS.values()]
    lines = []
    for name in results["runs"]:
        runs = [run["refined"] for run in of(results, name, name) if run.get("refined")]
        for behind in range(min(map(len, runs), default=0)):
            scopes = [run[behind]["overall"] for run in runs]
            ways = [x for x in scopes[0] if x not in ("better_by", "all_tokens")]
            for way in ways[1:] + ways[:1]:
                line = [f"{TITLES[name]}, MoE layer {runs[0][behind]['behind']}", WAYS[way]]
                line += [figure([scope[way][x] for scope in scopes]) for x in METRICS]
                found = [scope["better_by"].get(way) for scope in scopes]
                line += [spanning([x[metric] for x in found if x]) for metric in METRICS]
                lines.append(line)
    return head, lines


def shares(results):
    """Medians; what `sida run` says of SST-2's test."""
    head = ["predicting", "device", "sequences a batch", "ms a batch", "of the inference's time"]
    head += ["the inference waits", "refining, ms a batch"]
    groups = {}
    for x in results.get("shares", []):
        groups.setdefault((x["row"], x["device"], x["batch"]), []).append(x)
    lines = []
    for (row, device, batch), found in groups.items():
        keys = ["hash_ms_per_batch", "hash_share", "table_wait_share", "refine_ms_per_batch"]
        took, of_time, waits, refining = (median(x.get(k) or 0 for x in found) for k in keys)
        line = [ROWS[row], device, str(batch), f"{took:.2f}", f"{of_time:.1%}", f"{waits:.2%}"]
        lines.append([*line, f"{refining:.3f}" if refining else ""])
    return head, lines


def trainings(results):
    head = ["training", "options", "steps", "kept epoch", "gain in the last quarter"]
    head += ["gain of twice the steps", "seconds"]
    lines, seen = [], {}
    for x in results["trained"]:
        if x["steps"]:
            seen.setdefault((SETS.index(x["set"]), list(ROWS).index(x["row"])), []).append(x)
    for _, runs in sorted(seen.items()):
        kept = ", ".join(f"{x['kept_epoch']}/{x['epochs']}" for x in runs)
        twice = [x["gain_of_twice"] for x in runs if "gain_of_twice" in x]
        lines.append(
            [
                f"{TITLES[runs[0]['set']]}, {ROWS[runs[0]['row']]}",
                f"`{' '.join(runs[0]['options']) or 'the defaults'}`",
                f"{runs[0]['steps']:,}",
                kept,
                f"{max(x['gain_in_last_quarter'] for x in runs):.2f}",
                f"{twice[0]:+.2f}" if twice else "",
                f"{mean(x['seconds'] for x in runs):.0f}",
            ]
        )
    return head, lines


def sweep(results):
    head = ["chosen from", "options", "valid hit@1"]
    return head, [
        [
            f"{TITLES[x['set']]}, {ROWS[x['row']]}",
            f"`{' '.join(x['options'])}`",
            f"{x['valid_hit@1']:.2f}",
        ]
        for x in results["sweep"]
    ]


def sizes(results):
    head = ["set", "part", "sequences", "encoder tokens", "decoder tokens"]
    lines = []
    for name, run in results["runs"].items():
        for part, size in run["traces"][name].items():
            lines.append([TITLES[name], part] + [f"{size[k]:,}" for k in size])
    return head, lines
