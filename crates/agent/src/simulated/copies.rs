//! Copies of disks of simulated machines: they take a time, and what a machine goes on from has the content of then.

use super::{
    SimulatedAgent,
    state::{Guest, State},
    work::{demand_machine, no_guest},
};
use crate::{calls::*, copies::*};
use karst_model::{
    Error, InstanceId, Result, VolumeId,
    guest::{DiskCopyEnd, DiskCopyPhase, DiskCopyState},
    layer::Merge,
    spec::DiskSource,
    storage::VolumeContent,
};
use std::time::Duration;

/// A copy of a machine's disk.
pub(super) struct Copying {
    /// The start of the machine that it belongs to.
    pid: u32,
    from: VolumeRef,
    to: VolumeRef,
    total: u64,
    /// Bytes that were done at a time.
    done: (Duration, u64),
    speed: u64,
    /// It is no copy: files of the disk are made one.
    merge: Option<Merge>,
}

impl Copying {
    /// A merge that begins now.
    pub(super) fn merge(
        pid: u32,
        disk: VolumeRef,
        total: u64,
        now: Duration,
        speed: u64,
        merge: Merge,
    ) -> Self {
        Self { pid, from: disk, to: disk, total, done: (now, 0), speed, merge: Some(merge) }
    }

    /// Bytes that are done now, by a host that copies any disk in `whole`.
    fn done(&self, now: Duration, whole: Duration) -> u64 {
        let (since, before) = self.done;
        let full = self.total as f64 / whole.as_secs_f64().max(0.001);
        let rate = if self.speed == 0 { full } else { full.min(self.speed as f64) };
        let more = rate * now.saturating_sub(since).as_secs_f64();
        before.saturating_add(more as u64).min(self.total)
    }
}

fn gone() -> Error {
    Error::conflict("the disk is not being copied, or not any more; begin again")
}

impl State {
    /// The copy, of a machine that runs.
    fn copying(&self, at: MachineCopyRef) -> Option<&Copying> {
        let copy = self.copies.get(&(at.instance, at.to))?;
        self.guests.get(&at.instance).is_some_and(|g| g.runs() && g.pid == copy.pid).then_some(copy)
    }

    /// The merge of a disk of a machine that runs.
    pub(super) fn merging(&self, (instance, to): (InstanceId, VolumeId)) -> Option<Merge> {
        self.copying(MachineCopyRef { instance, to })?.merge
    }

    /// Has it done all by now? Nothing of what does not go on.
    pub(super) fn is_done(
        &self,
        (instance, to): (InstanceId, VolumeId),
        now: Duration,
        whole: Duration,
    ) -> Option<bool> {
        let copy = self.copying(MachineCopyRef { instance, to })?;
        Some(copy.done(now, whole) >= copy.total)
    }

    /// Has a machine that runs the volume as what a disk of it is copied to?
    pub(super) fn is_copied_to(&self, guest: &Guest, volume: VolumeId) -> bool {
        let at = MachineCopyRef { instance: guest.spec.instance, to: volume };
        self.copying(at).is_some()
    }

    /// Refuses what cannot be done to disks of a machine while one is copied, or they are backed up.
    pub(super) fn demand_no_copy(&self, instance: InstanceId) -> Result<()> {
        self.demand_no_backup(instance)?;
        let of = self.copies.keys().filter(|(i, _)| *i == instance);
        match of.into_iter().any(|(_, to)| self.copying(MachineCopyRef { instance, to: *to }).is_some()) {
            true => Err(Error::conflict(
                "a disk of the guest is being copied; wait until that has ended, or cancel it",
            )),
            false => Ok(()),
        }
    }

    /// The same of a volume that is the disk.
    pub(super) fn demand_not_copied(&self, volume: VolumeId) -> Result<()> {
        self.demand_not_backed_up(volume)?;
        let of = self.copies.iter().find(|(_, c)| c.from.volume == volume);
        of.map_or(Ok(()), |((instance, _), _)| self.demand_no_copy(*instance))
    }

    /// Nothing of what a machine was counts at its next start.
    pub(super) fn forget_copies(&mut self, instance: InstanceId) {
        self.copies.retain(|(i, _), _| *i != instance);
        self.pivoted.retain(|(i, _)| *i != instance);
        self.forget_backups(instance);
    }

    /// Copies that go on, in words.
    pub(super) fn copies_that_go_on(&self) -> Vec<String> {
        let live = |(instance, to): &&(InstanceId, VolumeId)| {
            self.copying(MachineCopyRef { instance: *instance, to: *to }).is_some()
        };
        let all = self.copies.keys().filter(live);
        let copies = all.map(|(instance, to)| format!("a disk of guest {instance} is being copied to {to}"));
        copies.chain(self.backups_that_go_on()).collect()
    }
}

impl SimulatedAgent {
    pub(super) fn begin_copy(&self, request: MachineCopyBegin) -> Result<()> {
        let MachineCopyBegin { guest: at, from, to, speed, .. } = request;
        let now = self.env.monotonic();
        let mut state = self.settled();
        if state.pivoted.contains(&(at.instance, to.volume)) {
            return Ok(());
        }
        let guest = state.running(at)?;
        demand_machine(guest)?;
        let pid = guest.pid;
        let mut disks = guest.spec.disks.iter().filter_map(|d| d.volume());
        let has = guest.spec.root.volume == from.volume || disks.any(|(_, v)| v == from.volume);
        if speed > FASTEST {
            return Err(Error::invalid("speed", "no copy is as fast as that"));
        }
        if state.copying(MachineCopyRef { instance: at.instance, to: to.volume }).is_some() {
            return Ok(());
        }
        if !has {
            return Err(Error::not_found("the guest has no such disk"));
        }
        let (disk, copy) = (state.volume(from)?, state.volume(to)?);
        if copy.spec.content != VolumeContent::Block || disk.spec.content != VolumeContent::Block {
            return Err(Error::invalid("to", "a disk is copied to a block volume"));
        }
        if copy.size != disk.size {
            let text = "the copy has another size than the disk; make it of exactly the same";
            return Err(Error::invalid("to", text));
        }
        let total = disk.size.map_or(0, |s| s.bytes());
        let elsewhere =
            state.copies.iter().any(|((i, _), c)| *i == at.instance && c.from == from && c.pid == pid);
        if elsewhere {
            return Err(Error::conflict("the disk is being copied elsewhere; wait until that has ended"));
        }
        state.demand_no_backup(at.instance)?;
        if let Some(user) = state.user_of(to.volume) {
            return Err(Error::conflict(format!("the volume is in use by instance {user}, which runs")));
        }
        let copy = Copying { pid, from, to, total, done: (now, 0), speed, merge: None };
        state.copies.insert((at.instance, to.volume), copy);
        Ok(())
    }

    pub(super) fn copy_state(&self, at: MachineCopyRef) -> Result<DiskCopyState> {
        let now = self.env.monotonic();
        let state = self.settled();
        if state.pivoted.contains(&(at.instance, at.to)) {
            return Ok(DiskCopyState { phase: DiskCopyPhase::Pivoted, ..Default::default() });
        }
        let Some(copy) = state.copying(at) else { return Ok(DiskCopyState::default()) };
        let done = copy.done(now, self.options.copy_time);
        let phase = if done >= copy.total { DiskCopyPhase::Ready } else { DiskCopyPhase::Copying };
        Ok(DiskCopyState { phase, done, total: copy.total, speed: copy.speed })
    }

    pub(super) fn set_copy_speed(&self, request: MachineCopySpeed) -> Result<()> {
        let now = self.env.monotonic();
        let mut state = self.settled();
        if request.speed > FASTEST {
            return Err(Error::invalid("speed", "no copy is as fast as that"));
        }
        state.copying(request.copy).ok_or_else(gone)?;
        let copy = state.copies.get_mut(&(request.copy.instance, request.copy.to)).ok_or_else(gone)?;
        copy.done = (now, copy.done(now, self.options.copy_time));
        copy.speed = request.speed;
        Ok(())
    }

    pub(super) fn end_copy(&self, request: MachineCopyEnd) -> Result<()> {
        let (at, key) = (request.copy(), (request.instance, request.to.volume));
        let now = self.env.monotonic();
        let mut state = self.settled();
        if state.pivoted.contains(&key) {
            return match request.end {
                DiskCopyEnd::Pivot => Ok(()),
                _ => Err(Error::conflict("the guest goes on from the copy of its disk already")),
            };
        }
        let known = state.copies.contains_key(&key);
        match request.end {
            DiskCopyEnd::Cancel => {
                state.copies.remove(&key);
                return Ok(());
            }
            DiskCopyEnd::Finish if !known => return Ok(()),
            _ => {}
        }
        let copy = state.copying(at).ok_or_else(gone)?;
        let (from, to) = (copy.from, copy.to);
        if copy.done(now, self.options.copy_time) < copy.total {
            return Err(Error::conflict("the copy of the disk is not complete yet; wait until it is ready"));
        }
        let held = state.volume(from)?.held.clone();
        state.volume_mut(to)?.held = held;
        state.copies.remove(&key);
        if request.end == DiskCopyEnd::Pivot {
            let guest = state.guests.get_mut(&at.instance).ok_or_else(|| no_guest(at.instance))?;
            if guest.spec.root.volume == from.volume {
                (guest.spec.root.pool, guest.spec.root.volume) = (to.pool, to.volume);
            }
            for disk in guest.spec.disks.iter_mut().filter(|d| d.volume() == Some((from.pool, from.volume))) {
                disk.source = DiskSource::Volume { pool: to.pool, volume: to.volume };
            }
            state.pivoted.insert(key);
        }
        Ok(())
    }
}
