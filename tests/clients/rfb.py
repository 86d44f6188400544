"""A viewer's part of RFB (3.8), the protocol of VNC, as far as looking at a screen needs it. A stream is a socket, or what has its
`recv`, `sendall` and `settimeout`."""

import struct
import subprocess


def exactly(stream, n):
    data = b""
    while len(data) < n:
        more = stream.recv(n - len(data))
        assert more, "the screen ended"
        data += more
    return data


def sealed(password, challenge):
    """RFB's answer to a challenge: DES, the bits of each byte of the key the other way round."""
    key = password.encode()[:8].ljust(8, b"\0")
    key = bytes(int(f"{byte:08b}"[::-1], 2) for byte in key)
    command = ["openssl", "enc", "-des-ecb", "-K", key.hex(), "-nopad", "-provider", "legacy", "-provider", "default"]
    return subprocess.run(command, input=challenge, stdout=subprocess.PIPE, check=True).stdout


def enter(stream, password):
    """Goes through the greeting; answers whether one is let in."""
    stream.settimeout(30)
    assert exactly(stream, 12) == b"RFB 003.008\n"
    stream.sendall(b"RFB 003.008\n")
    kinds = exactly(stream, exactly(stream, 1)[0])
    if password is None:
        assert kinds == b"\x01", kinds
        stream.sendall(b"\x01")
    else:
        assert kinds == b"\x02", kinds
        stream.sendall(b"\x02")
        stream.sendall(sealed(password, exactly(stream, 16)))
    return exactly(stream, 4) == b"\0\0\0\0"


def look(stream, password=None):
    assert enter(stream, password)
    stream.sendall(b"\x01")
    width, height = struct.unpack(">HH", exactly(stream, 4))
    assert width >= 320 and height >= 200, (width, height)
    exactly(stream, 16)
    exactly(stream, struct.unpack(">I", exactly(stream, 4))[0])
    return width, height
