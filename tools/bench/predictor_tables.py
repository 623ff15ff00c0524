"""The tables of tools/bench/predictors: means over seeds; an interval goes from the lowest end of a
seed's to the highest of another's, so it is no narrower than any of them."""

from statistics import mean

from tables import markdown

METRICS = ["hit@1", "hit@3", "set_recall_equal"]
SETS = ["sst2", "mrpc", "multirc", "prose"]
TITLES = {"sst2": "SST-2", "mrpc": "MRPC", "multirc": "MultiRC", "prose": "prose"}


def sets_of(results):
    """What was trained on."""
    return results["settings"].get("sets", SETS)


def of(results, learnt, name):
    return [x for x in results["evaluations"] if (x["trained_on"], x["set"]) == (learnt, name)]


def rows_of(results):
    """The first is what the others are compared with; it comes last in the tables."""
    first, *others = results["evaluations"][0]["rows"]
    return [*others, first]


def rows_everywhere(results):
    """Without those that were measured at home only."""
    shifted = of(results, "sst2", SETS[1])[0]["rows"]
    return [row for row in rows_of(results) if row in shifted]


def values(runs, row, scope, metric):
    return [run["rows"][row][scope][metric] for run in runs if scope in run["rows"][row]]


def figure(found):
    """A mean, and how far seeds go to either side where they differ."""
    if not found:
        return ""
    spread = max(max(found) - mean(found), mean(found) - min(found))
    return f"{mean(found):.1f}" + (f" ± {spread:.1f}" if spread >= 0.05 else "")


def interval(runs, row, metric, scope="overall"):
    found = [run["rows"][row].get("better_by", {}).get(scope, {}).get(metric) for run in runs]
    if not found or None in found:
        return ""
    low, high = min(x["low"] for x in found), max(x["high"] for x in found)
    return f"{mean(x['mean'] for x in found):+.1f} [{low:+.1f}, {high:+.1f}]"


def in_domain(results, name):
    runs = of(results, name, name)
    first = rows_of(results)[-1]
    head = [TITLES[name], "hit@1", "hit@3", "equal recall", "encoder hit@1", "decoder hit@1"]
    head += ["hit@1, all tokens", "α error"] + [f"{first} better: {m}" for m in ("hit@1", "hit@3")]
    head.append(f"{first} better: equal recall")
    lines = []
    for row in rows_of(results):
        line = [row] + [figure(values(runs, row, "overall", metric)) for metric in METRICS]
        line += [figure(values(runs, row, side, "hit@1")) for side in ("encoder", "decoder")]
        whole = [run["rows"][row]["all_tokens"]["overall"]["hit@1"] for run in runs]
        line += [figure(whole), figure(values(runs, row, "overall", "alpha_error"))]
        lines.append(line + [interval(runs, row, metric) for metric in METRICS])
    return head, lines


def decoders(results):
    """The decoder alone, where it says something: on span corruption."""
    runs = of(results, "prose", "prose")
    if not runs:
        return ["prose, decoder"], []
    head = ["prose, decoder", "hit@1", "hit@3", "equal recall"]
    head += [f"better: {m}" for m in ("hit@1", "hit@3", "equal recall")]
    lines = []
    for row in rows_of(results):
        line = [row] + [figure(values(runs, row, "decoder", metric)) for metric in METRICS]
        lines.append(line + [interval(runs, row, metric, "decoder") for metric in METRICS])
    return head, lines


def shift(results):
    head = ["trained on SST-2"]
    if "sst2" not in sets_of(results):
        return head, []
    for name in SETS[1:]:
        head += [f"{TITLES[name]} hit@1", "drop", "equal recall", "drop"]
    lines = []
    for row in rows_everywhere(results):
        line = [row]
        for name in SETS[1:]:
            for metric in ("hit@1", "set_recall_equal"):
                there = values(of(results, "sst2", name), row, "overall", metric)
                at_home = values(of(results, name, name), row, "overall", metric)
                drop = f"{mean(at_home) - mean(there):.1f}" if at_home else ""
                line += [figure(there), drop]
        lines.append(line)
    return head, lines


def margins(results):
    first = rows_of(results)[-1]
    head = ["router's margin, fifths from low to high", "1", "2", "3", "4", "5"]
    lines = []
    for name in sets_of(results):
        runs = of(results, name, name)
        bins = [run["rows"][first]["margins"] for run in runs]
        top = [f"{x['from']:.3f}–{x['to']:.3f}" for x in bins[0]]
        lines.append([f"{TITLES[name]}: p1 − p2", *top])
        for metric in ("hit@1", "hit@3"):
            found = [figure([x[i][metric] for x in bins]) for i in range(5)]
            lines.append([f"{TITLES[name]}: {metric}", *found])
    return head, lines


def alphas(results):
    head = ["α, points", "side", "mean error", "the layer's mean instead"]
    lines = []
    for name in sets_of(results):
        runs = of(results, name, name)
        for row in rows_of(results):
            for side in ("encoder", "decoder"):
                errors = values(runs, row, side, "alpha_error")
                constant = values(runs, row, side, "alpha_constant_error")
                if errors and row not in ("popular", "layer-hash", "router"):
                    lines.append(
                        [f"{TITLES[name]}, {row}", side, figure(errors), figure(constant)]
                    )
    return head, lines


def calibration(results):
    first = rows_of(results)[-1]
    head = [f"{first}: predicted α"] + [f"{b / 10:.1f}–{(b + 1) / 10:.1f}" for b in range(10)]
    lines = []
    for name in sets_of(results):
        bins = [run["rows"][first]["calibration"] for run in of(results, name, name)]

        def across(key, form, bins=bins):
            cells = []
            for b in range(10):
                pairs = sum(x[b]["pairs"] for x in bins)
                total = sum(x[b][key] * (x[b]["pairs"] if key != "pairs" else 1) for x in bins)
                cells.append(form.format(total / (pairs if key != "pairs" else 1)) if pairs else "")
            return cells

        lines.append([f"{TITLES[name]}: mean", *across("predicted", "{:.1f}")])
        lines.append([f"{TITLES[name]}: applied", *across("applied", "{:.1f}")])
        lines.append([f"{TITLES[name]}: pairs", *across("pairs", "{:,.0f}")])
    return head, lines


def name_of(record):
    return f"{TITLES[record['set']]}, {record['row']}"


def trainings(results):
    head = ["training", "options", "steps", "kept epoch", "gain in the last quarter", "seconds"]
    lines = []
    seen = {}
    for x in results["trained"]:
        if x["steps"]:
            seen.setdefault((x["set"], x["row"]), []).append(x)
    for (name, row), runs in seen.items():
        kept = ", ".join(f"{x['kept_epoch']}/{x['epochs']}" for x in runs)
        gain = max(x["gain_in_last_quarter"] for x in runs)
        options = " ".join(runs[0]["options"]) or "the defaults"
        lines.append(
            [
                f"{TITLES[name]}, {row}",
                f"`{options}`",
                f"{runs[0]['steps']:,}",
                kept,
                f"{gain:.2f}",
                f"{mean(x['seconds'] for x in runs):.0f}",
            ]
        )
    return head, lines


def sweep(results):
    head = ["chosen from", "options", "valid hit@1"]
    return head, [
        [name_of(x), f"`{' '.join(x['options'])}`", f"{x['valid_hit@1']:.2f}"]
        for x in results["sweep"]
    ]


def sizes(results):
    head = ["set", "part", "sequences", "encoder tokens", "decoder tokens"]
    return head, [
        [TITLES[name], part] + [f"{size[k]:,}" for k in size]
        for name, parts in results["traces"].items()
        for part, size in parts.items()
    ]


def show(results):
    seeds = len(results["settings"]["seeds"])
    if results["settings"]["quick"]:
        print("A quick run with few rows: these figures say nothing.\n")
    print(
        "Per cent, of content tokens on held-out inputs; means of "
        f"{seeds} seeds, ± how far a seed is from the mean. \"better\": the "
        "paired difference with its 95 % bootstrap interval over sequences, the widest over the "
        f"seeds. Commit {results['commit'][:12]}, "
        f"{results['machine']['device']}.\n"
    )
    parts = [in_domain(results, name) for name in sets_of(results)]
    for make in (decoders, shift, margins, alphas, calibration, trainings, sweep, sizes):
        parts.append(make(results))
    for head, lines in parts:
        print(markdown(head, lines) if lines else f"{head[0]}: nothing\n")
