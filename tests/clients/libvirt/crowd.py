#!/usr/bin/env python3
"""A crowd of clients: each with a connection of its own, lists, stops and starts its own guest, all at once, while one sends garbage.

crowd.py URI SOCKET: as many as the server has guests, which all run, as they do after it.
"""

import os
import random
import socket
import sys
import threading
import time

import libvirt

GARBAGE = [
    b"\0" * 200,
    b"\xff" * 200,
    b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n",
    b"\0\0\0\x1b",
    b"\x02\0\0\1\0\0\0\0",
    b"\x02\0\0\0\x20\0\x80\x86\0\0\0\1\0\0\0\1\0\0\0\0\0\0\0\1\0\0\0\0",
    b"\0\0\0\x2c\x20\0\x80\x86\0\0\0\1\0\0\0\x42\0\0\0\0\0\0\0\1\0\0\0\0" + b"\xff" * 16,
]


def noise(path, over, sent):
    held = []
    while not over.is_set():
        one = socket.socket(socket.AF_UNIX)
        try:
            one.connect(path)
            one.sendall(random.choice([*GARBAGE, os.urandom(300)]))
        except OSError:
            # Cut off in the middle, which is the server's right.
            pass
        sent.append(1)
        held = [*held[-50:], one]
        time.sleep(0.001)


def main():
    uri, path = sys.argv[1:]
    names = libvirt.open(uri).listAllDomains()
    names = [domain.name() for domain in names]
    slowest, faults, over, sent = [], [], threading.Event(), []
    together = threading.Barrier(len(names))

    def one(name):
        try:
            connection = libvirt.open(uri)
            together.wait(120)
            began = time.monotonic()
            assert len(connection.listAllDomains()) == len(names), "others are there"
            own = connection.lookupByName(name)
            own.destroy()
            assert own.state()[0] == libvirt.VIR_DOMAIN_SHUTOFF, own.state()
            own.create()
            assert own.state()[0] == libvirt.VIR_DOMAIN_RUNNING, own.state()
            slowest.append(time.monotonic() - began)
            connection.close()
        except Exception as e:
            faults.append(f"{name}: {e!r}")

    bad = threading.Thread(target=noise, args=(path, over, sent))
    bad.start()
    clients = [threading.Thread(target=one, args=(name,)) for name in names]
    for client in clients:
        client.start()
    for client in clients:
        client.join()
    over.set()
    bad.join()
    assert not faults, faults[:5]
    assert len(sent) > len(GARBAGE)
    after = libvirt.open(uri)
    assert all(domain.isActive() for domain in after.listAllDomains())
    print(f"{len(names)} clients, the slowest {max(slowest):.2f} s; {len(sent)} times garbage")


main()
