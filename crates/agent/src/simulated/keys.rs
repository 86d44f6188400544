//! Passphrases of encrypted disks on a simulated host: in memory until the call that they are for.

use super::{SimulatedAgent, state::State};
use crate::keys::{KeyOwner, KeysHand};
use karst_model::{Error, Result, VolumeId, spec::GuestSpec};
use std::collections::BTreeSet;
use uuid::Uuid;

/// What an encrypted disk begins with.
pub(super) const MAGIC: &[u8] = b"LUKS\xba\xbe\x00\x01";

impl State {
    /// Takes the one passphrase that was handed over for making a volume.
    pub(super) fn take_volume_key(&mut self, volume: VolumeId) -> Result<()> {
        match self.keys.remove(&KeyOwner::Volume(volume)) {
            Some(keys) if keys.len() == 1 => Ok(()),
            _ => {
                Err(Error::conflict("the passphrase of the encrypted volume was not handed over; try again"))
            }
        }
    }

    /// Takes those of a guest, and demands that all that open what it did not have before are among them.
    pub(super) fn take_guest_keys(&mut self, spec: &GuestSpec, before: Option<&GuestSpec>) -> Result<()> {
        let keys = self.keys.remove(&KeyOwner::Guest(spec.instance)).unwrap_or_default();
        let had: BTreeSet<&str> =
            before.into_iter().flat_map(|b| b.disks.iter().map(|d| d.slot.as_str())).collect();
        let root = spec.root.io.secret.filter(|_| before.is_none()).map(|s| (s, spec.root.name.as_str()));
        let disks = spec.disks.iter().filter(|d| !d.ejected && !had.contains(d.slot.as_str()));
        let disks = disks.filter_map(|d| Some((d.io.secret?, d.name.as_str())));
        let tpm = spec.machine.as_ref().filter(|_| before.is_none()).and_then(|m| m.tpm_secret);
        let tpm = tpm.map(|s| (s, "tpm"));
        match root.into_iter().chain(tpm).chain(disks).find(|(secret, _)| !keys.contains_key(secret)) {
            None => Ok(()),
            Some((secret, name)) => Err(no_key(secret, name)),
        }
    }
}

fn no_key(secret: Uuid, name: &str) -> Error {
    let text = format!("the passphrase of the encrypted disk {name:?} (secret {secret}) was not handed over");
    Error::conflict(text).at(format!("devices.{name}.encryption.secret"))
}

impl SimulatedAgent {
    pub(super) fn hand_keys(&self, request: KeysHand) {
        self.settled().keys.insert(request.of, request.keys);
    }

    /// What passphrases are held for; none, as long as no call that they are for is to come.
    pub fn held_keys(&self) -> Vec<KeyOwner> {
        self.lock().keys.keys().copied().collect()
    }
}
