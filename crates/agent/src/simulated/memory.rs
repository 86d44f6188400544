//! Memory of simulated machines in files of their host: a file has what it says of itself, and whether it can be gone on from.

use super::{
    SimulatedAgent,
    state::State,
    work::{demand_machine, no_guest},
};
use crate::{calls::WithFds, memory::*};
use karst_model::{
    Error, InstanceId, MemoryJobId, Result,
    instance::RuntimeState,
    memory::{DOCUMENT, DumpFormat, MemoryEnd, MemoryPhase, MemoryState, SavedMemory, new_head},
    spec::GuestSpec,
};
use std::{collections::BTreeMap, time::Duration};

/// A file below what the host grants.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum MemoryFile {
    /// Saved memory.
    Saved(SavedMemory),
    /// Something else.
    Other,
}

/// Memory that is written.
pub(super) struct Writing {
    /// The start of the machine that it is of.
    pid: u32,
    /// `None`: for a stop.
    id: Option<MemoryJobId>,
    path: String,
    file: MemoryFile,
    ran: bool,
    since: Duration,
    total: u64,
    /// It has its name.
    kept: bool,
}

/// Files of a simulated host, and what is written.
#[derive(Default)]
pub(super) struct Memories {
    pub files: BTreeMap<String, MemoryFile>,
    pub writing: BTreeMap<InstanceId, Writing>,
    /// Bytes of memory for which there is room; `None`: without end.
    pub room: Option<u64>,
}

fn done(writing: &Writing, now: Duration, whole: Duration) -> u64 {
    let part = now.saturating_sub(writing.since).as_secs_f64() / whole.as_secs_f64().max(0.001);
    ((writing.total as f64 * part) as u64).min(writing.total)
}

fn gone() -> Error {
    Error::conflict("the memory of the guest is not being written, or not any more")
}

impl State {
    /// The memory that is written of a machine that runs.
    fn writing(&self, at: MachineMemoryRef) -> Option<&Writing> {
        let writing = self.memories.writing.get(&at.instance).filter(|w| w.id == at.id)?;
        self.guests.get(&at.instance).is_some_and(|g| g.runs() && g.pid == writing.pid).then_some(writing)
    }

    /// What is written, in words.
    pub(super) fn memory_that_is_written(&self) -> Vec<String> {
        let all = self.memories.writing.iter().filter(|(_, w)| !w.kept);
        all.map(|(instance, w)| format!("memory of guest {instance} is being written to {:?}", w.path))
            .collect()
    }

    /// A stop begins to keep the memory.
    pub(super) fn begin_saving(&mut self, instance: InstanceId, now: Duration) -> Result<()> {
        let guest = self.guests.get_mut(&instance).ok_or_else(|| no_guest(instance))?;
        let before = self.memories.writing.get(&instance).filter(|w| w.id.is_none() && w.pid == guest.pid);
        let ran = before.map_or(guest.state != RuntimeState::Paused, |w| w.ran);
        guest.state = RuntimeState::Paused;
        let total = guest.spec.limits.memory.map_or(1 << 30, |m| m.bytes());
        let (pid, path, file) = (guest.pid, String::new(), MemoryFile::Other);
        let writing = Writing { pid, id: None, path, file, ran, since: now, total, kept: false };
        self.memories.writing.insert(instance, writing);
        Ok(())
    }

    /// Nothing of a start counts at the next one.
    pub(super) fn forget_memory(&mut self, instance: InstanceId) {
        self.memories.writing.remove(&instance);
    }

    /// Refuses a start from a file that does not fit.
    pub(super) fn demand_memory(&self, spec: &GuestSpec) -> Result<()> {
        let Some(path) = &spec.memory else { return Ok(()) };
        let saved = self.memory_file(path)?;
        let machine = spec.machine.as_ref().ok_or_else(|| {
            Error::unsupported("virtual machines only go on from their memory").at("memory")
        })?;
        if machine.uuid != saved.uuid {
            return Err(Error::conflict("the file has the memory of another virtual machine").at("path"));
        }
        if saved.shape != shape(spec) {
            return Err(Error::conflict("the virtual machine is not what it was when its memory was saved"));
        }
        Ok(())
    }

    fn memory_file(&self, path: &str) -> Result<SavedMemory> {
        granted(path)?;
        match self.memories.files.get(path) {
            None => Err(Error::not_found(format!("{path:?} does not exist on the host")).at("path")),
            Some(MemoryFile::Other) => {
                Err(Error::invalid("path", format!("{path:?} is no memory of a virtual machine")))
            }
            Some(MemoryFile::Saved(saved)) => Ok(saved.clone()),
        }
    }
}

/// What is compared of a machine.
fn shape(spec: &GuestSpec) -> String {
    let disks: Vec<_> = spec.disks.iter().map(|d| &d.slot).collect();
    let nics: Vec<_> = spec.nics.iter().map(|n| (&n.slot, &n.mac)).collect();
    let set_aside = spec.limits.memory_maximum.or(spec.limits.memory);
    format!("{set_aside:?} {:?} {disks:?} {nics:?}", spec.limits.cpu)
}

fn granted(path: &str) -> Result<()> {
    check_memory_path(path)?;
    match path.starts_with(super::SAVES) {
        true => Ok(()),
        false => Err(Error::forbidden(format!(
            "this host grants no file {path:?} for memory; its administrator can, with save_paths in host-policy.toml"
        ))
        .at("path")),
    }
}

impl SimulatedAgent {
    /// Puts a file beneath what the host grants, which is none of ours.
    pub fn put_foreign_file(&self, path: &str) {
        self.lock().memories.files.insert(path.into(), MemoryFile::Other);
    }

    /// The files with memory that there are.
    pub fn memory_files(&self) -> Vec<String> {
        self.lock().memories.files.keys().cloned().collect()
    }

    /// From now on there is room for so many bytes of memory.
    pub fn set_memory_room(&self, room: Option<u64>) {
        self.lock().memories.room = room;
    }

    pub(super) fn begin_memory(&self, request: MachineMemoryBegin) -> Result<()> {
        let MachineMemoryBegin { guest: at, id, path, wish } = request;
        let now = self.env.monotonic();
        let mut state = self.settled();
        granted(&path)?;
        let guest = state.running(at)?;
        demand_machine(guest)?;
        guest.demand_not_halted()?;
        let (pid, ran) = (guest.pid, guest.state != RuntimeState::Paused);
        let total = guest.spec.limits.memory.map_or(1 << 30, |m| m.bytes());
        let machine = guest.spec.machine.clone();
        let shape = shape(&guest.spec);
        if let Some(there) = state.memories.writing.get(&at.instance).filter(|w| w.pid == pid) {
            if there.id == Some(id) {
                return Ok(());
            }
            if !there.kept {
                return Err(Error::conflict("the memory of the guest is being written already"));
            }
        }
        state.demand_no_copy(at.instance)?;
        let file = match &wish {
            MemoryWish::Dump { .. } => MemoryFile::Other,
            MemoryWish::Save { document, paused } => {
                let machine = machine.ok_or_else(|| no_guest(at.instance))?;
                let (document, paused) = (document.clone(), *paused);
                let (uuid, machine) = (machine.uuid, machine.machine);
                let saved = SavedMemory { uuid, machine, document, shape, paused, stream: Some(total) };
                new_head(&saved)?;
                MemoryFile::Saved(saved)
            }
        };
        match (state.memories.files.get(&path), &wish) {
            (None, _) | (Some(MemoryFile::Saved(_)), MemoryWish::Save { .. }) => {}
            _ => {
                let text = format!("{path:?} is there already; remove it, or choose another name");
                return Err(Error::conflict(text).at("path"));
            }
        }
        if let (MemoryWish::Save { .. }, Some(guest)) = (&wish, state.guests.get_mut(&at.instance)) {
            guest.state = RuntimeState::Paused;
        }
        let writing = Writing { pid, id: Some(id), path, file, ran, since: now, total, kept: false };
        state.memories.writing.insert(at.instance, writing);
        Ok(())
    }

    pub(super) fn dump_memory(&self, request: MachineDump) -> Result<WithFds<u64>> {
        let MachineDump { guest: at, format } = request;
        let mut state = self.settled();
        let guest = state.running(at)?;
        demand_machine(guest)?;
        let pid = guest.pid;
        if state.memories.writing.get(&at.instance).is_some_and(|w| w.pid == pid && !w.kept) {
            return Err(Error::conflict("the memory of the guest is being written already"));
        }
        let content: &[u8] = match format {
            DumpFormat::Elf => b"\x7fELF, simulated",
            DumpFormat::WinDmp => {
                let text = "QEMU of this host cannot write the memory of this guest as win-dmp";
                return Err(Error::unsupported(text).at("format"));
            }
            _ => b"KDUMP   , simulated",
        };
        Ok(WithFds { value: content.len() as u64, fds: vec![super::files::content(content)?] })
    }

    pub(super) fn memory_state(&self, at: MachineMemoryRef) -> Result<MemoryState> {
        let now = self.env.monotonic();
        let state = self.settled();
        let Some(writing) = state.writing(at) else { return Ok(MemoryState::default()) };
        let (done, total) = (done(writing, now, self.options.memory_time), writing.total);
        let phase = match state.memories.room {
            _ if writing.kept => MemoryPhase::Done,
            Some(room) if done > room => {
                let reason = "there is not enough room on this host's disk for the memory".into();
                MemoryPhase::Failed { reason }
            }
            _ if done >= total => MemoryPhase::Done,
            _ => MemoryPhase::Running,
        };
        Ok(MemoryState { phase, done, total })
    }

    pub(super) fn end_memory(&self, request: MachineMemoryEnd) -> Result<()> {
        let MachineMemoryEnd { memory: at, end } = request;
        let phase = self.memory_state(at)?.phase;
        let mut state = self.settled();
        let known = state.memories.writing.get(&at.instance).filter(|w| w.id == at.id);
        let Some((kept, path, file)) = known.map(|w| (w.kept, w.path.clone(), w.file.clone())) else {
            return match end {
                MemoryEnd::Cancel => Ok(()),
                MemoryEnd::Keep => Err(gone()),
            };
        };
        match end {
            MemoryEnd::Keep if kept => Ok(()),
            MemoryEnd::Keep if phase == MemoryPhase::Done => {
                state.memories.files.insert(path, file);
                if let Some(writing) = state.memories.writing.get_mut(&at.instance) {
                    writing.kept = true;
                }
                Ok(())
            }
            MemoryEnd::Keep => Err(gone()),
            MemoryEnd::Cancel => {
                let runs = state.writing(at).is_some();
                let writing = state.memories.writing.remove(&at.instance);
                if kept && runs {
                    state.memories.files.remove(&path);
                }
                let ran = writing.is_some_and(|w| w.ran);
                let guest = state.guests.get_mut(&at.instance);
                if let Some(guest) = guest.filter(|g| runs && ran && g.state == RuntimeState::Paused) {
                    guest.state = RuntimeState::Running;
                }
                Ok(())
            }
        }
    }

    pub(super) fn read_memory_file(&self, path: &str) -> Result<SavedMemory> {
        self.settled().memory_file(path)
    }

    pub(super) fn change_memory_file(&self, request: MemoryFileChange) -> Result<()> {
        let mut state = self.settled();
        let saved = state.memory_file(&request.path)?;
        if saved.uuid != request.uuid {
            return Err(Error::conflict("the file has the memory of another virtual machine").at("path"));
        }
        if request.document.len() > DOCUMENT {
            return Err(Error::too_large("the description is too large").at("document"));
        }
        let new = SavedMemory { document: request.document, paused: request.paused, ..saved };
        state.memories.files.insert(request.path, MemoryFile::Saved(new));
        Ok(())
    }
}
