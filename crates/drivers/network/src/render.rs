//! Text for other programs, made of checked values only: the nft table, dnsmasq's configuration and its lists of hosts.

use crate::record::{Paths, Record};
use ipnet::Ipv4Net;
use karst_host::link::parse_mac;
use karst_model::{Error, Result, device::interface_name, spec::NetworkHost};
use std::{collections::BTreeSet, fmt::Write, net::Ipv4Addr};

/// Name of the daemon's table in family `inet`.
pub(crate) fn table_name(daemon: &str) -> String {
    format!("karst_{daemon}")
}

/// The mark on a link.
pub(crate) fn alias(daemon: &str, id: karst_model::NetworkId) -> String {
    format!("karst:{daemon}:{id}")
}

/// One transaction that replaces the daemon's table by what `records` want, or deletes it when they want nothing. Our base
/// chains only translate addresses: an accept in them could not overrule the drop of another's chain.
pub(crate) fn nft_table(daemon: &str, records: &[Record]) -> String {
    let table = table_name(daemon);
    let mut text = format!("add table inet {table}\ndelete table inet {table}\n");
    let translated: Vec<_> =
        records.iter().filter(|r| r.spec.nat).filter_map(|r| Some((r, r.spec.ipv4?.trunc()))).collect();
    if translated.is_empty() {
        return text;
    }
    let _ = write!(
        text,
        "table inet {table} {{\n\tchain postrouting {{\n\t\ttype nat hook postrouting priority srcnat; policy accept;\n"
    );
    for (record, subnet) in translated {
        // `oifname`: with br_netfilter the guests' own multicasts pass here too, and must keep their source.
        let _ = writeln!(
            text,
            "\t\tip saddr {subnet} ip daddr != {subnet} oifname != \"{}\" masquerade comment \"{}\"",
            record.bridge,
            alias(daemon, record.id)
        );
    }
    text.push_str("\t}\n}\n");
    text
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
pub(crate) fn dnsmasq(record: &Record, context: &DnsmasqContext<'_>) -> Option<String> {
    let net = record.spec.ipv4?;
    let file = |name: &str| context.paths.file(record.id, name).display().to_string();
    let Record { bridge, spec, .. } = record;
    let mut text = format!(
        "# Made by Karst {daemon} for network {id}, link {link}. Changes are overwritten.\n\
         user={user}\ngroup={group}\npid-file={pid}\nlog-facility={log}\n\
         interface={bridge}\nexcept-interface=lo\nbind-dynamic\n\
         no-hosts\naddn-hosts={hosts}\ndomain={domain}\nlocal=/{domain}/\ndomain-needed\n\
         interface-name=_gateway.{domain},{bridge}\n",
        daemon = context.daemon,
        id = record.id,
        link = context.link,
        user = context.user,
        group = context.group,
        pid = file("dnsmasq.pid"),
        log = file("dnsmasq.log"),
        hosts = file("hosts"),
        domain = spec.domain,
    );
    if matches!(net.prefix_len(), 8 | 16 | 24) {
        // Addresses of guests are looked up here alone. Older dnsmasq takes whole octets only.
        let _ = writeln!(text, "rev-server={}", net.trunc());
    }
    if !context.upstream {
        text.push_str("no-resolv\n");
    }
    if spec.dhcp {
        let (first, last) = spec.dhcp_range.unwrap_or_else(|| whole(net));
        let _ = write!(
            text,
            "dhcp-range={first},{last},{mask},1h\ndhcp-lease-max={max}\ndhcp-leasefile={leases}\ndhcp-hostsfile={hosts}\n\
             dhcp-authoritative\ndhcp-rapid-commit\ndhcp-no-override\ndhcp-ignore-names\ndhcp-ignore-clid\nno-ping\nquiet-dhcp\n",
            mask = net.netmask(),
            max = (u64::from(u32::from(last)) - u64::from(u32::from(first)) + 1).min(65_536),
            leases = file("dnsmasq.leases"),
            hosts = file("dhcp-hosts"),
        );
        if let Some(mtu) = spec.mtu {
            let _ = writeln!(text, "dhcp-option=26,{mtu}");
        }
    }
    Some(text)
}

/// First and last host of a subnet. dnsmasq itself never gives out the bridge's own address.
fn whole(net: Ipv4Net) -> (Ipv4Addr, Ipv4Addr) {
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
    let label =
        |l: &str| !l.is_empty() && l.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'_');
    if !spec.domain.split('.').all(label) {
        return Err(Error::invalid("config.dns.domain", format!("{:?} is not a DNS domain", spec.domain)));
    }
    Ok(())
}

/// Checks the guests of a network and puts them into a fixed order. A name that two have goes to the first of them.
pub(crate) fn check_hosts(ipv4: Option<Ipv4Net>, hosts: &[NetworkHost]) -> Result<Vec<NetworkHost>> {
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
        if let Some(address) = host.ipv4
            && !ipv4.is_some_and(|net| {
                net.contains(&address) && ![net.addr(), net.network(), net.broadcast()].contains(&address)
            })
        {
            return Err(Error::invalid(
                "ipv4.address",
                format!("{address} is not an address for a guest of this network"),
            ));
        }
        checked.push(NetworkHost { mac: host.mac.to_ascii_lowercase(), hostname: name, ipv4: host.ipv4 });
    }
    checked.sort();
    checked.dedup();
    let (mut macs, mut names, mut addresses) = (BTreeSet::new(), BTreeSet::new(), BTreeSet::new());
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
        // `localhost` must mean the guest itself; a second guest of a name would take it from the first.
        if !host.hostname.is_empty() && (host.hostname == "localhost" || !names.insert(host.hostname.clone()))
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
        if !host.hostname.is_empty() {
            let _ = write!(text, ",{}", host.hostname);
        }
        text.push('\n');
    }
    text
}

/// `addn-hosts`: static addresses are found by name whether or not their guest ever asked for a lease.
pub(crate) fn dns_hosts(domain: &str, hosts: &[NetworkHost]) -> String {
    let mut text = String::new();
    for host in hosts.iter().filter(|h| !h.hostname.is_empty()) {
        if let Some(address) = host.ipv4 {
            let _ = writeln!(text, "{address} {name}.{domain} {name}", name = host.hostname);
        }
    }
    text
}

/// Does `resolv.conf` name a server that is not `own`?
pub(crate) fn has_upstream(resolv_conf: &str, own: Option<Ipv4Addr>) -> bool {
    nameservers(resolv_conf).any(|s| own.is_none_or(|o| s != std::net::IpAddr::V4(o)))
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
    use karst_model::network::BridgeSpec;

    fn record(n: u128, bridge: &str, ipv4: Option<&str>) -> Record {
        Record {
            id: uuid::Uuid::from_u128(n).into(),
            bridge: bridge.into(),
            spec: BridgeSpec {
                ipv4: ipv4.map(|s| s.parse().unwrap()),
                nat: true,
                dhcp: true,
                dhcp_range: None,
                domain: "karst".into(),
                mtu: None,
            },
            removing: false,
        }
    }

    fn host(mac: &str, hostname: &str, ipv4: Option<&str>) -> NetworkHost {
        NetworkHost { mac: mac.into(), hostname: hostname.into(), ipv4: ipv4.map(|s| s.parse().unwrap()) }
    }

    #[test]
    fn nft() {
        let mut routed = record(2, "routed0", Some("10.9.0.1/16"));
        routed.spec.nat = false;
        insta::assert_snapshot!(nft_table(
            "ab12cd",
            &[record(1, "karstbr0", Some("10.1.2.1/24")), routed, record(3, "plain0", None)]
        ), @r#"
        add table inet karst_ab12cd
        delete table inet karst_ab12cd
        table inet karst_ab12cd {
        	chain postrouting {
        		type nat hook postrouting priority srcnat; policy accept;
        		ip saddr 10.1.2.0/24 ip daddr != 10.1.2.0/24 oifname != "karstbr0" masquerade comment "karst:ab12cd:00000000-0000-0000-0000-000000000001"
        	}
        }
        "#);
        insta::assert_snapshot!(nft_table("ab12cd", &[]), @r"
        add table inet karst_ab12cd
        delete table inet karst_ab12cd
        ");
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
        insta::assert_snapshot!(dnsmasq(&r, &context).unwrap(), @r"
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
        dhcp-range=10.1.2.2,10.1.2.254,255.255.255.0,1h
        dhcp-lease-max=253
        dhcp-leasefile=/var/lib/karst/host/networks/00000000-0000-0000-0000-000000000001/dnsmasq.leases
        dhcp-hostsfile=/var/lib/karst/host/networks/00000000-0000-0000-0000-000000000001/dhcp-hosts
        dhcp-authoritative
        dhcp-rapid-commit
        dhcp-no-override
        dhcp-ignore-names
        dhcp-ignore-clid
        no-ping
        quiet-dhcp
        dhcp-option=26,9000
        ");
        r.spec.dhcp = false;
        let text = dnsmasq(&r, &DnsmasqContext { upstream: true, ..context.clone() }).unwrap();
        assert!(!text.contains("dhcp") && !text.contains("no-resolv"), "{text}");
        r.spec.ipv4 = None;
        assert!(dnsmasq(&r, &context).is_none());
    }

    #[test]
    fn hosts_are_checked_and_written() {
        let net = Some("10.1.2.1/24".parse().unwrap());
        let hosts = check_hosts(
            net,
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
            assert!(check_hosts(net, std::slice::from_ref(&bad)).is_err(), "{bad:?}");
        }
        let twice = [host("02:00:00:00:00:02", "a", None), host("02:00:00:00:00:02", "b", None)];
        assert!(check_hosts(net, &twice).unwrap_err().is(karst_model::ErrorKind::Conflict));
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
