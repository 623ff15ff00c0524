"""The table of tools/bench/train-options, from its file of results."""

import textwrap
from math import sqrt
from statistics import mean, median, variance

from tables import markdown

SETS = ["sst2", "prose"]
LSTM = "--source lstm"
TITLES = {"sst2": "SST-2", "prose": "prose"}
READING = (
    "Per cent of content tokens, means of the seeds, ± how far a seed is from it; α's error in points. "
    "\"chosen by\": hit@1 on the validation part. \"difference\": of that, to the defaults, or of rows of "
    f"`{LSTM}` to that row, ± twice its standard error (from the seeds' variance: the row's own, or the "
    "median over all rows if that is larger); in bold where the row is better by more. Seconds of a "
    "training on the first set."
)
DEFAULTS = ["lr", "batch", "hidden", "blocks", "lambda", "tkd", "top", "weight_decay", "warmup"]
DEFAULTS += ["schedule", "clip", "patience"]


def named(options):
    return f"`{options}`" if options else "**the defaults**"


def base_of(options):
    """What a row differs from in one option."""
    return LSTM if options.startswith(LSTM + " ") else ""


class Set:
    """The trainings on one set."""

    def __init__(self, results, name):
        self.name = name
        self.runs = {}
        for x in results["trainings"]:
            if x["set"] == name:
                self.runs.setdefault(x["options"], []).append(x)
        found = [self.valid(row) for row in self.runs]
        found = [(variance(x), len(x) - 1) for x in found if len(x) > 1]
        # The seeds' variance is the same in most rows: its median over them, by Wilson and
        # Hilferty's median of chi squared, is not moved by one that diverged.
        self.typical = (
            median(v / (1 - 2 / (9 * free)) ** 3 for v, free in found) if found else None
        )

    def done(self, row):
        return [x for x in self.runs.get(row, []) if x["status"] == "ok"]

    def valid(self, row):
        return [x["valid"]["overall"]["hit@1"] for x in self.done(row)]

    def test(self, row, metric):
        return [x["test"]["overall"][metric] for x in self.done(row)]

    def squared_error(self, row):
        """Of the row's mean over seeds."""
        found = self.valid(row)
        own = variance(found) if len(found) > 1 else 0
        return max(own, self.typical) / len(found)

    def difference(self, row):
        """(mean, spread) against the row's base on the validation part; None: not measured. The
        spread is None where there is one seed, or no other row to compare with."""
        base = base_of(row)
        if row == base or not self.valid(row) or not self.valid(base):
            return None
        spread = None
        if self.typical is not None:
            spread = 2 * sqrt(self.squared_error(row) + self.squared_error(base))
        return mean(self.valid(row)) - mean(self.valid(base)), spread

    def better(self, row):
        found = self.difference(row)
        return bool(found) and found[1] is not None and found[0] > found[1]


def figure(found, places=1):
    """A mean, and how far seeds go to either side."""
    if not found:
        return ""
    spread = max(max(found) - mean(found), mean(found) - min(found))
    return f"{mean(found):.{places}f}" + (f" ± {spread:.{places}f}" if len(found) > 1 else "")


def cells(part, row):
    if part.runs.get(row) and not part.done(row):
        return ["failed", "", "", "", "", ""]
    cell, found = "", part.difference(row)
    if found:
        cell = f"{found[0]:+.2f}" + (f" ± {found[1]:.2f}" if found[1] is not None else "")
    line = [figure(part.valid(row), 2), f"**{cell}**" if part.better(row) else cell]
    line.append(figure(part.test(row, "hit@1")))
    for metric in ("hit@3", "set_recall_equal", "alpha_error"):
        found = part.test(row, metric)
        line.append(f"{mean(found):.1f}" if found else "")
    return line


def table(parts, rows):
    head = [""]
    for part in parts:
        head += [f"{TITLES[part.name]}: chosen by", "difference", "held out: hit@1", "hit@3"]
        head += ["equal recall", "α error"]
    head += ["1,000 parameters", "seconds"]
    lines = []
    for row in rows:
        line = [named(row)]
        for part in parts:
            line += cells(part, row)
        done = parts[0].done(row) or parts[-1].done(row)
        line.append(f"{done[0]['parameters'] / 1e3:,.0f}" if done else "")
        line.append(f"{mean(x['seconds'] for x in done):.0f}" if done else "")
        lines.append(line)
    return head, lines


def wrapped(words, hang=""):
    return textwrap.fill(words, 112, subsequent_indent=hang, break_on_hyphens=False) + "\n"


def how(results, parts):
    """What was trained on what."""
    settings, machine, lines = results["settings"], results["machine"], []
    for part in parts:
        size = results["traces"][part.name]
        rows = {key: f"{found['sequences']:,}" for key, found in size.items()}
        tokens = size["train"]["encoder_tokens"] + size["train"]["decoder_tokens"]
        default = part.done("")
        steps = f", {default[0]['steps']:,} steps with the defaults" if default else ""
        lines.append(
            f"{TITLES[part.name]}: trained on {rows['train']} sequences ({tokens:,} tokens) "
            f"{settings['epochs']} times{steps}; chosen by {rows['valid']}, measured on "
            f"{rows['test']} others."
        )
    runs = parts[0].done("")
    if runs:
        config = {**runs[0]["config"]["training"], **runs[0]["config"]["net"]}
        found = (f"{x.replace('_', '-')} {config[x]}" for x in DEFAULTS if x in config)
        lines.append(f"The defaults: {', '.join(found)}.")
    lines.append(
        f"Seeds {', '.join(map(str, settings['seeds']))}; {machine['device']}, {machine['jobs']} "
        f"trainings at a time, a CPU thread each; commit {results['commit'][:12]}."
    )
    return wrapped(" ".join(lines)) + "\n" + wrapped(READING)


def verdict(parts, rows):
    lines = []
    for part in parts:
        better = [named(row) for row in rows if part.better(row)]
        measured = sum(part.difference(row) is not None for row in rows)
        found = ", ".join(better) or "none"
        if part.typical is None:
            found = "unknown, since one seed has no spread"
        lines.append(f"- {TITLES[part.name]}, better by more than the spread, of {measured}: {found}.")
    for part in parts:
        for row in rows:
            lines += [
                f"- {TITLES[part.name]}, {named(row)}, seed {x['seed']} failed: {x['reason']}"
                for x in part.runs.get(row, [])
                if x["status"] != "ok"
            ]
    return "".join(wrapped(line, "  ") for line in lines)


def text(results):
    parts = [Set(results, name) for name in SETS]
    rows = [row for row in results["rows"] if any(row in part.runs for part in parts)]
    parts = [part for part in parts if part.runs]
    if not parts:
        return "Nothing was trained.\n"
    return "\n".join([how(results, parts), markdown(*table(parts, rows)), verdict(parts, rows)])
