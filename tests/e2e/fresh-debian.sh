# A Debian 12 on which nothing of what Karst needs is installed, with a user anna who has sudo and a clone of this tree: a root file
# system of its own with processes and mounts of its own; network and control groups are the host's. Sourced after lib.sh by
# suites that do what a stranger does.
work=$(mktemp -d /var/tmp/karst-run.XXXXXX)
root=$work/root
first=
cleanup() {
    [ -z "$first" ] || as_user 'cd karst && KARST_BIN=$(ls -d target/release 2>/dev/null || echo /programs) make purge' >/dev/null 2>&1
    [ -z "$first" ] || kill -KILL "$first" 2>/dev/null
    [ -z "$first" ] || wait "$first" 2>/dev/null
    rm -rf --one-file-system "$work"
}
trap cleanup EXIT

# Its first process: it reaps what nobody else does. BINDS are places of the host that it has too, read-only: "FROM:TO …".
init() {
    mount --make-rprivate / && mount --bind "$root" "$root" && mount -t proc proc "$root/proc" &&
        mount --rbind /sys "$root/sys" && mount --rbind /dev "$root/dev" && mount -t tmpfs -o mode=755 tmpfs "$root/run" || exit 1
    local bind to
    for bind in $BINDS; do
        to=$root${bind#*:}
        mkdir -p "$to" && mount --bind "${bind%%:*}" "$to" && mount -o remount,bind,ro "$to" || exit 1
    done
    cd "$root" && mkdir -p before && pivot_root . before && cd / && umount -l /before && rmdir /before || exit 1
    touch /run/ready
    trap 'exit 0' TERM
    while :; do
        sleep 1 &
        wait $!
    done
}
inside() { nsenter --target "$inner" --mount --pid --root env -i "$@"; }
# The words before a line of anna's shell; ANNA is what else is in her environment.
anna=(HOME=/home/anna TERM=dumb PATH=/usr/local/bin:/usr/bin:/bin)
as_user() { inside "${anna[@]}" KARST_DIR="${karst_dir:-/var/lib/karst}" setpriv --reuid anna --regid anna --init-groups bash -c "cd && $1" </dev/null; }
# on_terminal STEP… -- LINE: on a terminal of her own, where she types (terminal.py).
on_terminal() {
    local steps=()
    while [ "$1" != -- ]; do
        steps+=("$1")
        shift
    done
    TERMINAL_PATIENCE=3600 python3 "$here/terminal.py" 100x40 "${steps[@]}" -- nsenter --target "$inner" --mount --pid --root \
        env -i "${anna[@]}" setpriv --reuid anna --regid anna --init-groups bash -c "cd && $2"
}
as_root() { inside HOME=/root PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin KARST_DIR=/var/lib/karst bash -c "$1" </dev/null; }
# processes NAME…: of that Debian, by these names; looked for from here, because it has no procps.
processes() {
    local name
    for name in "$@"; do pgrep --ns "$inner" --nslist pid -x "$name"; done
}

# fresh_debian BINDS: makes it and starts it; the suite ends where that fails.
fresh_debian() {
    local sources mirror suite
    sources=$(mktemp -p "$work")
    mirror=$(cat /etc/apt/sources.list.d/debian.sources /etc/apt/sources.list 2>/dev/null |
        awk '$1 == "URIs:" { print $2; exit } $1 == "deb" { print ($2 ~ /^\[/) ? $3 : $2; exit }')
    for suite in "$mirror bookworm" "$mirror bookworm-updates" "$mirror-security bookworm-security"; do
        echo "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] $suite main" >>"$sources"
    done
    # By way of its input the list becomes sources.list, where a Debian that was installed has it.
    ok "it is made" mmdebstrap --quiet --variant=minbase --include=make,git,sudo,debian-archive-keyring,ca-certificates bookworm "$root" - <"$sources"
    chroot "$root" useradd --create-home --shell /bin/bash anna
    echo 'anna ALL=(ALL) NOPASSWD: ALL' >"$root/etc/sudoers.d/anna"
    cp /etc/resolv.conf "$root/etc/resolv.conf"
    echo "127.0.0.1 localhost $(hostname)" >"$root/etc/hosts"
    ok "a clone" git clone --quiet --no-hardlinks "$top" "$root/home/anna/karst"
    # What has been changed here and not been committed yet counts too.
    git -C "$top" diff --binary HEAD | git -C "$root/home/anna/karst" apply --allow-empty
    git -C "$top" ls-files --others --exclude-standard -z | tar -C "$top" --null -cf - -T - | tar -C "$root/home/anna/karst" -xf -
    chroot "$root" chown -R anna: /home/anna/karst
    local tool
    for tool in qemu-system-x86_64 lxc-start dnsmasq nft mmdebstrap zstd cargo incus; do
        is "no $tool" "" chroot "$root" sh -c "command -v $tool"
    done
    # Every path of it, and how that was when the last package had been installed: from there on nothing but Karst adds to it.
    printf '%s\n' '#!/bin/sh' 'find / /run /dev/shm -xdev \( -path /proc -o -path /sys -o -path /dev \) -prune -o -print | sort -u' >"$root/root/paths"
    printf '%s\n' '#!/bin/sh' '[ -e /var/lib/karst ] || /root/paths >/root/paths.before' >"$root/root/installed"
    chmod 0755 "$root/root/paths" "$root/root/installed"
    echo 'DPkg::Post-Invoke { "/root/installed"; };' >"$root/etc/apt/apt.conf.d/99karst-test"
    export -f init
    export root BINDS=$1
    unshare --mount --pid --fork --kill-child bash -c init &
    first=$!
    inner() { inner=$(pgrep -P "$first" | head -n 1) && [ -n "$inner" ] && nsenter --target "$inner" --mount --root test -e /run/ready; }
    eventually "it runs" 20 inner || { finish; exit 1; }
    before=$("$here/traces" /var/lib/karst)
}
# What is in its file systems beside what was there and what packages, shells and logs of Debian itself leave.
new_paths() {
    as_root '/root/paths' | comm -13 "$root/root/paths.before" - |
        grep -vE '^/(root/paths\.before|home/anna|var/(log|cache)/|var/lib/(apt|dpkg)/|run/(sudo|lock$)|etc/[a-z]+-$)'
}
# as_was TEXT: nothing of Karst is on the machine, and nothing else that was not there before.
as_was() {
    is "$1: no process is left" "" processes karstd karst-keeper qemu-system-x86 lxc-start dnsmasq
    is "$1: no file is left, wherever" "" new_paths
    is "$1: no user and no group" "" as_root 'getent passwd karst; getent group karst karst-admin'
    is "$1: no mount is left" "" as_root "awk '{ print \$5 }' /proc/self/mountinfo | grep karst"
    is "$1: nothing is on the machine that was not there before" "" comm -13 <(printf '%s\n' "$before") <("$here/traces" /var/lib/karst)
}
