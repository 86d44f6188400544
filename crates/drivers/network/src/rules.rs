//! The rules of all networks of this daemon, made of checked specifications: pure.
//!
//! Two tables of one name, always applied in one transaction. `inet`: translation of addresses, forwards, and the ACLs of
//! networks, which decide about what passes between a bridge and the rest. `bridge`: what single ports may send and get.
//! Ports are found by verdict maps; ports of the same policy share its chains, and policies share their ACLs'. What a port
//! was allowed to send is remembered in dynamic sets, so that the answers come in: connection tracking of bridges is not in
//! every kernel, and this needs none.
//!
//! A packet's way through these rules is what `karst_model::firewall::evaluate` says in words.

use crate::{
    acl_log,
    loose::{self, Loose, has_rules},
    ruleset::Table,
    views, walls,
};
use karst_model::{
    AclId, NetworkId,
    firewall::{
        AclSpec, Action, AddressRange, Direction, Policy, Protocol, RuleSpec, Subject, evaluate, merge,
    },
    spec::{NetworkHost, NetworkSpec, PortSpec},
};
use std::{collections::BTreeSet, net::IpAddr};

/// Bits of a connection's mark: its first packet passed a network's edge by `allow-stateless`, outwards or inwards.
const STATELESS: [(Direction, u32); 2] =
    [(Direction::Egress, 0x0100_0000), (Direction::Ingress, 0x0200_0000)];

/// Name of the daemon's tables.
pub(crate) fn table_name(daemon: &str) -> String {
    format!("karst_{daemon}")
}

/// Where rules log to.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Logs<'a> {
    /// Short id of the daemon.
    pub daemon: &'a str,
    /// The group that this process reads; `None`: the kernel's own log, as there is none.
    pub group: Option<u16>,
}

/// The daemon's tables `inet` and `bridge`; `bridge_reject`: this kernel can answer what it refuses on a bridge.
pub(crate) fn tables(
    logs: Logs<'_>,
    networks: &[NetworkSpec],
    bridge_reject: bool,
    loose: &Loose,
) -> [Table; 2] {
    let daemon = logs.daemon;
    let mut inet = Table::new("inet", table_name(daemon));
    let mut bridge = Table::new("bridge", table_name(daemon));
    translation(daemon, &mut inet, networks);
    edges(logs, &mut inet, networks);
    let unmanaged = loose::network(loose);
    ports(logs, &mut bridge, networks, &unmanaged, bridge_reject);
    loose::cables(&mut inet, loose);
    views::rules(&mut inet, &mut bridge, networks);
    walls::rules(daemon, &mut inet, networks);
    [inet, bridge]
}

/// What what leaves is translated to: by TCP and UDP, if ports are chosen for them, and by all else.
fn translated_to(
    family: &str,
    (first, last): (Option<IpAddr>, Option<IpAddr>),
    ports: Option<(u16, u16)>,
) -> Vec<String> {
    let to = first.map(|first| match last {
        None => first.to_string(),
        Some(last) => format!("{first}-{last}"),
    });
    let rest = to.as_ref().map_or("masquerade".to_owned(), |to| format!("snat {family} to {to}"));
    let chosen = ports.map(|(first, last)| match &to {
        None => format!("masquerade to :{first}-{last}"),
        Some(to) => format!("snat {family} to {to}:{first}-{last}"),
    });
    let by =
        |protocol: &'static str| chosen.as_ref().map(|chosen| format!("meta l4proto {protocol} {chosen}"));
    by("tcp").into_iter().chain(by("udp")).chain([rest]).collect()
}

fn translation(daemon: &str, t: &mut Table, networks: &[NetworkSpec]) {
    for network in networks {
        let spec = &network.spec;
        let range4 = (spec.nat_address.map(IpAddr::V4), spec.nat_last.map(IpAddr::V4));
        let range6 = (spec.nat6_address.map(IpAddr::V6), spec.nat6_last.map(IpAddr::V6));
        let to4 = translated_to("ip", range4, spec.nat_ports);
        let to6 = translated_to("ip6", range6, spec.nat6_ports);
        let v4 =
            spec.own4().filter(|_| spec.nat).map(|n| ("ip", n.trunc().to_string(), &to4, spec.nat_after));
        let v6 =
            spec.own6().filter(|_| spec.nat6).map(|n| ("ip6", n.trunc().to_string(), &to6, spec.nat6_after));
        for (family, subnet, all, after) in v4.chain(v6) {
            let (chain, priority) =
                if after { ("postrouting_after", "srcnat + 1") } else { ("postrouting", "srcnat") };
            for to in all {
                // `oifname`: with br_netfilter the guests' own multicasts pass here too, and must keep their source.
                t.base(chain, &format!("nat hook postrouting priority {priority}; policy accept")).push(format!(
                    "{family} saddr {subnet} {family} daddr != {subnet} oifname != \"{}\" {to} comment \"{}\"",
                    network.bridge,
                    crate::render::alias(daemon, network.id)
                ));
            }
        }
        forwards(t, network);
        together(t, network);
    }
}

/// The rate of all that passes between a bridge and the host or what is beyond it. From one guest to another nothing of it counts.
fn together(t: &mut Table, network: &NetworkSpec) {
    let rates = network.spec.ports.rates;
    for (rate, chain, hook, end) in [
        (rates.ingress, "rate_to", "postrouting priority 320", "oifname"),
        (rates.egress, "rate_from", "prerouting priority -320", "iifname"),
    ] {
        let Some(rate) = rate else { continue };
        let rules = t.base(chain, &format!("filter hook {hook}; policy accept"));
        for text in loose::rates(rate.average, rate.more) {
            rules.push(format!("{end} \"{}\" {text}", network.bridge));
        }
    }
}

fn forwards(t: &mut Table, network: &NetworkSpec) {
    for forward in &network.forwards {
        let (family, kind, map) = if forward.listen.is_ipv4() {
            ("ip", "ipv4_addr", "listen4")
        } else {
            ("ip6", "ipv6_addr", "listen6")
        };
        for (base, hook) in
            [("prerouting", "prerouting priority dstnat"), ("output_nat", "output priority -100")]
        {
            let rules = t.base(base, &format!("nat hook {hook}; policy accept"));
            let rule = format!("{family} daddr vmap @{map}");
            if !rules.contains(&rule) {
                rules.push(rule);
            }
        }
        let chain = format!("f_{}", forward.listen.to_string().replace([':', '.'], "_"));
        t.map(map, &format!("type {kind} : verdict;")).insert(format!("{} : goto {chain}", forward.listen));
        let postrouting = "nat hook postrouting priority srcnat; policy accept";
        // A guest that uses its own forward, or a neighbour's: the answer must come back through here.
        let hairpin = format!("iifname \"{0}\" oifname \"{0}\" ct status dnat masquerade", network.bridge);
        let rules = t.base("postrouting", postrouting);
        if !rules.contains(&hairpin) {
            rules.push(hairpin);
        }
        for target in forward.targets.iter().filter(|f| f.snat) {
            let protocol = if target.tcp { "tcp" } else { "udp" };
            let (a, b) = (target.target_port(target.listen.0), target.target_port(target.listen.1));
            t.base("postrouting", postrouting).push(format!(
                "oifname \"{}\" ct status dnat {family} daddr {} {protocol} dport {a}-{b} masquerade",
                network.bridge, target.address
            ));
        }
        let rules = t.chain(&chain);
        for target in &forward.targets {
            let protocol = if target.tcp { "tcp" } else { "udp" };
            let (first, last) = target.listen;
            let ports = if first == last { first.to_string() } else { format!("{first}-{last}") };
            let address = target.address;
            rules.push(match target.port {
                None => format!("{protocol} dport {ports} dnat {family} to {address}"),
                Some(port) if target.single || first == last => {
                    let to = if address.is_ipv4() { address.to_string() } else { format!("[{address}]") };
                    format!("{protocol} dport {ports} dnat {family} to {to}:{port}")
                }
                Some(_) => {
                    let map: Vec<String> = (first..=last)
                        .map(|p| format!("{p} : {address} . {}", target.target_port(p)))
                        .collect();
                    format!("dnat {family} to {protocol} dport map {{ {} }}", map.join(", "))
                }
            });
        }
        if let Some(address) = forward.default_target {
            rules.push(format!("dnat {family} to {address}"));
        }
    }
}

/// Routing that is switched off, and ACLs of networks.
fn edges(logs: Logs<'_>, t: &mut Table, networks: &[NetworkSpec]) {
    for network in networks {
        for (on, nfproto) in [(network.spec.routing, "ipv4"), (network.spec.routing6, "ipv6")] {
            if !on {
                let rules = t.base("routing", "filter hook forward priority filter - 1; policy accept");
                for (here, there) in [("iifname", "oifname"), ("oifname", "iifname")] {
                    rules.push(format!(
                        "{here} \"{0}\" {there} != \"{0}\" meta nfproto {nfproto} reject",
                        network.bridge
                    ));
                }
            }
        }
        let Some(policy) = &network.spec.policy else { continue };
        for direction in [Direction::Egress, Direction::Ingress] {
            let chain = format!("n_{}_{}", network.id.uuid().simple(), direction.as_str());
            let (map, name, hooks) = match direction {
                Direction::Egress => (
                    "edge_from",
                    "iifname",
                    [("forward_from", "forward priority filter"), ("input_from", "input priority filter")],
                ),
                Direction::Ingress => (
                    "edge_to",
                    "oifname",
                    [("forward_to", "forward priority filter + 1"), ("output_to", "output priority filter")],
                ),
            };
            for (base, hook) in hooks {
                let rules = t.base(base, &format!("filter hook {hook}; policy accept"));
                if rules.is_empty() {
                    rules.push(format!("{name} vmap @{map}"));
                }
            }
            t.map(map, "type ifname : verdict;").insert(format!("\"{}\" : goto {chain}", network.bridge));
            let other = if direction == Direction::Egress { "oifname" } else { "iifname" };
            let mut rules = vec![format!("{other} \"{}\" accept", network.bridge)];
            for (way, own) in [("original", true), ("reply", false)] {
                let bit = STATELESS.iter().find(|(d, _)| (*d == direction) == own).map_or(0, |(_, b)| *b);
                rules.push(format!(
                    "ct state established,related ct direction {way} ct mark and {bit:#010x} == 0 accept"
                ));
            }
            core(&mut rules, direction, network, "accept");
            if direction == Direction::Egress {
                let ports = views::ports(network).into_values();
                rules.extend(ports.map(|p| {
                    format!("meta l4proto {{ tcp, udp }} th dport {p} ct status & dnat != 0 accept")
                }));
            }
            let verdicts = Verdicts {
                reject: "reject",
                stateless: {
                    let bit = STATELESS.iter().find(|(d, _)| *d == direction).map_or(0, |(_, b)| *b);
                    format!("ct mark set ct mark or {bit:#010x} accept")
                },
                allow: "accept".into(),
            };
            policy_rules(logs, t, &mut rules, networks, network, policy, direction, &verdicts);
            *t.chain(&chain) = rules;
        }
    }
}

/// What the actions become in a table.
struct Verdicts {
    reject: &'static str,
    stateless: String,
    allow: String,
}

impl Verdicts {
    fn of(&self, action: Action) -> &str {
        match action {
            Action::Drop => "drop",
            Action::Reject => self.reject,
            Action::AllowStateless => &self.stateless,
            Action::Allow => &self.allow,
        }
    }
}

/// What guests need for their addresses and names. `remembered`: the verdict for what is answered.
fn core(rules: &mut Vec<String>, direction: Direction, network: &NetworkSpec, remembered: &str) {
    let (a, b, c, d) = if direction == Direction::Egress { (68, 67, 546, 547) } else { (67, 68, 547, 546) };
    rules.push(format!("meta protocol ip udp sport {a} udp dport {b} accept"));
    rules.push(format!("meta protocol ip6 udp sport {c} udp dport {d} accept"));
    rules.push("icmp type { 3, 11, 12 } accept".into());
    rules.push("icmpv6 type { 1-4, 130-136, 143 } accept".into());
    if direction == Direction::Egress {
        let v4 = network.spec.own4().map(|n| format!("ip daddr {}", n.addr()));
        let v6 = network.spec.own6().map(|n| format!("ip6 daddr {}", n.addr()));
        for own in v4.chain(v6) {
            for protocol in ["udp", "tcp"] {
                rules.push(format!("{own} {protocol} dport 53 {remembered}"));
            }
        }
    }
}

#[allow(clippy::too_many_arguments)] // one place, all of it needed
fn policy_rules(
    logs: Logs<'_>,
    t: &mut Table,
    rules: &mut Vec<String>,
    networks: &[NetworkSpec],
    network: &NetworkSpec,
    policy: &Policy,
    direction: Direction,
    verdicts: &Verdicts,
) {
    for action in Action::ORDER {
        for acl in network.acls.iter().filter(|a| policy.acls.contains(&a.name)) {
            if let Some(chain) = acl_chain(logs, t, networks, network, acl, direction, action, verdicts) {
                rules.push(format!("jump {chain}"));
            }
        }
    }
    let default = policy.default_of(direction);
    if default.logged {
        let what = format!("{} default", network.bridge);
        rules.push(kernel_log(logs.daemon, &what, direction, default.action));
    }
    rules.push(verdicts.of(default.action).to_owned());
}

/// Of a packet at most so many are logged by each rule, whatever is sent.
const RATE: &str = "limit rate 10/second burst 50 packets";

fn kernel_log(daemon: &str, what: &str, direction: Direction, action: Action) -> String {
    let (way, action) = (direction.as_str(), action.as_str());
    format!("{RATE} log prefix \"karst-{daemon} {what} {way} {action}: \"")
}

/// What a rule of an ACL logs: to the group, with a prefix that [`acl_log::Origin`] reads back, or else to the kernel's log.
fn rule_log(logs: Logs<'_>, acl: &AclSpec, rule: &RuleSpec, direction: Direction) -> String {
    let Logs { daemon, group } = logs;
    let Some(group) = group else {
        return kernel_log(daemon, &format!("acl {}[{}]", acl.name, rule.number), direction, rule.action);
    };
    let origin = acl_log::Origin { acl: acl.id, rule: rule.number, direction, action: rule.action };
    format!("{RATE} log prefix \"{}\" group {group}", origin.prefix(daemon))
}

#[allow(clippy::too_many_arguments)] // one place, all of it needed
fn acl_chain(
    logs: Logs<'_>,
    t: &mut Table,
    networks: &[NetworkSpec],
    network: &NetworkSpec,
    acl: &AclSpec,
    direction: Direction,
    action: Action,
    verdicts: &Verdicts,
) -> Option<String> {
    if !acl.rules(direction).iter().any(|r| r.action == action) {
        return None;
    }
    let name = format!(
        "a_{}_{}_{}_{}",
        acl.id.uuid().simple(),
        network.id.uuid().simple(),
        direction.as_str(),
        action.as_str().replace('-', "_")
    );
    if t.chains.contains_key(&name) {
        return Some(name);
    }
    let mut rules = vec![];
    for rule in acl.rules(direction).iter().filter(|r| r.action == action) {
        for condition in conditions(t, networks, network, rule) {
            if rule.logged {
                rules.push(format!("{condition}{}", rule_log(logs, acl, rule, direction)));
            }
            rules.push(format!("{condition}{}", verdicts.of(action)));
        }
    }
    *t.chain(&name) = rules;
    Some(name)
}

/// nft's conditions for a rule, each with a blank after it: several where one cannot say it.
fn conditions(
    t: &mut Table,
    networks: &[NetworkSpec],
    network: &NetworkSpec,
    rule: &RuleSpec,
) -> Vec<String> {
    let list = |ports: &[(u16, u16)]| {
        let ports: Vec<String> = merge_ports(ports)
            .iter()
            .map(|(a, b)| if a == b { a.to_string() } else { format!("{a}-{b}") })
            .collect();
        format!("{{ {} }}", ports.join(", "))
    };
    let mut payload = String::new();
    match rule.protocol {
        None => {}
        Some(p @ (Protocol::Tcp | Protocol::Udp)) => {
            let p = if p == Protocol::Tcp { "tcp" } else { "udp" };
            if rule.source_ports.is_empty() && rule.destination_ports.is_empty() {
                payload = format!("meta l4proto {p} ");
            }
            for (which, ports) in [("sport", &rule.source_ports), ("dport", &rule.destination_ports)] {
                if !ports.is_empty() {
                    payload += &format!("{p} {which} {} ", list(ports));
                }
            }
        }
        Some(p) => {
            let word = if p == Protocol::Icmp4 { "icmp" } else { "icmpv6" };
            match (rule.icmp_type, rule.icmp_code) {
                (None, _) if p == Protocol::Icmp4 => payload = "ip protocol icmp ".into(),
                (None, _) => payload = "meta l4proto ipv6-icmp ".into(),
                (Some(kind), code) => {
                    payload = format!("{word} type {kind} ");
                    if let Some(code) = code {
                        payload += &format!("{word} code {code} ");
                    }
                }
            }
        }
    }
    if rule.source.is_empty() && rule.destination.is_empty() {
        return vec![payload];
    }
    let mut all = vec![];
    for v4 in [true, false] {
        if rule.protocol == Some(if v4 { Protocol::Icmp6 } else { Protocol::Icmp4 }) {
            continue;
        }
        let sources = subjects(t, networks, network, &rule.source, v4, "saddr");
        let destinations = subjects(t, networks, network, &rule.destination, v4, "daddr");
        for source in &sources {
            for destination in &destinations {
                all.push(format!("{source}{destination}{payload}"));
            }
        }
    }
    all
}

fn merge_ports(ports: &[(u16, u16)]) -> Vec<(u16, u16)> {
    let mut sorted = ports.to_vec();
    sorted.sort_unstable();
    let mut merged: Vec<(u16, u16)> = vec![];
    for (a, b) in sorted {
        match merged.last_mut() {
            Some(last) if a <= last.1.saturating_add(1) => last.1 = last.1.max(b),
            _ => merged.push((a, b)),
        }
    }
    merged
}

/// Conditions on one end for one IP version; an empty text is no condition, no text: nothing matches.
fn subjects(
    t: &mut Table,
    networks: &[NetworkSpec],
    network: &NetworkSpec,
    list: &[Subject],
    v4: bool,
    end: &str,
) -> Vec<String> {
    if list.is_empty() {
        return vec![String::new()];
    }
    let family = if v4 { "ip" } else { "ip6" };
    let own = || network.spec.subnets().map(AddressRange::from).filter(|r| r.is_v4() == v4);
    let text =
        |ranges: &[AddressRange]| ranges.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ");
    let (mut plain, mut found) = (vec![], vec![]);
    for subject in list {
        match subject {
            Subject::Range(r) if r.is_v4() == v4 => plain.push(*r),
            Subject::Range(_) => {}
            Subject::Internal => plain.extend(own()),
            Subject::External => {
                let own = merge(own());
                found.push(if own.is_empty() {
                    // Any address of this version.
                    format!("{family} {end} {} ", if v4 { "0.0.0.0/0" } else { "::/0" })
                } else {
                    format!("{family} {end} != {{ {} }} ", text(&own))
                });
            }
            Subject::Set(name) => {
                if let Some(set) = network.sets.iter().find(|s| s.name == *name) {
                    let ranges = merge(set.ranges.iter().copied().filter(|r| r.is_v4() == v4));
                    let set = named(t, &format!("s_{}", set.id.uuid().simple()), v4, &ranges);
                    found.push(format!("{family} {end} @{set} "));
                }
            }
            Subject::Acl(name) => {
                let id: AclId = network
                    .acls
                    .iter()
                    .find(|a| a.name == *name)
                    .map_or_else(|| NetworkId(network.id.uuid()).uuid().into(), |a| a.id);
                let members: Vec<AddressRange> = evaluate::members(networks, network, name)
                    .into_iter()
                    .filter(|r| r.is_v4() == v4)
                    .collect();
                let set = named(t, &format!("g_{}", id.uuid().simple()), v4, &members);
                found.push(format!("{family} {end} @{set} "));
            }
        }
    }
    if !plain.is_empty() {
        let merged = merge(plain);
        found.push(if let [one] = &merged[..] {
            format!("{family} {end} {one} ")
        } else {
            format!("{family} {end} {{ {} }} ", text(&merged))
        });
    }
    found
}

fn named(t: &mut Table, name: &str, v4: bool, ranges: &[AddressRange]) -> String {
    let (kind, name) =
        if v4 { ("ipv4_addr", format!("{name}_4")) } else { ("ipv6_addr", format!("{name}_6")) };
    t.set(&name, &format!("type {kind}; flags interval;")).extend(ranges.iter().map(ToString::to_string));
    name
}

/// What single ports may send and get.
fn ports(
    logs: Logs<'_>,
    t: &mut Table,
    networks: &[NetworkSpec],
    unmanaged: &NetworkSpec,
    bridge_reject: bool,
) {
    let with_port = |n: &NetworkSpec| {
        n.hosts
            .iter()
            .filter_map(|h| Some((h.clone(), h.port.clone().filter(has_rules)?)))
            .collect::<Vec<_>>()
    };
    let guarded: Vec<(&NetworkSpec, Vec<(NetworkHost, PortSpec)>)> = networks
        .iter()
        .chain([unmanaged])
        .map(|n| (n, with_port(n)))
        .filter(|(_, p)| !p.is_empty())
        .collect();
    if guarded.is_empty() {
        return;
    }
    base_chains(t);
    for (network, ports) in guarded {
        for (host, port) in ports {
            filters(t, network, &host, &port);
            limits(t, &port);
            if let Some(policy) = &port.policy {
                for (direction, map) in [(Direction::Egress, "from"), (Direction::Ingress, "to")] {
                    let chain = port_chain(logs, t, networks, network, policy, direction, bridge_reject);
                    t.map(map, "type ifname : verdict;")
                        .insert(format!("\"{}\" : goto {chain}", port.interface));
                }
            }
        }
    }
}

fn base_chains(t: &mut Table) {
    let names = "type ifname;";
    for (name, header) in [
        ("mac_ports", names),
        ("v4_ports", names),
        ("v6_ports", names),
        ("isolated", names),
        ("mac_ok", "typeof iifname . ether saddr;"),
        ("v4_ok", "typeof iifname . ip saddr;"),
        ("v6_ok", "typeof iifname . ip6 saddr;"),
        ("target_ok", "typeof iifname . @th,64,128;"),
    ] {
        t.set(name, header);
    }
    for map in ["from", "to", "limit_from", "limit_to"] {
        t.map(map, "type ifname : verdict;");
    }
    let tuple = "th sport . th dport; size 262144; flags dynamic,timeout; timeout 3m;";
    t.dynamic("est4", &format!("typeof meta iif . ip saddr . ip daddr . ip protocol . {tuple}"));
    t.dynamic("est6", &format!("typeof meta iif . ip6 saddr . ip6 daddr . ip6 nexthdr . {tuple}"));
    let ping = "size 65536; flags dynamic,timeout; timeout 30s;";
    t.dynamic("ping4", &format!("typeof meta iif . ip saddr . ip daddr . icmp id; {ping}"));
    t.dynamic("ping6", &format!("typeof meta iif . ip6 saddr . ip6 daddr . icmpv6 id; {ping}"));

    let strings = |list: &[&str]| list.iter().map(|s| (*s).to_owned()).collect::<Vec<_>>();
    *t.base("prerouting", "filter hook prerouting priority -200; policy accept") = strings(&[
        "iifname @mac_ports iifname . ether saddr != @mac_ok drop",
        "iifname @mac_ports ether type arp iifname . arp saddr ether != @mac_ok drop",
        // Tags would hide what the rules below look at.
        "iifname @v4_ports ether type { 8021q, 8021ad } drop",
        "iifname @v6_ports ether type { 8021q, 8021ad } drop",
        "iifname @v4_ports iifname @v6_ports ether type != { ip, ip6, arp } drop",
        "iifname @v4_ports ether type arp iifname . arp saddr ip != @v4_ok jump v4_other",
        "iifname @v4_ports ether type ip iifname . ip saddr != @v4_ok jump v4_other",
        "iifname @v4_ports ether type ip udp sport 67 udp dport 68 drop",
        "iifname @v6_ports ether type ip6 iifname . ip6 saddr != @v6_ok jump v6_other",
        "iifname @v6_ports icmpv6 type { nd-router-advert, nd-redirect } drop",
        "iifname @v6_ports icmpv6 type nd-neighbor-advert iifname . @th,64,128 != @target_ok drop",
        "iifname @v6_ports ether type ip6 udp sport 547 udp dport 546 drop",
        "iifname vmap @limit_from",
        "iifname vmap @from",
    ]);
    // A guest that has no address yet asks for one, and asks whether one is taken.
    *t.chain("v4_other") = strings(&[
        "ether type arp arp saddr ip 0.0.0.0 return",
        "ip saddr 0.0.0.0 udp sport 68 udp dport 67 return",
        "jump v4_routed",
        "drop",
    ]);
    *t.chain("v6_other") = strings(&[
        "ip6 saddr :: icmpv6 type { nd-neighbor-solicit, nd-router-solicit, mld-listener-report, mld2-listener-report } return",
        "jump v6_routed",
        "drop",
    ]);
    t.chain("v4_routed");
    t.chain("v6_routed");
    *t.base("passing", "filter hook forward priority 0; policy accept") =
        strings(&["iifname @isolated oifname @isolated drop"]);
    *t.base("postrouting", "filter hook postrouting priority 0; policy accept") =
        strings(&["oifname vmap @limit_to", "oifname vmap @to"]);
    // Remember what may be answered, by the port through which it went; a full memory stops no packet.
    for (chain, port) in [("remember_egress", "iif"), ("remember_ingress", "oif")] {
        let answer = |family: &str, protocol: &str| {
            format!("{port} . {family} daddr . {family} saddr . {family} {protocol} . th dport . th sport")
        };
        let (v4, v6) = (answer("ip", "protocol"), answer("ip6", "nexthdr"));
        *t.chain(chain) = vec![
            format!("tcp flags & (fin | rst) != 0 update @est4 {{ {v4} timeout 1m }} accept"),
            format!("tcp flags & (fin | rst) != 0 update @est6 {{ {v6} timeout 1m }} accept"),
            format!("meta l4proto tcp update @est4 {{ {v4} timeout 1d }} accept"),
            format!("meta l4proto tcp update @est6 {{ {v6} timeout 1d }} accept"),
            format!("meta l4proto udp update @est4 {{ {v4} timeout 3m }} accept"),
            format!("meta l4proto udp update @est6 {{ {v6} timeout 3m }} accept"),
            format!(
                "icmp type echo-request update @ping4 {{ {port} . ip daddr . ip saddr . icmp id timeout 30s }} accept"
            ),
            format!(
                "icmpv6 type echo-request update @ping6 {{ {port} . ip6 daddr . ip6 saddr . icmpv6 id timeout 30s }} accept"
            ),
            "accept".into(),
        ];
    }
}

fn filters(t: &mut Table, network: &NetworkSpec, host: &NetworkHost, port: &PortSpec) {
    let name = format!("\"{}\"", port.interface);
    if port.isolated {
        t.set("isolated", "").insert(name.clone());
    }
    if port.mac_filter {
        t.set("mac_ports", "").insert(name.clone());
        t.set("mac_ok", "").insert(format!("{name} . {}", host.mac));
    }
    let addresses: BTreeSet<IpAddr> =
        evaluate::addresses(network, host).into_iter().chain(evaluate::link_local(&host.mac)).collect();
    for (v4, on) in [(true, port.ipv4_filter), (false, port.ipv6_filter)] {
        if !on {
            continue;
        }
        let (ports, ok, chain, word) = if v4 {
            ("v4_ports", "v4_ok", "v4_routed", "ip")
        } else {
            ("v6_ports", "v6_ok", "v6_routed", "ip6")
        };
        t.set(ports, "").insert(name.clone());
        for address in addresses.iter().filter(|a| a.is_ipv4() == v4) {
            t.set(ok, "").insert(format!("{name} . {address}"));
            if let IpAddr::V6(a) = address {
                t.set("target_ok", "").insert(format!("{name} . {:#034x}", u128::from(*a)));
            }
        }
        for route in host.routes.iter().filter(|r| r.addr().is_ipv4() == v4) {
            t.chain(chain).push(format!("iifname {name} {word} saddr {} return", route.trunc()));
            if v4 {
                t.chain(chain).push(format!("iifname {name} arp saddr ip {} return", route.trunc()));
            }
        }
    }
}

fn limits(t: &mut Table, port: &PortSpec) {
    let priority = port.priority.and_then(loose::priority);
    for (limit, more, priority, map, letter) in [
        (port.egress_limit, port.egress, priority, "limit_from", 'e'),
        (port.ingress_limit, port.ingress, None, "limit_to", 'i'),
    ] {
        if limit.is_none() && priority.is_none() {
            continue;
        }
        let chain = format!("l_{letter}_{}", port.interface.replace(['.', '-'], "_"));
        t.chain(&chain)
            .extend(limit.into_iter().flat_map(|average| loose::rates(average, more)).chain(priority));
        t.map(map, "").insert(format!("\"{}\" : jump {chain}", port.interface));
    }
}

fn port_chain(
    logs: Logs<'_>,
    t: &mut Table,
    networks: &[NetworkSpec],
    network: &NetworkSpec,
    policy: &Policy,
    direction: Direction,
    bridge_reject: bool,
) -> String {
    let text = serde_json::to_string(policy).unwrap_or_default();
    let hash =
        text.bytes().fold(0xcbf2_9ce4_8422_2325_u64, |h, b| (h ^ u64::from(b)).wrapping_mul(0x100_0000_01b3));
    let name = format!("p_{}_{hash:016x}_{}", network.id.uuid().simple(), direction.as_str());
    if t.chains.contains_key(&name) {
        return name;
    }
    let egress = direction == Direction::Egress;
    let (index, remember) =
        if egress { ("iif", "goto remember_egress") } else { ("oif", "goto remember_ingress") };
    let tuple = "th sport . th dport";
    let mut rules = vec![
        "ether type arp accept".to_owned(),
        // Parts of what passed, without ports; useless without the first.
        "ip frag-off & 0x1fff != 0 accept".into(),
        format!(
            "meta l4proto {{ tcp, udp }} {index} . ip saddr . ip daddr . ip protocol . {tuple} @est4 accept"
        ),
        format!(
            "meta l4proto {{ tcp, udp }} {index} . ip6 saddr . ip6 daddr . ip6 nexthdr . {tuple} @est6 accept"
        ),
        format!("icmp type echo-reply {index} . ip saddr . ip daddr . icmp id @ping4 accept"),
        format!("icmpv6 type echo-reply {index} . ip6 saddr . ip6 daddr . icmpv6 id @ping6 accept"),
    ];
    core(&mut rules, direction, network, remember);
    let verdicts = Verdicts {
        // A port's outward side is no place from which an answer could be sent.
        reject: if egress && bridge_reject { "reject" } else { "drop" },
        stateless: "accept".into(),
        allow: remember.into(),
    };
    policy_rules(logs, t, &mut rules, networks, network, policy, direction, &verdicts);
    *t.chain(&name) = rules;
    name
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_leaves_is_translated_to() {
        let at = |text: &str| text.parse::<IpAddr>().ok();
        assert_eq!(translated_to("ip", (None, None), None), ["masquerade"]);
        assert_eq!(translated_to("ip", (at("192.0.2.1"), None), None), ["snat ip to 192.0.2.1"]);
        let range = (at("192.0.2.1"), at("192.0.2.9"));
        let all = translated_to("ip", range, Some((1024, 65535)));
        let wanted = [
            "meta l4proto tcp snat ip to 192.0.2.1-192.0.2.9:1024-65535",
            "meta l4proto udp snat ip to 192.0.2.1-192.0.2.9:1024-65535",
            "snat ip to 192.0.2.1-192.0.2.9",
        ];
        assert_eq!(all, wanted);
        let all = translated_to("ip6", (None, None), Some((1024, 65535)));
        assert_eq!(all[0], "meta l4proto tcp masquerade to :1024-65535");
    }
}
