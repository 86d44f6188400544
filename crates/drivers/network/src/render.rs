//! Text for other programs, made of checked values only: dnsmasq's configuration and its lists of hosts.

use crate::record::{Paths, Record};
use ipnet::{Ipv4Net, Ipv6Net};
use karst_host::link::parse_mac;
use karst_model::{
    Error, Result,
    device::interface_name,
    network::{BridgeSpec, DnsMode},
    network_names::{DnsForwarder, DnsHost, DnsService, DnsText, NetworkNames, ReservedHost},
    spec::NetworkHost,
};
use std::{
    collections::BTreeSet,
    fmt::Write,
    net::{IpAddr, Ipv4Addr},
};

/// The mark on a link.
pub(crate) fn alias(daemon: &str, id: karst_model::NetworkId) -> String {
    format!("karst:{daemon}:{id}")
}

/// What decides dnsmasq's configuration besides the record.
#[derive(Debug, Clone)]
pub(crate) struct DnsmasqContext<'a> {
    pub daemon: &'a str,
    pub paths: &'a Paths,
    pub user: &'a str,
    pub group: &'a str,
    /// Index of the bridge's link: sockets stay bound to a link that was deleted, so dnsmasq starts anew with a new one.
    pub link: u32,
    /// `/etc/resolv.conf` names a server other than this network's own.
    pub upstream: bool,
}

/// dnsmasq's configuration; `None` for a network without an address, which has neither DHCP nor DNS.
/// `view`: the port of a server of names alone.
pub(crate) fn dnsmasq(record: &Record, context: &DnsmasqContext<'_>, view: Option<u16>) -> Option<String> {
    let Record { bridge, spec, .. } = record;
    if spec.ipv4.is_none() && spec.ipv6.is_none() {
        return None;
    }
    let file = |name: &str| context.paths.file(record.id, name).display().to_string();
    let mut text = format!(
        "# Made by Karst {daemon} for network {id}, link {link}. Changes are overwritten.\n\
         user={user}\ngroup={group}\npid-file={pid}\nlog-facility={log}\n\
         interface={bridge}\nexcept-interface=lo\nbind-dynamic\nno-hosts\n",
        daemon = context.daemon,
        id = record.id,
        link = context.link,
        user = context.user,
        group = context.group,
        pid = file("dnsmasq.pid"),
        log = file("dnsmasq.log"),
    );
    if spec.dns_mode != DnsMode::None {
        let domain = &spec.domain;
        let _ = write!(text, "addn-hosts={hosts}\ndomain={domain}\n", hosts = file("hosts"));
        if !spec.names.beyond {
            let _ = writeln!(text, "local=/{domain}/");
        }
        text.push_str(match spec.names.plain {
            None => "domain-needed\n",
            Some(false) => "domain-needed\nlocal=//\n",
            Some(true) => "",
        });
        let _ = writeln!(text, "interface-name=_gateway.{domain},{bridge}");
        records(&mut text, &spec.names);
        if let Some(net) = spec.ipv4.filter(|n| matches!(n.prefix_len(), 8 | 16 | 24)) {
            // Addresses of guests are looked up here alone. Older dnsmasq takes whole octets only.
            let _ = writeln!(text, "rev-server={}", net.trunc());
        }
    }
    let alone = spec.names.forwarders.iter().any(|f| f.domain.is_none());
    if !context.upstream || alone {
        text.push_str("no-resolv\n");
    }
    if let Some(port) = view {
        let _ = writeln!(text, "port={port}");
        return Some(text);
    }
    let v4 = spec.ipv4.filter(|_| spec.dhcp);
    let v6 = spec.ipv6.filter(|_| spec.ra || spec.dhcp6);
    if v4.is_some() || v6.is_some() {
        let names = if spec.dns_mode == DnsMode::Dynamic { "" } else { "dhcp-ignore-names\n" };
        let _ = write!(
            text,
            "dhcp-leasefile={leases}\ndhcp-hostsfile={hosts}\ndhcp-no-override\n{names}quiet-dhcp\n",
            leases = file("dnsmasq.leases"),
            hosts = file("dhcp-hosts"),
        );
    }
    if let Some(net) = v4 {
        dhcp4(&mut text, spec, net);
    }
    if let Some(net) = v6 {
        dhcp6(&mut text, spec, net);
    }
    // Last, as the administrator of the host has granted it; checked (`check`).
    if let Some(raw) = &spec.raw_dnsmasq {
        text.push_str(raw);
        text.push('\n');
    }
    Some(text)
}

/// What is answered beside names of guests, and who is asked for the rest. All of it was checked when it was parsed, and is again
/// before it comes here ([`check`]).
fn records(text: &mut String, names: &NetworkNames) {
    for forwarder in &names.forwarders {
        let address = forwarder.address.map_or("#".into(), |a| a.to_string());
        let _ = match &forwarder.domain {
            Some(domain) => writeln!(text, "server=/{domain}/{address}"),
            None => writeln!(text, "server={address}"),
        };
    }
    for record in &names.texts {
        // In quotes a comma is a part of the text.
        let value = record.value.replace('\\', "\\\\").replace('"', "\\\"");
        let _ = writeln!(text, "txt-record={},\"{value}\"", record.name);
    }
    for service in &names.services {
        let _ = write!(text, "srv-host=_{}._{}", service.service, service.protocol);
        if let Some(domain) = &service.domain {
            let _ = write!(text, ".{domain}");
        }
        if let Some(target) = &service.target {
            let numbers =
                [service.port.unwrap_or(1), service.priority.unwrap_or(0), service.weight.unwrap_or(0)];
            let _ = write!(text, ",{target},{}", joined(numbers));
        }
        text.push('\n');
    }
}

fn joined<T: ToString>(list: impl IntoIterator<Item = T>) -> String {
    list.into_iter().map(|x| x.to_string()).collect::<Vec<_>>().join(",")
}

fn time(seconds: u32) -> String {
    match seconds {
        0 => "infinite".into(),
        s if s.is_multiple_of(3600) => format!("{}h", s / 3600),
        s => s.to_string(),
    }
}

fn dhcp4(text: &mut String, spec: &BridgeSpec, net: Ipv4Net) {
    let ranges = if spec.dhcp_ranges.is_empty() { vec![whole(net)] } else { spec.dhcp_ranges.clone() };
    let mut count: u64 = 0;
    for (first, last) in ranges {
        let _ = writeln!(text, "dhcp-range={first},{last},{},{}", net.netmask(), time(spec.dhcp_expiry));
        count += u64::from(u32::from(last)) - u64::from(u32::from(first)) + 1;
    }
    let _ = write!(
        text,
        "dhcp-lease-max={}\ndhcp-authoritative\ndhcp-rapid-commit\ndhcp-ignore-clid\nno-ping\n",
        count.min(65_536)
    );
    if let Some(mtu) = spec.mtu {
        let _ = writeln!(text, "dhcp-option=26,{mtu}");
    }
    if let Some(gateway) = spec.dhcp_gateway {
        let _ = writeln!(text, "dhcp-option=3,{gateway}");
    }
    if !spec.dhcp_routes.is_empty() {
        let routes = joined(spec.dhcp_routes.iter().map(|(to, via)| format!("{to},{via}")));
        // A client that hears of routes does not look at the gateway (RFC 3442).
        let gateway = spec.dhcp_gateway.unwrap_or_else(|| net.addr());
        let _ = writeln!(text, "dhcp-option=121,0.0.0.0/0,{gateway},{routes}");
    }
    let servers: Vec<_> = spec.nameservers.iter().filter(|a| a.is_ipv4()).collect();
    if !servers.is_empty() {
        let _ = writeln!(text, "dhcp-option=6,{}", joined(servers));
    }
    if !spec.search.is_empty() {
        let _ = writeln!(text, "dhcp-option=119,{}", joined(&spec.search));
    }
}

fn dhcp6(text: &mut String, spec: &BridgeSpec, net: Ipv6Net) {
    if spec.ra {
        text.push_str("enable-ra\n");
    }
    let subnet = net.network();
    if spec.dhcp6 && spec.dhcp6_stateful {
        let base = u128::from(subnet);
        let all = u128::from(net.broadcast());
        let ranges = if spec.dhcp6_ranges.is_empty() {
            vec![((base + 2).into(), all.into())]
        } else {
            spec.dhcp6_ranges.clone()
        };
        for (first, last) in ranges {
            // dnsmasq's ranges are of /64 at least.
            let _ = writeln!(
                text,
                "dhcp-range={first},{last},{},{}",
                net.prefix_len().max(64),
                time(spec.dhcp6_expiry)
            );
        }
    } else if spec.dhcp6 {
        let _ = writeln!(text, "dhcp-range={subnet},ra-stateless,ra-names,64,{}", time(spec.dhcp6_expiry));
    } else {
        let _ = writeln!(text, "dhcp-range={subnet},ra-only,64,{}", time(spec.dhcp6_expiry));
    }
    let servers: Vec<_> = spec.nameservers.iter().filter(|a| a.is_ipv6()).map(|a| format!("[{a}]")).collect();
    if !servers.is_empty() {
        let _ = writeln!(text, "dhcp-option=option6:dns-server,{}", joined(servers));
    }
    if !spec.search.is_empty() {
        let _ = writeln!(text, "dhcp-option=option6:domain-search,{}", joined(&spec.search));
    }
}

/// First and last host of a subnet. dnsmasq itself never gives out the bridge's own address.
pub(crate) fn whole(net: Ipv4Net) -> (Ipv4Addr, Ipv4Addr) {
    let (first, last) = (u32::from(net.network()) + 1, u32::from(net.broadcast()) - 1);
    // The usual case, the bridge being the first, reads better without it.
    let first = if first == u32::from(net.addr()) { first + 1 } else { first };
    (first.into(), last.into())
}

/// Checks a network as a whole; what is refused here would otherwise reach another program's configuration.
pub(crate) fn check(bridge: &str, spec: &karst_model::network::BridgeSpec) -> Result<()> {
    interface_name("name", bridge)?;
    if matches!(bridge, "all" | "default" | "lo") {
        // `net.ipv4.conf.all` is every interface of the host.
        return Err(Error::invalid("name", format!("a bridge cannot be called {bridge:?}")));
    }
    for text in &spec.external_interfaces {
        karst_model::network::ExternalInterface::parse(text)?;
    }
    if let Some(mac) = &spec.hwaddr {
        parse_mac(mac)?;
    }
    let label =
        |l: &str| !l.is_empty() && l.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'_');
    if let Some(wrong) = spec.search.iter().find(|d| !d.split('.').all(label)) {
        return Err(Error::invalid("config.dns.search", format!("{wrong:?} is not a DNS domain")));
    }
    // Written out and read again: what does not come back the same would be something else to dnsmasq.
    let names = &spec.names;
    let list = |all: Vec<String>, between: &str| Some(all.join(between)).filter(|v| !v.is_empty());
    let values = [
        ("dns.hosts", list(names.hosts.iter().map(DnsHost::entry).collect(), ",")),
        ("dns.txt", list(names.texts.iter().map(DnsText::entry).collect(), "\n")),
        ("dns.srv", list(names.services.iter().map(DnsService::entry).collect(), ",")),
        ("dns.forwarders", list(names.forwarders.iter().map(DnsForwarder::entry).collect(), ",")),
        ("ipv4.dhcp.hosts", list(names.reserved.iter().map(ReservedHost::entry).collect(), ",")),
    ];
    let get = |key: &str| values.iter().find(|(k, _)| *k == key).and_then(|(_, v)| v.as_deref());
    if NetworkNames::parse(&get, !names.beyond, names.plain)? != *names {
        return Err(Error::invalid("config.dns.hosts", "a record of the network's DNS is not one"));
    }
    if !spec.domain.split('.').all(label) {
        return Err(Error::invalid("config.dns.domain", format!("{:?} is not a DNS domain", spec.domain)));
    }
    if let Some(lines) = &spec.raw_dnsmasq {
        karst_model::dnsmasq::check_lines("config.raw.dnsmasq", lines)?;
    }
    Ok(())
}

/// Checks the guests of a network and puts them into a fixed order. A name that two have goes to the first of them; whose it
/// is says who knows their age, and tells of one only.
pub(crate) fn check_hosts(spec: &BridgeSpec, hosts: &[NetworkHost]) -> Result<Vec<NetworkHost>> {
    let mut checked: Vec<NetworkHost> = Vec::with_capacity(hosts.len());
    for host in hosts {
        parse_mac(&host.mac)?;
        let name = host.hostname.to_ascii_lowercase();
        let fits = name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-')
            && !name.starts_with('-')
            && !name.ends_with('-')
            && name.len() <= 63;
        if !fits {
            return Err(Error::invalid("hostname", format!("{:?} is not a DNS label", host.hostname)));
        }
        let addresses =
            [("ipv4.address", host.ipv4.map(IpAddr::from)), ("ipv6.address", host.ipv6.map(IpAddr::from))];
        for (key, address) in addresses {
            if let Some(address) = address.filter(|a| !spec.takes(*a)) {
                let text = format!("{address} is not an address for a guest of this network");
                return Err(Error::invalid(key, text));
            }
        }
        // What the network does not give away would be others' traffic.
        if let Some(route) = host.routes.iter().find(|r| !spec.routed().any(|net| net.contains(*r))) {
            let text = format!("{route} is not within the routes of this network");
            return Err(Error::invalid("ipv4.routes", text));
        }
        if let Some(port) = &host.port {
            interface_name("host_name", &port.interface)?;
        }
        checked.push(NetworkHost { mac: host.mac.to_ascii_lowercase(), hostname: name, ..host.clone() });
    }
    checked.sort();
    checked.dedup();
    let (mut macs, mut names, mut addresses) = (BTreeSet::new(), BTreeSet::new(), BTreeSet::new());
    let mut addresses6 = BTreeSet::new();
    for host in &mut checked {
        if !macs.insert(host.mac.clone()) {
            return Err(Error::conflict(format!(
                "two guests of this network have the MAC address {}",
                host.mac
            )));
        }
        if host.ipv4.is_some_and(|a| !addresses.insert(a)) {
            return Err(Error::conflict(format!(
                "two guests of this network have the address {}",
                host.ipv4.expect("just seen")
            )));
        }
        if let Some(address) = host.ipv6
            && !addresses6.insert(address)
        {
            return Err(Error::conflict(format!("two guests of this network have the address {address}")));
        }
        // `localhost` must mean the guest itself; a second guest of a name would take it from the first.
        let view = host.view.as_ref().map(|v| v.project);
        if !host.hostname.is_empty()
            && (host.hostname == "localhost" || !names.insert((view, host.hostname.clone())))
        {
            tracing::warn!(mac = %host.mac, name = %host.hostname, "guest is left without a DNS name: it is taken");
            host.hostname.clear();
        }
    }
    Ok(checked)
}

/// `dhcp-hostsfile`: by MAC the name, and the address where it is static.
pub(crate) fn dhcp_hosts(hosts: &[NetworkHost]) -> String {
    let mut text = String::new();
    for host in hosts {
        text.push_str(&host.mac);
        if let Some(address) = host.ipv4 {
            let _ = write!(text, ",{address}");
        }
        if let Some(address) = host.ipv6 {
            let _ = write!(text, ",[{address}]");
        }
        // The name of a guest of a view is in its view alone.
        if !host.hostname.is_empty() && host.view.is_none() {
            let _ = write!(text, ",{}", host.hostname);
        }
        text.push('\n');
    }
    text
}

/// `addn-hosts`: static addresses are found by name whether or not their guest ever asked for a lease.
pub(crate) fn dns_hosts(domain: &str, hosts: &[NetworkHost]) -> String {
    let mut text = String::new();
    for host in hosts.iter().filter(|h| !h.hostname.is_empty() && h.view.is_none()) {
        let v4 = host.ipv4.map(IpAddr::V4);
        for address in v4.into_iter().chain(host.ipv6.map(IpAddr::V6)) {
            let _ = writeln!(text, "{address} {name}.{domain} {name}", name = host.hostname);
        }
    }
    text
}

/// Further hosts of a network, in the same file. One without a domain is in the network's too.
pub(crate) fn more_hosts(spec: &BridgeSpec) -> String {
    let mut text = String::new();
    for host in &spec.names.hosts {
        let _ = write!(text, "{}", host.address);
        for name in &host.names {
            if !name.contains('.') {
                let _ = write!(text, " {name}.{}", spec.domain);
            }
            let _ = write!(text, " {name}");
        }
        text.push('\n');
    }
    text
}

/// Does `resolv.conf` name a server that is not `own`?
pub(crate) fn has_upstream(resolv_conf: &str, own: Option<Ipv4Addr>) -> bool {
    nameservers(resolv_conf).any(|s| own.is_none_or(|o| s != IpAddr::V4(o)))
}

/// Name servers in `resolv.conf`.
pub(crate) fn nameservers(resolv_conf: &str) -> impl Iterator<Item = std::net::IpAddr> {
    resolv_conf.lines().filter_map(|line| {
        let mut words = line.split_whitespace();
        (words.next() == Some("nameserver"))
            .then(|| words.next())
            .flatten()
            .and_then(|a| a.split('%').next()?.parse().ok())
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    fn record(n: u128, bridge: &str, ipv4: Option<&str>) -> Record {
        Record {
            id: uuid::Uuid::from_u128(n).into(),
            bridge: bridge.into(),
            spec: BridgeSpec { ipv4: ipv4.map(|s| s.parse().unwrap()), nat: true, ..Default::default() },
            removing: false,
        }
    }

    fn host(mac: &str, hostname: &str, ipv4: Option<&str>) -> NetworkHost {
        NetworkHost {
            mac: mac.into(),
            hostname: hostname.into(),
            ipv4: ipv4.map(|s| s.parse().unwrap()),
            ..Default::default()
        }
    }

    #[test]
    fn dnsmasq_configuration() {
        let paths = Paths("/var/lib/karst/host/networks".into());
        let context = DnsmasqContext {
            daemon: "ab12cd",
            paths: &paths,
            user: "dnsmasq",
            group: "nogroup",
            link: 7,
            upstream: false,
        };
        let mut r = record(1, "karstbr0", Some("10.1.2.1/24"));
        r.spec.mtu = Some(9000);
        insta::assert_snapshot!(dnsmasq(&r, &context, None).unwrap(), @r"
        # Made by Karst ab12cd for network 00000000-0000-0000-0000-000000000001, link 7. Changes are overwritten.
        user=dnsmasq
        group=nogroup
        pid-file=/var/lib/karst/host/networks/00000000-0000-0000-0000-000000000001/dnsmasq.pid
        log-facility=/var/lib/karst/host/networks/00000000-0000-0000-0000-000000000001/dnsmasq.log
        interface=karstbr0
        except-interface=lo
        bind-dynamic
        no-hosts
        addn-hosts=/var/lib/karst/host/networks/00000000-0000-0000-0000-000000000001/hosts
        domain=karst
        local=/karst/
        domain-needed
        interface-name=_gateway.karst,karstbr0
        rev-server=10.1.2.0/24
        no-resolv
        dhcp-leasefile=/var/lib/karst/host/networks/00000000-0000-0000-0000-000000000001/dnsmasq.leases
        dhcp-hostsfile=/var/lib/karst/host/networks/00000000-0000-0000-0000-000000000001/dhcp-hosts
        dhcp-no-override
        dhcp-ignore-names
        quiet-dhcp
        dhcp-range=10.1.2.2,10.1.2.254,255.255.255.0,1h
        dhcp-lease-max=253
        dhcp-authoritative
        dhcp-rapid-commit
        dhcp-ignore-clid
        no-ping
        dhcp-option=26,9000
        ");
        r.spec.dhcp = false;
        let text = dnsmasq(&r, &DnsmasqContext { upstream: true, ..context.clone() }, None).unwrap();
        assert!(!text.contains("dhcp") && !text.contains("no-resolv"), "{text}");
        r.spec.ipv4 = None;
        assert!(dnsmasq(&r, &context, None).is_none());
    }

    #[test]
    fn records_of_names() {
        let paths = Paths("/p".into());
        let (daemon, user, group) = ("ab12cd", "dnsmasq", "nogroup");
        let context = DnsmasqContext { daemon, paths: &paths, user, group, link: 7, upstream: true };
        let all: Vec<(&str, &str)> = vec![
            ("dns.hosts", "10.1.2.5 www a.example,fd00::5 six"),
            ("dns.txt", "spf v=spf1 a, b \"c\\\nother x"),
            ("dns.srv", "ldap tcp example.org ldap.example.org 389 10 5,sip udp,xmpp tcp - chat.example.org"),
            ("dns.forwarders", "192.0.2.53,example.org=192.0.2.54,host.example="),
        ];
        let get = |key: &str| all.iter().find(|(k, _)| *k == key).map(|(_, v)| *v);
        let mut r = record(1, "karstbr0", Some("10.1.2.1/24"));
        r.spec.names = NetworkNames::parse(&get, false, Some(true)).unwrap();
        check("br0", &r.spec).unwrap();
        let text = dnsmasq(&r, &context, Some(30_053)).unwrap();
        let from = text.find("domain=").unwrap();
        insta::assert_snapshot!(&text[from..], @r#"
        domain=karst
        interface-name=_gateway.karst,karstbr0
        server=192.0.2.53
        server=/example.org/192.0.2.54
        server=/host.example/#
        txt-record=spf,"v=spf1 a, b \"c\\"
        txt-record=other,"x"
        srv-host=_ldap._tcp.example.org,ldap.example.org,389,10,5
        srv-host=_sip._udp
        srv-host=_xmpp._tcp,chat.example.org,1,0,0
        rev-server=10.1.2.0/24
        no-resolv
        port=30053
        "#);
        insta::assert_snapshot!(more_hosts(&r.spec), @r"
        10.1.2.5 www.karst www a.example
        fd00::5 six.karst six
        ");
        r.spec.names.plain = Some(false);
        assert!(dnsmasq(&r, &context, None).unwrap().contains("\ndomain-needed\nlocal=//\n"));
        // What did not come from a key is looked at again.
        for wrong in ["a b", "a\nserver=192.0.2.1", "a/b", ""] {
            let mut spec = r.spec.clone();
            spec.names.hosts[0].names = vec![wrong.into()];
            assert!(check("br0", &spec).is_err(), "{wrong:?}");
            let mut spec = r.spec.clone();
            spec.names.texts[1].value = format!("x\n{wrong}");
            assert!(check("br0", &spec).is_err(), "{wrong:?}");
            let mut spec = r.spec.clone();
            spec.names.services[0].target = Some(wrong.into());
            assert!(check("br0", &spec).is_err(), "{wrong:?}");
            let mut spec = r.spec.clone();
            spec.names.forwarders[1].domain = Some(wrong.into());
            assert!(check("br0", &spec).is_err(), "{wrong:?}");
        }
    }

    #[test]
    fn lines_that_are_added_say_what_guests_are_answered() {
        let with = |lines: &str| BridgeSpec { raw_dnsmasq: Some(lines.into()), ..Default::default() };
        check("br0", &with("address=/a.example/10.0.0.1")).unwrap();
        for lines in ["dhcp-script=/bin/sh", "no-resolv\nconf-file=/etc/shadow"] {
            assert_eq!(check("br0", &with(lines)).unwrap_err().field.as_deref(), Some("config.raw.dnsmasq"));
        }
    }

    #[test]
    fn hosts_are_checked_and_written() {
        let net = BridgeSpec { ipv4: Some("10.1.2.1/24".parse().unwrap()), ..Default::default() };
        let hosts = check_hosts(
            &net,
            &[
                host("02:00:00:00:00:02", "v1", Some("10.1.2.50")),
                host("02:00:00:00:00:0A", "C1", None),
                host("02:00:00:00:00:0b", "c1", None),
                host("02:00:00:00:00:0c", "localhost", Some("10.1.2.51")),
            ],
        )
        .unwrap();
        insta::assert_snapshot!(dhcp_hosts(&hosts), @r"
        02:00:00:00:00:02,10.1.2.50,v1
        02:00:00:00:00:0a,c1
        02:00:00:00:00:0b
        02:00:00:00:00:0c,10.1.2.51
        ");
        insta::assert_snapshot!(dns_hosts("karst", &hosts), @"10.1.2.50 v1.karst v1");
        for bad in [
            host("02:00:00:00:00:02", "a,b", None),
            host("02:00:00:00:00:02", "a\ndhcp-script=/bin/sh", None),
            host("02:00:00:00:00:02,set:x", "a", None),
            host("02:00:00:00:00:02", "a", Some("10.1.3.5")),
            host("02:00:00:00:00:02", "a", Some("10.1.2.1")),
            host("02:00:00:00:00:02", "a", Some("10.1.2.255")),
        ] {
            assert!(check_hosts(&net, std::slice::from_ref(&bad)).is_err(), "{bad:?}");
        }
        let given = BridgeSpec { routes: vec!["192.0.2.0/24".parse().unwrap()], ..net.clone() };
        for (route, fine) in [("192.0.2.64/26", true), ("192.0.0.0/16", false), ("1.1.1.1/32", false)] {
            let routes = vec![route.parse().unwrap()];
            let routed = [NetworkHost { routes, ..host("02:00:00:00:00:02", "a", None) }];
            assert_eq!(check_hosts(&given, &routed).is_ok(), fine, "{route}");
            assert!(check_hosts(&net, &routed).is_err(), "{route}");
        }
        let twice = [host("02:00:00:00:00:02", "a", None), host("02:00:00:00:00:02", "b", None)];
        assert!(check_hosts(&net, &twice).unwrap_err().is(karst_model::ErrorKind::Conflict));
    }

    #[test]
    fn upstream() {
        let own = Some("10.1.2.1".parse().unwrap());
        assert!(!has_upstream("# nameserver 9.9.9.9\nsearch x\n", own));
        assert!(!has_upstream("nameserver 10.1.2.1\n", own));
        assert!(has_upstream("nameserver 10.1.2.1\nnameserver 127.0.0.53\n", own));
        assert_eq!(nameservers("nameserver fe80::1%eth0\n").count(), 1);
    }
}
