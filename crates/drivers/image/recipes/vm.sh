# Runs inside the new root file system of a virtual machine, as its root, once, while the image is made.
# Arguments come as files below /karst: esp/ receives what goes into the EFI system partition, bios/ GRUB for BIOS.
set -eu
cd /karst

# The initial RAM disk: just what reaches the root disk on the buses that hypervisors offer.
cat > /etc/initramfs-tools/conf.d/karst <<'X'
MODULES=list
COMPRESS=zstd
X
printf '%s\n' virtio_pci virtio_blk virtio_scsi ahci sd_mod nvme ext4 crc32c >> /etc/initramfs-tools/modules
update-initramfs -u -k all
# Where GRUB's configuration looks for them: the kernel's package keeps the links, in one directory or the other.
{ [ -e /vmlinuz ] && [ -e /initrd.img ]; } || { [ -e /boot/vmlinuz ] && [ -e /boot/initrd.img ]; } ||
    { echo 'E: the package of the kernel has left no links to what is to be started' >&2; exit 1; }

# BIOS: a core image that finds its configuration on the third partition of the disk it was loaded from.
mkdir -p bios esp
grub-mkimage -O i386-pc -o bios/core.img -p '(,gpt3)/boot/grub' \
    biosdisk part_gpt ext2 normal linux configfile search search_fs_uuid echo serial terminal test sleep reboot halt minicmd
cp /usr/lib/grub/i386-pc/boot.img bios/

# EFI: the distribution's signed shim and GRUB, so that Secure Boot works too. Where the package has more than one shim it makes
# the link to the latest when it is installed.
for d in deb/*.deb; do dpkg-deb -x "$d" deb; done
for shim in deb/usr/lib/shim/shimx64.efi.signed deb/usr/lib/shim/shimx64.efi.signed.latest; do
    [ ! -f "$shim" ] || { cp "$shim" esp/shim; break; }
done
[ -f esp/shim ] || { echo 'E: the package shim-signed has no signed shim at a place known here' >&2; exit 1; }
cp deb/usr/lib/grub/x86_64-efi-signed/grubx64.efi.signed esp/grub
rm -r deb

passwd -l root >/dev/null
rm -f /etc/machine-id /var/lib/dbus/machine-id /etc/ssh/ssh_host_* /etc/hostname /etc/resolv.conf
touch /etc/machine-id
ln -s ../run/systemd/resolve/stub-resolv.conf /etc/resolv.conf
systemctl enable systemd-networkd systemd-resolved serial-getty@ttyS0.service
systemctl mask apt-daily.timer apt-daily-upgrade.timer e2scrub_all.timer e2scrub_reap.service \
    systemd-networkd-wait-online.service systemd-pstore.service
rm -rf /usr/share/man/* /usr/share/locale/* /var/log/*.log /var/log/apt
