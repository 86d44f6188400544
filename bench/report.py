"""The table, and the document that is checked in."""

import os
import platform
import shutil
import subprocess

from clock import median


class Row:
    """One figure of several subjects. A target is (whose, relation, value), or ("ratio PEER", relation, value)."""

    def __init__(self, what, unit, values, target=None):
        self.what = what
        self.unit = unit
        self.samples = {who: v for who, v in values.items() if isinstance(v, list) and v}
        self.values = {who: (median(v) if isinstance(v, list) else v) for who, v in values.items() if v != []}
        self.target = target

    def ratio(self):
        """How many times better than the first peer: Karst's figure may be a time or a rate."""
        mine, peer = self.values.get("karst"), self.peer()
        if mine is None or peer is None or mine <= 0 or self.values[peer] <= 0:
            return None
        return mine / self.values[peer] if self.unit in ("per s", "MB/s") else self.values[peer] / mine

    def peer(self):
        return next((who for who in ("incus", "libvirt") if who in self.values), None)

    def met(self):
        if not self.target or "karst" not in self.values:
            return None
        whose, relation, limit = self.target
        value = self.ratio() if whose.startswith("ratio") else self.values["karst"]
        if value is None:
            return None
        return value <= limit if relation == "<=" else value >= limit

    def target_text(self):
        if not self.target:
            return ""
        whose, relation, limit = self.target
        sign = "≤" if relation == "<=" else "≥"
        return f"{sign} {number(limit)}" + (f"x {whose.split()[1]}" if whose.startswith("ratio") else f" {self.unit}".rstrip())

    def cells(self):
        ratio, met, peer = self.ratio(), self.met(), self.peer()

        def shown(who):
            return f"{number(self.values[who])} {self.unit}".strip() if who in self.values else ""

        return [
            self.what,
            shown("karst"),
            f"{shown(peer)} ({peer})" if peer else "",
            f"{ratio:.1f}x" if ratio else "",
            shown("plain"),
            self.target_text(),
            {None: "", True: "met", False: "missed"}[met],
        ]

    def line(self):
        what, *rest = self.cells()
        return f"{what}: " + " | ".join(c for c in rest if c)

    def spread(self):
        return "; ".join(
            f"{who} {number(min(s))} to {number(max(s))} (n={len(s)})" for who, s in self.samples.items() if len(s) > 1
        )


def number(value):
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if value % 1 else f"{value:.0f}"


HEAD = ["figure", "Karst", "peer", "ratio", "plain tools", "target", ""]


def table(rows):
    """Markdown, aligned for people."""
    lines = [HEAD, *(row.cells() for row in rows)]
    widths = [max(len(line[n]) for line in lines) for n in range(len(HEAD))]
    text = ["| " + " | ".join(c.ljust(w) for c, w in zip(line, widths)) + " |" for line in lines]
    text.insert(1, "|" + "|".join("-" * (w + 2) for w in widths) + "|")
    return "\n".join(text)


def facts(bench, started):
    """Where and with what it was measured."""
    top = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

    def out(*argv):
        if not shutil.which(argv[0]):
            return "not installed"
        result = subprocess.run(argv, capture_output=True, text=True)
        return result.stdout.strip().splitlines()[0] if result.stdout.strip() else "?"

    with open("/proc/cpuinfo") as file:
        cpu = next((l.partition(":")[2].strip() for l in file if l.startswith("model name")), "?")
    with open("/proc/meminfo") as file:
        memory = int(file.readline().split()[1]) // 1024 // 1024
    commit = out("git", "-C", top, "rev-parse", "--short=12", "HEAD")
    changed = subprocess.run(
        ["git", "-C", top, "status", "--porcelain", "--untracked-files=no"], capture_output=True, text=True
    ).stdout.strip()
    return [
        ("date", started.strftime("%Y-%m-%d %H:%M UTC")),
        ("commit", commit + (" with local changes" if changed else "")),
        ("kernel", platform.release().split("-")[0]),
        ("processor", f"{cpu}, {os.cpu_count()} CPUs"),
        ("memory", f"{memory} GiB"),
        ("file system", out("findmnt", "-n", "-o", "FSTYPE", "-T", bench.work)),
        ("Incus", out("incus", "--version") if bench.incus else "not measured"),
        ("libvirt", getattr(bench.libvirt, "version", "?") if bench.libvirt else "not measured"),
        ("LXC", out("lxc-start", "--version")),
        ("QEMU", out("qemu-system-x86_64", "--version")),
        ("load when it ended", open("/proc/loadavg").read().split()[0]),
    ]


def document(bench, facts):
    """The checked-in result."""
    lines = ["# Karst beside its peers", ""]
    lines += ["One run on one machine, medians; made by `make bench`.", ""]
    lines += ["| | |", "|---|---|", *(f"| {k} | {v} |" for k, v in facts), "", table(bench.rows), ""]
    spreads = [f"- {row.what}: {row.spread()}" for row in bench.rows if row.spread()]
    if spreads:
        lines += ["Smallest and largest sample:", "", *spreads, ""]
    # What was taken once has no median and no spread, and the table alone does not show it.
    once = [row.what for row in bench.rows if not any(len(s) > 1 for s in row.samples.values())]
    notes = list(bench.notes)
    if once:
        notes.append(f"One sample each, no median; rates, CPU, syncs and kB an instance are means over the requests of that one run: {'; '.join(once)}.")
    if notes:
        lines += ["Notes:", "", *(f"- {n}" for n in notes), ""]
    return "\n".join(lines)
