//! Processors and memory of a machine that runs: processors are plugged up to the number that was set aside at its start,
//! memory is taken by its balloon and given back, up to what was set aside then.

use crate::{launch, machine::Machine, qmp::Qmp, record::Record};
use karst_guest::ExecRequest;
use karst_model::{Error, Result, instance::Firmware, maximum, node::AcceleratorKind, spec::Limits};
use serde_json::{Value, json};
use std::{collections::BTreeMap, time::Duration};
use tokio::time::{Instant, sleep, timeout};

const GREETING: Duration = Duration::from_secs(5);
/// How long a guest may take to give a processor or memory back.
const PATIENCE: Duration = Duration::from_secs(15);
const LOOK: Duration = Duration::from_millis(100);
/// A balloon stops short of its goal by a few pages.
const NEAR: u64 = 16 << 20;

/// Processors that a machine can have later: those of this host, as far as a machine of any type can have them. With secure boot a
/// new processor is first the firmware's, in system management mode, and a guest was seen to stand still in that.
pub(crate) fn most_cpus(firmware: Option<Firmware>, now: u32) -> u32 {
    if firmware == Some(Firmware::UefiSecure) {
        return now;
    }
    let host = std::thread::available_parallelism().map_or(1, |n| n.get() as u32);
    now.max(host.min(240))
}

/// May processors come and go, up to `most`? TCG counts those that ever were, and ends with an assertion when one comes that had been
/// there before: there they come, and none goes that could not come back. Of a start by an earlier version, whose firmware is
/// not known, only places beyond both numbers say that its processors can.
fn cpus_live(
    accelerator: AcceleratorKind,
    firmware: Option<Firmware>,
    most: u32,
    now: u32,
    wanted: u32,
) -> bool {
    let kvm = accelerator == AcceleratorKind::Kvm;
    match firmware {
        Some(Firmware::UefiSecure) => false,
        Some(_) => wanted <= most && (kvm || wanted > now),
        None => kvm && most > now.max(wanted),
    }
}

/// Brings a running machine to these numbers; answers the keys that wait for the next start. The caller holds the
/// machine's lock of changes.
///
/// # Errors
/// What QEMU refuses, and conflict when the guest does not give a processor back in time.
pub(crate) async fn apply(machine: &Machine, wanted: &Record) -> Result<Vec<String>> {
    let now = machine.record().clone();
    let mut pending = vec![];
    let balloon = now.hardware.as_ref().is_some_and(|h| h.balloon);
    let size = now.balloon.unwrap_or(now.memory);
    let goal = wanted.balloon.unwrap_or(wanted.memory);
    if size != goal {
        if balloon && goal <= now.memory {
            if !set_memory(machine, goal).await? {
                pending.push("limits.memory".to_owned());
            }
            note(machine, |r| {
                r.balloon = (goal != r.memory).then_some(goal);
            })?;
        } else {
            pending.push("limits.memory".to_owned());
        }
    }
    if now.cpus != wanted.cpus {
        let firmware = now.hardware.as_ref().map(|h| h.firmware);
        if cpus_live(now.accelerator, firmware, now.max_cpus, now.cpus, wanted.cpus) {
            set_cpus(machine, wanted.cpus).await?;
        } else {
            pending.push("limits.cpu".to_owned());
        }
    }
    Ok(pending)
}

/// Keys of what is set aside that a machine started with something else for. More places for processors than were wanted are
/// nobody's loss; with secure boot there are none at all.
pub(crate) fn room(now: &Record, limits: &Limits) -> Vec<String> {
    let memory = limits.memory_maximum.map(|most| most.round_up(1 << 20).bytes());
    let secure = now.hardware.as_ref().is_some_and(|h| h.firmware == Firmware::UefiSecure);
    let waits = [
        (maximum::MEMORY, memory.is_some_and(|most| most != now.memory)),
        (maximum::CPUS, !secure && limits.cpu_maximum.is_some_and(|most| most > now.max_cpus)),
    ];
    waits.into_iter().filter(|(_, waits)| *waits).map(|(key, _)| key.to_owned()).collect()
}

/// Tells the balloon of a machine what it is to leave, before the first instruction, and before the first after its memory was
/// loaded, whose balloon had another goal then.
pub(crate) async fn before_first(qmp: &Qmp, record: &Record) -> Result<()> {
    let has = record.hardware.as_ref().is_some_and(|h| h.balloon);
    if has && (record.balloon.is_some() || record.resuming) {
        let left = record.balloon.unwrap_or(record.memory);
        qmp.execute("balloon", json!({"value": left})).await?;
    }
    Ok(())
}

fn note(machine: &Machine, change: impl FnOnce(&mut Record)) -> Result<()> {
    let mut record = machine.record();
    change(&mut record);
    record.write(&machine.dir)
}

/// Answers whether the guest has followed; it goes on doing so later, too.
async fn set_memory(machine: &Machine, bytes: u64) -> Result<bool> {
    let (qmp, _) = Qmp::connect(&machine.dir, launch::QMP, GREETING).await?;
    qmp.execute("balloon", json!({"value": bytes})).await?;
    let end = Instant::now() + PATIENCE;
    loop {
        let now = qmp.execute("query-balloon", json!({})).await?;
        if now.get("actual").and_then(Value::as_u64).is_some_and(|n| n.abs_diff(bytes) <= NEAR) {
            return Ok(true);
        }
        if Instant::now() >= end {
            return Ok(false);
        }
        sleep(LOOK).await;
    }
}

/// A place for a processor.
struct Place {
    order: Vec<u64>,
    kind: String,
    properties: Value,
    /// QEMU's path of the processor in it.
    path: Option<String>,
}

async fn places(qmp: &Qmp) -> Result<Vec<Place>> {
    let list = qmp.execute("query-hotpluggable-cpus", json!({})).await?;
    let mut places: Vec<Place> = list
        .as_array()
        .into_iter()
        .flatten()
        .map(|p| {
            let properties = p.get("props").cloned().unwrap_or_default();
            let number = |k: &str| properties.get(k).and_then(Value::as_u64).unwrap_or(0);
            Place {
                order: ["socket-id", "die-id", "module-id", "core-id", "thread-id"].map(number).to_vec(),
                kind: p.get("type").and_then(Value::as_str).unwrap_or_default().to_owned(),
                path: p.get("qom-path").and_then(Value::as_str).map(str::to_owned),
                properties,
            }
        })
        .collect();
    places.sort_by(|a, b| a.order.cmp(&b.order));
    Ok(places)
}

async fn set_cpus(machine: &Machine, wanted: u32) -> Result<()> {
    let (qmp, _) = Qmp::connect(&machine.dir, launch::QMP, GREETING).await?;
    loop {
        let all = places(&qmp).await?;
        let have = all.iter().filter(|p| p.path.is_some()).count() as u32;
        note(machine, |r| r.cpus = have)?;
        if have == wanted {
            break;
        }
        if have < wanted {
            let free = all.iter().find(|p| p.path.is_none());
            let free = free.ok_or_else(|| Error::internal("QEMU has no place for a processor", have))?;
            let mut device = free.properties.clone();
            device["driver"] = free.kind.as_str().into();
            device["id"] = format!("cpu-{have}").into();
            qmp.execute("device_add", device).await?;
        } else if let Some(path) = all.iter().rev().find_map(|p| p.path.as_deref()) {
            unplug(&qmp, path, have).await?;
        }
    }
    bring_up(machine).await;
    Ok(())
}

async fn unplug(qmp: &Qmp, path: &str, have: u32) -> Result<()> {
    let end = Instant::now() + PATIENCE;
    qmp.execute("device_del", json!({"id": path})).await?;
    loop {
        let left = places(qmp).await?.iter().filter(|p| p.path.is_some()).count() as u32;
        if left < have {
            return Ok(());
        }
        if Instant::now() >= end {
            return Err(Error::conflict(
                "the guest does not give a processor back; it may still boot, or need a restart for it",
            )
            .at("config.limits.cpu"));
        }
        sleep(LOOK).await;
    }
}

/// A Linux does not use new processors by itself everywhere; its agent, if there is one, sees to it.
async fn bring_up(machine: &Machine) {
    let line =
        "for c in /sys/devices/system/cpu/cpu[0-9]*/online; do [ \"$(cat $c)\" = 1 ] || echo 1 >$c; done";
    let request = ExecRequest {
        command: vec!["/bin/sh".into(), "-c".into(), line.into()],
        environment: BTreeMap::new(),
        uid: 0,
        gid: 0,
        cwd: None,
        terminal: None,
        term: None,
    };
    let work = async {
        let exec = machine.inside.exec(&BTreeMap::new(), request).await?;
        exec.control.wait().await
    };
    match timeout(Duration::from_secs(10), work).await {
        Ok(Ok(0)) => {}
        other => tracing::debug!(?other, "new processors may wait for the guest to take them up"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use AcceleratorKind::{Kvm, Tcg};
    use karst_model::{ByteSize, spec::MachineSpec};

    #[test]
    fn a_processor_that_cannot_come_back_does_not_go() {
        let (bios, secure) = (Some(Firmware::Bios), Some(Firmware::UefiSecure));
        // Emulated ones come and stay.
        assert!(cpus_live(Tcg, bios, 4, 2, 4) && cpus_live(Tcg, Some(Firmware::Uefi), 4, 2, 3));
        assert!(!cpus_live(Tcg, bios, 4, 2, 1) && !cpus_live(Tcg, bios, 4, 2, 5));
        // With secure boot neither: there are as many places as at the start.
        assert_eq!(most_cpus(secure, 2), 2);
        assert!(!cpus_live(Kvm, secure, 8, 2, 4) && !cpus_live(Tcg, secure, 8, 2, 4));
        assert!(cpus_live(Kvm, bios, 8, 2, 8) && cpus_live(Kvm, bios, 8, 8, 1));
        assert!(!cpus_live(Kvm, bios, 8, 2, 9));
        // Of an earlier version.
        assert!(
            cpus_live(Kvm, None, 8, 2, 4) && !cpus_live(Kvm, None, 4, 4, 2) && !cpus_live(Tcg, None, 4, 2, 4)
        );
        assert!(most_cpus(bios, 300) == 300 && most_cpus(None, 1) >= 1);
    }

    #[test]
    fn what_is_set_aside_is_of_the_start() {
        let (machine, _) = crate::machine::without_owner("/nonexistent".into());
        let mut record = machine.record().clone();
        (record.memory, record.max_cpus) = (1 << 30, 4);
        let of = |record: &Record, memory: Option<ByteSize>, cpus: Option<u32>| {
            room(record, &Limits { memory_maximum: memory, cpu_maximum: cpus, ..Limits::default() })
        };
        assert!(of(&record, None, None).is_empty());
        assert!(of(&record, Some(ByteSize::gib(1)), Some(4)).is_empty());
        // In whole MiB, and of processors there may be more places.
        assert!(of(&record, Some(ByteSize((1 << 30) - 1024)), Some(2)).is_empty());
        assert_eq!(of(&record, Some(ByteSize::gib(2)), None), [maximum::MEMORY]);
        assert_eq!(of(&record, Some(ByteSize::mib(512)), Some(5)), [maximum::MEMORY, maximum::CPUS]);
        let secure = MachineSpec { firmware: Firmware::UefiSecure, ..karst_guest::samples::machine(7) };
        record.hardware = Some(secure);
        assert!(of(&record, None, Some(5)).is_empty());
    }
}
