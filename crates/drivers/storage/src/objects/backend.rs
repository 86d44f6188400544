//! What a kind of pool whose volumes are objects of its own has to know.

use super::Object;
use async_trait::async_trait;
use karst_host::{Command, Program, mount, run};
use karst_model::{
    ByteSize, Error, Result,
    storage::{PoolKind, Usage, VolumeContent},
};
use std::{
    fmt::Debug,
    path::{Path, PathBuf},
    time::Duration,
};

/// What is known of an object.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Kept {
    /// What it holds.
    pub content: VolumeContent,
    /// Size of a device, limit of a data set.
    pub size: Option<ByteSize>,
    /// The file system of a tree on a device of its own; `None`: a disk, or a tree of a data set.
    pub on: Option<FileSystem>,
}

/// File systems of trees on devices.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FileSystem {
    /// ext4.
    Ext4,
    /// XFS.
    Xfs,
}

impl FileSystem {
    /// As users and the kernel call it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Ext4 => "ext4",
            Self::Xfs => "xfs",
        }
    }

    /// Reads [`Self::as_str`].
    pub fn parse(text: &str) -> Option<Self> {
        [Self::Ext4, Self::Xfs].into_iter().find(|f| f.as_str() == text)
    }

    /// Smallest that its tools make.
    pub fn smallest(self) -> ByteSize {
        match self {
            Self::Ext4 => ByteSize::mib(8),
            Self::Xfs => ByteSize::mib(300),
        }
    }

    /// Makes one on an empty device.
    pub async fn make(self, device: &Path) -> Result<()> {
        let made = match self {
            // Nothing is set aside for root: the size is the tree's. The device is known to be all zeros.
            Self::Ext4 => run(Program::MkfsExt4).args(["-q", "-F", "-m", "0", "-E", MKFS]),
            Self::Xfs => run(Program::MkfsXfs).args(["-q", "-K"]),
        };
        done(made.arg(device).timeout(PATIENCE)).await.map(drop)
    }

    /// Mounts it. Clones carry the same id as what they were made of; what is deleted in it goes back to the pool.
    pub fn mount(self, device: &Path, at: &Path) -> Result<()> {
        let options = match self {
            // The device is all zeros where nothing was written: tables of inodes need not be cleared, which would take
            // space for each.
            Self::Ext4 => "discard,noinit_itable",
            Self::Xfs => "discard,nouuid",
        };
        Ok(mount::mount(device, at, self.as_str(), options)?)
    }

    /// Mounts it for reading, and writes nothing, not even what its journal has still to say.
    pub fn mount_read_only(self, device: &Path, at: &Path) -> Result<()> {
        let options = match self {
            Self::Ext4 => "noload",
            Self::Xfs => "norecovery,nouuid",
        };
        match mount::mount_read_only(device, at, self.as_str(), options) {
            // A daemon that is gone has left it mounted for writing: this is the same file system once more.
            Err(e) if e.kind() == std::io::ErrorKind::ResourceBusy => self.mount(device, at),
            other => Ok(other?),
        }
    }

    /// Fills its device, which has grown; it is mounted at `at`.
    pub async fn grow(self, device: &Path, at: &Path) -> Result<()> {
        let grown = match self {
            Self::Ext4 => run(Program::Resize2fs).arg(device),
            Self::Xfs => run(Program::XfsGrowfs).arg(at),
        };
        done(grown.timeout(PATIENCE)).await.map(drop)
    }
}

/// How long a tool may take: they wait for each other and for udev, and one that is killed leaves its work half-done.
pub const PATIENCE: Duration = Duration::from_secs(900);

/// Nothing is cleared that is zeros already.
const MKFS: &str = "nodiscard,lazy_itable_init=1,lazy_journal_init=1";

/// A kind of pool. All calls are atomic: an object is there completely or not at all.
#[async_trait]
pub trait Backend: Send + Sync + Debug {
    /// Kind.
    fn kind(&self) -> PoolKind;
    /// All objects.
    async fn list(&self) -> Result<Vec<(Object, Kept)>>;
    /// One.
    async fn find(&self, object: Object) -> Result<Option<Kept>> {
        Ok(self.list().await?.into_iter().find(|(o, _)| *o == object).map(|(_, kept)| kept))
    }
    /// How the pool keeps its descriptions.
    fn texts(&self) -> Kept;
    /// How a tree of a wanted size is kept.
    fn tree(&self, size: Option<ByteSize>) -> Kept;
    /// Frees what a daemon that was killed in the midst of a call has left beside the objects.
    async fn tidy(&self) -> Result<()> {
        Ok(())
    }
    /// The size that a device gets of which this is wanted.
    async fn rounded(&self, size: ByteSize) -> Result<ByteSize>;
    /// Makes an empty one, of zeros.
    async fn make(&self, object: Object, kept: Kept) -> Result<()>;
    /// Makes `to` what `from` is at this instant, with its size.
    async fn clone(&self, from: Object, to: Object, kept: Kept) -> Result<()>;
    /// Gives it another name.
    async fn rename(&self, from: Object, to: Object) -> Result<()>;
    /// Removes it; one that is not there is gone already. `false`: it cannot go yet.
    async fn remove(&self, object: Object) -> Result<bool>;
    /// Changes the size: of a device only upwards.
    async fn resize(&self, object: Object, kept: Kept) -> Result<()>;
    /// The block device of a disk or of a tree on one.
    async fn device(&self, object: Object) -> Result<PathBuf>;
    /// Mounts a data set, perhaps for reading only.
    async fn mount(&self, object: Object, at: &Path, read_only: bool) -> Result<()>;
    /// Bytes that it takes of the pool.
    async fn used(&self, object: Object, kept: Kept) -> Result<u64>;
    /// Space of the pool.
    async fn space(&self) -> Result<Usage>;
}

/// Runs a program to its end, whoever stops waiting for it: a tool that is killed in the middle may leave a lock behind.
///
/// # Errors
/// Quota when it says that the pool is full; as [`Command::ok`] otherwise.
pub async fn done(command: Command) -> Result<String> {
    let ended = tokio::spawn(command.ok()).await;
    let out = ended.map_err(|e| Error::internal("a task ended unexpectedly", e))?.map_err(full)?;
    Ok(String::from_utf8_lossy(&out).into_owned())
}

/// Tools say in words that a pool is full.
pub fn full(e: Error) -> Error {
    let words =
        ["No space left", "out of space", "quota exceeded", "insufficient free space", "Insufficient free"];
    match &e.context {
        Some(c) if words.iter().any(|w| c.contains(w)) => {
            Error::quota("no space left in the pool").with_context(c)
        }
        _ => e,
    }
}

/// Asks until there is an answer, with the number of the try: what udev and the kernel have still to do takes them a moment.
///
/// # Errors
/// Unavailable when it does not come.
pub async fn until<T, F: Future<Output = Result<Option<T>>>>(ask: impl Fn(u32) -> F) -> Result<T> {
    for tried in 0..1200 {
        if let Some(answer) = ask(tried).await? {
            return Ok(answer);
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    Err(Error::unavailable("the device of a volume did not appear on this host"))
}
