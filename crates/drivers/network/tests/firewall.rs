//! Rules against real packets: IPv6, filters against forged senders, ACLs, forwards, and a comparison of what
//! `karst_model::firewall::evaluate` says with what arrives. In network namespaces of the test's own, as `real.rs`.
#![allow(clippy::disallowed_methods)] // tests live in the real world

#[path = "../../../testkit/src/backends.rs"]
mod backends;

mod lab;

use karst_model::{
    NetworkId, ProjectId,
    firewall::{
        AclRule, AclSpec, Action, AddressSetSpec, DefaultAction, Direction, ForwardSpec, ForwardTarget,
        Policy,
        evaluate::{self, End, Packet, Payload},
    },
    network::BridgeSpec,
    spec::{NetworkHost, NetworkSpec, PortSpec},
};
use lab::{
    Lab, MACS, eventually, lab,
    probe::{self, Kind, Probe, Seen},
    run, try_run,
};
use std::{
    collections::BTreeMap,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    time::{Duration, Instant},
};

const MAC_C: &str = "02:aa:00:00:00:03";

fn host(n: u8, mac: &str, ipv4: &str) -> NetworkHost {
    NetworkHost {
        mac: mac.into(),
        hostname: format!("g{n}"),
        ipv4: Some(ipv4.parse().unwrap()),
        port: Some(PortSpec { interface: format!("v{}", (b'a' + n) as char), ..Default::default() }),
        ..Default::default()
    }
}

fn network(n: u128, bridge: &str, hosts: Vec<NetworkHost>) -> NetworkSpec {
    NetworkSpec {
        id: NetworkId(uuid::Uuid::from_u128(n)),
        bridge: bridge.into(),
        spec: BridgeSpec {
            ipv4: Some(format!("10.77.{n}.1/24").parse().unwrap()),
            ipv6: Some(format!("fd42:77:0:{n}::1/64").parse().unwrap()),
            nat: true,
            nat6: true,
            ..Default::default()
        },
        hosts,
        acls: vec![],
        sets: vec![],
        forwards: vec![],
        owner: None,
    }
}

fn acl(n: u128, name: &str, ingress: &[&[(&str, &str)]], egress: &[&[(&str, &str)]]) -> AclSpec {
    let parse = |direction: Direction, rules: &[&[(&str, &str)]]| {
        let rules = rules.iter().enumerate().filter_map(|(i, pairs)| {
            let map: serde_json::Map<_, _> =
                pairs.iter().map(|(k, v)| ((*k).to_owned(), (*v).into())).collect();
            let rule: AclRule = serde_json::from_value(map.into()).unwrap();
            rule.parse(direction, i).unwrap()
        });
        rules.collect()
    };
    AclSpec {
        id: uuid::Uuid::from_u128(n).into(),
        name: name.into(),
        ingress: parse(Direction::Ingress, ingress),
        egress: parse(Direction::Egress, egress),
    }
}

fn policy(acls: &[&str], ingress: Action, egress: Action) -> Option<Policy> {
    let default = |action| DefaultAction { action, logged: false };
    let acls = acls.iter().map(|a| (*a).to_owned()).collect();
    Some(Policy { acls, ingress: default(ingress), egress: default(egress) })
}

/// Static addresses, without DHCP.
fn address(lab: &Lab, n: &str, address: &str, gateway: &str) {
    let ns = lab.ns(n);
    run(&["ip", "-n", &ns, "addr", "replace", address, "dev", "eth0"]);
    run(&["ip", "-n", &ns, "route", "replace", "default", "via", gateway]);
}

#[test]
fn guests_make_and_get_ipv6_addresses() {
    lab("guests_make_and_get_ipv6_addresses", &[], |lab| async move {
        lab.outside();
        run(&["ip", "addr", "add", "2001:db8::1/64", "dev", "up0", "nodad"]);
        run(&["ip", "-n", &lab.ns("x"), "addr", "add", "2001:db8::2/64", "dev", "eth0", "nodad"]);
        // The host has this one otherwise: that keeps nobody's network back.
        run(&["ip", "route", "add", "10.99.7.0/24", "dev", "up0"]);
        let before = lab.trace();
        let driver = lab.driver();
        let mut net =
            network(1, "ktbr0", vec![host(0, MACS[0], "10.77.1.10"), host(1, MACS[1], "10.77.1.11")]);
        net.hosts[0].routes = ["10.99.7.0/24", "10.99.8.0/24"].iter().map(|r| r.parse().unwrap()).collect();
        net.hosts[1].ipv6 = Some("fd42:77:0:1::99".parse().unwrap());
        net.spec.routes6 = vec!["fd42:99::/64".parse().unwrap()];
        net.spec.routes = vec!["10.99.0.0/16".parse().unwrap()];
        driver.ensure(&net).await.unwrap();
        // The host forwards, and hears its own router all the same; the purge below gives both back.
        assert_eq!(
            (lab.setting6("all", "forwarding"), lab.setting6("up0", "accept_ra")),
            ("1".into(), "2".into())
        );
        lab.plug("a", MACS[0], "ktbr0");
        lab.plug("b", MACS[1], "ktbr0");
        let addresses = |n: &str| run(&["ip", "-n", &lab.ns(n), "-6", "addr", "show", "dev", "eth0"]);
        eventually("SLAAC", || addresses("a").contains("fd42:77:0:1:aa:ff:fe00:1/64"));
        eventually("the gateway answers", || lab.pings("a", "fd42:77:0:1::1"));
        // The outside has no route to the guests: an answer proves the translation.
        eventually("outwards by IPv6", || lab.pings("a", "2001:db8::2"));
        let routes = run(&["ip", "-6", "route", "show", "dev", "ktbr0"]);
        assert!(routes.contains("fd42:99::/64"), "{routes}");
        let routes = run(&["ip", "route", "show", "dev", "ktbr0"]);
        assert!(routes.contains("10.99.0.0/16") && routes.contains("10.99.8.0/24"), "{routes}");
        assert!(!routes.contains("10.99.7.0/24"), "{routes}");
        address(&lab, "a", "10.77.1.10/24", "10.77.1.1");
        let name = |n: &str| {
            let out = lab.guest("a", &["busybox", "nslookup", "-type=aaaa", n, "10.77.1.1"]);
            String::from_utf8_lossy(&out.stdout).contains("fd42:77:0:1::99")
        };
        eventually("a static IPv6 address has a name", || name("g1.karst"));
        let leases = driver.leases(net.id).await.unwrap();
        let has =
            |a: &str, fixed: bool| leases.iter().any(|l| l.address.to_string() == a && l.fixed == fixed);
        assert!(has("fd42:77:0:1::99", true) && has("fd42:77:0:1:aa:ff:fe00:1", false), "{leases:?}");

        // Changed live: the guests stay in the bridge, routes go, names stay.
        let mut changed = net.clone();
        changed.spec.routes.clear();
        changed.spec.routes6.clear();
        // What the network does not give a host refuses, whoever asks for it.
        assert!(driver.ensure(&changed).await.unwrap_err().is(karst_model::ErrorKind::Invalid));
        changed.hosts[0].routes.clear();
        changed.spec.hwaddr = Some("02:12:34:56:78:9a".into());
        changed.spec.mtu = Some(1400);
        changed.spec.search = vec!["a.example".into()];
        driver.ensure(&changed).await.unwrap();
        let state = driver.state(net.id).await.unwrap();
        assert_eq!((state.mac.as_str(), state.mtu, state.ports.len()), ("02:12:34:56:78:9a", 1400, 2));
        assert!(!run(&["ip", "route", "show", "dev", "ktbr0"]).contains("10.99.0.0/16"));
        eventually("and still has its gateway", || lab.pings("a", "fd42:77:0:1::1"));
        changed.spec.dhcp6_stateful = true;
        driver.ensure(&changed).await.unwrap();
        assert!(driver.state(net.id).await.unwrap().dnsmasq.is_some(), "dnsmasq takes stateful DHCPv6");
        changed.spec.ipv6 = None;
        changed.hosts[1].ipv6 = None;
        driver.ensure(&changed).await.unwrap();
        assert!(!run(&["ip", "-6", "addr", "show", "dev", "ktbr0"]).contains("fd42"));
        for link in ["va", "vb"] {
            karst_host::link::delete(link).unwrap();
        }
        driver.purge().await.unwrap();
        assert_eq!(lab.trace(), before);
    });
}

#[test]
fn forged_senders_get_nowhere() {
    lab("forged_senders_get_nowhere", &[], |lab| async move {
        let driver = lab.driver();
        let mut net =
            network(1, "ktbr0", vec![host(0, MACS[0], "10.77.1.10"), host(1, MACS[1], "10.77.1.11")]);
        let port = net.hosts[0].port.as_mut().unwrap();
        (port.mac_filter, port.ipv4_filter, port.ipv6_filter) = (true, true, true);
        driver.ensure(&net).await.unwrap();
        lab.plug("a", MACS[0], "ktbr0");
        lab.plug("b", MACS[1], "ktbr0");
        // Its own address by DHCP: asking for it is no forgery.
        assert_eq!(lab.dhcp("a", &[]).as_deref(), Some("10.77.1.10"));
        address(&lab, "b", "10.77.1.11/24", "10.77.1.1");
        assert!(lab.reaches("a", "10.77.1.11") && lab.reaches("b", "10.77.1.10"), "honest packets pass");
        let ns = lab.ns("a");
        let forget = || drop(try_run(&["ip", "-n", &lab.ns("b"), "neigh", "flush", "all"]));
        // Another's address, by IP and by ARP.
        run(&["ip", "-n", &ns, "addr", "add", "10.77.1.77/24", "dev", "eth0"]);
        forget();
        assert!(!lab.pings("b", "10.77.1.77"), "an address that is not its own does not answer");
        assert!(
            !lab.guest("a", &["busybox", "ping", "-c1", "-W1", "-I", "10.77.1.77", "10.77.1.11"])
                .status
                .success()
        );
        run(&["ip", "-n", &ns, "addr", "del", "10.77.1.77/24", "dev", "eth0"]);
        // Another's MAC address.
        run(&["ip", "-n", &ns, "link", "set", "eth0", "address", "02:aa:00:00:00:77"]);
        forget();
        assert!(!lab.pings("a", "10.77.1.11"), "another MAC address does not pass");
        run(&["ip", "-n", &ns, "link", "set", "eth0", "address", MACS[0]]);
        assert!(lab.reaches("b", "10.77.1.1"), "the neighbour was never touched");
        eventually("honest again", || lab.pings("a", "10.77.1.11"));
        // IPv6: the address of its MAC address, and no other.
        eventually("SLAAC", || {
            run(&["ip", "-n", &ns, "-6", "addr", "show", "dev", "eth0", "-tentative"])
                .contains("fd42:77:0:1:aa:ff:fe00:1/64")
        });
        eventually("its own IPv6 address passes", || lab.pings("a", "fd42:77:0:1::1"));
        run(&["ip", "-n", &ns, "addr", "add", "fd42:77:0:1::77/64", "dev", "eth0", "nodad"]);
        assert!(
            !lab.guest("a", &["busybox", "ping6", "-c1", "-W1", "-I", "fd42:77:0:1::77", "fd42:77:0:1::1"])
                .status
                .success()
        );
        // Isolation: two isolated ports do not reach each other, and both reach the gateway. Live.
        for h in &mut net.hosts {
            h.port.as_mut().unwrap().isolated = true;
        }
        driver.ensure(&net).await.unwrap();
        assert!(!lab.pings("b", "10.77.1.10") && lab.reaches("b", "10.77.1.1"));
        for h in &mut net.hosts {
            h.port.as_mut().unwrap().isolated = false;
        }
        driver.ensure(&net).await.unwrap();
        assert!(lab.reaches("b", "10.77.1.10"));
        driver.purge().await.unwrap();
    });
}

/// The pings of `a` are logged by the rule that lets them pass, also after its table was emptied, and a flood is not.
async fn what_is_logged(lab: &Lab, driver: &karst_network::NetworkDriver) {
    let acl = karst_model::AclId(uuid::Uuid::from_u128(9));
    let lines = async || match driver.acl_log(acl, 1 << 20).await {
        Ok(log) => Some(String::from_utf8(log).unwrap()),
        Err(e) if e.is(karst_model::ErrorKind::Unsupported) => None,
        Err(e) => panic!("{e}"),
    };
    // Since its first packet, so before the table was emptied.
    if lines().await.is_none() {
        backends::missing("the kernel's nfnetlink_log");
        return;
    }
    let until = async |what: &str, done: &dyn Fn(&str) -> bool| {
        for _ in 0..100 {
            let log = lines().await.unwrap();
            if done(&log) {
                return log;
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        panic!("{what}: {:?}", lines().await);
    };
    let log = until("what passed before is logged", &|log| log.contains("\"dst\":\"10.77.1.11\"")).await;
    let first: serde_json::Value = serde_json::from_str(log.lines().next().unwrap()).unwrap();
    for (key, value) in [
        ("proto", "icmp"),
        ("src", "10.77.1.10"),
        ("icmp_type", "8"),
        ("action", "allow"),
        ("direction", "egress"),
    ] {
        assert_eq!(first[key], value, "{first}");
    }
    driver.acl_log_remove(acl).await.unwrap();
    // Once more, by the rules that were repaired; and the kernel limits what a guest can have written.
    lab.guest("a", &["busybox", "ping", "-q", "-c", "300", "-i", "0.005", "-W", "1", "10.77.1.11"]);
    let log = until("what passes after the repair is logged", &|log| !log.is_empty()).await;
    tokio::time::sleep(Duration::from_millis(500)).await;
    let count = log.lines().count().max(lines().await.unwrap().lines().count());
    assert!((1..=200).contains(&count), "{count} of 300 packets are logged");
}

#[test]
fn answers_come_back_and_tampering_is_repaired() {
    lab("answers_come_back_and_tampering_is_repaired", &[], |lab| async move {
        // With br_netfilter a forward back into its own bridge is bridged, which a port does not do to itself.
        karst_host::sysctl::set(&["net", "bridge", "bridge-nf-call-iptables"], "0").unwrap();
        lab.outside();
        run(&["ip", "addr", "add", "192.0.2.100/32", "dev", "up0"]);
        let driver = lab.driver();
        driver.adopt().await.unwrap();
        let mut net =
            network(1, "ktbr0", vec![host(0, MACS[0], "10.77.1.10"), host(1, MACS[1], "10.77.1.11")]);
        net.acls = vec![acl(
            9,
            "out",
            &[],
            &[
                &[("action", "allow"), ("protocol", "icmp4"), ("state", "logged")],
                &[("action", "allow"), ("protocol", "tcp"), ("destination_port", "7777")],
            ],
        )];
        net.hosts[0].port.as_mut().unwrap().policy = policy(&["out"], Action::Drop, Action::Drop);
        net.forwards = vec![ForwardSpec {
            listen: "192.0.2.100".parse().unwrap(),
            default_target: None,
            targets: vec![ForwardTarget {
                tcp: true,
                listen: (80, 80),
                address: "10.77.1.11".parse().unwrap(),
                port: Some(7777),
                single: true,
                snat: false,
            }],
        }];
        driver.ensure(&net).await.unwrap();
        lab.plug("a", MACS[0], "ktbr0");
        lab.plug("b", MACS[1], "ktbr0");
        assert_eq!(lab.dhcp("a", &[]).as_deref(), Some("10.77.1.10"), "DHCP passes every ACL");
        address(&lab, "b", "10.77.1.11/24", "10.77.1.1");
        assert!(lab.lookup("a", "g1.karst", "10.77.1.1").is_some(), "and so does DNS");
        assert!(lab.reaches("a", "10.77.1.11"), "what it sends is answered");
        assert!(lab.reaches("a", "192.0.2.2"), "also from outside");
        assert!(!lab.pings("b", "10.77.1.10"), "and nobody else comes in");
        let ns = lab.ns("b");
        let served = |from: &str, to: &str, port: &str| {
            let mut server = std::process::Command::new("ip")
                .args(["netns", "exec", &ns, "busybox", "nc", "-l", "-p", "7777", "-e", "echo", "hello"])
                .spawn()
                .unwrap();
            let listens =
                || run(&["ip", "netns", "exec", &ns, "busybox", "netstat", "-ltn"]).contains(":7777");
            eventually("the server listens", listens);
            let out = lab.guest(from, &["busybox", "timeout", "60", "busybox", "nc", "-w", "30", to, port]);
            let _ = server.kill();
            let _ = server.wait();
            String::from_utf8_lossy(&out.stdout).contains("hello")
        };
        assert!(served("a", "10.77.1.11", "7777"), "a TCP connection that the ACL allows");
        assert!(served("x", "192.0.2.100", "80"), "a forward leads in from outside");
        assert!(served("b", "192.0.2.100", "80"), "and from its own network");

        // Somebody empties both tables: what was forbidden is forbidden again soon.
        for family in ["inet", "bridge"] {
            run(&["nft", "flush", "table", family, "karst_ab12cd"]);
        }
        eventually("the ACL is back", || !lab.pings("b", "10.77.1.10"));
        what_is_logged(&lab, &driver).await;
        eventually("the translation is back", || lab.pings("a", "192.0.2.2"));
        // Rates, live: a burst fits, the rest of a flood does not.
        net.hosts[1].port.as_mut().unwrap().egress_limit = Some(8000);
        driver.ensure(&net).await.unwrap();
        let flood =
            lab.guest("b", &["busybox", "ping", "-q", "-c", "200", "-i", "0.01", "-s", "1400", "10.77.1.1"]);
        let text = String::from_utf8_lossy(&flood.stdout).into_owned();
        let lost: u32 =
            text.split("% packet loss").next().unwrap().rsplit(' ').next().unwrap().parse().unwrap();
        assert!((30..=99).contains(&lost), "{text}");
        driver.purge().await.unwrap();
        assert!(run(&["nft", "list", "ruleset"]).is_empty());
    });
}

/// Numbers that look random and are the same each time.
struct Dice(u64);

impl Dice {
    fn roll(&mut self, n: usize) -> usize {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        ((self.0 >> 33) as usize) % n
    }
    fn pick<'a, T: ?Sized>(&mut self, list: &[&'a T]) -> &'a T {
        list[self.roll(list.len())]
    }
}

const PORTS: [u16; 4] = [53, 80, 443, 8000];

fn random_rule(dice: &mut Dice, direction: Direction, acls: &[&str]) -> AclRule {
    let plain = [
        "",
        "",
        "10.77.1.10",
        "10.77.1.0/24",
        "10.77.2.0-10.77.2.20",
        "192.0.2.2",
        "192.0.2.0/24,10.77.1.11",
        "$set",
        "fd42:77:0:1::10",
        "fd42:77:0:2::/64",
        "2001:db8::/32,192.0.2.2",
    ];
    let mut selectors = vec!["@internal", "@external", "10.77.1.11,@external"];
    selectors.extend(plain);
    selectors.extend(acls);
    let (source, destination) = match direction {
        Direction::Ingress => (dice.pick(&selectors), dice.pick(&plain)),
        Direction::Egress => (dice.pick(&plain), dice.pick(&selectors)),
    };
    let protocol = dice.pick(&["", "udp", "udp", "tcp", "tcp", "icmp4", "icmp6"]);
    let has_ports = matches!(protocol, "udp" | "tcp");
    let ports = if has_ports { dice.pick(&["", "80", "443,53", "80-500", "8000,80-90"]) } else { "" };
    // That of echo requests, mostly.
    let (icmp_type, icmp_code) = match protocol {
        "icmp4" => (dice.pick(&["", "8", "8", "13"]), dice.pick(&["", "0", "1"])),
        "icmp6" => (dice.pick(&["", "128", "128", "129"]), dice.pick(&["", "0", "1"])),
        _ => ("", ""),
    };
    let icmp_code = if icmp_type.is_empty() { "" } else { icmp_code };
    AclRule {
        action: dice.pick(&["allow", "allow", "allow-stateless", "drop", "reject"]).to_owned(),
        source: source.to_owned(),
        destination: destination.to_owned(),
        protocol: protocol.to_owned(),
        destination_port: ports.to_owned(),
        source_port: if has_ports {
            dice.pick(&["", "", "", "20000-29999"]).to_owned()
        } else {
            String::new()
        },
        icmp_type: icmp_type.to_owned(),
        icmp_code: icmp_code.to_owned(),
        state: dice.pick(&["enabled", "enabled", "enabled", "disabled", "logged"]).to_owned(),
        ..Default::default()
    }
}

fn random_policy(dice: &mut Dice, acls: &[&str]) -> Option<Policy> {
    let chosen: Vec<&str> = acls.iter().copied().filter(|_| dice.roll(2) == 0).collect();
    let actions = [&Action::Allow, &Action::Allow, &Action::Drop, &Action::Reject];
    let (ingress, egress) = (*dice.pick(&actions), *dice.pick(&actions));
    if chosen.is_empty() { None } else { policy(&chosen, ingress, egress) }
}

/// The name and both addresses of who sends and receives.
const PLACES: [(&str, &str, &str); 5] = [
    ("a", "10.77.1.10", "fd42:77:0:1::10"),
    ("b", "10.77.1.11", "fd42:77:0:1::11"),
    ("c", "10.77.2.10", "fd42:77:0:2::10"),
    ("x", "192.0.2.2", "2001:db8::2"),
    ("h", "10.77.1.1", "fd42:77:0:1::1"),
];
/// Where forwards listen.
const LISTEN: [&str; 2] = ["192.0.2.100", "2001:db8::100"];

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

/// What is sent from one address to another: of all ports something, of each protocol something.
fn payloads(dice: &mut Dice, from: u16, v4: bool) -> Vec<(Kind, u16, Payload)> {
    let some: &[&u16] = &[&53, &80, &443, &8000];
    // The most of what there is most of.
    let udp = if v4 { PORTS.to_vec() } else { vec![*dice.pick(some)] };
    let tcp = if v4 { vec![*dice.pick(some), *dice.pick(some)] } else { vec![*dice.pick(some)] };
    let icmp = if v4 { Payload::Icmp(8, 0) } else { Payload::Icmp(128, 0) };
    let udp = udp.into_iter().map(|port| (Kind::Udp, port));
    let all = udp.chain(tcp.into_iter().map(|port| (Kind::Tcp, port)));
    let all = all.enumerate().map(|(n, (kind, port))| match kind {
        Kind::Tcp => (kind, port, Payload::Tcp(from + n as u16, port)),
        _ => (kind, port, Payload::Udp(from + n as u16, port)),
    });
    all.chain([(Kind::Icmp, 0, icmp)]).collect()
}

/// Random rules, and for each packet of a random lot, of TCP, UDP and ICMP and of both versions of IP: it arrives exactly where the
/// explanation says. `KARST_SEEDS=6` does it with as many seeds instead of one, and with no more than those: each packet has a
/// number of its own, so that what the kernel remembers of one says nothing of another.
#[test]
fn explanations_are_what_happens() {
    lab("explanations_are_what_happens", &[], |lab| async move {
        // With br_netfilter a forward back into its own bridge is bridged, which a port does not do to itself.
        karst_host::sysctl::set(&["net", "bridge", "bridge-nf-call-iptables"], "0").unwrap();
        karst_host::sysctl::set(&["net", "bridge", "bridge-nf-call-ip6tables"], "0").unwrap();
        lab.outside();
        let x = lab.ns("x");
        run(&["ip", "addr", "add", "2001:db8::1/64", "dev", "up0", "nodad"]);
        run(&["ip", "-n", &x, "addr", "add", "2001:db8::2/64", "dev", "eth0", "nodad"]);
        run(&["ip", "addr", "add", "192.0.2.100/32", "dev", "up0"]);
        run(&["ip", "addr", "add", "2001:db8::100/128", "dev", "up0", "nodad"]);
        run(&["ip", "-n", &x, "route", "add", "10.77.0.0/16", "via", "192.0.2.1"]);
        run(&["ip", "-n", &x, "-6", "route", "add", "fd42:77::/32", "via", "2001:db8::1"]);
        let driver = lab.driver();
        let mut one =
            network(1, "ktbr0", vec![host(0, MACS[0], "10.77.1.10"), host(1, MACS[1], "10.77.1.11")]);
        let mut two = network(2, "ktbr1", vec![host(2, MAC_C, "10.77.2.10")]);
        let guests = [("a", MACS[0], "ktbr0", 1), ("b", MACS[1], "ktbr0", 1), ("c", MAC_C, "ktbr1", 2)];
        let hosts = one.hosts.iter_mut().chain(&mut two.hosts);
        for (host, (_, _, own6)) in hosts.zip(PLACES) {
            host.ipv6 = Some(own6.parse().unwrap());
        }
        driver.ensure(&one).await.unwrap();
        driver.ensure(&two).await.unwrap();
        for ((n, mac, bridge, net), (_, own, own6)) in guests.into_iter().zip(PLACES) {
            let ns = lab.ns(n);
            // Its addresses and its route are those that are given here, and no others.
            let key = "net.ipv6.conf.default.accept_ra=0";
            run(&["ip", "netns", "exec", &ns, "busybox", "sysctl", "-qw", key]);
            lab.plug(n, mac, bridge);
            address(&lab, n, &format!("{own}/24"), &format!("10.77.{net}.1"));
            run(&["ip", "-n", &ns, "-6", "addr", "add", &format!("{own6}/64"), "dev", "eth0", "nodad"]);
            let gateway = format!("fd42:77:0:{net}::1");
            run(&["ip", "-n", &ns, "-6", "route", "replace", "default", "via", &gateway, "dev", "eth0"]);
        }
        for (bridge, net) in [("ktbr0", 1), ("ktbr1", 2)] {
            let settled = || run(&["ip", "-6", "addr", "show", "dev", bridge, "-tentative"]);
            eventually("the bridge has its address", || {
                settled().contains(&format!("fd42:77:0:{net}::1/64"))
            });
        }
        let seen = Seen::default();
        for (n, own, own6) in PLACES {
            // Of the host what comes to this bridge's address, of the others all.
            let (any4, any6) = (Ipv4Addr::UNSPECIFIED.into(), Ipv6Addr::UNSPECIFIED.into());
            let (at4, at6) = if n == "h" { (ip(own), ip(own6)) } else { (any4, any6) };
            probe::listen(n, &lab.ns(n), at4, &seen);
            probe::listen(n, &lab.ns(n), at6, &seen);
        }
        let names = ["web", "db", "mgmt"];
        let seeds =
            std::env::var("KARST_SEEDS").ok().and_then(|s| s.parse().ok()).unwrap_or(1u64).clamp(1, 6);
        let mut dice = Dice(0);
        let mut number = 0u32;
        // Of each kind and version how many arrived, and how many did not.
        let mut both: BTreeMap<(Kind, bool), [usize; 2]> = BTreeMap::new();
        for (seed, round) in (0..seeds).flat_map(|seed| (0..24u128).map(move |round| (seed, round))) {
            if round == 0 {
                dice = Dice(20_260_101 + 7919 * seed);
            }
            let acls: Vec<AclSpec> = names
                .iter()
                .enumerate()
                .map(|(i, name)| {
                    let mut rules = |direction| {
                        let count = dice.roll(4);
                        let all = (0..count).map(|_| random_rule(&mut dice, direction, &names));
                        all.enumerate().filter_map(|(n, r)| r.parse(direction, n).unwrap_or(None)).collect()
                    };
                    AclSpec {
                        id: uuid::Uuid::from_u128(100 + i as u128).into(),
                        name: (*name).into(),
                        ingress: rules(Direction::Ingress),
                        egress: rules(Direction::Egress),
                    }
                })
                .collect();
            let set = dice.pick(&["10.77.2.10", "192.0.2.0/25", "10.77.1.11-10.77.1.200"]);
            let set6 = dice.pick(&["fd42:77:0:2::10", "2001:db8::/120", "fd42:77:0:1::11"]);
            let sets = vec![AddressSetSpec {
                id: uuid::Uuid::from_u128(7).into(),
                name: "set".into(),
                ranges: vec![set.parse().unwrap(), set6.parse().unwrap()],
            }];
            for net in [&mut one, &mut two] {
                net.acls = acls.clone();
                net.sets = sets.clone();
                net.spec.policy = if dice.roll(3) == 0 { random_policy(&mut dice, &names) } else { None };
                net.spec.routing = dice.roll(8) != 0;
                net.spec.routing6 = dice.roll(8) != 0;
                for host in &mut net.hosts {
                    let port = host.port.as_mut().unwrap();
                    port.policy = if dice.roll(2) == 0 { random_policy(&mut dice, &names) } else { None };
                    port.isolated = dice.roll(6) == 0;
                    port.ipv4_filter = dice.roll(4) == 0;
                    port.ipv6_filter = dice.roll(4) == 0;
                    port.mac_filter = dice.roll(4) == 0;
                }
            }
            // Every third time the second is a project's own, with ACLs of its own under the same names.
            two.owner = (round % 3 == 2).then(|| ProjectId(uuid::Uuid::from_u128(9)));
            if two.owner.is_some() {
                for acl in &mut two.acls {
                    acl.id = uuid::Uuid::from_u128(1000 + acl.id.uuid().as_u128()).into();
                }
            }
            let place = dice.roll(2);
            one.forwards = [PLACES[place].1, PLACES[place].2]
                .into_iter()
                .zip(LISTEN)
                .map(|(target, listen)| {
                    let mut to = |tcp| ForwardTarget {
                        tcp,
                        listen: (80, 80),
                        address: ip(target),
                        port: (dice.roll(2) == 0).then_some(8000),
                        single: true,
                        snat: dice.roll(2) == 0,
                    };
                    let mut targets = vec![to(false), to(true)];
                    targets.truncate(1 + dice.roll(2));
                    let default_target = (dice.roll(2) == 0).then(|| ip(target));
                    ForwardSpec { listen: ip(listen), default_target, targets }
                })
                .collect();
            driver.ensure(&one).await.unwrap();
            driver.ensure(&two).await.unwrap();
            let networks = [one.clone(), two.clone()];
            let ends = [End::Guest(0, 0), End::Guest(0, 1), End::Guest(1, 0), End::Outside];
            let mut expected: BTreeMap<u32, Option<(String, u16)>> = BTreeMap::new();
            let mut stories = BTreeMap::new();
            let senders = PLACES.iter().zip(ends).flat_map(|((name, own, own6), end)| {
                [(*name, ip(own), end, true), (*name, ip(own6), end, false)]
            });
            for (name, source, end, v4) in senders {
                let mut lot = vec![];
                let places = PLACES.iter().map(|(_, own, own6)| ip(if v4 { own } else { own6 }));
                let listens = ip(if v4 { LISTEN[0] } else { LISTEN[1] });
                for destination in places.chain([listens]).filter(|d| *d != source) {
                    let next =
                        Probe { number: number + 1, kind: Kind::Udp, to: SocketAddr::new(destination, 0) };
                    for (kind, port, payload) in payloads(&mut dice, next.port(), v4) {
                        number += 1;
                        lot.push(Probe { number, kind, to: SocketAddr::new(destination, port) });
                        let packet = Packet { source, destination, payload };
                        let story = evaluate::explain(&networks, end, packet);
                        let here = |(_, own, own6): &&(&str, &str, &str)| {
                            [ip(own), ip(own6)].contains(&story.destination)
                        };
                        let arrives = PLACES.iter().find(here).filter(|_| story.passes);
                        let arrives = arrives.map(|(at, ..)| ((*at).to_owned(), story.port.unwrap_or(0)));
                        both.entry((kind, v4)).or_default()[usize::from(arrives.is_none())] += 1;
                        expected.insert(number, arrives);
                        stories.insert(number, (packet, story));
                    }
                }
                probe::send(lab.ns(name), source, lot);
            }
            let deadline = Instant::now() + Duration::from_secs(30);
            let all_there = || {
                let seen = seen.lock().unwrap();
                expected.iter().all(|(n, e)| e.is_none() || seen.get(n) == e.as_ref())
            };
            while !all_there() && Instant::now() < deadline {
                std::thread::sleep(Duration::from_millis(5));
            }
            // What should not arrive has had the time of all that should, and a little more.
            std::thread::sleep(Duration::from_millis(30));
            let seen = seen.lock().unwrap();
            for (n, e) in &expected {
                let (packet, story) = &stories[n];
                assert_eq!(
                    seen.get(n),
                    e.as_ref(),
                    "seed {seed}, round {round}, packet {n}: {packet:?}\n{story:#?}\n{}\n{}",
                    serde_json::to_string(&networks).unwrap(),
                    run(&["nft", "list", "ruleset"])
                );
            }
        }
        println!("{number} packets of {seeds} seeds; arrived and not, by kind and whether of IPv4: {both:?}");
        assert!(both.len() == 6 && both.values().flatten().all(|n| *n > 20), "both happen: {both:?}");
        driver.purge().await.unwrap();
    });
}

/// Bridges of different projects on one host: nothing passes between them, and everything else does.
#[test]
fn networks_of_projects_are_apart() {
    lab("networks_of_projects_are_apart", &[], |lab| async move {
        lab.outside();
        let before = lab.trace();
        let driver = lab.driver();
        let mut one = network(1, "ktbr0", vec![host(0, MACS[0], "10.77.1.10")]);
        let mut two = network(2, "ktbr1", vec![host(1, MACS[1], "10.77.2.10")]);
        driver.ensure(&one).await.unwrap();
        driver.ensure(&two).await.unwrap();
        lab.plug("a", MACS[0], "ktbr0");
        lab.plug("b", MACS[1], "ktbr1");
        address(&lab, "a", "10.77.1.10/24", "10.77.1.1");
        address(&lab, "b", "10.77.2.10/24", "10.77.2.1");
        eventually("the host forwards between bridges that projects share", || lab.pings("a", "10.77.2.10"));
        eventually("and answers at each", || lab.pings("a", "10.77.2.1"));
        let project = |n: u128| Some(ProjectId(uuid::Uuid::from_u128(n)));
        for (first, second) in [(project(1), None), (None, project(1)), (project(1), project(2))] {
            (one.owner, two.owner) = (first, second);
            driver.ensure(&one).await.unwrap();
            driver.ensure(&two).await.unwrap();
            let story = format!("{first:?} {second:?}");
            assert!(!lab.pings("a", "10.77.2.10") && !lab.pings("b", "10.77.1.10"), "{story}");
            assert!(!lab.pings("a", "10.77.2.1") && !lab.pings("b", "10.77.1.1"), "{story}");
            assert!(lab.pings("a", "10.77.1.1") && lab.pings("b", "10.77.2.1"), "its own host: {story}");
            assert!(lab.pings("a", "192.0.2.2") && lab.pings("b", "192.0.2.2"), "and outwards: {story}");
        }
        // Two of one project.
        two.owner = one.owner;
        driver.ensure(&two).await.unwrap();
        assert!(lab.pings("a", "10.77.2.10") && lab.pings("b", "10.77.1.1"));
        for link in ["va", "vb"] {
            karst_host::link::delete(link).unwrap();
        }
        driver.purge().await.unwrap();
        assert_eq!(lab.trace(), before);
    });
}

/// How long a change takes with a thousand ports of twenty rules each: told, not judged.
#[test]
fn many_ports() {
    lab("many_ports", &[], |lab| async move {
        let driver = lab.driver();
        let count: u32 = std::env::var("KARST_NETWORK_TEST_PORTS").map_or(100, |n| n.parse().unwrap());
        let mut net = network(1, "ktbr0", vec![]);
        net.spec.ipv4 = Some("10.77.0.1/16".parse().unwrap());
        let twenty = |n: u32, port: u32| {
            let rules: Vec<AclRule> = (0..20)
                .map(|i| AclRule {
                    action: "allow".into(),
                    source: format!("10.{}.{i}.0/24", n % 250),
                    protocol: "tcp".into(),
                    destination_port: (port + i).to_string(),
                    ..Default::default()
                })
                .collect();
            AclSpec {
                id: uuid::Uuid::from_u128(n.into()).into(),
                name: format!("acl{n}"),
                ingress: rules
                    .iter()
                    .enumerate()
                    .map(|(i, r)| r.parse(Direction::Ingress, i).unwrap().unwrap())
                    .collect(),
                egress: vec![],
            }
        };
        for n in 0..count {
            net.acls.push(twenty(n, 1000));
            net.hosts.push(NetworkHost {
                mac: format!("02:bb:00:00:{:02x}:{:02x}", n / 256, n % 256),
                hostname: format!("g{n}"),
                ipv4: Some(Ipv4Addr::new(10, 77, (n / 250) as u8, (n % 250) as u8 + 2)),
                port: Some(PortSpec {
                    interface: format!("kab12cd{n:x}"),
                    mac_filter: true,
                    ipv4_filter: true,
                    policy: policy(&[&format!("acl{n}")], Action::Drop, Action::Allow),
                    ..Default::default()
                }),
                ..Default::default()
            });
        }
        let timed = async |what: &str, net: &NetworkSpec| {
            let started = Instant::now();
            driver.ensure(net).await.unwrap();
            println!("{what}: {:?} with {count} ports of 20 rules", started.elapsed());
        };
        timed("all at once", &net).await;
        timed("nothing", &net).await;
        let middle = count as usize / 2;
        net.acls[middle] = twenty(middle as u32, 5000);
        timed("one ACL", &net).await;
        let rules = run(&["nft", "list", "table", "bridge", "karst_ab12cd"]);
        assert!(rules.contains("tcp dport 5000 ") && rules.contains(&format!("kab12cd{:x}", count - 1)));
        net.hosts.remove(3);
        net.acls.remove(3);
        timed("one port less", &net).await;
        assert!(!run(&["nft", "list", "table", "bridge", "karst_ab12cd"]).contains("02:bb:00:00:00:03"));
        // The same from the beginning is the same.
        let grown = run(&["nft", "-s", "list", "table", "bridge", "karst_ab12cd"]);
        run(&["nft", "delete", "table", "bridge", "karst_ab12cd"]);
        timed("all again, after somebody deleted it", &net).await;
        let sorted = |text: &str| {
            let mut lines: Vec<String> = text.lines().map(str::to_owned).collect();
            lines.sort();
            lines
        };
        assert_eq!(sorted(&run(&["nft", "-s", "list", "table", "bridge", "karst_ab12cd"])), sorted(&grown));
        driver.purge().await.unwrap();
    });
}
