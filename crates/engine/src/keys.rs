//! Passphrases of encrypted disks: found among the secrets of projects when a host is about to need them, and handed to it in a call of
//! their own. No plan of a saga and no specification of a guest has one; those name secrets.
//!
//! A device's secret is one of its instance's project. What a volume says may also be one of the project that the volume counts for,
//! which is another where projects share their volumes.

use crate::{EngineInner, Records, saga::StepContext};
use karst_agent::{CallContext, HostAgent, KeyOwner, KeysHand};
use karst_model::{
    Config, Error, ErrorKind, InstanceId, ProjectId, Result, VolumeId,
    device::DiskIo,
    encryption::{Encryption, Passphrase, Passphrases, SECRET},
    instance::{Instance, InstanceKind},
    spec::GuestSpec,
    storage::Volume,
};
use std::{collections::BTreeMap, time::Duration};
use uuid::Uuid;

const CALL: Duration = Duration::from_secs(30);

/// Is what a device shows of a volume a container?
pub(crate) fn is_encrypted(volume: &Volume, io: &DiskIo) -> bool {
    io.secret.is_some() || volume.encryption().is_some()
}

/// How a disk is driven, with the secret of its volume where the device says none.
pub(crate) fn driven(io: DiskIo, volume: Option<&Volume>) -> DiskIo {
    let of_volume = || volume.and_then(|v| v.encryption()).map(|(secret, _)| secret);
    DiskIo { secret: io.secret.or_else(of_volume), ..io }
}

/// Refuses to take the root of an instance for that of another one, or for an image: an instance's own root is not encrypted, and so what
/// came out of it would open nowhere.
///
/// # Errors
/// Unsupported, with what to do.
pub(crate) fn demand_open_root(records: &Records, instance: &Instance) -> Result<()> {
    let devices = records.expanded(instance).1;
    let is_root = |keys: &Config| keys.get("path").is_some_and(|p| p == "/");
    let said = devices.values().any(|keys| is_root(keys) && keys.get(SECRET).is_some_and(|s| !s.is_empty()));
    match said || records.volumes.get(&instance.root).is_some_and(|v| v.encryption().is_some()) {
        false => Ok(()),
        true => Err(Error::unsupported(format!(
            "the root of instance {:?} is an encrypted volume, and what is made of instances has a root of its own; copy or export that \
             volume, and make an instance with it",
            &*instance.name
        ))),
    }
}

/// What a volume is made with it keeps; the secret may be another one that has the same passphrase.
///
/// # Errors
/// Invalid, naming the key.
pub(crate) fn demand_same(before: &Config, after: &Config) -> Result<()> {
    let (was, is) = (Encryption::of(before)?, Encryption::of(after)?);
    match (was, is) {
        (None, None) => Ok(()),
        (Some((_, was)), Some((_, is))) if was == is => Ok(()),
        (Some(_), Some(_)) => Err(Error::invalid(
            "config.encryption.cipher",
            "what a volume is encrypted with is chosen when it is made; make another one, and copy into it inside a machine",
        )),
        _ => Err(Error::invalid(
            format!("config.{SECRET}"),
            "a volume is encrypted from the beginning or not at all, and so are its copies; make another one, and copy into it inside \
             a machine",
        )),
    }
}

/// Where the secret of a guest's disk is looked for.
struct Wanted {
    device: String,
    projects: Vec<ProjectId>,
}

impl EngineInner {
    /// The passphrase that a secret of one of these projects has; of several the first that has it decides.
    ///
    /// # Errors
    /// Not found, naming it, when there is none or it has no value; invalid when it is no passphrase; unavailable without the key
    /// that it was sealed with.
    pub(crate) fn passphrase(&self, projects: &[ProjectId], uuid: Uuid) -> Result<Passphrase> {
        for project in projects {
            if let Some(value) = self.secret_inside(*project, uuid)? {
                return Passphrase::of(value.bytes()).map_err(|e| {
                    let text = format!("secret {uuid} opens no disk: {}", e.message);
                    Error { message: text, ..e }
                });
            }
        }
        Err(Error::not_found(format!(
            "no secret with matching uuid '{uuid}', which opens it, is in the project; define it, and set its value to the passphrase"
        )))
    }

    /// The secrets that open what a guest has.
    fn wanted(&self, project: ProjectId, spec: &GuestSpec) -> BTreeMap<Uuid, Wanted> {
        let mut all: BTreeMap<Uuid, Wanted> = BTreeMap::new();
        if spec.kind != InstanceKind::VirtualMachine {
            return all;
        }
        let records = self.inventory.read();
        let mut add = |io: &DiskIo, device: &str, volume: Option<VolumeId>| {
            let Some(secret) = io.secret else { return };
            let one = all
                .entry(secret)
                .or_insert_with(|| Wanted { device: device.to_owned(), projects: vec![project] });
            let volume = volume.and_then(|id| records.volumes.get(&id));
            if let Some(volume) = volume.filter(|v| v.encryption().is_some_and(|(s, _)| s == secret))
                && !one.projects.contains(&volume.project)
            {
                one.projects.push(volume.project);
            }
        };
        let tpm = spec.machine.as_ref().and_then(|m| m.tpm_secret);
        add(&DiskIo { secret: tpm, ..DiskIo::default() }, "tpm", None);
        if !spec.root.detached {
            add(&spec.root.io, &spec.root.name, Some(spec.root.volume));
        }
        for disk in spec.disks.iter().filter(|d| !d.ejected) {
            add(&disk.io, &disk.name, disk.volume().map(|(_, volume)| volume));
        }
        all
    }
}

/// What a host needs to make an encrypted volume.
///
/// # Errors
/// Those of [`EngineInner::passphrase`] and of the host.
pub(crate) async fn hand_for_volume(
    cx: &StepContext,
    agent: &dyn HostAgent,
    projects: &[ProjectId],
    secret: Uuid,
    volume: VolumeId,
) -> Result<()> {
    let passphrase = cx.engine.passphrase(projects, secret).map_err(|e| e.at(format!("config.{SECRET}")))?;
    let keys = Passphrases::from([(secret, passphrase)]);
    agent.keys_hand(&CallContext::read(CALL), KeysHand { of: KeyOwner::Volume(volume), keys }).await
}

/// What a host needs to start a guest.
///
/// # Errors
/// Those of [`EngineInner::passphrase`], naming the disk, and of the host.
pub(crate) async fn hand_for_start(
    cx: &StepContext,
    agent: &dyn HostAgent,
    project: ProjectId,
    spec: &GuestSpec,
) -> Result<()> {
    hand(cx, agent, project, spec, true).await
}

/// What a host may need to give a running guest what it is to have. What it has open already needs nothing, so that a secret that is
/// gone keeps nobody from changing anything else; a disk that comes is refused by the host then.
///
/// # Errors
/// Those of the host.
pub(crate) async fn hand_for_change(
    cx: &StepContext,
    agent: &dyn HostAgent,
    project: ProjectId,
    spec: &GuestSpec,
) -> Result<()> {
    hand(cx, agent, project, spec, false).await
}

async fn hand(
    cx: &StepContext,
    agent: &dyn HostAgent,
    project: ProjectId,
    spec: &GuestSpec,
    demanded: bool,
) -> Result<()> {
    let mut keys = Passphrases::new();
    for (secret, Wanted { device, projects }) in cx.engine.wanted(project, spec) {
        match cx.engine.passphrase(&projects, secret) {
            Ok(passphrase) => drop(keys.insert(secret, passphrase)),
            Err(e) if demanded => {
                let text = format!("what encrypts device {device:?} cannot be had: {}", e.message);
                // What is missing is not what was asked for.
                let kind = if e.is(ErrorKind::NotFound) { ErrorKind::Conflict } else { e.kind };
                return Err(Error { kind, message: text, ..e }.at(format!("devices.{device}.{SECRET}")));
            }
            Err(e) => {
                tracing::debug!(instance = %spec.instance, %device, error = %e, "a disk that came now could not be opened");
            }
        }
    }
    if keys.is_empty() {
        return Ok(());
    }
    agent.keys_hand(&CallContext::read(CALL), KeysHand { of: KeyOwner::Guest(spec.instance), keys }).await
}

/// The project of an instance that is there.
///
/// # Errors
/// Not found.
pub(crate) fn project_of(cx: &StepContext, instance: InstanceId) -> Result<ProjectId> {
    Ok(cx.engine.instance_row(instance)?.project)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_volume_is_encrypted_with_stays() {
        let config = |keys: &[(&str, &str)]| -> Config {
            keys.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect()
        };
        let (one, two) = (Uuid::from_u128(1).to_string(), Uuid::from_u128(2).to_string());
        let plain = config(&[("size", "1GiB")]);
        let first = config(&[(SECRET, &one)]);
        let second = config(&[(SECRET, &two)]);
        let cbc = config(&[(SECRET, &one), ("encryption.cipher", "aes-256-cbc")]);
        demand_same(&plain, &plain).unwrap();
        demand_same(&first, &second).expect("another secret may have the same passphrase");
        for (before, after) in [(&plain, &first), (&first, &plain), (&first, &cbc), (&cbc, &first)] {
            let e = demand_same(before, after).unwrap_err();
            assert!(e.is(ErrorKind::Invalid) && e.field.is_some(), "{e}");
        }
    }
}
