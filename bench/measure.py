"""Karst beside Incus, libvirt and plain tools, in one run on one machine. Called by `bench/run`, which prepares what it needs.

All servers run at the same time and are never measured at the same time: rounds alternate between them, so that drift of the
machine meets all alike. A figure is the median of its samples.
"""

import argparse
import datetime
import functools
import os
import secrets
import shutil
import signal
import subprocess
import sys
import time
import traceback

import clock
import daily
import domains
import report
import subjects
from clock import Commands, Failed, median
from report import Row


class Bench:
    """The run: its directory, its name in everything outside of it, and what it has to take away at the end."""

    def __init__(self, arguments):
        self.arguments = arguments
        self.id = secrets.token_hex(2)
        self.work = f"/var/tmp/karst-bench-{self.id}"
        os.makedirs(self.work)
        os.chmod(self.work, 0o711)
        self.commands = Commands(self.work)
        self.links = []
        self.mounts = []
        self.rootfs = os.path.join(arguments.images, "rootfs")
        self.rows = []
        self.notes = []
        clock.become_subreaper()
        names = arguments.only.split(",")
        self.karst = subjects.Karst(self, arguments.programs) if "karst" in names else None
        self.incus = subjects.Incus(self) if "incus" in names and subjects.INCUSD else None
        self.plain = subjects.Plain(self) if "plain" in names else None
        self.libvirt = subjects.Libvirt(self) if "libvirt" in names and shutil.which("libvirtd") else None
        for name, there in (("incus", self.incus), ("libvirt", self.libvirt)):
            if name in names and not there:
                self.notes.append(f"{name} is not installed: not measured.")
        self.started = []

    def servers(self):
        return [s for s in (self.karst, self.incus) if s]

    def bridge(self, letter):
        """A bridge of our own, removed at the end."""
        name = f"kb{self.id}{letter}"
        self.links.append(name)
        subprocess.run(["ip", "link", "add", name, "type", "bridge"], check=True)
        subprocess.run(["ip", "link", "set", name, "up"], check=True)
        return name

    def disk(self, name):
        """A copy of the small disk."""
        path = os.path.join(self.work, f"{name}.qcow2")
        shutil.copy(os.path.join(self.arguments.images, "disk.qcow2"), path)
        os.chmod(path, 0o666)
        return path

    def reap(self):
        known = {s.background.reaper for s in self.started if getattr(s, "background", None)}
        known |= {b.reaper for s in self.started for b in getattr(s, "before", [])}
        clock.reap_strays(known)

    def start(self):
        for subject in (self.karst, self.incus, self.plain, self.libvirt):
            if subject:
                self.started.append(subject)
                subject.prepare()

    def stop(self):
        for subject in reversed(self.started):
            try:
                subject.stop()
            except Exception as e:  # whatever happens, the others are stopped
                print(f"stopping {subject.name}: {e}", file=sys.stderr)
                for background in [getattr(subject, "background", None), *getattr(subject, "before", [])]:
                    if background:
                        background.end()
                subjects.release(subject.directory)
        for link in self.links:
            if os.path.exists(f"/sys/class/net/{link}"):
                subprocess.run(["ip", "link", "delete", link], check=False)
        if self.arguments.keep_logs:
            for name in ("karst", "incus", "libvirt"):
                log = os.path.join(self.work, f"{name}.log")
                if os.path.exists(log):
                    shutil.copy(log, self.arguments.keep_logs)
        for mount in self.mounts:
            subprocess.run(["umount", "-l", mount], check=False)
        subjects.remove_cgroups(f"kb{self.id}")
        shutil.rmtree(self.work, ignore_errors=True)

    def row(self, *arguments, **named):
        row = Row(*arguments, **named)
        self.rows.append(row)
        print(row.line(), flush=True)

    def alternate(self, measures, rounds=None):
        """Samples by name; each round takes one of each, and every other round the other way round."""
        samples = {name: [] for name in measures}
        for n in range(rounds or self.arguments.rounds):
            order = list(measures) if n % 2 == 0 else list(reversed(list(measures)))
            for name in order:
                samples[name].append(measures[name]())
        return samples


# ---- the figures -----------------------------------------------------------------------------------------------------


def idle(bench):
    """Memory of the daemons, with an image and without instances."""
    time.sleep(3)
    clock.settle()
    took = {s.name: clock.pss(s.daemons()) / 1024 for s in bench.servers()}
    bench.row("daemons idle, PSS together", "MiB", took, target=("karst", "<=", 40 * 1e6 / 1048576))
    if bench.karst:
        parts = ", ".join(f"{clock.pss([p]) / 1024:.1f}" for p in bench.karst.daemons())
        bench.notes.append(f"Karst's PSS by process (launcher, then host and control as started), MiB: {parts}.")


def first_answer(bench, instances):
    measures = {s.name: s.first_answer for s in bench.servers()}
    samples = bench.alternate(measures)
    target = ("karst", "<=", 100) if instances == 0 else None
    bench.row(f"first answer after kill -9 and start, {instances} instances", "ms", samples, target=target)


def containers(bench):
    """The `incus` client's view of a container's life; the same root file system under bare LXC."""
    name = f"kb{bench.id}c"
    for server in bench.servers():
        server.client("init", "bench", name)
    keys = ("start", "exec", "karst exec", "stop")
    samples = {key: {} for key in keys}

    def put(key, who, value):
        samples[key].setdefault(who, []).append(value)

    subjects_ = bench.servers() + ([bench.plain] if bench.plain else [])
    for n in range(bench.arguments.rounds):
        for subject in subjects_ if n % 2 == 0 else list(reversed(subjects_)):
            clock.settle()
            if subject is bench.plain:
                put("start", "plain", subject.start())
                subject.booted()
                put("exec", "plain", subject.exec())
                put("stop", "plain", subject.stop_container())
                continue
            put("start", subject.name, subject.client("start", name))
            if subject.status(name) != "Running":
                raise Failed(f"{subject.name}: {name} does not run after start")
            subject.booted(name)
            put("exec", subject.name, subject.client("exec", name, "--", "true"))
            if subject is bench.karst:
                put("karst exec", subject.name, subject.karst("exec", name, "--", "true"))
            put("stop", subject.name, subject.client("stop", "--force", name))
            if subject.status(name) != "Stopped":
                raise Failed(f"{subject.name}: {name} runs after stop")
    bench.row("container: `incus start` to Running", "ms", samples["start"], target=("ratio incus", ">=", 2.5))
    if bench.karst and bench.plain:
        over = {}
        for who in ("karst", "incus"):
            if who in samples["start"]:
                over[who] = median(samples["start"][who]) - median(samples["start"]["plain"])
        bench.row("container: start over bare `lxc-start -d`", "ms", over, target=("karst", "<=", 40))
    bench.row("container: `incus exec true`", "ms", samples["exec"], target=("karst", "<=", 30))
    if samples["karst exec"]:
        bench.row("container: `karst exec true`", "ms", samples["karst exec"], target=("karst", "<=", 30))
    bench.row("container: `incus stop --force`", "ms", samples["stop"], target=("karst", "<=", 120))
    for server in bench.servers():
        server.client("delete", name)

    created = {}
    deleted = {}

    def cycle(server):
        clock.settle(2)
        created.setdefault(server.name, []).append(server.client("init", "bench", name))
        clock.settle(2)
        deleted.setdefault(server.name, []).append(server.client("delete", name))

    bench.alternate({s.name: functools.partial(cycle, s) for s in bench.servers()})
    bench.row("container: `incus init` from the image", "ms", created)
    bench.row("container: `incus delete`", "ms", deleted, target=("karst", "<=", 30))


def machines(bench):
    """From the call to a running QEMU; what runs in it does not matter."""
    name = f"kb{bench.id}v"
    measures, after = {}, {}
    raw = []
    if bench.karst:
        bench.karst.client("init", "benchvm", name, "--vm", "-c", "limits.memory=256MiB")
        connection = bench.karst.connect()

        def karst():
            start = clock.now()
            connection.operation("PUT", f"/1.0/instances/{name}/state", {"action": "start", "timeout": -1})
            raw.append(clock.now() - start)
            if bench.karst.status(name) != "Running":
                raise Failed("the machine does not run after start")
            bench.karst.client("stop", "--force", name)
            took = bench.karst.client("start", name)
            bench.karst.client("stop", "--force", name)
            return took

        measures["karst"] = karst
    if bench.libvirt:

        def libvirt():
            took = bench.libvirt.virsh("start", bench.libvirt.domain)
            after.setdefault("libvirt", []).append(bench.libvirt.virsh("destroy", bench.libvirt.domain))
            return took

        libvirt()  # probes QEMU's capabilities once
        after.clear()
        measures["libvirt"] = libvirt
    if bench.plain:
        measures["plain"] = bench.plain.qemu

    def settled(measure):
        clock.settle(2)
        return measure()

    samples = bench.alternate({who: functools.partial(settled, m) for who, m in measures.items()})
    row = dict(samples)
    if raw:
        row["karst"] = raw
    bench.notes.append("VM, API call to QEMU running: Karst from request to the operation's end, libvirt `virsh start`, plain until QMP answers.")
    bench.row(
        "VM: API call to QEMU running",
        "ms",
        row,
        target=("karst", "<=", 130),
    )
    if bench.karst:
        bench.row("VM: `incus start`", "ms", {"karst": samples["karst"], "libvirt": samples.get("libvirt", [])})
        connection.close()
        bench.karst.client("delete", name)


INOTIFY = "/proc/sys/fs/inotify/max_user_instances"


def many(bench):
    """Hundreds of instances, twenty of them running."""
    # A systemd takes about five of these, and all containers of the host share the 128 that are the default.
    with open(INOTIFY) as file:
        before = file.read()
    if int(before) < 1024:
        with open(INOTIFY, "w") as file:
            file.write("1024")
    try:
        many_instances(bench)
    finally:
        with open(INOTIFY, "w") as file:
            file.write(before)


def many_instances(bench):
    total, running = bench.arguments.instances, bench.arguments.running
    empty = total - running
    rate, footprint = {}, {}
    for server in bench.servers():
        clock.settle()
        before = clock.pss(server.daemons())
        connection = server.connect()
        start = clock.now()
        for n in range(empty):
            create_empty(connection, f"kb{bench.id}e{n}")
        rate[server.name] = empty / (clock.now() - start) * 1000
        time.sleep(2)
        clock.settle()
        footprint[server.name] = (clock.pss(server.daemons()) - before) * 1.024 / empty
        connection.close()
    bench.row(f"create {empty} empty instances one after the other", "per s", rate, target=("karst", ">=", 150))
    bench.row("memory of the daemons per instance (PSS)", "kB", footprint, target=("karst", "<=", 40))
    for server in bench.servers():
        for n in range(running):
            server.client("launch", "bench", f"kb{bench.id}r{n}")
    for server in bench.servers():
        connection = server.connect()
        states = [i["status"] for i in connection.metadata("/1.0/instances?recursion=1")]
        connection.close()
        if len(states) != total or states.count("Running") != running:
            raise Failed(f"{server.name}: {len(states)} instances, {states.count('Running')} running")
    clock.settle(30)
    connections = {s.name: s.connect() for s in bench.servers()}
    for recursion, limit in ((1, 8), (2, 30)):
        path = f"/1.0/instances?recursion={recursion}"
        for connection in connections.values():
            connection.get(path)
        samples = bench.alternate({who: functools.partial(c.timed_get, path) for who, c in connections.items()})
        bench.row(
            f"GET recursion={recursion}, {total} instances, {running} running", "ms", samples, target=("karst", "<=", limit)
        )
    samples = bench.alternate({s.name: functools.partial(s.client, "list") for s in bench.servers()})
    bench.row(f"`incus list`, {total} instances, {running} running", "ms", samples, target=("ratio incus", ">=", 8))
    daily.sampling(bench, running)
    if bench.karst:
        daily.keepers(bench, running)

    requests, used = bench.arguments.requests, {}
    for connection in connections.values():
        connection.close()
    paths = {f"a stopped instance": f"/1.0/instances/kb{bench.id}e1", "a running instance": f"/1.0/instances/kb{bench.id}r1"}
    for what, path in paths.items():
        for server in bench.servers():
            # One of its own: while the peer is measured a server lets none idle for so long.
            connection = server.connect()
            pids = server.daemons()
            before, start = clock.cpu(pids), clock.now()
            for _ in range(requests):
                connection.get(path)
            used.setdefault(server.name, {})[what] = ((clock.cpu(pids) - before) * 1000 / requests, (clock.now() - start) * 1000 / requests)
            connection.close()
        bench.row(
            f"CPU of the server per GET of {what}, {requests} requests", "µs",
            {who: u[what][0] for who, u in used.items()}, target=("karst", "<=", 40),
        )  # fmt: skip
    for server in bench.servers():
        names = [f"kb{bench.id}r{n}" for n in range(running)]
        took = server.client("stop", "--force", *names)
        bench.notes.append(f"{server.name}: `incus stop --force` of {running} running containers at once: {took:.0f} ms.")
    first_answer(bench, total)


def create_empty(connection, name):
    body = {"name": name, "type": "container", "source": {"type": "none"}}
    connection.operation("POST", "/1.0/instances", body)


def syncs(bench):
    """Synchronous writes that creating an empty instance costs, counted by strace on a short run of its own."""
    if not shutil.which("strace"):
        bench.notes.append("strace is not installed: syncs not counted.")
        return
    count, counted = 20, {}
    for server in bench.servers():
        output = os.path.join(bench.work, "syncs")
        argv = ["strace", "-f", "-qq", "-e", "trace=fsync,fdatasync,sync_file_range,msync,sync,syncfs,io_submit,pwritev2,io_uring_enter", "-o", output]
        for pid in server.daemons():
            argv += ["-p", str(pid)]
        connection = server.connect()
        tracer = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        threads = [f"/proc/{p}/task/{t}/status" for p in server.daemons() for t in os.listdir(f"/proc/{p}/task")]
        clock.wait_until(lambda: all(traced(t) for t in threads), 10, "strace does not attach")
        try:
            for n in range(count):
                create_empty(connection, f"kb{bench.id}s{n}")
        finally:
            tracer.send_signal(signal.SIGINT)
            tracer.wait()
        with open(output) as file:
            # A call that another thread interrupts is written twice; its begin counts.
            lines = [line for line in file if "resumed>" not in line]
        # Incus' database writes by asynchronous IO with RWF_DSYNC: a synchronous write too. One that would block is
        # refused and submitted again without NOWAIT, so of the two kinds the more frequent counts.
        direct = [line for line in lines if "DSYNC" in line]
        first = sum("NOWAIT" in line for line in direct)
        counted[server.name] = (sum("sync(" in line for line in lines) + max(first, len(direct) - first)) / count
        os.unlink(output)
        for n in range(count):
            connection.operation("DELETE", f"/1.0/instances/kb{bench.id}s{n}", None)
        connection.close()
    bench.row("syncs to create an empty instance", "", counted, target=("karst", "<=", 6))


def traced(path):
    try:
        with open(path) as file:
            return any(line.startswith("TracerPid:") and line.split()[1] != "0" for line in file)
    except OSError:
        return True


FIGURES = {
    "idle": idle,
    "first": lambda bench: first_answer(bench, 0),
    "containers": containers,
    "machines": machines,
    "domains": domains.domains,
    "syncs": syncs,
    "storage": daily.storage,
    "export": daily.export,
    "throughput": daily.throughput,
    "many": many,
    "snapshots": daily.snapshots,
    "firewall": daily.firewall,
}


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--programs", required=True, help="directory with karstd and karst")
    parser.add_argument("--images", required=True, help="directory with the images that bench/run made")
    parser.add_argument("--only", default="karst,incus,libvirt,plain", help="whom to measure")
    parser.add_argument("--figures", default=",".join(FIGURES), help="which figures: " + " ".join(FIGURES))
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--instances", type=int, default=500)
    parser.add_argument("--domains", type=int, default=1000, help="that are defined by libvirt's protocol")
    parser.add_argument("--running", type=int, default=20)
    parser.add_argument("--snapshots", type=int, default=48, help="of each of the thousand simulated instances")
    parser.add_argument("--ports", type=int, default=1000, help="of the firewall")
    parser.add_argument("--requests", type=int, default=20_000)
    parser.add_argument("--output", help="write the result there")
    parser.add_argument("--keep-logs", help="directory for the servers' logs")
    arguments = parser.parse_args()
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: sys.exit(130))
    bench = Bench(arguments)
    started, complete = datetime.datetime.now(datetime.timezone.utc), True
    try:
        bench.start()
        for server in bench.servers():
            server.client("image", "import", os.path.join(arguments.images, "container.tar"), "--alias", "bench")
        if bench.karst:
            bench.karst.client("image", "import", os.path.join(arguments.images, "machine.tar"), "--alias", "benchvm")
        for figure in arguments.figures.split(","):
            begun = time.monotonic()
            try:
                FIGURES[figure](bench)
            except Failed as e:
                complete = False
                bench.notes.append(f"`{figure}` failed: {e}")
                print(f"{figure}: FAILED: {e}", file=sys.stderr)
            print(f"({figure}: {time.monotonic() - begun:.0f} s)", flush=True)
    except Failed:
        complete = False
        traceback.print_exc()
    finally:
        facts = report.facts(bench, started)
        bench.stop()
    print()
    print(report.table(bench.rows))
    print("\n".join(f"- {note}" for note in bench.notes))
    if arguments.output and bench.rows:
        with open(arguments.output, "w") as file:
            file.write(report.document(bench, facts))
        print(f"written to {arguments.output}")
    return 0 if complete else 1


if __name__ == "__main__":
    sys.exit(main())
