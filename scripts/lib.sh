# Shared by the scripts: messages, privileges, the place of things. Sourced, not executed.
set -euo pipefail
top=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
KARST_DIR=${KARST_DIR:-/var/lib/karst}
target=${CARGO_TARGET_DIR:-$top/target}

say() { printf '\033[1m==>\033[0m %s\n' "$*"; }
fail() { printf 'karst: %s\n' "$*" >&2; exit 1; }

# Runs a command as root: directly, or through sudo.
as_root() {
    if [ "$(id -u)" = 0 ]; then "$@"
    elif command -v sudo >/dev/null; then sudo --preserve-env=KARST_DIR,KARST_BIN,KARST_LOG "$@"
    else fail "this needs root: run it as root or install sudo"
    fi
}

# Process id of the launcher of $KARST_DIR, if it runs.
launcher_pid() {
    local pid
    # The lock is root's, like the launcher.
    [ -d "$KARST_DIR" ] || return 1
    pid=$(as_root cat "$KARST_DIR/lock" 2>/dev/null) || return 1
    [ -n "$pid" ] && [ -r "/proc/$pid/cmdline" ] || return 1
    tr '\0' '\n' <"/proc/$pid/cmdline" | grep -qxF -- "$KARST_DIR" || return 1
    echo "$pid"
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
