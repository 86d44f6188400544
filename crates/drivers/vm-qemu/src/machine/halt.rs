//! Machines that an error halts: why, who keeps one halted while its disks are copied, and how one goes on by itself when what
//! was full has room again. QEMU's process lives all the while, with the disks open and with what it could not write yet.

use super::{Owner, RuntimeState, run_state};
use crate::{news, record::Record};
use karst_model::{Result, instance::HaltReason};
use serde_json::Value;
use std::{path::PathBuf, time::Duration};
use tokio::time::Instant;

/// Between two looks at whether a full disk has room again.
pub(super) const ROOM_EVERY: Duration = Duration::from_secs(5);
/// What must be free before a guest that a full disk halted goes on.
const ROOM: u64 = 64 << 20;

/// What a machine does by QEMU's run state. One that an error halted and that was asked to stand still is paused.
pub(crate) fn seen(status: &str, record: &Record) -> RuntimeState {
    match run_state(status, record.held) {
        RuntimeState::Error if record.kept_halted => RuntimeState::Paused,
        other => other,
    }
}

/// Why QEMU's run state is an error; `disk`: the slot of one that failed, and whether for want of space.
pub(super) fn reason(status: &str, disk: Option<(Option<String>, bool)>) -> Option<HaltReason> {
    Some(match status {
        "io-error" => {
            let (slot, full) = disk.unwrap_or_default();
            HaltReason::Disk { slot, full }
        }
        "guest-panicked" => HaltReason::Panicked,
        "watchdog" => HaltReason::Watchdog,
        "internal-error" => HaltReason::Internal,
        _ => return None,
    })
}

/// Of QEMU's answer to `query-block`: the slot of the disk that failed, and whether for want of space. One that is full says more
/// than one that fails for another reason.
pub(super) fn failed_disk(answer: &Value) -> Option<(Option<String>, bool)> {
    let disks = answer.as_array()?;
    let with = |status: &str| {
        let found = disks.iter().find(|d| d.get("io-status").and_then(Value::as_str) == Some(status))?;
        Some((found.get("qdev").and_then(Value::as_str).and_then(news::slot_of), status == "nospace"))
    };
    with("nospace").or_else(|| with("failed"))
}

impl Owner {
    /// It is halted by an error, which nobody asked for.
    pub(super) fn halted(&self, why: Option<HaltReason>) {
        let kept = self.machine.record().kept_halted;
        let state = if kept { RuntimeState::Paused } else { RuntimeState::Error };
        let news = self.machine.observed.send_if_modified(|o| {
            // What is known of the disk is not forgotten for what says less.
            let less = matches!(why, None | Some(HaltReason::Disk { slot: None, full: false }));
            let news = (!(less && o.halt.is_some()) && o.halt != why) || o.state != state;
            if !(less && o.halt.is_some()) {
                o.halt.clone_from(&why);
            }
            o.state = state;
            news
        });
        if news {
            (self.tell.changed)(self.machine.observed.borrow().clone());
        }
    }

    /// Whether what an error halted is to stay so until it is resumed, also over a new start of the host's daemon.
    pub(super) fn keep_halted(&self, kept: bool) -> Result<()> {
        let mut record = self.machine.record();
        record.kept_halted = kept;
        record.write(&self.machine.dir)
    }

    /// What was kept halted is halted as before, and goes on by itself when it can.
    pub(super) async fn release(&mut self) -> Result<()> {
        self.keep_halted(false)?;
        self.refresh().await;
        if self.full.is_some() {
            self.full = Some(Instant::now());
        }
        Ok(())
    }

    /// A guest that a full disk halted goes on by itself when there is room. A block device does not tell: there it is tried,
    /// and QEMU halts the guest again when it was too early.
    pub(super) async fn go_on_with_room(&mut self) {
        if self.state() != RuntimeState::Error {
            return;
        }
        let devices = self.machine.record().devices.clone();
        let paths: Vec<PathBuf> = devices
            .into_iter()
            .flat_map(|d| d.disks)
            .filter(|d| !d.readonly && !d.cdrom)
            .map(|d| d.path)
            .collect();
        // What changes its disk lets it go on by itself.
        let machine = self.machine.clone();
        let Ok(_turn) = machine.copying.try_lock() else {
            self.full = Some(Instant::now() + ROOM_EVERY);
            return;
        };
        let room = tokio::task::spawn_blocking(move || paths.iter().all(|p| has_room(p))).await;
        if !room.unwrap_or(false) {
            self.full = Some(Instant::now() + ROOM_EVERY);
            return;
        }
        match self.execute("cont").await {
            Ok(_) => {
                tracing::info!(instance = %self.machine.record().instance, "a guest that a full disk halted goes on");
                self.refresh().await;
            }
            Err(e) => {
                tracing::debug!(error = %e, "a halted guest does not go on yet");
                self.full = Some(Instant::now() + ROOM_EVERY);
            }
        }
    }
}

/// Has the file system of a disk's file room for more? What cannot be asked is no reason to wait.
fn has_room(path: &std::path::Path) -> bool {
    match rustix::fs::statvfs(path) {
        Ok(s) if path.is_file() => s.f_bavail.saturating_mul(s.f_frsize) >= ROOM,
        _ => true,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{devices::device_id, machine::without_owner};
    use RuntimeState as S;
    use serde_json::json;

    #[test]
    fn why_a_machine_is_halted() {
        let blocks = json!([
            {"device": "", "qdev": "d-cdrom", "io-status": "ok"},
            {"device": "", "qdev": device_id("scsi1"), "io-status": "failed"},
            {"device": "", "qdev": device_id("scsi0"), "io-status": "nospace"},
        ]);
        let full = failed_disk(&blocks);
        assert_eq!(full, Some((Some("scsi0".into()), true)));
        let known = HaltReason::Disk { slot: Some("scsi0".into()), full: true };
        assert_eq!(reason("io-error", full), Some(known));
        // An older QEMU that does not say which.
        assert_eq!(failed_disk(&json!([{"device": ""}])), None);
        assert_eq!(reason("io-error", None), Some(HaltReason::Disk { slot: None, full: false }));
        assert_eq!(reason("guest-panicked", None), Some(HaltReason::Panicked));
        assert_eq!(reason("running", None), None);
    }

    #[test]
    fn one_that_is_kept_halted_is_paused() {
        let (machine, _receiver) = without_owner(PathBuf::from("/nonexistent"));
        let mut record = machine.record().clone();
        assert_eq!(seen("io-error", &record), S::Error);
        record.kept_halted = true;
        assert_eq!(seen("io-error", &record), S::Paused);
        assert_eq!(seen("running", &record), S::Running);
    }
}
