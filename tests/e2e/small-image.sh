# A container image without systemd, made in a second from the host's own files: busybox as init, which asks for an address by
# DHCP, and Debian's smallest Perl.

# small_image DIR: its files, in DIR/rootfs.
small_image() {
    local root=$1/rootfs perl file
    mkdir -p "$root"/{bin,sbin,dev,etc,proc,sys,run,tmp,root,usr/bin,var}
    cp /usr/bin/busybox "$root/bin/"
    "$root/bin/busybox" --install -s "$root/bin" 2>/dev/null
    find "$root/bin" -type l -exec ln -sfn busybox {} \;
    ln -s ../bin/busybox "$root/sbin/init"
    printf 'root:x:0:0:root:/root:/bin/sh\nuser:x:1000:1000::/tmp:/bin/sh\n' >"$root/etc/passwd"
    printf '::sysinit:/bin/udhcpc -i eth0 -b -s /etc/udhcpc.script\nnull::respawn:/bin/sleep 100000\n' >"$root/etc/inittab"
    cat >"$root/etc/udhcpc.script" <<'SH'
#!/bin/sh
[ "$1" = bound ] || exit 0
ip addr flush dev "$interface" scope global
ip addr add "$ip/${mask:-24}" dev "$interface"
ip route add default via "${router%% *}"
SH
    chmod 755 "$root/etc/udhcpc.script"
    perl=$(dirname "$(find /usr/lib -path '*/perl-base/strict.pm' | head -n 1)")
    for file in /usr/bin/perl $(ldd /usr/bin/perl | grep -o '/[^ ]*'); do
        mkdir -p "$root$(dirname "$file")" && cp -L "$file" "$root$file"
    done
    mkdir -p "$root$perl" && cp -r "$perl/." "$root$perl"
}

# pack_image DIR: DIR/image.tar.gz, to be imported.
pack_image() {
    printf '{"architecture":"x86_64","creation_date":1,"properties":{"os":"busybox","description":"busybox"}}\n' >"$1/metadata.yaml"
    tar -C "$1" -czf "$1/image.tar.gz" metadata.yaml rootfs
}
