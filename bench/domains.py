"""Figures of libvirt's protocol: a thousand defined domains, by a raw loop of calls and by virsh, beside libvirtd.

Both servers get the same document for each domain, apart from where its disk lies and how its bridge is called. Definitions
lie on the same file system at both, and all that was defined is counted again after each `kill -9`. Called by measure.py.
"""

import functools
import os
import shutil
import struct
import sys

import clock
import rpc
import subjects
from clock import Failed, median
from rpc import Rpc, string, word

# Calls of one sample: a single one is too short to be told from the machine's noise.
CALLS = 20
DOCUMENT = """<domain type='qemu'><name>{name}</name><memory unit='MiB'>256</memory><vcpu>1</vcpu>
<os><type arch='x86_64' machine='q35'>hvm</type><boot dev='hd'/></os><features><acpi/></features>
<devices><emulator>/usr/bin/qemu-system-x86_64</emulator>
<disk type='file' device='disk'><driver name='qemu' type='raw'/><source file='{disk}'/><target dev='vda' bus='virtio'/></disk>
<interface type='bridge'><source bridge='{bridge}'/><model type='virtio'/></interface>
<serial type='pty'/></devices></domain>
"""


class Side:
    """One server, and what was made at it."""

    def __init__(self, bench, server):
        self.bench, self.server, self.name = bench, server, server.name
        self.socket = server.libvirt_socket()
        self.defined, self.rounds = [], 0
        self.connection = self.connect()
        self.before = self.connection.domains()

    def connect(self):
        return Rpc(self.socket)

    def domain(self, n):
        return f"kb{self.bench.id}d{n}"

    def virsh(self, *arguments):
        """Milliseconds of `virsh`."""
        return self.bench.commands.run(["virsh", "-q", "-c", f"qemu+unix:///system?socket={self.socket}", *arguments])

    def define(self, total, rounds):
        """Defines per second, of the next round's part of `total` domains, one after the other."""
        first, last = (total * (self.rounds + n) // rounds for n in (0, 1))
        self.rounds += 1
        documents = [DOCUMENT.format(name=self.domain(n), disk=self.disk(n), bridge=self.bridge()) for n in range(first, last)]
        arguments = [string(text) for text in documents]
        start = clock.now()
        for one in arguments:
            self.defined.append(self.connection.call(rpc.DEFINE, one))
        return (last - first) / (clock.now() - start) * 1000

    def calls(self, procedure, arguments):
        """Milliseconds of a call, by the median of several."""
        return median([self.connection.timed(procedure, arguments) for _ in range(CALLS)])

    def demand_all(self):
        """What was defined is there, with its figures."""
        wanted = self.before + len(self.defined)
        counted = (self.connection.domains(), self.connection.with_stats())
        if counted != (wanted, wanted):
            raise Failed(f"{self.name}: {wanted} domains are defined; {counted[0]} are listed, {counted[1]} have figures")

    def answers(self):
        """Opens a connection and lists the domains, all of them."""
        try:
            connection = self.connect()
        except (OSError, Failed):
            return False
        try:
            return connection.domains() == self.before + len(self.defined)
        except (OSError, Failed):
            return False
        finally:
            connection.close()

    def restart(self):
        """Milliseconds from the daemon's exec to its first list of all domains, after all of it was killed."""
        self.connection.close()
        took = self.server.first_answer(self.answers)
        self.connection = self.connect()
        return took

    def demand_state(self, name, runs):
        if self.connection.runs(name) != runs:
            raise Failed(f"{self.name}: {name} {'does not run' if runs else 'still runs'}")

    def remove(self):
        """Takes away what was made; the rest goes with the server."""
        self.connection.close()
        self.connection = self.connect()
        try:
            first = self.domain(0)
            if self.defined and self.connection.runs(first):
                self.connection.call(rpc.DESTROY, self.connection.domain(first))
            for domain in self.defined:
                self.connection.call(rpc.UNDEFINE, domain)
            self.remove_disks()
            left = self.connection.domains()
            if left != self.before:
                raise Failed(f"{self.name}: {left - self.before} domains are left")
        finally:
            self.connection.close()


class KarstSide(Side):
    """Disks are volumes of the pool that the first start made."""

    def __init__(self, bench, server):
        super().__init__(bench, server)
        self.volumes = []
        connection = server.connect()
        try:
            devices = connection.metadata("/1.0/profiles/default")["devices"].values()
        finally:
            connection.close()
        self.pool = next(d["pool"] for d in devices if d["type"] == "disk")
        self.network = next(d["network"] for d in devices if d["type"] == "nic")

    def make_disks(self, count):
        pool = self.connection.call(rpc.POOL_BY_NAME, string(self.pool))
        for n in range(count):
            text = (
                f"<volume><name>{self.domain(n)}</name><capacity unit='MiB'>1</capacity>"
                "<target><format type='raw'/></target></volume>"
            )
            self.volumes.append(self.connection.call(rpc.VOLUME_CREATE, pool + string(text) + word(0)))

    def remove_disks(self):
        for volume in self.volumes:
            self.connection.call(rpc.VOLUME_DELETE, volume + word(0))

    def disk(self, n):
        return f"/karst/{self.pool}/{self.domain(n)}"

    def bridge(self):
        return self.network


class LibvirtSide(Side):
    """Disks are sparse files, of the same size."""

    def __init__(self, bench, server):
        super().__init__(bench, server)
        self.directory = os.path.join(bench.work, "libvirt-disks")

    def make_disks(self, count):
        os.makedirs(self.directory)
        os.chmod(self.directory, 0o711)
        for n in range(count):
            with open(self.disk(n), "wb") as file:
                file.truncate(1 << 20)
            os.chmod(self.disk(n), 0o666)

    def remove_disks(self):
        shutil.rmtree(self.directory)

    def disk(self, n):
        return os.path.join(self.directory, f"{self.domain(n)}.raw")

    def bridge(self):
        return self.server.bridge


def domains(bench):
    """Lists, figures, definitions, starts and restarts, with a thousand domains that are defined."""
    made = []
    try:
        if bench.karst:
            made.append(KarstSide(bench, bench.karst))
        if bench.libvirt:
            made.append(LibvirtSide(bench, bench.libvirt))
        if made:
            measure(bench, made)
    except (OSError, struct.error) as e:
        raise Failed(f"a server does not answer as libvirt's protocol says: {e}") from e
    finally:
        for side in made:
            try:
                side.remove()
            except (OSError, Failed, struct.error) as e:
                print(f"{side.name}: what the figures of domains made is not all gone: {e}", file=sys.stderr)


def measure(bench, sides):
    total, rounds = bench.arguments.domains, bench.arguments.rounds
    if total < rounds:
        raise Failed(f"--domains {total} is less than --rounds {rounds}, and each round defines some")
    for side in sides:
        side.make_disks(total)

    def settled(measure, *arguments):
        clock.settle(2)
        return measure(*arguments)

    def each(measure, *arguments):
        """Samples of each server, by turns."""
        return bench.alternate({s.name: functools.partial(settled, getattr(s, measure), *arguments) for s in sides})

    count = f"{total:,} domains"
    defines = each("define", total, rounds)
    bench.row(f"libvirt protocol: define {count} one after the other", "per s", defines, target=("ratio libvirt", ">=", 3))
    for side in sides:
        side.demand_all()
    lists = each("calls", rpc.LIST_ALL, rpc.ALL_DOMAINS)
    bench.row(f"libvirt protocol: list of {count}", "ms", lists, target=("ratio libvirt", ">=", 3))
    figures = each("calls", rpc.ALL_STATS, rpc.EVERYTHING)
    bench.row(f"libvirt protocol: all stats of {count}", "ms", figures, target=("ratio libvirt", ">=", 3))
    bench.notes.append(
        f"libvirt's protocol: each sample of a list or of stats is the median of {CALLS} calls on one connection; definitions "
        "of both servers lie on the file system above, and all were there after each `kill -9`."
    )
    if shutil.which("virsh"):
        bench.row(f"`virsh list --all`, {count}", "ms", each("virsh", "list", "--all"), target=("ratio libvirt", ">=", 1.5))
        start_and_destroy(bench, sides, settled)
    else:
        bench.notes.append("virsh is not installed: what it takes was not measured.")
    restarts = each("restart")
    bench.row(f"first list after kill -9 and start, {count}", "ms", restarts, target=("ratio libvirt", ">=", 2))
    for side in sides:
        side.demand_all()


def start_and_destroy(bench, sides, settled):
    if subjects.kvm_usable():
        # Karst's machines use it whatever a document says, so the two would not do the same.
        bench.notes.append("KVM is usable here: the start of a domain without it was not measured.")
        return
    took = {"start": {}, "destroy": {}}

    def cycle(side):
        name = side.domain(0)
        for verb, runs in (("start", True), ("destroy", False)):
            took[verb].setdefault(side.name, []).append(settled(side.virsh, verb, name))
            side.demand_state(name, runs)

    for side in sides:
        cycle(side)  # the first finds out what QEMU can do
    took["start"].clear()
    took["destroy"].clear()
    bench.alternate({s.name: functools.partial(cycle, s) for s in sides})
    for verb, samples in took.items():
        bench.row(f"`virsh {verb}` of a domain without KVM", "ms", samples, target=("ratio libvirt", ">=", 2.5))
