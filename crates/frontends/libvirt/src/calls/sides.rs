//! The two sides of a domain: its definition, which the next start takes, and its run, which is what its guest has now.
//!
//! A call changes the one that its flags name, or both, each by itself: what is changed live is gone when the guest stops, what
//! is changed in the definition waits for the next start. Without a flag a call is about what is there: the run of a guest that
//! runs, else the definition.

use super::{define::of_definition, domain::is_running};
use crate::{
    error::{Code, VirError},
    session::Call,
    xml::machine::spec,
};
use karst_engine::{
    InstanceView,
    compute::{
        run::{MachineChange, RunChange},
        update::UpdateInstance,
    },
};
use karst_model::{Config, device::Devices, instance::DeviceIdentity};
use std::collections::BTreeMap;

/// `VIR_DOMAIN_AFFECT_*`
pub(super) const LIVE: u32 = 1;
pub(super) const CONFIG: u32 = 2;

/// Is a question about the run?
pub(super) fn live(view: &InstanceView, flags: u32) -> Result<bool, VirError> {
    let running = is_running(view);
    match (flags & LIVE != 0, flags & CONFIG != 0) {
        (true, _) if !running => Err(VirError::state("domain is not running")),
        (false, true) => Ok(false),
        _ => Ok(running),
    }
}

/// What a call changes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Affects {
    pub run: bool,
    pub definition: bool,
}

/// What the flags of a call mean.
///
/// # Errors
/// Operation invalid: for the run of a domain that does not run, and the definition of one that has none.
pub(super) fn affects(view: &InstanceView, flags: u32) -> Result<Affects, VirError> {
    affected(is_running(view), view.instance.ephemeral, flags)
}

fn affected(running: bool, transient: bool, flags: u32) -> Result<Affects, VirError> {
    match (flags & LIVE != 0, flags & CONFIG != 0) {
        (true, _) if !running => Err(VirError::state("domain is not running")),
        (_, true) if transient => {
            Err(VirError::state("transient domains do not have any persistent configuration"))
        }
        (false, false) => Ok(Affects { run: running, definition: !running }),
        (run, definition) => Ok(Affects { run, definition }),
    }
}

/// One side of a domain.
pub(super) struct Side<'a> {
    /// Its own keys; of a run all that it has.
    pub config: &'a Config,
    /// Its own devices; of a run all that it has.
    pub devices: &'a Devices,
    /// Keys with those of profiles.
    pub all_config: &'a Config,
    /// Devices with those of profiles.
    pub all_devices: &'a Devices,
    /// What its devices are known by.
    pub identities: BTreeMap<String, DeviceIdentity>,
    /// It is the run.
    pub run: bool,
}

/// The definition of a domain.
pub(super) fn definition(view: &InstanceView) -> Side<'_> {
    Side {
        config: &view.instance.config,
        devices: &view.instance.devices,
        all_config: &view.expanded_config,
        all_devices: &view.expanded_devices,
        identities: view.instance.identities.clone(),
        run: false,
    }
}

/// The run of a domain that runs.
///
/// # Errors
/// Operation invalid, when it does not.
pub(super) fn run(view: &InstanceView) -> Result<Side<'_>, VirError> {
    let has = view.run().filter(|_| is_running(view));
    let has = has.ok_or_else(|| VirError::state("domain is not running"))?;
    Ok(Side {
        config: &has.config,
        devices: &has.devices,
        all_config: &has.config,
        all_devices: &has.devices,
        identities: view.run_identities(),
        run: true,
    })
}

/// The side that a question is about.
///
/// # Errors
/// Operation invalid, when it is about the run of a domain that does not run.
pub(super) fn asked(view: &InstanceView, flags: u32) -> Result<Side<'_>, VirError> {
    // What a guest has of which no start is recorded is what is defined.
    match live(view, flags)? && view.run().is_some() {
        true => run(view),
        false => Ok(definition(view)),
    }
}

/// A change of either side.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(super) struct Edits {
    pub run: Option<spec::Updated>,
    pub definition: Option<spec::Updated>,
}

/// The change of each side that is affected.
///
/// # Errors
/// Those of the edit, of either side; operation invalid when the run is not there.
pub(super) fn edits(
    view: &InstanceView,
    affects: Affects,
    edit: impl Fn(&Side<'_>) -> Result<spec::Updated, VirError>,
) -> Result<Edits, VirError> {
    let definition = affects.definition.then(|| edit(&definition(view))).transpose()?;
    let run = affects.run.then(|| edit(&run(view)?)).transpose()?;
    Ok(Edits { run, definition })
}

fn failed(text: impl Into<String>) -> VirError {
    VirError::new(Code::OperationFailed, crate::error::Part::Qemu, text)
}

/// Brings a change to the engine; `touched` are the keys, and `devices.NAME`, that the run must have taken.
///
/// # Errors
/// Those of the engine; operation failed, when the guest did not take something while it runs.
pub(super) async fn write(
    call: &Call,
    view: &InstanceView,
    edits: Edits,
    touched: &[String],
) -> Result<(), VirError> {
    let instance = &view.instance;
    let mut slots = BTreeMap::new();
    let mut request = None;
    if let Some(new) = edits.definition {
        slots.extend(new.slots);
        request = Some(UpdateInstance {
            description: instance.description.clone(),
            ephemeral: instance.ephemeral,
            config: new.config,
            devices: new.devices,
            profiles: view.profiles.iter().map(|p| p.name.to_string()).collect(),
            if_version: Some(instance.spec_version),
        });
    }
    let defined = request.is_some();
    let mut wanted = None;
    if let Some(new) = edits.run {
        let was = view.run().ok_or_else(|| VirError::state("domain is not running"))?.clone();
        slots.extend(new.slots);
        wanted = Some(RunChange { was, config: new.config, devices: new.devices });
    }
    let session = &call.session;
    let (engine, context, project) = (&session.front.engine, &session.context, &view.project.name);
    let change = MachineChange { definition: request, run: wanted.clone(), slots };
    let changed = engine.machine_change(context, project, &instance.name, change).await;
    if let Some(e) = changed.map_err(of_definition)?.ended().await.error.clone() {
        return Err(of_definition(e));
    }
    let Some(wanted) = wanted else { return Ok(()) };
    let now = engine.instance(context, project, &instance.name)?;
    // It may have ended since.
    let Some(has) = now.run() else { return Ok(()) };
    let left = |key: &&String| match key.strip_prefix("devices.") {
        Some(device) => has.devices.get(device) != wanted.devices.get(device),
        None => has.config.get(*key) != wanted.config.get(*key).filter(|value| !value.is_empty()),
    };
    match touched.iter().find(left) {
        None => Ok(()),
        Some(key) if defined => {
            Err(failed(format!("{key} does not change while the guest runs; it does at its next start")))
        }
        Some(key) => Err(failed(format!(
            "{key} does not change while the guest runs; change it for its next start (--config)"
        ))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flags_say_which_side_changes() {
        let of = |running, transient, flags| {
            affected(running, transient, flags).map(|a| (a.run, a.definition)).map_err(|e| e.text)
        };
        assert_eq!(of(true, false, 0), Ok((true, false)));
        assert_eq!(of(false, false, 0), Ok((false, true)));
        assert_eq!(of(true, false, LIVE), Ok((true, false)));
        assert_eq!(of(true, false, CONFIG), Ok((false, true)));
        assert_eq!(of(false, false, CONFIG), Ok((false, true)));
        assert_eq!(of(true, false, LIVE | CONFIG), Ok((true, true)));
        assert!(of(false, false, LIVE).unwrap_err().contains("not running"));
        assert!(of(false, false, LIVE | CONFIG).unwrap_err().contains("not running"));
        assert_eq!(of(true, true, LIVE), Ok((true, false)));
        assert!(of(true, true, CONFIG).unwrap_err().contains("transient"));
    }
}
