//! Addresses are unique on a network: MACs and static addresses, also when many ask for one at once; and where records
//! say otherwise all the same, one guest's fault is that guest's alone.

use karst_engine::{
    compute::{create::CreateInstance, power::PowerRequest, update::UpdateInstance},
    network::CreateNetwork,
    tenancy::UpdateProfile,
};
use karst_env::{Env, SeededEnv};
use karst_model::{
    Config, Error, ErrorKind, Result,
    device::Devices,
    instance::{PowerAction, Status},
    uplink::NetworkKind,
    warning::WarningStatus,
};
use karst_testkit::{World, scenarios::container};
use std::{net::Ipv4Addr, time::Duration};

const P: &str = "default";

/// The address `n` of the network's subnet.
fn address(w: &World, n: u32) -> String {
    let network = w.engine.network(&w.admin, P, "karstbr0").unwrap();
    let subnet = network.bridge().unwrap().ipv4.unwrap();
    Ipv4Addr::from(u32::from(subnet.network()) + n).to_string()
}

fn nic(keys: &[(&str, &str)]) -> Devices {
    let mut nic: std::collections::BTreeMap<String, String> =
        [("type", "nic"), ("network", "karstbr0")].map(|(k, v)| (k.into(), v.into())).into();
    nic.extend(keys.iter().map(|(k, v)| (k.to_string(), v.to_string())));
    Devices::from([("eth0".into(), nic)])
}

fn with(name: &str, keys: &[(&str, &str)]) -> CreateInstance {
    CreateInstance { devices: nic(keys), ..container(name) }
}

async fn create(w: &World, request: CreateInstance) -> Result<()> {
    let (_, operation) = w.engine.instance_create(&w.admin, P, request).await?;
    w.ended(operation).await.error.clone().map_or(Ok(()), Err)
}

async fn update(w: &World, name: &str, devices: Devices) -> Result<()> {
    let update = UpdateInstance {
        description: String::new(),
        ephemeral: false,
        config: Default::default(),
        devices,
        profiles: vec!["default".into()],
        if_version: None,
    };
    let operation = w.engine.instance_update(&w.admin, P, name, update).await?;
    w.ended(operation).await.error.clone().map_or(Ok(()), Err)
}

async fn start(w: &World, name: &str) -> Result<()> {
    let request = PowerRequest { action: PowerAction::Start, force: false, timeout: None, stateful: false };
    let operation = w.engine.instance_power(&w.admin, P, name, request).await?;
    w.ended(operation).await.error.clone().map_or(Ok(()), Err)
}

#[track_caller]
fn refused(result: Result<()>, kind: ErrorKind, field: &str, says: &str) -> Error {
    let e = result.expect_err(says);
    assert_eq!((e.kind, e.field.as_deref()), (kind, Some(field)), "{e}");
    assert!(e.to_string().contains(says), "{e}");
    e
}

#[test]
fn one_of_many_that_ask_for_an_address_gets_it() {
    for seed in 1..=8 {
        SeededEnv::run(seed, |env| async move {
            let w = World::new(&env).await.unwrap();
            let fixed = address(&w, 55);
            for keys in [("ipv4.address", fixed.as_str()), ("hwaddr", "10:66:6a:ab:cd:ef")] {
                let many = (0..6).map(|n| {
                    let request = with(&format!("c{n}-{}", &keys.0[..2]), &[keys]);
                    let delay = env.below(3);
                    let (w, env) = (&w, &env);
                    async move {
                        env.sleep(Duration::from_micros(delay)).await;
                        create(w, request).await
                    }
                });
                let results = futures::future::join_all(many).await;
                let made = results.iter().filter(|r| r.is_ok()).count();
                assert_eq!(made, 1, "seed {seed}: {results:?}");
                for e in results.into_iter().filter_map(Result::err) {
                    assert_eq!(e.kind, ErrorKind::Conflict, "{e}");
                }
            }
            // Two that exist, and change at once.
            let taken = address(&w, 56);
            create(&w, with("x", &[])).await.unwrap();
            create(&w, with("y", &[])).await.unwrap();
            let wanted = || nic(&[("ipv4.address", &taken)]);
            let (x, y) = futures::join!(update(&w, "x", wanted()), update(&w, "y", wanted()));
            assert!(x.is_ok() != y.is_ok(), "seed {seed}: {x:?} {y:?}");
            w.engine.close();
        });
    }
}

#[test]
fn taken_addresses_are_refused_by_name() {
    SeededEnv::run(1, |env| async move {
        let w = World::new(&env).await.unwrap();
        let (fixed, mac) = (address(&w, 60), "10:66:6a:00:00:60");
        create(&w, with("first", &[("ipv4.address", &fixed), ("hwaddr", mac)])).await.unwrap();
        let conflict = ErrorKind::Conflict;
        let e = create(&w, with("second", &[("ipv4.address", &fixed)])).await;
        refused(e, conflict, "devices.eth0.ipv4.address", "by instance \"first\"");
        let e = create(&w, with("second", &[("hwaddr", &mac.to_uppercase())])).await;
        refused(e, conflict, "devices.eth0.hwaddr", "by instance \"first\"");
        let mut twice = nic(&[("ipv4.address", &address(&w, 61))]);
        twice.insert("eth1".into(), twice["eth0"].clone());
        let e = create(&w, CreateInstance { devices: twice, ..container("second") }).await;
        refused(e, conflict, "devices.eth1.ipv4.address", "the same instance");
        for (n, why) in [(0, "the subnet's"), (1, "the host's own"), (255, "the broadcast")] {
            let e = create(&w, with("second", &[("ipv4.address", &address(&w, n))])).await;
            let e = refused(e, ErrorKind::Invalid, "devices.eth0.ipv4.address", "not an address for a guest");
            assert!(e.to_string().contains("choose one within"), "{why}: {e}");
        }
        // Its own address is nobody else's.
        update(&w, "first", nic(&[("ipv4.address", &fixed), ("hwaddr", mac)])).await.unwrap();
        // What a change gives up is free, what it takes is taken.
        let other = "10:66:6a:00:00:61";
        update(&w, "first", nic(&[("ipv4.address", &fixed), ("hwaddr", other)])).await.unwrap();
        refused(
            create(&w, with("second", &[("hwaddr", other)])).await,
            conflict,
            "devices.eth0.hwaddr",
            "\"first\"",
        );
        create(&w, with("third", &[("hwaddr", mac)])).await.unwrap();
        let operation = w.engine.instance_delete(&w.admin, P, "third").await.unwrap();
        assert_eq!(w.ended(operation).await.error, None);
        update(&w, "first", nic(&[("ipv4.address", &fixed), ("hwaddr", mac)])).await.unwrap();
        // Whoever is given up is free.
        let operation = w.engine.instance_delete(&w.admin, P, "first").await.unwrap();
        assert_eq!(w.ended(operation).await.error, None);
        create(&w, with("second", &[("ipv4.address", &fixed), ("hwaddr", mac)])).await.unwrap();
        w.engine.close();
    });
}

/// On an interface of the host guests are on one wire as on a bridge; what addresses they have there is nobody's business.
#[test]
fn a_mac_is_one_guests_on_each_kind_of_network() {
    SeededEnv::run(1, |env| async move {
        let w = World::new(&env).await.unwrap();
        let mac = "10:66:6a:00:00:60";
        for kind in [NetworkKind::Macvlan, NetworkKind::Physical] {
            let name = kind.as_str();
            let config = Config::from([("parent".into(), "granted0".into())]);
            let request = CreateNetwork { name: name.into(), kind, config, ..Default::default() };
            let (_, operation) = w.engine.network_create(&w.admin, P, request).await.unwrap();
            assert_eq!(w.ended(operation).await.error, None);
            let on = |instance: &str, keys: &[(&str, &str)]| {
                let keys: Vec<_> = [("network", name)].iter().chain(keys).copied().collect();
                with(&format!("{instance}-{name}"), &keys)
            };
            create(&w, on("first", &[("hwaddr", mac)])).await.unwrap();
            let by = format!("on network {name:?} by instance \"first-{name}\"");
            for taken in [mac.to_owned(), mac.to_uppercase()] {
                let e = create(&w, on("second", &[("hwaddr", taken.as_str())])).await;
                refused(e, ErrorKind::Conflict, "devices.eth0.hwaddr", &by);
            }
            let mut twice = on("second", &[("hwaddr", "10:66:6a:00:00:61")]);
            twice.devices.insert("eth1".into(), twice.devices["eth0"].clone());
            refused(
                create(&w, twice).await,
                ErrorKind::Conflict,
                "devices.eth1.hwaddr",
                "by another NIC of the same instance",
            );
            // A change is asked the same, and two at once are one too many.
            for other in ["a", "b"] {
                create(&w, on(other, &[])).await.unwrap();
            }
            let wanted = |mac: &str| on("", &[("hwaddr", mac)]).devices;
            let (a, b) = (format!("a-{name}"), format!("b-{name}"));
            refused(update(&w, &a, wanted(mac)).await, ErrorKind::Conflict, "devices.eth0.hwaddr", &by);
            let fresh = "10:66:6a:00:00:62";
            let (x, y) = futures::join!(update(&w, &a, wanted(fresh)), update(&w, &b, wanted(fresh)));
            assert!(x.is_ok() != y.is_ok(), "{name}: {x:?} {y:?}");
        }
        // Another network is another wire.
        create(&w, with("bridged", &[("hwaddr", mac)])).await.unwrap();
        w.engine.close();
    });
}

#[test]
fn a_profile_that_gives_one_address_to_two_harms_none_but_the_second() {
    SeededEnv::run(1, |env| async move {
        let w = World::new(&env).await.unwrap();
        for name in ["a", "b", "c"] {
            create(&w, container(name)).await.unwrap();
        }
        let mut devices = w.engine.profile(&w.admin, P, "default").unwrap().devices.clone();
        for keys in devices.values_mut().filter(|keys| keys.get("type").is_some_and(|t| t == "nic")) {
            keys.insert("ipv4.address".into(), address(&w, 70));
        }
        let profile = UpdateProfile { devices, ..Default::default() };
        w.engine.profile_update(&w.admin, P, "default", profile).await.unwrap();
        let e = start(&w, "a").await.expect_err("two others have its address");
        assert_eq!(e.kind, ErrorKind::Conflict, "{e}");
        let warned = || {
            let all = w.engine.warnings(&w.admin).unwrap().into_iter();
            all.filter(|w| w.kind == "Guests share an address")
                .map(|w| (w.message.clone(), w.status))
                .collect::<Vec<_>>()
        };
        env.sleep(Duration::from_secs(5)).await;
        let said = warned();
        assert!(said.len() == 1 && said[0].1 == WarningStatus::New, "{said:?}");
        assert!(said[0].0.contains("karstbr0") && said[0].0.contains(&address(&w, 70)), "{said:?}");
        // One that says otherwise itself is no part of it, and its network comes up.
        update(&w, "c", nic(&[])).await.unwrap();
        start(&w, "c").await.unwrap();
        update(&w, "b", nic(&[("ipv4.address", &address(&w, 71))])).await.unwrap();
        start(&w, "a").await.unwrap();
        start(&w, "b").await.unwrap();
        for name in ["a", "b", "c"] {
            assert_eq!(w.engine.instance(&w.admin, P, name).unwrap().status, Status::Running, "{name}");
        }
        env.sleep(Duration::from_secs(5)).await;
        assert_eq!(warned()[0].1, WarningStatus::Resolved);
        w.engine.close();
    });
}

fn without_network(name: &str) -> CreateInstance {
    let none = [("type", "none")].map(|(k, v)| (k.to_owned(), v.to_owned())).into();
    CreateInstance { devices: Devices::from([("eth0".into(), none)]), ..container(name) }
}

/// What differs by case, `_` and `.` alone is one name in DNS: as the clients of Incus know it, the second is refused.
#[test]
fn a_dns_name_is_one_guests_on_a_network() {
    SeededEnv::run(1, |env| async move {
        let w = World::new(&env).await.unwrap();
        let conflict = ErrorKind::Conflict;
        create(&w, container("Web")).await.unwrap();
        let says = "DNS name \"web\" is instance \"Web\"'s on network \"karstbr0\"";
        refused(create(&w, container("web")).await, conflict, "name", says);
        create(&w, container("a.b")).await.unwrap();
        for name in ["a-b", "a_b", "A.b"] {
            refused(create(&w, container(name)).await, conflict, "name", "instance \"a.b\"");
        }
        // Where it is on no network with it, it is free; coming onto one is refused, and so is the name there.
        create(&w, without_network("web")).await.unwrap();
        refused(update(&w, "web", nic(&[])).await, conflict, "devices", says);
        w.engine.instance_rename(&w.admin, P, "web", "other").await.unwrap();
        update(&w, "other", nic(&[])).await.unwrap();
        refused(w.engine.instance_rename(&w.admin, P, "other", "wEb").await, conflict, "name", says);
        // Who has it may be changed, and take another form of it.
        update(&w, "Web", nic(&[])).await.unwrap();
        w.engine.instance_rename(&w.admin, P, "Web", "WEB").await.unwrap();
        // Each project has its own names.
        let own = Config::from([("features.profiles".into(), "false".into())]);
        w.engine.project_create(&w.admin, "theirs", "", own).await.unwrap();
        let (_, operation) = w.engine.instance_create(&w.admin, "theirs", container("web")).await.unwrap();
        assert_eq!(w.ended(operation).await.error, None);
        // What is gone has no name.
        let operation = w.engine.instance_delete(&w.admin, P, "WEB").await.unwrap();
        assert_eq!(w.ended(operation).await.error, None);
        create(&w, container("web")).await.unwrap();
        assert_eq!(w.faults().await, Vec::<String>::new());
        w.engine.close();
    });
}

/// A profile can bring two onto a network all the same. Whichever has the smaller MAC: the older one is found.
#[test]
fn of_two_with_one_dns_name_the_older_keeps_it() {
    for seed in 1..=8 {
        SeededEnv::run(seed, |env| async move {
            let w = World::new(&env).await.unwrap();
            let devices = w.engine.profile(&w.admin, P, "default").unwrap().devices.clone();
            let mut bare = devices.clone();
            bare.retain(|_, keys| keys.get("type").is_none_or(|t| t != "nic"));
            let with = |devices: Devices| UpdateProfile { devices, ..Default::default() };
            w.engine.profile_create(&w.admin, P, "lan", with(bare)).await.unwrap();
            for name in ["Web", "web"] {
                let profiles = Some(vec!["lan".into()]);
                create(&w, CreateInstance { profiles, ..container(name) }).await.unwrap();
                env.sleep(Duration::from_secs(1)).await;
            }
            w.engine.profile_update(&w.admin, P, "lan", with(devices)).await.unwrap();
            let network = w.engine.network(&w.admin, P, "karstbr0").unwrap().id;
            // MAC addresses of those that the host gives the name to.
            let found = || {
                let hosts = w.agent.network_hosts(network).into_iter();
                hosts.filter(|h| h.hostname == "web").map(|h| h.mac).collect::<Vec<_>>()
            };
            let mac = |name: &str| {
                let view = w.engine.instance(&w.admin, P, name).unwrap();
                view.instance.identities.values().find_map(|i| i.mac.clone()).expect("a MAC address")
            };
            start(&w, "Web").await.unwrap();
            assert_eq!(found(), [mac("Web")], "seed {seed}");
            start(&w, "web").await.unwrap();
            assert_eq!(found(), [mac("Web")], "seed {seed}");
            assert_eq!(w.agent.network_hosts(network).len(), 2, "the other one is known all the same");
            let warned = || {
                let all = w.engine.warnings(&w.admin).unwrap().into_iter();
                all.filter(|w| w.kind == "Guests share a name")
                    .map(|w| (w.message.clone(), w.status))
                    .collect::<Vec<_>>()
            };
            env.sleep(Duration::from_secs(5)).await;
            let said = warned();
            assert!(said.len() == 1 && said[0].1 == WarningStatus::New, "{said:?}");
            let words = "instance \"web\" is not found by name: \"web\" is instance \"Web\"";
            assert!(said[0].0.contains("karstbr0") && said[0].0.contains(words), "{said:?}");
            // Nothing keeps either from being changed; with another name it is found.
            let force =
                PowerRequest { action: PowerAction::Stop, force: true, timeout: None, stateful: false };
            let operation = w.engine.instance_power(&w.admin, P, "web", force).await.unwrap();
            assert_eq!(w.ended(operation).await.error, None);
            w.engine.instance_rename(&w.admin, P, "web", "shop").await.unwrap();
            start(&w, "shop").await.unwrap();
            assert!(w.agent.network_hosts(network).iter().any(|h| h.hostname == "shop"), "seed {seed}");
            env.sleep(Duration::from_secs(5)).await;
            assert_eq!(warned()[0].1, WarningStatus::Resolved);
            w.engine.close();
        });
    }
}
