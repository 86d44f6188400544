//! The driver on a real kernel: in a network namespace of the test's own that plays the host, with further ones as guests
//! and as the outside. Needs root, ip, nft, dnsmasq, busybox (udhcpc, nslookup), and iptables for the cases of Docker and ufw.
//!
//! Each test runs itself again inside the namespace (`ip netns exec`), so everything the driver does stays in there.
#![allow(clippy::disallowed_methods)] // tests live in the real world

#[path = "../../../testkit/src/backends.rs"]
mod backends;

mod lab;

use karst_model::{
    NetworkId,
    network::BridgeSpec,
    spec::{NameView, NetworkHost, NetworkSpec, PortSpec},
};
use karst_network::NetworkDriver;
use lab::{Lab, MACS, eventually, lab, run, try_run};
use std::{
    path::PathBuf,
    process::{Command, Stdio},
    time::{Duration, Instant},
};

fn host(mac: &str, name: &str, ipv4: Option<&str>) -> NetworkHost {
    NetworkHost {
        mac: mac.into(),
        hostname: name.into(),
        ipv4: ipv4.map(|a| a.parse().unwrap()),
        ..Default::default()
    }
}

fn network(n: u128, bridge: &str, ipv4: &str, hosts: Vec<NetworkHost>) -> NetworkSpec {
    NetworkSpec {
        id: NetworkId(uuid::Uuid::from_u128(n)),
        bridge: bridge.into(),
        spec: BridgeSpec { ipv4: Some(ipv4.parse().unwrap()), nat: true, ..Default::default() },
        hosts,
        acls: vec![],
        sets: vec![],
        forwards: vec![],
        owner: None,
    }
}

fn kill9(pid: i32) {
    run(&["kill", "-9", &pid.to_string()]);
}

#[test]
fn names_resolve_within_a_project_and_not_beyond() {
    lab("names_resolve_within_a_project_and_not_beyond", &[], |lab| async move {
        let (driver, before, own) = (lab.driver(), lab.trace(), "10.77.1.1");
        let of = |mac: &str, name: &str, n: &str, project: u128| NetworkHost {
            port: Some(PortSpec { interface: format!("v{n}"), ..Default::default() }),
            view: Some(NameView { project: uuid::Uuid::from_u128(project).into(), port: 0 }),
            ..host(mac, name, None)
        };
        let hosts = vec![of(MACS[0], "web", "a", 7), of(MACS[1], "db", "b", 8)];
        let mut net = network(1, "ktbr0", "10.77.1.1/24", hosts);
        driver.ensure(&net).await.unwrap();
        lab.plug("a", MACS[0], "ktbr0");
        lab.plug("b", MACS[1], "ktbr0");
        lab.plug("x", "02:aa:00:00:00:0d", "ktbr0");
        let web = lab.dhcp("a", &["-x", "hostname:db"]).expect("web gets a lease");
        let db = lab.dhcp("b", &[]).expect("db gets a lease");
        lab.dhcp("x", &["-x", "hostname:web"]).expect("a guest of the network's own project gets one");
        let asks = |n: &str, name: &str| lab.lookup(n, name, own);
        assert_eq!(asks("a", "web.karst").as_deref(), Some(&*web));
        assert_eq!(asks("b", "db").as_deref(), Some(&*db));
        for (guest, name) in [("a", "db"), ("b", "web"), ("b", "web.karst"), ("x", "web"), ("x", "db.karst")]
        {
            assert_eq!(asks(guest, name), None, "{guest} learns of {name}");
        }
        let reverse = lab.guest("b", &["busybox", "nslookup", &web, own]);
        assert!(!String::from_utf8_lossy(&reverse.stdout).contains("web"), "{reverse:?}");
        let leases = driver.leases(net.id).await.unwrap();
        assert!(leases.iter().any(|l| l.hostname == "web" && l.address.to_string() == web), "{leases:?}");

        // The ports of views answer what was led there, and the host.
        for port in [30053, 30054] {
            std::net::TcpStream::connect((own, port)).expect("the view is there");
            let port = port.to_string();
            for guest in ["a", "b", "x"] {
                let direct = lab.guest(guest, &["busybox", "nc", "-w", "1", own, &port, "-e", "/bin/true"]);
                assert!(!direct.status.success(), "{guest} reaches a view by its port");
            }
        }

        // One that ends comes back; a guest that joins is known at once; a view nobody needs goes.
        let views = |n: usize| lab.dnsmasqs().len() == n + 1;
        let first = driver.state(net.id).await.unwrap().dnsmasq.unwrap();
        lab.dnsmasqs().into_iter().filter(|p| *p != first).for_each(kill9);
        eventually("the views are back", || views(2) && asks("a", "web").is_some());
        net.hosts.push(of("02:aa:00:00:00:0e", "cache", "q", 7));
        driver.ensure(&net).await.unwrap();
        eventually("a new name", || asks("a", "cache").is_some());
        assert_eq!(asks("b", "cache"), None);
        net.hosts.retain(|h| h.hostname != "db");
        driver.ensure(&net).await.unwrap();
        eventually("a view that nobody needs goes", || views(1));
        // Another process finds them.
        drop(driver);
        let driver = lab.driver();
        driver.adopt().await.unwrap();
        assert!(views(1) && asks("a", "web").is_some());
        assert_eq!(driver.strays().await.unwrap(), Vec::<String>::new());
        driver.purge().await.unwrap();
        for n in ["va", "vb", "vx"] {
            karst_host::link::delete(n).unwrap();
        }
        assert_eq!(lab.trace(), before);
    });
}

#[test]
fn guests_get_addresses_and_names_and_reach_the_outside() {
    lab("guests_get_addresses_and_names_and_reach_the_outside", &[], |lab| async move {
        lab.outside();
        assert_eq!(karst_host::sysctl::get(&["net", "ipv4", "ip_forward"]).unwrap().as_deref(), Some("0"));
        let before = lab.trace();
        let driver = lab.driver();
        let net = network(1, "ktbr0", "10.77.1.1/24", vec![host(MACS[0], "c1", None)]);
        driver.ensure(&net).await.unwrap();
        lab.plug("a", MACS[0], "ktbr0");
        lab.plug("b", MACS[1], "ktbr0");

        // c1 sends no host name; the other, unknown, says it is c1.
        let c1 = lab.dhcp("a", &[]).expect("c1 gets a lease");
        let spoof =
            lab.dhcp("b", &["-x", "hostname:c1", "-F", "c1"]).expect("an unknown guest gets an address");
        assert_ne!(c1, spoof);
        for name in ["c1", "c1.karst"] {
            assert_eq!(lab.lookup("b", name, "10.77.1.1").as_deref(), Some(&*c1), "{name}");
        }
        let options = std::fs::read_to_string(lab.dir.join("lease-a.opts")).unwrap();
        assert_eq!(options.trim(), "karst 10.77.1.1");

        // It becomes known, live, with the lease it has: no restart.
        let pid = driver.state(net.id).await.unwrap().dnsmasq.unwrap();
        let both = [host(MACS[0], "c1", None), host(MACS[1], "v1", None)];
        driver.set_hosts(net.id, &both).await.unwrap();
        eventually("v1 has its name", || lab.lookup("a", "v1", "10.77.1.1").as_deref() == Some(&*spoof));
        assert_eq!(driver.state(net.id).await.unwrap().dnsmasq, Some(pid));
        assert!(lab.reaches("a", &spoof) && lab.reaches("b", &c1), "guests reach each other");

        // Outwards: the outside has no route to 10.77.1.0/24, so an answer proves the translation; it also sees who asked.
        assert!(lab.reaches("a", "192.0.2.2"), "a guest reaches the outside");
        let (listening, ready) = std::sync::mpsc::channel();
        let (heard, from) = std::sync::mpsc::channel();
        let ns = lab.ns("x");
        std::thread::spawn(move || {
            // This thread alone moves into the outside's namespace.
            let ns = std::fs::File::open(format!("/run/netns/{ns}")).unwrap();
            rustix::thread::move_into_link_name_space(
                std::os::fd::AsFd::as_fd(&ns),
                Some(rustix::thread::LinkNameSpaceType::Network),
            )
            .unwrap();
            let listener = std::net::TcpListener::bind("192.0.2.2:7777").unwrap();
            listening.send(()).unwrap();
            heard.send(listener.accept().unwrap().1.ip().to_string()).unwrap();
        });
        ready.recv_timeout(Duration::from_secs(60)).expect("the outside listens");
        lab.guest("a", &["busybox", "nc", "-w", "2", "192.0.2.2", "7777"]);
        assert_eq!(
            from.recv_timeout(Duration::from_secs(60)).unwrap(),
            "192.0.2.1",
            "the outside sees the host's address, not the guest's"
        );

        // A static address, found by name before its guest ever asked; and what the driver says of all this.
        let fixed = [
            host(MACS[0], "c1", Some("10.77.1.99")),
            host(MACS[1], "v1", None),
            host("02:aa:00:00:00:09", "off", Some("10.77.1.98")),
        ];
        driver.set_hosts(net.id, &fixed).await.unwrap();
        eventually("a static name", || lab.lookup("a", "off", "10.77.1.1").as_deref() == Some("10.77.1.98"));
        assert_eq!(lab.dhcp("a", &[]).as_deref(), Some("10.77.1.99"));
        let leases = driver.leases(net.id).await.unwrap();
        let one = |name: &str| {
            leases.iter().find(|l| l.hostname == name).unwrap_or_else(|| panic!("{name}: {leases:?}"))
        };
        assert!(one("c1").fixed && one("off").fixed && !one("v1").fixed);
        let state = driver.state(net.id).await.unwrap();
        assert!(state.up && state.ports == ["va", "vb"], "{state:?}");
        assert_eq!(state.addresses, [("10.77.1.1".parse().unwrap(), 24, "global".into())]);

        // v1 is deleted: its lease, and with it its name, go at once, and its address is free.
        driver.set_hosts(net.id, &fixed[..1]).await.unwrap();
        eventually("the name of a deleted guest is gone", || lab.lookup("a", "v1", "10.77.1.1").is_none());
        assert!(driver.leases(net.id).await.unwrap().iter().all(|l| l.mac != MACS[1]));

        // No other interface of the host answers DNS.
        assert!(lab.lookup("x", "c1", "192.0.2.1").is_none());

        // Nothing is changed by a second ensure, and it is cheap.
        let same = NetworkSpec { hosts: fixed[..1].to_vec(), ..net.clone() };
        driver.ensure(&same).await.unwrap();
        let unchanged = lab.trace();
        let started = Instant::now();
        driver.ensure(&same).await.unwrap();
        println!("ensure without change: {:?}", started.elapsed());
        assert_eq!(lab.trace(), unchanged);

        for link in ["va", "vb"] {
            karst_host::link::delete(link).unwrap();
        }
        driver.remove(net.id).await.unwrap();
        driver.remove(net.id).await.unwrap();
        driver.purge().await.unwrap();
        assert_eq!(lab.trace(), before, "nothing is left, and forwarding is off again");
        assert!(!lab.dir.join("net").exists());
    });
}

#[test]
fn killed_and_adopted() {
    if let Ok(dir) = std::env::var("KARST_NETWORK_TEST_DRIVER") {
        // The second process: makes the network, says so, and waits to be killed.
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let driver = NetworkDriver::new("ab12cd", PathBuf::from(dir).join("net"));
            driver
                .ensure(&network(1, "ktbr0", "10.77.1.1/24", vec![host(MACS[0], "c1", None)]))
                .await
                .unwrap();
            println!("made");
            std::future::pending::<()>().await;
        });
    }
    lab("killed_and_adopted", &[], |lab| async move {
        let before = lab.trace();
        let spawn = || {
            Command::new(std::env::current_exe().unwrap())
                .args(["killed_and_adopted", "--exact", "--nocapture"])
                .env("KARST_NETWORK_TEST_DRIVER", &lab.dir)
                .stdout(Stdio::piped())
                .spawn()
                .unwrap()
        };
        let mut child = spawn();
        let mut lines = std::io::BufRead::lines(std::io::BufReader::new(child.stdout.take().unwrap()));
        assert!(lines.any(|l| l.unwrap().contains("made")));
        child.kill().unwrap();
        child.wait().unwrap();

        // Nobody is there, and DHCP works.
        lab.plug("a", MACS[0], "ktbr0");
        let address = lab.dhcp("a", &[]).expect("a lease without any driver");
        let running = lab.dnsmasqs();
        assert_eq!(running.len(), 1);

        let driver = lab.driver();
        let adopted = driver.adopt().await.unwrap();
        assert!(adopted.len() == 1 && adopted[0].survived && adopted[0].result.is_ok(), "{adopted:?}");
        assert_eq!(lab.dnsmasqs(), running, "the same process goes on");
        assert_eq!(lab.lookup("a", "c1", "10.77.1.1").as_deref(), Some(&*address));

        // It is watched: killed, it comes back, and still knows the lease.
        kill9(running[0]);
        eventually("dnsmasq is back", || matches!(lab.dnsmasqs()[..], [pid] if pid != running[0]));
        eventually("and knows its leases", || {
            lab.lookup("a", "c1", "10.77.1.1").as_deref() == Some(&*address)
        });

        // Tampering is repaired: at once by the watch, all of it by ensure.
        let id = adopted[0].id;
        let rules = run(&["nft", "list", "table", "inet", "karst_ab12cd"]);
        run(&["nft", "flush", "table", "inet", "karst_ab12cd"]);
        eventually("the watch repairs the rules", || {
            String::from_utf8_lossy(&try_run(&["nft", "list", "table", "inet", "karst_ab12cd"]).stdout)
                == rules
        });
        drop(driver);
        let driver = lab.driver();
        run(&["nft", "flush", "table", "inet", "karst_ab12cd"]);
        run(&["ip", "addr", "flush", "dev", "ktbr0"]);
        run(&["ip", "addr", "add", "10.99.9.9/24", "dev", "ktbr0"]);
        driver.ensure(&network(1, "ktbr0", "10.77.1.1/24", vec![host(MACS[0], "c1", None)])).await.unwrap();
        assert_eq!(run(&["nft", "list", "table", "inet", "karst_ab12cd"]), rules);
        assert!(!run(&["ip", "addr", "show", "dev", "ktbr0"]).contains("10.99.9.9"));
        assert!(lab.dhcp("a", &[]).is_some());
        run(&["ip", "link", "delete", "ktbr0"]);
        run(&["nft", "delete", "table", "inet", "karst_ab12cd"]);
        driver.ensure(&network(1, "ktbr0", "10.77.1.1/24", vec![host(MACS[0], "c1", None)])).await.unwrap();
        karst_host::link::set_master("va", Some("ktbr0")).unwrap();
        eventually("a deleted bridge is made again", || lab.dhcp("a", &[]).as_deref() == Some(&*address));
        karst_host::link::delete("va").unwrap();
        driver.remove(id).await.unwrap();
        driver.purge().await.unwrap();
        assert_eq!(lab.trace(), before);

        // Killed anywhere in the making: a second ensure makes it whole, a remove or purge leaves nothing.
        for round in 0..12u64 {
            let mut child = spawn();
            std::thread::sleep(Duration::from_millis(3 + round * 9));
            child.kill().unwrap();
            child.wait().unwrap();
            let driver = lab.driver();
            let spec = network(1, "ktbr0", "10.77.1.1/24", vec![]);
            match round % 3 {
                0 => driver.purge().await.unwrap(),
                1 => driver.remove(spec.id).await.unwrap(),
                _ => {
                    driver.ensure(&spec).await.unwrap_or_else(|e| panic!("round {round}: {e:?}"));
                    // One that the killed driver had begun to start may be ending yet.
                    eventually("one dnsmasq", || lab.dnsmasqs().len() == 1);
                    driver.remove(spec.id).await.unwrap();
                }
            }
            if round % 3 != 0 {
                driver.purge().await.unwrap();
            }
            eventually("nothing is left", || lab.trace() == before);
        }
    });
}

#[test]
fn beside_docker_and_ufw_in_nft_tables() {
    lab("beside_docker_and_ufw_in_nft_tables", &["iptables-nft"], |lab| beside(lab, "iptables-nft"));
}

#[test]
fn old_tables_of_docker_and_ufw() {
    lab("old_tables_of_docker_and_ufw", &["iptables-legacy"], |lab| beside(lab, "iptables-legacy"));
}

async fn beside(lab: Lab, iptables: &str) {
    lab.outside();
    // As Docker leaves it, and ufw's default for what comes in.
    for rule in [
        "-P FORWARD DROP",
        "-P INPUT DROP",
        "-N DOCKER-USER",
        "-A DOCKER-USER -j RETURN",
        "-I FORWARD -j DOCKER-USER",
        "-N ufw-before-input",
        "-A INPUT -j ufw-before-input",
    ] {
        let mut argv = vec![iptables, "-w", "30"];
        argv.extend(rule.split(' '));
        run(&argv);
    }
    let before = lab.trace();
    let driver = lab.driver();
    let net = network(1, "ktbr0", "10.77.1.1/24", vec![host(MACS[0], "c1", None), host(MACS[1], "v1", None)]);
    let second = network(2, "ktbr1", "10.77.2.1/24", vec![]);
    driver.ensure(&net).await.unwrap();
    driver.ensure(&second).await.unwrap();
    lab.plug("a", MACS[0], "ktbr0");
    lab.plug("b", MACS[1], "ktbr0");
    let all_well = |what: &str| {
        let c1 = lab.dhcp("a", &[]).unwrap_or_else(|| panic!("{what}: DHCP through INPUT DROP"));
        lab.dhcp("b", &[]).unwrap();
        assert_eq!(lab.lookup("b", "c1", "10.77.1.1").as_deref(), Some(&*c1), "{what}: DNS");
        assert!(lab.reaches("b", &c1), "{what}: guest to guest");
        assert!(lab.reaches("a", "192.0.2.2"), "{what}: outwards through FORWARD DROP");
    };
    all_well("first");
    assert!(run(&[iptables, "-S", "DOCKER-USER"]).contains("-j KARST_ab12cd_FWD"));
    // What comes from outside still falls to Docker's policy: translated guests are reached only by answers.
    run(&["ip", "-n", &lab.ns("x"), "route", "add", "10.77.1.0/24", "via", "192.0.2.1"]);
    let c1 = lab.dhcp("a", &[]).unwrap();
    assert!(!lab.pings("x", &c1));

    // Somebody empties our chain; somebody flushes FORWARD, so that DOCKER-USER is never reached.
    run(&[iptables, "-F", "KARST_ab12cd_FWD"]);
    assert!(!lab.pings("a", "192.0.2.2"), "the case is real: without the rules nothing passes");
    driver.ensure(&net).await.unwrap();
    all_well("after a flush of our chain");
    run(&[iptables, "-F", "FORWARD"]);
    driver.ensure(&net).await.unwrap();
    all_well("after a flush of FORWARD");
    run(&[iptables, "-I", "FORWARD", "-j", "DOCKER-USER"]);
    driver.ensure(&net).await.unwrap();
    all_well("after Docker's call came back");
    let settled = lab.trace();
    driver.ensure(&net).await.unwrap();
    driver.ensure(&second).await.unwrap();
    assert_eq!(lab.trace(), settled);

    // One network less takes its rules only.
    driver.remove(second.id).await.unwrap();
    let rules = run(&[iptables, "-S"]);
    assert!(!rules.contains("ktbr1") && rules.contains("ktbr0"), "{rules}");

    // A drop that nobody can open for us is named.
    run(&[
        "nft",
        "add table inet mine; add chain inet mine passing { type filter hook forward priority 5; policy drop; }",
    ]);
    driver.ensure(&net).await.unwrap();
    let warnings = driver.warnings().await;
    assert!(warnings.len() == 1 && warnings[0].contains("\"mine\""), "{warnings:?}");
    run(&["nft", "delete", "table", "inet", "mine"]);

    for link in ["va", "vb"] {
        karst_host::link::delete(link).unwrap();
    }
    driver.purge().await.unwrap();
    assert_eq!(lab.trace(), before);
}

#[test]
fn strangers_are_left_alone() {
    lab("strangers_are_left_alone", &[], |lab| async move {
        lab.outside();
        run(&["ip", "link", "add", "ktbr0", "type", "bridge"]);
        run(&["ip", "route", "add", "10.0.0.0/8", "via", "192.0.2.2"]);
        let before = lab.trace();
        let driver = lab.driver();
        let net = network(1, "ktbr0", "10.77.1.1/24", vec![]);
        let e = driver.ensure(&net).await.unwrap_err();
        assert!(e.is(karst_model::ErrorKind::Conflict) && e.message.contains("ktbr0"), "{e:?}");
        assert!(driver.list().await.unwrap().is_empty());
        driver.remove(net.id).await.unwrap();
        assert_eq!(lab.trace(), before, "neither the refusal nor the removal touched the other's bridge");

        // Also one that another daemon marked, and one of ours for another network.
        run(&["ip", "link", "set", "ktbr0", "alias", "karst:ffffff:00000000-0000-0000-0000-000000000001"]);
        assert!(driver.ensure(&net).await.unwrap_err().is(karst_model::ErrorKind::Conflict));
        driver.purge().await.unwrap();
        assert!(karst_host::link::exists("ktbr0").unwrap());

        assert_eq!(driver.find_free_bridge_name("ktbr0").await.unwrap(), "ktbr1");
        assert_eq!(driver.find_free_bridge_name("other0").await.unwrap(), "other0");
        // All of 10/8 is routed to a VPN.
        let subnet = driver.find_free_subnet(&[]).await.unwrap();
        assert_eq!(subnet.to_string(), "172.16.0.1/24");
        let again = driver.find_free_subnet(&["172.16.0.0/16".parse().unwrap()]).await.unwrap();
        assert_eq!(again.to_string(), "172.17.0.1/24");

        let ours = network(2, "ktbr1", "172.16.0.1/24", vec![]);
        driver.ensure(&ours).await.unwrap();
        assert_eq!(driver.find_free_subnet(&[]).await.unwrap().to_string(), "172.16.1.1/24");
        for (clash, part) in [
            (network(3, "ktbr1", "172.16.5.1/24", vec![]), "ktbr1"),
            (network(3, "ktbr2", "172.16.0.9/16", vec![]), "overlaps"),
        ] {
            let e = driver.ensure(&clash).await.unwrap_err();
            assert!(e.is(karst_model::ErrorKind::Conflict) && e.message.contains(part), "{e:?}");
        }
        // Renamed, moved and without DHCP.
        let mut moved = network(2, "ktbr5", "172.18.0.1/16", vec![]);
        moved.spec.mtu = Some(9000);
        moved.spec.dhcp = false;
        driver.ensure(&moved).await.unwrap();
        let state = driver.state(moved.id).await.unwrap();
        assert_eq!((state.mtu, state.addresses.len(), state.up), (9000, 1, true));
        assert!(!karst_host::link::exists("ktbr1").unwrap());
        driver.purge().await.unwrap();
        assert!(lab.dnsmasqs().is_empty());
        let after = lab.trace();
        assert_eq!(after, before);
    });
}

#[test]
fn unplugged_while_their_network_is_stopped() {
    lab("unplugged_while_their_network_is_stopped", &[], |lab| async move {
        let (driver, before) = (lab.driver(), lab.trace());
        let net = network(1, "ktbr0", "10.77.1.1/24", vec![host(MACS[0], "c1", None)]);
        driver.ensure(&net).await.unwrap();
        for (n, mac) in ["a", "b"].into_iter().zip(MACS) {
            lab.plug(n, mac, "ktbr0");
            assert!(lab.dhcp(n, &[]).is_some());
        }
        driver.stop(net.id).await.unwrap();
        driver.stop(net.id).await.expect("twice is once");
        assert!(karst_host::link::get("ktbr0").unwrap().is_none() && lab.dnsmasqs().is_empty());
        for name in ["va", "vb"] {
            let port = karst_host::link::get(name).unwrap().expect("a guest's interface stays");
            assert!(!port.up && port.master.is_none(), "{port:?}");
        }
        assert_eq!(driver.detached().await.unwrap().into_values().collect::<Vec<_>>(), ["ktbr0"]);
        assert_eq!(driver.strays().await.unwrap(), Vec::<String>::new());
        // Another process knows it too. One of the guests ends meanwhile, and another has its interface's name.
        drop(driver);
        let driver = lab.driver();
        driver.adopt().await.unwrap();
        assert!(karst_host::link::get("ktbr0").unwrap().is_none(), "it is not adopted");
        karst_host::link::delete("vb").unwrap();
        run(&["ip", "link", "add", "vb", "type", "veth", "peer", "name", "eth0", "netns", &lab.ns("b")]);
        driver.ensure(&net).await.unwrap();
        assert!(lab.reaches("a", "10.77.1.1"), "it is back on its network");
        assert_eq!(karst_host::link::get("vb").unwrap().unwrap().master, None, "that one was never on it");
        assert!(driver.detached().await.unwrap().is_empty());
        driver.stop(net.id).await.unwrap();
        driver.remove(net.id).await.unwrap();
        assert!(driver.detached().await.unwrap().is_empty(), "nothing goes back to what is gone");
        for name in ["va", "vb"] {
            karst_host::link::delete(name).unwrap();
        }
        driver.purge().await.unwrap();
        assert_eq!(lab.trace(), before);
    });
}

#[test]
fn records_subnets_and_ports_of_ones_own() {
    lab("records_subnets_and_ports_of_ones_own", &[], |lab| async move {
        lab.outside();
        let (driver, before) = (lab.driver(), lab.trace());
        let keys = [
            ("ipv4.address", "10.77.1.1/24"),
            ("ipv4.addresses", "10.77.2.1/24"),
            ("ipv4.nat", "true"),
            ("ipv4.nat.address", "192.0.2.1"),
            ("ipv4.nat.ports", "40000-40999"),
            ("ipv4.dhcp.hosts", "02:aa:00:00:00:01 10.77.1.77 kept"),
            ("dns.hosts", "10.77.1.5 www a.example"),
            ("dns.txt", "note say \"hi\", \\ twice"),
            ("dns.srv", "ldap tcp - ldap.example 389 1 2"),
            ("dns.forwarders", "corp.example=192.0.2.53"),
            ("limits.egress", "100Mbit"),
            ("limits.egress.peak", "200Mbit"),
            ("limits.egress.burst", "1MiB"),
            ("bridge.stp", "false"),
            ("bridge.forward_delay", "3"),
        ];
        let config = keys.iter().map(|(k, v)| (k.to_string(), v.to_string())).collect();
        let spec = BridgeSpec::parse("ktbr0", &config).unwrap();
        let net = NetworkSpec {
            spec,
            ..network(1, "ktbr0", "10.77.1.1/24", vec![host(MACS[0], "kept", Some("10.77.1.77"))])
        };
        driver.ensure(&net).await.unwrap();
        driver.ensure(&net).await.expect("twice is once");
        lab.plug("a", MACS[0], "ktbr0");
        assert_eq!(lab.dhcp("a", &[]).as_deref(), Some("10.77.1.77"));
        for name in ["www", "www.karst", "a.example"] {
            assert_eq!(lab.lookup("a", name, "10.77.1.1").as_deref(), Some("10.77.1.5"), "{name}");
        }
        let asks = |kind: &str, name: &str| {
            let kind = format!("-type={kind}");
            let out = lab.guest("a", &["busybox", "nslookup", &kind, name, "10.77.1.1"]);
            String::from_utf8_lossy(&out.stdout).into_owned()
        };
        // As it was said, whatever stands in it.
        let text = asks("txt", "note");
        assert!(text.contains("say") && text.contains("hi") && text.contains("twice"), "{text}");
        assert!(asks("srv", "_ldap._tcp.karst").contains("ldap.example"));
        assert!(lab.reaches("a", "10.77.2.1"), "the second address is the host's too");
        // What leaves has a port out of the range.
        assert!(lab.reaches("a", "192.0.2.2"));
        let rules = run(&["nft", "list", "table", "inet", "karst_ab12cd"]);
        for part in
            ["tcp snat ip to 192.0.2.1:40000-40999", "udp snat ip to 192.0.2.1:40000-40999", "10.77.2.0/24"]
        {
            assert!(rules.contains(part), "{part}: {rules}");
        }
        assert!(rules.contains("chain rate_from"), "{rules}");
        let delay =
            std::fs::read_to_string("/sys/class/net/ktbr0/bridge/forward_delay").unwrap_or("300".into());
        assert_eq!(delay.trim(), "300");
        assert_eq!(driver.strays().await.unwrap(), Vec::<String>::new());
        karst_host::link::delete("va").unwrap();
        driver.remove(net.id).await.unwrap();
        driver.purge().await.unwrap();
        assert_eq!(lab.trace(), before);
    });
}
