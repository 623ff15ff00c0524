"""The pictures of tools/bench/report, drawn by gnuplot."""

import os
import subprocess

from gpu_results import Refused


def ms(case):
    return case.ms if case else None


def pictures(r):
    """(file, label of x, title, [(name of the line, [(x, ms or None)])])"""
    lengths = r.having("length", batch=1)
    batches = r.having("batch", experts=128, budget="100%")
    sizes = r.having("experts", batch=1, dtype="bf16")
    shares = [float(b.rstrip("%")) for b in r.having("budget", experts=128, batch=1)]

    def ours(e, n, share=100):
        ahead = "recall" if share < 100 else None
        return ms(r.sida(e, n, budget=f"{share:g}%", prefetch=ahead))

    def theirs(e, n):
        return ms(r.standard(e, n))

    ways = (("sida", ours), ("sida, 20 %", lambda e, n: ours(e, n, 20)), ("Standard", theirs))
    lines = [
        (f"{name}, base-{e}", [(n, way(e, n)) for n in lengths])
        for e in (128, 256)
        for name, way in ways
    ]
    yield "cost-length", "tokens", "bf16, batches of one", lines
    lines = [
        (f"{name}, {n} tokens", [(e, way(e, n)) for e in sizes])
        for n in lengths
        for name, way in ways
    ]
    yield "cost-experts", "experts a layer", "bf16, batches of one", lines
    lines = [
        (f"{name}, {n} tokens", [(b, ms(find(128, n, batch=b))) for b in batches])
        for n in lengths
        for name, find in (("sida", r.sida), ("Standard", r.standard))
    ]
    yield "cost-batch", "sequences a batch", "base-128, bf16, all resident", lines
    lines = [
        (f"{n} tokens", [(share, ours(128, n, share)) for share in sorted(shares)]) for n in lengths
    ]
    title = "base-128, bf16, batches of one, tables of measured recall"
    yield "cost-budget", "% of the experts on the GPU", title, lines


def draw(r, folder):
    device = r.file["machine"]["device"]
    for name, label, title, lines in pictures(r):
        lines = [(text, [(x, y) for x, y in points if y is not None]) for text, points in lines]
        lines = [(text, points) for text, points in lines if points]
        if lines:
            plot(os.path.join(folder, name + ".svg"), label, f"{title}, {device}", lines)


def plot(path, label, title, lines):
    xs = sorted({x for _, points in lines for x, _ in points})
    script = [
        "set terminal svg size 800,520 dynamic background rgb 'white' font 'sans,13'",
        f"set output '{path}'",
        f"set title '{title}' noenhanced",
        f"set xlabel '{label}'",
        "set ylabel 'ms a batch'",
        "set logscale xy",
        f"set xrange [{xs[0] * 0.8:g}:{xs[-1] * 1.25:g}]",
        "set xtics (" + ", ".join(f"'{x:g}' {x:g}" for x in xs) + ")",
        "set grid",
        "set key outside right noenhanced",
    ]
    for i, (_, points) in enumerate(lines):
        script += [f"$d{i} << EOD", *(f"{x:g} {y:.6g}" for x, y in points), "EOD"]
    curves = [f"$d{i} with linespoints lw 2 title '{text}'" for i, (text, _) in enumerate(lines)]
    script.append("plot " + ", ".join(curves))
    text = "\n".join(script) + "\n"
    try:
        got = subprocess.run(["gnuplot"], input=text, text=True, capture_output=True, check=False)
    except OSError as error:
        raise Refused(f"--plot needs gnuplot: {error}") from error
    if got.returncode != 0:
        raise Refused(f"gnuplot: {got.stderr.strip()[:500]}")
