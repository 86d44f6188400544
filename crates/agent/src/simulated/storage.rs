//! Pools and volumes of a simulated host: the rules of the real drivers, with content in memory.

use super::{
    SimulatedAgent,
    session::Session,
    state::{SimulatedFile, State, Volume},
    work::EMPTY_VOLUME,
};
use crate::{backups::VolumeWrite, calls::*};
use karst_model::{
    ByteSize, Error, InstanceId, Result, SessionId, SnapshotId,
    instance::{InstanceKind, RuntimeState},
    spec::{VolumeSource, VolumeSpec},
    storage::VolumeContent,
};
use serde::{Deserialize, Serialize};
use std::{collections::BTreeMap, sync::Arc};

/// How images of disks begin.
const IMAGE: &[u8] = b"QFI\xfb";

/// What a volume holds, and each of its snapshots.
#[derive(Clone, Default, PartialEq, Serialize, Deserialize)]
pub(super) struct Held {
    /// Only what was written; everything else is as in every guest.
    pub files: BTreeMap<String, SimulatedFile>,
    /// What was imported and is no export of a simulation.
    pub imported: Arc<Vec<u8>>,
}

#[derive(Clone)]
pub(super) struct Snapshot {
    pub size: Option<ByteSize>,
    pub held: Held,
}

impl State {
    /// The guest that runs from it; a virtual machine only when it is not paused, with `unless_paused`.
    pub(super) fn writer(&self, at: VolumeRef, unless_paused: bool) -> Result<()> {
        let Some(user) = self.user_of(at.volume) else { return Ok(()) };
        let guest = &self.guests[&user];
        let still = guest.spec.kind == InstanceKind::Container || guest.state == RuntimeState::Paused;
        if unless_paused && still {
            return Ok(());
        }
        let todo = if unless_paused { "pause it first" } else { "stop it first" };
        Err(Error::conflict(format!("the volume is in use by instance {user}, which runs; {todo}")))
    }

    pub(super) fn volume_mut(&mut self, at: VolumeRef) -> Result<&mut Volume> {
        self.volume(at)?;
        self.volumes.get_mut(&at.volume).ok_or_else(|| Error::not_found("the volume is gone"))
    }

    /// Content, size and kind of a volume, or of a snapshot of it.
    pub(super) fn held(
        &self,
        at: VolumeRef,
        snapshot: Option<SnapshotId>,
    ) -> Result<(Held, Option<ByteSize>, VolumeContent)> {
        let volume = self.volume(at)?;
        let content = volume.spec.content;
        let Some(id) = snapshot else {
            self.writer(at, true)?;
            volume.demand_one()?;
            return Ok((volume.held.clone(), volume.size, content));
        };
        let snapshot = volume.snapshots.get(&id).ok_or_else(|| no_snapshot(id))?;
        Ok((snapshot.held.clone(), snapshot.size, content))
    }
}

fn no_snapshot(id: SnapshotId) -> Error {
    Error::not_found(format!("the volume has no snapshot {id} on this host"))
}

/// A stream's format fits the content.
pub(super) fn check_format(content: VolumeContent, format: StreamFormat, export: bool) -> Result<()> {
    let fits = match format {
        StreamFormat::Tar => !content.is_disk(),
        StreamFormat::Raw | StreamFormat::Qcow2 => content.is_disk(),
        StreamFormat::Vmdk => content.is_disk() && !export,
    };
    if fits {
        return Ok(());
    }
    Err(Error::invalid("format", format!("a volume of content {} does not travel so", content.as_str())))
}

fn demand_disk(content: VolumeContent) -> Result<()> {
    match content.is_disk() {
        true => Ok(()),
        false => Err(Error::invalid("volume", "a file system has no bytes to be read or written by place")),
    }
}

impl SimulatedAgent {
    pub(super) fn create_volume(&self, spec: VolumeSpec) -> Result<()> {
        let mut state = self.settled();
        if let Some(volume) = state.volumes.get(&spec.id) {
            if volume.spec == spec {
                return Ok(());
            }
            return Err(Error::conflict(format!("volume {} is there already, and different", spec.id)));
        }
        state.demand_open(spec.pool)?;
        let (mut wanted, mut held, mut size) = (EMPTY_VOLUME, Held::default(), spec.size);
        match spec.source {
            VolumeSource::Empty => {}
            VolumeSource::Encrypted { .. } => {
                if spec.content != VolumeContent::Block {
                    return Err(Error::invalid("content", "only a disk can be encrypted"));
                }
                state.take_volume_key(spec.id)?;
                held.imported = Arc::new(super::keys::MAGIC.to_vec());
            }
            VolumeSource::Image { image, .. } => {
                let facts = state.images.get(&image).map(|i| &i.facts);
                let facts =
                    facts.ok_or_else(|| Error::not_found(format!("image {image} is not on this host")))?;
                let content = match facts.kind {
                    InstanceKind::Container => VolumeContent::Filesystem,
                    InstanceKind::VirtualMachine => VolumeContent::Block,
                };
                if content != spec.content {
                    return Err(Error::invalid("content", format!("the image is one of a {}", facts.kind)));
                }
                if spec.size.is_some_and(|s| s.bytes() < facts.disk_size) {
                    return Err(Error::invalid("size", "smaller than the image"));
                }
                wanted = facts.size;
                held = state.images.get(&image).map(|i| i.held.clone()).unwrap_or_default();
            }
            VolumeSource::Copy { pool, volume, snapshot, .. } => {
                let (copied, old, content) = state.held(VolumeRef { pool, volume }, snapshot)?;
                if content != spec.content {
                    return Err(Error::invalid("content", "the volume that is copied holds something else"));
                }
                if content.is_disk() && spec.size.is_some_and(|s| old.is_some_and(|old| s < old)) {
                    return Err(Error::invalid("size", "smaller than the volume that is copied"));
                }
                (held, size) = (copied, spec.size.or(if content.is_disk() { old } else { None }));
            }
        }
        if state.pool_used(spec.pool) + wanted > self.options.pool_size.bytes() {
            return Err(Error::quota("no space left in the pool"));
        }
        let full = matches!(
            spec.source,
            VolumeSource::Image { full: true, .. } | VolumeSource::Copy { full: true, .. }
        );
        let based = matches!(spec.source, VolumeSource::Image { full: false, .. });
        let (snapshots, chain) = (BTreeMap::new(), vec![0]);
        state.volumes.insert(spec.id, Volume { size, spec, held, full, snapshots, chain, based });
        Ok(())
    }

    pub(super) fn delete_volume(&self, at: VolumeRef) -> Result<()> {
        let mut state = self.settled();
        if state.closed.contains(&at.pool) {
            return Err(crate::pools::closed(at.pool));
        }
        state.writer(at, false)?;
        if state.volumes.get(&at.volume).is_some_and(|v| v.spec.pool == at.pool) {
            state.volumes.remove(&at.volume);
            state.described.volumes.remove(&at.volume);
        }
        Ok(())
    }

    pub(super) fn resize_volume(&self, request: VolumeResize) -> Result<()> {
        let mut state = self.settled();
        state.demand_not_copied(request.volume.volume)?;
        let volume = state.volume_mut(request.volume)?;
        if volume.spec.content.is_disk() && volume.size.is_some_and(|now| request.size < now) {
            return Err(Error::invalid("size", "a volume can only grow"));
        }
        volume.size = Some(request.size);
        Ok(())
    }

    pub(super) fn create_snapshot(&self, at: VolumeSnapshotRef) -> Result<()> {
        let mut state = self.settled();
        let volume = VolumeRef { pool: at.pool, volume: at.volume };
        if state.volume(volume)?.snapshots.contains_key(&at.snapshot) {
            return Ok(());
        }
        state.writer(volume, true)?;
        let volume = state.volume_mut(volume)?;
        volume.demand_one()?;
        let snapshot = Snapshot { size: volume.size, held: volume.held.clone() };
        volume.snapshots.insert(at.snapshot, snapshot);
        Ok(())
    }

    pub(super) fn delete_snapshot(&self, at: VolumeSnapshotRef) -> Result<()> {
        let mut state = self.settled();
        if state.closed.contains(&at.pool) {
            return Err(crate::pools::closed(at.pool));
        }
        if let Ok(volume) = state.volume_mut(VolumeRef { pool: at.pool, volume: at.volume }) {
            volume.snapshots.remove(&at.snapshot);
        }
        Ok(())
    }

    pub(super) fn restore_snapshot(&self, at: VolumeSnapshotRef) -> Result<()> {
        let mut state = self.settled();
        let volume = VolumeRef { pool: at.pool, volume: at.volume };
        state.volume(volume)?;
        state.writer(volume, false)?;
        let volume = state.volume_mut(volume)?;
        volume.demand_one()?;
        let old = volume.snapshots.get(&at.snapshot).ok_or_else(|| no_snapshot(at.snapshot))?.clone();
        (volume.size, volume.held) = (old.size, old.held);
        Ok(())
    }

    pub(super) fn snapshots(&self, at: VolumeRef) -> Result<Vec<VolumeSnapshot>> {
        let state = self.lock();
        let all = state.volume(at)?.snapshots.iter();
        Ok(all.map(|(id, s)| VolumeSnapshot { snapshot: *id, size: s.size }).collect())
    }

    pub(super) fn refresh_volume(&self, request: VolumeRefresh) -> Result<()> {
        let mut state = self.settled();
        let (held, size, content) = state.held(request.from, request.snapshot)?;
        if state.volume(request.volume)?.spec.content != content {
            return Err(Error::invalid("from", "the other volume holds something else"));
        }
        state.writer(request.volume, false)?;
        let volume = state.volume_mut(request.volume)?;
        volume.demand_one()?;
        (volume.held, volume.size, volume.full) = (held, size, request.full);
        Ok(())
    }

    pub(super) fn export_volume(&self, request: VolumeExport) -> Result<WithFds<SessionId>> {
        let mut state = self.settled();
        let (held, _, content) = state.held(request.volume, request.snapshot)?;
        check_format(content, request.format, true)?;
        let mut data = if held.files.is_empty() && !held.imported.is_empty() {
            held.imported.to_vec()
        } else {
            serde_json::to_vec(&held)?
        };
        if request.format == StreamFormat::Qcow2 {
            data = [IMAGE, &data[..]].concat();
        }
        let (session, fd) = Session::export(InstanceId(uuid::Uuid::nil()), data)?;
        let value = SessionId(self.env.uuid());
        state.add_session(value, session)?;
        Ok(WithFds { value, fds: vec![fd] })
    }

    pub(super) fn import_volume(&self, request: VolumeImport) -> Result<WithFds<SessionId>> {
        let mut state = self.settled();
        check_format(state.volume(request.volume)?.spec.content, request.format, false)?;
        state.volume(request.volume)?.demand_one()?;
        state.writer(request.volume, false)?;
        let states = self.state.clone();
        let commit = move |data: Vec<u8>| {
            let data = match data.strip_prefix(IMAGE).filter(|_| request.format == StreamFormat::Qcow2) {
                Some(disk) => disk.to_vec(),
                None => data,
            };
            let mut state = states.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
            state.writer(request.volume, false)?;
            let volume = state.volume_mut(request.volume)?;
            if volume.spec.content.is_disk() {
                let came = ByteSize((data.len() as u64).next_multiple_of(512));
                volume.size = volume.size.map(|s| s.max(came));
            }
            volume.held = serde_json::from_slice(&data)
                .unwrap_or(Held { files: BTreeMap::new(), imported: Arc::new(data) });
            Ok(())
        };
        let (session, fd) = Session::file_write(InstanceId(uuid::Uuid::nil()), commit)?;
        let value = SessionId(self.env.uuid());
        state.add_session(value, session)?;
        Ok(WithFds { value, fds: vec![fd] })
    }

    pub(super) fn open_volume(&self, at: VolumeRef) -> Result<WithFds<SessionId>> {
        let mut state = self.settled();
        let (held, size, content) = state.held(at, None)?;
        demand_disk(content)?;
        let fd = super::files::content(&held.imported)?;
        rustix::fs::ftruncate(&fd, size.map_or(0, ByteSize::bytes)).map_err(std::io::Error::from)?;
        let session = Session::held(InstanceId(uuid::Uuid::nil()))?;
        let value = SessionId(self.env.uuid());
        state.add_session(value, session)?;
        Ok(WithFds { value, fds: vec![fd] })
    }

    pub(super) fn write_volume(&self, request: &VolumeWrite) -> Result<()> {
        let mut data = self.staged_backup(request.staged)?;
        if request.image {
            // As images are here: what begins as one, and then the bytes of the disk.
            let disk = data.strip_prefix(IMAGE).filter(|_| request.offset == 0);
            let wrong = || Error::invalid("volume", "the disk image is not in qcow2 format");
            data = disk.ok_or_else(wrong)?.to_vec();
        }
        let mut state = self.settled();
        let volume = state.volume(request.volume)?;
        demand_disk(volume.spec.content)?;
        let size = volume.size.map_or(0, ByteSize::bytes);
        let end = request.offset.checked_add(data.len() as u64).filter(|end| *end <= size);
        let Some(end) = end else {
            let text = format!("what is written reaches beyond the end of the disk at {size} bytes");
            return Err(Error::invalid("length", text));
        };
        state.writer(request.volume, false)?;
        let volume = state.volume_mut(request.volume)?;
        let mut bytes = if request.image { vec![] } else { volume.held.imported.to_vec() };
        bytes.resize(bytes.len().max(end as usize), 0);
        bytes[request.offset as usize..end as usize].copy_from_slice(&data);
        volume.held.imported = Arc::new(bytes);
        Ok(())
    }
}
