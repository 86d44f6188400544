//! Interfaces, addresses and counters inside another network namespace, over a netlink socket that was opened there.
//!
//! Sockets, and files below `/proc/net`, belong for ever to the namespace they were opened in: one short-lived thread enters it
//! once a guest start. Links and addresses are dumped when the kernel has told that one of them changed; between such news a
//! sample looks whether there are any, and reads the counters, which are a file that takes no lock of the kernel's. Formats:
//! rtnetlink(7), proc_pid_net(5).

use karst_model::{Error, Result};
use rustix::{
    buffer::spare_capacity,
    io::{Errno, pread},
    net::RecvFlags,
};
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
    /// Failed at receiving and sending, dropped (also for want of room) at receiving and sending.
    pub losses: [u64; 4],
    /// Address, prefix length, scope (`global`, `link`, `local`).
    pub addresses: Vec<(IpAddr, u8, String)>,
}

/// What a network namespace is asked with, and what is known of it.
#[derive(Debug)]
pub struct NetnsProbe {
    socket: OwnedFd,
    /// The kernel tells here that links or addresses changed. What it tells is not read: all is asked for anew.
    news: OwnedFd,
    /// `net/dev` of the namespace; where that cannot be had, all is asked for each time.
    counters: Option<OwnedFd>,
    /// As they were at the last dump, with counters of the last look; empty when that is not known.
    links: Vec<Link>,
}

const RTM_NEWLINK: u16 = 16;
const RTM_GETLINK: u16 = 18;
const RTM_NEWADDR: u16 = 20;
const RTM_GETADDR: u16 = 22;
/// `RTEXT_FILTER_SKIP_STATS`: without the counters that each protocol keeps of an interface, which are more than all the rest.
/// [`libc::IFLA_STATS64`] is there all the same.
const SKIP_STATS: u32 = 1 << 3;
/// Links and addresses that come, go or change (rtnetlink(7), `RTMGRP_`).
const GROUPS: i32 = libc::RTMGRP_LINK | libc::RTMGRP_IPV4_IFADDR | libc::RTMGRP_IPV6_IFADDR;
/// Room for news, bytes: that there was more than fits is news as well.
const NEWS_ROOM: i32 = 8 << 10;
/// News that one look takes away at most. A guest that makes them faster is dumped each time.
const NEWS: usize = 64;
/// Links that are found by their names, one for each line. Of more, which only a guest has that makes them on purpose, all is
/// asked for.
const COUNTED: usize = 64;

impl NetnsProbe {
    /// Opens a socket in the network namespace of a process, named by a pidfd.
    ///
    /// # Errors
    /// Internal when the process is gone or its namespace cannot be entered.
    pub fn open(pidfd: impl AsFd + Send) -> Result<Self> {
        let fd = pidfd.as_fd().as_raw_fd();
        // A thread of its own, which ends right away: entering a namespace changes the thread that does it.
        let opened = std::thread::scope(|s| {
            s.spawn(move || -> std::io::Result<Self> {
                // SAFETY: a plain call; the descriptor is borrowed by the scope and outlives the thread.
                if unsafe { libc::setns(fd, libc::CLONE_NEWNET) } < 0 {
                    return Err(std::io::Error::last_os_error());
                }
                let socket = netlink(0)?;
                // The kernel answers at once; this only bounds a kernel that does not.
                let timeout = libc::timeval { tv_sec: 2, tv_usec: 0 };
                option(&socket, libc::SO_RCVTIMEO, &timeout)?;
                let news = netlink(libc::SOCK_NONBLOCK)?;
                option(&news, libc::SO_RCVBUF, &NEWS_ROOM)?;
                listen_to(&news, GROUPS)?;
                let counters = std::fs::File::open("/proc/thread-self/net/dev");
                if let Err(e) = &counters {
                    tracing::debug!(error = %e, "counters of a guest's network are asked for with all else");
                }
                Ok(Self { socket, news, counters: counters.ok().map(OwnedFd::from), links: vec![] })
            })
            .join()
        });
        opened
            .map_err(|_| Error::internal("the guest's network could not be read", "thread panicked"))?
            .map_err(|e| Error::internal("the guest's network could not be read", e))
    }

    /// All interfaces with their addresses, as they are now.
    ///
    /// # Errors
    /// Internal when the kernel's answer is not understood.
    pub fn links(&mut self) -> Result<&[Link]> {
        let changed = self.changed();
        if changed || self.links.is_empty() || !self.count() {
            self.ask()?;
        }
        Ok(&self.links)
    }

    /// Has the kernel told of a change since the last look?
    fn changed(&self) -> bool {
        let mut changed = false;
        for _ in 0..NEWS {
            let mut beginning = [0u8; 16];
            match rustix::net::recv(&self.news, &mut beginning, RecvFlags::empty()) {
                // More than there is room for, which is forgotten when all that is there was taken.
                Ok(_) | Err(Errno::NOBUFS | Errno::INTR) => changed = true,
                Err(Errno::AGAIN) => break,
                Err(_) => return true,
            }
        }
        changed
    }

    /// Brings the counters of the known links up to date; `false` when others are there than are known.
    fn count(&mut self) -> bool {
        let Some(file) = self.counters.as_ref().filter(|_| self.links.len() <= COUNTED) else { return false };
        let mut bytes = Vec::<u8>::with_capacity(4096);
        let (mut from, mut counted) = (0, 0);
        while counted < self.links.len() {
            bytes.reserve(1024);
            let at = bytes.len() as u64;
            match pread(file, spare_capacity(&mut bytes), at) {
                Ok(0) | Err(_) => return false,
                Ok(_) => {}
            }
            while let Some(end) = bytes[from..].iter().position(|b| *b == b'\n') {
                let line = String::from_utf8_lossy(&bytes[from..from + end]);
                from += end + 1;
                // The two lines of the head have no colon.
                let Some((name, numbers)) = line.split_once(':') else { continue };
                let known = self.links.iter_mut().find(|link| link.name == name.trim_start());
                let (Some(link), Some((counters, losses))) = (known, parse_counters(numbers)) else {
                    return false;
                };
                (link.counters, link.losses) = (counters, losses);
                counted += 1;
            }
        }
        true
    }

    /// Asks for everything.
    fn ask(&mut self) -> Result<()> {
        // What is known is no longer right, also when this fails.
        self.links.clear();
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
        self.links = links.into_values().collect();
        Ok(())
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

/// A netlink socket in the namespace of the calling thread.
fn netlink(flags: i32) -> std::io::Result<OwnedFd> {
    // SAFETY: plain calls; the descriptor is new and nobody else's.
    unsafe {
        let socket =
            libc::socket(libc::AF_NETLINK, libc::SOCK_RAW | libc::SOCK_CLOEXEC | flags, libc::NETLINK_ROUTE);
        if socket < 0 { Err(std::io::Error::last_os_error()) } else { Ok(OwnedFd::from_raw_fd(socket)) }
    }
}

fn option<T>(socket: &OwnedFd, name: i32, value: &T) -> std::io::Result<()> {
    let size = size_of::<T>() as libc::socklen_t;
    let value = std::ptr::from_ref(value).cast();
    // SAFETY: the kernel reads `size` bytes of a value that lives here.
    match unsafe { libc::setsockopt(socket.as_raw_fd(), libc::SOL_SOCKET, name, value, size) } {
        0 => Ok(()),
        _ => Err(std::io::Error::last_os_error()),
    }
}

fn listen_to(socket: &OwnedFd, groups: i32) -> std::io::Result<()> {
    // SAFETY: all-zero is a valid address of netlink: the kernel chooses the number of the socket.
    let mut address: libc::sockaddr_nl = unsafe { std::mem::zeroed() };
    address.nl_family = libc::AF_NETLINK as libc::sa_family_t;
    address.nl_groups = groups.cast_unsigned();
    let size = size_of_val(&address) as libc::socklen_t;
    // SAFETY: the kernel reads `size` bytes of an address that lives here.
    match unsafe { libc::bind(socket.as_raw_fd(), (&raw const address).cast(), size) } {
        0 => Ok(()),
        _ => Err(std::io::Error::last_os_error()),
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
                // Those that were missed (the 16th) are dropped ones in `net/dev`.
                link.losses = [n(4)?, n(5)?, n(6)?.saturating_add(n(15)?), n(7)?];
            }
            _ => {}
        }
    }
    Some(link)
}

/// Numbers of a line of `net/dev`: bytes, packets, errors, drops, queue, frame, compressed and multicast received, then as
/// many sent.
fn parse_counters(numbers: &str) -> Option<([u64; 4], [u64; 4])> {
    let mut words = numbers.split_ascii_whitespace();
    let mut n = [0u64; 16];
    for number in &mut n {
        *number = words.next()?.parse().ok()?;
    }
    Some(([n[0], n[8], n[1], n[9]], [n[2], n[10], n[3], n[11]]))
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
        let mut probe = NetnsProbe::open(me.as_ref().unwrap()).unwrap();
        let lo = probe.links().unwrap().iter().find(|l| l.loopback).cloned().unwrap();
        assert_eq!((lo.name.as_str(), lo.mac.as_str()), ("lo", "00:00:00:00:00:00"));
        assert!(lo.mtu > 1000);
        if lo.up {
            let socket = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
            socket.send_to(b"x", socket.local_addr().unwrap()).unwrap();
            let links = probe.links().unwrap();
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

    #[test]
    fn counters_of_a_line() {
        let line = " 1 2 3 4 5 6 7 8 11 12 13 14 15 16 17 18";
        assert_eq!(parse_counters(line), Some(([1, 11, 2, 12], [3, 13, 4, 14])));
        assert_eq!((parse_counters("1 2 3"), parse_counters(&line.replace('5', "x"))), (None, None));
    }

    #[test]
    fn changes_are_told_and_counters_are_of_the_moment() {
        if !crate::backends::root() {
            return;
        }
        // SAFETY: a plain call on a thread that ends here.
        let made = std::thread::spawn(|| match unsafe { libc::unshare(libc::CLONE_NEWNET) } {
            0 => Some(std::fs::File::open("/proc/thread-self/ns/net").unwrap()),
            _ => None,
        });
        let Some(namespace) = made.join().unwrap() else {
            return crate::backends::missing("network namespaces cannot be made");
        };
        let mut probe = NetnsProbe::open(&namespace).unwrap();
        let lo = |probe: &mut NetnsProbe| {
            let links = probe.links().unwrap();
            links.iter().find(|l| l.name == "lo").cloned().unwrap()
        };
        let first = lo(&mut probe);
        assert!(!first.up && first.addresses.is_empty() && first.counters == [0; 4], "{first:?}");
        let address: IpAddr = "192.0.2.7".parse().unwrap();
        within(&namespace, || {
            crate::link::set_up("lo", true)?;
            crate::link::add_address("lo", address, 32)
        })
        .unwrap();
        let second = lo(&mut probe);
        assert!(second.up && second.addresses.contains(&(address, 32, "global".to_owned())), "{second:?}");
        within(&namespace, || {
            let socket = std::net::UdpSocket::bind("127.0.0.1:0")?;
            socket.send_to(b"x", socket.local_addr()?)?;
            Ok(())
        })
        .unwrap();
        // What nothing was told of is not asked for: what is false of it here stays, and the counters are true.
        let known = (0..100).find_map(|_| {
            probe.links.iter_mut().for_each(|l| l.mtu = 7);
            Some(lo(&mut probe)).filter(|l| l.mtu == 7)
        });
        let known = known.expect("a look without a dump");
        assert!(known.counters.iter().zip(second.counters).all(|(now, then)| *now > then), "{known:?}");
        probe.ask().unwrap();
        let asked = probe.links.iter().find(|l| l.name == "lo").unwrap();
        assert_eq!((asked.counters, asked.losses), (known.counters, known.losses), "both ways tell the same");
        // One that is there and not known, and one that is known and gone.
        probe.links[0].name = "other".to_owned();
        assert_eq!(lo(&mut probe).mtu, second.mtu);
        let there = probe.links.len();
        probe.links.push(Link { name: "gone".to_owned(), ..Link::default() });
        assert_eq!((lo(&mut probe).mtu, probe.links.len()), (second.mtu, there));
        // More news than there is room for.
        within(&namespace, || {
            for n in 1..200 {
                crate::link::add_address("lo", IpAddr::from([198, 51, 100, n]), 32)?;
            }
            Ok(())
        })
        .unwrap();
        assert_eq!(lo(&mut probe).addresses.len(), second.addresses.len() + 199);
        within(&namespace, || crate::link::set_up("lo", false)).unwrap();
        assert!(!lo(&mut probe).up, "the news that came after the lost ones were told");
    }
}
