"""Time, processes, raw HTTP and figures of /proc: what the measurements are made with.

Times are milliseconds of the monotonic clock around the real client process, started by posix_spawn: no shell in between.
"""

import ctypes
import json
import os
import signal
import socket
import statistics
import time

PR_SET_CHILD_SUBREAPER = 36
TICK = os.sysconf("SC_CLK_TCK")
_libc = ctypes.CDLL(None, use_errno=True)


class Failed(Exception):
    """A command or request that had to succeed did not."""


def now():
    """Milliseconds."""
    return time.monotonic_ns() / 1e6


def median(samples):
    return statistics.median(samples)


def become_subreaper():
    """What daemonizes itself below us comes back to us: process 1 of some hosts reaps nothing."""
    if _libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl")


# ---- processes -------------------------------------------------------------------------------------------------------


class Commands:
    """Runs commands and takes the time from spawn to end. Their output goes to one file, for messages about failures."""

    def __init__(self, directory):
        self.output = os.path.join(directory, "output")

    def run(self, argv, env=None, check=True, stdin="/dev/null"):
        """Milliseconds until the process ended. Raises Failed when it does not succeed and `check` is set."""
        actions = [
            (os.POSIX_SPAWN_OPEN, 0, stdin, os.O_RDONLY, 0),
            (os.POSIX_SPAWN_OPEN, 1, self.output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600),
            (os.POSIX_SPAWN_DUP2, 1, 2),
        ]
        environment = dict(os.environ, **(env or {}))
        start = now()
        pid = os.posix_spawnp(argv[0], argv, environment, file_actions=actions)
        _, status = os.waitpid(pid, 0)
        took = now() - start
        if check and status != 0:
            code = os.waitstatus_to_exitcode(status)
            raise Failed(f"{' '.join(argv)}: exit {code}: {self.text()[-600:]}")
        self.succeeded = status == 0
        return took

    def text(self):
        with open(self.output, errors="replace") as file:
            return file.read().strip()

    def read(self, argv, env=None):
        """Standard output (and error) of a command that has to succeed."""
        self.run(argv, env)
        return self.text()


class Background:
    """A server under a reaper of its own: whatever it leaves behind stays a descendant of ours and can be ended."""

    def __init__(self, argv, log, env=None):
        reader, writer = os.pipe()
        self.reaper = os.fork()
        if self.reaper == 0:
            os.setsid()
            become_subreaper()
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            actions = [
                (os.POSIX_SPAWN_OPEN, 0, "/dev/null", os.O_RDONLY, 0),
                (os.POSIX_SPAWN_OPEN, 1, log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600),
                (os.POSIX_SPAWN_DUP2, 1, 2),
            ]
            try:
                pid = os.posix_spawnp(
                    argv[0], argv, env or os.environ, file_actions=actions, setsigdef=[signal.SIGINT, signal.SIGTERM]
                )
                os.write(writer, str(pid).encode())
                os.close(writer)
                while True:
                    os.waitpid(-1, 0)
            except ChildProcessError:
                os._exit(0)
            except OSError:
                os._exit(127)
        os.close(writer)
        answer = os.read(reader, 32)
        os.close(reader)
        if not answer:
            os.waitpid(self.reaper, 0)
            raise Failed(f"{argv[0]} cannot be started")
        self.pid = int(answer)

    def end(self):
        """Kills what is left below the reaper, and then the reaper."""
        deadline = now() + 10_000
        while now() < deadline:
            left = descendants(self.reaper)
            if not left:
                break
            for pid in left:
                kill(pid, signal.SIGKILL)
            time.sleep(0.01)
        kill(self.reaper, signal.SIGKILL)
        try:
            os.waitpid(self.reaper, 0)
        except ChildProcessError:
            pass


def reap_strays(known):
    """Reaps children that came to us as orphans; never one of `known`."""
    for pid in children(os.getpid()):
        if pid not in known:
            try:
                os.waitpid(pid, os.WNOHANG)
            except ChildProcessError:
                pass


def kill(pid, number):
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        pass


def wait_gone(pids, limit=15):
    """Waits until all of the processes are gone (or only wait to be reaped)."""
    wait_until(lambda: not any(alive(pid) for pid in pids), limit, "processes do not end")


def alive(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def wait_until(condition, limit, what):
    deadline = now() + limit * 1000
    while not condition():
        if now() > deadline:
            raise Failed(f"{what} (not within {limit} s)")
        time.sleep(0.002)


# ---- /proc -----------------------------------------------------------------------------------------------------------


def parents():
    """Parent of every process."""
    found = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                with open(f"/proc/{entry}/stat") as file:
                    found[int(entry)] = int(file.read().rpartition(")")[2].split()[1])
            except OSError:
                pass
    return found


def children(pid):
    return [child for child, parent in parents().items() if parent == pid]


def descendants(pid):
    """Processes below `pid`, zombies not counted."""
    tree = parents()
    found, frontier = [], {pid}
    while frontier:
        frontier = {child for child, parent in tree.items() if parent in frontier}
        found.extend(frontier)
    return [p for p in found if alive(p)]


def command(pid):
    try:
        with open(f"/proc/{pid}/comm") as file:
            return file.read().strip()
    except OSError:
        return ""


def pss(pids):
    """Kilobytes of proportional set size together."""
    total = 0
    for pid in pids:
        with open(f"/proc/{pid}/smaps_rollup") as file:
            total += next(int(line.split()[1]) for line in file if line.startswith("Pss:"))
    return total


def cpu(pids):
    """Milliseconds of user and system time that the processes have used so far."""
    total = 0
    for pid in pids:
        with open(f"/proc/{pid}/stat") as file:
            fields = file.read().rpartition(")")[2].split()
        total += int(fields[11]) + int(fields[12])
    return total * 1000 / TICK


def cpu_ns(pids):
    """Nanoseconds on a processor of all threads of the processes, also of those that have ended since they began: for little
    work, where ticks are too coarse. It is the kernel's clock of each process, by the number that clock_getcpuclockid(3) makes."""
    return sum(time.clock_gettime_ns((~pid << 3) | 2) for pid in pids)


def settle(limit=5.0):
    """Waits until the machine has little to do, but not for long: it may be shared."""
    deadline = time.monotonic() + limit
    while time.monotonic() < deadline:
        before = _busy()
        time.sleep(0.25)
        after = _busy()
        if after[0] - before[0] < 0.15 * max(1, after[1] - before[1]):
            return
    return


def _busy():
    with open("/proc/stat") as file:
        fields = [int(x) for x in file.readline().split()[1:9]]
    idle = fields[3] + fields[4]
    return sum(fields) - idle, sum(fields)


# ---- HTTP ------------------------------------------------------------------------------------------------------------


class Connection:
    """A keep-alive connection to an API's unix socket; does as little as possible, so that the server is measured."""

    def __init__(self, path, timeout=120):
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.socket.settimeout(timeout)
        self.socket.connect(path)
        self.left = b""

    def close(self):
        self.socket.close()

    def request(self, method, path, body=None):
        """Status and body."""
        payload = b"" if body is None else json.dumps(body).encode()
        head = f"{method} {path} HTTP/1.1\r\nHost: karst\r\n"
        if body is not None:
            head += f"Content-Type: application/json\r\nContent-Length: {len(payload)}\r\n"
        self.socket.sendall(head.encode() + b"\r\n" + payload)
        return self._answer()

    def get(self, path):
        """Body of a successful answer."""
        status, body = self.request("GET", path)
        if status != 200:
            raise Failed(f"GET {path}: {status}: {body[:300]!r}")
        return body

    def metadata(self, path):
        return json.loads(self.get(path))["metadata"]

    def timed_get(self, path):
        """Milliseconds until the whole answer is there."""
        start = now()
        self.get(path)
        return now() - start

    def operation(self, method, path, body):
        """A mutation and waiting for its operation."""
        status, answer = self.request(method, path, body)
        if status >= 400:
            raise Failed(f"{method} {path}: {status}: {answer[:300]!r}")
        answer = json.loads(answer)
        if answer.get("type") != "async":
            return
        result = self.metadata(f"{answer['operation']}/wait?timeout=120")
        if result["status_code"] != 200:
            raise Failed(f"{method} {path}: {result['status']}: {result['err']}")

    def _more(self):
        data = self.socket.recv(1 << 18)
        if not data:
            raise Failed("the server closed the connection")
        self.left += data

    def _answer(self):
        while b"\r\n\r\n" not in self.left:
            self._more()
        head, self.left = self.left.split(b"\r\n\r\n", 1)
        lower = head.lower()
        status = int(head[9:12])
        if b"transfer-encoding: chunked" in lower:
            return status, self._chunked()
        at = lower.find(b"content-length:")
        if at < 0:
            return status, b""
        length = int(lower[at + 15 :].split(b"\r\n", 1)[0])
        parts, have = [self.left], len(self.left)
        while have < length:
            data = self.socket.recv(1 << 18)
            if not data:
                raise Failed("the server closed the connection")
            parts.append(data)
            have += len(data)
        whole = b"".join(parts)
        self.left = whole[length:]
        return status, whole[:length]

    def _chunked(self):
        parts = []
        while True:
            while b"\r\n" not in self.left:
                self._more()
            size, self.left = self.left.split(b"\r\n", 1)
            size = int(size.split(b";")[0], 16)
            while len(self.left) < size + 2:
                self._more()
            parts.append(self.left[:size])
            self.left = self.left[size + 2 :]
            if size == 0:
                return b"".join(parts)
