//! What this host was told of, on root's own disk: pools and guests, one small file each, whole or not there.
//!
//! ```text
//! DIR/host/              0711  root
//!   epoch                      highest epoch of each executor
//!   registry/pools/ID.json     what control called a pool
//!   registry/pools/ID.found    what its file system can
//!   registry/pools/ID.closed   it was let go of; what it said of itself
//!   pools/ID/                  its volumes, by their ids
//!   images/ networks/          of their drivers
//!   staging/ID.PART      0600  parts of images being uploaded
//!   backups/ID           0600  backups that were made here
//!   memory/ID.json       0600  where memory of a guest is being written
//!   guests/ID/           0711  state of a guest that was started: the driver's, and agent.json; or, with the
//!                              mark `arrived`, what a machine is that was not started yet
//! ```
//! Ids come over the wire as UUIDs and are written as such: no name of a client ever becomes part of a path. Records are
//! synced, but for containers': after a power cut none runs that they could speak of, and their directories have nothing to
//! lose, and one that a power cut tore keeps nobody else from going on.

use karst_guest::IdRange;
use karst_model::{
    Error, InstanceId, PoolId, Result, VolumeId,
    instance::{Generation, InstanceKind},
    spec::PoolSpec,
    storage::Abilities,
};
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use std::{
    fs,
    io::Write,
    os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt},
    path::{Path, PathBuf},
};

/// What is kept of a guest from its first start to its end.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct GuestRecord {
    pub kind: InstanceKind,
    /// Of the last start that was ordered.
    pub generation: Generation,
    pub ids: IdRange,
    pub pool: PoolId,
    pub root: VolumeId,
    /// Volumes of its other disks.
    #[serde(default)]
    pub volumes: Vec<VolumeId>,
    /// Volumes that its disks are being copied to.
    #[serde(default)]
    pub copies: Vec<VolumeId>,
    /// The host's interfaces, written before they are made.
    pub interfaces: Vec<String>,
    pub networks: Vec<karst_model::NetworkId>,
    /// Interfaces of the host that it has for itself.
    #[serde(default)]
    pub lent: Vec<String>,
}

/// The mark of [`Registry::arrive`].
const ARRIVED: &str = "arrived";
/// What a machine is beside its disks, by the names that their driver gives it.
const OF_MACHINES: [&str; 5] = ["nvram.fd", "nvram.secure.fd", "tpm", "states", "saved"];

#[derive(Debug, Clone)]
pub(crate) struct Registry {
    root: PathBuf,
}

/// A directory of exactly this mode: the process' umask is stricter than what guests need to reach their own.
fn directory(path: &Path, mode: u32) -> Result<()> {
    match fs::DirBuilder::new().mode(mode).create(path) {
        Err(e) if e.kind() != std::io::ErrorKind::AlreadyExists => return Err(e.into()),
        _ => {}
    }
    Ok(fs::set_permissions(path, fs::Permissions::from_mode(mode))?)
}

impl Registry {
    pub fn open(root: PathBuf) -> Result<Self> {
        for (name, mode) in [
            ("registry", 0o700),
            ("registry/pools", 0o700),
            ("staging", 0o700),
            ("backups", 0o700),
            ("memory", 0o700),
            ("guests", 0o711),
        ] {
            directory(&root.join(name), mode)?;
        }
        Ok(Self { root })
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.root.join(name)
    }

    pub fn guest_dir(&self, id: InstanceId) -> PathBuf {
        self.root.join("guests").join(id.0.to_string())
    }

    fn pool_file(&self, id: PoolId) -> PathBuf {
        self.root.join("registry/pools").join(format!("{}.json", id.0))
    }

    pub fn pool(&self, id: PoolId) -> Result<Option<PoolSpec>> {
        read(&self.pool_file(id))
    }

    pub fn pools(&self) -> Result<Vec<PoolSpec>> {
        let mut found = vec![];
        for entry in fs::read_dir(self.root.join("registry/pools"))? {
            let path = entry?.path();
            if path.extension().is_some_and(|e| e == "json") {
                found.extend(read(&path)?);
            }
        }
        Ok(found)
    }

    pub fn put_pool(&self, spec: &PoolSpec) -> Result<()> {
        write(&self.pool_file(spec.id), spec, true)
    }

    pub fn remove_pool(&self, id: PoolId) -> Result<()> {
        remove(&self.found_file(id))?;
        remove(&self.closed_file(id))?;
        remove(&self.pool_file(id))
    }

    fn closed_file(&self, id: PoolId) -> PathBuf {
        self.pool_file(id).with_extension("closed")
    }

    /// Was the pool let go of? Then what it said of itself before; a damaged file says that it was.
    pub fn closed(&self, id: PoolId) -> Option<Option<String>> {
        read::<Option<String>>(&self.closed_file(id)).unwrap_or(Some(None))
    }

    pub fn put_closed(&self, id: PoolId, said: Option<String>) -> Result<()> {
        write(&self.closed_file(id), &said, true)
    }

    pub fn forget_closed(&self, id: PoolId) -> Result<()> {
        remove(&self.closed_file(id))
    }

    fn found_file(&self, id: PoolId) -> PathBuf {
        self.pool_file(id).with_extension("found")
    }

    /// What the file system of a pool could when it was last opened; what is damaged was never found.
    pub fn abilities(&self, id: PoolId) -> Result<Option<Abilities>> {
        Ok(read(&self.found_file(id)).unwrap_or_default())
    }

    pub fn put_abilities(&self, id: PoolId, found: &Abilities) -> Result<()> {
        write(&self.found_file(id), found, false)
    }

    pub fn guest(&self, id: InstanceId) -> Result<Option<GuestRecord>> {
        karst_guest::record::read(&self.guest_dir(id), "agent.json")
    }

    /// Makes the guest's directory with it.
    pub fn put_guest(&self, id: InstanceId, record: &GuestRecord) -> Result<()> {
        let dir = self.guest_dir(id);
        directory(&dir, 0o711)?;
        write(&dir.join("agent.json"), record, record.kind == InstanceKind::VirtualMachine)
    }

    /// Makes the directory of a machine that is something before its first start here; it is there for good then.
    pub fn arrive(&self, id: InstanceId) -> Result<()> {
        let dir = self.guest_dir(id);
        directory(&dir, 0o711)?;
        fs::File::options().write(true).create(true).truncate(false).mode(0o600).open(dir.join(ARRIVED))?;
        fs::File::open(&dir)?.sync_all()?;
        Ok(fs::File::open(self.root.join("guests"))?.sync_all()?)
    }

    /// Is it one of those, or was it?
    pub fn arrived(&self, id: InstanceId) -> bool {
        self.guest_dir(id).join(ARRIVED).is_file()
    }

    /// Forgets a guest, its directory and all in it.
    pub fn remove_guest(&self, id: InstanceId) -> Result<()> {
        match fs::remove_dir_all(self.guest_dir(id)) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(e.into()),
            _ => Ok(()),
        }
    }

    /// Guests with a directory here, with or without a record. A machine whose record a power cut tore is kept as one that was
    /// not started here yet: what it is beside its disks lies there.
    pub fn guests(&self) -> Result<Vec<(InstanceId, Option<GuestRecord>)>> {
        let mut found = vec![];
        for entry in fs::read_dir(self.root.join("guests"))? {
            let name = entry?.file_name();
            if let Some(id) = name.to_str().and_then(|n| n.parse().ok()) {
                let (record, dir) = (self.guest(id)?, self.guest_dir(id));
                let torn = record.is_none() && dir.join("agent.json").exists();
                if torn && OF_MACHINES.iter().any(|name| dir.join(name).exists()) {
                    self.arrive(id)?;
                }
                found.push((id, record));
            }
        }
        Ok(found)
    }
}

/// Renames what cannot be read under `root` (`DIR/host`), so that everything else can be purged: records of pools and guests,
/// and the highest epoch. Answers what of it is uncertain now, for people.
///
/// # Errors
/// When a file cannot be renamed.
pub fn set_damaged_aside(root: &Path) -> Result<Vec<String>> {
    let entries = |name: &str| {
        let found = fs::read_dir(root.join(name)).into_iter().flatten().flatten();
        found.map(|e| e.path()).collect::<Vec<_>>()
    };
    let mut uncertain = vec![];
    let mut aside = |path: &Path, text: String| -> Result<()> {
        fs::rename(path, path.with_extension("damaged"))?;
        uncertain.push(text);
        Ok(())
    };
    for path in entries("registry/pools") {
        if path.extension().is_some_and(|e| e == "json") && read::<PoolSpec>(&path).is_err() {
            let name = path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
            aside(
                &path,
                format!("what pool {name} is; its directory in DIR goes, what it may have elsewhere stays"),
            )?;
        }
    }
    for dir in entries("guests") {
        let path = dir.join("agent.json");
        if read::<GuestRecord>(&path).is_err() {
            let name = dir.file_name().unwrap_or_default().to_string_lossy().into_owned();
            aside(
                &path,
                format!("what guest {name} had; its processes and interfaces are found by the daemon's id"),
            )?;
        }
    }
    let epoch = root.join("epoch");
    if karst_agent::EpochGuard::open(&epoch).is_err() {
        aside(&epoch, "the executors' epochs, which nobody needs any more".into())?;
    }
    Ok(uncertain)
}

fn read<T: DeserializeOwned>(path: &Path) -> Result<Option<T>> {
    match fs::read(path) {
        Ok(bytes) => serde_json::from_slice(&bytes)
            .map(Some)
            .map_err(|e| Error::internal("a record of this host is damaged", e).with_context(path.display())),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(e) => Err(Error::from(e).with_context(path.display())),
    }
}

fn write(path: &Path, value: &impl Serialize, durable: bool) -> Result<()> {
    let fresh = path.with_extension("new");
    let mut file = fs::File::options().write(true).create(true).truncate(true).mode(0o600).open(&fresh)?;
    file.write_all(&serde_json::to_vec(value)?)?;
    if durable {
        file.sync_all()?;
    }
    karst_host::fs::replace(&fresh, path)?;
    if durable && let Some(parent) = path.parent() {
        fs::File::open(parent)?.sync_all()?;
    }
    Ok(())
}

fn remove(path: &Path) -> Result<()> {
    match fs::remove_file(path) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(e.into()),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_damaged_is_set_aside_and_named() {
        let dir = tempfile::tempdir().unwrap();
        let registry = Registry::open(dir.path().to_owned()).unwrap();
        let guest: InstanceId = "6c0f7f0e-0000-4000-8000-000000000001".parse().unwrap();
        assert_eq!(set_damaged_aside(dir.path()).unwrap(), Vec::<String>::new());
        fs::write(dir.path().join("epoch"), "7\n").unwrap();
        assert_eq!(set_damaged_aside(dir.path()).unwrap(), Vec::<String>::new());
        fs::write(dir.path().join("epoch"), "\0\0").unwrap();
        fs::write(dir.path().join("registry/pools/x.json"), "{\"id\":").unwrap();
        fs::create_dir(registry.guest_dir(guest)).unwrap();
        fs::write(registry.guest_dir(guest).join("agent.json"), "[]").unwrap();
        assert!(registry.pools().is_err());
        assert_eq!(registry.guests().unwrap(), [(guest, None)]);
        assert!(!registry.arrived(guest), "nothing to be lost lies there");
        fs::write(registry.guest_dir(guest).join("nvram.fd"), "").unwrap();
        assert_eq!(registry.guests().unwrap(), [(guest, None)]);
        let named = set_damaged_aside(dir.path()).unwrap();
        assert_eq!(named.len(), 3, "{named:?}");
        assert!(named[1].contains(&guest.to_string()));
        assert_eq!(registry.pools().unwrap(), []);
        assert_eq!(registry.guests().unwrap(), [(guest, None)]);
    }
}
