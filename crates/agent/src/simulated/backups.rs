//! Backups of a simulated host: the contents as JSON instead of an archive.

use super::{SimulatedAgent, storage::Held};
use crate::backups::*;
use karst_model::{
    BackupId, ByteSize, Error, Name, Result, SnapshotId,
    storage::VolumeContent,
    template::{Templates, read_rules},
};
use serde::{Deserialize, Serialize};
use std::{
    io::{Read, Seek, SeekFrom},
    sync::Arc,
};

#[derive(Serialize, Deserialize)]
struct File {
    index: serde_json::Value,
    kind: BackupKind,
    #[serde(default)]
    templates: Templates,
    contents: Vec<(Option<Name>, Held, Option<ByteSize>)>,
    /// Those with what a machine is beside its disk.
    #[serde(default)]
    machine: Vec<Option<Name>>,
}

fn check_content(kind: BackupKind, content: VolumeContent) -> Result<()> {
    let fits = match kind {
        BackupKind::Container | BackupKind::Filesystem => content == VolumeContent::Filesystem,
        BackupKind::VirtualMachine | BackupKind::Block => content == VolumeContent::Block,
        BackupKind::Raw => content.is_disk(),
    };
    if fits {
        return Ok(());
    }
    Err(Error::invalid("kind", format!("a volume of content {} does not travel so", content.as_str())))
}

impl SimulatedAgent {
    pub(super) fn create_backup(&self, request: &BackupCreate) -> Result<BackupFacts> {
        let mut state = self.settled();
        let facts = |data: &[u8]| BackupFacts { size: data.len() as u64, index: serde_json::Value::Null };
        if let Some(there) = state.backups.get(&request.id) {
            return Ok(facts(there));
        }
        if request.kind == BackupKind::Raw {
            return Err(Error::invalid("kind", "a backup is one of a container, virtual machine or volume"));
        }
        check_content(request.kind, state.volume(request.volume)?.spec.content)?;
        let named = request.snapshots.iter().map(|(name, id)| (Some(name.clone()), Some(*id)));
        let mut contents = vec![];
        let all: Vec<(Option<Name>, Option<SnapshotId>)> = named.chain([(None, request.at)]).collect();
        for (name, id) in all {
            let (held, size, _) = state.held(request.volume, id)?;
            contents.push((name, held, size));
        }
        let machine = request.machine.iter().flat_map(|m| {
            let states = request.snapshots.iter().zip(&m.snapshots);
            let states = states.map(|((name, _), (id, _))| (Some(name.clone()), Some(*id)));
            states
                .chain([(None, request.at)])
                .filter(|(_, at)| state.has_machine_state(m.instance, *at))
                .map(|(name, _)| name)
                .collect::<Vec<_>>()
        });
        let machine = machine.collect();
        let rules = request.metadata.as_ref().map(|m| m["templates"].clone());
        let rules = rules.and_then(|r| serde_json::from_value(r).ok()).unwrap_or_default();
        let templates = Templates { rules: read_rules("", rules)?, files: request.templates.clone() };
        let data = serde_json::to_vec(&File {
            index: request.index.clone(),
            kind: request.kind,
            templates,
            contents,
            machine,
        })?;
        let answer = facts(&data);
        state.backups.insert(request.id, data);
        Ok(answer)
    }

    pub(super) fn staged_backup(&self, id: BackupId) -> Result<Vec<u8>> {
        let state = self.lock();
        let staged = state.staged_backups.get(&id);
        let mut file = staged
            .ok_or_else(|| Error::not_found("the uploaded backup is gone; send it again"))?
            .try_clone()?;
        let mut data = vec![];
        file.seek(SeekFrom::Start(0))?;
        file.read_to_end(&mut data)?;
        Ok(data)
    }

    pub(super) fn inspect_backup(&self, id: BackupId) -> Result<BackupFacts> {
        let data = self.staged_backup(id)?;
        let file: File = serde_json::from_slice(&data)
            .map_err(|e| Error::invalid("backup", "the file is not a backup").with_context(e))?;
        Ok(BackupFacts { size: data.len() as u64, index: file.index })
    }

    pub(super) fn fill_volume(&self, request: &VolumeFill) -> Result<VolumeFilled> {
        let data = self.staged_backup(request.backup)?;
        let mut state = self.settled();
        check_content(request.kind, state.volume(request.volume)?.spec.content)?;
        state.writer(request.volume, false)?;
        let (held, size, templates) = if request.kind == BackupKind::Raw {
            let size = ByteSize((data.len() as u64).next_multiple_of(512));
            (Held { imported: Arc::new(data), ..Held::default() }, Some(size), Templates::default())
        } else {
            let file: File = serde_json::from_slice(&data)
                .map_err(|e| Error::invalid("backup", "the backup is corrupt or cut off").with_context(e))?;
            let there = file.machine.contains(&request.snapshot);
            let found = file.contents.into_iter().find(|(name, ..)| *name == request.snapshot);
            let (_, held, size) = found.filter(|_| file.kind == request.kind).ok_or_else(|| {
                let place = request.kind.place(request.snapshot.as_deref());
                Error::invalid("backup", format!("the archive has no {place}"))
            })?;
            if let Some(machine) = &request.machine {
                state.set_machine_state(machine.instance, machine.at, there)?;
            }
            let own = request.snapshot.is_none();
            (held, size, if own { file.templates } else { Templates::default() })
        };
        let volume = state.volume_mut(request.volume)?;
        volume.held = held;
        match volume.spec.content {
            VolumeContent::Filesystem => {}
            VolumeContent::Iso => volume.size = size,
            VolumeContent::Block => volume.size = volume.size.max(size),
        }
        Ok(VolumeFilled { size: volume.size, templates })
    }
}
