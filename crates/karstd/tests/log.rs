//! The log file of a daemon without a supervisor: the launcher, control and host write to it, and it stays within its bound.
#![allow(clippy::disallowed_methods)] // real processes, real time

#[path = "../../testkit/src/backends.rs"]
mod backends;

use std::{
    collections::BTreeSet,
    fs,
    io::{Read, Write},
    os::unix::{fs::PermissionsExt, net::UnixStream},
    path::Path,
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

const LONG: Duration = Duration::from_secs(120);
const BOUND: u64 = 16 << 10;

/// Ends the daemon and takes away what its bootstrap made on this machine.
struct Karstd<'a>(Child, &'a Path);

impl Drop for Karstd<'_> {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
        let purge = Command::new(env!("CARGO_BIN_EXE_karstd")).arg("--dir").arg(self.1).arg("purge").output();
        if let Ok(output) = purge
            && !output.status.success()
        {
            eprintln!("{}", String::from_utf8_lossy(&output.stderr));
        }
    }
}

/// Asks for what is not there, which control tells its log.
fn ask(dir: &Path) -> Option<String> {
    let mut stream = UnixStream::connect(dir.join("unix.socket")).ok()?;
    stream.set_read_timeout(Some(LONG)).unwrap();
    let request = b"GET /1.0/instances/nobody HTTP/1.1\r\nHost: karst\r\nConnection: close\r\n\r\n";
    stream.write_all(request).ok()?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).ok()?;
    Some(answer)
}

fn until<T>(what: &str, mut probe: impl FnMut() -> Option<T>) -> T {
    let end = Instant::now() + LONG;
    loop {
        if let Some(found) = probe() {
            return found;
        }
        assert!(Instant::now() < end, "{what}: not within {LONG:?}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// Which parts of the programs said something. The line that was written when it was cut may have lost its end.
fn targets_of(text: &str) -> Vec<String> {
    let lines = text.lines().filter_map(|l| serde_json::from_str::<serde_json::Value>(l).ok());
    lines.filter_map(|l| Some(l["target"].as_str()?.to_owned())).collect()
}

#[test]
fn the_log_of_all_three_stays_within_its_bound() {
    if !backends::root() {
        return;
    }
    let base = tempfile::Builder::new().prefix("karstd-").tempdir().unwrap();
    // The control process passes through it.
    fs::set_permissions(base.path(), PermissionsExt::from_mode(0o711)).unwrap();
    let (dir, log) = (base.path().join("k"), base.path().join("log"));
    let child = Command::new(env!("CARGO_BIN_EXE_karstd"))
        .arg("--dir")
        .arg(&dir)
        .args(["--user", "nobody", "--log-format", "json", "--log-file"])
        .arg(&log)
        .args(["--log-file-size", &BOUND.to_string()])
        .env("KARST_LOG", "debug")
        .stdin(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let mut karstd = Karstd(child, &dir);
    let old = base.path().join("log.1");
    let mut targets = BTreeSet::new();
    for time in ["first", "second", "third"] {
        until(&format!("the {time} cut"), || {
            ask(&dir);
            old.exists().then_some(())
        });
        let kept = fs::read_to_string(&old).unwrap();
        assert!(kept.len() as u64 > BOUND, "{}", kept.len());
        targets.extend(targets_of(&kept));
        let shorter = || fs::metadata(&log).is_ok_and(|m| m.len() < kept.len() as u64);
        until("that it begins anew", || shorter().then_some(()));
        fs::remove_file(&old).unwrap();
    }
    // SAFETY: the process of this test.
    unsafe { libc::kill(karstd.0.id() as i32, libc::SIGTERM) };
    let ended = until("the end of the launcher", || karstd.0.try_wait().unwrap());
    assert!(ended.success(), "{ended}");
    let last = fs::read_to_string(&log).unwrap();
    assert!(last.contains("karstd ended; guests run on"), "{last}");
    targets.extend(targets_of(&last));
    // The launcher's, that of control's front end, and the host's, which alone executes programs.
    for part in ["karstd::launcher", "karst_frontend_incus", "karst_host"] {
        assert!(targets.iter().any(|t| t.starts_with(part)), "nothing of {part} is among {targets:?}");
    }
}
