//! Passphrases of encrypted disks that were handed over for calls to come, in memory only: each is gone when its call has ended, and
//! after a while in any case.

use crate::RealAgent;
use karst_agent::{KeyOwner, KeysHand};
use karst_env::{Mutex, SharedEnv};
use karst_model::{
    Error, InstanceId, Result, VolumeId,
    device::DiskIo,
    encryption::{Encryption, Passphrase, Passphrases},
};
use karst_storage::Container;
use std::{collections::BTreeMap, time::Duration};

/// For how long they are held without their call: as the protocol says.
const HELD: Duration = Duration::from_secs(600);
/// For how many calls there may be some, and how many bytes of them together.
const OWNERS: usize = 1024;
const BYTES: usize = 16 << 20;

/// Passphrases that are held.
pub(crate) struct Keys {
    env: SharedEnv,
    held: Mutex<BTreeMap<KeyOwner, (Duration, Passphrases)>>,
}

/// Forgets those of an owner when it is dropped: the call that they were for has ended.
pub(crate) struct Given<'a> {
    keys: &'a Keys,
    of: KeyOwner,
}

fn is_held(now: Duration, since: Duration) -> bool {
    now.saturating_sub(since) < HELD
}

impl Drop for Given<'_> {
    fn drop(&mut self) {
        self.keys.held.lock().remove(&self.of);
    }
}

impl Keys {
    pub fn new(env: SharedEnv) -> Self {
        Self { env, held: Mutex::default() }
    }

    /// Takes some, in the place of those of the same owner.
    pub fn hand(&self, request: KeysHand) -> Result<()> {
        self.hand_at(self.env.monotonic(), request)
    }

    fn hand_at(&self, now: Duration, request: KeysHand) -> Result<()> {
        let mut held = self.held.lock();
        held.retain(|_, (since, _)| is_held(now, *since));
        if held.len() >= OWNERS && !held.contains_key(&request.of) {
            return Err(Error::quota(format!("passphrases are held for {OWNERS} calls already; try again")));
        }
        let length = |keys: &Passphrases| keys.values().map(|k| k.text().len()).sum::<usize>();
        let others = held.iter().filter(|(of, _)| **of != request.of);
        if others.map(|(_, (_, keys))| length(keys)).sum::<usize>() + length(&request.keys) > BYTES {
            return Err(Error::quota(format!("passphrases of {BYTES} bytes are held already; try again")));
        }
        held.insert(request.of, (now, request.keys));
        Ok(())
    }

    /// Those of this owner go when what is answered goes.
    pub fn until_then(&self, of: KeyOwner) -> Given<'_> {
        Given { keys: self, of }
    }

    /// That of a guest's disk, where it has come: what a running guest has open needs none.
    pub fn of_disk(&self, instance: InstanceId, io: &DiskIo) -> Option<Passphrase> {
        self.of_guest(instance, io.secret?)
    }

    /// That of a secret, for a guest.
    pub fn of_guest(&self, instance: InstanceId, secret: uuid::Uuid) -> Option<Passphrase> {
        self.of_at(self.env.monotonic(), KeyOwner::Guest(instance), |keys| keys.get(&secret))
    }

    /// One of an owner's, where it is held still: what nobody came for may be there for longer than it is given.
    fn of_at(
        &self,
        now: Duration,
        of: KeyOwner,
        which: impl FnOnce(&Passphrases) -> Option<&Passphrase>,
    ) -> Option<Passphrase> {
        let held = self.held.lock();
        let (_, keys) = held.get(&of).filter(|(since, _)| is_held(now, *since))?;
        which(keys).cloned()
    }

    fn of_volume(&self, volume: VolumeId) -> Result<Passphrase> {
        let one = self.of_at(self.env.monotonic(), KeyOwner::Volume(volume), |keys| keys.values().next());
        one.ok_or_else(|| {
            Error::conflict("the passphrase of the encrypted volume was not handed over; try again")
        })
    }
}

impl RealAgent {
    /// An empty container with the passphrase that was handed over for a volume.
    pub(crate) async fn container(&self, volume: VolumeId, encryption: Encryption) -> Result<Container> {
        let passphrase = self.keys.of_volume(volume)?;
        Container::make(&self.launcher, &self.registry.path("staging"), encryption, &passphrase).await
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use uuid::Uuid;

    #[test]
    fn passphrases_are_held_for_their_call_and_not_for_ever() {
        let keys = Keys::new(karst_env::RealEnv::shared());
        let (guest, secret) = (InstanceId(Uuid::from_u128(1)), Uuid::from_u128(2));
        let io = DiskIo { secret: Some(secret), ..DiskIo::default() };
        let one = |text: &str| {
            let keys = Passphrases::from([(secret, Passphrase::of(text.as_bytes()).unwrap())]);
            KeysHand { of: KeyOwner::Guest(guest), keys }
        };
        assert!(keys.of_disk(guest, &io).is_none());
        keys.hand(one("first")).unwrap();
        keys.hand(one("second")).unwrap();
        assert_eq!(keys.of_disk(guest, &io).unwrap().text(), "second");
        assert!(keys.of_disk(InstanceId(Uuid::from_u128(3)), &io).is_none(), "nobody else has it");
        assert!(keys.of_disk(guest, &DiskIo::default()).is_none());
        assert!(keys.of_volume(VolumeId(guest.0)).is_err(), "nor a volume");
        drop(keys.until_then(KeyOwner::Guest(guest)));
        assert!(keys.of_disk(guest, &io).is_none(), "its call has ended");

        let none = || KeysHand { of: KeyOwner::Volume(VolumeId(Uuid::nil())), keys: Passphrases::new() };
        let of_guest = |now| keys.of_at(now, KeyOwner::Guest(guest), |keys| keys.get(&secret));
        let last = HELD - Duration::from_secs(1);
        keys.hand_at(Duration::ZERO, one("old")).unwrap();
        assert!(of_guest(last).is_some());
        assert!(of_guest(HELD).is_none(), "it is given for its time only, whether it is gone or not");
        keys.hand_at(last, none()).unwrap();
        assert!(keys.held.lock().contains_key(&KeyOwner::Guest(guest)));
        keys.hand_at(HELD, none()).unwrap();
        assert!(!keys.held.lock().contains_key(&KeyOwner::Guest(guest)), "no call came for it");
        assert!(keys.of_disk(guest, &io).is_none());
        assert!(keys.of_volume(VolumeId(Uuid::nil())).is_err());
    }
}
