# An installer on a disc, made of the small Linux of the drivers' tests: it boots by SeaBIOS, by UEFI and with secure boot, writes a
# bootable system to the machine's first disk, says so on the serial console and powers off, or (karst.end=reboot) restarts.
export MTOOLS_SKIP_CHECK=1

# small_linux: prints where the cached disk of `small-machine.sh` is; made when it is missing.
small_linux() {
    local cache=${CARGO_TARGET_DIR:-$top/target}/test-cache disk
    disk=$cache/vm-small-1.raw
    mkdir -p "$cache"
    (
        # The drivers' tests make it too.
        flock 9
        [ -e "$disk" ] || "$top/tests/small-machine.sh" disk "$disk"
    ) 9>"$cache/vm-small-lock" && printf '%s\n' "$disk"
}

# installer_init FILE: the first process of both systems; karst.do= in the kernel's line says which of them it is.
installer_init() {
    cat >"$1" <<'INIT'
#!/bin/busybox sh
/bin/busybox --install -s /bin
mount -t proc proc /proc; mount -t sysfs sysfs /sys; mount -t devtmpfs dev /dev
while read -r module; do insmod "/lib/$module" 2>/dev/null; done </lib/order
word() { sed -n "s/.*karst\.$1=\([^ ]*\).*/\1/p" /proc/cmdline; }
first() { for disk in /dev/sda /dev/vda /dev/nvme0n1; do [ ! -b $disk ] || { echo $disk; break; }; done; }
# The serial console is a byte wide and slow: whole lines only.
say() { echo "karst-test: $*" >/dev/ttyS0; }
end() { say "$*"; sync; [ "$(word end)" = reboot ] && reboot -f; poweroff -f; }
# What the disc's header calls it, without a mount: its medium may go.
label() { dd if=/dev/sr0 bs=2048 skip=16 count=1 2>/dev/null | dd bs=1 skip=40 count=32 2>/dev/null | tr -d ' \0'; }
case $(word do) in
install)
    say "installer begins"
    for _ in $(seq 60); do [ -n "$(first)" ] && [ -n "$(label)" ] && break; sleep 1; done
    disk=$(first)
    [ -n "$disk" ] || end "installer failed: no disk"
    mount -t iso9660 -o ro /dev/sr0 /mnt || end "installer failed: no disc"
    zcat /mnt/system.gz | dd of="$disk" bs=1M 2>/dev/null || end "installer failed: not written"
    sync; echo 3 >/proc/sys/vm/drop_caches
    size=$(cat /mnt/system.size)
    [ "$(head -c "$size" "$disk" | sha256sum | cut -d' ' -f1)" = "$(cat /mnt/system.sha256)" ] || end "installer failed: not as written"
    end "installer done with $disk"
    ;;
run)
    firmware=bios; [ ! -d /sys/firmware/efi ] || firmware=uefi
    ! dmesg | grep -qi 'secure boot enabled' || firmware=secure-uefi
    say "system $(word system) is up by $firmware from $(first)"
    last=
    while :; do
        now=$(label); now=${now:-none}
        [ "$now" = "$last" ] || say "disc $now"
        last=$now
        sleep 1
    done
    ;;
esac
INIT
    chmod 755 "$1"
}

# installer_disc DIR SYSTEM: makes DIR/installer.iso, whose system calls itself so, DIR/vm, its kernel and initrd, DIR/system.raw, which it
# writes, and DIR/other.iso,
# a disc without anything to boot.
installer_disc() {
    local dir=$1 system=$2 small at disk='small.raw@@1M'
    small=$(small_linux) || return 1
    mkdir -p "$dir/root" "$dir/disc/boot" "$dir/disc/vm" "$dir/other"
    (
        set -e
        cd "$dir"
        cp "$small" small.raw
        mcopy -n -i "$disk" ::/vmlinuz ::/initrd disc/vm/
        mcopy -n -i "$disk" ::/EFI/BOOT/BOOTX64.EFI shim
        mcopy -n -i "$disk" ::/EFI/BOOT/grubx64.efi grub
        # A second archive after the first: the kernel takes both, and this init instead of the shell.
        installer_init root/init
        (cd root && echo init | busybox cpio -o -H newc 2>/dev/null | gzip -1) >>disc/vm/initrd
        printf 'linux /vmlinuz console=ttyS0 quiet panic=1 karst.do=run karst.system=%s\ninitrd /initrd\nboot\n' "$system" >system.cfg
        for at in ::/EFI/debian/grub.cfg ::/grub/grub.cfg; do mcopy -n -o -i "$disk" system.cfg "$at"; done
        mcopy -n -o -i "$disk" disc/vm/initrd ::/initrd
        mv small.raw system.raw
        gzip -1 <system.raw >disc/system.gz
        stat -c %s system.raw >disc/system.size
        sha256sum <system.raw | cut -d' ' -f1 >disc/system.sha256

        printf '%s\n' 'search --no-floppy --file --set=root /vm/vmlinuz' 'linux /vm/vmlinuz console=ttyS0 quiet panic=1 karst.do=install' \
            'initrd /vm/initrd' boot >installer.cfg
        grub-mkimage -O i386-pc-eltorito -c installer.cfg -p /boot -o disc/boot/bios.img biosdisk iso9660 search search_fs_file linux normal boot
        truncate -s 6M disc/boot/efi.img
        /sbin/mkfs.vfat -F 12 disc/boot/efi.img >/dev/null
        mmd -i disc/boot/efi.img ::/EFI ::/EFI/BOOT
        mcopy -i disc/boot/efi.img shim ::/EFI/BOOT/BOOTX64.EFI
        mcopy -i disc/boot/efi.img grub ::/EFI/BOOT/grubx64.efi
        # Debian's signed loader looks for a disc of Debian's, and for its menu there.
        mkdir disc/.disk disc/boot/grub
        echo 'An installer of a test' >disc/.disk/info
        cp installer.cfg disc/boot/grub/grub.cfg
        xorriso -as mkisofs -quiet -o installer.iso -V INSTALLER -R -b boot/bios.img -no-emul-boot -boot-load-size 4 -boot-info-table \
            -eltorito-alt-boot -e boot/efi.img -no-emul-boot disc 2>disc.log || { cat disc.log; exit 1; }
        echo nothing >other/file
        xorriso -as mkisofs -quiet -o other.iso -V OTHER -R other 2>disc.log || { cat disc.log; exit 1; }
        # What it starts, for whoever starts that directly.
        mv disc/vm vm
        rm -rf root disc other shim grub
    )
}
