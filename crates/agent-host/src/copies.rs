//! Copies of disks of virtual machines while they run: ids become places, and what a machine has in use is remembered before
//! it has it, and until it is gone.

use crate::{
    RealAgent,
    agent::{as_state, has_volume},
    drives::format,
};
use karst_agent::{FASTEST, MachineCopyBegin, MachineCopyEnd, MachineCopyRef, MachineCopySpeed};
use karst_guest::{DiskCopies, DiskCopy, DiskCopyEnd, DiskCopyPhase, DiskCopyState, GuestDriver};
use karst_model::{Error, Result, storage::VolumeContent};
use std::sync::Arc;

fn copies(driver: &Arc<dyn GuestDriver>) -> Result<&dyn DiskCopies> {
    driver
        .disk_copies()
        .ok_or_else(|| Error::unsupported("only disks of virtual machines are copied while their guests run"))
}

fn check_speed(speed: u64) -> Result<()> {
    match speed <= FASTEST {
        true => Ok(()),
        false => Err(Error::invalid("speed", "no copy is as fast as that")),
    }
}

impl RealAgent {
    pub(crate) async fn begin_copy(&self, request: MachineCopyBegin) -> Result<()> {
        let MachineCopyBegin { guest, from, to, speed, synchronous } = request;
        let id = guest.instance;
        check_speed(speed)?;
        let _lock = self.lock(id.0).await;
        let (record, driver) = self.meant(guest)?;
        let copies = copies(driver)?;
        if !self.runs(id).await? {
            return Err(Error::conflict(format!("instance {id} is not running")));
        }
        if copies.state(id, to.volume).await?.phase == DiskCopyPhase::Pivoted {
            return Ok(());
        }
        if record.root != from.volume && !record.volumes.contains(&from.volume) {
            return Err(Error::not_found(format!("volume {} is not a disk of instance {id}", from.volume)));
        }
        if from.volume == to.volume {
            return Err(Error::invalid("to", "the disk is there already"));
        }
        // Nobody else begins to use it meanwhile.
        let _volume = self.lock(to.volume.0).await;
        let now = self.pool(from.pool)?.inspect(from.volume).await?;
        let copy = self.pool(to.pool)?.inspect(to.volume).await?;
        if copy.content != VolumeContent::Block || now.content != VolumeContent::Block {
            return Err(Error::invalid("to", "a disk is copied to a block volume"));
        }
        // A device has whole blocks of its pool: it may be larger by less than one.
        let devices = self.pool(to.pool)?.kind().has_names();
        if copy.size != now.size && !(devices && copy.size > now.size) {
            let text = "the copy has another size than the disk; make it of exactly the same";
            return Err(Error::invalid("to", text));
        }
        let known = record.copies.contains(&to.volume);
        if !known && let Some(user) = self.user(has_volume(to.volume)).await? {
            return Err(Error::conflict(format!("the volume is in use by instance {user}, which runs")));
        }
        let user = Some(record.ids.base);
        let (from, located) = (self.locate(from, user).await?, self.locate(to, user).await?);
        if !located.chain.below.is_empty() {
            let text =
                "the volume has layers, and a copy is written to a disk that is one file; merge them first";
            return Err(Error::conflict(text).at("to"));
        }
        let mut with = record.clone();
        if !known {
            with.copies.push(to.volume);
            self.put_guest(id, with.clone()).await?;
        }
        let copy = DiskCopy {
            to: to.volume,
            from: from.path,
            path: located.path,
            format: format(located.format),
            backing: located.backing,
            speed,
            synchronous,
        };
        let begun = copies.begin(id, copy).await.map_err(as_state(id));
        let gone = DiskCopyPhase::Gone;
        if begun.is_err() && copies.state(id, to.volume).await.is_ok_and(|s| s.phase == gone) {
            with.copies.retain(|v| *v != to.volume);
            self.put_guest(id, with).await?;
        }
        begun
    }

    pub(crate) async fn copy_state(&self, at: MachineCopyRef) -> Result<DiskCopyState> {
        // One that nobody knows has no copies, and a container neither.
        match self.known(at.instance).map(|(_, driver)| driver.disk_copies()) {
            Ok(Some(copies)) => copies.state(at.instance, at.to).await,
            _ => Ok(DiskCopyState::default()),
        }
    }

    pub(crate) async fn set_copy_speed(&self, request: MachineCopySpeed) -> Result<()> {
        let MachineCopyRef { instance, to } = request.copy;
        check_speed(request.speed)?;
        let (_, driver) = self.known(instance)?;
        copies(driver)?.set_speed(instance, to, request.speed).await.map_err(as_state(instance))
    }

    pub(crate) async fn end_copy(&self, request: MachineCopyEnd) -> Result<()> {
        let MachineCopyEnd { instance, from, to, end } = request;
        let _lock = self.lock(instance.0).await;
        let Ok((record, driver)) = self.known(instance) else {
            return match end {
                DiskCopyEnd::Cancel => Ok(()),
                _ => Err(Error::conflict(format!("instance {instance} is not running"))),
            };
        };
        copies(driver)?.end(instance, to.volume, end).await.map_err(as_state(instance))?;
        let mut now = record.clone();
        now.copies.retain(|v| *v != to.volume);
        if end == DiskCopyEnd::Pivot && now.root == from.volume {
            (now.pool, now.root) = (to.pool, to.volume);
        } else if end == DiskCopyEnd::Pivot
            && let Some(volume) = now.volumes.iter_mut().find(|v| **v == from.volume)
        {
            *volume = to.volume;
        }
        if now != record {
            self.put_guest(instance, now).await?;
        }
        Ok(())
    }
}
