//! The trait of pools.

use async_trait::async_trait;
use karst_host::overlay::{Layers, Mapped};
use karst_model::{
    ByteSize, Error, ImageId, Result, SnapshotId, VolumeId,
    storage::{Abilities, PoolKind, Usage, VolumeContent},
};
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};

/// A pool on this host. Implementations pass [`crate::contract`].
///
/// Every mutation is idempotent and crash-safe: a volume is there completely or not at all; `create` of one that is there
/// answers it, `delete` of an unknown one is fine. Nothing here knows names: a volume's place derives from its UUID.
#[async_trait]
pub trait PoolDriver: Send + Sync {
    /// Kind.
    fn kind(&self) -> PoolKind;

    /// Makes a volume. On failure nothing is left.
    async fn create(&self, volume: VolumeId, new: &NewVolume) -> Result<VolumeInfo>;

    /// Removes a volume: its name at once, its space in the background, also across a restart.
    async fn delete(&self, volume: VolumeId) -> Result<()>;

    /// What is known of a volume; not found when there is none.
    async fn inspect(&self, volume: VolumeId) -> Result<VolumeInfo>;

    /// Where a volume is, made accessible to `user` (the host id that a guest's QEMU runs as; `None`: root alone).
    async fn locate(&self, volume: VolumeId, user: Option<u32>) -> Result<Located>;

    /// The tree of a volume that no guest has in use, to be read and written as long as what is answered is kept.
    async fn open_tree(&self, volume: VolumeId) -> Result<OpenTree> {
        Ok(OpenTree { path: self.locate(volume, None).await?.path, guard: None })
    }

    /// Makes a tree one that stands alone, a directory like any other, if it is not. Nothing may have it in use.
    async fn flatten(&self, _volume: VolumeId) -> Result<()> {
        Ok(())
    }

    /// Space that a volume takes now. Of a tree this reads every directory: not for a hot path.
    async fn usage(&self, volume: VolumeId) -> Result<Usage>;

    /// Changes the size limit. A disk only grows, and only while nothing has it open; a tree's limit needs
    /// [`PoolDriver::supports_quota`] and may shrink to what the tree holds.
    async fn resize(&self, volume: VolumeId, size: ByteSize) -> Result<VolumeInfo>;

    /// Writes down that a disk's file was grown by the program that has it open. Pools of block devices have nothing to do.
    async fn grown(&self, volume: VolumeId, size: ByteSize) -> Result<VolumeInfo> {
        self.resize(volume, size).await
    }

    /// All volumes, by id.
    async fn list(&self) -> Result<Vec<VolumeInfo>>;

    /// Space of the pool.
    async fn space(&self) -> Result<Usage>;

    /// Are size limits of trees enforced? Disks always have their size.
    fn supports_quota(&self) -> bool;

    /// What its file system can, of a pool of directories that is in use.
    fn abilities(&self) -> Option<Abilities> {
        None
    }

    /// Makes the owners of a tree's files those of a guest that is about to have it, where they are not mapped by its mount: id 0 of
    /// the guest is the first of `ids`. Nothing else may have the tree.
    async fn move_owners(&self, _volume: VolumeId, _ids: Mapped) -> Result<()> {
        Ok(())
    }

    /// Waits until the space of all deleted volumes is free (shutdown, tests, purge).
    async fn settle(&self);

    /// Waits until what was made is on disk (after a snapshot, shutdown). A power cut before loses what was made of an image
    /// or is a snapshot: whoever asks for it is told then. What was copied or put in an old content's place is on disk as
    /// soon as it is there.
    ///
    /// # Errors
    /// The system cannot write.
    async fn flush(&self) -> Result<()> {
        Ok(())
    }

    /// Snapshots of volumes, where the pool has them.
    fn snapshots(&self) -> Option<&dyn Snapshots> {
        None
    }

    /// Reading and replacing whole contents, where the pool can.
    fn contents(&self) -> Option<&dyn Contents> {
        None
    }

    /// Layers of disks, where volumes are files.
    fn disk_layers(&self) -> Option<&dyn DiskLayers> {
        None
    }

    /// Texts that say what volumes are, where the pool can keep them.
    fn descriptions(&self) -> Option<&dyn Descriptions> {
        None
    }

    /// An image is gone: what the pool kept of it to clone from may go too. Volumes made of it stay whole.
    async fn forget_image(&self, _image: ImageId) -> Result<()> {
        Ok(())
    }
}

/// Snapshots of volumes. They do not depend on each other and go with their volume; all calls are idempotent.
#[async_trait]
pub trait Snapshots: Send + Sync {
    /// Is a disk that is being written frozen at one instant? Otherwise its writer has to be paused.
    fn instant(&self) -> bool;
    /// Freezes the volume's content now under `snapshot`.
    async fn create(&self, volume: VolumeId, snapshot: SnapshotId) -> Result<()>;
    /// Was it on disk before the power went? One that was not is of no use.
    async fn whole(&self, _volume: VolumeId, _snapshot: SnapshotId) -> Result<bool> {
        Ok(true)
    }
    /// Removes a snapshot.
    async fn delete(&self, volume: VolumeId, snapshot: SnapshotId) -> Result<()>;
    /// Makes the volume what it was at the snapshot, its size included; nothing may have it open.
    async fn restore(&self, volume: VolumeId, snapshot: SnapshotId) -> Result<VolumeInfo>;
    /// Snapshots of a volume, by id; the id of each info is the volume's.
    async fn list(&self, volume: VolumeId) -> Result<Vec<(SnapshotId, VolumeInfo)>>;
}

/// Whole contents of volumes.
#[async_trait]
pub trait Contents: Send + Sync {
    /// Where the content lies, for reading, as long as what is answered is kept.
    async fn read(&self, volume: VolumeId, snapshot: Option<SnapshotId>) -> Result<Reading>;
    /// Replaces the content in one step; snapshots stay, nothing may have the volume open. The size becomes the source's.
    async fn replace(&self, volume: VolumeId, source: &Source) -> Result<VolumeInfo>;
    /// Begins a content that somebody else writes.
    async fn begin(&self, volume: VolumeId) -> Result<Box<dyn Filling>>;
}

/// Layers of disks: files of a volume, each over the one before it. All calls are idempotent, and what they say is on disk when they
/// answer. Who else has the disk open is the caller's business.
#[async_trait]
pub trait DiskLayers: Send + Sync {
    /// The numbers of the volume's files, lowest first.
    async fn chain(&self, volume: VolumeId) -> Result<Vec<u32>>;
    /// Does an image lie below the lowest?
    async fn has_base(&self, volume: VolumeId) -> Result<bool>;
    /// Puts an empty layer over all; its number is higher than all before it.
    async fn add(&self, volume: VolumeId, number: u32) -> Result<()>;
    /// Takes the highest layer away, to which nothing was written; fine when it is not there.
    async fn take_back(&self, volume: VolumeId, number: u32) -> Result<()>;
    /// After a merge: of the files only these are left, and what lay below those that went does not matter any more.
    async fn keep(&self, volume: VolumeId, left: &[u32]) -> Result<()>;
    /// The lowest file has all that was in the image below it.
    async fn leave_base(&self, volume: VolumeId) -> Result<()>;
}

/// Texts that say what the pool and its volumes are: for whoever has nothing but the pool. They go with their volumes.
#[async_trait]
pub trait Descriptions: Send + Sync {
    /// Writes them, each in one step; all are on disk when it answers. One that says what is there already is left alone,
    /// and so is one of a volume that the pool does not have.
    async fn describe(&self, own: Option<String>, volumes: Vec<(VolumeId, String)>) -> Result<()>;
    /// What is said of a volume, or of the pool itself; nothing that is longer than `most` bytes or no text.
    async fn description(&self, volume: Option<VolumeId>, most: usize) -> Result<Option<String>>;
}

/// The content of a volume, to be read.
pub struct Reading {
    /// What it is.
    pub info: VolumeInfo,
    /// Where; nothing is written through it.
    pub located: Located,
    /// Keeps it there (a mount, a clone made for reading).
    pub guard: Option<Box<dyn Send + Sync>>,
}

impl Reading {
    /// It, as what another volume is made of.
    pub fn source(&self) -> Source {
        let path = self.located.path.clone();
        match self.located.format {
            Format::Directory => Source::Tree { path, image: None },
            format => Source::Disk {
                path,
                format,
                backing: self.located.backing.clone(),
                size: self.info.size.unwrap_or_default().bytes(),
                image: None,
            },
        }
    }
}

/// A tree of a volume, to be worked on.
pub struct OpenTree {
    /// Where, for this process.
    pub path: PathBuf,
    /// Keeps it there.
    pub guard: Option<Box<dyn Send + Sync>>,
}

/// A new content in the making; dropped it leaves nothing.
#[async_trait]
pub trait Filling: Send + Sync {
    /// An empty directory: a tree is to be put into its subdirectory `tree`, a disk into its file `disk.img`, raw.
    fn directory(&self) -> &Path;
    /// Makes it the volume's content in one step.
    async fn commit(self: Box<Self>) -> Result<VolumeInfo>;
}

/// A volume to make.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NewVolume {
    /// What it holds.
    pub content: VolumeContent,
    /// Its size; `None` is the source's for a disk (which an empty one must have) and no limit for a tree.
    pub size: Option<ByteSize>,
    /// What it begins as.
    pub source: Source,
}

/// What a new volume begins as: things of this host, found by the agent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Source {
    /// Nothing in it.
    Empty,
    /// A copy of a tree that does not change meanwhile.
    Tree {
        /// Where.
        path: PathBuf,
        /// It is this image's: the pool may keep it under that id and clone from there.
        image: Option<ImageId>,
    },
    /// A copy of a disk that does not change meanwhile.
    Disk {
        /// Where.
        path: PathBuf,
        /// Form.
        format: Format,
        /// The qcow2 file below it.
        backing: Option<PathBuf>,
        /// Its virtual size in bytes.
        size: u64,
        /// It is this image's, which never changes again: the pool may refer to it.
        image: Option<ImageId>,
    },
    /// A clone of a volume of this pool.
    Volume {
        /// Which.
        volume: VolumeId,
        /// Its state then; `None`: now.
        snapshot: Option<SnapshotId>,
    },
    /// A copy of one of the others that shares nothing with it, neither blocks nor files: that may go at once.
    Full(Box<Source>),
}

impl Source {
    /// The same as a full copy, where that is wanted.
    #[must_use]
    pub fn in_full(self, full: bool) -> Self {
        if full { Self::Full(Box::new(self)) } else { self }
    }
}

/// What a full copy is made of: what lies somewhere and is nobody's to clone from; and what keeps it there meanwhile.
pub(crate) async fn apart(pool: &dyn Contents, of: &Source) -> Result<(Source, Option<Reading>)> {
    Ok(match of.clone() {
        Source::Empty => (Source::Empty, None),
        Source::Tree { path, .. } => (Source::Tree { path, image: None }, None),
        Source::Disk { path, format, backing, size, .. } => {
            (Source::Disk { path, format, backing, size, image: None }, None)
        }
        Source::Volume { volume, snapshot } => {
            let reading = pool.read(volume, snapshot).await?;
            (reading.source(), Some(reading))
        }
        Source::Full(_) => return Err(Error::internal("a full copy of a full copy is asked for", "")),
    })
}

/// Form of a volume on disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Format {
    /// A tree with unshifted owners (guest id 0 is id 0 on disk).
    Directory,
    /// qcow2 file.
    Qcow2,
    /// Raw file or block device.
    Raw,
}

/// A volume.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VolumeInfo {
    /// Which.
    pub id: VolumeId,
    /// What it holds.
    pub content: VolumeContent,
    /// Form.
    pub format: Format,
    /// Virtual size of a disk, limit of a tree; `None` without one.
    pub size: Option<ByteSize>,
}

/// Where a volume is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Located {
    /// Directory, file or block device. Of a tree with `layers` an empty directory, except in a [`Reading`].
    pub path: PathBuf,
    /// A tree that is an overlay: who runs it mounts these, all others ask [`PoolDriver::open_tree`].
    pub layers: Option<Layers>,
    /// Form of what is there.
    pub format: Format,
    /// The read-only qcow2 file below a clone, for a QEMU that gets its block nodes spelled out; of a disk in layers it is below the
    /// lowest of them.
    pub backing: Option<PathBuf>,
    /// The files below the one at `path`.
    pub chain: FileChain,
}

/// Files of a disk in layers, beside the one that is written.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct FileChain {
    /// The number of the one that is written.
    pub number: u32,
    /// Those below it, the next one first.
    pub below: Vec<ChainFile>,
}

/// A file of a disk in layers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ChainFile {
    /// Its number.
    pub number: u32,
    /// Where.
    pub path: PathBuf,
    /// Form.
    pub format: Format,
}
