# Karst on another release than Debian 12, as far as can be known here: installed as a stranger would, a container and a virtual
# machine launched, a restart of daemon and machine, purge. Sourced by a suite per release, which says $variant.
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

section "the machine ($variant), and make install"
machine "$variant" container small
is "control groups are pure v2" "cgroup2fs" guest stat -f -c %T /sys/fs/cgroup
is "the unit is enabled" "enabled" guest systemctl is-enabled karst
like "the host's state names LXC" 'lxc: [56]' guest karst host info
shell '. /etc/os-release; echo "$PRETTY_NAME, Linux $(uname -r), $(qemu-system-x86_64 --version | head -n 1), LXC $(lxc-start --version)"'

section "container"
ok "launch" guest karst launch debian/12 c1
until_there "it gets an address" 240 'karst list c1 --format csv --columns 4 | grep -q "[0-9]"'
is "systemd is its init" "systemd" guest karst exec c1 -- cat /proc/1/comm
is "no unit of it has failed" "0" shell 'karst exec c1 -- systemctl --failed --no-legend | wc -l'
like "AppArmor confines it" '^lxc-karst-[0-9a-f]+ \(enforce\)$' guest karst exec c1 -- cat /proc/self/attr/current
until_there "it has the way out by its bridge" 60 'karst exec c1 -- ip route | grep -q "^default"'
ok "a limit" guest karst config set c1 limits.memory=128MiB
code "more is not had" 137 guest karst exec c1 -- perl -e 'vec($x, 300000000, 8) = 1'

section "virtual machine"
ok "launch" guest karst launch small v1 --vm -c limits.memory=256MiB -c limits.cpu=1 -c security.csm=true
like "its QEMU uses the kernel's KVM" 'accel[ =]kvm' shell 'pgrep -a qemu-system'
up="karst console v1 --show-log | grep -q 'small linux is up'"
until_there "it runs" 300 "$up"

section "the daemon restarts, then the machine"
ok "systemctl restart" guest systemctl restart karst
until_there "both run on" 120 'karst exec c1 -- true && karst list v1 --format csv --columns s | grep -qx RUNNING'
id=$(boot_id)
shell 'systemctl reboot' >/dev/null 2>&1
must ok "it comes back" lab await-reboot "$id" --timeout 600
settled
until_there "what ran runs again" 300 'karst exec c1 -- true'
until_there "the machine too" 300 "$up"
is "nothing leaks" "[]" shell 'karst query /1.0/karst/check | jq -c .leaks'
is "no complaint of the daemon that is not listed" "" complaints

section "make purge"
ok "delete" guest karst delete --force c1 v1
ok "uninstall" shell 'cd /root/karst && make uninstall'
ok "purge" shell 'cd /root/karst && KARST_BIN=/lab/bin make purge'
is "nothing of it is left" "" shell 'ls -d /sys/fs/cgroup/karst-* /var/lib/karst /usr/local/lib/karst /run/karst* 2>/dev/null; ip -o link | grep karstbr; nft list tables | grep karst; pgrep -a karst; mount | grep karst'
finish
