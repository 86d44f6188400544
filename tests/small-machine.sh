#!/usr/bin/env bash
# Machines that boot in seconds also where they are emulated: Debian's signed kernel and a busybox.
# small-machine.sh disk FILE: a disk with a shell on the serial console, by SeaBIOS and by UEFI (also with secure boot). On it:
# vmlinuz and initrd. Its shell answers on ttyS0 some seconds after power-on.
# small-machine.sh image DIR: an image whose busybox lies on ext4, asks for an address by DHCP and fetches Karst's guest agent as any
# other system does. DIR/metadata and DIR/rootfs are the two parts of the image.
set -euo pipefail
top=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
kind=${1:-} made=${2:-}
[ -n "$made" ] || kind=
case $kind in
disk) work=$(mktemp -d "$made.XXXXXX") ;;
image)
    mkdir -p "$made"
    work=$(mktemp -d "$(cd "$made" && pwd)/making.XXXXXX")
    ;;
*)
    echo "usage: small-machine.sh disk FILE | image DIR" >&2
    exit 2
    ;;
esac
trap 'rm -rf "$work"' EXIT
chmod 755 "$work"
made=$(realpath "$made")
cd "$work"

# kernel PACKAGE...: $version and ./tree, with what is in the packages beside it.
kernel() {
    local package deb
    package=$(apt-cache depends linux-image-amd64 | awk '/Depends: linux-image/ { print $2; exit }')
    apt-get -q download "$package" "$@" >apt.log 2>&1 || { cat apt.log >&2; exit 1; }
    for deb in *.deb; do dpkg-deb -x "$deb" tree; done
    version=${package#linux-image-}
    busybox depmod -b "$work/tree" "$version"
}

declare -A seen=()
add() { # a module's file, after what it needs
    local to=$1 file=$2 need
    [ -z "${seen[$file]:-}" ] || return 0
    seen[$file]=1
    for need in $(sed -n "s|^$file:||p" "$modules/modules.dep"); do add "$to" "$need"; done
    cp "$modules/$file" "$to/"
    basename "$file" >>"$to/order"
}

# modules DIR NAME...: those that the kernel has, and DIR/order to load them in.
modules() {
    local to=$1 name file
    modules=tree/lib/modules/$version
    shift
    for name in "$@"; do
        file=$(sed -n "s|^\(.*/${name//_/[-_]}\.ko\):.*|\1|p" "$modules/modules.dep" | head -n 1)
        [ -z "$file" ] || add "$to" "$file"
    done
}

# pack DIR: DIR as an initrd.
pack() {
    (cd "$1" && find . | busybox cpio -o -H newc 2>/dev/null | gzip -1)
}

# loader PREFIX TYPE MODULE: GRUB for SeaBIOS on ./disk, and its one partition of $mib MiB: active, from sector 2048.
loader() {
    local size=$((mib * 2048))
    grub-mkimage -O i386-pc -p "(hd0,msdos1)$1" -o core biosdisk part_msdos "$3" linux normal configfile boot
    cp /usr/lib/grub/i386-pc/boot.img mbr
    dd if=mbr of=disk bs=440 count=1 conv=notrunc status=none
    dd if=core of=disk bs=512 seek=1 conv=notrunc status=none
    printf '\x80\x00\x00\x00\x'"$2"'\x00\x00\x00\x00\x08\x00\x00'"$(printf '\\x%02x\\x%02x\\x%02x\\x%02x' $((size & 255)) $((size >> 8 & 255)) $((size >> 16 & 255)) $((size >> 24)))" |
        dd of=disk bs=1 seek=446 conv=notrunc status=none
    printf '\x55\xaa' | dd of=disk bs=1 seek=510 conv=notrunc status=none
}

make_disk() {
    local line='console=ttyS0 quiet panic=1' at="disk@@1M"
    kernel grub-efi-amd64-signed shim-signed
    mkdir -p root/bin root/lib root/proc root/sys root/dev root/mnt
    cp "$(command -v busybox)" root/bin/busybox
    modules root/lib virtio_pci virtio_blk virtio_scsi sd_mod sr_mod nvme ahci ata_piix virtio_net e1000e isofs 9p 9pnet_virtio \
        virtiofs virtio_balloon virtio_mem vfat nls_cp437 nls_ascii tpm_tis tpm_crb acpiphp
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
    pack root >initrd

    printf 'linux /vmlinuz %s\ninitrd /initrd\nboot\n' "$line" >grub.cfg
    mib=$((($(stat -c %s initrd) + $(stat -c %s "tree/boot/vmlinuz-$version")) / 1048576 + 12))
    truncate -s $((mib + 1))M disk
    export MTOOLS_SKIP_CHECK=1
    /sbin/mkfs.vfat -F 16 -n SMALL --offset 2048 disk $((mib * 1024)) >/dev/null
    mmd -i "$at" ::/EFI ::/EFI/BOOT ::/EFI/debian ::/grub
    mcopy -i "$at" "tree/boot/vmlinuz-$version" ::/vmlinuz
    mcopy -i "$at" initrd ::/initrd
    mcopy -i "$at" tree/usr/lib/shim/shimx64.efi.signed ::/EFI/BOOT/BOOTX64.EFI
    mcopy -i "$at" tree/usr/lib/grub/x86_64-efi-signed/grubx64.efi.signed ::/EFI/BOOT/grubx64.efi
    mcopy -i "$at" grub.cfg ::/EFI/debian/grub.cfg
    mcopy -i "$at" grub.cfg ::/grub/grub.cfg
    # Of type EFI.
    loader /grub ef fat
    mv disk "$made"
}

make_image() {
    local applet program
    kernel
    # What the kernel needs for its root, and beside that for network, agent, power button.
    mkdir -p initrd/{bin,lib,proc,sys,dev,root}
    cp "$(command -v busybox)" initrd/bin/busybox
    modules initrd/lib virtio_pci virtio_blk virtio_scsi sd_mod crc32c_generic ext4 virtio_net e1000e 8021q virtio_console virtio_balloon isofs \
        9p 9pnet_virtio
    cat >initrd/init <<'INIT'
#!/bin/busybox sh
/bin/busybox mount -t devtmpfs dev /dev
while read -r module; do /bin/busybox insmod "/lib/$module"; done </lib/order
i=0
# By virtio-blk or virtio-scsi, as it is asked for.
until disk=$(/bin/busybox ls /dev/[sv]d?1 2>/dev/null) || [ $i -ge 100 ]; do /bin/busybox sleep 0.1; i=$((i + 1)); done
/bin/busybox mount -t ext4 -o rw "$disk" /root
/bin/busybox mount -o move /dev /root/dev
exec /bin/busybox switch_root /root /sbin/init
INIT
    chmod 755 initrd/init

    mkdir -p root/{bin,sbin,usr/bin,usr/lib/karst-agent,boot/grub,dev,etc,proc,root,run,sys,tmp,var}
    chmod 1777 root/tmp
    cp initrd/bin/busybox root/bin/busybox
    for applet in $(busybox --list); do
        [ "$applet" = busybox ] || [ -e "root/bin/$applet" ] || ln -s busybox "root/bin/$applet"
    done
    for program in init poweroff reboot halt; do ln -s ../bin/busybox "root/sbin/$program"; done
    # No applet of Debian's.
    printf '#!/bin/sh\neval "printf \x27%%s\\\\n\x27 \\"\\$$1\\""\n' >root/bin/printenv
    chmod 755 root/bin/printenv
    install -m 0755 "$top/crates/guest-agent/delivery/karst-agent-setup" root/usr/lib/karst-agent/setup
    printf 'root:x:0:0:root:/root:/bin/sh\nuser:x:1000:1000::/tmp:/bin/sh\n' >root/etc/passwd
    printf 'root:x:0:\nuser:x:1000:\n' >root/etc/group
    printf 'ID=small\nPRETTY_NAME="small machine"\n' >root/etc/os-release
    cat >root/etc/inittab <<'INIT'
::sysinit:/etc/start
::respawn:/etc/agent
::shutdown:/bin/umount -a -r
INIT
    cat >root/etc/start <<'START'
#!/bin/sh
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t tmpfs run /run
mkdir -p /dev/pts
mount -t devpts -o gid=0,mode=620,ptmxmode=666 devpts /dev/pts
ip link set lo up
ip link set eth0 up
udhcpc -i eth0 -b -q -s /etc/udhcpc >/dev/null 2>&1 &
echo 'the small machine is up' >/dev/console
START
    cat >root/etc/udhcpc <<'DHCP'
#!/bin/sh
[ "$1" = bound ] || exit 0
ip addr flush dev "$interface" scope global
ip addr add "$ip/${mask:-24}" dev "$interface"
ip route add default via "${router%% *}"
DHCP
    cat >root/etc/agent <<'AGENT'
#!/bin/sh
/usr/lib/karst-agent/setup && exec /run/karst-agent/karst-guest-agent
sleep 1
AGENT
    chmod 755 root/etc/start root/etc/udhcpc root/etc/agent

    cp "tree/boot/vmlinuz-$version" root/boot/vmlinuz
    pack initrd >root/boot/initrd
    printf 'linux /boot/vmlinuz console=ttyS0 panic=1\ninitrd /boot/initrd\nboot\n' >root/boot/grub/grub.cfg
    mib=$(($(du -sm root | cut -f 1) + 24))
    truncate -s $((mib + 1))M disk
    # Features that GRUB 2.06 does not read are left out.
    /sbin/mke2fs -q -F -t ext4 -O '^metadata_csum_seed,^orphan_file' -E offset=1048576,root_owner=0:0 -d root disk ${mib}M
    # Of Linux.
    loader /boot/grub 83 ext2
    qemu-img convert -f raw -O qcow2 disk rootfs
    printf 'architecture: x86_64\ncreation_date: 1700000000\nproperties: {os: linux, description: small machine}\n' >metadata.yaml
    tar -cf metadata metadata.yaml
    mv metadata rootfs "$made"
}

"make_$kind"
