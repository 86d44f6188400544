//! Packets whose arrival is seen: the first of a connection by TCP or UDP, or an echo request. They are seen by raw sockets, which
//! get what the rules of their own namespace have let through, and which need nobody to answer.

use rustix::{
    io::Errno,
    net::{self, AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, ipproto},
};
use std::{
    collections::BTreeMap,
    net::{IpAddr, SocketAddr},
    os::fd::OwnedFd,
    sync::{Arc, Mutex},
};

/// The port that a packet comes from says which it is: this one and its number.
const FIRST_PORT: u16 = 20_000;
/// So many packets can be told apart.
pub const MOST: u32 = 40_000;

/// What a packet is of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    Tcp,
    Udp,
    Icmp,
}

/// A packet that is to be sent; the port it goes to says nothing of ICMP.
#[derive(Debug, Clone, Copy)]
pub struct Probe {
    pub number: u32,
    pub kind: Kind,
    pub to: SocketAddr,
}

/// What has arrived: number of the packet, name of the namespace, port there, 0 of ICMP.
pub type Seen = Arc<Mutex<BTreeMap<u32, (String, u16)>>>;

/// Runs `work` on a thread of its own in a namespace.
fn inside<T: Send + 'static>(ns: String, work: impl FnOnce() -> T + Send + 'static) -> T {
    let thread = std::thread::spawn(move || {
        let ns = std::fs::File::open(format!("/run/netns/{ns}")).unwrap();
        rustix::thread::move_into_link_name_space(
            std::os::fd::AsFd::as_fd(&ns),
            Some(rustix::thread::LinkNameSpaceType::Network),
        )
        .unwrap();
        work()
    });
    thread.join().unwrap()
}

fn family(v4: bool) -> AddressFamily {
    if v4 { AddressFamily::INET } else { AddressFamily::INET6 }
}

fn raw(kind: Kind, at: IpAddr) -> OwnedFd {
    let protocol = match kind {
        Kind::Tcp => ipproto::TCP,
        Kind::Udp => ipproto::UDP,
        Kind::Icmp if at.is_ipv4() => ipproto::ICMP,
        Kind::Icmp => ipproto::ICMPV6,
    };
    let family = family(at.is_ipv4());
    let socket = net::socket_with(family, SocketType::RAW, SocketFlags::CLOEXEC, Some(protocol)).unwrap();
    net::bind(&socket, &SocketAddr::new(at, 0)).unwrap_or_else(|e| panic!("{at}: {e}"));
    socket
}

/// Number and port of a packet that is the first of its kind, as a raw socket gets it.
fn first(kind: Kind, v4: bool, packet: &[u8]) -> Option<(u32, u16)> {
    // Those of IPv4 come with their header.
    let packet = if v4 { packet.get(usize::from(packet.first()? & 15) * 4..)? } else { packet };
    let word = |at: usize| Some(u16::from_be_bytes(*packet.get(at..)?.first_chunk()?));
    match kind {
        Kind::Icmp => {
            let request = if v4 { 8 } else { 128 };
            (*packet.first()? == request).then_some(())?;
            Some((u32::from_be_bytes(*packet.get(8..)?.first_chunk()?), 0))
        }
        // Of SYN, ACK, RST and FIN the first has SYN alone.
        Kind::Tcp if *packet.get(13)? & 0x17 != 0x02 => None,
        _ => Some((u32::from(word(0)?.checked_sub(FIRST_PORT)?), word(2)?)),
    }
}

/// Notes from now on what arrives in a namespace at an address, or at all of its version.
pub fn listen(name: &str, ns: &str, at: IpAddr, seen: &Seen) {
    for kind in [Kind::Tcp, Kind::Udp, Kind::Icmp] {
        let socket = inside(ns.to_owned(), move || raw(kind, at));
        let (name, seen) = (name.to_owned(), seen.clone());
        std::thread::spawn(move || {
            let mut buffer = [0u8; 512];
            while let Ok((length, _)) = net::recv(&socket, &mut buffer[..], RecvFlags::empty()) {
                if let Some((number, port)) = first(kind, at.is_ipv4(), &buffer[..length.min(512)]) {
                    seen.lock().unwrap().insert(number, (name.clone(), port));
                }
            }
        });
    }
}

/// Sends packets from an address of a namespace.
pub fn send(ns: String, from: IpAddr, lot: Vec<Probe>) {
    inside(ns, move || lot.iter().for_each(|probe| probe.send(from)));
}

impl Probe {
    pub fn port(&self) -> u16 {
        assert!(self.number < MOST, "more packets than can be told apart");
        FIRST_PORT + self.number as u16
    }

    /// What forbids it may say so in its answer to this call or the next: that counts for nothing here.
    fn send(&self, from: IpAddr) {
        let open = |kind, more| {
            let flags = SocketFlags::CLOEXEC | more;
            let socket = net::socket_with(family(from.is_ipv4()), kind, flags, None).unwrap();
            let own = SocketAddr::new(from, self.port());
            net::bind(&socket, &own).unwrap_or_else(|e| panic!("{own}: {e}"));
            socket
        };
        let sent = match self.kind {
            Kind::Udp => {
                let socket = open(SocketType::DGRAM, SocketFlags::empty());
                net::sendto(&socket, &self.number.to_be_bytes(), SendFlags::empty(), &self.to).map(drop)
            }
            // Sent when this returns; nobody asks what became of the connection.
            Kind::Tcp => net::connect(open(SocketType::STREAM, SocketFlags::NONBLOCK), &self.to),
            Kind::Icmp => {
                let to = SocketAddr::new(self.to.ip(), 0);
                net::sendto(raw(Kind::Icmp, from), &self.echo(), SendFlags::empty(), &to).map(drop)
            }
        };
        match sent {
            Ok(()) | Err(Errno::INPROGRESS) => {}
            Err(e) => assert_ne!(e, Errno::INVAL, "{self:?} from {from}"),
        }
    }

    /// An echo request with the number in it.
    fn echo(&self) -> Vec<u8> {
        let v4 = self.to.is_ipv4();
        let mut packet = vec![if v4 { 8 } else { 128 }, 0, 0, 0];
        packet.extend((self.number as u16).to_be_bytes());
        packet.extend([0, 1]);
        packet.extend(self.number.to_be_bytes());
        if v4 {
            // The kernel does it for ICMPv6.
            let words = packet.chunks(2).map(|pair| u32::from(u16::from_be_bytes([pair[0], pair[1]])));
            let carried = |sum: u32| (sum & 0xffff) + (sum >> 16);
            let sum = carried(carried(words.sum()));
            packet[2..4].copy_from_slice(&(!(sum as u16)).to_be_bytes());
        }
        packet
    }
}
