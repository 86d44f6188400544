//! Checkpoints and backups of disks of simulated machines: backups take a time, and have the content of the moment in which they
//! began. All disks keep checkpoints, as those of images do in directories.

use super::{SimulatedAgent, state::State, work::demand_machine};
use crate::checkpoints::*;
use karst_model::{
    CheckpointId, DiskBackupId, Error, InstanceId, Result, VolumeId,
    guest::{CheckpointMark, DiskBackupPhase, DiskBackupState, scratch_size},
    spec::GuestSpec,
    storage::VolumeContent,
};
use std::{collections::BTreeSet, time::Duration};

/// A backup of a machine's disks.
pub(super) struct BackingUp {
    id: DiskBackupId,
    /// The start of the machine that it belongs to.
    pid: u32,
    from: Vec<VolumeId>,
    to: Vec<VolumeId>,
    listen: Option<BackupListen>,
    total: u64,
    since: Duration,
}

/// A change of what disks have.
type Marks = Vec<(VolumeId, CheckpointId)>;

fn is_disk(spec: &GuestSpec, volume: VolumeId) -> bool {
    spec.root.volume == volume || spec.disks.iter().filter_map(|d| d.volume()).any(|(_, v)| v == volume)
}

fn demand_disk(spec: &GuestSpec, volume: VolumeId) -> Result<()> {
    match is_disk(spec, volume) {
        true => Ok(()),
        false => Err(Error::not_found("the guest has no such disk")),
    }
}

impl State {
    /// The backup of a machine that runs.
    fn backing_up(&self, instance: InstanceId) -> Option<&BackingUp> {
        let backup = self.backing_up.get(&instance)?;
        self.guests.get(&instance).is_some_and(|g| g.runs() && g.pid == backup.pid).then_some(backup)
    }

    /// Has a machine that runs the volume as what a disk of it is backed up to?
    pub(super) fn is_backed_up_to(&self, instance: InstanceId, volume: VolumeId) -> bool {
        self.backing_up(instance).is_some_and(|b| b.to.contains(&volume))
    }

    /// Refuses what cannot be done to disks of a machine while they are backed up.
    pub(super) fn demand_no_backup(&self, instance: InstanceId) -> Result<()> {
        match self.backing_up(instance) {
            Some(_) => Err(Error::conflict(
                "disks of the guest are being backed up; wait until that has ended, or cancel it",
            )),
            None => Ok(()),
        }
    }

    /// The same of a volume that is a disk.
    pub(super) fn demand_not_backed_up(&self, volume: VolumeId) -> Result<()> {
        let of = self.backing_up.iter().find(|(_, b)| b.from.contains(&volume));
        of.map_or(Ok(()), |(instance, _)| self.demand_no_backup(*instance))
    }

    /// Nothing of what a machine was counts at its next start.
    pub(super) fn forget_backups(&mut self, instance: InstanceId) {
        self.backing_up.remove(&instance);
    }

    /// Backups that go on, in words.
    pub(super) fn backups_that_go_on(&self) -> Vec<String> {
        let all = self.backing_up.keys().filter(|i| self.backing_up(**i).is_some());
        all.map(|i| format!("disks of guest {i} are being backed up")).collect()
    }

    /// What a new checkpoint puts onto disks, if they can have it.
    fn marks_of(&self, spec: &GuestSpec, mark: &NewMark) -> Result<Marks> {
        let mut marks = vec![];
        for disk in &mark.disks {
            demand_disk(spec, disk.volume.volume)?;
            self.volume(disk.volume)?;
            marks.push((disk.volume.volume, mark.id));
        }
        Ok(marks)
    }

    /// Drops what disks of a machine have that nobody knows.
    fn sweep_marks(&mut self, spec: &GuestSpec, known: &BTreeSet<CheckpointId>) {
        self.marks.retain(|(volume, id)| !is_disk(spec, *volume) || known.contains(id));
    }
}

impl SimulatedAgent {
    pub(super) fn create_checkpoint(&self, request: MachineCheckpointCreate) -> Result<()> {
        let MachineCheckpointCreate { guest: at, mark, known } = request;
        let mut state = self.settled();
        let guest = state.running(at)?;
        demand_machine(guest)?;
        let spec = guest.spec.clone();
        state.demand_no_copy(at.instance)?;
        let new = state.marks_of(&spec, &mark)?;
        state.sweep_marks(&spec, &known.into_iter().chain([mark.id]).collect());
        state.marks.extend(new);
        Ok(())
    }

    pub(super) fn delete_checkpoint(&self, request: MachineCheckpointDelete) -> Result<()> {
        let MachineCheckpointDelete { instance, id, disks } = request;
        let mut state = self.settled();
        let Some(guest) = state.guests.get(&instance) else { return Ok(()) };
        if guest.spec.kind == karst_model::instance::InstanceKind::Container {
            return Err(Error::unsupported("only disks of virtual machines have checkpoints"));
        }
        if !guest.runs() {
            return match disks.iter().any(|d| d.parent.is_some() && !d.last) {
                true => {
                    Err(Error::conflict("the guest is not running: what the checkpoint has cannot be merged"))
                }
                false => Ok(()),
            };
        }
        state.demand_no_backup(instance)?;
        for disk in disks {
            state.marks.remove(&(disk.volume.volume, id));
        }
        Ok(())
    }

    pub(super) fn checkpoints(&self, request: MachineCheckpoints) -> Result<Vec<CheckpointMark>> {
        let mut state = self.settled();
        let guest = state.running(request.guest)?;
        demand_machine(guest)?;
        for at in &request.volumes {
            demand_disk(&guest.spec, at.volume)?;
        }
        let asked: BTreeSet<_> = request.volumes.iter().map(|v| v.volume).collect();
        let told = |(volume, checkpoint): &(VolumeId, CheckpointId)| CheckpointMark {
            checkpoint: *checkpoint,
            volume: *volume,
            bytes: 65_536,
            whole: true,
        };
        Ok(state.marks.iter().filter(|(v, _)| asked.contains(v)).map(told).collect())
    }

    pub(super) fn begin_backup(&self, request: MachineBackupBegin) -> Result<()> {
        let MachineBackupBegin { guest: at, id, disks, mark, known, listen } = request;
        let now = self.env.monotonic();
        let mut state = self.settled();
        if disks.is_empty() {
            return Err(Error::invalid("disks", "a backup has disks"));
        }
        listen.map_or(Ok(()), BackupListen::check)?;
        let guest = state.running(at)?;
        demand_machine(guest)?;
        let (spec, pid) = (guest.spec.clone(), guest.pid);
        if state.backing_up(at.instance).is_some_and(|b| b.id == id) {
            return Ok(());
        }
        state.demand_no_copy(at.instance)?;
        let mut total = 0;
        for disk in &disks {
            demand_disk(&spec, disk.from.volume)?;
            if !is_export_name(&disk.export) || !is_export_name(&disk.bitmap) {
                return Err(Error::invalid("exportname", "that is no name of an export"));
            }
            let (from, to) = (state.volume(disk.from)?, state.volume(disk.to)?);
            if from.spec.content != VolumeContent::Block || to.spec.content != VolumeContent::Block {
                return Err(Error::invalid("disks", "a disk is backed up to a block volume"));
            }
            let (size, has) = (from.size.unwrap_or_default().bytes(), to.size.unwrap_or_default().bytes());
            let fits = if listen.is_some() { has >= scratch_size(size) } else { has == size };
            if !fits {
                return Err(Error::invalid("disks", "what a disk is backed up to has another size"));
            }
            if let Some(user) = state.user_of(disk.to.volume) {
                return Err(Error::conflict(format!("the volume is in use by instance {user}, which runs")));
            }
            if disk.since.iter().any(|c| !state.marks.contains(&(disk.from.volume, *c))) {
                return Err(Error::conflict("what changed of the disk since that checkpoint is not known"));
            }
            total += size;
        }
        let new = match &mark {
            Some(mark) => state.marks_of(&spec, mark)?,
            None => vec![],
        };
        let known: BTreeSet<_> = known.into_iter().chain(mark.map(|m| m.id)).collect();
        state.sweep_marks(&spec, &known);
        state.marks.extend(new);
        for disk in disks.iter().filter(|_| listen.is_none()) {
            let held = state.volume(disk.from)?.held.clone();
            state.volume_mut(disk.to)?.held = held;
        }
        let (from, to) = disks.iter().map(|d| (d.from.volume, d.to.volume)).unzip();
        let backup = BackingUp { id, pid, from, to, listen, total, since: now };
        state.backing_up.insert(at.instance, backup);
        Ok(())
    }

    pub(super) fn backup_state(&self, at: MachineBackupRef) -> Result<DiskBackupState> {
        let now = self.env.monotonic();
        let state = self.settled();
        let Some(backup) = state.backing_up(at.instance).filter(|b| b.id == at.id) else {
            return Ok(DiskBackupState::default());
        };
        let passed = now.saturating_sub(backup.since).as_secs_f64();
        let whole = self.options.copy_time.as_secs_f64().max(0.001);
        let done = ((backup.total as f64 * (passed / whole).min(1.0)) as u64).min(backup.total);
        let unix = matches!(backup.listen, Some(BackupListen::Unix));
        Ok(match backup.listen {
            Some(_) => DiskBackupState {
                phase: DiskBackupPhase::Running,
                socket: unix.then(|| format!("/run/simulated/{}.sock", at.instance)),
                ..Default::default()
            },
            None if done < backup.total => {
                DiskBackupState { phase: DiskBackupPhase::Running, done, total: backup.total, socket: None }
            }
            None => DiskBackupState { phase: DiskBackupPhase::Done, done, total: backup.total, socket: None },
        })
    }

    pub(super) fn end_backup(&self, at: MachineBackupRef) -> Result<()> {
        let mut state = self.settled();
        if state.backing_up.get(&at.instance).is_some_and(|b| b.id == at.id) {
            state.backing_up.remove(&at.instance);
        }
        Ok(())
    }
}
