//! Checkpoints and backups of disks of virtual machines that run: ids become places, what a machine has in use is remembered before it
//! has it, and until it is gone, and where others may read is decided here.

use crate::{
    RealAgent,
    agent::{as_state, has_volume},
    drives::format,
};
use karst_agent::{
    BackupListen, MachineBackupBegin, MachineBackupRef, MachineCheckpointCreate, MachineCheckpointDelete,
    MachineCheckpoints, NewMark, VolumeRef, is_export_name,
};
use karst_guest::{
    BackedUpDisk, BackupServer, DiskBackup, DiskBackupPhase, DiskBackupState, DiskBackups, DiskFormat,
    GuestDriver, MarkedDisk, NewCheckpoint, UnmarkedDisk, scratch_size,
};
use karst_model::{Error, InstanceId, Result, VolumeId, guest::CheckpointMark, storage::VolumeContent};
use std::{path::PathBuf, sync::Arc};

/// Disks of one backup.
const MOST: usize = 64;

fn backups(driver: &Arc<dyn GuestDriver>) -> Result<&dyn DiskBackups> {
    driver.disk_backups().ok_or_else(|| {
        Error::unsupported(
            "only disks of virtual machines have checkpoints, and are backed up while their guests run",
        )
    })
}

fn server(listen: BackupListen) -> Result<BackupServer> {
    listen.check()?;
    Ok(match listen {
        BackupListen::Unix => BackupServer::Unix,
        BackupListen::Tcp { address } => BackupServer::Tcp(address),
    })
}

impl RealAgent {
    /// Where a disk of a machine is.
    async fn disk_of(&self, at: VolumeRef, user: u32) -> Result<PathBuf> {
        Ok(self.locate(at, Some(user)).await?.path)
    }

    async fn new_mark(&self, mark: NewMark, user: u32) -> Result<NewCheckpoint> {
        let mut disks = vec![];
        for disk in mark.disks {
            disks.push(MarkedDisk { path: self.disk_of(disk.volume, user).await?, before: disk.before });
        }
        Ok(NewCheckpoint { id: mark.id, disks })
    }

    pub(crate) async fn create_checkpoint(&self, request: MachineCheckpointCreate) -> Result<()> {
        let MachineCheckpointCreate { guest, mark, known } = request;
        let id = guest.instance;
        let _lock = self.lock(id.0).await;
        let (record, driver) = self.meant(guest)?;
        let backups = backups(driver)?;
        if !self.runs(id).await? {
            return Err(Error::conflict(format!("instance {id} is not running")));
        }
        for disk in &mark.disks {
            self.demand_disk(id, disk.volume.volume)?;
        }
        let new = self.new_mark(mark, record.ids.base).await?;
        backups.mark(id, new, known).await.map_err(as_state(id))
    }

    pub(crate) async fn delete_checkpoint(&self, request: MachineCheckpointDelete) -> Result<()> {
        let MachineCheckpointDelete { instance, id, disks } = request;
        let _lock = self.lock(instance.0).await;
        let Ok((record, driver)) = self.known(instance) else { return Ok(()) };
        let backups = backups(driver)?;
        let mut at = vec![];
        for disk in disks {
            if !has_volume(disk.volume.volume)(&record) {
                if disk.parent.is_some() && !disk.last {
                    let text = "the guest does not have a disk of the checkpoint; attach it again";
                    return Err(Error::conflict(text));
                }
                continue;
            }
            let path = self.disk_of(disk.volume, record.ids.base).await?;
            at.push(UnmarkedDisk { path, parent: disk.parent, last: disk.last });
        }
        backups.unmark(instance, id, at).await.map_err(as_state(instance))
    }

    pub(crate) async fn checkpoints(&self, request: MachineCheckpoints) -> Result<Vec<CheckpointMark>> {
        let id = request.guest.instance;
        let (record, driver) = self.meant(request.guest)?;
        let mut places = vec![];
        for at in request.volumes {
            self.demand_disk(id, at.volume)?;
            places.push((at.volume, self.disk_of(at, record.ids.base).await?));
        }
        let marks = backups(driver)?.marks(id).await.map_err(as_state(id))?;
        let of = |path: &PathBuf| places.iter().find(|(_, p)| p == path).map(|(volume, _)| *volume);
        Ok(marks
            .into_iter()
            .filter_map(|(path, checkpoint, bytes, whole)| {
                Some(CheckpointMark { checkpoint, volume: of(&path)?, bytes, whole })
            })
            .collect())
    }

    /// The volume is a disk of the guest.
    fn demand_disk(&self, id: InstanceId, volume: VolumeId) -> Result<()> {
        let (record, _) = self.known(id)?;
        match record.root == volume || record.volumes.contains(&volume) {
            true => Ok(()),
            false => Err(Error::not_found(format!("volume {volume} is not a disk of instance {id}"))),
        }
    }

    pub(crate) async fn begin_backup(&self, request: MachineBackupBegin) -> Result<()> {
        let MachineBackupBegin { guest, id, disks, mark, known, listen } = request;
        let instance = guest.instance;
        if disks.is_empty() || disks.len() > MOST {
            return Err(Error::invalid("disks", format!("a backup has 1 to {MOST} disks")));
        }
        let server = listen.map(server).transpose()?;
        let _lock = self.lock(instance.0).await;
        let (record, driver) = self.meant(guest)?;
        let backups = backups(driver)?;
        if !self.runs(instance).await? {
            return Err(Error::conflict(format!("instance {instance} is not running")));
        }
        let user = record.ids.base;
        let mut with = record.clone();
        // Nobody else begins to use them meanwhile.
        let mut locks = vec![];
        let mut targets: Vec<_> = disks.iter().map(|d| d.to.volume).collect();
        targets.sort();
        if targets.windows(2).any(|two| two[0] == two[1]) {
            return Err(Error::invalid("disks", "two disks are backed up to one volume"));
        }
        let mut sources: Vec<_> = disks.iter().map(|d| d.from.volume).collect();
        sources.sort();
        if sources.windows(2).any(|two| two[0] == two[1]) {
            return Err(Error::invalid("disks", "a disk is there twice"));
        }
        for volume in &targets {
            locks.push(self.lock(volume.0).await);
        }
        let mut all = vec![];
        for disk in disks {
            self.demand_disk(instance, disk.from.volume)?;
            for (key, name) in [("exportname", &disk.export), ("exportbitmap", &disk.bitmap)] {
                if !is_export_name(name) {
                    let text = format!("{name:?} is no name of an export: letters, digits, '.', '_' and '-'");
                    return Err(Error::invalid(key, text));
                }
            }
            let (from, to) = (self.pool(disk.from.pool)?, self.pool(disk.to.pool)?);
            let now = from.inspect(disk.from.volume).await?;
            let target = to.inspect(disk.to.volume).await?;
            if target.content != VolumeContent::Block || now.content != VolumeContent::Block {
                return Err(Error::invalid("disks", "a disk is backed up to a block volume"));
            }
            let size = now.size.unwrap_or_default().bytes();
            let needed = if server.is_some() { scratch_size(size) } else { size };
            let has = target.size.unwrap_or_default().bytes();
            if (server.is_some() && has < needed) || (server.is_none() && has != needed) {
                let text = format!("what a disk is backed up to has {has} bytes, and needs {needed}");
                return Err(Error::invalid("disks", text));
            }
            let known = record.copies.contains(&disk.to.volume);
            if !known && let Some(user) = self.user(has_volume(disk.to.volume)).await? {
                return Err(Error::conflict(format!("the volume is in use by instance {user}, which runs")));
            }
            let path = self.disk_of(disk.from, user).await?;
            let located = self.locate(disk.to, Some(user)).await?;
            if format(located.format) != DiskFormat::Raw || located.backing.is_some() {
                let text = "a disk is backed up to a raw volume, not to one that was made of an image; make a new one";
                return Err(Error::unsupported(text));
            }
            if !known {
                with.copies.push(disk.to.volume);
            }
            all.push(BackedUpDisk {
                path,
                since: disk.since,
                to: located.path,
                export: disk.export,
                bitmap: disk.bitmap,
            });
        }
        let checkpoint = match mark {
            Some(mark) => {
                for disk in &mark.disks {
                    self.demand_disk(instance, disk.volume.volume)?;
                }
                Some(self.new_mark(mark, user).await?)
            }
            None => None,
        };
        if with != record {
            self.put_guest(instance, with.clone()).await?;
        }
        let backup = DiskBackup { id, disks: all, checkpoint, known, server };
        let begun = backups.begin(instance, backup).await.map_err(as_state(instance));
        let gone = DiskBackupPhase::Gone;
        if begun.is_err() && backups.state(instance, id).await.is_ok_and(|s| s.phase == gone) {
            with.copies.retain(|v| !targets.contains(v));
            self.put_guest(instance, with).await?;
        }
        begun
    }

    pub(crate) async fn backup_state(&self, at: MachineBackupRef) -> Result<DiskBackupState> {
        // One that nobody knows has no backups, and a container neither.
        match self.known(at.instance).map(|(_, driver)| driver.disk_backups()) {
            Ok(Some(backups)) => backups.state(at.instance, at.id).await,
            _ => Ok(DiskBackupState::default()),
        }
    }

    pub(crate) async fn end_backup(&self, at: MachineBackupRef) -> Result<()> {
        let MachineBackupRef { instance, id } = at;
        let _lock = self.lock(instance.0).await;
        let Ok((mut record, driver)) = self.known(instance) else { return Ok(()) };
        let Some(backups) = driver.disk_backups() else { return Ok(()) };
        backups.end(instance, id).await.map_err(as_state(instance))?;
        // There is neither a copy nor another backup beside it.
        if !record.copies.is_empty() {
            record.copies.clear();
            self.put_guest(instance, record).await?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use karst_model::ErrorKind;

    #[test]
    fn what_may_not_be_listened_at_is_refused_here_too() {
        let tcp = |text: &str| server(BackupListen::Tcp { address: text.parse().unwrap() });
        assert_eq!(server(BackupListen::Unix).unwrap(), BackupServer::Unix);
        let good = "127.0.0.1:10809";
        assert_eq!(tcp(good).unwrap(), BackupServer::Tcp(good.parse().unwrap()));
        for bad in ["0.0.0.0:10809", "127.0.0.1:22"] {
            assert!(tcp(bad).unwrap_err().is(ErrorKind::Forbidden), "{bad}");
        }
    }
}
