//! What backups may take of this host. Their files lie in `DIR/host/backups`, beside the database: without bounds, whoever may
//! back up something could fill the file system, and nothing of anybody's could change any more.
//!
//! A backup does not begin where there is no room for any. While it is packed the room is looked at again and again, and no
//! file grows beyond what there was when its part began: so a few that are packed at once pass a bound by what they write
//! between two looks, which the reserve is large enough for.

use crate::{agent::blocking, staging::size};
use karst_env::SharedEnv;
use karst_model::{Error, Result, size::ByteSize};
use serde::{Deserialize, Deserializer};
use std::{os::unix::fs::MetadataExt, path::PathBuf, sync::Arc, time::Duration};

/// How often the room is looked at while something is packed.
const LOOK: Duration = Duration::from_millis(100);

/// What backups may take of this host: the table `backups` of `host-policy.toml`.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct BackupLimits {
    /// Backups.
    pub number: usize,
    /// Bytes of all together; what the file system has when absent.
    #[serde(deserialize_with = "some_size")]
    pub total: Option<ByteSize>,
    /// Bytes that the file system keeps free for others.
    #[serde(deserialize_with = "size")]
    pub reserve: ByteSize,
}

impl Default for BackupLimits {
    fn default() -> Self {
        Self { number: 10_000, total: None, reserve: ByteSize::mib(512) }
    }
}

fn some_size<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<ByteSize>, D::Error> {
    size(deserializer).map(Some)
}

/// The room that they have.
pub(crate) struct BackupRoom {
    directory: PathBuf,
    limits: BackupLimits,
}

fn over(text: String) -> Error {
    Error::quota(format!("{text}; delete some that nobody needs (backups in host-policy.toml)"))
}

impl BackupRoom {
    pub fn new(directory: PathBuf, limits: BackupLimits) -> Self {
        Self { directory, limits }
    }

    /// May one more begin? Blocks.
    ///
    /// # Errors
    /// Quota, naming the limit.
    pub fn begin(&self) -> Result<()> {
        let (number, _) = self.taken()?;
        if number >= self.limits.number {
            return Err(over(format!("this host keeps {} backups, which it has", self.limits.number)));
        }
        self.left().map(drop)
    }

    /// Bytes that may still be written, at least one. Blocks.
    ///
    /// # Errors
    /// Quota, naming the limit.
    pub fn left(&self) -> Result<u64> {
        let of_all = match self.limits.total {
            None => u64::MAX,
            Some(total) => total.bytes().saturating_sub(self.taken()?.1),
        };
        if of_all == 0 {
            let total = self.limits.total.unwrap_or_default();
            return Err(over(format!("backups on this host may take {total} together, which they do")));
        }
        let space = rustix::fs::statvfs(&self.directory).map_err(std::io::Error::from)?;
        let free = space.f_bavail.saturating_mul(space.f_frsize);
        let of_disk = free.saturating_sub(self.limits.reserve.bytes());
        if of_disk == 0 {
            return Err(over(format!(
                "the host's disk has no more than the {} free that backups must leave",
                self.limits.reserve
            )));
        }
        Ok(of_all.min(of_disk))
    }

    /// Waits until there is no room any more, and says why.
    pub async fn gone(self: Arc<Self>, env: SharedEnv) -> Error {
        loop {
            env.sleep(LOOK).await;
            let room = self.clone();
            if let Err(e) = blocking(move || room.left()).await {
                return e;
            }
        }
    }

    /// Files, and the bytes that they have on disk.
    fn taken(&self) -> Result<(usize, u64)> {
        let mut all = (0, 0u64);
        for entry in std::fs::read_dir(&self.directory)? {
            match entry?.metadata() {
                Ok(found) => all = (all.0 + 1, all.1.saturating_add(found.blocks() * 512)),
                // It has been deleted meanwhile.
                Err(e) if e.kind() == std::io::ErrorKind::NotFound => {}
                Err(e) => return Err(e.into()),
            }
        }
        Ok(all)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use karst_env::RealEnv;
    use karst_model::ErrorKind;

    fn room(limits: BackupLimits) -> (tempfile::TempDir, Arc<BackupRoom>) {
        let dir = tempfile::tempdir().unwrap();
        let room = Arc::new(BackupRoom::new(dir.path().to_owned(), limits));
        (dir, room)
    }

    fn none() -> BackupLimits {
        BackupLimits { reserve: ByteSize(0), ..Default::default() }
    }

    fn refused(outcome: Result<()>, words: &str) {
        let e = outcome.unwrap_err();
        assert!(e.is(ErrorKind::Quota) && e.message.contains(words), "{e}");
        assert!(e.message.contains("backups in host-policy.toml"), "{e}");
    }

    #[test]
    fn the_table_is_read_as_written() {
        let policy: crate::HostPolicy =
            toml::from_str("[backups]\nnumber = 3\ntotal = \"2GiB\"\nreserve = \"1GiB\"\n").unwrap();
        let expected = BackupLimits { number: 3, total: Some(ByteSize::gib(2)), reserve: ByteSize::gib(1) };
        assert_eq!(policy.backups, expected);
        let policy: crate::HostPolicy = toml::from_str("[backups]\nnumber = 3\n").unwrap();
        assert_eq!(policy.backups, BackupLimits { number: 3, ..Default::default() });
        assert!(toml::from_str::<crate::HostPolicy>("[backups]\ntotal = \"2 horses\"\n").is_err());
        assert!(toml::from_str::<crate::HostPolicy>("[backups]\ntotals = \"2GiB\"\n").is_err());
    }

    #[test]
    fn a_backup_begins_where_there_is_room_for_it() {
        let (dir, room) = room(BackupLimits { number: 2, total: Some(ByteSize::mib(1)), ..none() });
        room.begin().unwrap();
        assert!(room.left().unwrap() <= 1 << 20);
        std::fs::write(dir.path().join("one"), vec![1; 512 << 10]).unwrap();
        let left = room.left().unwrap();
        assert!((1..=512 << 10).contains(&left), "{left}");
        std::fs::write(dir.path().join("two"), "x").unwrap();
        refused(room.begin(), "2 backups");
        std::fs::write(dir.path().join("two"), vec![1; 512 << 10]).unwrap();
        refused(room.left().map(drop), "may take 1MiB together");
        std::fs::remove_file(dir.path().join("two")).unwrap();
        room.begin().unwrap();
    }

    #[test]
    fn the_reserve_is_left_to_the_database() {
        let (_dir, full) = room(BackupLimits { reserve: ByteSize(u64::MAX >> 1), ..none() });
        refused(full.begin(), "must leave");
        let (_dir, free) = room(none());
        free.begin().unwrap();
    }

    #[tokio::test]
    async fn what_is_packed_is_told_when_the_room_is_gone() {
        let (dir, room) = room(BackupLimits { total: Some(ByteSize::mib(1)), ..none() });
        let waiting = tokio::spawn(room.clone().gone(RealEnv::shared()));
        tokio::time::sleep(LOOK * 3).await;
        assert!(!waiting.is_finished(), "there is room");
        std::fs::write(dir.path().join("one.partial"), vec![1; 2 << 20]).unwrap();
        let e = tokio::time::timeout(Duration::from_secs(60), waiting).await.unwrap().unwrap();
        refused(Err(e), "may take 1MiB together");
    }
}
