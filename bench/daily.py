"""Figures of daily work: storage, long lists, traffic, sampling, firewall. Called by measure.py like its own figures."""

import ctypes
import functools
import json
import os
import select
import signal
import socket
import subprocess
import threading
import time

import clock
import subjects
from clock import Connection, Failed, median

_libc = ctypes.CDLL(None, use_errno=True)
CLONE_NEWNET = 0x40000000


# ---- storage ---------------------------------------------------------------------------------------------------------


def pools(bench):
    """A btrfs pool in a file of each server, and a dir pool in memory."""
    wanted = []
    if "btrfs" in open("/proc/filesystems").read() and os.path.exists("/dev/loop-control"):
        wanted.append(("btrfs", "kbf", ["btrfs", "size=4GiB"]))
    else:
        bench.notes.append("This host has no btrfs or no loop devices: its figures are missing.")
    wanted.append(("memory", "kbm", None))
    for what, pool, arguments in wanted:
        for server in bench.servers():
            made = arguments or ["dir", f"source={server.memory()}"]
            server.client("storage", "create", pool, *made)
    return [(what, pool) for what, pool, _ in wanted]


def storage(bench):
    """Launch from what lies in the pool already; snapshot, restore and copy of a stopped container."""
    for what, pool in pools(bench):
        name = f"kb{bench.id}p"
        for server in bench.servers():
            # The first unpacks the image into the pool.
            server.client("init", "bench", name, "-s", pool)
            server.client("delete", name)

        launched = {}

        def launch(server, name=name, pool=pool, launched=launched):
            clock.settle(2)
            took = server.client("launch", "bench", name, "-s", pool)
            if server.status(name) != "Running":
                raise Failed(f"{server.name}: {name} does not run after launch")
            launched.setdefault(server.name, []).append(took)
            server.client("delete", "--force", name)

        bench.alternate({s.name: functools.partial(launch, s) for s in bench.servers()})
        where = "btrfs" if what == "btrfs" else "a dir pool in memory"
        bench.row(f"`incus launch` from cache on {where}", "ms", launched, target=("karst", "<=", 110 if what == "btrfs" else 130))
        if what != "btrfs":
            continue
        for server in bench.servers():
            server.client("init", "bench", name, "-s", pool)
        took = {"snapshot": {}, "restore": {}, "copy": {}}

        def cycle(server, name=name, took=took):
            clock.settle(2)

            def put(key, *arguments):
                took[key].setdefault(server.name, []).append(server.client(*arguments))

            put("snapshot", "snapshot", "create", name, "s")
            put("restore", "snapshot", "restore", name, "s")
            put("copy", "copy", name, name + "c", "--instance-only")
            server.client("delete", name + "c")
            server.client("snapshot", "delete", name, "s")

        bench.alternate({s.name: functools.partial(cycle, s) for s in bench.servers()})
        for key, samples in took.items():
            bench.row(f"{key} of a container on btrfs", "ms", samples, target=("karst", "<=", 35))
        for server in bench.servers():
            server.client("delete", name)


def export(bench):
    """Export of a stopped container beside `tar | zstd -3` of the same files: bytes of files a second."""
    name = f"kb{bench.id}e"
    for server in bench.servers():
        server.client("init", "bench", name)
    tree = bench.rootfs
    size = int(subprocess.run(["du", "--apparent-size", "-sb", tree], capture_output=True, text=True, check=True).stdout.split()[0])
    out = os.path.join(bench.work, "export.tar.zst")

    def exported(server):
        clock.settle(2)
        took = server.client("export", name, out, "--compression", "zstd", "--instance-only")
        # What it wrote is an archive of all of it.
        listed = subprocess.run(["tar", "--zstd", "-tf", out], capture_output=True, text=True, check=True).stdout
        if "backup/container/rootfs/etc/" not in listed:
            raise Failed(f"{server.name}: the export has no files of the container")
        os.remove(out)
        return size / 1e3 / took

    def piped():
        clock.settle(2)
        start = clock.now()
        with open(out, "wb") as file:
            tar = subprocess.Popen(["tar", "-C", tree, "--numeric-owner", "--xattrs", "-cf", "-", "."], stdout=subprocess.PIPE)
            zstd = subprocess.run(["zstd", "-q", "-3", "-c"], stdin=tar.stdout, stdout=file, check=False)
            tar.stdout.close()
            if tar.wait() != 0 or zstd.returncode != 0:
                raise Failed("tar | zstd failed")
        took = clock.now() - start
        os.remove(out)
        return size / 1e3 / took

    measures = {s.name: functools.partial(exported, s) for s in bench.servers()}
    samples = bench.alternate({**measures, "plain": piped})
    bench.row("`incus export` of a container, zstd", "MB/s", samples)
    if bench.karst:
        share = median(samples["karst"]) / median(samples["plain"]) * 100
        bench.row("the same, of what `tar | zstd -3` does", "%", {"karst": share}, target=("karst", ">=", 80))
    for server in bench.servers():
        server.client("delete", name)


# ---- long lists ------------------------------------------------------------------------------------------------------


def snapshots(bench):
    """1,000 instances with 48 snapshots each. Simulated hosts: what is measured is the server and its lists."""
    if not bench.karst:
        return
    instances, each = 1000, bench.arguments.snapshots
    directory = os.path.join(bench.work, "simulated")
    os.makedirs(directory)
    program = os.path.join(bench.karst.programs, "karstd")
    server = clock.Background(
        [program, "--dir", directory, "--simulate", f"10x{instances // 10}"],
        os.path.join(bench.work, "simulated.log"),
        {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin"},
    )
    path = os.path.join(directory, "unix.socket")
    try:

        def names():
            try:
                connection = Connection(path)
            except OSError:
                return []
            try:
                return connection.metadata("/1.0/instances")
            except Failed:
                return []
            finally:
                connection.close()

        clock.wait_until(lambda: len(names()) == instances, 180, "the simulated guests are not there; see simulated.log")
        # Several at once for each connection's waiting; each instance takes one after the other.
        work, failed, done = names(), [], []
        deadline = time.monotonic() + 240

        def take(some):
            connection = Connection(path)
            try:
                for n in range(each):
                    for instance in some:
                        if time.monotonic() > deadline:
                            return
                        connection.operation("POST", f"{instance}/snapshots", {"name": f"s{n}"})
                        done.append(n)
            except Failed as e:
                failed.append(e)
            finally:
                connection.close()

        threads = [threading.Thread(target=take, args=(work[n::4],)) for n in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if failed:
            raise failed[0]
        if len(done) < instances * each:
            bench.notes.append(f"The simulated snapshots were cut short after four minutes: {len(done):,} of {instances * each:,}.")
            each = len(done) // instances
        pids = [server.pid, *clock.descendants(server.pid)]
        connection = Connection(path)
        for recursion, limit in ((1, 60), (2, None)):
            list_path = f"/1.0/instances?recursion={recursion}"
            size = len(connection.get(list_path))
            connection.get(list_path)
            before = clock.cpu_ns(pids)
            times = [connection.timed_get(list_path) for _ in range(bench.arguments.rounds)]
            used = (clock.cpu_ns(pids) - before) / 1e6 / bench.arguments.rounds
            bench.row(
                f"simulated: GET recursion={recursion}, {instances:,} instances with {each} snapshots each",
                "ms",
                {"karst": times},
                target=limit and ("karst", "<=", limit),
            )
            bench.notes.append(
                f"Simulated list, recursion={recursion}: {size / 1e6:.1f} MB, {used:.1f} ms of CPU a request, client's reading not counted."
            )
        page = "/1.0/instances?recursion=2&limit=50"
        connection.get(page)
        bench.row(
            "simulated: first page of 50 of them, with states and snapshots",
            "ms",
            {"karst": [connection.timed_get(page) for _ in range(bench.arguments.rounds)]},
            target=("karst", "<=", 50),
        )
        bench.notes.append(f"Simulated server with {len(done):,} snapshots: {clock.pss(pids) / 1024:.0f} MiB PSS, the simulated hosts included.")
        connection.close()
    finally:
        clock.kill(server.pid, signal.SIGTERM)
        try:
            clock.wait_gone([server.pid])
        finally:
            server.end()


# ---- traffic ---------------------------------------------------------------------------------------------------------


def enter_network(pid):
    """Moves the calling process into the network namespace of another."""
    with open(f"/proc/{pid}/ns/net") as file:
        if _libc.setns(file.fileno(), CLONE_NEWNET) != 0:
            raise OSError(ctypes.get_errno(), "setns")


def transfer(receiver, address, sender, seconds=0.5):
    """Megabytes a second over TCP from one namespace into another, by two processes of the host."""
    read_end, write_end = os.pipe()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            enter_network(receiver)
            listener = socket.create_server((address, 0))
            os.write(write_end, str(listener.getsockname()[1]).encode())
            listener.settimeout(10)
            connection, _ = listener.accept()
            buffer = bytearray(1 << 20)
            while connection.recv_into(buffer):
                pass
            connection.sendall(b"!")
            code = 0
        finally:
            os._exit(code)
    os.close(write_end)
    if not select.select([read_end], [], [], 10)[0]:
        raise Failed("the receiver does not listen")
    port = int(os.read(read_end, 16) or b"0")
    os.close(read_end)
    result_read, result_write = os.pipe()
    source = os.fork()
    if source == 0:
        code = 1
        try:
            enter_network(sender)
            connection = socket.create_connection((address, port), timeout=10)
            block, sent = b"x" * (1 << 20), 0
            start = clock.now()
            while clock.now() - start < seconds * 1000:
                sent += connection.send(block)
            connection.shutdown(socket.SHUT_WR)
            connection.recv(1)
            os.write(result_write, str(sent / 1e6 / (clock.now() - start) * 1000).encode())
            code = 0
        finally:
            os._exit(code)
    os.close(result_write)
    answer = os.read(result_read, 64)
    os.close(result_read)
    for pid in (source, child):
        os.waitpid(pid, 0)
    if not answer:
        raise Failed("the transfer failed")
    return float(answer)


class Namespace:
    """A network namespace of ours, held by a sleeping process, with one end of a veth pair whose other is in a bridge."""

    def __init__(self, bench, bridge, number):
        self.pid = os.fork()
        if self.pid == 0:
            os.setsid()
            if _libc.unshare(CLONE_NEWNET) != 0:
                os._exit(1)
            while True:
                signal.pause()
        own = os.readlink("/proc/self/ns/net")
        clock.wait_until(lambda: os.readlink(f"/proc/{self.pid}/ns/net") != own, 5, "no network namespace")
        outside, inside = f"kb{bench.id}w{number}", f"kb{bench.id}u{number}"
        bench.links.append(outside)
        self.address = f"10.213.251.{number + 1}"

        def ip(*arguments):
            subprocess.run(["ip", *arguments], check=True)

        ip("link", "add", outside, "type", "veth", "peer", "name", inside)
        ip("link", "set", outside, "master", bridge, "up")
        ip("link", "set", inside, "netns", str(self.pid))
        enter = ["nsenter", f"--net=/proc/{self.pid}/ns/net", "ip"]
        subprocess.run([*enter, "address", "add", f"{self.address}/24", "dev", inside], check=True)
        subprocess.run([*enter, "link", "set", inside, "up"], check=True)
        subprocess.run([*enter, "link", "set", "lo", "up"], check=True)

    def end(self):
        clock.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)


def throughput(bench):
    """Between two containers on Karst's managed bridge, and between two namespaces on a bridge made by hand."""
    if not bench.karst:
        return
    names = [f"kb{bench.id}n{n}" for n in range(2)]
    spaces = []
    try:
        for name in names:
            bench.karst.client("launch", "bench", name)
        connection = bench.karst.connect()

        def address(name):
            network = connection.metadata(f"/1.0/instances/{name}/state")["network"] or {}
            found = [a["address"] for a in network.get("eth0", {}).get("addresses", []) if a["family"] == "inet" and a["scope"] == "global"]
            return found[0] if found else None

        clock.wait_until(lambda: all(address(n) for n in names), 60, "the containers get no addresses")
        pids = [connection.metadata(f"/1.0/instances/{n}/state")["pid"] for n in names]
        target = address(names[0])
        bridge = bench.bridge("t")
        spaces = [Namespace(bench, bridge, n) for n in range(2)]
        for name in names:
            bench.karst.booted(name)
        samples = bench.alternate(
            {
                "karst": lambda: transfer(pids[0], target, pids[1]),
                "plain": lambda: transfer(spaces[0].pid, spaces[0].address, spaces[1].pid),
            }
        )
        connection.close()
        bench.row("TCP between two containers on a managed bridge", "MB/s", samples)
        share = median(samples["karst"]) / median(samples["plain"]) * 100
        bench.row("the same, of what links made by hand carry", "%", {"karst": share}, target=("karst", ">=", 95))
    finally:
        for space in spaces:
            space.end()
        for name in names:
            bench.karst.client("delete", "--force", name, check=False)


# ---- running guests --------------------------------------------------------------------------------------------------


def keepers(bench, running):
    """Memory of keepers, of guests and of their APIs; only while guests run. Called by `many`."""
    pids = [p for p in clock.descendants(1) + clock.descendants(os.getpid()) if clock.command(p) == "karst-keeper"]
    own = [p for p in set(pids) if bench.karst.directory in open(f"/proc/{p}/cmdline").read()]
    if len(own) < running:
        raise Failed(f"{len(own)} keepers of {running} guests")
    bench.row("keeper of a guest, or server of its API, PSS of each", "kB", {"karst": clock.pss(own) * 1.024 / len(own)}, target=("karst", "<=", 1000))


def sampling(bench, running):
    """CPU that the daemons use to sample a running guest and to answer what they found. Called by `many`."""
    last = {server: 0 for server in bench.servers()}

    def sampled(server):
        """Microseconds. Servers keep figures for a while: each request comes when those are too old."""
        pids, connection = server.daemons(), server.connect()
        connection.get("/1.0")
        # Never at once after that, also when the peer took its time: caches are as cold as they are when a scrape comes.
        time.sleep(max(2, last[server] + server.keeps_figures + 0.2 - time.monotonic()))
        before = clock.cpu_ns(pids)
        connection.get("/1.0/metrics")
        last[server] = time.monotonic()
        # What is left to be done after the answer belongs to it.
        time.sleep(0.05)
        used = clock.cpu_ns(pids) - before
        connection.close()
        return used / 1000 / running

    for server in last:
        sampled(server)  # the first one opens what the later ones read
    samples = bench.alternate({server.name: functools.partial(sampled, server) for server in last})
    bench.row(f"CPU to sample a guest, of {running}, and to answer its metrics", "µs", samples, target=("karst", "<=", 200))


# ---- firewall --------------------------------------------------------------------------------------------------------


def firewall(bench):
    """1,000 ports with 20 rules each, and then one change of one of their ACLs until the host has it."""
    if not bench.karst:
        return
    ports, rules = bench.arguments.ports, 20
    network = f"kb{bench.id}f"
    connection = bench.karst.connect()
    connection.operation(
        "POST",
        "/1.0/networks",
        {"name": network, "type": "bridge", "config": {"ipv4.address": f"10.{bench_octet()}.0.1/16", "ipv6.address": "none"}},
    )

    def acl(n, port):
        ingress = [
            {"action": "allow", "state": "enabled", "protocol": "tcp", "source": f"10.{n % 250}.{i}.0/24", "destination_port": str(port + i)}
            for i in range(rules)
        ]
        return {"name": f"kb{bench.id}a{n}", "ingress": ingress, "egress": [], "config": {}}

    failed = []

    def make(numbers):
        own = bench.karst.connect()
        try:
            for n in numbers:
                own.operation("POST", "/1.0/network-acls", acl(n, 1000))
                nic = {"type": "nic", "network": network, "name": "eth0", "security.acls": f"kb{bench.id}a{n}"}
                body = {"name": f"kb{bench.id}f{n}", "type": "container", "source": {"type": "none"}, "devices": {"eth0": nic}}
                own.operation("POST", "/1.0/instances", body)
        except Failed as e:
            failed.append(e)
        finally:
            own.close()

    threads = [threading.Thread(target=make, args=(range(ports)[k::4],)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failed:
        raise failed[0]
    samples = []
    for n in range(bench.arguments.rounds):
        clock.settle(3)
        body = acl(ports // 2, 5000 + 100 * n)
        del body["name"]
        start = clock.now()
        connection.operation("PUT", f"/1.0/network-acls/kb{bench.id}a{ports // 2}", body)
        samples.append(clock.now() - start)
    connection.close()
    table = subprocess.run(["nft", "list", "ruleset", "bridge"], capture_output=True, text=True, check=True).stdout
    if str(5000 + 100 * (bench.arguments.rounds - 1)) not in table:
        raise Failed("the last change is not in the ruleset after its answer")
    bench.row(f"firewall: change of an ACL, {ports:,} ports with {rules} rules each", "ms", {"karst": samples}, target=("karst", "<=", 1000))


def bench_octet():
    """Second byte of a /16 that no route of this host uses."""
    routes = subprocess.run(["ip", "-4", "route", "show", "table", "all"], capture_output=True, text=True, check=True).stdout
    for second in range(160, 250):
        if f"10.{second}." not in routes:
            return second
    raise Failed("no /16 is free below 10.0.0.0/8")
