//! Live against configured, over the records.

use crate::{Engine, EngineInner, Records, Row, context::Context, db::Tx};
use karst_model::{
    Config, InstanceId, Result,
    access::Permission,
    applied::{AppliedSpec, Pending},
    device::Devices,
    guest::Applied,
    instance::{Generation, Instance, Runtime, RuntimeState},
};

impl Engine {
    /// Changes of a running instance that wait for its next start; none when it does not run.
    ///
    /// # Errors
    /// Not found, forbidden.
    pub fn instance_pending(&self, context: &Context, project: &str, name: &str) -> Result<Vec<Pending>> {
        let project = self.project(context, project, Permission::ProjectView)?;
        let records = self.inner().inventory.read();
        let row = records.instance(&project, name)?;
        Ok(pending(&records, row))
    }
}

/// The same over the records.
pub(crate) fn pending(records: &Records, instance: &Instance) -> Vec<Pending> {
    let runtime = records.runtimes.get(&instance.id);
    let Some(applied) = runtime.and_then(|r| r.applied.as_ref()) else { return vec![] };
    let (config, devices) = records.expanded(instance);
    applied.pending(&config, &devices)
}

impl EngineInner {
    /// What a guest that a host saw has: all of its record when it was just started, else what was kept of it.
    pub(crate) fn applied_of(
        &self,
        records: &Records,
        id: InstanceId,
        generation: Generation,
        state: RuntimeState,
    ) -> Option<AppliedSpec> {
        if state.is_down() {
            return None;
        }
        let old = records.runtimes.get(&id).filter(|r| r.generation == generation);
        if let Some(applied) = old.and_then(|r| r.applied.clone()) {
            return Some(applied);
        }
        let (config, devices) = records.expanded(records.instances.get(&id)?);
        Some(AppliedSpec::of_start(&config, &devices))
    }

    /// Notes what a change of a running instance did. `instance` is the record as it will be, `config` and `devices` its
    /// expanded form, `wanted` what the guest was to have, `applied` what became of that on its host; `None`: nobody asked the
    /// host, and what is held has changed only.
    pub(crate) fn note_applied(
        &self,
        tx: &mut Tx,
        runtime: &Row<Runtime>,
        instance: &Instance,
        (config, devices): (&Config, &Devices),
        wanted: &AppliedSpec,
        applied: Option<&Applied>,
    ) {
        let mut new = runtime.value.clone();
        let before = new.applied.take().unwrap_or_default();
        let after = match applied {
            Some(applied) => before.after(&wanted.config, &wanted.devices, &applied.pending),
            None => before,
        };
        let (held, identities) = (wanted.held.clone(), wanted.identities.clone());
        let after = AppliedSpec { held, identities, ..after }.settled(config, devices, &instance.identities);
        if applied.is_some() && after.pending(config, devices).is_empty() {
            new.applied_spec_version = instance.spec_version;
        }
        new.applied = Some(after);
        if new != runtime.value {
            new.seq += 1;
            tx.replace(runtime, &new);
        }
    }

    /// Notes what a live change of a profile did to one of its users, whose expanded form is `as_is`.
    pub(crate) async fn note_applied_profile(
        &self,
        id: InstanceId,
        generation: Generation,
        as_is: (&Config, &Devices),
        applied: &Applied,
    ) -> Result<()> {
        self.transact(|records, tx| {
            let runtime = records.runtimes.get(&id).filter(|r| r.generation == generation);
            let (Some(runtime), Some(instance)) = (runtime, records.instances.get(&id)) else {
                return Ok(());
            };
            if let Some(has) = &runtime.applied {
                // A profile changes nothing of what is held, and whether the record says the same now is not decided yet.
                let (config, devices) = has.over(as_is.0, as_is.1);
                let after = has.after(&config, &devices, &applied.pending);
                let mut new = runtime.value.clone();
                if after.pending(as_is.0, as_is.1).is_empty() {
                    new.applied_spec_version = instance.spec_version;
                }
                new.applied = Some(after);
                new.seq += 1;
                if new != runtime.value {
                    tx.replace(runtime, &new);
                }
            }
            Ok(())
        })
        .await
    }
}
