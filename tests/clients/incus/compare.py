"""The `incus` client against Karst and against a real Incus: the same commands, their answers side by side.

`record SOCKET OUT` runs the cases and writes what came of them; `compare OUT RECORDING` compares two such files. Ids, times,
addresses and sizes that differ between any two servers are replaced before; everything else counts: output, error text, exit
code. What is accepted to differ stands in `accepted`: a line names the command and why. An accepted difference that does not
occur any more is a failure too: the list only becomes shorter. `CASE || LINES => REASON` accepts only that lines of the output
are missing (`-LINE`) or more (`+LINE`); any other difference of that case is wrong, and each line has to differ.

`complete RECORDING` tells which commands of the client no case has with success and with bad input, but for the list `uncovered`;
`prove` tries the comparison of errors on pairs that are alike and on pairs that are not.
"""

import argparse
import json
import os
import re
import subprocess
import sys

HERE = os.path.dirname(os.path.abspath(__file__))

# Errors are Karst's own words: they name the field and the fix. What has to be the same is what they are about. A pair says
# that the left (of Incus) and the right (of Karst) are about the same thing; both have to match for a pair to count.
WORDINGS = [
    (r"not found|doesn't exist|does not exist|Image source not found|No such object", r"not found|has no forward of|does not exist"),
    (r"UNIQUE constraint|already exists|already in use|already in trust store|already defined", r"exists already|has a snapshot|has a forward of|trusted already|already exists|at \".*\""),
    (r"Unknown configuration key|[Uu]nknown key|Invalid option|Invalid config option|Invalid project configuration key \"\S+\"$|Invalid device option", r"unknown .*key"),
    (r"name:|[Nn]ames? (may|can|must)|Network interface", r"name \"|name has|is not an interface name"),
    (r"clustered|only allowed when clustered", r"clustered|\"clustering_|node \"one\" not found"),
    (r"already (running|stopped|frozen)|isn't running|not running|is frozen|currently running", r"is (already )?(running|stopped|frozen)|is not (running|frozen)"),
    (r"in use|still in use|currently in use", r"is used by"),
    (r"cannot be (deleted|renamed)", r"cannot be (deleted|renamed)"),
    (r"[Oo]nly empty projects|non-empty projects", r"is not empty"),
    (r"maximum number|is too low", r"would use"),
    (r"Renaming of running instance", r"stop it before it is renamed"),
    (r"Unknown driver|Unsupported device type|instance type doesn't exist|not implemented", r"is not a storage driver|is no (type of a network|kind of NIC)|are not (there yet|known)|not known here|is not a method|needs the name of a network"),
    (r"Compression algorithm \"\S+\" isn't currently supported", r"compression_algorithm: \"\S+\" is not a compression"),
    (r"^Error: not found$", r"no such path"),
    (r"Duplicate profile found", r"is named twice"),
    (r"Target address is not within the network subnet", r"is not an address for a guest of this network"),
    (r"Source path '.*' doesn't exist", r"this host does not grant"),
    (r"^Error: Invalid instance name$", r"instance \"\S+\" not found"),
    (r"must be stopped to be rebuilt", r"is running; stop it to rebuild it"),
    (r"Invalid template filename", r"is not the name of a template"),
    (r"server isn't listening on network", r"a token needs a server that listens on the network"),
    (r"Project not found", r"project \S+ not found"),
    (r"VGA console is only supported by virtual machines", r"only virtual machines have a screen"),
]

# A value that is wrong is told with the field that has it, in Karst's words. Incus often names the field, or else it is the one
# whose value its text repeats; what says neither stands here.
SUBJECTS = [
    (r"Invalid CPU limit syntax|Invalid cpuset", "limits.cpu"),
    (r"Device IP address \"[^\"]*:", "ipv6.address"),
    (r"Device IP address", "ipv4.address"),
    (r"missing the required \"source|Custom block volumes", "source"),
    (r"More than one disk device uses the same path", "path"),
    (r"No root device could be found", "devices"),
    (r"Action must be one of", "action"),
    (r"[Pp]rotocol must be one of", "protocol"),
    (r"Destination port cannot be used", "destination_port"),
    (r"Invalid Source:", "source"),
    (r"forward listen address", "listen_address"),
    (r"Duplicate listen port|Service out of range", "listen_port"),
    (r"Invalid volume content type", "content_type"),
    (r"Schedule must be of the form", "snapshots.schedule"),
    (r"Invalid expiry expression", "snapshots.expiry"),
    (r"Invalid filter|Unsupported operation", "filter"),
    (r"cannot unmarshal (string|array) into", "body"),
]
# What is imported is told by its command only.
IMPORTED = {"image": r"\bincus image import\b", "backup": r"\bincus (storage volume )?import\b"}

# In order. What the text still says after them is compared.
NORMAL = [
    (r"\x1b\[[0-9;?]*[A-Za-z]|\r", ""),
    (r"\b[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}\b", "UUID"),
    (r"\b[0-9a-f]{64}\b", "SHA256"),
    (r"\b(?:00:16:3e|10:66:6a)(?::[0-9a-f]{2}){3}\b", "MAC"),
    (r"\b\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?(Z|[+-]\d\d:\d\d)", "TIME"),
    (r"\b\d{4}[-/]\d\d[-/]\d\d \d\d:\d\d(:\d\d)?(\.\d+)?( (UTC|[+-]\d{4} UTC))?", "TIME"),
    (r"\b\d{4}/\d\d/\d\d", "DAY"),
    (r"\bfd42:[0-9a-f:]+", "IP6"),
    (r"\b10\.(?!99\.)\d+\.\d+\.\d+", "IP4"),
    (r"\b\d+(\.\d+)?(B|KiB|MiB|GiB|kB|MB)/s", "RATE"),
    (r"(?m)^ ?(Retrieving|Unpacking|Exporting|Importing|Transferring|Publishing instance)[^\n]*%[^\n]*\n?", ""),
    # The client says so when the operation failed, and not when the request did; which of both it is, is chance with a real Incus.
    (r"(?m)\n?^Try `incus info --show-log [^\n]*` for more info$", ""),
    # Which of two devices is named first is the order of a Go map.
    (r"for \"\S+\": More than one disk device", "for \"DEVICE\": More than one disk device"),
    (r"(?m)^ ?Pushing [^\n]*\n?", ""),
    (r"Default (Incus|Karst) (profile|project)", r"Default \2"),
    (r"(?m)^\s*volatile\.[^\n]*\n", ""),
    (r"(Usage|usage|Total|total|Bytes|bytes|Size)(:| )\s*[\d.]+ ?[kKMGT]?i?B?", r"\1\2 N"),
    (r"-{2,}", "--"),
    (r"[ \t]+", " "),
    (r"(?m) $", ""),
]


def normal(text, work, socket):
    text = text.replace(work, "WORK").replace(os.path.dirname(socket), "STATE")
    for pattern, by in NORMAL:
        text = re.sub(pattern, by, text)
    return text.strip()


def cases(long):
    area, wanted = "", True
    with open(os.path.join(HERE, "cases")) as file:
        for line in file:
            line = line.rstrip("\n")
            if not line or line.startswith("#"):
                continue
            if line.startswith("["):
                area, _, kind = line.strip("[]").partition(" ")
                wanted = long or not kind
            elif wanted:
                yield area, line


def record(arguments):
    work, out = arguments.work, []
    environment = dict(os.environ, W=work, F=arguments.fingerprint, INCUS_SOCKET=arguments.socket,
                       INCUS_CONF=os.path.join(work, "conf"), LC_ALL="C", TERM="dumb")  # fmt: skip
    os.makedirs(environment["INCUS_CONF"], exist_ok=True)
    broken = 0
    seen = {}
    for area, line in cases(arguments.long):
        if arguments.only and area not in arguments.only:
            continue
        try:
            done = subprocess.run(["sh", "-c", line.removeprefix("-")], env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", timeout=120)
            code, stdout, stderr = done.returncode, done.stdout, done.stderr
        except subprocess.TimeoutExpired:
            code, stdout, stderr = -1, "", "did not end within 120 s"
        if line.startswith("-"):
            if code != 0:
                print(f"{area}: {line[1:]}: exit {code}: {stderr.strip()[-300:]}", file=sys.stderr)
                broken += 1
            continue
        # A line may stand several times in an area; each time counts.
        key = f"{area}: {line}"
        seen[key] = seen.get(key, 0) + 1
        out.append({
            "case": key if seen[key] == 1 else f"{key} #{seen[key]}", "code": code,
            "out": normal(stdout, work, arguments.socket).splitlines(), "err": normal(stderr, work, arguments.socket).splitlines(),
        })  # fmt: skip
    with open(arguments.out, "w") as file:
        json.dump(out, file, indent=1, ensure_ascii=False)
        file.write("\n")
    print(f"{len(out)} commands")
    return 1 if broken else 0


def subjects(case, theirs):
    """The fields that an error of Incus may be about; none when it is not about a value."""
    named = re.findall(r"\boption \"([^\"]+)\"|\bkey \"([^\"]+)\" value|^Error: cannot set '([^']+)'", theirs)
    if named:
        return {next(filter(None, groups)) for groups in named}
    for pattern, subject in SUBJECTS:
        if re.search(pattern, theirs):
            return {subject}
    if "Unsupported compression" in theirs:
        return {what for what, command in IMPORTED.items() if re.search(command, case)}
    wrong = re.search(r"Invalid value(?: for an? \w+)?:? \"?([^\s\"]+)\"?$", theirs)
    values = re.findall(r"([a-z][\w.-]*)=('[^']*'|\S+)", case)
    return {key for key, value in values if wrong and value.strip("'") == wrong[1]}


def names(ours, subject):
    """Is an error of Karst about this field? It begins with the field, unless its sentence has the name anyway."""
    field = re.match(r"Error: ([a-z_][\w.\[\]-]*): ", ours)
    if field:
        return field[1] == subject or field[1].endswith("." + subject)
    return re.search(rf"(?<![\w-]){re.escape(subject)}(?![\w-]|\.\w)", ours) is not None


def alike(got, want):
    """Are both the same, or errors about the same thing?"""
    if got == want:
        return True
    if (got["code"], got["out"]) != (want["code"], want["out"]) or got["code"] == 0:
        return False
    ours, theirs = "\n".join(got["err"]), "\n".join(want["err"])
    if not ours.startswith("Error: "):
        return False
    if any(re.search(b, ours, re.M) and re.search(a, theirs, re.M) for a, b in WORDINGS):
        return True
    return any(names(ours, subject) for subject in subjects(want["case"], theirs))


def lines_of(text):
    """`-a, +b` as the lines that may be missing and that may be more."""
    missing, more = set(), set()
    for word in filter(None, (w.strip() for w in text.split(", "))):
        {"-": missing, "+": more}.get(word[0], set()).add(word[1:])
    return missing, more


def alike_but(got, want, allowed):
    """Why two answers differ by other lines than `allowed`; nothing where they differ by exactly these."""
    if (got["code"], got["err"]) != (want["code"], want["err"]):
        return "differ in more than lines of the output"
    ours, theirs = set(got["out"]), set(want["out"])
    missing, more = allowed
    wrong = [f"-{l}" for l in sorted((theirs - ours) ^ missing)] + [f"+{l}" for l in sorted((ours - theirs) ^ more)]
    return wrong and "differ otherwise than accepted (or do not any more) by " + ", ".join(wrong)


def accepted(path):
    reasons = {}
    with open(path) as file:
        for number, line in enumerate(file, 1):
            line = line.rstrip("\n")
            if not line or line.startswith("#"):
                continue
            case, arrow, reason = line.partition(" => ")
            if not arrow or not reason.strip():
                sys.exit(f"{path}:{number}: `CASE => REASON`")
            case, bar, lines = case.partition(" || ")
            reasons[case] = (reason, lines_of(lines) if bar else None)
    return reasons


def compare(arguments):
    with open(arguments.out) as a, open(arguments.recording) as b:
        ours, theirs = ({r["case"]: r for r in json.load(f)} for f in (a, b))
    reasons = accepted(arguments.accepted)
    differ = equal = tolerated = worded = 0
    for case, got in ours.items():
        want = theirs.get(case)
        if want is None:
            print(f"{case}\n  is not in the recording; record again with a real Incus")
            differ += 1
        elif alike(got, want):
            equal += 1
            worded += got != want
            if case in reasons:
                print(f"{case}\n  is the same now; take it out of {os.path.basename(arguments.accepted)}")
                differ += 1
        elif case in reasons and not (reasons[case][1] and alike_but(got, want, reasons[case][1])):
            tolerated += 1
        else:
            differ += 1
            print(case)
            if case in reasons:
                print(f"  {alike_but(got, want, reasons[case][1])}")
            for field in ("code", "out", "err"):
                if got[field] != want[field]:
                    show = lambda v: v if isinstance(v, int) else "\n         ".join(v)  # noqa: E731
                    print(f"  {field} incus: {show(want[field])}\n  {field} karst: {show(got[field])}")
    for case in reasons:
        if case not in ours and (arguments.long or case not in theirs):
            print(f"{case}\n  is accepted to differ, but there is no such command")
            differ += 1
    print(f"{equal} the same ({worded} in other words), {tolerated} differ as accepted, {differ} wrong")
    return 1 if differ or not equal else 0


def leaves(path=()):
    """The commands of the client that have no commands below them."""
    said = subprocess.run(["incus", *path, "--help"], capture_output=True, text=True, env=dict(os.environ, LC_ALL="C")).stdout
    listed = re.search(r"Available Commands:\n(.*?)(\n\n|\Z)", said, re.S)
    below = [line.split()[0] for line in listed[1].splitlines() if line.strip()] if listed else []
    below = [name for name in below if name not in ("help", "completion")]
    return [leaf for name in below for leaf in leaves((*path, name))] if below else [" ".join(path)]


def complete(arguments):
    """Every command of the client stands in the cases with success and with bad input, but for those of `uncovered`."""
    with open(arguments.recording) as file:
        answers = json.load(file)
    reasons, wrong, used = {}, 0, set()
    with open(os.path.join(HERE, "uncovered")) as file:
        for line in (line.rstrip("\n") for line in file):
            if line and not line.startswith("#"):
                what, arrow, reason = line.partition(" => ")
                if not arrow or not reason.strip() or what.partition(": ")[0] not in ("success", "bad input"):
                    sys.exit(f"uncovered: {line!r} is not `success|bad input: COMMAND => REASON`")
                reasons[what] = reason
    all_leaves = leaves()
    for leaf in all_leaves:
        command = re.compile(rf"\bincus {re.escape(leaf)}(?![\w-])")
        codes = {answer["code"] == 0 for answer in answers if command.search(answer["case"].partition(": ")[2])}
        for kind, there in (("success", True in codes), ("bad input", False in codes)):
            # A line of a whole family ends in ` *`.
            names = [f"{kind}: {leaf}"] + [f"{kind}: {' '.join(leaf.split()[:n])} *" for n in range(1, leaf.count(" ") + 1)]
            found = next((name for name in names if name in reasons), None)
            if not there and found is None:
                print(f"{kind} of `incus {leaf}` is in no case")
                wrong += 1
            if not there and found is not None:
                used.add(found)
    for stale in reasons.keys() - used:
        print(f"uncovered: {stale}: is covered now, or no command; take it out")
        wrong += 1
    print(f"{len(all_leaves)} commands, {len(reasons)} lines of what is not covered, {wrong} wrong")
    return 1 if wrong or len(all_leaves) < 200 else 0


# (a command, what Incus says, what Karst may say, what it may not say)
PROOFS = [
    ("incus create bb c4 -c limits.memory=much", "Error: Failed creating instance record: Invalid value: much",
     "Error: config.limits.memory: \"much\" is not a size", "Error: config.limits.cpu: \"much\" is not a number"),
    ("incus config set c4 limits.cpu=many", "Error: Invalid config: Invalid CPU limit syntax",
     "Error: config.limits.cpu: \"many\" is no number", "Error: config.limits.cpu.allowance: \"many\" is no share"),
    ("incus config set c4 boot.autostart.priority=first", "Error: Invalid config: Invalid value for an integer \"first\"",
     "Error: config.boot.autostart.priority must be a number", "Error: config.boot.autostart must be true or false"),
    ("incus network create n2 ipv4.dhcp.ranges=x ipv4.address=10.9.2.1/24",
     "Error: Invalid value for network \"n2\" option \"ipv4.dhcp.ranges\": Item \"x\": IP range must contain start and end IP addresses",
     "Error: config.ipv4.dhcp.ranges: \"x\" is no range", "Error: config.ipv4.address: \"x\" is not an address with prefix"),
    ("incus network acl rule add web ingress action=allow protocol=nothing",
     "Error: Invalid ingress rule 1: Protocol must be one of: icmp4, icmp6, tcp, udp",
     "Error: ingress[0].protocol: \"nothing\" is not known", "Error: ingress[0].action: \"allow\" is not known"),
    ("echo rubbish > $W/rubbish; incus image import $W/rubbish", "Error: Unsupported compression",
     "Error: image: the archive is corrupt or cut off", "Error: the backup is corrupt"),
    ("incus config set c1 user.x=1", "Error: Failed for a reason that nobody knows",
     "Error: Failed for a reason that nobody knows", "Error: config.user.x: is wrong"),
]  # fmt: skip


def prove(_):
    """Errors about the same field are alike, and those about another one are not."""
    wrong = 0
    for case, theirs, right, other in PROOFS:
        answer = lambda text: {"case": f"area: {case}", "code": 1, "out": [], "err": [text]}  # noqa: E731
        for text, wanted in ((right, True), (other, False)):
            if alike(answer(text), answer(theirs)) != wanted:
                print(f"{case}\n  incus: {theirs}\n  karst: {text}\n  should be {'alike' if wanted else 'wrong'}")
                wrong += 1
    return 1 if wrong else 0


def main():
    parser = argparse.ArgumentParser()
    commands = parser.add_subparsers(required=True)
    one = commands.add_parser("record")
    one.add_argument("socket")
    one.add_argument("out")
    one.add_argument("--work", required=True)
    one.add_argument("--fingerprint", required=True)
    one.add_argument("--long", action="store_true")
    one.add_argument("--only", nargs="*")
    one.set_defaults(run=record)
    two = commands.add_parser("compare")
    two.add_argument("out")
    two.add_argument("recording")
    two.add_argument("--accepted", default=os.path.join(HERE, "accepted"))
    two.add_argument("--long", action="store_true")
    two.set_defaults(run=compare)
    three = commands.add_parser("complete")
    three.add_argument("recording")
    three.set_defaults(run=complete)
    commands.add_parser("prove").set_defaults(run=prove)
    arguments = parser.parse_args()
    sys.exit(arguments.run(arguments))


if __name__ == "__main__":
    main()
