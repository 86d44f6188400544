//! Links of guests: cables (veth), addresses on an interface of the host (macvlan, macvtap), VLANs, and moves between network
//! namespaces. By rtnetlink(7), `linux/if_link.h`, `linux/if_bridge.h`.
//!
//! What a guest gets is made in its network namespace at once, under its last name: there is no moment at which a link of
//! nobody is on the host.

use crate::{
    link::{
        self, IFLA_ADDRESS, IFLA_IFNAME, IFLA_INFO_DATA, IFLA_INFO_KIND, IFLA_LINK, IFLA_LINKINFO, IFLA_MTU,
        Link, RTA_OIF, RTM_NEWLINK, RTM_NEWROUTE, RTM_SETLINK, check, failed, family, info, octets,
        parse_mac,
    },
    netlink::{CREATE, EXCLUSIVE, Message, REPLACE, Socket},
};
use karst_model::{Error, Result, device::MacvlanMode};
use std::{
    io,
    net::IpAddr,
    os::fd::{AsRawFd, BorrowedFd},
};

const RTM_DELLINK: u16 = 17;
const RTM_NEWNEIGH: u16 = 28;
const RTM_DELNEIGH: u16 = 29;
const RTM_NEWLINKPROP: u16 = 108;
const IFLA_TXQLEN: u16 = 13;
const IFLA_AF_SPEC: u16 = 26;
const IFLA_NET_NS_FD: u16 = 28;
const IFLA_PROP_LIST: u16 = 52;
const IFLA_ALT_IFNAME: u16 = 53;
const NESTED: u16 = 0x8000;
const RTA_GATEWAY: u16 = 5;

/// The guest's end of a link.
#[derive(Debug, Clone, Copy)]
pub struct GuestEnd<'a> {
    /// Its network namespace.
    pub namespace: BorrowedFd<'a>,
    /// Name there.
    pub name: &'a str,
    /// MAC address.
    pub mac: &'a str,
    /// MTU.
    pub mtu: Option<u32>,
}

impl GuestEnd<'_> {
    fn put(&self, message: Message) -> Result<Message> {
        check(self.name)?;
        let mut message = message
            .text(IFLA_IFNAME, self.name)
            .attr(IFLA_ADDRESS, &parse_mac(self.mac)?)
            .attr(IFLA_NET_NS_FD, &self.namespace.as_raw_fd().to_ne_bytes());
        if let Some(mtu) = self.mtu {
            message = message.attr(IFLA_MTU, &mtu.to_ne_bytes());
        }
        Ok(message)
    }
}

fn execute(message: Message, what: &str, name: &str) -> Result<()> {
    Socket::route().and_then(|mut s| s.execute(message)).map_err(|e| failed(what, name, &e))
}

/// Lays a cable: one end on the host, down, the other with the guest.
///
/// # Errors
/// Conflict when a name is taken on either side.
pub fn create_cable(host: &str, guest: &GuestEnd<'_>) -> Result<()> {
    const VETH_INFO_PEER: u16 = 1;
    check(host)?;
    let peer = guest.put(Message::new(0, 0, &[]))?;
    let mut message = Message::new(RTM_NEWLINK, CREATE | EXCLUSIVE, &info(0, 0, 0)).text(IFLA_IFNAME, host);
    if let Some(mtu) = guest.mtu {
        message = message.attr(IFLA_MTU, &mtu.to_ne_bytes());
    }
    let message = message.nested(IFLA_LINKINFO, |m| {
        m.text(IFLA_INFO_KIND, "veth").nested(IFLA_INFO_DATA, |m| {
            m.nested(VETH_INFO_PEER, |m| m.raw(&info(0, 0, 0)).raw(peer.attributes()))
        })
    });
    execute(message, "created", host)
}

fn macvlan(message: Message, parent: u32, kind: &str, mode: MacvlanMode) -> Message {
    const IFLA_MACVLAN_MODE: u16 = 1;
    // MACVLAN_MODE_*
    let mode: u32 = match mode {
        MacvlanMode::Private => 1,
        MacvlanMode::Vepa => 2,
        MacvlanMode::Bridge => 4,
        MacvlanMode::Passthrough => 8,
    };
    message.attr(IFLA_LINK, &parent.to_ne_bytes()).nested(IFLA_LINKINFO, |m| {
        m.text(IFLA_INFO_KIND, kind)
            .nested(IFLA_INFO_DATA, |m| m.attr(IFLA_MACVLAN_MODE, &mode.to_ne_bytes()))
    })
}

fn on_parent(e: Error, parent: &Link) -> Error {
    match e.kind {
        karst_model::ErrorKind::Conflict => Error::conflict(format!(
            "interface {:?} is in a bridge or given to somebody else, or the name is taken in the guest",
            parent.name
        ))
        .with_context(e),
        _ => e,
    }
}

/// Gives a guest an address of its own on `parent`.
///
/// # Errors
/// Conflict when the name is taken there, or the parent is used by something that does not share it.
pub fn create_macvlan(parent: &Link, mode: MacvlanMode, guest: &GuestEnd<'_>) -> Result<()> {
    let message = guest.put(Message::new(RTM_NEWLINK, CREATE | EXCLUSIVE, &info(0, 0, 0)))?;
    execute(macvlan(message, parent.index, "macvlan", mode), "created", guest.name)
        .map_err(|e| on_parent(e, parent))
}

/// The same for a virtual machine: the link `name` stays on the host and is read by a character device.
///
/// # Errors
/// As [`create_macvlan`].
pub fn create_macvtap(
    parent: &Link,
    mode: MacvlanMode,
    name: &str,
    mac: &str,
    mtu: Option<u32>,
) -> Result<()> {
    check(name)?;
    let mut message = Message::new(RTM_NEWLINK, CREATE | EXCLUSIVE, &info(0, 0, 0))
        .text(IFLA_IFNAME, name)
        .attr(IFLA_ADDRESS, &parse_mac(mac)?);
    if let Some(mtu) = mtu {
        message = message.attr(IFLA_MTU, &mtu.to_ne_bytes());
    }
    execute(macvlan(message, parent.index, "macvtap", mode), "created", name)
        .map_err(|e| on_parent(e, parent))
}

/// Gives a guest a VLAN of `parent`.
///
/// # Errors
/// Unsupported by a kernel without 802.1Q, conflict when somebody has this VLAN.
pub fn create_vlan(parent: &Link, vlan: u16, guest: &GuestEnd<'_>) -> Result<()> {
    let message = guest.put(Message::new(RTM_NEWLINK, CREATE | EXCLUSIVE, &info(0, 0, 0)))?;
    vlan_of(message, parent, vlan, guest.name)
}

/// Makes an interface of the host of a VLAN of `parent`, down, with this MAC address.
///
/// # Errors
/// As [`create_vlan`].
pub fn create_host_vlan(parent: &Link, vlan: u16, name: &str, mac: [u8; 6]) -> Result<()> {
    check(name)?;
    let message = Message::new(RTM_NEWLINK, CREATE | EXCLUSIVE, &info(0, 0, 0))
        .text(IFLA_IFNAME, name)
        .attr(IFLA_ADDRESS, &mac);
    vlan_of(message, parent, vlan, name)
}

fn vlan_of(message: Message, parent: &Link, vlan: u16, name: &str) -> Result<()> {
    const IFLA_VLAN_ID: u16 = 1;
    let message = message.attr(IFLA_LINK, &parent.index.to_ne_bytes()).nested(IFLA_LINKINFO, |m| {
        m.text(IFLA_INFO_KIND, "vlan").nested(IFLA_INFO_DATA, |m| m.attr(IFLA_VLAN_ID, &vlan.to_ne_bytes()))
    });
    Socket::route().and_then(|mut s| s.execute(message)).map_err(|e| match e.raw_os_error() {
        Some(libc::EOPNOTSUPP) => Error::unsupported(
            "this host's kernel has no VLANs (802.1Q, module 8021q); without vlan the NIC can be had",
        ),
        Some(libc::EEXIST) => {
            Error::conflict(format!("VLAN {vlan} of {:?} is in use on this host", parent.name))
        }
        _ => failed("created", name, &e),
    })
}

/// Moves the link with this index of the current network namespace into another, under a new name.
///
/// # Errors
/// Conflict when the name is taken there.
pub fn hand_over(index: u32, to: BorrowedFd<'_>, name: &str) -> Result<()> {
    check(name)?;
    let message = Message::new(RTM_SETLINK, 0, &info(index, 0, 0))
        .text(IFLA_IFNAME, name)
        .attr(IFLA_NET_NS_FD, &to.as_raw_fd().to_ne_bytes());
    execute(message, "moved", name)
}

/// Renames the link with this index, which is down.
///
/// # Errors
/// Conflict when the name is taken.
pub fn rename(index: u32, name: &str) -> Result<()> {
    check(name)?;
    let message = Message::new(RTM_SETLINK, 0, &info(index, 0, 0)).text(IFLA_IFNAME, name);
    execute(message, "renamed", name)
}

/// Packets that may wait to be sent.
///
/// # Errors
/// Not found.
pub fn set_queue_length(name: &str, packets: u32) -> Result<()> {
    link::set(name, 0, 0, "given its queue length", |m| m.attr(IFLA_TXQLEN, &packets.to_ne_bytes()))
}

/// Gives a link another name beside its own; it goes with the link. Nothing happens when the link has it.
///
/// # Errors
/// Conflict when another link has the name.
pub fn add_name(name: &str, other: &str) -> Result<()> {
    check(other)?;
    let link =
        link::get(name)?.ok_or_else(|| Error::not_found(format!("interface {name:?} does not exist")))?;
    if let Some(there) = link::get(other)? {
        return match there.index == link.index {
            true => Ok(()),
            false => Err(Error::conflict(format!("the host has an interface {other:?} already"))),
        };
    }
    let message = Message::new(RTM_NEWLINKPROP, CREATE | EXCLUSIVE, &info(link.index, 0, 0))
        .nested(IFLA_PROP_LIST | NESTED, |m| m.text(IFLA_ALT_IFNAME, other));
    execute(message, "given another name", name)
}

/// Puts a port of a bridge into a VLAN; `untagged`: also what comes without a tag.
///
/// # Errors
/// Unsupported by a kernel without VLANs in bridges.
pub fn add_port_vlan(port: &str, vlan: u16, untagged: bool) -> Result<()> {
    port_vlan(port, vlan, if untagged { 2 | 4 } else { 0 }, RTM_SETLINK)
}

/// Takes a port out of a VLAN.
///
/// # Errors
/// As [`add_port_vlan`].
pub fn delete_port_vlan(port: &str, vlan: u16) -> Result<()> {
    port_vlan(port, vlan, 0, RTM_DELLINK)
}

/// Takes a port out of the VLAN in which its bridge puts each new one (`default_pvid`), unless that is `keep`.
///
/// # Errors
/// As [`add_port_vlan`].
pub fn leave_default_vlan(port: &str, bridge: &str, keep: Option<u16>) -> Result<()> {
    check(bridge)?;
    let default = match std::fs::read_to_string(format!("/sys/class/net/{bridge}/bridge/default_pvid")) {
        Ok(text) => default_vlan(&text),
        Err(e) if e.kind() == io::ErrorKind::NotFound => None,
        Err(e) => return Err(e.into()),
    };
    match default.filter(|vlan| Some(*vlan) != keep) {
        Some(vlan) => delete_port_vlan(port, vlan),
        None => Ok(()),
    }
}

/// Of the kernel's text; 0: new ports are in none.
fn default_vlan(text: &str) -> Option<u16> {
    text.trim().parse().ok().filter(|vlan| *vlan != 0)
}

fn port_vlan(port: &str, vlan: u16, flags: u16, kind: u16) -> Result<()> {
    const PF_BRIDGE: u8 = 7;
    const IFLA_BRIDGE_VLAN_INFO: u16 = 2;
    let link =
        link::get(port)?.ok_or_else(|| Error::not_found(format!("interface {port:?} does not exist")))?;
    let mut body = info(link.index, 0, 0);
    body[0] = PF_BRIDGE;
    let mut value = [0; 4];
    value[..2].copy_from_slice(&flags.to_ne_bytes());
    value[2..].copy_from_slice(&vlan.to_ne_bytes());
    let message =
        Message::new(kind, 0, &body).nested(IFLA_AF_SPEC | NESTED, |m| m.attr(IFLA_BRIDGE_VLAN_INFO, &value));
    Socket::route().and_then(|mut s| s.execute(message)).map_err(|e| match e.raw_os_error() {
        Some(libc::EOPNOTSUPP) => Error::unsupported("this host's kernel has no VLANs in bridges"),
        _ => failed("put into its VLAN", port, &e),
    })
}

/// A default route of the current network namespace, over the link with this index.
///
/// # Errors
/// Conflict when there is one, internal when the kernel refuses.
pub fn add_default_route(link: u32, gateway: IpAddr) -> Result<()> {
    const ONLINK: u32 = 4;
    const RT_TABLE_MAIN: u8 = 254;
    const RTPROT_STATIC: u8 = 4;
    const RTN_UNICAST: u8 = 1;
    let mut body = [0; 12];
    body[..8].copy_from_slice(&[family(gateway), 0, 0, 0, RT_TABLE_MAIN, RTPROT_STATIC, 0, RTN_UNICAST]);
    body[8..].copy_from_slice(&ONLINK.to_ne_bytes());
    let message = Message::new(RTM_NEWROUTE, CREATE | EXCLUSIVE, &body)
        .attr(RTA_GATEWAY, &octets(gateway))
        .attr(RTA_OIF, &link.to_ne_bytes());
    Socket::route().and_then(|mut s| s.execute(message)).map_err(|e| match e.raw_os_error() {
        Some(libc::EEXIST) => {
            Error::conflict("the guest has a default route already; set the gateway to none")
        }
        _ => Error::internal(format!("the route by {gateway} could not be made"), e),
    })
}

/// Lets the host answer for an address on the network of `link` (proxy ARP, proxy NDP), or no longer.
///
/// # Errors
/// Internal.
pub fn set_proxy(link: &str, address: IpAddr, on: bool) -> Result<()> {
    const NDA_DST: u16 = 1;
    const NTF_PROXY: u8 = 8;
    const NUD_PERMANENT: u16 = 0x80;
    let Some(found) = link::get(link)? else {
        return if on { Err(Error::not_found(format!("interface {link:?} does not exist"))) } else { Ok(()) };
    };
    let mut body = [0; 12];
    body[0] = family(address);
    body[4..8].copy_from_slice(&found.index.to_ne_bytes());
    body[8..10].copy_from_slice(&NUD_PERMANENT.to_ne_bytes());
    body[10] = NTF_PROXY;
    let (kind, flags) = if on { (RTM_NEWNEIGH, CREATE | REPLACE) } else { (RTM_DELNEIGH, 0) };
    let message = Message::new(kind, flags, &body).attr(NDA_DST, &octets(address));
    match Socket::route().and_then(|mut s| s.execute(message)) {
        Err(e) if !on && matches!(e.raw_os_error(), Some(libc::ENOENT | libc::ESRCH)) => Ok(()),
        Err(e) => Err(Error::internal(format!("the host could not answer for {address} on {link:?}"), e)),
        Ok(()) => Ok(()),
    }
}

/// Is VLAN filtering of this bridge switched on? False where the kernel has none.
///
/// # Errors
/// Internal.
pub fn filters_vlans(bridge: &str) -> Result<bool> {
    check(bridge)?;
    match std::fs::read_to_string(format!("/sys/class/net/{bridge}/bridge/vlan_filtering")) {
        Ok(text) => Ok(text.trim() == "1"),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(e) => Err(e.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::netns::{own, within};
    use std::{os::fd::AsFd, process::Command};

    /// A network namespace of the test's own.
    fn empty() -> Option<std::os::fd::OwnedFd> {
        let made = std::thread::spawn(|| {
            // SAFETY: a plain call on a thread that ends here.
            (unsafe { libc::unshare(libc::CLONE_NEWNET) } == 0)
                .then(|| std::fs::File::open("/proc/thread-self/ns/net").unwrap().into())
        });
        made.join().unwrap()
    }

    fn ip(words: &[&str]) -> String {
        String::from_utf8(Command::new("ip").args(words).output().unwrap().stdout).unwrap()
    }

    #[test]
    fn bridges_have_a_default_vlan_or_none() {
        assert_eq!(
            (default_vlan("1\n"), default_vlan("10\n"), default_vlan("0\n")),
            (Some(1), Some(10), None)
        );
    }

    #[test]
    fn links_come_whole_and_go_back() {
        let (Some(host), Some(guest)) = (empty(), empty()) else {
            return crate::backends::missing("network namespaces cannot be made");
        };
        let mac = "10:66:6a:00:00:01";
        let end = |name| GuestEnd { namespace: guest.as_fd(), name, mac, mtu: Some(1400) };
        within(&host, || {
            ip(&["link", "add", "real0", "type", "veth", "peer", "name", "real1"]);
            create_cable("kcable", &end("eth0"))?;
            assert!(create_cable("kcable", &end("eth1")).unwrap_err().is(karst_model::ErrorKind::Conflict));
            add_name("kcable", "wan-of-web")?;
            add_name("kcable", "wan-of-web")?;
            assert_eq!(link::get("wan-of-web")?.unwrap().name, "kcable");
            assert!(add_name("kcable", "real0").unwrap_err().is(karst_model::ErrorKind::Conflict));
            set_queue_length("kcable", 77)?;
            assert!(ip(&["link", "show", "kcable"]).contains("qlen 77"));
            let real = link::get("real0")?.unwrap();
            create_macvlan(
                &real,
                MacvlanMode::Private,
                &GuestEnd { mac: "10:66:6a:00:00:02", ..end("lan0") },
            )?;
            create_macvtap(&real, MacvlanMode::Private, "ktap", "10:66:6a:00:00:03", None)?;
            assert_eq!(link::get("ktap")?.unwrap().kind.as_deref(), Some("macvtap"));
            assert!(ip(&["-d", "link", "show", "ktap"]).contains("mode private"));
            hand_over(real.index, guest.as_fd(), "phys0")?;
            assert!(link::get("real0")?.is_none());
            Ok(())
        })
        .unwrap();
        within(&guest, || {
            let eth0 = link::get("eth0")?.unwrap();
            assert_eq!((eth0.mac.as_deref(), eth0.mtu), (Some(mac), 1400));
            assert!(eth0.elsewhere);
            let phys = link::get("phys0")?.unwrap();
            link::set_up("eth0", true)?;
            link::add_address("eth0", "192.0.2.5".parse::<IpAddr>().unwrap(), 32)?;
            add_default_route(eth0.index, "169.254.0.1".parse().unwrap())?;
            assert!(ip(&["route"]).contains("default via 169.254.0.1"));
            hand_over(phys.index, host.as_fd(), "real0")
        })
        .unwrap();
        within(&host, || {
            assert!(link::get("real0")?.is_some());
            link::set_up("real0", true)?;
            let address = "192.0.2.5".parse().unwrap();
            set_proxy("real0", address, true)?;
            assert!(ip(&["neigh", "show", "proxy"]).contains("192.0.2.5"));
            set_proxy("real0", address, false)?;
            set_proxy("real0", address, false)?;
            assert_eq!(ip(&["neigh", "show", "proxy"]), "");
            Ok(())
        })
        .unwrap();
        own().unwrap();
    }
}
