//! What an instance is after it was put back, or had moved: its virtual hardware, and what listeners are told of it.

use karst_engine::{
    compute::{create::CreateInstance, relocate::MoveInstance, update::UpdateInstance},
    events::{EventKind, Subject},
    snapshots::{Origin, create::CreateSnapshot},
};
use karst_env::{EnvExt, SeededEnv};
use karst_model::{
    Config,
    device::Devices,
    instance::{Firmware, InstanceKind},
    operation::OperationState,
};
use karst_testkit::{World, scenarios::container};
use std::time::Duration;

fn update(keys: &[(&str, &str)]) -> UpdateInstance {
    UpdateInstance {
        description: String::new(),
        ephemeral: false,
        config: keys.iter().map(|(k, v)| (k.to_string(), v.to_string())).collect(),
        devices: Devices::new(),
        profiles: vec!["default".into()],
        if_version: None,
    }
}

async fn create(w: &World, project: &str, request: CreateInstance) {
    let (_, operation) = w.engine.instance_create(&w.admin, project, request).await.unwrap();
    assert_eq!(w.ended(operation).await.state, OperationState::Success);
}

/// A snapshot keeps the firmware's variables; back at it the machine has the firmware that they are of, and the CPU that its
/// system was started on, whatever the keys said meanwhile.
#[test]
fn a_restore_brings_the_virtual_hardware_back() {
    SeededEnv::run(1, |env| async move {
        let w = World::new(&env).await.unwrap();
        let config = Config::from([("security.secureboot".into(), "false".into())]);
        create(
            &w,
            "default",
            CreateInstance { kind: InstanceKind::VirtualMachine, config, ..container("v1") },
        )
        .await;
        let of = || Origin::Instance { project: "default", name: "v1" };
        let hardware = || {
            let view = w.engine.instance(&w.admin, "default", "v1").unwrap();
            view.instance.hardware.clone().unwrap()
        };
        let then = hardware();
        assert_eq!(then.firmware, Firmware::Uefi);
        let request = CreateSnapshot { name: Some("then".into()), ..CreateSnapshot::default() };
        let taken = w.engine.snapshot_create(&w.admin, of(), request).await.unwrap();
        assert_eq!(w.ended(taken).await.state, OperationState::Success);
        let keys = [("hardware.cpu.model", "qemu64")];
        let changed = w.engine.instance_update(&w.admin, "default", "v1", update(&keys)).await.unwrap();
        assert_eq!(w.ended(changed).await.error, None);
        assert_eq!((hardware().firmware, hardware().cpu_model.as_str()), (Firmware::UefiSecure, "qemu64"));
        let back = w.engine.snapshot_restore(&w.admin, of(), "then").await.unwrap();
        assert_eq!(w.ended(back).await.error, None);
        assert_eq!(hardware(), then);
        w.engine.close();
    });
}

/// Where it went, and where it came from, others may have the names it had and has.
#[test]
fn a_move_that_renames_is_told_of_what_moved() {
    SeededEnv::run(2, |env| async move {
        let w = World::new(&env).await.unwrap();
        let features = Config::from([("features.profiles".into(), "false".into())]);
        w.engine.project_create(&w.admin, "other", "", features).await.unwrap();
        for name in ["c1", "c2"] {
            create(&w, "default", container(name)).await;
        }
        let moved = w.engine.instance(&w.admin, "default", "c1").unwrap().instance.id;
        let mut heard = w.engine.subscribe(&w.admin).unwrap();
        // To a name that another one has where it was.
        let request =
            MoveInstance { name: Some("c2".into()), project: Some("other".into()), ..Default::default() };
        let operation = w.engine.instance_move(&w.admin, "default", "c1", request).await.unwrap();
        assert_eq!(w.ended(operation).await.error, None);
        assert_eq!(w.engine.instance(&w.admin, "other", "c2").unwrap().instance.id, moved);
        let told = async {
            loop {
                let event = heard.recv().await.unwrap();
                if matches!(&event.kind, EventKind::Lifecycle { action: "instance-renamed", .. }) {
                    return event.subject.clone();
                }
            }
        };
        let Ok(Some(Subject::Instance(subject, _))) = env.timeout(Duration::from_secs(60), told).await else {
            panic!("no instance is told of");
        };
        assert_eq!(subject.id, moved);
        w.engine.close();
    });
}
