//! Trees that are an image's and what differs: overlays, where the kernel and the file system can map their layers' owners.
//!
//! ```text
//! POOL/images/<image>/rootfs    the lower layer; `forgotten` beside it when only volumes still need it
//! <state>/over/{upper,work}     the upper layer with owners unshifted, and the kernel's own
//! <state>/rootfs                empty
//! ```
//! Nothing is mounted here but for as long as somebody reads or writes; a running container has the one mapped mount in a
//! namespace of its own. See the decision record.

use crate::{
    FilePool, NewVolume, OpenTree,
    files::blocking,
    states::{self, Record},
};
use karst_host::overlay::{self, Held, Layers};
use karst_model::{Error, ImageId, Result, VolumeId};
use std::{
    collections::{HashMap, HashSet},
    io,
    os::unix::fs::DirBuilderExt,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, Weak},
};

/// Name of the mark of an image that is gone and lies below volumes.
const FORGOTTEN: &str = "forgotten";

/// Trees that are being read and written outside of a container: one mount each, however many do so.
#[derive(Debug, Default)]
pub(crate) struct Opened(Mutex<HashMap<VolumeId, Weak<Held>>>);

impl Opened {
    /// What is in the volume's place now is another state.
    pub(crate) fn forget(&self, volume: VolumeId) {
        self.0.lock().unwrap_or_else(|e| e.into_inner()).remove(&volume);
    }
}

/// Makes the directories of a layered state in `state`, the upper layer too when it is a new one over `lower`.
pub(crate) fn prepare(state: &Path, lower: Option<&Path>) -> Result<()> {
    let make = |name: &str, mode| std::fs::DirBuilder::new().mode(mode).create(state.join(name));
    make("rootfs", 0o755)?;
    make("over", 0o700)?;
    make("over/work", 0o700)?;
    if let Some(lower) = lower {
        make("over/upper", 0o755)?;
        let (from, to) =
            (karst_host::fs::open_dir(lower)?, karst_host::fs::open_dir(&state.join("over/upper"))?);
        karst_host::fs::copy_attributes(&from, &to)?;
    }
    Ok(())
}

/// Images that the states of a pool lie over, those in the making as well.
fn needed(root: &Path) -> Result<HashSet<ImageId>> {
    let mut found = HashSet::new();
    let mut look = |directory: &Path| -> Result<()> {
        let entries = match std::fs::read_dir(directory) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
            other => other?,
        };
        for entry in entries {
            found.extend(Record::read(&entry?.path())?.and_then(|r| r.image));
        }
        Ok(())
    };
    // In the order in which a state moves.
    look(&root.join("tmp"))?;
    look(&root.join("volumes"))?;
    for volume in std::fs::read_dir(root.join("snapshots"))? {
        look(&volume?.path())?;
    }
    Ok(found)
}

/// Images that are forgotten and that nothing lies over any more, out of the way. The caller keeps others from taking one in.
pub(crate) fn reap(root: &Path) -> Result<Vec<PathBuf>> {
    let mut forgotten = vec![];
    let images = match std::fs::read_dir(root.join("images")) {
        // The pool was removed.
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(vec![]),
        other => other?,
    };
    for entry in images.flatten() {
        if entry.path().join(FORGOTTEN).exists() {
            forgotten.push(entry);
        }
    }
    if forgotten.is_empty() {
        return Ok(vec![]);
    }
    let needed = needed(root)?;
    let mut gone = vec![];
    for entry in forgotten {
        let id = entry.file_name().to_str().and_then(|n| n.parse().ok()).map(ImageId);
        if id.is_some_and(|id| !needed.contains(&id)) {
            let to = root.join("trash").join(uuid::Uuid::new_v4().to_string());
            std::fs::rename(entry.path(), &to)?;
            gone.push(to);
        }
    }
    Ok(gone)
}

impl FilePool {
    /// The layers of a state; `None` when it is a plain one.
    pub(crate) fn layers(&self, state: &Path, record: &Record) -> Result<Option<Layers>> {
        let Some(image) = record.image else { return Ok(None) };
        let below = state.strip_prefix(&*self.root).ok().and_then(Path::to_str);
        let below = below.ok_or_else(|| Error::internal("the volume is out of reach", state.display()))?;
        let lower = format!("images/{image}/rootfs");
        Ok(Some(Layers { directory: self.root.to_path_buf(), lower, over: format!("{below}/over") }))
    }

    /// Begins a tree over an image in `work`; its record is written.
    pub(crate) async fn over_image(&self, work: &Path, image: ImageId, new: &NewVolume) -> Result<Record> {
        let record = Record {
            content: new.content,
            format: crate::Format::Directory,
            size: new.size,
            based: false,
            image: Some(image),
            moved: None,
            chain: vec![],
        };
        // Under the lock: who looks for images that nothing lies over finds this one's record.
        let _one = self.taking.lock().await;
        let (base, _) = self.taken(image, &new.source).await?;
        let (at, written, states) = (work.to_owned(), record.clone(), self.states.clone());
        blocking(move || {
            let mark = base.join(FORGOTTEN);
            if mark.exists() {
                std::fs::remove_file(mark)?;
            }
            states.make(&at)?;
            states.account(&at)?;
            prepare(&at, Some(&base.join("rootfs")))?;
            written.write(&at)
        })
        .await?;
        Ok(record)
    }

    /// Keeps a forgotten image for the volumes that lie over it; answers whether there are any.
    pub(crate) async fn keep_for_volumes(&self, image: ImageId) -> Result<bool> {
        if !self.layered {
            return Ok(false);
        }
        let root = self.root.clone();
        blocking(move || {
            let at = root.join("images").join(image.to_string());
            if !at.exists() || !needed(&root)?.contains(&image) {
                return Ok(false);
            }
            std::fs::write(at.join(FORGOTTEN), "")?;
            Ok(true)
        })
        .await
    }

    pub(crate) async fn open_layered(&self, volume: VolumeId, layers: Layers) -> Result<OpenTree> {
        let opened = self.opened.clone();
        blocking(move || {
            let mut all = opened.0.lock().unwrap_or_else(|e| e.into_inner());
            let held = match all.get(&volume).and_then(Weak::upgrade) {
                Some(held) => held,
                None => {
                    all.retain(|_, held| held.strong_count() > 0);
                    let held = Arc::new(Held::new(overlay::mount(&layers, true, None)?));
                    all.insert(volume, Arc::downgrade(&held));
                    held
                }
            };
            Ok(OpenTree { path: held.path(), guard: Some(Box::new(held)) })
        })
        .await
    }
}

/// The lower layer of an image: second names of its files, which never change.
pub(crate) fn take(from: &Path, to: &Path) -> Result<()> {
    let done = states::copy_tree(from, to, karst_host::fs::TreeMode::Names)?;
    if done.bytes > 0 {
        // Copies, on another file system than the image's: many roots will lie over them.
        rustix::fs::syncfs(karst_host::fs::open_dir(to)?).map_err(io::Error::from)?;
    }
    Ok(())
}
