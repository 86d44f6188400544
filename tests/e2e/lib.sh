# Shared by the end-to-end suites: an own instance of the platform, checks that count, and the log that must stay clean.
set -uo pipefail
# What clients say is matched in English.
export LC_ALL=C.UTF-8
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
top=$(cd "$here/../.." && pwd)
KARST_BIN=${KARST_BIN:-${CARGO_TARGET_DIR:-$top/target}/debug}
export PATH="$KARST_BIN:$PATH"
passed=0 failed=0

# ok TEXT COMMAND…: the command succeeds.
ok() {
    local text=$1 out
    shift
    if out=$("$@" 2>&1); then
        passed=$((passed + 1))
    else
        local code=$?
        failed=$((failed + 1))
        printf 'FAILED %s\n  %s\n' "$text" "$(printf '%s\n' "exit $code: $*" "$out" | head -n 12 | sed '2,$s/^/  /')"
    fi
}

# is TEXT EXPECTED COMMAND…: the command prints exactly this (trailing newlines apart).
is() {
    local text=$1 expected=$2 out
    shift 2
    out=$("$@" 2>&1)
    if [ "$out" = "$expected" ]; then
        passed=$((passed + 1))
    else
        failed=$((failed + 1))
        printf 'FAILED %s\n  %s\n  expected: %s\n  printed:  %s\n' "$text" "$*" "$expected" "$(printf '%s' "$out" | head -n 12)"
    fi
}

# like TEXT PATTERN COMMAND…: what the command prints, on either stream, matches the extended regular expression.
like() {
    local text=$1 pattern=$2 out
    shift 2
    out=$("$@" 2>&1)
    # No pipe: grep ends at the first match, and who still writes then would count as failed.
    if grep -qE -- "$pattern" <<<"$out"; then
        passed=$((passed + 1))
    else
        failed=$((failed + 1))
        printf 'FAILED %s\n  %s\n  no match for: %s\n  printed: %s\n' "$text" "$*" "$pattern" "$(printf '%s' "$out" | head -n 12)"
    fi
}

# code TEXT CODE COMMAND…: the command exits with this code.
code() {
    local text=$1 expected=$2 out
    shift 2
    out=$("$@" 2>&1)
    local got=$?
    if [ $got = "$expected" ]; then
        passed=$((passed + 1))
    else
        failed=$((failed + 1))
        printf 'FAILED %s\n  %s\n  exit code %s, expected %s\n  printed: %s\n' "$text" "$*" $got "$expected" "$(printf '%s' "$out" | head -n 12)"
    fi
}

# eventually TEXT SECONDS COMMAND…: the command succeeds within so many seconds on a machine that does nothing else; one that
# is slower, or busy, gets four times as many before that counts as never.
eventually() {
    local text=$1 limit=$(($2 * 4)) start=$SECONDS
    shift 2
    until "$@" >/dev/null 2>&1; do
        if [ $((SECONDS - start)) -ge "$limit" ]; then
            failed=$((failed + 1))
            printf 'FAILED %s (not within %s s)\n  %s\n  %s\n' "$text" "$limit" "$*" "$("$@" 2>&1 | head -n 12)"
            return 1
        fi
        sleep 0.1
    done
    passed=$((passed + 1))
}

# unused_port [COUNT]: ports of loopback that nobody has and nobody is given by chance: below those that the kernel draws.
unused_port() {
    python3 - "${1:-1}" <<'PY'
import random, socket, sys
held = []
for port in random.sample(range(10000, 30000), 500):
    one = socket.socket()
    try:
        one.bind(("0.0.0.0", port))
    except OSError:
        continue
    held.append(one)
    print(port)
    if len(held) == int(sys.argv[1]):
        break
PY
}

section() { printf '%s [%ss]\n' "-- $*" "$SECONDS"; }

# own_network SUITE ARGUMENT…: runs the suite again in a network namespace of its own. Its /sys shows that namespace, where
# liblxc looks for bridges; control groups stay where they are.
own_network() {
    if [ -z "${KARST_TEST_NETNS:-}" ]; then
        KARST_TEST_NETNS=1 exec unshare --net --mount "$@"
    fi
    local groups
    groups=$(mktemp -d)
    mount --rbind /sys/fs/cgroup "$groups" && mount -t sysfs sysfs /sys && mount --rbind "$groups" /sys/fs/cgroup || exit 1
    umount -l "$groups" && rmdir "$groups"
    ip link set lo up
}

# The user of the control process, which a suite that compares the machine before and after wants to be there before.
platform_user() {
    getent passwd karst >/dev/null || useradd --system --home-dir /nonexistent --no-create-home --shell /usr/sbin/nologin karst
}

# start_platform DIR: starts a launcher over it; its process id is in $launcher, its log in DIR.log.
start_platform() {
    export KARST_DIR=$1 INCUS_SOCKET=$1/unix.socket INCUS_CONF=$1.client LXD_DIR=$1 LXD_CONF=$1.client
    platform_user
    mkdir -p "$1" "$1.client"
    "$KARST_BIN/karstd" --dir "$1" </dev/null >>"$1.log" 2>&1 &
    launcher=$!
}

# debian_image container|vm: Debian's image of that kind, by its usual alias. KARST_TEST_IMAGES, for who writes a suite, is a
# directory of those that tests/lab/guest-images has made.
debian_image() {
    local alias=debian/12 made=${KARST_TEST_IMAGES:+$KARST_TEST_IMAGES/$1}
    [ "$1" = container ] || alias=debian/12/vm
    if [ -z "$made" ]; then
        karst image build debian/12 "--$1"
    else
        karst image import "$made"/meta-* "$(find "$made" -type f ! -name 'meta-*' ! -name complete)" --alias "$alias"
    fi
}

# busybox_image PREFIX: a small container image, made of the busybox at hand, as PREFIX.tar.xz; the same file each time.
busybox_image() {
    local root=$1/rootfs busybox path
    busybox=$(command -v busybox)
    mkdir -p "$root/bin" "$root/root" "$root/etc" "$root/dev" "$root/proc" "$root/sys" "$root/tmp" "$root/mnt" "$root/usr/bin" "$root/sbin" "$root/usr/sbin"
    cp "$busybox" "$root/bin/busybox"
    (cd "$root" && ln -s bin/busybox init &&
        for path in $("$busybox" --list-full); do [ -e "$path" ] || ln -s /bin/busybox "$path"; done
        printf '::sysinit:/bin/true\n::shutdown:/bin/true\n' >etc/inittab
        printf 'root:x:0:0:root:/root:/bin/sh\n' >etc/passwd
        printf 'root:x:0:\n' >etc/group)
    printf 'architecture: x86_64\ncreation_date: 1700000000\nproperties: {os: Busybox, release: one, description: Busybox, architecture: x86_64}\n' >"$1/metadata.yaml"
    tar -C "$1" --numeric-owner --owner 0 --group 0 --mtime @1700000000 --sort name -cJf "$1.tar.xz" metadata.yaml rootfs
}

# small_machine: prints the directory of the cached image of `small-machine.sh image`, in its two parts metadata and rootfs; made where
# it is missing, of packages that are fetched. It starts by SeaBIOS: security.csm=true.
small_machine() {
    local cache=${CARGO_TARGET_DIR:-$top/target}/test-cache image
    # As crates/agent-host/tests/real.rs has it.
    image=$cache/small-machine-2
    mkdir -p "$cache"
    (
        flock 9
        [ -e "$image" ] || { rm -rf "$image.making" && "$top/tests/small-machine.sh" image "$image.making" >&2 && mv "$image.making" "$image"; }
    ) 9>"$cache/small-machine-lock" && printf '%s\n' "$image"
}

# What a call of the host hears that does not answer yet, or ends meanwhile.
host_gone='the host process (ended while it worked on this|does not answer|closed the connection)'
# Complaints are listed as whole messages, with their target and those fields that decide; a quote around a field's value may
# be missing, as it is in the lab.
#
# Those of any machine: what one without KVM says of itself, and what a slow one makes of a start or an end, where control asks a
# host again that does not answer yet, and what is synced last may not be in time.
of_any_machine=(
    'karst_engine::reconcile: (the CPU|/dev/kvm) .*virtual machines are emulated and slow.*'
    'karst_engine::reconcile: QEMU is installed, but has not said yet what it is; it is asked again node=.*'
    'karst_agent_host::facts: QEMU does not say what it is; asking again later error=[^ ]* did not end within .*'
    "karst_engine::reconcile: the host does not say what it runs; trying again node=[^ ]* error=($host_gone|[a-z_]+ did not end within its time .*)"
    "karstd::platform: the default pool and network could not be made; trying again error=$host_gone context=.*"
    "karst_engine::audit: the audit log cannot be written; trying again error=$host_gone"
    'karstd::platform: the last requests are not in the audit log error=the host does not take what is to be audited'
    'karst_engine::compute::metrics: a host does not tell (its figures node=[^ ]*|the space of volumes) error=[a-z_]+ did not end within its time .*'
    'karst_agent_host::agent: new volumes are not known to be on disk yet'
    'karstd::launcher: did not end in time; killing it role="?(host|control)"? pid=[0-9]+'
)
# Those of a kill -9 of daemons, wherever it lands: the launcher's, who was connected, and who asked the host in vain meanwhile.
# A step that has no return is done again, and so is what undoes one; a step that is undone is listed with its saga, by the
# suite that kills in the middle of it.
of_kills=(
    'karstd::launcher: ended by itself; starting it again role="?(host|control)"? pid=[0-9]+ how="?signal 9"? lived_ms=[0-9]+'
    'karst_agent::client: the connection to the host process broke error=(unexpected end of file|(Broken pipe|Connection reset by peer) \(os error [0-9]+\))'
    'karst_agent::server: agent connection (without a proper hello|broken) error=(unexpected end of file|(Broken pipe|Connection reset by peer) \(os error [0-9]+\))'
    "karst_engine::reconcile: a network is behind; trying again network=[^ ]* error=$host_gone"
    "karst_engine::reconcile: a network could not be brought up network=[^ ]* error=$host_gone context=.*"
    "karst_engine::firewall: the network's rules are behind; its reconciler tries again network=[^ ]* error=$host_gone"
    "karst_engine::compute::metrics: a host does not tell (its figures node=[^ ]*|the space of volumes) error=$host_gone"
    "karst_engine::compute::inside: a host does not tell what its machines did node=[^ ]* error=$host_gone"
    "karst_engine::saga::runner: (a step|an undo) failed; trying again saga=[^ ]* step=[^ ]* error=$host_gone attempt=[0-9]+"
    'karst_vm_qemu::driver: QEMU of an adopted guest does not answer instance=[^ ]* error=.*'
)
# undone SAGA STEP ERROR: the message of a step that was undone; all three are patterns.
undone() { printf '%s' "karst_engine::saga::runner: a step failed; undoing saga=[^ ]* name=\"?$1\"? step=\"?$2\"? error=$3 context=.*"; }

# unlisted LISTED…: of complaints without their time and level those that are none of any machine's and not listed.
unlisted() { grep -avxE -f <(printf '%s\n' "${of_any_machine[@]}" "$@") | head -n 20; }

# unlisted_complaints LOG LISTED…: the same of a log's lines of level WARN or ERROR.
unlisted_complaints() {
    local log=$1
    shift
    sed -nE 's/^[^ ]+ +(WARN|ERROR) +//p' "$log" | unlisted "$@"
}

# tiny_image FILE: a unified image of a container, with a static busybox for init and tools.
tiny_image() {
    local tree
    tree=$(mktemp -d)
    mkdir -p "$tree"/rootfs/{bin,sbin,etc,proc,sys,dev,run,tmp,root,var}
    cp "$(command -v busybox)" "$tree/rootfs/bin/busybox"
    local applet
    for applet in sh ls cat sleep mount echo init id stat touch ps poweroff reboot halt true hostname chmod ln tr dd mkdir rm sync ip; do
        ln -s busybox "$tree/rootfs/bin/$applet"
    done
    ln -s ../bin/busybox "$tree/rootfs/sbin/init"
    printf '::sysinit:/bin/true\n::respawn:/bin/sleep 100000\n::shutdown:/bin/true\n' >"$tree/rootfs/etc/inittab"
    echo 'root:x:0:0:root:/root:/bin/sh' >"$tree/rootfs/etc/passwd"
    echo 'root:x:0:' >"$tree/rootfs/etc/group"
    printf 'architecture: x86_64\ncreation_date: 1700000000\nproperties: {os: busybox, description: tiny}\n' >"$tree/metadata.yaml"
    tar -C "$tree" --owner=0 --group=0 -czf "$1" metadata.yaml rootfs
    rm -rf "$tree"
}

finish() {
    printf '%s passed, %s failed\n' "$passed" "$failed"
    [ "$failed" = 0 ]
}
