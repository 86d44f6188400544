#!/usr/bin/env bash
# small-linux.sh DISK: makes a disk that boots Debian's signed kernel with a busybox on the serial console, by SeaBIOS and
# by UEFI (also with secure boot). On it: vmlinuz and initrd. Its shell answers on ttyS0 some seconds after power-on.
set -euo pipefail
disk=$1
work=$(mktemp -d "$disk.XXXXXX")
trap 'rm -rf "$work"' EXIT
chmod 755 "$work"
cd "$work"

kernel=$(apt-cache depends linux-image-amd64 | awk '/Depends: linux-image/ { print $2; exit }')
apt-get -q download "$kernel" grub-efi-amd64-signed shim-signed >apt.log 2>&1 || { cat apt.log >&2; exit 1; }
for deb in *.deb; do dpkg-deb -x "$deb" tree; done
version=${kernel#linux-image-}
busybox depmod -b "$work/tree" "$version"

mkdir -p root/bin root/lib root/proc root/sys root/dev root/mnt
cp "$(command -v busybox)" root/bin/busybox
modules=tree/lib/modules/$version
declare -A seen=()
add() { # a module's file, after what it needs
    local file=$1 need
    [ -z "${seen[$file]:-}" ] || return 0
    seen[$file]=1
    for need in $(sed -n "s|^$file:||p" "$modules/modules.dep"); do add "$need"; done
    cp "$modules/$file" root/lib/
    basename "$file" >>root/lib/order
}
for name in virtio_pci virtio_blk virtio_scsi sd_mod sr_mod nvme ahci ata_piix virtio_net e1000e isofs 9p 9pnet_virtio \
    virtiofs virtio_balloon virtio_mem vfat nls_cp437 nls_ascii tpm_tis tpm_crb acpiphp; do
    file=$(sed -n "s|^\(.*/${name//_/[-_]}\.ko\):.*|\1|p" "$modules/modules.dep" | head -n 1)
    [ -z "$file" ] || add "$file"
done
cat >root/init <<'INIT'
#!/bin/busybox sh
/bin/busybox --install -s /bin
mount -t proc proc /proc; mount -t sysfs sysfs /sys; mount -t devtmpfs dev /dev
while read -r module; do insmod "/lib/$module" 2>/dev/null; done </lib/order
stty -F /dev/ttyS0 -echo
echo 'small linux is up'
exec setsid sh -c 'exec sh </dev/ttyS0 >/dev/ttyS0 2>&1'
INIT
chmod 755 root/init
(cd root && find . | busybox cpio -o -H newc 2>/dev/null | gzip -1) >initrd

line='console=ttyS0 quiet panic=1'
printf 'linux /vmlinuz %s\ninitrd /initrd\nboot\n' "$line" >grub.cfg
mib=$((($(stat -c %s initrd) + $(stat -c %s "tree/boot/vmlinuz-$version")) / 1048576 + 12))
truncate -s $((mib + 1))M disk
export MTOOLS_SKIP_CHECK=1
/sbin/mkfs.vfat -F 16 -n SMALL --offset 2048 disk $((mib * 1024)) >/dev/null
at="disk@@1M"
mmd -i "$at" ::/EFI ::/EFI/BOOT ::/EFI/debian ::/grub
mcopy -i "$at" "tree/boot/vmlinuz-$version" ::/vmlinuz
mcopy -i "$at" initrd ::/initrd
mcopy -i "$at" tree/usr/lib/shim/shimx64.efi.signed ::/EFI/BOOT/BOOTX64.EFI
mcopy -i "$at" tree/usr/lib/grub/x86_64-efi-signed/grubx64.efi.signed ::/EFI/BOOT/grubx64.efi
mcopy -i "$at" grub.cfg ::/EFI/debian/grub.cfg
mcopy -i "$at" grub.cfg ::/grub/grub.cfg
grub-mkimage -O i386-pc -p '(hd0,msdos1)/grub' -o core biosdisk part_msdos fat linux normal configfile boot
cp /usr/lib/grub/i386-pc/boot.img mbr
dd if=mbr of=disk bs=440 count=1 conv=notrunc status=none
dd if=core of=disk bs=512 seek=1 conv=notrunc status=none
# One partition of type EFI, active, from sector 2048.
size=$((mib * 2048))
printf '\x80\x00\x00\x00\xef\x00\x00\x00\x00\x08\x00\x00'"$(printf '\\x%02x\\x%02x\\x%02x\\x%02x' $((size & 255)) $((size >> 8 & 255)) $((size >> 16 & 255)) $((size >> 24)))" |
    dd of=disk bs=1 seek=446 conv=notrunc status=none
printf '\x55\xaa' | dd of=disk bs=1 seek=510 conv=notrunc status=none
mv disk "$disk"
