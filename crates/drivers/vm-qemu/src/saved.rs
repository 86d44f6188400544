//! The memory of a machine in a directory: over a stop (`saved` of the guest's directory) or with a snapshot.
//!
//! It is whole when the file `ram` is there, which is renamed last. Memory that is kept over a stop is good only for as
//! long as the machine's processors stand still since: whoever lets them run takes it away first ([`discard`]). So old
//! memory never meets newer disks.

use crate::{launch, machine::Inner, qmp::Qmp, record::Record};
use karst_guest::{MemoryShape, ResolvedDisk};
use karst_model::{
    Error, ErrorKind, Result,
    board::Board,
    device::{DiskCache, PortDevice, PortEnd},
    spec::{LineSpec, MachineSpec},
};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use std::{
    fs::File,
    io::Write,
    os::{
        fd::AsFd,
        unix::fs::{DirBuilderExt, OpenOptionsExt},
    },
    path::{Path, PathBuf},
    time::Duration,
};
use tokio::time::sleep;

/// Beside the guest's other files.
const SAVED: &str = "saved";
const RAM: &str = "ram";
const RAM_NEW: &str = "ram.new";
const SHAPE: &str = "shape.json";
/// Its files; the last says that it is whole.
pub(crate) const FILES: [&str; 2] = [SHAPE, RAM];

/// What a guest sees of a port.
fn seen(line: &LineSpec) -> LineSpec {
    // QEMU's own side of an agent has a state of its own.
    let to = match line.device.to {
        PortEnd::Agent { .. } => line.device.to.clone(),
        _ => PortEnd::Null {},
    };
    let device = PortDevice { place: line.device.place.clone(), to, log: None };
    LineSpec { name: line.name.clone(), device }
}
/// The name of the descriptor in QEMU.
const FD: &str = "state";
const GREETING: Duration = Duration::from_secs(10);
/// Between two looks at how far QEMU is.
const LOOK: Duration = Duration::from_millis(100);

/// What must be there again, as it was, for the memory to be of use.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Shape {
    hardware: Option<MachineSpec>,
    accelerator: String,
    cpus: u32,
    max_cpus: u32,
    memory: u64,
    balloon: Option<u64>,
    /// It had what belongs to SPICE.
    #[serde(default)]
    spice: bool,
    /// Slots and addresses.
    disks: Vec<(String, Option<String>)>,
    nics: Vec<(String, Option<String>, String)>,
    /// What of them is not as usual, by slot.
    #[serde(default)]
    options: Vec<(String, String)>,
}

impl Shape {
    fn of(record: &Record) -> Self {
        let devices = record.devices.as_ref();
        let mut disks: Vec<_> =
            devices.iter().flat_map(|d| &d.disks).map(|d| (d.slot.clone(), d.pci.clone())).collect();
        let mut nics: Vec<_> = devices
            .iter()
            .flat_map(|d| &d.nics)
            .map(|n| (n.slot.clone(), n.pci.clone(), n.mac.clone()))
            .collect();
        disks.sort();
        nics.sort();
        let disks_options = devices.iter().flat_map(|d| &d.disks).map(|d| (&d.slot, d.io.options.text()));
        let nics_options = devices.iter().flat_map(|d| &d.nics).map(|n| (&n.slot, n.options.text()));
        let mut options: Vec<_> = disks_options
            .chain(nics_options)
            .filter_map(|(slot, text)| Some((slot.clone(), text?)))
            .collect();
        // The guest is told that such a disk has no cache.
        let through = |d: &&ResolvedDisk| {
            !d.cdrom && matches!(d.io.cache, Some(DiskCache::Writethrough | DiskCache::Directsync))
        };
        let through = devices.iter().flat_map(|d| &d.disks).filter(through);
        options.extend(through.map(|d| (d.slot.clone(), "write-cache=off".to_owned())));
        options.sort();
        Self {
            hardware: record.hardware.clone().map(|h| MachineSpec {
                resume: false,
                paused: false,
                fresh_firmware: false,
                boot_menu: false,
                ends_on_reboot: false,
                halts_on_crash: false,
                // The time goes on as it was saved.
                local_time: false,
                // Nor who looks at it, and how, and what its ports lead to.
                screen: Default::default(),
                lines: h.lines.iter().map(seen).collect(),
                board: Board { clock_start: None, clock_zone: None, balloon_period: None, ..h.board.clone() },
                // Who serves the disks is not the guest's to see.
                iothreads: vec![],
                scsi_iothread: None,
                // Nor what its TPM is kept with.
                tpm_secret: None,
                // The firmware told them when it started.
                strings: vec![],
                accelerator: None,
                ..h
            }),
            accelerator: record.accelerator.as_str().to_owned(),
            cpus: record.cpus,
            max_cpus: record.max_cpus,
            memory: record.memory,
            balloon: record.balloon,
            spice: record.spice,
            disks,
            nics,
            options,
        }
    }

    fn wanted_spice(&self) -> bool {
        self.hardware.as_ref().is_some_and(|h| h.spice)
    }

    /// What differs, in words.
    fn differs(&self, other: &Self) -> Option<&'static str> {
        if self == other {
            return None;
        }
        Some(match () {
            () if self.memory != other.memory => "limits.memory",
            () if self.cpus != other.cpus => "limits.cpu",
            () if self.disks != other.disks => "its disks",
            () if self.nics != other.nics => "its NICs",
            () if self.options != other.options => {
                "io.options or io.cache of its disks, or io.options of its NICs"
            }
            () if self.accelerator != other.accelerator => "whether KVM is usable",
            () if self.wanted_spice() != other.wanted_spice() => "hardware.spice",
            () if self.spice != other.spice => {
                "whether QEMU has SPICE (the package qemu-system-modules-spice)"
            }
            () => "its hardware",
        })
    }
}

/// Where memory is kept over a stop, of the guest in `dir`.
pub(crate) fn place(dir: &Path) -> PathBuf {
    dir.join(SAVED)
}

/// Is there memory in `place`, whole?
pub(crate) fn there(place: &Path) -> bool {
    place.join(RAM).is_file()
}

/// Takes it away; fine when there is none. It is gone for good when this answers.
///
/// # Errors
/// When it cannot be removed.
pub(crate) fn discard(dir: &Path) -> Result<()> {
    let place = place(dir);
    match std::fs::remove_file(place.join(RAM)) {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => {}
        Err(e) => return Err(e.into()),
        Ok(()) => File::open(&place)?.sync_all()?,
    }
    match std::fs::remove_dir_all(&place) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(e.into()),
        _ => Ok(()),
    }
}

/// Refuses a start from memory that does not fit the machine as it would be now, or that is not there. What the machine had
/// been given beyond its limits (room for more processors, memory that its balloon holds) it gets again, and of a share of the
/// host's memory, in percent, what that was then.
///
/// # Errors
/// Not found, conflict naming what differs.
pub(crate) fn demand_fit(place: &Path, share: Option<u32>, record: &mut Record) -> Result<()> {
    if !there(place) {
        return Err(Error::not_found("there is no saved memory of this virtual machine; start it without"));
    }
    demand_shape(serde_json::from_slice(&std::fs::read(place.join(SHAPE))?)?, share, record)
}

/// What must be there again, of the machine as it runs, for memory in a file of the host.
///
/// # Errors
/// Unsupported for one that was started by a version that did not write down what it is.
pub(crate) fn shape(machine: &Inner) -> Result<MemoryShape> {
    let record = machine.record();
    let hardware = record.hardware.as_ref().ok_or_else(|| {
        Error::unsupported("the virtual machine was started by an earlier version; restart it first")
    })?;
    Ok(MemoryShape {
        uuid: hardware.uuid,
        machine: hardware.machine.clone(),
        words: serde_json::to_string(&Shape::of(&record))?,
    })
}

/// As [`demand_fit`], by the words of [`shape`] that were in a file.
///
/// # Errors
/// Invalid for what are no such words, conflict naming what differs.
pub(crate) fn demand_words_fit(shape: &str, share: Option<u32>, record: &mut Record) -> Result<()> {
    let shape = serde_json::from_str(shape).map_err(|e| {
        Error::invalid(
            "path",
            "the file does not say of what machine its memory is, or not as QEMU's host does",
        )
        .with_context(e)
    })?;
    demand_shape(shape, share, record)
}

fn demand_shape(mut shape: Shape, share: Option<u32>, record: &mut Record) -> Result<()> {
    record.max_cpus = shape.max_cpus;
    if let Some(percent) = share {
        // A host counts its memory a little otherwise with another kernel. Half a percent of it is no other share.
        let then = shape.balloon.unwrap_or(shape.memory);
        if then.abs_diff(record.memory) < record.memory / (2 * u64::from(percent.max(1))) {
            record.memory = then;
        }
    }
    // One that has a balloon already says by itself what is memory and what it is to leave.
    if record.balloon.is_none() && shape.balloon == Some(record.memory) {
        (record.memory, record.balloon) = (shape.memory, shape.balloon);
    }
    if shape.memory == record.memory {
        // The balloon is told what it is to leave now before the guest goes on.
        shape.balloon = record.balloon;
    }
    match shape.differs(&Shape::of(record)) {
        None => Ok(()),
        Some(what) => Err(Error::conflict(format!(
            "the virtual machine is not what it was when its memory was saved: {what} changed; change it back, or start it \
             without its memory (--stateless)"
        ))),
    }
}

/// Refuses a machine that shares directories by virtiofs: with its memory QEMU would save what virtiofsd knows of files, which are
/// others by the time that it is loaded. Of 9p it refuses what a guest has mounted by itself.
pub(crate) fn demand_alone(machine: &Inner) -> Result<()> {
    let record = machine.record();
    let shared = record.directories.iter().find(|d| record.virtiofs.contains(&d.slot));
    shared.map_or(Ok(()), |directory| {
        let text =
            "the memory of a virtual machine that shares directories cannot be kept; start it without them";
        Err(Error::unsupported(text).at(format!("devices.{}", directory.name)))
    })
}

/// Writes the memory of a machine that stands still into `place`, whole or not at all.
///
/// # Errors
/// Unsupported for a machine with devices that QEMU cannot save, and what writing lacks.
pub(crate) async fn save(machine: &Inner, place: &Path) -> Result<()> {
    if there(place) {
        return Ok(());
    }
    demand_alone(machine)?;
    match std::fs::DirBuilder::new().mode(0o700).create(place) {
        Err(e) if e.kind() != std::io::ErrorKind::AlreadyExists => return Err(e.into()),
        _ => {}
    }
    let new = place.join(RAM_NEW);
    let outcome = async {
        let file = File::options()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .custom_flags(libc::O_NOFOLLOW)
            .open(&new)?;
        write(&machine.dir, &file).await?;
        let shape = serde_json::to_vec(&Shape::of(&machine.record()))?;
        let place = place.to_owned();
        let synced = tokio::task::spawn_blocking(move || {
            file.sync_all()?;
            let mut out = File::options()
                .write(true)
                .create(true)
                .truncate(true)
                .mode(0o600)
                .open(place.join(SHAPE))?;
            out.write_all(&shape)?;
            out.sync_all()?;
            std::fs::rename(place.join(RAM_NEW), place.join(RAM))?;
            File::open(&place)?.sync_all()?;
            if let Some(above) = place.parent() {
                File::open(above)?.sync_all()?;
            }
            Ok::<_, std::io::Error>(())
        });
        Ok(synced.await.map_err(|e| Error::internal("the memory could not be written", e))??)
    };
    outcome.await.inspect_err(|_| drop(std::fs::remove_dir_all(place)))
}

/// A migration as QEMU tells of it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Migration {
    pub(crate) status: String,
    pub(crate) error: String,
    /// Bytes of memory that are to be written, and that are left.
    pub(crate) total: u64,
    pub(crate) remaining: u64,
}

impl Migration {
    fn of(said: &Value) -> Self {
        let text = |k: &str| said.get(k).and_then(Value::as_str).unwrap_or_default().to_owned();
        let bytes = |k: &str| said.get("ram").and_then(|ram| ram.get(k)?.as_u64()).unwrap_or(0);
        Self {
            status: text("status"),
            error: text("error-desc"),
            total: bytes("total"),
            remaining: bytes("remaining"),
        }
    }

    /// Does it go on, or hold the machine?
    pub(crate) fn goes_on(&self) -> bool {
        ["setup", "active", "device", "pre-switchover", "cancelling", "postmigrate"]
            .contains(&self.status.as_str())
    }

    /// Why it failed, if it did.
    pub(crate) fn failure(&self) -> Option<Error> {
        matches!(self.status.as_str(), "failed" | "cancelled")
            .then(|| explain(Error::internal("the memory could not be written", &self.error)))
    }
}

pub(crate) async fn migration(qmp: &Qmp) -> Result<Migration> {
    Ok(Migration::of(&qmp.execute("query-migrate", json!({})).await?))
}

/// Breaks off what is being written.
///
/// # Errors
/// When QEMU does not answer.
pub(crate) async fn break_off(qmp: &Qmp) -> Result<()> {
    while migration(qmp).await?.goes_on() {
        qmp.execute("migrate_cancel", json!({})).await?;
        sleep(LOOK).await;
    }
    Ok(())
}

/// Has QEMU begin to write the state of a machine that stands still.
///
/// # Errors
/// Unsupported for a machine with devices that QEMU cannot save.
pub(crate) async fn begin(qmp: &Qmp, file: impl AsFd) -> Result<()> {
    // An earlier attempt may have been broken off: one that still runs is ended, and QEMU saves a machine only once
    // between two runs of its processors.
    break_off(qmp).await?;
    let status = qmp.execute("query-status", json!({})).await?;
    if matches!(status.get("status").and_then(Value::as_str), Some("postmigrate" | "finish-migrate")) {
        qmp.execute("cont", json!({})).await?;
        qmp.execute("stop", json!({})).await?;
    }
    // No limit: nobody waits for the machine while it stands still.
    qmp.execute("migrate-set-parameters", json!({"max-bandwidth": 1u64 << 40})).await?;
    qmp.execute_with_fd("getfd", json!({"fdname": FD}), file.as_fd()).await?;
    qmp.execute("migrate", json!({"uri": format!("fd:{FD}")})).await.map_err(explain)?;
    Ok(())
}

/// Until all is written. QEMU serves one connection at a time: others look at how far it is meanwhile.
async fn write(dir: &Path, file: &File) -> Result<()> {
    {
        let (qmp, _) = Qmp::connect(dir, launch::QMP, GREETING).await?;
        begin(&qmp, file).await?;
    }
    loop {
        let now = {
            let (qmp, _) = Qmp::connect(dir, launch::QMP, GREETING).await?;
            migration(&qmp).await?
        };
        match now.failure() {
            _ if now.status == "completed" => return Ok(()),
            Some(e) => return Err(e),
            None => sleep(LOOK).await,
        }
    }
}

/// QEMU's reason in words.
fn explain(e: Error) -> Error {
    let text = e.context.clone();
    let text = text.as_deref().unwrap_or_default();
    if text.contains("Migration is disabled")
        || text.contains("non-migratable")
        || text.contains("unmigratable")
    {
        return Error::new(
            ErrorKind::Unsupported,
            "this virtual machine has a device whose state QEMU cannot save; set migration.stateful=true and start it anew",
        )
        .with_context(text);
    }
    if text.contains("No space left") {
        return Error::new(ErrorKind::Quota, "there is not enough room on this host's disk for the memory")
            .with_context(text);
    }
    e
}

/// Loads memory into a QEMU that waits for it and has executed nothing yet.
///
/// # Errors
/// When QEMU refuses; its last words say why.
pub(crate) async fn load(qmp: &Qmp, place: &Path) -> Result<()> {
    let file = File::options().read(true).custom_flags(libc::O_NOFOLLOW).open(place.join(RAM))?;
    load_from(qmp, file).await
}

/// The same from where a file stands.
///
/// # Errors
/// Those of [`load`].
pub(crate) async fn load_from(qmp: &Qmp, file: impl AsFd) -> Result<()> {
    qmp.execute_with_fd("getfd", json!({"fdname": FD}), file.as_fd()).await?;
    qmp.execute("migrate-incoming", json!({"uri": format!("fd:{FD}")})).await?;
    loop {
        let status = qmp.execute("query-status", json!({})).await?;
        if status.get("status").and_then(Value::as_str) != Some("inmigrate") {
            return Ok(());
        }
        let now = migration(qmp).await?;
        if now.status == "failed" {
            return Err(Error::internal("the saved memory could not be loaded", now.error));
        }
        sleep(LOOK).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_qemu_tells_of_a_migration() {
        let said = json!({"status": "active", "ram": {"total": 100, "remaining": 40, "transferred": 60}});
        let now = Migration::of(&said);
        assert!(now.goes_on() && now.failure().is_none(), "{now:?}");
        assert_eq!((now.total, now.remaining), (100, 40));
        assert_eq!(Migration::of(&json!({})), Migration::default());
        assert!(!Migration::default().goes_on());
        let failed =
            Migration::of(&json!({"status": "failed", "error-desc": "write: No space left on device"}));
        assert!(failed.failure().is_some_and(|e| e.is(ErrorKind::Quota)));
        assert!(Migration::of(&json!({"status": "cancelled"})).failure().is_some());
    }

    #[test]
    fn words_of_another_machine_name_what_differs() {
        let (machine, _) = crate::machine::without_owner("/nonexistent".into());
        assert!(shape(&machine).unwrap_err().is(ErrorKind::Unsupported), "of an earlier version");
        machine.record().hardware = Some(karst_guest::samples::machine(7));
        let mut record = machine.record().clone();
        let MemoryShape { uuid, words, .. } = shape(&machine).unwrap();
        assert_eq!(uuid, uuid::Uuid::from_u128(7));
        demand_words_fit(&words, None, &mut record).unwrap();
        record.hardware.as_mut().unwrap().board.clock_start = Some(60);
        demand_words_fit(&words, None, &mut record).expect("the time goes on as it was saved");
        record.memory += 1;
        let e = demand_words_fit(&words, None, &mut record).unwrap_err();
        assert!(e.is(ErrorKind::Conflict) && e.message.contains("limits.memory"), "{e}");
        for junk in ["", "{}", "[1]"] {
            assert!(demand_words_fit(junk, None, &mut record).unwrap_err().is(ErrorKind::Invalid), "{junk}");
        }
    }

    #[test]
    fn the_same_share_of_a_host_that_counts_otherwise_is_what_it_was() {
        let (machine, _) = crate::machine::without_owner("/nonexistent".into());
        machine.record().hardware = Some(karst_guest::samples::machine(7));
        machine.record().memory = 1000 << 20;
        let of = |words: &str, memory: u64, share: Option<u32>| {
            let mut record = machine.record().clone();
            (record.memory, record.balloon) = (memory, None);
            demand_words_fit(words, share, &mut record).map(|()| (record.memory >> 20, record.balloon))
        };
        let words = shape(&machine).unwrap().words;
        assert_eq!(of(&words, 1003 << 20, Some(50)).unwrap(), (1000, None));
        assert_eq!(of(&words, 997 << 20, Some(50)).unwrap(), (1000, None));
        for (memory, share) in [(1003 << 20, None), (1020 << 20, Some(50)), (500 << 20, Some(25))] {
            let e = of(&words, memory, share).unwrap_err();
            assert!(
                e.is(ErrorKind::Conflict) && e.message.contains("limits.memory"),
                "{memory} {share:?}: {e}"
            );
        }
        // The same memory was set aside, of which the balloon leaves another part now.
        let mut record = machine.record().clone();
        record.balloon = Some(700 << 20);
        demand_words_fit(&words, None, &mut record).unwrap();
        assert_eq!((record.memory, record.balloon), (1000 << 20, Some(700 << 20)));
        // The balloon has the rest, as it had then.
        machine.record().balloon = Some(800 << 20);
        let words = shape(&machine).unwrap().words;
        assert_eq!(of(&words, 801 << 20, Some(50)).unwrap(), (1000, Some(800 << 20)));
        // A machine that is to be so large, with a balloon of its own, is another one.
        let mut record = machine.record().clone();
        (record.memory, record.balloon) = (800 << 20, Some(700 << 20));
        let e = demand_words_fit(&words, None, &mut record).unwrap_err();
        assert!(e.is(ErrorKind::Conflict) && e.message.contains("limits.memory"), "{e}");
        assert_eq!((record.memory, record.balloon), (800 << 20, Some(700 << 20)));
    }
}
