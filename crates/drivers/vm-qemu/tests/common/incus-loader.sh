# Run with a root as $1: puts into it what Incus 6.0 installs into an image, in behaviour: the rule, the paths, the options
# of the mount, the type of the unit.
set -eu
[ -d "${1:?a root}/etc/systemd" ]
cat >"$1/usr/lib/systemd/incus-agent-setup" <<'X'
#!/bin/sh -eu
mkdir -p /run/incus_agent.mnt /run/incus_agent
modprobe 9pnet_virtio || true
mount -t 9p config /run/incus_agent.mnt -o access=0,trans=virtio,size=1048576
mount -t tmpfs tmpfs /run/incus_agent -o mode=0700,size=50M
cp -Ra /run/incus_agent.mnt/* /run/incus_agent
umount /run/incus_agent.mnt
chown -R root:root /run/incus_agent
X
chmod 755 "$1/usr/lib/systemd/incus-agent-setup"
cat >"$1/usr/lib/systemd/system/incus-agent.service" <<'X'
[Unit]
Before=multi-user.target
DefaultDependencies=no
[Service]
Type=notify
WorkingDirectory=-/run/incus_agent
ExecStartPre=/usr/lib/systemd/incus-agent-setup
ExecStart=/run/incus_agent/incus-agent
Restart=on-failure
RestartSec=5s
X
cat >"$1/usr/lib/udev/rules.d/99-incus-agent.rules" <<'X'
SYMLINK=="virtio-ports/org.linuxcontainers.incus", TAG+="systemd", ENV{SYSTEMD_WANTS}+="incus-agent.service"
X
