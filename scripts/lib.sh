# Shared by the scripts: messages, privileges, the place of things. Sourced, not executed.
set -euo pipefail
top=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# Spelled one way, however it was given; links stay, because what is in /etc/karst is for the name /var/lib/karst.
KARST_DIR=$(realpath --canonicalize-missing --no-symlinks -- "${KARST_DIR:-/var/lib/karst}")
target=${CARGO_TARGET_DIR:-$top/target}
# What was made outside of any DIR, and which DIRs use it: the last of them that is purged takes it away.
register=/etc/karst/instances
# Where apt is told of the backports, in which the client of Incus is.
backports_list=/etc/apt/sources.list.d/karst-backports.sources

say() { printf '\033[1m==>\033[0m %s\n' "$*"; }
fail() { printf 'karst: %s\n' "$*" >&2; exit 1; }

# manual_pages PROGRAMS DIRECTORY: the manual pages of the programs in PROGRAMS, below DIRECTORY as share/man has them. They are
# what the programs say of themselves.
manual_pages() {
    local programs=$1 to=$2 number
    number=$(sed -n 's/^version = "\(.*\)"/\1/p' "$top/Cargo.toml" | head -n 1)
    mkdir -p "$to/man1" "$to/man8"
    env -u KARST_DIR -u KARST_PROJECT "$programs/karst" man "$to/man1"
    {
        printf '.TH KARSTD 8 "" "karst %s"\n.SH NAME\nkarstd \\- the daemon of Karst\n.SH SYNOPSIS\n.B karstd\n[options] [command]\n.SH DESCRIPTION\n.nf\n' "$number"
        env -u KARST_DIR COLUMNS=78 "$programs/karstd" --help | sed 's/\\/\\\\/g; s/^\([.'"'"']\)/\\\&\1/; s/-/\\-/g'
        printf '.fi\n.SH SEE ALSO\n.BR karst (1)\n'
    } >"$to/man8/karstd.8"
    gzip -9nf "$to"/man?/*
    chmod 0644 "$to"/man?/*
}

# Runs a command as root: directly, or through sudo.
as_root() {
    if [ "$(id -u)" = 0 ]; then "$@"
    elif command -v sudo >/dev/null; then sudo --preserve-env=KARST_DIR,KARST_BIN,KARST_LOG,KARST_LOG_FILE "$@"
    else fail "this needs root: run it as root or install sudo"
    fi
}

# Whoever has to give sudo a password gives it once, at the beginning, however long the rest takes: sudo forgets it sooner than
# a build ends. Four hours at most, and never longer than the script runs.
one_sudo() {
    [ "$(id -u)" != 0 ] && command -v sudo >/dev/null || return 0
    sudo -n true 2>/dev/null || sudo -v || fail "this needs root, and sudo does not give it"
    (
        trap 'kill ${nap:-} 2>/dev/null; exit 0' TERM
        for ((i = 0; i < 480; i++)); do
            sleep 30 &
            nap=$!
            wait "$nap"
            kill -0 $$ && sudo -n true || exit 0
        done
    ) </dev/null >/dev/null 2>&1 &
    # shellcheck disable=SC2064 # this process, not a later one
    trap "kill $! 2>/dev/null || true" EXIT
}

# Is there anything at $KARST_DIR? It may lie below a directory that only root may enter; whether that is so is seen without root.
dir_is_there() {
    local above=$KARST_DIR
    [ ! -d "$KARST_DIR" ] || return 0
    until [ -e "$above" ]; do above=$(dirname -- "$above"); done
    [ ! -x "$above" ] || return 1
    as_root test -d "$KARST_DIR"
}

# Process id of the launcher of $KARST_DIR, if it runs: the lock names it, and it has the lock open. Another process may have
# the number of one that is gone.
launcher_pid() {
    dir_is_there || return 1
    as_root bash -c '
        read -r pid <"$1/lock" || exit 1
        for fd in "/proc/${pid:-none}/fd/"*; do
            [ "$fd" -ef "$1/lock" ] && echo "$pid" && exit
        done
        exit 1
    ' launcher_pid "$KARST_DIR" 2>/dev/null
}

# Does any guest of $KARST_DIR run, whether a daemon is there or not? Its keeper says whose it is, and so does its control group.
guests_run() {
    dir_is_there || return 1
    as_root bash -c '
        read -r id <"$1/id" || exit 1
        for process in /proc/[0-9]*; do
            tr "\0" "\n" <"$process/cmdline" | grep -A 1 -x -e --daemon | grep -qxF "$id" && exit 0
        done
        find /sys/fs/cgroup -type f -path "*/karst-$id/*" -name cgroup.procs -exec cat {} + | grep -q .
    ' guests_run "$KARST_DIR" 2>/dev/null
}
no_guest_runs() { ! guests_run; }

# The daemon as the administrator's own commands do not set it up: neither a project of theirs nor a limitless wait.
karst() { as_root env KARST_DIR="$KARST_DIR" "$KARST_BIN/karst" --project default "$@"; }
karst_within() { as_root env KARST_DIR="$KARST_DIR" timeout --kill-after=5 "$1" "$KARST_BIN/karst" "${@:2}"; }
answers() { karst_within 10 query /1.0; }

# Starts the daemon in $KARST_DIR, in a session of its own: it outlives this terminal.
start_karst() {
    # With the data, which belongs to root whoever calls this: purge takes it away as well.
    local log=${KARST_LOG_FILE:-$KARST_DIR/karstd.log}
    need_passage
    say "Starting karstd in $KARST_DIR"
    as_root mkdir -p -m 0711 "$KARST_DIR"
    as_root bash -c 'exec setsid --fork "$1" --dir "$2" --log-file "$3" </dev/null >>"$3" 2>&1' start "$KARST_BIN/karstd" "$KARST_DIR" "$log"
    wait_for 60 answers || {
        as_root tail -n 20 "$log" >&2
        fail "karstd does not answer; its log is $log"
    }
}

# Is this the process of systemd's unit? Then systemd must end it, which would start again what is killed.
of_unit() { [ -d /run/systemd/system ] && [ "$(systemctl show --property=MainPID --value karst.service 2>/dev/null)" = "$1" ]; }
# Where the unit is that `make install` or the package put there, if it is.
unit_is_there() {
    local unit
    for unit in {/etc,/usr/lib,/lib}/systemd/system/karst.service; do
        [ ! -e "$unit" ] || { echo "$unit"; return; }
    done
    return 1
}
# It is gone, or nobody has reaped it yet.
gone() { ! [ -e "/proc/$1" ] || grep -q '^State:[[:space:]]*Z' "/proc/$1/status"; }

# end_launcher PROCESS SECONDS: ends it and with it the daemons, never a guest; by force when it has not ended so soon.
end_launcher() {
    if of_unit "$1"; then
        as_root systemctl stop karst.service
    else
        # The shell's own: /bin/kill is a package that a small system lacks.
        as_root bash -c 'kill -TERM "$1"' stop "$1" 2>/dev/null || true
    fi
    if ! wait_for "$2" gone "$1"; then
        say "It does not end by itself: killing it"
        # Whatever state they are in, its daemons end with it.
        as_root bash -c 'kill -KILL "$1"' stop "$1" 2>/dev/null || true
        wait_for 20 gone "$1" || fail "the launcher (process $1) cannot be killed"
    fi
}

# note LINE: writes it into the register, once.
note() {
    ! grep -qsxF -- "$1" "$register" || return 0
    as_root bash -c 'umask 022 && mkdir -p "${1%/*}" && printf "%s\n" "$2" >>"$1"' note "$register" "$1"
}
# The user of the control process; noted before it is made, so that it can go again.
need_user() {
    note "dir $KARST_DIR"
    getent passwd karst >/dev/null && return
    note "user karst"
    as_root useradd --system --home-dir /nonexistent --no-create-home --shell /usr/sbin/nologin karst
}
# The control process must get to $KARST_DIR: a home is closed to others on many systems. Said before anything is built or made.
need_passage() {
    local closed user=karst
    # Before it is made: like one who has no rights either.
    getent passwd karst >/dev/null || user=nobody
    closed=$(as_root bash -c '
        above=$1 closed=
        while [ "$above" != / ]; do
            above=$(dirname -- "$above")
            [ ! -d "$above" ] || setpriv --reuid "$2" --regid "$(id -g "$2")" --clear-groups test -x "$above" || closed=$above
        done
        echo "$closed"
    ' passage "$KARST_DIR" "$user")
    [ -z "$closed" ] || fail "$KARST_DIR lies below $closed, which the user karst of the control process cannot enter; let others pass through (chmod o+x $closed), or choose another KARST_DIR"
}
# left DIR: it is no instance any more. What was made for all goes with the last of them and with the installed programs; a user
# or a group that was there before stays.
left() {
    [ -e "$register" ] || return 0
    as_root bash -c '
        umask 022
        { grep -vxF -- "dir $2" "$1" || true; } >"$1.new"
        mv -f "$1.new" "$1"
        # Where the user was there before there is nothing to keep in mind.
        [ -s "$1" ] || { rm "$1" && rmdir "${1%/*}" 2>/dev/null || true; }
    ' left "$register" "$1"
    [ -e "$register" ] || return 0
    local others
    unit_is_there >/dev/null && return 0
    others=$(sed -n 's/^dir //p' "$register" | paste -sd ' ')
    # One that was started by hand has claimed its ids.
    if [ -z "$others" ] && [ -n "$(ls -A /run/karst/ids 2>/dev/null)" ]; then others="one that was started by hand"; fi
    if [ -n "$others" ]; then
        ! grep -qxF 'user karst' "$register" || say "The system user karst stays for other instances on this machine: $others"
        return 0
    fi
    if grep -qxF 'user karst' "$register" && getent passwd karst >/dev/null && ! as_root userdel karst; then
        say "The system user karst stays; see above"
        return 0
    fi
    if grep -qxF 'group karst-admin' "$register" && getent group karst-admin >/dev/null; then as_root groupdel karst-admin; fi
    as_root rm -f "$register"
    # The policy that somebody wrote stays.
    as_root rmdir "${register%/*}" 2>/dev/null || true
}

# Waits until "$@" succeeds, at most $1 seconds.
wait_for() {
    local limit=$1 start=$SECONDS
    shift
    until "$@" >/dev/null 2>&1; do
        [ $((SECONDS - start)) -lt "$limit" ] || return 1
        sleep 0.1
    done
}
