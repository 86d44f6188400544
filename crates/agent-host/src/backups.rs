//! Backups: files below `DIR/host/backups`, packed and read by workers without privileges.
//!
//! A backup appears by one rename, whole, or not at all; what a killed agent left is removed when the next one starts. Each
//! content is packed by a worker of its own that sees nothing else (see `karst_image::backup`).

use crate::{
    RealAgent,
    agent::blocking,
    storage::{BOUNDS, STREAM, contents, converted, open, said},
};
use karst_agent::{BackupCreate, BackupFacts, BackupKind, VolumeFill, VolumeFilled, WithFds};
use karst_host::{
    Program,
    sandbox::{Ended, Limits, Sandbox},
};
use karst_image::{
    backup::{Kind, Piece},
    unpack::{Answer, Found, Part, Task},
};
use karst_model::{
    BackupId, Error, ErrorKind, Result, SnapshotId,
    storage::VolumeContent,
    template::{Templates, check_name},
};
use karst_storage::{Format, PoolDriver, Reading};
use std::{
    collections::BTreeMap,
    fs::File,
    os::{
        fd::OwnedFd,
        unix::fs::{OpenOptionsExt, PermissionsExt},
    },
    path::{Path, PathBuf},
    time::{Duration, SystemTime},
};

/// How often a staged backup is touched while it is read, so that it is not taken for abandoned.
const TOUCH: Duration = Duration::from_secs(600);

/// Removes what was being made when the agent before this one ended.
pub(crate) fn sweep(directory: &Path) -> Result<()> {
    for entry in std::fs::read_dir(directory)?.flatten() {
        if entry.path().extension().is_some_and(|e| e == "partial") {
            std::fs::remove_file(entry.path())?;
        }
    }
    Ok(())
}

/// A file in the making: gone when it is dropped, unless it was kept.
struct Partial(Option<PathBuf>);

impl Drop for Partial {
    fn drop(&mut self) {
        if let Some(path) = &self.0
            && let Err(e) = std::fs::remove_file(path)
        {
            tracing::warn!(error = %e, "an unfinished backup was left; the next start removes it");
        }
    }
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

pub(crate) fn yaml(value: &serde_json::Value) -> Result<String> {
    serde_yaml_ng::to_string(value).map_err(|e| Error::internal("a backup's index could not be written", e))
}

impl RealAgent {
    fn backup_file(&self, id: BackupId) -> PathBuf {
        self.registry.path("backups").join(id.0.to_string())
    }

    pub(crate) async fn create_backup(&self, request: BackupCreate) -> Result<BackupFacts> {
        let _making = self.lock(request.id.0).await;
        let path = self.backup_file(request.id);
        if let Ok(there) = tokio::fs::metadata(&path).await {
            return Ok(BackupFacts { size: there.len(), index: serde_json::Value::Null });
        }
        let room = self.backup_room.clone();
        blocking(move || room.begin()).await?;
        // Its workers end with it, and what they have written goes.
        tokio::select! {
            biased;
            made = self.make_backup(request, path) => made,
            over = self.backup_room.clone().gone(self.env.clone()) => {
                tracing::warn!(error = %over, "a backup was broken off");
                Err(over)
            }
        }
    }

    async fn make_backup(&self, request: BackupCreate, path: PathBuf) -> Result<BackupFacts> {
        let at = request.volume;
        let _lock = self.lock(at.volume.0).await;
        let pool = self.pool(at.pool)?;
        if request.kind == BackupKind::Raw {
            return Err(Error::invalid("kind", "a backup is one of a container, virtual machine or volume"));
        }
        check_content(request.kind, pool.inspect(at.volume).await?.content)?;
        if request.at.is_none() {
            self.still(&*pool, at.volume).await?;
        }
        let partial = path.with_extension("partial");
        let file = File::options().append(true).create(true).mode(0o600).open(&partial)?;
        file.set_len(0)?;
        let mut partial = Partial(Some(partial));

        let config = request.index.get("config").cloned().unwrap_or_default();
        let mut texts = vec![("backup/index.yaml".to_owned(), Some(yaml(&request.index)?))];
        for (n, (name, snapshot)) in request.snapshots.iter().enumerate() {
            let own = request.machine.as_ref().and_then(|m| m.snapshots.get(n));
            let own = own.map(|(at, tpm)| (Some(*at), tpm.clone()));
            if let Some(directory) = request.kind.directory(Some(name))
                && !self.pack_machine(&request, own, &mut texts, &directory, &file).await?
            {
                texts.push((directory, None));
            }
            let reading = contents(&*pool)?.read(at.volume, Some(*snapshot)).await?;
            let place = request.kind.place(Some(name));
            self.pack(&request, std::mem::take(&mut texts), place, reading, &file, false).await?;
        }
        if let Some(directory) = request.kind.directory(None) {
            let own = request.machine.as_ref().map(|m| (request.at, m.tpm.clone()));
            if !self.pack_machine(&request, own, &mut texts, &directory, &file).await? {
                texts.push((directory.clone(), None));
            }
            texts.push((format!("{directory}/backup.yaml"), Some(yaml(&config)?)));
            if let Some(metadata) = &request.metadata {
                texts.push((format!("{directory}/metadata.yaml"), Some(yaml(metadata)?)));
            }
            texts.extend(template_texts(&format!("{directory}/"), &request.templates)?);
        }
        let reading = contents(&*pool)?.read(at.volume, request.at).await?;
        self.pack(&request, texts, request.kind.place(None), reading, &file, true).await?;
        let size = file.metadata()?.len();
        let from = partial.0.clone().unwrap_or_default();
        blocking(move || {
            file.sync_all()?;
            std::fs::rename(from, &path)?;
            Ok(File::open(path.parent().unwrap_or(&path))?.sync_all()?)
        })
        .await?;
        partial.0 = None;
        Ok(BackupFacts { size, index: serde_json::Value::Null })
    }

    /// Packs the directory of a virtual machine with what it is beside its disk, after what waits to be packed; `false`
    /// when it is nothing.
    async fn pack_machine(
        &self,
        request: &BackupCreate,
        own: Option<(Option<SnapshotId>, Option<String>)>,
        texts: &mut Vec<(String, Option<String>)>,
        directory: &str,
        out: &File,
    ) -> Result<bool> {
        let (Some(machine), Some((at, tpm))) = (&request.machine, own) else { return Ok(false) };
        let Some(room) = self.machine_for_backup(machine, at, tpm).await? else { return Ok(false) };
        let worker = self.packer(out).await?;
        let piece = Piece {
            texts: std::mem::take(texts),
            content: Some((directory.to_owned(), Kind::Tree)),
            compression: request.compression,
            last: false,
        };
        let worker = worker.readable("tree", open(room.path(), false)?);
        self.packed(&worker.call("backup-pack", serde_json::to_value(piece)?).await?).await?;
        Ok(true)
    }

    /// A worker that writes on at the end of a backup, as much as there is room for.
    async fn packer(&self, out: &File) -> Result<Sandbox> {
        let room = self.backup_room.clone();
        let left = blocking(move || room.left()).await?;
        let limits = Limits { file_size: out.metadata()?.len().saturating_add(left), ..STREAM };
        Ok(self.worker().limits(limits).stdout(out.try_clone()?.into()))
    }

    /// How it ended; where there was no room, which limit that is of.
    async fn packed(&self, ended: &Ended) -> Result<()> {
        let outcome = packed(ended);
        if outcome.as_ref().is_err_and(|e| e.is(ErrorKind::Quota)) {
            let room = self.backup_room.clone();
            blocking(move || room.left()).await?;
        }
        outcome
    }

    async fn pack(
        &self,
        request: &BackupCreate,
        texts: Vec<(String, Option<String>)>,
        place: String,
        reading: Reading,
        out: &File,
        last: bool,
    ) -> Result<()> {
        let located = &reading.located;
        let mut worker = self.packer(out).await?;
        let mut converted_to = None;
        let kind = match located.format {
            Format::Directory => {
                worker = crate::storage::tree(worker, &reading).await?;
                Kind::Tree
            }
            Format::Raw => {
                worker = worker.readable("disk.img", open(&located.path, false)?);
                Kind::Disk
            }
            Format::Qcow2 => {
                // Its holes stay holes; what it holds needs room once more for so long.
                let room = self.staging.work()?;
                let mut convert = self
                    .worker()
                    .readable("disk.img", open(&located.path, false)?)
                    .writable("out", open(room.path(), false)?);
                if let Some(base) = &located.backing {
                    convert = convert.readable("base.img", open(base, false)?);
                }
                let args = ["convert", "-U", "-f", "qcow2", "-O", "raw", "/disk.img", "/out/disk"];
                converted(room.watched(convert.exec(Program::QemuImg, &args)).await?)?;
                worker = worker.readable("disk.img", open(&room.path().join("disk"), false)?);
                converted_to = Some(room);
                Kind::Disk
            }
        };
        let piece = Piece { texts, content: Some((place, kind)), compression: request.compression, last };
        let ended = worker.call("backup-pack", serde_json::to_value(piece)?).await?;
        drop(converted_to);
        self.packed(&ended).await
    }

    pub(crate) async fn stage_backup(&self, id: BackupId) -> Result<WithFds<()>> {
        let staging = self.staging.clone();
        let file = blocking(move || staging.stage_backup(id)).await?;
        Ok(WithFds { value: (), fds: vec![file.into()] })
    }

    pub(crate) fn open_staged(&self, id: BackupId) -> Result<File> {
        self.staging.read_backup(id)
    }

    pub(crate) async fn inspect_backup(&self, id: BackupId) -> Result<BackupFacts> {
        let file = self.open_staged(id)?;
        let size = file.metadata()?.len();
        let worker = karst_host::sandbox::Sandbox::new(&self.launcher).stdin(file.into());
        let ended = worker.call("backup-index", serde_json::Value::Null).await?;
        match ended.code {
            0 => Ok(BackupFacts { size, index: serde_json::from_slice(&ended.stdout)? }),
            65 => Err(Error::invalid("backup", String::from_utf8_lossy(&ended.stderr))),
            125 => Err(Error::internal("the worker that reads backups could not be set up", said(&ended))),
            _ => Err(Error::invalid("backup", "the backup is corrupt").with_context(said(&ended))),
        }
    }

    pub(crate) async fn open_backup(&self, id: BackupId) -> Result<WithFds<BackupFacts>> {
        let file = match File::open(self.backup_file(id)) {
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
                return Err(Error::not_found("this host does not have the backup"));
            }
            other => other?,
        };
        let value = BackupFacts { size: file.metadata()?.len(), index: serde_json::Value::Null };
        Ok(WithFds { value, fds: vec![file.into()] })
    }

    pub(crate) async fn delete_backup(&self, id: BackupId) -> Result<()> {
        let _lock = self.lock(id.0).await;
        match tokio::fs::remove_file(self.backup_file(id)).await {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => return Err(e.into()),
            _ => {}
        }
        let staging = self.staging.clone();
        blocking(move || staging.drop_backup(id)).await
    }

    pub(crate) async fn fill_volume(&self, request: VolumeFill) -> Result<VolumeFilled> {
        let at = request.volume;
        let _machine = match &request.machine {
            Some(machine) => Some(self.lock(machine.instance.0).await),
            None => None,
        };
        let _lock = self.lock(at.volume.0).await;
        let pool = self.pool(at.pool)?;
        check_content(request.kind, pool.inspect(at.volume).await?.content)?;
        self.unused(at.volume).await?;
        let staged = self.open_staged(request.backup)?;
        let held = staged.try_clone()?;
        let touching = async {
            loop {
                // It may be gone; who reads it keeps it open.
                let _ = held.set_modified(SystemTime::now());
                tokio::time::sleep(TOUCH).await;
            }
        };
        let work = self.fill_from(&*pool, &request, staged.into());
        tokio::select! {
            biased;
            done = work => done,
            () = touching => Err(Error::internal("touching a file ended", request.backup)),
        }
    }

    async fn fill_from(
        &self,
        pool: &dyn PoolDriver,
        request: &VolumeFill,
        staged: OwnedFd,
    ) -> Result<VolumeFilled> {
        let filling = contents(pool)?.begin(request.volume.volume).await?;
        let mut templates = Templates::default();
        let mut worker = self.worker().stdin(staged).writable("out", open(filling.directory(), false)?);
        if request.kind == BackupKind::Raw {
            let ended = worker.call("store", serde_json::Value::Null).await?;
            stored(&ended)?;
            let (from, to) = (filling.directory().join("upload"), filling.directory().join("disk.img"));
            std::fs::rename(from, to)?;
        } else {
            let part = if request.kind.is_disk() { Part::Disk } else { Part::Root };
            let within = request.kind.place(request.snapshot.as_deref());
            let beside = match request.snapshot {
                None => request.kind.directory(None),
                Some(_) => None,
            };
            let (mut wanted, mut room) = (None, None);
            let directory = request.kind.directory(request.snapshot.as_deref());
            if let (Some(machine), Some(directory)) = (&request.machine, directory) {
                let found = self.machine_from_backup(worker, machine, directory)?;
                worker = found.0;
                (wanted, room) = (Some(found.1), Some((machine, found.2)));
            }
            let task = Task {
                part,
                bounds: BOUNDS,
                field: "backup".into(),
                within: Some(within),
                beside,
                machine: wanted,
            };
            let ended = worker.call("unpack", serde_json::to_value(task)?).await?;
            match (ended.code, serde_json::from_slice::<Answer>(&ended.stdout)) {
                (0, Ok(answer)) => {
                    let found = Result::<Found>::from(answer)?;
                    templates.rules = found.metadata.map(|m| m.templates).unwrap_or_default();
                    templates.files = found.templates;
                    templates.check("backup")?;
                    if let Some((machine, room)) = &room {
                        self.take_machine(machine, room.path()).await?;
                    }
                }
                (125, _) => {
                    return Err(Error::internal("the worker that unpacks could not be set up", said(&ended)));
                }
                _ => {
                    return Err(Error::invalid(
                        "backup",
                        "the backup is corrupt or exceeds what a volume may be",
                    )
                    .with_context(said(&ended)));
                }
            }
            if part == Part::Disk {
                // The worker gave it the owner and mode that the archive says.
                let disk = filling.directory().join("disk.img");
                let plain = disk.symlink_metadata().is_ok_and(|m| m.is_file());
                if !plain {
                    return Err(Error::invalid("backup", "the disk of the backup is not a file"));
                }
                std::fs::set_permissions(&disk, PermissionsExt::from_mode(0o600))?;
                std::os::unix::fs::chown(&disk, Some(0), Some(0))?;
            }
        }
        let info = filling.commit().await?;
        Ok(VolumeFilled { size: info.size, templates })
    }
}

/// The entries of an archive that are an instance's templates, below `directory` (`""`, or one with a slash).
pub(crate) fn template_texts(
    directory: &str,
    templates: &BTreeMap<String, String>,
) -> Result<Vec<(String, Option<String>)>> {
    let mut texts = vec![];
    if !templates.is_empty() {
        texts.push((format!("{directory}templates"), None));
    }
    for (name, text) in templates {
        check_name("templates", name)?;
        texts.push((format!("{directory}templates/{name}"), Some(text.clone())));
    }
    Ok(texts)
}

/// How a worker that packed ended.
pub(crate) fn packed(ended: &Ended) -> Result<()> {
    match ended.code {
        0 => Ok(()),
        // The second: it was ended for writing more than it may (SIGXFSZ).
        28 | 153 => Err(Error::new(ErrorKind::Quota, "no space left on the host for the backup")),
        125 => Err(Error::internal("the worker that packs could not be set up", said(ended))),
        _ => Err(Error::internal("packing the backup failed", said(ended))),
    }
}

/// How a worker that stored a plain file ended.
fn stored(ended: &Ended) -> Result<()> {
    match ended.code {
        0 => Ok(()),
        28 => Err(Error::quota("no space left in the pool")),
        125 => Err(Error::internal("the worker that stores could not be set up", said(ended))),
        _ => Err(Error::invalid("body", "the file is empty").with_context(said(ended))),
    }
}
