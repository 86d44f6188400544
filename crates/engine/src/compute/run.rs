//! What a running guest is to have, beside what its record says: changes of the run only, of the record only, and of both.
//!
//! Words of this module: the *run* is a guest from its start to its end; the *definition* is the record of its instance, which the
//! next start takes whole. What somebody wanted to differ between the two is held (see [`karst_model::applied`]).
//!
//! A device of the run only is nobody's but the run's: no snapshot, copy, backup or restart has it. It uses its volume and its
//! network as any other does, and what the run has more of than the definition counts in its project.

use super::{
    disks::{check_disks, demand_drives},
    expand,
    update::{UpdateInstance, place_disks},
};
use crate::{
    EngineInner, Records, Row,
    context::Context,
    db::Tx,
    tenancy::{
        limits::{Planned, admit},
        profile_update::disks_of_change,
    },
};
use karst_model::{
    Config, Error, Result,
    applied::{AppliedSpec, changed},
    device::Devices,
    instance::{DeviceIdentity, Generation, Instance, Runtime},
    keys, maximum,
    project::Project,
    spec::GuestSpec,
};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};

/// What a running guest is to have: all of its keys and devices, with those of its profiles.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RunChange {
    /// What it was read to have.
    pub was: AppliedSpec,
    /// Configuration.
    pub config: Config,
    /// Devices.
    pub devices: Devices,
}

/// A change that says of both what it is: what it leaves out stays.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct MachineChange {
    /// What the next start takes.
    pub definition: Option<UpdateInstance>,
    /// What runs.
    pub run: Option<RunChange>,
    /// Bus slots of new disks (`sdb` is `scsi1`) by the names of their devices. One that is taken is chosen anew.
    pub slots: BTreeMap<String, String>,
}

/// What a running guest gets of a change.
#[derive(Debug, Clone, Copy)]
pub(super) enum Live<'a> {
    /// All of the definition that can change while it runs, but for what is held.
    Follow,
    /// Nothing before its next start.
    Leave,
    /// This.
    Given(&'a RunChange),
}

/// What is asked of an instance.
#[derive(Debug, Clone, Copy)]
pub(super) struct Wanted<'a> {
    pub definition: Option<&'a UpdateInstance>,
    pub live: Live<'a>,
    pub slots: &'a BTreeMap<String, String>,
}

/// What is decided about a running guest.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct RunPlan {
    /// Of which run.
    pub generation: Generation,
    /// What it is to have.
    pub wanted: AppliedSpec,
    /// It was asked for as such, and is checked as such.
    #[serde(default)]
    pub given: bool,
    /// What was held before.
    #[serde(default)]
    pub held: BTreeSet<String>,
}

/// A running guest and its definition, before and after a change.
pub(super) struct Running<'a> {
    pub runtime: &'a Row<Runtime>,
    /// The record as it was, with identities for all that it has.
    pub before: &'a Instance,
    /// Its keys and devices, expanded.
    pub defined: (&'a Config, &'a Devices),
    /// The same as they are to be.
    pub after: (&'a Config, &'a Devices),
}

/// An instance with keys and devices of its run written into itself, so that it can be asked what any instance is asked.
pub(crate) fn as_run(
    instance: &Instance,
    config: Config,
    devices: Devices,
    identities: BTreeMap<String, DeviceIdentity>,
) -> Instance {
    Instance { config, devices, identities, profiles: vec![], ..instance.clone() }
}

/// An instance as its run is to have it when its record says what `instance` does, which has no profiles any more: what is held
/// stays. `known` are the identities of the record, of which those of the run only are taken.
pub(crate) fn over_flat(
    run: Option<&AppliedSpec>,
    instance: &Instance,
    known: &BTreeMap<String, DeviceIdentity>,
) -> Instance {
    let Some(run) = run.filter(|run| !run.held.is_empty()) else { return instance.clone() };
    let (config, devices) = run.over(&instance.config, &instance.devices);
    let mut identities = instance.identities.clone();
    let all = run.known_by(known);
    for name in run.held_devices().filter(|name| run.devices.contains_key(*name)) {
        if let Some(identity) = all.get(name) {
            identities.insert(name.to_owned(), identity.clone());
        }
    }
    as_run(instance, config, devices, identities)
}

/// What is known of devices that the run has and the record has not.
pub(crate) fn of_run_only(
    run: Option<&AppliedSpec>,
    instance: &Instance,
    devices: &Devices,
) -> BTreeMap<String, DeviceIdentity> {
    let Some(run) = run else { return BTreeMap::new() };
    let known = instance.identities.iter();
    let only = known.filter(|(name, _)| run.devices.contains_key(*name) && !devices.contains_key(*name));
    only.map(|(name, identity)| (name.clone(), identity.clone())).collect()
}

/// Refuses to keep the memory of a guest with devices of its run only, or without some of those that the next start takes:
/// it goes on as it is defined, and QEMU refuses memory of other devices.
///
/// # Errors
/// Conflict, naming the device.
pub(crate) fn demand_defined(records: &Records, instance: &Instance) -> Result<()> {
    let run = records.runtimes.get(&instance.id).and_then(|r| r.applied.as_ref());
    let Some(run) = run.filter(|run| !run.held.is_empty()) else { return Ok(()) };
    let devices = records.expanded(instance).1;
    let apart = |name: &&str| run.devices.contains_key(*name) != devices.contains_key(*name);
    match run.held_devices().find(apart) {
        None => Ok(()),
        Some(name) => {
            let (is, fix) = match run.devices.contains_key(name) {
                true => ("is of this run only", "detach it, or add it to the definition"),
                false => ("is not in this run", "attach it, or remove it from the definition"),
            };
            Err(Error::conflict(format!(
                "device {name:?} of instance {:?} {is}, and memory goes on with what is defined; {fix} first",
                &*instance.name
            ))
            .at(format!("devices.{name}")))
        }
    }
}

/// The root disk is what the run began with, but for its size, which follows that of the definition.
fn demand_root(run: &Devices, was: &Devices, defined: &Devices, root: &str) -> Result<()> {
    let Some(before) = was.iter().find(|(_, keys)| is_root(keys)) else { return Ok(()) };
    let field = |key: &str| format!("devices.{root}.{key}");
    if before.0 != root {
        return Err(Error::unsupported("the root disk stays while the guest runs").at(field("path")));
    }
    let (is, defined) = (run.get(root), defined.get(root));
    for key in ["pool", "source", "attached", "size"] {
        let of = |keys: Option<&BTreeMap<String, String>>| keys.and_then(|keys| keys.get(key)).cloned();
        let (was, is) = (of(Some(before.1)), of(is));
        if was != is && (key != "size" || is != of(defined)) {
            let text = match key {
                "size" => "the root disk grows for good; change its size in the definition too",
                _ => "the root disk stays while the guest runs",
            };
            return Err(Error::unsupported(text).at(field(key)));
        }
    }
    Ok(())
}

fn is_root(keys: &BTreeMap<String, String>) -> bool {
    let is = |key: &str, value: &str| keys.get(key).is_some_and(|v| v == value);
    is("type", "disk") && is("path", "/")
}

/// What a guest has been told, and what it is to be told.
pub(super) type Differs = (GuestSpec, GuestSpec);

impl EngineInner {
    /// Asks of what a run is to have, as such, what is asked of any definition; `tx` holds as long as that is so.
    ///
    /// # Errors
    /// Invalid, not found, conflict, quota and forbidden, naming the device or key.
    pub(super) fn check_run(
        &self,
        records: &Records,
        tx: &mut Tx,
        definition: &Instance,
        run: &AppliedSpec,
        was: &AppliedSpec,
    ) -> Result<()> {
        keys::check(&run.config, Some(definition.kind))?;
        let parsed = expand::parse_devices(&run.devices)?;
        demand_root(&run.devices, &was.devices, &records.expanded(definition).1, &parsed.root.0)?;
        let identities = run.known_by(&definition.identities);
        let flat = as_run(definition, run.config.clone(), run.devices.clone(), identities);
        admit(records, tx, flat.project, &Planned { instance: Some(&flat), ..Default::default() })?;
        check_disks(records, tx, &flat, &disks_of_change(&parsed, &was.devices, &run.devices))?;
        self.check_nics(records, tx, &flat, &parsed)?;
        self.demand_own_label(records, &flat, "devices")
    }

    /// Decides what a running guest gets of a change of its instance, which is `instance` then: its identities become those of
    /// all that it is to have, defined or running. Answers what a host gets to give it that, and before that to take it back.
    pub(super) fn plan_run(
        &self,
        records: &Records,
        (context, project): (&Context, &Project),
        running: &Running<'_>,
        instance: &mut Instance,
        wanted: &Wanted<'_>,
    ) -> Result<(Option<RunPlan>, Option<Differs>)> {
        let Running { runtime, before, defined, after } = *running;
        let (generation, domain_id) = (runtime.generation, runtime.domain_id.unwrap_or(0));
        let spec = |of: &Instance| -> Result<GuestSpec> {
            Ok(GuestSpec { generation, ..self.guest_spec(records, of, domain_id)? })
        };
        let Some(has) = runtime.applied.as_ref() else {
            // Of a run that nobody ever told: it follows its record.
            return match wanted.live {
                Live::Follow => Ok((None, Some((spec(before)?, spec(instance)?)))),
                Live::Leave => Ok((None, None)),
                Live::Given(_) => Err(Error::conflict("it is not known yet what the guest has; try again")),
            };
        };
        let known = has.known_by(&before.identities);
        let redefined = changed(defined, after);
        let (config, devices, held) = match wanted.live {
            Live::Leave => (
                has.config.clone(),
                has.devices.clone(),
                has.held.union(&redefined).cloned().collect::<BTreeSet<String>>(),
            ),
            Live::Follow => {
                let apart = has.held.difference(&redefined);
                let held: BTreeSet<String> =
                    apart.filter(|key| !maximum::goes_with(key, &redefined)).cloned().collect();
                let (config, devices) =
                    AppliedSpec { held: held.clone(), ..has.clone() }.over(after.0, after.1);
                (config, devices, held)
            }
            Live::Given(run) => {
                if (&run.was.config, &run.was.devices) != (&has.config, &has.devices) {
                    return Err(Error::precondition_failed(format!(
                        "what instance {:?} runs with has changed since it was read; read it again",
                        &*instance.name
                    )));
                }
                demand_drives(context, &has.devices, &run.devices)?;
                super::create::check_devices(&run.devices)?;
                records.demand_seen_acls(context, project, &run.devices)?;
                let given: Config = run
                    .config
                    .iter()
                    .filter(|(_, v)| !v.is_empty())
                    .map(|(k, v)| (k.clone(), v.clone()))
                    .collect();
                let moved = changed((&has.config, &has.devices), (&given, &run.devices));
                let held = has.held.iter().chain(&redefined).chain(&moved).cloned().collect();
                (AppliedSpec::with_platform(&given, after.0), run.devices.clone(), held)
            }
        };
        let parsed = expand::parse_devices(&devices)?;
        let same = |name: &str| devices.get(name) == after.1.get(name);
        // What is as it is defined is known by what it is defined as; what is not, by what it is known by now.
        let mut identities: BTreeMap<String, DeviceIdentity> = instance.identities.clone();
        for (name, identity) in known.iter().filter(|(name, _)| devices.contains_key(*name) && !same(name)) {
            identities.insert(name.clone(), identity.clone());
        }
        let mut flat = as_run(instance, config.clone(), devices.clone(), identities);
        place_disks(self, &mut flat, &parsed, wanted.slots);
        let (old, hardware) = (&flat.identities, instance.hardware.as_ref());
        flat.identities =
            self.assign_beside(records, (old, &instance.identities), &parsed, hardware, instance.root);
        for (name, identity) in &flat.identities {
            instance.identities.entry(name.clone()).or_insert_with(|| identity.clone());
        }
        let own = flat.identities.iter().filter(|(name, _)| held.contains(&format!("devices.{name}")));
        let new = AppliedSpec {
            held: held.clone(),
            identities: own.map(|(name, identity)| (name.clone(), identity.clone())).collect(),
            ..AppliedSpec::of_start(&config, &devices)
        };
        let given = matches!(wanted.live, Live::Given(_));
        let specs = match wanted.live {
            Live::Leave => None,
            Live::Follow => {
                let flat_before =
                    as_run(before, defined.0.clone(), defined.1.clone(), before.identities.clone());
                Some((spec(&over_flat(Some(has), &flat_before, &before.identities))?, spec(&flat)?))
            }
            Live::Given(_) => {
                let config = AppliedSpec::with_platform(&has.config, defined.0);
                Some((spec(&as_run(before, config, has.devices.clone(), known))?, spec(&flat)?))
            }
        };
        Ok((Some(RunPlan { generation, wanted: new, given, held: has.held.clone() }), specs))
    }
}
