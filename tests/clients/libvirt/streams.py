#!/usr/bin/env python3
"""Streams of python3-libvirt in all the ways that there are: bytes that are sent and received, holes, by callbacks, by the event
loop without waiting, given up in the middle, and many at once over one connection.

streams.py URI: does it with volumes of the pool `default` and a machine of its own, and leaves nothing.
"""

import os
import sys
import threading

import libvirt

SIZE = 8 << 20
BYTES = bytes(i * 7 % 251 for i in range(1 << 20))


def volume(connection, name):
    pool = connection.storagePoolLookupByName("default")
    return pool.createXML(f"<volume><name>{name}</name><capacity>{SIZE}</capacity></volume>")


def upload(connection, of, data, offset=0):
    stream = connection.newStream()
    of.upload(stream, offset, len(data))
    rest = memoryview(data)
    while rest:
        rest = rest[stream.send(bytes(rest[:50_000])) :]
    stream.finish()


def download(connection, of, offset, length):
    stream = connection.newStream()
    of.download(stream, offset, length)
    came = []
    stream.recvAll(lambda _stream, data, _opaque: came.append(data) or len(data), None)
    stream.finish()
    return b"".join(came)


def holes(connection, of):
    """A file with holes goes up, comes down with them, and is the same."""
    pieces = [(0, b"first"), (3 << 20, b"middle" * 1000), (SIZE - 4, b"last")]
    expected = bytearray(SIZE)
    for at, data in pieces:
        expected[at : at + len(data)] = data
    stream = connection.newStream()
    of.upload(stream, 0, SIZE, libvirt.VIR_STORAGE_VOL_UPLOAD_SPARSE_STREAM)
    at = 0
    for begin, data in pieces:
        if begin > at:
            stream.sendHole(begin - at)
        at = begin + len(data)
        while data:
            data = data[stream.send(data) :]
    stream.finish()
    assert download(connection, of, 0, 0) == bytes(expected), "what was sparse is something else"
    stream = connection.newStream()
    of.download(stream, 0, 0, libvirt.VIR_STORAGE_VOL_DOWNLOAD_SPARSE_STREAM)
    came, skipped = bytearray(), 0
    while True:
        piece = stream.recvFlags(65_536, libvirt.VIR_STREAM_RECV_STOP_AT_HOLE)
        if piece == -3:
            hole = stream.recvHole()
            skipped += hole
            came.extend(bytes(hole))
        elif not piece:
            break
        else:
            came.extend(piece)
    stream.finish()
    came.extend(bytes(SIZE - len(came)))
    assert bytes(came) == bytes(expected), "what came with holes is something else"
    return skipped


def without_waiting(connection, of):
    """By the event loop: what is there is taken when it is told of."""
    done, came = threading.Event(), []

    def told(stream, events, _opaque):
        if events & (libvirt.VIR_STREAM_EVENT_ERROR | libvirt.VIR_STREAM_EVENT_HANGUP):
            done.set()
            return
        piece = stream.recv(65_536)
        if piece == -2:
            return
        if not piece:
            stream.eventRemoveCallback()
            stream.finish()
            done.set()
            return
        came.append(piece)

    stream = connection.newStream(libvirt.VIR_STREAM_NONBLOCK)
    of.download(stream, 0, len(BYTES))
    stream.eventAddCallback(libvirt.VIR_STREAM_EVENT_READABLE | libvirt.VIR_STREAM_EVENT_ERROR | libvirt.VIR_STREAM_EVENT_HANGUP, told, None)
    assert done.wait(60), "the stream does not end"
    assert b"".join(came) == BYTES, f"{sum(map(len, came))} bytes"


def given_up(connection, of):
    before = download(connection, of, 0, 4096)
    stream = connection.newStream()
    of.download(stream, 0, 0)
    stream.recv(1000)
    stream.abort()
    stream = connection.newStream()
    of.upload(stream, 1 << 20, 1 << 20)
    stream.send(b"x" * 1000)
    stream.abort()
    # The connection goes on, and so does the volume.
    assert download(connection, of, 0, 4096) == before
    stream = connection.newStream()
    try:
        of.download(stream, SIZE + 1, 10)
        stream.recv(10)
        raise AssertionError("a download from beyond the end")
    except libvirt.libvirtError as e:
        assert "beyond" in str(e), e


def at_once(connection):
    """Twelve uploads and downloads over one connection."""
    faults = []

    def one(number):
        try:
            own = volume(connection, f"stream{number}")
            data = bytes([number + 1]) * 300_000 + os.urandom(1000)
            upload(connection, own, data, number * 512)
            assert download(connection, own, number * 512, len(data)) == data, number
            own.delete()
        except Exception as e:
            faults.append(repr(e))

    threads = [threading.Thread(target=one, args=(n,)) for n in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not faults, faults


def screen(connection):
    domain = connection.createXML(
        "<domain type='qemu'><name>streams</name><memory unit='MiB'>128</memory><vcpu>1</vcpu>"
        "<os><type machine='q35'>hvm</type></os><devices><video><model type='vga'/></video></devices></domain>"
    )
    stream = connection.newStream()
    kind = domain.screenshot(stream, 0)
    came = []
    stream.recvAll(lambda _stream, data, _opaque: came.append(data) or len(data), None)
    stream.finish()
    domain.destroy()
    assert kind.startswith("image/") and b"".join(came), kind


def main():
    libvirt.virEventRegisterDefaultImpl()

    def loop():
        while True:
            libvirt.virEventRunDefaultImpl()

    threading.Thread(target=loop, daemon=True).start()
    connection = libvirt.open(sys.argv[1])
    one = volume(connection, "streams")
    upload(connection, one, BYTES)
    assert download(connection, one, 0, len(BYTES)) == BYTES
    without_waiting(connection, one)
    given_up(connection, one)
    one.delete()
    two = volume(connection, "holes")
    skipped = holes(connection, two)
    two.delete()
    at_once(connection)
    screen(connection)
    print(f"whole, {skipped} bytes of holes")


main()
