//! Taps of virtual machines: made by opening `/dev/net/tun`, so that one lives exactly as long as its descriptor.
//!
//! Not persistent: when QEMU ends, the kernel removes the interface, whatever happened to the daemons. Done with ioctls
//! (`linux/if_tun.h`, `linux/sockios.h`) on names, because a start must not wait for a program.

use karst_model::{Error, Result};
use std::{
    io,
    os::fd::{AsRawFd, FromRawFd, OwnedFd},
};

// From linux/if_tun.h.
const TUNSETIFF: libc::c_ulong = 0x4004_54ca;
const TUNSETVNETHDRSZ: libc::c_ulong = 0x4004_54d8;
/// From linux/sockios.h.
const SIOCBRADDIF: libc::c_ulong = 0x89a2;
const IFF_TAP: libc::c_short = 0x0002;
const IFF_NO_PI: libc::c_short = 0x1000;
const IFF_VNET_HDR: libc::c_short = 0x4000;
const IFF_TUN_EXCL: libc::c_int = 0x8000;
/// Size of `struct virtio_net_hdr_v1`, which every virtio 1.0 device uses.
const VNET_HEADER: libc::c_int = 12;

/// A tap to make.
#[derive(Debug, Clone)]
pub struct TapSpec<'a> {
    /// Interface name, at most 15 bytes; must not exist.
    pub name: &'a str,
    /// Bridge to put it into.
    pub bridge: &'a str,
    /// The guest's MAC address; the host's end gets it with `fe` in front, so that a bridge never takes it as its own.
    pub guest_mac: &'a str,
    /// MTU; the bridge's default when absent.
    pub mtu: Option<u32>,
}

fn ifreq(name: &str) -> Result<libc::ifreq> {
    karst_model::device::interface_name("interface", name)?;
    // SAFETY: all-zero is a valid ifreq.
    let mut r: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in r.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from as libc::c_char;
    }
    Ok(r)
}

/// An ioctl that takes an `ifreq`.
fn request(fd: &OwnedFd, code: libc::c_ulong, r: &mut libc::ifreq) -> io::Result<()> {
    // SAFETY: every code used here reads and writes one ifreq.
    match unsafe { libc::ioctl(fd.as_raw_fd(), code as _, r as *mut libc::ifreq) } {
        -1 => Err(io::Error::last_os_error()),
        _ => Ok(()),
    }
}

/// Makes the tap, up and in its bridge; it vanishes with the last copy of the descriptor. Takes well below a millisecond.
///
/// # Errors
/// Conflict when the name is taken, not found when the bridge does not exist; nothing is left then.
pub fn open(spec: &TapSpec<'_>) -> Result<OwnedFd> {
    let failed =
        |what: &str, e: io::Error| Error::internal(format!("network interface {:?}: {what}", spec.name), e);
    let file = std::fs::File::options().read(true).write(true).open("/dev/net/tun").map_err(|e| {
        Error::unsupported("virtual machines with NICs need /dev/net/tun; load the module tun")
            .with_context(e)
    })?;
    let tap = OwnedFd::from(file);
    let mut r = ifreq(spec.name)?;
    r.ifr_ifru.ifru_flags = (IFF_TAP | IFF_NO_PI | IFF_VNET_HDR) | (IFF_TUN_EXCL as libc::c_short);
    request(&tap, TUNSETIFF, &mut r).map_err(|e| match e.raw_os_error() {
        Some(libc::EBUSY | libc::EEXIST) => {
            Error::conflict(format!("network interface {:?} exists already", spec.name))
        }
        _ => failed("it could not be made", e),
    })?;
    // SAFETY: reads one int.
    if unsafe { libc::ioctl(tap.as_raw_fd(), TUNSETVNETHDRSZ as _, &VNET_HEADER) } < 0 {
        return Err(failed("it takes no virtio header", io::Error::last_os_error()));
    }

    // SAFETY: a new socket that is ours.
    let control = unsafe {
        let fd = libc::socket(libc::AF_INET, libc::SOCK_DGRAM | libc::SOCK_CLOEXEC, 0);
        if fd < 0 {
            return Err(io::Error::last_os_error().into());
        }
        OwnedFd::from_raw_fd(fd)
    };
    let mac = karst_model::device::parse_mac("hwaddr", spec.guest_mac)?;
    let mut r = ifreq(spec.name)?;
    // SAFETY: the union's member for this request.
    unsafe {
        r.ifr_ifru.ifru_hwaddr.sa_family = libc::ARPHRD_ETHER;
        for (to, from) in r.ifr_ifru.ifru_hwaddr.sa_data.iter_mut().zip(mac.split(':')) {
            *to = u8::from_str_radix(from, 16).unwrap_or_default() as libc::c_char;
        }
        r.ifr_ifru.ifru_hwaddr.sa_data[0] = 0xfe_u8 as libc::c_char;
    }
    request(&control, libc::SIOCSIFHWADDR as _, &mut r)
        .map_err(|e| failed("its address could not be set", e))?;
    if let Some(mtu) = spec.mtu {
        let mut r = ifreq(spec.name)?;
        r.ifr_ifru.ifru_mtu = mtu as libc::c_int;
        request(&control, libc::SIOCSIFMTU as _, &mut r)
            .map_err(|e| failed("its MTU could not be set", e))?;
    }
    // The host's end is a cable, not a host: without this the kernel gives it a link-local address, by which the guest
    // could reach services of the host past the bridge's firewall. No such file: a kernel without IPv6.
    match std::fs::write(format!("/proc/sys/net/ipv6/conf/{}/disable_ipv6", spec.name), "1") {
        Err(e) if e.kind() != io::ErrorKind::NotFound => {
            return Err(failed("IPv6 could not be turned off", e));
        }
        _ => {}
    }

    let mut r = ifreq(spec.name)?;
    request(&control, libc::SIOCGIFINDEX as _, &mut r).map_err(|e| failed("it has no index", e))?;
    // SAFETY: filled by the call before.
    let index = unsafe { r.ifr_ifru.ifru_ifindex };
    let mut r = ifreq(spec.bridge)?;
    r.ifr_ifru.ifru_ifindex = index;
    request(&control, SIOCBRADDIF, &mut r).map_err(|e| match e.raw_os_error() {
        Some(libc::ENODEV) => {
            Error::not_found(format!("the bridge {:?} does not exist on this host", spec.bridge))
        }
        Some(libc::EOPNOTSUPP | libc::EINVAL) => {
            Error::conflict(format!("{:?} is not a bridge of this host", spec.bridge))
        }
        _ => failed("it could not join its bridge", e),
    })?;
    let mut r = ifreq(spec.name)?;
    request(&control, libc::SIOCGIFFLAGS as _, &mut r)
        .map_err(|e| failed("it could not be brought up", e))?;
    // SAFETY: filled by the call before.
    unsafe { r.ifr_ifru.ifru_flags |= libc::IFF_UP as libc::c_short };
    request(&control, libc::SIOCSIFFLAGS as _, &mut r)
        .map_err(|e| failed("it could not be brought up", e))?;
    Ok(tap)
}

/// Opens a macvtap, as [`open`] opens a tap; the link stays when the descriptor is closed. `dir`: where a node for it may
/// stand for a moment, for a host need not have one in `/dev`.
///
/// # Errors
/// Not found, internal.
pub fn open_macvtap(name: &str, dir: &std::path::Path) -> Result<OwnedFd> {
    let failed = |what: &str, e: io::Error| Error::internal(format!("network interface {name:?}: {what}"), e);
    let link = crate::link::get(name)?
        .ok_or_else(|| Error::not_found(format!("network interface {name:?} does not exist")))?;
    let number = std::fs::read_to_string(format!("/sys/class/net/{name}/tap{}/dev", link.index))
        .map_err(|e| failed("it has no device", e))?;
    let (major, minor) = number
        .trim()
        .split_once(':')
        .and_then(|(a, b)| Some((a.parse().ok()?, b.parse().ok()?)))
        .ok_or_else(|| Error::internal("a macvtap has no device number", &number))?;
    let node = dir.join(format!("{name}.node"));
    let device = crate::mountns::DeviceNumber { block: false, major, minor };
    crate::mountns::make_node(&node, device, (0, 0), 0o600)?;
    let opened = std::fs::File::options().read(true).write(true).open(&node);
    std::fs::remove_file(&node)?;
    let tap = OwnedFd::from(opened.map_err(|e| failed("its device could not be opened", e))?);
    let mut r = ifreq(name)?;
    r.ifr_ifru.ifru_flags = IFF_TAP | IFF_NO_PI | IFF_VNET_HDR;
    request(&tap, TUNSETIFF, &mut r).map_err(|e| failed("it could not be set up", e))?;
    // SAFETY: reads one int.
    if unsafe { libc::ioctl(tap.as_raw_fd(), TUNSETVNETHDRSZ as _, &VNET_HEADER) } < 0 {
        return Err(failed("it takes no virtio header", io::Error::last_os_error()));
    }
    Ok(tap)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::Command;

    /// A bridge of the test's own, removed at its end.
    struct Bridge(String);
    impl Bridge {
        fn new() -> Option<Self> {
            let name = format!("ktb{}", std::process::id() % 1_000_000);
            Command::new("ip")
                .args(["link", "add", &name, "type", "bridge"])
                .output()
                .is_ok_and(|o| o.status.success())
                .then_some(Bridge(name))
        }
    }
    impl Drop for Bridge {
        fn drop(&mut self) {
            let _ = Command::new("ip").args(["link", "del", &self.0]).output();
        }
    }

    #[test]
    fn a_tap_is_up_in_its_bridge_and_goes_with_its_descriptor() {
        let Some(bridge) = Bridge::new() else {
            return crate::backends::missing("a bridge cannot be made (package iproute2)");
        };
        let name = bridge.0.replace("ktb", "ktt");
        let spec =
            TapSpec { name: &name, bridge: &bridge.0, guest_mac: "10:66:6a:00:00:01", mtu: Some(1400) };
        let fd = open(&spec).unwrap();
        let show = || {
            String::from_utf8(Command::new("ip").args(["link", "show", &name]).output().unwrap().stdout)
                .unwrap()
        };
        // A process that another test is just starting has the descriptor still, until it executes its program.
        let gone = || {
            let end = std::time::Instant::now() + std::time::Duration::from_secs(30);
            while !show().is_empty() && std::time::Instant::now() < end {
                std::thread::sleep(std::time::Duration::from_millis(5));
            }
            show()
        };
        let text = show();
        assert!(
            text.contains(&format!("master {}", bridge.0))
                && text.contains("mtu 1400")
                && text.contains("UP"),
            "{text}"
        );
        assert!(text.contains("fe:66:6a:00:00:01"), "{text}");
        assert!(open(&spec).unwrap_err().is(karst_model::ErrorKind::Conflict), "the name is taken");
        drop(fd);
        assert_eq!(gone(), "", "it vanished");
        let missing = TapSpec { bridge: "ktb-none", ..spec };
        assert!(open(&missing).unwrap_err().is(karst_model::ErrorKind::NotFound));
        assert_eq!(gone(), "", "nothing is left of a failure");
    }
}
