"""The table of goals, and Markdown, for tools/bench/report."""


class Goals:
    """Lines of the table; a bar that is None was not set, a line without bars is reported. What is
    of kind `of`, `most` or `bytes` is to stay below its bars."""

    SHOW = {"x": "{:.2f} ×".format, "share": "{:.1%}".format, "of": "{:.3f}".format}
    SHOW |= {"most": "{:.1%}".format, "bytes": "{:.0f} bytes".format, "s": "{:.1f} s".format}
    BELOW = ("of", "most", "bytes")

    def __init__(self):
        self.lines = []

    def add(self, what, measured, goal=None, least=None, kind="x"):
        show = self.SHOW[kind]
        bars = ["" if bar is None else show(bar) for bar in (goal, least)]
        if measured is None:
            self.lines.append([what, *bars, "", "not measured"])
            return

        def reached(bar):
            below = kind in self.BELOW
            return bar is not None and (measured <= bar if below else measured >= bar)

        met = "goal" if reached(goal) else "at least" if reached(least) else "**no**"
        if goal is None and least is None:
            met = "reported"
        elif goal is None and met == "at least":
            met = "yes"
        self.lines.append([what, *bars, show(measured), met])


def cell(value, form="{:.2f}"):
    return "" if value is None else form.format(value)


def markdown(head, rows):
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def print_sections(sections):
    for title, (head, rows) in sections:
        print(f"## {title}\n")
        print(markdown(head, rows) if rows else "not measured\n")


def print_failures(failures):
    if failures:
        print("## Failed\n")
        for where, reason in failures:
            print(f"- `{where}`: {reason}")
