"""Runs a client on a real terminal and does something meanwhile.

terminal.py COLUMNSxROWS STEP... -- COMMAND...

Steps, one after the other:
  send TEXT             types it (\\x01 and the like are understood)
  size COLUMNSxROWS     gives the terminal another size
  see REGEX             waits until the client has written what matches, at most 120 s
  until REGEX COMMAND   runs a shell command again and again until it prints what matches, at most 120 s

Then waits for the end of the client, at most 120 s. TERMINAL_PATIENCE is another number of seconds. Prints what the client wrote; exits with its code, 99 when a step or
the end did not come.
"""
import fcntl, os, pty, re, select, signal, struct, subprocess, sys, termios, time

PATIENCE = int(os.environ.get("TERMINAL_PATIENCE", 120))
at = sys.argv.index("--")
first, steps, command = sys.argv[1], sys.argv[2:at], sys.argv[at + 1 :]


def size(fd, text):
    columns, rows = (int(n) for n in text.split("x"))
    fcntl.ioctl(fd, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))


pid, terminal = pty.fork()
if pid == 0:
    # The size is there before the client asks for it.
    size(0, first)
    os.execvp(command[0], command)

written = b""


def look(seconds):
    """Reads what the client writes for so long; False when it has ended."""
    global written
    until = time.monotonic() + seconds
    while (left := until - time.monotonic()) > 0:
        if terminal in select.select([terminal], [], [], left)[0]:
            try:
                data = os.read(terminal, 65536)
            except OSError:
                return False
            if not data:
                return False
            written += data
    return True


def end(code, why=""):
    sys.stdout.write(written.decode(errors="replace"))
    if why:
        print("\n" + why)
    sys.exit(code)


def give_up(why):
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    end(99, why)


for step in steps:
    word, _, rest = step.partition(" ")
    if word == "send":
        os.write(terminal, rest.encode().decode("unicode_escape").encode("latin-1"))
    elif word == "size":
        size(terminal, rest)
    elif word == "see":
        limit = time.monotonic() + PATIENCE
        while not re.search(rest, written.decode(errors="replace")):
            if not look(0.1) or time.monotonic() > limit:
                give_up(f"{step}: not seen")
    elif word == "until":
        regex, _, shell = rest.partition(" ")
        limit = time.monotonic() + PATIENCE
        while True:
            look(0.1)
            out = subprocess.run(["sh", "-c", shell], capture_output=True, stdin=subprocess.DEVNULL, text=True)
            text = out.stdout + out.stderr
            if re.search(regex, text):
                break
            if time.monotonic() > limit:
                give_up(f"{step}: printed {text!r}")
    else:
        give_up(f"no such step: {step}")

limit = time.monotonic() + PATIENCE
while look(0.2):
    if time.monotonic() > limit:
        give_up("the client does not end")
end(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
