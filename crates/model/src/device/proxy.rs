//! Proxies: connections that are taken on one side, the host's network or the container's, and made on the other.

use super::Keys;
use crate::{Error, Result};
use serde::{Deserialize, Serialize};
use std::net::{IpAddr, SocketAddr};

/// Most ports of one proxy.
const PORTS: usize = 48;

/// A proxy.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProxyDevice {
    /// What is passed on.
    pub protocol: ProxyProtocol,
    /// Listens in the guest and connects in the host's network, rather than the other way round.
    pub in_guest: bool,
    /// Where it listens and what it connects to from there.
    pub pairs: Vec<(SocketAddr, SocketAddr)>,
}

/// What a proxy passes on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ProxyProtocol {
    /// Streams.
    Tcp,
    /// Datagrams; the answers to a sender find it for a minute.
    Udp,
}

impl ProxyDevice {
    pub(super) fn parse(keys: &Keys<'_>) -> Result<Self> {
        keys.known(&["type", "listen", "connect", "bind", "nat"])?;
        if keys.boolean("nat")? {
            return Err(Error::unsupported(
                "proxies by address translation are not there yet; leave nat out",
            )
            .at(keys.field("nat")));
        }
        let sides = [("host", false), ("instance", true), ("guest", true), ("container", true)];
        let in_guest = keys.one_of("bind", &sides)?.unwrap_or(false);
        let (from, listen) = addresses(keys, "listen")?;
        let (to, connect) = addresses(keys, "connect")?;
        if from != to {
            return Err(Error::unsupported("a proxy passes tcp on to tcp and udp on to udp")
                .at(keys.field("connect")));
        }
        if connect.len() != 1 && connect.len() != listen.len() {
            return Err(Error::invalid(
                keys.field("connect"),
                format!("give one port, or as many as there are to listen at ({})", listen.len()),
            ));
        }
        let pairs = listen.iter().copied().zip(connect.iter().copied().cycle()).collect();
        Ok(Self { protocol: from, in_guest, pairs })
    }
}

/// `tcp:127.0.0.1:80`, `udp:[::1]:53,5353`, `tcp:0.0.0.0:8000-8010`.
fn addresses(keys: &Keys<'_>, key: &str) -> Result<(ProxyProtocol, Vec<SocketAddr>)> {
    let text = keys.demand(key, "a proxy needs an address to listen at and one to connect to")?;
    let wrong = || {
        Error::invalid(
            keys.field(key),
            format!(
                "{text:?} is not an address; write tcp:127.0.0.1:80, udp:[::1]:53 or tcp:0.0.0.0:8000-8010"
            ),
        )
    };
    let (protocol, rest) = text.split_once(':').ok_or_else(wrong)?;
    let protocol = match protocol {
        "tcp" => ProxyProtocol::Tcp,
        "udp" => ProxyProtocol::Udp,
        "unix" => {
            return Err(Error::unsupported("proxies of unix sockets are not there yet; use tcp or udp")
                .at(keys.field(key)));
        }
        _ => return Err(wrong()),
    };
    let (host, ports) = rest.rsplit_once(':').ok_or_else(wrong)?;
    let address: IpAddr = match host.strip_prefix('[').and_then(|h| h.strip_suffix(']')) {
        Some(v6) => IpAddr::V6(v6.parse().map_err(|_| wrong())?),
        None => IpAddr::V4(host.parse().map_err(|_| wrong())?),
    };
    let mut all = vec![];
    for part in ports.split(',') {
        let (low, high) = part.split_once('-').unwrap_or((part, part));
        let port = |t: &str| t.parse::<u16>().ok().filter(|p| *p > 0).ok_or_else(wrong);
        let (low, high) = (port(low)?, port(high)?);
        if low > high {
            return Err(wrong());
        }
        all.extend((low..=high).map(|p| SocketAddr::new(address, p)));
        if all.len() > PORTS {
            return Err(Error::invalid(keys.field(key), format!("a proxy has at most {PORTS} ports")));
        }
    }
    Ok((protocol, all))
}
