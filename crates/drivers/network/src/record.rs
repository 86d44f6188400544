//! What the driver remembers on disk, written before the thing itself is made: `network.json` in a directory per network,
//! `host.json` for what it changed outside of its own objects.

use karst_model::{Error, NetworkId, ProjectId, Result, network::BridgeSpec, spec::NetworkSpec};
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    io::{ErrorKind, Write},
    net::Ipv4Addr,
    os::unix::fs::{OpenOptionsExt, PermissionsExt},
    path::{Path, PathBuf},
};

/// A network that is, or was about to be, on this host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Record {
    /// Which.
    pub id: NetworkId,
    /// Bridge interface.
    pub bridge: String,
    /// How it is configured.
    pub spec: BridgeSpec,
    /// Its removal began: only [`crate::NetworkDriver::remove`] and `ensure` touch it from here on.
    pub removing: bool,
}

/// What was changed outside of the daemon's own objects.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, Default)]
pub(crate) struct HostRecord {
    /// `net.ipv4.ip_forward` was 0 and we set it.
    #[serde(default)]
    pub forwarding_switched_on: bool,
    /// Chains of ours are, or may be, in iptables' nft tables.
    #[serde(default)]
    pub iptables_nft: bool,
    /// The same in the legacy tables.
    #[serde(default)]
    pub iptables_legacy: bool,
    /// The same two for IPv6.
    #[serde(default)]
    pub ip6tables_nft: bool,
    /// See above.
    #[serde(default)]
    pub ip6tables_legacy: bool,
    /// `net.ipv6.conf.all.forwarding` was 0 and we set it.
    #[serde(default)]
    pub forwarding6_switched_on: bool,
    /// Interfaces that would have lost their router's announcements by that, and were told to go on hearing them.
    #[serde(default)]
    pub accept_ra: BTreeSet<String>,
    /// Bridges that were put into firewalld's zone `trusted`.
    #[serde(default)]
    pub firewalld: BTreeSet<String>,
}

/// Where things lie.
#[derive(Debug, Clone)]
pub(crate) struct Paths(pub PathBuf);

impl Paths {
    pub fn network(&self, id: NetworkId) -> PathBuf {
        self.0.join(id.to_string())
    }
    pub fn file(&self, id: NetworkId, name: &str) -> PathBuf {
        self.network(id).join(name)
    }

    pub fn read(&self, id: NetworkId) -> Result<Option<Record>> {
        read_json(&self.file(id, "network.json"))
    }

    pub fn write(&self, record: &Record) -> Result<()> {
        write_file(
            &self.file(record.id, "network.json"),
            &serde_json::to_vec_pretty(record)?,
            0o600,
            None,
            true,
        )
    }

    /// The network as the driver was last told, with its guests and rules; bare where that is lost.
    pub fn read_spec(&self, record: &Record) -> NetworkSpec {
        let known: Option<NetworkSpec> = read_json(&self.file(record.id, "spec.json")).unwrap_or_default();
        known.unwrap_or_else(|| NetworkSpec {
            id: record.id,
            bridge: record.bridge.clone(),
            spec: record.spec.clone(),
            hosts: vec![],
            acls: vec![],
            sets: vec![],
            forwards: vec![],
            owner: None,
        })
    }

    /// Not synced: after a power cut no guest runs to whom it could apply.
    pub fn write_spec(&self, spec: &NetworkSpec) -> Result<()> {
        write_if_changed(&self.file(spec.id, "spec.json"), &serde_json::to_vec(spec)?, 0o600, None).map(drop)
    }

    /// Addresses by MAC that are kept for guests whose rules depend on them.
    pub fn read_reserved(&self, id: NetworkId) -> BTreeMap<String, Ipv4Addr> {
        read_json(&self.file(id, "reserved.json")).unwrap_or_default().unwrap_or_default()
    }

    pub fn write_reserved(&self, id: NetworkId, reserved: &BTreeMap<String, Ipv4Addr>) -> Result<()> {
        write_if_changed(&self.file(id, "reserved.json"), &serde_json::to_vec(reserved)?, 0o600, None)
            .map(drop)
    }

    /// Ports of the views of names, by project.
    pub fn read_views(&self, id: NetworkId) -> BTreeMap<ProjectId, u16> {
        read_json(&self.file(id, "views.json")).unwrap_or_default().unwrap_or_default()
    }

    pub fn write_views(&self, id: NetworkId, views: &BTreeMap<ProjectId, u16>) -> Result<()> {
        write_if_changed(&self.file(id, "views.json"), &serde_json::to_vec(views)?, 0o600, None).map(drop)
    }

    /// Ids of all directories, with a readable record or not.
    pub fn ids(&self) -> Result<Vec<NetworkId>> {
        let entries = match fs::read_dir(&self.0) {
            Err(e) if e.kind() == ErrorKind::NotFound => return Ok(vec![]),
            other => other?,
        };
        let mut ids = Vec::new();
        for entry in entries {
            if let Some(id) = entry?.file_name().to_str().and_then(|n| n.parse().ok()) {
                ids.push(id);
            }
        }
        ids.sort();
        Ok(ids)
    }

    /// All networks that are not being removed.
    pub fn records(&self) -> Result<Vec<Record>> {
        let mut records = Vec::new();
        for id in self.ids()? {
            records.extend(self.read(id)?.filter(|r| !r.removing));
        }
        Ok(records)
    }

    pub fn read_host(&self) -> Result<HostRecord> {
        Ok(read_json(&self.0.join("host.json"))?.unwrap_or_default())
    }

    pub fn write_host(&self, record: &HostRecord) -> Result<()> {
        write_file(&self.0.join("host.json"), &serde_json::to_vec_pretty(record)?, 0o600, None, true)
    }

    /// Makes the root directory: others may pass through (dnsmasq must reach its files), not look.
    pub fn prepare(&self) -> Result<()> {
        let text = self.0.to_string_lossy();
        if text.contains(|c: char| c.is_control() || c == '"' || c == '#' || c == '\\')
            || !self.0.is_absolute()
        {
            return Err(Error::unsupported(format!(
                "the state directory {text:?} cannot be used for networks: its path must be absolute, without quotes, '#' or \
                 control characters"
            )));
        }
        make_directory(&self.0, 0o711, None)
    }
}

/// The JSON in a file; `None` when there is no file, or one that a power cut left empty or torn (what it would say is
/// written again by `ensure`).
pub(crate) fn read_json<T: DeserializeOwned>(path: &Path) -> Result<Option<T>> {
    match fs::read(path) {
        Err(e) if e.kind() == ErrorKind::NotFound => Ok(None),
        Err(e) => Err(e.into()),
        Ok(bytes) => match serde_json::from_slice(&bytes) {
            Ok(value) => Ok(Some(value)),
            Err(e) => {
                tracing::warn!(path = %path.display(), error = %e, "unreadable network record, taken as absent");
                Ok(None)
            }
        },
    }
}

/// Makes a directory (the parent exists) of this mode and group; nothing happens when it is there so.
pub(crate) fn make_directory(path: &Path, mode: u32, group: Option<u32>) -> Result<()> {
    match fs::create_dir(path) {
        Ok(()) => {}
        Err(e) if e.kind() == ErrorKind::AlreadyExists => {}
        Err(e) if e.kind() == ErrorKind::NotFound => fs::create_dir_all(path)?,
        Err(e) => return Err(e.into()),
    }
    if group.is_some() {
        std::os::unix::fs::chown(path, None, group)?;
    }
    if fs::metadata(path)?.permissions().mode() & 0o7777 != mode {
        fs::set_permissions(path, fs::Permissions::from_mode(mode))?;
    }
    Ok(())
}

/// Replaces a file whole. `durable` also survives a power cut.
pub(crate) fn write_file(
    path: &Path,
    bytes: &[u8],
    mode: u32,
    group: Option<u32>,
    durable: bool,
) -> Result<()> {
    let temporary = path.with_extension("new");
    let mut file =
        fs::OpenOptions::new().write(true).create(true).truncate(true).mode(mode).open(&temporary)?;
    file.write_all(bytes)?;
    if let Some(group) = group {
        std::os::unix::fs::fchown(&file, None, Some(group))?;
    }
    file.set_permissions(fs::Permissions::from_mode(mode))?;
    if durable {
        file.sync_all()?;
    }
    fs::rename(&temporary, path)?;
    if durable && let Some(parent) = path.parent() {
        fs::File::open(parent)?.sync_all()?;
    }
    Ok(())
}

/// Replaces a file unless it has these bytes. `true` when it was replaced.
pub(crate) fn write_if_changed(path: &Path, bytes: &[u8], mode: u32, group: Option<u32>) -> Result<bool> {
    if fs::read(path).is_ok_and(|old| old == bytes) {
        return Ok(false);
    }
    write_file(path, bytes, mode, group, false)?;
    Ok(true)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_torn_record_is_no_record() {
        let dir = tempfile::tempdir().unwrap();
        let paths = Paths(dir.path().into());
        assert_eq!(paths.read_host().unwrap(), HostRecord::default());
        let record = HostRecord { forwarding_switched_on: true, ..Default::default() };
        paths.write_host(&record).unwrap();
        assert_eq!(paths.read_host().unwrap(), record);
        fs::write(dir.path().join("host.json"), b"{\"forw").unwrap();
        assert_eq!(paths.read_host().unwrap(), HostRecord::default());
        assert!(write_if_changed(&dir.path().join("f"), b"1", 0o640, None).unwrap());
        assert!(!write_if_changed(&dir.path().join("f"), b"1", 0o640, None).unwrap());
        assert!(Paths("/tmp/a\nb".into()).prepare().is_err());
    }
}
