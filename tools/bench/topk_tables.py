"""The table of tools/bench/train-topk, from its results: means over seeds."""

from statistics import mean

from tables import markdown

ROWS = ["popular", "table", "bigram", "lstm, even", "lstm, weight", "lstm, best", "default"]
METRICS = {
    "hit@1": "hit@1",
    "slot_recall": "slot@k",
    "slot_recall_2k": "slot@2k",
    "exact_set": "exact set",
    "weight_recall": "weight@k",
    "weight_recall_2k": "weight@2k",
    "alpha_error": "α error",
}


def table(results):
    families = list(dict.fromkeys(x["family"] for x in results["rows"]))
    lines = []
    for family in families:
        for row in ROWS:
            found = [x for x in results["rows"] if (x["family"], x["row"]) == (family, row)]
            if found:
                line = [f"{family}, {'**the default**' if row == 'default' else row}"]
                figures = [[x["overall"][metric] for x in found] for metric in METRICS]
                line += [f"{mean(x):.1f}" for x in figures]
                slots = figures[1]
                spread = max(max(slots) - mean(slots), mean(slots) - min(slots))
                lines.append([*line, f"{spread:.1f}" if len(slots) > 1 else ""])
    return markdown(["", *METRICS.values(), "seeds: slot@k ±"], lines)
