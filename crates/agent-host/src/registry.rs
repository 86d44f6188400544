//! What this host was told of, on root's own disk: pools and guests, one small file each, whole or not there.
//!
//! ```text
//! DIR/host/              0711  root
//!   epoch                      highest executor epoch
//!   registry/pools/ID.json     what control called a pool
//!   pools/ID/                  its volumes, by their ids
//!   images/ networks/          of their drivers
//!   staging/ID.PART      0600  parts of images being uploaded
//!   guests/ID/           0711  state of a guest that was started: the driver's, and agent.json
//! ```
//! Ids come over the wire as UUIDs and are written as such: no name of a client ever becomes part of a path. Guests'
//! records are not synced: after a power cut nothing runs that they could speak of. Pools' are.

use karst_guest::IdRange;
use karst_model::{
    Error, InstanceId, PoolId, Result, VolumeId,
    instance::{Generation, InstanceKind},
    spec::PoolSpec,
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
    /// The host's interfaces, written before they are made.
    pub interfaces: Vec<String>,
    pub networks: Vec<karst_model::NetworkId>,
}

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
        for (name, mode) in
            [("registry", 0o700), ("registry/pools", 0o700), ("staging", 0o700), ("guests", 0o711)]
        {
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
        remove(&self.pool_file(id))
    }

    pub fn guest(&self, id: InstanceId) -> Result<Option<GuestRecord>> {
        read(&self.guest_dir(id).join("agent.json"))
    }

    /// Makes the guest's directory with it.
    pub fn put_guest(&self, id: InstanceId, record: &GuestRecord) -> Result<()> {
        let dir = self.guest_dir(id);
        directory(&dir, 0o711)?;
        write(&dir.join("agent.json"), record, false)
    }

    /// Forgets a guest, its directory and all in it.
    pub fn remove_guest(&self, id: InstanceId) -> Result<()> {
        match fs::remove_dir_all(self.guest_dir(id)) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(e.into()),
            _ => Ok(()),
        }
    }

    /// Guests with a directory here, with or without a record.
    pub fn guests(&self) -> Result<Vec<(InstanceId, Option<GuestRecord>)>> {
        let mut found = vec![];
        for entry in fs::read_dir(self.root.join("guests"))? {
            let name = entry?.file_name();
            if let Some(id) = name.to_str().and_then(|n| n.parse().ok()) {
                found.push((id, self.guest(id)?));
            }
        }
        Ok(found)
    }
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
    fs::rename(&fresh, path)?;
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
