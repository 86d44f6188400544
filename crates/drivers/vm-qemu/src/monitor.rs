//! QEMU's monitor for people: commands that the host's administrator granted, run as they are said, and how fast memory is
//! written.
//!
//! What such a command does Karst neither knows nor undoes. That one was run is written down first, for as long as the
//! machine runs.

use crate::{launch, machine::Inner, qmp::Qmp};
use karst_guest::{DirtyRate, MonitorAnswer};
use karst_model::{Result, guest::DirtyRateMode, instance::RuntimeState};
use serde_json::{Value, json};
use std::{
    fs::{self, File},
    io::ErrorKind,
    path::Path,
    time::Duration,
};

const GREETING: Duration = Duration::from_secs(5);
/// How long a command may take; one that takes longer goes on without anybody to hear of it.
const COMMAND: Duration = Duration::from_secs(30);
/// Stands in the state directory of a machine in which a command was run.
const MARK: &str = "monitored";

async fn connect(machine: &Inner) -> Result<Qmp> {
    Ok(Qmp::connect(&machine.dir, launch::QMP, GREETING).await?.0)
}

/// Was a command run in it since its start?
pub(crate) fn is_marked(dir: &Path) -> bool {
    dir.join(MARK).exists()
}

/// Forgets that one was run: it starts anew.
pub(crate) fn unmark(dir: &Path) -> Result<()> {
    match fs::remove_file(dir.join(MARK)) {
        Err(e) if e.kind() != ErrorKind::NotFound => Err(e.into()),
        _ => Ok(()),
    }
}

/// Runs a command.
pub(crate) async fn run(machine: &Inner, command: &str, arguments: Value) -> Result<MonitorAnswer> {
    if machine.observed.borrow().state == RuntimeState::Stopped {
        return Err(karst_model::Error::not_found("the guest is not running"));
    }
    let qmp = connect(machine).await?;
    let instance = machine.record().instance;
    match File::create_new(machine.dir.join(MARK)) {
        Ok(_) => {
            tracing::warn!(%instance, command, "a command of QEMU's monitor is run in a guest on request: what is recorded of it may no longer hold until it is stopped");
        }
        Err(e) if e.kind() == std::io::ErrorKind::AlreadyExists => {
            tracing::info!(%instance, command, "a command of QEMU's monitor is run in a guest on request");
        }
        Err(e) => return Err(e.into()),
    }
    Ok(match qmp.ask(COMMAND, command, arguments).await? {
        Ok(value) => MonitorAnswer::Returned(value),
        Err(refusal) => MonitorAnswer::Refused { class: refusal.class, description: refusal.description },
    })
}

/// Begins to measure.
///
/// # Errors
/// Conflict while it is being measured, and what QEMU refuses: a way that the machine is not made for.
pub(crate) async fn measure_dirty_rate(machine: &Inner, seconds: u32, mode: DirtyRateMode) -> Result<()> {
    let qmp = connect(machine).await?;
    let arguments = json!({"calc-time": seconds, "mode": mode.as_str()});
    match qmp.ask(COMMAND, "calc-dirty-rate", arguments).await? {
        Ok(_) => Ok(()),
        // One at a time.
        Err(refusal) if refusal.description.contains("already being measured") => {
            Err(karst_model::Error::conflict("it is being measured already"))
        }
        Err(refusal) if refusal.description.contains("is not enabled") => {
            let text = format!(
                "this machine cannot be measured by {}: a ring needs hardware.features with dirty-ring, and KVM; a bitmap has to be \
                 without",
                mode.as_str()
            );
            Err(karst_model::Error::unsupported(text))
        }
        Err(refusal) => Err(refusal.into()),
    }
}

/// What `query-dirty-rate` says; nothing before anybody asked.
pub(crate) fn dirty_rate(said: &Value) -> Option<DirtyRate> {
    let status = said.get("status")?.as_str()?;
    if status == "unstarted" {
        return None;
    }
    Some(DirtyRate {
        measured: status == "measured",
        started: said.get("start-time")?.as_i64()?,
        seconds: i32::try_from(said.get("calc-time")?.as_i64()?).ok()?,
        rate: said.get("dirty-rate").and_then(Value::as_i64).filter(|r| *r >= 0),
        mode: said.get("mode").and_then(Value::as_str).and_then(DirtyRateMode::named).unwrap_or_default(),
        processors: said
            .get("vcpu-dirty-rate")
            .and_then(Value::as_array)
            .into_iter()
            .flatten()
            .filter_map(processor)
            .collect(),
    })
}

fn processor(said: &Value) -> Option<(u32, i64)> {
    Some((u32::try_from(said.get("id")?.as_u64()?).ok()?, said.get("dirty-rate")?.as_i64()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rates_are_told_once_they_were_asked_for() {
        let said = |status: &str, rate: Value| json!({"status": status, "start-time": 9, "calc-time": 2, "dirty-rate": rate});
        assert_eq!(dirty_rate(&json!({"status": "unstarted", "start-time": 0, "calc-time": 0})), None);
        let measuring = dirty_rate(&said("measuring", Value::Null)).unwrap();
        assert_eq!((measuring.measured, measuring.rate), (false, None));
        let measured = dirty_rate(&said("measured", json!(12))).unwrap();
        let mode = DirtyRateMode::PageSampling;
        let wanted =
            DirtyRate { measured: true, started: 9, seconds: 2, rate: Some(12), mode, processors: vec![] };
        assert_eq!(measured, wanted);
        let mut by_ring = said("measured", json!(12));
        by_ring["mode"] = "dirty-ring".into();
        by_ring["vcpu-dirty-rate"] =
            json!([{"id": 0, "dirty-rate": 5}, {"id": 1, "dirty-rate": 7}, {"id": 2}]);
        let by_ring = dirty_rate(&by_ring).unwrap();
        assert_eq!((by_ring.mode, by_ring.processors), (DirtyRateMode::DirtyRing, vec![(0, 5), (1, 7)]));
    }

    #[test]
    fn a_mark_stays_until_the_next_start() {
        let dir = tempfile::tempdir().unwrap();
        assert!(!is_marked(dir.path()));
        File::create_new(dir.path().join(MARK)).unwrap();
        assert!(is_marked(dir.path()) && File::create_new(dir.path().join(MARK)).is_err());
        unmark(dir.path()).unwrap();
        unmark(dir.path()).unwrap();
        assert!(!is_marked(dir.path()));
    }
}
