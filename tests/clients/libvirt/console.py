#!/usr/bin/env python3
"""Types a line into the shell on the serial console of a domain, by `virsh console`, and prints what the line printed.

console.py URI DOMAIN LINE
"""

import os
import pty
import select
import sys
import time

PATIENCE = 230.0


def main():
    uri, domain, line = sys.argv[1:]
    pid, terminal = pty.fork()
    if pid == 0:
        os.execvp("virsh", ["virsh", "-q", "-c", uri, "console", domain, "--force"])
    # Marks of this line alone: one that was typed before and came late is no answer to it.
    mark = os.urandom(4).hex()
    typed = f"echo '<''<{mark}'; {line}; echo '>''>{mark}'\n".encode()
    first, last = f"<<{mark}".encode(), f">>{mark}".encode()
    seen, end, asked = b"", time.monotonic() + PATIENCE, float("-inf")
    while time.monotonic() < end and last not in seen.partition(first)[2]:
        # What is typed before somebody reads it may be lost.
        if time.monotonic() - asked > 5 and first not in seen:
            os.write(terminal, b"\n" + typed)
            asked = time.monotonic()
        if select.select([terminal], [], [], 1)[0]:
            try:
                seen += os.read(terminal, 4096)
            except OSError:
                break
    try:
        os.write(terminal, b"\x1d")
    except OSError:
        pass
    if last not in seen.partition(first)[2]:
        sys.exit(repr(seen))
    print(seen.split(first)[1].split(last)[0].decode(errors="replace").replace("\r", "").strip())


main()
