//! `karstd purge`: every trace of one instance goes, also of one that died half-way, or hangs.

use crate::{control, directory::Directory, launcher};
use karst_agent_host::{HostPolicy, RealAgent, RealOptions};
use karst_model::{Error, ErrorKind, Result};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use std::{
    os::{fd::OwnedFd, unix::fs::MetadataExt},
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

/// Time a launcher has to end its daemons: more than it gives these, one after the other.
pub const GRACE: Duration = Duration::from_secs(2 * launcher::GRACE.as_secs() + 10);
/// Time that the killed have to be gone.
const KILLED: Duration = Duration::from_secs(20);

/// Ends the daemon that serves `dir`, by force what has not ended after `grace`; ends its guests, removes what lies outside
/// `dir`, then `dir`.
///
/// # Errors
/// Not root; `dir` is no instance's; something would not go: then `dir` stays, and purging again goes on.
pub fn run(dir: &Path, grace: Duration) -> Result<()> {
    if !rustix::process::geteuid().is_root() {
        return Err(Error::forbidden("purging needs root"));
    }
    if never_began(dir)? {
        return remove(dir);
    }
    let directory = take(dir, grace)?;
    end_daemons(dir, &directory.daemon_id, grace)?;
    let options = RealOptions {
        dir: directory.path.clone(),
        daemon_id: directory.daemon_id.clone(),
        policy: HostPolicy::default(),
        worker: None,
    };
    let host = directory.path.join("host");
    let mut failed = vec![];
    if host.is_dir() {
        // Everything else must go also when a record cannot be read.
        for uncertain in karst_agent_host::set_damaged_aside(&host)? {
            tracing::warn!("a record is damaged and was set aside; uncertain: {uncertain}");
        }
        let purged =
            control::block_on(|env, _| Ok(async move { RealAgent::open(env, options).await?.purge().await }));
        failed.extend(purged.err());
    }
    // What lies in an etcd is no trace on this machine; but a new instance could not begin there.
    let (path, id) = (directory.path.clone(), directory.daemon_id.clone());
    let forgotten = control::block_on(|env, _| Ok(async move { crate::state::purge(&path, &id, env).await }));
    failed.extend(forgotten.err());
    Error::together(failed)?;
    remove(&directory.path)?;
    tracing::info!(dir = %directory.path.display(), "purged");
    Ok(())
}

/// Removes what is in `dir`. What tells that it was an instance's goes last, so that purging can go on whenever this ends: with
/// its `id` it is one, and with nothing but the lock one that never began. Directories go before files: `state`, which may say
/// that records are elsewhere, before `store.toml`, which says where. `before` hears of each.
fn empty(dir: &Path, mounted: bool, mut before: impl FnMut(&Path) -> Result<()>) -> Result<()> {
    let mut entries = vec![];
    for entry in std::fs::read_dir(dir)? {
        let entry = entry?;
        let (name, is_dir) = (entry.file_name(), entry.file_type()?.is_dir());
        let turn = match name.to_str() {
            // The file system's own.
            Some("lost+found") if mounted && is_dir => continue,
            Some("lock") => 3,
            Some("id") => 2,
            _ if is_dir => 0,
            _ => 1,
        };
        entries.push((turn, entry.path(), is_dir));
    }
    entries.sort();
    for (_, path, is_dir) in entries {
        before(&path)?;
        let removed = if is_dir { std::fs::remove_dir_all(&path) } else { std::fs::remove_file(&path) };
        removed.map_err(|e| Error::from(e).with_context(path.display()))?;
    }
    Ok(())
}

/// Removes DIR. Where a file system is mounted there its directory stays, empty; what somebody mounted below it is his.
fn remove(dir: &Path) -> Result<()> {
    let dir = std::fs::canonicalize(dir)?;
    let mounted: Vec<PathBuf> = karst_host::mountns::entries(None)?.into_iter().map(|m| m.at).collect();
    let below: Vec<_> = mounted
        .iter()
        .filter(|at| at.starts_with(&dir) && **at != dir)
        .map(|at| at.display().to_string())
        .collect();
    if !below.is_empty() {
        return Err(Error::conflict(format!(
            "nothing of Karst runs any more, but its files stay: something is mounted at {}; unmount it and purge again",
            below.join(", ")
        )));
    }
    let mounted = mounted.contains(&dir);
    empty(&dir, mounted, |_| Ok(()))?;
    if !mounted {
        return Ok(std::fs::remove_dir(&dir)?);
    }
    tracing::info!(dir = %dir.display(), "a file system is mounted there: it was emptied, the directory itself stays");
    Ok(())
}

/// Was DIR made, by `make run` or by a daemon that died in its first moment, before it became an instance's? Then there is
/// nothing in it but the log and what a daemon makes before the id, all of it empty, and the id that has not become it yet.
fn never_began(dir: &Path) -> Result<bool> {
    for entry in std::fs::read_dir(dir)? {
        let entry = entry?;
        let known = match entry.file_name().to_str() {
            Some("lock" | "karstd.log" | "karstd.log.1" | "karstd.log.new" | "id.new") => {
                entry.file_type()?.is_file()
            }
            // Of the file system that is mounted there.
            Some("lost+found") => entry.file_type()?.is_dir(),
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

/// Takes DIR, after its launcher was asked to end, and was killed if it did not.
fn take(dir: &Path, grace: Duration) -> Result<Directory> {
    let mut until = Instant::now() + grace;
    let (mut asked, mut killed) = (false, false);
    loop {
        let refused = match Directory::take(dir) {
            Err(e) if e.is(ErrorKind::Conflict) => e,
            other => return other,
        };
        let late = Instant::now() >= until;
        if late && killed {
            return Err(refused);
        }
        if (late || !asked)
            && let Some((pid, launcher)) = holder(dir)
        {
            let signal = if late { Signal::KILL } else { Signal::TERM };
            match late {
                true => tracing::warn!(pid, "the daemon does not end; killing it"),
                false => tracing::info!(pid, "asking the daemon to end"),
            }
            send(&launcher, signal)?;
            asked = true;
        }
        if late {
            (killed, until) = (true, Instant::now() + KILLED);
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// The process that the lock of `dir` names, if it is the one that has the lock.
fn holder(dir: &Path) -> Option<(i32, OwnedFd)> {
    let lock = dir.join("lock");
    let pid: i32 = std::fs::read_to_string(&lock).ok()?.trim().parse().ok()?;
    let process = pidfd_open(Pid::from_raw(pid)?, PidfdFlags::empty()).ok()?;
    // The descriptor names one process for ever; what is looked at now is that one's as long as it lives.
    let lock = std::fs::metadata(lock).ok()?;
    let same = |fd: std::fs::DirEntry| {
        std::fs::metadata(fd.path()).is_ok_and(|m| (m.dev(), m.ino()) == (lock.dev(), lock.ino()))
    };
    let holds = std::fs::read_dir(format!("/proc/{pid}/fd")).ok()?.flatten().any(same);
    holds.then_some((pid, process))
}

/// It may have ended by now.
fn send(process: &OwnedFd, signal: Signal) -> Result<()> {
    match pidfd_send_signal(process, signal) {
        Ok(()) | Err(rustix::io::Errno::SRCH) => Ok(()),
        Err(e) => Err(Error::from(std::io::Error::from(e))),
    }
}

/// The effective user of a process. The owner of its directory in /proc is root where it wants to be undumpable.
fn effective_user(pid: i32) -> Option<u32> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    status.lines().find_map(|l| l.strip_prefix("Uid:"))?.split_whitespace().nth(1)?.parse().ok()
}

/// A launcher that was killed is gone, and its lock with it, a moment before the kernel ends its daemons. Those that are there
/// all the same after `grace` are killed.
fn end_daemons(dir: &Path, daemon_id: &str, grace: Duration) -> Result<()> {
    let mark = format!("\0--daemon-id\0{daemon_id}\0");
    // Anybody may call a process so: a daemon is root's, or of the user whose the store is.
    let users: Vec<u32> = std::fs::metadata(dir.join("state")).iter().map(|m| m.uid()).collect();
    let own = rustix::process::geteuid().as_raw();
    let is_ours = |pid: i32| {
        if !effective_user(pid).is_some_and(|user| user == 0 || user == own || users.contains(&user)) {
            return false;
        }
        let line = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        String::from_utf8_lossy(&line).contains(&mark)
    };
    let mut until = Instant::now() + grace;
    let mut killed = false;
    loop {
        let all = std::fs::read_dir("/proc")?.flatten().filter_map(|e| e.file_name().to_str()?.parse().ok());
        let ours: Vec<i32> = all.filter(|pid| is_ours(*pid)).collect();
        if ours.is_empty() {
            return Ok(());
        }
        if Instant::now() >= until {
            if killed {
                return Err(Error::conflict(format!("processes of the daemon do not end: {ours:?}")));
            }
            for pid in ours {
                // Asked again once the descriptor names it: the number may have been another's in between.
                if let Some(process) =
                    Pid::from_raw(pid).and_then(|p| pidfd_open(p, PidfdFlags::empty()).ok())
                    && is_ours(pid)
                {
                    tracing::warn!(pid, "a process of the daemon does not end; killing it");
                    send(&process, Signal::KILL)?;
                }
            }
            (killed, until) = (true, Instant::now() + KILLED);
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_process_that_has_the_lock_is_its_holder() {
        let dir = tempfile::tempdir().unwrap();
        let lock = dir.path().join("lock");
        std::fs::write(&lock, format!("{}\n", std::process::id())).unwrap();
        assert!(holder(dir.path()).is_none(), "named, and does not have it");
        let held = std::fs::File::open(&lock).unwrap();
        assert_eq!(holder(dir.path()).unwrap().0, std::process::id() as i32);
        std::fs::write(&lock, "1\n").unwrap();
        assert!(holder(dir.path()).is_none(), "another's number");
        drop(held);
    }

    #[test]
    fn what_hangs_is_killed_and_nobody_else() {
        use std::os::unix::process::{CommandExt, ExitStatusExt};
        // As a daemon's command line has it.
        let shell = |id: &str| {
            let mut command = std::process::Command::new("/bin/sh");
            command.args([
                "-c",
                "trap '' TERM; while :; do sleep 1000; done",
                "karstd",
                "--daemon-id",
                id,
                "--parent",
                "1",
            ]);
            command.process_group(0);
            let child = command.spawn().unwrap();
            // Between exec and its arguments there is a moment in which it shows none.
            let line = format!("/proc/{}/cmdline", child.id());
            let end = Instant::now() + Duration::from_secs(60);
            while std::fs::read(&line).unwrap().is_empty() {
                assert!(Instant::now() < end, "it never had arguments");
                std::thread::sleep(Duration::from_millis(1));
            }
            child
        };
        let (mut ours, mut others) = (shell("f0f0f0"), shell("f0f0f1"));
        let own = rustix::process::geteuid().as_raw();
        assert_eq!(effective_user(ours.id() as i32), Some(own));
        let dir = tempfile::tempdir().unwrap();
        end_daemons(dir.path(), "f0f0f0", Duration::ZERO).unwrap();
        assert_eq!(ours.wait().unwrap().signal(), Some(9));
        assert!(others.try_wait().unwrap().is_none(), "another daemon's");
        end_daemons(dir.path(), "f0f0f2", Duration::ZERO).unwrap();
        for group in [ours.id(), others.id()] {
            // SAFETY: process groups of this test, with the shells' children.
            unsafe { libc::kill(-(group as i32), libc::SIGKILL) };
        }
        others.wait().unwrap();
    }

    #[test]
    fn wherever_the_removal_ends_purging_can_go_on() {
        let make = || {
            let base = tempfile::tempdir().unwrap();
            let dir = base.path().join("k");
            for below in ["run", "state", "host/guests"] {
                std::fs::create_dir_all(dir.join(below)).unwrap();
            }
            let files = ["id", "lock", "karstd.log", "store.toml", "state/in-etcd", "host/epoch", ".purge"];
            for file in files {
                std::fs::write(dir.join(file), "abc123\n").unwrap();
            }
            (base, dir)
        };
        let (_base, dir) = make();
        let mut all = vec![];
        empty(&dir, false, |path| {
            all.push(path.file_name().unwrap().to_owned());
            Ok(())
        })
        .unwrap();
        assert_eq!(std::fs::read_dir(&dir).unwrap().count(), 0);
        assert_eq!(all, ["host", "run", "state", ".purge", "karstd.log", "store.toml", "id", "lock"]);
        for end in 0..all.len() {
            let (base, dir) = make();
            let mut left = end;
            let ended = empty(&dir, false, |_| match left {
                0 => Err(Error::internal("died", "")),
                _ => {
                    left -= 1;
                    Ok(())
                }
            });
            assert!(ended.is_err());
            let goes_on = never_began(&dir).unwrap() || Directory::take(&dir).is_ok();
            assert!(goes_on, "{end}: {:?}", std::fs::read_dir(&dir).unwrap().collect::<Vec<_>>());
            let elsewhere = dir.join("state/in-etcd").exists();
            assert!(!elsewhere || dir.join("store.toml").exists(), "{end}: where the records are is said");
            remove(&dir).unwrap();
            assert_eq!(std::fs::read_dir(base.path()).unwrap().count(), 0);
        }
    }

    #[test]
    fn what_a_file_system_has_of_its_own_stays() {
        let base = tempfile::tempdir().unwrap();
        std::fs::create_dir(base.path().join("lost+found")).unwrap();
        std::fs::write(base.path().join("id"), "").unwrap();
        empty(base.path(), true, |_| Ok(())).unwrap();
        assert_eq!(std::fs::read_dir(base.path()).unwrap().count(), 1);
        empty(base.path(), false, |_| Ok(())).unwrap();
        assert_eq!(std::fs::read_dir(base.path()).unwrap().count(), 0);
    }

    #[test]
    fn a_directory_that_never_became_an_instances_is_told_from_one_that_did_and_from_others() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path();
        assert!(never_began(path).unwrap(), "empty");
        for name in ["run", "state", "host"] {
            std::fs::create_dir(path.join(name)).unwrap();
        }
        for name in ["karstd.log", "karstd.log.1", "karstd.log.new"] {
            std::fs::write(path.join(name), "died").unwrap();
        }
        std::fs::write(path.join("lock"), "1\n").unwrap();
        assert!(never_began(path).unwrap());
        std::fs::write(path.join("id.new"), "abc").unwrap();
        assert!(never_began(path).unwrap(), "it died before that became its id");
        std::fs::rename(path.join("id.new"), path.join("id")).unwrap();
        assert!(!never_began(path).unwrap(), "it has an id");
        std::fs::remove_file(path.join("id")).unwrap();
        std::fs::write(path.join("state/x"), "").unwrap();
        assert!(!never_began(path).unwrap(), "there is state");
        std::fs::remove_file(path.join("state/x")).unwrap();
        std::fs::write(path.join("photo.jpg"), "").unwrap();
        assert!(!never_began(path).unwrap(), "somebody's file");
        std::fs::remove_file(path.join("photo.jpg")).unwrap();
        std::fs::remove_file(path.join("karstd.log.1")).unwrap();
        std::os::unix::fs::symlink("/", path.join("karstd.log.1")).unwrap();
        assert!(!never_began(path).unwrap());
        std::fs::remove_file(path.join("karstd.log.1")).unwrap();
        let lock = std::fs::File::open(path.join("lock")).unwrap();
        rustix::fs::flock(&lock, rustix::fs::FlockOperation::LockExclusive).unwrap();
        assert!(!never_began(path).unwrap(), "a daemon is about to begin");
    }
}
