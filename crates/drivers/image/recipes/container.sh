# Runs inside the new root file system of a container, as its root, once, while the image is made.
set -eu
passwd -l root >/dev/null
rm -f /etc/machine-id /var/lib/dbus/machine-id /etc/ssh/ssh_host_* /etc/hostname /etc/resolv.conf
touch /etc/machine-id
ln -s ../run/systemd/resolve/stub-resolv.conf /etc/resolv.conf
systemctl enable systemd-networkd systemd-resolved console-getty.service
# What a container cannot use, or what only slows its start down.
systemctl mask systemd-networkd-wait-online.service apt-daily.timer apt-daily-upgrade.timer e2scrub_all.timer \
    e2scrub_reap.service dev-hugepages.mount sys-kernel-debug.mount sys-kernel-tracing.mount \
    systemd-udev-trigger.service systemd-udevd.service systemd-modules-load.service
rm -rf /usr/share/man/* /usr/share/locale/* /var/log/*.log /var/log/apt
