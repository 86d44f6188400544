//! Layers of disks of simulated machines: which there are, and merges, which take as long as copies. What is in a disk does not depend
//! on them.

use super::{
    SimulatedAgent,
    copies::Copying,
    state::{State, Volume},
    work::{demand_machine, no_guest},
};
use crate::{copies::*, layers::*};
use karst_model::{
    Error, Result,
    guest::DiskCopyEnd,
    layer::MOST,
    storage::{PoolKind, VolumeContent},
};
use std::collections::BTreeSet;

impl Volume {
    /// Refuses what is not done to a disk in layers.
    pub(super) fn demand_one(&self) -> Result<()> {
        match self.chain.len() {
            0 | 1 => Ok(()),
            _ => Err(Error::conflict(
                "the disk has layers, and this is done to a disk that is one file; merge them first (blockpull or blockcommit)",
            )),
        }
    }
}

impl State {
    fn demand_layers(&self, request: &MachineLayersAdd, running: bool) -> Result<()> {
        let volumes: BTreeSet<_> = request.layers.iter().map(|l| l.volume.volume).collect();
        if volumes.len() != request.layers.len() || volumes.is_empty() || volumes.len() > MOST_AT_ONCE {
            let text = format!("one call puts one layer over each of 1 to {MOST_AT_ONCE} disks");
            return Err(Error::invalid("layers", text));
        }
        for LayerOver { volume: at, number } in &request.layers {
            let volume = self.volume(*at)?;
            if volume.spec.content != VolumeContent::Block {
                return Err(Error::invalid("layers", "only disks have layers, no discs and no file systems"));
            }
            if self.pools.get(&at.pool).is_some_and(|p| !matches!(p.kind, PoolKind::Dir | PoolKind::Btrfs)) {
                return Err(Error::unsupported("volumes of this pool are no files, and have no layers"));
            }
            if running {
                let spec =
                    &self.guests.get(&request.instance).ok_or_else(|| no_guest(request.instance))?.spec;
                let mut disks = spec.disks.iter().filter_map(|d| d.volume());
                if spec.root.volume != at.volume && !disks.any(|(_, v)| v == at.volume) {
                    return Err(Error::not_found("the guest has no such disk"));
                }
            }
            if let Some(user) = self.user_of(at.volume).filter(|user| *user != request.instance) {
                return Err(Error::conflict(format!("the volume is in use by instance {user}, which runs")));
            }
            if !volume.chain.contains(number) {
                if volume.chain.last().is_some_and(|last| number <= last) {
                    return Err(Error::invalid("number", "a layer has a higher number than all before it"));
                }
                if volume.chain.len() > MOST {
                    return Err(Error::conflict(format!("a disk has at most {MOST} layers")));
                }
            } else if volume.chain.last() != Some(number) {
                return Err(Error::conflict("another layer lies over the disk"));
            }
        }
        Ok(())
    }
}

impl SimulatedAgent {
    pub(super) fn add_layers(&self, request: MachineLayersAdd) -> Result<()> {
        let mut state = self.settled();
        let running = state.guests.get(&request.instance).is_some_and(|g| g.runs());
        if running && request.guest.is_none() {
            return Err(Error::conflict(format!("instance {} is running", request.instance)));
        }
        if let Some(guest) = request.guest.filter(|_| running) {
            demand_machine(state.running(guest)?)?;
            let there = |l: &LayerOver| state.volume(l.volume).is_ok_and(|v| v.chain.contains(&l.number));
            if !request.layers.iter().all(there) {
                state.demand_no_copy(request.instance)?;
            }
        }
        state.demand_layers(&request, running)?;
        for LayerOver { volume, number } in request.layers {
            let volume = state.volume_mut(volume)?;
            if !volume.chain.contains(&number) {
                volume.chain.push(number);
            }
        }
        Ok(())
    }

    pub(super) fn take_layers_back(&self, request: MachineLayersAdd) -> Result<bool> {
        let mut state = self.settled();
        let there = |l: &LayerOver| state.volume(l.volume).is_ok_and(|v| v.chain.last() == Some(&l.number));
        if request.guest.is_some() && request.layers.iter().all(there) {
            // The guest goes on in them, or did.
            return Ok(true);
        }
        for LayerOver { volume, number } in request.layers {
            if let Ok(volume) = state.volume_mut(volume)
                && volume.chain.last() == Some(&number)
                && number > 0
            {
                volume.chain.pop();
            }
        }
        Ok(false)
    }

    pub(super) fn begin_merge(&self, request: MachineMergeBegin) -> Result<()> {
        let MachineMergeBegin { guest: at, volume, merge, speed } = request;
        let now = self.env.monotonic();
        let mut state = self.settled();
        let key = (at.instance, volume.volume);
        let guest = state.running(at)?;
        demand_machine(guest)?;
        let pid = guest.pid;
        let mut disks = guest.spec.disks.iter().filter_map(|d| d.volume());
        let has = guest.spec.root.volume == volume.volume || disks.any(|(_, v)| v == volume.volume);
        if speed > FASTEST {
            return Err(Error::invalid("speed", "no merge is as fast as that"));
        }
        if !has {
            return Err(Error::not_found("the guest has no such disk"));
        }
        if state.merging(key).is_some_and(|m| m == merge) {
            return Ok(());
        }
        let disk = state.volume(volume)?;
        merge.check(&disk.chain)?;
        if merge.left(&disk.chain) == disk.chain && !disk.based {
            return Err(Error::conflict("nothing lies below the disk: it is one file already").at("device"));
        }
        let total = disk.size.map_or(0, |s| s.bytes());
        state.demand_no_copy(at.instance)?;
        state.pivoted.remove(&key);
        state.copies.insert(key, Copying::merge(pid, volume, total, now, speed, merge));
        Ok(())
    }

    pub(super) fn end_merge(&self, request: MachineMergeEnd) -> Result<()> {
        let MachineMergeEnd { instance, volume: at, merge, end } = request;
        let key = (instance, at.volume);
        let now = self.env.monotonic();
        let mut state = self.settled();
        if state.pivoted.contains(&key) {
            return match end {
                DiskCopyEnd::Pivot => Ok(()),
                _ => Err(Error::conflict("the guest goes on from what is left of its disk already")),
            };
        }
        let known = state.copies.contains_key(&key);
        match end {
            DiskCopyEnd::Cancel => {
                state.copies.remove(&key);
                return Ok(());
            }
            DiskCopyEnd::Finish if !known => return Ok(()),
            _ => {}
        }
        let done = state.is_done(key, now, self.options.copy_time);
        match done {
            None => {
                return Err(Error::conflict("the disk is not being merged, or not any more; begin again"));
            }
            Some(false) => {
                return Err(Error::conflict("the merge is not complete yet; wait until it is ready"));
            }
            Some(true) => {}
        }
        state.copies.remove(&key);
        if end == DiskCopyEnd::Pivot {
            let volume = state.volume_mut(at)?;
            volume.chain = merge.left(&volume.chain);
            if merge == (karst_model::layer::Merge::Pull { base: None }) {
                volume.based = false;
            }
            state.pivoted.insert(key);
        }
        Ok(())
    }
}
