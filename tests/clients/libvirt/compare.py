#!/usr/bin/env python3
"""Runs the command lines of `cases` by virsh against one server, and compares what two servers answered.

    compare.py record URI OUT --pool PATH --work DIR     runs them, and writes what came, normalized
    compare.py compare OURS THEIRS                       compares; differences that `accepted` names are fine
    compare.py check                                     reads `accepted` and `cases`, and says whether they fit together

`accepted` holds reasons, each over the command lines that differ because of it, and below each line what Karst answers: the
exit code, and a regular expression that the whole normalized text matches, with `\d+` and the like where hosts differ. An
answer that does not match is a fault, as is one that does not differ any more: the list only shrinks. The `n`th of equal lines is written with `#n` at its end, from the second on.
"""

import argparse
import json
import os
import re
import shlex
import subprocess
import sys

HERE = os.path.dirname(os.path.abspath(__file__))
UUID = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}")
NORMAL = [
    (re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d(\.\d+)?( ?[+-]\d{4})?"), "TIME"),
    (re.compile(r"\b(vnet\d+|k[0-9a-f]{4,}[a-z0-9-]*)\b"), "NIC"),
    (re.compile(r"(?m)^ \d+( +)"), r" N\1"),
    (re.compile(r"(?m)^Id: +\d+"), "Id: N"),
    (re.compile(r"CPU time: +[\d.]+s"), "CPU time: Ns"),
    (re.compile(r"(cpu_time|user_time|system_time) +[\d.]+"), r"\1 N"),
    (re.compile(r"(?m)^Total: \d+ KiB"), "Total: N KiB"),
    (re.compile(r"[ \t]+"), " "),
    (re.compile(r"(?m)^-+$"), "---"),
    (re.compile(r"(?m) +$"), ""),
]


def lines():
    """Command lines with what distinguishes equal ones."""
    seen = {}
    with open(os.path.join(HERE, "cases")) as file:
        for line in file:
            line = line.strip()
            if line and not line.startswith("#"):
                seen[line] = seen.get(line, 0) + 1
                yield line if seen[line] == 1 else f"{line} #{seen[line]}"


def normal(text, places, hostname):
    for value, name in places:
        text = text.replace(value, name)
    names = {}
    text = UUID.sub(lambda m: names.setdefault(m.group(), f"UUID{len(names) + 1}"), text)
    text = re.sub(rf"\b{re.escape(hostname)}\b", "HOST", text)
    for pattern, replacement in NORMAL:
        text = pattern.sub(replacement, text)
    return text.strip()


def record(arguments):
    xml = os.path.join(arguments.work, "xml")
    os.makedirs(xml)
    for name in os.listdir(os.path.join(HERE, "xml")):
        with open(os.path.join(HERE, "xml", name)) as file, open(os.path.join(xml, name), "w") as out:
            out.write(file.read().replace("{pool}", arguments.pool))
    with open(os.path.join(arguments.work, "bytes"), "wb") as file:
        file.write(bytes(i * 7 % 251 for i in range(300_000)))
    places = [("{pool}", arguments.pool), ("{xml}", xml), ("{work}", arguments.work)]
    hide = [(value, name) for name, value in places]
    environment = {"PATH": os.environ["PATH"], "LC_ALL": "C.UTF-8", "TZ": "UTC", "HOME": arguments.work, "EDITOR": "true"}

    def virsh(words):
        command = ["virsh", "-q", "-c", arguments.uri, *words]
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=120, env=environment, stdin=subprocess.DEVNULL)
        return done.returncode, done.stdout + done.stderr

    code, text = virsh(["net-define", os.path.join(xml, "network0.xml")])
    for words in (["net-start", "n0"],):
        if code == 0:
            code, text = virsh(words)
    if code:
        sys.exit(f"the network of the domains: {text}")
    found = {}
    for case in lines():
        line = case.split(" #")[0]
        for name, value in places:
            line = line.replace(name, value)
        code, text = virsh(shlex.split(line))
        found[case] = [code, normal(text, hide, os.uname().nodename)]
    down = os.path.join(arguments.work, "down")
    with open(os.path.join(arguments.work, "bytes"), "rb") as file, open(down, "rb") as other:
        found["what came down"] = [0, str(file.read() == other.read())]
    with open(arguments.out, "w") as out:
        json.dump(found, out, indent=1)
    print(f"{len(found)} answers")


def accepted():
    """Reasons by command line, with the code and the pattern of our answer."""
    found, reason, last = {}, "", None
    with open(os.path.join(HERE, "accepted")) as file:
        for line in file:
            line = line.rstrip("\n")
            if line.startswith("# "):
                reason, last = line[2:], None
            elif line.startswith("    "):
                if last is None or last in found:
                    sys.exit(f"accepted: an answer of no command line: {line.strip()}")
                code, _, pattern = line[4:].partition(" ")
                found[last] = (reason, int(code), re.compile(pattern))
            elif line:
                if not reason:
                    sys.exit(f"accepted: no reason for {line!r}")
                if last is not None and last not in found:
                    sys.exit(f"accepted: no answer for {last!r}")
                last = line
    if last is not None and last not in found:
        sys.exit(f"accepted: no answer for {last!r}")
    return found


def check(_):
    cases = set(lines())
    wrong = [line for line in accepted() if line not in cases]
    for line in wrong:
        print(f"accepted, but no case: {line}")
    return 1 if wrong else 0


def compare(arguments):
    with open(arguments.ours) as ours, open(arguments.theirs) as theirs:
        ours, theirs = json.load(ours), json.load(theirs)
    reasons, wrong, same = accepted(), 0, 0
    for line in reasons.keys() - ours.keys():
        print(f"accepted, but no case: {line}")
        wrong += 1
    for line, answer in ours.items():
        equal = answer == theirs.get(line)
        if equal and line in reasons:
            print(f"accepted ({reasons[line][0]}), but the same now: {line}")
            wrong += 1
        elif line in reasons:
            _, code, pattern = reasons[line]
            if answer[0] != code or not pattern.fullmatch(answer[1]):
                print(f"accepted, but not as it was: {line}\n  Karst    {answer}\n  expected {[code, pattern.pattern]}")
                wrong += 1
        elif not equal:
            print(f"differs: {line}\n  Karst    {answer}\n  libvirtd {theirs.get(line)}")
            wrong += 1
        same += equal
    print(f"{len(ours)} command lines: {same} the same, {len(reasons)} accepted, {wrong} wrong")
    return 1 if wrong else 0


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("record")
    for name in ("uri", "out"):
        one.add_argument(name)
    for name in ("--pool", "--work"):
        one.add_argument(name, required=True)
    both = commands.add_parser("compare")
    for name in ("ours", "theirs"):
        both.add_argument(name)
    commands.add_parser("check")
    arguments = parser.parse_args()
    sys.exit({"record": record, "compare": compare, "check": check}[arguments.command](arguments))


main()
