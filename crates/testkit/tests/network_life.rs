//! Networks that are started and stopped, and what becomes of them and of their guests.

use karst_engine::{
    LiveOperation,
    compute::{create::CreateInstance, update::UpdateInstance},
    network::{CreateNetwork, UpdateNetwork, life::NetworkSides},
};
use karst_env::{Env, SeededEnv};
use karst_model::{
    Config, Error, ErrorKind, NetworkId, Result, device::Devices, instance::Status,
    network_life::NetworkBeginning,
};
use karst_testkit::{World, scenarios::container};
use std::time::Duration;

fn config(pairs: &[(&str, &str)]) -> Config {
    pairs.iter().map(|(k, v)| (k.to_string(), v.to_string())).collect()
}

async fn done(w: &World, operation: Result<LiveOperation>) -> Result<()> {
    w.ended(operation?).await.error.clone().map_or(Ok(()), Err)
}

async fn make(w: &World, name: &str, subnet: u8, beginning: NetworkBeginning) {
    let address = format!("10.99.{subnet}.1/24");
    let config = config(&[("ipv4.address", &address), ("ipv6.address", "none")]);
    let request = CreateNetwork { name: name.into(), config, beginning, ..Default::default() };
    let made = w.engine.network_create(&w.admin, "default", request).await.map(|(_, operation)| operation);
    done(w, made).await.unwrap();
}

async fn start(w: &World, name: &str) -> Result<()> {
    done(w, w.engine.network_start(&w.admin, "default", name).await).await
}

async fn stop(w: &World, name: &str) -> Result<()> {
    done(w, w.engine.network_stop(&w.admin, "default", name).await).await
}

fn id(w: &World, name: &str) -> NetworkId {
    w.engine.network(&w.admin, "default", name).unwrap().id
}

fn active(w: &World, name: &str) -> bool {
    w.engine.network(&w.admin, "default", name).unwrap().is_active()
}

fn nic(network: &str) -> Config {
    config(&[("type", "nic"), ("network", network)])
}

async fn guest(w: &World, name: &str, network: &str, start: bool) -> Result<()> {
    let devices = Devices::from([("eth0".into(), nic(network))]);
    let request = CreateInstance { start, devices, ..container(name) };
    let made = w.engine.instance_create(&w.admin, "default", request).await;
    done(w, made.map(|(_, operation)| operation)).await
}

/// An instance with these devices of its own.
async fn with(w: &World, name: &str, devices: Devices) -> Result<()> {
    let view = w.engine.instance(&w.admin, "default", name)?;
    let request = UpdateInstance {
        description: String::new(),
        ephemeral: false,
        config: view.instance.config.clone(),
        devices,
        profiles: vec!["default".into()],
        if_version: None,
    };
    done(w, w.engine.instance_update(&w.admin, "default", name, request).await).await
}

#[track_caller]
fn inactive(result: Result<()>, field: &str) {
    let e: Error = result.unwrap_err();
    assert!(e.is(ErrorKind::Conflict) && e.message.contains("karst network start n1"), "{e:?}");
    assert_eq!(e.field.as_deref(), Some(field), "{e:?}");
}

#[test]
fn guests_stay_and_nobody_comes() {
    SeededEnv::run(1, |env| async move {
        let w = World::new(&env).await.unwrap();
        make(&w, "n1", 1, NetworkBeginning::Usual).await;
        guest(&w, "on", "n1", true).await.unwrap();
        guest(&w, "other", "karstbr0", true).await.unwrap();
        guest(&w, "still", "n1", false).await.unwrap();
        stop(&w, "n1").await.unwrap();
        assert!(w.agent.network_spec(id(&w, "n1")).is_none() && !active(&w, "n1"));
        assert_eq!(w.engine.instance(&w.admin, "default", "on").unwrap().status, Status::Running);
        assert!(stop(&w, "n1").await.unwrap_err().is(ErrorKind::Conflict));
        inactive(guest(&w, "new", "n1", true).await, "devices.eth0.network");
        let request = karst_engine::compute::power::PowerRequest {
            action: karst_model::instance::PowerAction::Start,
            force: false,
            timeout: None,
            stateful: false,
        };
        let started = w.engine.instance_power(&w.admin, "default", "still", request).await;
        inactive(done(&w, started).await, "devices.eth0.network");
        // Who runs does not come onto it either, and who is on it can be changed.
        let both = Devices::from([("eth0".into(), nic("karstbr0")), ("eth1".into(), nic("n1"))]);
        inactive(with(&w, "other", both).await, "devices.eth1.network");
        let more = Devices::from([("eth0".into(), nic("n1")), ("eth1".into(), nic("karstbr0"))]);
        with(&w, "on", more).await.unwrap();
        // What changes meanwhile is not made, and is there with the start.
        let mut keys = w.engine.network(&w.admin, "default", "n1").unwrap().config.clone();
        keys.insert("dns.domain".into(), "b.test".into());
        let update = UpdateNetwork { description: String::new(), config: keys, if_version: None };
        done(&w, w.engine.network_update(&w.admin, "default", "n1", update).await).await.unwrap();
        assert!(w.agent.network_spec(id(&w, "n1")).is_none());
        w.env.sleep(Duration::from_secs(70)).await;
        assert!(w.agent.network_spec(id(&w, "n1")).is_none(), "nor does a reconciler make it");
        assert_eq!(w.faults().await, Vec::<String>::new());
        start(&w, "n1").await.unwrap();
        let spec = w.agent.network_spec(id(&w, "n1")).unwrap();
        assert_eq!(spec.spec.domain, "b.test");
        assert!(spec.hosts.iter().any(|h| h.hostname == "on"), "{:?}", spec.hosts);
        assert_eq!(w.faults().await, Vec::<String>::new());
    });
}

#[test]
fn a_definition_waits_for_the_next_start() {
    SeededEnv::run(2, |env| async move {
        let w = World::new(&env).await.unwrap();
        make(&w, "n1", 1, NetworkBeginning::Usual).await;
        let before = w.engine.network(&w.admin, "default", "n1").unwrap().config.clone();
        let with = |domain: &str| {
            let mut keys = before.clone();
            keys.insert("dns.domain".into(), domain.into());
            keys
        };
        let domain = |w: &World| w.agent.network_spec(id(w, "n1")).unwrap().spec.domain;
        let request =
            UpdateNetwork { description: String::new(), config: with("later.test"), if_version: None };
        done(&w, w.engine.network_define(&w.admin, "default", "n1", request).await).await.unwrap();
        assert_eq!(domain(&w), "karst");
        let sides = NetworkSides { running: Some(with("now.test")), ..Default::default() };
        done(&w, w.engine.network_change_sides(&w.admin, "default", "n1", sides).await).await.unwrap();
        assert_eq!(domain(&w), "now.test");
        w.env.sleep(Duration::from_secs(40)).await;
        assert_eq!(domain(&w), "now.test", "reconcilers keep to what runs");
        // A definition that others' subnets forbid is refused, and so is a subnet that one waits for.
        let taken = w.engine.network(&w.admin, "default", "karstbr0").unwrap().config["ipv4.address"].clone();
        let mut wrong = before.clone();
        wrong.insert("ipv4.address".into(), taken);
        let request = UpdateNetwork { description: String::new(), config: wrong, if_version: None };
        let refused = done(&w, w.engine.network_define(&w.admin, "default", "n1", request).await).await;
        assert!(refused.unwrap_err().is(ErrorKind::Conflict));
        stop(&w, "n1").await.unwrap();
        start(&w, "n1").await.unwrap();
        assert_eq!(domain(&w), "later.test");
        assert_eq!(w.faults().await, Vec::<String>::new());
    });
}

#[test]
fn a_start_of_the_host() {
    for seed in 0..4 {
        SeededEnv::run(seed, |env| async move {
            let mut w = World::new(&env).await.unwrap();
            make(&w, "usual", 1, NetworkBeginning::Usual).await;
            make(&w, "manual", 2, NetworkBeginning::Defined).await;
            make(&w, "gone", 3, NetworkBeginning::Transient).await;
            make(&w, "used", 4, NetworkBeginning::Transient).await;
            make(&w, "off", 5, NetworkBeginning::Usual).await;
            guest(&w, "c1", "used", false).await.unwrap();
            assert!(!active(&w, "manual"));
            start(&w, "manual").await.unwrap();
            stop(&w, "off").await.unwrap();
            w.engine.close();
            w.agent.power_cut();
            w.reopen().await.unwrap();
            w.settle().await;
            w.env.sleep(Duration::from_secs(40)).await;
            let seen = ["usual", "manual", "used", "off"].map(|name| active(&w, name));
            assert_eq!(seen, [true, false, false, true]);
            assert!(w.engine.network(&w.admin, "default", "gone").is_err(), "nothing used it");
            assert_eq!(w.faults().await, Vec::<String>::new());
            // What a user starts after that stays so, whatever daemon looks next.
            start(&w, "manual").await.unwrap();
            w.engine.close();
            w.reopen().await.unwrap();
            w.settle().await;
            w.env.sleep(Duration::from_secs(40)).await;
            assert!(active(&w, "manual"));
            // The last that used it goes, and it goes too.
            let deleted = w.engine.instance_delete(&w.admin, "default", "c1").await;
            done(&w, deleted).await.unwrap();
            w.env.sleep(Duration::from_secs(40)).await;
            assert!(w.engine.network(&w.admin, "default", "used").is_err());
            assert_eq!(w.faults().await, Vec::<String>::new());
        });
    }
}
