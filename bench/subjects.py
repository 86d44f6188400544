"""What is measured: Karst, Incus, libvirt and plain tools, each started in a directory of its own and taken away again."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys

import clock
from clock import Background, Connection, Failed, wait_until

INCUSD = next((p for p in ("/usr/libexec/incus/incusd", "/usr/lib/incus/incusd", "/opt/incus/bin/incusd") if os.path.exists(p)), None)


class Server:
    """A daemon that answers the Incus API."""

    name = ""
    keeps_figures = 2  # seconds for which the figures of guests are answered again

    def __init__(self, bench):
        self.bench = bench
        self.commands = bench.commands
        self.directory = os.path.join(bench.work, self.name)
        self.socket = os.path.join(self.directory, "unix.socket")
        self.log = os.path.join(bench.work, f"{self.name}.log")
        self.conf = os.path.join(bench.work, f"{self.name}.client")
        os.makedirs(self.conf)
        self.background = None
        self.before = []  # of daemons that were killed: their guests are still below them

    def env(self):
        return {"INCUS_SOCKET": self.socket, "INCUS_CONF": self.conf}

    def client(self, *arguments, check=True):
        """Milliseconds of the `incus` client against this server."""
        return self.commands.run(["incus", *arguments], self.env(), check)

    def connect(self):
        return Connection(self.socket)

    def answers(self):
        """One successful GET /1.0, as soon as the socket takes connections."""
        try:
            connection = self.connect()
            try:
                return connection.request("GET", "/1.0")[0] == 200
            finally:
                connection.close()
        except (OSError, Failed):
            return False

    def first_answer(self, answers=None):
        """Milliseconds from the daemon's exec to its first successful GET /1.0 (or other answer), after all of it was killed."""
        self.kill()
        start = clock.now()
        self.spawn()
        wait_until(answers or self.answers, 60, f"{self.name} does not answer")
        return clock.now() - start

    def start(self):
        self.spawn()
        wait_until(self.answers, 60, f"{self.name} does not answer; see {self.log}")

    def memory(self):
        """A file system in memory, for a pool."""
        place = os.path.join(self.bench.work, f"memory-{self.name}")
        if not os.path.ismount(place):
            os.makedirs(place, exist_ok=True)
            subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2g,mode=0711", "karst-bench", place], check=True)
            self.bench.mounts.append(place)
        return place

    def status(self, name):
        connection = self.connect()
        try:
            return connection.metadata(f"/1.0/instances/{name}")["status"]
        finally:
            connection.close()

    def booted(self, name):
        """Waits until the guest's systemd has nothing left to do, so that what is measured next is not its boot."""
        self.client("exec", name, "--", "timeout", "40", "systemctl", "is-system-running", "--wait", check=False)
        clock.settle()


class Karst(Server):
    name = "karst"

    def __init__(self, bench, programs):
        super().__init__(bench)
        self.programs = programs

    def spawn(self):
        old = self.background
        self.background = Background(
            [os.path.join(self.programs, "karstd"), "--dir", self.directory],
            self.log,
            {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", **{k: v for k, v in os.environ.items() if k == "KARST_LOG"}},
        )
        if old:
            self.before.append(old)

    def prepare(self):
        # Pools of the bench lie where this host permits them.
        os.makedirs(self.directory, exist_ok=True)
        policy = os.path.join(self.directory, "host-policy.toml")
        with open(policy, "w") as file:
            file.write(f'pool_sources = ["{os.path.join(self.bench.work, "memory-karst")}"]\n')
        os.chmod(policy, 0o644)
        self.start()

        def profile():
            connection = self.connect()
            try:
                devices = connection.metadata("/1.0/profiles/default")["devices"]
                return any(d["type"] == "nic" for d in devices.values()) and any(d["type"] == "disk" for d in devices.values())
            finally:
                connection.close()

        wait_until(profile, 30, "the first start makes no default profile")

    def libvirt_socket(self):
        return os.path.join(self.directory, "libvirt-sock")

    def karst(self, *arguments):
        """Milliseconds of Karst's own client."""
        return self.commands.run([os.path.join(self.programs, "karst"), *arguments], {"KARST_DIR": self.directory})

    def daemons(self):
        """Launcher, host and control; keepers belong to guests."""
        return [self.background.pid] + [p for p in clock.children(self.background.pid) if clock.command(p) == "karstd"]

    def kill(self):
        victims = self.daemons()
        for pid in victims:
            clock.kill(pid, signal.SIGKILL)
        clock.wait_gone(victims)

    def stop(self):
        if not self.background:
            return
        with open(os.path.join(self.directory, "id")) as file:
            daemon = file.read().strip()
        clock.kill(self.background.pid, signal.SIGTERM)
        try:
            clock.wait_gone([self.background.pid])
        finally:
            self.commands.run([os.path.join(self.programs, "karstd"), "purge", "--dir", self.directory], check=False)
            if not self.commands.succeeded:
                print(f"karstd purge failed: {self.commands.text()[-400:]}", file=sys.stderr)
            for background in [self.background, *self.before]:
                background.end()
            self.background = None
            self.sweep(daemon)
            release(self.directory)

    def sweep(self, daemon):
        """Takes away what a purge that failed left behind; everything carries the daemon's id."""
        links = json.loads(subprocess.run(["ip", "-j", "link"], capture_output=True, check=True).stdout)
        for link in links:
            if link.get("ifalias", "").startswith(f"karst:{daemon}:"):
                print(f"karstd purge left {link['ifname']} behind", file=sys.stderr)
                subprocess.run(["ip", "link", "delete", link["ifname"]], check=False)
        tables = subprocess.run(["nft", "list", "tables"], capture_output=True, text=True, check=False).stdout
        for line in tables.splitlines():
            if line.endswith(f" karst_{daemon}"):
                print(f"karstd purge left {line} behind", file=sys.stderr)
                subprocess.run(["nft", "delete", *line.split()], check=False)
        remove_cgroups(f"karst-{daemon}")


class Incus(Server):
    name = "incus"
    keeps_figures = 8

    def spawn(self):
        environment = {
            "PATH": "/usr/sbin:/usr/bin:/sbin:/bin",
            "INCUS_DIR": self.directory,
            "INCUS_SOCKET": self.socket,
            "HOME": self.conf,
        }
        old = self.background
        argv = [INCUSD, "--group", "root"]
        if not ids_for_root():
            # As its package leaves them, but in a mount namespace of its own: the host's files stay as they are.
            ids = os.path.join(self.bench.work, "subids")
            with open(ids, "w") as file:
                file.write("root:1000000:1000000000\n")
            script = 'mount --bind "$1" /etc/subuid && mount --bind "$1" /etc/subgid && shift && exec "$@"'
            argv = ["unshare", "--mount", "--propagation", "slave", "sh", "-c", script, "sh", ids, *argv]
        self.background = Background(argv, self.log, environment)
        if old:
            self.before.append(old)

    def prepare(self):
        os.makedirs(self.directory)
        os.chmod(self.directory, 0o711)
        self.start()
        self.bridge = f"kb{self.bench.id}i"
        self.subnet = free_subnet(1)
        self.bench.links.append(self.bridge)
        preseed = {
            "config": {"images.auto_update_interval": "0"},
            "networks": [
                {
                    "name": self.bridge,
                    "type": "bridge",
                    "config": {"ipv4.address": f"{self.subnet}.1/24", "ipv4.nat": "true", "ipv6.address": "none"},
                }
            ],
            "storage_pools": [{"name": "default", "driver": "dir"}],
            "profiles": [
                {
                    "name": "default",
                    "devices": {
                        "root": {"type": "disk", "path": "/", "pool": "default"},
                        "eth0": {"type": "nic", "name": "eth0", "network": self.bridge},
                    },
                }
            ],
        }
        file = os.path.join(self.bench.work, "preseed.yaml")
        with open(file, "w") as out:
            json.dump(preseed, out)  # JSON is YAML
        self.commands.run(["incus", "admin", "waitready", "--timeout", "60"], self.env())
        self.commands.run(["incus", "admin", "init", "--preseed"], self.env(), stdin=file)

    def daemons(self):
        return [self.background.pid]

    def kill(self):
        clock.kill(self.background.pid, signal.SIGKILL)
        clock.wait_gone([self.background.pid])

    def stop(self):
        if not self.background:
            return
        connection = self.connect()
        for instance in connection.metadata("/1.0/instances?recursion=1"):
            if instance["status"] == "Running":
                self.client("stop", "--force", instance["name"], check=False)
        # The bridge, its dnsmasq and its firewall chains go with the network; nothing may use it then.
        for instance in connection.metadata("/1.0/instances?recursion=1"):
            connection.operation("DELETE", f"/1.0/instances/{instance['name']}", None)
        self.client("profile", "device", "remove", "default", "eth0", check=False)
        self.client("network", "delete", self.bridge, check=False)
        if not self.commands.succeeded:
            print(f"incus network delete failed: {self.commands.text()[-400:]}")
        clock.kill(self.background.pid, signal.SIGTERM)
        try:
            clock.wait_gone([self.background.pid], 60)
        finally:
            for background in [self.background, *self.before]:
                background.end()
            self.background = None
            release(self.directory)


class Plain:
    """`lxc-start` of the same root file system, unprivileged and with a NIC on a bridge; and QEMU by hand."""

    name = "plain"

    def __init__(self, bench):
        self.bench = bench
        self.commands = bench.commands
        self.directory = os.path.join(bench.work, "plain")
        self.container = f"kb{bench.id}"

    def prepare(self):
        place = os.path.join(self.directory, self.container)
        os.makedirs(place)
        os.chmod(self.directory, 0o711)
        os.chmod(place, 0o711)
        self.bridge = self.bench.bridge("p")
        self.commands.run(["cp", "-a", self.bench.rootfs, os.path.join(place, "rootfs")])
        self.config = os.path.join(place, "config")
        with open(self.config, "w") as file:
            file.write(
                f"""lxc.include = /usr/share/lxc/config/common.conf
lxc.include = /usr/share/lxc/config/userns.conf
lxc.hook.mount =
lxc.hook.post-stop =
lxc.uts.name = bench
lxc.rootfs.path = dir:{place}/rootfs
lxc.rootfs.options = idmap=container
lxc.idmap = u 0 1000000 65536
lxc.idmap = g 0 1000000 65536
lxc.net.0.type = veth
lxc.net.0.link = {self.bridge}
lxc.net.0.name = eth0
lxc.net.0.flags = up
lxc.apparmor.profile = unconfined
lxc.log.file = {place}/log
"""
            )

    def lxc(self, program, *arguments, check=True):
        # As Karst runs it: root needs no `newuidmap`, which would insist on what /etc/subuid gives to root.
        argv = [shutil.which(program), "-P", self.directory, "-n", self.container, *arguments]
        return self.commands.run(argv, {"PATH": "/nonexistent"}, check)

    def start(self):
        return self.lxc("lxc-start", "-d")

    def booted(self):
        self.lxc("lxc-attach", "--", "/usr/bin/timeout", "40", "/usr/bin/systemctl", "is-system-running", "--wait", check=False)
        clock.settle()

    def exec(self):
        return self.lxc("lxc-attach", "--", "/usr/bin/true")

    def stop_container(self):
        took = self.lxc("lxc-stop", "-k")
        self.bench.reap()
        return took

    def qemu(self):
        """Milliseconds until a new QEMU's monitor answers."""
        path = os.path.join(self.bench.work, "qmp")
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        listener.bind(path)
        listener.listen(1)
        listener.settimeout(20)
        disk = self.bench.disk("plain")
        argv = [
            "qemu-system-x86_64", "-nodefaults", "-no-user-config", "-display", "none", "-machine", "q35,accel=tcg", "-m", "256",
            "-drive", f"file={disk},format=qcow2,if=virtio", "-device", "virtio-rng-pci", "-serial", "null",
            "-chardev", f"socket,id=qmp,path={path}", "-mon", "chardev=qmp,mode=control",
        ]  # fmt: skip
        start = clock.now()
        pid = os.posix_spawnp(argv[0], argv, os.environ)
        try:
            connection, _ = listener.accept()
            connection.settimeout(20)
            file = connection.makefile("rwb")
            file.readline()
            file.write(b'{"execute":"qmp_capabilities"}\n')
            file.flush()
            file.readline()
            return clock.now() - start
        finally:
            clock.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            listener.close()
            os.unlink(path)

    def stop(self):
        self.lxc("lxc-stop", "-k", check=False)
        self.bench.reap()
        release(self.directory)


class Libvirt:
    """libvirtd in a mount namespace of its own: its state is not the host's, and /dev/kvm is hidden when it does not work.

    A process that only sleeps holds the namespace, so that the daemon can be killed and started again in it.
    """

    name = "libvirt"
    HIDDEN = ("/run/libvirt", "/var/lib/libvirt", "/var/cache/libvirt", "/var/log/libvirt", "/etc/libvirt")

    def __init__(self, bench):
        self.bench = bench
        self.commands = bench.commands
        self.directory = os.path.join(bench.work, "libvirt")
        self.domain = f"kb{bench.id}"
        self.log = os.path.join(bench.work, "libvirt.log")
        self.background = None
        self.holder = None
        self.made = []
        self.before = []  # the holder, and daemons that were killed: their guests are still below them

    def prepare(self):
        os.makedirs(self.directory)
        os.chmod(self.directory, 0o711)
        made = [path for path in self.HIDDEN if not os.path.isdir(path)]
        for path in made:
            os.makedirs(path)
        self.made = made
        self.bridge = self.bench.bridge("v")
        script = ["set -e", "mount --make-rprivate /"]
        # Definitions lie on the file system of the bench, as Karst's records do: both wait for the same disk.
        definitions = os.path.join(self.directory, "etc")
        os.makedirs(definitions)
        for path in self.HIDDEN:
            on_disk = path == "/etc/libvirt"
            script.append(f"mount --bind {definitions} {path}" if on_disk else f"mount -t tmpfs -o mode=0755 karst-bench {path}")
        if os.path.exists("/dev/kvm") and not kvm_usable():
            # Nothing that its guests' user may open: of a node that it may, libvirtd asks QEMU anew at each definition.
            hidden = os.path.join(self.directory, "no-kvm")
            with open(hidden, "wb"):
                pass
            os.chmod(hidden, 0)
            script.append(f"mount --bind {hidden} /dev/kvm")
        # The user that libvirt was built for exists only where its whole package is installed; here, only in this namespace.
        for file, line in (("passwd", "libvirt-qemu:x:64055:64055::/nonexistent:/usr/sbin/nologin"), ("group", "libvirt-qemu:x:64055:")):
            with open(f"/etc/{file}") as source:
                known = source.read()
            with open(os.path.join(self.directory, file), "w") as out:
                out.write(known if "libvirt-qemu:" in known else known.rstrip("\n") + f"\n{line}\n")
            script.append(f"mount --bind {self.directory}/{file} /etc/{file}")
        # No helper daemons, and no /dev of each guest's own: libvirtd cannot make one around what hides /dev/kvm, and is faster without.
        with open(f"{self.directory}/qemu.conf", "w") as out:
            out.write('user = "libvirt-qemu"\ngroup = "libvirt-qemu"\nsecurity_driver = "none"\nstdio_handler = "file"\nnamespaces = []\n')
        script.append(f"cp {self.directory}/qemu.conf /etc/libvirt/qemu.conf")
        ready = os.path.join(self.directory, "ready")
        script += [f"touch {ready}", "exec sleep infinity"]
        self.config = os.path.join(self.directory, "libvirtd.conf")
        with open(self.config, "w") as file:
            file.write(f'unix_sock_dir = "{self.directory}"\nauth_unix_rw = "none"\nlisten_tls = 0\n')
        self.holder = Background(["unshare", "--mount", "sh", "-c", "\n".join(script)], self.log)
        self.before.append(self.holder)
        wait_until(lambda: os.path.exists(ready), 20, "libvirtd's mount namespace cannot be made; see libvirt.log")
        self.spawn()
        self.uri = f"qemu+unix:///system?socket={self.libvirt_socket()}"
        wait_until(lambda: self.virsh("version", check=False) and self.commands.succeeded, 60, "libvirtd does not answer; see libvirt.log")
        self.version = next(
            (l.rpartition(" ")[2] for l in self.commands.text().splitlines() if "library" in l and "Using" in l), "?"
        )
        disk = self.bench.disk("libvirt")
        kind = "kvm" if kvm_usable() else "qemu"
        xml = os.path.join(self.directory, "domain.xml")
        with open(xml, "w") as file:
            file.write(
                f"""<domain type='{kind}'><name>{self.domain}</name><memory unit='MiB'>256</memory><vcpu>1</vcpu>
<os><type arch='x86_64' machine='q35'>hvm</type></os><features><acpi/></features>
<devices><emulator>/usr/bin/qemu-system-x86_64</emulator>
<disk type='file' device='disk'><driver name='qemu' type='qcow2'/><source file='{disk}'/><target dev='vda' bus='virtio'/></disk>
<interface type='bridge'><source bridge='{self.bridge}'/><model type='virtio'/></interface>
<serial type='pty'/><rng model='virtio'><backend model='random'>/dev/urandom</backend></rng>
<memballoon model='none'/></devices></domain>
"""
            )
        self.virsh("define", xml)

    def spawn(self):
        old = self.background
        namespace = f"--mount=/proc/{self.holder.pid}/ns/mnt"
        self.background = Background(["nsenter", namespace, "--", shutil.which("libvirtd"), "-f", self.config], self.log)
        if old:
            self.before.append(old)

    def kill(self):
        clock.kill(self.background.pid, signal.SIGKILL)
        clock.wait_gone([self.background.pid])

    def first_answer(self, answers):
        """As that of `Server`; entering the namespace, a millisecond or two, is in it."""
        self.kill()
        start = clock.now()
        self.spawn()
        wait_until(answers, 60, "libvirtd does not answer; see libvirt.log")
        return clock.now() - start

    def libvirt_socket(self):
        return os.path.join(self.directory, "libvirt-sock")

    def virsh(self, *arguments, check=True):
        return self.commands.run(["virsh", "-q", "-c", self.uri, *arguments], check=check)

    def stop(self):
        try:
            if self.background:
                self.virsh("destroy", self.domain, check=False)
                clock.kill(self.background.pid, signal.SIGTERM)
                clock.wait_gone([self.background.pid])
        finally:
            # Also when it was never up: what holds the namespace would stay.
            for background in [self.background, *self.before]:
                if background:
                    background.end()
            self.background, self.before = None, []
            for path in self.made:
                os.rmdir(path)
            self.made = []
            release(self.directory)


def remove_cgroups(unique):
    """Empty groups whose path holds `unique`: LXC and libvirt leave some behind."""
    for directory, _, _ in os.walk("/sys/fs/cgroup", topdown=False):
        if unique in directory:
            try:
                os.rmdir(directory)
            except OSError:
                pass


def kvm_usable():
    """The node and the processor's flag: a node alone proves nothing."""
    try:
        with open("/proc/cpuinfo") as file:
            flags = set(next(line for line in file if line.startswith("flags")).split())
        return os.access("/dev/kvm", os.R_OK | os.W_OK) and bool(flags & {"vmx", "svm"})
    except (OSError, StopIteration):
        return False


def ids_for_root():
    """Does the host give subordinate ids to root, as Incus' package arranges it?"""
    try:
        return all(any(line.startswith("root:") for line in open(path)) for path in ("/etc/subuid", "/etc/subgid"))
    except OSError:
        return False


def free_subnet(number):
    """First three bytes of a /24 that no route of this host uses."""
    routes = subprocess.run(["ip", "-4", "route", "show", "table", "all"], capture_output=True, text=True, check=True).stdout
    for third in range(number, 250):
        if f"10.213.{third}." not in routes:
            return f"10.213.{third}"
    raise Failed("no subnet is free below 10.213.0.0/16")


def release(directory):
    """Unmounts what is mounted below a directory and removes it."""
    with open("/proc/self/mountinfo") as file:
        mounts = [line.split()[4] for line in file]
    for mount in sorted((m for m in mounts if m == directory or m.startswith(directory + "/")), key=len, reverse=True):
        subprocess.run(["umount", "-l", mount], check=False)
    shutil.rmtree(directory, ignore_errors=True)
