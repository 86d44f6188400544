//! Proxies: connections that are taken on one side, the host or the container, and made on the other.

use super::{Keys, disk::plain_path, other_keys::keys_of};
use crate::{Error, Result};
use serde::{Deserialize, Serialize};
use std::{
    fmt,
    net::{IpAddr, SocketAddr},
    str::FromStr,
};

/// Most ports of one proxy.
const PORTS: usize = 48;
/// Longest name of an abstract socket, and of a socket in its directory: the kernel's 108 bytes, less what leads there.
const LONGEST: usize = 80;

/// A proxy.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProxyDevice {
    /// What is passed on.
    pub protocol: ProxyProtocol,
    /// Listens in the guest and connects on the host, rather than the other way round.
    pub in_guest: bool,
    /// Where it listens and what it connects to from there.
    pub pairs: Vec<(ProxyAddress, ProxyAddress)>,
    /// Owner and permissions of a socket that it listens at by a path.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub socket: Option<SocketMode>,
    /// User and group that connect, as ids of the side where that is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub user: Option<(u32, u32)>,
    /// The server is told who connected, by the first line of the PROXY protocol.
    #[serde(default, skip_serializing_if = "is_false")]
    pub announce: bool,
}

fn is_false(b: &bool) -> bool {
    !b
}

/// Owner and permissions of a socket, as ids of the side where it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct SocketMode {
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Permission bits; who connects needs to be able to write.
    pub mode: u32,
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

/// One end of a proxy; as text `127.0.0.1:80`, `unix:/run/x.sock` or `unix:@name`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
pub enum ProxyAddress {
    /// An address and port.
    Net(SocketAddr),
    /// A unix socket by its path: absolute, without `..`.
    Path(String),
    /// A unix socket of the network namespace, by its name.
    Abstract(String),
}

impl fmt::Display for ProxyAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Net(address) => address.fmt(f),
            Self::Path(path) => write!(f, "unix:{path}"),
            Self::Abstract(name) => write!(f, "unix:@{name}"),
        }
    }
}

impl From<ProxyAddress> for String {
    fn from(address: ProxyAddress) -> Self {
        address.to_string()
    }
}

impl FromStr for ProxyAddress {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, String> {
        let wrong = || format!("{text:?} is no end of a proxy");
        match text.strip_prefix("unix:") {
            None => text.parse().map(Self::Net).map_err(|_| wrong()),
            Some(unix) => match unix.strip_prefix('@') {
                Some(name) if !name.is_empty() => Ok(Self::Abstract(name.to_owned())),
                None if unix.starts_with('/') => Ok(Self::Path(unix.to_owned())),
                _ => Err(wrong()),
            },
        }
    }
}

impl TryFrom<String> for ProxyAddress {
    type Error = String;

    fn try_from(text: String) -> std::result::Result<Self, String> {
        text.parse()
    }
}

impl ProxyAddress {
    /// It is a unix socket.
    pub fn is_unix(&self) -> bool {
        !matches!(self, Self::Net(_))
    }
}

impl ProxyDevice {
    pub(super) fn parse(keys: &Keys<'_>) -> Result<Self> {
        keys.known(&keys_of("proxy"))?;
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
            return Err(Error::unsupported(
                "a proxy passes streams (tcp, unix) on to streams, and udp on to udp",
            )
            .at(keys.field("connect")));
        }
        if connect.len() != 1 && connect.len() != listen.len() {
            return Err(Error::invalid(
                keys.field("connect"),
                format!("give one port, or as many as there are to listen at ({})", listen.len()),
            ));
        }
        let announce = keys.boolean("proxy_protocol")?;
        if announce && (from != ProxyProtocol::Tcp || connect[0].is_unix()) {
            return Err(Error::invalid(
                keys.field("proxy_protocol"),
                "the PROXY protocol tells a server of tcp who connected",
            ));
        }
        let by_path = matches!(listen[0], ProxyAddress::Path(_));
        let socket = match ["uid", "gid", "mode"].into_iter().find(|k| keys.get(k).is_some()) {
            Some(key) if !by_path => {
                return Err(Error::invalid(
                    keys.field(key),
                    "only a socket that is listened at by a path (listen=unix:/…) has an owner and a mode",
                ));
            }
            _ if by_path => Some(SocketMode {
                uid: keys.number("uid")?.unwrap_or(0),
                gid: keys.number("gid")?.unwrap_or(0),
                mode: mode(keys)?,
            }),
            _ => None,
        };
        let user = match ["security.uid", "security.gid"].into_iter().find(|k| keys.get(k).is_some()) {
            Some(key) if !matches!(connect[0], ProxyAddress::Path(_)) => {
                return Err(Error::invalid(
                    keys.field(key),
                    "who connects matters to a socket with a path only (connect=unix:/…)",
                ));
            }
            Some(_) => {
                Some((keys.number("security.uid")?.unwrap_or(0), keys.number("security.gid")?.unwrap_or(0)))
            }
            None => None,
        };
        let pairs = listen.iter().cloned().zip(connect.iter().cloned().cycle()).collect();
        Ok(Self { protocol: from, in_guest, pairs, socket, user, announce })
    }
}

/// `mode`, octal.
fn mode(keys: &Keys<'_>) -> Result<u32> {
    let Some(text) = keys.get("mode") else { return Ok(0o644) };
    u32::from_str_radix(text, 8).ok().filter(|m| *m <= 0o777).ok_or_else(|| {
        Error::invalid(
            keys.field("mode"),
            format!("{text:?} is not a mode; write three octal digits, as 0660"),
        )
    })
}

/// `tcp:127.0.0.1:80`, `udp:[::1]:53,5353`, `tcp:0.0.0.0:8000-8010`, `unix:/run/x.sock`, `unix:@name`.
fn addresses(keys: &Keys<'_>, key: &str) -> Result<(ProxyProtocol, Vec<ProxyAddress>)> {
    let text = keys.demand(key, "a proxy needs an address to listen at and one to connect to")?;
    let wrong = || {
        Error::invalid(
            keys.field(key),
            format!(
                "{text:?} is not an address; write tcp:127.0.0.1:80, udp:[::1]:53, tcp:0.0.0.0:8000-8010, \
                 unix:/run/server.sock or unix:@name"
            ),
        )
    };
    let (protocol, rest) = text.split_once(':').ok_or_else(wrong)?;
    let protocol = match protocol {
        "tcp" => ProxyProtocol::Tcp,
        "udp" => ProxyProtocol::Udp,
        "unix" => return Ok((ProxyProtocol::Tcp, vec![unix(&keys.field(key), rest).ok_or_else(wrong)??])),
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
        all.extend((low..=high).map(|p| ProxyAddress::Net(SocketAddr::new(address, p))));
        if all.len() > PORTS {
            return Err(Error::invalid(keys.field(key), format!("a proxy has at most {PORTS} ports")));
        }
    }
    Ok((protocol, all))
}

/// What follows `unix:`; `None` when it is neither a path nor a name.
fn unix(field: &str, text: &str) -> Option<Result<ProxyAddress>> {
    let long =
        |what: &str| Err(Error::invalid(field, format!("{what} of a socket has at most {LONGEST} bytes")));
    if let Some(name) = text.strip_prefix('@') {
        let plain = !name.is_empty() && !name.chars().any(char::is_control);
        return match name.len() {
            _ if !plain => None,
            0..=LONGEST => Some(Ok(ProxyAddress::Abstract(name.to_owned()))),
            _ => Some(long("the name")),
        };
    }
    if !text.starts_with('/') || text.chars().any(char::is_control) {
        return None;
    }
    Some(plain_path(field, text).and_then(|path| match path.rsplit('/').next() {
        Some(last) if last.len() > LONGEST => long("the last part"),
        _ => Ok(ProxyAddress::Path(path)),
    }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::Device;

    fn proxy(pairs: &[(&str, &str)]) -> Result<ProxyDevice> {
        let mut keys: std::collections::BTreeMap<String, String> =
            pairs.iter().map(|(k, v)| (k.to_string(), v.to_string())).collect();
        keys.insert("type".into(), "proxy".into());
        match Device::parse("p", &keys)? {
            Device::Proxy(proxy) => Ok(proxy),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn proxies_of_both_sides() {
        let web =
            proxy(&[("listen", "tcp:0.0.0.0:80-81,90"), ("connect", "tcp:[::1]:8080"), ("bind", "instance")]);
        let web = web.unwrap();
        assert!(web.in_guest && web.protocol == ProxyProtocol::Tcp && web.pairs.len() == 3);
        assert_eq!(web.pairs[2], ("0.0.0.0:90".parse().unwrap(), "[::1]:8080".parse().unwrap()));
        assert_eq!((web.socket, web.user, web.announce), (None, None, false));
        let unix = proxy(&[
            ("listen", "unix:/srv/x//sock"),
            ("connect", "unix:/run/server"),
            ("mode", "0660"),
            ("gid", "7"),
            ("security.uid", "1000"),
        ])
        .unwrap();
        assert_eq!(
            unix.pairs,
            [(ProxyAddress::Path("/srv/x/sock".into()), ProxyAddress::Path("/run/server".into()))]
        );
        assert_eq!(unix.socket, Some(SocketMode { uid: 0, gid: 7, mode: 0o660 }));
        assert_eq!(unix.user, Some((1000, 0)));
        let mixed =
            proxy(&[("listen", "unix:@x"), ("connect", "tcp:127.0.0.1:80"), ("proxy_protocol", "true")]);
        assert!(mixed.is_ok_and(|m| m.announce && m.pairs[0].0 == ProxyAddress::Abstract("x".into())));
        let good = ("listen", "udp:127.0.0.1:53");
        let long = format!("unix:@{}", "x".repeat(LONGEST + 1));
        for (pairs, field) in [
            (&[good][..], "connect"),
            (&[good, ("connect", "tcp:127.0.0.1:53")], "connect"),
            (&[good, ("connect", "udp:127.0.0.1:1-2")], "connect"),
            (&[good, ("connect", "udp:localhost:53")], "connect"),
            (&[good, ("connect", "unix:/run/x")], "connect"),
            (&[("listen", "unix:run/x"), ("connect", "tcp:127.0.0.1:1")], "listen"),
            (&[("listen", "unix:@"), ("connect", "tcp:127.0.0.1:1")], "listen"),
            (&[("listen", "unix:/run/../x"), ("connect", "tcp:127.0.0.1:1")], "listen"),
            (&[("listen", &long), ("connect", "tcp:127.0.0.1:1")], "listen"),
            (&[("listen", "unix:/x"), ("connect", "tcp:127.0.0.1:1"), ("mode", "rw")], "mode"),
            (&[("listen", "unix:@x"), ("connect", "tcp:127.0.0.1:1"), ("uid", "1")], "uid"),
            (&[("listen", "unix:@x"), ("connect", "tcp:127.0.0.1:1"), ("security.gid", "1")], "security.gid"),
            (&[good, ("connect", "udp:127.0.0.1:1"), ("proxy_protocol", "true")], "proxy_protocol"),
            (&[("listen", "tcp:0.0.0.0:0"), ("connect", "tcp:127.0.0.1:1")], "listen"),
            (&[("listen", "tcp:0.0.0.0:1-60000"), ("connect", "tcp:127.0.0.1:1")], "listen"),
            (&[good, ("connect", "udp:127.0.0.1:53"), ("nat", "true")], "nat"),
            (&[good, ("connect", "udp:127.0.0.1:53"), ("bind", "both")], "bind"),
        ] {
            let e = proxy(pairs).unwrap_err();
            assert_eq!(e.field, Some(format!("devices.p.{field}")), "{pairs:?}: {e}");
        }
    }

    #[test]
    fn an_end_is_text_in_records() {
        for text in ["127.0.0.1:80", "[::1]:53", "unix:/run/x", "unix:@name"] {
            let address: ProxyAddress = serde_json::from_value(text.into()).unwrap();
            assert_eq!(serde_json::to_value(&address).unwrap(), text);
        }
        for bad in ["unix:", "unix:@", "unix:x", "localhost:80"] {
            assert!(bad.parse::<ProxyAddress>().is_err(), "{bad}");
        }
        // As records had it before.
        let old = r#"{"protocol":"tcp","in_guest":false,"pairs":[["127.0.0.1:1","127.0.0.1:2"]]}"#;
        assert!(serde_json::from_str::<ProxyDevice>(old).is_ok_and(|p| p.socket.is_none()));
    }
}
