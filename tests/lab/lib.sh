# Shared by the suites of the lab: the checks of the end-to-end suites, and a guest to do them in. Sourced, not executed.
# `cargo xtask lab suite NAME` sets KARST_LAB and KARST_LAB_NAME, and removes the guest that a suite leaves.
. "$(dirname "${BASH_SOURCE[0]}")/../e2e/lib.sh"
target=${CARGO_TARGET_DIR:-$top/target}
images=$target/lab/guests
: "${KARST_LAB:?run this by: cargo xtask lab suite NAME}"

lab() { "$KARST_LAB" lab "$@"; }
# guest COMMAND…: runs it in the guest, as it is. shell TEXT: a line of shell there.
guest() { lab run --timeout "${patience:-600}" -- "$@" </dev/null; }
shell() { guest sh -c "$1"; }
# A guest whose QEMU has ended makes everything fail: the suite ends there. MADE is set once there is a guest.
section() {
    printf '%s [%ss]\n' "-- $*" "$SECONDS"
    if [ -n "${made:-}" ] && ! guest true; then
        failed=$((failed + 1))
        echo "FAILED the guest of the lab does not answer any more"
        finish
        exit 1
    fi
}
# must CHECK…: a check that everything after it stands on; the suite ends where it fails.
must() {
    local before=$failed
    "$@"
    [ "$failed" = "$before" ] || { finish; exit 1; }
}
boot_id() { guest cat /proc/sys/kernel/random/boot_id; }
# client ARGUMENT…: the real incus client of the guest's image against Karst, or karst itself where there is none.
client() { guest sh -c 'command -v incus >/dev/null || exec karst "$@"; INCUS_SOCKET=/var/lib/karst/unix.socket exec incus "$@"' client "$@"; }
# clients TEXT: a line of shell there in which incus is that client.
clients() { shell "export INCUS_SOCKET=/var/lib/karst/unix.socket; command -v incus >/dev/null || incus() { karst \"\$@\"; }; $1"; }
# until_there TEXT SECONDS LINE: the line of shell succeeds there within so many seconds. It asks in the guest, where asking is cheap.
until_there() {
    ok "$1" shell "i=0; until $3; do i=\$((i + 1)); [ \$i -lt $2 ] || { echo 'not within $2 s:'; $3; exit 1; }; sleep 1; done"
}
# complaints LISTED…: the daemon's WARN and ERROR of the guest's journal, in the form of the end-to-end suites' logs, but for the
# listed, for those of any machine and for those of killed daemons: a guest within a guest is slow, and its units are restarted.
complaints() {
    shell "journalctl -u karst -o cat --no-pager | grep -aE '\"level\":\"(WARN|ERROR)\"' || true" |
        jq -Rr 'fromjson? // {message: .} | . as $line | "\($line.target): \($line.message)" + (del(.timestamp, .level, .target, .message)
            | [to_entries[] | " \(.key)=\(.value | tostring | gsub("\n"; " "))"] | join(""))' |
        unlisted "${of_kills[@]}" "${of_the_lab[@]}" "$@"
}
# What the end of the machine, of its power or of the unit does to what runs just then: a step that asks a host which goes, or does
# not answer in time, is done again or undone; the host takes the network up again whose servers ended with the machine.
gone_or_late="($host_gone|[a-z_]+ did not end within its time .*)"
# A machine that is emulated twice may not be down in its time when the lab's guest restarts: then it is ended by force.
late='the guest did not shut down in time and runs on; force it, or look at its console'
of_the_lab=(
    "karst_engine::saga::runner: a step failed; undoing saga=[^ ]* name=\"?instance-power\"? step=\"?stop\"? error=$late context=.*"
    "karst_engine::compute::shutdown: does not stop that way instance=v1 way=Graceful error=$late"
    "karst_engine::saga::runner: a step failed; undoing saga=[^ ]* name=\"?instance-(create|power|delete|update)\"? step=[^ ]* error=$gone_or_late context=.*"
    "karst_engine::saga::runner: (a step|an undo) failed; trying again saga=[^ ]* step=[^ ]* error=$gone_or_late attempt=[0-9]+"
    "karst_engine::reconcile: a network is behind; trying again network=[^ ]* error=$gone_or_late"
    "karst_engine::reconcile: a network could not be brought up network=[^ ]* error=$gone_or_late context=.*"
    'karst_network: DHCP and DNS ended; starting them again bridge=.*'
)

# After a boot: what a busy machine may have been too slow for. The disk may come later than its mount waits for it, and udev
# gives up on modules (those that read what the daemon said meanwhile list the complaint).
settled() {
    must ok "the files of the lab are there" shell 'mountpoint -q /lab || mount /lab'
    shell 'modprobe kvm_amd 2>/dev/null || modprobe kvm_intel 2>/dev/null'
}
# machine VARIANT KIND… [-- OPTION…]: a guest of that variant with Karst installed as a stranger would, and images of these kinds
# as debian/12 (debian/12/vm; small, machine: as such). Everything else in a suite stands on it, so a failure ends the suite.
machine() {
    local variant=$1 kinds=() files=() kind alias
    shift
    while [ $# -gt 0 ] && [ "$1" != -- ]; do
        kinds+=("$1") files+=(--file "$images/$1")
        shift
    done
    [ $# = 0 ] || shift
    [ -x "$KARST_BIN/karst-guest-agent" ] || "$top/scripts/build-guest-agent" "$KARST_BIN" || exit 1
    "$here/../lab/guest-images" "$images" "${kinds[@]}" || { echo "the images of guests could not be made"; exit 1; }
    # KARST_LAB_REUSE, for who writes a suite: the guest that is there (cargo xtask lab up), which what came before has left clean.
    [ -n "${KARST_LAB_REUSE:-}" ] || lab up --variant "$variant" "${files[@]}" "$@" || exit 1
    made=1
    settled
    must ok "make install" shell 'rm -rf /root/karst && cp -a /lab/src /root/karst && cd /root/karst && KARST_BIN=/lab/bin make install'
    must until_there "the unit runs and the API answers" 120 'karst query /1.0'
    for kind in "${kinds[@]}"; do
        case $kind in container) alias=debian/12 ;; vm) alias=debian/12/vm ;; *) alias=$kind ;; esac
        ok "import the image ($kind)" shell "karst image import /lab/files/$kind/meta-* \$(ls /lab/files/$kind/* | grep -v -e meta- -e complete) --alias $alias"
    done
}
