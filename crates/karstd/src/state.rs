//! Which store the platform keeps its records in: that of `DIR/store.toml`; for the instance in `/var/lib/karst`, when DIR has
//! none, of `/etc/karst/store.toml`. Without the file it is SQLite in `DIR/state`.
//!
//! ```toml
//! etcd = ["https://10.0.0.1:2379", "https://10.0.0.2:2379"]
//! ca = "/etc/karst/etcd-ca.pem"
//! certificate = "/etc/karst/etcd.pem"
//! key = "/etc/karst/etcd.key"
//! user = "karst"
//! password_file = "/etc/karst/etcd-password"
//! ```
//! All but the first line are optional; endpoints with `https://` need `ca`, and a password needs them, unless etcd is on this
//! machine. The control process reads these files, so its user must be able to; a key or password that others can read is
//! refused. An etcd holds one platform: the first to come writes its id there, and another one is told. An instance stays
//! with the store that it began with (`DIR/state/in-etcd` says that it was etcd): another choice is refused, because it
//! would look like a platform without a single record.

use karst_env::SharedEnv;
use karst_model::{Error, ErrorKind, Result};
use karst_store::{
    Compare, EtcdOptions, EtcdStore, KeyRange, Op, SqliteOptions, SqliteStore, Store, Txn, TxnOutcome,
};
use serde::Deserialize;
use std::{
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    sync::Arc,
};

/// Name of the file.
const FILE: &str = "store.toml";
/// What of an etcd is ours.
const EVERYTHING: &str = "/karst/";
/// There while the records are in etcd.
const MARK: &str = "state/in-etcd";
/// SQLite's file.
const SQLITE: &str = "state/karst.db";
/// The DIR to which what is in `/etc/karst` applies.
const MAIN: &str = "/var/lib/karst";
/// Whose records an etcd holds.
const OWNER: &str = "/karst/v1/meta/daemon";

/// The file, read. Secrets are not in it, but in files of their own.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StoreConfig {
    /// Endpoints of one cluster.
    etcd: Vec<String>,
    ca: Option<PathBuf>,
    certificate: Option<PathBuf>,
    key: Option<PathBuf>,
    user: Option<String>,
    password_file: Option<PathBuf>,
}

impl StoreConfig {
    /// The file of the first of `directories` that has one.
    ///
    /// # Errors
    /// One that cannot be read, or says what makes no sense.
    fn load(directories: &[PathBuf]) -> Result<Option<Self>> {
        for directory in directories {
            let path = directory.join(FILE);
            match std::fs::read_to_string(&path) {
                Ok(text) => return Self::parse(&path, &text).map(Some),
                Err(e) if e.kind() == std::io::ErrorKind::NotFound => {}
                Err(e) => {
                    let text = format!("{} cannot be read by the control process", path.display());
                    return Err(Error::forbidden(text).with_context(e));
                }
            }
        }
        Ok(None)
    }

    fn parse(path: &Path, text: &str) -> Result<Self> {
        let wrong = |text: &str| Error::invalid(FILE, format!("{}: {text}", path.display()));
        let config: Self =
            toml::from_str(text).map_err(|e| wrong(e.message()).with_context(e.to_string()))?;
        if config.etcd.is_empty() {
            return Err(wrong("etcd names no endpoint, such as \"https://127.0.0.1:2379\""));
        }
        if config.etcd.iter().any(|e| e.contains('@')) {
            return Err(wrong(
                "an endpoint is scheme, host and port; who signs in is said by user and password_file",
            ));
        }
        let secure = config.etcd.iter().filter(|e| e.starts_with("https://")).count();
        let plain = config.etcd.iter().filter(|e| e.starts_with("http://")).count();
        if secure + plain != config.etcd.len() || secure > 0 && plain > 0 {
            return Err(wrong("endpoints all begin with https://, or all with http://"));
        }
        if (secure > 0) != config.ca.is_some() {
            return Err(wrong("endpoints with https:// need ca, and only they do"));
        }
        if config.certificate.is_some() != config.key.is_some() || plain > 0 && config.key.is_some() {
            return Err(wrong("certificate and key go together, with https://"));
        }
        if config.user.is_some() != config.password_file.is_some() {
            return Err(wrong("user and password_file go together"));
        }
        let here = |e: &String| {
            ["http://127.0.0.1:", "http://localhost:", "http://[::1]:"].iter().any(|h| e.starts_with(h))
        };
        if config.user.is_some() && plain > 0 && !config.etcd.iter().all(here) {
            return Err(wrong("a password goes to another machine over https:// only"));
        }
        Ok(config)
    }

    fn options(&self) -> Result<EtcdOptions> {
        let open = |path: &PathBuf| {
            std::fs::read(path).map_err(|e| {
                let text = format!("{} cannot be read by the control process", path.display());
                Error::forbidden(text).with_context(e)
            })
        };
        let secret = |path: &PathBuf| {
            // One that cannot be seen cannot be read either, which is said below.
            if std::fs::metadata(path).is_ok_and(|found| found.mode() & 0o007 != 0) {
                let path = path.display();
                return Err(Error::forbidden(format!("{path} is open to everybody; chmod o= {path}")));
            }
            open(path)
        };
        let password = match &self.password_file {
            Some(path) => {
                let text = String::from_utf8(secret(path)?);
                let text =
                    text.map_err(|_| Error::invalid(FILE, format!("{} is no text", path.display())))?;
                Some(text.trim_end_matches('\n').to_owned())
            }
            None => None,
        };
        Ok(EtcdOptions {
            ca: self.ca.as_ref().map(open).transpose()?,
            identity: match (&self.certificate, &self.key) {
                (Some(certificate), Some(key)) => Some((open(certificate)?, secret(key)?)),
                _ => None,
            },
            user: self.user.clone().zip(password),
        })
    }

    /// Connects, and makes sure that the records there are `daemon_id`'s.
    ///
    /// # Errors
    /// Unavailable; conflict when another platform's records are there.
    async fn connect(&self, daemon_id: &str, env: SharedEnv) -> Result<EtcdStore> {
        let store = EtcdStore::connect_with(&self.etcd, &self.options()?, env).await?;
        let mine = Op::Put { key: OWNER.into(), value: daemon_id.as_bytes().to_vec().into(), lease: None };
        let txn = Txn { compares: vec![Compare::absent(OWNER)], success: vec![mine], failure: vec![] };
        // Unknown or refused: whose it is shows the read.
        let _outcome: TxnOutcome = store.txn(txn).await?;
        let owner = store.get(OWNER).await?.kv.map(|kv| String::from_utf8_lossy(&kv.value).into_owned());
        match owner {
            Some(owner) if owner == daemon_id => Ok(store),
            owner => Err(Error::conflict(format!(
                "the etcd of {FILE} holds the records of the platform with the id {}, and this is {daemon_id}; give each its own",
                owner.unwrap_or_else(|| "(none)".into())
            ))),
        }
    }
}

/// Where the file may be, in order of precedence.
fn places(dir: &Path) -> Vec<PathBuf> {
    let of_machine = (dir == Path::new(MAIN)).then(|| PathBuf::from("/etc/karst"));
    std::iter::once(dir.to_owned()).chain(of_machine).collect()
}

/// Has the instance in `dir` had a store before?
pub fn has_begun(dir: &Path) -> bool {
    dir.join(MARK).exists() || dir.join(SQLITE).exists()
}

/// Are its records where other hosts may have theirs?
pub fn is_shared(dir: &Path) -> bool {
    dir.join(MARK).exists()
}

/// Opens the store of the instance in `dir`.
///
/// # Errors
/// A file that cannot be read or makes no sense; unavailable when no server answers; conflict when the records are in the
/// other kind of store, or an etcd is another platform's.
pub async fn open(dir: &Path, daemon_id: &str, env: SharedEnv) -> Result<Arc<dyn Store>> {
    let (mark, sqlite) = (dir.join(MARK), dir.join(SQLITE));
    let Some(config) = StoreConfig::load(&places(dir))? else {
        if mark.exists() {
            return Err(Error::conflict(format!(
                "the records of this platform are in etcd, and no {FILE} says where; put it back, or purge the platform"
            )));
        }
        return Ok(Arc::new(SqliteStore::open(&sqlite, env, SqliteOptions::default()).await?));
    };
    if sqlite.exists() {
        return Err(Error::conflict(format!(
            "{FILE} names an etcd, and the records of this platform are in {}; remove {FILE}, or purge the platform",
            sqlite.display()
        )));
    }
    // Written first: what is in etcd is found by a purge whatever happens now.
    let new = !mark.exists();
    if new {
        std::fs::write(&mark, "")?;
        std::fs::File::open(dir.join("state"))?.sync_all()?;
    }
    match config.connect(daemon_id, env).await {
        Ok(store) => {
            tracing::info!(endpoints = ?config.etcd, "records are in etcd");
            Ok(Arc::new(store))
        }
        Err(e) => {
            if new && e.is(ErrorKind::Conflict) {
                std::fs::remove_file(&mark)?;
            }
            Err(e)
        }
    }
}

/// Removes this instance's records from its etcd, if it has one.
///
/// # Errors
/// Unavailable when it cannot be reached, conflict when no file says where it is.
pub async fn purge(dir: &Path, daemon_id: &str, env: SharedEnv) -> Result<()> {
    if !dir.join(MARK).exists() {
        return Ok(());
    }
    let config = StoreConfig::load(&places(dir))?.ok_or_else(|| {
        let mark = dir.join(MARK);
        Error::conflict(format!(
            "the records are in etcd, and no {FILE} says where; put it back, or remove {} to leave them there",
            mark.display()
        ))
    })?;
    let store = match config.connect(daemon_id, env).await {
        Ok(store) => store,
        // Nothing there is ours.
        Err(e) if e.is(ErrorKind::Conflict) => return Ok(()),
        Err(e) => {
            let mark = dir.join(MARK);
            let text = format!(
                "{}; purge again when it can be reached, or remove {} to leave its records there",
                e.message,
                mark.display()
            );
            return Err(Error { message: text, ..e });
        }
    };
    let all = Op::DeleteRange { range: KeyRange::Prefix(EVERYTHING.into()) };
    match store.txn(Txn { compares: vec![], success: vec![all], failure: vec![] }).await? {
        TxnOutcome::Unknown => {
            Err(Error::unavailable("etcd did not say whether the records are gone; purge again"))
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(text: &str) -> String {
        StoreConfig::parse(Path::new("/x/store.toml"), text).unwrap_err().message
    }

    #[test]
    fn what_makes_no_sense_is_refused() {
        assert!(refused("etcd = []").contains("no endpoint"));
        assert!(refused("etcd = [\"a:1\"]").contains("https://"));
        assert!(refused("etcd = [\"http://a:1\", \"https://b:1\"]").contains("all begin"));
        assert!(refused("etcd = [\"https://b:1\"]").contains("need ca"));
        assert!(refused("etcd = [\"http://b:1\"]\nuser = \"x\"").contains("password_file"));
        assert!(refused("etcd = [\"http://b:1\"]\nkey = \"x\"").contains("go together"));
        let password = "user = \"x\"\npassword_file = \"/p\"";
        assert!(refused(&format!("etcd = [\"http://b:1\"]\n{password}")).contains("https:// only"));
        assert!(refused("etcd = [\"http://x:sesame@b:1\"]").contains("password_file"));
        assert!(refused("etcd = [\"http://b:1\"]\npassword = \"x\"").contains("password"));
        let path = Path::new("x");
        StoreConfig::parse(path, "etcd = [\"https://b:1\"]\nca = \"/c\"\n").unwrap();
        StoreConfig::parse(path, "etcd = [\"http://b:1\", \"http://c:1\"]\n").unwrap();
        StoreConfig::parse(path, &format!("etcd = [\"http://127.0.0.1:1\"]\n{password}")).unwrap();
        assert_eq!(StoreConfig::load(&["/nonexistent".into()]).unwrap(), None);
    }

    #[test]
    fn what_is_for_the_machine_is_for_its_main_instance_only() {
        assert_eq!(places(Path::new("/x")), [Path::new("/x")]);
        assert_eq!(places(Path::new(MAIN)), [Path::new(MAIN), Path::new("/etc/karst")]);
    }

    #[test]
    fn an_instance_stays_with_its_store() {
        let base = tempfile::tempdir().unwrap();
        let dir = base.path();
        std::fs::create_dir(dir.join("state")).unwrap();
        let open = || {
            let dir = dir.to_owned();
            let runtime = tokio::runtime::Runtime::new().unwrap();
            runtime
                .block_on(async move { open(&dir, "abc123", karst_env::RealEnv::shared()).await.map(drop) })
        };
        std::fs::write(dir.join(MARK), "").unwrap();
        let e = open().unwrap_err();
        assert!(e.is(ErrorKind::Conflict) && e.message.contains("put it back"), "{e:?}");
        std::fs::remove_file(dir.join(MARK)).unwrap();
        open().unwrap();
        std::fs::write(dir.join(FILE), "etcd = [\"http://127.0.0.1:1\"]").unwrap();
        let e = open().unwrap_err();
        assert!(e.is(ErrorKind::Conflict) && e.message.contains("karst.db"), "{e:?}");
        assert!(!dir.join(MARK).exists());
        std::fs::remove_file(dir.join(SQLITE)).unwrap();
        assert_eq!(open().unwrap_err().kind, ErrorKind::Unavailable);
        assert!(dir.join(MARK).exists(), "it may have got there");
    }

    #[test]
    fn secrets_that_everybody_can_read_are_refused() {
        use std::os::unix::fs::PermissionsExt;
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("password");
        std::fs::write(&file, "sesame\n").unwrap();
        let config = StoreConfig {
            etcd: vec!["https://b:1".into()],
            user: Some("karst".into()),
            password_file: Some(file.clone()),
            ..Default::default()
        };
        for (mode, good) in [(0o644, false), (0o640, true), (0o600, true)] {
            std::fs::set_permissions(&file, std::fs::Permissions::from_mode(mode)).unwrap();
            assert_eq!(config.options().is_ok(), good, "{mode:o}");
        }
        assert_eq!(config.options().unwrap().user.unwrap().1, "sesame");
    }
}
