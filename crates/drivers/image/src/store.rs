//! The images of this host.
//!
//! ```text
//! ROOT/images/<image id>/   image.json · unified | metadata + rootfs (as uploaded) · tree/ or disk.img
//! ROOT/recipes/<key>/       metadata.tar · rootfs: what a recipe built today
//! ROOT/tmp/<uuid>/          work in progress; removed at the next start
//! ```
//! All directories are root's alone (0700): a tree carries setuid files with unshifted owners, which no user of the host
//! may reach. An image appears by one rename, complete, or not at all.

use crate::{
    metadata::Metadata,
    ova, qcow2,
    recipe::{Built, Progress, Recipe, open_dir, write_tar},
    unpack::{Answer, Bounds, Found, Part, Task},
    vmdk,
};
use karst_host::{
    Program,
    sandbox::{Ended, Launcher, Limits, Sandbox},
};
use karst_model::{
    Error, ImageId, Result,
    image::{DiskFormat, ImageFacts},
    instance::InstanceKind,
    template::Templates,
};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use std::{
    fs::{File, Permissions},
    io::{self, Read, Write},
    os::{
        fd::OwnedFd,
        unix::fs::{DirBuilderExt, PermissionsExt},
    },
    path::{Path, PathBuf},
    sync::Arc,
};

/// A file that is to become part of an image.
#[derive(Debug)]
pub enum Staged {
    /// A foreign file, read from its beginning. It may change while it is read: what counts is the copy made of it.
    Foreign(OwnedFd),
    /// A file that a recipe made here.
    Own(PathBuf),
    /// A file that a worker packed here of what a guest has: not copied, and checked as a foreign one.
    Packed(PathBuf),
}

/// An image as it comes.
#[derive(Debug)]
pub enum Upload {
    /// One archive with everything.
    Unified {
        /// The archive.
        image: Staged,
    },
    /// Metadata and root file system (tar, squashfs) or disk (qcow2) apart.
    Split {
        /// Archive with `metadata.yaml`.
        metadata: Staged,
        /// Root file system or disk.
        rootfs: Staged,
    },
    /// A disk by itself, in a format that is stated. What is kept is a split image made of it.
    Disk {
        /// The disk, or the appliance that has it.
        disk: OwnedFd,
        /// Its format.
        format: DiskFormat,
    },
}

/// What volumes are cloned from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Content {
    /// Root tree with unshifted owners.
    Tree(PathBuf),
    /// Disk image in qcow2 format.
    Disk {
        /// Where.
        path: PathBuf,
        /// Virtual size in bytes.
        size: u64,
    },
}

/// A file of an image to hand out.
#[derive(Debug)]
pub struct ExportPart {
    /// Field of the multipart answer: `metadata`, `rootfs`, `rootfs.img`; the only part of a unified image is `image`.
    pub field: &'static str,
    /// File name as Incus gives it.
    pub filename: String,
    /// Size in bytes.
    pub size: u64,
    /// For reading.
    pub file: OwnedFd,
}

/// An image to hand out: the files as they came, so that the fingerprint is the same on the other side.
#[derive(Debug)]
pub struct Export {
    /// One part, or metadata and root.
    pub parts: Vec<ExportPart>,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
struct Record {
    facts: ImageFacts,
    unified: bool,
}

/// The store. Cheap to clone.
#[derive(Debug, Clone)]
pub struct ImageStore {
    root: Arc<PathBuf>,
    launcher: Arc<Launcher>,
    bounds: Bounds,
    /// Lines of a sources.list that recipes take before the host's own.
    sources: Arc<Vec<String>>,
    building: Arc<tokio::sync::Mutex<()>>,
    importing: Arc<tokio::sync::Semaphore>,
}

impl ImageStore {
    /// Opens (and makes) the store in the directory `root`; removes what an earlier process left half-done.
    ///
    /// # Errors
    /// The directory cannot be used.
    pub async fn open(root: impl Into<PathBuf>, launcher: Launcher) -> Result<Self> {
        let root: PathBuf = root.into();
        let at = root.clone();
        blocking(move || {
            for dir in [at.clone(), at.join("images"), at.join("recipes"), at.join("tmp")] {
                std::fs::DirBuilder::new().recursive(true).mode(0o700).create(&dir)?;
                std::fs::set_permissions(&dir, Permissions::from_mode(0o700))?;
            }
            for entry in std::fs::read_dir(at.join("tmp"))?.flatten() {
                remove(&entry.path())?;
            }
            Ok(())
        })
        .await?;
        Ok(Self {
            root: root.into(),
            launcher: launcher.into(),
            bounds: Bounds::default(),
            sources: Arc::default(),
            building: Arc::default(),
            importing: Arc::new(tokio::sync::Semaphore::new(2)),
        })
    }

    /// Other bounds for archives than the default.
    pub fn with_bounds(mut self, bounds: Bounds) -> Self {
        self.bounds = bounds;
        self
    }

    /// Recipes take their packages from these archives, where they are of the recipe's distribution: lines that
    /// [`crate::recipe::check_source`] has taken.
    pub fn with_sources(mut self, lines: Vec<String>) -> Self {
        self.sources = lines.into();
        self
    }

    fn image_dir(&self, id: ImageId) -> PathBuf {
        self.root.join("images").join(id.to_string())
    }

    /// Takes an image in under `id`; an id that is there already is answered as it is. On failure nothing is left.
    ///
    /// # Errors
    /// Invalid with the file at fault as field (`image`, `metadata`, `rootfs`); quota when the disk is full; timeout.
    pub async fn import(&self, id: ImageId, upload: Upload) -> Result<ImageFacts> {
        if let Some(record) = self.record(id).await? {
            return Ok(record.facts);
        }
        let _turn =
            self.importing.acquire().await.map_err(|e| Error::internal("imports are shut down", e))?;
        let work = self.work_dir().await?;
        let upload = match upload {
            Upload::Disk { disk, format } => self.adopt(&work.path.join("made"), disk, format).await?,
            other => other,
        };
        let record = self.take(&work.path, upload).await?;
        let made = work.path.join("made");
        blocking(move || remove(&made)).await?;
        let (from, to, facts) = (work.path.clone(), self.image_dir(id), record.facts.clone());
        blocking(move || {
            let mut file = File::create_new(from.join("image.json"))?;
            file.write_all(&serde_json::to_vec(&record)?)?;
            // The rename must not reach the disk before what it names.
            rustix::fs::syncfs(&file).map_err(io::Error::from)?;
            match std::fs::rename(&from, &to) {
                Err(e) if e.kind() == io::ErrorKind::DirectoryNotEmpty => {} // another call was faster
                r => r?,
            }
            sync_dir(to.parent().unwrap_or(&to))
        })
        .await?;
        Ok(facts)
    }

    /// Makes a split image of a foreign disk in the new directory `made`. Workers without privileges read it, in the format
    /// that is stated; nothing that it refers to is there for them, and what refers to anything is refused before.
    async fn adopt(&self, made: &Path, disk: OwnedFd, format: DiskFormat) -> Result<Upload> {
        std::fs::DirBuilder::new().mode(0o700).create(made)?;
        let field = "disk";
        let mut given = File::from(disk);
        io::Seek::rewind(&mut given)?;
        if given.metadata()?.len() == 0 {
            return Err(Error::invalid(field, "the disk is empty"));
        }
        let (mut name, mut system, mut format, mut file) = (String::new(), String::new(), format, "upload");
        // What counts is the copy: who uploads may still write.
        if format == DiskFormat::Ova {
            let bounds = serde_json::to_value(self.bounds)?;
            let ended = self.worker(made)?.stdin(given.into()).call("ova", bounds).await?;
            let found = match (ended.code, serde_json::from_slice::<ova::Answer>(&ended.stdout)) {
                (0, Ok(ova::Answer::Done(found))) => found,
                (0, Ok(ova::Answer::Failed(e))) => return Err(e),
                (125, _) => {
                    let said = String::from_utf8_lossy(&ended.stderr).into_owned();
                    return Err(Error::internal(
                        "the worker that reads appliances could not be set up",
                        said,
                    ));
                }
                _ => {
                    let text = "the appliance is corrupt or exceeds what an image may be";
                    return Err(Error::invalid(field, text));
                }
            };
            (name, system, format, file) = (found.name, found.system, DiskFormat::Vmdk, "disk");
        } else {
            let ended = self.worker(made)?.stdin(given.into()).call("store", serde_json::Value::Null).await?;
            match ended.code {
                0 => {}
                28 => return Err(Error::quota("no space left on the device")),
                _ => return Err(damaged(field, &ended)),
            }
        }
        let copy = made.join(file);
        if !copy.symlink_metadata()?.is_file() {
            return Err(Error::invalid(field, "the disk is not a file"));
        }
        let given = File::open(&copy)?;
        let size = match format {
            DiskFormat::Qcow2 => qcow2::check(field, &given)?.size,
            DiskFormat::Raw => match given.metadata()?.len() {
                size @ 1..=qcow2::MAX_SIZE if size % 512 == 0 => size,
                size if size > qcow2::MAX_SIZE => {
                    return Err(Error::invalid(field, "the disk is larger than 8 TiB"));
                }
                _ => {
                    let text = "the disk is no whole number of sectors (512 bytes): cut off, or no raw disk";
                    return Err(Error::invalid(field, text));
                }
            },
            _ => vmdk::check(field, &given)?,
        };
        let (from, place) = (format.as_str(), format!("/out/{file}"));
        if format != DiskFormat::Raw {
            // Converting reads what lies past the end as zeros; only the check tells a cut or damaged file.
            let args = ["check", "-q", "-f", from, &place];
            let checked = self.worker(made)?.exec(Program::QemuImg, &args).await?;
            if !matches!(checked.code, 0 | 3) {
                return Err(damaged(field, &checked));
            }
        }
        let args = ["convert", "-f", from, "-O", "qcow2", &place, "/out/rootfs"];
        let converted = self.worker(made)?.exec(Program::QemuImg, &args).await?;
        if converted.code != 0 {
            return Err(damaged(field, &converted));
        }
        std::fs::remove_file(&copy)?;
        let rootfs = made.join("rootfs");
        let whole = rootfs.symlink_metadata()?.is_file();
        if !whole || qcow2::check(field, &File::open(&rootfs)?)?.size != size {
            return Err(Error::invalid(field, "the disk image changed its size while it was converted"));
        }
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
        let text = |s: String, other: &str| if s.is_empty() { other.to_owned() } else { s };
        let metadata = Metadata {
            architecture: "x86_64".into(),
            creation_date: now.map_or(0, |d| d.as_secs() as i64),
            properties: [
                ("os", text(system, "unknown")),
                ("description", text(name, &format!("disk ({})", format.as_str()))),
            ]
            .map(|(k, v)| (k.to_owned(), v))
            .into(),
            ..Metadata::default()
        };
        let tar = made.join("metadata");
        let yaml = metadata.to_yaml()?;
        write_tar(&tar, &[("metadata.yaml", yaml.as_bytes(), 0o644)])?;
        Ok(Upload::Split { metadata: Staged::Own(tar), rootfs: Staged::Own(rootfs) })
    }

    async fn take(&self, work: &Path, upload: Upload) -> Result<Record> {
        let (unified, files) = match upload {
            Upload::Unified { image } => (true, vec![("unified", image)]),
            Upload::Split { metadata, rootfs } => (false, vec![("metadata", metadata), ("rootfs", rootfs)]),
            Upload::Disk { .. } => return Err(Error::internal("a disk is adopted first", "take")),
        };
        let own = files.iter().all(|(_, f)| matches!(f, Staged::Own(_)));
        let at = work.to_owned();
        let (fingerprint, size) = blocking(move || {
            let (mut hash, mut size) = (Sha256::new(), 0);
            for (name, file) in files {
                size += keep(file, &at.join(name), &mut hash)?;
            }
            Ok((format!("{:x}", hash.finalize()), size))
        })
        .await?;
        let out = work.join("out");
        std::fs::DirBuilder::new().mode(0o700).create(&out)?;
        let found = if unified {
            self.unpack(work, "unified", "image", Part::Unified, &out).await?
        } else {
            let described = self.unpack(work, "metadata", "metadata", Part::Metadata, &out).await?;
            let mut magic = [0u8; 4];
            let _ = File::open(work.join("rootfs"))?.read(&mut magic)?;
            let inside = match magic {
                qcow2::MAGIC => {
                    rustix::fs::linkat(
                        rustix::fs::CWD,
                        work.join("rootfs"),
                        rustix::fs::CWD,
                        out.join("rootfs.img"),
                        rustix::fs::AtFlags::empty(),
                    )
                    .map_err(io::Error::from)?;
                    Found { disk: true, ..Found::default() }
                }
                _ if &magic == b"hsqs" => self.unsquash(work, &out).await?,
                _ => self.unpack(work, "rootfs", "rootfs", Part::Root, &out).await?,
            };
            Found { metadata: described.metadata, templates: described.templates, ..inside }
        };
        let field = if unified { "image" } else { "rootfs" };
        let mut disk_size = 0;
        let kind = if found.disk {
            let img = out.join("rootfs.img");
            disk_size = qcow2::check(field, &File::open(&img)?)?.size;
            if own {
                std::fs::rename(&img, work.join("disk.img"))?;
            } else {
                self.convert(field, &out).await?;
                let made = out.join("disk.img");
                if qcow2::check(field, &File::open(&made)?)?.size != disk_size {
                    return Err(Error::invalid(
                        field,
                        "the disk image changed its size while it was converted",
                    ));
                }
                std::fs::rename(made, work.join("disk.img"))?;
            }
            // Every clone of it refers to this file; nothing may write it again.
            std::fs::set_permissions(work.join("disk.img"), Permissions::from_mode(0o444))?;
            InstanceKind::VirtualMachine
        } else {
            std::fs::rename(out.join("tree"), work.join("tree"))?;
            InstanceKind::Container
        };
        let at = out.clone();
        blocking(move || remove(&at)).await?;
        let metadata = found.metadata.unwrap_or_default();
        let templates = Templates { rules: metadata.templates, files: found.templates };
        templates.check(if unified { "image" } else { "metadata" })?;
        Ok(Record {
            unified,
            facts: ImageFacts {
                // The world knows an image of the OCI by the digest of its manifest.
                fingerprint: found.digest.unwrap_or(fingerprint),
                application: found.application,
                size,
                kind,
                architecture: metadata.architecture,
                properties: metadata.properties,
                created_at: metadata.creation_date,
                expires_at: metadata.expiry_date,
                disk_size,
                templates,
            },
        })
    }

    fn worker(&self, out: &Path) -> Result<Sandbox> {
        let limits = Limits { memory: 2 << 30, ..Limits::default() };
        Ok(Sandbox::new(&self.launcher).limits(limits).writable("out", open_dir(out)?))
    }

    async fn unpack(&self, work: &Path, file: &str, field: &str, part: Part, out: &Path) -> Result<Found> {
        self.unpack_from(File::open(work.join(file))?.into(), field, part, out).await
    }

    async fn unpack_from(&self, input: OwnedFd, field: &str, part: Part, out: &Path) -> Result<Found> {
        let task = Task {
            part,
            bounds: self.bounds,
            field: field.to_owned(),
            within: None,
            beside: None,
            machine: None,
        };
        let ended = self.worker(out)?.stdin(input).call("unpack", serde_json::to_value(task)?).await?;
        let said = || format!("exit code {}: {}", ended.code, String::from_utf8_lossy(&ended.stderr).trim());
        match (ended.code, serde_json::from_slice::<Answer>(&ended.stdout)) {
            (0, Ok(answer)) => answer.into(),
            (125, _) => Err(Error::internal("the worker that unpacks images could not be set up", said())),
            // A limit ended it, or the archive made it fall over: the file's fault.
            _ => Err(Error::invalid(field, "the archive is corrupt or exceeds what an image may be")
                .with_context(said())),
        }
    }

    /// A squashfs becomes a tar stream by `sqfs2tar` in one worker, which another one unpacks.
    async fn unsquash(&self, work: &Path, out: &Path) -> Result<Found> {
        let (read, write) =
            rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).map_err(io::Error::from)?;
        let reader = Sandbox::new(&self.launcher)
            .readable("image.squashfs", File::open(work.join("rootfs"))?.into())
            .stdout(write)
            .exec(Program::Sqfs2tar, &["/image.squashfs"]);
        let (tar, found) = tokio::join!(reader, self.unpack_from(read, "rootfs", Part::Root, out));
        let tar = tar?;
        if tar.code != 0 {
            let said = String::from_utf8_lossy(&tar.stderr).trim().to_owned();
            // A broken pipe follows from what the other worker refused; its words are the better ones.
            return match found {
                Err(e) if !e.message.contains("cut off") => Err(e),
                _ => {
                    Err(Error::invalid("rootfs", "the squashfs image is corrupt or cut off")
                        .with_context(said))
                }
            };
        }
        found
    }

    async fn convert(&self, field: &str, out: &Path) -> Result<()> {
        // Converting reads what lies past the end as zeros; only the check tells a cut or damaged file. Its exit code 3
        // means lost clusters, which is harmless.
        let args = ["check", "-q", "-f", "qcow2", "/out/rootfs.img"];
        let checked = self.worker(out)?.exec(Program::QemuImg, &args).await?;
        if !matches!(checked.code, 0 | 3) {
            return Err(damaged(field, &checked));
        }
        let args = ["convert", "-f", "qcow2", "-O", "qcow2", "/out/rootfs.img", "/out/disk.img"];
        let converted = self.worker(out)?.exec(Program::QemuImg, &args).await?;
        if converted.code != 0 {
            return Err(damaged(field, &converted));
        }
        Ok(())
    }

    async fn record(&self, id: ImageId) -> Result<Option<Record>> {
        match tokio::fs::read(self.image_dir(id).join("image.json")).await {
            Ok(bytes) => Ok(Some(serde_json::from_slice(&bytes)?)),
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(e) => Err(e.into()),
        }
    }

    async fn known(&self, id: ImageId) -> Result<Record> {
        self.record(id).await?.ok_or_else(|| Error::not_found("this host does not have the image"))
    }

    /// What is known of an image.
    ///
    /// # Errors
    /// Not found.
    pub async fn facts(&self, id: ImageId) -> Result<ImageFacts> {
        Ok(self.known(id).await?.facts)
    }

    /// What volumes of an image are cloned from.
    ///
    /// # Errors
    /// Not found.
    pub async fn content(&self, id: ImageId) -> Result<Content> {
        let facts = self.known(id).await?.facts;
        let dir = self.image_dir(id);
        Ok(match facts.kind {
            InstanceKind::Container => Content::Tree(dir.join("tree")),
            InstanceKind::VirtualMachine => {
                Content::Disk { path: dir.join("disk.img"), size: facts.disk_size }
            }
        })
    }

    /// The files as they came.
    ///
    /// # Errors
    /// Not found.
    pub async fn export(&self, id: ImageId) -> Result<Export> {
        let record = self.known(id).await?;
        let (dir, fingerprint) = (self.image_dir(id), record.facts.fingerprint);
        let vm = record.facts.kind == InstanceKind::VirtualMachine;
        let root = if vm { "rootfs.img" } else { "rootfs" };
        let names: &[(&str, &'static str, &str)] = if record.unified {
            &[("unified", "image", "")]
        } else {
            &[("metadata", "metadata", "meta-"), ("rootfs", root, "")]
        };
        let names = names.to_vec();
        let parts = blocking(move || {
            names
                .iter()
                .map(|(name, field, prefix)| {
                    let mut file = File::open(dir.join(name))?;
                    let extension = extension(&mut file)?;
                    Ok(ExportPart {
                        field,
                        filename: format!("{prefix}{fingerprint}{extension}"),
                        size: file.metadata()?.len(),
                        file: file.into(),
                    })
                })
                .collect()
        })
        .await?;
        Ok(Export { parts })
    }

    /// Removes an image; volumes made of it stay. An unknown one is fine.
    ///
    /// # Errors
    /// The system refuses.
    pub async fn delete(&self, id: ImageId) -> Result<()> {
        let (from, to) = (self.image_dir(id), self.root.join("tmp").join(uuid::Uuid::new_v4().to_string()));
        let doomed = to.clone();
        let gone = blocking(move || match std::fs::rename(&from, &to) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(false),
            r => r.map(|()| true).map_err(Into::into),
        })
        .await?;
        if gone {
            // The name is gone; the rest goes in the background, or at the next start.
            tokio::spawn(async move {
                loop {
                    let at = doomed.clone();
                    match blocking(move || remove_unread(&at)).await {
                        Ok(true) => return,
                        Ok(false) => tokio::time::sleep(READ_WHOLE).await,
                        Err(e) => return tracing::debug!(error = %e, "left to the next start"),
                    }
                }
            });
        }
        Ok(())
    }

    /// Keeps the files of an image as long as what this answers is kept, also should it be deleted meanwhile: for who reads
    /// all of it for minutes.
    ///
    /// # Errors
    /// Not found; the system refuses.
    pub async fn hold(&self, id: ImageId) -> Result<std::fs::File> {
        use std::os::unix::fs::MetadataExt;
        let path = self.image_dir(id);
        blocking(move || {
            let gone = || Error::not_found("the image is gone");
            let directory = std::fs::File::open(&path).map_err(|_| gone())?;
            rustix::fs::flock(&directory, rustix::fs::FlockOperation::LockShared).map_err(io::Error::from)?;
            // Whoever deletes takes its name away first.
            let inode = |found: std::fs::Metadata| (found.dev(), found.ino());
            let there = std::fs::metadata(&path).map_err(|_| gone())?;
            match inode(there) == inode(directory.metadata()?) {
                true => Ok(directory),
                false => Err(gone()),
            }
        })
        .await
    }

    /// All images of this host, by id.
    ///
    /// # Errors
    /// The directory cannot be read.
    pub async fn list(&self) -> Result<Vec<(ImageId, ImageFacts)>> {
        let mut dir = tokio::fs::read_dir(self.root.join("images")).await?;
        let mut found = Vec::new();
        while let Some(entry) = dir.next_entry().await? {
            let Some(id) = entry.file_name().to_str().and_then(|n| n.parse::<ImageId>().ok()) else {
                continue;
            };
            if let Some(record) = self.record(id).await? {
                found.push((id, record.facts));
            }
        }
        found.sort_by_key(|(id, _)| *id);
        Ok(found)
    }

    /// Builds a recipe, or answers what was built of it today unless `force`; import the answer with
    /// [`ImageStore::import`]. One build at a time.
    ///
    /// # Errors
    /// As [`Recipe::build`].
    pub async fn build(
        &self,
        recipe: &str,
        kind: InstanceKind,
        force: bool,
        progress: Progress,
    ) -> Result<Upload> {
        let recipe = Recipe::find(recipe)?;
        let _turn = self.building.lock().await;
        let date = jiff::Zoned::now().date().to_string();
        let key = recipe.key(kind, &date);
        let place = self.root.join("recipes").join(&key);
        if force || !place.join("rootfs").exists() {
            let work = self.work_dir().await?;
            let built =
                recipe.build(kind, &date, &self.sources, &work.path, &self.launcher, &progress).await?;
            let (to, trash) = (place.clone(), work.path.join("old"));
            let label = format!("{} {} {date}", recipe.name, kind.as_str());
            let recipes = self.root.join("recipes");
            blocking(move || {
                let fresh = built.metadata.with_file_name("fresh");
                std::fs::create_dir(&fresh)?;
                std::fs::rename(&built.metadata, fresh.join("metadata.tar"))?;
                std::fs::rename(&built.rootfs, fresh.join("rootfs"))?;
                std::fs::write(fresh.join("recipe"), &label)?;
                rustix::fs::syncfs(File::open(&fresh)?).map_err(io::Error::from)?;
                if to.exists() {
                    std::fs::rename(&to, &trash)?;
                }
                std::fs::rename(&fresh, &to)?;
                forget_older(&recipes, &to, &label)
            })
            .await?;
        } else {
            progress("built earlier today", 100);
        }
        let built = Built { metadata: place.join("metadata.tar"), rootfs: place.join("rootfs") };
        Ok(Upload::Split { metadata: Staged::Own(built.metadata), rootfs: Staged::Own(built.rootfs) })
    }

    async fn work_dir(&self) -> Result<WorkDir> {
        let path = self.root.join("tmp").join(uuid::Uuid::new_v4().to_string());
        tokio::fs::DirBuilder::new().mode(0o700).create(&path).await?;
        Ok(WorkDir { path })
    }
}

/// What `qemu-img` said of a foreign disk image.
fn damaged(field: &str, ended: &Ended) -> Error {
    let said = String::from_utf8_lossy(&ended.stderr).trim().to_owned();
    if ended.code == 125 {
        return Error::internal("the worker that reads disk images could not be set up", said);
    }
    if said.contains("No space left") {
        return Error::quota("no space left on the device").with_context(said);
    }
    Error::invalid(field, "the disk image is corrupt or cut off").with_context(said)
}

/// A directory below `tmp/`, removed when dropped (in the background when on the runtime).
struct WorkDir {
    path: PathBuf,
}

impl Drop for WorkDir {
    fn drop(&mut self) {
        let path = std::mem::take(&mut self.path);
        if path.exists()
            && let Err(e) = remove(&path)
        {
            tracing::warn!(error = %e, "a work directory of the image store was left; the next start removes it");
        }
    }
}

/// Earlier builds of the same recipe and kind go; images made of them have their own links.
fn forget_older(recipes: &Path, keep: &Path, label: &str) -> Result<()> {
    let what = |l: &str| l.rsplit_once(' ').map(|(w, _)| w.to_owned());
    for entry in std::fs::read_dir(recipes)?.flatten() {
        let path = entry.path();
        let other = std::fs::read_to_string(path.join("recipe")).unwrap_or_default();
        if path != keep && (other.is_empty() || what(&other) == what(label)) {
            remove(&path)?;
        }
    }
    Ok(())
}

/// Puts a file into the image's directory and its bytes into the hash; answers its size.
fn keep(file: Staged, to: &Path, hash: &mut Sha256) -> Result<u64> {
    let mut buffer = vec![0u8; 256 << 10];
    let mut size = 0;
    let (mut from, mut copy) = match file {
        Staged::Own(path) | Staged::Packed(path) => {
            std::fs::hard_link(&path, to)?;
            (File::open(to)?, None)
        }
        Staged::Foreign(fd) => {
            let mut from = File::from(fd);
            io::Seek::rewind(&mut from)?;
            (from, Some(File::create_new(to)?))
        }
    };
    loop {
        let n = match from.read(&mut buffer) {
            Ok(0) => break,
            Ok(n) => n,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
            Err(e) => return Err(e.into()),
        };
        hash.update(&buffer[..n]);
        size += n as u64;
        if let Some(copy) = &mut copy {
            copy.write_all(&buffer[..n])?;
        }
    }
    Ok(size)
}

/// File name extension by content, as Incus names exported files.
fn extension(file: &mut File) -> Result<&'static str> {
    use std::os::unix::fs::FileExt;
    let mut magic = [0u8; 6];
    let _ = file.read_at(&mut magic, 0)?;
    Ok(match magic {
        [0x1f, 0x8b, ..] => ".tar.gz",
        [0xfd, b'7', b'z', b'X', b'Z', 0] => ".tar.xz",
        [0x28, 0xb5, 0x2f, 0xfd, ..] => ".tar.zst",
        [b'B', b'Z', b'h', ..] => ".tar.bz2",
        [b'h', b's', b'q', b's', ..] => ".squashfs",
        [b'Q', b'F', b'I', 0xfb, ..] => ".qcow2",
        _ => ".tar",
    })
}

/// How often an image that is deleted while somebody reads all of it is looked at again: no thread waits for him.
const READ_WHOLE: std::time::Duration = std::time::Duration::from_secs(5);

/// Removes what nobody holds ([`ImageStore::hold`]); answers whether nobody does.
fn remove_unread(doomed: &Path) -> Result<bool> {
    let Ok(directory) = std::fs::File::open(doomed) else { return remove(doomed).map(|()| true) };
    let exclusive = rustix::fs::FlockOperation::NonBlockingLockExclusive;
    match rustix::fs::flock(&directory, exclusive) {
        Err(rustix::io::Errno::WOULDBLOCK) => Ok(false),
        _ => remove(doomed).map(|()| true),
    }
}

fn sync_dir(path: &Path) -> Result<()> {
    File::open(path)?.sync_all().map_err(Into::into)
}

fn remove(path: &Path) -> Result<()> {
    match std::fs::remove_dir_all(path) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
        r => r.map_err(Into::into),
    }
}

async fn blocking<T: Send + 'static>(f: impl FnOnce() -> Result<T> + Send + 'static) -> Result<T> {
    tokio::task::spawn_blocking(f).await.map_err(|e| Error::internal("a task ended unexpectedly", e))?
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_read_whole_stays_until_it_is_read() {
        let place = tempfile::tempdir().unwrap();
        let doomed = place.path().join("image");
        std::fs::create_dir(&doomed).unwrap();
        std::fs::write(doomed.join("disk"), "x").unwrap();
        let held = File::open(&doomed).unwrap();
        rustix::fs::flock(&held, rustix::fs::FlockOperation::LockShared).unwrap();
        assert!(!remove_unread(&doomed).unwrap());
        assert!(doomed.join("disk").exists());
        rustix::fs::flock(&held, rustix::fs::FlockOperation::Unlock).unwrap();
        assert!(remove_unread(&doomed).unwrap());
        assert!(!doomed.exists());
        assert!(remove_unread(&doomed).unwrap(), "gone is gone");
    }
}
