"""Runs pylxd's own integration tests, as they are, against the server of LXD_DIR, and compares with the named list.

The tests know a server by `Client()` (the unix socket) and by https://127.0.0.1:8443/. Over HTTPS the first is given the
address and a trusted certificate; nothing else of the tests is changed. Each test that starts as a stranger (`TestClient`)
has a fresh certificate and a fresh token.

The list holds a line for each test: `pass NAME`; `skip NAME REASON` where the test cannot run against an Incus server of one
machine; `open NAME REASON` where it has to pass one day and does not yet. Whatever differs from it fails, in either direction:
an open one that passes too, so that it is made a `pass`.
"""

import argparse
import os
import subprocess
import sys
import unittest


def certificate(directory, name):
    """A self-signed client certificate; answers its file and its key's."""
    os.makedirs(directory, exist_ok=True)
    crt, key = os.path.join(directory, "client.crt"), os.path.join(directory, "client.key")
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:secp384r1", "-nodes", "-days", "2",
         "-subj", f"/CN={name}", "-keyout", key, "-out", crt],
        check=True, capture_output=True,
    )  # fmt: skip
    return crt, key


def incus(*arguments):
    return subprocess.run(["incus", *arguments], check=True, capture_output=True, text=True).stdout


def expectations(path):
    wanted = {}
    with open(path) as file:
        for line in file:
            words = line.split(None, 2)
            if not words or words[0].startswith("#"):
                continue
            kind, name, *reason = words
            if kind not in ("pass", "skip", "open") or (kind == "pass") == bool(reason):
                sys.exit(f"{path}: {line!r}: `pass NAME`, `skip NAME REASON` or `open NAME REASON`")
            wanted[name] = kind
    return wanted


class Result(unittest.TextTestResult):
    """Remembers what became of each test, and gives strangers what they need."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.ended = {}
        self.stranger = None

    def startTest(self, test):
        super().startTest(test)
        if ".TestClient." in test.id():
            self.stranger(test.id().rpartition(".")[2])

    def end(self, test, how):
        # Of several ends (a test and its clean-up) a bad one counts.
        if self.ended.get(test.id()) not in ("fail", "error"):
            self.ended[test.id()] = how

    def addSuccess(self, test):
        super().addSuccess(test)
        self.end(test, "pass")

    def addError(self, test, err):
        super().addError(test, err)
        self.ended[test.id()] = "error"

    def addFailure(self, test, err):
        super().addFailure(test, err)
        self.ended[test.id()] = "fail"

    def addSkip(self, test, reason):
        super().addSkip(test, reason)
        self.end(test, "skip")


def flat(suite):
    for item in suite:
        if isinstance(item, unittest.TestSuite):
            yield from flat(item)
        else:
            yield item


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--transport", choices=("unix", "https"), required=True)
    parser.add_argument("--sources", required=True)
    parser.add_argument("--expected", required=True)
    parser.add_argument("--work", required=True)
    parser.add_argument("only", nargs="*", help="words; a test runs when its name has one of them")
    arguments = parser.parse_args()
    os.makedirs(arguments.work, exist_ok=True)

    # Where pylxd looks for its certificate and the server's: below the home directory, read when it is imported. Of the
    # proxy's and authorities' variables that somebody's shell may have set, the tests know nothing.
    os.environ["HOME"] = arguments.work
    for name in ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "HTTPS_PROXY", "https_proxy"):
        os.environ.pop(name, None)
    conf = os.path.join(arguments.work, ".config", "lxc", "")
    os.makedirs(os.path.join(conf, "servercerts"))
    with open(os.path.join(conf, "servercerts", "127.0.0.1.crt"), "w") as file:
        file.write(next_certificate())
    certificate(conf, "stranger")
    sys.path.append(arguments.sources)  # the package itself is the installed one
    import integration.testing  # noqa: E402
    import pylxd  # noqa: E402

    if pylxd.client.CERTS_PATH != conf:
        sys.exit(f"pylxd looks for its certificates in {pylxd.client.CERTS_PATH}")
    print(f"pylxd of {os.path.dirname(pylxd.__file__)}")
    if arguments.transport == "https":
        trusted = certificate(os.path.join(arguments.work, "trusted"), "administrator")
        incus("config", "trust", "add-certificate", trusted[0], "--name", f"pylxd-{arguments.transport}")
        plain = integration.testing.Client
        integration.testing.Client = lambda: plain("https://127.0.0.1:8443", cert=trusted)

    def stranger(name):
        certificate(conf, name)
        os.environ["LXD_TOKEN"] = incus("config", "trust", "add", f"{arguments.transport}-{name}", "--quiet").split()[-1]

    wanted = expectations(arguments.expected)
    tests = [t for t in flat(unittest.defaultTestLoader.discover(arguments.sources + "/integration", top_level_dir=arguments.sources))]
    if arguments.only:
        tests = [t for t in tests if any(word in t.id() for word in arguments.only)]
        wanted = {n: k for n, k in wanted.items() if any(word in n for word in arguments.only)}
    result = Result(unittest.runner._WritelnDecorator(sys.stderr), False, 1)
    result.stranger = stranger
    unittest.TestSuite(tests).run(result)
    result.printErrors()

    wrong = []
    for name in sorted(set(wanted) | set(result.ended)):
        want, got = wanted.get(name, "nothing: it is not listed"), result.ended.get(name, "nothing: it did not run")
        if want != got and not (want == "open" and got in ("fail", "error")):
            wrong.append(f"{name}: expected {want}, got {got}")
    passed = sum(1 for k in result.ended.values() if k == "pass")
    print(f"{passed} of {len(tests)} passed; as listed: {len(tests) - len(wrong)}")
    print("\n".join(wrong))
    sys.exit(1 if wrong or not passed else 0)


def next_certificate():
    import json

    return json.loads(incus("query", "/1.0"))["environment"]["certificate"]


if __name__ == "__main__":
    main()
