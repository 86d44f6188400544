//! `karstd purge`: every trace of one instance goes, also of one that died half-way.

use crate::{control, directory::Directory};
use karst_agent_host::{HostPolicy, RealAgent, RealOptions};
use karst_model::{Error, ErrorKind, Result};
use std::{
    path::Path,
    time::{Duration, Instant},
};

/// Time a launcher has to end its daemons.
const GRACE: Duration = Duration::from_secs(30);

/// Ends the daemon that serves `dir`, ends its guests, removes what lies outside `dir`, then `dir`.
///
/// # Errors
/// Not root; `dir` is no instance's; something would not go: then `dir` stays, and purging again goes on.
pub fn run(dir: &Path) -> Result<()> {
    if !rustix::process::geteuid().is_root() {
        return Err(Error::forbidden("purging needs root"));
    }
    if never_began(dir)? {
        std::fs::remove_dir_all(dir)?;
        return Ok(());
    }
    let directory = take(dir)?;
    wait_for_daemons(&directory.daemon_id)?;
    let options = RealOptions {
        dir: directory.path.clone(),
        daemon_id: directory.daemon_id.clone(),
        policy: HostPolicy::default(),
        worker: None,
    };
    let host = directory.path.join("host");
    if host.is_dir() {
        // Everything else must go also when a record cannot be read.
        for uncertain in karst_agent_host::set_damaged_aside(&host)? {
            tracing::warn!("a record is damaged and was set aside; uncertain: {uncertain}");
        }
        control::block_on(|env, _| Ok(async move { RealAgent::open(env, options).await?.purge().await }))?;
    }
    // What lies in an etcd is no trace on this machine; but a new instance could not begin there.
    let (path, id) = (directory.path.clone(), directory.daemon_id.clone());
    control::block_on(|env, _| Ok(async move { crate::state::purge(&path, &id, env).await }))?;
    std::fs::remove_dir_all(&directory.path)?;
    tracing::info!(dir = %directory.path.display(), "purged");
    Ok(())
}

/// Was DIR made, by `make run` or by a daemon that died in its first moment, before it became an instance's? Then there is
/// nothing in it but the log and what a daemon makes before the id, all of it empty.
fn never_began(dir: &Path) -> Result<bool> {
    for entry in std::fs::read_dir(dir)? {
        let entry = entry?;
        let known = match entry.file_name().to_str() {
            Some("lock" | "karstd.log") => entry.file_type()?.is_file(),
            Some("run" | "state" | "host") => {
                entry.file_type()?.is_dir() && std::fs::read_dir(entry.path())?.next().is_none()
            }
            _ => false,
        };
        if !known {
            return Ok(false);
        }
    }
    // A daemon that has just taken it is about to become an instance.
    Ok(Directory::is_free(dir))
}

/// Takes DIR, after its launcher was asked to end.
fn take(dir: &Path) -> Result<Directory> {
    let until = Instant::now() + GRACE;
    let mut asked = false;
    loop {
        match Directory::take(dir) {
            Err(e) if e.is(ErrorKind::Conflict) && Instant::now() < until => {
                let pid = std::fs::read_to_string(dir.join("lock")).unwrap_or_default();
                let pid = pid.trim().parse().ok().and_then(rustix::process::Pid::from_raw);
                if let (Some(pid), false) = (pid, asked) {
                    tracing::info!(pid = pid.as_raw_nonzero().get(), "asking the daemon to end");
                    rustix::process::kill_process(pid, rustix::process::Signal::TERM)
                        .map_err(std::io::Error::from)?;
                    asked = true;
                }
                std::thread::sleep(Duration::from_millis(20));
            }
            other => return other,
        }
    }
}

/// A launcher that was killed is gone, and its lock with it, a moment before the kernel ends its daemons.
fn wait_for_daemons(daemon_id: &str) -> Result<()> {
    let until = Instant::now() + GRACE;
    let mark = format!("\0--daemon-id\0{daemon_id}\0");
    let lives = |entry: std::fs::DirEntry| {
        let line = std::fs::read(entry.path().join("cmdline")).unwrap_or_default();
        String::from_utf8_lossy(&line).contains(&mark)
    };
    while std::fs::read_dir("/proc")?.flatten().any(lives) {
        if Instant::now() > until {
            return Err(Error::conflict("processes of the daemon do not end"));
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_directory_that_never_became_an_instances_is_told_from_one_that_did_and_from_others() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path();
        assert!(never_began(path).unwrap(), "empty");
        for name in ["run", "state", "host"] {
            std::fs::create_dir(path.join(name)).unwrap();
        }
        std::fs::write(path.join("karstd.log"), "died").unwrap();
        std::fs::write(path.join("lock"), "1\n").unwrap();
        assert!(never_began(path).unwrap());
        std::fs::write(path.join("state/x"), "").unwrap();
        assert!(!never_began(path).unwrap(), "there is state");
        std::fs::remove_file(path.join("state/x")).unwrap();
        std::fs::write(path.join("photo.jpg"), "").unwrap();
        assert!(!never_began(path).unwrap(), "somebody's file");
        std::fs::remove_file(path.join("photo.jpg")).unwrap();
        std::os::unix::fs::symlink("/", path.join("karstd.log.1")).unwrap();
        assert!(!never_began(path).unwrap());
        std::fs::remove_file(path.join("karstd.log.1")).unwrap();
        let lock = std::fs::File::open(path.join("lock")).unwrap();
        rustix::fs::flock(&lock, rustix::fs::FlockOperation::LockExclusive).unwrap();
        assert!(!never_began(path).unwrap(), "a daemon is about to begin");
    }
}
