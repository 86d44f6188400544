"""libvirt's remote protocol, as much of it as figures need: frames over a unix socket, one call at a time.

It does as little as possible, so that the server is measured: an answer is taken whole and looked at afterwards. Source of
the protocol: `virnetprotocol.x` and `remote_protocol.x` of libvirt 9.0, read as facts.
"""

import socket
import struct

from clock import Failed, now

REMOTE = 0x20008086
CALL, REPLY = 0, 1
HEAD = struct.Struct(">7I")  # length (counting itself), program, version, procedure, kind, serial, status

OPEN, DEFINE, DESTROY, BY_NAME, UNDEFINE = 1, 11, 12, 23, 35
AUTH_LIST, POOL_BY_NAME, VOLUME_CREATE, VOLUME_DELETE = 66, 84, 93, 94
LIST_ALL, ALL_STATS = 273, 344


def word(number):
    return struct.pack(">I", number)


def string(text):
    data = text.encode()
    return word(len(data)) + data + bytes(-len(data) % 4)


# Names, UUIDs and numbers of all domains, whatever their state; and of no domain in particular all groups of figures.
ALL_DOMAINS = word(1) + word(0)
EVERYTHING = word(0) + word(0) + word(0)


class Rpc:
    """A connection that is open. Raises Failed for an error of the server, OSError when there is none."""

    def __init__(self, path, timeout=120):
        self.serial = 0
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self.socket.settimeout(timeout)
            self.socket.connect(path)
            # As clients begin.
            self.call(AUTH_LIST)
            self.call(OPEN, word(1) + string("qemu:///system") + word(0))
        except BaseException:
            self.socket.close()
            raise

    def close(self):
        self.socket.close()

    def call(self, procedure, arguments=b""):
        """Payload of the answer."""
        self.serial += 1
        head = HEAD.pack(HEAD.size + len(arguments), REMOTE, 1, procedure, CALL, self.serial, 0)
        self.socket.sendall(head + arguments)
        while True:
            _, _, _, answered, kind, serial, status, payload = self._frame()
            if (kind, serial, answered) == (REPLY, self.serial, procedure):
                break  # nothing else is awaited: no event was asked for
        if status != 0:
            raise Failed(f"procedure {procedure}: {message(payload)}")
        return payload

    def timed(self, procedure, arguments=b""):
        """Milliseconds until the whole answer is there."""
        start = now()
        self.call(procedure, arguments)
        return now() - start

    def domains(self):
        """How many there are, in any state."""
        payload = self.call(LIST_ALL, ALL_DOMAINS)
        listed, said = struct.unpack(">I", payload[:4])[0], struct.unpack(">I", payload[-4:])[0]
        if listed != said:
            raise Failed(f"a list of {said} domains holds {listed}")
        return listed

    def with_stats(self):
        """How many domains have figures."""
        return struct.unpack(">I", self.call(ALL_STATS, EVERYTHING)[:4])[0]

    def domain(self, name):
        """A domain by its name, as arguments have it."""
        return self.call(BY_NAME, string(name))

    def runs(self, name):
        """Domains that run have a number."""
        return struct.unpack(">i", self.domain(name)[-4:])[0] != -1

    def _frame(self):
        head = self._take(HEAD.size)
        fields = HEAD.unpack(head)
        return *fields, self._take(fields[0] - HEAD.size)

    def _take(self, size):
        data = bytearray(size)
        view, have = memoryview(data), 0
        while have < size:
            got = self.socket.recv_into(view[have:])
            if got == 0:
                raise Failed("the server closed the connection")
            have += got
        return bytes(data)


def message(payload):
    """The text of a `remote_error`: number, part, and a text that may be absent."""
    if len(payload) < 16 or payload[8:12] != word(1):
        return "an error without a text"
    length = struct.unpack(">I", payload[12:16])[0]
    return payload[16 : 16 + length].decode(errors="replace")
