//! Managed networks: the record, the typed form of a bridge's configuration, and leases.

use crate::{
    Config, Error, Name, NetworkId, ProjectId, Result,
    device::{interface_name, parse_mac},
    error::nearest,
    firewall::{self, Policy},
    keys::parse_bool,
    network_life::NetworkLife,
    network_names::{NetworkNames, is_name},
    network_ports::{NetworkPorts, is_group_key},
};
use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use serde::{Deserialize, Serialize};
use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    str::FromStr,
};

/// A managed network.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Network {
    /// Reference.
    pub id: NetworkId,
    /// Project that owns it.
    pub project: ProjectId,
    /// What it is made of.
    #[serde(default)]
    pub kind: crate::uplink::NetworkKind,
    /// Name, unique in its project; at most 15 bytes.
    pub name: Name,
    /// The bridge's interface on the host; `None`: its name is the network's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub interface: Option<Name>,
    /// User's text.
    #[serde(default)]
    pub description: String,
    /// As written (`ipv4.address`, `ipv4.nat`, `dns.domain`, …), `auto` already replaced by the value chosen.
    #[serde(default)]
    pub config: Config,
    /// Whether it is there, and begins with its host.
    #[serde(default, skip_serializing_if = "NetworkLife::is_usual")]
    pub life: NetworkLife,
    /// Grows with each change.
    pub spec_version: u64,
}

/// Who decides the names in a network's DNS.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, Default)]
#[serde(rename_all = "snake_case")]
pub enum DnsMode {
    /// Nobody: upstream names only.
    None,
    /// The names of the guests, as Karst knows them.
    #[default]
    Managed,
    /// Also what guests say of themselves by DHCP.
    Dynamic,
}

/// A bridge, parsed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct BridgeSpec {
    /// IPv4 address of the bridge with its prefix; `None` when `ipv4.address=none`.
    pub ipv4: Option<Ipv4Net>,
    /// Further IPv4 addresses of the bridge, each with its own subnet; DHCP serves the first alone.
    pub more: Vec<Ipv4Net>,
    /// Translate IPv4 addresses of what leaves.
    pub nat: bool,
    /// To this address rather than the outgoing interface's.
    pub nat_address: Option<Ipv4Addr>,
    /// To one of those from `nat_address` to this.
    pub nat_last: Option<Ipv4Addr>,
    /// Ports of TCP and UDP that are translated to.
    pub nat_ports: Option<(u16, u16)>,
    /// Behind the translations of others rather than before them.
    pub nat_after: bool,
    /// Serve DHCPv4.
    pub dhcp: bool,
    /// Ranges of DHCPv4 addresses, inclusive; the whole subnet when there is none.
    pub dhcp_ranges: Vec<(Ipv4Addr, Ipv4Addr)>,
    /// Seconds for which a DHCPv4 lease holds; 0: for ever.
    pub dhcp_expiry: u32,
    /// Gateway that DHCPv4 names instead of the bridge.
    pub dhcp_gateway: Option<Ipv4Addr>,
    /// Routes that DHCPv4 tells guests: destination, gateway.
    pub dhcp_routes: Vec<(Ipv4Net, Ipv4Addr)>,
    /// Route IPv4 between the bridge and the rest.
    pub routing: bool,
    /// Open other firewalls of the host for IPv4 of this network.
    pub firewall: bool,
    /// Further IPv4 destinations that are reached over the bridge.
    pub routes: Vec<Ipv4Net>,
    /// IPv6 address of the bridge with its prefix.
    pub ipv6: Option<Ipv6Net>,
    /// As `more`.
    pub more6: Vec<Ipv6Net>,
    /// Translate IPv6 addresses of what leaves.
    pub nat6: bool,
    /// As `nat_address`.
    pub nat6_address: Option<Ipv6Addr>,
    /// As `nat_last`.
    pub nat6_last: Option<Ipv6Addr>,
    /// As `nat_ports`.
    pub nat6_ports: Option<(u16, u16)>,
    /// As `nat_after`.
    pub nat6_after: bool,
    /// Serve DHCPv6: beside SLAAC for options only, or addresses too.
    pub dhcp6: bool,
    /// DHCPv6 gives addresses; guests make none themselves.
    pub dhcp6_stateful: bool,
    /// Ranges of stateful DHCPv6.
    pub dhcp6_ranges: Vec<(Ipv6Addr, Ipv6Addr)>,
    /// Seconds for which a DHCPv6 lease holds; 0: for ever.
    pub dhcp6_expiry: u32,
    /// Announce the router.
    pub ra: bool,
    /// Route IPv6 between the bridge and the rest.
    pub routing6: bool,
    /// Open other firewalls of the host for IPv6 of this network.
    pub firewall6: bool,
    /// Further IPv6 destinations that are reached over the bridge.
    pub routes6: Vec<Ipv6Net>,
    /// DNS domain of the guests.
    pub domain: String,
    /// Who decides the names.
    pub dns_mode: DnsMode,
    /// Domains in which guests search for short names.
    pub search: Vec<String>,
    /// Name servers that guests are told instead of the bridge.
    pub nameservers: Vec<IpAddr>,
    /// What is answered beside the guests' names, and addresses that are kept.
    #[serde(skip_serializing_if = "NetworkNames::is_usual")]
    pub names: NetworkNames,
    /// MTU of the bridge.
    pub mtu: Option<u32>,
    /// MAC address of the bridge; otherwise one is derived.
    pub hwaddr: Option<String>,
    /// Spanning tree; off where nobody said it.
    pub stp: Option<bool>,
    /// Seconds that a port of it waits, twice, before it forwards.
    pub forward_delay: Option<u32>,
    /// IGMP and MLD snooping; the kernel's default (on) when absent.
    pub multicast_snooping: Option<bool>,
    /// Interfaces of the host that become ports of the bridge, each as [`ExternalInterface::parse`] takes it.
    pub external_interfaces: Vec<String>,
    /// How fast its ports are.
    #[serde(skip_serializing_if = "NetworkPorts::is_usual")]
    pub ports: NetworkPorts,
    /// What passes between the bridge and the rest, where ACLs decide that.
    pub policy: Option<Policy>,
    /// `raw.dnsmasq`, which the host's policy must grant ([`crate::dnsmasq`] says which lines).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub raw_dnsmasq: Option<String>,
}

/// An interface of the host that is to be a port of a bridge: one that is there (`eth1`), or one that is made of a VLAN
/// (`NAME/PARENT/VLAN`) and goes when it is no port any more.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ExternalInterface<'a> {
    /// Its name.
    pub name: &'a str,
    /// What it is made of: an interface that is there, and the VLAN.
    pub vlan: Option<(&'a str, u16)>,
}

impl<'a> ExternalInterface<'a> {
    /// Parses one.
    ///
    /// # Errors
    /// Invalid; the field is `config.bridge.external_interfaces`.
    pub fn parse(text: &'a str) -> Result<Self> {
        let field = "config.bridge.external_interfaces";
        let words: Vec<&str> = text.split('/').collect();
        let (name, vlan) = match words[..] {
            [name] => (name, None),
            [name, parent, vlan] => {
                interface_name(field, parent)?;
                (name, Some((parent, crate::device::vlan_id(field, vlan)?)))
            }
            _ => {
                let text = format!("{text:?} is neither an interface nor NAME/PARENT/VLAN");
                return Err(Error::invalid(field, text));
            }
        };
        interface_name(field, name)?;
        if vlan.is_some_and(|(parent, _)| parent == name) {
            return Err(Error::invalid(field, format!("{name:?} cannot be made of itself")));
        }
        Ok(Self { name, vlan })
    }

    /// The interface that has to be there.
    pub fn needs(&self) -> &'a str {
        self.vlan.map_or(self.name, |(parent, _)| parent)
    }
}

impl Default for BridgeSpec {
    fn default() -> Self {
        Self {
            ipv4: None,
            more: vec![],
            nat: false,
            nat_address: None,
            nat_last: None,
            nat_ports: None,
            nat_after: false,
            dhcp: true,
            dhcp_ranges: vec![],
            dhcp_expiry: HOUR,
            dhcp_gateway: None,
            dhcp_routes: vec![],
            routing: true,
            firewall: true,
            routes: vec![],
            ipv6: None,
            more6: vec![],
            nat6: false,
            nat6_address: None,
            nat6_last: None,
            nat6_ports: None,
            nat6_after: false,
            dhcp6: true,
            dhcp6_stateful: false,
            dhcp6_ranges: vec![],
            dhcp6_expiry: HOUR,
            ra: true,
            routing6: true,
            firewall6: true,
            routes6: vec![],
            domain: "karst".into(),
            dns_mode: DnsMode::Managed,
            search: vec![],
            nameservers: vec![],
            names: NetworkNames::default(),
            mtu: None,
            hwaddr: None,
            stp: None,
            forward_delay: None,
            multicast_snooping: None,
            external_interfaces: vec![],
            ports: NetworkPorts::default(),
            policy: None,
            raw_dnsmasq: None,
        }
    }
}

const HOUR: u32 = 3600;

/// Keys of a bridge network with what they mean, in order.
pub const BRIDGE_KEYS: &[(&str, &str)] = &[
    ("bridge.driver", "native"),
    (
        "bridge.external_interfaces",
        "interfaces of the host that become ports of the bridge, comma-separated; NAME/PARENT/VLAN makes one of a VLAN",
    ),
    (
        "bridge.forward_delay",
        "seconds that a port waits, twice, before it forwards, 0 to 30 (0; with a spanning tree 2)",
    ),
    ("bridge.hwaddr", "MAC address of the bridge"),
    ("bridge.mtu", "MTU of the bridge, 1280 to 65535"),
    ("bridge.multicast_snooping", "IGMP and MLD snooping (true)"),
    ("bridge.stp", "spanning tree (false)"),
    ("dns.domain", "DNS domain of the guests (karst)"),
    (
        "dns.forwarders",
        "servers that are asked for names that the network does not know: ADDRESS, DOMAIN=ADDRESS, or DOMAIN= for those of the \
         host, comma-separated",
    ),
    ("dns.hosts", "further hosts: ADDRESS NAME [NAME…], comma-separated"),
    ("dns.local", "names of dns.domain that are not known are asked for nowhere else (true)"),
    ("dns.mode", "names of the guests: managed, dynamic (also what they say themselves) or none"),
    ("dns.nameservers", "name servers that guests are told instead of the bridge, comma-separated"),
    ("dns.plain", "names without a domain are asked for elsewhere (false)"),
    ("dns.search", "domains in which guests search for short names, comma-separated"),
    (
        "dns.srv",
        "services: SERVICE PROTOCOL [DOMAIN [TARGET [PORT [PRIORITY [WEIGHT]]]]], - for what is not said, comma-separated",
    ),
    ("dns.txt", "texts: NAME VALUE, one a line"),
    ("ipv4.address", "address of the bridge with its prefix, auto or none"),
    (
        "ipv4.addresses",
        "further addresses of the bridge with their prefixes, comma-separated; DHCP serves ipv4.address alone",
    ),
    ("ipv4.dhcp", "serve DHCPv4 (true)"),
    ("ipv4.dhcp.expiry", "how long leases hold, such as 1h (the default) or infinite"),
    ("ipv4.dhcp.gateway", "gateway that guests are told instead of the bridge"),
    (
        "ipv4.dhcp.hosts",
        "addresses kept for MAC addresses, which need not be of a guest yet: MAC ADDRESS [NAME], comma-separated",
    ),
    ("ipv4.dhcp.ranges", "ranges FIRST-LAST for leases, comma-separated; all addresses when absent"),
    ("ipv4.dhcp.routes", "routes that guests are told: DESTINATION,GATEWAY,DESTINATION,GATEWAY,…"),
    ("ipv4.firewall", "open other firewalls of the host for the network (true)"),
    ("ipv4.nat", "translate addresses of what leaves (false; true with an automatic address)"),
    ("ipv4.nat.address", "source address of what leaves translated, or a range FIRST-LAST of them"),
    ("ipv4.nat.order", "before or after the translations of others (before)"),
    ("ipv4.nat.ports", "source ports of what leaves translated by TCP or UDP, FIRST-LAST"),
    ("ipv4.routes", "further subnets that are reached over the bridge, comma-separated"),
    ("ipv4.routing", "route between the bridge and the rest (true)"),
    ("ipv6.address", "address of the bridge with its prefix, auto or none"),
    ("ipv6.addresses", "further addresses of the bridge with their prefixes, comma-separated"),
    ("ipv6.dhcp", "serve DHCPv6 (true)"),
    ("ipv6.dhcp.expiry", "how long leases hold, such as 1h (the default) or infinite"),
    ("ipv6.dhcp.ranges", "ranges FIRST-LAST for stateful leases, comma-separated"),
    ("ipv6.dhcp.stateful", "DHCPv6 gives addresses; otherwise guests make theirs by SLAAC (false)"),
    ("ipv6.firewall", "open other firewalls of the host for the network (true)"),
    ("ipv6.nat", "translate addresses of what leaves (false; true with an automatic address)"),
    ("ipv6.nat.address", "source address of what leaves translated, or a range FIRST-LAST of them"),
    ("ipv6.nat.order", "before or after the translations of others (before)"),
    (
        "ipv6.nat.ports",
        "source ports of what leaves translated by TCP or UDP, FIRST-LAST, without ipv6.nat.address",
    ),
    ("ipv6.ra", "announce the router (true)"),
    ("ipv6.routes", "further subnets that are reached over the bridge, comma-separated"),
    ("ipv6.routing", "route between the bridge and the rest (true)"),
    ("limits.egress", "bits a second that may pass from the bridge's guests to all beyond it, together"),
    ("limits.egress.burst", "bytes that may pass at once beyond that"),
    ("limits.egress.peak", "bits a second that such a burst never exceeds"),
    ("limits.ingress", "bits a second that may pass from beyond the bridge to its guests, together"),
    ("limits.ingress.burst", "as limits.egress.burst"),
    ("limits.ingress.peak", "as limits.egress.peak"),
    (
        "raw.dnsmasq",
        "lines added to dnsmasq's configuration, of options that say what guests are answered, where the host grants it: \
         raw_keys in host-policy.toml",
    ),
    ("security.acls", "ACLs for what passes between the bridge and the rest, comma-separated"),
    ("security.acls.default.egress.action", "for what no rule matches: allow, reject (the default) or drop"),
    ("security.acls.default.egress.logged", "log what no rule matches (false)"),
    ("security.acls.default.ingress.action", "for what no rule matches: allow, reject (the default) or drop"),
    ("security.acls.default.ingress.logged", "log what no rule matches (false)"),
];

fn bad(key: &str, text: impl Into<String>) -> Error {
    Error::invalid(format!("config.{key}"), text)
}

/// Reads a configuration key by key.
struct Reader<'a>(&'a Config);

impl<'a> Reader<'a> {
    fn get(&self, key: &str) -> Option<&'a str> {
        self.0.get(key).map(String::as_str).filter(|v| !v.is_empty())
    }
    fn flag(&self, key: &str, default: bool) -> Result<bool> {
        self.get(key).map_or(Ok(default), |v| parse_bool(&format!("config.{key}"), v))
    }
    fn one<T: FromStr>(&self, key: &str, what: &str) -> Result<Option<T>> {
        self.get(key).map(|v| v.parse().map_err(|_| bad(key, format!("{v:?} is not {what}")))).transpose()
    }
    fn words(&self, key: &str) -> impl Iterator<Item = &'a str> {
        self.get(key).unwrap_or_default().split(',').map(str::trim).filter(|w| !w.is_empty())
    }
    fn many<T: FromStr>(&self, key: &str, what: &str) -> Result<Vec<T>> {
        self.words(key).map(|w| w.parse().map_err(|_| bad(key, format!("{w:?} is not {what}")))).collect()
    }
    fn ranges<A: FromStr + Ord + Copy>(&self, key: &str, inside: impl Fn(A) -> bool) -> Result<Vec<(A, A)>> {
        let mut all: Vec<(A, A)> = vec![];
        for word in self.words(key) {
            let wrong = || bad(key, format!("{word:?} is not a range FIRST-LAST inside the subnet"));
            let (a, b) = word.split_once('-').ok_or_else(wrong)?;
            let (a, b): (A, A) =
                (a.trim().parse().map_err(|_| wrong())?, b.trim().parse().map_err(|_| wrong())?);
            if a > b || !inside(a) || !inside(b) {
                return Err(wrong());
            }
            if all.iter().any(|(c, d)| a <= *d && *c <= b) {
                return Err(bad(key, format!("the range {word:?} overlaps another")));
            }
            all.push((a, b));
        }
        Ok(all)
    }
    /// Seconds; 0 for ever.
    fn expiry(&self, key: &str) -> Result<u32> {
        let Some(text) = self.get(key) else { return Ok(HOUR) };
        if text == "infinite" {
            return Ok(0);
        }
        let (number, unit) = match text.find(|c: char| !c.is_ascii_digit()) {
            Some(at) => text.split_at(at),
            None => (text, "s"),
        };
        let factor = match unit {
            "s" => Some(1),
            "m" => Some(60),
            "h" => Some(HOUR),
            "d" => Some(24 * HOUR),
            "w" => Some(7 * 24 * HOUR),
            _ => None,
        };
        number
            .parse::<u32>()
            .ok()
            .zip(factor)
            .and_then(|(n, f)| n.checked_mul(f))
            .filter(|s| *s >= 120)
            .ok_or_else(|| {
                bad(key, format!("{text:?} is not a time from 2m (s, m, h, d, w) and not \"infinite\""))
            })
    }
    /// `auto` must have been replaced.
    fn address<N: FromStr>(&self, key: &str, example: &str) -> Result<Option<N>> {
        match self.get(key) {
            None | Some("none") => Ok(None),
            Some(s) => s
                .parse()
                .map(Some)
                .map_err(|_| bad(key, format!("{s:?} is not an address with prefix, such as {example}"))),
        }
    }
    /// One address, or the first and the last of a range.
    fn addresses<A: FromStr + Ord + Copy>(&self, key: &str) -> Result<(Option<A>, Option<A>)> {
        let Some(text) = self.get(key) else { return Ok((None, None)) };
        let parse = |t: &str| t.trim().parse::<A>().ok();
        let (first, last) = match text.split_once('-') {
            None => (parse(text), None),
            Some((first, last)) => (parse(first), Some(parse(last))),
        };
        match (first, last) {
            (Some(first), None) => Ok((Some(first), None)),
            (Some(first), Some(Some(last))) if first < last => Ok((Some(first), Some(last))),
            _ => Err(bad(key, format!("{text:?} is neither an address nor a range FIRST-LAST of them"))),
        }
    }
    /// First and last port.
    fn ports(&self, key: &str) -> Result<Option<(u16, u16)>> {
        let Some(text) = self.get(key) else { return Ok(None) };
        let (first, last) = text.split_once('-').unwrap_or((text, text));
        let both = first.trim().parse::<u16>().ok().zip(last.trim().parse::<u16>().ok());
        let fits = both.filter(|(first, last)| *first > 0 && first <= last);
        fits.map(Some)
            .ok_or_else(|| bad(key, format!("{text:?} is no range of ports FIRST-LAST from 1 to 65535")))
    }
    fn order(&self, key: &str) -> Result<bool> {
        match self.get(key) {
            None | Some("before") => Ok(false),
            Some("after") => Ok(true),
            Some(v) => Err(bad(key, format!("{v:?} is neither \"before\" nor \"after\""))),
        }
    }
}

fn domain(key: &str, text: &str) -> Result<()> {
    if !is_name(text) {
        return Err(bad(key, format!("{text:?} is not a DNS domain")));
    }
    Ok(())
}

fn known_keys(config: &Config) -> Result<()> {
    for (key, value) in config {
        crate::keys::check_free(key, value)?;
        if key.starts_with("user.") || is_group_key(key) || BRIDGE_KEYS.iter().any(|(k, _)| k == key) {
            continue;
        }
        let unsupported = |why: &str| Err(Error::unsupported(why).at(format!("config.{key}")));
        match key.as_str() {
            k if k.starts_with("bgp.") => {
                return unsupported("BGP is not there; use ipv4.routes and ipv6.routes");
            }
            k if k.starts_with("tunnel.") => {
                return unsupported(
                    "tunnels between bridges are not there; put a VXLAN link of the host into bridge.external_interfaces",
                );
            }
            k if k.starts_with("portgroup.") => {
                let text = "keys of a group of ports are portgroup.NAME.default, and portgroup.NAME.limits.ingress and .egress, each \
                            with .burst and .peak";
                return Err(bad(key, text));
            }
            k if k.starts_with("dns.zone.") => return unsupported("DNS zones are not there"),
            _ => {}
        }
        let hint = match nearest(key, BRIDGE_KEYS.iter().map(|(k, _)| *k)) {
            Some(n) => format!("; did you mean {n:?}?"),
            None => "; `incus network show` lists what is set, the reference all keys of a bridge".into(),
        };
        return Err(bad(key, format!("unknown network key {key:?}{hint}")));
    }
    Ok(())
}

impl BridgeSpec {
    /// A guest of the network may have this address: it is in the subnet, and neither the host's own, nor the subnet's, nor
    /// the broadcast's.
    pub fn takes(&self, address: IpAddr) -> bool {
        match address {
            IpAddr::V4(a) => self.ipv4.is_some_and(|net| {
                net.contains(&a) && ![net.addr(), net.network(), net.broadcast()].contains(&a)
            }),
            IpAddr::V6(a) => {
                self.ipv6.is_some_and(|net| net.contains(&a) && ![net.addr(), net.network()].contains(&a))
            }
        }
    }

    /// Parses a network's configuration; `auto` must have been replaced before.
    ///
    /// # Errors
    /// Invalid, forbidden or unsupported, naming the key.
    pub fn parse(name: &str, config: &Config) -> Result<Self> {
        interface_name("name", name)?;
        known_keys(config)?;
        let r = Reader(config);
        if let Some(driver) = r.get("bridge.driver").filter(|d| *d != "native") {
            return Err(Error::unsupported(format!(
                "bridges of driver {driver:?} are not there; \"native\" is"
            ))
            .at("config.bridge.driver"));
        }
        let ipv4: Option<Ipv4Net> = r.address("ipv4.address", "10.20.30.1/24")?;
        if let Some(net) = ipv4
            && (net.prefix_len() > 29 || net.addr() == net.network() || net.addr() == net.broadcast())
        {
            return Err(bad(
                "ipv4.address",
                format!("{net} must be a host address in a subnet of /29 or larger, such as 10.20.30.1/24"),
            ));
        }
        let ipv6: Option<Ipv6Net> = r.address("ipv6.address", "fd42:1:2:3::1/64")?;
        let dhcp6_stateful = r.flag("ipv6.dhcp.stateful", false)?;
        if let Some(net) = ipv6 {
            if net.prefix_len() > 120 || net.prefix_len() < 16 || net.addr() == net.network() {
                return Err(bad(
                    "ipv6.address",
                    format!(
                        "{net} must be a host address in a subnet of /16 to /120, such as fd42:1:2:3::1/64"
                    ),
                ));
            }
            if net.addr().is_multicast() || net.addr().is_unicast_link_local() || net.addr().is_loopback() {
                return Err(bad("ipv6.address", format!("{net} is not an address that can be routed")));
            }
            if net.prefix_len() != 64 && !dhcp6_stateful && r.flag("ipv6.ra", true)? {
                return Err(bad(
                    "ipv6.address",
                    format!("SLAAC needs a /64, not {net}; or set ipv6.dhcp.stateful=true"),
                ));
            }
        }
        let dhcp_routes = {
            let words: Vec<&str> = r.words("ipv4.dhcp.routes").collect();
            let wrong =
                || bad("ipv4.dhcp.routes", "write DESTINATION,GATEWAY,…, such as 10.1.0.0/16,10.20.30.5");
            if !words.len().is_multiple_of(2) {
                return Err(wrong());
            }
            words
                .chunks(2)
                .map(|c| Ok((c[0].parse().map_err(|_| wrong())?, c[1].parse().map_err(|_| wrong())?)))
                .collect::<Result<Vec<_>>>()?
        };
        let mtu = r
            .get("bridge.mtu")
            .map(|s| {
                s.parse()
                    .ok()
                    .filter(|m| (1280..=65535).contains(m))
                    .ok_or_else(|| bad("bridge.mtu", format!("{s:?} is not an MTU from 1280 to 65535")))
            })
            .transpose()?;
        let domain_text = r.get("dns.domain").unwrap_or("karst").to_owned();
        domain("dns.domain", &domain_text)?;
        let search: Vec<String> = r.words("dns.search").map(str::to_owned).collect();
        search.iter().try_for_each(|s| domain("dns.search", s))?;
        let external_interfaces: Vec<String> =
            r.words("bridge.external_interfaces").map(str::to_owned).collect();
        let mut named = vec![name];
        for text in &external_interfaces {
            let interface = ExternalInterface::parse(text)?;
            if named.contains(&interface.name) || interface.vlan.is_some_and(|(parent, _)| parent == name) {
                return Err(bad(
                    "bridge.external_interfaces",
                    format!("{:?} is named twice", interface.name),
                ));
            }
            named.push(interface.name);
        }
        let (nat_address, nat_last) = r.addresses("ipv4.nat.address")?;
        let (nat6_address, nat6_last) = r.addresses("ipv6.nat.address")?;
        let forward_delay = r
            .get("bridge.forward_delay")
            .map(|s| {
                let wrong =
                    || bad("bridge.forward_delay", format!("{s:?} is not a time from 0 to 30 seconds"));
                s.parse::<u32>().ok().filter(|d| *d <= 30).ok_or_else(wrong)
            })
            .transpose()?;
        let plain = r.get("dns.plain").map(|_| r.flag("dns.plain", false)).transpose()?;
        let spec = Self {
            nat: r.flag("ipv4.nat", false)?,
            nat_address,
            nat_last,
            nat_ports: r.ports("ipv4.nat.ports")?,
            more: r.many("ipv4.addresses", "an address with prefix, such as 10.20.40.1/24")?,
            nat_after: r.order("ipv4.nat.order")?,
            dhcp: r.flag("ipv4.dhcp", true)?,
            dhcp_ranges: r.ranges("ipv4.dhcp.ranges", |a| ipv4.is_some_and(|n| n.contains(&a)))?,
            dhcp_expiry: r.expiry("ipv4.dhcp.expiry")?,
            dhcp_gateway: r.one("ipv4.dhcp.gateway", "an IPv4 address")?,
            dhcp_routes,
            routing: r.flag("ipv4.routing", true)?,
            firewall: r.flag("ipv4.firewall", true)?,
            routes: r.many("ipv4.routes", "an IPv4 subnet")?,
            nat6: r.flag("ipv6.nat", false)?,
            nat6_address,
            nat6_last,
            nat6_ports: r.ports("ipv6.nat.ports")?,
            more6: r.many("ipv6.addresses", "an address with prefix, such as fd42:1:2:4::1/64")?,
            nat6_after: r.order("ipv6.nat.order")?,
            dhcp6: r.flag("ipv6.dhcp", true)?,
            dhcp6_stateful,
            dhcp6_ranges: r.ranges("ipv6.dhcp.ranges", |a| ipv6.is_some_and(|n| n.contains(&a)))?,
            dhcp6_expiry: r.expiry("ipv6.dhcp.expiry")?,
            ra: r.flag("ipv6.ra", true)?,
            routing6: r.flag("ipv6.routing", true)?,
            firewall6: r.flag("ipv6.firewall", true)?,
            routes6: r.many("ipv6.routes", "an IPv6 subnet")?,
            domain: domain_text,
            dns_mode: match r.get("dns.mode") {
                None | Some("managed") => DnsMode::Managed,
                Some("dynamic") => DnsMode::Dynamic,
                Some("none") => DnsMode::None,
                Some(v) => {
                    return Err(bad(
                        "dns.mode",
                        format!("{v:?} is none of \"managed\", \"dynamic\", \"none\""),
                    ));
                }
            },
            search,
            nameservers: r.many("dns.nameservers", "an IP address")?,
            names: NetworkNames::parse(&|key| r.get(key), r.flag("dns.local", true)?, plain)?,
            mtu,
            hwaddr: r.get("bridge.hwaddr").map(|m| parse_mac("config.bridge.hwaddr", m)).transpose()?,
            stp: r.get("bridge.stp").map(|_| r.flag("bridge.stp", false)).transpose()?,
            forward_delay,
            multicast_snooping: r
                .get("bridge.multicast_snooping")
                .map(|_| r.flag("bridge.multicast_snooping", true))
                .transpose()?,
            external_interfaces,
            ports: NetworkPorts::parse(config)?,
            policy: firewall::policy("config.", &|k| r.get(k), firewall::Action::Reject)?,
            raw_dnsmasq: r
                .get("raw.dnsmasq")
                .map(|lines| {
                    crate::dnsmasq::check_lines("config.raw.dnsmasq", lines).map(|()| lines.to_owned())
                })
                .transpose()?,
            ipv4,
            ipv6,
        };
        spec.check_more()?;
        if spec.nat6_ports.is_some() && spec.nat6_address.is_some() {
            return Err(bad(
                "ipv6.nat.ports",
                "ports are chosen where what leaves has the address of its way out",
            ));
        }
        if let Some(all) = spec.routed().find(|n| n.prefix_len() == 0) {
            let key = if all.addr().is_ipv4() { "ipv4.routes" } else { "ipv6.routes" };
            return Err(bad(key, "the default route cannot lead into a network of guests"));
        }
        if spec.dns_mode == DnsMode::None && spec.names.has_records() {
            let text = "\"none\" leaves nobody who answers dns.hosts, dns.txt, dns.srv and dns.forwarders; take these out";
            return Err(bad("dns.mode", text));
        }
        if let Some(kept) = spec.names.reserved.iter().find(|h| !spec.takes(h.address.into())) {
            let text = format!("{} is not an address for a guest of this network", kept.address);
            return Err(bad("ipv4.dhcp.hosts", text));
        }
        if spec.ra && spec.ipv6.is_some() && !spec.dhcp6 && spec.dhcp6_stateful {
            return Err(bad("ipv6.dhcp.stateful", "stateful DHCPv6 needs ipv6.dhcp=true"));
        }
        Ok(spec)
    }

    /// Further addresses are hosts in subnets of their own.
    fn check_more(&self) -> Result<()> {
        for (key, first, more) in [
            (
                "ipv4.addresses",
                self.ipv4.is_some(),
                self.more.iter().map(|n| IpNet::V4(*n)).collect::<Vec<_>>(),
            ),
            ("ipv6.addresses", self.ipv6.is_some(), self.more6.iter().map(|n| IpNet::V6(*n)).collect()),
        ] {
            if !first && !more.is_empty() {
                let text = format!("the first address is {}", key.trim_end_matches("es"));
                return Err(bad(key, text));
            }
            let mut own: Vec<IpNet> =
                self.ipv4.map(IpNet::V4).into_iter().chain(self.ipv6.map(IpNet::V6)).collect();
            for net in more {
                let fits = match net {
                    IpNet::V4(n) => {
                        n.prefix_len() <= 30 && n.addr() != n.network() && n.addr() != n.broadcast()
                    }
                    IpNet::V6(n) => (16..=126).contains(&n.prefix_len()) && n.addr() != n.network(),
                };
                if !fits
                    || net.addr().is_multicast()
                    || net.addr().is_loopback()
                    || net.addr().is_unspecified()
                {
                    return Err(bad(key, format!("{net} is not the address of a host in a subnet")));
                }
                if let Some(other) =
                    own.iter().find(|o| o.contains(&net.network()) || net.contains(&o.network()))
                {
                    return Err(bad(key, format!("{net} overlaps {other}")));
                }
                own.push(net);
            }
        }
        Ok(())
    }

    /// IPv4 addresses of the bridge with their prefixes.
    pub fn own4(&self) -> impl Iterator<Item = Ipv4Net> {
        self.ipv4.into_iter().chain(self.more.iter().copied())
    }

    /// The same of IPv6.
    pub fn own6(&self) -> impl Iterator<Item = Ipv6Net> {
        self.ipv6.into_iter().chain(self.more6.iter().copied())
    }

    /// All of them.
    pub fn own(&self) -> impl Iterator<Item = IpNet> {
        self.own4().map(IpNet::V4).chain(self.own6().map(IpNet::V6))
    }

    /// Subnets of the network and what is routed over it.
    pub fn subnets(&self) -> impl Iterator<Item = IpNet> {
        let v4 = self.own4().map(|n| n.trunc()).chain(self.routes.iter().map(|n| n.trunc()));
        let v6 = self.own6().map(|n| n.trunc()).chain(self.routes6.iter().map(|n| n.trunc()));
        v4.map(IpNet::V4).chain(v6.map(IpNet::V6))
    }

    /// Subnets beyond its own that are reached over the bridge.
    pub fn routed(&self) -> impl Iterator<Item = IpNet> {
        let v4 = self.routes.iter().map(|n| IpNet::V4(n.trunc()));
        v4.chain(self.routes6.iter().map(|n| IpNet::V6(n.trunc())))
    }

    /// Guests make their IPv6 addresses themselves.
    pub fn slaac(&self) -> bool {
        self.ra && !self.dhcp6_stateful && self.ipv6.is_some_and(|n| n.prefix_len() == 64)
    }
}

/// The address that a guest with this MAC address makes for itself in a /64 (modified EUI-64, RFC 4291).
pub fn eui64(net: Ipv6Net, mac: &str) -> Option<Ipv6Addr> {
    let octets: Vec<u8> =
        mac.split(':').map(|p| u8::from_str_radix(p, 16)).collect::<std::result::Result<_, _>>().ok()?;
    let [a, b, c, d, e, f]: [u8; 6] = octets.try_into().ok()?;
    let mut address = net.network().octets();
    address[8..].copy_from_slice(&[a ^ 2, b, c, 0xff, 0xfe, d, e, f]);
    Some(address.into())
}

/// A DHCP lease or static assignment.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Lease {
    /// Name that the guest sent or has.
    pub hostname: String,
    /// MAC address.
    pub mac: String,
    /// Address.
    pub address: std::net::IpAddr,
    /// Assigned by configuration rather than from the pool.
    pub fixed: bool,
    /// When it ends, in seconds since 1970, unless it is renewed; none of one that never does, and of what nobody leased.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub expires: Option<i64>,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cfg(pairs: &[(&str, &str)]) -> Config {
        pairs.iter().map(|(k, v)| (k.to_string(), v.to_string())).collect()
    }

    #[test]
    fn keys_are_sorted() {
        assert!(BRIDGE_KEYS.windows(2).all(|w| w[0].0 < w[1].0));
    }

    #[test]
    fn parses_and_refuses() {
        let s = BridgeSpec::parse(
            "br0",
            &cfg(&[
                ("ipv4.address", "10.1.2.1/24"),
                ("ipv4.nat", "true"),
                ("ipv4.dhcp.ranges", "10.1.2.5-10.1.2.9, 10.1.2.20-10.1.2.30"),
                ("ipv4.dhcp.expiry", "2d"),
                ("ipv4.dhcp.routes", "10.9.0.0/16,10.1.2.7"),
                ("ipv6.address", "fd42:1:2:3::1/64"),
                ("ipv6.routes", "fd42:1:2:9::/64"),
                ("dns.search", "a.example,b.example"),
            ]),
        )
        .unwrap();
        let more = BridgeSpec::parse(
            "br0",
            &cfg(&[
                ("ipv4.address", "10.1.2.1/24"),
                ("ipv4.addresses", "10.1.3.1/24, 10.1.4.1/30"),
                ("ipv4.nat.address", "192.0.2.1-192.0.2.9"),
                ("ipv4.nat.ports", "1024-65535"),
                ("bridge.stp", "true"),
                ("bridge.forward_delay", "4"),
            ]),
        )
        .unwrap();
        assert_eq!(
            more.subnets().map(|n| n.to_string()).collect::<Vec<_>>(),
            ["10.1.2.0/24", "10.1.3.0/24", "10.1.4.0/30"]
        );
        assert_eq!(more.nat_last.map(|a| a.to_string()).as_deref(), Some("192.0.2.9"));
        assert_eq!(
            (more.nat_ports, more.stp, more.forward_delay),
            (Some((1024, 65535)), Some(true), Some(4))
        );
        assert!(s.nat && s.dhcp && s.ipv4.unwrap().prefix_len() == 24 && s.slaac());
        assert_eq!((s.dhcp_ranges.len(), s.dhcp_expiry, s.search.len()), (2, 172_800, 2));
        let subnets: Vec<String> = s.subnets().map(|n| n.to_string()).collect();
        assert_eq!(subnets, ["10.1.2.0/24", "fd42:1:2:3::/64", "fd42:1:2:9::/64"]);
        assert_eq!(
            eui64(s.ipv6.unwrap(), "10:66:6a:12:34:56").unwrap().to_string(),
            "fd42:1:2:3:1266:6aff:fe12:3456"
        );
        for (k, v) in [
            ("ipv4.address", "10.1.2.0/24"),
            ("ipv4.nat", "perhaps"),
            ("bridge.mtu", "12"),
            ("bridge.hwaddr", "x"),
            ("bridge.external_interfaces", "eth1,eth1"),
            ("bridge.external_interfaces", "br0"),
            ("bridge.external_interfaces", "v5/eth1"),
            ("bridge.external_interfaces", "v5/eth1/0"),
            ("bridge.external_interfaces", "v5/eth1/5/6"),
            ("bridge.external_interfaces", "v5/v5/5"),
            ("bridge.external_interfaces", "v5/eth1/5,v5"),
            ("bridge.external_interfaces", "v5/br0/5"),
            ("ipv4.dhcp.ranges", "10.9.9.9-10.9.9.10"),
            ("ipv4.dhcp.ranges", "10.1.2.5-10.1.2.9,10.1.2.9-10.1.2.10"),
            ("ipv4.dhcp.expiry", "soon"),
            ("ipv4.dhcp.expiry", "10"),
            ("ipv4.dhcp.routes", "10.9.0.0/16"),
            ("ipv4.nat.order", "between"),
            ("ipv4.nat.address", "192.0.2.9-192.0.2.1"),
            ("ipv4.nat.address", "192.0.2"),
            ("ipv4.nat.ports", "0-5"),
            ("ipv4.nat.ports", "9-5"),
            ("ipv4.addresses", "10.1.2.129/25"),
            ("ipv4.addresses", "10.1.3.0/24"),
            ("ipv4.addresses", "10.1.3.1/24,10.1.3.9/25"),
            ("ipv6.addresses", "fd42::1/64"),
            ("bridge.stp", "perhaps"),
            ("bridge.forward_delay", "99"),
            ("ipv4.routes", "10.9.0.0/33"),
            ("ipv4.routes", "0.0.0.0/0"),
            ("ipv6.address", "fd42::/64"),
            ("ipv6.address", "fd42::1/56"),
            ("ipv6.address", "fe80::1/64"),
            ("dns.domain", "a b"),
            ("dns.mode", "some"),
            ("dns.search", "ok,a\nb"),
            ("dns.nameservers", "ns1"),
            ("dns.local", "perhaps"),
            ("limits.ingress", "fast"),
            ("portgroup.a.colour", "red"),
            ("dns.plain", "perhaps"),
            ("dns.hosts", "10.1.2.5 a/b"),
            ("ipv4.dhcp.hosts", "52:54:00:aa:bb:01 10.9.9.9"),
            ("ipv4.dhcp.hosts", "52:54:00:aa:bb:01 10.1.2.1"),
            ("raw.dnsmasq", "dhcp-script=/bin/sh"),
            ("bgp.peers.x.asn", "1"),
            ("bridge.driver", "openvswitch"),
            ("security.acls.default.egress.action", "perhaps"),
        ] {
            let mut c = cfg(&[("ipv4.address", "10.1.2.1/24"), ("security.acls", "web")]);
            c.insert(k.into(), v.into());
            assert_eq!(
                BridgeSpec::parse("br0", &c).unwrap_err().field.unwrap(),
                format!("config.{k}"),
                "{k}={v}"
            );
        }
        assert!(
            BridgeSpec::parse("br0", &cfg(&[("ipv4.adress", "x")]))
                .unwrap_err()
                .message
                .contains("ipv4.address")
        );
    }
}
