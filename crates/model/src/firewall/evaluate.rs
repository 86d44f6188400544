//! What becomes of a packet, in words: the same decision as the rules that the host renders of the same specifications.
//! Pure; a test of the network driver compares it with real packets.
//!
//! The way of a packet: the sender's NIC (source filter, ACLs), then either straight to a port of the same bridge
//! (isolation) or through the host (forwards, routing, ACLs of the networks), then the receiver's NIC.

use super::{AclSpec, Action, AddressRange, Direction, Policy, Protocol, RuleSpec, Subject};
use crate::{
    network::eui64,
    spec::{NetworkHost, NetworkSpec},
};
use ipnet::{IpNet, Ipv6Net};
use serde::{Deserialize, Serialize};
use std::net::IpAddr;

/// What a packet carries; the first of a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Payload {
    /// TCP from and to a port.
    Tcp(u16, u16),
    /// UDP from and to a port.
    Udp(u16, u16),
    /// ICMP or ICMPv6, by the addresses' version: type and code.
    Icmp(u8, u8),
}

/// A packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Packet {
    /// Sender.
    pub source: IpAddr,
    /// Receiver.
    pub destination: IpAddr,
    /// Rest.
    pub payload: Payload,
}

impl Packet {
    fn ports(&self) -> Option<(u16, u16)> {
        match self.payload {
            Payload::Tcp(a, b) | Payload::Udp(a, b) => Some((a, b)),
            Payload::Icmp(..) => None,
        }
    }
}

/// Why.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "by", rename_all = "snake_case")]
pub enum Reason {
    /// A rule of an ACL.
    Rule {
        /// Name.
        acl: String,
        /// Direction.
        direction: Direction,
        /// Position among the rules of the direction, from 0.
        number: u32,
    },
    /// No rule matched.
    Default {
        /// Direction.
        direction: Direction,
    },
    /// Always so: the key or the service, in words.
    Fixed {
        /// Which.
        what: String,
    },
}

/// A decision at one place of a packet's way.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Step {
    /// Where: `eth0 of c1`, `network karstbr0`.
    pub place: String,
    /// What happened.
    pub action: Action,
    /// Why.
    #[serde(flatten)]
    pub reason: Reason,
}

/// The whole way.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Explanation {
    /// It arrives.
    pub passes: bool,
    /// Where it arrives, after forwards.
    pub destination: IpAddr,
    /// Port there.
    pub port: Option<u16>,
    /// Decisions in order; the last one that does not pass is the deciding one.
    pub steps: Vec<Step>,
}

/// An end of the way.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    /// A guest: index of the network, index of the host in it.
    Guest(usize, usize),
    /// The host itself.
    Host,
    /// Anything beyond.
    Outside,
}

/// Addresses that a guest is known to have in its network.
pub fn addresses(network: &NetworkSpec, host: &NetworkHost) -> Vec<IpAddr> {
    let mut all: Vec<IpAddr> = host.ipv4.map(IpAddr::V4).into_iter().collect();
    all.extend(host.ipv6.map(IpAddr::V6));
    if host.ipv6.is_none()
        && network.spec.slaac()
        && let Some(net) = network.spec.ipv6
    {
        all.extend(eui64(net, &host.mac).map(IpAddr::V6));
    }
    all
}

/// The link-local address that a guest makes of its MAC address.
pub fn link_local(mac: &str) -> Option<IpAddr> {
    let net: Ipv6Net = "fe80::/64".parse().ok()?;
    eui64(net, mac).map(IpAddr::V6)
}

/// Addresses of the guests to which an ACL of the project of `of` applies: on all `networks` of that project.
pub fn members(networks: &[NetworkSpec], of: &NetworkSpec, acl: &str) -> Vec<AddressRange> {
    let has = |p: &Option<Policy>| p.as_ref().is_some_and(|p| p.acls.iter().any(|a| a == acl));
    let mut found: Vec<AddressRange> = vec![];
    // Another project's ACL of the same name is another one.
    for network in networks.iter().filter(|n| n.owner == of.owner) {
        if has(&network.spec.policy) {
            found.extend(network.spec.subnets().map(AddressRange::from));
        }
        for host in network.hosts.iter().filter(|h| h.port.as_ref().is_some_and(|p| has(&p.policy))) {
            found.extend(addresses(network, host).into_iter().map(AddressRange::from));
        }
    }
    super::merge(found)
}

impl Subject {
    fn contains(&self, address: IpAddr, networks: &[NetworkSpec], network: &NetworkSpec) -> bool {
        let inside = || network.spec.subnets().any(|n| n.contains(&address));
        match self {
            Self::Range(range) => range.contains(address),
            Self::Internal => inside(),
            Self::External => !inside(),
            Self::Set(name) => network
                .sets
                .iter()
                .filter(|s| s.name == *name)
                .any(|s| s.ranges.iter().any(|r| r.contains(address))),
            Self::Acl(name) => members(networks, network, name).iter().any(|r| r.contains(address)),
        }
    }
}

fn matches(rule: &RuleSpec, packet: &Packet, networks: &[NetworkSpec], network: &NetworkSpec) -> bool {
    let v4 = packet.source.is_ipv4();
    let protocol = match (rule.protocol, packet.payload) {
        (None, _) => true,
        (Some(Protocol::Tcp), Payload::Tcp(..)) | (Some(Protocol::Udp), Payload::Udp(..)) => true,
        (Some(Protocol::Icmp4), Payload::Icmp(t, c)) => {
            v4 && rule.icmp_type.is_none_or(|w| w == t) && rule.icmp_code.is_none_or(|w| w == c)
        }
        (Some(Protocol::Icmp6), Payload::Icmp(t, c)) => {
            !v4 && rule.icmp_type.is_none_or(|w| w == t) && rule.icmp_code.is_none_or(|w| w == c)
        }
        _ => false,
    };
    let among = |list: &[(u16, u16)], port: Option<u16>| {
        list.is_empty() || port.is_some_and(|p| list.iter().any(|(a, b)| (*a..=*b).contains(&p)))
    };
    let any = |list: &[Subject], address: IpAddr| {
        list.is_empty() || list.iter().any(|s| s.contains(address, networks, network))
    };
    protocol
        && among(&rule.source_ports, packet.ports().map(|p| p.0))
        && among(&rule.destination_ports, packet.ports().map(|p| p.1))
        && any(&rule.source, packet.source)
        && any(&rule.destination, packet.destination)
}

/// What always passes a NIC or the edge of a network, because guests would lose their addresses and names without it.
pub fn core_service(packet: &Packet, direction: Direction, network: &NetworkSpec) -> Option<&'static str> {
    let v4 = packet.source.is_ipv4();
    let out = direction == Direction::Egress;
    let own = |a: IpAddr| match a {
        IpAddr::V4(a) => network.spec.ipv4.is_some_and(|n| n.addr() == a),
        IpAddr::V6(a) => network.spec.ipv6.is_some_and(|n| n.addr() == a),
    };
    match packet.payload {
        Payload::Udp(68, 67) if v4 && out => Some("DHCP"),
        Payload::Udp(67, 68) if v4 && !out => Some("DHCP"),
        Payload::Udp(546, 547) if !v4 && out => Some("DHCPv6"),
        Payload::Udp(547, 546) if !v4 && !out => Some("DHCPv6"),
        Payload::Udp(_, 53) | Payload::Tcp(_, 53) if out && own(packet.destination) => {
            Some("DNS of the network")
        }
        Payload::Icmp(3 | 11 | 12, _) if v4 => Some("ICMP errors"),
        Payload::Icmp(1..=4, _) if !v4 => Some("ICMPv6 errors"),
        Payload::Icmp(130..=132 | 133..=136 | 143, _) if !v4 => Some("neighbour discovery"),
        _ => None,
    }
}

/// The decision of a policy.
pub fn decide(
    policy: &Policy,
    direction: Direction,
    packet: &Packet,
    networks: &[NetworkSpec],
    network: &NetworkSpec,
) -> (Action, Reason) {
    if let Some(what) = core_service(packet, direction, network) {
        return (Action::Allow, Reason::Fixed { what: what.into() });
    }
    let applied: Vec<&AclSpec> = network.acls.iter().filter(|a| policy.acls.contains(&a.name)).collect();
    for action in Action::ORDER {
        for acl in &applied {
            let rules = acl.rules(direction).iter().filter(|r| r.action == action);
            for rule in rules {
                if matches(rule, packet, networks, network) {
                    let reason = Reason::Rule { acl: acl.name.clone(), direction, number: rule.number };
                    return (action, reason);
                }
            }
        }
    }
    (policy.default_of(direction).action, Reason::Default { direction })
}

struct Way<'a> {
    networks: &'a [NetworkSpec],
    steps: Vec<Step>,
    stopped: bool,
}

impl Way<'_> {
    fn step(&mut self, place: String, action: Action, reason: Reason) {
        self.stopped |= !action.passes();
        self.steps.push(Step { place, action, reason });
    }
    fn stop(&mut self, place: String, action: Action, what: &str) {
        self.step(place, action, Reason::Fixed { what: what.into() });
    }
    fn policy(
        &mut self,
        place: String,
        policy: Option<&Policy>,
        direction: Direction,
        packet: &Packet,
        on: usize,
    ) {
        let Some(policy) = policy else { return };
        let (mut action, reason) = decide(policy, direction, packet, self.networks, &self.networks[on]);
        // A bridge's way out has no place from which it could be answered.
        if direction == Direction::Ingress && action == Action::Reject && place.contains(" of ") {
            action = Action::Drop;
        }
        self.step(place, action, reason);
    }
    /// The edge of a network: routing, then its own ACLs.
    fn edge(&mut self, on: usize, direction: Direction, packet: &Packet, through: bool) {
        let network = &self.networks[on];
        let place = || format!("network {}", network.bridge);
        let routing = if packet.destination.is_ipv4() { network.spec.routing } else { network.spec.routing6 };
        if through && !routing && core_service(packet, direction, network).is_none() {
            let key = if packet.destination.is_ipv4() { "ipv4.routing=false" } else { "ipv6.routing=false" };
            return self.stop(place(), Action::Reject, key);
        }
        self.policy(place(), network.spec.policy.as_ref(), direction, packet, on);
    }
}

fn nic(network: &NetworkSpec, host: &NetworkHost) -> String {
    let name = if host.hostname.is_empty() { &host.mac } else { &host.hostname };
    format!("NIC of {name} on {}", network.bridge)
}

/// Follows the first packet of a connection from one end to where its destination address leads.
pub fn explain(networks: &[NetworkSpec], from: End, packet: Packet) -> Explanation {
    let mut way = Way { networks, steps: vec![], stopped: false };
    let mut packet = packet;
    let v4 = packet.source.is_ipv4();
    if let End::Guest(n, h) = from {
        let (network, host) = (&networks[n], &networks[n].hosts[h]);
        let place = nic(network, host);
        if let Some(port) = &host.port {
            let filtered = if v4 { port.ipv4_filter } else { port.ipv6_filter };
            let unset =
                v4 && packet.source.is_unspecified() && matches!(packet.payload, Payload::Udp(68, 67));
            let own = addresses(network, host).contains(&packet.source)
                || port.ipv6_filter && link_local(&host.mac) == Some(packet.source);
            if filtered && !own && !unset {
                let key = if v4 { "security.ipv4_filtering" } else { "security.ipv6_filtering" };
                way.stop(place.clone(), Action::Drop, key);
            }
        }
        if !way.stopped {
            let policy = host.port.as_ref().and_then(|p| p.policy.as_ref());
            way.policy(place, policy, Direction::Egress, &packet, n);
        }
    }
    let arrives = |networks: &[NetworkSpec], address: IpAddr| -> End {
        for (n, network) in networks.iter().enumerate() {
            let gateway = network.spec.ipv4.is_some_and(|g| IpAddr::V4(g.addr()) == address)
                || network.spec.ipv6.is_some_and(|g| IpAddr::V6(g.addr()) == address);
            if gateway {
                return End::Host;
            }
            let here = |h: &NetworkHost| {
                addresses(network, h).contains(&address) || h.routes.iter().any(|r| r.contains(&address))
            };
            if let Some(h) = network.hosts.iter().position(here) {
                return End::Guest(n, h);
            }
        }
        End::Outside
    };
    let at = |networks: &[NetworkSpec], address: IpAddr| -> Option<usize> {
        networks.iter().position(|n| n.spec.subnets().any(|s: IpNet| s.contains(&address)))
    };
    // Ports of the same bridge reach each other without the host.
    if let (End::Guest(n, h), false) = (from, way.stopped)
        && at(networks, packet.destination) == Some(n)
        && let End::Guest(m, g) = arrives(networks, packet.destination)
        && n == m
    {
        let isolated = |i: usize| networks[n].hosts[i].port.as_ref().is_some_and(|p| p.isolated);
        let target = &networks[n].hosts[g];
        if isolated(h) && isolated(g) {
            way.stop(nic(&networks[n], target), Action::Drop, "security.port_isolation");
        } else {
            let policy = target.port.as_ref().and_then(|p| p.policy.as_ref());
            way.policy(nic(&networks[n], target), policy, Direction::Ingress, &packet, n);
        }
        return finish(way, &packet);
    }
    if way.stopped {
        return finish(way, &packet);
    }
    // Through the host: forwards first, as the kernel translates before it routes.
    let before = packet.destination;
    if let Some((network, to, port)) = translated(networks, &packet) {
        packet.destination = to;
        packet.payload = match packet.payload {
            Payload::Tcp(s, _) => Payload::Tcp(s, port.unwrap_or_default()),
            Payload::Udp(s, _) => Payload::Udp(s, port.unwrap_or_default()),
            icmp @ Payload::Icmp(..) => icmp,
        };
        let what = format!("forward of {before} to {to}");
        way.step(format!("network {network}"), Action::Allow, Reason::Fixed { what });
    }
    let target_network = at(networks, packet.destination);
    let target = arrives(networks, packet.destination);
    let source_network = if let End::Guest(n, _) = from { Some(n) } else { None };
    let through = target != End::Host;
    // What a forward publishes is for everybody.
    if let (Some(n), Some(m)) = (source_network, target_network)
        && networks[n].owner != networks[m].owner
        && before == packet.destination
    {
        let place = format!("network {}", networks[n].bridge);
        way.stop(place, Action::Drop, "networks of different projects are apart");
        return finish(way, &packet);
    }
    // In and out of the same bridge, which a forward may bring about, is not its edge.
    if let (Some(n), true) = (source_network, source_network != target_network || target == End::Host) {
        way.edge(n, Direction::Egress, &packet, through);
    }
    if let (Some(m), false, true) = (target_network, way.stopped, target != End::Host)
        && source_network != Some(m)
    {
        way.edge(m, Direction::Ingress, &packet, from != End::Host);
    }
    if let (End::Guest(m, g), false) = (target, way.stopped) {
        // The receiver sees the sender as it was translated on the way.
        if let Some(source) = masqueraded(networks, source_network, target_network, &packet, before) {
            packet.source = source;
        }
        let (network, host) = (&networks[m], &networks[m].hosts[g]);
        let policy = host.port.as_ref().and_then(|p| p.policy.as_ref());
        way.policy(nic(network, host), policy, Direction::Ingress, &packet, m);
    }
    finish(way, &packet)
}

fn finish(way: Way<'_>, packet: &Packet) -> Explanation {
    Explanation {
        passes: !way.stopped,
        destination: packet.destination,
        port: packet.ports().map(|p| p.1),
        steps: way.steps,
    }
}

/// Where a forward leads a packet: network, address, port.
fn translated<'a>(networks: &'a [NetworkSpec], packet: &Packet) -> Option<(&'a str, IpAddr, Option<u16>)> {
    for network in networks {
        for forward in network.forwards.iter().filter(|f| f.listen == packet.destination) {
            let (tcp, port) = match packet.payload {
                Payload::Tcp(_, p) => (Some(true), p),
                Payload::Udp(_, p) => (Some(false), p),
                Payload::Icmp(..) => (None, 0),
            };
            let target = forward
                .targets
                .iter()
                .find(|t| Some(t.tcp) == tcp && (t.listen.0..=t.listen.1).contains(&port));
            if let Some(t) = target {
                return Some((&network.bridge, t.address, Some(t.target_port(port))));
            }
            if let Some(address) = forward.default_target {
                return Some((&network.bridge, address, Some(port)));
            }
        }
    }
    None
}

/// The sender's address as the receiver sees it.
fn masqueraded(
    networks: &[NetworkSpec],
    source: Option<usize>,
    target: Option<usize>,
    packet: &Packet,
    listened: IpAddr,
) -> Option<IpAddr> {
    let gateway = |m: usize| match packet.destination {
        IpAddr::V4(_) => networks[m].spec.ipv4.map(|n| IpAddr::V4(n.addr())),
        IpAddr::V6(_) => networks[m].spec.ipv6.map(|n| IpAddr::V6(n.addr())),
    };
    let forwarded = listened != packet.destination;
    match (source, target) {
        // Its own forward, or a neighbour's: the answer must come back through the host.
        (Some(n), Some(m)) if n == m && forwarded => gateway(m),
        (Some(n), Some(m)) if n != m => {
            let spec = &networks[n].spec;
            match packet.source {
                IpAddr::V4(a) if spec.nat && spec.own4().any(|net| net.contains(&a)) => {
                    spec.nat_address.map(IpAddr::V4).or_else(|| gateway(m))
                }
                IpAddr::V6(a) if spec.nat6 && spec.own6().any(|net| net.contains(&a)) => {
                    spec.nat6_address.map(IpAddr::V6).or_else(|| gateway(m))
                }
                _ if forwarded && snat(networks, packet, listened) => gateway(m),
                _ => None,
            }
        }
        (None, Some(m)) if forwarded && snat(networks, packet, listened) => gateway(m),
        _ => None,
    }
}

fn snat(networks: &[NetworkSpec], packet: &Packet, listened: IpAddr) -> bool {
    networks.iter().flat_map(|n| &n.forwards).filter(|f| f.listen == listened).any(|f| {
        f.targets.iter().any(|t| {
            t.snat
                && t.address == packet.destination
                && packet
                    .ports()
                    .is_some_and(|(_, p)| (t.listen.0..=t.listen.1).any(|l| t.target_port(l) == p))
        })
    })
}
