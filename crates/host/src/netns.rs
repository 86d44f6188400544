//! Interfaces, addresses and counters inside another network namespace, over a netlink socket that was opened there.
//!
//! A socket belongs for ever to the namespace it was opened in: one short-lived thread enters the namespace once a guest
//! start, later samples cost two dumps on the kept socket. Format: rtnetlink(7).

use karst_model::{Error, Result};
use std::{
    collections::BTreeMap,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd},
};

/// An interface in the namespace.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Link {
    /// Its number.
    pub index: u32,
    /// Its name.
    pub name: String,
    /// Hardware address, lower case with colons.
    pub mac: String,
    /// MTU.
    pub mtu: u32,
    /// Administratively up.
    pub up: bool,
    /// The loopback interface.
    pub loopback: bool,
    /// Bytes received and sent, packets received and sent.
    pub counters: [u64; 4],
    /// Failed at receiving and sending, dropped at receiving and sending.
    pub losses: [u64; 4],
    /// Address, prefix length, scope (`global`, `link`, `local`).
    pub addresses: Vec<(IpAddr, u8, String)>,
}

/// A netlink socket in a network namespace.
#[derive(Debug)]
pub struct NetnsProbe {
    socket: OwnedFd,
}

const RTM_NEWLINK: u16 = 16;
const RTM_GETLINK: u16 = 18;
const RTM_NEWADDR: u16 = 20;
const RTM_GETADDR: u16 = 22;
/// `RTEXT_FILTER_SKIP_STATS`: without the counters that each protocol keeps of an interface, which are more than all the rest.
/// [`libc::IFLA_STATS64`] is there all the same.
const SKIP_STATS: u32 = 1 << 3;

impl NetnsProbe {
    /// Opens a socket in the network namespace of a process, named by a pidfd.
    ///
    /// # Errors
    /// Internal when the process is gone or its namespace cannot be entered.
    pub fn open(pidfd: impl AsFd + Send) -> Result<Self> {
        let fd = pidfd.as_fd().as_raw_fd();
        // A thread of its own, which ends right away: entering a namespace changes the thread that does it.
        let opened = std::thread::scope(|s| {
            s.spawn(move || -> std::io::Result<OwnedFd> {
                // SAFETY: plain calls; the descriptor is borrowed by the scope and outlives the thread.
                unsafe {
                    if libc::setns(fd, libc::CLONE_NEWNET) < 0 {
                        return Err(std::io::Error::last_os_error());
                    }
                    let socket = libc::socket(
                        libc::AF_NETLINK,
                        libc::SOCK_RAW | libc::SOCK_CLOEXEC,
                        libc::NETLINK_ROUTE,
                    );
                    if socket < 0 {
                        return Err(std::io::Error::last_os_error());
                    }
                    // The kernel answers at once; this only bounds a kernel that does not.
                    let timeout = libc::timeval { tv_sec: 2, tv_usec: 0 };
                    libc::setsockopt(
                        socket,
                        libc::SOL_SOCKET,
                        libc::SO_RCVTIMEO,
                        (&raw const timeout).cast(),
                        size_of_val(&timeout) as libc::socklen_t,
                    );
                    Ok(OwnedFd::from_raw_fd(socket))
                }
            })
            .join()
        });
        let socket = opened
            .map_err(|_| Error::internal("the guest's network could not be read", "thread panicked"))?
            .map_err(|e| Error::internal("the guest's network could not be read", e))?;
        Ok(Self { socket })
    }

    /// All interfaces with their addresses.
    ///
    /// # Errors
    /// Internal when the kernel's answer is not understood.
    pub fn links(&self) -> Result<Vec<Link>> {
        let mut links: BTreeMap<u32, Link> = BTreeMap::new();
        let mut buffer = vec![0u8; 32 * 1024];
        self.dump(RTM_GETLINK, &mut buffer, |kind, body| {
            if kind == RTM_NEWLINK
                && let Some(link) = parse_link(body)
            {
                links.insert(link.index, link);
            }
        })?;
        self.dump(RTM_GETADDR, &mut buffer, |kind, body| {
            if kind == RTM_NEWADDR
                && let Some((index, address)) = parse_address(body)
                && let Some(link) = links.get_mut(&index)
            {
                link.addresses.push(address);
            }
        })?;
        Ok(links.into_values().collect())
    }

    fn dump(&self, kind: u16, buffer: &mut [u8], mut each: impl FnMut(u16, &[u8])) -> Result<()> {
        let failed = |e: &str| Error::internal("the guest's network could not be read", e);
        // nlmsghdr (16 bytes) and rtgenmsg, padded to the size of ifinfomsg, which older kernels want; of links then an attribute.
        let mut request = [0u8; 40];
        let length = if kind == RTM_GETLINK { request.len() } else { 32 };
        request[32..34].copy_from_slice(&8u16.to_ne_bytes());
        request[34..36].copy_from_slice(&libc::IFLA_EXT_MASK.to_ne_bytes());
        request[36..].copy_from_slice(&SKIP_STATS.to_ne_bytes());
        let request = &mut request[..length];
        request[..4].copy_from_slice(&(length as u32).to_ne_bytes());
        request[4..6].copy_from_slice(&kind.to_ne_bytes());
        let flags = (libc::NLM_F_REQUEST | libc::NLM_F_DUMP) as u16;
        request[6..8].copy_from_slice(&flags.to_ne_bytes());
        rustix::net::send(&self.socket, request, rustix::net::SendFlags::empty())
            .map_err(|e| failed(&e.to_string()))?;
        loop {
            let (n, _) = rustix::net::recv(&self.socket, &mut *buffer, rustix::net::RecvFlags::empty())
                .map_err(|e| failed(&e.to_string()))?;
            let mut rest = &buffer[..n];
            while rest.len() >= 16 {
                let length = u32::from_ne_bytes([rest[0], rest[1], rest[2], rest[3]]) as usize;
                if length < 16 || length > rest.len() {
                    return Err(failed("malformed message"));
                }
                match u16::from_ne_bytes([rest[4], rest[5]]) {
                    t if t == libc::NLMSG_DONE as u16 => return Ok(()),
                    t if t == libc::NLMSG_ERROR as u16 => return Err(failed("the kernel refused")),
                    t => each(t, &rest[16..length]),
                }
                rest = &rest[length.next_multiple_of(4).min(rest.len())..];
            }
        }
    }
}

/// Does work in a network namespace, on a thread of its own that ends with it: sockets that the work opens are there.
///
/// # Errors
/// Internal when it cannot be entered, and those of the work.
pub fn within<T: Send>(namespace: impl AsFd + Send, work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
    let failed = "the guest's network could not be entered";
    let fd = namespace.as_fd().as_raw_fd();
    let done = std::thread::scope(|s| {
        s.spawn(move || {
            // SAFETY: a plain call; the descriptor is borrowed by the scope and outlives the thread.
            if unsafe { libc::setns(fd, libc::CLONE_NEWNET) } < 0 {
                return Err(Error::internal(failed, std::io::Error::last_os_error()));
            }
            work()
        })
        .join()
    });
    done.map_err(|_| Error::internal(failed, "thread panicked"))?
}

/// The network namespace of this process.
///
/// # Errors
/// Internal.
pub fn own() -> Result<OwnedFd> {
    Ok(std::fs::File::open("/proc/self/ns/net")?.into())
}

/// The network namespace of a process.
///
/// # Errors
/// Not found when the process is gone.
pub fn namespace_of(pid: u32) -> Result<OwnedFd> {
    let file = std::fs::File::open(format!("/proc/{pid}/ns/net"));
    file.map(OwnedFd::from).map_err(|e| Error::not_found("the guest is not running").with_context(e))
}

/// A socket that listens at an address, in the network namespace of a process or the own one.
///
/// # Errors
/// Conflict when the address is taken; invalid when the network does not have it.
pub fn listen(inside: Option<u32>, udp: bool, at: SocketAddr) -> Result<OwnedFd> {
    let bind = move || -> std::io::Result<OwnedFd> {
        Ok(if udp { std::net::UdpSocket::bind(at)?.into() } else { std::net::TcpListener::bind(at)?.into() })
    };
    let bound = match inside {
        None => bind(),
        Some(pid) => {
            let namespace = namespace_of(pid)?;
            let fd = namespace.as_raw_fd();
            // A thread of its own, which ends right away: entering a namespace changes the thread that does it.
            let work = move || {
                // SAFETY: plain call; the descriptor outlives the thread.
                if unsafe { libc::setns(fd, libc::CLONE_NEWNET) } < 0 {
                    return Err(std::io::Error::last_os_error());
                }
                bind()
            };
            std::thread::scope(|s| s.spawn(work).join())
                .map_err(|_| Error::internal("listening failed", "thread panicked"))?
        }
    };
    bound.map_err(|e| match e.kind() {
        std::io::ErrorKind::AddrInUse => Error::conflict(format!("{at} is taken by another program")),
        std::io::ErrorKind::AddrNotAvailable => {
            Error::invalid("listen", format!("the network has no address {}", at.ip()))
        }
        _ => Error::internal(format!("listening at {at} failed"), e),
    })
}

/// Attributes after a header of `header` bytes.
fn attributes(body: &[u8], header: usize) -> impl Iterator<Item = (u16, &[u8])> {
    let mut rest = body.get(header..).unwrap_or_default();
    std::iter::from_fn(move || {
        let length = u16::from_ne_bytes([*rest.first()?, *rest.get(1)?]) as usize;
        let kind = u16::from_ne_bytes([*rest.get(2)?, *rest.get(3)?]) & 0x3fff;
        let value = rest.get(4..length)?;
        rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some((kind, value))
    })
}

fn parse_link(body: &[u8]) -> Option<Link> {
    let word = |at: usize| Some(u32::from_ne_bytes(body.get(at..at + 4)?.try_into().ok()?));
    let flags = word(8)?;
    let mut link = Link {
        index: word(4)?,
        up: flags & libc::IFF_UP as u32 != 0,
        loopback: flags & libc::IFF_LOOPBACK as u32 != 0,
        ..Link::default()
    };
    for (kind, value) in attributes(body, 16) {
        match kind {
            libc::IFLA_IFNAME => {
                let end = value.iter().position(|b| *b == 0).unwrap_or(value.len());
                link.name = String::from_utf8_lossy(&value[..end]).into_owned();
            }
            libc::IFLA_ADDRESS => {
                let bytes: Vec<String> = value.iter().map(|b| format!("{b:02x}")).collect();
                link.mac = bytes.join(":");
            }
            libc::IFLA_MTU => link.mtu = u32::from_ne_bytes(value.try_into().ok()?),
            libc::IFLA_STATS64 => {
                // rtnl_link_stats64 begins: packets received, sent, bytes, errors, dropped, each received and sent.
                let n = |i: usize| Some(u64::from_ne_bytes(value.get(i * 8..i * 8 + 8)?.try_into().ok()?));
                link.counters = [n(2)?, n(3)?, n(0)?, n(1)?];
                link.losses = [n(4)?, n(5)?, n(6)?, n(7)?];
            }
            _ => {}
        }
    }
    Some(link)
}

fn parse_address(body: &[u8]) -> Option<(u32, (IpAddr, u8, String))> {
    let (family, prefix, scope) = (*body.first()?, *body.get(1)?, *body.get(3)?);
    let index = u32::from_ne_bytes(body.get(4..8)?.try_into().ok()?);
    let mut found = None;
    for (kind, value) in attributes(body, 8) {
        let address = match (family as i32, value.len()) {
            (libc::AF_INET, 4) => IpAddr::from(Ipv4Addr::from(<[u8; 4]>::try_from(value).ok()?)),
            (libc::AF_INET6, 16) => IpAddr::from(Ipv6Addr::from(<[u8; 16]>::try_from(value).ok()?)),
            _ => continue,
        };
        match kind {
            // On a point-to-point link the other one is the peer's.
            libc::IFA_LOCAL => found = Some(address),
            libc::IFA_ADDRESS if found.is_none() => found = Some(address),
            _ => {}
        }
    }
    let scope = match scope {
        253 => "link",
        254 => "local",
        _ => "global",
    };
    Some((index, (found?, prefix, scope.to_owned())))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_the_own_namespace() {
        if !crate::backends::root() {
            return;
        }
        let me = rustix::process::pidfd_open(rustix::process::getpid(), rustix::process::PidfdFlags::empty());
        let links = NetnsProbe::open(me.as_ref().unwrap()).unwrap().links().unwrap();
        let lo = links.iter().find(|l| l.loopback).unwrap();
        assert_eq!((lo.name.as_str(), lo.mac.as_str()), ("lo", "00:00:00:00:00:00"));
        assert!(lo.mtu > 1000);
        if lo.up {
            let socket = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
            socket.send_to(b"x", socket.local_addr().unwrap()).unwrap();
            let links = NetnsProbe::open(me.as_ref().unwrap()).unwrap().links().unwrap();
            let counters = links.iter().find(|l| l.loopback).unwrap().counters;
            assert!(counters.iter().all(|n| *n > 0), "{counters:?}");
            let local = ("127.0.0.1".parse().unwrap(), 8, "local".to_owned());
            assert!(lo.addresses.contains(&local), "{lo:?}");
        }
    }

    #[test]
    fn malformed_messages_do_not_panic() {
        for n in 0..64 {
            let body = vec![0xff; n];
            let _ = (parse_link(&body), parse_address(&body));
        }
    }
}
