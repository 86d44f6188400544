//! Links, addresses and routes of this host by rtnetlink (rtnetlink(7), `linux/if_link.h`).
//!
//! Synchronous: each call is answered by the kernel at once. Only [`delete`] may take some milliseconds (the kernel waits
//! for readers of the link), so callers in async code give that one to `spawn_blocking`.

use crate::netlink::{Answer, CREATE, DUMP, EXCLUSIVE, Message, REPLACE, Socket, attributes, text, u32_at};
use karst_model::{Error, Result};
use std::{
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

pub(crate) const RTM_NEWLINK: u16 = 16;
const RTM_DELLINK: u16 = 17;
const RTM_GETLINK: u16 = 18;
pub(crate) const RTM_SETLINK: u16 = 19;
const RTM_NEWADDR: u16 = 20;
const RTM_DELADDR: u16 = 21;
const RTM_GETADDR: u16 = 22;
pub(crate) const RTM_NEWROUTE: u16 = 24;
const RTM_DELROUTE: u16 = 25;
const RTM_GETROUTE: u16 = 26;

pub(crate) const IFLA_ADDRESS: u16 = 1;
pub(crate) const IFLA_IFNAME: u16 = 3;
pub(crate) const IFLA_MTU: u16 = 4;
pub(crate) const IFLA_LINK: u16 = 5;
const IFLA_LINK_NETNSID: u16 = 37;
const IFLA_PERM_ADDRESS: u16 = 54;
const IFLA_MASTER: u16 = 10;
pub(crate) const IFLA_LINKINFO: u16 = 18;
const IFLA_IFALIAS: u16 = 20;
const IFLA_STATS64: u16 = 23;
pub(crate) const IFLA_INFO_KIND: u16 = 1;
const IFA_ADDRESS: u16 = 1;
const IFA_LOCAL: u16 = 2;
const IFA_BROADCAST: u16 = 4;
const RTA_DST: u16 = 1;
pub(crate) const RTA_OIF: u16 = 4;
pub(crate) const IFLA_INFO_DATA: u16 = 2;
const IFA_F_NODAD: u8 = 2;

const IFF_UP: u32 = 1;
const AF_UNSPEC: u8 = 0;
const AF_INET: u8 = 2;
const AF_INET6: u8 = 10;

/// A link as the kernel has it.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Link {
    /// Index.
    pub index: u32,
    /// Name.
    pub name: String,
    /// Alias (`IFLA_IFALIAS`); where Karst's mark stands.
    pub alias: Option<String>,
    /// Kind: `bridge`, `veth`, `tun`, …; `None` for hardware and loopback.
    pub kind: Option<String>,
    /// MAC address, lower case; `None` for links without one.
    pub mac: Option<String>,
    /// MTU in bytes.
    pub mtu: u32,
    /// Administratively up.
    pub up: bool,
    /// Index of the link below it (of a macvlan, a VLAN), or of its other end (of a veth); in another network namespace
    /// when `elsewhere`.
    pub below: Option<u32>,
    /// What is below is in another network namespace.
    pub elsewhere: bool,
    /// The address that the hardware has by itself.
    pub permanent: Option<String>,
    /// Index of the bridge (or other master) it belongs to.
    pub master: Option<u32>,
    /// Received bytes, sent bytes, received packets, sent packets.
    pub counters: [u64; 4],
}

/// An address on a link.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Address {
    /// Link index.
    pub link: u32,
    /// Address.
    pub address: IpAddr,
    /// Prefix length.
    pub prefix: u8,
    /// `RT_SCOPE_*`: 0 global, 253 link, 254 host.
    pub scope: u8,
}

impl Address {
    /// The scope as `ip` and the Incus API write it.
    pub fn scope_name(&self) -> &'static str {
        match self.scope {
            254 => "local",
            253 => "link",
            _ => "global",
        }
    }
}

pub(crate) fn failed(what: &str, name: &str, e: &io::Error) -> Error {
    match e.raw_os_error() {
        Some(libc::ENODEV) => Error::not_found(format!("interface {name:?} does not exist")),
        Some(libc::EEXIST) => Error::conflict(format!("interface {name:?} exists already")),
        Some(libc::EBUSY) => Error::conflict(format!("interface {name:?} is busy")),
        _ => Error::internal(format!("interface {name:?} could not be {what}"), e),
    }
}

pub(crate) fn info(index: u32, flags: u32, change: u32) -> [u8; 16] {
    let mut body = [0; 16];
    body[0] = AF_UNSPEC;
    body[4..8].copy_from_slice(&index.to_ne_bytes());
    body[8..12].copy_from_slice(&flags.to_ne_bytes());
    body[12..16].copy_from_slice(&change.to_ne_bytes());
    body
}

/// The kernel's limit is 15 bytes; what does not fit is refused here, for the kernel would say only `EINVAL`.
pub(crate) fn check(name: &str) -> Result<()> {
    if name.is_empty() || name.len() > 15 || name.contains(['/', '\0']) || name == "." || name == ".." {
        return Err(Error::invalid("name", format!("{name:?} is not an interface name")));
    }
    Ok(())
}

pub(crate) fn set(
    name: &str,
    flags: u32,
    change: u32,
    what: &str,
    fill: impl FnOnce(Message) -> Message,
) -> Result<()> {
    check(name)?;
    // Index 0 with a name: the kernel looks the name up itself, in the same message.
    let message = Message::new(RTM_SETLINK, 0, &info(0, flags, change)).text(IFLA_IFNAME, name);
    Socket::route().and_then(|mut s| s.execute(fill(message))).map_err(|e| failed(what, name, &e))
}

/// Parses `aa:bb:cc:dd:ee:ff`.
///
/// # Errors
/// Invalid.
pub fn parse_mac(mac: &str) -> Result<[u8; 6]> {
    let wrong = || Error::invalid("mac", format!("{mac:?} is not a MAC address"));
    let mut bytes = [0; 6];
    let mut parts = mac.split(':');
    for byte in &mut bytes {
        let part = parts
            .next()
            .filter(|p| p.len() == 2 && p.bytes().all(|b| b.is_ascii_hexdigit()))
            .ok_or_else(wrong)?;
        *byte = u8::from_str_radix(part, 16).map_err(|_| wrong())?;
    }
    parts.next().is_none().then_some(bytes).ok_or_else(wrong)
}

/// Writes a MAC address in lower case.
pub fn format_mac(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect::<Vec<_>>().join(":")
}

/// Makes a bridge with this MAC address (so it never changes with its ports) and MTU. It is down, without an alias: the
/// kernel takes the alias only in a second message.
///
/// # Errors
/// Conflict when the name is taken.
pub fn create_bridge(name: &str, mac: [u8; 6], mtu: Option<u32>) -> Result<()> {
    check(name)?;
    let mut message = Message::new(RTM_NEWLINK, CREATE | EXCLUSIVE, &info(0, 0, 0))
        .text(IFLA_IFNAME, name)
        .attr(IFLA_ADDRESS, &mac);
    if let Some(mtu) = mtu {
        message = message.attr(IFLA_MTU, &mtu.to_ne_bytes());
    }
    message = message.nested(IFLA_LINKINFO, |m| m.text(IFLA_INFO_KIND, "bridge"));
    Socket::route().and_then(|mut s| s.execute(message)).map_err(|e| failed("created", name, &e))
}

/// Deletes a link. May take milliseconds.
///
/// # Errors
/// Not found.
pub fn delete(name: &str) -> Result<()> {
    check(name)?;
    let message = Message::new(RTM_DELLINK, 0, &info(0, 0, 0)).text(IFLA_IFNAME, name);
    Socket::route().and_then(|mut s| s.execute(message)).map_err(|e| failed("deleted", name, &e))
}

/// Sets a link up or down.
///
/// # Errors
/// Not found.
pub fn set_up(name: &str, up: bool) -> Result<()> {
    set(name, if up { IFF_UP } else { 0 }, IFF_UP, "set up", |m| m)
}

/// Puts a link into a bridge, or takes it out.
///
/// # Errors
/// Not found, for either.
pub fn set_master(name: &str, bridge: Option<&str>) -> Result<()> {
    let index = match bridge {
        None => 0,
        Some(bridge) => {
            get(bridge)?.ok_or_else(|| Error::not_found(format!("bridge {bridge:?} does not exist")))?.index
        }
    };
    set(name, 0, 0, "put into its bridge", |m| m.attr(IFLA_MASTER, &index.to_ne_bytes()))
}

/// Sets the MTU.
///
/// # Errors
/// Not found; internal when the kernel refuses the value.
pub fn set_mtu(name: &str, mtu: u32) -> Result<()> {
    set(name, 0, 0, "given its MTU", |m| m.attr(IFLA_MTU, &mtu.to_ne_bytes()))
}

/// Sets the MAC address.
///
/// # Errors
/// Not found; internal when the kernel refuses the value.
pub fn set_mac(name: &str, mac: [u8; 6]) -> Result<()> {
    set(name, 0, 0, "given its MAC address", |m| m.attr(IFLA_ADDRESS, &mac))
}

/// Sets the alias: free text of at most 255 bytes, Karst's mark of ownership.
///
/// # Errors
/// Not found.
pub fn set_alias(name: &str, alias: &str) -> Result<()> {
    set(name, 0, 0, "marked", |m| m.attr(IFLA_IFALIAS, alias.as_bytes()))
}

/// The link called `name` (or having it as an alternative name).
///
/// # Errors
/// Internal.
pub fn get(name: &str) -> Result<Option<Link>> {
    check(name)?;
    let message = Message::new(RTM_GETLINK, 0, &info(0, 0, 0)).text(IFLA_IFNAME, name);
    match Socket::route().and_then(|mut s| s.query(message)) {
        Ok(answers) => Ok(answers.iter().find_map(parse_link)),
        Err(e) if e.raw_os_error() == Some(libc::ENODEV) => Ok(None),
        Err(e) => Err(failed("read", name, &e)),
    }
}

/// Is there a link of this name?
///
/// # Errors
/// Internal.
pub fn exists(name: &str) -> Result<bool> {
    get(name).map(|l| l.is_some())
}

/// All links.
///
/// # Errors
/// Internal.
pub fn list() -> Result<Vec<Link>> {
    dump(Message::new(RTM_GETLINK, DUMP, &info(0, 0, 0)), "links")
        .map(|answers| answers.iter().filter_map(parse_link).collect())
}

pub(crate) fn dump(message: Message, what: &str) -> Result<Vec<Answer>> {
    Socket::route()
        .and_then(|mut s| s.query(message))
        .map_err(|e| Error::internal(format!("the {what} of this host could not be listed"), e))
}

fn parse_link(answer: &Answer) -> Option<Link> {
    if answer.kind != RTM_NEWLINK {
        return None;
    }
    let mut link = Link {
        index: u32_at(&answer.body, 4)?,
        up: u32_at(&answer.body, 8)? & IFF_UP != 0,
        ..Link::default()
    };
    for (kind, value) in attributes(answer.body.get(16..)?) {
        match kind {
            IFLA_IFNAME => link.name = text(value),
            IFLA_IFALIAS => link.alias = Some(text(value)),
            IFLA_ADDRESS if value.len() == 6 => link.mac = Some(format_mac(value)),
            IFLA_MTU => link.mtu = u32_at(value, 0)?,
            IFLA_LINK => link.below = u32_at(value, 0).filter(|b| *b != 0),
            IFLA_LINK_NETNSID => link.elsewhere = true,
            IFLA_PERM_ADDRESS if value.len() == 6 => link.permanent = Some(format_mac(value)),
            IFLA_MASTER => link.master = u32_at(value, 0).filter(|m| *m != 0),
            IFLA_LINKINFO => {
                link.kind = attributes(value).find(|(k, _)| *k == IFLA_INFO_KIND).map(|(_, v)| text(v));
            }
            IFLA_STATS64 => {
                let at = |i: usize| {
                    value
                        .get(i * 8..)
                        .and_then(|v| v.first_chunk::<8>())
                        .map_or(0, |b| u64::from_ne_bytes(*b))
                };
                // The kernel's order: received packets, sent packets, received bytes, sent bytes.
                link.counters = [at(2), at(3), at(0), at(1)];
            }
            _ => {}
        }
    }
    Some(link)
}

/// Addresses of the link with this index, or of all links.
///
/// # Errors
/// Internal.
pub fn addresses(link: Option<u32>) -> Result<Vec<Address>> {
    let answers = dump(Message::new(RTM_GETADDR, DUMP, &[0; 8]), "addresses")?;
    Ok(answers.iter().filter_map(parse_address).filter(|a| link.is_none_or(|l| l == a.link)).collect())
}

fn parse_address(answer: &Answer) -> Option<Address> {
    if answer.kind != RTM_NEWADDR {
        return None;
    }
    let mut address = None;
    for (kind, value) in attributes(answer.body.get(8..)?) {
        // On a point-to-point link IFA_ADDRESS is the peer; where IFA_LOCAL is given it is the own one.
        if kind == IFA_LOCAL || (kind == IFA_ADDRESS && address.is_none()) {
            address = ip(value);
        }
    }
    Some(Address {
        link: u32_at(&answer.body, 4)?,
        address: address?,
        prefix: *answer.body.get(1)?,
        scope: *answer.body.get(3)?,
    })
}

pub(crate) fn ip(value: &[u8]) -> Option<IpAddr> {
    match value.len() {
        4 => Some(Ipv4Addr::from(*value.first_chunk::<4>()?).into()),
        16 => Some(Ipv6Addr::from(*value.first_chunk::<16>()?).into()),
        _ => None,
    }
}

pub(crate) fn octets(address: IpAddr) -> Vec<u8> {
    match address {
        IpAddr::V4(a) => a.octets().to_vec(),
        IpAddr::V6(a) => a.octets().to_vec(),
    }
}

pub(crate) fn family(address: IpAddr) -> u8 {
    if address.is_ipv4() { AF_INET } else { AF_INET6 }
}

fn change_address(kind: u16, flags: u16, name: &str, address: IpAddr, prefix: u8, what: &str) -> Result<()> {
    let link = get(name)?.ok_or_else(|| Error::not_found(format!("interface {name:?} does not exist")))?;
    // Without detection of duplicates, which a bridge without ports never ends: the address is ours to choose.
    let mut body = [family(address), prefix, if address.is_ipv6() { IFA_F_NODAD } else { 0 }, 0, 0, 0, 0, 0];
    body[4..8].copy_from_slice(&link.index.to_ne_bytes());
    let mut message = Message::new(kind, flags, &body)
        .attr(IFA_LOCAL, &octets(address))
        .attr(IFA_ADDRESS, &octets(address));
    if let IpAddr::V4(address) = address {
        let host_bits = u32::MAX.checked_shr(u32::from(prefix)).unwrap_or(0);
        message = message.attr(IFA_BROADCAST, &Ipv4Addr::from(u32::from(address) | host_bits).octets());
    }
    Socket::route()
        .and_then(|mut s| s.execute(message))
        .map_err(|e| Error::internal(format!("{address}/{prefix} could not be {what} {name:?}"), e))
}

/// Puts an address on a link; nothing happens when it is there.
///
/// # Errors
/// Not found; internal.
pub fn add_address(name: &str, address: impl Into<IpAddr>, prefix: u8) -> Result<()> {
    change_address(RTM_NEWADDR, CREATE | REPLACE, name, address.into(), prefix, "put on")
}

/// Takes an address off a link.
///
/// # Errors
/// Not found; internal, also when it is not there.
pub fn delete_address(name: &str, address: impl Into<IpAddr>, prefix: u8) -> Result<()> {
    change_address(RTM_DELADDR, 0, name, address.into(), prefix, "taken off")
}

/// Who made a route (`rtm_protocol`): a number of Karst's own, so that its routes are told from others'.
const RTPROT_KARST: u8 = 75;

fn change_route(kind: u16, flags: u16, link: u32, destination: (IpAddr, u8)) -> Result<()> {
    const RT_TABLE_MAIN: u8 = 254;
    const RT_SCOPE_LINK: u8 = 253;
    const RTN_UNICAST: u8 = 1;
    let (address, prefix) = destination;
    let scope = if address.is_ipv4() { RT_SCOPE_LINK } else { 0 };
    let mut body = [0; 12];
    body[..8].copy_from_slice(&[
        family(address),
        prefix,
        0,
        0,
        RT_TABLE_MAIN,
        RTPROT_KARST,
        scope,
        RTN_UNICAST,
    ]);
    let message =
        Message::new(kind, flags, &body).attr(RTA_DST, &octets(address)).attr(RTA_OIF, &link.to_ne_bytes());
    Socket::route().and_then(|mut s| s.execute(message)).map_err(|e| {
        Error::conflict(format!("the route to {address}/{prefix} could not be changed")).with_context(e)
    })
}

/// Makes the routes over the link with this index, as far as Karst made them, exactly `wanted` (network address and prefix
/// length).
///
/// # Errors
/// Conflict when the kernel refuses one, such as one that others have.
pub fn set_routes(link: u32, wanted: &[(IpAddr, u8)]) -> Result<()> {
    match offer_routes(link, wanted)?.into_iter().next() {
        None => Ok(()),
        Some((_, refused)) => Err(refused),
    }
}

/// As [`set_routes`], but goes on when the kernel refuses to add one; answers those.
///
/// # Errors
/// Conflict when one that is not wanted any more could not be removed.
pub fn offer_routes(link: u32, wanted: &[(IpAddr, u8)]) -> Result<Vec<((IpAddr, u8), Error)>> {
    let mut there = vec![];
    for family in [AF_INET, AF_INET6] {
        let mut body = [0; 12];
        body[0] = family;
        for answer in dump(Message::new(RTM_GETROUTE, DUMP, &body), "routes")? {
            if answer.kind != RTM_NEWROUTE || answer.body.get(5) != Some(&RTPROT_KARST) {
                continue;
            }
            let Some(rest) = answer.body.get(12..) else { continue };
            let on = attributes(rest).find(|(k, _)| *k == RTA_OIF).and_then(|(_, v)| u32_at(v, 0));
            let to = attributes(rest).find(|(k, _)| *k == RTA_DST).and_then(|(_, v)| ip(v));
            if let (true, Some(to), Some(prefix)) = (on == Some(link), to, answer.body.get(1)) {
                there.push((to, *prefix));
            }
        }
    }
    for route in there.iter().filter(|r| !wanted.contains(r)) {
        change_route(RTM_DELROUTE, 0, link, *route)?;
    }
    let mut refused = vec![];
    for route in wanted.iter().filter(|r| !there.contains(r)) {
        if let Err(e) = change_route(RTM_NEWROUTE, CREATE | EXCLUSIVE, link, *route) {
            refused.push((*route, e));
        }
    }
    Ok(refused)
}

/// Switches IGMP and MLD snooping of a bridge.
///
/// # Errors
/// Not found; internal, also for a link that is no bridge.
pub fn set_multicast_snooping(name: &str, on: bool) -> Result<()> {
    const IFLA_BR_MCAST_SNOOPING: u16 = 23;
    set_bridge(name, "given its multicast snooping", |m| m.attr(IFLA_BR_MCAST_SNOOPING, &[u8::from(on)]))
}

/// Changes what is of bridges, by the message that makes a link; without the flags for that it makes none. The one that changes links
/// says yes to it and changes nothing.
fn set_bridge(name: &str, what: &str, fill: impl FnOnce(Message) -> Message) -> Result<()> {
    check(name)?;
    let message = Message::new(RTM_NEWLINK, 0, &info(0, 0, 0)).text(IFLA_IFNAME, name);
    let message =
        message.nested(IFLA_LINKINFO, |m| m.text(IFLA_INFO_KIND, "bridge").nested(IFLA_INFO_DATA, fill));
    Socket::route().and_then(|mut s| s.execute(message)).map_err(|e| failed(what, name, &e))
}

/// Switches the spanning tree of a bridge, and says how many seconds a port listens, and then learns, before it forwards. With
/// the tree on the kernel makes less than two seconds two.
///
/// # Errors
/// Not found; internal, also for a link that is no bridge.
pub fn set_spanning_tree(name: &str, on: bool, delay: u32) -> Result<()> {
    const IFLA_BR_FORWARD_DELAY: u16 = 1;
    const IFLA_BR_STP_STATE: u16 = 5;
    // In hundredths of a second (USER_HZ).
    let delay = (if on { delay.max(2) } else { delay } * 100).to_ne_bytes();
    let state = |m: Message| m.attr(IFLA_BR_STP_STATE, &u32::from(on).to_ne_bytes());
    let waits = |m: Message| m.attr(IFLA_BR_FORWARD_DELAY, &delay);
    // A short delay is refused as long as there is a tree.
    match on {
        true => set_bridge(name, "given its spanning tree", |m| state(waits(m))),
        false => {
            set_bridge(name, "relieved of its spanning tree", state)?;
            set_bridge(name, "given its delay", waits)
        }
    }
}

/// Destinations of all IPv4 routes of all tables, the default route left out: address and prefix length.
///
/// # Errors
/// Internal.
pub fn routes() -> Result<Vec<(Ipv4Addr, u8)>> {
    let mut body = [0; 12];
    body[0] = AF_INET;
    let answers = dump(Message::new(RTM_GETROUTE, DUMP, &body), "routes")?;
    Ok(answers
        .iter()
        .filter(|a| a.kind == RTM_NEWROUTE)
        .filter_map(|a| {
            let prefix = *a.body.get(1)?;
            let destination = attributes(a.body.get(12..)?).find(|(k, _)| *k == RTA_DST)?.1;
            match ip(destination) {
                Some(IpAddr::V4(address)) if prefix > 0 => Some((address, prefix)),
                _ => None,
            }
        })
        .collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn loopback_is_seen() {
        let lo = get("lo").unwrap().unwrap();
        assert_eq!(lo.index, 1);
        assert_eq!(lo.kind, None);
        assert!(list().unwrap().iter().any(|l| l.name == "lo" && l.mtu == lo.mtu));
        assert!(get("no-such-link").unwrap().is_none());
        assert!(delete("no-such-link").unwrap_err().is(karst_model::ErrorKind::NotFound));
        if lo.up {
            let own = addresses(Some(1)).unwrap();
            assert!(own.iter().any(|a| a.address.is_loopback() && a.prefix == 8), "{own:?}");
            assert!(own.iter().all(|a| a.scope_name() == "local"));
        }
    }

    #[test]
    fn names_the_kernel_would_misread_are_refused() {
        for name in ["", "..", "a/b", "sixteen-bytes-xx"] {
            assert!(get(name).unwrap_err().is(karst_model::ErrorKind::Invalid), "{name:?}");
        }
    }

    #[test]
    fn macs() {
        assert_eq!(format_mac(&parse_mac("10:66:6A:00:00:ff").unwrap()), "10:66:6a:00:00:ff");
        for bad in [
            "",
            "10:66:6a:00:00",
            "10:66:6a:00:00:ff:01",
            "10:66:6a:00:00:+f",
            "1:0:0:0:0:0",
            "é0:66:6a:00:00:ff",
        ] {
            assert!(parse_mac(bad).is_err(), "{bad}");
        }
    }
}
