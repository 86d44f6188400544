//! Scenarios of changes that are of a run only, of the definition only, or of both.

use super::{Scenario, container, done, make, volume};
use crate::World;
use karst_engine::{
    LiveOperation,
    compute::{
        create::CreateInstance,
        run::{MachineChange, RunChange},
        update::UpdateInstance,
    },
};
use karst_model::{Error, Result, device::Devices, instance::InstanceKind, storage::VolumeContent};

/// Changes the devices of `c1` as it runs, and those of its definition too where it is said.
pub async fn change_run(
    w: &World,
    run: impl FnOnce(&mut Devices),
    definition: Option<Devices>,
) -> Result<LiveOperation> {
    let view = w.engine.instance(&w.admin, "default", "c1")?;
    let was = view.run().cloned().ok_or_else(|| Error::conflict("c1 does not run"))?;
    let mut devices = was.devices.clone();
    run(&mut devices);
    let definition = definition.map(|devices| UpdateInstance {
        description: view.instance.description.clone(),
        ephemeral: false,
        config: view.instance.config.clone(),
        devices,
        profiles: view.profiles.iter().map(|p| p.name.to_string()).collect(),
        if_version: Some(view.instance.spec_version),
    });
    let run = RunChange { config: was.config.clone(), devices, was };
    let change = MachineChange { definition, run: Some(run), ..Default::default() };
    w.engine.machine_change(&w.admin, "default", "c1", change).await
}

fn device(pairs: &[(&str, &str)]) -> std::collections::BTreeMap<String, String> {
    pairs.iter().map(|(k, v)| (k.to_string(), v.to_string())).collect()
}

/// A second interface on the network of the first.
fn second() -> std::collections::BTreeMap<String, String> {
    device(&[("type", "nic"), ("network", "karstbr0"), ("name", "eth1")])
}

/// A disk of the custom volume `v1`.
fn disk() -> std::collections::BTreeMap<String, String> {
    device(&[("type", "disk"), ("pool", "default"), ("source", "v1")])
}

/// A machine `c1` that runs, and a volume that is nobody's.
async fn machine_and_volume(w: &World) -> Result<()> {
    done(w, volume(w, "v1", VolumeContent::Block).await).await?;
    let kind = InstanceKind::VirtualMachine;
    let request = CreateInstance { kind, start: true, ..container("c1") };
    done(w, Ok(w.engine.instance_create(&w.admin, "default", request).await?.1)).await
}

pub(super) fn scenarios() -> Vec<Scenario> {
    vec![
        scenario!("instance-update", "an interface of the run only", |w| make(w, "c1", true).await, |w| {
            change_run(w, |devices| drop(devices.insert("eth1".into(), second())), None).await
        }),
        scenario!("instance-update", "a disk of the run only", |w| machine_and_volume(w).await, |w| {
            change_run(w, |devices| drop(devices.insert("more".into(), disk())), None).await
        }),
        scenario!(
            "instance-update",
            "a disk that the run is without",
            |w| {
                machine_and_volume(w).await?;
                let both = Devices::from([("more".to_owned(), disk())]);
                done(
                    w,
                    change_run(w, |devices| drop(devices.insert("more".into(), disk())), Some(both)).await,
                )
                .await
            },
            |w| change_run(w, |devices| drop(devices.remove("more")), None).await
        ),
        scenario!(
            "instance-update",
            "a disk of the run, and of the definition another",
            |w| machine_and_volume(w).await,
            |w| {
                let read =
                    device(&[("type", "disk"), ("pool", "default"), ("source", "v1"), ("readonly", "true")]);
                let definition = Devices::from([("more".to_owned(), read)]);
                change_run(w, |devices| drop(devices.insert("more".into(), disk())), Some(definition)).await
            }
        ),
    ]
}
