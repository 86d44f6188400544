//! What nftables logs to a group (`log group N`): the packets' beginnings, as the kernel's `nfnetlink_log` hands them to the one
//! process that has bound the group.
//!
//! Format: `linux/netfilter/nfnetlink_log.h`. A group belongs to the network namespace in which its socket was opened; what is
//! logged to one that nobody has bound is dropped.

use crate::netlink::{Message, Socket, attributes, text};
use karst_model::{Error, Result};
use std::io;
use tokio::io::{Interest, unix::AsyncFd};

/// `NFNL_SUBSYS_ULOG`, with `NFULNL_MSG_PACKET` and `NFULNL_MSG_CONFIG`.
const PACKET: u16 = 4 << 8;
const CONFIG: u16 = 4 << 8 | 1;
/// Bytes of each packet from its network header on: enough for IPv6 with some extension headers, and ports.
const SNAP: u32 = 128;
/// Groups tried one after the other where one is another process'.
const TRIES: u16 = 16;

/// A packet that a rule logged.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LoggedPacket {
    /// The rule's `prefix`.
    pub prefix: String,
    /// EtherType.
    pub protocol: u16,
    /// Its beginning, from the network header on.
    pub payload: Vec<u8>,
}

/// A group, bound for as long as this lives.
#[derive(Debug)]
pub struct PacketLog {
    socket: AsyncFd<Socket>,
    group: u16,
}

impl PacketLog {
    /// Binds the group `first`, or the next that no other process has; needs a runtime.
    ///
    /// # Errors
    /// Unsupported where the kernel logs packets to nobody (`nfnetlink_log`), or all groups that were tried are taken.
    pub fn open(first: u16) -> Result<Self> {
        let mut last = io::Error::from(io::ErrorKind::AddrInUse);
        for group in (0..TRIES).map(|n| first.wrapping_add(n)) {
            match bind(group) {
                Ok(socket) => {
                    // SAFETY: `Socket` owns its descriptor and always names the same open one until it is dropped.
                    let socket = unsafe { AsyncFd::register_with_interest(socket, Interest::READABLE) }
                        .map_err(io::Error::from)?;
                    return Ok(Self { socket, group });
                }
                // Another process has it: EPERM where it is alive, EBUSY in between.
                Err(e)
                    if matches!(e.kind(), io::ErrorKind::PermissionDenied | io::ErrorKind::ResourceBusy) =>
                {
                    last = e;
                }
                Err(e) => {
                    last = e;
                    break;
                }
            }
        }
        Err(Error::unsupported("this host's kernel hands logged packets to no program (nfnetlink_log)")
            .with_context(last))
    }

    /// Its number, for rules.
    pub fn group(&self) -> u16 {
        self.group
    }

    /// Waits for packets. `false` beside them: more came than were read, and some are lost.
    ///
    /// # Errors
    /// Internal.
    pub async fn next(&mut self) -> Result<(Vec<LoggedPacket>, bool)> {
        loop {
            let mut guard = self.socket.readable().await?;
            let mut packets = vec![];
            let whole = guard.get_inner().receive(|kind, body| {
                if kind == PACKET {
                    packets.extend(packet(body));
                }
            })?;
            guard.clear_ready();
            if !packets.is_empty() || !whole {
                return Ok((packets, whole));
            }
        }
    }
}

fn bind(group: u16) -> io::Result<Socket> {
    const COMMAND: u16 = 1;
    const MODE: u16 = 2;
    const TIMEOUT: u16 = 4;
    const BIND: u8 = 1;
    const COPY_PACKET: u8 = 2;
    let mut socket = Socket::netfilter(0)?;
    // `nfgenmsg`: family, version, and the group in network order.
    let [high, low] = group.to_be_bytes();
    let head = [0, 0, high, low];
    socket.execute(Message::new(CONFIG, 0, &head).attr(COMMAND, &[BIND]))?;
    let [a, b, c, d] = SNAP.to_be_bytes();
    // Packets are held back for a tenth of a second at most, so that several make one message.
    let settings = Message::new(CONFIG, 0, &head)
        .attr(MODE, &[a, b, c, d, COPY_PACKET, 0])
        .attr(TIMEOUT, &10u32.to_be_bytes());
    socket.execute(settings)?;
    Ok(socket)
}

/// A packet out of its message; `None` of one without prefix or content.
fn packet(body: &[u8]) -> Option<LoggedPacket> {
    const HEADER: u16 = 1;
    const PAYLOAD: u16 = 9;
    const PREFIX: u16 = 10;
    let mut found = LoggedPacket { prefix: String::new(), protocol: 0, payload: vec![] };
    for (kind, value) in attributes(body.get(4..)?) {
        match kind {
            HEADER => found.protocol = u16::from_be_bytes(*value.first_chunk::<2>()?),
            PAYLOAD => found.payload = value.to_vec(),
            PREFIX => found.prefix = text(value),
            _ => {}
        }
    }
    (!found.prefix.is_empty() && !found.payload.is_empty()).then_some(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn packets_are_taken_out_of_messages() {
        let message = Message::new(PACKET, 0, &[2, 0, 0, 7])
            .attr(1, &[0x08, 0x00, 1, 0])
            .attr(3, &[0; 16])
            .attr(9, &[0x45, 0, 0, 20, 9])
            .text(10, "karst-x web ");
        let body = message.attributes();
        let found = packet(body).unwrap();
        assert_eq!(found.prefix, "karst-x web ");
        assert_eq!((found.protocol, found.payload.len()), (0x0800, 5));
        for end in 0..body.len() {
            // Cut anywhere: less, or nothing, and no panic.
            let _ = packet(&body[..end]);
        }
        assert_eq!(packet(&[]), None);
    }
}
