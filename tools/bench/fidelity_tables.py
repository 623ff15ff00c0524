"""The tables of tools/bench/fidelity, from its runs."""

import statistics

from tables import markdown

# Fidelity means something only where the model knows more than which label is frequent.
LEAST_LEAD = 0.05


def mean(runs, key):
    return statistics.mean(run[key] for run in runs)


def spread(runs, key):
    return ", ".join(str(run[key]) for run in runs)


def loss_cell(runs):
    low, high = (statistics.mean(run["loss_change_95"][i] for run in runs) for i in (0, 1))
    return f"{mean(runs, 'loss_change'):+.2%} ({low:+.2%} … {high:+.2%})"


def share_cell(runs):
    if runs[0]["allowed_share_encoder"] is None:
        return "-"
    sides = ("allowed_share_encoder", "allowed_share_decoder")
    return " / ".join(f"{mean(runs, side):.1%}" for side in sides)


def score_cells(runs, full):
    return [f"{mean(runs, 'score'):.1%}", f"{mean(runs, 'flips') / full['records']:.2%}"]


def table(form, runs):
    """Markdown. Means over the predictors' seeds; random ones over all draws as well."""
    full = runs[0]
    labelled = "flips" in full
    head = ["", "\\|A\\|/E, encoder / decoder"]
    if labelled:
        head += ["score", "labels flipped", "each", "lost / gained", "McNemar p"]
        head += ["random: score", "flipped"]
    head += ["loss (95 %)", "moved, nats", "random: loss", "moved"]
    lines = []
    for name in dict.fromkeys(run["mode"] for run in runs[1:]):
        ours = [r for r in runs if r["mode"] == name and r["random"] is None]
        dice = [r for r in runs if r["mode"] == name and r["random"] is not None]
        row = [name, share_cell(ours)]
        if labelled:
            row += score_cells(ours, full) + [spread(ours, "flips")]
            row += [", ".join(f"{r['lost']} / {r['gained']}" for r in ours)]
            row += [", ".join(f"{r['mcnemar_p']:.2g}" for r in ours)]
            row += score_cells(dice, full)
        row += [loss_cell(ours), f"{mean(ours, 'moved_nats_a_token'):.3f}"]
        row += [f"{mean(dice, 'loss_change'):+.2%}", f"{mean(dice, 'moved_nats_a_token'):.3f}"]
        lines.append(row)
    said = f"### {form}: {full['records']} records\n\nThe full model: "
    if labelled:
        lead = full["score"] - full["constant_score"]
        said += f"score {full['score']:.1%}, the constant answer {full['constant_score']:.1%}. "
        if lead < LEAST_LEAD:
            said += "**No fidelity is claimed here**: it does not lead by 5 points. "
    said += f"Loss {full['loss']:.4f} nats a token of {full['target_tokens']}.\n\n"
    return said + markdown(head, lines)
